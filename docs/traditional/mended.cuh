// The two decodes of first.cuh and second.cuh without their faults: the answers of the lab in README.md.
#pragma once

#include "docs/traditional/latent_decode.h"
#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE::traditional_mended {

constexpr int kThreads = 128;
constexpr int kColumns = LatentDecode::kColumns;

// One block per head, scores in global memory.
__global__ void __launch_bounds__(kThreads) first(LatentDecode d) {
  const int head = blockIdx.x;
  const float* const q_gmem = d.q + head * kColumns;  // [64]
  float* const s_gmem = d.scores + head * d.tokens;   // [tokens]

  // S = scale q K^T, one token per thread
  for (int t = threadIdx.x; t < d.tokens; t += kThreads) {
    float dot = 0;
    for (int c = 0; c < kColumns; ++c) dot += q_gmem[c] * d.k[t * kColumns + c];
    s_gmem[t] = d.scale * dot;
  }
  __syncthreads();  // the head's scores are there

  // P = exp(S - maximum), O = P V / sum P, one column per thread: each looks for the maximum itself
  for (int c = threadIdx.x; c < kColumns; c += kThreads) {
    float maximum = -INFINITY, sum = 0, o = 0;
    for (int t = 0; t < d.tokens; ++t) maximum = fmaxf(maximum, s_gmem[t]);
    for (int t = 0; t < d.tokens; ++t) {
      const float p = expf(s_gmem[t] - maximum);
      sum += p;
      o += p * d.v[t * kColumns + c];
    }
    d.out[head * kColumns + c] = o / sum;
  }
}

struct Smem {
  float q[kColumns];
  float p[LatentDecode::kMostTokens];  // scores, then weights
  float of_thread[kThreads];           // what a tree adds up, or finds the largest of
  MLA_REGIONS(q, p, of_thread)
};

// The sum or the maximum of `value` over the block, in every thread. Every thread calls it, with a token or without.
template <typename Combine>
__device__ float over_block(Smem& smem, float value, Combine combine) {
  const int thread = threadIdx.x;
  smem.of_thread[thread] = value;
  __syncthreads();  // all values are there
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      smem.of_thread[thread] = combine(smem.of_thread[thread], smem.of_thread[thread + half]);
    }
    __syncthreads();  // this step's results are there
  }
  const float result = smem.of_thread[0];
  __syncthreads();  // and have been read: the next call may overwrite them
  return result;
}

// One block per head, scores in shared memory.
__global__ void __launch_bounds__(kThreads) second(LatentDecode d) {
  Smem& smem = shared_memory<Smem>();
  const int head = blockIdx.x, thread = threadIdx.x;
  if (thread < kColumns) smem.q[thread] = d.q[head * kColumns + thread];
  __syncthreads();  // the query is there

  // S = scale q K^T, one token per thread; the maximum of its own first
  float maximum = -INFINITY;
  for (int t = thread; t < d.tokens; t += kThreads) {
    float dot = 0;
    for (int c = 0; c < kColumns; ++c) dot += smem.q[c] * d.k[t * kColumns + c];
    smem.p[t] = d.scale * dot;
    maximum = fmaxf(maximum, smem.p[t]);
  }
  maximum = over_block(smem, maximum, [](float a, float b) { return fmaxf(a, b); });

  // P = exp(S - maximum), and its sum
  float sum = 0;
  for (int t = thread; t < d.tokens; t += kThreads) {
    smem.p[t] = expf(smem.p[t] - maximum);
    sum += smem.p[t];
  }
  sum = over_block(smem, sum, [](float a, float b) { return a + b; });

  // O = P V / sum, one column per thread
  if (thread < kColumns) {
    float o = 0;
    for (int t = 0; t < d.tokens; ++t) o += smem.p[t] * d.v[t * kColumns + thread];
    d.out[head * kColumns + thread] = o / sum;
  }
}

}  // namespace mla::MLA_MACHINE::traditional_mended
