/// @file
/// What the softmax of the bench's pipelines does with a row: one value from all threads of a block.
#pragma once

namespace mla::bench {

/// Combines the values of all threads of a block of kThreads, a multiple of 32: the same result in all.
template <int kThreads, typename T, typename Combine>
__device__ T over_block(T value, Combine combine) {
  constexpr int kWarp = 32;
  __shared__ T of_warp[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // the last call's values were read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int i = 1; i < kThreads / kWarp; ++i) value = combine(value, of_warp[i]);
  return value;
}

}  // namespace mla::bench
