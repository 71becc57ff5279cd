// 10_pages: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = pages;

constexpr int kMaxRows = 32;

// Rows of a tile: those that there are, padded; 32 where there are more.
template <typename F>
decltype(auto) visit_rows(int rows, F&& f) {
  if (rows <= 8) return f(std::integral_constant<int, 8>());
  if (rows <= 16) return f(std::integral_constant<int, 16>());
  if (rows <= 24) return f(std::integral_constant<int, 24>());
  return f(std::integral_constant<int, kMaxRows>());
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = visit_rows(problem.rows_per_kv_head(),
                               [&](auto rows) { return row_tiles_of(problem, rows()); });
  return {.row_tiles = tiles,
          .workers = workers_for(tiles, limits.multiprocessors),
          .fixed_grains = 2,
          .min_grains = 2,
          .combine_grains = 4};
}

Status decode(const Problem& problem, const Tensors& tensors, void* plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  const PlanShape shape = plan_shape(problem, limits);
  const SplitWorkspace split = split_workspace(problem, shape, plan, scratch);
  TensorMap cache_map;
  MLA_RETURN_IF_ERROR(encode_page_map(problem, tensors, &cache_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_rows(problem.rows_per_kv_head(), [&](auto rows) {
        return visit_flag(problem.page_size == 64, [&](auto pages_of_64) {
          return launch(kernel::decode<decltype(zero), rows(), pages_of_64()>, grid,
                        kernel::kThreads, sizeof(kernel::Smem<rows()>), stream, cache_map, problem,
                        tensors, split, items);
        });
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream, CombineStart::kEarly);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const int rows =
      visit_rows(problem.rows_per_kv_head(), [](auto padded) { return int{padded()}; });
  const double tiles = double(total_tokens) / kernel::kTokens * shape.row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tiles * rows * kernel::kTokens * (kHeadDimQK + kHeadDimV);
  // A tile's bytes: K, Q; V, and P for each of its boxes; the way in; P written.
  prediction.shared_bytes = tiles * 2 * (kernel::kTokens * (2 * kHeadDimQK + kHeadDimV) +
                                         rows * (kHeadDimQK + (kernel::kVBoxes + 1) * kernel::kTokens));
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  prediction.busy_fraction = busy_fraction(shape, total_tokens, limits);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "operands swapped: few heads are columns, padded to 8 instead of 64";
  stage.min_compute_capability = stage.max_compute_capability = 90;
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
