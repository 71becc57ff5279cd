/// @file
/// Test data: the one generator behind tests, bench and tools.
///
/// Every value is a pure function of (seed, place in the logical tensor), computed in integer arithmetic and
/// exactly rounded operations only, so a seed gives the same bits on the host, under the GPU model and on a GPU,
/// and one sequence can be made without the others.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "reference/problem.h"

namespace mla {

/// What q and the cache hold; see docs/testing.md for why flat data alone proves little.
enum class DataKind {
  kFlat,     ///< N(0,1)/10, clamped to +-1: softmax is almost a mean.
  kNeedles,  ///< The same with a few tokens a sequence that dominate the softmax, so that losing one shows.
};

/// A decode problem by its shape, as test lists name it.
struct DecodeCase {
  DType dtype = DType::kBFloat16;
  int batch = 1;
  int seqlen_q = 1;
  int seqlen_k = 64;  ///< Length of every sequence, or the mean if variable_lengths.
  int num_heads_q = 1;
  int num_heads_kv = 1;
  bool variable_lengths = false;  ///< Lengths max(N(seqlen_k, seqlen_k / 2), seqlen_q).
  double empty_fraction = 0;      ///< Each sequence is empty (length 0) with this probability.
  bool causal = false;
  DataKind data = DataKind::kFlat;
  uint64_t seed = 0;  ///< Even: scale 576^-1/2; odd: 0.135234 (DeepSeek-V3's).
  std::vector<int32_t> lengths;  ///< If not empty: the lengths themselves, [batch].

  /// "bf16 b=2 s_q=1 s_k=140 h_q=64 h_kv=2 var causal needles seed=7"
  std::string name() const;
};

/// One dominant token.
struct Needle {
  int32_t token;
  uint16_t bits;  ///< Column 575 of its cache row, as a 16-bit pattern.
};

/// A case with its small tables filled in: everything but q and the cache.
struct DataSet {
  DecodeCase spec;
  Problem problem;
  std::vector<int32_t> seqlens_k;      ///< [batch]
  std::vector<int32_t> block_table;    ///< [batch, max_pages_per_seq]; unused slots hold 2147480000
  std::vector<int32_t> page_sequence;  ///< [num_pages]: the sequence that owns a page, -1 for an unused one
  std::vector<int32_t> page_position;  ///< [num_pages]: which page of that sequence it is
  std::vector<Needle> needles;         ///< All sequences' needles, by sequence, then by token
  std::vector<int32_t> needle_begin;   ///< [batch + 1], offsets into `needles`
  int64_t total_tokens() const;        ///< Sum of seqlens_k
};

/// Draws lengths, the page permutation and the needles of a case. The cache has a few pages more than the sequences
/// need, all of which hold NaN.
DataSet make_data_set(const DecodeCase& spec);

/// The bulk tensors on the host, as 16-bit patterns, with outputs full of NaN.
struct HostTensors {
  std::vector<uint16_t> q;         ///< [batch, seqlen_q, num_heads_q, 576]
  std::vector<uint16_t> kv_cache;  ///< [num_pages, 64, num_heads_kv, 576]; NaN past every sequence's end
  std::vector<uint16_t> out;       ///< [batch, seqlen_q, num_heads_q, 512], NaN
  std::vector<float> lse;          ///< [batch, num_heads_q, seqlen_q], NaN
  /// Pointers to these and to the tables of `data`.
  Tensors tensors(const DataSet& data);
};
HostTensors generate(const DataSet& data);

/// @name Element functions
/// What `generate` calls for every element; a GPU kernel calls them too. `is_bf16` chooses the rounding.
/// @{

/// Bits of q[sequence, query, head, column].
MLA_HOST_DEVICE inline uint16_t q_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                       int query, int head, int column);
/// Bits of the cache row of `token`, before needles: column 575 is 0 on needle data.
MLA_HOST_DEVICE inline uint16_t kv_bits(uint64_t seed, DType dtype, DataKind kind, int sequence,
                                        int64_t token, int head_kv, int column);
/// The bit pattern of NaN in `dtype`.
MLA_HOST_DEVICE constexpr uint16_t nan_bits(DType dtype);
/// @}

}  // namespace mla
