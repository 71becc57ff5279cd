/// @file
/// When a decode counts as right: the comparison that tests, bench and tools share.
///
/// Positions of +inf, -inf and NaN must match first. Then every element must be within abs_tol or
/// rel_tol, the cosine difference of the whole tensor within cos_tol, and that of every row of 512
/// within 1e-5. All comparisons are written so that NaN fails.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "reference/attention.h"
#include "reference/problem.h"

namespace mla {

/// |a - r| < abs_tol, or |a - r| / (|r| + 1e-6) < rel_tol; 1 - 2<a,r>/(<a,a> + <r,r>) < cos_tol.
struct Tolerance {
  double abs_tol;
  double rel_tol;
  double cos_tol;      ///< Of the whole tensor.
  double row_cos_tol;  ///< Of each row; infinity where rows are not compared.
};

/// The production kernels' own tolerances (FlashMLA, tests/test_flash_mla_dense_decoding.py), plus
/// the row criterion.
inline constexpr Tolerance kOutTolerance{8e-4, 2.01 / 128, 5e-6, 1e-5};
/// The same for lse.
inline constexpr Tolerance kLseTolerance{1e-6, 8.01 / 65536, 1e-7, __builtin_huge_val()};

/// What a comparison found. Prints as one line.
struct Comparison {
  bool ok = false;
  int64_t elements = 0;
  int64_t mismatches = 0;        ///< Elements outside tolerance, or special values out of place.
  int64_t first_mismatch = -1;   ///< Flat index, -1 if none.
  double max_abs_error = 0;      ///< Over finite elements.
  double relative_l2 = 0;        ///< |a - r| / |r| over finite elements.
  double cosine_difference = 0;  ///< Of the whole tensor.
  double worst_row_cosine_difference = 0;
  int64_t worst_row = -1;
  std::string failure;  ///< Empty if ok; else what failed, where, with values.
};

/// Compares `actual` (16-bit patterns) with `expected`; rows are runs of `row_length` elements.
Comparison compare(DType dtype, std::span<const uint16_t> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance);
/// Compares fp32 values with `expected`.
Comparison compare(std::span<const float> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance);

/// Compares out and lse of a decode on the host with the reference. ok only if both are.
struct DecodeComparison {
  Comparison out;
  Comparison lse;
  bool ok() const { return out.ok && lse.ok; }
  /// "out: ..." and "lse: ...", for a test's message.
  std::string describe() const;
};
/// Compares `out` and `lse` of one decode, each with its own tolerance.
DecodeComparison compare_decode(DType dtype, std::span<const uint16_t> out,
                                std::span<const float> lse, const ReferenceResult& expected);

}  // namespace mla
