// Conversions to and from e4m3 as a kernel calls them: the instructions, and the project's functions.
#include "reference/float8.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128;

// by_instruction and by_function [pairs] get the codes of values [2 pairs]. The lower byte of a pair
// is the first value's.
__global__ void round_pairs(const float* __restrict__ values, uint16_t* __restrict__ by_instruction,
                            uint16_t* __restrict__ by_function, int64_t pairs) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pairs;
       i += int64_t{gridDim.x} * kThreads) {
    const float low = values[2 * i], high = values[2 * i + 1];
    by_function[i] = static_cast<uint16_t>(round_to_e4m3(high) << 8 | round_to_e4m3(low));
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 890
    by_instruction[i] = ptx::cvt_rn_satfinite_e4m3x2_f32(high, low);
#else
    by_instruction[i] = by_function[i];
#endif
  }
}

// halves [65536] gets two fp16 for every pair of codes; values [256] gets a float for every code.
__global__ void all_values(uint32_t* __restrict__ halves, float* __restrict__ values) {
  for (int codes = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); codes < 65536;
       codes += static_cast<int>(gridDim.x) * kThreads) {
    if (codes < 256) values[codes] = e4m3_value(static_cast<uint8_t>(codes));
#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 890
    halves[codes] = ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(codes));
#else
    halves[codes] = 0;
#endif
  }
}

}  // namespace

Status launch_round_pairs(const float* values, uint16_t* by_instruction, uint16_t* by_function,
                          int64_t pairs) {
  return launch(round_pairs, grid_for((pairs + kThreads - 1) / kThreads), kThreads, 0, nullptr,
                values, by_instruction, by_function, pairs);
}
Status launch_all_values(uint32_t* halves, float* values) {
  return launch(all_values, grid_for(65536 / kThreads), kThreads, 0, nullptr, halves, values);
}

}  // namespace mla::MLA_MACHINE
