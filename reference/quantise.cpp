#include "reference/quantise.h"

#include <array>
#include <new>
#include <string>
#include <utility>

#include "reference/checks.h"
#include "reference/parallel_for.h"

namespace mla {
namespace {

Status check(const Problem& problem, const void* cache, const void* result, int num_threads) {
  MLA_RETURN_IF_ERROR(validate(problem));
  if (!is_quantised(problem.cache_format)) {
    return {StatusCode::kInvalidArgument,
            "cache_format = " + std::string(to_string(problem.cache_format)) + " is not quantised"};
  }
  MLA_RETURN_IF_ERROR(check_pointer("cache", cache));
  if (result == nullptr) return {StatusCode::kInvalidArgument, "the result is null"};
  if (num_threads < 0) {
    return {StatusCode::kInvalidArgument,
            "num_threads = " + std::to_string(num_threads) + " must be at least 0"};
  }
  return {};
}

/// Calls convert(row) for each row of a cache, which writes a vector of `elements`.
template <typename T, typename Convert>
Status convert_rows(const Problem& problem, int64_t elements, int num_threads,
                    std::vector<T>* result, const Convert& convert) {
  try {
    std::vector<T> converted(static_cast<size_t>(elements));
    const int64_t rows_per_page = int64_t{problem.page_size} * problem.num_heads_kv;
    parallel_for(problem.num_pages, num_threads, [&](int64_t page) {
      for (int64_t row = page * rows_per_page; row < (page + 1) * rows_per_page; ++row) {
        convert(row, converted.data());
      }
    });
    *result = std::move(converted);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "not enough memory for the converted cache"};
  }
  return {};
}

}  // namespace

Status quantise_cache(const Problem& problem, const void* cache, ScaleRule rule,
                      std::vector<uint8_t>* quantised, int num_threads) {
  MLA_RETURN_IF_ERROR(check(problem, cache, quantised, num_threads));
  const auto convert = [&](int64_t row, uint8_t* result) {
    const uint16_t* const bits = static_cast<const uint16_t*>(cache) + row * kHeadDimQK;
    std::array<float, kHeadDimQK> values{};
    for (size_t column = 0; column < values.size(); ++column) {
      values[column] = to_float(problem.dtype, bits[column]);
    }
    quantise_row(problem, rule, values.data(), result + row * problem.cache_row_bytes());
  };
  return convert_rows(problem, problem.kv_elements(), num_threads, quantised, convert);
}

Status dequantise_cache(const Problem& problem, const void* cache, std::vector<double>* values,
                        int num_threads) {
  MLA_RETURN_IF_ERROR(check(problem, cache, values, num_threads));
  const auto convert = [&](int64_t row, double* result) {
    dequantise_row(problem, static_cast<const uint8_t*>(cache) + row * problem.cache_row_bytes(),
                   result + row * kHeadDimQK);
  };
  const int64_t rows = problem.kv_elements() / problem.cache_row_elements();
  return convert_rows(problem, rows * kHeadDimQK, num_threads, values, convert);
}

}  // namespace mla
