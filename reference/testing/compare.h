/// @file
/// What counts as a right decode: the comparison that tests, bench and tools share.
///
/// compare_decode() judges by what a right kernel can lose: one that rounds P and out to 16 bits,
/// and computes all else in fp32. Write u for the type's unit roundoff, p for the weights of the
/// softmax, v for the rows of V, r for the reference's row. RowSize and out_size in
/// reference/attention.h give the sums. A right kernel's errors are:
///
///   rounding P     u sum p |v| at most. Over a row, u |r| where all weights round alike, and
///                  u sqrt(sum p^2 |v|^2) where rows of V have nothing in common: the larger of both
///   rounding out   u |r| at most; over the 512 elements of a row u |r| / 2, since few are at worst
///   fp32 logits    a weight is off by e = 8 2^-24 of the logits' size, so out by e sum p |v - r|
///   fp32 sums      2^-24 (8 + sqrt(tokens)) of what is added, as errors to either side add up;
///                  2^-29 tokens |r| for tensor cores, which round towards 0 every 16 tokens
///
/// An element may err by the sum of these. A row's squared L2 error may be the sum of their squares,
/// and two columns' worth more, since few columns that dominate a row do not average out; that of
/// the whole half the sum of the rows', and two rows' worth more. The production kernels' tolerances,
/// relative to the terms, are a ceiling. For lse only the fp32 terms are left: 2^-24 (48 of the
/// logits' size + 4 + 4 ln tokens + sqrt(tokens)). docs/testing.md has more.
///
/// An infinity is right beside a finite value of its sign from which rounding may overflow.
/// All comparisons are written so that NaN fails.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "reference/attention.h"
#include "reference/problem.h"

namespace mla {

/// Fixed tolerances, for results of inputs that are not at hand. They fit values of size 0.1.
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
/// These are for bf16: in fp16 an eighth of the error, whose square the cosines have. Results that are rounded before they
/// are merged, as those of several ranks, are judged by them: compare_decode() does not allow for that.
constexpr Tolerance merged_tolerance(DType dtype) {
  const Tolerance bf16 = kOutTolerance;
  if (dtype == DType::kBFloat16) return bf16;
  return {bf16.abs_tol / 8, bf16.rel_tol / 8, bf16.cos_tol / 64, bf16.row_cos_tol / 64};
}
/// The production kernels' for lse.
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
  int64_t nan_rows = 0;                    ///< Rows of the reference that have NaN.
  /// The largest error of an element, a row or the whole, as a part of its limit; more than 1 fails.
  double share = 0;
  std::string failure;  ///< Empty if ok; else what failed, where, with values.
  /// "NaN, as the reference: 12 rows"; empty if the reference has none.
  std::string nan_note() const;
};

/// Compares `actual` (16-bit patterns) with `expected`, each [rows, row_length], by fixed tolerances.
Comparison compare(DType dtype, std::span<const uint16_t> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance);
/// The same for fp32 values.
Comparison compare(std::span<const float> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance);

/// How out and lse of a decode compare with the reference.
struct DecodeComparison {
  Comparison out;  ///< [batch, seqlen_q, num_heads_q] rows of 512
  Comparison lse;  ///< [batch, num_heads_q, seqlen_q] rows of 1
  /// Whether both are right.
  bool ok() const { return out.ok && lse.ok; }
  /// "out: ..." and "lse: ...", for a test's message.
  std::string describe() const;
};
/// Compares `out` and `lse` of one decode of `problem`, on the host, with what the reference found
/// for the same inputs.
/// `rows`: empty, or the query rows that all three hold, each with all heads: [rows, num_heads_q, ...].
DecodeComparison compare_decode(const Problem& problem, std::span<const uint16_t> out,
                                std::span<const float> lse, const ReferenceResult& expected,
                                std::span<const QueryRow> rows = {});
/// The same for out alone, in fp32: rounded to the problem's type, or not.
Comparison compare_out(const Problem& problem, std::span<const float> out,
                       const ReferenceResult& expected, std::span<const QueryRow> rows = {});
/// The same for lse alone. A failure says if lse looks like a logarithm to base 2.
Comparison compare_lse(const Problem& problem, std::span<const float> lse,
                       const ReferenceResult& expected, std::span<const QueryRow> rows = {});

}  // namespace mla
