/// @file
/// Random numbers that are a function of (seed, place), in integer arithmetic only: the CPU, the
/// GPU model and a GPU draw the same bits, in any order.
#pragma once

#include <cstdint>

#include "reference/dtype.h"

namespace mla::counter_random {

/// Step of the counter: 2^64 / golden ratio.
inline constexpr uint64_t kStep = 0x9E3779B97F4A7C15ull;

/// The finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014).
MLA_HOST_DEVICE constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// Where the splitmix64 stream of one row starts. `stream` keeps the draws of different tensors
/// apart.
MLA_HOST_DEVICE constexpr uint64_t row_key(uint64_t seed, uint64_t stream, int64_t sequence,
                                           int64_t position, int64_t head) {
  uint64_t key = mix(seed + kStep * stream);
  key = mix(key + kStep * (static_cast<uint64_t>(sequence) + 1));
  key = mix(key + kStep * (static_cast<uint64_t>(position) + 1));
  return mix(key + kStep * (static_cast<uint64_t>(head) + 1));
}

/// Draw `index` of a row's stream: 64 uniform bits.
MLA_HOST_DEVICE constexpr uint64_t draw(uint64_t key, int64_t index) {
  return mix(key + kStep * static_cast<uint64_t>(index));
}

/// 2^16 z for element `column` of a row, z nearly N(0,1): twelve uniform 16-bit draws minus their
/// mean.
MLA_HOST_DEVICE constexpr int32_t normal(uint64_t key, int column) {
  constexpr uint64_t kEvenFields = 0x0000FFFF0000FFFFull;
  uint64_t sums = 0;  // two sums of six draws each, 32 bits apart
  for (int j = 0; j < 3; ++j) {
    const uint64_t bits = draw(key, 3 * int64_t{column} + j);
    sums += (bits & kEvenFields) + ((bits >> 16) & kEvenFields);
  }
  return static_cast<int32_t>((sums & 0xFFFFFFFFu) + (sums >> 32)) - 6 * 65535;
}

}  // namespace mla::counter_random
