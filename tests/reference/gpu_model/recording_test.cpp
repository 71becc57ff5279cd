/// @file
/// Recordings of the GPU model: what they say of kernels that use each kind of event. A replay must
/// accept them under every schedule, and reject those that lack an event or have a changed one.

#include "reference/gpu_model/recording.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "reference/testing/recording_check.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "tests/reference/gpu_model/gpu_model_fixture.h"
#include "tests/status_matchers.h"

namespace gpu_model_test {
namespace {

namespace ptx = mla::model::ptx;
using nlohmann::json;

class RecordingTest : public GpuModel {
 protected:
  struct Launch {
    dim3 grid = 1, block = 32;
    size_t shared_bytes = 0;
    gpu_model::LaunchOptions options = {};
  };

  /// Records a launch under a schedule. `error` is part of what the launch must throw.
  template <typename Kernel>
  static std::string record(const Launch& launch, Kernel kernel, uint64_t seed = 0,
                            const gpu_model::RecordingOptions& options = {},
                            const std::string& error = {}) {
    gpu_model::Recording recording(options);
    gpu_model::schedule().seed = seed;
    gpu_model::schedule().recording = &recording;
    std::string message;
    try {
      gpu_model::launch(launch.grid, launch.block, launch.shared_bytes, kernel, launch.options);
    } catch (const gpu_model::KernelError& thrown) {
      message = thrown.what();
    }
    gpu_model::schedule().recording = nullptr;
    if (error.empty()) {
      EXPECT_EQ(message, "") << "seed " << seed;
    } else {
      expect_contains(message, error);
    }
    return recording.json({{"test", "a \"name\""}});
  }

  static mla::RecordingSummary expect_right(const std::string& file) {
    mla::RecordingSummary summary;
    EXPECT_OK(mla::check_recording(file, &summary)) << file.substr(0, 20000);
    return summary;
  }
  static void expect_wrong(const json& file, const std::string& part) {
    mla::RecordingSummary summary;
    const mla::Status status = mla::check_recording(file.dump(), &summary);
    EXPECT_EQ(status.code(), mla::StatusCode::kInvalidArgument) << part;
    expect_contains(status.message(), part);
  }

  /// Expects, under every schedule, that the recording replays, is the same twice, and has `count` of
  /// `member`.
  template <typename Kernel>
  static void expect_right_always(const Launch& launch, Kernel kernel,
                                  uint64_t mla::RecordingSummary::*member, uint64_t count,
                                  const gpu_model::RecordingOptions& options = {}) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      const std::string file = record(launch, kernel, seed, options);
      const mla::RecordingSummary summary = expect_right(file);
      EXPECT_EQ(summary.*member, count) << "seed " << seed;
      EXPECT_EQ(record(launch, kernel, seed, options), file) << "seed " << seed;
    }
  }

  /// The events of a kind, each as an object of its fields.
  static std::vector<json> events_of(const json& file, const std::string& kind) {
    std::vector<json> found;
    for (const json& event : file.at("events")) {
      const json& fields = file.at("kinds").at(event.at(0).get<size_t>());
      if (fields.at(0) != kind) continue;
      json& named = found.emplace_back();
      for (size_t i = 1; i < event.size(); ++i) named[fields.at(i).get<std::string>()] = event[i];
      const auto resolve = [&](const char* field, const char* list, const char* name) {
        if (named.contains(field)) named[name] = file.at(list).at(named[field].get<size_t>());
      };
      resolve("place", "places", "what");
      resolve("reads", "ranges", "reads");
      resolve("writes", "ranges", "writes");
    }
    return found;
  }
  /// The place of the first event of a kind in the list of events.
  static size_t first_of(const json& file, const std::string& kind) {
    for (size_t i = 0; i < file.at("events").size(); ++i) {
      if (file.at("kinds").at(file["events"][i].at(0).get<size_t>()).at(0) == kind) return i;
    }
    ADD_FAILURE() << "no " << kind;
    return 0;
  }
};

struct TileSmem {
  int values[64];
  alignas(16) uint4 tile[8][8];
  ptx::Mbarrier full;
  MLA_REGIONS(values, tile, full)
};

/// Two warps, a barrier of the block, and a warp function.
void simple_kernel(int* line) {
  auto& smem = mla::model::shared_memory<TileSmem>();
  smem.values[threadIdx.x] = static_cast<int>(threadIdx.x);
  *line = __LINE__ + 1;
  __syncthreads();
  if (__shfl_xor_sync(kAllLanes, smem.values[63 - threadIdx.x], 1) < 0) __syncwarp();
}

TEST_F(RecordingTest, SaysWhatItIs) {
  int line = 0;
  const json file = json::parse(
      record({.block = 64, .shared_bytes = sizeof(TileSmem)}, [&] { simple_kernel(&line); }));
  EXPECT_EQ(file.at("schema"), "gpu_model recording");
  EXPECT_EQ(file.at("version"), 1);
  EXPECT_EQ(file.at("about").at("test"), "a \"name\"");
  EXPECT_EQ(file.at("truncated"), false);
  const json& launch = file.at("launches").at(0);
  EXPECT_EQ(launch.at("block"), (json{64, 1, 1}));
  EXPECT_EQ(launch.at("regions"),
            (json{{"values", 0, 256}, {"tile", 256, 1024}, {"full", 1280, 8}}));

  const std::vector<json> meetings = events_of(file, "meet");
  ASSERT_EQ(meetings.size(), 2u);  // one per warp
  EXPECT_EQ(meetings[0].at("what").at(0), "__syncthreads");
  EXPECT_EQ(meetings[0].at("what").at(2), line);
  EXPECT_EQ(file.at("files").at(meetings[0].at("what").at(1).get<size_t>()),
            "tests/reference/gpu_model/recording_test.cpp");
  EXPECT_EQ(meetings[0].at("lanes"), -1);
  EXPECT_EQ(meetings[1].at("arrived"), 64);
  ASSERT_EQ(events_of(file, "met").size(), 1u);
  EXPECT_EQ(events_of(file, "met")[0].at("released"), 64);
}

TEST_F(RecordingTest, PlainAccessesAreSeenInInstrumentedKernels) {
  if (!gpu_model::kernels_are_instrumented()) GTEST_SKIP() << "not compiled for the race detector";
  int line = 0;
  const json file = json::parse(
      record({.block = 64, .shared_bytes = sizeof(TileSmem)}, [&] { simple_kernel(&line); }));
  int stores = 0, loads = 0;
  for (const json& event : events_of(file, "run")) {
    if (event.at("what").at(0) == "store") {
      ++stores;
      const int begin = event.at("warp").get<int>() * 128;
      EXPECT_EQ(event.at("writes"), (json{begin, begin + 128}));
      EXPECT_EQ(event.at("what").at(2), line - 2);
    }
    loads += event.at("what").at(0) == "load";
  }
  EXPECT_EQ(stores, 2);
  EXPECT_EQ(loads, 2);
}

TEST_F(RecordingTest, IsOffUnlessAsked) {
  gpu_model::Recording recording;
  int line = 0;
  gpu_model::launch(1, 64, sizeof(TileSmem), [&] { simple_kernel(&line); });
  EXPECT_EQ(expect_right(recording.json()).launches, 0u);
}

/// cp.async, its groups, and ldmatrix.
void copy_kernel(const uint4* source) {
  auto& smem = mla::model::shared_memory<TileSmem>();
  ptx::cp_async_16(&smem.tile[threadIdx.x / 8][threadIdx.x % 8], source + threadIdx.x, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_16(&smem.tile[4 + threadIdx.x / 8][threadIdx.x % 8], source + threadIdx.x, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, &smem.tile[threadIdx.x / 8][threadIdx.x % 8]);
  ptx::cp_async_wait_group<0>();
}

TEST_F(RecordingTest, CopiesOfThreads) {
  GlobalArray<uint4> source(64);
  const Launch launch{.shared_bytes = sizeof(TileSmem)};
  const auto kernel = [&] { copy_kernel(source.data()); };
  expect_right_always(launch, kernel, &mla::RecordingSummary::copies, 2);

  const json file = json::parse(record(launch, kernel));
  const std::vector<json> copies = events_of(file, "copy");
  EXPECT_EQ(copies.at(0).at("writes"), (json{256, 768}));
  EXPECT_EQ(copies.at(0).at("bytes"), 512);
  EXPECT_EQ(copies.at(1).at("writes"), (json{768, 1280}));
  EXPECT_EQ(events_of(file, "settle").at(0).at("count"), 32);
  // Move the read before the wait for the copy.
  json wrong = file;
  const size_t wait = first_of(file, "settle");
  json& events = wrong["events"];
  json reader;
  for (size_t i = wait; reader.is_null(); ++i) {
    const json& event = events.at(i);
    if (file["kinds"][event[0].get<size_t>()][0] == "run" && event.size() > 6 &&
        file["places"][event[4].get<size_t>()][0] == "ldmatrix_x4") {
      reader = event;
      events.erase(i);
    }
  }
  events.insert(events.begin() + static_cast<ptrdiff_t>(wait), reader);
  expect_wrong(wrong, "byte 256 is read before the copy to it has landed");
}

/// A bulk load with its mbarrier, four times to the same place. One thread issues, two warps wait.
void load_kernel(const uint4* source) {
  auto& smem = mla::model::shared_memory<TileSmem>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  for (int turn = 0; turn < 4; ++turn) {
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.full, 1024);
      ptx::cp_async_bulk(smem.tile, source, 1024, &smem.full);
    }
    ptx::mbarrier_wait(&smem.full, turn % 2);
  }
}

TEST_F(RecordingTest, LoadsAndPhases) {
  GlobalArray<uint4> source(64);
  const Launch launch{.block = 64, .shared_bytes = sizeof(TileSmem)};
  const auto kernel = [&] { load_kernel(source.data()); };
  expect_right_always(launch, kernel, &mla::RecordingSummary::phases, 4);
  expect_right_always(launch, kernel, &mla::RecordingSummary::copies, 4);

  const json file = json::parse(record(launch, kernel));
  const json arrival = events_of(file, "arrive").at(0), landing = events_of(file, "land").at(0);
  EXPECT_EQ(arrival.at("pending"), 0);
  EXPECT_EQ(arrival.at("missing"), 1024);
  EXPECT_EQ(landing.at("missing"), 0);
  EXPECT_EQ(events_of(file, "phase").at(0).at("released"), 64);

  // Faults on purpose, such as a recorder that forgets an event or writes it wrongly would make.
  const auto without = [&](const std::string& kind) {
    json wrong = file;
    wrong["events"].erase(first_of(file, kind));
    wrong["events_kept"] = wrong["events"].size();
    return wrong;
  };
  expect_wrong(without("phase"), "of a lane that waits for an mbarrier");
  expect_wrong(without("land"), "the phase is not complete");
  expect_wrong(without("arrive"), "pending is 0, but 1 follows from the events before");
  expect_wrong(without("copy"), "it lands, but is not under way");
  expect_wrong(without("mbarrier"), "of a barrier that was not initialised");
  expect_wrong(without("met"), "of a lane that waits for a barrier");
  expect_wrong(without("begin"), "of a block that does not run");
  expect_wrong(without("end"), "a block does not end");
  expect_wrong(without("return"), "a block ends before its threads have returned");
  json wrong = file;
  wrong["events"].erase(wrong["events"].size() - 1);
  expect_wrong(wrong, "events_kept is not their number");
  wrong = file;
  wrong["version"] = 2;
  expect_wrong(wrong, "version 2 is not 1");
  wrong = file;
  wrong["kinds"][9][3] = "number";
  expect_wrong(wrong, "kind 9 is not that of version 1");
  expect_wrong(json::array(), "this is no recording");
  // Each number in the events of a phase is changed in turn.
  for (const char* kind : {"arrive", "land", "phase", "meet", "met", "wait"}) {
    const size_t place = first_of(file, kind);
    const size_t fields = file["events"][place].size();
    for (const size_t field : {fields - 1, fields - 2}) {
      wrong = file;
      json& number = wrong["events"][place][field];
      number = number.get<int>() + 7;
      mla::RecordingSummary summary;
      EXPECT_FALSE(mla::check_recording(wrong.dump(), &summary).ok()) << kind << " " << field;
    }
  }
}

TEST_F(RecordingTest, StoresAndNamedBarriers) {
  GlobalArray<uint4> target(64);
  expect_right_always(
      {.block = 64, .shared_bytes = sizeof(TileSmem)},
      [&] {
        auto& smem = mla::model::shared_memory<TileSmem>();
        smem.tile[threadIdx.x / 8][threadIdx.x % 8] = make_uint4(1, 2, 3, threadIdx.x);
        ptx::fence_proxy_async();
        if (threadIdx.x >= 32) {
          ptx::barrier_arrive(3, 64);
          return;
        }
        ptx::barrier_sync(3, 64);
        if (threadIdx.x != 0) return;
        ptx::cp_async_bulk_store(target.data(), smem.tile, 1024);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
      },
      &mla::RecordingSummary::copies, 1);
}

TEST_F(RecordingTest, RegistersThatAWarpgroupWaitsFor) {
  const auto kernel = [] {
    if (threadIdx.x < 256) {
      ptx::setmaxnreg_inc<240>();
    } else {
      ptx::setmaxnreg_dec<24>();
    }
  };
  expect_right_always({.block = 384}, kernel, &mla::RecordingSummary::waits, 8);
  const json file = json::parse(record({.block = 384}, kernel));
  EXPECT_EQ(events_of(file, "registers").size(), 12u);
  EXPECT_EQ(events_of(file, "grant").size(), 8u);
}

struct ClusterSmem {
  uint32_t values[64];
  alignas(16) uint4 box[8];
  ptx::Mbarrier full;
  MLA_REGIONS(values, box, full)
};

TEST_F(RecordingTest, ClustersAreRecordedWhole) {
  const auto kernel = [] {
    auto& smem = mla::model::shared_memory<ClusterSmem>();
    const unsigned rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&smem.full, 2);
      ptx::fence_mbarrier_init();
      smem.values[32] = 0;
      for (uint4& part : smem.box) part = make_uint4(rank, 1, 2, 3);
      ptx::fence_proxy_async();
    }
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    ptx::Mbarrier* full = ptx::mapa(&smem.full, rank ^ 1);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.full, 32 * 4 + 4);
      ptx::mbarrier_arrive_cluster(full);
      ptx::red_async_add(ptx::mapa(&smem.values[32], rank ^ 1), 5, full);
    }
    ptx::st_async(ptx::mapa(&smem.values[threadIdx.x], rank ^ 1), threadIdx.x, full);
    ptx::mbarrier_wait_cluster(&smem.full, 0);
    ptx::barrier_cluster_arrive_relaxed();
    ptx::barrier_cluster_wait();
  };
  const Launch launch{.grid = 4, .shared_bytes = sizeof(ClusterSmem), .options = {.cluster = 2}};
  expect_right_always(launch, kernel, &mla::RecordingSummary::copies, 66);
  expect_right_always(launch, kernel, &mla::RecordingSummary::copies, 132, {.blocks = {}});
  const json file = json::parse(record(launch, kernel));
  EXPECT_EQ(file.at("blocks"), (json{{0, 0, 0, 0}, {0, 1, 0, 0}}));
  EXPECT_EQ(events_of(file, "cluster_met").size(), 2u);
  json wrong = file;
  wrong["events"].erase(first_of(file, "cluster_met"));
  expect_wrong(wrong, "waits contradicts the phase");
}

TEST_F(RecordingTest, CopiesBetweenBlocks) {
  GlobalArray<uint16_t> table(64 * 8);
  for (size_t i = 0; i < 64 * 8; ++i) table[i] = static_cast<uint16_t>(i);
  const auto kernel = [] {
    auto& smem = mla::model::shared_memory<ClusterSmem>();
    const unsigned rank = ptx::cluster_ctarank();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&smem.full, 1);
      ptx::fence_mbarrier_init();
      if (rank == 0) {
        for (uint4& part : smem.box) part = make_uint4(1, 1, 2, 3);
      }
      ptx::fence_proxy_async();
    }
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    if (rank == 0 && threadIdx.x == 0) {
      ptx::cp_async_bulk_cluster(ptx::mapa(smem.box, 1), smem.box, sizeof smem.box,
                                 ptx::mapa(&smem.full, 1));
    }
    if (rank == 1) {
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(&smem.full, sizeof smem.box);
      ptx::mbarrier_wait_cluster(&smem.full, 0);
    }
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  };
  const Launch launch{.grid = 2, .shared_bytes = sizeof(ClusterSmem), .options = {.cluster = 2}};
  expect_right_always(launch, kernel, &mla::RecordingSummary::copies, 1);
  const json copy = events_of(json::parse(record(launch, kernel)), "copy").at(0);
  EXPECT_EQ(copy.at("at"), 1);
  EXPECT_EQ(copy.at("from"), 0);
  EXPECT_EQ(copy.at("reads"), copy.at("writes"));
}

TEST_F(RecordingTest, CountersOfACooperativeGrid) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    GlobalArray<unsigned> counters(2);
    counters.fill(0);
    const auto kernel = [&] {
      if (threadIdx.x == 0) ptx::red_add_release(&counters[0], 1);
      ptx::wait_until_at_least(&counters[0], gridDim.x);
      if (threadIdx.x == 0 && blockIdx.x == 0) ptx::st_release(&counters[1], 7);
      while (ptx::ld_acquire(&counters[1]) != 7) {
      }
    };
    const std::string file =
        record({.grid = 3, .options = {.cooperative = true}}, kernel, seed, {.blocks = {}});
    EXPECT_EQ(expect_right(file).blocks, 3u);
    const json read = json::parse(file);
    EXPECT_EQ(read.at("counters").size(), 2u);
    EXPECT_NE(read.at("counters").at(0).get<std::string>().find("of an allocation of 8 bytes"),
              std::string::npos);
    for (const json& event : events_of(read, "counter_met")) EXPECT_EQ(event.at("holds"), 3);
    if (seed == 0) {
      EXPECT_FALSE(events_of(read, "counter_wait").empty());
    }
  }
}

TEST_F(RecordingTest, DivergentLanesWaitForTheirWarp) {
  const auto kernel = [] {
    auto& smem = mla::model::shared_memory<TileSmem>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&smem.full, 33);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 5) {
      ptx::mbarrier_arrive(&smem.full);
      ptx::mbarrier_wait(&smem.full, 0);
    }
    if (threadIdx.x >= 32) ptx::mbarrier_arrive(&smem.full);
    if (threadIdx.x < 32) __syncwarp();
  };
  const Launch launch{.block = 64, .shared_bytes = sizeof(TileSmem)};
  expect_right_always(launch, kernel, &mla::RecordingSummary::phases, 1);
  const json file = json::parse(record(launch, kernel));
  const std::vector<json> waits = events_of(file, "warp_wait");
  ASSERT_EQ(waits.size(), 1u);
  EXPECT_EQ(waits[0].at("lanes"), 0xffffffff & ~(1u << 5));
}

TEST_F(RecordingTest, EndsWhereTheKernelIsRejected) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const std::string file = record(
        {.block = 64},
        [] {
          if (threadIdx.x < 32) __syncwarp();
          if (threadIdx.x < 40) __syncthreads();
        },
        seed, {}, "__syncthreads");
    const mla::RecordingSummary summary = expect_right(file);
    expect_contains(summary.error, "__syncthreads");
    EXPECT_FALSE(summary.truncated);
  }
}

TEST_F(RecordingTest, BoundsAreKeptAndSaid) {
  GlobalArray<uint4> source(64);
  const Launch launch{.block = 64, .shared_bytes = sizeof(TileSmem)};
  const auto kernel = [&] { load_kernel(source.data()); };
  const json whole = json::parse(record(launch, kernel));
  const size_t events = whole["events"].size();
  for (const bool by_bytes : {false, true}) {
    gpu_model::RecordingOptions options;
    (by_bytes ? options.max_bytes : options.max_events) = by_bytes ? 300 : 10;
    const std::string text = record(launch, kernel, 0, options);
    const json file = json::parse(text);
    EXPECT_TRUE(expect_right(text).truncated);
    const size_t kept = file["events"].size();
    EXPECT_EQ(file["events_kept"], kept);
    EXPECT_EQ(file["events_left_out"], events - kept);
    if (by_bytes) {
      EXPECT_GT(kept, 5u);
      EXPECT_LE(file["events"].dump().size(), 300u);
    } else {
      EXPECT_EQ(kept, 10u);
    }
    for (size_t i = 0; i < kept; ++i) EXPECT_EQ(file["events"][i], whole["events"][i]);
  }
  // If exactly as many fit as there are, none is missing.
  EXPECT_EQ(json::parse(record(launch, kernel, 0, {.max_events = events}))["truncated"], false);
}

TEST_F(RecordingTest, ManyBlocksInTheOrderOfTheirTurns) {
  int line = 0;
  const Launch launch{.grid = dim3(3, 2), .block = 64, .shared_bytes = sizeof(TileSmem)};
  const auto kernel = [&] { simple_kernel(&line); };
  expect_right_always(launch, kernel, &mla::RecordingSummary::blocks, 6, {.blocks = {}});
  const json file = json::parse(record(launch, kernel, 0, {.blocks = {4, 1}}));
  EXPECT_EQ(file["blocks"], (json{{0, 1, 0, 0}, {0, 1, 1, 0}}));
}

TEST_F(RecordingTest, ChangesNothingThatAKernelDoes) {
  GlobalArray<unsigned> order(64), next(1);
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const auto kernel = [&] {
      __syncthreads();
      order[atomicAdd(next.data(), 1)] = threadIdx.x;
    };
    gpu_model::schedule().seed = seed;
    next[0] = 0;
    gpu_model::launch(1, 64, 0, kernel);
    const std::vector<unsigned> plain = order.values();
    next[0] = 0;
    record({.block = 64}, kernel, seed);
    EXPECT_EQ(order.values(), plain);
  }
}

}  // namespace
}  // namespace gpu_model_test
