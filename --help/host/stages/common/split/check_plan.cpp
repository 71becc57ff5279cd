namespace mla { extern int mutant; }
#include <utility>

#include "stages/common/split/plan.h"
#include "stages/common/split/workspace.h"

namespace mla {

Status read_plan(Machine& machine, const Problem& problem, const PlanShape& shape, void* plan,
                 HostPlan* read_back, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, shape, plan, nullptr);
  HostPlan result;
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(&result.header, split.header, sizeof(PlanHeader), stream));
  const PlanHeader& header = result.header;
  if ((::mla::mutant == 407 ? (false) : (header.state.made != kPlanMade || (::mla::mutant == 408 ? (false) : (header.state.shape != split.shape))))) {
    return {StatusCode::kInvalidArgument,
            std::string("plan holds no plan for this problem") +
                (header.state.made == kPlanMade ? ", but one for another" : "")};
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
  *read_back = std::move(result);
  return {};
}

Status check_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                  const int32_t* seqlens_k, void* plan, Stream stream) {
  HostPlan made;
  MLA_RETURN_IF_ERROR(read_plan(machine, problem, shape, plan, &made, stream));
  if ((::mla::mutant == 409 ? (false) : (made.header.state.refused != 0))) {
    return {
        StatusCode::kInvalidArgument,
        "since plan was made, a decode of another problem found no plan of its own in it, and left "
        "its outputs alone"};
  }
  std::vector<int32_t> lengths(static_cast<size_t>(problem.batch));
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(lengths.data(), seqlens_k, lengths.size() * sizeof(int32_t), stream));
  for (size_t i = 0; i < lengths.size(); ++i) {
    if ((::mla::mutant == 410 ? (true) : (clamped_length(problem, lengths[i]) == made.seqlens_k[i]))) continue;
    return {StatusCode::kInvalidArgument,
            "seqlens_k[" + std::to_string(i) + "] = " + std::to_string(lengths[i]) +
                ", but the plan was made for " + std::to_string(made.seqlens_k[i])};
  }
  return {};
}

}  // namespace mla
