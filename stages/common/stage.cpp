#include "stages/common/stage.h"

#include <algorithm>

#include "reference/checks.h"
#include "stages/common/split/workspace.h"

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

Status check_workspace(const Stage& stage, size_t needed, const Workspace& workspace) {
  if (workspace.bytes < needed) {
    return {StatusCode::kWorkspaceTooSmall, "workspace.bytes = " + std::to_string(workspace.bytes) +
                                                ", " + stage.slug + " needs " +
                                                std::to_string(needed) + " for this problem"};
  }
  if (needed > 0 && workspace.data == nullptr) {
    return {StatusCode::kInvalidArgument, "workspace.data is null, " + stage.slug + " needs " +
                                              std::to_string(needed) + " bytes"};
  }
  if (reinterpret_cast<uintptr_t>(workspace.data) % 16 != 0) {
    return {StatusCode::kInvalidArgument, "workspace.data is not 16-byte aligned"};
  }
  return {};
}

/// Where a call runs: found and checked once.
struct Place {
  Machine* machine = nullptr;
  DeviceLimits limits;
};

/// Device and workspace of a call, whose problem is checked already.
Status check_place(const Stage& stage, const Problem& problem, const Workspace& workspace,
                   Place* place) {
  MLA_RETURN_IF_ERROR(machine_of(stage, &place->machine));
  place->limits = place->machine->limits();
  return check_workspace(stage, workspace_bytes(stage, problem, place->limits), workspace);
}

Status enqueue_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                    const Workspace& workspace, const Place& place, Stream stream) {
  if (stage.plan_shape == nullptr) return {};
  return make_plan(*place.machine, problem, stage.plan_shape(problem, place.limits), seqlens_k,
                   workspace.data, stream);
}

}  // namespace

size_t workspace_bytes(const Stage& stage, const Problem& problem, const DeviceLimits& limits) {
  if (stage.plan_shape != nullptr) {
    return split_workspace_bytes(problem, stage.plan_shape(problem, limits));
  }
  return stage.workspace_bytes != nullptr ? stage.workspace_bytes(problem, limits) : 0;
}

Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors,
              const Workspace& workspace, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, &place));
  MLA_RETURN_IF_ERROR(enqueue_plan(stage, problem, tensors.seqlens_k, workspace, place, stream));
  return stage.decode(problem, tensors, workspace.data, place.limits, stream);
}

Status plan_decode(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                   const Workspace& workspace, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, &place));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k));
  return enqueue_plan(stage, problem, seqlens_k, workspace, place, stream);
}

Status decode_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      const Workspace& workspace, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, &place));
  return stage.decode(problem, tensors, workspace.data, place.limits, stream);
}

Status read_plan(const Stage& stage, const Problem& problem, const Workspace& workspace,
                 HostPlan* plan, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, &place));
  if (stage.plan_shape == nullptr) {
    return {StatusCode::kUnsupported, stage.slug + " makes no plan"};
  }
  return read_plan(*place.machine, problem, stage.plan_shape(problem, place.limits), workspace.data,
                   plan, stream);
}

Status check_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                  const Workspace& workspace, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_place(stage, problem, workspace, &place));
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k));
  if (stage.plan_shape == nullptr) return {};
  return check_plan(*place.machine, problem, stage.plan_shape(problem, place.limits), seqlens_k,
                    workspace.data, stream);
}

double cache_bytes(const Problem& problem, int64_t total_tokens) {
  return double(total_tokens) * problem.num_heads_kv * kHeadDimQK * 2;
}

double busy_fraction(const PlanShape& shape, int64_t total_tokens, const DeviceLimits& limits) {
  const double shares = double(total_tokens) / kPageSize / shape.min_pages;
  return std::min(
      1.0, shape.row_tiles * std::min<double>(shape.workers, shares) / limits.multiprocessors);
}

}  // namespace mla
