// Making a plan on the device: one block, in parallel over sequences and over workers. The rules are
// those of make_plan_on_host in make_plan.cpp, which tells them in the order of the line.
#include <climits>

#include "stages/common/machine/launch.h"
#include "stages/common/split/plan.h"
#include "stages/common/split/workspace.h"

namespace mla::MLA_MACHINE {
namespace {

// A tile is what the thread block looks at together: two neighbouring sequences per thread.
template <int kThreads>
struct Smem {
  int64_t start[2 * kThreads];  // of each sequence of the tile, on the line
  int first_cut[2 * kThreads];  // first worker that begins inside the sequence
  int cuts[2 * kThreads];       // how many do
  int64_t warp_sum[2][kThreads / 32];
  int warp_longest[kThreads / 32];
};

// The sum of `value` over all threads before this one; `total` is the sum over all. Callers that
// follow one another without a barrier alternate between two arrays.
template <int kWarps>
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
  int64_t all = lane < kWarps ? warp_sum[lane] : 0;
  int64_t before = lane < warp ? all : 0;
#pragma unroll
  for (int offset = kWarps / 2; offset > 0; offset /= 2) {
    all += __shfl_xor_sync(0xffffffff, all, offset);
    before += __shfl_xor_sync(0xffffffff, before, offset);
  }
  *total = __shfl_sync(0xffffffff, all, 0);
  return __shfl_sync(0xffffffff, before, 0) + inclusive - value;
}

// The lengths are the plan's own.
struct WholeLengths {
  __device__ int of(const Problem& problem, int64_t /*sequence*/, int seqlen_k) const {
    return clamped_length(problem, seqlen_k);
  }
  __device__ void keep(int64_t /*sequence*/, int /*seqlen_k*/) const {}
};

// A rank holds a share of every sequence.
struct LengthsOfRank : SharedLengths {
  __device__ int of(const Problem& problem, int64_t sequence, int seqlen_k) const {
    const int whole = min(max(seqlen_k, 0), max_seqlen_k);
    return static_cast<int>(shares.of(sequence).tokens(whole, problem.page_size));
  }
  __device__ void keep(int64_t sequence, int seqlen_k) const { own[sequence] = seqlen_k; }
};

template <int kThreads, typename Lengths>
__global__ void __launch_bounds__(kThreads)
    make_plan(Problem problem, PlanShape shape, const int32_t* __restrict__ seqlens_k,
              Lengths lengths, SplitWorkspace plan) {
  constexpr int kTile = 2 * kThreads;
  auto& smem = shared_memory<Smem<kThreads>>();
  const int piece_grains = problem.fixed_split_tokens / kGrainTokens;  // 0: cut anywhere
  const auto pieces_of = [&](int grains) {
    return piece_grains > 0 ? (grains + piece_grains - 1) / piece_grains : 1;
  };
  // This thread's two sequences of the tile at `base`; a sequence past the last has no grains.
  int grains[2];
  const auto read_tile = [&](int64_t base) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t sequence = base + 2 * threadIdx.x + j;
      grains[j] = 0;
      if (sequence < problem.batch) {
        const int seqlen_k = lengths.of(problem, sequence, seqlens_k[sequence]);
        plan.seqlens_k[sequence] = seqlen_k;
        lengths.keep(sequence, seqlen_k);
        grains[j] = max(1, static_cast<int>(grains_for(seqlen_k)));
      }
    }
  };
  // Pages and, where a sequence may have several by rule, pieces before this thread's sequences.
  int64_t grains_before, pieces_before, tile_grains, tile_pieces;
  const auto sum_tile = [&](int64_t base) {
    grains_before = exclusive_sum(int64_t{grains[0]} + grains[1], smem.warp_sum[0], &tile_grains);
    pieces_before = 2 * threadIdx.x;
    tile_pieces = min(int64_t{kTile}, problem.batch - base);
    if (piece_grains > 0) {
      pieces_before = exclusive_sum(int64_t{pieces_of(grains[0])} + pieces_of(grains[1]),
                                    smem.warp_sum[1], &tile_pieces);
    }
  };

  // How long the line is, and who gets how much of it.
  int64_t total_grains = 0, total_pieces = 0;
  int longest = 0;
  for (int64_t base = 0; base < problem.batch; base += kTile) {
    read_tile(base);
    sum_tile(base);
    total_grains += tile_grains;
    total_pieces += tile_pieces;
    longest = max(longest, max(grains[0], grains[1]));
    if (base + kTile < problem.batch) __syncthreads();  // the sums have been read
  }
  longest = __reduce_max_sync(0xffffffff, longest);
  if (threadIdx.x % 32 == 0) smem.warp_longest[threadIdx.x / 32] = longest;
  __syncthreads();  // every warp's longest is there
  for (int warp = 0; warp < kThreads / 32; ++warp) longest = max(longest, smem.warp_longest[warp]);

  const bool alike = piece_grains == 0 &&
                     (problem.batch == 1 || total_grains <= int64_t{shape.workers} * shape.team);
  const int fixed = alike ? 0 : shape.fixed_grains;
  const int64_t length = total_grains + fixed * total_pieces;
  const auto batch = static_cast<unsigned>(problem.batch);
  const unsigned a_worker = (batch + shape.workers - 1) / shape.workers;  // if sequences stay whole
  const bool whole = piece_grains == 0 && int64_t{a_worker} * (longest + fixed) <=
                                              length / shape.workers + fixed + shape.combine_grains;
  const unsigned each =  // workers for every sequence, if all get as many
      min(static_cast<unsigned>(shape.workers) / batch,
          static_cast<unsigned>(longest / shape.min_grains));
  const bool even = piece_grains == 0 && !alike && each >= 2 &&
                    static_cast<int64_t>((longest + each - 1) / each) <= length / shape.workers;
  const int up = shape.team > 1 ? shape.min_grains - 1 : 0;  // a round is for all of a team
  const auto used = static_cast<unsigned>(
      whole  ? (batch + a_worker - 1) / a_worker
      : even ? batch * each
             : max(int64_t{1}, min(int64_t{shape.workers}, (length + up) / shape.min_grains)));
  const int64_t quotient =
      length >> 32 == 0 ? static_cast<unsigned>(length) / used : length / used;  // 64 bits are slow
  const unsigned remainder = static_cast<unsigned>(length - quotient * used);
  const auto interval_begin = [&](unsigned worker) {  // used <= 65535: the product fits 32 bits
    return quotient * worker + remainder * worker / used;
  };

  int64_t line = 0;  // where the tile begins
  int64_t slots = 0, split_sequences = 0;
  for (int64_t base = 0; base < problem.batch; base += kTile) {
    const int count = static_cast<int>(min(int64_t{kTile}, problem.batch - base));
    if (problem.batch > kTile) {  // else the one tile is still there
      __syncthreads();            // the sums have been read
      read_tile(base);
      sum_tile(base);
    }
    const int64_t tile_length = tile_grains + fixed * tile_pieces;
    const int64_t start = line + grains_before + fixed * pieces_before;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int local = 2 * threadIdx.x + j;
      smem.start[local] = start + (j == 0 ? 0 : grains[0] + fixed * pieces_of(grains[0]));
      smem.first_cut[local] = INT_MAX;
      smem.cuts[local] = 0;
    }
    __syncthreads();  // the tile's stretch of the line is there

    // The worker's beginning: in the last sequence that starts at or before its interval.
    const auto locate = [&](unsigned worker, int* local) -> WorkerBegin {
      const int64_t place = interval_begin(worker);
      *local = -1;
      if (whole) {
        const auto first = static_cast<int>(worker * a_worker);
        if (first >= base && first < base + count) *local = static_cast<int>(first - base);
        return {first, 0, 0, 0};
      }
      const auto length_of = [&](int low) {  // of a sequence's stretch of the line
        return static_cast<int>((low + 1 < count ? smem.start[low + 1] : line + tile_length) -
                                smem.start[low]);
      };
      if (even) {
        const auto sequence = static_cast<int>(worker / each);
        if (sequence < base || sequence >= base + count) return {};
        *local = static_cast<int>(sequence - base);
        const auto sequence_grains = static_cast<unsigned>(length_of(*local) - fixed);
        const unsigned piece = worker % each;
        if (piece >= sequence_grains) return {sequence + 1, 0, 0, 0};  // it has fewer pieces
        const unsigned pieces = min(each, sequence_grains);  // piece * pieces fits 32 bits, too
        const unsigned grain =
            sequence_grains / pieces * piece + sequence_grains % pieces * piece / pieces;
        return {sequence, static_cast<int>(grain), 0, 0};
      }
      if (place < line || place >= line + tile_length) return {};
      int low = 0, high = count;  // start[low] <= place < start[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (smem.start[middle] <= place ? low : high) = middle;
      }
      *local = low;
      const int offset = static_cast<int>(place - smem.start[low]);
      const int sequence = static_cast<int>(base) + low;
      if (piece_grains == 0) return {sequence, max(0, offset - fixed), 0, 0};
      const int piece = (offset + fixed + piece_grains - 1) / (fixed + piece_grains);
      if (piece * (fixed + piece_grains) >= length_of(low)) return {sequence + 1, 0, 0, 0};
      return {sequence, piece * piece_grains, piece, 0};
    };
    for (unsigned worker = threadIdx.x; worker < used; worker += kThreads) {
      int local;
      WorkerBegin begin = locate(worker, &local);
      if (local < 0) continue;
      if (begin.sequence < problem.batch) {
        begin.seqlen_k = lengths.of(problem, begin.sequence, seqlens_k[begin.sequence]);
      }
      plan.worker_begin[worker] = begin;
      if (piece_grains > 0 || begin.grain == 0) continue;
      atomicMin(&smem.first_cut[local], static_cast<int>(worker));
      atomicAdd(&smem.cuts[local], 1);
    }
    __syncthreads();  // the cuts are counted
    for (unsigned worker = threadIdx.x; worker < used && piece_grains == 0; worker += kThreads) {
      int local;
      const WorkerBegin begin = locate(worker, &local);
      if (local < 0 || begin.grain == 0) continue;
      plan.worker_begin[worker].split = static_cast<int>(worker) - smem.first_cut[local] + 1;
    }

    // Slots for the pieces of what was cut: both counts in one sum.
    int splits[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int cuts = piece_grains > 0 ? pieces_of(grains[j]) - 1 : smem.cuts[2 * threadIdx.x + j];
      splits[j] = cuts > 0 ? cuts + 1 : 0;
    }
    const auto packed = [](int n) { return (int64_t{n} << 32) | (n > 0 ? 1 : 0); };
    int64_t tile_total;
    int64_t sum =
        exclusive_sum(packed(splits[0]) + packed(splits[1]), smem.warp_sum[1], &tile_total);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t sequence = base + 2 * threadIdx.x + j;
      const int slot_begin = static_cast<int>(slots + (sum >> 32));
      if (sequence < problem.batch) plan.slot_begin[sequence] = slot_begin;
      if (splits[j] > 0) {
        plan.split_sequences[split_sequences + (sum & 0xffffffff)] = {static_cast<int>(sequence),
                                                                      slot_begin, splits[j], 0};
      }
      sum += packed(splits[j]);
    }
    line += tile_length;
    slots += tile_total >> 32;
    split_sequences += tile_total & 0xffffffff;
  }

  for (int worker = static_cast<int>(used + threadIdx.x); worker <= shape.workers;
       worker += kThreads) {
    plan.worker_begin[worker] = {problem.batch, 0, 0, 0};
  }
  if (threadIdx.x == 0) {
    plan.slot_begin[problem.batch] = static_cast<int>(slots);
    PlanHeader& header = *plan.header;
    header.state.made = kPlanMade;
    header.state.shape = plan.shape;
    atomicAdd(&header.state.generation, 1u);  // without waiting for what was there
    header.state.refused = 0;
    header.batch = problem.batch;
    header.workers = shape.workers;
    header.fixed_split_tokens = problem.fixed_split_tokens;
    header.fixed_grains = fixed;
    header.num_split_sequences = static_cast<int>(split_sequences);
    header.num_slots = static_cast<int>(slots);
  }
}

template <typename Lengths>
Status launch_with(const Problem& problem, const PlanShape& shape, const int32_t* seqlens_k,
                   const Lengths& lengths, const SplitWorkspace& plan, Stream stream) {
  const auto launch_block = [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    return launch(make_plan<kThreads, Lengths>, 1, kThreads, sizeof(Smem<kThreads>), stream,
                  problem, shape, seqlens_k, lengths, plan);
  };
  // A small block starts sooner.
  return problem.batch <= 512 ? launch_block(std::integral_constant<int, 256>())
                              : launch_block(std::integral_constant<int, 1024>());
}

}  // namespace

Status launch_make_plan(const Problem& problem, const PlanShape& shape, const int32_t* seqlens_k,
                        const SharedLengths* shared, const SplitWorkspace& plan, Stream stream) {
  if (shared == nullptr)
    return launch_with(problem, shape, seqlens_k, WholeLengths(), plan, stream);
  return launch_with(problem, shape, seqlens_k, LengthsOfRank{*shared}, plan, stream);
}

}  // namespace mla::MLA_MACHINE
