#include "stages/common/stage.h"

#include "reference/checks.h"

namespace mla {

const Stage* find_stage(MachineKind machine, const std::string& slug) {
  for (const Stage& stage : stages(machine)) {
    if (stage.slug == slug || stage.slug.substr(0, 2) == slug) return &stage;
  }
  return nullptr;
}

Status check_device(const Stage& stage, const DeviceLimits& limits) {
  const auto version = [](int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  };
  if (limits.compute_capability < stage.min_compute_capability ||
      limits.compute_capability > stage.max_compute_capability) {
    std::string needs = version(stage.min_compute_capability);
    if (stage.max_compute_capability == stage.min_compute_capability) {
      needs += " exactly";
    } else if (stage.max_compute_capability < (1 << 30)) {
      needs += " to " + version(stage.max_compute_capability);
    } else {
      needs += " or newer";
    }
    return {StatusCode::kUnsupported, stage.slug + " needs compute capability " + needs +
                                          ", the device has " + version(limits.compute_capability)};
  }
  return {};
}

namespace {

/// The machine the stage is for, if it can run there.
Status machine_of(const Stage& stage, Machine** machine) {
  if (stage.machine == MachineKind::kModel) {
    *machine = &model_machine();
  } else {
    std::string why_not;
    *machine = gpu_machine(&why_not);
    if (*machine == nullptr) return {StatusCode::kUnavailable, why_not};
  }
  return check_device(stage, (*machine)->limits());
}

Status check_workspace(const Stage& stage, const Problem& problem, const void* workspace,
                       size_t workspace_bytes) {
  const size_t needed = stage.workspace_bytes(problem);
  if (workspace_bytes < needed) {
    return {StatusCode::kWorkspaceTooSmall, "workspace_bytes = " + std::to_string(workspace_bytes) +
                                                ", " + stage.slug + " needs " +
                                                std::to_string(needed) + " for this problem"};
  }
  if (needed > 0 && workspace == nullptr) {
    return {StatusCode::kInvalidArgument,
            "workspace is null, " + stage.slug + " needs " + std::to_string(needed) + " bytes"};
  }
  if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return {StatusCode::kInvalidArgument, "workspace is not 16-byte aligned"};
  }
  return {};
}

/// Device and workspace of a call, whose problem is checked already.
Status check_place(const Stage& stage, const Problem& problem, const void* workspace,
                   size_t workspace_bytes, Machine** machine) {
  MLA_RETURN_IF_ERROR(machine_of(stage, machine));
  return check_workspace(stage, problem, workspace, workspace_bytes);
}

Status enqueue_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                    void* workspace, Machine& machine, Stream stream) {
  if (stage.plan_shape == nullptr) return {};
  return make_plan(machine, problem, stage.plan_shape(problem), seqlens_k, workspace, stream);
}

}  // namespace

Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors, void* workspace,
              size_t workspace_bytes, Stream stream) {
  Machine* machine = nullptr;
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, workspace_bytes, &machine));
  MLA_RETURN_IF_ERROR(enqueue_plan(stage, problem, tensors.seqlens_k, workspace, *machine, stream));
  return stage.decode(problem, tensors, workspace, stream);
}

Status plan_decode(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                   void* workspace, size_t workspace_bytes, Stream stream) {
  Machine* machine = nullptr;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, workspace_bytes, &machine));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k));
  return enqueue_plan(stage, problem, seqlens_k, workspace, *machine, stream);
}

Status decode_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      void* workspace, size_t workspace_bytes, Stream stream) {
  Machine* machine = nullptr;
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, workspace_bytes, &machine));
  return stage.decode(problem, tensors, workspace, stream);
}

Status read_plan(const Stage& stage, const Problem& problem, void* workspace,
                 size_t workspace_bytes, HostPlan* plan, Stream stream) {
  Machine* machine = nullptr;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, workspace_bytes, &machine));
  if (stage.plan_shape == nullptr) {
    return {StatusCode::kUnsupported, stage.slug + " makes no plan"};
  }
  return read_plan(*machine, problem, stage.plan_shape(problem), workspace, plan, stream);
}

Status check_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                  void* workspace, size_t workspace_bytes, Stream stream) {
  Machine* machine = nullptr;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, workspace_bytes, &machine));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k));
  if (stage.plan_shape == nullptr) return {};
  HostPlan plan;
  MLA_RETURN_IF_ERROR(
      read_plan(*machine, problem, stage.plan_shape(problem), workspace, &plan, stream));
  std::vector<int32_t> lengths(static_cast<size_t>(problem.batch));
  MLA_RETURN_IF_ERROR(
      machine->copy_to_host(lengths.data(), seqlens_k, lengths.size() * sizeof(int32_t), stream));
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] == plan.seqlens_k[i]) continue;
    return {StatusCode::kInvalidArgument,
            "seqlens_k[" + std::to_string(i) + "] = " + std::to_string(lengths[i]) +
                ", but the plan was made for " + std::to_string(plan.seqlens_k[i])};
  }
  return {};
}

}  // namespace mla
