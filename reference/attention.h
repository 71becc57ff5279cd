/// @file
/// The truth: paged MLA decode attention in double precision, with Eigen.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/problem.h"

namespace mla {

/// Result of the reference, in double. Rows that see nothing have out = 0 and lse = +inf.
struct ReferenceResult {
  std::vector<double> out;  ///< [batch, seqlen_q, num_heads_q, 512], or [rows, num_heads_q, 512]
  /// [batch, num_heads_q, seqlen_q], or [rows, num_heads_q]; natural logarithm.
  std::vector<double> lse;
};

/// One query token of one sequence, all heads.
struct QueryRow {
  int sequence = 0;  ///< 0 ... batch - 1
  int query = 0;     ///< 0 ... seqlen_q - 1
};

/// Decodes the whole batch. `tensors.out` and `tensors.lse` are ignored and may be null; the others
/// point to host memory. Uses `num_threads` threads (0: all cores). Besides the result it needs
/// memory for the scores of one sequence per thread.
/// @return kInvalidArgument for what validate() refuses, a null `result` or a negative
/// `num_threads`; kOutOfRange for a length or page id that validate_paging() refuses; kOutOfMemory.
/// On an error `result` is untouched.
Status reference_attention(const Problem& problem, const Tensors& tensors, ReferenceResult* result,
                           int num_threads = 0);

/// The same for chosen rows only, in the order given.
/// @return The same errors, and kOutOfRange for a row outside the batch.
Status reference_attention_rows(const Problem& problem, const Tensors& tensors,
                                std::span<const QueryRow> rows, ReferenceResult* result,
                                int num_threads = 0);

}  // namespace mla
