// Lab 5: a producer, consumers, and a ring of mbarriers. Warp 4's first thread sends for tiles of 128 words by bulk copies into two
// buffers; warps 0 to 3 add them up:
//
//   out[thread] = sum over tiles of a[tile][thread]        thread = 0 ... 127
//
// full[buffer]: one arrival, the producer's, and 512 bytes. empty[buffer]: four arrivals, one per consumer warp.
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE::MLA_LAB::mbarrier_ring {

constexpr int kConsumers = 128, kThreads = kConsumers + 32, kTileBytes = 4 * kConsumers;

struct Smem {
  alignas(16) uint32_t tile[2][kConsumers];
  ptx::Mbarrier full[2], empty[2];
  MLA_REGIONS(tile, full, empty)
};

__global__ void __launch_bounds__(kThreads) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  const auto* a_gmem = static_cast<const uint32_t*>(d.a);  // [count][128]
  if (threadIdx.x == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      ptx::mbarrier_init(&smem.full[buffer], 1);
      ptx::mbarrier_init(&smem.empty[buffer], kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  if (threadIdx.x == kConsumers) {  // the producer
    for (int tile = 0; tile < d.count; ++tile) {
      const int buffer = tile % 2, turn = tile / 2;  // of this buffer
      // Fill in: wait until the buffer is free, announce the bytes, start the copy.
      // Until here.
    }
  } else if (threadIdx.x < kConsumers) {
    uint32_t sum = 0;
    for (int tile = 0; tile < d.count; ++tile) {
      const int buffer = tile % 2, turn = tile / 2;
      // Fill in: wait for the tile, add this thread's word to `sum`, and say that the warp has read the tile.
      // Until here.
    }
    d.out[threadIdx.x] = sum;
  }
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::mbarrier_ring
