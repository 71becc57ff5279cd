#include "docs/demos/wasm/limits_page.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>
#include <vector>

#include "bench/explain/estimate.h"
#include "bench/explain/explain.h"

namespace mla::bench {
namespace {

char names[1024];

struct Time {
  Summary cold;
  double sustained_us = kUnknown;
};

const std::vector<const Stage*>& kernels() {
  static const std::vector<const Stage*> result = [] {
    std::vector<const Stage*> found;
    for (const Stage& stage : stages(MachineKind::kModel)) {
      if (!stage.on_cpu) found.push_back(&stage);
    }
    return found;
  }();
  return result;
}

std::vector<Time>& stage_times() {
  static std::vector<Time> result(kernels().size());
  return result;
}

/// JSON has no NaN.
std::string json(double value) {
  return std::isfinite(value) ? fmt::format("{}", value) : "null";
}
std::string json(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '\n') {
      result += "\\n";
      continue;
    }
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}
using Fields = std::vector<std::pair<const char*, std::string>>;
std::string json(const Fields& fields) {
  std::string result;
  for (const auto& [name, value] : fields) {
    result += fmt::format("{}\"{}\": {}", result.empty() ? "" : ", ", name, value);
  }
  return "{" + result + "}";
}

std::string json(const StageFacts& facts, const ExplainInput& input, const Work& work) {
  const Status& why_not = facts.device.ok() ? facts.cache : facts.device;
  const Prediction& spends = facts.prediction;
  const OwnLimit limit = own_limit(spends, work, input.ceilings, Mode::kCold);
  return json({{"slug", json(facts.slug)},
               {"why_not", json(why_not.ok() ? std::string() : why_not.message())},
               {"fp32_flop", json(spends.fp32_flop)},
               {"matrix_flop", json(spends.matrix_flop)},
               {"shared_bytes", json(spends.shared_bytes)},
               {"dram_bytes", json(spends.dram_bytes)},
               {"busy_fraction", json(spends.busy_fraction)},
               {"fp32_s", json(limit.fp32)},
               {"matrix_s", json(limit.matrix)},
               {"shared_s", json(limit.shared)},
               {"dram_s", json(limit.dram)},
               {"own_limit_s", json(limit.seconds())},
               {"own_limit_by", json(std::string(limit.name()))},
               {"estimate_s", json(estimate_of(facts, input).seconds())},
               {"workspace_bytes", json(double(facts.workspace_bytes))}});
}

std::string answer(const ExplainInput& input, int64_t tokens) {
  const char* const bounds[] = {"", "memory", "matrix", "launch"};
  const Work work = work_of(input.problem, tokens);
  const Floor floor = floor_of(work, input.ceilings, Mode::kCold);
  std::string of_stages;
  for (const StageFacts& facts : input.stages) {
    of_stages += (of_stages.empty() ? "" : ", ") + json(facts, input, work);
  }
  return json(
      {{"work", json({{"flop", json(work.flop)},
                      {"bytes", json(work.bytes)},
                      {"intensity", json(work.intensity())},
                      {"ridge", json(input.ceilings.matrix_cold / input.ceilings.read)}})},
       {"floor", json({{"memory_s", json(floor.memory)},
                       {"matrix_s", json(floor.matrix)},
                       {"launch_s", json(floor.launch)},
                       {"seconds", json(floor.seconds())},
                       {"bound", json(std::string(bounds[static_cast<int>(floor.bound())]))},
                       {"lead", json(floor.lead())}})},
       {"stages", "[" + of_stages + "]"},
       {"text", json(explain(input))}});
}

}  // namespace
}  // namespace mla::bench

using namespace mla;
using namespace mla::bench;

char* limits_names() {
  return names;
}

const char* limits_slugs() {
  static std::string result;
  result.clear();
  for (const Stage* stage : kernels()) result += (result.empty() ? "" : ", ") + json(stage->slug);
  result = "[" + result + "]";
  return result.c_str();
}

void limits_time(int stage, double median, double p10, double p90, double n, double sustained) {
  Time& time = stage_times().at(static_cast<size_t>(stage));
  time.cold = {median, p10, p90, static_cast<int>(n)};
  time.sustained_us = sustained;
}

const char* limits_explain(double capability, double multiprocessors, double read, double fp32,
                           double matrix_cold, double matrix_sustained, double shared,
                           double shared_bytes_per_clock, double launch, double num_heads_q,
                           double seqlen_q, double batch, double seqlen_k, double causal,
                           double fp16, double format) {
  static std::string result;
  ExplainInput input;
  const auto tens = static_cast<int>(capability);
  DeviceLimits& limits = input.limits;
  if (!limits_of(fmt::format("{}.{}", tens / 10, tens % 10), static_cast<int>(multiprocessors),
                 &limits)) {
    result = json({{"error", json(std::string("no device that is known"))}});
    return result.c_str();
  }
  const std::string text = names;
  const size_t first = text.find('\n'), second = text.find('\n', first + 1);
  limits.name = text.substr(0, first);
  input.device = fmt::format("{}, compute capability {}.{}, {} multiprocessors", limits.name,
                             tens / 10, tens % 10, limits.multiprocessors);
  input.ceilings_origin = text.substr(first + 1, second - first - 1);
  input.times_origin = text.substr(second + 1);
  input.ceilings.read = read;
  input.ceilings.fp32 = fp32;
  input.ceilings.matrix_cold = matrix_cold;
  input.ceilings.matrix_sustained = matrix_sustained;
  input.ceilings.shared = shared;
  input.ceilings.shared_bytes_per_clock = shared_bytes_per_clock;
  input.ceilings.launch = launch;

  const auto tokens = static_cast<int32_t>(seqlen_k);
  Problem& problem = input.problem;
  problem.dtype = fp16 != 0 ? DType::kFloat16 : DType::kBFloat16;
  problem.cache_format = static_cast<CacheFormat>(static_cast<int>(format));
  problem.batch = static_cast<int>(batch);
  problem.seqlen_q = static_cast<int>(seqlen_q);
  problem.num_heads_q = static_cast<int>(num_heads_q);
  problem.causal = causal != 0;
  problem.softmax_scale = 1.0f / 24;
  problem.num_pages = 1;  // no limit depends on how many there are
  problem.max_pages_per_seq = static_cast<int>(pages_for(tokens, problem.page_size)) + 1;
  if (const Status status = validate(problem); !status.ok()) {
    result = json({{"error", json(status.message())}});
    return result.c_str();
  }
  const int64_t total = int64_t{problem.batch} * tokens;
  input.seqlens_k.assign(static_cast<size_t>(problem.batch), tokens);
  for (size_t i = 0; i < kernels().size(); ++i) {
    StageFacts& facts = input.stages.emplace_back(facts_of(*kernels()[i], problem, total, limits));
    facts.cold = stage_times()[i].cold;
    facts.sustained_us = stage_times()[i].sustained_us;
  }
  result = answer(input, total);
  return result.c_str();
}
