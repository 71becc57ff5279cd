/// @file
/// A stage is a value in a registry: what it is called, its one idea, what hardware it needs, how
/// to run it. Tests, bench and tools loop over the registry, which the build generates from
/// registry.cpp.in: one entry per folder stages/NN_*.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "reference/problem.h"
#include "stages/common/machine/machine.h"
#include "stages/common/split/plan.h"

namespace mla {

/// What a stage expects to spend on a problem: the terms of its own limit.
struct Prediction {
  double fp32_flop = 0;     ///< FLOP on the fp32 cores (an FMA is 2), padding included.
  double matrix_flop = 0;   ///< FLOP on the tensor cores, padding included.
  double shared_bytes = 0;  ///< Bytes through shared memory.
  double dram_bytes =
      0;  ///< Bytes through device memory. A re-read while a block runs hits a cache.
  double busy_fraction = 1;  ///< Share of the multiprocessors that have work, 0 ... 1.
  /// Clocks that a multiprocessor takes for 64 tokens of one row tile, where phases wait for one another. 0:
  /// they overlap, and the largest of the amounts above is all that counts. For an estimate, no limit.
  double grain_clocks = 0;
};

/// One rung of the ladder, built for one machine.
struct Stage {
  std::string slug;  ///< Folder name: "02_shared_tiled"
  std::string idea;  ///< One line
  MachineKind machine = MachineKind::kModel;
  /// It has no kernel: it is plain C++ on the host's cores and memory, and a stage of the model's machine
  /// alone. It predicts nothing, because limits are a GPU's.
  bool on_cpu = false;
  int min_compute_capability = 80;  ///< 80 for 8.0; the oldest device that it runs on.
  int max_compute_capability = 1 << 30;
  /// What it can read of a cache. Any other problem is refused before anything else is done with it.
  std::vector<CacheFormat> cache_formats = {CacheFormat::k16Bit};
  /// How long it must run back to back before sustained times are taken, in s. A kernel that keeps the
  /// tensor cores busy needs kTensorCoreWarmup: only then has the power limit lowered the clock.
  double sustained_warmup_s = 0.2;
  /// What its plan is to be made by instead of what the stage asks for; by default nothing.
  PlanSettings settings;

  /// @name What the stage itself supplies
  /// Called with arguments that are checked, a batch that is not empty, and strides that are filled in,
  /// by the functions below: call those.
  /// @{

  /// Whether the stage can decode the problem on the device, if the fields above do not say all; null:
  /// they do.
  Status (*check)(const Problem& problem, const DeviceLimits& limits) = nullptr;
  /// Bytes of device memory that `decode` needs beside the tensors, for a stage without a plan; null:
  /// none.
  size_t (*scratch_bytes)(const Problem& problem, const DeviceLimits& limits) = nullptr;
  /// How sequences are split over workers; null for a stage that works without a plan.
  PlanShape (*plan_shape)(const Problem& problem, const DeviceLimits& limits) = nullptr;
  /// Enqueues the decode on `stream`, by the plan if the stage uses one: not by what plan_shape says,
  /// which `settings` may have changed. `limits` are those of the device.
  Status (*decode)(const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                   void* scratch, const DeviceLimits& limits, Stream stream) = nullptr;
  /// See mla::predict. The busy fraction of a stage with a plan is filled in from that. Null for a stage on
  /// the CPU.
  Prediction (*predict)(const Problem& problem, int64_t total_tokens,
                        const DeviceLimits& limits) = nullptr;
  /// @}
};

/// Stage::sustained_warmup_s of kernels that keep the tensor cores busy.
inline constexpr double kTensorCoreWarmup = 1.2;

/// Every folder stages/NN_*, in order, built for `machine`. Empty for kGpu in a build without CUDA, and for
/// kModel in a program that links the stages for GPUs alone. One on the CPU is among those of kModel.
const std::vector<Stage>& stages(MachineKind machine);

/// Steps between a stage and the one before, in folders stages/NN_*/steps/N_*, in a program that is built with some:
/// mla_bench, mla_run, the conformance program of the stage; for GPUs where MLA_GPU_STEPS says so. Slugs are
/// "step_05_1_plain_mma". A step is a stage in all but this: stages() does not list it, so that nothing chooses it, tests
/// it or shows it unasked.
const std::vector<Stage>& steps(MachineKind machine);
/// Gives a program its steps; called once, before main().
void add_steps(std::vector<Stage> (*list)(MachineKind machine));

/// The stage with this slug (or its number: "02", of a step "step_05_1"), or null with the reason in `why_not`:
/// which stages there are, or why there is none for this machine. "auto" is the one that chooses: auto_stage() of
/// choose.h.
const Stage* find_stage(MachineKind machine, const std::string& slug,
                        std::string* why_not = nullptr);

/// Where `stage` runs on `machine`, in a line: Machine::description(), or "CPU, 16 cores".
std::string where(const Stage& stage, const Machine& machine);

/// ok, or kUnsupported with the reason why `stage` cannot run on a device with these limits.
Status check_device(const Stage& stage, const DeviceLimits& limits);

/// Whether `stage` can read a cache of this format.
bool can_read(const Stage& stage, CacheFormat format);
/// Whether it can read any but 16 bits.
bool reads_quantised(const Stage& stage);
/// The formats that `stage` can read: "fp8_tile128, fp8_tensor".
std::string names_of_formats(const Stage& stage);
/// ok, or kUnsupported, naming stage and format, if `stage` cannot read the problem's cache. All functions
/// below that take a stage and a problem ask it.
Status check_cache_format(const Stage& stage, const Problem& problem);

/// @name What a stage asks for, and expects
/// By shapes and the device alone. They return kInvalidArgument for a problem that validate()
/// refuses and for limits of no device, kUnsupported as check_cache_format(), and then leave the result
/// alone.
/// @{

/// Bytes of memory that a decode of `problem` needs beside its tensors, on a device with these limits.
/// @return also kInvalidArgument for more pieces than a plan can hold
Status workspace_bytes(const Stage& stage, const Problem& problem, const DeviceLimits& limits,
                       WorkspaceBytes* bytes);
/// The same on the device where the stage runs.
/// @return also kUnavailable and kUnsupported, as check_device()
Status workspace_bytes(const Stage& stage, const Problem& problem, WorkspaceBytes* bytes);

/// Allocates what decode() needs on the device where the stage runs. Nothing if that is nothing.
/// @return also Machine::allocate's errors
Status allocate_workspace(const Stage& stage, const Problem& problem, DeviceBuffer* workspace);

/// How the stage splits sequences over workers.
/// @return also kUnsupported for a stage that makes no plan
Status plan_shape(const Stage& stage, const Problem& problem, const DeviceLimits& limits,
                  PlanShape* shape);

/// What the stage expects to spend.
/// @param total_tokens  sum of seqlens_k, at least 0
/// @return also kUnsupported for a stage on the CPU
Status predict(const Stage& stage, const Problem& problem, int64_t total_tokens,
               const DeviceLimits& limits, Prediction* prediction);
/// @}

/// Decodes: checks problem, cache format, pointers, strides, workspace and device, makes the plan if the stage uses
/// one, then runs the stage. On any error no output is touched. Asynchronous on a GPU: errors inside
/// kernels appear at the next synchronisation. May be captured in a CUDA graph: a replay uses the
/// lengths and the block table as they are then.
/// @param tensors    see Tensors for shapes
/// @param workspace  WorkspaceBytes::total() or more, 16-byte aligned; not shared with another decode
///                   under way
Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors,
              const Workspace& workspace = {}, Stream stream = nullptr);

/// @name The two halves of decode()
/// One plan can serve several decodes of the same lengths, for example those of all layers of a model,
/// also at the same time on several streams: then each has scratch memory of its own. Both are
/// asynchronous, and report errors as decode() does.
/// @{

/// Makes the plan, without a host synchronisation; does nothing for a stage that uses none.
/// @param seqlens_k  [batch], in device memory
/// @param plan       WorkspaceBytes::plan or more, 16-byte aligned
/// @param shared     for a rank that holds a share of every sequence, else null
Status plan_decode(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                   const Workspace& plan, Stream stream = nullptr,
                   const SharedLengths* shared = nullptr);

/// Decodes by the plan, which must have been made for the same problem and lengths. With other lengths
/// the results are wrong; check_plan() checks that on request. Memory that holds no plan for this
/// problem is recognised in the kernel, which then leaves the outputs alone: plan_state() and
/// check_plan() tell.
/// @param plan     as plan_decode() left it; only read
/// @param scratch  WorkspaceBytes::scratch or more, 16-byte aligned
Status decode_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      const Workspace& plan, const Workspace& scratch, Stream stream = nullptr);
/// @}

/// Enqueues a copy of 16 bytes that say whether `plan` holds a plan, and whether a decode has missed
/// its own there. Does not wait.
/// @param state  on the host, pinned if the copy is to be asynchronous; there when the stream is
/// @return kUnsupported for a stage that uses no plan
Status plan_state(const Stage& stage, const Problem& problem, const Workspace& plan,
                  PlanState* state, Stream stream = nullptr);

/// Reads the plan back, after all work on `stream`.
/// @return kUnsupported for a stage that uses none; kInvalidArgument if there is none for this
///         problem
Status read_plan(const Stage& stage, const Problem& problem, const Workspace& plan,
                 HostPlan* read_back, Stream stream = nullptr);

/// On request: whether the plan was made for this problem and these lengths, and no decode since has
/// missed its own there. Waits for the stream. ok for a stage that uses no plan.
/// @param seqlens_k  [batch], in device memory
/// @return kInvalidArgument, naming the first sequence whose length differs
Status check_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                  const Workspace& plan, Stream stream = nullptr);

/// @name Terms of a prediction that stages share
/// @{

/// Bytes of the cache rows of `total_tokens` tokens, in the problem's cache format.
double cache_bytes(const Problem& problem, int64_t total_tokens);

/// Share of the multiprocessors that have work under a plan of this shape: a worker has min_grains grains
/// at least.
double busy_fraction(const PlanShape& shape, int64_t total_tokens, const DeviceLimits& limits);
/// @}

}  // namespace mla
