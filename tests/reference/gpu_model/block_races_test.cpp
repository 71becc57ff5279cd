// Races between blocks that run together, in clusters and in cooperative grids. Each kernel that lacks one
// edge is rejected in one run under the friendly schedule. The kernel that has it is rejected under none.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "stages/common/ptx/ptx_sm90.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"
#include "tests/status_matchers.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;
using gpu_model::LaunchOptions;

class BlockRaces : public GpuModel {
 protected:
  void SetUp() override {
    GpuModel::SetUp();
    if (!gpu_model::kernels_are_instrumented())
      GTEST_SKIP() << "kernels are not compiled for the race detector";
  }

  /// Runs `kernel(true)`, which must be accepted, and `kernel(false)`, which must be rejected with
  /// `part` in the message. Blocks have 64 threads.
  template <typename Smem, typename Kernel>
  void expect_race(const std::string& part, unsigned blocks, const LaunchOptions& options,
                   Kernel kernel) {
    for (const bool right : {true, false}) {
      for (uint64_t seed = 0; seed < (right ? kSeeds : 1); ++seed) {
        gpu_model::schedule() = {.seed = seed};
        begin();
        const std::string error = error_of(
            blocks, 64, sizeof(Smem), [&] { kernel(right); }, options);
        if (right) {
          EXPECT_EQ(error, "") << "seed " << seed;
        } else {
          expect_contains(error, "race: ");
          expect_contains(error, part);
        }
      }
    }
  }
  template <typename Smem, typename Kernel>
  void in_cluster(const std::string& part, Kernel kernel, unsigned blocks = 2) {
    expect_race<Smem>(part, blocks, {.cluster = blocks}, kernel);
  }
  template <typename Kernel>
  void in_grid(const std::string& part, unsigned blocks, Kernel kernel) {
    struct Smem {
      unsigned words[64];
    };
    expect_race<Smem>(part, blocks, {.cooperative = true}, kernel);
  }

  void begin() {
    counters.fill(0);
    in.fill(7);
  }
  GlobalArray<unsigned> counters{16};
  GlobalArray<unsigned> in{2048}, out{2048};
};

void cluster_sync() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}
bool first_thread() {
  return threadIdx.x == 0;
}

struct Smem {
  alignas(128) unsigned from[256];
  alignas(128) unsigned to[256];
  unsigned words[64];
  unsigned sum;
  ptx::Mbarrier full, empty;
};
constexpr int kCopyBytes = sizeof Smem::from;

/// Makes the block's barriers and lets the cluster see them.
Smem& start(int full, int bytes = 0) {
  Smem& smem = *shared<Smem>();
  if (first_thread()) {
    ptx::mbarrier_init(&smem.full, full);
    ptx::mbarrier_init(&smem.empty, 1);
    ptx::fence_mbarrier_init();
    if (bytes > 0) ptx::mbarrier_arrive_expect_tx(&smem.full, bytes);
  }
  cluster_sync();
  return smem;
}

// ---------------------------------------------------------------------------------------------------------------
// The cluster's barrier.

TEST_F(BlockRaces, NoClusterBarrierBeforeARead) {
  in_cluster<Smem>("by thread (3,0,0) of block (1,0,0): nothing released there is acquired here",
                   [&](bool right) {
                     Smem& smem = start(1);
                     const unsigned rank = ptx::cluster_ctarank();
                     if (rank == 1) smem.words[threadIdx.x] = threadIdx.x;
                     if (right) cluster_sync();
                     if (rank == 0 && threadIdx.x == 3) out[0] = *ptx::mapa(&smem.words[3], 1);
                     cluster_sync();
                   });
}

TEST_F(BlockRaces, NoClusterBarrierBeforeAWriteOverWhatIsRead) {
  in_cluster<Smem>("race: write of 4 bytes", [&](bool right) {
    Smem& smem = start(1);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 1) smem.words[threadIdx.x] = 1;
    cluster_sync();
    if (rank == 0) out[threadIdx.x] = *ptx::mapa(&smem.words[threadIdx.x], 1);
    if (right) cluster_sync();
    if (rank == 1) smem.words[threadIdx.x] = 2;
    cluster_sync();
  });
}

TEST_F(BlockRaces, ARelaxedArrivalReleasesNothing) {
  in_cluster<Smem>("nothing released there is acquired here", [&](bool right) {
    Smem& smem = start(1);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 1) smem.words[threadIdx.x] = threadIdx.x;
    right ? ptx::barrier_cluster_arrive() : ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
    if (rank == 0) out[threadIdx.x] = *ptx::mapa(&smem.words[threadIdx.x], 1);
    cluster_sync();
  });
}

TEST_F(BlockRaces, AFenceBeforeARelaxedArrivalReleases) {
  in_cluster<Smem>("nothing released there is acquired here", [&](bool right) {
    Smem& smem = start(1);
    const unsigned rank = ptx::cluster_ctarank();
    if (!right) __threadfence();  // too early
    if (rank == 1) smem.words[threadIdx.x] = threadIdx.x;
    if (right) __threadfence();
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
    if (rank == 0) out[threadIdx.x] = *ptx::mapa(&smem.words[threadIdx.x], 1);
    cluster_sync();
  });
}

TEST_F(BlockRaces, ARelaxedArrivalHandsOnInitialisedMbarriersThatAreFenced) {
  in_cluster<Smem>("race: mbarrier_arrive_cluster", [&](bool right) {
    Smem& smem = *shared<Smem>();
    if (first_thread()) {
      ptx::mbarrier_init(&smem.full, 1);
      if (right) ptx::fence_mbarrier_init();
    }
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
    if (first_thread()) {
      ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1 - ptx::cluster_ctarank()));
    }
    if (right) ptx::mbarrier_wait_cluster(&smem.full, 0);
    cluster_sync();
  });
  // But it hands on nothing else that the thread did.
  in_cluster<Smem>("race: read of 4 bytes", [&](bool right) {
    Smem& smem = *shared<Smem>();
    if (first_thread()) {
      ptx::mbarrier_init(&smem.full, 1);
      smem.words[0] = 1;
      ptx::fence_mbarrier_init();
    }
    right ? ptx::barrier_cluster_arrive() : ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
    if (first_thread()) out[ptx::cluster_ctarank()] = *ptx::mapa(&smem.words[0], 1);
    cluster_sync();
  });
}

TEST_F(BlockRaces, ABlockMayNotHaveStarted) {
  in_cluster<Smem>("in the shared memory of block (1,0,0): nothing says that it has started",
                   [&](bool right) {
                     Smem& smem = *shared<Smem>();
                     if (right) {
                       ptx::barrier_cluster_arrive_relaxed();
                       ptx::barrier_cluster_wait();
                     } else if (ptx::cluster_ctarank() == 0) {
                       // Long enough for the other to start. The race is found all the same.
                       for (int i = 0; i < 10; ++i) __nanosleep(100);
                     }
                     if (ptx::cluster_ctarank() == 0) {
                       *ptx::mapa(&smem.words[threadIdx.x], 1) = threadIdx.x;
                     }
                     cluster_sync();
                   });
}

TEST_F(BlockRaces, ABlockEndsWhileOthersUseItsMemory) {
  const auto reads = [&](bool right) {
    Smem& smem = start(1);
    if (ptx::cluster_ctarank() == 0) {
      out[threadIdx.x] = static_cast<unsigned>(
          reinterpret_cast<uintptr_t>(ptx::mapa(&smem.words[threadIdx.x], 1)) % 2);
      *ptx::mapa(&smem.words[threadIdx.x], 1) = 5;
    } else {
      for (int i = 0; i < 10; ++i) __nanosleep(100);  // by luck it ends last
    }
    // Nobody looks at what was written, so this need not release anything.
    if (right) {
      ptx::barrier_cluster_arrive_relaxed();
      ptx::barrier_cluster_wait();
    }
  };
  in_cluster<Smem>("race: block (1,0,0) ends after write at ", reads);
}

TEST_F(BlockRaces, ABlockEndsBeforeACopyFromItsMemoryIsKnownToBeOver) {
  in_cluster<Smem>("race: block (0,0,0) ends after cp_async_bulk_cluster at ", [&](bool right) {
    Smem& smem = start(1, kCopyBytes);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 0 && first_thread()) {
      ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], 1), smem.from, kCopyBytes,
                                 ptx::mapa(&smem.full, 1));
    }
    if (rank == 1) {
      ptx::mbarrier_wait(&smem.full, 0);
    } else if (!right) {
      for (int i = 0; i < 10; ++i) __nanosleep(100);  // by luck the copy is over by then
    }
    if (right) cluster_sync();
  });
}

// ---------------------------------------------------------------------------------------------------------------
// mbarriers of other blocks.

TEST_F(BlockRaces, ARemoteStoreWithoutAnArrivalAfterIt) {
  in_cluster<Smem>("nothing released there is acquired here", [&](bool right) {
    Smem& smem = start(1);
    if (ptx::cluster_ctarank() == 0 && first_thread()) {
      unsigned* word = ptx::mapa(&smem.words[0], 1);
      if (right) *word = 5;
      ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1));
      if (!right) *word = 5;
    }
    if (ptx::cluster_ctarank() == 1) {
      ptx::mbarrier_wait_cluster(&smem.full, 0);
      out[threadIdx.x] = smem.words[0];
    }
    cluster_sync();
  });
}

TEST_F(BlockRaces, AWaitAtTheScopeOfTheBlockAcquiresNothingFromOtherBlocks) {
  in_cluster<Smem>("mbarrier_wait_cluster acquires the rest", [&](bool right) {
    Smem& smem = start(1);
    if (ptx::cluster_ctarank() == 0 && first_thread()) {
      *ptx::mapa(&smem.words[0], 1) = 5;
      ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1));
    }
    if (ptx::cluster_ctarank() == 1) {
      right ? ptx::mbarrier_wait_cluster(&smem.full, 0) : ptx::mbarrier_wait(&smem.full, 0);
      out[threadIdx.x] = smem.words[0];
    }
    cluster_sync();
  });
}

TEST_F(BlockRaces, OneThreadsWaitForTheClusterServesItsBlock) {
  in_cluster<Smem>("nothing released there is acquired here", [&](bool right) {
    Smem& smem = start(1);
    if (ptx::cluster_ctarank() == 0 && first_thread()) {
      *ptx::mapa(&smem.words[0], 1) = 5;
      ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1));
    }
    if (ptx::cluster_ctarank() == 1) {
      if (first_thread()) ptx::mbarrier_wait_cluster(&smem.full, 0);
      if (right) __syncthreads();
      out[threadIdx.x] = smem.words[0];
    }
    cluster_sync();
  });
}

/// Block 0 fills a slot of block 1 twice. Before the second time, block 1 must say that the slot is empty.
TEST_F(BlockRaces, ASlotOfAPeerIsFilledBeforeItHasArrived) {
  in_cluster<Smem>("race: st_async at ", [&](bool right) {
    Smem& smem = start(1);
    const unsigned rank = ptx::cluster_ctarank();
    for (int round = 0; round < 2; ++round) {
      if (rank == 0 && first_thread()) {
        if (right && round > 0) ptx::mbarrier_wait_cluster(&smem.empty, 0);
        ptx::mbarrier_arrive_expect_tx_cluster(ptx::mapa(&smem.full, 1), 4);
        ptx::st_async(ptx::mapa(&smem.words[0], 1), 5u, ptx::mapa(&smem.full, 1));
        if (!right) ptx::mbarrier_wait_cluster(&smem.empty, 0);  // after the store, too late
      }
      if (rank == 1) {
        ptx::mbarrier_wait_cluster(&smem.full, round);
        if (right || round > 0) out[threadIdx.x] = smem.words[0];
        if (!right && round == 0 && first_thread()) {
          ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.empty, 0));
        }
        if (!right && round == 0) out[threadIdx.x] = smem.words[0];  // only after the arrival
        if (right && round == 0) {
          __syncthreads();
          if (first_thread()) ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.empty, 0));
        }
      }
      if (!right && round == 0 && rank == 0) continue;
    }
    cluster_sync();
  });
}

/// The same with a bulk copy, and a producer that waits at too small a scope.
TEST_F(BlockRaces, ASlotOfAPeerIsFilledAfterAWaitForTheOwnBlockAlone) {
  in_cluster<Smem>("mbarrier_wait_cluster acquires the rest", [&](bool right) {
    Smem& smem = start(1, kCopyBytes);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 1) {
      out[threadIdx.x] = smem.to[threadIdx.x];
      __syncthreads();
      if (first_thread()) ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.empty, 0));
      ptx::mbarrier_wait(&smem.full, 0);
    } else if (first_thread()) {
      right ? ptx::mbarrier_wait_cluster(&smem.empty, 0) : ptx::mbarrier_wait(&smem.empty, 0);
      ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], 1), smem.from, kCopyBytes,
                                 ptx::mapa(&smem.full, 1));
    }
    cluster_sync();
  });
}

// ---------------------------------------------------------------------------------------------------------------
// What is asynchronous between blocks.

TEST_F(BlockRaces, AnAsynchronousStoreThatIsNotWaitedFor) {
  for (const bool cluster : {false, true}) {  // a wait of either scope covers what lands
    in_cluster<Smem>(" after st_async at ", [&](bool right) {
      Smem& smem = start(1, 4);
      const unsigned other = 1 - ptx::cluster_ctarank();
      if (first_thread()) {
        ptx::st_async(ptx::mapa(&smem.words[0], other), 5u, ptx::mapa(&smem.full, other));
      }
      if (right || threadIdx.x < 32) {
        cluster ? ptx::mbarrier_wait_cluster(&smem.full, 0) : ptx::mbarrier_wait(&smem.full, 0);
      } else {
        for (int i = 0; i < 10; ++i) __nanosleep(100);  // by luck it is there by then
      }
      out[other * 64 + threadIdx.x] = smem.words[0];
      cluster_sync();
    });
  }
}

TEST_F(BlockRaces, ALandingHandsOnNothingElseThatItsIssuerDid) {
  in_cluster<Smem>("nothing released there is acquired here", [&](bool right) {
    Smem& smem = start(right ? 2 : 1, 4);
    if (ptx::cluster_ctarank() == 0 && first_thread()) {
      *ptx::mapa(&smem.words[1], 1) = 5;
      if (right) ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 1));
      ptx::st_async(ptx::mapa(&smem.words[0], 1), 5u, ptx::mapa(&smem.full, 1));
    }
    if (ptx::cluster_ctarank() == 1) {
      ptx::mbarrier_wait_cluster(&smem.full, 0);
      out[threadIdx.x] = smem.words[1];
    }
    cluster_sync();
    if (ptx::cluster_ctarank() == 0 && first_thread()) {  // ends block 0's own phase
      if (right) ptx::mbarrier_arrive(&smem.full);
      ptx::st_async(ptx::mapa(&smem.words[0], 0), 5u, ptx::mapa(&smem.full, 0));
      ptx::mbarrier_wait(&smem.full, 0);
    }
    cluster_sync();
  });
}

TEST_F(BlockRaces, AsynchronousAddsDoNotRaceWithEachOther) {
  in_cluster<Smem>(
      " after red_async_add at ",
      [&](bool right) {
        Smem& smem = start(1, ptx::cluster_ctarank() == 0 ? 3 * 4 : 0);
        if (ptx::cluster_ctarank() == 0 && first_thread()) smem.sum = 1;
        cluster_sync();
        if (ptx::cluster_ctarank() != 0 && first_thread()) {
          ptx::red_async_add(ptx::mapa(&smem.sum, 0), 5, ptx::mapa(&smem.full, 0));
        }
        if (ptx::cluster_ctarank() == 0 && (right || first_thread())) {
          ptx::mbarrier_wait_cluster(&smem.full, 0);
        }
        if (ptx::cluster_ctarank() == 0) out[threadIdx.x] = smem.sum;
        cluster_sync();
      },
      4);
}

TEST_F(BlockRaces, ACopyBetweenBlocksThatIsNotWaitedFor) {
  in_cluster<Smem>("cp_async_bulk_cluster at ", [&](bool right) {
    Smem& smem = start(1, kCopyBytes);
    const unsigned other = 1 - ptx::cluster_ctarank();
    if (first_thread()) {
      ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], other), smem.from, kCopyBytes,
                                 ptx::mapa(&smem.full, other));
      ptx::mbarrier_wait(&smem.full, 0);
    }
    if (right) __syncthreads();
    out[other * 64 + threadIdx.x] = smem.to[threadIdx.x];
    cluster_sync();
  });
}

/// The block that a copy went to knows that it has left its source.
TEST_F(BlockRaces, TheSourceOfACopyBetweenBlocksIsWrittenAgainTooEarly) {
  in_cluster<Smem>("under way: nothing here says that it has ended", [&](bool right) {
    Smem& smem = start(1, kCopyBytes);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 0 && first_thread()) {
      ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], 1), smem.from, kCopyBytes,
                                 ptx::mapa(&smem.full, 1));
    }
    if (rank == 1) ptx::mbarrier_wait(&smem.full, 0);
    if (right) cluster_sync();
    if (rank == 0) smem.from[threadIdx.x] = 9;
    cluster_sync();
  });
}

struct MulticastSmem {
  alignas(1024) uint16_t box[64 * 64];
  ptx::Mbarrier full;
};

TEST_F(BlockRaces, AMulticastThatABlockDoesNotWaitFor) {
  GlobalArray<uint16_t> values(64 * 64);
  values.fill(3);
  mla::model::TensorShape shape;
  shape.rank = 4;
  const uint64_t size[] = {64, 64, 1, 1}, stride[] = {2, 128, 8192, 8192};
  const uint32_t box[] = {64, 64, 1, 1};
  std::copy_n(size, 4, shape.size);
  std::copy_n(stride, 4, shape.stride_bytes);
  std::copy_n(box, 4, shape.box);
  mla::model::TensorMap map;
  ASSERT_OK(mla::model::encode_tensor_map(values.data(), shape, &map));
  in_cluster<MulticastSmem>(
      " after cp_async_bulk_tensor_4d_multicast at ",
      [&](bool right) {
        auto& smem = *shared<MulticastSmem>();
        const unsigned rank = ptx::cluster_ctarank();
        if (first_thread()) {
          ptx::mbarrier_init(&smem.full, 1);
          ptx::fence_mbarrier_init();
          ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.box);
        }
        cluster_sync();
        if (rank == 0 && first_thread()) {
          ptx::cp_async_bulk_tensor_4d_multicast(smem.box, &map, 0, 0, 0, 0, &smem.full, 0xf,
                                                 ptx::createpolicy_evict_last());
        }
        if (right || rank != 2 || first_thread()) ptx::mbarrier_wait(&smem.full, 0);
        out[rank * 64 + threadIdx.x] = smem.box[threadIdx.x];
        cluster_sync();
      },
      4);
}

TEST_F(BlockRaces, TheSourceOfALoadIsWrittenBeforeItHasLanded) {
  in_cluster<Smem>(" after cp_async_bulk at ", [&](bool right) {
    Smem& smem = start(1, kCopyBytes);
    if (ptx::cluster_ctarank() == 0) {
      if (first_thread()) ptx::cp_async_bulk(smem.to, in.data(), kCopyBytes, &smem.full);
      // It is enough to wait until it has landed; any thread may do so.
      if (right && threadIdx.x == 40) ptx::mbarrier_wait(&smem.full, 0);
      if (threadIdx.x == (right ? 40 : 0)) in[5] = 1;
      ptx::mbarrier_wait(&smem.full, 0);
    }
    cluster_sync();
    if (ptx::cluster_ctarank() == 1 && first_thread()) {
      ptx::cp_async_bulk(smem.to, in.data() + 1024, kCopyBytes, &smem.full);
      ptx::mbarrier_wait(&smem.full, 0);
    }
  });
}

/// The thread that writes to another block's memory must itself fence it, for the whole cluster.
TEST_F(BlockRaces, ARemoteStoreThatItsReaderFences) {
  in_cluster<Smem>("that thread has called no fence_proxy_async_cluster since", [&](bool right) {
    Smem& smem = start(1);
    const unsigned rank = ptx::cluster_ctarank();
    if (rank == 0) {
      unsigned* to = ptx::mapa(&smem.to[0], 1);
      for (unsigned i = threadIdx.x; i < 256; i += 64) to[i] = i;
      right ? ptx::fence_proxy_async_cluster() : ptx::fence_proxy_async();
    }
    cluster_sync();
    if (rank == 1 && first_thread()) {
      ptx::fence_proxy_async();
      ptx::cp_async_bulk_store(out.data(), smem.to, kCopyBytes);
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_group_read<0>();
    }
    cluster_sync();
  });
}

TEST_F(BlockRaces, AtomicsInAnotherBlocksMemory) {
  in_cluster<Smem>("race: atomic write of 4 bytes", [&](bool right) {
    Smem& smem = start(1);
    if (first_thread()) smem.sum = 0;
    cluster_sync();
    atomicAdd(ptx::mapa(&smem.sum, 0), 1u);
    if (right) cluster_sync();
    if (ptx::cluster_ctarank() == 0) out[threadIdx.x] = smem.sum;
    cluster_sync();
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Cooperative grids: global memory.

/// By a flag, block 1 tells the others that `in` is there.
enum class Flag { kVolatile, kAtomic, kAcquire };

TEST_F(BlockRaces, AFlagWithoutAFenceBeforeIt) {
  in_grid("by thread (0,0,0) of block (1,0,0): nothing released there is acquired here", 2,
          [&](bool right) {
            if (!first_thread()) return;
            volatile unsigned* flag = &counters[0];
            if (blockIdx.x == 1) {
              in[0] = 1;
              if (right) __threadfence();
              *flag = 1;
            } else {
              while (*flag == 0) __nanosleep(20);
              __threadfence();
              out[0] = in[0];
            }
          });
}

TEST_F(BlockRaces, AFlagWithoutAFenceBehindIt) {
  in_grid("nothing released there is acquired here", 2, [&](bool right) {
    if (!first_thread()) return;
    volatile unsigned* flag = &counters[0];
    if (blockIdx.x == 1) {
      in[0] = 1;
      __threadfence();
      *flag = 1;
    } else {
      while (*flag == 0) __nanosleep(20);
      if (right) __threadfence();
      out[0] = in[0];
    }
  });
}

TEST_F(BlockRaces, AnAtomicInPlaceOfAnAcquire) {
  in_grid("nothing released there is acquired here", 2, [&](bool right) {
    if (!first_thread()) return;
    if (blockIdx.x == 1) {
      in[0] = 1;
      ptx::st_release(&counters[0], 1);
    } else {
      if (right) {
        while (ptx::ld_acquire(&counters[0]) == 0) {
        }
      } else {
        while (atomicAdd(&counters[0], 0u) == 0) {
        }
      }
      out[0] = in[0];
    }
  });
}

TEST_F(BlockRaces, AnAtomicInPlaceOfARelease) {
  in_grid("nothing released there is acquired here", 2, [&](bool right) {
    if (!first_thread()) return;
    if (blockIdx.x == 1) {
      in[0] = 1;
      right ? ptx::red_add_release(&counters[0], 1) : void(atomicAdd(&counters[0], 1u));
    } else {
      ptx::wait_until_at_least(&counters[0], 1);
      out[0] = in[0];
    }
  });
}

TEST_F(BlockRaces, APlainFlag) {
  in_grid("race: ", 2, [&](bool right) {
    if (!first_thread()) return;
    if (blockIdx.x == 1) {
      in[0] = 1;
      __threadfence();
      if (right) {
        atomicExch(&counters[0], 1u);
      } else {
        counters[0] = 1;
      }
    } else {
      ptx::wait_until_at_least(&counters[0], 1);
      out[0] = in[0];
    }
  });
}

TEST_F(BlockRaces, NoBlockBarrierBeforeTheRelease) {
  in_grid("of block (0,0,0): nothing released there is acquired here", 2, [&](bool right) {
    if (blockIdx.x == 0) {
      in[threadIdx.x] = 1;
      if (right) __syncthreads();
      if (first_thread()) ptx::st_release(&counters[0], 1);
    } else {
      ptx::wait_until_at_least(&counters[0], 1);
      out[threadIdx.x] = in[threadIdx.x];
    }
  });
}

TEST_F(BlockRaces, NoBlockBarrierBehindTheAcquire) {
  in_grid("nothing released there is acquired here", 2, [&](bool right) {
    if (blockIdx.x == 0) {
      in[threadIdx.x] = 1;
      __syncthreads();
      if (first_thread()) ptx::st_release(&counters[0], 1);
    } else {
      if (first_thread()) ptx::wait_until_at_least(&counters[0], 1);
      if (right) __syncthreads();
      out[threadIdx.x] = in[threadIdx.x];
    }
  });
}

/// A barrier of the grid that is used again: the last block to come resets the counter, then lets the others go.
TEST_F(BlockRaces, ACounterIsResetWhileOthersStillLookAtIt) {
  in_grid(": nothing released there is acquired here", 4, [&](bool right) {
    unsigned* count = &counters[0];
    unsigned* round = &counters[4];
    for (unsigned i = 0; i < (right ? 3u : 1u); ++i) {
      __syncthreads();
      if (first_thread()) {
        __threadfence();
        const bool last = atomicAdd(count, 1u) == gridDim.x - 1;
        if (right) {
          if (last) {
            *count = 0;
            ptx::st_release(round, i + 1);
          } else {
            while (ptx::ld_acquire(round) != i + 1) {
            }
          }
        } else if (last) {
          *count = 0;  // the others still look at it
        } else {
          while (ptx::ld_acquire(count) != 0) {
          }
        }
        __threadfence();
      }
      __syncthreads();
    }
  });
}

/// A block may learn through a third block that another has written.
TEST_F(BlockRaces, ReleasesAreHandedOn) {
  in_grid("by thread (0,0,0) of block (0,0,0): nothing released there is acquired here", 3,
          [&](bool right) {
            if (!first_thread()) return;
            if (blockIdx.x == 0) {
              in[0] = 1;
              ptx::st_release(&counters[0], 1);
            } else if (blockIdx.x == 1) {
              if (right) ptx::wait_until_at_least(&counters[0], 1);
              ptx::st_release(&counters[1], 1);
            } else {
              ptx::wait_until_at_least(&counters[1], 1);
              out[0] = in[0];
            }
          });
}

/// More blocks read than are remembered one by one. The last one writes, but knows only of some that they are done.
TEST_F(BlockRaces, AWriteAfterTheReadsOfManyBlocks) {
  for (const unsigned blocks : {6u, 80u}) {
    in_grid("by one of many blocks", blocks, [&](bool right) {
      const unsigned last = gridDim.x - 1;
      if (in[threadIdx.x] == 1) out[blockIdx.x * 64 + threadIdx.x] = 1;
      __syncthreads();
      if (!first_thread()) return;
      if (blockIdx.x != last && (right || blockIdx.x < 3)) ptx::red_add_release(&counters[0], 1);
      if (blockIdx.x != last) return;
      ptx::wait_until_at_least(&counters[0], right ? last : 3);
      in[0] = 8;
    });
  }
}

/// Each block has a shared memory of its own.
TEST_F(BlockRaces, EachBlockOfAGridHasASharedMemoryOfItsOwn) {
  in_grid("no barrier between them, block (2,0,0), thread (32,0,0)", 4, [&](bool right) {
    auto* words = static_cast<unsigned*>(gpu_model::dynamic_shared_memory(256));
    words[threadIdx.x] = blockIdx.x;
    if (first_thread()) {
      ptx::red_add_release(&counters[0], 1);
      ptx::wait_until_at_least(&counters[0], gridDim.x);
    }
    if (right || blockIdx.x != 2) __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = words[63 - threadIdx.x];
  });
}

/// A grid as large as a GPU, in which each thread releases and acquires by itself: 50,688 clocks.
TEST_F(BlockRaces, AWholeGpuNeedsLittleMemory) {
  constexpr unsigned kBlocks = 132, kThreads = 384;
  GlobalArray<unsigned> values(kBlocks * kThreads), sums(kBlocks * kThreads);
  begin();
  gpu_model::launch(kBlocks, kThreads, 0,
                    [&] {
                      const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
                      values[thread] = thread;
                      __threadfence();
                      atomicAdd(&counters[0], 1u);
                      ptx::wait_until_at_least(&counters[0], kBlocks * kThreads);
                      sums[thread] = values[(thread + 12345) % (kBlocks * kThreads)];
                      ptx::red_add_release(&counters[1], 1);
                      ptx::wait_until_at_least(&counters[1], kBlocks * kThreads);
                      values[thread] = 0;
                    },
                    {.cooperative = true});
  EXPECT_EQ(sums[0], 12345u);
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  EXPECT_LT(used.ru_maxrss, 4 << 20);  // KiB
}

}  // namespace
}  // namespace gpu_model_test
