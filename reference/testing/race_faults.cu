// Each kernel is a template: kRight is the one difference between the right form and the faulty one. All
// have 128 threads a block.
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

template <typename Smem, typename Kernel>
Status run(Kernel kernel, const void* in, void* out, unsigned* counter, unsigned blocks = 1) {
  return launch(kernel, blocks, kThreads, sizeof(Smem), nullptr, static_cast<const uint4*>(in),
                static_cast<unsigned*>(out), counter);
}

}  // namespace

#define FAULT(kernel, Smem, blocks, what)                                                  \
  {                                                                                        \
#kernel, what, [](bool right, const void* in, void* out, unsigned* counter) {            \
      return right ? run<Smem>(kernel<true>, in, out, counter, blocks)                       \
                   : run<Smem>(kernel<false>, in, out, counter, blocks);                     \
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
  };
}

}  // namespace mla::MLA_MACHINE
