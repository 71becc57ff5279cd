#include "stages/common/stage.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "reference/checks.h"
#include "stages/common/choose/choose.h"
#include "stages/common/split/workspace.h"

namespace mla {

namespace {

std::vector<Stage> (*list_of_steps)(MachineKind) = nullptr;

std::vector<Stage> steps_if_any(MachineKind machine) {
  return list_of_steps == nullptr ? std::vector<Stage>{} : list_of_steps(machine);
}

}  // namespace

void add_steps(std::vector<Stage> (*list)(MachineKind machine)) {
  list_of_steps = list;
}

const std::vector<Stage>& steps(MachineKind machine) {
  static const std::vector<Stage> on_model = steps_if_any(MachineKind::kModel);
  static const std::vector<Stage> on_gpu = steps_if_any(MachineKind::kGpu);
  return machine == MachineKind::kModel ? on_model : on_gpu;
}

const Stage* find_stage(MachineKind machine, const std::string& slug, std::string* why_not) {
  const std::vector<Stage>& all = stages(machine);
  for (const Stage& stage : all) {
    if (stage.slug == slug || stage.slug.compare(0, 2, slug) == 0) return &stage;
  }
  for (const Stage& step : steps(machine)) {
    if (step.slug == slug || step.slug.compare(0, std::strlen("step_05_1"), slug) == 0)
      return &step;
  }
  if (slug == kAutoSlug && !all.empty()) return &auto_stage(machine);
  std::string names;
  for (const Stage& stage : all) names += (names.empty() ? "" : ", ") + stage.slug;
  const bool is_gpu = machine == MachineKind::kGpu;
  const Stage* other = is_gpu ? find_stage(MachineKind::kModel, slug) : nullptr;
  if (why_not != nullptr && other != nullptr && other->on_cpu) {
    *why_not = other->slug + " runs on the CPU, and has no kernel for GPUs";
  } else if (why_not != nullptr && other != nullptr && !names.empty()) {
    *why_not =
        other->slug +
        " was built for the GPU model alone; cmake -DMLA_GPU_STEPS=ON builds it for GPUs, too";
  } else if (why_not != nullptr && !names.empty()) {
    *why_not = "there is no stage '" + slug + "'; there are " + names + ", auto";
  } else if (why_not != nullptr && find_machine(machine, why_not) != nullptr) {
    *why_not = "this build has no stage for this machine";
  }
  return nullptr;
}

std::string where(const Stage& stage, const Machine& machine) {
  if (!stage.on_cpu) return machine.description();
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  return "CPU, " + std::to_string(cores) + (cores == 1 ? " core" : " cores");
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

bool can_read(const Stage& stage, CacheFormat format) {
  const std::vector<CacheFormat>& known = stage.cache_formats;
  return std::find(known.begin(), known.end(), format) != known.end();
}

bool reads_quantised(const Stage& stage) {
  return std::any_of(stage.cache_formats.begin(), stage.cache_formats.end(), is_quantised);
}

std::string names_of_formats(const Stage& stage) {
  std::string names;
  for (const CacheFormat format : stage.cache_formats) {
    names += (names.empty() ? "" : ", ") + std::string(to_string(format));
  }
  return names;
}

Status check_cache_format(const Stage& stage, const Problem& problem) {
  if (can_read(stage, problem.cache_format)) return {};
  return {StatusCode::kUnsupported,
          stage.slug + " cannot read a cache of cache_format = " + to_string(problem.cache_format) +
              ", only " + names_of_formats(stage)};
}

namespace {

/// The problem alone, and whether the stage takes it.
Status check_problem(const Stage& stage, const Problem& problem) {
  MLA_RETURN_IF_ERROR(validate(problem));
  return check_cache_format(stage, problem);
}
/// The same, and the tensors.
Status check_problem(const Stage& stage, const Problem& problem, const Tensors& tensors) {
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  return check_cache_format(stage, problem);
}

/// The machine the stage is for, if it can run there.
Status machine_of(const Stage& stage, Machine** machine) {
  std::string why_not;
  *machine = find_machine(stage.machine, &why_not);
  if (*machine == nullptr) return {StatusCode::kUnavailable, why_not};
  return check_device(stage, (*machine)->limits());
}

/// A buffer that a caller lends: `name` for messages.
Status check_buffer(const Stage& stage, const std::string& name, size_t needed,
                    const Workspace& buffer) {
  if (buffer.bytes < needed) {
    return {StatusCode::kWorkspaceTooSmall, name + ".bytes = " + std::to_string(buffer.bytes) +
                                                ", " + stage.slug + " needs " +
                                                std::to_string(needed) + " for this problem"};
  }
  if (needed > 0 && buffer.data == nullptr) {
    return {StatusCode::kInvalidArgument,
            name + ".data is null, " + stage.slug + " needs " + std::to_string(needed) + " bytes"};
  }
  if (reinterpret_cast<uintptr_t>(buffer.data) % 16 != 0) {
    return {StatusCode::kInvalidArgument, name + ".data is not 16-byte aligned"};
  }
  return {};
}

/// Limits may come from a caller.
Status check_limits(const DeviceLimits& limits) {
  constexpr int kMost = 1 << 16;  // more than any device has, and a count of blocks fits 32 bits
  if (limits.multiprocessors >= 1 && limits.multiprocessors <= kMost) return {};
  return {StatusCode::kInvalidArgument,
          "limits.multiprocessors = " + std::to_string(limits.multiprocessors) + " must be 1 to " +
              std::to_string(kMost)};
}

/// Where a call runs, how it splits and how much memory it needs: found once.
struct Place {
  Machine* machine = nullptr;
  DeviceLimits limits;
  PlanShape shape;  ///< Of a stage that makes a plan.
  WorkspaceBytes bytes;
};

/// Shape and needs on a device with the place's limits, of a problem that is checked already. The
/// limits become those of the stage's settings.
Status find_needs(const Stage& stage, const Problem& problem, Place* place) {
  place->limits = with_settings(stage.settings, place->limits);
  if (problem.batch == 0) return {};
  if (stage.plan_shape != nullptr) {
    place->shape = with_settings(stage.settings, stage.plan_shape(problem, place->limits));
    return split_bytes(problem, place->shape, &place->bytes);
  }
  if (stage.scratch_bytes != nullptr) {
    place->bytes.scratch = stage.scratch_bytes(problem, place->limits);
  }
  return {};
}

/// The device of a call and its needs, whose problem is checked already.
Status find_place(const Stage& stage, const Problem& problem, Place* place) {
  MLA_RETURN_IF_ERROR(machine_of(stage, &place->machine));
  place->limits = place->machine->limits();
  if (stage.check != nullptr) MLA_RETURN_IF_ERROR(stage.check(problem, place->limits));
  return find_needs(stage, problem, place);
}

/// The same for what works on a plan alone: the problem and the plan's memory are checked, too.
Status find_plan(const Stage& stage, const Problem& problem, const Workspace& plan, Place* place) {
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  MLA_RETURN_IF_ERROR(find_place(stage, problem, place));
  return check_buffer(stage, "plan", place->bytes.plan, plan);
}

Status no_plan(const Stage& stage) {
  return {StatusCode::kUnsupported, stage.slug + " makes no plan"};
}

Status enqueue_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                    void* plan, const Place& place, Stream stream,
                    const SharedLengths* shared = nullptr) {
  if (stage.plan_shape == nullptr || problem.batch == 0) return {};
  return make_plan(*place.machine, problem, place.shape, seqlens_k, plan, stream, shared);
}

Status enqueue_decode(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      void* plan, void* scratch, const Place& place, Stream stream) {
  if (problem.batch == 0) return {};
  return stage.decode(problem, with_strides(problem, tensors), {place.shape, plan}, scratch,
                      place.limits, stream);
}

}  // namespace

Status workspace_bytes(const Stage& stage, const Problem& problem, const DeviceLimits& limits,
                       WorkspaceBytes* bytes) {
  Place place;
  place.limits = limits;
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  MLA_RETURN_IF_ERROR(check_limits(limits));
  MLA_RETURN_IF_ERROR(find_needs(stage, problem, &place));
  *bytes = place.bytes;
  return {};
}

Status workspace_bytes(const Stage& stage, const Problem& problem, WorkspaceBytes* bytes) {
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  Place place;
  MLA_RETURN_IF_ERROR(find_place(stage, problem, &place));
  *bytes = place.bytes;
  return {};
}

Status allocate_workspace(const Stage& stage, const Problem& problem, DeviceBuffer* workspace) {
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  Place place;
  MLA_RETURN_IF_ERROR(find_place(stage, problem, &place));
  workspace->reset();
  if (place.bytes.total() == 0) return {};
  return workspace->allocate(*place.machine, place.bytes.total());
}

Status plan_shape(const Stage& stage, const Problem& problem, const DeviceLimits& limits,
                  PlanShape* shape) {
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  MLA_RETURN_IF_ERROR(check_limits(limits));
  if (stage.plan_shape == nullptr) return no_plan(stage);
  *shape = with_settings(stage.settings,
                         stage.plan_shape(problem, with_settings(stage.settings, limits)));
  return {};
}

Status predict(const Stage& stage, const Problem& problem, int64_t total_tokens,
               const DeviceLimits& limits, Prediction* prediction) {
  MLA_RETURN_IF_ERROR(check_problem(stage, problem));
  MLA_RETURN_IF_ERROR(check_limits(limits));
  if (total_tokens < 0) {
    return {StatusCode::kInvalidArgument,
            "total_tokens = " + std::to_string(total_tokens) + " must be at least 0"};
  }
  if (stage.predict == nullptr) {
    return {StatusCode::kUnsupported, stage.slug + " runs on the CPU: no limit of a GPU binds it"};
  }
  *prediction = {};
  if (problem.batch == 0) return {};
  *prediction = stage.predict(problem, total_tokens, with_settings(stage.settings, limits));
  if (stage.plan_shape == nullptr) return {};
  PlanShape shape;
  MLA_RETURN_IF_ERROR(plan_shape(stage, problem, limits, &shape));
  prediction->busy_fraction = busy_fraction(shape, total_tokens, limits);
  return {};
}

Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors,
              const Workspace& workspace, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(check_problem(stage, problem, tensors));
  MLA_RETURN_IF_ERROR(find_place(stage, problem, &place));
  MLA_RETURN_IF_ERROR(check_buffer(stage, "workspace", place.bytes.total(), workspace));
  void* plan = place.bytes.plan_in(workspace).data;
  MLA_RETURN_IF_ERROR(enqueue_plan(stage, problem, tensors.seqlens_k, plan, place, stream));
  return enqueue_decode(stage, problem, tensors, plan, place.bytes.scratch_in(workspace).data,
                        place, stream);
}

Status plan_decode(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                   const Workspace& plan, Stream stream, const SharedLengths* shared) {
  Place place;
  MLA_RETURN_IF_ERROR(find_plan(stage, problem, plan, &place));
  if (problem.batch > 0) MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k, 4));
  return enqueue_plan(stage, problem, seqlens_k, plan.data, place, stream, shared);
}

Status decode_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      const Workspace& plan, const Workspace& scratch, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(check_problem(stage, problem, tensors));
  MLA_RETURN_IF_ERROR(find_place(stage, problem, &place));
  MLA_RETURN_IF_ERROR(check_buffer(stage, "plan", place.bytes.plan, plan));
  MLA_RETURN_IF_ERROR(check_buffer(stage, "scratch", place.bytes.scratch, scratch));
  return enqueue_decode(stage, problem, tensors, plan.data, scratch.data, place, stream);
}

Status plan_state(const Stage& stage, const Problem& problem, const Workspace& plan,
                  PlanState* state, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(find_plan(stage, problem, plan, &place));
  if (stage.plan_shape == nullptr) return no_plan(stage);
  if (problem.batch == 0) {
    *state = {};
    return {};
  }
  return place.machine->enqueue_copy_to_host(state, plan.data, sizeof(PlanState), stream);
}

Status read_plan(const Stage& stage, const Problem& problem, const Workspace& plan,
                 HostPlan* read_back, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(find_plan(stage, problem, plan, &place));
  if (stage.plan_shape == nullptr) return no_plan(stage);
  if (problem.batch == 0) {
    *read_back = {};
    return {};
  }
  return read_plan(*place.machine, problem, place.shape, plan.data, read_back, stream);
}

Status check_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                  const Workspace& plan, Stream stream) {
  Place place;
  MLA_RETURN_IF_ERROR(find_plan(stage, problem, plan, &place));
  if (stage.plan_shape == nullptr || problem.batch == 0) return {};
  MLA_RETURN_IF_ERROR(check_pointer("seqlens_k", seqlens_k, 4));
  return check_plan(*place.machine, problem, place.shape, seqlens_k, plan.data, stream);
}

double cache_bytes(const Problem& problem, int64_t total_tokens) {
  return double(total_tokens) * problem.num_heads_kv * problem.cache_row_bytes();
}

double busy_fraction(const PlanShape& shape, int64_t total_tokens, const DeviceLimits& limits) {
  const double shares = double(total_tokens) / kGrainTokens / shape.min_grains;
  return std::min(1.0, shape.row_tiles * shape.team * std::min<double>(shape.workers, shares) /
                           limits.multiprocessors);
}

}  // namespace mla
