/// @file
/// Random numbers as functions of a key and an index alone, by the counter of
/// reference/testing/data_generator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "reference/testing/data_generator.h"

namespace mla::bench {

/// Uniform in (0, 1).
inline double uniform(uint64_t key, int64_t index) {
  return (static_cast<double>(generator::draw(key, index + 1) >> 11) + 0.5) / 9007199254740992.0;
}

/// N(0, 1), from the uniform draws at `index` and after it.
inline double normal(uint64_t key, int64_t index) {
  return std::sqrt(-2 * std::log(uniform(key, index))) *
         std::cos(2 * std::numbers::pi * uniform(key, index + 1));
}

}  // namespace mla::bench
