/// @file
/// The decode problem: shapes, tensors, and the checks on both. Every stage and the reference
/// compute the same function of these, and nothing else:
///
///     logit[t] = softmax_scale * <q, k_t>            k_t: 576 values of the cache
///     out      = sum_t softmax(logit)[t] * v_t       v_t: the first 512 values of k_t
///     lse      = ln sum_t exp(logit[t])
///
/// for each (sequence, query token, query head), over the tokens t that the row may see. This is
/// the absorbed form of multi-head latent attention (arXiv 2405.04434, section 2.1): multi-query
/// attention whose value is a prefix of its key.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reference/cache_format.h"
#include "reference/dtype.h"
#include "reference/paging.h"
#include "reference/status.h"

namespace mla {

/// Width of q and of a cache row: 512 latent + 64 rotary values.
inline constexpr int kHeadDimQK = 576;
/// Width of out: the latent part of a cache row.
inline constexpr int kHeadDimV = 512;

/// Most tokens that a row of a block table can describe, so that a token's index, and one tile more,
/// fit 32 bits.
inline constexpr int kMaxTokensPerSeq = 1 << 30;

/// Tokens of a grain: a decode that is split over blocks cuts a sequence between grains.
inline constexpr int kGrainTokens = 64;
/// How many grains hold `tokens` >= 0 tokens.
MLA_HOST_DEVICE constexpr int64_t grains_for(int64_t tokens) {
  return pages_for(tokens, kGrainTokens);
}

/// Most query rows of a sequence, seqlen_q * num_heads_q, so that a row's index, and one tile more,
/// fit 32 bits.
inline constexpr int64_t kMaxRowsPerSeq = int64_t{1} << 30;

/// Shapes and scalars of one decode call. All are known on the host; lengths and page ids are not:
/// they live in device memory (see Tensors).
struct Problem {
  DType dtype = DType::kBFloat16;  ///< Of q and out, and of a cache of 16 bits.
  /// What the cache holds; see cache_format.h. bf16 alone goes with the tile128 formats.
  CacheFormat cache_format = CacheFormat::k16Bit;
  /// Of fp8_tensor: what every code is multiplied by; finite and > 0. Of other formats: not read.
  float cache_scale = 1;
  int batch = 0;         ///< Sequences, >= 0. Without one there is nothing to decode: no error.
  int seqlen_q = 1;      ///< Query tokens per sequence, >= 1; seqlen_q * num_heads_q <= 2^30.
  int num_heads_q = 0;   ///< Query heads, a multiple of num_heads_kv.
  int num_heads_kv = 1;  ///< KV heads, >= 1. Query head j reads KV head j / group_size().
  int num_pages = 0;     ///< Pages in the cache, >= 1.
  int page_size = kDefaultPageSize;  ///< Tokens per page: 16, 32, 64, 128 or 256.
  int max_pages_per_seq = 0;         ///< Columns of the block table, >= 1; max_seqlen_k() <= 2^30.
  /// Factor on q.k before the exponential; finite and > 0. The language model defines it; it is not
  /// 576^-1/2.
  float softmax_scale = 0;
  /// Query i of s_q sees tokens 0 ... seqlen_k - s_q + i (aligned bottom-right).
  bool causal = false;
  /// For stages that split a sequence over blocks. A multiple of 64: a sequence is cut after every
  /// so many tokens, so that its result does not depend on the rest of the batch, to the bit. 0: it
  /// is cut where that balances the load best. Other stages are batch-invariant anyway.
  int fixed_split_tokens = 0;

  /// Query heads that share one KV head.
  MLA_HOST_DEVICE int group_size() const { return num_heads_q / num_heads_kv; }
  /// Query rows of one (sequence, KV head): row r is query token r / group_size(), query head
  /// head_kv * group_size() + r % group_size().
  MLA_HOST_DEVICE int rows_per_kv_head() const { return seqlen_q * group_size(); }
  /// Tokens of the longest sequence that the block table can describe.
  MLA_HOST_DEVICE int64_t max_seqlen_k() const {
    return static_cast<int64_t>(max_pages_per_seq) * page_size;
  }
  /// Tokens visible to query token `query` of a sequence with `seqlen_k` tokens; <= 0 means none.
  MLA_HOST_DEVICE int64_t visible_tokens(int64_t seqlen_k, int query) const {
    return causal ? seqlen_k - seqlen_q + query + 1 : seqlen_k;
  }

  /// Which page of its sequence holds a token.
  MLA_HOST_DEVICE int page_of(int token) const { return mla::page_of(token, page_size); }
  /// The token's row in that page.
  MLA_HOST_DEVICE int row_in_page(int token) const { return token & (page_size - 1); }

  /// Bytes of an element of the cache: 2, or 1 of a quantised one.
  MLA_HOST_DEVICE constexpr int cache_element_bytes() const {
    return is_quantised(cache_format) ? 1 : 2;
  }
  /// Elements of a cache row: 576 values, or the bytes of a quantised one.
  MLA_HOST_DEVICE constexpr int cache_row_elements() const {
    return has_tile_scales(cache_format) ? kTileRowBytes : kHeadDimQK;
  }
  /// Bytes of a cache row: 1152, 656 or 576.
  MLA_HOST_DEVICE constexpr int cache_row_bytes() const {
    return cache_row_elements() * cache_element_bytes();
  }

  /// Elements of each tensor if it is contiguous.
  int64_t q_elements() const { return int64_t{batch} * seqlen_q * num_heads_q * kHeadDimQK; }
  int64_t kv_elements() const {
    return int64_t{num_pages} * page_size * num_heads_kv * cache_row_elements();
  }
  int64_t block_table_elements() const { return int64_t{batch} * max_pages_per_seq; }
  int64_t out_elements() const { return int64_t{batch} * seqlen_q * num_heads_q * kHeadDimV; }
  int64_t lse_elements() const { return int64_t{batch} * num_heads_q * seqlen_q; }
};

/// A stride that says: as if the tensor were contiguous.
inline constexpr int64_t kContiguous = -1;

/// Elements from one sequence, query token or head to the next. The last dimension is contiguous.
struct RowStrides {
  int64_t batch = kContiguous, token = kContiguous, head = kContiguous;
};
/// Elements from one page, token of a page or KV head to the next; of a quantised cache that is
/// bytes. The last dimension is contiguous.
struct CacheStrides {
  int64_t page = kContiguous, token = kContiguous, head = kContiguous;
};

/// Pointers to one call's tensors and their strides, all on the machine that decodes (device memory
/// for a GPU, host memory for the reference and the GPU model). Strides are in elements, and matter
/// only where the dimension has two members or more.
///
/// q, kv_cache and out are 16-byte aligned, and so is each of their rows: their strides are multiples
/// of 8, those of a quantised cache, which count bytes, of 16. The others are 4-byte aligned. What is
/// read may overlap itself (a stride of 0 repeats a row); rows of out and lse overlap nothing. Bytes
/// between rows are neither read nor written.
struct Tensors {
  const void* q = nullptr;  ///< [batch, seqlen_q, num_heads_q, 576], dtype
  /// [num_pages, page_size, num_heads_kv, 576], dtype; of a quantised cache [..., 656] or [..., 576]
  /// bytes
  const void* kv_cache = nullptr;
  const int32_t* block_table = nullptr;  ///< [batch, max_pages_per_seq], page ids
  /// [batch], tokens per sequence, 0 ... max_seqlen_k(). A stage takes any other as the nearest of
  /// these; the reference and check_paging() refuse it.
  const int32_t* seqlens_k = nullptr;
  void* out = nullptr;  ///< [batch, seqlen_q, num_heads_q, 512], dtype
  /// [batch, num_heads_q, seqlen_q], natural logarithm, +inf for a row that sees nothing
  float* lse = nullptr;

  RowStrides q_strides = {};     ///< Of q.
  CacheStrides kv_strides = {};  ///< Of kv_cache.
  int64_t block_table_stride =
      kContiguous;              ///< From one sequence's row of block_table to the next.
  RowStrides out_strides = {};  ///< Of out.
  RowStrides lse_strides = {};  ///< Of lse.

  /// @name Places, in elements from the pointer
  /// For strides that with_strides() has filled in. Of a quantised cache in bytes.
  /// @{
  MLA_HOST_DEVICE int64_t q_place(int sequence, int query, int head) const {
    return place(q_strides, sequence, query, head);
  }
  MLA_HOST_DEVICE int64_t out_place(int sequence, int query, int head) const {
    return place(out_strides, sequence, query, head);
  }
  MLA_HOST_DEVICE int64_t lse_place(int sequence, int query, int head) const {
    return place(lse_strides, sequence, query, head);
  }
  MLA_HOST_DEVICE int64_t page_place(int64_t page, int row, int head_kv) const {
    return page * kv_strides.page + row * kv_strides.token + head_kv * kv_strides.head;
  }
  /// @}

  /// The sequence's row of the block table.
  MLA_HOST_DEVICE const int32_t* table_row(int sequence) const {
    return block_table + sequence * block_table_stride;
  }

 private:
  MLA_HOST_DEVICE static int64_t place(const RowStrides& strides, int sequence, int query,
                                       int head) {
    return sequence * strides.batch + query * strides.token + head * strides.head;
  }
};

/// Where the cache row of `token` is for KV head `head_kv`, in elements, in the sequence whose row of
/// the block table is `table_row`.
MLA_HOST_DEVICE inline int64_t cache_place(const Problem& problem, const Tensors& tensors,
                                           const int32_t* table_row, int token, int head_kv) {
  return tensors.page_place(table_row[problem.page_of(token)], problem.row_in_page(token), head_kv);
}

/// A length as a stage takes it: seqlens_k[sequence], or the nearest that the block table can describe.
MLA_HOST_DEVICE inline int clamped_length(const Problem& problem, int seqlen_k) {
  const int longest = problem.max_pages_per_seq * problem.page_size;
  return seqlen_k < 0 ? 0 : seqlen_k < longest ? seqlen_k : longest;
}

/// The same tensors with every stride filled in: kContiguous, and those of dimensions that have one
/// member, become what a contiguous tensor has. For a problem that validate() accepts.
Tensors with_strides(const Problem& problem, Tensors tensors);

/// Checks dimensions, dtype, cache format and scales. Costs nothing; every entry point calls it.
/// @return kInvalidArgument, naming the member, its value and what is allowed; or ok.
Status validate(const Problem& problem);

/// The same, and checks that no tensor is null or misaligned, and its strides. Does not follow the
/// pointers. Tensors without elements (batch = 0) may be anything.
/// @return kInvalidArgument, naming the tensor or stride, its value and what is allowed; or ok.
Status validate(const Problem& problem, const Tensors& tensors);

/// Checks the lengths against the block table, and the page ids that they use against the cache.
/// Host memory only; for device memory see stages/common/cache/paging_check.h.
/// @return kOutOfRange for the first length or page id that does not fit; kInvalidArgument for a
/// null pointer or a problem that validate() refuses; or ok.
/// @param block_table_stride  as in Tensors
Status validate_paging(const Problem& problem, const int32_t* block_table, const int32_t* seqlens_k,
                       int64_t block_table_stride = kContiguous);

}  // namespace mla
