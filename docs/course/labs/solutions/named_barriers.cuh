// Lab 7: a hand-over by named barriers, as P crosses in the seesaw. In every round warp w of the first warpgroup puts 32 words into
// a place of its own, and warp w of the second takes them out; the four pairs of warps need not be in step:
//
//   out[thread] = sum over rounds of a[round][thread]        thread = 0 ... 127, of the second warpgroup
//
// Barriers 1 + w: the words are there. Barriers 5 + w: they have been read. Each is of 64 threads: 32 arrive, 32 wait.
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE::MLA_LAB::named_barriers {

constexpr int kThreads = 256;

struct Smem {
  uint32_t word[128];
  MLA_REGIONS(word)
};

__global__ void __launch_bounds__(kThreads) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  const auto* a_gmem = static_cast<const uint32_t*>(d.a);  // [count][128]
  const int thread = threadIdx.x % 128, warp = thread / 32;
  if (threadIdx.x < 128) {  // gives
    for (int round = 0; round < d.count; ++round) {
      // Fill in: wait until the words of the round before have been read (there are none in the first), store, and say so.
      if (round > 0) ptx::barrier_sync(5 + warp, 64);
      smem.word[thread] = a_gmem[round * 128 + thread];
      ptx::barrier_arrive(1 + warp, 64);
      // Until here.
    }
  } else {  // takes
    uint32_t sum = 0;
    for (int round = 0; round < d.count; ++round) {
      // Fill in: wait for the words, add this thread's to `sum`, and say that they have been read. After the last round, nobody waits for that.
      ptx::barrier_sync(1 + warp, 64);
      sum += smem.word[thread];
      if (round + 1 < d.count) ptx::barrier_arrive(5 + warp, 64);
      // Until here.
    }
    d.out[thread] = sum;
  }
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::named_barriers
