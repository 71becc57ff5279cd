/// @file
/// Rows of what a product of the tensor cores left in registers, to and from memory. Of such a result
/// [16 rows, 8 N columns] a lane has, of each eight columns, 2 (lane % 4) and 2 (lane % 4) + 1, in rows
/// lane / 4 and lane / 4 + 8.
///
/// As fp32 a row's eight columns are 32 bytes, and the L2 takes 32 bytes at a time only two thirds as
/// fast as 64. So neighbouring lanes give each other a half of 16 columns, and each has four in a row:
/// even lanes of the first eight, odd lanes of the second.
#pragma once

#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE {

/// Where this lane's four columns of the first 16 begin.
__device__ __forceinline__ int four_columns() {
  const int lane = threadIdx.x % 32;
  return lane % 2 * 8 + lane % 4 / 2 * 4;
}

/// What the lane has of 16 columns of a row, `left` of the first eight and `right` of the second, becomes
/// four columns in a row, from four_columns() on. All lanes of a warp call this together.
__device__ __forceinline__ float4 to_four(float2 left, float2 right) {
  const bool odd = threadIdx.x % 2 == 1;
  const float x = __shfl_xor_sync(0xffffffff, odd ? left.x : right.x, 1);
  const float y = __shfl_xor_sync(0xffffffff, odd ? left.y : right.y, 1);
  return odd ? make_float4(x, y, right.x, right.y) : make_float4(left.x, left.y, x, y);
}
/// And back.
__device__ __forceinline__ void from_four(const float4& four, float2& left, float2& right) {
  const bool odd = threadIdx.x % 2 == 1;
  const float x = __shfl_xor_sync(0xffffffff, odd ? four.x : four.z, 1);
  const float y = __shfl_xor_sync(0xffffffff, odd ? four.y : four.w, 1);
  left = odd ? make_float2(x, y) : make_float2(four.x, four.y);
  right = odd ? make_float2(four.z, four.w) : make_float2(x, y);
}

}  // namespace mla::MLA_MACHINE
