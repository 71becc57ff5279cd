// How the simulated clock is fitted, and which figures a run computes from steps of known times.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <thread>
#include <tuple>

#include "bench/service/experiments.h"
#include "bench/service/report.h"
#include "bench/service/scenarios.h"
#include "bench/service/service.h"
#include "bench/service/time_model.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

// ---- the fit ----

TEST(Fit, FindsCoefficients) {
  const std::vector<std::vector<double>> columns{{1, 1, 1, 1}, {1, 2, 4, 8}, {3, 1, 4, 1}};
  std::vector<double> times;
  for (size_t i = 0; i < 4; ++i) times.push_back(5 + 0.25 * columns[1][i] + 2 * columns[2][i]);
  const auto x = fit_non_negative(columns, times);
  EXPECT_NEAR(x[0], 5, 1e-8);
  EXPECT_NEAR(x[1], 0.25, 1e-8);
  EXPECT_NEAR(x[2], 2, 1e-8);
}

TEST(Fit, IsNeverNegative) {
  // The times fall as the column rises, so the best fit without negative terms is the constant
  // alone.
  const auto x = fit_non_negative({{1, 1, 1}, {1, 2, 3}}, std::vector<double>{3, 2, 1});
  EXPECT_GT(x[0], 0);
  EXPECT_EQ(x[1], 0);
}

TEST(Fit, TellsASumFromALargest) {
  std::vector<DecodeTime> sums, largest;
  for (const double batch : {1, 4, 16, 64, 128}) {
    for (const double length : {1000, 8000, 30000}) {
      const DecodeShape shape{batch, batch * length, length};
      sums.push_back({"", shape, 10 + 0.5 * batch + 0.001 * shape.tokens + 0.02 * length});
      largest.push_back({"", shape, 10 + std::max(0.001 * shape.tokens, 0.02 * length)});
    }
  }
  const DecodeFit sum = fit_decode(sums), most = fit_decode(largest);
  EXPECT_FALSE(sum.largest);
  EXPECT_LT(sum.worst_error, 1e-8);
  EXPECT_NEAR(sum.d, 0.02, 1e-8);
  EXPECT_TRUE(most.largest);
  EXPECT_LT(most.worst_error, 1e-8);
  EXPECT_EQ(most.shapes, 15);
}

struct Bound {
  const char* stage;
  int heads;
  double median, worst;
};

class RecordedFit : public testing::TestWithParam<Bound> {};

// The bounds lie a little above the fit's errors, so that a worse fit fails.
TEST_P(RecordedFit, IsCloseToWhatWasRecorded) {
  const Bound& bound = GetParam();
  Recorded recorded;
  ASSERT_OK(load_newest_recorded(&recorded));
  TimeModel model;
  const Status status =
      fit_time_model(recorded, bound.stage, bound.heads, CacheFormat::k16Bit, &model);
  ASSERT_OK(status);
  EXPECT_LT(model.decode.median_error, bound.median) << model.describe();
  EXPECT_LT(model.decode.worst_error, bound.worst) << model.describe();
  EXPECT_GT(model.append_us[0], 1);
  EXPECT_LT(model.append_us[0], 20);
  EXPECT_EQ(model.plan_us[0] > 0, model.stage >= "04");
  // The same error, computed from the recording instead of taken from the fit.
  const RecordedEntry* entry =
      recorded.find(model.stage, "h" + std::to_string(bound.heads) + "_q1_b128_k8192", "sustained");
  ASSERT_NE(entry, nullptr);
  EXPECT_NEAR(model.decode.us({128, 128 * 8192, 8192}) / entry->us, 1, bound.worst);
}

INSTANTIATE_TEST_SUITE_P(Stages, RecordedFit,
                         testing::Values(Bound{"02", 128, 0.12, 0.3}, Bound{"02", 16, 0.1, 0.25},
                                         Bound{"03", 128, 0.05, 0.3}, Bound{"03", 16, 0.05, 0.1},
                                         Bound{"07_tma_pipeline", 128, 0.08, 0.15},
                                         Bound{"08", 128, 0.05, 0.15}, Bound{"08", 16, 0.05, 0.1}),
                         [](const auto& bound) {
                           return "s" + std::string(bound.param.stage).substr(0, 2) + "_h" +
                                  std::to_string(bound.param.heads);
                         });

TEST(Model, WithoutRecordedTimesIsRefused) {
  Recorded recorded;
  ASSERT_OK(load_newest_recorded(&recorded));
  TimeModel model;
  for (const auto& [stage, heads] : {std::pair("08", 3), std::pair("77", 128)}) {
    const Status status = fit_time_model(recorded, stage, heads, CacheFormat::k16Bit, &model);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("recorded times of stage " + std::string(stage)),
              std::string::npos);
  }
  // Malformed names of appends are passed over. Where no append is recorded, appends take no time.
  const auto is_append = [](const RecordedEntry& entry) { return entry.stage == "cache"; };
  std::erase_if(recorded.entries, is_append);
  for (const char* name : {"append_b0_t1", "append_b1_t-1", "append_", "host_append_b1_t1"}) {
    recorded.entries.push_back({"cache", name, "sustained", 3, {}});
  }
  ASSERT_OK(fit_time_model(recorded, "08", 128, CacheFormat::k16Bit, &model));
  EXPECT_EQ(model.append_us[0], 0);
  EXPECT_NE(model.describe().find("appends: none are recorded"), std::string::npos);
}

// Each format is fitted to its own times alone: of decodes, plans and appends.
TEST(Model, FormatsAreFittedApart) {
  Recorded recorded;
  const auto add = [&](const char* stage, const std::string& shape, const char* mode, double us) {
    recorded.entries.push_back({stage, shape, mode, us, {}});
  };
  for (const auto& [format, factor] : {std::pair("", 1.0), std::pair("_fp8_tile128", 0.5)}) {
    for (const int batch : {1, 16, 64, 256}) {
      const std::string shape = "h16_q1_b" + std::to_string(batch) + "_k4096" + format;
      add("13_quantised_mma", shape, "sustained", factor * (10 + batch));
      add("13_quantised_mma", shape, "plan", factor * 4);
    }
    const std::string cache = *format == 0 ? "" : std::string(format + 1) + "_";
    for (const int batch : {1, 64}) {
      add("cache", cache + "append_b" + std::to_string(batch) + "_t1", "sustained", factor * 6);
    }
  }
  TimeModel plain, quantised;
  ASSERT_OK(fit_time_model(recorded, "13", 16, CacheFormat::k16Bit, &plain));
  ASSERT_OK(fit_time_model(recorded, "13", 16, CacheFormat::kFp8Tile128, &quantised));
  StepWork work;
  work.sequences.resize(64, {0, 4095, 1, 4096, {}});
  EXPECT_NEAR(plain.step_us(work, 2), 4 + 2 * (74 + 6), 1e-6);
  EXPECT_NEAR(quantised.step_us(work, 2), 2 + 2 * (37 + 3), 1e-6);
  const Status status = fit_time_model(recorded, "13", 16, CacheFormat::kFp8Tensor, &plain);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("0 recorded times of stage 13 with 16 heads and a cache of "
                                  "fp8_tensor, and needs 4"),
            std::string::npos)
      << status.to_string();
}

TEST(Model, SaysWhatIsNotRecorded) {
  TimeModel model;
  EXPECT_EQ(model.not_recorded(true), "plans, appends");
  EXPECT_EQ(model.not_recorded(false), "appends");
  model.append_us[2] = 0.1;
  EXPECT_EQ(model.not_recorded(true), "plans");
  model.plan_us[1] = 0.1;
  EXPECT_EQ(model.not_recorded(true), "");
}

TEST(Model, AStepIsThePlanAndEveryLayersAppendAndDecode) {
  TimeModel model;
  model.decode.a = 10;
  model.decode.b = 1;
  model.decode.c = 0.01;
  model.plan_us[0] = 5;
  model.plan_us[1] = 0.5;
  model.append_us[0] = 3;
  model.append_us[1] = 0.1;
  model.append_us[2] = 0.01;
  StepWork work;
  work.sequences = {{0, 99, 1, 100, {}}, {1, 0, 200, 200, {}}};
  // 26 runs, 201 rows, 300 tokens.
  const double layer = 3 + 2.6 + 2.01 + 10 + 2 + 3;
  EXPECT_NEAR(model.step_us(work, 4), 6 + 4 * layer, 1e-9);
  SimulatedEngine engine(model, 4);
  double seconds = 0;
  ASSERT_OK(engine.step(work, &seconds));
  EXPECT_NEAR(seconds, (6 + 4 * layer) * 1e-6, 1e-12);
}

// ---- a run ----

/// Its steps take the time that the test says. In each it also checks the work it is given.
class FakeEngine final : public Engine {
 public:
  explicit FakeEngine(double a, double per_sequence = 0) : a_(a), b_(per_sequence) {}
  Status step(const StepWork& work, double* seconds) override {
    if (scheduler != nullptr) {
      const RequestCounts counts = scheduler->counts();
      EXPECT_EQ(counts.arrived,
                counts.finished + counts.rejected_total() + counts.queued + counts.running);
    }
    *seconds = a_ + b_ * double(work.sequences.size());
    return {};
  }
  const Scheduler* scheduler = nullptr;

 private:
  double a_, b_;
};

std::unique_ptr<PagedScheduler> paged(const SchedulerLimits& limits) {
  std::unique_ptr<PagedScheduler> scheduler;
  EXPECT_OK(PagedScheduler::create(limits, &scheduler));
  return scheduler;
}

TEST(Run, FiguresOfOneThatWorksOutByHand) {
  // Two requests are under way. Request 0 has 63 tokens and one more to come, request 1 has no
  // token and two to come. A step takes 0.5 s, and no more requests arrive.
  const auto scheduler = paged({.num_pages = 10, .max_batch = 2});
  FakeEngine engine(0.5);
  const std::vector<Request> under_way{
      {.id = 0, .arrival = -1, .prompt = 60, .output = 4, .generated = 3},
      {.id = 1, .prompt = 0, .output = 2}};
  Figures figures;
  ASSERT_OK(run_service({.requests = 0}, under_way, RequestStream({1, {1, 0}, {1, 0}}, 1),
                        *scheduler, engine, &figures));
  EXPECT_EQ(figures.counts.arrived, 2);
  EXPECT_EQ(figures.counts.finished, 2);
  EXPECT_EQ(figures.steps, 2);
  EXPECT_DOUBLE_EQ(figures.span, 1);
  EXPECT_EQ(figures.tokens, 3);
  EXPECT_DOUBLE_EQ(figures.tokens_per_s, 3);
  EXPECT_DOUBLE_EQ(figures.step_ms_mean, 500);
  // Of request 0's only token, counted from the beginning, and of request 1's second one.
  EXPECT_DOUBLE_EQ(figures.token_ms_mean, 500);
  EXPECT_DOUBLE_EQ(figures.first_token_ms_p50, 500);
  EXPECT_DOUBLE_EQ(figures.batch_mean, 1.5);
  EXPECT_EQ(figures.pages_peak, 2);
  EXPECT_DOUBLE_EQ(figures.pages_mean, 1.5);
  // For half a second 64 + 1 of 128 rows are used, for another half 2 of 64.
  EXPECT_DOUBLE_EQ(figures.waste_share, 1 - 67.0 / 192);
  EXPECT_EQ(figures.queue_max, 0);
}

TEST(Run, WaitsInTheQueueAreCounted) {
  const auto scheduler = paged({.num_pages = 10, .max_batch = 1, .max_queue = 1});
  FakeEngine engine(1);
  const std::vector<Request> under_way{{.id = 0, .output = 2}, {.id = 1, .output = 1}};
  Figures figures;
  ASSERT_OK(run_service({.requests = 0}, under_way, RequestStream({1, {1, 0}, {1, 0}}, 1),
                        *scheduler, engine, &figures));
  EXPECT_DOUBLE_EQ(figures.span, 3);
  EXPECT_DOUBLE_EQ(figures.queue_mean, 2.0 / 3);
  EXPECT_EQ(figures.queue_max, 1);
  EXPECT_DOUBLE_EQ(figures.first_token_ms_p99, 1000 + 0.99 * 2000);  // 1 s and 3 s
}

TEST(Run, WhoeverArrivesDuringAStepWaitsFromThenOn) {
  const auto scheduler = paged({.num_pages = 10, .max_batch = 1});
  const RequestStream stream({1, {1, 0}, {1, 0}}, 1, 1);
  const double arrival = stream.peek().arrival;
  FakeEngine engine(2 * arrival);
  const std::vector<Request> under_way{{.id = 0, .output = 2}};
  Figures figures;
  ASSERT_OK(run_service({.requests = 1}, under_way, stream, *scheduler, engine, &figures));
  EXPECT_DOUBLE_EQ(figures.span, 6 * arrival);
  // In units of `arrival`: the request waits from 1 to 4 of 6; the first tokens take 2 and 5.
  EXPECT_DOUBLE_EQ(figures.queue_mean, 0.5);
  EXPECT_DOUBLE_EQ(figures.first_token_ms_p99, 1e3 * arrival * (2 + 0.99 * 3));
}

TEST(Run, TheClockJumpsWhileNothingRuns) {
  const auto scheduler = paged({.num_pages = 10});
  FakeEngine engine(1e-6);
  engine.scheduler = scheduler.get();
  Figures figures;
  ASSERT_OK(run_service({.seconds = 1000}, {}, RequestStream({0.1, {10, 0}, {5, 0}}, 1), *scheduler,
                        engine, &figures));
  EXPECT_NEAR(double(figures.counts.arrived), 100, 35);
  EXPECT_EQ(figures.counts.finished, figures.counts.arrived);
  EXPECT_EQ(figures.steps, 5 * figures.counts.finished);
  EXPECT_DOUBLE_EQ(figures.span, 1000);
}

TEST(Run, OverloadIsReportedAsItIs) {
  const auto scheduler = paged({.num_pages = 5, .max_batch = 4, .max_queue = 5});
  FakeEngine engine(0.1);
  engine.scheduler = scheduler.get();
  Figures figures;
  ASSERT_OK(run_service({.seconds = 30}, {}, RequestStream({20, {50, 20}, {80, 40}}, 1), *scheduler,
                        engine, &figures));
  const RequestCounts& counts = figures.counts;
  EXPECT_GT(counts.rejected[size_t(Rejection::kQueueFull)], 50);
  EXPECT_GT(counts.preemptions, 0);
  EXPECT_GT(counts.running, 0);
  EXPECT_GT(counts.queued, 0);
  EXPECT_EQ(counts.arrived,
            counts.finished + counts.rejected_total() + counts.queued + counts.running);
  EXPECT_LE(figures.pages_peak, 5);
  EXPECT_GT(figures.token_ms_mean, 100.01);  // preempted requests waited longer than a step
}

TEST(Run, RequestsAreTimedFromTheirArrivalToTheirEnd) {
  // Three arrive as the run begins. One was under way before, so its time is not known.
  const auto scheduler = paged({.num_pages = 10, .max_batch = 2});
  FakeEngine engine(1);
  const std::vector<Request> under_way{
      {.id = 0, .arrival = -1, .prompt = 5, .output = 9, .generated = 8},
      {.id = 1, .output = 2},
      {.id = 2, .output = 1},
      {.id = 3, .output = 3}};
  Figures figures;
  ASSERT_OK(run_service({.requests = 0}, under_way, RequestStream({1, {1, 0}, {1, 0}}, 1),
                        *scheduler, engine, &figures));
  EXPECT_EQ(figures.requests_timed, 3);
  EXPECT_DOUBLE_EQ(figures.request_ms_mean, (2 + 2 + 5) * 1000 / 3.0);
  EXPECT_DOUBLE_EQ(figures.request_ms_p50, 2000);
  EXPECT_TRUE(std::isnan(figures.request_ms_p99)) << "of three";
  EXPECT_DOUBLE_EQ(figures.busy_share, 1);
}

TEST(Run, AP99IsKnownOfAHundredRequests) {
  const auto scheduler = paged({.num_pages = 10});
  FakeEngine engine(0.001);
  Figures figures;
  ASSERT_OK(run_service({.requests = 100}, {}, RequestStream({1, {1, 0}, {2, 0}}, 1), *scheduler,
                        engine, &figures));
  EXPECT_EQ(figures.requests_timed, 100);
  EXPECT_GE(figures.request_ms_p99, 2);
  EXPECT_LT(figures.request_ms_p99, 5);
  EXPECT_NEAR(figures.busy_share, 0.2 / figures.span, 1e-3);
}

TEST(Run, AlertsSayWhatWasPassedAndWhen) {
  // Steps take 40 ms, and 60 ms after the first second. A window is half a second.
  class Slower final : public Engine {
   public:
    Status step(const StepWork&, double* seconds) override {
      *seconds = now_ < 1 ? 0.04 : 0.06;
      now_ += *seconds;
      return {};
    }

   private:
    double now_ = 0;
  };
  const auto run = [](const Thresholds& thresholds) {
    const auto scheduler = paged({.num_pages = 10, .max_batch = 1});
    Slower engine;
    const std::vector<Request> under_way{{.id = 0, .output = 500}, {.id = 1, .output = 1}};
    Figures figures;
    EXPECT_OK(run_service({.seconds = 2, .requests = 0, .thresholds = thresholds, .window = 0.5},
                          under_way, RequestStream({1, {1, 0}, {1, 0}}, 1), *scheduler, engine,
                          &figures));
    return figures.alerts;
  };
  EXPECT_TRUE(run({.token_ms_mean = 61, .token_ms_p99 = 61}).empty());
  auto alerts = run({.token_ms_mean = 50, .token_ms_p99 = 61});
  ASSERT_EQ(alerts.size(), 2u);
  EXPECT_EQ(alerts[0].what, "token mean, ms");
  EXPECT_DOUBLE_EQ(alerts[0].time, 1.5);
  EXPECT_NEAR(alerts[0].value, 60, 1e-6);
  EXPECT_DOUBLE_EQ(alerts[0].threshold, 50);
  EXPECT_EQ(run({.token_ms_mean = 61, .token_ms_p99 = 50}).size(), 2u);
  alerts = run({.token_ms_mean = 61, .token_ms_p99 = 61, .queue = 0.5});
  ASSERT_EQ(alerts.size(), 4u);
  EXPECT_EQ(alerts[3].what, "queue");
  EXPECT_EQ(run({.token_ms_mean = 61, .token_ms_p99 = 61, .pages_share = 0.05}).size(), 4u);
}

TEST(Run, TheHostsTimeCountsWhereStepsAreReal) {
  class SlowBooks final : public Scheduler {
   public:
    SlowBooks() : Scheduler({.num_pages = 10}) {}
    Status begin_step(StepWork* work) override {
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      work->sequences.assign(left_ > 0 ? 1 : 0, {0, 0, 1, 1, {}});
      return {};
    }
    Status end_step(std::vector<GeneratedToken>* tokens) override {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      tokens->assign(1, {{.id = 0, .output = 3, .generated = 4 - left_--}});
      return {};
    }
    Holding holding() const override { return {}; }

   private:
    int64_t running() const override { return 0; }
    int64_t left_ = 3;
  };
  class Real final : public Engine {
   public:
    Status step(const StepWork&, double* seconds) override {
      *seconds = 1;
      return {};
    }
    bool counts_host_time() const override { return counts; }
    bool counts = true;
  };
  Real engine;
  Figures figures;
  for (const bool counts : {true, false}) {
    SlowBooks scheduler;
    engine.counts = counts;
    ASSERT_OK(run_service({.requests = 0}, {}, RequestStream({1, {1, 0}, {1, 0}}, 1), scheduler,
                          engine, &figures));
    EXPECT_EQ(figures.steps, 3);
    if (counts) {  // what the host does after the last step is in no step
      EXPECT_GE(figures.span, 3 + 3 * 0.003 + 2 * 0.002);
    } else {
      EXPECT_DOUBLE_EQ(figures.span, 3);
    }
  }
}

TEST(Run, NeedsAnEndAndTimes) {
  const auto scheduler = paged({.num_pages = 10});
  const RequestStream stream({1, {1, 0}, {1, 0}}, 1);
  FakeEngine engine(1), broken(NAN);
  Figures figures;
  EXPECT_FALSE(run_service({}, {}, stream, *scheduler, engine, &figures).ok());
  EXPECT_FALSE(run_service({.seconds = -1}, {}, stream, *scheduler, engine, &figures).ok());
  EXPECT_FALSE(run_service({.requests = 1}, {}, stream, *scheduler, broken, &figures).ok());
  EXPECT_FALSE(
      run_service({.requests = 1, .window = 0}, {}, stream, *scheduler, engine, &figures).ok());
}

TEST(Balance, IsWhereStepsGenerateWhatArrives) {
  // batch = rate * output * (a + b * batch): 20 * 10 * (0.01 + 0.004 batch) = batch, so 10.
  const Workload workload{20, {100, 0}, {10, 0}};
  FakeEngine engine(0.01, 0.004);
  int64_t population = 0;
  ASSERT_OK(
      population_in_balance(workload, {.num_pages = 1000, .max_batch = 64}, engine, &population));
  EXPECT_EQ(population, 10);
  ASSERT_OK(
      population_in_balance(workload, {.num_pages = 1000, .max_batch = 7}, engine, &population));
  EXPECT_EQ(population, 7);  // overloaded: the batch is full
  ASSERT_OK(
      population_in_balance(workload, {.num_pages = 9, .max_batch = 64}, engine, &population));
  EXPECT_EQ(population, 4);  // nine pages hold four sequences of two
}

// ---- scenarios and results ----

TEST(Scenarios, AreAllInOrder) {
  std::vector<Scenario> all;
  ASSERT_OK(select_scenarios("all", &all));
  EXPECT_EQ(all.size(), scenarios().size() - 1);
  for (const Scenario& scenario : scenarios()) {
    const Status status = validate(scenario);
    EXPECT_OK(status) << scenario.name << ": " << status.to_string();
    std::unique_ptr<StaticScheduler> fixed;
    EXPECT_OK(StaticScheduler::create(limits_of(scenario), &fixed)) << scenario.name;
  }
  EXPECT_EQ(select_scenarios("service,nonesuch", &all).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(select_scenarios("", &all).code(), StatusCode::kInvalidArgument);
}

TEST(Scenarios, TakeAModelsHeadsAndLayersOrSayWhyNot) {
  Scenario scenario;
  ASSERT_OK(use_model("deepseek_v2_lite", &scenario));
  EXPECT_EQ(scenario.heads, 16);
  EXPECT_EQ(scenario.layers, 27);
  ASSERT_OK(use_model("deepseek_v2", &scenario));
  EXPECT_EQ(scenario.heads, 128);
  EXPECT_EQ(scenario.layers, 60);
  const Status grouped = use_model("llama_2_70b", &scenario);
  EXPECT_EQ(grouped.code(), StatusCode::kUnsupported);
  EXPECT_NE(grouped.message().find("llama_2_70b has 8 heads of keys"), std::string::npos);
  EXPECT_NE(grouped.message().find("mla_traditional"), std::string::npos);
  EXPECT_EQ(use_model("nonesuch", &scenario).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(scenario.layers, 60);
}

// A page has 64 rows in every layer, and the format says how many bytes a row has.
TEST(Scenarios, MemoryHoldsPagesByTheFormatsBytes) {
  const auto found = std::find_if(scenarios().begin(), scenarios().end(), [](const Scenario& one) {
    return one.name == "small_device_full";
  });
  ASSERT_NE(found, scenarios().end());
  std::vector<Scenario> all(4, *found);
  const int64_t rows[] = {1152, 656, 576, 656};
  for (size_t i = 0; i < 4; ++i) {
    all[i].cache_format = kCacheFormats[i];
    EXPECT_EQ(all[i].token_bytes(), 27 * rows[i]);
    EXPECT_EQ(all[i].page_bytes(), 27 * 64 * rows[i]);
    EXPECT_EQ(all[i].num_pages(), (int64_t{2} << 30) / (27 * 64 * rows[i]));
    EXPECT_EQ(limits_of(all[i]).num_pages, all[i].num_pages());
  }
  // 8192 tokens and half of 256 are 130 pages; a buffer of 32768 tokens has 512. The 64 places are
  // not the limit.
  EXPECT_EQ(most_half_way(all[0].workload, limits_of(all[0])), 1078 / 130);
  EXPECT_EQ(most_half_way(all[1].workload, limits_of(all[1])), 1894 / 130);
  EXPECT_EQ(most_half_way(all[2].workload, limits_of(all[2])), 2157 / 130);
  const std::string text = compare_memory(all);
  for (const char* line :
       {"16bit 31104 1078 68992 8 2", "fp8_tile128 17712 1894 121216 14 3",
        "fp8_tensor 15552 2157 138048 16 4", "int8_tile128 17712 1894 121216 14 3"}) {
    EXPECT_TRUE(std::regex_search(
        text, std::regex(std::regex_replace(std::string(line), std::regex(" "), " +"))))
        << line << "\n"
        << text;
  }
  EXPECT_EQ(title(all[0]), "small_device_full");
  EXPECT_EQ(title(all[1]), "small_device_full, fp8_tile128");
}

// Each format is compared with the first one, separately for each way to serve.
TEST(Report, FormatsAreCompared) {
  std::vector<ServiceRun> runs;
  for (const auto& [format, stage, tokens] :
       {std::tuple(CacheFormat::k16Bit, "10_few_heads", 100.0),
        std::tuple(CacheFormat::kFp8Tensor, "12_fp8", 150.0)}) {
    for (const auto& [way, factor] : {std::pair("paged", 4.0), std::pair("static", 1.0)}) {
      ServiceRun run{scenarios().front(), way, stage, {}};
      run.scenario.cache_format = format;
      run.figures.tokens_per_s = tokens * factor;
      runs.push_back(run);
    }
  }
  const std::string text = compare_formats(runs, "a clock");
  for (const char* line :
       {"paged, 10 +16bit .* 400 +1.00x", "paged, 12 +fp8_tensor .* 600 +1.50x",
        "static, 10 +16bit .* 100 +1.00x", "static, 12 +fp8_tensor .* 150 +1.50x"}) {
    EXPECT_TRUE(std::regex_search(text, std::regex(line))) << line << "\n" << text;
  }
  EXPECT_LT(text.find("paged, 12"), text.find("static, 10"));
  EXPECT_EQ(compare_formats({runs[0], runs[1]}, "a clock"), "");
  EXPECT_NE(compare_runs({runs[2], runs[3]}, "a clock", "").find("service, fp8_tensor, a clock"),
            std::string::npos);
}

// For each scenario and format, the newest recording that has it is used.
TEST(Report, TheNewestRecordingOfAScenarioAndFormatCounts) {
  const std::filesystem::path folder = testing::TempDir() + "/service_recordings";
  std::filesystem::create_directories(folder);
  const auto record = [&](const char* day, const Scenario& scenario, double tokens,
                          const char* values = "as listed") {
    ServiceRun run{scenario, "paged", "08_seesaw", {}};
    run.figures.tokens_per_s = tokens;
    ASSERT_OK(write_runs(folder / (std::string(day) + ".json"),
                         {{"schema", kServiceSchema},
                          {"clock", "gpu"},
                          {"gpu", "a GPU"},
                          {"commit", "c"},
                          {"date_utc", day},
                          {"scenarios", values},
                          {"seed", "1"}},
                         {run}));
  };
  Scenario plain = scenarios().front(), quantised = plain, other = scenarios().back();
  quantised.cache_format = CacheFormat::kFp8Tensor;
  record("2026-01-01", plain, 1);
  record("2026-01-02", plain, 2);
  record("2026-01-03", quantised, 3);
  record("2026-01-04", plain, 4, "changed");
  for (const auto& [scenario, tokens] : {std::pair(plain, 2.0), std::pair(quantised, 3.0)}) {
    const RecordedService newest = load_newest_service(folder, scenario);
    const auto* run = newest.find(scenario, "paged", "08_seesaw");
    ASSERT_NE(run, nullptr);
    EXPECT_EQ(run->figures.at("tokens_per_s"), tokens);
  }
  EXPECT_TRUE(load_newest_service(folder, other).runs.empty());
  std::filesystem::remove_all(folder);
}

TEST(Report, TargetsCostAndAlertsAreSaid) {
  ServiceRun run{scenarios().front(), "paged", "08_seesaw", {}};
  run.figures.token_ms_mean = 40;
  run.figures.token_ms_p99 = 120;
  run.figures.tokens_per_s = 100;
  run.figures.alerts = {{1.5, "queue", 12, 10}, {2, "queue", 13, 10}};
  run.price_per_hour = 3.6;
  std::string text = compare_runs({run}, "a clock", "");
  EXPECT_NE(text.find("missed: p99"), std::string::npos) << text;
  EXPECT_NE(text.find("cost of 1000 tokens, at 3.6 per hour  0.01"), std::string::npos) << text;
  EXPECT_NE(text.find("the first alert at 1.5 s: queue 12.0 > 10"), std::string::npos) << text;
  EXPECT_EQ(text.find("power"), std::string::npos) << "no GPU was read";
  EXPECT_EQ(text.find("prefixes"), std::string::npos);
  run.targets = {.token_ms_mean = 30, .token_ms_p99 = 130};
  run.figures.power_w = 500;
  run.scenario.workload.prefixes = {1, 64};
  run.figures.counts.prompts = 4;
  run.figures.counts.prefix_hits = 3;
  run.figures.counts.prompt_tokens = 400;
  run.figures.counts.prefix_hit_tokens = 100;
  text = compare_runs({run}, "a clock", "");
  EXPECT_NE(text.find("missed: mean"), std::string::npos) << text;
  EXPECT_NE(text.find("power, W"), std::string::npos) << text;
  EXPECT_EQ(text.find("budget"), std::string::npos) << text;
  for (const auto& [watt, verdict] : {std::pair(500.0, "kept"), std::pair(499.0, "passed")}) {
    run.targets.power_w = watt;
    text = compare_runs({run}, "a clock", "");
    EXPECT_TRUE(
        std::regex_search(text, std::regex(fmt::format("budget of {:g} W +{}", watt, verdict))))
        << text;
  }
  run.figures.power_w = kUnknown;
  EXPECT_NE(compare_runs({run}, "a clock", "").find("power is not read"), std::string::npos);
  EXPECT_NE(text.find("75%, 25%"), std::string::npos) << text;
  run.targets = {};
  run.figures.token_ms_p99 = 99;
  EXPECT_NE(compare_runs({run}, "a clock", "").find(" met\n"), std::string::npos);
}

// ---- experiments ----

TEST(Pairs, AreToldApartByStudentsT) {
  // Differences 10%, 20%, 30%: mean 20%, deviation 10%, t of two degrees 4.303.
  const double base[] = {1, 10, 100}, other[] = {1.1, 12, 130};
  const PairedDifference difference = paired_difference(base, other);
  EXPECT_EQ(difference.pairs, 3);
  EXPECT_NEAR(difference.mean, 0.2, 1e-12);
  EXPECT_NEAR(difference.half_width, 4.303 * 0.1 / std::sqrt(3), 1e-9);
  EXPECT_FALSE(difference.is_told());
  const double close[] = {1.19, 12, 121};
  EXPECT_TRUE(paired_difference(base, close).is_told());
  EXPECT_FALSE(paired_difference({base, 1}, {other, 1}).is_told()) << "one pair tells nothing";
  const double unknown[] = {1, kUnknown, 100};
  EXPECT_EQ(paired_difference(base, unknown).pairs, 2);
  const std::vector<double> many(100, 1.0);
  EXPECT_EQ(paired_difference(many, many).half_width, 0);
}

TEST(Pairs, TheVerdictNamesTheBetterOne) {
  std::vector<ServiceRun> a(3, {scenarios().front(), "paged", "08_seesaw", {}}), b = a;
  for (size_t i = 0; i < 3; ++i) {
    a[i].figures.token_ms_mean = 10 + double(i);
    b[i].figures.token_ms_mean = 0.9 * a[i].figures.token_ms_mean + 0.01 * double(i);
    a[i].figures.tokens_per_s = 100;
    b[i].figures.tokens_per_s = 90 - double(i);
    a[i].figures.step_ms_mean = b[i].figures.step_ms_mean = 5;
  }
  const std::string text = compare_pairs("first", a, "second", b, "a clock");
  EXPECT_NE(
      text.find(
          "3 pairs of runs, the same requests in both runs of a pair. By the mean time between "
          "tokens: second is better; the time of second differs by -9.9%"),
      std::string::npos)
      << text;
  const auto line = [&](const std::string& title) {
    const size_t begin = text.find(title);
    return text.substr(begin, text.find('\n', begin) - begin);
  };
  EXPECT_NE(line("tokens/s").find("first"), std::string::npos) << "more is better";
  EXPECT_NE(line("step, ms").find("not told apart"), std::string::npos);
  EXPECT_EQ(text.find("energy"), std::string::npos) << "not known";
}

TEST(Rollout, GoesOnWithoutAlertsAndBackWithOne) {
  constexpr double kShares[] = {0.05, 0.25, 1};
  std::vector<std::string> served;
  double worst_share = 2;  // from which on the new stage raises an alert
  const auto serve = [&](bool by_new, double from, double to, Figures* figures) -> Status {
    served.push_back(fmt::format("{} {:g}-{:g}", by_new ? "new" : "old", from, to));
    if (by_new && to >= worst_share) figures->alerts = {{0.5, "token p99, ms", 123, 100}};
    if (!by_new) figures->alerts = {{0.5, "queue", 5, 1}};  // alerts of the old stage stop nothing
    return {};
  };
  std::vector<RolloutPhase> phases;
  ASSERT_OK(run_rollout(kShares, serve, &phases));
  EXPECT_EQ(served, (std::vector<std::string>{"old 0.05-1", "new 0-0.05", "old 0.25-1",
                                              "new 0-0.25", "new 0-1"}));
  EXPECT_EQ(phases.size(), 3u);
  EXPECT_NE(describe_rollout("08", "09", phases, "a clock").find("09 serves all requests"),
            std::string::npos);
  served.clear();
  worst_share = 0.25;
  ASSERT_OK(run_rollout(kShares, serve, &phases));
  EXPECT_EQ(served, (std::vector<std::string>{"old 0.05-1", "new 0-0.05", "old 0.25-1",
                                              "new 0-0.25", "old 0-1"}));
  const std::string text = describe_rollout("08", "09", phases, "a clock");
  EXPECT_NE(
      text.find("09 was rolled back at 25%, because of alerts: 1, the first at 0.5 s: token p99, "
                "ms 123 > 100. 08 serves all requests again."),
      std::string::npos)
      << text;
  EXPECT_NE(text.find("0% on 09"), std::string::npos);
}

TEST(Report, UnknownFiguresAreNull) {
  const std::string path = testing::TempDir() + "/service_clock_test.json";
  ServiceRun run{scenarios().front(), "paged", "08_seesaw", {}};
  run.figures.counts.arrived = 1;
  run.figures.counts.rejected[size_t(Rejection::kTooLong)] = 1;
  ASSERT_OK(write_runs(path, {{"schema", "s"}}, {run}));
  std::ifstream stream(path);
  const auto json = nlohmann::json::parse(stream);
  std::filesystem::remove(path);
  EXPECT_EQ(json["context"]["schema"], "s");
  EXPECT_TRUE(json["context"]["gpu"].is_null());
  EXPECT_TRUE(json["runs"][0]["figures"]["step_ms_mean"].is_null());
  EXPECT_EQ(json["runs"][0]["figures"]["rejected"], 1);
  EXPECT_EQ(json["runs"][0]["rejected_by_reason"]["too_long"], 1);
  EXPECT_EQ(write_runs("/nonesuch/a.json", {}, {run}).code(), StatusCode::kFileError);
  ServiceRun other = run;
  other.way = "static";
  EXPECT_NE(compare_runs({run, other}, "a clock", "").find("static / paged"), std::string::npos);
  EXPECT_NE(compare_runs({run}, "a clock", "").find("1 (too_long)"), std::string::npos);
  run.figures.tokens_per_s = 120;
  EXPECT_NE(compare_runs({run}, "a clock", "a GPU").find("no run is recorded"), std::string::npos);
  run.recorded = {{"tokens_per_s", 100}};
  const std::string text = compare_runs({run}, "a clock", "a GPU");
  EXPECT_NE(text.find("120 (+20%)"), std::string::npos) << text;
  EXPECT_NE(text.find("the clock's error against a GPU"), std::string::npos) << text;
  EXPECT_EQ(text.find("no run is recorded"), std::string::npos) << text;
}

}  // namespace
}  // namespace mla::bench
