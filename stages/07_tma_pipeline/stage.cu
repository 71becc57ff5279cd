// 07_tma_pipeline: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = tma_pipeline;

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = row_tiles_of(problem, kernel::kRows);
  return {
      .row_tiles = tiles, .workers = workers_for(tiles, limits.multiprocessors), .fixed_grains = 2};
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits&, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  TensorMap cache_map;
  MLA_RETURN_IF_ERROR(encode_cache_map(problem, tensors, &cache_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_flag(problem.page_size == 64, [&](auto pages_of_64) {
        return launch(kernel::decode<decltype(zero), pages_of_64()>, grid, kernel::kThreads,
                      sizeof(kernel::Smem) + timeline::kSharedBytes, stream, cache_map, problem,
                      tensors, split, items);
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const double tiles = double(total_tokens) / kernel::kTokens * shape.row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tiles * kernel::kRows * kernel::kTokens * (kHeadDimQK + kHeadDimV);
  // A tile's bytes (README.md, "Prediction"): Q twice, K, P twice, V; the way in; P.
  prediction.shared_bytes =
      tiles * 2 * 64 * (3 * kHeadDimQK + 2 * 64 + kHeadDimV + kHeadDimQK + 64);
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  // S by shared memory; exponentials, 16 per clock; P; O by the tensor cores, while the next tile comes.
  prediction.grain_clocks = 1728 + 64 * 64 / 16 + 64 + 1024;
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "TMA and mbarriers: nine boxes per tile, copied while the last one is worked on";
  stage.min_compute_capability = stage.max_compute_capability = 90;
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
