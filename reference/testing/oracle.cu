// The fp64 oracle's kernels. As different from the stages as the formula allows: two passes over
// scores in double, no packing of rows, no tiles.
#include <cstdint>

#include "reference/attention.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 256;

struct Smem {
  double q[kHeadDimQK];
  double reduce[kThreads];
};

// One item: one (row, head). Its scores, [max_seqlen_k] doubles, belong to the block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_row(Problem problem, Tensors tensors, const QueryRow* __restrict__ rows,
               int64_t num_items, double* __restrict__ scores, double* __restrict__ out,
               double* __restrict__ lse) {
  Smem& smem = shared_memory<Smem>();
  double* s = scores + blockIdx.x * problem.max_seqlen_k();
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const QueryRow row = rows[item / problem.num_heads_q];
    const int head = static_cast<int>(item % problem.num_heads_q);
    const int head_kv = head / (problem.num_heads_q / problem.num_heads_kv);
    const int32_t* table = tensors.table_row(row.sequence);
    const T* cache = static_cast<const T*>(tensors.kv_cache);
    const T* q = static_cast<const T*>(tensors.q) + tensors.q_place(row.sequence, row.query, head);
    const int seqlen_k = clamped_length(problem, tensors.seqlens_k[row.sequence]);
    const int visible = problem.causal ? seqlen_k - problem.seqlen_q + row.query + 1 : seqlen_k;

    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      smem.q[column] = to_float(q[column]);
    }
    __syncthreads();

    double largest = -INFINITY;
    for (int t = threadIdx.x; t < visible; t += kThreads) {
      const T* k = cache + cache_place(problem, tensors, table, t, head_kv);
      double dot = 0;
      for (int column = 0; column < kHeadDimQK; column += 8) {
        const uint4 eight = *reinterpret_cast<const uint4*>(k + column);
        for (int i = 0; i < 8; ++i) {
          dot += smem.q[column + i] *
                 static_cast<double>(to_float(reinterpret_cast<const T*>(&eight)[i]));
        }
      }
      s[t] = dot * problem.softmax_scale;
      largest = fmax(largest, s[t]);
    }
    smem.reduce[threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) largest = fmax(largest, smem.reduce[i]);
    __syncthreads();  // also: every score is written

    double sum = 0;
    for (int t = threadIdx.x; t < visible; t += kThreads) {
      s[t] = exp(s[t] - largest);
      sum += s[t];
    }
    smem.reduce[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += smem.reduce[i];

    double left = 0, right = 0;  // columns threadIdx.x and threadIdx.x + 256
    for (int t = 0; t < visible; ++t) {
      const T* v = cache + cache_place(problem, tensors, table, t, head_kv);
      left += s[t] * static_cast<double>(to_float(v[threadIdx.x]));
      right += s[t] * static_cast<double>(to_float(v[threadIdx.x + kThreads]));
    }
    out[item * kHeadDimV + threadIdx.x] = visible > 0 ? left / sum : 0;
    out[item * kHeadDimV + threadIdx.x + kThreads] = visible > 0 ? right / sum : 0;
    if (threadIdx.x == 0) lse[item] = visible > 0 ? largest + log(sum) : INFINITY;
    __syncthreads();  // the scores and the plan are free for the next item
  }
}

}  // namespace

Status launch_oracle(const Problem& problem, const Tensors& tensors, const QueryRow* rows,
                     int64_t num_items, unsigned grid, double* scores, double* out, double* lse) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(decode_row<decltype(zero)>, grid, kThreads, sizeof(Smem), nullptr, problem,
                  tensors, rows, num_items, scores, out, lse);
  });
}

}  // namespace mla::MLA_MACHINE
