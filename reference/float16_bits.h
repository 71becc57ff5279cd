/// @file
/// What 16-bit patterns are worth, for code that needs no types for them: Eigen, whose types float16.h takes for the CPU,
/// is a second of compiling.
#pragma once

#include <cstdint>
#include <cstring>

#include "reference/dtype.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace mla {

/// The value of a 16-bit pattern, exact.
MLA_HOST_DEVICE inline float to_float(DType dtype, uint16_t bits) {
  float value = 0;
  if (dtype == DType::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
#ifdef __CUDACC__
  __half half;
  memcpy(static_cast<void*>(&half), &bits, sizeof half);
  return __half2float(half);
#else
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 0x1F;
  const uint32_t fraction = bits & 0x3FF;
  if (exponent == 0) {  // zero and subnormals, in units of 2^-24
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign == 0 ? value : -value;
  }
  // The exponent's bias is 15 there and 127 here; all ones stay all ones.
  const uint32_t wide = sign | (exponent == 0x1F ? 0xFF : exponent + 112) << 23 | fraction << 13;
  memcpy(&value, &wide, sizeof value);
  return value;
#endif
}

}  // namespace mla
