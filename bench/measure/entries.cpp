#include "bench/measure/entries.h"

#include <cmath>

#include "bench/measure/present.h"

namespace mla::bench {
namespace {

using Counters = std::map<std::string, double>;
using Entries = std::vector<GoogleEntry>;

void add_figures(const ShapeResult& result, double us, Counters* counters) {
  (*counters)["TFLOPs"] = result.work.flop / us / 1e6;
  (*counters)["GBps"] = result.work.bytes / us / 1e3;
  (*counters)["checked_whole"] = result.checked_whole ? 1 : 0;
  (*counters)["tokens"] = static_cast<double>(result.total_tokens);
  (*counters)["longest"] = result.longest;
}

void add_errors(const StageResult& entry, Counters* counters) {
  (*counters)["rel_l2"] = entry.check.out.relative_l2;
  (*counters)["max_abs"] = entry.check.out.max_abs_error;
  (*counters)["cosine_difference"] = entry.check.out.cosine_difference;
  (*counters)["lse_max_abs"] = entry.check.lse.max_abs_error;
}

/// "cannot run here: needs ..."
std::string reason(const StageResult& entry) {
  const bool failed = entry.outcome == StageResult::Outcome::kFailed;
  return (failed ? "failed" : outcome_name(entry.outcome)) + ": " + entry.reason;
}

void add_stage(const ShapeResult& result, const StageResult& entry, Mode mode, bool gpu,
               Entries* entries) {
  const bool cold = mode == Mode::kCold;
  const std::string name = benchmark_name(entry.stage, result.shape, to_string(mode));
  if (entry.outcome != StageResult::Outcome::kMeasured) {
    if (cold) entries->push_back({name, 0, {}, "", reason(entry)});
    return;
  }
  const Summary& times = cold ? entry.cold : entry.sustained;
  if (times.n == 0) return;
  const OwnLimit& limit = cold ? entry.cold_limit : entry.sustained_limit;
  Counters counters{{"p10_us", times.p10},
                    {"p90_us", times.p90},
                    {"n", times.n},
                    {"mean_us", times.mean},
                    {"variance_us2", times.variance},
                    {"cache_bytes", result.cache_bytes},
                    {"workspace_bytes", double(entry.workspace_bytes)},
                    {"peak_bytes", result.tensor_bytes + double(entry.workspace_bytes)}};
  add_errors(entry, &counters);
  add_figures(result, times.median, &counters);
  counters["speedup"] = cold ? entry.cold_speedup : entry.sustained_speedup;
  if (gpu) {
    counters["once"] = entry.times.once ? 1 : 0;
    const double floor = cold ? result.cold_floor : result.sustained_floor;
    counters["floor_share"] = 1e6 * floor / times.median;
    counters["own_limit_share"] = 1e6 * limit.seconds() / times.median;
    counters["limit_fp32_us"] = 1e6 * limit.fp32;
    counters["limit_matrix_us"] = 1e6 * limit.matrix;
    counters["limit_shared_us"] = 1e6 * limit.shared;
    counters["limit_dram_us"] = 1e6 * limit.dram;
    if (!cold) {
      counters["sm_mhz"] = entry.times.readings.sm_mhz;
      counters["power_w"] = entry.times.readings.watts;
      counters["energy_mj"] = 1e3 * entry.times.readings.joules_a_run;
    }
  }
  entries->push_back({name, times.median, counters, entry.idea, ""});
}

/// Median and spread of a series, and what else is known of it; nothing of an empty one.
void add_times(const std::string& name, const std::vector<double>& samples, Counters more,
               Entries* entries) {
  const Summary times = summarize(samples);
  if (times.n == 0) return;
  more.insert({{"p10_us", times.p10}, {"p90_us", times.p90}, {"n", times.n}});
  entries->push_back({name, times.median, std::move(more), "", ""});
}

/// What the plan takes alone, warm; what it adds to a decode, cold.
void add_plan(const ShapeResult& result, const StageResult& entry, Entries* entries) {
  const std::string name = benchmark_name(entry.stage, result.shape, "plan");
  if (entry.outcome != StageResult::Outcome::kMeasured) {
    if (result.shape.measure == Measure::kPlans)
      entries->push_back({name, 0, {}, "", reason(entry)});
    return;
  }
  const std::vector<double>& with_decode = entry.plan.with_decode.cold;
  add_times(benchmark_name(entry.stage, result.shape, "plan_and_decode"), with_decode, {}, entries);
  add_times(
      name, entry.plan.alone,
      {{"with_decode_us", summarize(with_decode).median}, {"marginal_us", entry.plan.marginal_us}},
      entries);
}

/// The combining kernel alone.
void add_combine(const ShapeResult& result, const StageResult& entry, Entries* entries) {
  if (entry.outcome != StageResult::Outcome::kMeasured) return;
  const CombineTimes& combine = entry.combine;
  add_times(benchmark_name(entry.stage, result.shape, "combine_cold"), combine.cold, {}, entries);
  add_times(benchmark_name(entry.stage, result.shape, "combine"), combine.warm,
            {{"cold_us", summarize(combine.cold).median},
             {"slots", combine.slots},
             {"bytes", combine.bytes}},
            entries);
}

/// The result against the reference; no time.
void add_error(const ShapeResult& result, const StageResult& entry, Entries* entries) {
  const bool measured = entry.outcome == StageResult::Outcome::kMeasured;
  Counters counters;
  if (measured) add_errors(entry, &counters);
  entries->push_back({benchmark_name(entry.stage, result.shape, "error"), 0, counters, "",
                      measured ? "" : reason(entry)});
}

}  // namespace

std::vector<GoogleEntry> google_entries(const ShapeResult& result, MachineKind machine) {
  Entries entries;
  const bool gpu = machine == MachineKind::kGpu;
  if (!std::isnan(result.reference_seconds)) {
    const double us = 1e6 * result.reference_seconds;
    Counters counters{{"n", 1}};
    add_figures(result, us, &counters);
    entries.push_back(
        {benchmark_name("reference", result.shape, "wall"), us, counters, "fp64 on the CPU", ""});
  }
  for (const StageResult& entry : result.stages) {
    if (result.shape.measure == Measure::kErrors) {
      add_error(result, entry, &entries);
      continue;
    }
    if (result.shape.measure != Measure::kPlans) {
      add_stage(result, entry, Mode::kCold, gpu, &entries);
      add_stage(result, entry, Mode::kSustained, gpu, &entries);
    }
    add_plan(result, entry, &entries);
    add_combine(result, entry, &entries);
  }
  return entries;
}

}  // namespace mla::bench
