// The counters: kernels whose sectors, wavefronts and conflicts are known.
#include "reference/gpu_model/counters.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "reference/gpu_model/ptx_sm90.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"

namespace gpu_model_test {
namespace {

using gpu_model::AccessKind;
using gpu_model::Counts;
using gpu_model::Profile;
namespace ptx = gpu_model::ptx;

/// The sum over all instructions of a kind, in all launches.
Counts sum(const Profile& profile, AccessKind kind) {
  Counts counts;
  for (const auto& launch : profile.launches) {
    for (const auto& instruction : launch.instructions) {
      if (instruction.kind == kind) counts += instruction.counts;
    }
  }
  return counts;
}

/// How often warps executed a function of the model.
uint64_t executed(const Profile& profile, const std::string& what) {
  uint64_t times = 0;
  for (const auto& launch : profile.launches) {
    for (const auto& instruction : launch.instructions) {
      if (instruction.what != nullptr && what == instruction.what) {
        times += instruction.counts.executed;
      }
    }
  }
  return times;
}

class Counters : public GpuModel {
 protected:
  void SetUp() override {
    GpuModel::SetUp();
    if (!gpu_model::kernels_are_instrumented())
      GTEST_SKIP() << "kernels are not compiled for counting";
#ifdef __clang__
    GTEST_SKIP() << "clang splits accesses to structs; see docs/counters.md";
#endif
    gpu_model::schedule().detect_races = false;
    gpu_model::schedule().profile = &profile_;
  }

  template <typename Kernel>
  void count(Kernel kernel, unsigned threads = 32, unsigned blocks = 1, size_t shared_bytes = 0) {
    profile_.launches.clear();
    gpu_model::launch(blocks, threads, shared_bytes, kernel);
  }
  Counts loads() const {
    return sum(profile_, AccessKind::kLoad);
  }
  Counts stores() const {
    return sum(profile_, AccessKind::kStore);
  }

  Profile profile_;
};

/// Lane i reads element i * stride + offset.
template <typename T>
__global__ void read_strided(const T* in, T* out, unsigned stride, unsigned offset) {
  out[threadIdx.x] = in[threadIdx.x * stride + offset];
}

TEST_F(Counters, SectorsOfGlobalLoads) {
  GlobalArray<uint32_t> in(2048), out(64);
  const struct {
    unsigned stride, offset;
    uint64_t sectors, lines;
  } cases[] = {{0, 0, 1, 1}, {1, 0, 4, 1},  {1, 1, 5, 2},    {1, 7, 5, 2},   {1, 8, 4, 2},
               {2, 0, 8, 2}, {8, 0, 32, 8}, {32, 0, 32, 32}, {33, 0, 32, 32}};
  for (const auto& one : cases) {
    SCOPED_TRACE(std::to_string(one.stride) + "+" + std::to_string(one.offset));
    count([&] { read_strided(in.data(), out.data(), one.stride, one.offset); });
    EXPECT_EQ(loads().global_requests, 1u);
    EXPECT_EQ(loads().global_sectors, one.sectors);
    EXPECT_EQ(loads().global_lines, one.lines);
    EXPECT_EQ(loads().global_bytes, 128u);
    EXPECT_EQ(loads().l2_sectors, one.sectors);
    EXPECT_EQ(stores().global_sectors, 4u);
    EXPECT_EQ(loads().shared_requests, 0u);
  }
}

TEST_F(Counters, SectorsByWidth) {
  GlobalArray<uint16_t> narrow(64), narrow_out(64);
  count([&] { read_strided(narrow.data(), narrow_out.data(), 1, 0); });
  EXPECT_EQ(loads().global_sectors, 2u);
  GlobalArray<float2> pairs(64), pairs_out(64);
  count([&] { read_strided(pairs.data(), pairs_out.data(), 1, 0); });
  EXPECT_EQ(loads().global_requests, 1u);
  EXPECT_EQ(loads().global_sectors, 8u);
  GlobalArray<float4> fours(64), fours_out(64);
  count([&] { read_strided(fours.data(), fours_out.data(), 1, 0); });
  EXPECT_EQ(loads().global_requests, 1u);
  EXPECT_EQ(loads().global_sectors, 16u);
  EXPECT_EQ(stores().global_requests, 1u);
}

/// 48 bytes: three accesses of 16, which no instruction can make at once.
struct alignas(16) Three {
  uint4 a, b, c;
};

TEST_F(Counters, ALargeStructIsSeveralAccesses) {
  GlobalArray<Three> in(64), out(64);
  count([&] { read_strided(in.data(), out.data(), 1, 0); });
  EXPECT_EQ(loads().global_requests, 3u);
  EXPECT_EQ(loads().global_bytes, 32u * 48);
  EXPECT_EQ(loads().global_sectors, 3u * 32);  // the lanes' 16 bytes are 48 apart
}

TEST_F(Counters, DivergentLanesMakeSmallerRequests) {
  GlobalArray<uint32_t> in(64), out(64);
  count([&] {
    uint32_t value = 0;
    if (threadIdx.x < 8) value = in[threadIdx.x];
    out[threadIdx.x] = value;
  });
  EXPECT_EQ(loads().global_requests, 1u);
  EXPECT_EQ(loads().threads, 8u);
  EXPECT_EQ(loads().global_sectors, 1u);
}

TEST_F(Counters, TripsThatDifferPerLane) {
  GlobalArray<uint32_t> in(1024), out(64);
  // Lane i reads i + 1 times: trip t is made by lanes t to 31.
  count([&] {
    uint32_t value = 0;
    for (unsigned trip = 0; trip <= threadIdx.x; ++trip) value += in[32 * trip + threadIdx.x];
    out[threadIdx.x] = value;
  });
  EXPECT_EQ(loads().global_requests, 32u);
  EXPECT_EQ(loads().threads, 32u * 33 / 2);
  uint64_t sectors = 0;
  for (uint64_t trip = 0; trip < 32; ++trip) sectors += 4 - trip / 8;
  EXPECT_EQ(loads().global_sectors, sectors);
}

TEST_F(Counters, LongLoopsWithoutAMeetingAreKeptInBounds) {
  constexpr unsigned kTrips = 20000;
  GlobalArray<uint32_t> in(64), out(64);
  count([&] {
    uint32_t value = 0;
    const volatile uint32_t* volatile_in = in.data();
    // Half of the warp makes twice as many trips as the other.
    const unsigned trips = threadIdx.x < 16 ? kTrips : 2 * kTrips;
    for (unsigned trip = 0; trip < trips; ++trip) value += volatile_in[threadIdx.x];
    out[threadIdx.x] = value;
  });
  EXPECT_EQ(loads().global_requests, 2u * kTrips);
  EXPECT_EQ(loads().global_sectors, kTrips * (4u + 2));
}

TEST_F(Counters, AMeetingPutsLanesInStepAgain) {
  GlobalArray<uint32_t> in(64), out(64);
  const auto read = [&](unsigned times) {
    const volatile uint32_t* values = in.data();
    for (unsigned i = 0; i < times; ++i) static_cast<void>(values[threadIdx.x]);
  };
  // Lane 0 reads once more before the meeting: 3 + 2 requests. Without the meeting, lane 0's third
  // read would be taken together with the other lanes' next one.
  count([&] {
    for (unsigned round = 0; round < 2; ++round) {
      const bool more = round == 0 && threadIdx.x == 0;
      read(more ? 3 : 2);
      __syncwarp();
    }
    out[threadIdx.x] = 0;
  });
  EXPECT_EQ(loads().global_requests, 5u);
  EXPECT_EQ(loads().global_sectors, 2u * 4 + 1 + 2 * 4);
}

TEST_F(Counters, WhatABlockHasLoadedNeedNotComeAgain) {
  GlobalArray<uint32_t> in(64), out(256);
  count([&] { out[blockIdx.x * 64 + threadIdx.x] = in[threadIdx.x % 32]; }, 64, 3);
  EXPECT_EQ(loads().global_requests, 6u);
  EXPECT_EQ(loads().global_sectors, 24u);
  EXPECT_EQ(loads().l2_sectors, 3u * 4);
  EXPECT_EQ(stores().l2_sectors, 3u * 8);
}

/// Lane i reads word i * stride of shared memory.
template <typename T>
__global__ void read_shared(unsigned stride) {
  auto* smem = static_cast<volatile T*>(gpu_model::dynamic_shared_memory(32768));
  static_cast<void>(smem[threadIdx.x * stride]);
}

TEST_F(Counters, BankConflictsByStride) {
  for (const unsigned stride : {0u, 1u, 2u, 3u, 4u, 8u, 16u, 32u, 33u, 64u}) {
    SCOPED_TRACE(stride);
    count([&] { read_shared<uint32_t>(stride); }, 32, 1, 32768);
    uint64_t wavefronts = 1;
    while (wavefronts < 32 && stride != 0 && stride % (2 * wavefronts) == 0) wavefronts *= 2;
    EXPECT_EQ(loads().shared_requests, 1u);
    EXPECT_EQ(loads().shared_wavefronts, wavefronts);
    EXPECT_EQ(loads().shared_conflicts, wavefronts - 1);
    EXPECT_EQ(loads().global_requests, 0u);
  }
}

TEST_F(Counters, TwoLanesShareAWord) {
  count([&] { read_shared<uint16_t>(1); }, 32, 1, 32768);
  EXPECT_EQ(loads().shared_wavefronts, 1u);
  count([&] { read_shared<uint8_t>(1); }, 32, 1, 32768);
  EXPECT_EQ(loads().shared_wavefronts, 1u);
}

TEST_F(Counters, ATilesColumn) {
  struct Padded {
    float tile[32][33];
  };
  struct Plain {
    float tile[32][32];
  };
  count([] { static_cast<volatile float&>(shared<Plain>()->tile[threadIdx.x][3]) = 1; }, 32, 1,
        sizeof(Plain));
  EXPECT_EQ(stores().shared_wavefronts, 32u);
  count([] { static_cast<volatile float&>(shared<Padded>()->tile[threadIdx.x][3]) = 1; }, 32, 1,
        sizeof(Padded));
  EXPECT_EQ(stores().shared_wavefronts, 1u);
  EXPECT_EQ(stores().shared_conflicts, 0u);
}

/// A warp's access in which lane i reads element `place(i)` of type T.
template <typename T, typename Place>
__global__ void load_at(T* out, Place place) {
  const T* smem = static_cast<const T*>(gpu_model::dynamic_shared_memory(32768));
  out[threadIdx.x] = smem[place(threadIdx.x)];
}
template <typename T, typename Place>
__global__ void store_at(const T* in, Place place) {
  T* smem = static_cast<T*>(gpu_model::dynamic_shared_memory(32768));
  smem[place(threadIdx.x)] = in[threadIdx.x];
}

TEST_F(Counters, WideAccessesTakeHalvesAndQuarters) {
  GlobalArray<float2> pairs(64);
  GlobalArray<float4> fours(64);
  const struct {
    const char* name;
    unsigned (*place)(unsigned);
    uint64_t pair_load, pair_store, four_load, four_store;
  } cases[] = {
      {"in a row", [](unsigned i) { return i; }, 2, 2, 4, 4},
      {"every second", [](unsigned i) { return 2 * i; }, 4, 4, 8, 8},
      {"all the same", [](unsigned) { return 5u; }, 1, 2, 2, 4},
      {"neighbours the same", [](unsigned i) { return i / 2; }, 1, 2, 4, 4},
      {"rows of eight", [](unsigned i) { return i / 8; }, 1, 2, 2, 4},
      {"over each other", [](unsigned i) { return i % 8; }, 2, 2, 4, 4},
  };
  for (const auto& one : cases) {
    SCOPED_TRACE(one.name);
    count([&] { load_at(pairs.data(), one.place); }, 32, 1, 32768);
    EXPECT_EQ(loads().shared_wavefronts, one.pair_load);
    count([&] { store_at(pairs.data(), one.place); }, 32, 1, 32768);
    EXPECT_EQ(stores().shared_wavefronts, one.pair_store);
    count([&] { load_at(fours.data(), one.place); }, 32, 1, 32768);
    EXPECT_EQ(loads().shared_wavefronts, one.four_load);
    count([&] { store_at(fours.data(), one.place); }, 32, 1, 32768);
    EXPECT_EQ(stores().shared_wavefronts, one.four_store);
  }
}

TEST_F(Counters, NeighbouringAccessesToSharedMemoryAreJoined) {
  // Each lane reads four words in a row, one by one, beginning at a multiple of 16 bytes or one word
  // later.
  const auto read = [](unsigned first) {
    return [first] {
      const auto* smem = static_cast<volatile float*>(gpu_model::dynamic_shared_memory(32768));
      for (unsigned i = 0; i < 4; ++i) static_cast<void>(smem[threadIdx.x * 4 + first + i]);
    };
  };
  count(read(0), 32, 1, 32768);
  EXPECT_EQ(loads().shared_requests, 1u);
  EXPECT_EQ(loads().shared_wavefronts, 4u);
  EXPECT_EQ(loads().shared_conflicts, 0u);
  EXPECT_EQ(loads().shared_bytes, 512u);
  count(read(1), 32, 1, 32768);  // 4, 8 and 4 bytes
  EXPECT_EQ(loads().shared_requests, 3u);
  EXPECT_EQ(loads().shared_wavefronts, 4u + 4 + 4);
}

TEST_F(Counters, LdmatrixWithAndWithoutSwizzle) {
  // Rows of 128 bytes: without a swizzle the eight rows of a matrix begin at the same bank.
  const auto load = [](bool swizzled) {
    return [swizzled] {
      auto* smem = static_cast<uint4*>(gpu_model::dynamic_shared_memory(8192));
      for (unsigned i = threadIdx.x; i < 512; i += 32) smem[i] = make_uint4(i, i, i, i);
      __syncwarp();
      uint32_t r[4];
      const unsigned row = threadIdx.x % 8, chunk = threadIdx.x / 8;
      ptx::ldmatrix_x4(r, &smem[row * 8 + (swizzled ? chunk ^ row : chunk)]);
    };
  };
  count(load(false), 32, 1, 8192);
  EXPECT_EQ(executed(profile_, "ldmatrix_x4"),
            1u + 1);  // once by the lanes that give addresses, once by the warp
  EXPECT_EQ(sum(profile_, AccessKind::kMatrixLoad).shared_wavefronts, 32u);
  EXPECT_EQ(sum(profile_, AccessKind::kMatrixLoad).shared_conflicts, 28u);
  count(load(true), 32, 1, 8192);
  EXPECT_EQ(sum(profile_, AccessKind::kMatrixLoad).shared_wavefronts, 4u);
  EXPECT_EQ(sum(profile_, AccessKind::kMatrixLoad).shared_conflicts, 0u);
  EXPECT_EQ(executed(profile_, "__syncwarp"), 1u);
}

TEST_F(Counters, CpAsync) {
  GlobalArray<uint4> in(64);
  count(
      [&] {
        auto* smem = static_cast<uint4*>(gpu_model::dynamic_shared_memory(1024));
        const bool there = threadIdx.x < 16;
        ptx::cp_async_16(&smem[threadIdx.x], there ? &in[threadIdx.x] : nullptr, there ? 16 : 0);
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<0>();
      },
      32, 1, 1024);
  const Counts copies = sum(profile_, AccessKind::kAsyncCopy);
  EXPECT_EQ(copies.executed, 1u);
  EXPECT_EQ(copies.global_requests, 1u);
  EXPECT_EQ(copies.global_sectors, 8u);
  EXPECT_EQ(copies.l2_sectors, 8u);
  EXPECT_EQ(copies.shared_wavefronts, 4u);
  EXPECT_EQ(copies.shared_bytes, 512u);
}

TEST_F(Counters, BulkCopies) {
  GlobalArray<std::byte> in(4096);
  count(
      [&] {
        struct Smem {
          alignas(128) std::byte data[1024];
          ptx::Mbarrier barrier;
        };
        Smem& smem = *shared<Smem>();
        if (threadIdx.x == 0) {
          ptx::mbarrier_init(&smem.barrier, 1);
          ptx::fence_mbarrier_init();
          ptx::mbarrier_arrive_expect_tx(&smem.barrier, 1024);
          ptx::cp_async_bulk(smem.data, in.data() + 16, 1024, &smem.barrier);
        }
        __syncthreads();
        ptx::mbarrier_wait(&smem.barrier, 0);
      },
      32, 1, 2048);
  const Counts copies = sum(profile_, AccessKind::kBulkLoad);
  EXPECT_EQ(copies.executed, 1u);
  EXPECT_EQ(copies.global_bytes, 1024u);
  EXPECT_EQ(copies.global_sectors, 33u);  // it begins in the middle of one
  EXPECT_EQ(copies.shared_wavefronts, 8u);
  EXPECT_EQ(executed(profile_, "mbarrier_wait"), 1u);
  EXPECT_EQ(executed(profile_, "__syncthreads"), 1u);
}

TEST_F(Counters, FlopOfTensorCores) {
  count([] {
    float d[4] = {};
    const uint32_t a[4] = {};
    ptx::mma_m16n8k16<mla::bfloat16>(d, a, 0, 0);
  });
  EXPECT_EQ(sum(profile_, AccessKind::kNone).flop, 4096u);
}

TEST_F(Counters, DoNotDependOnTheSchedule) {
  GlobalArray<float> in(4096), out(4096);
  std::vector<uint64_t> first;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    count(
        [&] {
          auto* tile = static_cast<float*>(gpu_model::dynamic_shared_memory(16384));
          const unsigned i = blockIdx.x * 128 + threadIdx.x;
          tile[threadIdx.x * 32] = in[i];
          __syncthreads();
          float value = 0;
          for (unsigned j = 0; j <= threadIdx.x % 7; ++j) value += tile[(threadIdx.x ^ j) * 32];
          out[i] = __shfl_xor_sync(kAllLanes, value, 1);
        },
        128, 4, 16384);
    const std::vector<uint64_t> counted = {
        loads().global_sectors,    loads().l2_sectors,        loads().shared_requests,
        loads().shared_wavefronts, stores().shared_conflicts, executed(profile_, "__syncthreads")};
    if (seed == 0) first = counted;
    EXPECT_EQ(counted, first) << "seed " << seed;
  }
}

TEST_F(Counters, OfNothingWithoutAProfile) {
  gpu_model::schedule().profile = nullptr;
  GlobalArray<uint32_t> in(64), out(64);
  count([&] { read_strided(in.data(), out.data(), 1, 0); });
  EXPECT_TRUE(profile_.launches.empty());
}

TEST_F(Counters, KeepOnAfterARejectedKernel) {
  EXPECT_THROW(count(
                   [] {
                     if (threadIdx.x == 0) __syncthreads();
                   },
                   64),
               gpu_model::KernelError);
  GlobalArray<uint32_t> in(64), out(64);
  count([&] { read_strided(in.data(), out.data(), 1, 0); });
  EXPECT_EQ(loads().global_sectors, 4u);
}

TEST(Residency, ByThreadsSharedMemoryAndRegisters) {
  gpu_model::device() = {};
  EXPECT_EQ(gpu_model::residency(256, 0).blocks, 8u);
  EXPECT_EQ(gpu_model::residency(32, 0).blocks, 32u);
  EXPECT_EQ(gpu_model::residency(256, 231936).blocks, 1u);
  EXPECT_EQ(gpu_model::residency(128, 0, 128).by_registers, 4u);
  EXPECT_EQ(gpu_model::residency(128, 0, 128).blocks, 4u);
  EXPECT_EQ(gpu_model::residency(256, 0, 254).blocks, 1u);
  EXPECT_EQ(gpu_model::residency(256, 0, 129).by_registers,
            1u);  // a unit is 256 registers of a warp
  EXPECT_EQ(gpu_model::residency(256, 0, 0).by_registers, 0u);
}

}  // namespace
}  // namespace gpu_model_test
