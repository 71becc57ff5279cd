// Each kernel is a template: kRight is the one difference between the right form and the faulty one. All
// have 128 threads per block.
#include "reference/testing/race_faults.h"

#include <cstdint>

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr unsigned kThreads = 128;

// Plain loads and stores --------------------------------------------------------------------------

struct Words {
  unsigned values[kThreads];
};

template <bool kRight>
__global__ void read_after_write(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  smem.values[threadIdx.x] = threadIdx.x;
  if (kRight) __syncthreads();
  out[threadIdx.x] = smem.values[kThreads - 1 - threadIdx.x];
}

// Two rounds through one buffer.
template <bool kRight>
__global__ void write_after_read(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  for (unsigned round = 0; round < 2; ++round) {
    smem.values[threadIdx.x] = round + threadIdx.x;
    __syncthreads();
    out[round * kThreads + threadIdx.x] = smem.values[kThreads - 1 - threadIdx.x];
    if (kRight) __syncthreads();
  }
}

// What a warp did in lockstep before Volta.
template <bool kRight>
__global__ void lanes_in_step(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  smem.values[threadIdx.x] = threadIdx.x;
  if (kRight) __syncwarp();
  out[threadIdx.x] = smem.values[threadIdx.x ^ 1];
}

// A shuffle makes lanes meet, but orders no memory.
template <bool kRight>
__global__ void order_by_shuffle(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  smem.values[threadIdx.x] = threadIdx.x;
  const unsigned zero = __shfl_sync(0xffffffff, 0u, 0);
  if (kRight) __syncwarp();
  out[threadIdx.x] = smem.values[threadIdx.x ^ 1] + zero;
}

template <bool kRight>
__global__ void histogram(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  smem.values[threadIdx.x] = 0;
  __syncthreads();
  if (kRight) {
    atomicAdd(&smem.values[threadIdx.x % 4], 1u);
  } else {
    ++smem.values[threadIdx.x % 4];
  }
  __syncthreads();
  out[threadIdx.x] = smem.values[threadIdx.x];
}

template <bool kRight>
__global__ void tree(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Words>();
  smem.values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) smem.values[threadIdx.x] += smem.values[threadIdx.x + half];
    if (kRight) __syncthreads();
  }
  if (threadIdx.x == 0) *out = smem.values[0];
}

// The last block to come adds up what all wrote.
template <bool kRight>
__global__ void last_block(const uint4*, unsigned* out, unsigned* counter) {
  auto& smem = shared_memory<Words>();
  if (threadIdx.x == 0) {
    out[blockIdx.x] = blockIdx.x;
    if (kRight) __threadfence();
    smem.values[0] = atomicAdd(counter, 1u);
    if (kRight) __threadfence();
  }
  __syncthreads();
  if (smem.values[0] != gridDim.x - 1 || threadIdx.x > 0) return;
  unsigned sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += out[block];
  out[gridDim.x] = sum;
}

// cp.async ----------------------------------------------------------------------------------------

struct Granules {
  uint4 values[kThreads];
};

__device__ __forceinline__ void store(unsigned* out, const uint4& value) {
  reinterpret_cast<uint4*>(out)[threadIdx.x] = value;
}

template <bool kRight>
__global__ void copy_not_waited_for(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Granules>();
  ptx::cp_async_16(&smem.values[threadIdx.x], in + threadIdx.x, 16);
  ptx::cp_async_commit_group();
  if (kRight) ptx::cp_async_wait_group<0>();
  store(out, smem.values[threadIdx.x]);
  if (!kRight) ptx::cp_async_wait_group<0>();
}

// A wait is for the copies of one thread.
template <bool kRight>
__global__ void copies_of_others(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Granules>();
  ptx::cp_async_16(&smem.values[threadIdx.x], in + threadIdx.x, 16);
  ptx::cp_async_commit_group();
  if (!kRight) __syncthreads();  // too early: it orders no copy that is under way
  ptx::cp_async_wait_group<0>();
  if (kRight) __syncthreads();
  store(out, smem.values[kThreads - 1 - threadIdx.x]);
}

template <bool kRight>
__global__ void copy_over_readers(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Granules>();
  for (unsigned tile = 0; tile < 2; ++tile) {
    ptx::cp_async_16(&smem.values[threadIdx.x], in + tile * kThreads + threadIdx.x, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    store(out, smem.values[kThreads - 1 - threadIdx.x]);
    if (kRight) __syncthreads();
  }
}

// Bulk copies -------------------------------------------------------------------------------------

struct Bulk {
  alignas(128) uint4 values[kThreads];
  ptx::Mbarrier full;
};
constexpr int kBulkBytes = kThreads * 16;

__device__ __forceinline__ void begin(ptx::Mbarrier* barrier) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
}
__device__ __forceinline__ void load(Bulk& smem, const uint4* in) {
  if (threadIdx.x > 0) return;
  ptx::mbarrier_arrive_expect_tx(&smem.full, kBulkBytes);
  ptx::cp_async_bulk(smem.values, in, kBulkBytes, &smem.full);
}

// One thread waits, and the others take its word for it.
template <bool kRight>
__global__ void one_waits_for_all(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Bulk>();
  begin(&smem.full);
  __syncthreads();
  load(smem, in);
  if (threadIdx.x == 0) ptx::mbarrier_wait(&smem.full, 0);
  if (kRight) __syncthreads();
  store(out, smem.values[threadIdx.x]);
}

// The buffer is filled again before all have read it.
template <bool kRight>
__global__ void refilled_too_early(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Bulk>();
  begin(&smem.full);
  __syncthreads();
  for (int tile = 0; tile < 2; ++tile) {
    load(smem, in + tile * kThreads);
    ptx::mbarrier_wait(&smem.full, tile);
    store(out, smem.values[threadIdx.x]);
    if (kRight) __syncthreads();
  }
}

template <bool kRight>
__global__ void barrier_not_shared(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Bulk>();
  begin(&smem.full);
  if (kRight) __syncthreads();
  load(smem, in);
  ptx::mbarrier_wait(&smem.full, 0);
  store(out, smem.values[threadIdx.x]);
}

// wgmma of a tile that threads have written ---------------------------------------------------------
// As of P^T in the decode kernel of FlashMLA-ETAP, whose plain stores went to a product without a fence or
// a barrier: https://github.com/pengcuo/FlashMLA-ETAP/pull/3

struct Operands {
  alignas(1024) uint4 p[64][8];
  alignas(1024) uint4 k[64][8];
};

// Stores P and K: each thread half a row of both.
__device__ __forceinline__ void store_operands(Operands& smem, const uint4* in) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2 * 4;
#pragma unroll
  for (int chunk = half; chunk < half + 4; ++chunk) {
    smem.p[row][chunk] = in[row * 8 + chunk];
    smem.k[row][chunk] = in[512 + row * 8 + chunk];
  }
}
__device__ __forceinline__ void multiply(Operands& smem, float (&d)[8][4]) {
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, 1024);
  const ptx::MatrixDescriptor k = ptx::matrix_descriptor(smem.k, 0, 1024);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    for (int j = 0; j < 4; ++j) d[n][j] = 0;
  }
  ptx::wgmma_fence(d);
  ptx::wgmma_m64n64k16<bfloat16>(d, p, k, false);
  ptx::wgmma_commit_group();
}
__device__ __forceinline__ void store_sum(const float (&d)[8][4], unsigned* out) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    for (int j = 0; j < 4; ++j) sum += d[n][j];
  }
  out[threadIdx.x] = __float_as_uint(sum);
}

__device__ __forceinline__ void store_product(Operands& smem, unsigned* out) {
  float d[8][4];
  multiply(smem, d);
  ptx::wgmma_wait_group<0>(d);
  store_sum(d, out);
}

template <bool kRight>
__global__ void product_without_fence(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Operands>();
  store_operands(smem, in);
  if (kRight) ptx::fence_proxy_async();
  __syncthreads();
  store_product(smem, out);
}

template <bool kRight>
__global__ void product_without_barrier(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Operands>();
  store_operands(smem, in);
  ptx::fence_proxy_async();
  if (kRight) __syncthreads();
  store_product(smem, out);
}

// A fence is for what its own thread wrote.
template <bool kRight>
__global__ void product_fenced_by_another(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Operands>();
  store_operands(smem, in);
  if (kRight) ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) ptx::fence_proxy_async();
  store_product(smem, out);
}

// The next P goes where the product still reads this one.
template <bool kRight>
__global__ void tile_overwritten(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Operands>();
  store_operands(smem, in);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[8][4];
  multiply(smem, d);
  if (kRight) {
    ptx::wgmma_wait_group<0>(d);
    __syncthreads();
  }
  smem.p[threadIdx.x / 2][threadIdx.x % 2] = in[threadIdx.x];
  if (!kRight) ptx::wgmma_wait_group<0>(d);
  store_sum(d, out);
}

// Blocks of a cooperative grid --------------------------------------------------------------------

// Block 1 tells block 0 that the number is there. On a GPU the flag may be seen before the number.
template <bool kRight>
__global__ void flag_without_fence(const uint4*, unsigned* out, unsigned* counter) {
  if (threadIdx.x > 0) return;
  volatile unsigned* flag = counter;
  if (blockIdx.x == 1) {
    out[1] = 7;
    if (kRight) __threadfence();
    *flag = 1;
  } else {
    while (*flag == 0) __nanosleep(20);
    __threadfence();
    out[0] = out[1];
  }
}

// All wait by atomics, which acquire nothing.
template <bool kRight>
__global__ void atomics_do_not_acquire(const uint4*, unsigned* out, unsigned* counter) {
  if (threadIdx.x > 0) return;
  out[blockIdx.x] = blockIdx.x;
  ptx::red_add_release(counter, 1);
  if (kRight) {
    ptx::wait_until_at_least(counter, gridDim.x);
  } else {
    while (atomicAdd(counter, 0u) < gridDim.x) __nanosleep(20);
  }
  out[gridDim.x + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
}

// A barrier of the grid: the last to come makes the counter ready for the next, while others look at it.
template <bool kRight>
__global__ void counter_reset(const uint4*, unsigned*, unsigned* counter) {
  if (threadIdx.x > 0) return;
  unsigned* round = counter + 1;
  __threadfence();
  if (atomicAdd(counter, 1u) == gridDim.x - 1) {
    *counter = 0;
    if (kRight) ptx::st_release(round, 1);
  } else {
    while (ptx::ld_acquire(kRight ? round : counter) != (kRight ? 1u : 0u)) {
    }
  }
}

// Blocks of a cluster -----------------------------------------------------------------------------

struct Shared {
  alignas(128) uint4 from[kThreads];
  alignas(128) uint4 to[kThreads];
  unsigned values[kThreads];
  ptx::Mbarrier full, empty;
};

__device__ __forceinline__ void cluster_sync() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}
// The blocks of a pair have started, and know each other's barriers. Returns the rank.
__device__ __forceinline__ unsigned begin_pair(Shared& smem) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::mbarrier_init(&smem.empty, 1);
    ptx::fence_mbarrier_init();
  }
  cluster_sync();
  return ptx::cluster_ctarank();
}

template <bool kRight>
__global__ void peer_read_too_early(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  const unsigned rank = begin_pair(smem);
  smem.values[threadIdx.x] = threadIdx.x;
  if (kRight) cluster_sync();
  out[rank * kThreads + threadIdx.x] = *ptx::mapa(&smem.values[threadIdx.x], 1 - rank);
  cluster_sync();
}

template <bool kRight>
__global__ void relaxed_arrival(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  const unsigned rank = begin_pair(smem);
  smem.values[threadIdx.x] = threadIdx.x;
  if (kRight) {
    ptx::barrier_cluster_arrive();
  } else {
    ptx::barrier_cluster_arrive_relaxed();
  }
  ptx::barrier_cluster_wait();
  out[rank * kThreads + threadIdx.x] = *ptx::mapa(&smem.values[threadIdx.x], 1 - rank);
  cluster_sync();
}

// The arrival releases to the cluster, but the wait acquires from its own block alone.
template <bool kRight>
__global__ void wait_for_own_block(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  const unsigned rank = begin_pair(smem);
  if (threadIdx.x == 0) {
    *ptx::mapa(&smem.values[0], 1 - rank) = rank;
    ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1 - rank));
  }
  if (kRight) {
    ptx::mbarrier_wait_cluster(&smem.full, 0);
  } else {
    ptx::mbarrier_wait(&smem.full, 0);
  }
  out[rank * kThreads + threadIdx.x] = smem.values[0];
  cluster_sync();
}

// What a peer copies here may be read by those who have waited for it.
template <bool kRight>
__global__ void peer_copy_not_waited_for(const uint4* in, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  const unsigned rank = begin_pair(smem);
  smem.from[threadIdx.x] = in[threadIdx.x];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBulkBytes);
    ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], 1 - rank), smem.from, kBulkBytes,
                               ptx::mapa(&smem.full, 1 - rank));
  }
  if (kRight || threadIdx.x == 0) ptx::mbarrier_wait(&smem.full, 0);
  store(out + rank * kThreads * 4, smem.to[threadIdx.x]);
  cluster_sync();
}

// A peer's buffer is overwritten before the peer has said that it has read it.
template <bool kRight>
__global__ void peer_still_reads(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  smem.values[threadIdx.x] = threadIdx.x;
  const unsigned rank = begin_pair(smem);
  out[rank * kThreads + threadIdx.x] = smem.values[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.empty, 1 - rank));
    if (kRight) ptx::mbarrier_wait_cluster(&smem.empty, 0);
    *ptx::mapa(&smem.values[0], 1 - rank) = 7;
    if (!kRight) ptx::mbarrier_wait_cluster(&smem.empty, 0);
  }
  cluster_sync();
}

template <bool kRight>
__global__ void peer_has_left(const uint4*, unsigned* out, unsigned*) {
  auto& smem = shared_memory<Shared>();
  const unsigned rank = begin_pair(smem);
  if (rank == 0) out[threadIdx.x] = atomicAdd(ptx::mapa(&smem.values[threadIdx.x], 1), 1u);
  if (kRight) cluster_sync();
}

enum class Blocks { kAlone, kCluster, kGrid };

template <typename Smem, Blocks kBlocks = Blocks::kAlone, typename Kernel>
Status run(Kernel kernel, const void* in_gmem, void* out_gmem, unsigned* counter, unsigned blocks) {
  const auto* in = static_cast<const uint4*>(in_gmem);
  auto* out = static_cast<unsigned*>(out_gmem);
  if constexpr (kBlocks == Blocks::kCluster) {
    return launch_cluster(kernel, blocks, blocks, kThreads, sizeof(Smem), nullptr, in, out,
                          counter);
  } else if constexpr (kBlocks == Blocks::kGrid) {
    return launch_cooperative(kernel, blocks, kThreads, sizeof(Smem), nullptr, in, out, counter);
  } else {
    return launch(kernel, blocks, kThreads, sizeof(Smem), nullptr, in, out, counter);
  }
}

}  // namespace

#define FAULT(kernel, Smem, blocks, what) FAULT_OF(Blocks::kAlone, kernel, Smem, blocks, what)
#define FAULT_OF(kind, kernel, Smem, blocks, what)                                         \
  {                                                                                        \
#kernel, what, [](bool right, const void* in, void* out, unsigned* counter) {            \
      return right ? run<Smem, kind>(kernel<true>, in, out, counter, blocks)                       \
                   : run<Smem, kind>(kernel<false>, in, out, counter, blocks);                     \
    } \
  }

std::vector<RaceFault> race_faults() {
  return {
      FAULT(read_after_write, Words, 1, "no __syncthreads between a write and others' reads"),
      FAULT(write_after_read, Words, 1, "no __syncthreads before the buffer is written again"),
      FAULT(lanes_in_step, Words, 1, "no __syncwarp between lanes"),
      FAULT(order_by_shuffle, Words, 1, "a shuffle in place of __syncwarp"),
      FAULT(histogram, Words, 1, "counters in shared memory without atomics"),
      FAULT(tree, Words, 1, "no __syncthreads between the steps of a sum"),
      FAULT(last_block, Words, 4, "no __threadfence around the atomic that orders blocks"),
      FAULT(copy_not_waited_for, Granules, 1, "cp.async: read before the wait"),
      FAULT(copies_of_others, Granules, 1, "cp.async: the barrier before the wait, not behind it"),
      FAULT(copy_over_readers, Granules, 1, "cp.async: the next copy before all have read"),
      FAULT(one_waits_for_all, Bulk, 1, "bulk copy: one thread waits, no barrier for the others"),
      FAULT(refilled_too_early, Bulk, 1, "bulk copy: the next one before all have read"),
      FAULT(barrier_not_shared, Bulk, 1,
            "mbarrier: used by others without a barrier after its init"),
      FAULT(product_without_fence, Operands, 1,
            "wgmma of plain stores: no fence between the proxies"),
      FAULT(product_without_barrier, Operands, 1, "wgmma of plain stores: no barrier"),
      FAULT(product_fenced_by_another, Operands, 1,
            "wgmma of plain stores: fenced by one thread for all"),
      FAULT(tile_overwritten, Operands, 1, "wgmma: its operand overwritten before the wait"),
      FAULT_OF(Blocks::kGrid, flag_without_fence, Words, 2,
               "cooperative grid: a flag without a __threadfence before it"),
      FAULT_OF(Blocks::kGrid, atomics_do_not_acquire, Words, 4,
               "cooperative grid: a wait by atomics, which acquire nothing"),
      FAULT_OF(Blocks::kGrid, counter_reset, Words, 4,
               "cooperative grid: a counter reset while others look at it"),
      FAULT_OF(Blocks::kCluster, peer_read_too_early, Shared, 2,
               "cluster: no barrier before a read of another block's memory"),
      FAULT_OF(Blocks::kCluster, relaxed_arrival, Shared, 2,
               "cluster: a relaxed arrival at its barrier, which releases nothing"),
      FAULT_OF(Blocks::kCluster, wait_for_own_block, Shared, 2,
               "cluster: a wait that acquires from the own block alone"),
      FAULT_OF(Blocks::kCluster, peer_copy_not_waited_for, Shared, 2,
               "cluster: a copy from another block, waited for by one thread"),
      FAULT_OF(Blocks::kCluster, peer_still_reads, Shared, 2,
               "cluster: another block's memory overwritten while that reads it"),
      FAULT_OF(Blocks::kCluster, peer_has_left, Shared, 2,
               "cluster: a block ends while another uses its memory"),
  };
}

}  // namespace mla::MLA_MACHINE
