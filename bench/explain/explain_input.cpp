#include "bench/explain/explain_input.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "reference/gpu_model/gpu_model.h"
#include "stages/common/choose/choose.h"

namespace mla::bench {
namespace {

int64_t total(const std::vector<int32_t>& seqlens_k) {
  return std::accumulate(seqlens_k.begin(), seqlens_k.end(), int64_t{0});
}

/// A stage on a device with the input's limits: the machine's own.
void add_facts(const Stage& stage, ExplainInput* input) {
  input->stages.push_back(facts_of(stage, input->problem, total(input->seqlens_k), input->limits));
}

/// Every stage of the registry, one on the CPU too, which is no stage of a GPU's; and the one that chooses if it
/// is asked about.
void add_facts_of_all(MachineKind machine, const std::string& asked, ExplainInput* input) {
  input->stage = asked;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (stage.on_cpu && machine != MachineKind::kModel) add_facts(stage, input);
  }
  for (const Stage& stage : stages(machine)) add_facts(stage, input);
  if (asked == kAutoSlug) add_facts(auto_stage(machine), input);
}

/// What "auto" chooses, if it is asked about. Without a recorded time of its own it has that of the
/// stage it chose, if that was recorded with the same settings, which are none.
void add_choice(MachineKind machine, ExplainInput* input) {
  Choice choice;
  if (input->stage != kAutoSlug) return;
  if (!choose(machine, input->problem, input->limits, &choice).ok()) return;
  input->choice = describe(choice, input->limits);
  StageFacts& facts = input->stages.back();
  if (facts.cold.n > 0 || choice.settings != PlanSettings{}) return;
  for (const StageFacts& other : input->stages) {
    if (other.slug != choice.stage->slug) continue;
    facts.cold = other.cold;
    facts.sustained_us = other.sustained_us;
  }
}

/// The model's limits as long as this lives.
class PretendedDevice {
 public:
  explicit PretendedDevice(const DeviceLimits& limits) : before_(gpu_model::device()) {
    gpu_model::Device& device = gpu_model::device();
    device.compute_capability = limits.compute_capability;
    device.multiprocessors = limits.multiprocessors;
    device.max_shared_bytes = limits.max_shared_bytes;
  }
  ~PretendedDevice() { gpu_model::device() = before_; }
  PretendedDevice(const PretendedDevice&) = delete;
  PretendedDevice& operator=(const PretendedDevice&) = delete;

 private:
  gpu_model::Device before_;
};

std::string describe(const std::string& name, const DeviceLimits& limits) {
  return fmt::format("{}, compute capability {}.{}, {} multiprocessors", name,
                     limits.compute_capability / 10, limits.compute_capability % 10,
                     limits.multiprocessors);
}

std::string context_of(const Recorded& recorded, const std::string& key) {
  const auto found = recorded.context.find(key);
  return found == recorded.context.end() ? "" : found->second;
}

void add_recorded(const Recorded& recorded, ExplainInput* input) {
  input->ceilings = recorded.ceilings;
  input->ceilings_origin = "recorded: " + recorded.origin();
  input->times_origin = input->ceilings_origin;
  const std::string shape = recorded_shape(recorded, input->problem, input->seqlens_k);
  if (shape.empty()) return;
  for (StageFacts& facts : input->stages) {
    const RecordedEntry* cold = recorded.find(facts.slug, shape, "cold");
    if (cold == nullptr) continue;
    const auto counter = [&](const char* name, double otherwise) {
      const auto found = cold->counters.find(name);
      return found == cold->counters.end() ? otherwise : found->second;
    };
    facts.cold = {cold->us, counter("p10_us", cold->us), counter("p90_us", cold->us),
                  static_cast<int>(counter("n", 1))};
    const RecordedEntry* sustained = recorded.find(facts.slug, shape, "sustained");
    if (sustained != nullptr) facts.sustained_us = sustained->us;
  }
}

}  // namespace

Status recorded_limits(const Recorded& recorded, DeviceLimits* limits) {
  const std::string capability = context_of(recorded, "compute_capability");
  if (!limits_of(capability, recorded.multiprocessors, limits)) {
    return {StatusCode::kUnsupported,
            fmt::format("{}: compute capability '{}' and {} multiprocessors are no device that is "
                        "known",
                        recorded.file, capability, recorded.multiprocessors)};
  }
  limits->name = context_of(recorded, "gpu");
  return {};
}

std::string recorded_shape(const Recorded& recorded, const Problem& problem,
                           const std::vector<int32_t>& seqlens_k) {
  std::set<std::string> seen;
  for (const RecordedEntry& entry : recorded.entries) {
    Shape shape;
    if (entry.mode != "cold" || !seen.insert(entry.shape).second) continue;
    if (!parse_shape(entry.shape, &shape).ok()) continue;
    const DecodeCase& spec = shape.spec;
    const bool alike = spec.dtype == problem.dtype && spec.batch == problem.batch &&
                       spec.seqlen_q == problem.seqlen_q &&
                       spec.num_heads_q == problem.num_heads_q &&
                       spec.num_heads_kv == problem.num_heads_kv &&
                       (spec.causal == problem.causal || problem.seqlen_q == 1) &&
                       spec.fixed_split_tokens == problem.fixed_split_tokens &&
                       spec.cache_format == problem.cache_format;
    if (alike && make_data_set(spec).seqlens_k == seqlens_k) return entry.shape;
  }
  return "";
}

ExplainInput explain_recorded(const Problem& problem, const std::vector<int32_t>& seqlens_k,
                              const Recorded* recorded, const std::string& why_not,
                              const std::string& stage) {
  ExplainInput input;
  input.problem = problem;
  input.seqlens_k = seqlens_k;
  input.limits = model_machine().limits();
  input.device = describe("the GPU model's", input.limits);
  input.ceilings_origin = why_not;
  if (recorded != nullptr) {
    const Status known = recorded_limits(*recorded, &input.limits);
    if (known.ok()) {
      input.device = describe(context_of(*recorded, "gpu"), input.limits) + ", from records";
    } else {
      input.ceilings_origin = known.message();
      recorded = nullptr;
    }
  }
  const PretendedDevice pretended(input.limits);
  add_facts_of_all(MachineKind::kModel, stage, &input);
  if (recorded != nullptr) add_recorded(*recorded, &input);
  add_choice(MachineKind::kModel, &input);
  return input;
}

ExplainInput explain_on(Machine& machine, const Problem& problem,
                        const std::vector<int32_t>& seqlens_k, const std::string& stage) {
  Recorded recorded;
  const Status status = load_newest_recorded(&recorded);
  if (machine.kind() == MachineKind::kModel) {
    return explain_recorded(problem, seqlens_k, status.ok() ? &recorded : nullptr, status.message(),
                            stage);
  }
  ExplainInput input;
  input.problem = problem;
  input.seqlens_k = seqlens_k;
  input.limits = machine.limits();
  input.device = machine.description();
  add_facts_of_all(machine.kind(), stage, &input);
  const bool of_its_kind = status.ok() &&
                           input.device.starts_with(context_of(recorded, "gpu") + ",") &&
                           input.limits.multiprocessors == recorded.multiprocessors;
  if (of_its_kind) {
    add_recorded(recorded, &input);
  } else {
    input.ceilings_origin = status.ok()
                                ? "what is recorded is of another device, " + recorded.origin()
                                : status.message();
  }
  add_choice(machine.kind(), &input);
  return input;
}

void set_measured(const ShapeResult& result, const Ceilings& ceilings, ExplainInput* input) {
  input->ceilings = ceilings;
  input->ceilings_origin = input->times_origin = "measured in this run";
  for (StageFacts& facts : input->stages) {
    facts.cold = {};
    facts.sustained_us = kUnknown;
    for (const StageResult& entry : result.stages) {
      if (entry.stage != facts.slug || entry.outcome != StageResult::Outcome::kMeasured) continue;
      facts.cold = entry.cold;
      facts.sustained_us = entry.sustained.median;
    }
  }
}

std::string explain(const Bench& bench, const ShapeResult& result) {
  const DataSet data = make_data_set(result.shape.spec);
  if (!validate(data.problem).ok()) return "";
  ExplainInput input =
      explain_on(bench.machine, data.problem, data.seqlens_k,
                 bench.stages.size() == 1 ? bench.stages.front()->slug : std::string());
  if (bench.machine.kind() == MachineKind::kGpu) set_measured(result, bench.ceilings, &input);
  return explain(input);
}

}  // namespace mla::bench
