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
  std::vector<double> lse;  ///< [batch, num_heads_q, seqlen_q], or [rows, num_heads_q]
};

/// One query token of one sequence, all heads.
struct QueryRow {
  int sequence = 0;
  int query = 0;
};

/// Decodes the whole batch. `tensors.out` and `tensors.lse` are ignored and may be null; the others
/// point to host memory. Uses `num_threads` threads (0: all cores) and memory proportional to one
/// sequence a thread, beside the result.
/// @return kInvalidArgument, kOutOfRange or kOutOfMemory; `result` is then
/// untouched.
Status reference_attention(const Problem& problem, const Tensors& tensors, ReferenceResult* result,
                           int num_threads = 0);

/// The same for chosen rows only, in the order given.
Status reference_attention_rows(const Problem& problem, const Tensors& tensors,
                                std::span<const QueryRow> rows, ReferenceResult* result,
                                int num_threads = 0);

}  // namespace mla
