// A stage that gives a wrong result, or none, must not get a time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

#include "bench/measure/measure.h"
#include "bench/measure/present.h"
#include "reference/attention.h"
#include "reference/float16.h"
#include "stages/common/stage.h"
#include "tests/bench/measure/google_driver.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using Outcome = StageResult::Outcome;

const Stage& right_stage() {  // one that needs no plan to be right
  return *find_stage(MachineKind::kModel, "03");
}

/// Runs the right stage; what a wrong one then does to the outputs is up to it. Model memory is
/// host memory.
Status decode_right(const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, const DeviceLimits& limits, Stream stream) {
  return right_stage().decode(problem, tensors, plan, scratch, limits, stream);
}

Stage wrong_stage(decltype(Stage::decode) decode) {
  Stage stage = right_stage();
  stage.slug = "99_wrong";
  stage.decode = decode;
  return stage;
}

Shape shape_of(const std::string& name, Measure what = Measure::kTimes) {
  Shape shape;
  EXPECT_OK(parse_shape(name, &shape));
  shape.measure = what;
  return shape;
}

ShapeResult measure_by(GoogleBenchmark& google, const Shape& shape,
                       std::vector<const Stage*> chosen, const Ceilings& ceilings = {},
                       std::vector<const Stage*> peers = {}) {
  Progress progress;
  const auto runner = make_model_runner();
  return measure_shape(
      {model_machine(), *runner, std::move(chosen), std::move(peers), ceilings, progress, google},
      shape);
}

ShapeResult measure(const std::vector<const Stage*>& chosen,
                    const std::string& shape_name = "h4_q1_b2_k100", Measure what = Measure::kTimes,
                    const Ceilings& ceilings = {}, const std::vector<const Stage*>& peers = {}) {
  const Shape shape = shape_of(shape_name, what);
  const auto google = driver(benchmark_names(MachineKind::kModel, shape, chosen, peers));
  return measure_by(*google, shape, chosen, ceilings, peers);
}

const Stage& stage_with_plan() {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (stage.plan_shape != nullptr) return stage;
  }
  throw std::logic_error("no stage makes a plan");
}

TEST(Measure, ARightStageHasATimeAndAnError) {
  const ShapeResult result = measure({&right_stage()});
  const StageResult& entry = result.stages.front();
  EXPECT_EQ(entry.outcome, Outcome::kMeasured) << entry.reason;
  EXPECT_EQ(entry.cold.n, 3);
  EXPECT_GT(entry.cold.median, 0);
  EXPECT_GT(entry.check.out.relative_l2, 0);
  EXPECT_GT(result.reference_seconds, 0);
  EXPECT_TRUE(result.checked_whole);
}

/// Decodes by the reference, from a cache of any format.
Status decode_by_reference(const Problem& problem, const Tensors& tensors, const DevicePlan&, void*,
                           const DeviceLimits&, Stream) {
  ReferenceResult result;
  MLA_RETURN_IF_ERROR(reference_attention(problem, tensors, &result));
  for (int64_t i = 0; i < problem.out_elements(); ++i) {
    static_cast<bfloat16*>(tensors.out)[i] =
        from_float<bfloat16>(static_cast<float>(result.out[static_cast<size_t>(i)]));
  }
  for (int64_t i = 0; i < problem.lse_elements(); ++i) {
    tensors.lse[i] = static_cast<float>(result.lse[static_cast<size_t>(i)]);
  }
  return {};
}

TEST(Measure, AStageThatCannotReadTheCacheIsLeftOutWithAReason) {
  Stage able = wrong_stage(decode_by_reference);
  able.slug = "99_able";
  able.cache_formats = {CacheFormat::kFp8Tile128};
  for (const auto& [shape, in, out] :
       {std::tuple("h4_q1_b2_k100_fp8_tile128", "99_able", "03_online_softmax"),
        std::tuple("h4_q1_b2_k100", "03_online_softmax", "99_able")}) {
    const ShapeResult result = measure({&right_stage(), &able}, shape);
    ASSERT_EQ(result.stages.size(), 1u);
    EXPECT_EQ(result.stages[0].stage, in);
    EXPECT_EQ(result.stages[0].outcome, Outcome::kMeasured) << result.stages[0].reason;
    EXPECT_GT(result.stages[0].check.out.relative_l2, 0);
    EXPECT_EQ(result.unable, std::vector<std::string>{out});
    const std::string text = side_by_side(result, MachineKind::kModel);
    EXPECT_NE(text.find("cannot read a cache of"), std::string::npos) << text;
    const Stage* const both[] = {&right_stage(), &able};
    for (const std::string& name :
         benchmark_names(MachineKind::kModel, shape_of(shape), both, {})) {
      EXPECT_EQ(name.find(out), std::string::npos) << name;
    }
  }
  const ShapeResult plain = measure({&right_stage()});
  EXPECT_TRUE(plain.unable.empty());
  EXPECT_EQ(side_by_side(plain, MachineKind::kModel).find("cannot read"), std::string::npos);
}

TEST(Measure, WrongResultsHaveNoTime) {
  const auto untouched = [](const Problem&, const Tensors&, const DevicePlan&, void*,
                            const DeviceLimits&, Stream) { return Status(); };
  const auto one_wrong_element = [](const Problem& problem, const Tensors& tensors,
                                    const DevicePlan& plan, void* scratch,
                                    const DeviceLimits& limits, Stream stream) {
    MLA_RETURN_IF_ERROR(decode_right(problem, tensors, plan, scratch, limits, stream));
    static_cast<uint16_t*>(tensors.out)[777] ^= 0x8000;
    return Status();
  };
  const auto shifted_lse = [](const Problem& problem, const Tensors& tensors,
                              const DevicePlan& plan, void* scratch, const DeviceLimits& limits,
                              Stream stream) {
    MLA_RETURN_IF_ERROR(decode_right(problem, tensors, plan, scratch, limits, stream));
    tensors.lse[3] += 0.01f;
    return Status();
  };
  for (const Stage& wrong :
       {wrong_stage(untouched), wrong_stage(one_wrong_element), wrong_stage(shifted_lse)}) {
    const ShapeResult result = measure({&wrong, &right_stage()});
    const StageResult& entry = result.stages[0];
    EXPECT_EQ(entry.outcome, Outcome::kFailed);
    EXPECT_EQ(entry.cold.n, 0);
    EXPECT_NE(entry.reason.find("wrong result"), std::string::npos) << entry.reason;
    EXPECT_NE(side_by_side(result, MachineKind::kModel).find("FAILED"), std::string::npos);
    EXPECT_EQ(result.stages[1].outcome, Outcome::kMeasured);
    EXPECT_TRUE(std::isnan(result.stages[1].cold_speedup));  // there is no stage before with a time
    std::ostringstream samples;
    write_samples({result}, samples);
    EXPECT_EQ(samples.str().find("99_wrong"), std::string::npos);
  }
}

TEST(Measure, AResultThatChangesInTheTimedRunsHasNoTime) {
  static int runs;
  runs = 0;
  const Stage unsteady =
      wrong_stage([](const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                     void* scratch, const DeviceLimits& limits, Stream stream) {
        MLA_RETURN_IF_ERROR(decode_right(problem, tensors, plan, scratch, limits, stream));
        // The checks come first: needle and flat data, each with a plan made before and with one
        // made together with the decode.
        if (++runs > (right_stage().plan_shape != nullptr ? 4 : 2))
          static_cast<uint16_t*>(tensors.out)[777] ^= 1;
        return Status();
      });
  const Shape shape = shape_of("h4_q1_b2_k100");
  const std::vector<const Stage*> chosen{&unsteady};
  const auto google = driver(benchmark_names(MachineKind::kModel, shape, chosen, {}));
  const StageResult entry = measure_by(*google, shape, chosen).stages.front();
  const auto reported = nlohmann::json::parse(google->json({}))["benchmarks"];
  ASSERT_EQ(reported.size(), 3u) << reported.dump(1);  // two of the reference, and the reason
  EXPECT_TRUE(reported[2].value("error_occurred", false) || reported[2].contains("skipped"));
  EXPECT_EQ(entry.outcome, Outcome::kFailed);
  EXPECT_NE(entry.reason.find("other bits"), std::string::npos) << entry.reason;
}

TEST(Measure, MemoryMeanAndVarianceAreReported) {
  const Stage& stage = stage_with_plan();
  const Shape shape = shape_of("h4_q1_b2_k100");
  const std::vector<const Stage*> chosen{&stage};
  const auto google = driver(benchmark_names(MachineKind::kModel, shape, chosen, {}));
  const ShapeResult result = measure_by(*google, shape, chosen);
  const Problem problem = make_data_set(shape.spec).problem;
  const double cache = double(problem.num_pages) * 64 * 1152;
  const double others = 2 * 4 * (576 * 2 + 512 * 2 + 4) + 2 * 4 * (problem.max_pages_per_seq + 1);
  EXPECT_EQ(result.cache_bytes, cache);
  EXPECT_EQ(result.tensor_bytes, cache + others);
  WorkspaceBytes needed;
  ASSERT_OK(workspace_bytes(stage, problem, model_machine().limits(), &needed));
  EXPECT_GT(needed.total(), 0u);
  EXPECT_EQ(result.stages[0].workspace_bytes, needed.total());
  const auto reported = nlohmann::json::parse(google->json({}))["benchmarks"];
  const auto found = std::find_if(reported.begin(), reported.end(), [&](const auto& entry) {
    return entry["name"].template get<std::string>().starts_with(stage.slug) &&
           entry.value("aggregate_name", "") == "samples";
  });
  ASSERT_NE(found, reported.end());
  EXPECT_EQ((*found)["cache_bytes"], cache);
  EXPECT_EQ((*found)["peak_bytes"], cache + others + double(needed.total()));
  const Summary& cold = result.stages[0].cold;
  EXPECT_DOUBLE_EQ((*found)["mean_us"], cold.mean);
  EXPECT_GT(cold.variance, 0);
  EXPECT_DOUBLE_EQ((*found)["variance_us2"], cold.variance);
}

TEST(Measure, OnlyWhatIsChosenIsDone) {
  const Stage& planned = stage_with_plan();
  const Shape shape = shape_of("h4_q1_b2_k100");
  const std::vector<const Stage*> both{&right_stage(), &planned};
  const auto google = driver(benchmark_names(MachineKind::kModel, shape, both, {}),
                             {"--benchmark_filter=^" + planned.slug + ".*/plan/"});
  EXPECT_EQ(google->listing(), planned.slug + "/h4_q1_b2_k100/plan/manual_time\n");
  const ShapeResult result = measure_by(*google, shape, both);
  ASSERT_EQ(result.stages.size(), 1u);
  EXPECT_EQ(result.stages[0].stage, planned.slug);
  EXPECT_EQ(result.stages[0].cold.n, 0);
  EXPECT_EQ(result.stages[0].plan.alone.size(), 3u);
}

TEST(Measure, AStageForOtherHardwareSaysSo) {
  Stage other = right_stage();
  other.min_compute_capability = 123;
  const ShapeResult result = measure({&other});
  EXPECT_EQ(result.stages[0].outcome, Outcome::kCannotRun);
  EXPECT_NE(result.stages[0].reason.find("12.3"), std::string::npos);
}

TEST(Measure, AnErrorIsReportedWithItsMessage) {
  const Stage broken =
      wrong_stage([](const Problem&, const Tensors&, const DevicePlan&, void*, const DeviceLimits&,
                     Stream) { return Status(StatusCode::kCudaError, "a made-up error"); });
  const ShapeResult result = measure({&broken});
  EXPECT_EQ(result.stages[0].outcome, Outcome::kFailed);
  EXPECT_NE(result.stages[0].reason.find("a made-up error"), std::string::npos);
}

TEST(Measure, APlanIsTimedApart) {
  const ShapeResult result = measure({&stages(MachineKind::kModel).front(), &stage_with_plan()});
  EXPECT_TRUE(result.stages[0].plan.alone.empty());
  EXPECT_TRUE(std::isnan(result.stages[0].plan.marginal_us));
  const StageResult& entry = result.stages[1];
  EXPECT_EQ(entry.outcome, Outcome::kMeasured) << entry.reason;
  EXPECT_EQ(entry.plan.alone.size(), 3u);
  EXPECT_EQ(entry.plan.with_decode.cold.size(), 3u);
  EXPECT_FALSE(std::isnan(entry.plan.marginal_us));
  EXPECT_NE(side_by_side(result, MachineKind::kGpu).find("plan and decode, cold, "),
            std::string::npos);
  std::ostringstream samples;
  write_samples({result}, samples);
  EXPECT_NE(samples.str().find(entry.stage + ",h4_q1_b2_k100,plan,0,"), std::string::npos);
  EXPECT_NE(samples.str().find(entry.stage + ",h4_q1_b2_k100,plan+decode,2,"), std::string::npos);
}

TEST(Measure, InterleavedStagesKeepTheirPlans) {
  // The plans of these two stages differ. In one workspace, each would decode by the other's plan.
  Stage other = stage_with_plan();
  other.slug = "99_other";
  other.plan_shape = [](const Problem& problem, const DeviceLimits& limits) {
    PlanShape shape = stage_with_plan().plan_shape(problem, limits);
    shape.workers = 1;
    return shape;
  };
  other.decode = [](const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, const DeviceLimits& limits, Stream stream) {
    PlanShape shape = stage_with_plan().plan_shape(problem, limits);
    shape.workers = 1;
    HostPlan made;
    MLA_RETURN_IF_ERROR(read_plan(model_machine(), problem, shape, plan.memory, &made));
    return find_stage(MachineKind::kModel, "03")
        ->decode(problem, tensors, {}, scratch, limits, stream);
  };
  for (const StageResult& entry : measure({&other, &stage_with_plan()}).stages) {
    EXPECT_EQ(entry.outcome, Outcome::kMeasured) << entry.reason;
  }
}

TEST(Measure, APlanOfManySequencesNeedsNoCache) {
  const ShapeResult result = measure({&stages(MachineKind::kModel).front(), &stage_with_plan()},
                                     "h128_q1_b1024_klognormal2048", Measure::kPlans);
  ASSERT_EQ(result.stages.size(), 1u);  // a stage that makes no plan has no entry
  EXPECT_EQ(result.stages[0].outcome, Outcome::kMeasured) << result.stages[0].reason;
  EXPECT_EQ(result.stages[0].plan.alone.size(), 3u);
  EXPECT_EQ(result.stages[0].cold.n, 0);
  EXPECT_NE(side_by_side(result, MachineKind::kModel).find("only plans\n" + result.stages[0].stage),
            std::string::npos);
}

TEST(Measure, ErrorsAloneAreCheckedAndNotTimed) {
  const Stage wrong = wrong_stage([](const Problem&, const Tensors&, const DevicePlan&, void*,
                                     const DeviceLimits&, Stream) { return Status(); });
  const ShapeResult result =
      measure({&right_stage(), &wrong}, "h4_q1_b2_k100_peak4", Measure::kErrors);
  EXPECT_EQ(result.stages[0].outcome, Outcome::kMeasured) << result.stages[0].reason;
  EXPECT_GT(result.stages[0].check.out.relative_l2, 0);
  EXPECT_EQ(result.stages[0].cold.n, 0);
  EXPECT_EQ(result.stages[1].outcome, Outcome::kFailed);
  EXPECT_NE(side_by_side(result, MachineKind::kModel).find("only errors"), std::string::npos);
}

TEST(Measure, CombiningIsTimedWhereAStageSplits) {
  const ShapeResult result = measure({&stage_with_plan()}, "h4_q1_b1_k1000");
  const StageResult& entry = result.stages[0];
  EXPECT_EQ(entry.outcome, Outcome::kMeasured) << entry.reason;
  EXPECT_GT(entry.combine.slots, 1);
  EXPECT_EQ(entry.combine.bytes, entry.combine.slots * 4 * 513 * 4.0);
  EXPECT_EQ(entry.combine.warm.size(), 3u);
  EXPECT_EQ(entry.combine.cold.size(), 3u);
  EXPECT_TRUE(measure({&right_stage()}).stages[0].combine.warm.empty());
}

TEST(Measure, APeerIsMeasuredAlikeButHasNoSpeedup) {
  Stage peer = right_stage();
  peer.slug = "a_peer";
  const ShapeResult result =
      measure({&right_stage()}, "h4_q1_b2_k100", Measure::kTimes, {}, {&peer});
  ASSERT_EQ(result.stages.size(), 2u);
  EXPECT_TRUE(result.stages[1].peer);
  EXPECT_EQ(result.stages[1].outcome, Outcome::kMeasured) << result.stages[1].reason;
  EXPECT_EQ(result.stages[1].cold.n, 3);
  EXPECT_TRUE(std::isnan(result.stages[1].cold_speedup));
}

TEST(Measure, LaterRungsAreComparedWithTheOneTheyBranchFrom) {
  Stage seesaw = right_stage(), few = right_stage(), cluster = right_stage();
  seesaw.slug = "08_seesaw";
  few.slug = "10_few_heads";
  cluster.slug = "11_cluster";
  const ShapeResult result = measure({&seesaw, &few, &cluster});
  for (size_t i : {1, 2}) {
    EXPECT_EQ(result.stages[i].cold_speedup,
              result.stages[0].cold.median / result.stages[i].cold.median);
  }
}

TEST(Measure, AStageThatWouldTakeTooLongIsLeftOut) {
  Ceilings slow;
  slow.fp32 = slow.shared = slow.read = 1e4;
  slow.launch = 1e-6;
  const ShapeResult result = measure({&right_stage()}, "h4_q1_b2_k100", Measure::kTimes, slow);
  EXPECT_EQ(result.stages[0].outcome, Outcome::kLeftOut);
  EXPECT_NE(result.stages[0].reason.find("predicted to take"), std::string::npos);
  EXPECT_NE(side_by_side(result, MachineKind::kModel).find("left out: a run"), std::string::npos);
}

TEST(Truth, ChecksRowsWhereTheWholeIsTooMuch) {
  Shape shape;
  ASSERT_OK(parse_shape("h128_q2_b100_kskew5000", &shape));
  const DataSet data = make_data_set(shape.spec);
  EXPECT_TRUE(checked_rows(data, 1e9).empty());
  const std::vector<QueryRow> rows = checked_rows(data, 1e12);
  ASSERT_EQ(rows.size(), size_t{kCheckedRows});
  EXPECT_EQ(rows[0].sequence, 99);  // the longest
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      EXPECT_FALSE(rows[i].sequence == rows[j].sequence && rows[i].query == rows[j].query);
    }
  }
}

}  // namespace
}  // namespace mla::bench
