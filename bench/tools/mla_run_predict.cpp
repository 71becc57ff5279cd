// mla_run plan, predict and explain: what is known of a decode without doing it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/explain/estimate.h"
#include "bench/explain/explain_input.h"
#include "bench/measure/limits.h"
#include "bench/measure/table.h"
#include "bench/tools/mla_run.h"
#include "reference/testing/device_data.h"

namespace mla::bench {
namespace {

/// The machine that --machine names, a GPU first if it is auto; null with a reason.
Machine* machine_of(const RunOptions& options, std::string* why_not) {
  if (options.machine == "model") return &model_machine();
  Machine* gpu = gpu_machine(why_not);
  return gpu == nullptr && options.machine == "auto" ? &model_machine() : gpu;
}

/// Finds the stages and reads the problem. `not_reference`: what the reference is refused with.
Status prepare(const RunOptions& options, const std::string& stage, const std::string& machine,
               const char* not_reference, std::vector<Placement>* placements, Dump* dump) {
  if (stage == "reference") return {StatusCode::kInvalidArgument, not_reference};
  MLA_RETURN_IF_ERROR(place(stage, machine, placements));
  return load_problem(options, Use{}, dump);
}

/// What is predicted of one stage for one device.
struct Forecast {
  const StageFacts* stage;
  const ExplainInput* input;
  Work work;
  Floor floor;
  OwnLimit limit;
  std::optional<Estimate> estimate;  ///< Of a stage with a plan
};

std::string seconds_text(double seconds) {
  return microseconds(1e6 * seconds) + " µs";
}

std::string rate_text(double amount, double rate, const char* unit) {
  return std::isnan(rate) ? "" : fmt::format(" at {} {}", number(rate / amount), unit);
}

/// One row for each resource that the stage uses: "fp32", its amount and the time that follows.
std::string forecast_table(const Forecast& one) {
  const Prediction& prediction = one.stage->prediction;
  const Ceilings& ceilings = one.input->ceilings;
  Table table({"", "spends", "least time", "how"});
  const std::string busy =
      fmt::format(", launch, {} of the multiprocessors", percent(prediction.busy_fraction));
  const auto add = [&](const char* name, double amount, double unit, const char* unit_name,
                       double seconds, const std::string& how) {
    if (amount == 0) return;
    table.add({name, fmt::format("{} {}", number(amount / unit), unit_name), seconds_text(seconds),
               how + (std::string(one.limit.name()) == name ? "  ← own limit" : "")});
  };
  add("fp32", prediction.fp32_flop, 1e9, "GFLOP", one.limit.fp32,
      "fp32 cores" + rate_text(1e12, ceilings.fp32, "TFLOP/s") + busy);
  add("matrix", prediction.matrix_flop, 1e9, "GFLOP", one.limit.matrix,
      "tensor cores" + rate_text(1e12, ceilings.matrix_cold, "TFLOP/s") + busy);
  add("shared", prediction.shared_bytes, 1e6, "MB", one.limit.shared,
      "shared memory" + rate_text(1e12, ceilings.shared, "TB/s") + busy);
  add("DRAM", std::max(prediction.dram_bytes, one.work.bytes), 1e6, "MB", one.limit.dram,
      "device memory" + rate_text(1e9, ceilings.read, "GB/s"));
  return table.to_string();
}

std::string forecast_text(const Forecast& one) {
  std::string text = fmt::format(
      "{}: own limit {}, by {}; floor {}; workspace {} MiB\n{}", one.stage->slug,
      seconds_text(one.limit.seconds()), one.limit.name(), seconds_text(one.floor.seconds()),
      number(static_cast<double>(one.stage->workspace_bytes) / (1 << 20)), forecast_table(one));
  if (one.estimate) {
    const Estimate& estimate = *one.estimate;
    text += fmt::format("estimate {}: launch {}, first tile {}, tiles {}, end {}, combine {}\n",
                        seconds_text(estimate.seconds()), seconds_text(estimate.launch),
                        seconds_text(estimate.first_tile), seconds_text(estimate.tiles),
                        seconds_text(estimate.end), seconds_text(estimate.combine));
  }
  return text;
}

nlohmann::ordered_json forecast_json(const Forecast& one) {
  const Problem& problem = one.input->problem;
  const Prediction& prediction = one.stage->prediction;
  double tokens = 0;
  for (const int32_t length : one.input->seqlens_k) tokens += length;
  nlohmann::ordered_json json{{"stage", one.stage->slug},
                              {"device", one.input->device},
                              {"ceilings", one.input->ceilings_origin},
                              {"batch", problem.batch},
                              {"seqlen_q", problem.seqlen_q},
                              {"num_heads_q", problem.num_heads_q},
                              {"num_heads_kv", problem.num_heads_kv},
                              {"max_pages_per_seq", problem.max_pages_per_seq},
                              {"cache_format", mla::to_string(problem.cache_format)},
                              {"cache_row_bytes", problem.cache_row_bytes()},
                              {"tokens", tokens},
                              {"flop", one.work.flop},
                              {"unique_bytes", one.work.bytes},
                              {"workspace_bytes", one.stage->workspace_bytes},
                              {"fp32_flop", prediction.fp32_flop},
                              {"matrix_flop", prediction.matrix_flop},
                              {"shared_bytes", prediction.shared_bytes},
                              {"dram_bytes", prediction.dram_bytes},
                              {"busy_fraction", prediction.busy_fraction}};
  const Estimate estimate = one.estimate.value_or(Estimate{});
  const std::pair<const char*, double> times[] = {{"fp32_s", one.limit.fp32},
                                                  {"matrix_s", one.limit.matrix},
                                                  {"shared_s", one.limit.shared},
                                                  {"dram_s", one.limit.dram},
                                                  {"own_limit_s", one.limit.seconds()},
                                                  {"floor_s", one.floor.seconds()},
                                                  {"estimate_launch_s", estimate.launch},
                                                  {"estimate_first_tile_s", estimate.first_tile},
                                                  {"estimate_tiles_s", estimate.tiles},
                                                  {"estimate_end_s", estimate.end},
                                                  {"estimate_combine_s", estimate.combine},
                                                  {"estimate_s", estimate.seconds()}};
  for (const auto& [name, seconds] : times) {
    if (!std::isnan(seconds)) json[name] = seconds;
  }
  return json;
}

}  // namespace

int run_predict(const RunOptions& options) {
  std::vector<Placement> placements;
  Dump dump;
  if (Status status =
          prepare(options, options.stage, "model",
                  "predict is for stages; the reference has no prediction", &placements, &dump);
      !status.ok()) {
    return refuse(status);
  }
  std::string no_machine;
  Machine* machine = machine_of(options, &no_machine);
  if (machine == nullptr) return refuse({StatusCode::kUnavailable, no_machine});

  const ExplainInput input =
      explain_on(*machine, dump.problem, dump.seqlens_k, placements.front().slug);
  if (!options.json) {
    fmt::print("{}\ndevice: {}\nceilings: {}\n", describe(dump), input.device,
               input.ceilings_origin);
  }
  bool any = false;
  for (const Placement& placement : placements) {
    const auto found =
        std::find_if(input.stages.begin(), input.stages.end(),
                     [&](const StageFacts& stage) { return stage.slug == placement.slug; });
    if (found == input.stages.end()) continue;
    if (!found->can_run()) {
      if (placements.size() == 1) return refuse(found->device.ok() ? found->cache : found->device);
      continue;
    }
    any = true;
    const Work work = work_of(dump.problem, dump.total_tokens());
    Forecast one{&*found,
                 &input,
                 work,
                 floor_of(work, input.ceilings, Mode::kCold),
                 own_limit(found->prediction, work, input.ceilings, Mode::kCold),
                 std::nullopt};
    if (found->plan) one.estimate = estimate_of(*found, input);
    if (options.json) {
      fmt::print("{}\n", forecast_json(one).dump());
    } else {
      fmt::print("\n{}", forecast_text(one));
    }
  }
  return any ? kRight
             : refuse({StatusCode::kUnsupported, "no stage runs on this device, on this cache"});
}

/// Makes the plan of every stage that has one, each on its machine, and prints it.
int run_plan(const RunOptions& options) {
  std::vector<Placement> placements;
  Dump dump;
  if (Status status =
          prepare(options, options.stage, options.machine,
                  "plan is for stages; the reference makes no plan", &placements, &dump);
      !status.ok()) {
    return refuse(status);
  }
  leave_out_unable(dump.problem, &placements);
  int printed = 0;
  Status none(StatusCode::kUnsupported, placements.size() > 1
                                            ? "none of the stages makes a plan"
                                            : placements.front().slug + " makes no plan");
  for (const Placement& placement : placements) {
    if (!placement.why_not.ok()) {
      none = placement.why_not;
      continue;
    }
    const Stage& stage = *placement.stage;
    Machine& machine = *placement.machine;
    PlanShape shape;
    if (const Status known = plan_shape(stage, dump.problem, machine.limits(), &shape);
        !known.ok()) {
      if (known.code() == StatusCode::kUnsupported) continue;  // it makes none
      return refuse(known, kWrong);
    }
    DeviceBuffer seqlens_k, workspace;
    HostPlan plan;
    Status status = seqlens_k.assign(machine, dump.seqlens_k.data(), dump.seqlens_k.size() * 4);
    if (status.ok()) status = allocate_workspace(stage, dump.problem, &workspace);
    if (status.ok()) {
      status = plan_decode(stage, dump.problem, seqlens_k.as<int32_t>(), workspace);
    }
    if (status.ok()) {
      status = read_plan(stage, dump.problem, workspace, &plan);
    }
    if (!status.ok()) return refuse(status, kWrong);
    fmt::print("{}{}, plan made on: {}\n{}\nrow tiles: {}, workers for each: {}{}\n{}",
               printed > 0 ? "\n" : "", stage.slug, machine.description(), describe(dump),
               shape.row_tiles, shape.workers,
               shape.team > 1 ? fmt::format(", teams of {} blocks", shape.team) : "",
               describe_plan(plan));
    ++printed;
  }
  return printed > 0 ? kRight : refuse(none);
}

/// Says what binds the problem, on a GPU or, from records, on the one that was recorded.
int run_explain(const RunOptions& options) {
  const bool all = options.stage.empty() || options.stage == "all";
  std::vector<Placement> placements;
  Dump dump;
  if (Status status = prepare(options, all ? "all" : options.stage, "model",
                              "explain is for stages; the reference has nothing to explain",
                              &placements, &dump);
      !status.ok()) {
    return refuse(status);
  }
  std::string no_machine;
  Machine* machine = machine_of(options, &no_machine);
  if (machine == nullptr) return refuse({StatusCode::kUnavailable, no_machine});
  const ExplainInput input = explain_on(*machine, dump.problem, dump.seqlens_k,
                                        all ? std::string() : placements.front().slug);
  fmt::print("{}\n{}", describe(dump), explain(input));
  return kRight;
}

}  // namespace mla::bench
