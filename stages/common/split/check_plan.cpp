#include <utility>

#include "stages/common/split/plan.h"
#include "stages/common/split/workspace.h"

namespace mla {

Status read_plan(Machine& machine, const Problem& problem, const PlanShape& shape, void* workspace,
                 HostPlan* plan, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, shape, workspace);
  HostPlan result;
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(&result.header, split.header, sizeof(PlanHeader), stream));
  const PlanHeader& header = result.header;
  if (header.made != kPlanMade || header.batch != problem.batch ||
      header.workers != shape.workers || header.fixed_split_tokens != problem.fixed_split_tokens) {
    return {StatusCode::kInvalidArgument, "workspace holds no plan for this problem"};
  }
  const auto read = [&](auto& values, int64_t count, const auto* source) -> Status {
    values.resize(static_cast<size_t>(count));
    if (count == 0) return {};
    return machine.copy_to_host(values.data(), source, values.size() * sizeof(values[0]), stream);
  };
  MLA_RETURN_IF_ERROR(read(result.worker_begin, shape.workers + 1, split.worker_begin));
  MLA_RETURN_IF_ERROR(read(result.slot_begin, problem.batch + 1, split.slot_begin));
  MLA_RETURN_IF_ERROR(read(result.seqlens_k, problem.batch, split.seqlens_k));
  MLA_RETURN_IF_ERROR(
      read(result.split_sequences, header.num_split_sequences, split.split_sequences));
  *plan = std::move(result);
  return {};
}

Status check_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                  const int32_t* seqlens_k, void* workspace, Stream stream) {
  HostPlan plan;
  MLA_RETURN_IF_ERROR(read_plan(machine, problem, shape, workspace, &plan, stream));
  std::vector<int32_t> lengths(static_cast<size_t>(problem.batch));
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(lengths.data(), seqlens_k, lengths.size() * sizeof(int32_t), stream));
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] == plan.seqlens_k[i]) continue;
    return {StatusCode::kInvalidArgument,
            "seqlens_k[" + std::to_string(i) + "] = " + std::to_string(lengths[i]) +
                ", but the plan was made for " + std::to_string(plan.seqlens_k[i])};
  }
  return {};
}

}  // namespace mla
