#include "bench/present.h"

#include <algorithm>
#include <iomanip>

#include "bench/table.h"

namespace mla::bench {
namespace {

using Outcome = StageResult::Outcome;

/// Short, for the table; the reason stands below it.
std::string outcome_text(const StageResult& entry) {
  return entry.outcome == Outcome::kFailed ? "FAILED, see below" : "cannot run here, see below";
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
    return Summary{us.median / 1e3, us.p10 / 1e3, us.p90 / 1e3, us.n};
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
  std::string text = "\n" + result.shape.name + ": " + result.shape.title() + "; " +
                     number(result.work.flop / 1e9) + " GFLOP, " + number(result.work.bytes / 1e6) +
                     " MB; checked " + (result.checked_whole ? "whole" : "in 64 rows of all heads");
  if (result.cold_floor == result.cold_floor) {
    text += "; floor " + microseconds(1e6 * result.cold_floor) + " µs cold, " +
            microseconds(1e6 * result.sustained_floor) + " µs sustained";
  }
  const Table table = machine == MachineKind::kGpu ? gpu_table(result) : model_table(result);
  text += '\n';
  text += table.to_string();
  for (const StageResult& entry : result.stages) {
    if (entry.outcome == Outcome::kMeasured) continue;
    text += entry.stage;
    text += entry.outcome == Outcome::kFailed ? " FAILED: " : " cannot run here: ";
    text += entry.reason + "\n";
  }
  return text;
}

void write_samples(const std::vector<ShapeResult>& results, std::ostream& file) {
  file << "stage,shape,mode,index,us\n" << std::fixed << std::setprecision(3);
  for (const ShapeResult& result : results) {
    for (const StageResult& entry : result.stages) {
      const auto write = [&](Mode mode, const std::vector<double>& samples) {
        for (size_t i = 0; i < samples.size(); ++i) {
          file << entry.stage << ',' << result.shape.name << ',' << to_string(mode) << ',' << i
               << ',' << samples[i] << '\n';
        }
      };
      if (entry.outcome != Outcome::kMeasured) continue;
      write(Mode::kCold, entry.times.cold);
      write(Mode::kSustained, entry.times.sustained);
    }
  }
}

}  // namespace mla::bench
