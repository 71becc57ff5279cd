#include "reference/testing/compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>

#include "reference/float16.h"
#include "reference/parallel_for.h"

namespace mla {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Names a row in a message: "sequence 1, query token 0, head 5". Empty: "row 5".
using RowName = std::function<std::string(int64_t row)>;

/// What one task, some rows, adds to a Comparison. Tasks are of fixed size and merged in order, so
/// that the result does not depend on the number of threads.
struct Partial {
  int64_t mismatches = 0;
  int64_t nan_rows = 0;
  int64_t first_special = -1;  ///< First element where NaN or an infinity is not matched.
  int64_t first_beyond = -1;   ///< First finite element beyond its limit.
  double max_abs_error = 0;
  double share = 0;   ///< The largest of an element.
  double sum_dd = 0;  ///< Sums over finite elements: (a - r)^2, a^2, r^2.
  double sum_aa = 0;
  double sum_rr = 0;
  double sum_limits = 0;  ///< Of the rows' squared limits.
  double largest_limit = 0;
  struct Row {
    int64_t index = -1;
    double share = -1;
    double sum_dd = 0, sum_aa = 0, sum_rr = 0, limit_square = 0;
  } worst;  ///< The row with the largest share.
};

/// 1 - 2<a,r>/(<a,a> + <r,r>), written as <a-r,a-r>/(<a,a> + <r,r>): the same, without the
/// cancellation. Two zero vectors are equal; a zero vector and another differ by 1.
double cosine_difference(double sum_dd, double sum_aa, double sum_rr) {
  const double denominator = sum_aa + sum_rr;
  return denominator == 0 ? 0 : sum_dd / denominator;
}

// Limits say how much an error may be: of_row(row).element(column) of an element,
// of_row(row).square(...) of a whole row, squared, whole_square() of everything, squared.

/// The limits of fixed tolerances.
struct FixedLimits {
  const Tolerance& tolerance;
  std::span<const double> expected;
  int64_t row_length;
  bool compares_rows = !std::isinf(tolerance.row_cos_tol);
  static constexpr double overflow = kInfinity;

  struct Row {
    const Tolerance& tolerance;
    const double* expected;

    double element(int64_t column) const {
      return std::max(tolerance.abs_tol, tolerance.rel_tol * (std::abs(expected[column]) + 1e-6));
    }
    double square(double sum_aa, double sum_rr) const {
      return tolerance.row_cos_tol * (sum_aa + sum_rr);
    }
  };
  Row of_row(int64_t row) const { return {tolerance, expected.data() + row * row_length}; }
  double whole_square(const Partial& total) const {
    return tolerance.cos_tol * (total.sum_aa + total.sum_rr);
  }
};

// Errors in units of 2^-24, fp32's unit roundoff: a constant for exp, log and the division by l, the
// square root of how many tokens are added up, and for lse 4 ln tokens.
constexpr double kFp32 = 0x1p-24;
constexpr double kConstant = 8;
// Of a logit, relative to RowSize::logit, in lse: 576 sums, each off by at most a unit to either side,
// add up to 12 units on average, and to four times that at most. It comes to this if the largest
// product is the first. Tensor cores add 16 products at once and round 36 sums towards 0: 26 units.
constexpr double kLseLogit = 48;
// The same in out, where only how logits differ counts, for sums of 16 products at once.
constexpr double kOutLogit = 8;
// Tensor cores round a sum towards 0 every 16 tokens, by 2^-24 of it on average, while it grows from
// 0 to r: by half of that in the end.
constexpr double kTowardsZero = kFp32 / 32;
// The production kernels' tolerances for out are a ceiling, with abs_tol relative to the terms. They
// were made for logits of at most 11,000.
constexpr double kCeiling = kOutTolerance.abs_tol / 0.1;
constexpr double kRowCeiling = 2 * kOutTolerance.row_cos_tol;
constexpr double kCeilingLogit = 11'000;

/// What a right kernel's out may err: compare.h has the terms.
struct OutLimits {
  DType dtype;
  const ReferenceResult& expected;
  static constexpr bool compares_rows = true;
  double u = unit_roundoff(dtype);
  /// From here on, a value rounds to infinity.
  double overflow = (2 - u) * (dtype == DType::kBFloat16 ? 0x1p127 : 0x1p15);
  /// bf16: fp32's subnormal numbers may count as 0. fp16: half the spacing of its own.
  double least = dtype == DType::kBFloat16 ? 0x1p-126 : 0x1p-25;

  struct Row {
    const double* out;  ///< The reference's row [512]
    const double* out_size;
    RowSize size;
    double terms;         ///< Relative to the terms of a sum: rounding, fp32.
    double towards_zero;  ///< Relative to the sum.
    double logits;        ///< Relative to the spread.
    double ceiling;       ///< A factor on the ceiling.
    double least;

    double element(int64_t column) const {
      const double r = std::abs(out[column]), both = out_size[column] + r;
      if (both == 0) return 0;
      const double limit = terms * both + towards_zero * r + logits * std::min(both, size.spread);
      const double most = std::max(kCeiling * out_size[column], kOutTolerance.rel_tol * r);
      return std::min(limit, ceiling * most) + least;
    }
    double square(double, double) const {
      if (size.rounding == 0) return 0;
      double sum_rr = 0, sum_sizes = 0;
      for (int column = 0; column < kHeadDimV; ++column) {
        if (!std::isfinite(out[column])) continue;
        sum_rr += out[column] * out[column];
        sum_sizes += out_size[column] * out_size[column];
      }
      // Two columns' worth for few columns that dominate: 512 errors average out, few do not.
      const double rounding = size.rounding * size.rounding;
      double largest = 0;
      for (int column = 0; column < kHeadDimV; ++column) {
        if (!std::isfinite(out[column])) continue;
        const double share = out_size[column] * out_size[column] / sum_sizes;
        largest = std::max(largest, rounding * share + out[column] * out[column]);
      }
      const double weights = std::max(rounding, sum_rr);
      const double for_few = 2 * largest;
      const double error = terms + towards_zero;
      const double square = error * error * (weights + sum_rr / 4 + for_few) +
                            logits * logits * std::min(size.spread * size.spread, weights);
      const double most = ceiling * ceiling * kRowCeiling * (weights + for_few);
      const double limit = std::sqrt(std::min(square, most)) + std::sqrt(double{kHeadDimV}) * least;
      return limit * limit;
    }
  };
  Row of_row(int64_t row) const {
    const RowSize& size = expected.row_size[size_t(row)];
    return {expected.out.data() + row * kHeadDimV,
            expected.out_size.data() + row * kHeadDimV,
            size,
            u + kFp32 * (kConstant + std::sqrt(size.tokens)),
            kTowardsZero * size.tokens,
            kFp32 * kOutLogit * size.logit,
            std::max(1.0, size.logit / kCeilingLogit),
            least};
  }
  double whole_square(const Partial& total) const {
    return total.sum_limits / 2 + 2 * total.largest_limit;
  }
};

/// What a right kernel's lse may err.
struct LseLimits {
  const Problem& problem;
  const ReferenceResult& expected;
  bool by_query_row;  ///< lse is [rows, num_heads_q], not [batch, num_heads_q, seqlen_q].
  static constexpr bool compares_rows = false;
  static constexpr double overflow = kInfinity;

  struct Row {
    double limit;
    double element(int64_t) const { return limit; }
    double square(double, double) const { return kInfinity; }
  };
  Row of_row(int64_t i) const {
    const int64_t heads = problem.num_heads_q, queries = problem.seqlen_q;
    const int64_t row =
        by_query_row ? i
                     : (i / queries / heads * queries + i % queries) * heads + i / queries % heads;
    const RowSize& size = expected.row_size[size_t(row)];
    const double ln_tokens = std::log(std::max(size.tokens, 1.0));
    return {kFp32 * (kLseLogit * size.logit + 4 * (1 + ln_tokens) + std::sqrt(size.tokens))};
  }
  double whole_square(const Partial&) const { return kInfinity; }
};

template <typename T>
double value(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return to_float(x);
  }
}

/// An error as a part of its limit. NaN is infinitely much.
double share_of(double error, double limit) {
  if (error == 0) return 0;
  const double share = error / limit;
  return std::isnan(share) ? kInfinity : share;
}

template <typename T, typename Limits>
Partial compare_rows(const T* actual, const double* expected, int64_t first_row, int64_t last_row,
                     int64_t row_length, const Limits& limits) {
  Partial partial;
  for (int64_t row = first_row; row < last_row; ++row) {
    double sum_dd = 0, sum_aa = 0, sum_rr = 0;
    bool has_nan = false;
    const auto limits_of_row = limits.of_row(row);
    for (int64_t i = row * row_length; i < (row + 1) * row_length; ++i) {
      const double a = value(actual[i]);
      const double r = expected[i];
      has_nan |= std::isnan(r);
      if (!std::isfinite(a) || !std::isfinite(r)) {
        bool match = a == r || (std::isnan(a) && std::isnan(r));
        if (std::isinf(a) && std::isfinite(r) && std::signbit(a) == std::signbit(r)) {
          match = std::abs(r) + limits_of_row.element(i - row * row_length) >= limits.overflow;
        }
        if (match) continue;
        ++partial.mismatches;
        partial.share = kInfinity;
        if (partial.first_special < 0) partial.first_special = i;
        continue;
      }
      const double error = std::abs(a - r);
      const double share = share_of(error, limits_of_row.element(i - row * row_length));
      if (!(share <= 1)) {
        ++partial.mismatches;
        if (partial.first_beyond < 0) partial.first_beyond = i;
      }
      partial.share = std::max(partial.share, share);
      partial.max_abs_error = std::max(partial.max_abs_error, error);
      sum_dd += error * error;
      sum_aa += a * a;
      sum_rr += r * r;
    }
    partial.nan_rows += has_nan;
    partial.sum_dd += sum_dd;
    partial.sum_aa += sum_aa;
    partial.sum_rr += sum_rr;
    if (!limits.compares_rows) continue;
    const double limit = limits_of_row.square(sum_aa, sum_rr);
    if (std::isfinite(limit)) {  // NaN: a row of NaN, of which nothing is compared
      partial.sum_limits += limit;
      partial.largest_limit = std::max(partial.largest_limit, limit);
    }
    const double share = std::sqrt(share_of(sum_dd, limit));
    if (share > partial.worst.share) partial.worst = {row, share, sum_dd, sum_aa, sum_rr, limit};
  }
  return partial;
}

std::string row_name(const RowName& name, int64_t row) {
  return name ? name(row) : "row " + std::to_string(row);
}

/// "row 2, column 210: 0.5, expected 0.25"; of rows of one element without the column.
std::string describe_element(int64_t index, int64_t row_length, const RowName& name, double actual,
                             double expected) {
  char values[80];
  std::snprintf(values, sizeof values, ": %.9g, expected %.9g", actual, expected);
  std::string text = row_name(name, index / row_length);
  if (row_length > 1) text += ", column " + std::to_string(index % row_length);
  return text + values;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

/// "L2 error 0.1 of row 1 exceeds 0.02; its norm is 1.4"
std::string describe_norms(const std::string& what, double sum_dd, double limit_square,
                           double sum_rr) {
  return "L2 error " + number(std::sqrt(sum_dd)) + " of " + what + " exceeds " +
         number(std::sqrt(limit_square)) + "; its norm is " + number(std::sqrt(sum_rr));
}

template <typename T, typename Limits>
Comparison compare_all(std::span<const T> actual, std::span<const double> expected,
                       int64_t row_length, const Limits& limits, const RowName& name) {
  Comparison result;
  result.elements = static_cast<int64_t>(expected.size());
  if (actual.size() != expected.size()) {
    result.failure =
        std::to_string(actual.size()) + " elements, expected " + std::to_string(expected.size());
    return result;
  }
  if (expected.empty()) {
    result.failure = "nothing to compare";
    return result;
  }
  if (row_length < 1 || result.elements % row_length != 0) {
    result.failure = "row_length = " + std::to_string(row_length) + " does not divide " +
                     std::to_string(result.elements) + " elements";
    return result;
  }

  const int64_t rows = result.elements / row_length;
  const int64_t rows_per_task = std::max<int64_t>(1, (int64_t{1} << 18) / row_length);
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  std::vector<Partial> partials(static_cast<size_t>(tasks));
  parallel_for(tasks, 0, [&](int64_t task) {
    const int64_t first = task * rows_per_task;
    partials[size_t(task)] =
        compare_rows(actual.data(), expected.data(), first, std::min(first + rows_per_task, rows),
                     row_length, limits);
  });

  Partial total;
  for (const Partial& partial : partials) {
    total.mismatches += partial.mismatches;
    total.nan_rows += partial.nan_rows;
    if (total.first_special < 0) total.first_special = partial.first_special;
    if (total.first_beyond < 0) total.first_beyond = partial.first_beyond;
    total.max_abs_error = std::max(total.max_abs_error, partial.max_abs_error);
    total.share = std::max(total.share, partial.share);
    total.sum_dd += partial.sum_dd;
    total.sum_aa += partial.sum_aa;
    total.sum_rr += partial.sum_rr;
    total.sum_limits += partial.sum_limits;
    total.largest_limit = std::max(total.largest_limit, partial.largest_limit);
    if (partial.worst.share > total.worst.share) total.worst = partial.worst;
  }
  const Partial::Row& worst = total.worst;
  const double whole_limit = limits.whole_square(total);
  const double whole_share = std::sqrt(share_of(total.sum_dd, whole_limit));
  result.mismatches = total.mismatches;
  result.first_mismatch = total.first_special >= 0 ? total.first_special : total.first_beyond;
  result.nan_rows = total.nan_rows;
  result.max_abs_error = total.max_abs_error;
  result.relative_l2 = total.sum_dd == 0 ? 0 : std::sqrt(total.sum_dd / total.sum_rr);
  result.cosine_difference = cosine_difference(total.sum_dd, total.sum_aa, total.sum_rr);
  result.share = std::max({total.share, worst.share, whole_share});
  if (worst.index >= 0) {
    result.worst_row = worst.index;
    result.worst_row_cosine_difference =
        cosine_difference(worst.sum_dd, worst.sum_aa, worst.sum_rr);
  }

  if (result.first_mismatch >= 0) {
    const auto index = static_cast<size_t>(result.first_mismatch);
    result.failure =
        total.first_special >= 0 ? "NaN or infinity out of place at " : "outside tolerance at ";
    result.failure += describe_element(result.first_mismatch, row_length, name,
                                       value(actual[index]), expected[index]);
    result.failure += "; " + std::to_string(result.mismatches) + " of " +
                      std::to_string(result.elements) + " elements mismatch";
  } else if (!(worst.share <= 1)) {
    result.failure =
        describe_norms(row_name(name, worst.index), worst.sum_dd, worst.limit_square, worst.sum_rr);
  } else if (!(whole_share <= 1)) {
    result.failure = describe_norms("the whole", total.sum_dd, whole_limit, total.sum_rr);
  }
  result.ok = result.failure.empty();
  return result;
}

std::string describe_one(const char* name, const Comparison& comparison) {
  std::string text = std::string(name) + ": ";
  text += comparison.ok ? "ok" : comparison.failure;
  if (comparison.nan_rows > 0) text += "; " + comparison.nan_note();
  text += " (max abs error " + number(comparison.max_abs_error) + ", relative L2 " +
          number(comparison.relative_l2) + ", cosine difference " +
          number(comparison.cosine_difference);
  if (comparison.worst_row >= 0) {
    text += ", worst row " + number(comparison.worst_row_cosine_difference);
  }
  return text + ")";
}

std::string place(int64_t sequence, int64_t query, int64_t head) {
  return "sequence " + std::to_string(sequence) + ", query token " + std::to_string(query) +
         ", head " + std::to_string(head);
}

/// The names of the rows of out [batch, seqlen_q, num_heads_q, 512] ...
RowName out_row_name(const Problem& problem) {
  return [heads = problem.num_heads_q, queries = problem.seqlen_q](int64_t row) {
    return place(row / heads / queries, row / heads % queries, row % heads);
  };
}

/// ... and of lse [batch, num_heads_q, seqlen_q].
RowName lse_row_name(const Problem& problem) {
  return [heads = problem.num_heads_q, queries = problem.seqlen_q](int64_t row) {
    return place(row / queries / heads, row % queries, row / queries % heads);
  };
}

/// The names of `rows` with all their heads; of all rows if it is empty.
RowName row_names(const Problem& problem, std::span<const QueryRow> rows, const RowName& of_all) {
  if (rows.empty()) return of_all;
  return [rows, heads = problem.num_heads_q](int64_t row) {
    const QueryRow& chosen = rows[static_cast<size_t>(row / heads)];
    return place(chosen.sequence, chosen.query, row % heads);
  };
}

template <typename T>
Comparison judge_out(const Problem& problem, std::span<const T> out,
                     const ReferenceResult& expected, std::span<const QueryRow> rows) {
  if (expected.out_size.size() != expected.out.size() ||
      expected.row_size.size() * kHeadDimV != expected.out.size()) {
    Comparison result;
    result.failure = "the reference has no out_size and row_size for its out";
    return result;
  }
  return compare_all(out, expected.out, kHeadDimV, OutLimits{problem.dtype, expected},
                     row_names(problem, rows, out_row_name(problem)));
}

/// Whether the rows whose lse is wrong, and all others, are right if taken as logarithms to base 2.
bool is_base_2(std::span<const float> lse, const ReferenceResult& expected,
               const LseLimits& limits) {
  constexpr double kLn2 = 0.693147180559945309417;
  bool differs = false;
  for (size_t i = 0; i < lse.size(); ++i) {
    const double r = expected.lse[i], limit = limits.of_row(int64_t(i)).limit;
    if (!std::isfinite(r)) continue;
    differs |= !(std::abs(lse[i] - r) <= limit);
    if (!(std::abs(kLn2 * lse[i] - r) <= limit)) return false;
  }
  return differs;
}

}  // namespace

std::string Comparison::nan_note() const {
  if (nan_rows == 0) return "";
  return "NaN, as the reference: " + std::to_string(nan_rows) + (nan_rows == 1 ? " row" : " rows");
}

Comparison compare(DType dtype, std::span<const uint16_t> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance) {
  return visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // Same size, alignment and (trivial) representation: the pattern is the value.
    return compare_all(std::span(reinterpret_cast<const T*>(actual.data()), actual.size()),
                       expected, row_length, FixedLimits{tolerance, expected, row_length}, {});
  });
}

Comparison compare(std::span<const float> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance) {
  return compare_all(actual, expected, row_length, FixedLimits{tolerance, expected, row_length},
                     {});
}

std::string DecodeComparison::describe() const {
  return describe_one("out", out) + "; " + describe_one("lse", lse);
}

Comparison compare_out(const Problem& problem, std::span<const float> out,
                       const ReferenceResult& expected, std::span<const QueryRow> rows) {
  return judge_out(problem, out, expected, rows);
}

Comparison compare_lse(const Problem& problem, std::span<const float> lse,
                       const ReferenceResult& expected, std::span<const QueryRow> rows) {
  Comparison result;
  if (expected.row_size.size() != expected.lse.size()) {
    result.failure = "the reference has no row_size for its lse";
    return result;
  }
  const LseLimits limits{problem, expected, !rows.empty()};
  result =
      compare_all(lse, expected.lse, 1, limits, row_names(problem, rows, lse_row_name(problem)));
  if (!result.ok && lse.size() == expected.lse.size() && is_base_2(lse, expected, limits)) {
    result.failure += "; lse looks like base 2: divide by log2(e)";
  }
  return result;
}

DecodeComparison compare_decode(const Problem& problem, std::span<const uint16_t> out,
                                std::span<const float> lse, const ReferenceResult& expected,
                                std::span<const QueryRow> rows) {
  DecodeComparison result;
  visit_dtype(problem.dtype, [&](auto zero) {
    // Same size, alignment and (trivial) representation: the pattern is the value.
    result.out = judge_out(
        problem, std::span(reinterpret_cast<const decltype(zero)*>(out.data()), out.size()),
        expected, rows);
  });
  result.lse = compare_lse(problem, lse, expected, rows);
  return result;
}

}  // namespace mla
