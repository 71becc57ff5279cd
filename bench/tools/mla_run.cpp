// Runs one stage, or all, on tensors dumped from a model (.npy), or on generated ones; compares
// with the float64 reference; writes out and lse.
//
// Exit code: 0 all right; 1 a run failed or disagreed; 2 nothing was run: bad input, or no such
// machine.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "bench/explain/explain_input.h"
#include "bench/measure/limits.h"
#include "bench/measure/program.h"
#include "bench/measure/shapes.h"
#include "bench/measure/statistics.h"
#include "bench/tools/dump.h"
#include "bench/tools/npy.h"
#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "stages/common/stage.h"

namespace mla::bench {
namespace {

constexpr int kRight = 0;
constexpr int kWrong = 1;
constexpr int kNothingRun = 2;

constexpr const char* kDescription =
    "Decodes with one stage, or all, and compares with the float64 reference.";

constexpr const char* kFooter = R"(
Example, with the dump in tests/data:

  mla_run --stage 02 --dtype bf16 --scale 0.135234 \
      --q tests/data/paged/q.npy --cache tests/data/paged/cache.npy \
      --block-table tests/data/paged/block_table.npy --seqlens tests/data/paged/seqlens.npy \
      --out out.npy --lse lse.npy

What binds a shape, what its stages spend on it, what could be done about it:

  mla_run --explain --shape h128_q1_b128_k8192
  mla_run --explain --stage 08 --shape h16_q1_b1_k8192

Dumping from PyTorch, where NumPy has no bfloat16 but 16-bit patterns do:

  numpy.save("q.npy", q.contiguous().view(torch.int16).cpu().numpy())

--scale is the factor on q.k before the softmax. It comes from the unabsorbed heads, not from the 576 columns here:
192^-1/2 for DeepSeek-V2 and V3, times (0.1 mscale ln 40 + 1)^2 with YaRN: 0.135234 for V3, 0.114721 for V2-Lite.

Exit code: 0 all right; 1 a run failed or disagreed; 2 nothing was run (bad input, or no such machine).)";

struct Options {
  std::string stage;
  std::string machine = "auto";
  DumpFiles files;
  std::string shape;
  std::string data = "needles";
  uint64_t seed = 0;
  std::string out, lse, out_format = "bits";
  std::string check_out, check_lse;
  int schedules = 1;
  bool list = false;
  bool predict = false;
  bool print_plan = false;
  bool explain = false;

  bool names_files() const {
    return !files.q.empty() || !files.cache.empty() || !files.block_table.empty() ||
           !files.seqlens.empty();
  }
};

int refuse(const Status& status, int exit_code = kNothingRun) {
  return complain("mla_run", status, exit_code);
}

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

/// A stage on the machine it is to run on, or why it cannot.
struct Placement {
  std::string slug;
  std::string idea;
  const Stage* stage = nullptr;
  Machine* machine = nullptr;
  Status why_not;        ///< Not ok: cannot run.
  std::string fallback;  ///< Why the model and not the GPU, under --machine auto.
};

Status place_on_gpu(const std::string& slug, Placement* placement) {
  std::string no_gpu;
  Machine* gpu = gpu_machine(&no_gpu);
  if (gpu == nullptr) return {StatusCode::kUnavailable, no_gpu};
  const Stage* stage = find_stage(MachineKind::kGpu, slug);
  if (stage == nullptr) {
    return {StatusCode::kUnavailable, slug + " was not built for GPUs"};
  }
  MLA_RETURN_IF_ERROR(check_device(*stage, gpu->limits()));
  placement->stage = stage;
  placement->machine = gpu;
  return {};
}

Status place_on_model(const std::string& slug, Placement* placement) {
  const Stage* stage = find_stage(MachineKind::kModel, slug);
  MLA_RETURN_IF_ERROR(check_device(*stage, model_machine().limits()));
  placement->stage = stage;
  placement->machine = &model_machine();
  return {};
}

/// The stages that `name` asks for ("all": every one), each on its machine. Empty for an unknown
/// name.
std::vector<Placement> place(const std::string& name, const std::string& machine) {
  std::vector<Placement> placements;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (name != "all" && find_stage(MachineKind::kModel, name) != &stage) continue;
    Placement placement;
    placement.slug = stage.slug;
    placement.idea = stage.idea;
    if (machine != "model") placement.why_not = place_on_gpu(stage.slug, &placement);
    if (machine == "model" || (machine == "auto" && !placement.why_not.ok())) {
      placement.fallback = placement.why_not.message();
      placement.why_not = place_on_model(stage.slug, &placement);
    }
    placements.push_back(std::move(placement));
  }
  return placements;
}

int list_stages() {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    fmt::print("{:<20} {}\n", stage.slug, stage.idea);
    for (const char* machine : {"gpu", "model"}) {
      const Placement placement = place(stage.slug, machine).front();
      fmt::print(
          "{:<20}   {:<5}  {}\n", "", machine,
          placement.why_not.ok() ? placement.machine->description() : placement.why_not.message());
    }
  }
  fmt::print("{:<20} {}\n", "reference", "float64 on the CPU: the truth");
  return kRight;
}

std::string describe(const Dump& dump) {
  const Problem& problem = dump.problem;
  const auto [shortest, longest] =
      std::minmax_element(dump.seqlens_k.begin(), dump.seqlens_k.end());
  return fmt::format(
      "{}, b={} s_q={} h_q={} h_kv={}, {}{} tokens in {} pages, scale {:g}, {}causal{}",
      to_string(problem.dtype), problem.batch, problem.seqlen_q, problem.num_heads_q,
      problem.num_heads_kv, *shortest,
      *shortest != *longest ? fmt::format(" to {}", *longest) : std::string(), problem.num_pages,
      problem.softmax_scale, problem.causal ? "" : "not ",
      problem.fixed_split_tokens > 0
          ? fmt::format(", split every {} tokens", problem.fixed_split_tokens)
          : std::string());
}

/// What a stage expects to spend, one "name value" a line.
int print_predictions(const std::vector<Placement>& placements, const Dump& dump) {
  const Problem& problem = dump.problem;
  for (const Placement& placement : placements) {
    if (!placement.why_not.ok()) return refuse(placement.why_not);
    const Stage& stage = *placement.stage;
    const Work work = work_of(problem, dump.total_tokens());
    const Prediction prediction =
        stage.predict(problem, dump.total_tokens(), placement.machine->limits());
    fmt::print("stage {}\n", stage.slug);
    const std::pair<const char*, double> terms[] = {
        {"batch", problem.batch},
        {"seqlen_q", problem.seqlen_q},
        {"num_heads_q", problem.num_heads_q},
        {"num_heads_kv", problem.num_heads_kv},
        {"max_pages_per_seq", problem.max_pages_per_seq},
        {"tokens", static_cast<double>(dump.total_tokens())},
        {"flop", work.flop},
        {"unique_bytes", work.bytes},
        {"workspace_bytes",
         static_cast<double>(workspace_bytes(stage, problem, placement.machine->limits()))},
        {"fp32_flop", prediction.fp32_flop},
        {"matrix_flop", prediction.matrix_flop},
        {"shared_bytes", prediction.shared_bytes},
        {"dram_bytes", prediction.dram_bytes},
        {"busy_fraction", prediction.busy_fraction}};
    for (const auto& [name, value] : terms) fmt::print("{} {:.15g}\n", name, value);
  }
  return kRight;
}

/// Makes the plan of every stage that has one, each on its machine, and prints it.
int print_plans(const std::vector<Placement>& placements, const Dump& dump) {
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
    if (stage.plan_shape == nullptr) continue;
    DeviceBuffer seqlens_k, workspace;
    HostPlan plan;
    Status status = seqlens_k.assign(machine, dump.seqlens_k.data(), dump.seqlens_k.size() * 4);
    if (status.ok())
      status = workspace.allocate(machine, workspace_bytes(stage, dump.problem, machine.limits()));
    if (status.ok()) {
      status = plan_decode(stage, dump.problem, seqlens_k.as<int32_t>(), workspace);
    }
    if (status.ok()) {
      status = read_plan(stage, dump.problem, workspace, &plan);
    }
    if (!status.ok()) return refuse(status, kWrong);
    const PlanShape shape = stage.plan_shape(dump.problem, machine.limits());
    fmt::print("{}{}, plan made on: {}\n{}\nrow tiles: {}, workers for each: {}\n{}",
               printed > 0 ? "\n" : "", stage.slug, machine.description(), describe(dump),
               shape.row_tiles, shape.workers, describe_plan(plan));
    ++printed;
  }
  return printed > 0 ? kRight : refuse(none);
}

/// Says what binds the problem, on a GPU or, from records, on the one that was recorded.
int print_explanation(const Options& options, const Dump& dump) {
  std::string no_gpu;
  Machine* machine = options.machine == "model" ? &model_machine() : gpu_machine(&no_gpu);
  if (machine == nullptr && options.machine == "gpu") {
    return refuse({StatusCode::kUnavailable, no_gpu});
  }
  ExplainInput input =
      explain_on(machine != nullptr ? *machine : model_machine(), dump.problem, dump.seqlens_k);
  if (options.stage != "all") input.stage = find_stage(MachineKind::kModel, options.stage)->slug;
  fmt::print("{}\n{}", describe(dump), explain(input));
  return kRight;
}

/// Out and lse on the host.
struct Output {
  std::vector<uint16_t> out;
  std::vector<float> lse;
};

/// Runs a stage on tensors held on its machine.
class Runner {
 public:
  Status prepare(const Placement& placement, const Dump& dump) {
    stage_ = placement.stage;
    machine_ = placement.machine;
    problem_ = dump.problem;
    const Tensors host = dump.tensors();
    const auto bytes = [](int64_t elements, size_t size) {
      return static_cast<size_t>(elements) * size;
    };
    MLA_RETURN_IF_ERROR(device_.q.assign(*machine_, host.q, bytes(problem_.q_elements(), 2)));
    MLA_RETURN_IF_ERROR(
        device_.kv_cache.assign(*machine_, host.kv_cache, bytes(problem_.kv_elements(), 2)));
    MLA_RETURN_IF_ERROR(device_.block_table.assign(*machine_, host.block_table,
                                                   bytes(problem_.block_table_elements(), 4)));
    MLA_RETURN_IF_ERROR(
        device_.seqlens_k.assign(*machine_, host.seqlens_k, bytes(problem_.batch, 4)));
    MLA_RETURN_IF_ERROR(device_.out.allocate(*machine_, bytes(problem_.out_elements(), 2)));
    MLA_RETURN_IF_ERROR(device_.lse.allocate(*machine_, bytes(problem_.lse_elements(), 4)));
    const size_t lent = workspace_bytes(*stage_, problem_, machine_->limits());
    if (lent > 0) MLA_RETURN_IF_ERROR(workspace_.allocate(*machine_, lent));
    return {};
  }

  /// One decode into outputs full of NaN, by the host's clock, waiting included.
  Status run(double* seconds) {
    MLA_RETURN_IF_ERROR(device_.poison_outputs(*machine_));
    MLA_RETURN_IF_ERROR(machine_->synchronize());
    const auto start = WallClock::now();
    MLA_RETURN_IF_ERROR(decode(*stage_, problem_, device_.tensors(), workspace_));
    MLA_RETURN_IF_ERROR(machine_->synchronize());
    *seconds = seconds_since(start);
    return {};
  }

  Status fetch(Output* output) const {
    MLA_RETURN_IF_ERROR(bench::fetch(*machine_, device_.out, &output->out));
    return bench::fetch(*machine_, device_.lse, &output->lse);
  }

 private:
  const Stage* stage_ = nullptr;
  Machine* machine_ = nullptr;
  Problem problem_;
  DeviceTensors device_;
  DeviceBuffer workspace_;
};

/// What came of a stage's runs.
struct Result {
  bool decoded = false;       ///< Every run ended without an error.
  double seconds = kUnknown;  ///< Median.
  DecodeComparison comparison;
  std::string failure;  ///< Empty: right, in every run.
  Output output;        ///< Of the first run.
};

bool same_bits(const Output& a, const Output& b) {
  return std::equal(a.out.begin(), a.out.end(), b.out.begin()) &&
         std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0;
}

/// Runs a stage: on the model under every schedule, all of which must give the same right bits; on
/// a GPU once to check it and to warm up, then five times for the time.
Result run_stage(const Placement& placement, const Dump& dump, const ReferenceResult& expected,
                 int schedules) {
  constexpr int kTimedRuns = 5;
  const bool on_model = placement.machine->kind() == MachineKind::kModel;
  const int runs = on_model ? schedules : 1 + kTimedRuns;
  Result result;
  std::vector<double> times;
  Runner runner;
  Status status = runner.prepare(placement, dump);
  for (int i = 0; i < runs && status.ok() && result.failure.empty(); ++i) {
    gpu_model::schedule().seed = static_cast<uint64_t>(i);
    double seconds = 0;
    Output output;
    status = runner.run(&seconds);
    if (status.ok() && (on_model || i == 0)) status = runner.fetch(&output);
    if (status.ok()) {
      if (on_model || i > 0) times.push_back(seconds);
      if (i == 0) {
        result.comparison = compare_decode(dump.problem.dtype, output.out, output.lse, expected);
        if (!result.comparison.ok()) result.failure = result.comparison.describe();
        result.output = std::move(output);
      } else if (on_model && !same_bits(output, result.output)) {
        result.comparison = compare_decode(dump.problem.dtype, output.out, output.lse, expected);
        result.failure = "not the bits of schedule 0; " + result.comparison.describe();
      }
    }
    if (!status.ok()) result.failure = status.to_string();
    if (on_model && schedules > 1 && !result.failure.empty()) {
      result.failure = fmt::format("schedule {}: {}", i, result.failure);
    }
  }
  if (!status.ok() && result.failure.empty()) result.failure = status.to_string();
  result.decoded = status.ok();
  result.seconds = summarize(times).median;
  return result;
}

void print_table_head() {
  fmt::print("{:<20} {:<8} {:>12}  {:>9} {:>9} {:>9} {:>9}\n", "", "machine", "time", "max error",
             "rel. L2", "1 - cos", "lse error");
}

/// One line of the table; what is not known is a dash.
void print_row(const std::string& what, const char* machine, const std::string& time,
               const Comparison* out, const Comparison* lse, const char* verdict) {
  const auto cell = [](const Comparison* comparison, double Comparison::*member) {
    return comparison ? fmt::format("{:.2e}", comparison->*member) : std::string("-");
  };
  fmt::print("{:<20} {:<8} {:>12}  {:>9} {:>9} {:>9} {:>9}  {}\n", what, machine, time,
             cell(out, &Comparison::max_abs_error), cell(out, &Comparison::relative_l2),
             cell(out, &Comparison::cosine_difference), cell(lse, &Comparison::max_abs_error),
             verdict);
  std::fflush(stdout);
}

Status write_output(const Options& options, const Problem& problem,
                    std::span<const uint16_t> patterns, std::span<const float> floats,
                    std::span<const float> lse) {
  const std::vector<int64_t> out_shape{problem.batch, problem.seqlen_q, problem.num_heads_q,
                                       kHeadDimV};
  const std::vector<int64_t> lse_shape{problem.batch, problem.num_heads_q, problem.seqlen_q};
  std::vector<npy::Output> outputs;
  if (!options.out.empty() && options.out_format == "bits") {
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

/// Compares the user's own results with the reference, as a row of the table each. False if one is
/// wrong.
bool check_users_results(const std::vector<float>& out, const std::vector<float>& lse,
                         const Options& options, const ReferenceResult& expected) {
  bool right = true;
  const auto report = [&](const char* flag, const Comparison& comparison, bool is_out) {
    print_row(flag, "-", "-", is_out ? &comparison : nullptr, is_out ? nullptr : &comparison,
              comparison.ok ? "PASS" : "FAIL");
    if (!comparison.ok) fmt::print("    {}\n", comparison.failure);
    right &= comparison.ok;
  };
  if (!options.check_out.empty()) {
    report("--check-out", compare(out, expected.out, kHeadDimV, kOutTolerance), true);
  }
  if (!options.check_lse.empty()) {
    report("--check-lse", compare(lse, expected.lse, 1, kLseTolerance), false);
  }
  return right;
}

/// Fills `dump` with a generated case, its tensors only if they are `needed`.
Status generate_dump(const Options& options, bool needed, Dump* dump) {
  Shape shape;
  MLA_RETURN_IF_ERROR(parse_shape(options.shape, &shape));
  shape.spec.dtype = options.files.dtype.value_or(shape.spec.dtype);
  shape.spec.causal |= options.files.causal;
  shape.spec.seed = options.seed;
  shape.spec.data = options.data == "flat" ? DataKind::kFlat : DataKind::kNeedles;
  DataSet data = make_data_set(shape.spec);
  MLA_RETURN_IF_ERROR(validate(data.problem));
  if (needed) {
    HostTensors tensors = generate(data);
    dump->q.converted = std::move(tensors.q);
    dump->kv_cache.converted = std::move(tensors.kv_cache);
  }
  dump->problem = data.problem;
  dump->block_table = std::move(data.block_table);
  dump->seqlens_k = std::move(data.seqlens_k);
  return {};
}

/// Whether two paths name one file, or would if it were there.
bool same_file(const std::string& a, const std::string& b) {
  if (a.empty() || b.empty()) return false;
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;  // by another name, too
  const auto whole = [&error](const std::string& path) {
    const std::filesystem::path absolute = std::filesystem::absolute(path, error);
    const std::filesystem::path canonical = std::filesystem::weakly_canonical(absolute, error);
    return error ? absolute.lexically_normal() : canonical;
  };
  return whole(a) == whole(b);
}

/// What must hold between the flags, before any file is opened.
Status check_flags(const Options& options) {
  const auto invalid = [](const std::string& message) {
    return Status(StatusCode::kInvalidArgument, message);
  };
  const DumpFiles& files = options.files;
  if (!options.shape.empty()) {
    if (options.names_files()) {
      return invalid("--shape generates tensors; --q, --cache, --block-table, --seqlens name them");
    }
    if (files.softmax_scale != 0) return invalid("--shape brings its own --scale");
  } else {
    const std::pair<const char*, bool> needed[] = {{"--q", !files.q.empty()},
                                                   {"--cache", !files.cache.empty()},
                                                   {"--seqlens", !files.seqlens.empty()},
                                                   {"--scale", files.softmax_scale != 0}};
    for (const auto& [flag, given] : needed) {
      if (!given) return invalid(std::string(flag) + " is missing (or --shape); see --help");
    }
  }
  if (options.explain && options.stage == "reference") {
    return invalid("--explain is for stages; the reference has nothing to explain");
  }
  if (options.predict + options.print_plan + options.explain > 1) {
    return invalid("--predict, --print-plan and --explain exclude one another");
  }
  if (options.explain && (!options.out.empty() || !options.lse.empty() ||
                          !options.check_out.empty() || !options.check_lse.empty())) {
    return invalid("--explain decodes nothing: no --out, --lse, --check-out or --check-lse");
  }
  if (options.stage == "all" && (!options.out.empty() || !options.lse.empty())) {
    return invalid("--out and --lse take one stage's result: name it, as in --stage 02");
  }
  if (options.predict && options.stage == "reference") {
    return invalid("--predict is for stages; the reference predicts nothing");
  }
  if (options.print_plan && options.stage == "reference") {
    return invalid("--print-plan is for stages; the reference makes no plan");
  }
  if (same_file(options.out, options.lse)) {
    return invalid("--out and --lse are the same file, " + options.out);
  }
  for (const std::string& output : {options.out, options.lse}) {
    for (const std::string& input : {files.q, files.cache, files.block_table, files.seqlens,
                                     options.check_out, options.check_lse}) {
      if (same_file(output, input)) {
        return invalid(output + " is an input; it will not be overwritten");
      }
    }
    if (!output.empty()) MLA_RETURN_IF_ERROR(npy::check_writable(output));
  }
  if (options.schedules > 1 && options.machine != "model") {
    return invalid("--schedules needs --machine model: a GPU's schedule cannot be drawn");
  }
  return {};
}

int run(const Options& options) {
  if (options.list) return list_stages();
  const bool only_reference = options.stage == "reference";
  std::vector<Placement> placements;
  if (!only_reference) {
    placements = place(options.stage, options.machine);
    if (placements.empty()) {
      std::string known;
      for (const Stage& stage : stages(MachineKind::kModel)) known += stage.slug + ", ";
      return refuse({StatusCode::kInvalidArgument,
                     (options.stage.empty() ? "--stage is missing"
                                            : "--stage " + options.stage + " is not known") +
                         "; one of " + known + "all, reference needed"});
    }
  }
  if (Status status = check_flags(options); !status.ok()) return refuse(status);

  Dump dump;
  const bool decodes = !options.predict && !options.print_plan && !options.explain;
  const Status loaded =
      options.shape.empty() ? load(options.files, &dump) : generate_dump(options, decodes, &dump);
  if (!loaded.ok()) return refuse(loaded);
  std::vector<float> users_out, users_lse;
  if (!options.check_out.empty()) {
    const Status status = load_out(options.check_out, dump.problem, &users_out);
    if (!status.ok()) return refuse(status);
  }
  if (!options.check_lse.empty()) {
    const Status status = load_lse(options.check_lse, dump.problem, &users_lse);
    if (!status.ok()) return refuse(status);
  }
  if (options.predict) return print_predictions(placements, dump);
  if (options.print_plan) return print_plans(placements, dump);
  if (options.explain) return print_explanation(options, dump);

  bool any_can_run = only_reference;
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

  bool right = true, on_model = false, on_gpu = false;
  print_table_head();
  print_row("reference", "cpu", duration(reference_seconds), nullptr, nullptr, "float64");
  right &= check_users_results(users_out, users_lse, options, expected);
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
    if (model && flop * options.schedules > 1e9) {
      progress(fmt::format("{} on the GPU model, {:.0f} GFLOP x {}", placement.slug, flop / 1e9,
                           options.schedules));
    }
    const Result result = run_stage(placement, dump, expected, options.schedules);
    const std::string time =
        std::isnan(result.seconds) ? "-" : duration(result.seconds) + (model ? " *" : "");
    const bool compared = result.decoded;
    print_row(
        placement.slug, model ? "model" : "gpu", time, compared ? &result.comparison.out : nullptr,
        compared ? &result.comparison.lse : nullptr, result.failure.empty() ? "PASS" : "FAIL");
    if (!result.failure.empty()) fmt::print("    {}\n", result.failure);
    right &= result.failure.empty();
    on_model |= model;
    on_gpu |= !model;
    if (result.decoded && (!options.out.empty() || !options.lse.empty())) {
      const Status status =
          write_output(options, dump.problem, result.output.out,
                       to_floats(dump.problem.dtype, result.output.out), result.output.lse);
      if (!status.ok()) return refuse(status, kWrong);
    }
  }
  if (on_model) {
    const std::string& why = placements.front().fallback;
    fmt::print("* time of the CPU that plays the GPU; it says nothing about a GPU{}\n",
               why.empty() ? "" : " (" + why + ")");
  }
  if (on_gpu) {
    fmt::print("gpu: {}; median of 5 by the host's clock, launch and wait included\n",
               gpu_machine()->description());
  }
  return right ? kRight : kWrong;
}

/// Runs the program described by the command line; CLI11's own exit codes become ours.
int parse_and_run(int argc, char** argv) {
  Options options;
  std::string layout, dtype;
  CLI::App app(kDescription, "mla_run");
  app.footer(kFooter);
  app.get_formatter()->column_width(34);

  app.add_option("--stage", options.stage, "A stage (02 or 02_shared_tiled), all, or reference");
  app.add_option("--machine", options.machine, "gpu, model (the CPU plays the GPU), or auto")
      ->check(CLI::IsMember({"gpu", "model", "auto"}))
      ->capture_default_str();
  app.add_flag("--list", options.list, "Show the stages, and what can run here");

  const char* const inputs = "Tensors from files (.npy, little-endian, C order)";
  app.add_option("--q", options.files.q, "[b, s_q, h_q, 576]")->group(inputs);
  app.add_option("--cache", options.files.cache,
                 "[pages, 64, h_kv, 576], or contiguous [b, s, h_kv, 576]")
      ->group(inputs);
  app.add_option("--block-table", options.files.block_table, "[b, max_pages], page ids, <i4 or <i8")
      ->group(inputs);
  app.add_option("--seqlens", options.files.seqlens, "[b], tokens per sequence, <i4 or <i8")
      ->group(inputs);
  app.add_option("--layout", layout,
                 "paged or contiguous; by default paged if there is a block table")
      ->check(CLI::IsMember({"paged", "contiguous"}))
      ->group(inputs);
  app.add_option("--dtype", dtype,
                 "bf16 or fp16: what the patterns in <u2 and <i2 files are; <f2 and <f4 are "
                 "rounded to it")
      ->check(CLI::IsMember({"bf16", "fp16"}))
      ->group(inputs);
  app.add_option("--scale", options.files.softmax_scale, "Factor on q.k; see below")
      ->check(CLI::PositiveNumber)
      ->group(inputs);
  app.add_flag("--causal", options.files.causal, "Query i of s_q sees tokens 0 ... s_k - s_q + i")
      ->group(inputs);

  const char* const generated = "Or generated tensors";
  app.add_option("--shape", options.shape,
                 "As in h16_q1_b2_k256, h128_q2_b64_kvaried4096_causal, h16_q1_k256+512+1024")
      ->group(generated);
  app.add_option("--data", options.data, "needles (a few tokens dominate) or flat")
      ->check(CLI::IsMember({"needles", "flat"}))
      ->capture_default_str()
      ->group(generated);
  app.add_option("--seed", options.seed, "Odd: DeepSeek-V3's scale; even: 576^-1/2")
      ->capture_default_str()
      ->group(generated);

  const char* const results = "Results";
  app.add_option("--out", options.out, "Write out [b, s_q, h_q, 512] here (.npy)")->group(results);
  app.add_option("--lse", options.lse, "Write lse [b, h_q, s_q] here (.npy, <f4)")->group(results);
  app.add_option("--out-format", options.out_format, "bits (<u2) or fp32 (<f4)")
      ->check(CLI::IsMember({"bits", "fp32"}))
      ->capture_default_str()
      ->group(results);
  app.add_option("--check-out", options.check_out,
                 "Your own kernel's out: compare it with the reference, too")
      ->group(results);
  app.add_option("--check-lse", options.check_lse, "Your own kernel's lse")->group(results);
  app.add_option("--schedules", options.schedules,
                 "Run on the model under so many thread schedules; all must give the same bits")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str()
      ->group(results);
  app.add_flag("--predict", options.predict,
               "Run nothing; print what the stage expects to spend on it")
      ->group(results);
  app.add_flag("--print-plan", options.print_plan,
               "Decode nothing; make the stage's plan and print who attends to which tokens")
      ->group(results);
  app.add_flag(
         "--explain", options.explain,
         "Decode nothing; say what binds, what stages spend, what to do; every stage if none is "
         "named")
      ->group(results);

  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  if (!layout.empty()) {
    options.files.layout = layout == "paged" ? CacheLayout::kPaged : CacheLayout::kContiguous;
  }
  if (!dtype.empty()) {
    options.files.dtype = dtype == "bf16" ? DType::kBFloat16 : DType::kFloat16;
  }
  if (options.explain && options.stage.empty()) options.stage = "all";
  return run(options);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_run", mla::bench::parse_and_run, argc, argv);
}
