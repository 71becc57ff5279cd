/// @file
/// The GPU model itself. Right kernels must give right results under every schedule, and wrong kernels
/// must be rejected: launch() throws. Where the race detector is off, a race is found instead by a
/// wrong result under at least one of ten seeds.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/reference/gpu_model/gpu_model_fixture.h"

namespace gpu_model_test {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// Races. `kSynchronized` is the only difference between the right kernel and the wrong one.

class Races : public GpuModel {
 protected:
  static constexpr unsigned kThreads = 128;

  /// `kernel(out)` is right: it must fill out[i] with expected(i).
  template <typename Kernel, typename Expected>
  static void expect_right(unsigned threads, Kernel kernel, Expected expected) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      EXPECT_EQ(run(seed, threads, kernel, expected), "") << "seed " << seed;
    }
  }

  /// The friendly schedule gives right results, so only a hostile schedule or the race detector finds
  /// the race.
  template <typename Kernel, typename Expected>
  static void expect_race(unsigned threads, Kernel kernel, Expected expected) {
    if (gpu_model::kernels_are_instrumented()) {
      const std::string friendly = run(0, threads, kernel, expected);
      expect_contains(friendly, "race: ");
      expect_contains(friendly, ": no ");
      expect_contains(friendly, ", block (0,0,0), thread (");
    }
    gpu_model::schedule().detect_races = false;
    EXPECT_EQ(run(0, threads, kernel, expected), "");
    int rejected = 0;
    for (uint64_t seed = 1; seed < kSeeds; ++seed) {
      rejected += !run(seed, threads, kernel, expected).empty();
    }
    EXPECT_GE(rejected, 1);
    RecordProperty("seeds_that_found_it", rejected);
  }

 private:
  /// Empty, or what was wrong.
  template <typename Kernel, typename Expected>
  static std::string run(uint64_t seed, unsigned threads, Kernel kernel, Expected expected) {
    gpu_model::schedule().seed = seed;
    GlobalArray<int> out(threads);
    const std::string error = error_of(1, threads, 1024, [&] { kernel(out.data()); });
    if (!error.empty()) return error;
    for (unsigned i = 0; i < threads; ++i) {
      if (out[i] != expected(i)) return "wrong result at " + std::to_string(i);
    }
    return {};
  }
};

/// Everyone reads what the thread before wrote.
template <bool kSynchronized>
__global__ void read_after_write(int* out) {
  int* values = *shared<int[256]>();
  const unsigned i = threadIdx.x;
  values[i] = static_cast<int>(i);
  if constexpr (kSynchronized) __syncthreads();
  out[i] = values[i == 0 ? 0 : i - 1];
}

TEST_F(Races, MissingSyncthreadsReadAfterWrite) {
  const auto expected = [](unsigned i) { return static_cast<int>(i == 0 ? 0 : i - 1); };
  expect_right(kThreads, read_after_write<true>, expected);
  expect_race(kThreads, read_after_write<false>, expected);
}

/// Two tiles through one buffer: everyone reads what the next thread wrote, then overwrites its
/// own value.
template <bool kSynchronized>
__global__ void write_after_read(int* out) {
  int* values = *shared<int[256]>();
  const unsigned i = threadIdx.x;
  int sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    values[i] = 1000 * tile + static_cast<int>(i);
    __syncthreads();
    sum += values[i + 1 == blockDim.x ? i : i + 1];
    if constexpr (kSynchronized) __syncthreads();
  }
  out[i] = sum;
}

TEST_F(Races, MissingSyncthreadsWriteAfterRead) {
  const auto expected = [](unsigned i) {
    return 1000 + 2 * static_cast<int>(std::min(i + 1, kThreads - 1));
  };
  expect_right(kThreads, write_after_read<true>, expected);
  expect_race(kThreads, write_after_read<false>, expected);
}

/// Pairs of lanes of one warp, which hardware before Volta ran in lockstep.
template <bool kSynchronized>
__global__ void warp_exchange(int* out) {
  int* values = *shared<int[256]>();
  const unsigned lane = threadIdx.x;
  values[lane] = static_cast<int>(lane);
  if constexpr (kSynchronized) __syncwarp();
  out[lane] = values[lane & ~1u];
}

TEST_F(Races, MissingSyncwarp) {
  const auto expected = [](unsigned lane) { return static_cast<int>(lane & ~1u); };
  expect_right(32, warp_exchange<true>, expected);
  expect_race(32, warp_exchange<false>, expected);
}

/// A shuffle makes lanes meet but orders no memory. The kernel is wrong, but right under every schedule.
__global__ void shuffle_for_syncwarp(int* out) {
  int* values = *shared<int[256]>();
  const unsigned i = threadIdx.x;
  values[i] = static_cast<int>(i);
  __shfl_sync(kAllLanes, 0, 0);
  out[i] = values[31 - i];
}

TEST_F(Races, ShuffleOrdersNoMemory) {
  if (!gpu_model::kernels_are_instrumented()) GTEST_SKIP() << "only the race detector can tell";
  GlobalArray<int> out(32);
  expect_rejected("no __syncwarp or barrier between them", 1, 32, 1024,
                  [&] { shuffle_for_syncwarp(out.data()); });
}

TEST_F(Races, BetweenBlocks) {
  if (!gpu_model::kernels_are_instrumented()) GTEST_SKIP() << "only the race detector can tell";
  GlobalArray<int> out(1);
  expect_rejected("by thread (0,0,0) of block (0,0,0)", 2, 32, 0, [&] {
    if (threadIdx.x == 0) out[0] = static_cast<int>(blockIdx.x);
  });
}

/// The last block to finish adds up what all blocks left: ordered by fences and an atomic alone.
__global__ void sum_in_last_block(const int* in, int* partial, unsigned* finished, int* out) {
  unsigned* last = shared<unsigned>();
  int sum = in[blockIdx.x * 32 + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAllLanes, sum, offset);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    *last = atomicAdd(finished, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (*last == 0) return;
  sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) sum += partial[i];
  sum = __reduce_add_sync(kAllLanes, sum);
  if (threadIdx.x == 0) *out = sum;
}

TEST_F(Races, FencesAndAtomicsOrderBlocks) {
  GlobalArray<int> in(100 * 32), partial(100), out(1);
  GlobalArray<unsigned> finished(1);
  std::iota(in.data(), in.data() + 3200, 0);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    finished[0] = 0;
    gpu_model::launch(100, 32, sizeof(unsigned), [&] {
      sum_in_last_block(in.data(), partial.data(), finished.data(), out.data());
    });
    EXPECT_EQ(out[0], 3200 * 3199 / 2) << "seed " << seed;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Memory.

class Memory : public GpuModel {};

/// A read that the compiler does not drop, although nobody uses its result.
void read(const float* address) {
  static_cast<void>(*static_cast<const volatile float*>(address));
}

/// Hides a value from the compiler, so that it does not see the fault that the model must find.
int opaque(int value) {
  volatile int copy = value;
  return copy;
}

__global__ void read_shared(int index) {
  read(*shared<float[256]>() + opaque(index));
}
__global__ void write_shared(int index) {
  (*shared<float[256]>())[opaque(index)] = 1;
}

TEST_F(Memory, SharedReadPastTheEnd) {
  expect_rejected(
      "out-of-bounds shared memory read: 0 bytes past the end of 1024 bytes, "
      "block (0,0,0), thread (17,0,0)",
      1, 32, 1024, [] { read_shared(threadIdx.x == 17 ? 256 : 0); });
}

TEST_F(Memory, SharedWritePastTheEnd) {
  expect_rejected(
      "out-of-bounds shared memory write: 16 bytes past the end of 1024 bytes, "
      "block (2,1,0), thread (3,1,0)",
      dim3(3, 2), dim3(4, 2), 1024, [] {
        if (blockIdx.x == 2 && blockIdx.y == 1 && threadIdx.x == 3 && threadIdx.y == 1) {
          write_shared(260);
        }
      });
}

TEST_F(Memory, SharedAccessBeforeTheStart) {
  // Under odd seeds shared memory begins where the guard zone ends.
  gpu_model::schedule().seed = 1;
  expect_rejected("out-of-bounds shared memory read: 4 bytes before the start of 1024 bytes", 1, 1,
                  1024, [] { read_shared(-1); });
  expect_rejected("out-of-bounds shared memory write: 8 bytes before the start of 1024 bytes", 1, 1,
                  1024, [] { write_shared(-2); });
}

TEST_F(Memory, SharedWriteIntoPadding) {
  // 20 bytes leave 12 bytes of padding before the guard zone. A write there faults nowhere, but it is
  // seen when the block ends.
  const auto kernel = [] {
    static_cast<float*>(gpu_model::dynamic_shared_memory(20))[opaque(5)] = 1;
  };
  if (kAddressSanitizer) {
    EXPECT_DEATH(gpu_model::launch(1, 1, 20, kernel), "use-after-poison");
  } else {
    expect_rejected("out-of-bounds shared memory write: at byte 20 of 20, block (0,0,0)", 1, 1, 20,
                    kernel);
  }
}

TEST_F(Memory, MoreSharedMemoryThanLaunched) {
  expect_rejected(
      "the kernel uses 1024 bytes of dynamic shared memory, but the launch asked for 512", 1, 1,
      512, [] { read_shared(0); });
}

TEST_F(Memory, GlobalAccessOutOfBounds) {
  GlobalArray<float> values(1000);
  values.fill(0);
  expect_rejected(
      "out-of-bounds global memory read: 0 bytes past the end of 4000 bytes, block (31,0,0), "
      "thread (8,0,0)",
      32, 32, 0, [&] { read(values.data() + blockIdx.x * 32 + threadIdx.x); });
  expect_rejected("out-of-bounds global memory write: 4096 bytes before the start of 4000 bytes", 1,
                  1, 0, [&] { values.data()[opaque(-1024)] = 1; });
}

TEST_F(Memory, NullPointer) {
  expect_rejected("invalid memory read: address (nil), block (0,0,0), thread (0,0,0)", 1, 1, 0,
                  [] { read(nullptr); });
}

unsigned recurse(unsigned depth) {
  volatile unsigned char frame[4096];
  frame[depth % 4096] = static_cast<unsigned char>(depth);
  return depth == 0 ? 0 : recurse(depth - 1) + frame[depth % 4096];
}

TEST_F(Memory, StackOverflow) {
  expect_rejected("stack overflow: more than", 1, 64, 0,
                  [] { recurse(threadIdx.x == 40 ? 10000 : 4); });
}

TEST_F(Memory, SharedMemoryStartsPoisonedInEveryBlock) {
  std::atomic<int> numbers = 0;
  gpu_model::schedule().os_threads = 1;
  gpu_model::launch(3, 1, 1000 * sizeof(float), [&] {
    auto& values = *shared<float[1000]>();
    for (float& value : values) numbers += !std::isnan(value);
    for (float& value : values) value = 1;
  });
  EXPECT_EQ(numbers, 0);
}

TEST_F(Memory, AllocatedMemoryStartsPoisonedAndAligned) {
  const size_t before = gpu_model::free_memory();
  for (const size_t bytes : {size_t{1}, size_t{20}, size_t{4096}, size_t{100000}}) {
    auto* bytes_at = static_cast<unsigned char*>(gpu_model::allocate(bytes));
    ASSERT_NE(bytes_at, nullptr);
    EXPECT_EQ(gpu_model::free_memory(), before - bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(bytes_at) % 16, 0u);
    EXPECT_TRUE(
        std::all_of(bytes_at, bytes_at + bytes, [](unsigned char byte) { return byte == 0xff; }));
    gpu_model::deallocate(bytes_at);
  }
  EXPECT_EQ(gpu_model::free_memory(), before);
  EXPECT_EQ(gpu_model::allocate(size_t{1} << 60), nullptr);
  gpu_model::deallocate(nullptr);
}

TEST_F(Memory, SharedMemoryIsAlignedAsItsSizeIs) {
  for (uint64_t seed : {0, 1}) {
    gpu_model::schedule().seed = seed;
    gpu_model::launch(1, 1, 5 * 1024, [] {
      if (reinterpret_cast<uintptr_t>(gpu_model::dynamic_shared_memory(5 * 1024)) % 1024 != 0) {
        throw std::runtime_error("misaligned");
      }
    });
  }
}

TEST_F(Memory, StaticSharedMemoryIsTheBlocks) {
  gpu_model::schedule().os_threads = 1;
  std::vector<int> out(64);
  gpu_model::launch(1, 64, 0, [&] {
    __shared__ int values[64];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
  });
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(out[i], static_cast<int>(63 - i));
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers, and waits that never end.

class Barriers : public GpuModel {};

TEST_F(Barriers, DifferentLines) {
  int first = 0, second = 0;
  const std::string message = error_of(1, 64, 0, [&] {
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) first = __LINE__ + 1;
      __syncthreads();
    } else {
      if (threadIdx.x == 32) second = __LINE__ + 1;
      __syncthreads();
    }
  });
  EXPECT_EQ(message, "divergent barrier: block (0,0,0), thread (32,0,0) is in __syncthreads at " +
                         at(second) + " while thread (0,0,0) waits in __syncthreads at " +
                         at(first));
}

TEST_F(Barriers, EarlyReturn) {
  int line = 0;
  const auto kernel = [&] {
    if (threadIdx.x >= 40) return;
    if (threadIdx.x == 0) line = __LINE__ + 1;
    __syncthreads();
  };
  const std::string message = error_of(1, 64, 0, kernel);
  EXPECT_EQ(message, "divergent barrier: block (0,0,0): threads 0-39 wait in __syncthreads at " +
                         at(line) + "; threads 40-63 have returned");
}

TEST_F(Barriers, DeadlockSaysWhoWaitsWhere) {
  int warp_line = 0, block_line = 0;
  const auto kernel = [&] {
    if (blockIdx.x != 3) return;
    if (threadIdx.x >= 32 && threadIdx.x < 48) {
      if (threadIdx.x == 32) warp_line = __LINE__ + 1;
      __syncwarp();
    }
    if (threadIdx.x == 0) block_line = __LINE__ + 1;
    __syncthreads();
  };
  const std::string message = error_of(5, 64, 0, kernel);
  EXPECT_EQ(message, "deadlock: block (3,0,0): threads 0-31 wait in __syncthreads at " +
                         at(block_line) +
                         "; threads 32-47 wait in __syncwarp(mask 0xffffffff) at " + at(warp_line) +
                         "; threads 48-63 wait in __syncthreads at " + at(block_line));
}

TEST_F(Barriers, Reductions) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    GlobalArray<int> out(100 * 4);
    gpu_model::launch(1, 100, 0, [&] {
      const int i = static_cast<int>(threadIdx.x);
      out[threadIdx.x * 4 + 0] = __syncthreads_count(i % 3 == 0);
      out[threadIdx.x * 4 + 1] = __syncthreads_or(i == 77);
      out[threadIdx.x * 4 + 2] = __syncthreads_and(i != 77);
      out[threadIdx.x * 4 + 3] = __syncthreads_and(1) + 2 * __syncthreads_or(0);
    });
    for (size_t i = 0; i < 100; ++i) {
      EXPECT_EQ(out[i * 4 + 0], 34);
      EXPECT_EQ(out[i * 4 + 1], 1);
      EXPECT_EQ(out[i * 4 + 2], 0);
      EXPECT_EQ(out[i * 4 + 3], 1);
    }
  }
}

/// Two warps that take turns through an atomic: whichever the schedule prefers must not starve the
/// other.
TEST_F(Barriers, SpinningThreadsLetOthersRun) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    GlobalArray<int> turn(1);
    turn[0] = 0;
    gpu_model::launch(1, 64, 0, [&] {
      if (threadIdx.x % 32 != 0) return;
      const int self = static_cast<int>(threadIdx.x / 32);
      for (int round = 0; round < 10; ++round) {
        while (atomicAdd(turn.data(), 0) % 2 != self) {
        }
        atomicAdd(turn.data(), 1);
        while (round == 9 && atomicAdd(turn.data(), 0) < 19) __nanosleep(20);
      }
    });
    EXPECT_EQ(turn[0], 20);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Warps.

class Warps : public GpuModel {
 protected:
  /// Runs `function(lane)` on two warps under every seed; expects expected(lane) from each.
  template <typename Function, typename Expected>
  static void expect_lanes(Function function, Expected expected) {
    using T = decltype(function(0));
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule().seed = seed;
      GlobalArray<T> out(64);
      gpu_model::launch(1, 64, 0,
                        [&] { out[threadIdx.x] = function(static_cast<int>(threadIdx.x % 32)); });
      for (int i = 0; i < 64; ++i)
        EXPECT_EQ(out[static_cast<size_t>(i)], expected(i % 32)) << "lane " << i;
    }
  }
};

TEST_F(Warps, Shuffle) {
  expect_lanes([](int lane) { return __shfl_sync(kAllLanes, 100 + lane, 5); },
               [](int) { return 105; });
  expect_lanes([](int lane) { return __shfl_sync(kAllLanes, 100 + lane, lane + 1); },
               [](int lane) { return 100 + (lane + 1) % 32; });
  expect_lanes([](int lane) { return __shfl_sync(kAllLanes, lane, 3, 8); },
               [](int lane) { return lane / 8 * 8 + 3; });
}

TEST_F(Warps, ShuffleXor) {
  expect_lanes(
      [](int lane) { return __shfl_xor_sync(kAllLanes, 1.5f * static_cast<float>(lane), 4); },
      [](int lane) { return 1.5f * static_cast<float>(lane ^ 4); });
  // Width 8: a lower segment may be read, a higher one may not.
  expect_lanes([](int lane) { return __shfl_xor_sync(kAllLanes, lane, 8, 8); },
               [](int lane) { return lane & 8 ? lane - 8 : lane; });
}

TEST_F(Warps, ShuffleUp) {
  expect_lanes([](int lane) { return __shfl_up_sync(kAllLanes, static_cast<double>(lane), 3); },
               [](int lane) { return static_cast<double>(lane < 3 ? lane : lane - 3); });
  expect_lanes([](int lane) { return __shfl_up_sync(kAllLanes, lane, 1, 4); },
               [](int lane) { return lane % 4 == 0 ? lane : lane - 1; });
}

TEST_F(Warps, ShuffleDown) {
  expect_lanes(
      [](int lane) {
        return __shfl_down_sync(kAllLanes, (uint64_t{1} << 40) + static_cast<uint64_t>(lane), 16);
      },
      [](int lane) {
        return (uint64_t{1} << 40) + static_cast<uint64_t>(lane < 16 ? lane + 16 : lane);
      });
  expect_lanes([](int lane) { return __shfl_down_sync(kAllLanes, lane, 1, 4); },
               [](int lane) { return lane % 4 == 3 ? lane : lane + 1; });
}

TEST_F(Warps, SumOfLanes) {
  expect_lanes(
      [](int lane) {
        int sum = lane;
        for (int offset = 16; offset > 0; offset /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        return sum;
      },
      [](int) { return 31 * 32 / 2; });
}

TEST_F(Warps, Votes) {
  expect_lanes([](int lane) { return __ballot_sync(kAllLanes, lane % 5 == 0); },
               [](int) { return 0x42108421u; });
  expect_lanes([](int lane) { return __any_sync(kAllLanes, lane == 9); }, [](int) { return 1; });
  expect_lanes([](int) { return __any_sync(kAllLanes, 0); }, [](int) { return 0; });
  expect_lanes([](int lane) { return __all_sync(kAllLanes, lane < 32 ? 2 : 0); },
               [](int) { return 1; });
  expect_lanes([](int lane) { return __all_sync(kAllLanes, lane != 9); }, [](int) { return 0; });
}

TEST_F(Warps, Reductions) {
  expect_lanes([](int lane) { return __reduce_add_sync(kAllLanes, -lane); },
               [](int) { return -496; });
  expect_lanes([](int lane) { return __reduce_max_sync(kAllLanes, lane - 40); },
               [](int) { return -9; });
  expect_lanes([](int lane) { return __reduce_min_sync(kAllLanes, lane - 40); },
               [](int) { return -40; });
}

TEST_F(Warps, HalvesMeetSeparately) {
  expect_lanes(
      [](int lane) {
        const unsigned mask = lane < 16 ? 0x0000ffff : 0xffff0000;
        int sum = 0;
        // The halves meet a different number of times, too.
        for (int i = 0; i < (lane < 16 ? 3 : 5); ++i) sum += __reduce_add_sync(mask, lane);
        return sum;
      },
      [](int lane) { return lane < 16 ? 3 * 120 : 5 * 376; });
}

TEST_F(Warps, LastWarpMayBePartial) {
  GlobalArray<unsigned> out(40);
  gpu_model::launch(1, 40, 0, [&] {
    __syncwarp();
    out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  });
  EXPECT_EQ(out[31], kAllLanes);
  EXPECT_EQ(out[39], 0xffu);
}

TEST_F(Warps, ShuffleWithAnExitedLane) {
  int line = 0;
  const auto kernel = [&] {
    if (threadIdx.x == 7) return;
    if (threadIdx.x == 0) line = __LINE__ + 1;
    __shfl_sync(kAllLanes, 1, 0);
  };
  const std::string message = error_of(1, 32, 0, kernel);
  EXPECT_EQ(message,
            "block (0,0,0), thread (7,0,0) has returned while thread (0,0,0) waits in "
            "__shfl_sync(mask 0xffffffff) at " +
                at(line));
  // And the other way round: the lane returned before the others came.
  const auto late = [&] {
    if (threadIdx.x == 0) return;
    __shfl_sync(kAllLanes, 1, 0);
  };
  expect_rejected("but thread (0,0,0) of the mask has returned", 1, 32, 0, late);
}

TEST_F(Warps, ShuffleFromALaneOutsideTheMask) {
  expect_rejected("and reads from lane 20, which is not in the mask", 1, 32, 0, [] {
    if (threadIdx.x < 16) __shfl_sync(0x0000ffff, 1, 20);
  });
}

TEST_F(Warps, CallerOutsideTheMask) {
  expect_rejected("thread (16,0,0) calls __syncwarp(mask 0x0000ffff)", 1, 32, 0,
                  [] { __syncwarp(0x0000ffff); });
}

TEST_F(Warps, LanesInDifferentFunctions) {
  expect_rejected(
      "lanes of one warp disagree: thread (16,0,0) waits in __any_sync(mask 0xffffffff) at ", 1, 32,
      0, [] {
        if (threadIdx.x < 16) {
          __ballot_sync(kAllLanes, 1);
        } else {
          __any_sync(kAllLanes, 1);
        }
      });
}

TEST_F(Warps, LanesOnDifferentLines) {
  expect_rejected("lanes of one warp disagree", 1, 32, 0, [] {
    if (threadIdx.x % 2 == 0) {
      __shfl_sync(kAllLanes, 1, 0);
    } else {
      __shfl_sync(kAllLanes, 1, 0);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Grids and schedules.

class Launches : public GpuModel {};

TEST_F(Launches, EveryThreadOfAThreeDimensionalGridRunsOnce) {
  const dim3 grid(3, 4, 2), block(5, 3, 7);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    GlobalArray<int> count(24 * 105);
    count.fill(0);
    gpu_model::launch(grid, block, 0, [&] {
      const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      ++count[b * 105 + t];
    });
    EXPECT_EQ(count.values(), std::vector<int>(24 * 105, 1));
  }
}

TEST_F(Launches, AtomicsAcrossBlocks) {
  GlobalArray<int> integers(4);
  GlobalArray<unsigned> bound(1);
  GlobalArray<float> sum(1);
  GlobalArray<double> wide(1);
  GlobalArray<unsigned long long> longs(1);
  integers[0] = 0, integers[1] = 1 << 30, integers[2] = -1, integers[3] = 0;
  bound[0] = 0, sum[0] = 0, wide[0] = 0, longs[0] = 0;
  gpu_model::launch(100, 64, 0, [&] {
    const int id = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
    atomicAdd(&integers[0], 1);
    atomicMin(&integers[1], id + 5);
    atomicMax(&integers[2], id);
    for (int seen = atomicAdd(&integers[3], 0);;) {  // add 2 by compare and swap
      const int before = atomicCAS(&integers[3], seen, seen + 2);
      if (before == seen) break;
      seen = before;
    }
    atomicMax(&bound[0], static_cast<unsigned>(id));
    atomicAdd(&sum[0], 1);
    atomicAdd(&wide[0], 0.5);
    atomicAdd(&longs[0], 1ull << 33);
  });
  EXPECT_EQ(integers.values(), (std::vector<int>{6400, 5, 6399, 12800}));
  EXPECT_EQ(bound[0], 6399u);
  EXPECT_EQ(sum[0], 6400);
  EXPECT_EQ(wide[0], 3200);
  EXPECT_EQ(longs[0], 6400ull << 33);
  GlobalArray<int> exchanged(2);
  exchanged[0] = 3;
  gpu_model::launch(1, 1, 0, [&] { exchanged[1] = atomicExch(&exchanged[0], 4); });
  EXPECT_EQ(exchanged.values(), (std::vector<int>{4, 3}));
}

/// The order in which the threads of each of 8 blocks of 64 come past three points.
std::vector<int> order_of_execution(uint64_t seed, int os_threads) {
  gpu_model::schedule() = {.seed = seed, .os_threads = os_threads, .detect_races = false};
  GlobalArray<int> order(8 * 192), next(8);
  next.fill(0);
  gpu_model::launch(8, 64, 0, [&] {
    for (int pass = 0; pass < 3; ++pass) {
      const int turn = next[blockIdx.x]++;  // threads of one block never really run at once
      order[blockIdx.x * 192 + static_cast<unsigned>(turn)] = static_cast<int>(threadIdx.x);
      __syncthreads();
    }
  });
  return order.values();
}

TEST_F(Launches, ASeedIsASchedule) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const std::vector<int> order = order_of_execution(seed, 1);
    EXPECT_EQ(order, order_of_execution(seed, 1)) << "seed " << seed;
    EXPECT_EQ(order, order_of_execution(seed, 3)) << "seed " << seed;
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), size_t{kSeeds});
}

TEST_F(Launches, SeedZeroRunsThreadsInOrder) {
  const std::vector<int> order = order_of_execution(0, 1);
  for (size_t i = 0; i < order.size(); ++i) EXPECT_EQ(order[i], static_cast<int>(i % 64));
}

TEST_F(Launches, BlocksRunOnSeveralOsThreads) {
  gpu_model::schedule() = {.os_threads = 2, .detect_races = false};
  std::atomic<int> present = 0;
  // Each block waits for the other one, which one OS thread could not do.
  gpu_model::launch(2, 1, 0, [&] {
    ++present;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (present < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    if (present < 2) throw std::runtime_error("alone");
  });
}

TEST_F(Launches, SeveralHostThreadsMayLaunch) {
  std::vector<std::thread> hosts;
  std::atomic<int> count = 0;
  for (int i = 0; i < 4; ++i) {
    hosts.emplace_back([&] {
      for (int j = 0; j < 10; ++j) gpu_model::launch(4, 64, 64, [&] { ++count; });
    });
  }
  for (std::thread& host : hosts) host.join();
  EXPECT_EQ(count, 4 * 10 * 4 * 64);
}

TEST_F(Launches, ExceptionOutOfAKernel) {
  expect_rejected("the kernel threw an exception: no such expert, block (1,0,0), thread (33,0,0)",
                  2, 64, 0, [] {
                    if (blockIdx.x == 1 && threadIdx.x == 33)
                      throw std::runtime_error("no such expert");
                    __syncthreads();
                  });
}

TEST_F(Launches, AnErrorStopsTheOtherBlocks) {
  gpu_model::schedule().os_threads = 1;
  int blocks = 0;
  expect_rejected("stop", 1000, 1, 0, [&] {
    ++blocks;
    if (blockIdx.x == 10) throw std::runtime_error("stop");
  });
  EXPECT_EQ(blocks, 11);
}

TEST_F(Launches, Limits) {
  const auto nothing = [] {};
  expect_rejected("launch: grid.x = 0 must be 1 to 2147483647", 0, 1, 0, nothing);
  expect_rejected("launch: grid.y = 65536", dim3(1, 65536), 1, 0, nothing);
  expect_rejected("launch: grid.z = 65536", dim3(1, 1, 65536), 1, 0, nothing);
  expect_rejected("launch: block.x = 1025 must be 1 to 1024", 1, 1025, 0, nothing);
  expect_rejected("launch: block.z = 65 must", 1, dim3(1, 1, 65), 0, nothing);
  expect_rejected("launch: block.x * block.y * block.z = 2048 must be 1 to 1024", 1, dim3(32, 64),
                  0, nothing);
  expect_rejected("launch: shared_bytes = 232449 must be at most 232448", 1, 1, 232449, nothing);
  EXPECT_EQ(error_of(1, 1024, 232448, nothing), "");
  gpu_model::device().max_grid_x = 10;
  expect_rejected("launch: grid.x = 11 must be 1 to 10", 11, 1, 0, nothing);
  gpu_model::device().max_threads_per_block = 512;
  expect_rejected("launch: block.x * block.y * block.z = 513 must be 1 to 512", 1, 513, 0, nothing);
}

TEST_F(Launches, InsideAKernel) {
  expect_rejected("launch: called inside a kernel", 1, 1, 0,
                  [] { gpu_model::launch(1, 1, 0, [] {}); });
}

TEST_F(Launches, KernelFunctionsOutsideAKernel) {
  EXPECT_THROW(__syncthreads(), gpu_model::KernelError);
  EXPECT_THROW(gpu_model::dynamic_shared_memory(1), gpu_model::KernelError);
}

TEST_F(Launches, ManySmallBlocks) {
  gpu_model::schedule().detect_races = false;
  const int count = 100000;
  std::atomic<int> blocks = 0;
  const auto start = std::chrono::steady_clock::now();
  gpu_model::launch(static_cast<unsigned>(count), 32, 64, [&] {
    __syncthreads();
    if (threadIdx.x == 0) blocks.fetch_add(1, std::memory_order_relaxed);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(blocks, count);
  // It takes a fifth of a second on an idle machine. The limit catches blocks that cost milliseconds.
  EXPECT_LT(seconds.count(), 60);
  RecordProperty("milliseconds", static_cast<int>(1000 * seconds.count()));
}

TEST_F(Launches, Arithmetic) {
  EXPECT_EQ(min(3, 5), 3);
  EXPECT_EQ(max(3u, 5u), 5u);
  EXPECT_EQ(max(NAN, 1.0f), 1.0f);
  EXPECT_EQ(min(1.0f, NAN), 1.0f);
  EXPECT_EQ(__int_as_float(0x3f800000), 1.0f);
  EXPECT_EQ(__float_as_uint(-0.0f), 0x80000000u);
  EXPECT_FLOAT_EQ(rsqrtf(4), 0.5f);
  EXPECT_FLOAT_EQ(__expf(1), std::exp(1.0f));
  EXPECT_EQ(__ldg(&kAllLanes), kAllLanes);
  EXPECT_EQ(make_float4(1, 2, 3, 4).w, 4);
}

}  // namespace
}  // namespace gpu_model_test
