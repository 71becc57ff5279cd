// Making a plan on the device: one block, in parallel over sequences and over workers. The rules are
// those of make_plan_on_host in split_plan.cpp, which tells them in the order of the line.
#include <climits>

#include "stages/common/launch.h"
#include "stages/common/split_plan.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 2 * kThreads;  // sequences looked at together, two neighbours a thread
static_assert(kWarps == 32, "a warp adds up the sums of all warps");

struct PlanMemory {
  int64_t start[kTile];  // of each sequence of the tile, on the line
  int first_cut[kTile];  // first worker that begins inside the sequence
  int cuts[kTile];       // how many do
  int64_t warp_sum[2][kWarps];
};

// The sum of `value` over all threads before this one; `total` is the sum over all. Callers that
// follow one another without a barrier alternate between two arrays.
__device__ __forceinline__ int64_t exclusive_sum(int64_t value, int64_t (&warp_sum)[kWarps],
                                                 int64_t* total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffff, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  int64_t all = warp_sum[lane];
  int64_t before = lane < warp ? all : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    all += __shfl_xor_sync(0xffffffff, all, offset);
    before += __shfl_xor_sync(0xffffffff, before, offset);
  }
  *total = all;
  return before + inclusive - value;
}

__global__ void __launch_bounds__(kThreads)
    make_plan(Problem problem, PlanShape shape, const int32_t* __restrict__ seqlens_k,
              SplitWorkspace plan) {
  PlanMemory& smem = shared_memory<PlanMemory>();
  const int piece_blocks = problem.fixed_split_tokens / kPageSize;  // 0: cut anywhere
  const int max_seqlen_k = static_cast<int>(problem.max_seqlen_k());
  const auto blocks_of = [&](int length) {
    return max(1, static_cast<int>(pages_for(max(0, min(length, max_seqlen_k)))));
  };
  const auto pieces_of = [&](int blocks) {
    return piece_blocks > 0 ? (blocks + piece_blocks - 1) / piece_blocks : 1;
  };

  // How long the line is, and who gets how much of it.
  int64_t total_blocks = 0, total_pieces = 0;
  for (int64_t i = threadIdx.x; i < problem.batch; i += kThreads) {
    const int blocks = blocks_of(seqlens_k[i]);
    total_blocks += blocks;
    total_pieces += pieces_of(blocks);
  }
  exclusive_sum(total_blocks, smem.warp_sum[0], &total_blocks);
  exclusive_sum(total_pieces, smem.warp_sum[1], &total_pieces);
  const bool alike = piece_blocks == 0 && (problem.batch == 1 || total_blocks <= shape.workers);
  const int fixed = alike ? 0 : shape.fixed_blocks;
  const int64_t length = total_blocks + fixed * total_pieces;
  const int used = static_cast<int>(min(static_cast<int64_t>(shape.workers), length));
  const int64_t quotient = length / used;
  const unsigned remainder = static_cast<unsigned>(length % used);
  const auto interval_begin = [&](int worker) {  // used <= 65535: the product fits 32 bits
    return quotient * worker + remainder * static_cast<unsigned>(worker) / used;
  };

  int64_t line = 0;  // where the tile begins
  int64_t slots = 0, split_sequences = 0;
  for (int64_t base = 0; base < problem.batch; base += kTile) {
    const int64_t first = base + 2 * threadIdx.x;
    const int count = static_cast<int>(min(int64_t{kTile}, problem.batch - base));
    int blocks[2], cost[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      blocks[j] = cost[j] = 0;
      if (first + j < problem.batch) {
        const int seqlen_k = seqlens_k[first + j];
        plan.seqlens_k[first + j] = seqlen_k;
        blocks[j] = blocks_of(seqlen_k);
        cost[j] = blocks[j] + fixed * pieces_of(blocks[j]);
      }
    }
    int64_t tile_length;
    const int64_t before =
        line + exclusive_sum(int64_t{cost[0]} + cost[1], smem.warp_sum[0], &tile_length);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int local = 2 * threadIdx.x + j;
      smem.start[local] = before + (j == 0 ? 0 : cost[0]);
      smem.first_cut[local] = INT_MAX;
      smem.cuts[local] = 0;
    }
    __syncthreads();  // the tile's stretch of the line is there

    // The worker's beginning: in the last sequence that starts at or before its interval.
    const auto locate = [&](int worker, int* local) -> WorkerBegin {
      const int64_t place = interval_begin(worker);
      *local = -1;
      if (place < line || place >= line + tile_length) return {};
      int low = 0, high = count;  // start[low] <= place < start[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (smem.start[middle] <= place ? low : high) = middle;
      }
      *local = low;
      const int offset = static_cast<int>(place - smem.start[low]);
      const int sequence = static_cast<int>(base) + low;
      if (piece_blocks == 0) return {sequence, max(0, offset - fixed), 0, 0};
      const int piece = (offset + fixed + piece_blocks - 1) / (fixed + piece_blocks);
      const int end = static_cast<int>(
          (low + 1 < count ? smem.start[low + 1] : line + tile_length) - smem.start[low]);
      if (piece * (fixed + piece_blocks) >= end) return {sequence + 1, 0, 0, 0};
      return {sequence, piece * piece_blocks, piece, 0};
    };
    for (int worker = threadIdx.x; worker < used; worker += kThreads) {
      int local;
      const WorkerBegin begin = locate(worker, &local);
      if (local < 0 || piece_blocks > 0 || begin.block == 0) continue;
      atomicMin(&smem.first_cut[local], worker);
      atomicAdd(&smem.cuts[local], 1);
    }
    __syncthreads();  // the cuts are counted
    for (int worker = threadIdx.x; worker < used; worker += kThreads) {
      int local;
      WorkerBegin begin = locate(worker, &local);
      if (local < 0) continue;
      if (piece_blocks == 0 && begin.block > 0) begin.split = worker - smem.first_cut[local] + 1;
      plan.worker_begin[worker] = begin;
    }

    // Slots for the pieces of what was cut: both counts in one sum.
    int splits[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int cuts = piece_blocks > 0 ? pieces_of(blocks[j]) - 1 : smem.cuts[2 * threadIdx.x + j];
      splits[j] = first + j < problem.batch && cuts > 0 ? cuts + 1 : 0;
    }
    const auto packed = [](int n) { return (int64_t{n} << 32) | (n > 0 ? 1 : 0); };
    int64_t tile_total;
    int64_t sum =
        exclusive_sum(packed(splits[0]) + packed(splits[1]), smem.warp_sum[1], &tile_total);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (first + j < problem.batch) {
        plan.slot_begin[first + j] = static_cast<int>(slots + (sum >> 32));
        if (splits[j] > 0) {
          plan.split_sequences[split_sequences + (sum & 0xffffffff)] = static_cast<int>(first + j);
        }
      }
      sum += packed(splits[j]);
    }
    line += tile_length;
    slots += tile_total >> 32;
    split_sequences += tile_total & 0xffffffff;
  }

  for (int worker = used + threadIdx.x; worker <= shape.workers; worker += kThreads) {
    plan.worker_begin[worker] = {problem.batch, 0, 0, 0};
  }
  if (threadIdx.x == 0) {
    plan.slot_begin[problem.batch] = static_cast<int>(slots);
    *plan.header = {kPlanMade,
                    problem.batch,
                    shape.workers,
                    problem.fixed_split_tokens,
                    fixed,
                    static_cast<int>(split_sequences),
                    static_cast<int>(slots),
                    0};
  }
}

}  // namespace

Status launch_make_plan(const Problem& problem, const PlanShape& shape, const int32_t* seqlens_k,
                        const SplitWorkspace& plan, Stream stream) {
  return launch(make_plan, 1, kThreads, sizeof(PlanMemory), stream, problem, shape, seqlens_k,
                plan);
}

}  // namespace mla::MLA_MACHINE
