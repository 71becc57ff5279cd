// Several devices that hold the pages of one page table: which holds what; steps of 1, 2 and 3 ranks on the GPU model, and
// on as many GPUs as there are, against the reference; ranks that fail, or do not come back.
#include "bench/service/ranks_engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <future>
#include <new>
#include <utility>

#include "bench/service/service.h"
#include "reference/testing/compare.h"
#include "stages/common/machine/gpus.h"
#include "stages/common/parallel/nccl_api.h"
#include "tests/bench/service/expected_step.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kPatient{60000};
constexpr milliseconds kShort{300};

// ---- Tables

// 200 tokens in pages 5, 0, 7 and 2 of three ranks, of which the last has 8; the last 10 are new.
TEST(StepTables, APageIsWhereItsNumberSays) {
  const int32_t pages[] = {5, 0, 7, 2};
  StepWork work;
  work.sequences.push_back(
      {.request = 1, .tokens_before = 190, .appended = 10, .decoded = 200, .pages = pages});
  std::vector<StepTables> ranks(3);
  make_tables(work, false, ranks);
  const auto row = [](const StepTables& rank, size_t pages_held) {
    return std::vector<int32_t>(rank.data.begin(),
                                rank.data.begin() + static_cast<ptrdiff_t>(pages_held));
  };
  for (const StepTables& rank : ranks) {
    EXPECT_EQ(rank.batch, 1);
    EXPECT_EQ(rank.columns, 16);
    EXPECT_EQ(rank.data.size(), 17U);
    EXPECT_EQ(rank.most_runs, 2);
  }
  EXPECT_EQ(row(ranks[0], 2), (std::vector<int32_t>{0, -1}));
  EXPECT_EQ(row(ranks[1], 2), (std::vector<int32_t>{2, -1}));
  EXPECT_EQ(row(ranks[2], 3), (std::vector<int32_t>{1, 0, -1}));
  EXPECT_EQ(ranks[0].data[16], 64);
  EXPECT_EQ(ranks[1].data[16], 64);
  EXPECT_EQ(ranks[2].data[16], 72);
  EXPECT_TRUE(ranks[0].runs.empty());
  ASSERT_EQ(ranks[1].runs.size(), 1U);  // tokens 190 and 191
  EXPECT_EQ(ranks[1].runs[0].source, row_of(1, 190));
  EXPECT_EQ(ranks[1].runs[0].destination, 2 * 64 + 62);
  EXPECT_EQ(ranks[1].runs[0].tokens, 2);
  ASSERT_EQ(ranks[2].runs.size(), 1U);
  EXPECT_EQ(ranks[2].runs[0].source, row_of(1, 192));
  EXPECT_EQ(ranks[2].runs[0].destination, 0);
  EXPECT_EQ(ranks[2].runs[0].tokens, 8);
}

// The widest rank decides for all, and so does the batch: they make and replay graphs together.
TEST(StepTables, RanksHaveTheSameSizes) {
  std::vector<int32_t> even(40), odd(1, 1);
  for (size_t i = 0; i < even.size(); ++i) even[i] = int32_t(2 * i);
  StepWork work;
  for (int i = 0; i < 2; ++i) {
    work.sequences.push_back({i, 40 * 64 - 1, 1, 40 * 64, even});
  }
  work.sequences.push_back({2, 9, 1, 10, odd});
  for (const bool pad : {false, true}) {
    std::vector<StepTables> ranks(2);
    make_tables(work, pad, ranks);
    for (const StepTables& rank : ranks) {
      EXPECT_EQ(rank.padded, pad);
      EXPECT_EQ(rank.batch, pad ? 4 : 3);
      EXPECT_EQ(rank.columns, pad ? 64 : 48);
      EXPECT_EQ(rank.most_runs, pad ? 4 : 3);
      EXPECT_EQ(rank.data.size(), size_t(rank.batch) * size_t(rank.columns + 1));
    }
    EXPECT_EQ(ranks[0].runs.size(), pad ? 4U : 2U);
    EXPECT_EQ(ranks[1].runs.size(), pad ? 4U : 1U);
    EXPECT_EQ(ranks[0].data[ranks[0].entries() + 1], 40 * 64);
    EXPECT_EQ(ranks[1].data[ranks[1].entries() + 1], 0);
    EXPECT_EQ(ranks[1].data[ranks[1].entries() + 2], 10);
  }
}

// ---- Steps

/// A group of the model's ranks, whose transports `change` may replace.
using Change = std::function<void(int rank, std::unique_ptr<Transport>* transport)>;
Status make_ranks(Machine& machine, int ranks, int pages, CacheFormat format, int layers,
                  milliseconds limit, std::unique_ptr<DeviceRanks>* made,
                  const Change& change = nullptr) {
  MakeRankTransport make;
  MLA_RETURN_IF_ERROR(make_rank_transports(machine, ranks, limit, &make));
  const auto changed = [make, change](int rank, std::unique_ptr<Transport>* transport) {
    MLA_RETURN_IF_ERROR(make(rank, transport));
    if (change) change(rank, transport);
    return Status();
  };
  return DeviceRanks::create(machine, ranks, pages, format, layers, 0, limit, changed, made);
}

/// Puts together what the ranks made of the heads that each merged, and compares it with the reference.
void check_ranks(Machine& machine, const RanksEngine& engine, int ranks, const StepWork& work,
                 int layer) {
  const Problem& decoded = engine.rank(0).problem();
  const bool by_heads = decoded.num_heads_q % ranks == 0;
  const size_t all = size_t(decoded.num_heads_q), heads = by_heads ? all / size_t(ranks) : all;
  std::vector<uint16_t> q(size_t(decoded.q_elements())), out(size_t(decoded.out_elements()));
  std::vector<float> lse(size_t(decoded.lse_elements()));
  const size_t batch = size_t(decoded.batch);
  for (int rank = 0; rank < (by_heads ? ranks : 1); ++rank) {
    const Tensors device = engine.rank(rank).tensors();
    ASSERT_EQ(engine.rank(rank).problem().batch, decoded.batch);
    std::vector<uint16_t> some_out(batch * heads * kHeadDimV);
    std::vector<float> some_lse(batch * heads);
    ASSERT_OK(machine.copy_to_host(q.data(), device.q, q.size() * 2));
    ASSERT_OK(machine.copy_to_host(some_out.data(), device.out, some_out.size() * 2));
    ASSERT_OK(machine.copy_to_host(some_lse.data(), device.lse, some_lse.size() * 4));
    for (size_t i = 0; i < batch; ++i) {
      const size_t place = i * all + size_t(rank) * heads;
      std::copy_n(&some_out[i * heads * kHeadDimV], heads * kHeadDimV, &out[place * kHeadDimV]);
      std::copy_n(&some_lse[i * heads], heads, &lse[place]);
    }
  }
  Problem problem;
  ReferenceResult truth;
  ASSERT_OK(expected_of(decoded, q, work, layer, &problem, &truth));
  if (ranks == 1) {
    const DecodeComparison comparison = compare_decode(problem, out, lse, truth);
    EXPECT_OK(comparison);
    return;
  }
  const Comparison of_out =
      compare(problem.dtype, out, truth.out, kHeadDimV, merged_tolerance(problem.dtype));
  EXPECT_TRUE(of_out.ok) << of_out.failure;
  const Comparison of_lse = compare_lse(problem, lse, truth);
  EXPECT_TRUE(of_lse.ok) << of_lse.failure;
}

/// Does each step, then checks it; as long as steps of the test's own clock.
class CheckingRanks final : public Engine {
 public:
  CheckingRanks(Machine& machine, RanksEngine& engine, int ranks, int layers)
      : machine_(machine), engine_(engine), ranks_(ranks), layers_(layers) {}
  Status step(const StepWork& work, double* seconds) override {
    MLA_RETURN_IF_ERROR(engine_.step(work, seconds));
    EXPECT_GT(*seconds, 0);
    *seconds = 0.01;
    SCOPED_TRACE("step " + std::to_string(steps++));
    check_ranks(machine_, engine_, ranks_, work, layers_ - 1);
    return {};
  }
  int steps = 0;

 private:
  Machine& machine_;
  RanksEngine& engine_;
  int ranks_, layers_;
};

/// How requests are served.
struct Serving {
  CacheFormat format = CacheFormat::k16Bit;
  SharedPrefixes prefixes = {};
  bool graphs = false;
  int heads = 16;
};

/// Requests of which some are preempted: pages change their sequences, and rows their ranks.
void serve_and_check(Machine& machine, const Stage& stage, int ranks, int layers,
                     const Serving& how = {}) {
  SCOPED_TRACE(stage.slug + ", " + to_string(how.format) + ", ranks " + std::to_string(ranks));
  const int each = 6 / ranks + 1;
  const SchedulerLimits limits{.num_pages = each * ranks, .max_batch = 4, .max_length = 400};
  std::unique_ptr<DeviceRanks> group;
  ASSERT_OK(make_ranks(machine, ranks, each, how.format, layers, kPatient, &group));
  EXPECT_EQ(group->shape().num_pages, each);
  std::unique_ptr<RanksEngine> real;
  ASSERT_OK(RanksEngine::create(*group, stage, how.heads, how.graphs, &real));
  CheckingRanks engine(machine, *real, ranks, layers);
  ASSERT_OK(warm_up(*real));
  std::unique_ptr<PagedScheduler> scheduler;
  ASSERT_OK(PagedScheduler::create(limits, &scheduler));
  Figures figures;
  const Status status = run_service({.requests = 2}, first_requests(how.prefixes),
                                    RequestStream({20, {90, 90}, {6, 3}, how.prefixes}, 1, 11),
                                    *scheduler, engine, &figures);
  ASSERT_OK(status);
  EXPECT_EQ(figures.counts.finished + figures.counts.rejected_total(), 7);
  EXPECT_GE(figures.counts.finished, 6);
  for (int rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(real->rank(rank).graphs(), real->rank(0).graphs());
    EXPECT_EQ(real->rank(rank).replayed(), real->rank(0).replayed());
    EXPECT_EQ(real->rank(rank).replayed() > 0, how.graphs);
  }
  EXPECT_EQ(engine.steps, figures.steps);
}

const Stage& stage_of_model(const std::string& name) {
  return *find_stage(MachineKind::kModel, name);
}

// Two divide the heads, which are merged apart; three do not.
TEST(RanksEngine, DecodesWhatWasAppended) {
  for (const int ranks : {1, 2, 3})
    serve_and_check(model_machine(), stage_of_model("03"), ranks, 1);
  serve_and_check(model_machine(), stage_of_model("04"), 2, 2);
}

TEST(RanksEngine, DecodesWhatIsShared) {
  serve_and_check(model_machine(), stage_of_model("03"), 2, 2, {.prefixes = {1, 100}});
}

TEST(RanksEngine, DecodesWhatAGraphAppended) {
  for (const int ranks : {2, 3}) {
    serve_and_check(model_machine(), stage_of_model("04"), ranks, 2, {.graphs = true});
  }
}

TEST(RanksEngine, DecodesWhatItQuantised) {
  for (const CacheFormat format : {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor}) {
    serve_and_check(model_machine(), stage_of_model("auto"), 2, 1, {.format = format});
  }
}

TEST(RanksEngine, DecodesOnGpus) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  std::unique_ptr<NcclApi> nccl;
  if (const Status loaded = make_nccl_api(&nccl); !loaded.ok()) GTEST_SKIP() << loaded.message();
  for (int ranks = 1; ranks <= gpu_count(); ++ranks) {
    for (const bool graphs : {false, true}) {
      serve_and_check(*gpu, *find_stage(MachineKind::kGpu, "auto"), ranks, 3, {.graphs = graphs});
    }
  }
}

// One rank gives the bits of an engine without ranks, and a second run those of the first.
TEST(RanksEngine, TheSameBitsEveryTime) {
  const int32_t pages[] = {3, 2, 0, 1, 5};
  StepWork work;
  work.sequences.push_back({5, 0, 300, 300, pages});
  const auto out_of = [&](const RealEngine& engine) {
    const Problem& problem = engine.problem();
    std::vector<uint16_t> out(size_t(problem.out_elements()));
    EXPECT_OK(model_machine().copy_to_host(out.data(), engine.tensors().out, out.size() * 2));
    return out;
  };
  const auto run = [&](int ranks) {
    std::unique_ptr<DeviceRanks> group;
    std::unique_ptr<RanksEngine> engine;
    EXPECT_OK(
        make_ranks(model_machine(), ranks, 6 / ranks, CacheFormat::k16Bit, 1, kPatient, &group));
    EXPECT_OK(RanksEngine::create(*group, stage_of_model("04"), 5, false, &engine));
    double seconds = 0;
    EXPECT_OK(engine->step(work, &seconds));
    return out_of(engine->rank(ranks - 1));
  };
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(model_machine(), 6, CacheFormat::k16Bit, 1, 0, &caches));
  std::unique_ptr<RealEngine> alone;
  ASSERT_OK(RealEngine::create(model_machine(), stage_of_model("04"), *caches, 5, false, &alone));
  double seconds = 0;
  ASSERT_OK(alone->step(work, &seconds));
  EXPECT_EQ(run(1), out_of(*alone));
  EXPECT_EQ(run(3), run(3));
}

/// Counts a rank's plans and decodes.
struct CountingObserver final : RankObserver {
  int plans = 0, decodes = 0;
  Status mark(RankPhase phase, Stream) override {
    plans += phase == RankPhase::kCut ? 1 : 0;
    decodes += phase == RankPhase::kBulk ? 1 : 0;
    return {};
  }
};

// All layers have the same lengths. The third step is a graph's replay.
TEST(RanksEngine, AStepHasOnePlan) {
  constexpr int kRanks = 2, kLayers = 3;
  for (const bool graphs : {false, true}) {
    std::vector<CountingObserver> counted(kRanks);
    std::unique_ptr<DeviceRanks> group;
    ASSERT_OK(make_ranks(model_machine(), kRanks, 2, CacheFormat::k16Bit, kLayers, kPatient, &group,
                         [&](int rank, std::unique_ptr<Transport>* transport) {
                           (*transport)->observe(&counted[size_t(rank)]);
                         }));
    std::unique_ptr<RanksEngine> engine;
    ASSERT_OK(RanksEngine::create(*group, stage_of_model("04"), 4, graphs, &engine));
    const int32_t pages[] = {1, 0};
    for (int steps = 1; steps <= 3; ++steps) {
      StepWork work;
      work.sequences.push_back({0, 69 + steps, 1, 70 + steps, pages});
      double seconds = 0;
      ASSERT_OK(engine->step(work, &seconds));
      for (const CountingObserver& rank : counted) {
        EXPECT_EQ(rank.plans, steps);
        EXPECT_EQ(rank.decodes, steps * kLayers);
      }
    }
    EXPECT_EQ(engine->rank(0).replayed(), graphs ? 2 : 0);
  }
}

// ---- Failures

/// Does what a test says before an exchange, and before it waits for the device.
class SpoiltTransport final : public Transport {
 public:
  SpoiltTransport(std::unique_ptr<Transport> whole, std::function<Status()> before,
                  std::function<void()> before_wait = nullptr)
      : whole_(std::move(whole)),
        before_(std::move(before)),
        before_wait_(std::move(before_wait)) {}
  int rank() const override { return whole_->rank(); }
  int ranks() const override { return whole_->ranks(); }
  Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) override {
    MLA_RETURN_IF_ERROR(before_());
    return whole_->all_gather(send, receive, bytes, stream);
  }
  Status all_to_all(const void* send, void* receive, size_t bytes, Stream stream) override {
    MLA_RETURN_IF_ERROR(before_());
    return whole_->all_to_all(send, receive, bytes, stream);
  }
  Status reduce_scatter(const float* send, float* receive, size_t count, Stream stream) override {
    MLA_RETURN_IF_ERROR(before_());
    return whole_->reduce_scatter(send, receive, count, stream);
  }
  Status join(Stream stream) override { return whole_->join(stream); }
  Status wait(Stream stream) override {
    if (before_wait_) before_wait_();
    return whole_->wait(stream);
  }
  void fail(const Status& why) override { whole_->fail(why); }

 private:
  std::unique_ptr<Transport> whole_;
  std::function<Status()> before_;
  std::function<void()> before_wait_;
};

/// What ranks hang in, until they are released. Copies are the same.
class Hang {
 public:
  void operator()() const {
    state_->released.wait();
    if (++state_->came_back == state_->ranks) state_->all_came_back.set_value();
  }
  explicit Hang(int ranks) : state_(std::make_shared<State>()) { state_->ranks = ranks; }
  /// Whether all of them come back then.
  bool release() const {
    state_->release.set_value();
    return state_->all_came_back.get_future().wait_for(kPatient) == std::future_status::ready;
  }

 private:
  struct State {
    int ranks = 0;
    std::promise<void> release, all_came_back;
    std::shared_future<void> released = release.get_future().share();
    std::atomic<int> came_back = 0;
  };
  std::shared_ptr<State> state_;
};

/// Three ranks, of which rank 1 does something before each exchange; and steps of them.
class RanksFail : public testing::Test {
 protected:
  void make(milliseconds limit, const std::function<Status()>& before) {
    const auto spoil = [before](int rank, std::unique_ptr<Transport>* transport) {
      if (rank != 1) return;
      *transport = std::make_unique<SpoiltTransport>(std::move(*transport), before);
    };
    ASSERT_OK(make_ranks(model_machine(), 3, 2, CacheFormat::k16Bit, 1, limit, &group_, spoil));
    ASSERT_OK(RanksEngine::create(*group_, stage_of_model("03"), 3, false, &engine_));
  }
  Status step() {
    const int32_t page = 0;
    StepWork work;
    work.sequences.push_back({0, 0, 1, 1, {&page, 1}});
    double seconds = 0;
    return engine_->step(work, &seconds);
  }
  std::unique_ptr<DeviceRanks> group_;
  std::unique_ptr<RanksEngine> engine_;
};

// The others would wait for a minute.
TEST_F(RanksFail, AnErrorOfOneEndsTheStepAtOnce) {
  int exchanges = 0;
  make(kPatient,
       [&] { return ++exchanges < 3 ? Status() : Status(StatusCode::kCudaError, "out of luck"); });
  EXPECT_OK(step());
  EXPECT_OK(step());
  const auto begin = WallClock::now();
  const Status failed = step();
  EXPECT_LT(seconds_since(begin), 30);
  EXPECT_EQ(failed.code(), StatusCode::kCudaError);
  EXPECT_EQ(failed.message(), "rank 1: out of luck");
  EXPECT_EQ(step().message(), failed.message());
  EXPECT_EQ(exchanges, 3);
}

TEST(RanksEngine, RefusesACacheThatTheStageCannotRead) {
  std::unique_ptr<DeviceRanks> quantised;
  ASSERT_OK(make_ranks(model_machine(), 2, 2, CacheFormat::kFp8Tensor, 1, kPatient, &quantised));
  std::unique_ptr<RanksEngine> engine;
  const Status status = RanksEngine::create(*quantised, stage_of_model("03"), 4, false, &engine);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message().rfind("rank 0: 03_online_softmax cannot read", 0), 0U)
      << status.message();
  EXPECT_EQ(engine, nullptr);
}

// It is not waited for: neither by the step nor at the end.
TEST_F(RanksFail, ALostOneEndsTheStepInTime) {
  const auto came_back = std::make_shared<std::promise<void>>();
  std::promise<void> release;
  make(kShort, [came_back, released = release.get_future().share()] {
    released.wait();
    came_back->set_value();
    return Status();
  });
  const auto begin = WallClock::now();
  const Status lost = step();
  EXPECT_EQ(lost.code(), StatusCode::kRankFailed);
  EXPECT_EQ(lost.message().rfind("rank 1 did not come to all_to_all", 0), 0U) << lost.message();
  engine_.reset();
  group_.reset();
  EXPECT_LT(seconds_since(begin), 30);
  release.set_value();
  EXPECT_EQ(came_back->get_future().wait_for(kPatient), std::future_status::ready);
}

// Where no transport keeps a time limit, because they wait for nobody: one of them, and all.
TEST(RanksEngine, WhoHangsOutsideAnExchangeEndsTheStepInTime) {
  for (const bool all : {false, true}) {
    const Hang hang(all ? 3 : 1);
    std::unique_ptr<DeviceRanks> group;
    ASSERT_OK(make_ranks(model_machine(), 3, 2, CacheFormat::k16Bit, 1, kShort, &group,
                         [&](int rank, std::unique_ptr<Transport>* transport) {
                           if (rank != 1 && !all) return;
                           *transport = std::make_unique<SpoiltTransport>(
                               std::move(*transport), [] { return Status(); }, hang);
                         }));
    std::unique_ptr<RanksEngine> engine;
    ASSERT_OK(RanksEngine::create(*group, stage_of_model("03"), 3, false, &engine));
    const int32_t page = 0;
    StepWork work;
    work.sequences.push_back({0, 0, 1, 1, {&page, 1}});
    const auto begin = WallClock::now();
    for (int steps = 0; steps < 2; ++steps) {
      double seconds = 0;
      const Status lost = engine->step(work, &seconds);
      EXPECT_EQ(lost.code(), StatusCode::kRankFailed);
      EXPECT_EQ(lost.message(), all ? "rank 0, rank 1, rank 2 did not come back within 600 ms"
                                    : "rank 1 did not come back within 300 ms");
    }
    engine.reset();
    group.reset();
    EXPECT_LT(seconds_since(begin), 10);
    EXPECT_TRUE(hang.release());
  }
}

TEST(RanksEngine, WhoHangsBeforeItJoinsIsNamedInTime) {
  const Hang hang(1);
  std::unique_ptr<DeviceRanks> group;
  const auto begin = WallClock::now();
  const Status lost = make_ranks(model_machine(), 3, 2, CacheFormat::k16Bit, 1, kShort, &group,
                                 [hang](int rank, std::unique_ptr<Transport>*) {
                                   if (rank == 2) hang();
                                 });
  EXPECT_EQ(lost.message(), "rank 2 did not come back within 300 ms");
  EXPECT_EQ(group, nullptr);
  EXPECT_LT(seconds_since(begin), 10);
  EXPECT_TRUE(hang.release());
}

TEST(RanksEngine, RefusesWhatRanksCannotHold) {
  std::unique_ptr<DeviceRanks> group;
  const Status status =
      make_ranks(model_machine(), 2, 1 << 24, CacheFormat::k16Bit, 2, kPatient, &group);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(status.message().rfind("rank 0: a layer's cache of 16777216 pages takes", 0), 0U)
      << status.message();
  EXPECT_EQ(group, nullptr);
}

TEST(RanksEngine, SaysHowManyGpusThereAre) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  MakeRankTransport make;
  const Status status = make_rank_transports(*gpu, 1000, kPatient, &make);
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(status.message().rfind("1000 ranks need as many GPUs; there ", 0), 0U);
}

// ---- Threads

TEST(RankThreads, EachDoesEveryJobOnItsThread) {
  RankThreads threads(3, kPatient);
  const auto ids = std::make_shared<std::vector<std::thread::id>>(3);
  EXPECT_OK(threads.each([ids](int rank) {
    (*ids)[size_t(rank)] = std::this_thread::get_id();
    return Status();
  }));
  for (int turn = 0; turn < 100; ++turn) {
    const auto same = std::make_shared<std::vector<int>>(3);
    EXPECT_OK(threads.each([=](int rank) {
      (*same)[size_t(rank)] = (*ids)[size_t(rank)] == std::this_thread::get_id() ? 1 : 0;
      return Status();
    }));
    EXPECT_EQ(*same, std::vector<int>(3, 1));
  }
}

// Those that were told of a failure say so sooner than the one that has it.
TEST(RankThreads, TheCauseIsWhatIsReturned) {
  RankThreads threads(3, milliseconds(2000));
  const Status status = threads.each([](int rank) -> Status {
    if (rank != 2) return {StatusCode::kRankFailed, "rank 2 failed: ..."};
    std::this_thread::sleep_for(milliseconds(50));
    return {StatusCode::kOutOfMemory, "no memory"};
  });
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(status.message(), "rank 2: no memory");
  bool any = false;
  EXPECT_EQ(threads.each([&](int) { return any = true, Status(); }).message(), "rank 2: no memory");
  EXPECT_FALSE(any);
  const auto cleaned = std::make_shared<std::vector<int>>(3);
  threads.clean_up([=](int rank) { return (*cleaned)[size_t(rank)] = 1, Status(); });
  EXPECT_EQ(*cleaned, std::vector<int>(3, 1));
}

TEST(RankThreads, WhatAJobThrowsIsItsStatus) {
  RankThreads threads(2, kPatient);
  const Status status = threads.each([](int rank) {
    if (rank == 1) throw std::bad_alloc();
    return Status();
  });
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_EQ(status.message(), "rank 1: no host memory for that");
}

// A rank that does not come back is named, and left behind with what its job holds; it cleans up when it does.
TEST(RankThreads, ALostRankIsLeftBehind) {
  const auto cleaned = std::make_shared<std::promise<void>>();
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  const auto begin = WallClock::now();
  {
    RankThreads threads(2, kShort);
    const Status status = threads.each([released](int rank) {
      if (rank == 1) released.wait();
      return Status();
    });
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_EQ(status.message(), "rank 1 did not come back within 300 ms");
    threads.clean_up([cleaned](int rank) {
      if (rank == 1) cleaned->set_value();
      return Status();
    });
  }
  EXPECT_LT(seconds_since(begin), 10);
  release.set_value();
  EXPECT_EQ(cleaned->get_future().wait_for(milliseconds(10000)), std::future_status::ready);
}

// A program that left a thread behind ends before anything that the thread may use.
TEST(RankThreadsDeathTest, AProgramEndsWithoutWhoIsLeftBehind) {
  testing::FLAGS_gtest_death_test_style =
      "threadsafe";  // of this test alone: no other has lost a rank
  EXPECT_EXIT(
      {
        std::atexit([] { std::_Exit(1); });
        if (end_of_program(5) != 5) std::_Exit(2);
        const Hang hang(1);
        {
          RankThreads threads(2, milliseconds(20));
          const Status status = threads.each([hang](int rank) {
            if (rank == 0) hang();
            return Status();
          });
          if (status.ok()) std::_Exit(3);
        }
        std::exit(end_of_program(7));
      },
      testing::ExitedWithCode(7), "");
}

}  // namespace
}  // namespace mla::bench
