// The second attempt: scores in shared memory, the maximum taken off, sums by a tree. It has faults, on purpose: README.md.
#pragma once

#include "docs/traditional/latent_decode.h"
#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE::traditional_second {

constexpr int kThreads = 128;
constexpr int kColumns = LatentDecode::kColumns;

struct Smem {
  float q[kColumns];
  float p[LatentDecode::kMostTokens];  // scores, then weights
  float sums[kThreads];                // of each thread's weights
  float maximum;
  MLA_REGIONS(q, p, sums, maximum)
};

// One block per head.
__global__ void __launch_bounds__(kThreads) decode(LatentDecode d) {
  Smem& smem = shared_memory<Smem>();
  const int head = blockIdx.x, thread = threadIdx.x;
  if (thread < kColumns) smem.q[thread] = d.q[head * kColumns + thread];
  if (thread == 0) smem.maximum = -INFINITY;
  __syncthreads();  // the query is there

  // S = scale q K^T, one token per thread; its maximum
  for (int t = thread; t < d.tokens; t += kThreads) {
    float dot = 0;
    for (int c = 0; c < kColumns; ++c) dot += smem.q[c] * d.k[t * kColumns + c];
    smem.p[t] = d.scale * dot;
    smem.maximum = fmaxf(smem.maximum, smem.p[t]);
  }
  __syncthreads();  // all scores are there

  // P = exp(S - maximum), and its sum by a tree
  float sum = 0;
  for (int t = thread; t < d.tokens; t += kThreads) {
    smem.p[t] = expf(smem.p[t] - smem.maximum);
    sum += smem.p[t];
  }
  if (thread < d.tokens) {  // those that have a token
    smem.sums[thread] = sum;
    __syncthreads();  // all sums are there
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < half) smem.p[thread] += smem.p[thread + half];
      __syncthreads();  // this step's sums are there
    }
  }

  // O = P V / sum, one column per thread
  if (thread < kColumns) {
    float o = 0;
    for (int t = 0; t < d.tokens; ++t) o += smem.p[t] * d.v[t * kColumns + thread];
    d.out[head * kColumns + thread] = o / smem.p[0];
  }
}

}  // namespace mla::MLA_MACHINE::traditional_second
