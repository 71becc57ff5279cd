/// @file
/// e4m3, the 8-bit float of quantised caches, converted by integer arithmetic: the same bits on the
/// host, on the GPU model and on any GPU, also on those without an instruction for it.
///
/// One sign bit, four bits of exponent biased by 7, three of fraction; subnormals; no infinity; NaN is
/// all ones, 0x7f or 0xff; the largest number is 448. "E4M3" of the OCP 8-bit Floating Point
/// Specification (OFP8), https://www.opencompute.org.
#pragma once

#include <cstdint>
#include <cstring>

#include "reference/dtype.h"

namespace mla {

/// The largest e4m3 number; its code is 0x7e.
inline constexpr float kLargestE4M3 = 448;
/// The code that a NaN becomes.
inline constexpr uint8_t kNanE4M3 = 0x7f;

/// The value of an e4m3 code, exact. The sign of zero is kept.
MLA_HOST_DEVICE inline float e4m3_value(uint8_t code) {
  const int exponent = (code >> 3) & 0xF;
  const int fraction = code & 7;
  float value = static_cast<float>(fraction) * (1.0f / 512);  // if subnormal
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof bits);
  if (exponent > 0) bits = static_cast<uint32_t>((exponent - 7 + 127) << 23 | fraction << 20);
  if ((code & 0x7F) == kNanE4M3) bits = 0x7FC00000;
  bits |= static_cast<uint32_t>(code & 0x80) << 24;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// The code nearest to x, ties to even. Saturates: what is larger than 448, an infinity too, becomes
/// 448. A NaN becomes kNanE4M3; zeros, and what rounds to zero, keep their sign. As PTX's
/// cvt.rn.satfinite.e4m3x2.f32.
MLA_HOST_DEVICE inline uint8_t round_to_e4m3(float x) {
  uint32_t bits = 0;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t magnitude_bits = bits & 0x7FFFFFFF;
  if (magnitude_bits > 0x7F800000) return kNanE4M3;
  const uint32_t sign = (bits >> 24) & 0x80;
  if (magnitude_bits >= 0x43E00000) return static_cast<uint8_t>(sign | 0x7E);  // 448 or more
  const int exponent = static_cast<int>(magnitude_bits >> 23) - 127;
  const uint32_t significand = (bits & 0x7FFFFF) | 0x800000;  // 24 bits; 4 stay, fewer below 2^-6
  const int shift = exponent >= -6 ? 20 : 14 - exponent;
  if (shift > 24) return static_cast<uint8_t>(sign);  // below half of the least subnormal, 2^-10
  const uint32_t half_less_one = (1u << (shift - 1)) - 1;
  const uint32_t rounded = (significand + half_less_one + ((significand >> shift) & 1)) >> shift;
  // A normal's leading one adds itself to the exponent, and so does a carry out of the rounding.
  const uint32_t code = (exponent >= -6 ? static_cast<uint32_t>(exponent + 6) << 3 : 0) + rounded;
  return static_cast<uint8_t>(sign | code);
}

}  // namespace mla
