// Lab 1: a ring of three buffers, filled by cp.async. Each thread of one block of 128 adds up the words of its mirror image:
//
//   out[thread] = sum over tiles of a[tile][127 - thread]        the first word of each chunk
//
// While a tile is read, the copies of the next two are under way.
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE::MLA_LAB::cp_async_ring {

constexpr int kThreads = 128;

struct Smem {
  uint4 tile[3][kThreads];
  MLA_REGIONS(tile)
};

__global__ void __launch_bounds__(kThreads) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  const auto* a_gmem = static_cast<const uint4*>(d.a);  // [count][128] chunks of 16 bytes
  // Starts the copy of this thread's chunk, and makes it a group; past the last tile the group is empty.
  const auto copy = [&](int tile) {
    if (tile < d.count) {
      ptx::cp_async_16(&smem.tile[tile % 3][threadIdx.x], a_gmem + tile * kThreads + threadIdx.x,
                       16);
    }
    ptx::cp_async_commit_group();
  };

  copy(0);
  copy(1);
  uint32_t sum = 0;
  for (int tile = 0; tile < d.count; ++tile) {
    // Fill in: make sure that the tile can be read, and start the copy of tile + 2.
    ptx::cp_async_wait_group<1>();  // this thread's chunk is there; the newest group need not be
    __syncthreads();  // so are all others', and the tile before has been read: its buffer is free
    copy(tile + 2);
    // Until here.
    sum += smem.tile[tile % 3][kThreads - 1 - threadIdx.x].x;
  }
  d.out[threadIdx.x] = sum;
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::cp_async_ring
