// Lab 8: an exchange within a cluster. Two blocks of 128 threads send each other a word per thread, asynchronously, and each waits for
// what it gets at an mbarrier of its own:
//
//   out[rank][thread] = a[1 - rank][thread]        rank = 0, 1
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE::MLA_LAB::cluster_exchange {

constexpr int kThreads = 128;

struct Smem {
  uint32_t word[kThreads];  // from the other block
  ptx::Mbarrier full;       // one arrival, and the bytes of `word`
  MLA_REGIONS(word, full)
};

__global__ void __launch_bounds__(kThreads) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  const unsigned rank = ptx::cluster_ctarank(), other = 1 - rank;
  const uint32_t mine = static_cast<const uint32_t*>(d.a)[rank * kThreads + threadIdx.x];
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, static_cast<int>(sizeof smem.word));
  }
  // Fill in: when both blocks' barriers are there, send `mine` to the same place of the other block, and wait for its words.
  // Until here.
  d.out[rank * kThreads + threadIdx.x] = smem.word[threadIdx.x];
}

inline Status run(const LabData& d) {
  return launch_cluster(kernel, 2, 2, kThreads, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::cluster_exchange
