// 11_cluster: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = cluster;

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = row_tiles_of(problem, kernel::kRows);
  return {.row_tiles = tiles,
          .workers = workers_for(tiles, std::max(1, limits.multiprocessors / kernel::kBlocks)),
          .fixed_grains = 2,
          .min_grains = 2,
          .combine_grains = 4,
          .team = kernel::kBlocks};
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits&, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  TensorMap cache_map, rotary_map;
  MLA_RETURN_IF_ERROR(encode_cache_map(problem, tensors, &cache_map));
  MLA_RETURN_IF_ERROR(
      encode_cache_map(problem, tensors, &rotary_map, kernel::kTokens, kernel::kRotaryColumns));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_flag(problem.page_size == 64, [&](auto pages_of_64) {
        return launch_cluster(kernel::decode<decltype(zero), pages_of_64()>, kernel::kBlocks, grid,
                              kernel::kThreads, sizeof(kernel::Smem) + timeline::kSharedBytes,
                              stream, cache_map, rotary_map, problem, tensors, split, items);
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream, CombineStart::kEarly);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const double tiles = double(total_tokens) / kernel::kTokens * shape.row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tiles * kernel::kRows * kernel::kTokens * (kHeadDimQK + kHeadDimV);
  // A tile's bytes, of both blocks (README.md, "Prediction"): Q; K; V, each for two warpgroups; the way in;
  // S and P written and read.
  prediction.shared_bytes =
      tiles * 2 *
      (kernel::kRows * kHeadDimV + 2 * kernel::kTokens * (kHeadDimQK + kHeadDimV) +
       kernel::kTokens * kHeadDimQK + (2 + 1) * 2 * kernel::kRows * kernel::kTokens);
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea =
      "two blocks share every page: each has half of its columns, and they exchange S and P";
  stage.min_compute_capability = stage.max_compute_capability = 90;
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
