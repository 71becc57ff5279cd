// A stage of your own: copy this folder to stages/NN_name, give the namespace a name, and change the kernel.
//
// As it is: one block per row, one pass, the softmax kept running (stages/03_online_softmax has the derivation).
// Simple, right on every case of the contract, and slow.
#pragma once

#include "stages/common/machine/device.h"

namespace mla::MLA_MACHINE::my_stage {

constexpr int kThreads = 128;
constexpr int kTokens = 64;  // of a tile

// All of the block's shared memory, as one struct: on the GPU model it starts as NaN and ends at a guard page.
struct Smem {
  float q[kHeadDimQK];
  float scores[kTokens];
  MLA_REGIONS(q, scores)
};

// One item: one query head of one query token. Every thread owns four of the 512 output columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode(Problem problem, Tensors tensors, int64_t num_items) {
  Smem& smem = shared_memory<Smem>();
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {  // any grid limit
    const int head = static_cast<int>(item % problem.num_heads_q);
    const int64_t row = item / problem.num_heads_q;  // query token of the batch
    const int query = static_cast<int>(row % problem.seqlen_q);
    const int sequence = static_cast<int>(row / problem.seqlen_q);
    const int head_kv = head / problem.group_size();
    const int seqlen_k = clamped_length(problem, tensors.seqlens_k[sequence]);
    const int visible = static_cast<int>(problem.visible_tokens(seqlen_k, query));
    const int32_t* table = tensors.table_row(sequence);
    const T* kv_gmem = static_cast<const T*>(tensors.kv_cache);
    const T* q_gmem =
        static_cast<const T*>(tensors.q) + tensors.q_place(sequence, query, head);  // [576]

    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      smem.q[column] = problem.softmax_scale * to_float(q_gmem[column]);
    }
    __syncthreads();  // q is there

    float m = -1e30f, l = 0, o[4] = {};
    for (int begin = 0; begin < visible; begin += kTokens) {
      const int tokens = min(kTokens, visible - begin);
      if (static_cast<int>(threadIdx.x) < tokens) {
        const T* k_gmem =
            kv_gmem + cache_place(problem, tensors, table, begin + threadIdx.x, head_kv);
        float dot = 0;
        for (int column = 0; column < kHeadDimQK; ++column) {
          dot += smem.q[column] * to_float(k_gmem[column]);
        }
        smem.scores[threadIdx.x] = dot;
      }
      __syncthreads();  // the tile's scores are there

      float m_new = m;
      for (int t = 0; t < tokens; ++t) m_new = fmaxf(m_new, smem.scores[t]);
      const float rescale = expf(m - m_new);  // old minus new: at most 1
      m = m_new;
      l *= rescale;
      for (float& value : o) value *= rescale;
      for (int t = 0; t < tokens; ++t) {
        const float p = expf(smem.scores[t] - m);
        const T* v_gmem = kv_gmem + cache_place(problem, tensors, table, begin + t, head_kv);
        l += p;
        for (int i = 0; i < 4; ++i) o[i] += p * to_float(v_gmem[threadIdx.x + i * kThreads]);
      }
      __syncthreads();  // the scores have been read: the next tile may overwrite them
    }

    T* out_gmem = static_cast<T*>(tensors.out) + tensors.out_place(sequence, query, head);  // [512]
    for (int i = 0; i < 4; ++i) {
      out_gmem[threadIdx.x + i * kThreads] = from_float<T>(visible > 0 ? o[i] / l : 0);
    }
    if (threadIdx.x == 0) {
      tensors.lse[tensors.lse_place(sequence, query, head)] = visible > 0 ? m + logf(l) : INFINITY;
    }
    __syncthreads();  // q has been read: the next item may overwrite it
  }
}

}  // namespace mla::MLA_MACHINE::my_stage
