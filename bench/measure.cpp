#include "bench/measure.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace mla::bench {
namespace {

using Outcome = StageResult::Outcome;

/// Data, truth and stages of one shape, on the machine.
class ShapeRun {
 public:
  ShapeRun(const Bench& bench, const Shape& shape) : bench_(bench), result_{} {
    result_.shape = shape;
    for (const Stage* stage : bench.stages) {
      StageResult& entry = result_.stages.emplace_back();
      entry.stage = stage->slug;
      entry.idea = stage->idea;
      drop_if_error(entry, check_device(*stage, bench.machine.limits()), "");
    }
  }

  ShapeResult run() {
    DecodeCase needles = result_.shape.spec;
    needles.data = DataKind::kNeedles;
    needles.seed += 2;  // even: the same scale
    check_on(needles, "needle data");
    if (check_on(result_.shape.spec, "flat data")) {
      time();
      check_again();
      derive_speedups();
    }
    bench_.runner.clear();
    return std::move(result_);
  }

 private:
  /// Makes the data, prepares every stage that is still in, runs it once and judges its outputs.
  /// False if nothing can run.
  bool check_on(const DecodeCase& spec, const std::string& what) {
    bench_.runner.clear();
    if (std::none_of(result_.stages.begin(), result_.stages.end(), is_in)) return false;
    data_ = make_data_set(spec);
    const int64_t tokens = data_.total_tokens();
    result_.work = work_of(data_.problem, tokens);
    const bool timed = spec.data == result_.shape.spec.data;
    if (!timed && Truth::is_slow(bench_.machine, data_, result_.work.flop)) return true;

    step("making " + what);
    Status status = generate_on_device(bench_.machine, data_, &tensors_);
    if (status.ok()) status = allocate_workspace();
    if (status.ok()) step("fp64 reference on " + what);
    if (status.ok()) status = truth_.evaluate(bench_.machine, data_, tensors_, result_.work.flop);
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      step(entry.stage + " on " + what);
      drop_if_error(entry, status.ok() ? check_one(i) : status, what + ": ");
    }
    result_.checked_whole = truth_.whole();
    if (timed) result_.reference_seconds = truth_.reference_seconds();
    return status.ok();
  }

  /// One workspace for all: they run one after the other. A stage that asks for more than there is
  /// is dropped.
  Status allocate_workspace() {
    size_t largest = 0;
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      const size_t needed = bench_.stages[i]->workspace_bytes(data_.problem);
      const size_t there = bench_.machine.free_memory() + workspace_.bytes();
      if (needed > there) {
        drop_if_error(entry,
                      {StatusCode::kOutOfMemory, "needs " + std::to_string(needed >> 20) +
                                                     " MiB of workspace, " +
                                                     std::to_string(there >> 20) + " are free"},
                      "");
        continue;
      }
      largest = std::max(largest, needed);
    }
    if (largest <= workspace_.bytes()) return {};
    return workspace_.allocate(bench_.machine, largest);
  }

  /// Prepares stage i and runs it on poisoned outputs and a poisoned workspace.
  Status check_one(size_t i) {
    Machine& machine = bench_.machine;
    StageResult& entry = result_.stages[i];
    if (bench_.runner.lost()) {
      return {StatusCode::kUnavailable, "not run: another stage's kernel hung or broke the device"};
    }
    const auto operation = [this, stage = bench_.stages[i]](Stream stream) {
      return decode(*stage, data_.problem, tensors_.tensors(), workspace_.data(),
                    workspace_.bytes(), stream);
    };
    MLA_RETURN_IF_ERROR(bench_.runner.prepare(operation, &entry.times.handle));
    if (workspace_.bytes() > 0) {
      MLA_RETURN_IF_ERROR(machine.fill(workspace_.data(), 0xff, workspace_.bytes()));
    }
    double us = 0;
    MLA_RETURN_IF_ERROR(run_poisoned(entry, &us));
    entry.times.expected_us = us;
    fingerprints_.resize(result_.stages.size());
    MLA_RETURN_IF_ERROR(truth_.compare(machine, data_, tensors_, &entry.check, &fingerprints_[i]));
    if (!entry.check.ok()) {
      return {StatusCode::kKernelRejected, "wrong result: " + entry.check.describe()};
    }
    return {};
  }

  Status run_poisoned(StageResult& entry, double* us) {
    MLA_RETURN_IF_ERROR(tensors_.poison_outputs(bench_.machine));
    MLA_RETURN_IF_ERROR(
        bench_.machine.synchronize());  // the runner's stream does not wait for that
    std::vector<double> samples;
    MLA_RETURN_IF_ERROR(bench_.runner.run_cold(entry.times.handle, 1, &samples));
    *us = samples.front();
    return {};
  }

  void time() {
    const bool gpu = bench_.machine.kind() == MachineKind::kGpu;
    std::vector<Contender> contenders;
    std::vector<size_t> places;
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry)) continue;
      entry.times.name = result_.shape.name + ": " + entry.stage;
      entry.times.sustained_warmup_s = std::atoi(entry.stage.c_str()) >= 5 ? 1.2 : 0.2;
      contenders.push_back(entry.times);
      places.push_back(i);
    }
    sample(bench_.runner, contenders, [&](const std::string& text) { bench_.progress.step(text); });
    for (size_t c = 0; c < contenders.size(); ++c) {
      StageResult& entry = result_.stages[places[c]];
      entry.times = std::move(contenders[c]);
      drop_if_error(entry, entry.times.status, "timing: ");
      if (is_in(entry)) derive(entry, *bench_.stages[places[c]]);
    }
    if (!gpu) return;
    result_.cold_floor = floor_seconds(result_.work, bench_.ceilings, Mode::kCold);
    result_.sustained_floor = floor_seconds(result_.work, bench_.ceilings, Mode::kSustained);
  }

  void derive(StageResult& entry, const Stage& stage) {
    entry.cold = summarize(entry.times.cold);
    entry.sustained = summarize(entry.times.sustained);
    const Prediction prediction =
        stage.predict(data_.problem, data_.total_tokens(), bench_.machine.limits());
    entry.cold_limit = own_limit(prediction, bench_.ceilings, Mode::kCold);
    entry.sustained_limit = own_limit(prediction, bench_.ceilings, Mode::kSustained);
  }

  void derive_speedups() {
    const StageResult* before = nullptr;
    for (StageResult& entry : result_.stages) {
      if (!is_in(entry)) continue;
      if (before != nullptr) {
        entry.cold_speedup = before->cold.median / entry.cold.median;
        entry.sustained_speedup = before->sustained.median / entry.sustained.median;
      }
      before = &entry;
    }
  }

  /// A result must be bitwise repeatable, also after hundreds of back-to-back runs.
  void check_again() {
    for (size_t i = 0; i < result_.stages.size(); ++i) {
      StageResult& entry = result_.stages[i];
      if (!is_in(entry) || entry.times.cold.empty()) continue;
      double us = 0;
      uint64_t fingerprint = 0;
      Status status = run_poisoned(entry, &us);
      if (status.ok()) status = fingerprint_outputs(bench_.machine, tensors_, &fingerprint);
      if (status.ok() && fingerprint != fingerprints_[i]) {
        status = {StatusCode::kKernelRejected, "other bits than the run that was checked"};
      }
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
  ShapeResult result_;
  DataSet data_;
  DeviceTensors tensors_;
  DeviceBuffer workspace_;
  Truth truth_;
  std::vector<uint64_t> fingerprints_;
};

}  // namespace

ShapeResult measure_shape(const Bench& bench, const Shape& shape) {
  auto run = std::make_unique<ShapeRun>(bench, shape);
  ShapeResult result = run->run();
  bench.progress.clear();
  // Freeing memory waits for all kernels: not for one that never ends.
  if (bench.runner.lost()) static_cast<void>(run.release());
  return result;
}

}  // namespace mla::bench
