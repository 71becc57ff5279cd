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
__global__ void cut(Problem problem, Tensors tensors, SequenceShares shares, RankLengths lengths) {
  const int64_t items = int64_t{problem.batch} * problem.seqlen_q;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const int sequence = static_cast<int>(item / problem.seqlen_q);
    const int query = static_cast<int>(item % problem.seqlen_q);
    const ContextShare share = shares.of(sequence);
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

__device__ __forceinline__ const float* lse_at(const Parts& parts, int part, const Row& row) {
  const float* of_part =
      part == parts.apart ? parts.apart_lse : parts.lse + part * parts.lse_stride;
  return of_part + row.head * parts.lse_head + row.token;
}
// -inf for what saw nothing: decode() writes +inf there
__device__ __forceinline__ float weighable(float lse) {
  return lse == INFINITY ? -INFINITY : lse;
}
__device__ __forceinline__ float lse_of(const Parts& parts, int part, const Row& row) {
  return weighable(*lse_at(parts, part, row));
}

template <typename T>
__device__ __forceinline__ const T* out_of(const Parts& parts, int part, const Row& row) {
  const T* of_part = part == parts.apart
                         ? static_cast<const T*>(parts.apart_out)
                         : static_cast<const T*>(parts.out) + part * parts.out_stride;
  return of_part + row.head * parts.out_head + row.token * kHeadDimV;
}

// In the order of parts, every thread alike.
template <typename LseOf>
__device__ __forceinline__ RowMerge merge_of(int count, LseOf lse_of_part) {
  float largest = -INFINITY, sum = 0;
  for (int part = 0; part < count; ++part) largest = fmaxf(largest, lse_of_part(part));
  if (largest == -INFINITY) largest = 0;  // nothing seen: the sum is 0
  for (int part = 0; part < count; ++part) sum += expf(lse_of_part(part) - largest);
  return {largest, sum};
}
__device__ __forceinline__ RowMerge merge_of(const Parts& parts, const Row& row) {
  return merge_of(parts.count, [&](int part) { return lse_of(parts, part, row); });
}

// Blocks of kRows rows, row = head * tokens + token, with so many threads for each.
template <int kRows, int kThreadsPerRow, typename Body>
__device__ void for_each_row(const Problem& problem, Body body) {
  const int64_t tokens = int64_t{problem.batch} * problem.seqlen_q;
  const int64_t rows = tokens * problem.num_heads_q;
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreadsPerRow; row < rows;
       row += int64_t{gridDim.x} * kRows) {
    const int64_t token = row % tokens;
    body(Row{row, token, static_cast<int>(row / tokens), static_cast<int>(token / problem.seqlen_q),
             static_cast<int>(token % problem.seqlen_q)});
  }
}

// Where a warp has a row, a lane has four columns of each 128.
constexpr int kVectors = kHeadDimV / 128;
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
  tensors.lse[tensors.lse_place(row.sequence, row.query, row.head)] = lse;
}

// out += weight * the eight values of `packed`, if the part saw anything: else there may be anything. Not by a branch,
// into which the compiler would move the load.
template <typename T>
__device__ __forceinline__ void add_if(bool saw, const uint4& packed, float weight,
                                       float (&out)[8]) {
  const T* value = reinterpret_cast<const T*>(&packed);
  for (int i = 0; i < 8; ++i) {
    const float sum = out[i] + weight * to_float(value[i]);
    out[i] = saw ? sum : out[i];
  }
}

// Two warps per row, so that few rows are spread over many multiprocessors; a thread has eight columns.
constexpr int kMergeThreads = 128;
constexpr int kThreadsPerMerge = kHeadDimV / 8;
constexpr int kMergeRows = kMergeThreads / kThreadsPerMerge;

// What a row takes is the latency of its loads. Those of kAtOnce parts do not wait for each other: nothing is asked
// of one before all are under way. Of more parts than kMostAtOnce, so many follow each other. Added in the order of
// parts, whatever kAtOnce is.
constexpr int kMostAtOnce = 8;
template <typename T, int kAtOnce>
__global__ void __launch_bounds__(kMergeThreads)
    merge(Problem problem, Parts parts, Tensors tensors) {
  for_each_row<kMergeRows, kThreadsPerMerge>(problem, [&](const Row& row) {
    const int column = static_cast<int>(threadIdx.x) % kThreadsPerMerge * 8;
    RowMerge merged = {0, 0};
    float out[8] = {};
    for (int first = 0; first < parts.count; first += kAtOnce) {
      float lse[kAtOnce];
      uint4 packed[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = min(first + i, parts.count - 1);  // without a branch
        lse[i] = *lse_at(parts, part, row);
        packed[i] = *reinterpret_cast<const uint4*>(out_of<T>(parts, part, row) + column);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        lse[i] = first + i < parts.count ? weighable(lse[i]) : -INFINITY;
      }
      if (kAtOnce < kMostAtOnce || parts.count <= kAtOnce) {
        merged = merge_of(kAtOnce, [&](int i) { return lse[i]; });
      } else if (first == 0) {
        merged = merge_of(parts, row);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        add_if<T>(lse[i] != -INFINITY, packed[i], merged.weight(lse[i]), out);
      }
      if (kAtOnce < kMostAtOnce) break;  // there are no more
    }
    T* to = static_cast<T*>(tensors.out) + tensors.out_place(row.sequence, row.query, row.head);
    *reinterpret_cast<uint4*>(to + column) = {pack<T>(out[0], out[1]), pack<T>(out[2], out[3]),
                                              pack<T>(out[4], out[5]), pack<T>(out[6], out[7])};
    if (column == 0) store_lse(tensors, row, merged.lse());
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weigh(Problem problem, Parts parts, int mine, float* weighted) {
  for_each_row<kWarps, 32>(problem, [&](const Row& row) {
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
  for_each_row<kWarps, 32>(problem, [&](const Row& row) {
    T* to = static_cast<T*>(tensors.out) + tensors.out_place(row.sequence, row.query, row.head);
    for (int v = 0; v < kVectors; ++v) {
      const float4 value =
          *reinterpret_cast<const float4*>(sum + row.place * kHeadDimV + column_of(v));
      const float out[4] = {value.x, value.y, value.z, value.w};
      store_rounded(out, to + column_of(v));
    }
    const RowMerge merged = merge_of(parts, row);
    if (threadIdx.x % 32 == 0) store_lse(tensors, row, merged.lse());
  });
}

unsigned grid_of_rows(const Problem& problem, int rows_per_block) {
  return grid_for((problem.lse_elements() + rows_per_block - 1) / rows_per_block);
}

}  // namespace

Status launch_cut(const Problem& problem, const Tensors& tensors, const SequenceShares& shares,
                  const RankLengths& lengths, Stream stream) {
  const int64_t items = int64_t{problem.batch} * problem.seqlen_q;
  return launch(cut, grid_for((items + kThreads - 1) / kThreads), kThreads, 0, stream, problem,
                tensors, shares, lengths);
}

Status launch_merge(const Problem& problem, const Parts& parts, const Tensors& tensors,
                    Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = parts.count <= 2   ? merge<T, 2>
                        : parts.count <= 4 ? merge<T, 4>
                                           : merge<T, 8>;
    return launch(kernel, grid_of_rows(problem, kMergeRows), kMergeThreads, 0, stream, problem,
                  parts, tensors);
  });
}

Status launch_weigh(const Problem& problem, const Parts& parts, int mine, float* weighted,
                    Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(weigh<decltype(zero)>, grid_of_rows(problem, kWarps), kThreads, 0, stream,
                  problem, parts, mine, weighted);
  });
}

Status launch_finish(const Problem& problem, const Parts& parts, const float* sum,
                     const Tensors& tensors, Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(finish<decltype(zero)>, grid_of_rows(problem, kWarps), kThreads, 0, stream,
                  problem, parts, sum, tensors);
  });
}

}  // namespace mla::MLA_MACHINE
