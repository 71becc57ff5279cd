/// @file
/// What counts as a right decode: the comparison that tests, bench and tools share.
///
/// Positions of +inf, -inf and NaN must match first. Then every element must be within abs_tol or
/// rel_tol, the cosine difference of the whole tensor within cos_tol, and that of every row within
/// row_cos_tol. All comparisons are written so that NaN fails.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "reference/attention.h"
#include "reference/problem.h"

namespace mla {

/// |a - r| < abs_tol, or |a - r| / (|r| + 1e-6) < rel_tol; 1 - 2<a,r>/(<a,a> + <r,r>) < cos_tol.
struct Tolerance {
  double abs_tol;      ///< Bound on |a - r| ...
  double rel_tol;      ///< ... or on |a - r| / (|r| + 1e-6), per element.
  double cos_tol;      ///< Bound on the cosine difference of the whole tensor.
  double row_cos_tol;  ///< The same per row; infinity where rows are not compared.
};

/// The production kernels' own tolerances (FlashMLA, tests/test_flash_mla_dense_decoding.py), plus
/// the row criterion.
inline constexpr Tolerance kOutTolerance{8e-4, 2.01 / 128, 5e-6, 1e-5};
/// The same for lse.
inline constexpr Tolerance kLseTolerance{1e-6, 8.01 / 65536, 1e-7, __builtin_huge_val()};

/// What a comparison found. Prints as one line.
struct Comparison {
  bool ok = false;               ///< Whether `actual` counts as right.
  int64_t elements = 0;          ///< How many were compared.
  int64_t mismatches = 0;        ///< Elements outside tolerance, or special values out of place.
  int64_t first_mismatch = -1;   ///< Flat index, -1 if none.
  double max_abs_error = 0;      ///< Over finite elements.
  double relative_l2 = 0;        ///< |a - r| / |r| over finite elements.
  double cosine_difference = 0;  ///< Of the whole tensor.
  double worst_row_cosine_difference = 0;  ///< Over rows; 0 where rows are not compared.
  int64_t worst_row = -1;                  ///< The row with it, -1 if none.
  std::string failure;                     ///< Empty if ok; else what failed, where, with values.
};

/// Names a row in a message: "sequence 1, query token 0, head 5". Empty: "row 5".
using RowName = std::function<std::string(int64_t row)>;
/// The names of the rows of out [batch, seqlen_q, num_heads_q, 512].
RowName out_row_name(const Problem& problem);
/// The names of the rows of lse [batch, num_heads_q, seqlen_q].
RowName lse_row_name(const Problem& problem);

/// Compares `actual` (16-bit patterns) with `expected`, each [rows, row_length].
Comparison compare(DType dtype, std::span<const uint16_t> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance, const RowName& name = {});
/// The same for fp32 values.
Comparison compare(std::span<const float> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance, const RowName& name = {});

/// How out and lse of a decode compare with the reference.
struct DecodeComparison {
  Comparison out;  ///< [batch, seqlen_q, num_heads_q] rows of 512
  Comparison lse;  ///< [batch, num_heads_q, seqlen_q] rows of 1
  /// Whether both are right.
  bool ok() const { return out.ok && lse.ok; }
  /// "out: ..." and "lse: ...", for a test's message.
  std::string describe() const;
};
/// Compares `out` and `lse` of one decode of `problem`, on the host, each with its own tolerance.
/// `rows`: empty, or the query rows that all three hold, each with all heads: [rows, num_heads_q, ...].
DecodeComparison compare_decode(const Problem& problem, std::span<const uint16_t> out,
                                std::span<const float> lse, const ReferenceResult& expected,
                                std::span<const QueryRow> rows = {});

}  // namespace mla
