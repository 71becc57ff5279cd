/// @file
/// 16-bit values to fp32 and back: a chunk of 16 bytes, the widest load a thread can make, and what a
/// register or a store takes.
#pragma once

#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE {

/// Converts eight packed 16-bit floats and stores them as fp32; `destination` is 16-byte aligned.
template <typename T>
__device__ __forceinline__ void store_as_float(const uint4& packed, float* destination) {
  const T* value = reinterpret_cast<const T*>(&packed);
  auto* out = reinterpret_cast<float4*>(destination);
  out[0] =
      make_float4(to_float(value[0]), to_float(value[1]), to_float(value[2]), to_float(value[3]));
  out[1] =
      make_float4(to_float(value[4]), to_float(value[5]), to_float(value[6]), to_float(value[7]));
}

/// Rounds two floats to 16 bits, the first one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  T* value = reinterpret_cast<T*>(&packed);
  value[0] = from_float<T>(low);
  value[1] = from_float<T>(high);
  return packed;
}

/// Rounds four floats and stores them as one 8-byte access; `destination` is 8-byte aligned.
template <typename T>
__device__ __forceinline__ void store_rounded(const float (&value)[4], T* destination) {
  uint2 packed;
  T* rounded = reinterpret_cast<T*>(&packed);
  for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(value[i]);
  *reinterpret_cast<uint2*>(destination) = packed;
}

}  // namespace mla::MLA_MACHINE
