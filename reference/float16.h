/// @file
/// The two 16-bit float types of the project, behind one name each: the CUDA Toolkit's types under
/// nvcc (so that kernels keep the hardware conversions), Eigen's elsewhere. Both round to nearest
/// even, and both are plain 16-bit patterns in memory, so tensors cross between the two as `void*`.
#pragma once

#include "reference/float16_bits.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <Eigen/Core>
#endif

namespace mla {

#ifdef __CUDACC__
/// 8 bits of exponent, 7 of fraction.
using bfloat16 = __nv_bfloat16;
/// 5 bits of exponent, 10 of fraction.
using float16 = __half;
/// Exact.
MLA_HOST_DEVICE inline float to_float(bfloat16 x) {
  return __bfloat162float(x);
}
/// Exact.
MLA_HOST_DEVICE inline float to_float(float16 x) {
  return __half2float(x);
}
#else
/// 8 bits of exponent, 7 of fraction.
using bfloat16 = Eigen::bfloat16;
/// 5 bits of exponent, 10 of fraction.
using float16 = Eigen::half;
/// Exact.
inline float to_float(bfloat16 x) {
  return static_cast<float>(x);
}
/// Exact.
inline float to_float(float16 x) {
  return static_cast<float>(x);
}
#endif

/// Rounds to the nearest representable value, ties to even; overflow gives an infinity.
template <typename T>
MLA_HOST_DEVICE inline T from_float(float x) {
  return T(x);
}

static_assert(sizeof(bfloat16) == 2 && sizeof(float16) == 2, "tensors hold 16-bit patterns");

/// Calls f(T{}), where T is the C++ type of `dtype`, and returns what it returns.
template <typename F>
decltype(auto) visit_dtype(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(bfloat16{});
  return f(float16{});
}

}  // namespace mla
