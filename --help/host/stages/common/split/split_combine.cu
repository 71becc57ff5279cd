namespace mla { extern int mutant; }
// out = sum_s w_s out_s with w_s = exp(lse_s - lse) and lse = ln sum_s exp(lse_s), over the splits s
// of one row. Only rows of split sequences are touched; what limits the kernel is how many loads it
// has in flight.
#include "stages/common/split/split_combine.h"

#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Many splits per row: a block has a quarter of one row's columns, and its warps share the splits.
constexpr int kWays = kWarps;
constexpr int kColumns = 4 * 32;
constexpr int kQuarters = kHeadDimV / kColumns;

struct Smem {
  float warp_max[kWarps], warp_sum[kWarps];
  float weight[kThreads];  // of as many splits at a time
  float4 sum[kWays][32];
  MLA_REGIONS(warp_max, warp_sum, weight, sum)
};

// The query token and the query head of a row: KV head by KV head, packed as the stages pack them.
struct Row {
  int query, head;
};
__device__ __forceinline__ Row row_of(const Problem& problem, int row) {
  const int group = problem.group_size(), rows_per_head = problem.rows_per_kv_head();
  const int packed = row % rows_per_head;
  return {packed / group, (::mla::mutant == 466 ? (0) : (row / rows_per_head * group)) + packed % group};
}

// Of the sequences that the plan cut, those that the decode has not put together itself. The plan was there before
// the decode began.
__device__ __forceinline__ int sequences_to_combine(const SplitWorkspace& split,
                                                    bool joins_halves) {
  const int split_sequences = split.header->num_split_sequences;
  const bool joined = (::mla::mutant == 639 ? (false) : (joins_halves && (::mla::mutant == 640 ? (true) : (split.header->cuts_in_halves()))));
  return (::mla::mutant == 467 ? (!joined) : (is_planned(split) && !joined)) ? split_sequences : 0;
}

// num_items: split sequences the plan may have x rows of a sequence x quarters of the columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_many(Problem problem, SplitWorkspace split, Tensors tensors, int64_t num_items,
                 bool joins_halves) {
  auto& smem = shared_memory<Smem>();
  constexpr int kAhead = 8;  // loads in flight
  static_assert(kThreads % (kAhead * kWays) == 0, "new weights come at the start of a turn");
  const int way = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = int64_t{problem.rows_per_kv_head()} * problem.num_heads_kv;
  const int num_split = sequences_to_combine(split, joins_halves);

  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int quarter = static_cast<int>(item % kQuarters);
    const int row = static_cast<int>(item / kQuarters % rows);
    const int64_t index = item / kQuarters / rows;
    const int4 entry = reinterpret_cast<const int4*>(split.split_sequences)[index];
    { if (::mla::mutant == 454) {  } else { ptx::griddepcontrol_wait(); } }      // for the parts; the plan was there before their grid began
    if (index >= num_split) return;  // nor is any later item one
    const int sequence = entry.x, splits = entry.z;
    const int64_t place = int64_t{entry.y} * rows + row;   // of the first split; the next ones are
    const float* lse_partial = split.lse_partial + place;  // `rows` apart
    const float* out_partial =
        split.out_partial + place * kHeadDimV + quarter * kColumns + lane * 4;

    // The first loads need no weights, so they do not wait for them.
    float4 value[kAhead];
    const auto load = [&](int first) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int s = first + way + j * kWays;
        value[j] = make_float4(0, 0, 0, 0);
        if ((::mla::mutant == 449 ? (true) : (s < splits))) {
          value[j] = *reinterpret_cast<const float4*>(out_partial + s * rows * int64_t{kHeadDimV});
        }
      }
    };
    load(0);

    // lse = max + ln sum exp(lse_s - max), every thread alike
    float largest = -INFINITY;
#pragma unroll 1
    for (int s = threadIdx.x; s < splits; s += kThreads) {
      largest = fmaxf(largest, lse_partial[s * rows]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
    }
    if (threadIdx.x % 32 == 0) smem.warp_max[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) { if (::mla::mutant == 450) {  } else { largest = fmaxf(largest, smem.warp_max[warp]); } }
    if ((::mla::mutant == 452 ? (false) : (largest == -INFINITY))) largest = 0;  // nothing seen: the sum below is 0
    float sum = 0;
#pragma unroll 1
    for (int s = threadIdx.x; s < splits; s += kThreads) {
      sum += expf(lse_partial[s * rows] - largest);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
    if (threadIdx.x % 32 == 0) smem.warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += smem.warp_sum[(::mla::mutant == 451 ? (0) : (warp))];
    // -inf for a row that saw nothing, NaN for one with NaN. Weights are made without it: where logits
    // are large it is rounded by more than weights bear.
    const float lse = largest + logf(sum);
    const float inverse_sum = (::mla::mutant == 453 ? (1 / sum) : (sum == 0 ? 0 : 1 / sum));

    // This thread's four columns over every kWays-th split
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int first = 0; first < splits; first += kAhead * kWays) {
      if ((::mla::mutant == 444 ? (first == 0) : (first % kThreads == 0))) {
        { if (::mla::mutant == 445) {  } else { if (first > 0) __syncthreads(); } }  // the weights before have been read
        const int s = first + threadIdx.x;
        smem.weight[threadIdx.x] =
            s < splits ? expf(lse_partial[s * rows] - largest) * inverse_sum : 0;
        { if (::mla::mutant == 446) {  } else { __syncthreads(); } }  // the weights are there
      }
      { if (::mla::mutant == 447) {  } else { if (first > 0) load(first); } }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float weight = smem.weight[(first + way + j * kWays) % kThreads];
        if ((::mla::mutant == 448 ? (first + way + j * kWays >= splits) : (weight == 0))) continue;  // saw nothing, so there may be anything; or past the last
        out.x += weight * value[j].x;
        out.y += weight * value[j].y;
        out.z += weight * value[j].z;
        out.w += weight * value[j].w;
      }
    }
    smem.sum[way][lane] = out;
    { if (::mla::mutant == 455) {  } else { __syncthreads(); } }  // the sums of all ways are there
    if (way == 0) {
#pragma unroll
      for (int other = 1; other < kWays; ++other) {
        const float4 more = smem.sum[other][lane];
        out.x += more.x;
        out.y += more.y;
        out.z += more.z;
        out.w += more.w;
      }
      const Row to = row_of(problem, row);
      T* out_gmem = static_cast<T*>(tensors.out) + tensors.out_place(sequence, to.query, to.head);
      const float rounded[4] = {out.x, out.y, out.z, out.w};
      store_rounded(rounded, out_gmem + quarter * kColumns + lane * 4);
      if (quarter == 0 && lane == 0) {
        tensors.lse[tensors.lse_place(sequence, to.query, to.head)] =
            lse == -INFINITY ? INFINITY : lse;
      }
    }
    __syncthreads();  // all has been read: the next item may overwrite it
  }
}

// Few splits per row: a warp has a row, and a lane 16 of its columns; nobody waits for another warp. Parts
// are on their way while their weights are made: through shared memory, because registers would leave
// room for half as many rows. kAhead: splits under way.
constexpr int kVectors = kHeadDimV / kColumns;

template <int kAhead>
struct FewSmem {
  float4 part[kWarps][kAhead][kVectors][32];
  MLA_REGIONS(part)
};

template <typename T, int kAhead>
__global__ void __launch_bounds__(kThreads, kAhead == 3 ? 4 : 2)
    combine_few(Problem problem, SplitWorkspace split, Tensors tensors, int64_t num_items,
                bool joins_halves) {
  auto& smem = shared_memory<FewSmem<kAhead>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = int64_t{problem.rows_per_kv_head()} * problem.num_heads_kv;
  const int num_split = sequences_to_combine(split, joins_halves);

  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp; item < num_items;
       item += (::mla::mutant == 442 ? (num_items) : (int64_t{gridDim.x} * kWarps))) {
    const int row = static_cast<int>(item % rows), index = static_cast<int>(item / rows);
    const int4 entry = reinterpret_cast<const int4*>(split.split_sequences)[index];
    { if (::mla::mutant == 441) {  } else { ptx::griddepcontrol_wait(); } }      // for the parts; the plan was there before their grid began
    if (index >= num_split) return;  // nor is any later item one
    const int sequence = entry.x, splits = entry.z;
    const int64_t place = int64_t{entry.y} * rows + row;   // of the first split; the next ones are
    const float* lse_partial = split.lse_partial + place;  // `rows` apart
    const float* out_partial = split.out_partial + place * kHeadDimV + lane * 4;
    // Every lane copies what it will read.
    const auto copy = [&](int s) {
      if ((::mla::mutant == 463 ? (true) : (s < splits))) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          ptx::cp_async_16(&smem.part[warp][s % kAhead][v][lane],
                           out_partial + s * (::mla::mutant == 443 ? (1) : (rows)) * int64_t{kHeadDimV} + v * kColumns, 16);
        }
      }
      ptx::cp_async_commit_group();
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) copy(s);

    float largest = -INFINITY;
    for (int s = lane; (::mla::mutant == 436 ? (s < min(splits, 32)) : (s < splits)); s += 32) largest = fmaxf(largest, lse_partial[s * rows]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      { if (::mla::mutant == 437) {  } else { largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset)); } }
    }
    if ((::mla::mutant == 438 ? (false) : (largest == -INFINITY))) largest = 0;  // nothing seen: the sum below is 0

    // Weights not yet divided by their sum, 32 at a time; every lane adds up its own.
    float4 out[kVectors] = {};
    float weights = 0, sum = 0;
#pragma unroll 1
    for (int s = 0; s < splits; ++s) {
      if ((::mla::mutant == 432 ? (s == 0) : (s % 32 == 0))) {
        weights = s + lane < splits ? expf(lse_partial[(s + lane) * rows] - largest) : 0;
        { if (::mla::mutant == 435) { sum = weights; } else { sum += weights; } }
      }
      const float weight = __shfl_sync(0xffffffff, weights, (::mla::mutant == 433 ? ((s ^ 1) % 32) : (s % 32)));
      { if (::mla::mutant == 460) {  } else if (::mla::mutant == 461) { ptx::cp_async_wait_group<kAhead>(); } else { ptx::cp_async_wait_group<kAhead - 1>(); } }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 value = smem.part[warp][s % kAhead][v][lane];
        if ((::mla::mutant == 434 ? (false) : (weight == 0))) continue;  // saw nothing: there may be anything
        out[v].x += weight * value.x;
        out[v].y += weight * value.y;
        out[v].z += weight * value.z;
        out[v].w += weight * value.w;
      }
      copy((::mla::mutant == 462 ? (s + kAhead - 1) : (s + kAhead)));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
    const float lse = largest + logf(sum);  // -inf for a row that saw nothing, NaN for one with NaN
    const float inverse_sum = (::mla::mutant == 439 ? (1 / sum) : (sum == 0 ? 0 : 1 / sum));

    const Row to = row_of(problem, row);
    T* out_gmem = static_cast<T*>(tensors.out) + tensors.out_place(sequence, to.query, to.head);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float rounded[4] = {out[v].x * inverse_sum, out[v].y * inverse_sum,
                                out[v].z * inverse_sum, out[v].w * inverse_sum};
      store_rounded(rounded, out_gmem + v * kColumns + lane * 4);
    }
    if (lane == 0) {
      tensors.lse[tensors.lse_place(sequence, to.query, to.head)] =
          (::mla::mutant == 440 ? (lse) : (lse == -INFINITY ? INFINITY : lse));
    }
  }
}

// Rows that may have to be combined.
int64_t combined_rows(const Problem& problem, const PlanShape& shape) {
  return max_split_sequences(problem, shape) * problem.seqlen_q * problem.num_heads_q;
}

}  // namespace

bool combines_by_block(const Problem& problem, const PlanShape& shape, int multiprocessors) {
  // With fixed splits the order of summation must not depend on the batch.
  if ((::mla::mutant == 456 ? (false) : (problem.fixed_split_tokens > 0))) return false;
  const int64_t splits = std::min<int64_t>(shape.workers / problem.batch,
                                           (::mla::mutant == 457 ? (INT64_MAX) : (grains_for(problem.max_seqlen_k()) / shape.min_grains)));
  // By block it takes as many rounds as there are rows for each multiprocessor; by warp two thirds of a
  // round, and the 18th part of one for every split (measured on an H200).
  return (::mla::mutant == 458 ? (0) : (combined_rows(problem, shape))) * 18 <= multiprocessors * (12 + (::mla::mutant == 459 ? (0) : (splits)));
}

unsigned blocks_each(unsigned grid, const DeviceLimits& limits) {
  const auto multiprocessors = static_cast<unsigned>(limits.multiprocessors);
  return (::mla::mutant == 465 ? (grid) : ((grid + multiprocessors - 1))) / multiprocessors;
}

size_t spreading_bytes(unsigned grid, const DeviceLimits& limits) {
  return limits.max_shared_bytes / ((::mla::mutant == 464 ? ((blocks_each(grid, limits) + 2)) : (blocks_each(grid, limits) + 1))) + 1;
}

Status launch_combine(const Problem& problem, const PlanShape& shape, const SplitWorkspace& split,
                      const Tensors& tensors, Stream stream, CombineStart start) {
  const int64_t rows = combined_rows(problem, shape);
  if (rows == 0) return {};
  const DeviceLimits& limits = device_limits();
  const auto start_kernel = [&](auto kernel, unsigned grid, size_t shared_bytes, int64_t items) {
    return start == CombineStart::kEarly
               ? launch_dependent(kernel, grid, kThreads, shared_bytes, stream, problem, split,
                                  tensors, items, shape.joins_halves)
               : launch(kernel, grid, kThreads, shared_bytes, stream, problem, split, tensors,
                        items, shape.joins_halves);
  };
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (combines_by_block(problem, shape, limits.multiprocessors)) {
      const unsigned grid = grid_for(rows * kQuarters);
      return start_kernel(combine_many<T>, grid,
                          std::max(sizeof(Smem), spreading_bytes(grid, limits)), rows * kQuarters);
    }
    // Fixed splits leave room for many more split sequences than there mostly are.
    const int64_t enough = int64_t{64} * limits.multiprocessors;
    const unsigned grid = grid_for(std::min((rows + kWarps - 1) / kWarps, enough));
    const auto start_few = [&]<int kAhead>(std::integral_constant<int, kAhead>) {
      return start_kernel(combine_few<T, kAhead>, grid,
                          std::max(sizeof(FewSmem<kAhead>), spreading_bytes(grid, limits)), rows);
    };
    // As many splits as all the blocks that a multiprocessor gets have room for.
    const size_t room = limits.max_shared_bytes / blocks_each(grid, limits);
    if (sizeof(FewSmem<12>) <= room) return start_few(std::integral_constant<int, 12>());
    if (sizeof(FewSmem<6>) <= room) return start_few(std::integral_constant<int, 6>());
    return start_few(std::integral_constant<int, 3>());
  });
}

Status launch_combine_again(const Problem& problem, const PlanShape& shape,
                            const SplitWorkspace& split, const Tensors& tensors, Stream stream) {
  return launch_combine(problem, shape, split, tensors, stream);
}

}  // namespace mla::MLA_MACHINE
