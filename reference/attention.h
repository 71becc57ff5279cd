/// @file
/// The truth: paged MLA decode attention in double precision, with Eigen. Of a quantised cache it takes
/// what the cache says, exactly: quantising is no error of a decode.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "reference/problem.h"

namespace mla {

/// The unit roundoff u of a 16-bit type: rounding x to it costs at most u |x|, unless x is subnormal.
MLA_HOST_DEVICE constexpr double unit_roundoff(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

/// The smallest normal number of a 16-bit type.
MLA_HOST_DEVICE constexpr double smallest_normal(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-126 : 0x1p-14;
}

/// Rounding p, a weight relative to its row's largest, to 16 bits costs at most u times this: p
/// where p is a normal number, the smallest normal number below it, and p / u where p becomes 0.
MLA_HOST_DEVICE constexpr double rounded_size(DType dtype, double p) {
  const double normal = smallest_normal(dtype);
  if (p >= normal) return p;
  const double own = p / unit_roundoff(dtype);
  return own < normal ? own : normal;
}

/// How large the terms of one row's result are: what the errors of a right decode grow with. With p
/// the weights of the softmax, and v the rows of V. All 0 for a row that sees nothing.
struct RowSize {
  double tokens = 0;  ///< How many the row sees.
  /// What no logit exceeds: softmax_scale times the lesser of |q| max |k| and sum |q_c| max |k_c|.
  double logit = 0;
  double rounding = 0;  ///< sqrt(sum p^2 |v|^2), plus sum rounded_size(p) |v| over subnormal p.
  double spread = 0;    ///< sqrt(sum p |v - out|^2)
};

/// Result of the reference, in double. Rows that see nothing have out = 0 and lse = +inf.
struct ReferenceResult {
  std::vector<double> out;  ///< [batch, seqlen_q, num_heads_q, 512], or [rows, num_heads_q, 512]
  /// [batch, num_heads_q, seqlen_q], or [rows, num_heads_q]; natural logarithm.
  std::vector<double> lse;
  std::vector<double> out_size = {};   ///< As out: sum rounded_size(p) |v|, so at least |out|.
  std::vector<RowSize> row_size = {};  ///< Of each row of out.
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
