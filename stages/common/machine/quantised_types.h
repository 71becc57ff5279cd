/// @file
/// The types that a kernel for quantised caches is made for.
#pragma once

#include <type_traits>

#include "reference/float16.h"
#include "reference/problem.h"

namespace mla {

/// Calls f(T{}, std::integral_constant<CacheFormat, format>()), where T is the C++ type of the dtype, and
/// returns what it returns. For a problem that is checked and has a quantised cache: only fp8_tensor goes with
/// fp16.
template <typename F>
decltype(auto) visit_quantised_types(const Problem& problem, F&& f) {
  using enum CacheFormat;
  switch (problem.cache_format) {
    case kFp8Tile128:
      return f(bfloat16{}, std::integral_constant<CacheFormat, kFp8Tile128>());
    case kInt8Tile128:
      return f(bfloat16{}, std::integral_constant<CacheFormat, kInt8Tile128>());
    default:
      return visit_dtype(problem.dtype, [&](auto zero) {
        return f(zero, std::integral_constant<CacheFormat, kFp8Tensor>());
      });
  }
}

}  // namespace mla
