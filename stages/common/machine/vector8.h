/// @file
/// Sixteen bytes of a 16-bit tensor: the widest load a thread can make, and its conversion to fp32.
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

/// Rounds four floats and stores them as one 8-byte access; `destination` is 8-byte aligned.
template <typename T>
__device__ __forceinline__ void store_rounded(const float (&value)[4], T* destination) {
  uint2 packed;
  T* rounded = reinterpret_cast<T*>(&packed);
  for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(value[i]);
  *reinterpret_cast<uint2*>(destination) = packed;
}

}  // namespace mla::MLA_MACHINE
