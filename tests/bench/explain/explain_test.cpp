// Explanations and the parts they are made of. Every rule has a shape where it speaks and one where
// it is silent; its claim is checked against the cost model, the plan, and the recorded results.
#include "bench/explain/explain.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <set>

#include "bench/explain/estimate.h"
#include "bench/explain/explain_input.h"
#include "bench/measure/table.h"
#include "reference/gpu_model/gpu_model.h"
#include "stages/common/choose/choose.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

const Recorded& recorded() {
  static const Recorded result = [] {
    Recorded newest;
    EXPECT_OK(load_newest_recorded(&newest));
    return newest;
  }();
  return result;
}

DataSet data_of(const std::string& name) {
  Shape shape;
  const Status status = parse_shape(name, &shape);
  EXPECT_OK(status);
  return make_data_set(shape.spec);
}

ExplainInput input_of(const std::string& shape, const std::string& stage = "") {
  const DataSet data = data_of(shape);
  ExplainInput input = explain_recorded(data.problem, data.seqlens_k, &recorded(), "");
  if (!stage.empty()) input.stage = find_stage(MachineKind::kModel, stage)->slug;
  return input;
}

TEST(Explain, SaysWhatAutoChoseAndWhy) {
  const DataSet data = data_of("h128_q1_b64_k4096");
  const ExplainInput input =
      explain_recorded(data.problem, data.seqlens_k, &recorded(), "", "auto");
  Choice choice;
  ASSERT_OK(choose(MachineKind::kModel, data.problem, input.limits, &choice));
  EXPECT_EQ(input.choice, describe(choice, input.limits));
  const StageFacts* subject = subject_of(input);
  ASSERT_NE(subject, nullptr);
  EXPECT_EQ(subject->slug, "auto");
  EXPECT_TRUE(subject->plan.has_value());
  EXPECT_GT(subject->prediction.matrix_flop, 0);
  const std::string text = explain(input);
  EXPECT_NE(text.find("\nchoice    " + choice.stage->slug), std::string::npos) << text;
  EXPECT_EQ(text.find("another device"), std::string::npos) << text;
  // Nobody asked for auto: there is no line of its choice, and no row of its own beside the stages.
  const std::string of_all = explain(input_of("h128_q1_b64_k4096"));
  EXPECT_EQ(of_all.find("choice    "), std::string::npos);
  EXPECT_EQ(of_all.find("\nauto"), std::string::npos);
}

int64_t total(const std::vector<int32_t>& seqlens_k) {
  return std::accumulate(seqlens_k.begin(), seqlens_k.end(), int64_t{0});
}

void forget_times(ExplainInput* input) {
  for (StageFacts& facts : input->stages) {
    facts.cold = {};
    facts.sustained_us = kUnknown;
  }
}

std::string text_of(const ExplainInput& input, const std::string& rule) {
  const std::vector<std::string> names = advice_rules();
  EXPECT_NE(std::find(names.begin(), names.end(), rule), names.end()) << rule << " is no rule";
  for (const Advice& advice : advise(input)) {
    if (advice.rule == rule) return advice.text;
  }
  return "";
}

const StageFacts& facts_of(const ExplainInput& input, const std::string& stage) {
  const auto found =
      std::find_if(input.stages.begin(), input.stages.end(),
                   [&](const StageFacts& facts) { return facts.slug.substr(0, 2) == stage; });
  EXPECT_NE(found, input.stages.end());
  return *found;
}

Balance plan_of(const ExplainInput& input, const std::string& stage) {
  return bench::balance_of(input.problem, *facts_of(input, stage).plan, input.seqlens_k,
                           input.limits.multiprocessors);
}

double cold(const std::string& stage, const std::string& shape) {
  const RecordedEntry* entry =
      recorded().find(find_stage(MachineKind::kModel, stage)->slug, shape, "cold");
  return entry == nullptr ? kUnknown : entry->us;
}

/// The number after `words` in a text.
double number_after(const std::string& text, const std::string& words) {
  const size_t at = text.find(words);
  EXPECT_NE(at, std::string::npos) << words << " is not in: " << text;
  return at == std::string::npos ? kUnknown
                                 : std::strtod(text.c_str() + at + words.size(), nullptr);
}

std::set<std::string> recorded_shapes() {
  std::set<std::string> shapes;
  for (const RecordedEntry& entry : recorded().entries) {
    if (entry.mode == "cold" && entry.stage != "cache") shapes.insert(entry.shape);
  }
  return shapes;
}

#define EXPECT_SPEAKS(rule, shape, stage) \
  EXPECT_NE(text_of(input_of(shape, stage), rule), "") << shape << " " << stage
#define EXPECT_SILENT(rule, shape, stage) \
  EXPECT_EQ(text_of(input_of(shape, stage), rule), "") << shape << " " << stage

// Parts ------------------------------------------------------------------------------------------

TEST(Explain, TheFloorIsTheLargerOfMemoryAndLaunchWithProducts) {
  for (const std::string& shape : recorded_shapes()) {
    const ExplainInput input = input_of(shape);
    int64_t tokens = 0;
    for (const int32_t length : input.seqlens_k) tokens += length;
    const Work work = work_of(input.problem, tokens);
    for (const Mode mode : {Mode::kCold, Mode::kSustained}) {
      const Floor floor = floor_of(work, input.ceilings, mode);
      const Ceilings& ceilings = input.ceilings;
      const double rate = mode == Mode::kCold ? ceilings.matrix_cold : ceilings.matrix_sustained;
      EXPECT_DOUBLE_EQ(floor.seconds(),
                       std::max(work.bytes / ceilings.read, ceilings.launch + work.flop / rate))
          << shape;
      EXPECT_GE(floor.lead(), 1);
    }
  }
  const auto bound = [](double memory, double matrix, double launch) {
    return Floor{memory, matrix, launch}.bound();
  };
  EXPECT_EQ(bound(3, 1, 1), Floor::Bound::kMemory);
  EXPECT_EQ(bound(3, 3, 1), Floor::Bound::kMatrix);
  EXPECT_EQ(bound(3, 1, 3), Floor::Bound::kLaunch);
  EXPECT_EQ(bound(3, kUnknown, 3), Floor::Bound::kNone);
}

TEST(Explain, TheBalanceIsThatOfThePlan) {
  const ExplainInput input = input_of("h128_q1_b128_k8192_split1024");
  const Balance balance = plan_of(input, "08");
  EXPECT_EQ(balance.cut_sequences, 128);
  EXPECT_EQ(balance.pieces, 1024);
  EXPECT_EQ(balance.blocks, 132);
  EXPECT_DOUBLE_EQ(balance.mean, 18 * 1024.0 / 66);
  EXPECT_EQ(balance.largest % 18, 0);  // whole pieces: 16 grains, and 2 for beginning a piece
  EXPECT_DOUBLE_EQ(balance.partial_bytes, 1024.0 * 128 * (512 + 1) * 4);
  const Balance few = plan_of(input_of("h16_q1_b1_k8192"), "08");
  EXPECT_EQ(few.blocks, 64);
  EXPECT_DOUBLE_EQ(few.busy, 64.0 / 132);
}

TEST(Explain, MemoryIsCountedInPages) {
  const ExplainInput skew = input_of("h128_q1_b128_kskew131072");
  const MemoryUse memory = memory_of(skew.problem, skew.seqlens_k);
  EXPECT_EQ(memory.pages, 127 * 8 + 2048);
  EXPECT_DOUBLE_EQ(memory.cache, (127 * 8 + 2048) * 64.0 * 1152);
  EXPECT_DOUBLE_EQ(memory.padding, 0);
  EXPECT_DOUBLE_EQ(memory.contiguous, 128 * 131072.0 * 1152);
  EXPECT_DOUBLE_EQ(memory.expanded, (127 * 512 + 131072.0) * 128 * (128 + 64 + 128) * 2);
  const MemoryUse two = memory_of(data_of("h16x2_q1_b1_k65").problem, {65});
  EXPECT_EQ(two.pages, 2);
  EXPECT_DOUBLE_EQ(two.padding, 63 * 2 * 1152.0);
}

TEST(Explain, RecordedTimesAreThoseOfExactlyThisShape) {
  for (const std::string& shape : recorded_shapes()) {
    const DataSet data = data_of(shape);
    EXPECT_EQ(recorded_shape(recorded(), data.problem, data.seqlens_k), shape);
    EXPECT_EQ(facts_of(input_of(shape), "08").cold.median, cold("08", shape));
  }
  for (const char* other : {"h128_q1_b128_k8191", "h128_q1_b128_k8192_fp16", "h128_q1_b127_k8192",
                            "h128_q1_b128_k8192_split2048", "h128_q2_b128_k8192",
                            "h128x2_q1_b128_k8192", "h128_q1_b128_k8192_fp8_tile128"}) {
    const DataSet data = data_of(other);
    EXPECT_EQ(recorded_shape(recorded(), data.problem, data.seqlens_k), "") << other;
  }
  // The mask hides nothing from a single query token.
  const DataSet masked = data_of("h128_q1_b128_k8192_causal");
  EXPECT_EQ(recorded_shape(recorded(), masked.problem, masked.seqlens_k), "h128_q1_b128_k8192");
}

TEST(Explain, TheModelKeepsItsOwnDevice) {
  const gpu_model::Device before = gpu_model::device();
  gpu_model::device().multiprocessors = 4;
  const ExplainInput input = input_of("h128_q1_b128_k8192");
  EXPECT_EQ(input.limits.multiprocessors, 132);
  EXPECT_EQ(facts_of(input, "08").plan->workers, 66);
  EXPECT_EQ(gpu_model::device().multiprocessors, 4);
  gpu_model::device() = before;
}

TEST(Explain, ARecordedDeviceMustBeKnown) {
  Recorded one = recorded();
  DeviceLimits limits;
  ASSERT_OK(recorded_limits(one, &limits));
  EXPECT_EQ(limits.compute_capability, 90);
  EXPECT_EQ(limits.multiprocessors, 132);
  EXPECT_EQ(limits.max_shared_bytes, gpu_model::Device().max_shared_bytes);
  one.context["compute_capability"] = "7.5";
  EXPECT_EQ(recorded_limits(one, &limits).code(), StatusCode::kUnsupported);
  const DataSet data = data_of("h16_q1_b1_k100");
  const std::string text = explain(explain_recorded(data.problem, data.seqlens_k, &one, ""));
  EXPECT_NE(text.find("'7.5'"), std::string::npos) << text;
}

/// A GPU that knows its name and limits, and can do nothing else.
class NamedGpu final : public Machine {
 public:
  NamedGpu(std::string name, int multiprocessors)
      : name_(std::move(name)), multiprocessors_(multiprocessors) {}
  MachineKind kind() const override { return MachineKind::kGpu; }
  std::string description() const override { return name_ + ", compute capability 9.0"; }
  DeviceLimits limits() const override { return {90, multiprocessors_, 232448, 2147483647}; }
  Status allocate(size_t, void**) override { return {}; }
  void deallocate(void*) override {}
  Status copy_to_device(void*, const void*, size_t, Stream) override { return {}; }
  Status copy_to_host(void*, const void*, size_t, Stream) override { return {}; }
  Status enqueue_copy_to_host(void*, const void*, size_t, Stream) override { return {}; }
  Status fill(void*, unsigned char, size_t, Stream) override { return {}; }
  Status synchronize() override { return {}; }
  size_t free_memory() const override { return 0; }

 private:
  std::string name_;
  int multiprocessors_;
};

TEST(Explain, AGpuUsesRecordsOfItsKindOnly) {
  if (gpu_machine() == nullptr && !stages(MachineKind::kGpu).empty()) {
    GTEST_SKIP() << "the stages are built for a GPU, but there is none to plan for";
  }
  const DataSet data = data_of("h128_q1_b128_k8192");
  NamedGpu same("NVIDIA H200", 132), name("NVIDIA H20", 132), size("NVIDIA H200", 78);
  EXPECT_TRUE(
      explain_on(same, data.problem, data.seqlens_k).ceilings_origin.starts_with("recorded: "));
  for (Machine* other : {&name, &size}) {
    const ExplainInput input = explain_on(*other, data.problem, data.seqlens_k);
    EXPECT_TRUE(std::isnan(input.ceilings.read));
    EXPECT_EQ(input.ceilings_origin.find("what is recorded is of another device, NVIDIA H200"), 0u);
    EXPECT_NE(explain(input).find("mla_bench --explain measures them"), std::string::npos);
  }
}

TEST(Explain, WithoutCeilingsItSaysWhatItCan) {
  const DataSet data = data_of("h128_q1_b128_k8192_split64");
  ExplainInput input =
      explain_recorded(data.problem, data.seqlens_k, nullptr, "no recorded results of a GPU");
  for (const char* stage : {"", "08_seesaw", "01_naive"}) {
    input.stage = stage;
    const std::string text = explain(input);
    for (const char* needed : {"none (no recorded results of a GPU)", "235 FLOP per byte",
                               "floor     not known", "16384 pages"}) {
      EXPECT_NE(text.find(needed), std::string::npos) << needed << "\n" << text;
    }
    EXPECT_EQ(text.find("nan"), std::string::npos) << text;
    for (const char* rule : {"launch bound", "memory bound", "compute bound", "sustained clocks",
                             "faster stage", "far from its limit"}) {
      EXPECT_EQ(text_of(input, rule), "") << rule;
    }
  }
  input.stage = "08_seesaw";
  EXPECT_NE(text_of(input, "cuts too close"), "");
}

TEST(Explain, SaysWhereTimesAreFrom) {
  ExplainInput input = input_of("h128_q1_b128_k8192", "08");
  std::string text = explain(input);
  const double ridge = recorded().ceilings.matrix_cold / recorded().ceilings.read;
  const double products = 292057776128.0 / recorded().ceilings.matrix_cold;  // 08 pads no row here
  for (const std::string& needed :
       {std::string("NVIDIA H200, compute capability 9.0, 132 multiprocessors, from records"),
        std::string("(recorded: "), std::string("µs cold, recorded: floor share"),
        "above the ridge of " + number(ridge), std::string("set by the matrix rate"),
        "own limit " + microseconds(1e6 * (recorded().ceilings.launch + products)) +
            " µs, by its launch and matrix work",
        std::string("64 of 128 sequences cut, into 128 parts")}) {
    EXPECT_NE(text.find(needed), std::string::npos) << needed << "\n" << text;
  }
  input.times_origin = input.ceilings_origin = "measured in this run";
  text = explain(input);
  EXPECT_EQ(text.find("recorded"), std::string::npos) << text;
  EXPECT_NE(text.find("µs cold, measured in this run: "), std::string::npos) << text;
  forget_times(&input);
  EXPECT_NE(explain(input).find("time      of this shape not known"), std::string::npos);
}

TEST(Explain, WhatWasJustMeasuredTakesThePlaceOfRecords) {
  ExplainInput input = input_of("h128_q1_b128_k8192");
  ShapeResult result;
  for (const char* stage : {"07_tma_pipeline", "08_seesaw"}) {
    StageResult& entry = result.stages.emplace_back();
    entry.stage = stage;
    entry.cold = {500, 490, 510, 36};
    entry.sustained = {600, 590, 610, 36};
  }
  result.stages.back().outcome = StageResult::Outcome::kFailed;
  Ceilings ceilings = input.ceilings;
  ceilings.read = 4000e9;
  set_measured(result, ceilings, &input);
  EXPECT_EQ(facts_of(input, "07").cold.median, 500);
  EXPECT_EQ(facts_of(input, "07").sustained_us, 600);
  EXPECT_EQ(facts_of(input, "08").cold.n, 0);  // it failed
  EXPECT_EQ(facts_of(input, "06").cold.n, 0);  // it was not asked for
  EXPECT_EQ(subject_of(input)->slug, "07_tma_pipeline");
  EXPECT_NE(explain(input).find("read 4000 GB/s"), std::string::npos);
}

TEST(Explain, TimesOfTheModelAreNotTold) {
  Progress progress;
  const std::unique_ptr<Runner> runner = make_model_runner();
  std::unique_ptr<GoogleBenchmark> google;
  ASSERT_OK(GoogleBenchmark::create({"any"}, {}, /*show=*/false, &google));
  const Bench bench{model_machine(), *runner, {find_stage(MachineKind::kModel, "08")}, {}, {},
                    progress,        *google};
  ShapeResult result;
  ASSERT_OK(parse_shape("h128_q1_b128_k8192", &result.shape));
  StageResult& entry = result.stages.emplace_back();
  entry.stage = "08_seesaw";
  entry.cold = {1e9, 1e9, 1e9, 1};
  EXPECT_EQ(explain(bench, result), explain(input_of("h128_q1_b128_k8192", "08")));
}

TEST(Explain, EveryShapeAndStageIsExplained) {
  for (const char* shape :
       {"h1_q1_b1_k1", "h16_q1_b4_kvaried30", "h128x2_q3_b5_kskew9000_causal", "h24_q1_b300_k64",
        "h128_q100_b1_k200_causal", "h16_q1_b7_klognormal500_split64_fp16", "h128_q50_b1_k64",
        "h16_q1_b4_k300_fp8_tile128"}) {
    for (const char* stage : {"", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10"}) {
      const std::string text = explain(input_of(shape, stage));
      EXPECT_EQ(text.find("nan"), std::string::npos) << shape << "\n" << text;
      EXPECT_EQ(text.find("inf"), std::string::npos) << shape << "\n" << text;
      EXPECT_EQ(text.find("-0"), std::string::npos) << shape << "\n" << text;
      EXPECT_TRUE(text.ends_with("\n"));
    }
  }
  DataSet empty = data_of("h16_q1_b3_k64");
  empty.seqlens_k = {0, 0, 0};
  const std::string text =
      explain(explain_recorded(empty.problem, empty.seqlens_k, &recorded(), ""));
  EXPECT_EQ(text.find("nan"), std::string::npos) << text;
}

TEST(Explain, AdviceIsForTheFastestStage) {
  for (const std::string& shape : recorded_shapes()) {
    const ExplainInput input = input_of(shape);
    const StageFacts* subject = subject_of(input);
    for (const StageFacts& stage : input.stages) {
      if (stage.cold.n == 0) continue;  // newer than the recording
      EXPECT_LE(subject->cold.median, stage.cold.median) << shape << " " << stage.slug;
    }
  }
  ExplainInput ampere = input_of("h128_q1_b64_k4000");
  for (StageFacts& stage : ampere.stages) {
    if (stage.slug >= "06") stage.device = {StatusCode::kUnsupported, "needs 9.0"};
  }
  EXPECT_EQ(subject_of(ampere)->slug, "05_tensor_core");
  for (StageFacts& stage : ampere.stages) stage.device = {StatusCode::kUnsupported, "needs 9.0"};
  EXPECT_EQ(subject_of(ampere), nullptr);
  EXPECT_NE(explain(ampere).find("no stage can run"), std::string::npos);
}

// Rules ------------------------------------------------------------------------------------------

TEST(Advice, EveryRuleHasATest) {
  const std::set<std::string> tested = {"needs another device",
                                        "cannot read the cache",
                                        "faster stage",
                                        "does not split",
                                        "too short to fill",
                                        "launch bound",
                                        "memory bound",
                                        "compute bound",
                                        "sustained clocks",
                                        "far from its limit",
                                        "padded rows",
                                        "batch invariant",
                                        "fixed cuts ignored",
                                        "cuts too close",
                                        "cuts too far apart",
                                        "imbalance",
                                        "parts exceed the cache",
                                        "causal mask",
                                        "fp16",
                                        "cache format",
                                        "ragged lengths",
                                        "below a grain",
                                        "large workspace"};
  for (const std::string& rule : advice_rules()) EXPECT_EQ(tested.count(rule), 1u) << rule;
  EXPECT_EQ(tested.size(), advice_rules().size());
}

TEST(Advice, NeedsAnotherDevice) {
  EXPECT_SILENT("needs another device", "h128_q1_b1_k4096", "08");
  ExplainInput ampere = input_of("h128_q1_b1_k4096", "08");
  ampere.limits = {80, 108, 166912, 2147483647};
  for (StageFacts& stage : ampere.stages) {
    stage.device = check_device(*find_stage(MachineKind::kModel, stage.slug), ampere.limits);
  }
  const std::string text = text_of(ampere, "needs another device");
  EXPECT_NE(text.find("08_seesaw needs compute capability 9.0"), std::string::npos) << text;
  EXPECT_NE(text.find("is 05_tensor_core"), std::string::npos) << text;
  EXPECT_EQ(advise(ampere).size(), 1u);
  EXPECT_NE(explain(ampere).find("08_seesaw cannot run on this device"), std::string::npos);
}

TEST(Advice, AFasterStageIsOneByTheRecords) {
  EXPECT_SPEAKS("faster stage", "h128_q1_b64_k4096", "07");
  EXPECT_SILENT("faster stage", "h128_q1_b64_k4096", "08");
  // 284.4 and 286.3 us: within the spread.
  EXPECT_SILENT("faster stage", "h16_q1_b128_k8192", "08");
  int from_times = 0, from_limits = 0;
  for (const std::string& shape : recorded_shapes()) {
    for (const StageFacts& asked : input_of(shape).stages) {
      if (asked.cold.n == 0) continue;  // newer than the recording
      ExplainInput input = input_of(shape, asked.slug);
      std::erase_if(input.stages, [](const StageFacts& stage) { return stage.cold.n == 0; });
      const auto faster = [&](const std::string& text) {
        for (const StageFacts& other : input.stages) {
          const bool named = text.find(other.slug) != std::string::npos;
          if (named && other.slug != asked.slug) return cold(other.slug, shape);
        }
        return double(INFINITY);
      };
      std::string text = text_of(input, "faster stage");
      if (!text.empty()) {
        EXPECT_LT(faster(text), cold(asked.slug, shape)) << shape << ": " << text;
        ++from_times;
      }
      // The times confirm what the own limits say without any time.
      forget_times(&input);
      text = text_of(input, "faster stage");
      if (text.empty()) continue;
      EXPECT_NE(text.find("by its own limit"), std::string::npos);
      EXPECT_LT(faster(text), cold(asked.slug, shape)) << shape << ": " << text;
      ++from_limits;
    }
  }
  EXPECT_GT(from_times, 100);
  EXPECT_GT(from_limits, 50);
}

TEST(Advice, DoesNotSplit) {
  EXPECT_SPEAKS("does not split", "h128_q1_b1_k4096", "03");
  EXPECT_SPEAKS("does not split", "h16_q1_b16_k4096", "02");
  EXPECT_SILENT("does not split", "h128_q1_b64_k4096", "03");
  EXPECT_SILENT("does not split", "h128_q1_b1_k4096", "04");
  for (const std::string& shape : recorded_shapes()) {
    for (const char* stage : {"01", "02", "03"}) {
      if (text_of(input_of(shape, stage), "does not split").empty()) continue;
      EXPECT_LT(cold("04", shape), cold(stage, shape)) << shape << " " << stage;
    }
  }
}

TEST(Advice, TooShortToFill) {
  EXPECT_SPEAKS("too short to fill", "h16_q1_b4_k512", "08");
  EXPECT_SILENT("too short to fill", "h128_q1_b64_k4096", "08");
  EXPECT_SILENT("too short to fill", "h128_q1_b1_k65536_split16384", "08");  // the cuts' fault
  EXPECT_SILENT("too short to fill", "h128_q50_b8_k4096", "08");  // 100 row tiles, all at work
  EXPECT_SILENT("too short to fill", "h128_q1_b1_k4096", "03");
  // There are six grains per worker. But sequences stay whole, so 50 workers take two each.
  const std::string whole = text_of(input_of("h128_q1_b100_k256", "08"), "too short to fill");
  EXPECT_NE(whole.find("sequences stay whole"), std::string::npos) << whole;
  EXPECT_EQ(text_of(input_of("h16_q1_b4_k512", "08"), "too short to fill").find("stay whole"),
            std::string::npos);
  for (const char* shape : {"h16_q1_b1_k8192", "h16_q1_b4_k512", "h128_q1_b1_k4096"}) {
    for (const char* stage : {"05", "06", "08"}) {
      ExplainInput input = input_of(shape, stage);
      const std::string text = text_of(input, "too short to fill");
      if (text.empty()) continue;
      input.problem.batch = static_cast<int>(number_after(text, " With "));
      input.seqlens_k.assign(static_cast<size_t>(input.problem.batch), input.seqlens_k.front());
      EXPECT_GE(plan_of(input, stage).busy, 0.95) << shape << " " << text;
    }
  }
}

TEST(Advice, LaunchBound) {
  EXPECT_SPEAKS("launch bound", "h16_q1_b1_k8192", "08");
  EXPECT_SILENT("launch bound", "h16_q1_b64_k4096", "08");
  ExplainInput input = input_of("h16_q1_b4_k512", "08");
  const double most = number_after(text_of(input, "launch bound"), "Up to ");
  EXPECT_GT(most, 4);
  for (const int more : {0, 1}) {
    input.problem.batch = static_cast<int>(most) + more;
    const Floor floor = floor_of(work_of(input.problem, 512 * int64_t{input.problem.batch}),
                                 input.ceilings, Mode::kCold);
    EXPECT_EQ(std::max(floor.memory, floor.matrix) <= floor.launch, more == 0);
  }
  // Eight times the tokens take far less than eight times as long.
  EXPECT_LT(cold("08", "h16_q1_b16_k4096"), 3 * cold("08", "h16_q1_b1_k8192"));
}

TEST(Advice, MemoryBound) {
  EXPECT_SPEAKS("memory bound", "h16_q1_b128_k8192", "08");
  EXPECT_SILENT("memory bound", "h128_q1_b128_k8192", "08");
  for (const char* shape :
       {"h16_q1_b128_k8192", "h16_q1_b16_k4096", "h64_q1_b64_k4096", "h32_q1_b128_k8192"}) {
    ExplainInput input = input_of(shape, "08");
    const std::string text = text_of(input, "memory bound");
    if (text.find("ridge is near") != std::string::npos) {
      ++input.problem.seqlen_q;
      EXPECT_EQ(text_of(input, "memory bound"), "") << shape;
      continue;
    }
    input.problem.seqlen_q = static_cast<int>(number_after(text, "up to "));
    EXPECT_NE(text_of(input, "memory bound"), "") << shape;
    EXPECT_NEAR(floor_of(work_of(input.problem,
                                 memory_of(input.problem, input.seqlens_k).pages * kGrainTokens),
                         input.ceilings, Mode::kCold)
                        .seconds() *
                    1e6,
                number_after(text, "floor is then "), 0.06);
    ++input.problem.seqlen_q;
    EXPECT_EQ(text_of(input, "memory bound"), "") << shape;
  }
  EXPECT_NE(text_of(input_of("h128_q1_b1000_k2"), "memory bound").find("no number of query tokens"),
            std::string::npos);
  EXPECT_NE(text_of(input_of("h16_q1_b128_k8192", "04"), "memory bound").find("not so for 04"),
            std::string::npos);
  EXPECT_EQ(text_of(input_of("h16_q1_b128_k8192", "08"), "memory bound").find("not so for"),
            std::string::npos);
  // Four times the heads, and hardly more time.
  EXPECT_LT(cold("08", "h64_q1_b128_k8192"), 1.1 * cold("08", "h16_q1_b128_k8192"));
}

TEST(Advice, ComputeBound) {
  EXPECT_SPEAKS("compute bound", "h128_q1_b64_k4096", "08");
  EXPECT_SILENT("compute bound", "h16_q1_b64_k4096", "08");
  EXPECT_NEAR(cold("08", "h128_q1_b128_k4096") / cold("08", "h128_q1_b64_k4096"), 2, 0.1);
}

TEST(Advice, SustainedClocks) {
  EXPECT_SPEAKS("sustained clocks", "h128_q1_b64_k4096", "08");
  EXPECT_SILENT("sustained clocks", "h16_q1_b64_k4096", "08");
  for (const std::string& shape : recorded_shapes()) {
    const ExplainInput input = input_of(shape, "08");
    if (text_of(input, "sustained clocks").empty()) continue;
    EXPECT_GT(facts_of(input, "08").sustained_us, facts_of(input, "08").cold.median) << shape;
  }
  EXPECT_SILENT("sustained clocks", "h128_q1_b8_k4096", "08");  // it waits more than it multiplies
  ExplainInput cool = input_of("h128_q1_b64_k4096", "08");
  cool.ceilings.matrix_sustained = cool.ceilings.matrix_cold;
  EXPECT_EQ(text_of(cool, "sustained clocks"), "");
}

TEST(Advice, FarFromItsLimit) {
  EXPECT_SPEAKS("far from its limit", "h16_q1_b16_k4096", "06");
  EXPECT_SILENT("far from its limit", "h128_q1_b128_k8192", "08");
  EXPECT_SILENT("far from its limit", "h16_q1_b1_k8192", "08");  // the launch sets the time
  ExplainInput unknown = input_of("h16_q1_b16_k4096", "06");
  forget_times(&unknown);
  EXPECT_EQ(text_of(unknown, "far from its limit"), "");
}

TEST(Advice, PaddedRows) {
  EXPECT_SPEAKS("padded rows", "h16_q1_b128_k8192", "08");
  EXPECT_SILENT("padded rows", "h64_q1_b128_k8192", "08");
  EXPECT_SILENT("padded rows", "h16_q1_b128_k8192", "05");
  EXPECT_SILENT("padded rows", "h24_q1_b128_k8192", "01");
  const ExplainInput input = input_of("h16_q1_b128_k8192", "08");
  const std::string text = text_of(input, "padded rows");
  EXPECT_NE(text.find("4.0× the FLOP"), std::string::npos) << text;
  EXPECT_NE(text.find("05_tensor_core"), std::string::npos) << text;
  const auto rows = static_cast<int>(number_after(text, "Up to "));
  EXPECT_EQ(rows, 64);
  const auto flop = [](const std::string& shape) {
    return facts_of(input_of(shape), "08").prediction.matrix_flop;
  };
  EXPECT_DOUBLE_EQ(flop("h16_q1_b128_k8192"), flop("h16_q4_b128_k8192"));
  EXPECT_DOUBLE_EQ(flop("h16_q1_b128_k8192"), flop("h64_q1_b128_k8192"));
  EXPECT_GT(flop("h16_q5_b128_k8192"), flop("h16_q4_b128_k8192"));
}

TEST(Advice, BatchInvariant) {
  EXPECT_SPEAKS("batch invariant", "h128_q1_b128_k8192_split1024", "08");
  EXPECT_SILENT("batch invariant", "h128_q1_b128_k8192", "08");
  EXPECT_SILENT("batch invariant", "h128_q1_b128_k8192_split1024", "03");
  // Every recorded decode with fixed cuts takes longer than the same one without.
  int pairs = 0;
  for (const RecordedEntry& entry : recorded().entries) {
    const size_t at = entry.shape.find("_split");
    const Stage* stage = find_stage(MachineKind::kModel, entry.stage);
    if (at == std::string::npos || entry.mode != "cold" || stage == nullptr) continue;
    if (stage->plan_shape == nullptr) continue;
    const RecordedEntry* without = recorded().find(entry.stage, entry.shape.substr(0, at), "cold");
    ASSERT_NE(without, nullptr);
    EXPECT_GT(entry.us, without->us) << entry.stage << " " << entry.shape;
    const std::string text = text_of(input_of(entry.shape, entry.stage), "batch invariant");
    EXPECT_GE(number_after(text, "The largest load grows "), 1) << text;
    ++pairs;
  }
  EXPECT_EQ(pairs, 15);
}

TEST(Advice, FixedCutsIgnored) {
  EXPECT_SPEAKS("fixed cuts ignored", "h128_q1_b128_k8192_split1024", "03");
  EXPECT_SILENT("fixed cuts ignored", "h128_q1_b128_k8192_split1024", "08");
  EXPECT_SILENT("fixed cuts ignored", "h128_q1_b128_k8192", "03");
  for (const char* stage : {"01", "02", "03"}) {
    const Prediction with = facts_of(input_of("h128_q1_b2_k512_split64"), stage).prediction;
    const Prediction without = facts_of(input_of("h128_q1_b2_k512"), stage).prediction;
    EXPECT_DOUBLE_EQ(with.dram_bytes, without.dram_bytes);
    EXPECT_EQ(facts_of(input_of("h128_q1_b2_k512_split64"), stage).workspace_bytes,
              facts_of(input_of("h128_q1_b2_k512"), stage).workspace_bytes);
  }
}

TEST(Advice, CutsTooClose) {
  EXPECT_SPEAKS("cuts too close", "h128_q1_b128_k8192_split64", "08");
  EXPECT_SPEAKS("cuts too close", "h128_q1_b128_k8192_split448", "08");
  EXPECT_SILENT("cuts too close", "h128_q1_b128_k8192_split1024", "08");
  EXPECT_SILENT("cuts too close", "h16_q1_b128_k8192_split64", "08");
  EXPECT_SILENT("cuts too close", "h128_q1_b1_k4096", "08");  // free cuts
  const std::string text = text_of(input_of("h128_q1_b128_k8192_split64", "08"), "cuts too close");
  const auto enough = static_cast<int>(number_after(text, "take "));
  EXPECT_EQ(enough, 512);
  const double cache = 128 * 8192 * 1152.0;
  for (const int tokens : {enough, enough - 64}) {
    const Balance plan =
        plan_of(input_of("h128_q1_b128_k8192_split" + std::to_string(tokens)), "08");
    EXPECT_EQ(2 * plan.partial_bytes <= cache, tokens == enough) << tokens;
  }
}

TEST(Advice, CutsTooFarApart) {
  EXPECT_SPEAKS("cuts too far apart", "h128_q1_b1_k65536_split16384", "08");
  EXPECT_SILENT("cuts too far apart", "h128_q1_b128_k8192_split1024", "08");
  EXPECT_SILENT("cuts too far apart", "h128_q1_b1_k65536", "08");
  for (const char* stage : {"04", "05", "08"}) {
    const std::string text =
        text_of(input_of("h128_q1_b1_k65536_split16384", stage), "cuts too far apart");
    const auto tokens = static_cast<int>(number_after(text, "Cuts every "));
    const Balance closer =
        plan_of(input_of("h128_q1_b1_k65536_split" + std::to_string(tokens)), stage);
    const Balance free = plan_of(input_of("h128_q1_b1_k65536"), stage);
    EXPECT_GE(1.05 * closer.blocks, free.blocks) << stage << " " << text;
  }
}

TEST(Advice, Imbalance) {
  EXPECT_SPEAKS("imbalance", "h16_q1_b1_k153600_split1024", "08");
  EXPECT_SPEAKS("imbalance", "h128_q1_b100_kvaried64", "06");
  EXPECT_SILENT("imbalance", "h128_q1_b128_klognormal8192", "08");
  EXPECT_SILENT("imbalance", "h16_q1_b1_k8192", "08");  // half of the device is idle: another rule
  // Where all workers have work, the largest load is at most a grain and a beginning over the mean;
  // where sequences stay whole, it may exceed the mean by combine_grains and a beginning.
  for (const char* shape :
       {"h128_q1_b100_kvaried64", "h128_q1_b128_klognormal8192", "h128_q1_b128_kskew131072",
        "h16_q1_b200_kvaried300", "h128_q1_b66_kvaried190"}) {
    const ExplainInput input = input_of(shape);
    for (const char* stage : {"04", "05", "06", "07", "08", "09", "10"}) {
      const Balance plan = plan_of(input, stage);
      if (plan.busy < 1) continue;
      const int over = plan.pieces == 0 ? plan.shape.combine_grains : 1;
      EXPECT_LE(static_cast<double>(plan.largest), plan.mean + over + plan.shape.fixed_grains)
          << shape << " " << stage;
    }
  }
  const std::string whole = text_of(input_of("h128_q1_b66_kvaried190", "08"), "imbalance");
  EXPECT_NE(whole.find("Sequences stay whole"), std::string::npos) << whole;
  const ExplainInput input = input_of("h128_q1_b66_kvaried190");
  EXPECT_GT(static_cast<double>(plan_of(input, "08").largest),
            plan_of(input, "08").mean + 1 + plan_of(input, "08").shape.fixed_grains);
}

TEST(Advice, PartsExceedTheCache) {
  EXPECT_SPEAKS("parts exceed the cache", "h128_q1_b1_k4096", "08");
  EXPECT_SILENT("parts exceed the cache", "h128_q1_b64_k4096", "08");
  EXPECT_SILENT("parts exceed the cache", "h16_q1_b1_k8192", "08");
  EXPECT_SILENT("parts exceed the cache", "h128_q1_b128_k8192_split64", "08");  // another rule
  // Stage 04's chapter: 64 parts, 34 MB.
  const Balance plan = plan_of(input_of("h128_q1_b1_k4096"), "04");
  EXPECT_EQ(plan.pieces, 64);
  EXPECT_NEAR(2 * plan.partial_bytes, 34e6, 0.5e6);
}

TEST(Advice, CausalMask) {
  EXPECT_SPEAKS("causal mask", "h128_q2_b128_k4096_causal", "08");
  EXPECT_SILENT("causal mask", "h128_q2_b128_k4096", "08");
  EXPECT_SILENT("causal mask", "h128_q1_b128_k4096_causal", "08");
  // All 64 tokens are new, so the mask hides half of a square.
  const std::string text = text_of(input_of("h16_q64_b1_k64_causal", "08"), "causal mask");
  EXPECT_NE(text.find("hides 49% of the pairs"), std::string::npos) << text;
  const ExplainInput with = input_of("h128_q2_b128_k4096_causal");
  const ExplainInput without = input_of("h128_q2_b128_k4096");
  for (size_t i = 0; i < with.stages.size(); ++i) {
    const Work work = work_of(with.problem, 128 * 4096);
    const auto limit = [&](const ExplainInput& input) {
      return own_limit(input.stages[i].prediction, work, with.ceilings, Mode::kCold).seconds();
    };
    EXPECT_DOUBLE_EQ(limit(with), limit(without));
  }
}

TEST(Advice, ACacheThatAStageCannotRead) {
  EXPECT_SILENT("cannot read the cache", "h128_q1_b64_k4096", "08");
  ExplainInput input = input_of("h128_q1_b64_k4096_fp8_tile128", "08");
  const std::string text = text_of(input, "cannot read the cache");
  EXPECT_EQ(text.find("08_seesaw cannot read a cache of cache_format = fp8_tile128, only 16bit."),
            0u)
      << text;
  EXPECT_EQ(advise(input).size(), 1u);
  EXPECT_NE(explain(input).find("08_seesaw cannot read this cache"), std::string::npos);
  for (StageFacts& stage : input.stages) {
    stage.cache = {StatusCode::kUnsupported, "none"};
    if (stage.slug == "05_tensor_core") stage.cache = {};
  }
  EXPECT_EQ(text_of(input, "cannot read the cache"),
            "none. Stages that run here and can: 05_tensor_core.");
  input.stage = "";
  ASSERT_NE(subject_of(input), nullptr);
  EXPECT_EQ(subject_of(input)->slug, "05_tensor_core");
  for (StageFacts& stage : input.stages) stage.cache = {StatusCode::kUnsupported, "none"};
  EXPECT_EQ(subject_of(input), nullptr);
  EXPECT_NE(explain(input).find("no stage can run on this device, on this cache"),
            std::string::npos);
}

// Floors count a row's bytes: a quantised cache saves time where memory binds, and none where
// products do.
TEST(Advice, CacheFormatsHelpWhereReadingBinds) {
  const auto floor_us = [](const std::string& shape) {
    const DataSet data = data_of(shape);
    const Work work = work_of(data.problem, data.total_tokens());
    return microseconds(1e6 * floor_of(work, recorded().ceilings, Mode::kCold).seconds()) + " µs";
  };
  struct Wanted {
    const char *shape, *small, *plain, *rows, *says;
  };
  for (const auto& [shape, small, plain, rows, says] :
       {Wanted{"h16_q1_b128_k8192", "h16_q1_b128_k8192_fp8_tile128", "h16_q1_b128_k8192",
               "fp8_tile128 has 656 bytes per row, 16 bits have 1152. ",
               "can take 57% of the time"},
        Wanted{"h16_q1_b128_k8192_fp16", "h16_q1_b128_k8192_fp8_tensor_fp16",
               "h16_q1_b128_k8192_fp16", "fp8_tensor has 576 bytes", "can take 50% of the time"},
        Wanted{"h128_q1_b128_k8192", "h128_q1_b128_k8192_fp8_tile128", "h128_q1_b128_k8192",
               "fp8_tile128 has 656 bytes", "saves memory here, not time"}}) {
    const std::string text = text_of(input_of(shape, "08"), "cache format");
    for (const std::string& part :
         {std::string(rows), floor_us(small), floor_us(plain), std::string(says)}) {
      EXPECT_NE(text.find(part), std::string::npos) << text << " lacks " << part;
    }
    // The advice is the same when the cache is quantised already.
    ExplainInput quantised = input_of(small, "08");
    for (StageFacts& stage : quantised.stages) stage.cache = {};
    EXPECT_EQ(text_of(quantised, "cache format"), text);
  }
  EXPECT_SILENT("cache format", "h16_q1_b1_k64", "08");  // the launch is nearly all of the time
}

TEST(Advice, Fp16CostsTheSame) {
  EXPECT_SPEAKS("fp16", "h128_q1_b64_k4096_fp16", "08");
  EXPECT_SILENT("fp16", "h128_q1_b64_k4096", "08");
  const ExplainInput fp16 = input_of("h128_q1_b64_k4096_fp16");
  const ExplainInput bf16 = input_of("h128_q1_b64_k4096");
  EXPECT_DOUBLE_EQ(work_of(fp16.problem, 64 * 4096).bytes, work_of(bf16.problem, 64 * 4096).bytes);
  for (size_t i = 0; i < fp16.stages.size(); ++i) {
    const Prediction &a = fp16.stages[i].prediction, &b = bf16.stages[i].prediction;
    EXPECT_DOUBLE_EQ(a.fp32_flop, b.fp32_flop);
    EXPECT_DOUBLE_EQ(a.matrix_flop, b.matrix_flop);
    EXPECT_DOUBLE_EQ(a.shared_bytes, b.shared_bytes);
    EXPECT_DOUBLE_EQ(a.dram_bytes, b.dram_bytes);
  }
}

TEST(Advice, RaggedLengths) {
  EXPECT_SPEAKS("ragged lengths", "h128_q1_b128_kskew131072", "08");
  EXPECT_SILENT("ragged lengths", "h128_q1_b128_k8192", "08");
  const std::string text = text_of(input_of("h128_q1_b128_kskew131072"), "ragged lengths");
  EXPECT_NE(text.find("85.6×"), std::string::npos) << text;
}

TEST(Advice, BelowAGrain) {
  EXPECT_SPEAKS("below a grain", "h16_q1_b300_k20", "08");
  EXPECT_SILENT("below a grain", "h16_q1_b300_k64", "08");
  EXPECT_SILENT("below a grain", "h16_q1_b2_k100", "08");
  EXPECT_EQ(plan_of(input_of("h16_q1_b300_k20"), "08").pieces, 0);
  // Of two halves that are joined, only one is stored as a part.
  EXPECT_EQ(plan_of(input_of("h64_q1_b64_k4096"), "09").pieces, 128);
  EXPECT_EQ(plan_of(input_of("h64_q1_b64_k4096"), "09").parts, 64);
  EXPECT_EQ(plan_of(input_of("h64_q1_b64_k4096"), "08").parts, 128);
  // 20 tokens leave 12 of two pages of 16 empty, and 44 of one page of 64.
  for (const auto& [shape, padding] : {std::pair{"h16_q1_b300_k20_page16", "16 tokens: 38%"},
                                       std::pair{"h16_q1_b300_k20", "64 tokens: 69%"}}) {
    const std::string text = text_of(input_of(shape, "08"), "below a grain");
    EXPECT_NE(text.find(padding), std::string::npos) << text;
  }
}

// A plan deals out grains of 64 tokens, whatever the page size.
TEST(Advice, DoesNotTakePagesForGrains) {
  for (const char* page : {"_page16", "_page256"}) {
    for (const auto& [rule, shape] :
         {std::pair{"too short to fill", "h16_q1_b4_k512"},
          std::pair{"cuts too far apart", "h128_q1_b1_k65536_split16384"}}) {
      const std::string text = text_of(input_of(shape, "08"), rule);
      EXPECT_NE(text, "");
      EXPECT_EQ(text_of(input_of(std::string(shape) + page, "08"), rule), text) << page;
    }
  }
  EXPECT_NE(text_of(input_of("h16_q1_b4_k512_page16", "08"), "too short to fill").find("32 grains"),
            std::string::npos);
  const std::string whole = explain(input_of("h16_q1_b1_k8192_page256", "08"));
  EXPECT_NE(whole.find("in 32 pages"), std::string::npos) << whole;
  EXPECT_NE(whole.find("2 grains; 1 of 1"), std::string::npos) << whole;
}

Estimate estimate_on(const ExplainInput& input, const std::string& stage) {
  return estimate_of(facts_of(input, stage), input);
}

TEST(Estimate, IsNoLessThanTheOwnLimitAndNearTheRecordedTime) {
  for (const char* shape : {"h128_q1_b1_k4096", "h16_q1_b1_k8192", "h16_q1_b4_k512",
                            "h128_q1_b16_k4096", "h128_q1_b64_k4096", "h64_q1_b64_k4096",
                            "h16_q1_b64_k4096", "h128_q1_b128_k8192", "h128_q1_b128_kskew131072"}) {
    const ExplainInput input = input_of(shape);
    const Work work = work_of(input.problem, total(input.seqlens_k));
    for (const char* stage : {"04", "05", "06", "07", "08"}) {
      const StageFacts& facts = facts_of(input, stage);
      const double estimate = estimate_on(input, stage).seconds();
      EXPECT_GE(estimate, own_limit(facts.prediction, work, input.ceilings, Mode::kCold).seconds())
          << shape << " " << stage;
      ASSERT_GT(facts.cold.n, 0) << shape << " " << stage;
      const double ratio = facts.cold.median * 1e-6 / estimate;
      EXPECT_LT(ratio, 1.5) << shape << " " << stage;
      EXPECT_GT(ratio, 1 / 1.5) << shape << " " << stage;
    }
  }
}

TEST(Estimate, ItsSteps) {
  const ExplainInput one = input_of("h128_q1_b1_k4096");
  const Estimate of_one = estimate_on(one, "05");
  EXPECT_DOUBLE_EQ(of_one.launch, one.ceilings.launch);
  // 128 blocks have one tile each. A block reads 72 KB of q and as much of the cache, at twice a
  // 132nd of the rate.
  EXPECT_NEAR(of_one.first_tile, 4 * kLoadLatency + 2 * 73728 * 132 / (2 * one.ceilings.read),
              1e-9);
  const double clock = one.ceilings.shared / one.ceilings.shared_bytes_per_clock / 132;
  EXPECT_NEAR(of_one.tiles, (2176 + 4224) / clock, 1e-9);
  // 64 parts of 128 rows are written, and then read by the combine.
  const double parts = 64.0 * 128 * (512 + 1) * 4 / one.ceilings.read;
  EXPECT_NEAR(of_one.end, parts, 1e-9);
  EXPECT_NEAR(of_one.combine,
              kNextKernel + 3 * kLoadLatency + parts + 128.0 * 512 * 2 / one.ceilings.read, 1e-9);
  // Whole sequences leave no parts.
  const ExplainInput whole = input_of("h128_q1_b64_k4096");
  EXPECT_NEAR(estimate_on(whole, "05").combine, kNextKernel + 2 * kLoadLatency, 1e-9);
  // Two blocks of 16 rows share a multiprocessor: a worker's 16 grains take the time of 32.
  const ExplainInput few = input_of("h16_q1_b64_k4096");
  const double grain = facts_of(few, "04").prediction.grain_clocks / clock;
  EXPECT_NEAR(estimate_on(few, "04").tiles, 32 * grain, grain / 100);
  // Where memory binds, the time is that of all bytes, and of what is still to do when the last of
  // them have come.
  EXPECT_GT(estimate_on(few, "08").tiles + estimate_on(few, "08").first_tile,
            work_of(few.problem, total(few.seqlens_k)).bytes / few.ceilings.read);
  ExplainInput unknown = input_of("h128_q1_b1_k4096");
  unknown.ceilings = {};
  EXPECT_TRUE(std::isnan(estimate_on(unknown, "05").seconds()));
  EXPECT_TRUE(std::isnan(estimate_on(one, "03").seconds()));  // no plan
}

TEST(Advice, LargeWorkspace) {
  EXPECT_SPEAKS("large workspace", "h128_q1_b1_k4096", "08");
  EXPECT_SPEAKS("large workspace", "h128_q4_b2_k4096", "01");
  EXPECT_SILENT("large workspace", "h128_q1_b128_k8192", "08");
  EXPECT_SILENT("large workspace", "h128_q4_b2_k4096", "03");
  const auto bytes = [](const char* shape) {
    return facts_of(input_of(shape), "08").workspace_bytes;
  };
  EXPECT_NE(text_of(input_of("h128_q1_b128_k8192_split64", "08"), "large workspace")
                .find("further apart"),
            std::string::npos);
  EXPECT_LT(bytes("h128_q1_b128_k8192_split128"), bytes("h128_q1_b128_k8192_split64"));
}

}  // namespace
}  // namespace mla::bench
