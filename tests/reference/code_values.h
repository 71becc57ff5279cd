/// @file
/// Numbers of 16 and 8 bits and quantised rows, by their definitions and without the reference's code.
/// Tests check that code against these.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "reference/dtype.h"

namespace mla::test {

/// The value of a 16-bit pattern, from the formats' definitions.
inline double value_of(DType dtype, uint16_t bits) {
  const bool is_bf16 = dtype == DType::kBFloat16;
  const int fraction_bits = is_bf16 ? 7 : 10;
  const int bias = is_bf16 ? 127 : 15;
  const int all_ones = is_bf16 ? 255 : 31;
  const int exponent = (bits & 0x7FFF) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double magnitude;
  if (exponent == all_ones) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

/// The value of an e4m3 code, from the format's definition.
inline double e4m3_by_definition(int code) {
  const int exponent = code / 8 % 16, fraction = code % 8;
  double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  if (exponent == 15 && fraction == 7) magnitude = std::numeric_limits<double>::quiet_NaN();
  return code >= 128 ? -magnitude : magnitude;
}

/// The e4m3 code nearest to x, by a search of all codes of its sign: ties to even, saturating.
inline int nearest_e4m3(double x) {
  if (std::isnan(x)) return 0x7F;
  const int sign = std::signbit(x) ? 0x80 : 0;
  int best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  const double magnitude =
      std::min(std::abs(x), 1e6);  // so that a difference of 448 is not rounded away
  for (int code = 0; code < 0x7F; ++code) {
    const double distance = std::abs(magnitude - e4m3_by_definition(code));
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) {
      best = code;
      best_distance = distance;
    }
  }
  return sign | best;
}

/// The value of column `column` of a quantised row, by the layouts: `tiles` for tile128 rows, `int8` for
/// int8 codes, otherwise e4m3.
inline double quantised_value(bool tiles, bool int8, float call_scale, const uint8_t* row,
                              int column) {
  if (tiles && column >= 512) {
    const int at = 528 + 2 * (column - 512);
    return value_of(DType::kBFloat16, static_cast<uint16_t>(row[at] + 256 * row[at + 1]));
  }
  float scale = call_scale;
  if (tiles) std::memcpy(&scale, row + 512 + column / 128 * 4, 4);
  const int code = row[column];
  const double value = int8 ? (code < 128 ? code : code - 256) : e4m3_by_definition(code);
  return value * scale;
}

}  // namespace mla::test
