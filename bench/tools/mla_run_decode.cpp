// mla_run decode: stages against the float64 reference.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "bench/measure/limits.h"
#include "bench/measure/statistics.h"
#include "bench/measure/truth.h"
#include "bench/measure/write_file.h"
#include "bench/tools/mla_run.h"
#include "bench/tools/npy.h"
#include "bench/tools/stage_runner.h"
#include "reference/attention.h"
#include "reference/gpu_model/named_devices.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"

namespace mla::bench {
namespace {

/// Says what is going on, before something that takes seconds.
void progress(const std::string& what) {
  std::fflush(stdout);
  fmt::print(stderr, "... {}\n", what);
}

std::string duration(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.1f} ms", seconds * 1e3);
  return fmt::format("{:.2f} s", seconds);
}

/// Schedules of the model, by seed.
struct Schedules {
  uint64_t first = 0;
  uint64_t count = 1;
};

/// Reads "3" (0, 1, 2) or "17..19".
Status parse_schedules(const std::string& text, Schedules* schedules) {
  constexpr uint64_t kMost = 10000;
  const char* const end = text.data() + text.size();
  uint64_t first = 0, last = 0;
  auto [rest, error] = std::from_chars(text.data(), end, first);
  const size_t dots = text.find("..");
  bool right = error == std::errc() && (rest == end || rest == text.data() + dots);
  if (right && dots == std::string::npos) {
    last = first - 1;
    first = 0;
  } else if (right) {
    const auto [tail, wrong] = std::from_chars(rest + 2, end, last);
    right = wrong == std::errc() && tail == end && last >= first;
  }
  *schedules = {first, last - first + 1};
  if (right && schedules->count >= 1 && schedules->count <= kMost) return {};
  return {
      StatusCode::kInvalidArgument,
      fmt::format(
          "--schedules {} is neither a number of schedules, 1 to {}, nor a range such as 17..19",
          text, kMost)};
}

/// What came of a stage's runs.
struct Result {
  bool decoded = false;       ///< Every run ended without an error.
  double seconds = kUnknown;  ///< Median.
  DecodeComparison comparison;
  std::string failure;       ///< Empty: right, in every run.
  bool differs = false;      ///< Right, but not the bits of the first schedule.
  uint64_t failed_seed = 0;  ///< The schedule of the run that failed.
  Output output;             ///< Of the first run.
};

bool same_bits(const Output& a, const Output& b) {
  return std::equal(a.out.begin(), a.out.end(), b.out.begin()) &&
         std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

/// Runs a stage: on the model under every schedule, all of which must give the same right bits; on
/// a GPU once to check it and to warm up, then five times for the time.
Result run_stage(const Placement& placement, const Dump& dump, const ReferenceResult& expected,
                 Schedules schedules) {
  constexpr uint64_t kTimedRuns = 5;
  const bool on_model = placement.machine->kind() == MachineKind::kModel;
  const uint64_t runs = on_model ? schedules.count : 1 + kTimedRuns;
  Result result;
  std::vector<double> times;
  StageRunner runner;
  Status status = runner.prepare(placement, dump);
  for (uint64_t i = 0; i < runs && status.ok() && result.failure.empty(); ++i) {
    const uint64_t seed = schedules.first + i;
    gpu_model::schedule().seed = seed;
    double seconds = 0;
    Output output;
    status = runner.run(&seconds);
    if (status.ok() && (on_model || i == 0)) status = runner.fetch(&output);
    if (status.ok()) {
      if (on_model || i > 0) times.push_back(seconds);
      if (i == 0) {
        result.comparison = compare_decode(dump.problem, output.out, output.lse, expected);
        if (!result.comparison.ok()) result.failure = result.comparison.describe();
        result.output = std::move(output);
      } else if (on_model && !same_bits(output, result.output)) {
        result.comparison = compare_decode(dump.problem, output.out, output.lse, expected);
        result.differs = result.comparison.ok();
        result.failure = fmt::format("other bits than under schedule {}; {}", schedules.first,
                                     result.comparison.describe());
      }
    }
    if (!status.ok()) result.failure = status.to_string();
    if (result.failure.empty()) continue;
    result.failed_seed = seed;
    if (on_model && schedules.count > 1) {
      result.failure = fmt::format("schedule {}: {}", seed, result.failure);
    }
  }
  if (!status.ok() && result.failure.empty()) result.failure = status.to_string();
  result.decoded = status.ok();
  result.seconds = summarize(times).median;
  return result;
}

/// The command that shows a failure again, and nothing else.
std::string repeat_line(const RunOptions& options, const Placement& placement,
                        const Result& result) {
  const bool model = placement.machine->kind() == MachineKind::kModel;
  std::string text =
      fmt::format("repeat: mla_run decode --stage {} --machine {} {}", placement.slug,
                  model ? "model" : "gpu", problem_arguments(options));
  // Bits that differ need the schedule that they differ from.
  if (model && result.differs) text += " --schedules " + options.schedules;
  if (model && !result.differs) text += fmt::format(" --schedules {0}..{0}", result.failed_seed);
  if (!options.device.empty()) text += " --device " + options.device;
  return text;
}

void print_table_head() {
  fmt::print("{:<20} {:<8} {:>12}  {:>9} {:>9} {:>9} {:>9}\n", "", "machine", "time", "max error",
             "rel. L2", "1 - cos", "lse error");
}

/// One line of the table; what is not known is a dash.
void print_row(const std::string& what, const char* machine, const std::string& time,
               const Comparison* out, const Comparison* lse, const std::string& verdict) {
  const auto cell = [](const Comparison* comparison, double Comparison::*member) {
    return comparison ? fmt::format("{:.2e}", comparison->*member) : std::string("-");
  };
  fmt::print("{:<20} {:<8} {:>12}  {:>9} {:>9} {:>9} {:>9}  {}\n", what, machine, time,
             cell(out, &Comparison::max_abs_error), cell(out, &Comparison::relative_l2),
             cell(out, &Comparison::cosine_difference), cell(lse, &Comparison::max_abs_error),
             verdict);
  std::fflush(stdout);
}

Status write_output(const RunOptions& options, const Problem& problem,
                    std::span<const uint16_t> patterns, std::span<const float> floats,
                    std::span<const float> lse) {
  const std::vector<int64_t> out_shape{problem.batch, problem.seqlen_q, problem.num_heads_q,
                                       kHeadDimV};
  const std::vector<int64_t> lse_shape{problem.batch, problem.num_heads_q, problem.seqlen_q};
  std::vector<npy::Output> outputs;
  if (!options.out.empty() && options.out_format != "fp32") {
    outputs.push_back({options.out, npy::Type::kUInt16, out_shape, std::as_bytes(patterns)});
  } else if (!options.out.empty()) {
    outputs.push_back({options.out, npy::Type::kFloat32, out_shape, std::as_bytes(floats)});
  }
  if (!options.lse.empty()) {
    outputs.push_back({options.lse, npy::Type::kFloat32, lse_shape, std::as_bytes(lse)});
  }
  MLA_RETURN_IF_ERROR(npy::write(outputs));
  for (const npy::Output& output : outputs) {
    fmt::print("wrote {}: {} {}\n", output.path, to_string(output.type),
               npy::to_string(output.shape));
  }
  return {};
}

/// "PASS" or "FAIL", and that the reference has NaN where it does: there, little was compared.
std::string verdict(bool right, const Comparison& out, const Comparison& lse = {}) {
  const std::string note = out.nan_rows > 0 ? out.nan_note() : lse.nan_note();
  return (right ? "PASS" : "FAIL") + (note.empty() ? "" : "; " + note);
}

/// Compares the user's own results with the reference, each as a row of the table. False if one is
/// wrong.
bool check_users_results(const std::vector<float>& out, const std::vector<float>& lse,
                         const RunOptions& options, const Problem& problem,
                         const ReferenceResult& expected) {
  bool right = true;
  const auto report = [&](const char* flag, const Comparison& comparison, bool is_out) {
    print_row(flag, "-", "-", is_out ? &comparison : nullptr, is_out ? nullptr : &comparison,
              verdict(comparison.ok, comparison));
    if (!comparison.ok) fmt::print("    {}\n", comparison.failure);
    right &= comparison.ok;
  };
  if (!options.check_out.empty()) {
    report("--check-out", compare_out(problem, out, expected), true);
  }
  if (!options.check_lse.empty()) {
    report("--check-lse", compare_lse(problem, lse, expected), false);
  }
  return right;
}

/// What must hold between the flags, before any file is opened.
Status check_flags(const RunOptions& options) {
  const auto invalid = [](const std::string& message) {
    return Status(StatusCode::kInvalidArgument, message);
  };
  const DumpFiles& files = options.files;
  if (options.stage == "all" && (!options.out.empty() || !options.lse.empty())) {
    return invalid("--out and --lse write the result of one stage: name it, as in --stage 02");
  }
  if (same_file(options.out, options.lse)) {
    return invalid("--out and --lse are the same file, " + options.out);
  }
  for (const std::string& output : {options.out, options.lse}) {
    for (const std::string& input : {files.q, files.cache, files.block_table, files.seqlens,
                                     options.check_out, options.check_lse}) {
      if (same_file(output, input)) {
        return invalid(output + " is an input, and will not be overwritten");
      }
    }
    MLA_RETURN_IF_ERROR(check_writable(output));
  }
  if (options.out.empty() && !options.out_format.empty()) {
    return invalid("--out-format is for the file that --out names, and there is no --out");
  }
  if (options.stage == "reference" && (!options.schedules.empty() || !options.device.empty())) {
    return invalid(
        "--schedules and --device are for the GPU model, and --stage reference needs none");
  }
  if (!options.schedules.empty() && options.machine != "model") {
    return invalid("--schedules needs --machine model: a GPU's schedule cannot be drawn");
  }
  if (!options.device.empty() && options.machine != "model") {
    return invalid("--device needs --machine model: a GPU cannot pretend to be another");
  }
  return {};
}

}  // namespace

int run_decode(const RunOptions& options) {
  const bool only_reference = options.stage == "reference";
  std::vector<Placement> placements;
  for (const gpu_model::NamedDevice& device : gpu_model::named_devices()) {
    if (device.name == options.device) gpu_model::device() = device.device;
  }
  if (!only_reference) {
    const Status status = place(options.stage, options.machine, &placements);
    if (!status.ok()) return refuse(status);
  }
  Schedules schedules;
  if (!options.schedules.empty()) {
    const Status status = parse_schedules(options.schedules, &schedules);
    if (!status.ok()) return refuse(status);
  }
  if (Status status = check_flags(options); !status.ok()) return refuse(status);

  Use use{.decodes = true};
  for (const Placement& placement : placements) {
    if (placement.why_not.ok()) use.machine = placement.machine;
  }
  Dump dump;
  if (Status status = load_problem(options, use, &dump); !status.ok()) return refuse(status);
  std::vector<float> users_out, users_lse;
  if (!options.check_out.empty()) {
    const Status status = load_out(options.check_out, dump.problem, &users_out);
    if (!status.ok()) return refuse(status);
  }
  if (!options.check_lse.empty()) {
    const Status status = load_lse(options.check_lse, dump.problem, &users_lse);
    if (!status.ok()) return refuse(status);
  }

  bool any_can_run = only_reference;
  leave_out_unable(dump.problem, &placements);
  for (const Placement& placement : placements) any_can_run |= placement.why_not.ok();
  if (!any_can_run) return refuse(placements.front().why_not);

  fmt::print("{}\n", describe(dump));
  for (const std::string& note : dump.notes) fmt::print("note: {}\n", note);
  if (options.shape.empty() && std::abs(dump.problem.softmax_scale - 1.0F / 24) < 1e-6F) {
    fmt::print("note: --scale is 576^-1/2, which no DeepSeek model uses; see --help\n");
  }
  const double flop = work_of(dump.problem, dump.total_tokens()).flop;
  if (flop > 4e9) progress(fmt::format("float64 reference, {:.0f} GFLOP", flop / 1e9));
  ReferenceResult expected;
  const auto start = WallClock::now();
  if (Status status = reference_attention(dump.problem, dump.tensors(), &expected); !status.ok()) {
    return refuse(status, kWrong);
  }
  const double reference_seconds = seconds_since(start);

  bool right = true, on_gpu = false;
  const Placement *on_cpu = nullptr, *on_model = nullptr;  // the first of each
  std::string repeat;                                      // of the first failure
  print_table_head();
  print_row("reference", "cpu", duration(reference_seconds), nullptr, nullptr, "float64");
  right &= check_users_results(users_out, users_lse, options, dump.problem, expected);
  if (only_reference && (!options.out.empty() || !options.lse.empty())) {
    const std::vector<float> out(expected.out.begin(), expected.out.end());
    const std::vector<float> lse(expected.lse.begin(), expected.lse.end());
    const Status status =
        write_output(options, dump.problem, to_patterns(dump.problem.dtype, out), out, lse);
    if (!status.ok()) return refuse(status, kWrong);
  }
  for (const Placement& placement : placements) {
    if (!placement.why_not.ok()) {
      print_row(placement.slug, options.machine.c_str(), "-", nullptr, nullptr, "cannot run here");
      fmt::print("    {}\n", placement.why_not.message());
      continue;
    }
    const bool model = placement.machine->kind() == MachineKind::kModel;
    const bool cpu = placement.stage->on_cpu;
    if (model && !cpu && flop * double(schedules.count) > 1e9) {
      progress(fmt::format("{} on the GPU model, {:.0f} GFLOP x {}", placement.slug, flop / 1e9,
                           schedules.count));
    }
    const Result result = run_stage(placement, dump, expected, schedules);
    const std::string time =
        std::isnan(result.seconds) ? "-" : duration(result.seconds) + (model && !cpu ? " *" : "");
    const bool compared = result.decoded;
    print_row(placement.slug,
              cpu     ? "cpu"
              : model ? "model"
                      : "gpu",
              time, compared ? &result.comparison.out : nullptr,
              compared ? &result.comparison.lse : nullptr,
              verdict(result.failure.empty(), result.comparison.out, result.comparison.lse));
    if (!result.failure.empty()) {
      fmt::print("    {}\n", result.failure);
      if (repeat.empty()) repeat = repeat_line(options, placement, result);
    }
    right &= result.failure.empty();
    if (cpu && on_cpu == nullptr) on_cpu = &placement;
    if (model && !cpu && on_model == nullptr) on_model = &placement;
    on_gpu |= !model;
    if (result.decoded && (!options.out.empty() || !options.lse.empty())) {
      const Status status =
          write_output(options, dump.problem, result.output.out,
                       to_floats(dump.problem.dtype, result.output.out), result.output.lse);
      if (!status.ok()) return refuse(status, kWrong);
    }
  }
  if (on_cpu != nullptr) {
    fmt::print("cpu: wall time; {}\n", where(*on_cpu->stage, *on_cpu->machine));
  }
  if (on_model != nullptr) {
    const std::string& why = on_model->fallback;
    fmt::print("* time of the CPU that plays the GPU, which says nothing about a GPU{}\n",
               why.empty() ? "" : " (" + why + ")");
  }
  if (on_gpu) {
    fmt::print("gpu: {}; median of 5 runs by the host's clock, launch and wait included\n",
               gpu_machine()->description());
  }
  if (!repeat.empty()) fmt::print("{}\n", repeat);
  return right ? kRight : kWrong;
}

}  // namespace mla::bench
