/// @file
/// A stage is a value in a registry: what it is called, its one idea, what hardware it needs, how
/// to run it. Tests, bench and tools loop over the registry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "reference/problem.h"
#include "stages/common/machine/machine.h"
#include "stages/common/split/split_plan.h"

namespace mla {

/// What a stage expects to spend on a problem: the terms of its own limit.
struct Prediction {
  double fp32_flop = 0;     ///< On the fp32 cores (2 an FMA), padding included.
  double matrix_flop = 0;   ///< On the tensor cores, padding included.
  double shared_bytes = 0;  ///< Through shared memory.
  double dram_bytes =
      0;  ///< Through device memory, caches assumed to catch re-reads within a block's lifetime.
  double busy_fraction = 1;  ///< Share of the multiprocessors that have work.
};

/// One rung of the ladder, built for one machine.
struct Stage {
  std::string slug;  ///< Folder name: "02_shared_tiled"
  std::string idea;  ///< One line
  MachineKind machine = MachineKind::kModel;
  int min_compute_capability = 80;
  int max_compute_capability = 1 << 30;
  /// Device memory `decode` needs beside the tensors. Depends on shapes and the device alone.
  size_t (*workspace_bytes)(const Problem& problem) = nullptr;
  /// How sequences are split over workers; null for a stage that does without a plan.
  PlanShape (*plan_shape)(const Problem& problem) = nullptr;
  /// Enqueues the decode on `stream`; the workspace holds the plan, if the stage uses one.
  /// Arguments are already checked: call mla::decode.
  Status (*decode)(const Problem& problem, const Tensors& tensors, void* workspace,
                   Stream stream) = nullptr;
  /// `total_tokens`: sum of seqlens_k.
  Prediction (*predict)(const Problem& problem, int64_t total_tokens,
                        const DeviceLimits& limits) = nullptr;
};

/// Every folder stages/NN_*, in order, built for `machine`. For kGpu in a build without CUDA:
/// empty.
const std::vector<Stage>& stages(MachineKind machine);

/// The stage with this slug (or its number: "02"), or null.
const Stage* find_stage(MachineKind machine, const std::string& slug);

/// ok, or why `stage` cannot run on a device with these limits.
Status check_device(const Stage& stage, const DeviceLimits& limits);

/// Decodes: checks problem, pointers, workspace and device, makes the plan if the stage uses one,
/// then runs the stage. On any error no output is touched. Asynchronous on a GPU: errors inside
/// kernels appear at the next synchronisation. May be captured in a CUDA graph: a replay follows
/// lengths and block table as they then are.
Status decode(const Stage& stage, const Problem& problem, const Tensors& tensors, void* workspace,
              size_t workspace_bytes, Stream stream = nullptr);

/// The two halves of decode(), so that one plan can serve several decodes of the same lengths, as
/// the layers of a model are. First the plan; nothing for a stage that uses none. Asynchronous,
/// without a host synchronisation; errors as of decode().
Status plan_decode(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                   void* workspace, size_t workspace_bytes, Stream stream = nullptr);

/// Decodes by the plan in the workspace. It must be there, made for the same problem and lengths, as
/// page ids must be in the cache: check_plan() looks, on request. Other lengths give wrong results.
/// Asynchronous; errors as of decode().
Status decode_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                      void* workspace, size_t workspace_bytes, Stream stream = nullptr);

/// Reads the plan in the workspace back, after all work on `stream`.
/// @return kUnsupported for a stage that uses none; kInvalidArgument if there is none for this
///         problem
Status read_plan(const Stage& stage, const Problem& problem, void* workspace,
                 size_t workspace_bytes, HostPlan* plan, Stream stream = nullptr);

/// On request: whether the plan in the workspace was made for this problem and these lengths (in
/// device memory). Waits for the stream. ok for a stage that uses no plan.
/// @return kInvalidArgument, naming the first sequence whose length is another
Status check_plan(const Stage& stage, const Problem& problem, const int32_t* seqlens_k,
                  void* workspace, size_t workspace_bytes, Stream stream = nullptr);

}  // namespace mla
