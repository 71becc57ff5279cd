// The fp64 oracle's kernels. As different from the stages as the formula allows: two passes over
// scores in double, no packing of rows, no tiles.
#include <cstdint>

#include "reference/attention.h"
#include "reference/quantise.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 256;

struct Smem {
  double q[kHeadDimQK];
  double reduce[kThreads];
};

// One column of a cache row of 16 bits, and of quantised bytes.
template <typename T>
__device__ double value_of(const Problem&, const T* key_gmem, int column) {
  return to_float(key_gmem[column]);
}
__device__ double value_of(const Problem& problem, const uint8_t* key_gmem, int column) {
  return dequantise_value(problem, key_gmem, column);
}

// One item: one (row, head). Its scores, and |v|^2 of each token, [2, max_seqlen_k] doubles, belong
// to the block.
// `Key` is an element of the cache: T, or a byte, which takes more registers than ptxas would give (0).
template <typename T, typename Key>
__global__ void __launch_bounds__(kThreads, sizeof(Key) == 1 ? 2 : 0)
    decode_row(Problem problem, Tensors tensors, const QueryRow* __restrict__ rows,
               int64_t num_items, double* __restrict__ scores, double* __restrict__ out,
               double* __restrict__ lse, double* __restrict__ out_size,
               RowSize* __restrict__ row_size) {
  Smem& smem = shared_memory<Smem>();
  double* s = scores + blockIdx.x * 2 * problem.max_seqlen_k();
  double* v_square = s + problem.max_seqlen_k();
  const auto sum_over_block = [&](double value) {
    __syncthreads();  // the sum before has been read
    smem.reduce[threadIdx.x] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += smem.reduce[i];
    return sum;
  };
  const auto largest_of_block = [&](double value) {
    __syncthreads();
    smem.reduce[threadIdx.x] = value;
    __syncthreads();
    for (int i = 0; i < kThreads; ++i) value = fmax(value, smem.reduce[i]);
    return value;
  };
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const QueryRow row = rows[item / problem.num_heads_q];
    const int head = static_cast<int>(item % problem.num_heads_q);
    const int head_kv = head / (problem.num_heads_q / problem.num_heads_kv);
    const int32_t* table = tensors.table_row(row.sequence);
    const Key* cache = static_cast<const Key*>(tensors.kv_cache);
    const T* q = static_cast<const T*>(tensors.q) + tensors.q_place(row.sequence, row.query, head);
    const int seqlen_k = clamped_length(problem, tensors.seqlens_k[row.sequence]);
    const int visible = problem.causal ? seqlen_k - problem.seqlen_q + row.query + 1 : seqlen_k;

    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      smem.q[column] = to_float(q[column]);
    }
    __syncthreads();

    double largest = -INFINITY, k_square = 0;
    for (int t = threadIdx.x; t < visible; t += kThreads) {
      const Key* k = cache + cache_place(problem, tensors, table, t, head_kv);
      double dot = 0, square = 0;
      const auto add = [&](int column, double x) {
        dot += smem.q[column] * x;
        square += x * x;
      };
#pragma unroll 1  // unrolled, it would spill on sm_80
      for (int column = 0; column < kHeadDimQK; column += 8) {
        if (column == kHeadDimV) v_square[t] = square;
        if constexpr (sizeof(Key) == 1) {
          for (int i = 0; i < 8; ++i) add(column + i, value_of(problem, k, column + i));
        } else {
          const uint4 eight = *reinterpret_cast<const uint4*>(k + column);
          for (int i = 0; i < 8; ++i) {
            add(column + i, to_float(reinterpret_cast<const T*>(&eight)[i]));
          }
        }
      }
      s[t] = dot * problem.softmax_scale;
      largest = fmax(largest, s[t]);
      if (isfinite(square)) k_square = fmax(k_square, square);
    }
    largest = largest_of_block(largest);
    k_square = largest_of_block(k_square);

    double sum = 0, squares = 0, second_moment = 0, subnormal = 0;
    for (int t = threadIdx.x; t < visible; t += kThreads) {
      const double p = exp(s[t] - largest);
      s[t] = p;
      sum += p;
      if (p == 0) continue;  // whatever V is
      squares += p * p * v_square[t];
      second_moment += p * v_square[t];
      if (p < smallest_normal(problem.dtype)) {
        subnormal += rounded_size(problem.dtype, p) * sqrt(v_square[t]);
      }
    }
    sum = sum_over_block(sum);  // also: every weight is written
    squares = sum_over_block(squares);
    second_moment = sum_over_block(second_moment);
    subnormal = sum_over_block(subnormal);

    double out_square = 0, logit = 0;
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      double o = 0, size = 0, k_largest = 0;
      for (int t = 0; t < visible; ++t) {
        const Key* k = cache + cache_place(problem, tensors, table, t, head_kv);
        const double x = value_of(problem, k, column);
        o += s[t] * x;
        size += rounded_size(problem.dtype, s[t]) * fabs(x);
        if (isfinite(x)) k_largest = fmax(k_largest, fabs(x));
      }
      logit += fabs(smem.q[column]) * k_largest;
      if (column >= kHeadDimV) continue;
      if (visible > 0) {
        o /= sum;
        size /= sum;
      }
      out[item * kHeadDimV + column] = o;
      out_size[item * kHeadDimV + column] = size;
      out_square += o * o;
    }
    out_square = sum_over_block(out_square);
    logit = sum_over_block(logit);
    double q_square = 0;
    for (int column = 0; column < kHeadDimQK; ++column) q_square += smem.q[column] * smem.q[column];
    if (threadIdx.x == 0) {
      lse[item] = visible > 0 ? largest + log(sum) : INFINITY;
      RowSize size{};
      if (visible > 0) {
        size.tokens = visible;
        size.logit = fabs(double{problem.softmax_scale}) * fmin(sqrt(q_square * k_square), logit);
        size.rounding = (sqrt(squares) + subnormal) / sum;
        size.spread = sqrt(fmax(0.0, second_moment / sum - out_square));
      }
      row_size[item] = size;
    }
    __syncthreads();  // the scores and the plan are free for the next item
  }
}

}  // namespace

Status launch_oracle(const Problem& problem, const Tensors& tensors, const QueryRow* rows,
                     int64_t num_items, unsigned grid, double* scores, double* out, double* lse,
                     double* out_size, RowSize* row_size) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        is_quantised(problem.cache_format) ? decode_row<T, uint8_t> : decode_row<T, T>;
    return launch(kernel, grid, kThreads, sizeof(Smem), nullptr, problem, tensors, rows, num_items,
                  scores, out, lse, out_size, row_size);
  });
}

}  // namespace mla::MLA_MACHINE
