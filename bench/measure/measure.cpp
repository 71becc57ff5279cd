#include "bench/measure/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "bench/measure/entries.h"
#include "bench/measure/memory.h"
#include "bench/measure/table.h"
#include "stages/common/choose/choose.h"

namespace mla::bench {
namespace {

using Outcome = StageResult::Outcome;

/// The benchmarks of a stage or peer on a shape; none if it cannot read the shape's cache.
std::vector<std::string> names_of(const Stage& stage, const Shape& shape, MachineKind machine) {
  std::vector<std::string> modes;
  if (!can_read(stage, shape.spec.cache_format)) return modes;
  switch (shape.measure) {
    case Measure::kErrors:
      modes = {"error"};
      break;
    case Measure::kPlans:
      if (stage.plan_shape != nullptr) modes = {"plan"};
      break;
    case Measure::kTimes:
    case Measure::kEnergy:
      modes = {"cold"};
      if (machine == MachineKind::kGpu) modes.push_back("sustained");
      if (stage.plan_shape != nullptr) {
        modes.insert(modes.end(), {"plan_and_decode", "plan", "combine", "combine_cold"});
      }
      break;
  }
  for (std::string& mode : modes) mode = benchmark_name(stage.slug, shape, mode);
  return modes;
}

/// Data, truth and stages of one shape, on the machine.
class ShapeRun {
 public:
  ShapeRun(const Bench& bench, const Shape& shape) : bench_(bench), result_{} {
    result_.shape = shape;
    for (const Stage* stage : bench.stages) add(*stage, /*peer=*/false);
    for (const Stage* stage : bench.peers) add(*stage, /*peer=*/true);
  }

  ShapeResult run() {
    data_ = make_data_set(result_.shape.spec);
    result_.total_tokens = data_.total_tokens();
    if (!data_.seqlens_k.empty()) {
      result_.longest = *std::max_element(data_.seqlens_k.begin(), data_.seqlens_k.end());
    }
    for (StageResult& entry : result_.stages) say_choice(&entry);
    switch (result_.shape.measure) {
      case Measure::kPlans:
        plans_alone();
        break;
      case Measure::kErrors:
        check_on(result_.shape.spec, "flat data");
        break;
      case Measure::kTimes:
      case Measure::kEnergy:
        decodes();
        break;
    }
    bench_.runner.clear();
    return result_;
  }

  /// Lets no time of a stage be reported whose result turned out wrong later.
  void forget_failures() const {
    for (size_t i = 0; i < stages_.size(); ++i) {
      if (is_in(result_.stages[i])) continue;
      for (const std::string& name : names_of(*stages_[i], result_.shape, bench_.machine.kind())) {
        bench_.google.forget(name);
      }
    }
  }

 private:
  void add(const Stage& stage, bool peer) {
    if (!can_read(stage, result_.shape.spec.cache_format)) {
      result_.unable.push_back(stage.slug);
      return;
    }
    const std::vector<std::string> names = names_of(stage, result_.shape, bench_.machine.kind());
    if (!bench_.google.is_any_chosen(names)) return;
    stages_.push_back(&stage);
    StageResult& entry = result_.stages.emplace_back();
    entry.stage = stage.slug;
    entry.idea = (stage.on_cpu ? where(stage, bench_.machine) + ": " : "") + stage.idea;
    entry.peer = peer;
    drop_if_error(entry, check_device(stage, bench_.machine.limits()), "");
  }

  /// In the row of the stage that chooses: what it chose.
  void say_choice(StageResult* entry) const {
    Choice choice;
    if (entry->stage != kAutoSlug) return;
    const Machine& machine = bench_.machine;
    if (choose(machine.kind(), data_.problem, machine.limits(), &choice).ok()) {
      entry->idea = name_of(choice);
    }
  }

  void decodes() {
    leave_out_slow();
    DecodeCase needles = result_.shape.spec;
    needles.data = DataKind::kNeedles;
    needles.seed += 2;  // even: the same scale
    check_on(needles, "needle data");
    if (check_on(result_.shape.spec, "flat data")) {
      time();
      check_again();
      derive_speedups();
    }
  }

  /// No data but the lengths: a plan of many sequences needs no cache.
  void plans_alone() {
    Machine& machine = bench_.machine;
    Status status = validate(data_.problem);
    if (status.ok()) {
      status = tensors_.seqlens_k.assign(machine, data_.seqlens_k.data(),
                                         data_.seqlens_k.size() * sizeof(int32_t));
    }
    if (status.ok()) status = allocate_workspaces();
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      drop_if_error(entry, status.ok() ? time_plan(i) : status, "plan: ");
    }
  }

  /// What a stage expects of the data, whose problem is checked.
  Prediction predict_stage(const Stage& stage) const {
    Prediction prediction;
    const Status status =
        predict(stage, data_.problem, data_.total_tokens(), bench_.machine.limits(), &prediction);
    return status.ok() ? prediction : Prediction{};
  }

  /// By twice the stage's own limit; on even lengths stages take two to six times that limit.
  void leave_out_slow() {
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry) || !validate(data_.problem).ok()) continue;
      const Prediction prediction = predict_stage(*stages_[i]);
      const Work work = work_of(data_.problem, data_.total_tokens());
      const double us = 2e6 * own_limit(prediction, work, bench_.ceilings, Mode::kCold).seconds();
      if (!(us > kLeaveOutMicroseconds)) continue;  // on the model there is no limit
      entry.outcome = Outcome::kLeftOut;
      entry.reason = "a run is predicted to take about " + number(1e-6 * us, 2) + " s";
    }
  }

  /// Makes the data, prepares every stage that is still in, runs it once and judges its outputs.
  /// False if nothing can run.
  bool check_on(const DecodeCase& spec, const std::string& what) {
    bench_.runner.clear();
    const bool asked = bench_.google.is_chosen(reference_name());
    if (!asked && std::none_of(result_.stages.begin(), result_.stages.end(), is_in)) return false;
    data_ = make_data_set(spec);
    const int64_t tokens = data_.total_tokens();
    result_.work = work_of(data_.problem, tokens);
    note_memory();
    const bool timed = spec.data == result_.shape.spec.data;
    if (!timed && Truth::is_slow(bench_.machine, data_, result_.work.flop)) return true;

    step("making " + what);
    tensors_ = {};  // what is free is asked next
    Status status = check_memory_for_tensors();
    if (status.ok()) status = generate_on_device(bench_.machine, data_, &tensors_);
    if (status.ok()) status = allocate_workspaces();
    if (status.ok()) step("fp64 reference on " + what);
    if (status.ok()) status = evaluate_truth(timed);
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      step(entry.stage + " on " + what);
      drop_if_error(entry, status.ok() ? check_driven(i) : status, what + ": ");
    }
    result_.checked_whole = truth_.whole();
    if (timed) result_.reference_seconds = truth_.reference_seconds();
    return status.ok();
  }

  void note_memory() {
    const Problem& problem = data_.problem;
    const Footprint one = footprint(problem);
    result_.cache_bytes = double(problem.num_pages) * problem.page_size * problem.num_heads_kv *
                          problem.cache_row_bytes();
    result_.tensor_bytes =
        one.inputs + one.outputs +
        double{sizeof(int32_t)} * problem.batch * (problem.max_pages_per_seq + 1);
  }

  /// The CPU reference checks what lies on the host.
  Status check_memory_for_tensors() const {
    const MachineKind kind = bench_.machine.kind();
    const bool copied =
        kind == MachineKind::kModel || Truth::by_reference(kind, data_, result_.work.flop);
    return check_fits("shape " + result_.shape.name, footprint(data_.problem), &bench_.machine,
                      copied ? 1 : 0);
  }

  /// `timed`: as the benchmark of the CPU reference, if it is one that is chosen.
  Status evaluate_truth(bool timed) {
    const auto evaluate = [&] {
      return truth_.evaluate(bench_.machine, data_, tensors_, result_.work.flop);
    };
    if (!timed || !bench_.google.is_chosen(reference_name())) return evaluate();
    return run_driven(reference_name(), [&](std::vector<double>* us) -> Status {
      MLA_RETURN_IF_ERROR(evaluate());
      us->push_back(1e6 * truth_.reference_seconds());
      return {};
    });
  }

  /// Of a shape of errors alone, the checked run is the benchmark.
  Status check_driven(size_t i) {
    if (result_.shape.measure != Measure::kErrors) return check_one(i);
    return run_driven(name(i, "error"), [&](std::vector<double>* us) -> Status {
      MLA_RETURN_IF_ERROR(check_one(i));
      us->push_back(result_.stages[i].times.expected_us);
      return {};
    });
  }

  /// One benchmark, once unless a flag says otherwise.
  Status run_driven(const std::string& name,
                    const std::function<Status(std::vector<double>*)>& measure_one) {
    const auto measure = [&](int count, std::vector<double>* us) -> Status {
      for (int run = 0; run < count; ++run) MLA_RETURN_IF_ERROR(measure_one(us));
      return {};
    };
    const GoogleRun run{name, 1, 1, measure};
    return bench_.google.run({&run, 1}).front();
  }

  std::string reference_name() const { return benchmark_name("reference", result_.shape, "wall"); }
  std::string name(size_t i, const std::string& mode) const {
    return benchmark_name(result_.stages[i].stage, result_.shape, mode);
  }

  /// One workspace for all stages that make no plan: they run one after the other. A plan lies in
  /// the workspace from one decode to the next, so a stage that makes one has its own. A stage that
  /// asks for more than there is is dropped.
  Status allocate_workspaces() {
    own_workspaces_.resize(result_.stages.size());
    needs_.resize(result_.stages.size());
    const auto fits = [&](size_t i) {
      Status status =
          workspace_bytes(*stages_[i], data_.problem, bench_.machine.limits(), &needs_[i]);
      const size_t needed = needs_[i].total();
      const size_t there = bench_.machine.free_memory() + workspace(i).bytes();
      if (status.ok() && needed > there) {
        status = {StatusCode::kOutOfMemory,
                  fmt::format("needs {} MiB of workspace, {} are free", needed >> 20, there >> 20)};
      }
      drop_if_error(result_.stages[i], status, "");
      result_.stages[i].workspace_bytes = needed;
      return status.ok();
    };
    const auto grow = [&](DeviceBuffer& buffer, size_t needed) -> Status {
      if (needed <= buffer.bytes()) return {};
      return buffer.allocate(bench_.machine, needed);
    };
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      if (!is_in(result_.stages[i]) || !plans(i) || !fits(i)) continue;
      MLA_RETURN_IF_ERROR(grow(own_workspaces_[i], needs_[i].total()));
    }
    size_t largest = 0;
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      if (!is_in(result_.stages[i]) || plans(i) || !fits(i)) continue;
      largest = std::max(largest, needs_[i].total());
    }
    return grow(shared_workspace_, largest);
  }

  bool plans(size_t i) const { return stages_[i]->plan_shape != nullptr; }

  DeviceBuffer& workspace(size_t i) { return plans(i) ? own_workspaces_[i] : shared_workspace_; }
  Workspace plan(size_t i) { return needs_[i].plan_in(workspace(i)); }
  Workspace scratch(size_t i) { return needs_[i].scratch_in(workspace(i)); }

  Status make_plan(size_t i, Stream stream) {
    return plan_decode(*stages_[i], data_.problem, tensors_.tensors().seqlens_k, plan(i), stream);
  }

  Status poison_workspace(size_t i) {
    DeviceBuffer& buffer = workspace(i);
    if (buffer.bytes() == 0) return {};
    return bench_.machine.fill(buffer.data(), 0xff, buffer.bytes());
  }

  /// A workspace that holds the plan and nothing else of use.
  Status renew_workspace(size_t i) {
    MLA_RETURN_IF_ERROR(poison_workspace(i));
    MLA_RETURN_IF_ERROR(make_plan(i, nullptr));
    return bench_.machine.synchronize();  // the runner's stream does not wait for that
  }

  /// Prepares stage i and runs it on poisoned outputs and a poisoned workspace.
  Status check_one(size_t i) {
    Machine& machine = bench_.machine;
    StageResult& entry = result_.stages[i];
    if (bench_.runner.lost()) {
      return {StatusCode::kUnavailable,
              "not run, because another stage's kernel hung or broke the device"};
    }
    const auto operation = [this, i](Stream stream) {
      return decode_planned(*stages_[i], data_.problem, tensors_.tensors(), plan(i), scratch(i),
                            stream);
    };
    MLA_RETURN_IF_ERROR(renew_workspace(i));
    MLA_RETURN_IF_ERROR(bench_.runner.prepare(operation, &entry.times.handle));
    MLA_RETURN_IF_ERROR(renew_workspace(i));
    MLA_RETURN_IF_ERROR(run_poisoned(entry.times));
    fingerprints_.resize(result_.stages.size());
    MLA_RETURN_IF_ERROR(truth_.compare(machine, data_, tensors_, &entry.check, &fingerprints_[i]));
    if (!entry.check.ok()) {
      return {StatusCode::kKernelRejected, "wrong result: " + entry.check.describe()};
    }
    return plans(i) ? check_with_plan(i) : Status();
  }

  /// The same for plan and decode as one operation, which is timed for what the plan adds.
  Status check_with_plan(size_t i) {
    Contender& contender = result_.stages[i].plan.with_decode;
    const auto operation = [this, i](Stream stream) {
      return decode(*stages_[i], data_.problem, tensors_.tensors(), workspace(i), stream);
    };
    MLA_RETURN_IF_ERROR(bench_.runner.prepare(operation, &contender.handle));
    MLA_RETURN_IF_ERROR(poison_workspace(i));
    MLA_RETURN_IF_ERROR(run_poisoned(contender));
    return check_bits(i, "with a plan made in the same run: ");
  }

  /// Whether the outputs have the bits that were compared with the reference.
  Status check_bits(size_t i, const std::string& what) {
    uint64_t fingerprint = 0;
    MLA_RETURN_IF_ERROR(fingerprint_outputs(bench_.machine, tensors_, &fingerprint));
    if (fingerprint == fingerprints_[i]) return {};
    return {StatusCode::kKernelRejected, what + "other bits than the run that was checked"};
  }

  /// Compares stage i's plan with the host's, then times the making of it, warm. Leaves the plan.
  Status time_plan(size_t i) {
    if (bench_.runner.lost()) {
      return {StatusCode::kUnavailable,
              "not run, because another stage's kernel hung or broke the device"};
    }
    if (!bench_.google.is_chosen(name(i, "plan"))) return {};
    step(stages_[i]->slug + ": plan alone");
    MLA_RETURN_IF_ERROR(renew_workspace(i));
    HostPlan made;
    PlanShape shape;
    MLA_RETURN_IF_ERROR(read_plan(*stages_[i], data_.problem, plan(i), &made));
    MLA_RETURN_IF_ERROR(plan_shape(*stages_[i], data_.problem, bench_.machine.limits(), &shape));
    HostPlan on_host = make_plan_on_host(data_.problem, shape, data_.seqlens_k);
    on_host.header.state.generation = made.header.state.generation;
    if (!(made == on_host)) {
      return {StatusCode::kKernelRejected, "the plan differs from the host's"};
    }
    return time_apart([this, i](Stream stream) { return make_plan(i, stream); }, name(i, "plan"),
                      &result_.stages[i].plan.alone, "", nullptr);
  }

  /// Times an operation warm, and then cold if that has a name, as often as is due for its time.
  Status time_apart(const Operation& operation, const std::string& warm_name,
                    std::vector<double>* warm, const std::string& cold_name,
                    std::vector<double>* cold) {
    Runner& runner = bench_.runner;
    int handle = 0;
    MLA_RETURN_IF_ERROR(runner.prepare(operation, &handle));
    std::vector<double> unused;
    MLA_RETURN_IF_ERROR(runner.run_warm(handle, 1, &unused));
    const RunCounts due = runner.run_counts(unused.front());
    MLA_RETURN_IF_ERROR(runner.run_warm(handle, due.warmups, &unused));
    const GoogleRun runs[] = {
        {warm_name,
         due.runs,
         due.rounds,
         [&](int count, std::vector<double>* us) { return runner.run_warm(handle, count, us); },
         {},
         warm},
        {cold_name,
         due.runs,
         due.rounds,
         [&](int count, std::vector<double>* us) { return runner.run_cold(handle, count, us); },
         {},
         cold}};
    for (const GoogleRun& run : runs) {
      MLA_RETURN_IF_ERROR(bench_.google.run({&run, 1}).front());
    }
    return {};
  }

  /// Times the combining kernel alone, on what a decode left: it gives the decode's bits again.
  Status time_combine(size_t i) {
    const Stage& stage = *stages_[i];
    CombineTimes& times = result_.stages[i].combine;
    if (!bench_.google.is_any_chosen({name(i, "combine"), name(i, "combine_cold")})) return {};
    HostPlan made;
    PlanShape shape;
    MLA_RETURN_IF_ERROR(read_plan(stage, data_.problem, plan(i), &made));
    MLA_RETURN_IF_ERROR(plan_shape(stage, data_.problem, bench_.machine.limits(), &shape));
    const int64_t slots = combined_slots(made, shape);
    if (slots == 0) return {};
    step(stage.slug + ": combine alone");
    times.slots = slots;
    times.bytes = double(times.slots) * data_.problem.seqlen_q * data_.problem.num_heads_q *
                  (kHeadDimV + 1) * sizeof(float);
    MLA_RETURN_IF_ERROR(run_poisoned(result_.stages[i].times));
    const auto combine = [this, i, shape](Stream stream) {
      return combine_again(bench_.machine, data_.problem, shape,
                           with_strides(data_.problem, tensors_.tensors()), plan(i).data,
                           scratch(i).data, stream);
    };
    MLA_RETURN_IF_ERROR(
        time_apart(combine, name(i, "combine"), &times.warm, name(i, "combine_cold"), &times.cold));
    return check_bits(i, "combined once more: ");
  }

  Status run_poisoned(Contender& contender) {
    MLA_RETURN_IF_ERROR(tensors_.poison_outputs(bench_.machine));
    MLA_RETURN_IF_ERROR(
        bench_.machine.synchronize());  // the runner's stream does not wait for that
    std::vector<double> samples;
    MLA_RETURN_IF_ERROR(bench_.runner.run_cold(contender.handle, 1, &samples));
    contender.expected_us = samples.front();
    return {};
  }

  void time() {
    const bool gpu = bench_.machine.kind() == MachineKind::kGpu;
    std::vector<Contender> contenders;
    std::vector<Contender*> places;
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      entry.times.cold_name = name(i, "cold");
      entry.times.sustained_name = gpu ? name(i, "sustained") : "";
      entry.times.per_iteration = {{"FLOP", result_.work.flop}, {"bytes", result_.work.bytes}};
      const bool energy = result_.shape.measure == Measure::kEnergy;
      entry.times.sustained_warmup_s = energy ? kTensorCoreWarmup : stages_[i]->sustained_warmup_s;
      places.push_back(&entry.times);
      if (!plans(i)) continue;
      entry.plan.with_decode.cold_name = name(i, "plan_and_decode");
      places.push_back(&entry.plan.with_decode);
    }
    for (Contender* place : places) contenders.push_back(std::move(*place));
    sample(bench_.runner, bench_.google, contenders,
           [&](const std::string& text) { bench_.progress.step(text); });
    for (size_t c = 0; c < contenders.size(); ++c) *places[c] = std::move(contenders[c]);
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      drop_if_error(entry, entry.times.status, "timing: ");
      if (plans(i)) {
        if (is_in(entry)) drop_if_error(entry, entry.plan.with_decode.status, "timing: ");
        if (is_in(entry)) drop_if_error(entry, time_plan(i), "plan: ");
        if (is_in(entry)) drop_if_error(entry, time_combine(i), "combine: ");
      }
      if (is_in(entry)) derive(entry, *stages_[i]);
    }
    if (!gpu) return;
    result_.cold_floor = floor_of(result_.work, bench_.ceilings, Mode::kCold).seconds();
    result_.sustained_floor = floor_of(result_.work, bench_.ceilings, Mode::kSustained).seconds();
  }

  void derive(StageResult& entry, const Stage& stage) {
    entry.cold = summarize(entry.times.cold);
    entry.sustained = summarize(entry.times.sustained);
    entry.plan.marginal_us = summarize(entry.plan.with_decode.cold).median - entry.cold.median;
    const Prediction prediction = predict_stage(stage);
    entry.cold_limit = own_limit(prediction, result_.work, bench_.ceilings, Mode::kCold);
    entry.sustained_limit = own_limit(prediction, result_.work, bench_.ceilings, Mode::kSustained);
  }

  void derive_speedups() {
    const StageResult* before = nullptr;
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry) || entry.peer || entry.stage == kAutoSlug) continue;
      if (stages_[i]->on_cpu) continue;  // the others run on a model, whose time says nothing
      if (before != nullptr) {
        entry.cold_speedup = before->cold.median / entry.cold.median;
        entry.sustained_speedup = before->sustained.median / entry.sustained.median;
      }
      if (entry.stage < "09") before = &entry;  // later rungs branch from 08
    }
  }

  /// A result must be bitwise repeatable, also after hundreds of back-to-back runs.
  void check_again() {
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      Status status = run_poisoned(entry.times);
      if (status.ok()) status = check_bits(i, "");
      drop_if_error(entry, status, "after timing: ");
    }
  }

  static bool is_in(const StageResult& entry) { return entry.outcome == Outcome::kMeasured; }

  static void drop_if_error(StageResult& entry, const Status& status, const std::string& when) {
    if (status.ok()) return;
    const bool unfit = status.code() == StatusCode::kUnsupported ||
                       status.code() == StatusCode::kUnavailable ||
                       status.code() == StatusCode::kOutOfMemory;
    entry.outcome = unfit ? Outcome::kCannotRun : Outcome::kFailed;
    // A wrong result, and what the model rejects, say what they are.
    const bool plain = unfit || status.code() == StatusCode::kKernelRejected;
    entry.reason = (unfit ? "" : when) + (plain ? status.message() : status.to_string());
  }

  void step(const std::string& what) { bench_.progress.step(result_.shape.name + ": " + what); }

  const Bench& bench_;
  std::vector<const Stage*> stages_;  ///< Of result_.stages
  ShapeResult result_;
  DataSet data_;
  DeviceTensors tensors_;
  DeviceBuffer shared_workspace_;
  std::vector<DeviceBuffer> own_workspaces_;
  std::vector<WorkspaceBytes> needs_;  // [stages]
  Truth truth_;
  std::vector<uint64_t> fingerprints_;
};

}  // namespace

std::string benchmark_name(const std::string& who, const Shape& shape, const std::string& mode) {
  return who + "/" + shape.name + "/" + mode;
}

std::vector<std::string> benchmark_names(MachineKind machine, const Shape& shape,
                                         std::span<const Stage* const> stages,
                                         std::span<const Stage* const> peers) {
  std::vector<std::string> names;
  const DataSet data = make_data_set(shape.spec);
  const double flop = work_of(data.problem, data.total_tokens()).flop;
  if (shape.measure != Measure::kPlans && Truth::by_reference(machine, data, flop)) {
    names.push_back(benchmark_name("reference", shape, "wall"));
  }
  for (const auto& contenders : {stages, peers}) {
    for (const Stage* stage : contenders) {
      const std::vector<std::string> more = names_of(*stage, shape, machine);
      names.insert(names.end(), more.begin(), more.end());
    }
  }
  return names;
}

ShapeResult measure_shape(const Bench& bench, const Shape& shape) {
  auto run = std::make_unique<ShapeRun>(bench, shape);
  ShapeResult result = run->run();
  run->forget_failures();
  bench.google.add(google_entries(result, bench.machine.kind()));
  bench.progress.clear();
  // Freeing memory waits for all kernels: not for one that never ends.
  if (bench.runner.lost()) static_cast<void>(run.release());
  return result;
}

}  // namespace mla::bench
