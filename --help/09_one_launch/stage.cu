// 09_one_launch: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = one_launch;

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = row_tiles_of(problem, kernel::kRows);
  PlanShape shape = {.row_tiles = tiles,
                     .workers = workers_for(tiles, limits.multiprocessors),
                     .fixed_grains = 2,
                     .min_grains = 2,
                     .combine_grains = 4};
  // Halves meet where all blocks are resident, so that one may wait for another. With fixed splits nothing
  // may depend on the batch.
  const int64_t resident = std::min<int64_t>(limits.multiprocessors, limits.max_grid_x);
  shape.joins_halves =
      problem.fixed_split_tokens == 0 && int64_t{tiles} * shape.workers <= resident;
  if (!shape.joins_halves) return shape;
  // Nor more workers than there can be grains: they would only have to be resident.
  const int64_t most = problem.batch * (grains_for(problem.max_seqlen_k()) + shape.fixed_grains);
  shape.workers = static_cast<int>(std::clamp<int64_t>(most, 1, shape.workers));
  return shape;
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits&, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  RaisedFlags half_is_there = {};
  if (shape.joins_halves) half_is_there = {split.half_is_there, draw_number()};
  TensorMap cache_map;
  MLA_RETURN_IF_ERROR(encode_cache_map(problem, tensors, &cache_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_flag(problem.page_size == 64, [&](auto pages_of_64) {
        constexpr size_t kBytes = sizeof(kernel::Smem) + timeline::kSharedBytes;
        const auto decode = kernel::decode<decltype(zero), pages_of_64()>;
        if (shape.joins_halves) {
          return launch_cooperative(decode, grid, kernel::kThreads, kBytes, stream, cache_map,
                                    problem, tensors, split, items, half_is_there);
        }
        return launch(decode, grid, kernel::kThreads, kBytes, stream, cache_map, problem, tensors,
                      split, items, half_is_there);
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
  // A tile's bytes (README.md, "Prediction"): Q, K; V; the way in; P written and read.
  prediction.shared_bytes = tiles * 2 * 64 * (2 * kHeadDimQK + kHeadDimV + kHeadDimQK + 2 * 64);
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea =
      "a decode that mostly ends in its first kernel: two halves of a sequence meet in registers";
  stage.min_compute_capability = stage.max_compute_capability = 90;
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
