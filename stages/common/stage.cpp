#include "stages/common/stage.h"

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

Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors, void* workspace,
              size_t workspace_bytes, Stream stream) {
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  if (stage.machine == MachineKind::kGpu) {
    std::string why_not;
    const Machine* gpu = gpu_machine(&why_not);
    if (gpu == nullptr) return {StatusCode::kUnavailable, why_not};
    MLA_RETURN_IF_ERROR(check_device(stage, gpu->limits()));
  } else {
    MLA_RETURN_IF_ERROR(check_device(stage, model_machine().limits()));
  }
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
  return stage.decode(problem, tensors, workspace, stream);
}

}  // namespace mla
