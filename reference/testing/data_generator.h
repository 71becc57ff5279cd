/// @file
/// Test data: the one generator behind tests, bench and tools.
///
/// Every value is a pure function of (seed, place in the logical tensor), computed in integer
/// arithmetic and exactly rounded operations only, so a seed gives the same bits on the host, under
/// the GPU model and on a GPU, and one sequence can be made without the others.
///
/// "N(0,1)/10" is an Irwin-Hall sum: twelve uniform 16-bit draws, minus their mean. Its mean is 0
/// and its variance 1 (before the division by 10) to one part in 2^32; its excess kurtosis is -0.1
/// where a normal's is 0, and its tails are lighter: |z| > 3 has probability 2.0e-3
/// (normal: 2.7e-3), |z| > 4 has 1.7e-5 (6.3e-5), |z| > 6 never happens. The clamp to +-1,
/// ten standard deviations out, therefore never acts and is not in the code.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "reference/counter_random.h"
#include "reference/float16_bits.h"
#include "reference/problem.h"
#include "reference/quantise.h"

namespace mla {

/// What q and the cache hold; see docs/testing.md for why flat data alone proves little.
enum class DataKind {
  kFlat,  ///< N(0,1)/10, clamped to +-1: softmax is almost a mean.
  /// The same, with a few tokens per sequence that dominate the softmax: losing one shows.
  kNeedles,
  /// Cache columns 0-511 hold +-0, subnormals and huge values (65504 and half of it in fp16, 2^100
  /// and 2^99 in bf16; huge values of one column share a sign, so that sums do not cancel); q is 0
  /// there, and the other 64 columns are flat, so logits are ordinary. s_k * max|V| < 3e38 up to
  /// 2^27 tokens.
  kExtremeValues,
  /// Columns 512-575: in a row of q all are +2^9, or all are -2^9 (2^7 for odd seeds, whose scale
  /// is larger); in the cache they are +-2^3. In the other columns q is 0 and the cache flat.
  /// Logits are then exact in fp32 before the scale, spread over +-10923 (+-8863), and differ by 0
  /// or at least 277. Of fp8_tensor they are all of this times one factor near 1.
  kExtremeLogits,
  /// Flat, but each 128 of cache columns 0-511 times a power of two of their own, 2^-8 ... 2^8, drawn
  /// for each token and KV head: scales of a quantised cache's tiles differ by it from token to token
  /// and from tile to tile.
  kScaledTiles,
  /// q is 0 in columns 0-511, where the cache is flat times 2^-4 in tokens 0-63, 2^0 in the next 64, 2^4,
  /// ..., and 2^24 from token 448 on; in odd sequences from 2^24 down to 2^-4; in fp16 2^16 at most. The
  /// other columns are flat, so logits are ordinary: scales of a quantised cache grow past 1, or fall,
  /// while a sequence is read.
  kGrowingValues,
};
/// All of them, in order.
inline constexpr DataKind kDataKinds[] = {DataKind::kFlat,          DataKind::kNeedles,
                                          DataKind::kExtremeValues, DataKind::kExtremeLogits,
                                          DataKind::kScaledTiles,   DataKind::kGrowingValues};
/// "flat", "needles", "extreme-values", "extreme-logits", "scaled-tiles", "growing-values"
const char* to_string(DataKind kind);

/// A decode problem by its shape, as test lists name it.
struct DecodeCase {
  DType dtype = DType::kBFloat16;  ///< Of q, the cache and out.
  int batch = 1;                   ///< Sequences.
  int seqlen_q = 1;                ///< Query tokens per sequence.
  int seqlen_k = 64;               ///< Tokens of every sequence, or their mean if variable_lengths.
  int num_heads_q = 1;             ///< Query heads.
  int num_heads_kv = 1;            ///< KV heads.
  bool variable_lengths = false;   ///< Lengths max(N(seqlen_k, seqlen_k / 2), seqlen_q).
  double empty_fraction = 0;       ///< Each sequence is empty (length 0) with this probability.
  bool causal = false;             ///< As in Problem.
  int fixed_split_tokens = 0;      ///< As in Problem: batch-invariant if not 0.
  int page_size = kDefaultPageSize;  ///< Tokens per page.
  bool strided = false;  ///< Tensors with strides of their own and gaps between rows: see Layout.
  DataKind data = DataKind::kFlat;  ///< What q and the cache hold.
  uint64_t seed = 0;                ///< Even: scale 576^-1/2; odd: 0.135234 (DeepSeek-V3's).
  float softmax_scale = 0;          ///< If not 0: the scale, whatever the seed.
  /// If not empty: the lengths themselves; their number is the batch.
  std::vector<int32_t> lengths;
  /// How the cache keeps the values; a quantised cache holds the quantised ones of the 16-bit cache
  /// that the same case has.
  CacheFormat cache_format = CacheFormat::k16Bit;
  /// Of fp8_tensor: the scale, if not 0; else the least, by `scale_rule`, that no value of the data
  /// exceeds.
  float cache_scale = 0;
  ScaleRule scale_rule = ScaleRule::kLargest;  ///< Of a quantised cache.

  /// "bf16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 var causal needles seed=7"
  std::string name() const;
};

/// One dominant token.
struct Needle {
  int32_t token;  ///< Its place in its sequence.
  uint16_t bits;  ///< Column 575 of its cache row (of every KV head), as a 16-bit pattern.
};

/// What unused entries of the block table hold: no cache has this page.
inline constexpr int32_t kGarbagePage = 2147480000;
/// Pages of the cache that no sequence owns.
inline constexpr int kSparePages = 3;

/// Where the tensors of a case lie in the buffers that hold them.
///
/// A case that is not strided has contiguous tensors, each alone in its buffer. A strided one has what
/// engines have: gaps between rows, tokens, pages and sequences; KV heads outside the tokens of a page;
/// heads outside tokens in out, inside them in lse; columns of the block table that are another's; and
/// a block table and lengths that begin 4 bytes into their buffers.
struct Layout {
  Tensors strides;  ///< Every stride; the pointers are null.
  /// Elements; of a quantised kv_cache bytes.
  int64_t q = 0, kv_cache = 0, block_table = 0, seqlens_k = 0, out = 0, lse = 0;
  int64_t begin = 0;  ///< Of block_table and of seqlens_k, in their buffers.

  /// The tensors in these buffers.
  Tensors tensors(const void* q_buffer, const void* kv_buffer, const int32_t* table_buffer,
                  const int32_t* length_buffer, void* out_buffer, float* lse_buffer) const;
};
/// Of a problem that validate() accepts.
Layout layout_of(const Problem& problem, bool strided);

/// A case with its small tables filled in: everything but q and the cache.
struct DataSet {
  DecodeCase spec;                   ///< What it was made from.
  Problem problem;                   ///< The problem it makes.
  std::vector<int32_t> seqlens_k;    ///< [batch]
  std::vector<int32_t> block_table;  ///< [batch, max_pages_per_seq]; unused entries: kGarbagePage
  /// [num_pages]: the sequence that owns a page, -1 for an unused one
  std::vector<int32_t> page_sequence;
  /// [num_pages]: which page of that sequence it is, -1 for an unused one
  std::vector<int32_t> page_position;
  std::vector<Needle> needles;        ///< All sequences' needles, by sequence, then by token
  std::vector<int32_t> needle_begin;  ///< [batch + 1], offsets into `needles`
  int64_t total_tokens() const;       ///< Sum of seqlens_k
  Layout layout() const;              ///< layout_of() the problem.
  /// [layout().block_table] The block table as its buffer holds it; kGarbagePage in gaps.
  std::vector<int32_t> table_buffer() const;
  /// [layout().seqlens_k] The lengths as their buffer holds them; -1 in the gap.
  std::vector<int32_t> length_buffer() const;
};

/// @name Outputs in their buffers
/// @{

/// out [batch, seqlen_q, num_heads_q, 512], contiguous.
std::vector<uint16_t> gather_out(const Problem& problem, const Layout& layout,
                                 std::span<const uint16_t> buffer);
/// lse [batch, num_heads_q, seqlen_q], contiguous.
std::vector<float> gather_lse(const Problem& problem, const Layout& layout,
                              std::span<const float> buffer);
/// Whether all that lies between the rows of out and lse still is what the buffers were filled with.
bool gaps_hold(const Problem& problem, const Layout& layout, std::span<const uint16_t> out,
               uint16_t out_pattern, std::span<const float> lse, float lse_pattern);
/// @}

/// The case as the command-line tools spell it: "h64x2_q2_k140+20_causal_fp16", every length listed.
/// With its data and its seed it is the same case again, but for a scale_rule or a cache_scale.
std::string shape_name(const DataSet& data);

/// Draws lengths, the page permutation and the needles of a case. The cache has kSparePages pages
/// more than the sequences need; these hold NaN. The block table has at least one unused entry per
/// sequence, unless one has 2^30 tokens. A spec outside the contract gives a `problem` that validate() refuses, and no tables
/// to generate from.
DataSet make_data_set(const DecodeCase& spec);

/// A case's buffers on the host, as 16-bit patterns, with outputs and gaps full of NaN. Contiguous
/// unless the case is strided.
struct HostTensors {
  std::vector<uint16_t> q;  ///< [batch, seqlen_q, num_heads_q, 576]
  /// [num_pages, page_size, num_heads_kv, 576]; NaN past every sequence's end. Empty if the cache is
  /// quantised.
  std::vector<uint16_t> kv_cache;
  std::vector<int32_t> block_table;  ///< [batch, max_pages_per_seq]
  std::vector<int32_t> seqlens_k;    ///< [batch]
  std::vector<uint16_t> out;         ///< [batch, seqlen_q, num_heads_q, 512], NaN
  std::vector<float> lse;            ///< [batch, num_heads_q, seqlen_q], NaN
  /// [num_pages, page_size, num_heads_kv, 656 or 576], the bytes of a quantised cache; 0xff past every
  /// sequence's end, so that e4m3 codes, scales and rotary columns are NaN there
  std::vector<uint8_t> quantised_cache;
  /// The tensors in these buffers.
  Tensors tensors(const DataSet& data);
  /// Fills out and lse with NaN (again), so that an element a kernel does not write shows.
  void poison_outputs(DType dtype);
};
/// Fills the tensors of a data set whose problem validate() accepts, on `num_threads` threads (0:
/// all cores). Throws std::bad_alloc if memory is short.
HostTensors generate(const DataSet& data, int num_threads = 0);

/// @name Element functions
/// What `generate` calls for every element; a GPU kernel calls them too. Defined below.
/// @{

/// Bits of q[sequence, query, head, column].
MLA_HOST_DEVICE inline uint16_t q_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                       int query, int head, int column);
/// Bits of the cache row of `token`, before needles: column 575 is 0 on needle data.
MLA_HOST_DEVICE inline uint16_t kv_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                        int64_t token, int head_kv, int column);
/// The value of that element, needles included: what a quantised cache is made of.
/// @param needles, count  those of the sequence
MLA_HOST_DEVICE inline float kv_value(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                      int64_t token, int head_kv, int column, const Needle* needles,
                                      int count);
/// @}

/// The parts of the element functions. Public so that tests can check each against its definition.
namespace generator {

/// Which tensor (or table) a draw is for: keeps their streams apart.
enum class Stream : uint64_t { kQ = 1, kCache, kColumnSign, kLength, kEmpty, kPages, kNeedles };

using counter_random::draw;
using counter_random::normal;

/// Where the stream of one row starts.
MLA_HOST_DEVICE constexpr uint64_t row_key(uint64_t seed, Stream stream, int64_t sequence,
                                           int64_t position, int64_t head) {
  return counter_random::row_key(seed, static_cast<uint64_t>(stream), sequence, position, head);
}

/// N(0,1)/10: an integer below 2^24 in magnitude, so the conversion is exact, then one rounded
/// product.
MLA_HOST_DEVICE inline float normal_tenth(uint64_t key, int column) {
  return static_cast<float>(normal(key, column)) * (0.1f / 65536);
}

/// Rounds a finite float to 16 bits, to nearest, ties to even. By hand, because the host's and the
/// device's conversions differ in name and speed, and must not differ in bits.
MLA_HOST_DEVICE inline uint16_t round_to_16_bits(DType dtype, float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::kBFloat16) {
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
  const uint32_t sign = (bits >> 16) & 0x8000;
  const int exponent = static_cast<int>((bits >> 23) & 0xFF) - 127;
  const uint32_t significand = (bits & 0x7FFFFF) | 0x800000;  // 24 bits; 11 stay, fewer below 2^-14
  const int shift = exponent >= -14 ? 13 : -1 - exponent;
  if (shift > 24) return static_cast<uint16_t>(sign);  // below half of the least subnormal
  const uint32_t half_less_one = (1u << (shift - 1)) - 1;
  const uint32_t rounded = (significand + half_less_one + ((significand >> shift) & 1)) >> shift;
  // A normal's leading one adds itself to the exponent, and so does a carry out of the rounding.
  const uint32_t magnitude =
      (exponent >= -14 ? static_cast<uint32_t>(exponent + 14) << 10 : 0) + rounded;
  return static_cast<uint16_t>(sign | (magnitude < 0x7C00 ? magnitude : 0x7C00));
}

/// Bits of +-2^exponent.
MLA_HOST_DEVICE constexpr uint16_t power_of_two(DType dtype, int exponent, bool negative) {
  const int biased = dtype == DType::kBFloat16 ? (exponent + 127) << 7 : (exponent + 15) << 10;
  return static_cast<uint16_t>(biased | (negative ? 0x8000 : 0));
}

/// Columns 0-511 of the cache with DataKind::kExtremeValues. One quarter holds the largest value,
/// one half of it, one a zero of either sign, and one a subnormal of either sign.
MLA_HOST_DEVICE inline uint16_t extreme_value(uint64_t seed, DType dtype, int sequence, int head_kv,
                                              uint64_t key, int column) {
  const uint64_t bits = draw(key, column);
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 15;
  const bool is_bf16 = dtype == DType::kBFloat16;
  if ((bits & 3) == 2) return static_cast<uint16_t>(sign);
  if ((bits & 3) == 3) {
    const uint32_t subnormals = is_bf16 ? 0x7F : 0x3FF;
    return static_cast<uint16_t>(sign | (1 + (bits >> 2) % subnormals));
  }
  const uint64_t column_key = row_key(seed, Stream::kColumnSign, sequence, 0, head_kv);
  const uint32_t column_sign = static_cast<uint32_t>(draw(column_key, column) >> 63) << 15;
  const uint32_t largest = is_bf16 ? 0x7180 : 0x7BFF;  // 2^100, 65504
  const uint32_t half = is_bf16 ? 0x7100 : 0x77FF;
  return static_cast<uint16_t>(column_sign | ((bits & 3) == 0 ? largest : half));
}

/// Columns 512-575 of the cache with DataKind::kExtremeLogits: `level` of the 64 are +8, the others
/// -8. `level` is uniform in 0 ... 64, and the first positive column is drawn, so that
/// q.k = +-2^9 * 8 * (2 level - 64), always exact.
MLA_HOST_DEVICE inline uint16_t extreme_logit_value(DType dtype, uint64_t key, int column) {
  const uint64_t bits = draw(key, 3 * int64_t{kHeadDimQK});  // past every draw of the flat columns
  const int level = static_cast<int>((bits >> 32) % 65);
  const int place = (column + static_cast<int>(bits & 63)) & 63;
  return power_of_two(dtype, 3, place >= level);
}

/// What DataKind::kScaledTiles multiplies a tile's 128 columns by.
MLA_HOST_DEVICE inline float tile_factor(uint64_t key, int tile) {
  const uint64_t bits = draw(key, 3 * int64_t{kHeadDimQK});  // past every draw of the flat columns
  const int exponent = static_cast<int>((bits >> (16 * tile) & 0xFFFF) % 17) - 8;
  return exponent < 0 ? 1.0f / static_cast<float>(1 << -exponent)
                      : static_cast<float>(1 << exponent);
}

/// What DataKind::kGrowingValues multiplies a token's columns 0-511 by.
MLA_HOST_DEVICE inline float growing_factor(DType dtype, int sequence, int64_t token) {
  const int step = token < 448 ? static_cast<int>(token / 64) : 7;
  const int exponent = (sequence % 2 == 0 ? 4 * step : 28 - 4 * step) - 4;
  if (exponent < 0) return 1.0f / 16;
  return static_cast<float>(1 << (dtype == DType::kFloat16 && exponent > 16 ? 16 : exponent));
}

}  // namespace generator

MLA_HOST_DEVICE inline uint16_t q_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                       int query, int head, int column) {
  const uint64_t key = generator::row_key(seed, generator::Stream::kQ, sequence, query, head);
  if (kind == DataKind::kNeedles && column == kHeadDimQK - 1) {
    return generator::power_of_two(dtype, 3, false);
  }
  const bool is_rotary_alone = kind == DataKind::kExtremeValues || kind == DataKind::kGrowingValues;
  if (is_rotary_alone && column < kHeadDimV) return 0;
  if (kind == DataKind::kExtremeLogits) {
    if (column < kHeadDimV) return 0;
    return generator::power_of_two(dtype, seed % 2 == 0 ? 9 : 7, generator::draw(key, 0) >> 63);
  }
  return generator::round_to_16_bits(dtype, generator::normal_tenth(key, column));
}

MLA_HOST_DEVICE inline uint16_t kv_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                        int64_t token, int head_kv, int column) {
  const uint64_t key =
      generator::row_key(seed, generator::Stream::kCache, sequence, token, head_kv);
  if (kind == DataKind::kNeedles && column == kHeadDimQK - 1) return 0;
  if (kind == DataKind::kExtremeValues && column < kHeadDimV) {
    return generator::extreme_value(seed, dtype, sequence, head_kv, key, column);
  }
  if (kind == DataKind::kExtremeLogits && column >= kHeadDimV) {
    return generator::extreme_logit_value(dtype, key, column);
  }
  float value = generator::normal_tenth(key, column);
  if (kind == DataKind::kScaledTiles && column < kHeadDimV) {
    value *= generator::tile_factor(key, column / kTileColumns);
  }
  if (kind == DataKind::kGrowingValues && column < kHeadDimV) {
    value *= generator::growing_factor(dtype, sequence, token);
  }
  return generator::round_to_16_bits(dtype, value);
}

MLA_HOST_DEVICE inline float kv_value(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                      int64_t token, int head_kv, int column, const Needle* needles,
                                      int count) {
  uint16_t bits = kv_bits(seed, dtype, kind, sequence, token, head_kv, column);
  for (int n = 0; column == kHeadDimQK - 1 && n < count; ++n) {
    if (needles[n].token == token) bits = needles[n].bits;
  }
  return to_float(dtype, bits);
}

}  // namespace mla
