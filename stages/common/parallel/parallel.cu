// The kernels around a rank's decode: which tokens are its own, and the merge of the ranks' results.
#include "stages/common/machine/launch.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/parallel/parallel_kernels.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A thread per query token. Every query token of a sequence sees the pages that end before the first one's
// last token: the bulk. The pages after them are the tail, of which each query token sees a part of its own.
// Without a tail all query tokens see the same, and the bulk is all of it.
__global__ void cut(Problem problem, Tensors tensors, ContextShare share, RankLengths lengths) {
  const int64_t items = int64_t{problem.batch} * problem.seqlen_q;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const int sequence = static_cast<int>(item / problem.seqlen_q);
    const int query = static_cast<int>(item % problem.seqlen_q);
    const int length = clamped_length(problem, tensors.seqlens_k[sequence]);
    if (lengths.tail == nullptr) {
      if (query == 0) {
        lengths.bulk[sequence] = static_cast<int32_t>(share.tokens(length, problem.page_size));
      }
      continue;
    }
    const auto visible = [&](int q) {
      const int64_t tokens = problem.visible_tokens(length, q);
      return tokens < 0 ? 0 : tokens;
    };
    const int64_t bulk_pages = share.pages(visible(0) / problem.page_size);
    const int64_t bulk = bulk_pages * problem.page_size;
    if (query == 0) lengths.bulk[sequence] = static_cast<int32_t>(bulk);
    const int64_t tail = share.tokens(visible(query), problem.page_size) - bulk;
    lengths.tail[item] = static_cast<int32_t>(tail);
    for (int64_t column = 0; column < pages_for(tail, problem.page_size); ++column) {
      lengths.tail_table[item * lengths.tail_columns + column] =
          tensors.table_row(sequence)[bulk_pages + column];
    }
  }
}

// What merges the parts of one row: weights exp(lse - largest) / sum.
struct RowMerge {
  float largest, sum;
  __device__ float weight(float lse) const { return expf(lse - largest) / sum; }
  // +inf for a row that saw nothing
  __device__ float lse() const { return sum == 0 ? INFINITY : largest + logf(sum); }
};

struct Row {
  int64_t place;  // [heads, tokens]
  int64_t token;  // of all sequences
  int head, sequence, query;
};

// lse of a part, -inf if it saw nothing: decode() writes +inf there
__device__ __forceinline__ float lse_of(const Parts& parts, int part, const Row& row) {
  const float* of_part =
      part == parts.apart ? parts.apart_lse : parts.lse + part * parts.lse_stride;
  const float lse = of_part[row.head * parts.lse_head + row.token];
  return lse == INFINITY ? -INFINITY : lse;
}

template <typename T>
__device__ __forceinline__ const T* out_of(const Parts& parts, int part, const Row& row) {
  const T* of_part = part == parts.apart
                         ? static_cast<const T*>(parts.apart_out)
                         : static_cast<const T*>(parts.out) + part * parts.out_stride;
  return of_part + row.head * parts.out_head + row.token * kHeadDimV;
}

// In the order of parts, every lane alike.
__device__ __forceinline__ RowMerge merge_of(const Parts& parts, const Row& row) {
  float largest = -INFINITY, sum = 0;
  for (int part = 0; part < parts.count; ++part) largest = fmaxf(largest, lse_of(parts, part, row));
  if (largest == -INFINITY) largest = 0;  // nothing seen: the sum is 0
  for (int part = 0; part < parts.count; ++part) sum += expf(lse_of(parts, part, row) - largest);
  return {largest, sum};
}

// A warp per row, row = head * tokens + token; a lane has four columns of each 128.
constexpr int kVectors = kHeadDimV / 128;

template <typename Body>
__device__ void for_each_row(const Problem& problem, Body body) {
  const int64_t tokens = int64_t{problem.batch} * problem.seqlen_q;
  const int64_t rows = tokens * problem.num_heads_q;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < rows;
       row += int64_t{gridDim.x} * kWarps) {
    const int64_t token = row % tokens;
    body(Row{row, token, static_cast<int>(row / tokens), static_cast<int>(token / problem.seqlen_q),
             static_cast<int>(token % problem.seqlen_q)});
  }
}

__device__ __forceinline__ int column_of(int vector) {
  return vector * 128 + static_cast<int>(threadIdx.x % 32) * 4;
}

// sum += weight * the four values at `from`
template <typename T>
__device__ __forceinline__ void add(const T* from, float weight, float (&sum)[4]) {
  const uint2 packed = *reinterpret_cast<const uint2*>(from);
  const T* value = reinterpret_cast<const T*>(&packed);
  for (int i = 0; i < 4; ++i) sum[i] += weight * to_float(value[i]);
}

__device__ __forceinline__ void store_lse(const Tensors& tensors, const Row& row, float lse) {
  if (threadIdx.x % 32 == 0)
    tensors.lse[tensors.lse_place(row.sequence, row.query, row.head)] = lse;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge(Problem problem, Parts parts, Tensors tensors) {
  for_each_row(problem, [&](const Row& row) {
    const RowMerge merged = merge_of(parts, row);
    float out[kVectors][4] = {};
    for (int part = 0; part < parts.count; ++part) {
      const float lse = lse_of(parts, part, row);
      if (lse == -INFINITY) continue;  // there may be anything
      const T* from = out_of<T>(parts, part, row);
      for (int v = 0; v < kVectors; ++v) add(from + column_of(v), merged.weight(lse), out[v]);
    }
    T* to = static_cast<T*>(tensors.out) + tensors.out_place(row.sequence, row.query, row.head);
    for (int v = 0; v < kVectors; ++v) store_rounded(out[v], to + column_of(v));
    store_lse(tensors, row, merged.lse());
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weigh(Problem problem, Parts parts, int mine, float* weighted) {
  for_each_row(problem, [&](const Row& row) {
    const RowMerge merged = merge_of(parts, row);
    const float lse = lse_of(parts, mine, row);
    const T* from = out_of<T>(parts, 0, row);
    for (int v = 0; v < kVectors; ++v) {
      float out[4] = {};
      if (lse != -INFINITY) add(from + column_of(v), merged.weight(lse), out);
      *reinterpret_cast<float4*>(weighted + row.place * kHeadDimV + column_of(v)) =
          make_float4(out[0], out[1], out[2], out[3]);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish(Problem problem, Parts parts, const float* sum, Tensors tensors) {
  for_each_row(problem, [&](const Row& row) {
    T* to = static_cast<T*>(tensors.out) + tensors.out_place(row.sequence, row.query, row.head);
    for (int v = 0; v < kVectors; ++v) {
      const float4 value =
          *reinterpret_cast<const float4*>(sum + row.place * kHeadDimV + column_of(v));
      const float out[4] = {value.x, value.y, value.z, value.w};
      store_rounded(out, to + column_of(v));
    }
    store_lse(tensors, row, merge_of(parts, row).lse());
  });
}

unsigned grid_of_rows(const Problem& problem) {
  return grid_for((problem.lse_elements() + kWarps - 1) / kWarps);
}

}  // namespace

Status launch_cut(const Problem& problem, const Tensors& tensors, const ContextShare& share,
                  const RankLengths& lengths, Stream stream) {
  const int64_t items = int64_t{problem.batch} * problem.seqlen_q;
  return launch(cut, grid_for((items + kThreads - 1) / kThreads), kThreads, 0, stream, problem,
                tensors, share, lengths);
}

Status launch_merge(const Problem& problem, const Parts& parts, const Tensors& tensors,
                    Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(merge<decltype(zero)>, grid_of_rows(problem), kThreads, 0, stream, problem, parts,
                  tensors);
  });
}

Status launch_weigh(const Problem& problem, const Parts& parts, int mine, float* weighted,
                    Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(weigh<decltype(zero)>, grid_of_rows(problem), kThreads, 0, stream, problem, parts,
                  mine, weighted);
  });
}

Status launch_finish(const Problem& problem, const Parts& parts, const float* sum,
                     const Tensors& tensors, Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(finish<decltype(zero)>, grid_of_rows(problem), kThreads, 0, stream, problem,
                  parts, sum, tensors);
  });
}

}  // namespace mla::MLA_MACHINE
