/// @file
/// Launches whose blocks are resident together on the GPU model: blocks that wait for each other
/// give right results under every schedule, and a wait that can never end is reported.

#include <gtest/gtest.h>

#include <string>

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"
#include "tests/status_matchers.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;

class CoResident : public GpuModel {
 protected:
  /// What a cooperative launch throws; empty if nothing.
  template <typename Kernel>
  static std::string error_together(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
    return error_of(grid, block, shared_bytes, kernel, {.cooperative = true});
  }

  /// Expects this error under every seed.
  template <typename Kernel>
  static void expect_wrong(const std::string& part, dim3 grid, dim3 block, Kernel kernel) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      expect_contains(error_together(grid, block, 1024, kernel), part);
    }
  }
};

enum class Wait { kUntil, kAcquire, kAtomic, kVolatile, kNone };

/// A barrier of all blocks, for use once per counter.
template <Wait kWait>
void meet_all_blocks(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x;
    if constexpr (kWait == Wait::kAtomic || kWait == Wait::kVolatile) {
      __threadfence();
      atomicAdd(counter, 1);
    } else {
      ptx::red_add_release(counter, 1);
    }
    if constexpr (kWait == Wait::kUntil) {
      ptx::wait_until_at_least(counter, blocks);
    } else if constexpr (kWait == Wait::kAcquire) {
      while (ptx::ld_acquire(counter) < blocks) {
      }
    } else if constexpr (kWait == Wait::kAtomic) {
      while (atomicAdd(counter, 0) < blocks) {
      }
      __threadfence();
    } else if constexpr (kWait == Wait::kVolatile) {
      while (*static_cast<volatile unsigned*>(counter) < blocks) __nanosleep(20);
      __threadfence();
    }
  }
  __syncthreads();
}

/// Every block writes, and after the barrier reads what the next block wrote; `rounds` times.
template <Wait kWait>
__global__ void pass_around(unsigned* counters, int* values, int* out, int rounds) {
  const unsigned blocks = gridDim.x, threads = blockDim.x;
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    int* here = values + static_cast<unsigned>(round) * blocks * threads;
    here[blockIdx.x * threads + threadIdx.x] = static_cast<int>(blockIdx.x) + round;
    meet_all_blocks<kWait>(counters + round);
    sum += here[(blockIdx.x + 1) % blocks * threads + threadIdx.x];
  }
  out[blockIdx.x * threads + threadIdx.x] = sum;
}

template <Wait kWait>
std::string run_pass_around(unsigned blocks, unsigned threads,
                            std::string (*run)(dim3, dim3, const std::function<void()>&)) {
  constexpr int kRounds = 3;
  GlobalArray<unsigned> counters(kRounds);
  counters.fill(0);
  GlobalArray<int> values(kRounds * blocks * threads), out(blocks * threads);
  std::string error = run(blocks, threads, [&] {
    pass_around<kWait>(counters.data(), values.data(), out.data(), kRounds);
  });
  if (!error.empty()) return error;
  for (unsigned i = 0; i < blocks * threads; ++i) {
    const int next = static_cast<int>((i / threads + 1) % blocks);
    if (out[i] != next * kRounds + 3) return "wrong at " + std::to_string(i);
  }
  return {};
}

std::string together(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  try {
    gpu_model::launch(grid, block, 0, kernel, {.cooperative = true});
  } catch (const gpu_model::KernelError& error) {
    return error.what();
  }
  return {};
}

TEST_F(CoResident, BlocksWaitForEachOtherInAnyWay) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    EXPECT_EQ(run_pass_around<Wait::kUntil>(5, 64, together), "") << "seed " << seed;
    EXPECT_EQ(run_pass_around<Wait::kAcquire>(5, 64, together), "") << "seed " << seed;
    EXPECT_EQ(run_pass_around<Wait::kAtomic>(5, 64, together), "") << "seed " << seed;
    EXPECT_EQ(run_pass_around<Wait::kVolatile>(5, 64, together), "") << "seed " << seed;
  }
}

TEST_F(CoResident, MissingBarrierBetweenBlocksIsFound) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    EXPECT_NE(run_pass_around<Wait::kNone>(5, 64, together), "") << "seed " << seed;
  }
}

TEST_F(CoResident, BlocksRunInManyOrders) {
  constexpr unsigned kBlocks = 4;
  std::vector<std::vector<unsigned>> orders;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    GlobalArray<unsigned> next(1), order(kBlocks);
    next[0] = 0;
    gpu_model::launch(kBlocks, 1, 0, [&] { order[atomicAdd(next.data(), 1)] = blockIdx.x; },
                      {.cooperative = true});
    if (seed == 0) {
      EXPECT_EQ(order.values(), (std::vector<unsigned>{0, 1, 2, 3}));
    }
    orders.push_back(order.values());
  }
  std::sort(orders.begin(), orders.end());
  orders.erase(std::unique(orders.begin(), orders.end()), orders.end());
  EXPECT_GE(orders.size(), 5u);
}

TEST_F(CoResident, SameSeedSameSchedule) {
  const auto trace = [] {
    GlobalArray<unsigned> next(1), order(4 * 32 * 3);
    next[0] = 0;
    gpu_model::launch(4, 32, 0,
                      [&] {
                        for (int i = 0; i < 3; ++i) {
                          order[atomicAdd(next.data(), 1)] = blockIdx.x * 32 + threadIdx.x;
                          __syncthreads();
                        }
                      },
                      {.cooperative = true});
    return order.values();
  };
  for (uint64_t seed = 1; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    EXPECT_EQ(trace(), trace());
  }
}

TEST_F(CoResident, CounterThatStaysTooLow) {
  GlobalArray<unsigned> counters(16);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    counters.fill(0);
    int line = 0;
    const std::string error = error_together(4, 32, 0, [&] {
      if (threadIdx.x != 0) return;
      if (blockIdx.x < 2) ptx::red_add_release(&counters[4], 1);
      if (blockIdx.x != 3) return;
      line = __LINE__ + 1;
      ptx::wait_until_at_least(&counters[4], 3);
    });
    EXPECT_EQ(error, "deadlock: block (3,0,0): thread 0 waits in wait_until_at_least at " +
                         at(line) +
                         ": the counter at byte 16 of an allocation of 64 bytes wants 3 and holds "
                         "2; threads 1-31 have returned; 3 blocks have ended");
  }
}

TEST_F(CoResident, BlocksThatSpinForever) {
  GlobalArray<unsigned> counters(2);
  counters.fill(0);
  int line = 0;
  const auto spin = [&] {
    if (threadIdx.x == 0) {
      if (blockIdx.x == 0) line = __LINE__ + 1;
      while (ptx::ld_acquire(&counters[1]) == 0) {
      }
    }
    __syncthreads();
  };
  error_together(1, 32, 1024, spin);
  expect_wrong(
      "deadlock: blocks (0,0,0) to (1,0,0), each: thread 0 waits in ld_acquire at " + at(line) +
          ": the counter at byte 4 of an allocation of 8 bytes holds 0; threads 1-31 wait in "
          "__syncthreads",
      2, 32, spin);
  // Each waits for the other, looks at two places, and sleeps.
  expect_wrong("deadlock: block", 2, 32, [&] {
    if (threadIdx.x != 0) return;
    while (ptx::ld_acquire(&counters[0]) == 0 || ptx::ld_acquire(&counters[1]) == 0) {
      __nanosleep(10);
    }
    ptx::st_release(&counters[blockIdx.x], 1);
  });
}

TEST_F(CoResident, WaitingForASleeperIsNoDeadlock) {
  GlobalArray<unsigned> counter(1);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    counter[0] = 0;
    EXPECT_EQ(error_together(2, 32, 0,
                             [&] {
                               if (threadIdx.x != 0) return;
                               if (blockIdx.x == 0) {
                                 for (int i = 0; i < 2000; ++i) __nanosleep(100);
                                 ptx::st_release(counter.data(), 7);
                               } else {
                                 while (ptx::ld_acquire(counter.data()) != 7) {
                                 }
                               }
                             }),
              "");
  }
}

/// A flag of which only the upper half changes.
TEST_F(CoResident, FlagsOf64Bits) {
  constexpr uint64_t kRaised = uint64_t{7} << 32;
  GlobalArray<uint64_t> flag(1);
  GlobalArray<int> value(1), seen(1);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    flag[0] = 0;
    value[0] = seen[0] = 0;
    EXPECT_EQ(error_together(2, 32, 0,
                             [&] {
                               if (threadIdx.x != 0) return;
                               if (blockIdx.x == 1) {
                                 value[0] = 5;
                                 ptx::st_release(flag.data(), kRaised);
                               } else {
                                 while (ptx::ld_acquire(flag.data()) != kRaised) {
                                 }
                                 seen[0] = value[0];
                               }
                             }),
              "");
    EXPECT_EQ(flag[0], kRaised);
    EXPECT_EQ(seen[0], 5);
  }
}

/// A release that does not come after the other threads' stores.
TEST_F(CoResident, MissingBlockBarrierBeforeTheRelease) {
  int found = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    GlobalArray<unsigned> counter(1);
    counter[0] = 0;
    GlobalArray<int> values(64), out(64);
    out.fill(-1);
    const std::string error = error_together(2, 64, 0, [&] {
      if (blockIdx.x == 0) {
        values[threadIdx.x] = static_cast<int>(threadIdx.x);
        // no __syncthreads
        if (threadIdx.x == 0) ptx::st_release(counter.data(), 1);
      } else {
        ptx::wait_until_at_least(counter.data(), 1);
        out[threadIdx.x] = values[threadIdx.x];
      }
    });
    bool right = error.empty();
    for (int i = 0; i < 64; ++i) right = right && out[static_cast<size_t>(i)] == i;
    found += !right;
  }
  EXPECT_GE(found, 1);
  RecordProperty("seeds_that_found_it", found);
}

TEST_F(CoResident, AnErrorInOneBlockEndsAll) {
  GlobalArray<unsigned> counter(1);
  counter[0] = 0;
  expect_wrong("the kernel threw an exception: no, block (1,0,0), thread (3,0,0)", 3, 32, [&] {
    if (blockIdx.x == 1 && threadIdx.x == 3) throw std::runtime_error("no");
    ptx::wait_until_at_least(counter.data(), 1);
  });
}

TEST_F(CoResident, StackOverflowIsFound) {
  volatile char* keep = nullptr;
  const auto overflow = [&](auto& self, int depth) -> void {
    volatile char array[4096];
    array[0] = static_cast<char>(depth);
    keep = array;
    if (depth < 1000) self(self, depth + 1);
    keep[0] = array[0];
  };
  if (kAddressSanitizer) GTEST_SKIP() << "AddressSanitizer ends the process";
  expect_wrong("stack overflow", 2, 32, [&] {
    if (blockIdx.x == 1 && threadIdx.x == 0) overflow(overflow, 0);
  });
}

TEST_F(CoResident, GridThatDoesNotFit) {
  gpu_model::device().multiprocessors = 3;
  const auto nothing = [] {};
  EXPECT_EQ(error_together(6, 1024, 0, nothing), "");
  EXPECT_EQ(error_together(7, 1024, 0, nothing),
            "launch: the grid has 7 blocks, but at most 6 are resident at once: 2 on each of 3 "
            "multiprocessors (2 by their 1024 threads, 228 by their 0 bytes of shared memory)");
  EXPECT_EQ(error_together(3, 32, 232448, nothing), "");
  expect_contains(error_together(4, 32, 232448, nothing), "at most 3 are resident at once");
  // 2 * (113 + 1) KiB fit in 228 KiB, but not one byte more.
  EXPECT_EQ(error_together(6, 32, 113 * 1024, nothing), "");
  expect_contains(error_together(6, 32, 113 * 1024 + 1, nothing), "1 by their 115713 bytes");
  EXPECT_EQ(error_together(96, 1, 0, nothing), "");
  expect_contains(error_together(97, 1, 0, nothing), "32 on each of 3");
}

/// In a plain launch, a thread can wait for its own block only.
TEST_F(CoResident, PlainLaunchPromisesNothing) {
  GlobalArray<unsigned> counter(1);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    counter[0] = 0;
    EXPECT_EQ(error_of(1, 64, 0,
                       [&] {
                         if (threadIdx.x == 0) ptx::st_release(counter.data(), 1);
                         ptx::wait_until_at_least(counter.data(), 1);
                       }),
              "");
    gpu_model::schedule().os_threads = 1;
    expect_rejected("only a cooperative launch promises that other blocks run", 2, 32, 0, [&] {
      if (threadIdx.x != 0) return;
      ptx::red_add_release(counter.data(), 1);
      ptx::wait_until_at_least(counter.data(), 3);
    });
    gpu_model::schedule().os_threads = 0;
  }
}

__global__ void count_blocks(unsigned* counter, unsigned* seen) {
  if (threadIdx.x != 0) return;
  ptx::red_add_release(counter, 1);
  ptx::wait_until_at_least(counter, gridDim.x);
  seen[blockIdx.x] = ptx::ld_acquire(counter);
}

TEST_F(CoResident, LaunchCooperative) {
  gpu_model::device().multiprocessors = 2;
  GlobalArray<unsigned> counter(1), seen(8);
  counter[0] = 0;
  EXPECT_OK(
      mla::model::launch_cooperative(count_blocks, 8, 512, 0, {}, counter.data(), seen.data()));
  for (unsigned block = 0; block < 8; ++block) EXPECT_EQ(seen[block], 8u);
  const mla::Status status =
      mla::model::launch_cooperative(count_blocks, 9, 512, 0, {}, counter.data(), seen.data());
  EXPECT_EQ(status.code(), mla::StatusCode::kUnsupported);
  expect_contains(status.message(), "9 blocks, but at most 8");
}

/// The largest grid that a decode uses: all multiprocessors, all their shared memory. The figures
/// are in reference/gpu_model/README.md.
TEST_F(CoResident, AWholeGpu) {
  constexpr unsigned kBlocks = 132, kThreads = 384;
  constexpr size_t kSharedBytes = 232448;
  GlobalArray<unsigned> counters(2);
  GlobalArray<unsigned> out(kBlocks);
  for (const uint64_t seed : {0, 5}) {
    gpu_model::schedule().seed = seed;
    counters.fill(0);
    gpu_model::launch(kBlocks, kThreads, kSharedBytes,
                      [&] {
                        auto* values =
                            static_cast<unsigned*>(gpu_model::dynamic_shared_memory(kSharedBytes));
                        for (size_t i = threadIdx.x; i < kSharedBytes / 4; i += kThreads)
                          values[i] = blockIdx.x;
                        meet_all_blocks<Wait::kUntil>(&counters[0]);
                        if (threadIdx.x == 0) atomicAdd(&counters[1], values[kSharedBytes / 4 - 1]);
                        meet_all_blocks<Wait::kNone>(&counters[0]);
                        if (threadIdx.x == 0) {
                          ptx::wait_until_at_least(&counters[0], 2 * kBlocks);
                          out[blockIdx.x] = ptx::ld_acquire(&counters[1]);
                        }
                      },
                      {.cooperative = true});
    for (unsigned block = 0; block < kBlocks; ++block) {
      ASSERT_EQ(out[block], kBlocks * (kBlocks - 1) / 2);
    }
  }
}

}  // namespace
}  // namespace gpu_model_test
