#include <map>
#include <utility>

#include "bench/explain/explain.h"

namespace mla::bench {

StageFacts facts_of(const Stage& stage, const Problem& problem, int64_t total_tokens,
                    const DeviceLimits& limits) {
  StageFacts facts;
  facts.slug = stage.slug;
  facts.device = check_device(stage, limits);
  facts.cache = check_cache_format(stage, problem);
  // A problem that validate() refuses keeps its zeros.
  PlanShape shape;
  WorkspaceBytes needs;
  Prediction prediction;
  if (plan_shape(stage, problem, limits, &shape).ok()) facts.plan = shape;
  if (workspace_bytes(stage, problem, limits, &needs).ok()) facts.workspace_bytes = needs.total();
  const Status predicted = predict(stage, problem, total_tokens, limits, &prediction);
  if (predicted.ok()) facts.prediction = prediction;
  if (stage.on_cpu) facts.device = predicted;
  return facts;
}

bool limits_of(const std::string& compute_capability, int multiprocessors, DeviceLimits* limits) {
  // Shared memory a block may have, by compute capability (CUDA C++ Programming Guide).
  static const std::map<std::string, std::pair<int, size_t>> known = {
      {"8.0", {80, 163}}, {"8.6", {86, 99}},    {"8.9", {89, 99}},
      {"9.0", {90, 227}}, {"10.0", {100, 227}}, {"12.0", {120, 99}}};
  const auto found = known.find(compute_capability);
  if (found == known.end() || multiprocessors == 0) return false;
  limits->compute_capability = found->second.first;
  limits->multiprocessors = multiprocessors;
  limits->max_shared_bytes = found->second.second * 1024;
  limits->max_grid_x = 2147483647;
  return true;
}

}  // namespace mla::bench
