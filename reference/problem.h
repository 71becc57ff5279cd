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

#include "reference/float16.h"
#include "reference/paging.h"
#include "reference/status.h"

namespace mla {

/// Width of q and of a cache row: 512 latent + 64 rotary values.
inline constexpr int kHeadDimQK = 576;
/// Width of out: the latent part of a cache row.
inline constexpr int kHeadDimV = 512;

/// Longest row of a block table: 2^30 tokens, so that a token's index, and one tile more, fit 32
/// bits.
inline constexpr int kMaxPagesPerSeq = (1 << 30) / kPageSize;

/// Most query rows of a sequence, seqlen_q * num_heads_q, so that a row's index, and one tile more,
/// fit 32 bits.
inline constexpr int64_t kMaxRowsPerSeq = int64_t{1} << 30;

/// Shapes and scalars of one decode call. All are known on the host; lengths and page ids are not:
/// they live in device memory (see Tensors).
struct Problem {
  DType dtype = DType::kBFloat16;
  int batch = 0;              ///< Sequences, >= 1.
  int seqlen_q = 1;           ///< Query tokens per sequence, >= 1; seqlen_q * num_heads_q <= 2^30.
  int num_heads_q = 0;        ///< Query heads, a multiple of num_heads_kv.
  int num_heads_kv = 1;       ///< KV heads, >= 1. Query head j reads KV head j / group_size().
  int num_pages = 0;          ///< Pages in the cache, >= 1.
  int max_pages_per_seq = 0;  ///< Columns of the block table, >= 1, <= kMaxPagesPerSeq.
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
    return static_cast<int64_t>(max_pages_per_seq) * kPageSize;
  }
  /// Tokens visible to query token `query` of a sequence with `seqlen_k` tokens; <= 0 means none.
  MLA_HOST_DEVICE int64_t visible_tokens(int64_t seqlen_k, int query) const {
    return causal ? seqlen_k - seqlen_q + query + 1 : seqlen_k;
  }

  /// Elements of each tensor, padding included.
  int64_t q_elements() const { return int64_t{batch} * seqlen_q * num_heads_q * kHeadDimQK; }
  int64_t kv_elements() const { return int64_t{num_pages} * kPageSize * num_heads_kv * kHeadDimQK; }
  int64_t block_table_elements() const { return int64_t{batch} * max_pages_per_seq; }
  int64_t out_elements() const { return int64_t{batch} * seqlen_q * num_heads_q * kHeadDimV; }
  int64_t lse_elements() const { return int64_t{batch} * num_heads_q * seqlen_q; }
};

/// Pointers to one call's tensors, all contiguous and 16-byte aligned, all on the machine that
/// decodes (device memory for a GPU, host memory for the reference and the GPU model).
/// Outputs and workspace overlap nothing else.
struct Tensors {
  const void* q = nullptr;               ///< [batch, seqlen_q, num_heads_q, 576], dtype
  const void* kv_cache = nullptr;        ///< [num_pages, 64, num_heads_kv, 576], dtype
  const int32_t* block_table = nullptr;  ///< [batch, max_pages_per_seq], page ids
  const int32_t* seqlens_k = nullptr;    ///< [batch], tokens per sequence, 0 ... max_seqlen_k()
  void* out = nullptr;                   ///< [batch, seqlen_q, num_heads_q, 512], dtype
  /// [batch, num_heads_q, seqlen_q], natural logarithm, +inf for a row that sees nothing
  float* lse = nullptr;
};

/// Checks dimensions, dtype and scale. Costs nothing; every entry point calls it.
/// @return kInvalidArgument, naming the member, its value and what is allowed; or ok.
Status validate(const Problem& problem);

/// The same, and checks that no tensor is null or misaligned. Does not follow the pointers.
/// @return kInvalidArgument or ok.
Status validate(const Problem& problem, const Tensors& tensors);

/// Checks the lengths against the block table, and the page ids that they use against the cache.
/// Host memory only; for device memory see stages/common/cache/paging_check.h.
/// @return kOutOfRange for the first length or page id that does not fit; kInvalidArgument for a
/// null pointer or a problem that validate() refuses; or ok.
Status validate_paging(const Problem& problem, const int32_t* block_table,
                       const int32_t* seqlens_k);

}  // namespace mla
