// A first decode, as write-ups begin: one block per head, scores in global memory. It has faults, on purpose: README.md.
//
//   S[h, t] = scale * <q_h, k_t>      P = exp(S)      O[h, :] = sum_t P[h, t] * v_t / sum_t P[h, t]
#pragma once

#include "docs/traditional/latent_decode.h"
#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE::traditional_first {

constexpr int kThreads = 128;
constexpr int kColumns = LatentDecode::kColumns;

__global__ void __launch_bounds__(kThreads) decode(LatentDecode d) {
  const int head = blockIdx.x;
  const float q = d.q[head * kColumns];              // the head's query
  float* const p_gmem = d.scores + head * d.tokens;  // [tokens]

  // P = exp(scale q K^T), one token per thread
  for (int t = threadIdx.x; t < d.tokens; t += kThreads) {
    float dot = 0;
    for (int c = 0; c < kColumns; ++c) dot += q * d.k[t * kColumns + c];
    p_gmem[t] = expf(d.scale * dot);
  }
  __syncthreads();  // the head's weights are there

  // O = P V / sum P
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int t = 0; t < d.tokens; ++t) sum += p_gmem[t];
    for (int c = 0; c < kColumns; ++c) {
      float o = 0;
      for (int t = 0; t < d.tokens; ++t) o += p_gmem[t] * d.v[t * kColumns + c];
      d.out[head * kColumns + c] = o / sum;
    }
  }
}

}  // namespace mla::MLA_MACHINE::traditional_first
