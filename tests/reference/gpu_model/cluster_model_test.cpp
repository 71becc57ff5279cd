/// @file
/// Clusters on the GPU model. Right kernels give right results under every schedule. Each wrong one
/// lacks one statement of a right one, or has it in a wrong place, and is rejected.

#include <gtest/gtest.h>

#include <string>

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"
#include "tests/status_matchers.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;
using mla::model::TensorMap;
using mla::model::TensorShape;

class ClusterModel : public GpuModel {
 protected:
  static std::string error_in_cluster(unsigned cluster, unsigned grid, unsigned threads,
                                      size_t shared_bytes, const std::function<void()>& kernel) {
    gpu_model::LaunchOptions options;
    options.cluster = cluster;
    return error_of(grid, threads, shared_bytes, kernel, options);
  }

  /// Expects right results under every schedule, in one cluster, and no race.
  template <typename Smem, typename Kernel, typename Check>
  static void expect_right(unsigned cluster, unsigned threads, Kernel kernel, Check check) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule() = {.seed = seed};
      EXPECT_EQ(error_in_cluster(cluster, cluster, threads, sizeof(Smem), kernel), "")
          << "seed " << seed;
      EXPECT_EQ(check(), "") << "seed " << seed;
    }
  }
  /// Expects a rejection under every schedule, without the race detector.
  template <typename Smem, typename Kernel>
  static void expect_wrong(const std::string& part, unsigned cluster, unsigned threads,
                           Kernel kernel) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule() = {.seed = seed, .detect_races = false};
      const std::string error = error_in_cluster(cluster, cluster, threads, sizeof(Smem), kernel);
      EXPECT_NE(error, "") << "seed " << seed;
      expect_contains(error, part);
    }
  }
  /// Expects some schedules to give a rejection or wrong results, and `part` in a message at least once.
  /// Under the first schedule, the race detector must reject it.
  template <typename Smem, typename Kernel, typename Check>
  static void expect_found(const std::string& part, unsigned cluster, unsigned threads,
                           Kernel kernel, Check check) {
    int found = 0;
    bool named = part.empty();
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      gpu_model::schedule() = {.seed = seed, .detect_races = false};
      const std::string error = error_in_cluster(cluster, cluster, threads, sizeof(Smem), kernel);
      found += !error.empty() || !check().empty();
      named = named || error.find(part) != std::string::npos;
    }
    EXPECT_GE(found, 1);
    EXPECT_TRUE(named) << part;
    gpu_model::schedule() = {};
    if (gpu_model::kernels_are_instrumented()) {
      EXPECT_NE(error_in_cluster(cluster, cluster, threads, sizeof(Smem), kernel), "");
    }
    RecordProperty("seeds_that_found_it", found);
  }
};

void cluster_sync() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

template <typename Check>
std::string check_all(unsigned count, Check right) {
  for (unsigned i = 0; i < count; ++i) {
    if (!right(i)) return "wrong at " + std::to_string(i);
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------
// Plain loads, stores and atomics.

struct ExchangeSmem {
  int values[64];
  unsigned count;
};

/// kRelaxedLast is no fault: after the last reads, nobody has to see anything.
enum class Fault { kNone, kNoFirst, kNoLast, kRelaxedLast, kEarlyExit };

/// Every thread reads what the next block of the cluster wrote.
template <Fault kFault>
__global__ void exchange(int* out) {
  auto& smem = *shared<ExchangeSmem>();
  const unsigned rank = ptx::cluster_ctarank(), next = (rank + 1) % ptx::cluster_nctarank();
  smem.values[threadIdx.x] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
  if constexpr (kFault != Fault::kNoFirst) cluster_sync();
  if (kFault == Fault::kEarlyExit && rank == 1) return;
  out[blockIdx.x * 64 + threadIdx.x] = *ptx::mapa(&smem.values[threadIdx.x], next);
  if constexpr (kFault == Fault::kRelaxedLast) {
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  } else if constexpr (kFault != Fault::kNoLast) {
    cluster_sync();
  }
}

TEST_F(ClusterModel, ReadsAnotherBlock) {
  for (const unsigned cluster : {1u, 2u, 4u, 8u, 16u}) {
    GlobalArray<int> out(cluster * 64);
    const auto check = [&] {
      return check_all(cluster * 64, [&](unsigned i) {
        return out[i] == static_cast<int>((i / 64 + 1) % cluster * 64 + i % 64);
      });
    };
    expect_right<ExchangeSmem>(
        cluster, 64, [&] { exchange<Fault::kNone>(out.data()); }, check);
    expect_right<ExchangeSmem>(
        cluster, 64, [&] { exchange<Fault::kRelaxedLast>(out.data()); }, check);
  }
}

TEST_F(ClusterModel, ManyClusters) {
  GlobalArray<int> out(24 * 64);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    gpu_model::schedule().seed = seed;
    EXPECT_EQ(error_in_cluster(4, 24, 64, sizeof(ExchangeSmem),
                               [&] { exchange<Fault::kNone>(out.data()); }),
              "");
    for (unsigned i = 0; i < 24 * 64; ++i) {
      const unsigned block = i / 64, next = block / 4 * 4 + (block + 1) % 4;
      ASSERT_EQ(out[i], static_cast<int>(next * 64 + i % 64));
    }
  }
}

TEST_F(ClusterModel, ClustersOfACooperativeGrid) {
  GlobalArray<int> out(8 * 64);
  GlobalArray<unsigned> counter(1);
  counter[0] = 0;
  gpu_model::LaunchOptions options{.cooperative = true, .cluster = 2};
  gpu_model::launch(
      8, 64, sizeof(ExchangeSmem),
      [&] {
        exchange<Fault::kNone>(out.data());
        if (threadIdx.x == 0) {
          ptx::red_add_release(counter.data(), 1);
          ptx::wait_until_at_least(counter.data(), 8);
        }
      },
      options);
  for (unsigned i = 0; i < 8 * 64; ++i) {
    ASSERT_EQ(out[i], static_cast<int>((i / 64 ^ 1) * 64 + i % 64));
  }
}

TEST_F(ClusterModel, BlockThatHasNotStarted) {
  GlobalArray<int> out(2 * 64);
  expect_found<ExchangeSmem>(
      "invalid read of the shared memory of block (1,0,0), which has not started", 2, 64,
      [&] { exchange<Fault::kNoFirst>(out.data()); }, [] { return std::string(); });
}

TEST_F(ClusterModel, BlockThatHasEnded) {
  GlobalArray<int> out(2 * 64);
  expect_found<ExchangeSmem>(
      "which has ended", 2, 64, [&] { exchange<Fault::kNoLast>(out.data()); },
      [] { return std::string(); });
  // One that returns counts as having arrived, so there is no deadlock.
  expect_found<ExchangeSmem>(
      "invalid read of the shared memory of block (1,0,0), which has ended", 2, 64,
      [&] { exchange<Fault::kEarlyExit>(out.data()); }, [] { return std::string(); });
}

TEST_F(ClusterModel, PastAnotherBlocksMemory) {
  expect_wrong<ExchangeSmem>("of the shared memory of block (1,0,0): ", 2, 32, [&] {
    auto& smem = *shared<ExchangeSmem>();
    cluster_sync();
    auto* values = ptx::mapa(&smem.values[0], 1);
    if (ptx::cluster_ctarank() == 0 && threadIdx.x == 0) {
      *static_cast<volatile int*>(values + 4096) = 1;
    }
    cluster_sync();
  });
}

TEST_F(ClusterModel, Atomics) {
  GlobalArray<unsigned> out(1);
  expect_right<ExchangeSmem>(
      4, 64,
      [&] {
        auto& smem = *shared<ExchangeSmem>();
        if (threadIdx.x == 0) smem.count = 0;
        cluster_sync();
        atomicAdd(ptx::mapa(&smem.count, 2), 1);
        cluster_sync();
        if (ptx::cluster_ctarank() == 2 && threadIdx.x == 0) out[0] = smem.count;
      },
      [&] { return out[0] == 4 * 64 ? "" : "wrong count"; });
}

// ---------------------------------------------------------------------------------------------------------------
// The barrier.

TEST_F(ClusterModel, BarrierMisused) {
  const auto wait_alone = [] { ptx::barrier_cluster_wait(); };
  expect_wrong<ExchangeSmem>("has not arrived at the cluster's barrier", 2, 32, wait_alone);
  const auto arrive_twice = [] {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  };
  expect_wrong<ExchangeSmem>("has not called barrier_cluster_wait since it last arrived", 2, 32,
                             arrive_twice);
}

TEST_F(ClusterModel, BarrierThatOneBlockDoesNotReach) {
  struct Smem {
    ptx::Mbarrier never;
  };
  expect_wrong<Smem>(": 32 of 64 threads of the cluster have yet to arrive; block (1,0,0): ", 2, 32,
                     [&] {
                       auto& smem = *shared<Smem>();
                       if (threadIdx.x == 0) ptx::mbarrier_init(&smem.never, 1);
                       __syncthreads();
                       if (ptx::cluster_ctarank() == 1) ptx::mbarrier_wait(&smem.never, 0);
                       cluster_sync();
                     });
}

TEST_F(ClusterModel, Mapa) {
  expect_wrong<ExchangeSmem>("rank = 2 must be less than 2", 2, 32,
                             [&] { ptx::mapa(shared<ExchangeSmem>(), 2); });
  int local = 0;
  expect_wrong<ExchangeSmem>("not in the block's dynamic shared memory", 2, 32,
                             [&] { ptx::mapa(&local, 1); });
}

// ---------------------------------------------------------------------------------------------------------------
// Remote arrivals, st_async, red_async.

struct SignalSmem {
  alignas(16) int values[16];
  alignas(16) uint32_t sum;
  ptx::Mbarrier full;
};

enum class Signal {
  kRight,
  kStoreAfterArrival,
  kOneMissing,
  kOneTooMany,
  kNoBarrierAfterInit,
};

/// Every block stores a value in block 0, and arrives there.
template <Signal kSignal>
__global__ void signal(int* out) {
  auto& smem = *shared<SignalSmem>();
  const unsigned rank = ptx::cluster_ctarank(), blocks = ptx::cluster_nctarank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, static_cast<int>(blocks));
    ptx::fence_mbarrier_init();
  }
  if constexpr (kSignal != Signal::kNoBarrierAfterInit) cluster_sync();
  if (threadIdx.x == 0) {
    ptx::Mbarrier* full = ptx::mapa(&smem.full, 0);
    int* value = ptx::mapa(&smem.values[rank], 0);
    if constexpr (kSignal != Signal::kStoreAfterArrival) *value = static_cast<int>(rank) + 7;
    if (kSignal != Signal::kOneMissing || rank != 1) ptx::mbarrier_arrive_cluster(full);
    if (kSignal == Signal::kOneTooMany && rank == 1) ptx::mbarrier_arrive_cluster(full);
    if constexpr (kSignal == Signal::kStoreAfterArrival) *value = static_cast<int>(rank) + 7;
  }
  if (rank == 0) {
    ptx::mbarrier_wait_cluster(&smem.full, 0);
    if (threadIdx.x < blocks) out[threadIdx.x] = smem.values[threadIdx.x];
  }
  cluster_sync();
}

TEST_F(ClusterModel, RemoteArrival) {
  GlobalArray<int> out(4);
  const auto check = [&] {
    return check_all(4, [&](unsigned i) { return out[i] == static_cast<int>(i) + 7; });
  };
  expect_right<SignalSmem>(
      4, 32, [&] { signal<Signal::kRight>(out.data()); }, check);
  out.fill(0);
  expect_found<SignalSmem>(
      "", 4, 32,
      [&] {
        if (threadIdx.x == 0 && blockIdx.x == 0) out.fill(0);
        signal<Signal::kStoreAfterArrival>(out.data());
      },
      check);
  expect_found<SignalSmem>(
      "which has not started", 4, 32, [&] { signal<Signal::kNoBarrierAfterInit>(out.data()); },
      check);
  expect_wrong<SignalSmem>(
      "threads 0-31 wait in mbarrier_wait_cluster(barrier at byte 72, parity 0)", 4, 32,
      [&] { signal<Signal::kOneMissing>(out.data()); });
  expect_wrong<SignalSmem>("phase 0 wants 1 of 4 arrivals and 0 bytes", 4, 32,
                           [&] { signal<Signal::kOneMissing>(out.data()); });
}

TEST_F(ClusterModel, RemoteArrivalThatIsOneTooMany) {
  // The bytes that are expected never come, so the phase stays, and the next arrival is too many.
  struct Smem {
    ptx::Mbarrier full;
  };
  expect_wrong<Smem>(
      "too many arrivals: phase 0 takes 1 and still waits for 16 bytes, of the "
      "barrier at byte 0 of block (0,0,0), block (1,0,0), thread (0,0,0)",
      2, 32, [&] {
        auto& smem = *shared<Smem>();
        if (threadIdx.x == 0) {
          ptx::mbarrier_init(&smem.full, 1);
          if (ptx::cluster_ctarank() == 0) {
            ptx::mbarrier_arrive_expect_tx(&smem.full, 16);
          }
        }
        cluster_sync();
        if (threadIdx.x == 0 && ptx::cluster_ctarank() == 1) {
          ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.full, 0));
        }
        cluster_sync();
      });
}

template <int kExpectedBytes, bool kWait>
__global__ void send(int* out) {
  auto& smem = *shared<SignalSmem>();
  const unsigned rank = ptx::cluster_ctarank(), blocks = ptx::cluster_nctarank();
  if (threadIdx.x == 0) {
    smem.sum = 0;
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    if (rank == 0) ptx::mbarrier_arrive_expect_tx(&smem.full, kExpectedBytes);
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    ptx::Mbarrier* full = ptx::mapa(&smem.full, 0);
    ptx::st_async(ptx::mapa(&smem.values[rank], 0), static_cast<int>(rank) + 7, full);
    ptx::red_async_add(ptx::mapa(&smem.sum, 0), rank + 1, full);
  }
  if (rank == 0) {
    if constexpr (kWait) ptx::mbarrier_wait_cluster(&smem.full, 0);
    if (threadIdx.x < blocks) out[threadIdx.x] = smem.values[threadIdx.x];
    if (threadIdx.x == 0) out[blocks] = static_cast<int>(smem.sum);
  }
  cluster_sync();
}

TEST_F(ClusterModel, StoresAndAddsAsynchronously) {
  GlobalArray<int> out(5);
  const auto check = [&] {
    const std::string wrong =
        check_all(4, [&](unsigned i) { return out[i] == static_cast<int>(i) + 7; });
    return wrong.empty() && out[4] != 10 ? "wrong sum" : wrong;
  };
  expect_right<SignalSmem>(
      4, 32, [&] { send<32, true>(out.data()); }, check);
  expect_wrong<SignalSmem>("phase 0 wants 0 of 1 arrivals and 4 bytes", 4, 32,
                           [&] { send<36, true>(out.data()); });
  expect_found<SignalSmem>(
      "the block ended while ", 4, 32, [&] { send<28, true>(out.data()); }, check);
  expect_wrong<SignalSmem>("the block ended while ", 4, 32, [&] { send<32, false>(out.data()); });
}

struct WideSmem {
  uint4 value;
  ptx::Mbarrier full;
};

TEST_F(ClusterModel, StoresSixteenBytes) {
  GlobalArray<uint4> out(2);
  expect_right<WideSmem>(
      2, 32,
      [&] {
        auto& smem = *shared<WideSmem>();
        const unsigned rank = ptx::cluster_ctarank();
        if (threadIdx.x == 0) {
          ptx::mbarrier_init(&smem.full, 1);
          ptx::fence_mbarrier_init();
          ptx::mbarrier_arrive_expect_tx(&smem.full, 16);
        }
        cluster_sync();
        if (threadIdx.x == 0) {
          ptx::st_async(ptx::mapa(&smem.value, rank ^ 1), make_uint4(rank, 7, 8, 9),
                        ptx::mapa(&smem.full, rank ^ 1));
        }
        ptx::mbarrier_wait_cluster(&smem.full, 0);
        if (threadIdx.x == 0) out[rank] = smem.value;
        cluster_sync();
      },
      [&] {
        return check_all(2, [&](unsigned i) {
          return out[i].x == 1 - i && out[i].y == 7 && out[i].z == 8 && out[i].w == 9;
        });
      });
}

TEST_F(ClusterModel, StoreOverOneThatIsUnderWay) {
  expect_wrong<SignalSmem>("an ordinary store wrote while it was under way", 2, 32, [&] {
    auto& smem = *shared<SignalSmem>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&smem.full, 1);
      ptx::fence_mbarrier_init();
      ptx::mbarrier_arrive_expect_tx(&smem.full, 4);
    }
    cluster_sync();
    if (threadIdx.x == 0) {
      const unsigned other = 1 - ptx::cluster_ctarank();
      int* value = ptx::mapa(&smem.values[0], other);
      ptx::st_async(value, 3, ptx::mapa(&smem.full, other));
      *value = 5;
      ptx::mbarrier_wait_cluster(&smem.full, 0);
    }
    cluster_sync();
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Bulk copies between blocks.

struct CopySmem {
  alignas(128) uint32_t from[256];
  alignas(128) uint32_t to[256];
  ptx::Mbarrier full;
};

enum class Copy {
  kRight,
  kNoFence,
  kSourceOverwritten,
  kNoWait,
  kTargetStored,
  kBarrierElsewhere,
};

/// Every block copies 1 KiB to the next.
template <Copy kCopy>
__global__ void copy(uint32_t* out) {
  auto& smem = *shared<CopySmem>();
  const unsigned rank = ptx::cluster_ctarank(), next = (rank + 1) % ptx::cluster_nctarank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.from);
  }
  for (unsigned i = threadIdx.x; i < 256; i += 32) smem.from[i] = rank * 1000 + i;
  if (kCopy == Copy::kTargetStored) smem.to[threadIdx.x] = 1;
  if constexpr (kCopy != Copy::kNoFence) ptx::fence_proxy_async();
  if (kCopy == Copy::kTargetStored) smem.to[threadIdx.x] = 2;
  cluster_sync();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_cluster(
        ptx::mapa(&smem.to[0], next), smem.from, sizeof smem.from,
        ptx::mapa(&smem.full, kCopy == Copy::kBarrierElsewhere ? rank : next));
  }
  __syncwarp();
  if constexpr (kCopy == Copy::kSourceOverwritten) {
    smem.from[threadIdx.x] = 5;
    ptx::fence_proxy_async();
  }
  if constexpr (kCopy != Copy::kNoWait) {
    ptx::mbarrier_wait_cluster(&smem.full, 0);
    for (unsigned i = threadIdx.x; i < 256; i += 32) out[rank * 256 + i] = smem.to[i];
  }
  cluster_sync();
}

TEST_F(ClusterModel, CopiesBetweenBlocks) {
  GlobalArray<uint32_t> out(3 * 256 + 256);
  const auto check = [&] {
    return check_all(4 * 256,
                     [&](unsigned i) { return out[i] == (i / 256 + 3) % 4 * 1000 + i % 256; });
  };
  expect_right<CopySmem>(
      4, 32, [&] { copy<Copy::kRight>(out.data()); }, check);
  expect_wrong<CopySmem>("was written by ordinary stores, with no fence_proxy_async since", 4, 32,
                         [&] { copy<Copy::kNoFence>(out.data()); });
  expect_wrong<CopySmem>("was written by ordinary stores, with no fence_proxy_async since", 4, 32,
                         [&] { copy<Copy::kTargetStored>(out.data()); });
  expect_wrong<CopySmem>("the barrier is not in the block that is written to", 4, 32,
                         [&] { copy<Copy::kBarrierElsewhere>(out.data()); });
  expect_found<CopySmem>(
      "cp_async_bulk_cluster", 4, 32, [&] { copy<Copy::kSourceOverwritten>(out.data()); }, check);
  expect_wrong<CopySmem>("the block ended while cp_async_bulk_cluster", 4, 32,
                         [&] { copy<Copy::kNoWait>(out.data()); });
}

/// A slot of another block is still read, by a bulk store that nobody has waited for.
TEST_F(ClusterModel, CopyOverASlotThatIsStillRead) {
  GlobalArray<uint32_t> out(256);
  for (const bool waits : {true, false}) {
    const auto kernel = [&] {
      auto& smem = *shared<CopySmem>();
      const unsigned rank = ptx::cluster_ctarank();
      if (threadIdx.x == 0) {
        ptx::mbarrier_init(&smem.full, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.from);
      }
      for (unsigned i = threadIdx.x; i < 256; i += 32) smem.from[i] = smem.to[i] = i;
      ptx::fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0 && rank == 1) {
        ptx::cp_async_bulk_store(out.data(), smem.to, sizeof smem.to);
        ptx::cp_async_bulk_commit_group();
        if (waits) ptx::cp_async_bulk_wait_group_read<0>();
      }
      cluster_sync();
      if (threadIdx.x == 0 && rank == 0) {
        ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], 1), smem.from, sizeof smem.from,
                                   ptx::mapa(&smem.full, 1));
      }
      if (rank == 1) ptx::mbarrier_wait_cluster(&smem.full, 0);
      cluster_sync();
      if (threadIdx.x == 0 && rank == 1) ptx::cp_async_bulk_wait_group_read<0>();
    };
    if (waits) {
      expect_right<CopySmem>(2, 32, kernel, [] { return ""; });
    } else {
      expect_wrong<CopySmem>("of block (1,0,0) that cp_async_bulk_store at ", 2, 32, kernel);
    }
  }
}

/// Ordinary stores write to another block's memory, which that block then stores to global memory by TMA.
TEST_F(ClusterModel, RemoteStoresAndTheProxies) {
  GlobalArray<uint32_t> out(256);
  for (const bool fences : {true, false}) {
    const auto kernel = [&] {
      auto& smem = *shared<CopySmem>();
      cluster_sync();
      if (ptx::cluster_ctarank() == 0) {
        uint32_t* to = ptx::mapa(&smem.to[0], 1);
        for (unsigned i = threadIdx.x; i < 256; i += 32) to[i] = i + 3;
        if (fences) {
          ptx::fence_proxy_async_cluster();
        } else {
          ptx::fence_proxy_async();  // for the block's own memory alone
        }
      }
      cluster_sync();
      if (ptx::cluster_ctarank() == 1 && threadIdx.x == 0) {
        ptx::cp_async_bulk_store(out.data(), smem.to, sizeof smem.to);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
      }
    };
    if (fences) {
      expect_right<CopySmem>(2, 32, kernel, [&] {
        return check_all(256, [&](unsigned i) { return out[i] == i + 3; });
      });
    } else {
      expect_wrong<CopySmem>("was written by ordinary stores, with no fence_proxy_async since", 2,
                             32, kernel);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Multicast.

struct MulticastSmem {
  alignas(1024) uint16_t box[64 * 64];
  ptx::Mbarrier full;
};

/// Block 0 brings a box to all blocks of the mask.
template <bool kTwice = false>
__global__ void multicast(const TensorMap* map, uint16_t mask, uint16_t* out) {
  auto& smem = *shared<MulticastSmem>();
  const unsigned rank = ptx::cluster_ctarank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.box);
  }
  cluster_sync();
  if (threadIdx.x == 0 && rank == 0) {
    const uint64_t policy = ptx::createpolicy_evict_last();
    ptx::cp_async_bulk_tensor_4d_multicast(smem.box, map, 0, 0, 0, 0, &smem.full, mask, policy);
    if (kTwice) {
      ptx::cp_async_bulk_tensor_4d_multicast(smem.box, map, 0, 0, 0, 0, &smem.full, mask, policy);
    }
  }
  ptx::mbarrier_wait(&smem.full, 0);
  for (unsigned i = threadIdx.x; i < 64 * 64; i += 32) out[rank * 64 * 64 + i] = smem.box[i];
  cluster_sync();
}

TEST_F(ClusterModel, Multicast) {
  GlobalArray<uint16_t> values(64 * 64), out(4 * 64 * 64);
  for (unsigned i = 0; i < 64 * 64; ++i) values[i] = static_cast<uint16_t>(i * 7);
  TensorShape shape;
  shape.rank = 4;
  const uint64_t size[] = {64, 64, 1, 1}, stride[] = {2, 128, 8192, 8192};
  const uint32_t box[] = {64, 64, 1, 1};
  std::copy_n(size, 4, shape.size);
  std::copy_n(stride, 4, shape.stride_bytes);
  std::copy_n(box, 4, shape.box);
  TensorMap map;
  ASSERT_OK(mla::model::encode_tensor_map(values.data(), shape, &map));
  const auto check = [&] {
    return check_all(4 * 64 * 64, [&](unsigned i) { return out[i] == values[i % (64 * 64)]; });
  };
  expect_right<MulticastSmem>(
      4, 32, [&] { multicast(&map, 0xf, out.data()); }, check);
  // Block 2 is forgotten.
  expect_wrong<MulticastSmem>(
      "block (2,0,0): threads 0-31 wait in mbarrier_wait(barrier at byte 8192, parity 0) at ", 4,
      32, [&] { multicast(&map, 0xb, out.data()); });
  expect_wrong<MulticastSmem>("phase 0 wants 0 of 1 arrivals and 8192 bytes", 4, 32,
                              [&] { multicast(&map, 0xb, out.data()); });
  for (const uint16_t mask : {0x0, 0x1f}) {
    expect_wrong<MulticastSmem>("must name one or more of the 4 blocks of the cluster", 4, 32,
                                [&] { multicast(&map, mask, out.data()); });
  }
  expect_found<MulticastSmem>(
      "of block (1,0,0) that a bulk copy of block (0,0,0), thread (0,0,0) at ", 4, 32,
      [&] { multicast<true>(&map, 0xe, out.data()); }, check);
}

// ---------------------------------------------------------------------------------------------------------------
// Launches.

TEST_F(ClusterModel, LaunchesThatAreRefused) {
  const auto nothing = [] {};
  expect_contains(error_in_cluster(3, 6, 32, 0, nothing), "cluster = 3 must be 1, 2, 4, 8 or 16");
  expect_contains(error_in_cluster(4, 6, 32, 0, nothing), "cluster = 4 does not divide grid.x = 6");
  gpu_model::device().compute_capability = 80;
  expect_contains(error_in_cluster(2, 6, 32, 0, nothing), "needs compute capability 9.0");
}

TEST_F(ClusterModel, LaunchCluster) {
  GlobalArray<int> out(4 * 64);
  EXPECT_OK(mla::model::launch_cluster(exchange<Fault::kNone>, 2, 4, 64, sizeof(ExchangeSmem), {},
                                       out.data()));
  for (unsigned i = 0; i < 4 * 64; ++i) {
    EXPECT_EQ(out[i], static_cast<int>((i / 64 ^ 1) * 64 + i % 64));
  }
  EXPECT_EQ(mla::model::launch_cluster(exchange<Fault::kNone>, 4, 6, 64, sizeof(ExchangeSmem), {},
                                       out.data())
                .code(),
            mla::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace gpu_model_test
