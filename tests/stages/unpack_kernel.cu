// Stage 13's conversion of codes, in a kernel of its own.
#include "stages/13_quantised_mma/kernel.cuh"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128;

// pairs [2, 65536]: every pair of codes, as the low and as the high half of a word whose other half differs.
template <typename T, CacheFormat kFormat>
__global__ void unpack_pairs(uint32_t* __restrict__ pairs) {
  for (uint32_t codes = blockIdx.x * kThreads + threadIdx.x; codes < 65536;
       codes += gridDim.x * kThreads) {
    const uint32_t other = codes * 40503 & 0xFFFF;
    pairs[codes] = quantised_mma::values_of_pair<T, kFormat, 0>(other << 16 | codes);
    pairs[65536 + codes] = quantised_mma::values_of_pair<T, kFormat, 1>(codes << 16 | other);
  }
}

}  // namespace

Status launch_unpack_pairs(DType dtype, CacheFormat format, uint32_t* pairs) {
  const auto launch_as = [&](auto kernel) {
    return launch(kernel, grid_for(65536 / kThreads), kThreads, 0, nullptr, pairs);
  };
  if (format == CacheFormat::kInt8Tile128) {
    return launch_as(unpack_pairs<bfloat16, CacheFormat::kInt8Tile128>);
  }
  return visit_dtype(dtype, [&](auto zero) {
    return launch_as(unpack_pairs<decltype(zero), CacheFormat::kFp8Tensor>);
  });
}

}  // namespace mla::MLA_MACHINE
