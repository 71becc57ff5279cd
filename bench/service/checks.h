/// @file
/// Checks of what a user may set, with one wording.
#pragma once

#include <fmt/format.h>

#include <cstdint>

#include "reference/status.h"

namespace mla::bench {

/// ok, or kInvalidArgument with "heads = 0 must be in 1 ... 1024".
inline Status check_in(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return {};
  return {StatusCode::kInvalidArgument,
          fmt::format("{} = {} must be in {} ... {}", name, value, least, most)};
}

/// The same of a number that need not be whole, and is none if it is NaN.
inline Status check_number(const char* name, double value, bool in_range, const char* range) {
  if (in_range) return {};
  return {StatusCode::kInvalidArgument, fmt::format("{} = {:g} must be {}", name, value, range)};
}

}  // namespace mla::bench
