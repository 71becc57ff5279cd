#include "reference/testing/compare.h"
#include "reference/float16.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>

#include "reference/parallel_for.h"

namespace mla {
namespace {

/// What one task, some rows, adds to a Comparison. Tasks are of fixed size and merged in order, so
/// that the result does not depend on the number of threads.
struct Partial {
  int64_t mismatches = 0;
  int64_t first_special = -1;    ///< First element where NaN or an infinity is not matched.
  int64_t first_tolerance = -1;  ///< First finite element outside tolerance.
  double max_abs_error = 0;
  double sum_dd = 0;  ///< Sums over finite elements: (a - r)^2, a^2, r^2.
  double sum_aa = 0;
  double sum_rr = 0;
  double worst_row_cosine_difference = -1;
  int64_t worst_row = -1;
};

/// 1 - 2<a,r>/(<a,a> + <r,r>), written as <a-r,a-r>/(<a,a> + <r,r>): the same, without the
/// cancellation. Two zero vectors are equal; a zero vector and another differ by 1.
double cosine_difference(double sum_dd, double sum_aa, double sum_rr) {
  const double denominator = sum_aa + sum_rr;
  return denominator == 0 ? 0 : sum_dd / denominator;
}

template <typename T>
Partial compare_rows(const T* actual, const double* expected, int64_t first_row, int64_t last_row,
                     int64_t row_length, const Tolerance& tolerance) {
  Partial partial;
  for (int64_t row = first_row; row < last_row; ++row) {
    double sum_dd = 0, sum_aa = 0, sum_rr = 0;
    for (int64_t i = row * row_length; i < (row + 1) * row_length; ++i) {
      double a;
      if constexpr (std::is_same_v<T, float>) {
        a = actual[i];
      } else {
        a = to_float(actual[i]);
      }
      const double r = expected[i];
      if (!std::isfinite(a) || !std::isfinite(r)) {
        const bool match = a == r || (std::isnan(a) && std::isnan(r));
        if (match) continue;
        ++partial.mismatches;
        if (partial.first_special < 0) partial.first_special = i;
        continue;
      }
      const double error = std::abs(a - r);
      if (!(error < tolerance.abs_tol) && !(error / (std::abs(r) + 1e-6) < tolerance.rel_tol)) {
        ++partial.mismatches;
        if (partial.first_tolerance < 0) partial.first_tolerance = i;
      }
      partial.max_abs_error = std::max(partial.max_abs_error, error);
      sum_dd += error * error;
      sum_aa += a * a;
      sum_rr += r * r;
    }
    partial.sum_dd += sum_dd;
    partial.sum_aa += sum_aa;
    partial.sum_rr += sum_rr;
    const double difference = cosine_difference(sum_dd, sum_aa, sum_rr);
    // `!(<=)`: a difference that is NaN (sums that overflowed) is the worst there is, and stays.
    if (!(difference <= partial.worst_row_cosine_difference) &&
        !std::isnan(partial.worst_row_cosine_difference)) {
      partial.worst_row_cosine_difference = difference;
      partial.worst_row = row;
    }
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

template <typename T>
Comparison compare_all(std::span<const T> actual, std::span<const double> expected,
                       int64_t row_length, const Tolerance& tolerance, const RowName& name) {
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
                     row_length, tolerance);
  });

  Partial total;
  for (const Partial& partial : partials) {
    total.mismatches += partial.mismatches;
    if (total.first_special < 0) total.first_special = partial.first_special;
    if (total.first_tolerance < 0) total.first_tolerance = partial.first_tolerance;
    total.max_abs_error = std::max(total.max_abs_error, partial.max_abs_error);
    total.sum_dd += partial.sum_dd;
    total.sum_aa += partial.sum_aa;
    total.sum_rr += partial.sum_rr;
    if (!(partial.worst_row_cosine_difference <= total.worst_row_cosine_difference) &&
        !std::isnan(total.worst_row_cosine_difference)) {
      total.worst_row_cosine_difference = partial.worst_row_cosine_difference;
      total.worst_row = partial.worst_row;
    }
  }
  const bool compare_row_cosines = !std::isinf(tolerance.row_cos_tol);
  result.mismatches = total.mismatches;
  result.first_mismatch = total.first_special >= 0 ? total.first_special : total.first_tolerance;
  result.max_abs_error = total.max_abs_error;
  result.relative_l2 = total.sum_dd == 0 ? 0 : std::sqrt(total.sum_dd / total.sum_rr);
  result.cosine_difference = cosine_difference(total.sum_dd, total.sum_aa, total.sum_rr);
  if (compare_row_cosines) {
    result.worst_row_cosine_difference = total.worst_row_cosine_difference;
    result.worst_row = total.worst_row;
  }

  if (result.first_mismatch >= 0) {
    const auto index = static_cast<size_t>(result.first_mismatch);
    double a;
    if constexpr (std::is_same_v<T, float>) {
      a = actual[index];
    } else {
      a = to_float(actual[index]);
    }
    result.failure =
        total.first_special >= 0 ? "NaN or infinity out of place at " : "outside tolerance at ";
    result.failure += describe_element(result.first_mismatch, row_length, name, a, expected[index]);
    result.failure += "; " + std::to_string(result.mismatches) + " of " +
                      std::to_string(result.elements) + " elements mismatch";
  } else if (!(result.cosine_difference < tolerance.cos_tol)) {
    result.failure = "cosine difference " + number(result.cosine_difference) +
                     " is not less than " + number(tolerance.cos_tol);
  } else if (compare_row_cosines && !(result.worst_row_cosine_difference < tolerance.row_cos_tol)) {
    result.failure = "cosine difference " + number(result.worst_row_cosine_difference) + " of " +
                     row_name(name, result.worst_row) + " is not less than " +
                     number(tolerance.row_cos_tol);
  }
  result.ok = result.failure.empty();
  return result;
}

std::string describe_one(const char* name, const Comparison& comparison) {
  std::string text = std::string(name) + ": ";
  text += comparison.ok ? "ok" : comparison.failure;
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

}  // namespace

RowName out_row_name(const Problem& problem) {
  return [heads = problem.num_heads_q, queries = problem.seqlen_q](int64_t row) {
    return place(row / heads / queries, row / heads % queries, row % heads);
  };
}

RowName lse_row_name(const Problem& problem) {
  return [heads = problem.num_heads_q, queries = problem.seqlen_q](int64_t row) {
    return place(row / queries / heads, row % queries, row / queries % heads);
  };
}

Comparison compare(DType dtype, std::span<const uint16_t> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance, const RowName& name) {
  return visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // Same size, alignment and (trivial) representation: the pattern is the value.
    return compare_all(std::span(reinterpret_cast<const T*>(actual.data()), actual.size()),
                       expected, row_length, tolerance, name);
  });
}

Comparison compare(std::span<const float> actual, std::span<const double> expected,
                   int64_t row_length, const Tolerance& tolerance, const RowName& name) {
  return compare_all(actual, expected, row_length, tolerance, name);
}

std::string DecodeComparison::describe() const {
  return describe_one("out", out) + "; " + describe_one("lse", lse);
}

DecodeComparison compare_decode(const Problem& problem, std::span<const uint16_t> out,
                                std::span<const float> lse, const ReferenceResult& expected,
                                std::span<const QueryRow> rows) {
  RowName of_out = out_row_name(problem), of_lse = lse_row_name(problem);
  if (!rows.empty()) {
    of_out = of_lse = [rows, heads = problem.num_heads_q](int64_t row) {
      const QueryRow& chosen = rows[static_cast<size_t>(row / heads)];
      return place(chosen.sequence, chosen.query, row % heads);
    };
  }
  return {compare(problem.dtype, out, expected.out, kHeadDimV, kOutTolerance, of_out),
          compare(lse, expected.lse, 1, kLseTolerance, of_lse)};
}

}  // namespace mla
