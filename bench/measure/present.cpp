#include "bench/measure/present.h"

#include <fmt/format.h>

#include <algorithm>
#include <iomanip>

#include "bench/measure/table.h"

namespace mla::bench {

using Outcome = StageResult::Outcome;

std::string outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kMeasured:
      return "measured";
    case Outcome::kCannotRun:
      return "cannot run here";
    case Outcome::kLeftOut:
      return "left out";
    case Outcome::kFailed:
      return "FAILED";
  }
  return "unknown";
}

namespace {

/// Short, for the table; the reason is below it.
std::string outcome_text(const StageResult& entry) {
  return outcome_name(entry.outcome) + ", see below";
}

std::string share_of_limit(const OwnLimit& limit, double us) {
  const double share = 1e6 * limit.seconds() / us;
  return share == share ? percent(share) + " " + limit.name() : percent(share);
}

Table gpu_table(const ShapeResult& result) {
  Table table({"stage", "cold µs (p10–p90)", "sustained µs (p10–p90)", "TFLOP/s", "GB/s",
               "own limit", "floor", "speed-up", "rel. L2 error", "the one idea"});
  const double reference_us = 1e6 * result.reference_seconds;
  table.add({"reference", microseconds(reference_us), "—",
             number(result.work.flop / reference_us / 1e6),
             number(result.work.bytes / reference_us / 1e3), "—", "—", "—", "—",
             "fp64 on the CPU, wall time of one run"});
  for (const StageResult& entry : result.stages) {
    if (entry.outcome != Outcome::kMeasured) {
      table.add({entry.stage, "—", "—", "—", "—", "—", "—", "—", "—", outcome_text(entry)});
      continue;
    }
    const double us = entry.cold.median;
    table.add({entry.stage, spread(entry.cold),
               entry.times.once ? "over 200 ms" : spread(entry.sustained),
               number(result.work.flop / us / 1e6), number(result.work.bytes / us / 1e3),
               share_of_limit(entry.cold_limit, us), percent(1e6 * result.cold_floor / us),
               factor(entry.cold_speedup), error(entry.check.out.relative_l2), entry.idea});
  }
  return table;
}

Table model_table(const ShapeResult& result) {
  Table table({"stage", "model time, not a GPU's: ms (p10–p90)", "rel. L2 error", "the one idea"});
  const auto milliseconds = [](Summary us) {
    return Summary{us.median / 1e3, us.p10 / 1e3,     us.p90 / 1e3, us.n,
                   us.mean / 1e3,   us.variance / 1e6};
  };
  table.add({"reference", microseconds(1e3 * result.reference_seconds), "—",
             "fp64 on the CPU, wall time of one run"});
  for (const StageResult& entry : result.stages) {
    if (entry.outcome != Outcome::kMeasured) {
      table.add({entry.stage, "—", "—", outcome_text(entry)});
      continue;
    }
    table.add({entry.stage, spread(milliseconds(entry.cold)), error(entry.check.out.relative_l2),
               entry.idea});
  }
  return table;
}

Table error_table(const ShapeResult& result) {
  Table table({"stage", "rel. L2 error", "1 - cosine", "max error", "lse max error"});
  for (const StageResult& entry : result.stages) {
    if (entry.outcome != Outcome::kMeasured) {
      table.add({entry.stage, "—", "—", "—", outcome_text(entry)});
      continue;
    }
    const Comparison& out = entry.check.out;
    table.add({entry.stage, error(out.relative_l2), error(out.cosine_difference),
               error(out.max_abs_error), error(entry.check.lse.max_abs_error)});
  }
  return table;
}

/// "412 W, 1.35 GHz, 49.1 mJ per run, 0.767 mJ per query token", a line per stage, of those whose energy was
/// read.
std::string energy_lines(const ShapeResult& result) {
  std::string text;
  for (const StageResult& entry : result.stages) {
    const Readings& readings = entry.times.readings;
    if (entry.outcome != Outcome::kMeasured || !(readings.watts > 0)) continue;
    const double millijoules = 1e3 * readings.joules_a_run;
    const double tokens = double(result.shape.spec.batch) * result.shape.spec.seqlen_q;
    text += entry.stage + ": sustained " + number(readings.watts) + " W, " +
            number(readings.sm_mhz / 1e3) + " GHz, " + number(millijoules) + " mJ per run, " +
            number(millijoules / tokens) + " mJ per query token\n";
  }
  return text;
}

/// Why stages have no time, one line per stage.
std::string reasons(const ShapeResult& result) {
  std::string text;
  for (const StageResult& entry : result.stages) {
    if (entry.outcome == Outcome::kMeasured) continue;
    text += entry.stage + " " + outcome_name(entry.outcome) + ": " + entry.reason + "\n";
  }
  if (!result.unable.empty()) {
    text +=
        fmt::format("left out, because they cannot read a cache of {}: {}\n",
                    mla::to_string(result.shape.spec.cache_format), fmt::join(result.unable, ", "));
  }
  return text;
}

/// "04_split_kv: plan alone, warm, 4.31 us (4.29-4.35); plan and decode, cold, 120.0 us, 3.1 us over
/// decode", a line per stage that makes a plan.
std::string plan_lines(const ShapeResult& result, MachineKind machine) {
  std::string text;
  for (const StageResult& entry : result.stages) {
    if (entry.outcome != Outcome::kMeasured || entry.plan.alone.empty()) continue;
    text += entry.stage + ": plan alone, ";
    text += machine == MachineKind::kGpu ? "warm, " : "model time, ";
    text += spread(summarize(entry.plan.alone)) + " µs";
    if (machine == MachineKind::kGpu && !entry.plan.with_decode.cold.empty()) {
      text += "; plan and decode, cold, " +
              microseconds(summarize(entry.plan.with_decode.cold).median) + " µs, " +
              microseconds(entry.plan.marginal_us) + " µs over decode";
    }
    if (!entry.combine.warm.empty()) {
      text += "; combine alone, " + std::to_string(entry.combine.slots) + " slots, " +
              spread(summarize(entry.combine.warm)) + " µs";
    }
    text += "\n";
  }
  return text;
}

}  // namespace

std::string describe(const Context& context) {
  const auto get = [&](const std::string& key) { return value_of(context, key); };
  std::string text = get("machine_description");
  if (get("machine") == "gpu") {
    text += ", driver " + get("driver");
    text += ", SM clock up to " + get("max_sm_mhz") + " MHz, power limit " + get("power_limit_w") +
            " W";
  }
  text += "\nnvcc " + get("nvcc") + ", " + get("host_compiler") + ", commit " + get("commit") +
          ", " + get("date_utc") + "\n";
  if (get("machine") != "gpu") return text;
  const auto or_dash = [&](const std::string& key) {
    const std::string value = get(key);
    return value.empty() ? std::string("—") : value;
  };
  text += "measured ceilings: read " + or_dash("ceiling_read_gbps") +
          " GB/s (302 MB: " + or_dash("ceiling_read_302mb_gbps") + "), fp32 FMA " +
          or_dash("ceiling_fp32_tflops") + " TFLOP/s, shared memory " +
          or_dash("ceiling_shared_tbps") + " TB/s (" + or_dash("ceiling_shared_bytes_per_clock") +
          " B/clock/SM), empty launch " + or_dash("ceiling_launch_us") +
          " µs,\n  cuBLAS bf16 8192³ " + or_dash("ceiling_matrix_cold_tflops") + " TFLOP/s cold, " +
          or_dash("ceiling_matrix_sustained_tflops") + " sustained\n";
  if (!get("ceiling_matrix_note").empty()) text += "  " + get("ceiling_matrix_note") + "\n";
  return text;
}

std::string side_by_side(const ShapeResult& result, MachineKind machine) {
  std::string text = "\n" + result.shape.name + ": " + result.shape.title();
  if (result.shape.measure == Measure::kErrors) {
    text += "; only errors, against fp64\n" + error_table(result).to_string();
    return text + reasons(result);
  }
  if (result.shape.measure == Measure::kPlans) {
    text += "; only plans\n" + plan_lines(result, machine);
    if (result.stages.empty()) text += "none of these stages makes a plan\n";
    return text + reasons(result);
  }
  text += "; " + number(result.work.flop / 1e9) + " GFLOP, " + number(result.work.bytes / 1e6) +
          " MB; checked " + (result.checked_whole ? "whole" : "in 64 rows of all heads");
  if (result.cold_floor == result.cold_floor) {
    text += "; floor " + microseconds(1e6 * result.cold_floor) + " µs cold, " +
            microseconds(1e6 * result.sustained_floor) + " µs sustained";
  }
  const Table table = machine == MachineKind::kGpu ? gpu_table(result) : model_table(result);
  text += '\n';
  text += table.to_string();
  return text + plan_lines(result, machine) + energy_lines(result) + reasons(result);
}

void write_samples(const std::vector<ShapeResult>& results, std::ostream& file) {
  file << "stage,shape,mode,index,us\n" << std::fixed << std::setprecision(3);
  for (const ShapeResult& result : results) {
    for (const StageResult& entry : result.stages) {
      const auto write = [&](const char* mode, const std::vector<double>& samples) {
        for (size_t i = 0; i < samples.size(); ++i) {
          file << entry.stage << ',' << result.shape.name << ',' << mode << ',' << i << ','
               << samples[i] << '\n';
        }
      };
      if (entry.outcome != Outcome::kMeasured) continue;
      write("cold", entry.times.cold);
      write("sustained", entry.times.sustained);
      write("plan", entry.plan.alone);
      write("plan+decode", entry.plan.with_decode.cold);
      write("combine", entry.combine.warm);
      write("combine cold", entry.combine.cold);
    }
  }
}

}  // namespace mla::bench
