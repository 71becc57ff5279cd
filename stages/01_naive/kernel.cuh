// 01_naive: three kernels, as the formula reads. Scores go to global memory and come back twice.
//
//   scores   S[row, t] = scale * <q_row, k_t>         one warp per score
//   softmax  P[row, t] = exp(S - max) / sum           one block per row, in place
//   values   O[row, :] = sum_t P[row, t] * v_t        one block per row, two columns per thread
//
// A row is one query head of one query token: row = query * num_heads_q + head.
#pragma once

#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE::naive {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Who computes a score. The threads of a warp read either 32 neighbouring columns of one token
// (coalesced: 64 bytes in a row) or one column of 32 neighbouring tokens (uncoalesced: 32 places
// 1152 bytes apart).
enum class Mapping { kWarpPerScore, kThreadPerScore };

// The row a kernel works on, and the tokens it may see.
struct Row {
  int sequence, query, head, head_kv;
  int visible;  // <= 0: none

  __device__ Row(const Problem& problem, const Tensors& tensors, int sequence_, int64_t row)
      : sequence(sequence_),
        query(static_cast<int>(row / problem.num_heads_q)),
        head(static_cast<int>(row % problem.num_heads_q)),
        head_kv(head / problem.group_size()),
        visible(static_cast<int>(problem.visible_tokens(
            clamped_length(problem, tensors.seqlens_k[sequence_]), query))) {}
};

// S = scale * Q K^T. One item: one row against every `parts`-th stretch of 64 tokens.
//   scores_gmem: [num_sequences, rows, max_seqlen_k], rows = seqlen_q * num_heads_q
template <typename T, Mapping kMapping>
__global__ void __launch_bounds__(kThreads)
    scores(Problem problem, Tensors tensors, int first_sequence, int parts, int64_t num_items,
           float* __restrict__ scores_gmem) {
  constexpr int kTokens = 64;
  const int64_t rows = int64_t{problem.seqlen_q} * problem.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t score_row = item / parts;  // sequence in this turn, row
    const Row row(problem, tensors, first_sequence + static_cast<int>(score_row / rows),
                  score_row % rows);
    const int32_t* table = tensors.table_row(row.sequence);
    const T* q_gmem = static_cast<const T*>(tensors.q) +
                      tensors.q_place(row.sequence, row.query, row.head);  // [576]
    const T* kv_gmem = static_cast<const T*>(tensors.kv_cache);
    float* s_gmem = scores_gmem + score_row * problem.max_seqlen_k();  // [max_seqlen_k]

    for (int64_t begin = item % parts * kTokens; begin < row.visible;
         begin += int64_t{parts} * kTokens) {
      const int first = static_cast<int>(begin), end = min(first + kTokens, row.visible);
      if constexpr (kMapping == Mapping::kWarpPerScore) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int t = first + warp; t < end; t += kWarps) {
          const T* k_gmem = kv_gmem + cache_place(problem, tensors, table, t, row.head_kv);
          float dot = 0;
          for (int column = lane; column < kHeadDimQK; column += 32) {
            dot += to_float(q_gmem[column]) * to_float(k_gmem[column]);
          }
          for (int offset = 16; offset > 0; offset /= 2) {
            dot += __shfl_xor_sync(0xffffffff, dot, offset);
          }
          if (lane == 0) s_gmem[t] = problem.softmax_scale * dot;
        }
      } else {
        for (int t = first + threadIdx.x; t < end; t += kThreads) {
          const T* k_gmem = kv_gmem + cache_place(problem, tensors, table, t, row.head_kv);
          float dot = 0;
          for (int column = 0; column < kHeadDimQK; ++column) {
            dot += to_float(q_gmem[column]) * to_float(k_gmem[column]);
          }
          s_gmem[t] = problem.softmax_scale * dot;
        }
      }
    }
  }
}

// What the block's warps tell each other: one value per warp.
struct SoftmaxSmem {
  float of_warp[kWarps];
  MLA_REGIONS(of_warp)
};

// The sum or the maximum of `value` over the block, in every thread.
template <typename Combine>
__device__ float block_reduce(SoftmaxSmem& smem, float value, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // the last reduction's values have been read
  if (threadIdx.x % 32 == 0) smem.of_warp[threadIdx.x / 32] = value;
  __syncthreads();  // every warp's value is there
  value = smem.of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, smem.of_warp[warp]);
  return value;
}

// P = softmax(S), in place, and lse. One item: one row.
__global__ void __launch_bounds__(kThreads)
    softmax(Problem problem, Tensors tensors, int first_sequence, int64_t num_items,
            float* __restrict__ scores_gmem) {
  SoftmaxSmem& smem = shared_memory<SoftmaxSmem>();
  const int64_t rows = int64_t{problem.seqlen_q} * problem.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const Row row(problem, tensors, first_sequence + static_cast<int>(item / rows), item % rows);
    float* s_gmem = scores_gmem + item * problem.max_seqlen_k();  // [max_seqlen_k]

    float maximum = -INFINITY;
    for (int t = threadIdx.x; t < row.visible; t += kThreads) {
      maximum = fmaxf(maximum, s_gmem[t]);
    }
    maximum = block_reduce(smem, maximum, [](float a, float b) { return fmaxf(a, b); });

    float sum = 0;
    for (int t = threadIdx.x; t < row.visible; t += kThreads) {
      s_gmem[t] = expf(s_gmem[t] - maximum);
      sum += s_gmem[t];
    }
    sum = block_reduce(smem, sum, [](float a, float b) { return a + b; });

    for (int t = threadIdx.x; t < row.visible; t += kThreads) s_gmem[t] /= sum;
    if (threadIdx.x == 0) {
      tensors.lse[tensors.lse_place(row.sequence, row.query, row.head)] =
          row.visible > 0 ? maximum + logf(sum) : INFINITY;
    }
  }
}

// O = P V. One item: one row; thread t makes columns t and t + 256, so a warp reads 64 bytes in a
// row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    values(Problem problem, Tensors tensors, int first_sequence, int64_t num_items,
           const float* __restrict__ scores_gmem) {
  const int64_t rows = int64_t{problem.seqlen_q} * problem.num_heads_q;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const Row row(problem, tensors, first_sequence + static_cast<int>(item / rows), item % rows);
    const int32_t* table = tensors.table_row(row.sequence);
    const T* kv_gmem = static_cast<const T*>(tensors.kv_cache);
    const float* p_gmem = scores_gmem + item * problem.max_seqlen_k();  // [max_seqlen_k]
    T* out_gmem = static_cast<T*>(tensors.out) +
                  tensors.out_place(row.sequence, row.query, row.head);  // [512]

    float left = 0, right = 0;
    for (int t = 0; t < row.visible; ++t) {
      const T* v_gmem = kv_gmem + cache_place(problem, tensors, table, t, row.head_kv);  // [512]
      left += p_gmem[t] * to_float(v_gmem[threadIdx.x]);
      right += p_gmem[t] * to_float(v_gmem[threadIdx.x + kThreads]);
    }
    out_gmem[threadIdx.x] = from_float<T>(left);
    out_gmem[threadIdx.x + kThreads] = from_float<T>(right);
  }
}

}  // namespace mla::MLA_MACHINE::naive
