// 10_few_heads: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = few_heads;

// Calls f(rows of a warpgroup, warpgroups): as many rows as there are, padded, or 64 where there are more.
template <typename F>
decltype(auto) visit_rows(int rows, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (rows <= 8) return f(std::integral_constant<int, 8>(), One());
  if (rows <= 16) return f(std::integral_constant<int, 16>(), One());
  if (rows <= 24) return f(std::integral_constant<int, 24>(), One());
  if (rows <= 32) return f(std::integral_constant<int, 32>(), One());
  if (rows <= 48) return f(std::integral_constant<int, 24>(), Two());
  return f(std::integral_constant<int, 32>(), Two());
}

int padded_rows(const Problem& problem) {
  return visit_rows(problem.rows_per_kv_head(), [](auto rows, auto warpgroups) {
    return int{rows()} * int{warpgroups()};
  });
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int rows = padded_rows(problem), tiles = row_tiles_of(problem, rows);
  return {.row_tiles = tiles,
          .workers = workers_for(tiles, limits.multiprocessors),
          .fixed_grains = 2,
          .min_grains = 2,
          .combine_grains = 4,
          .merged_pieces = std::min(kernel::kMaxMerged, 256 / rows)};
}

Status decode(const Problem& problem, const Tensors& tensors, void* plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  const PlanShape shape = plan_shape(problem, limits);
  const SplitWorkspace split = split_workspace(problem, shape, plan, scratch);
  TensorMap cache_map;
  MLA_RETURN_IF_ERROR(encode_page_map(problem, tensors, kernel::kCopyBoxes, &cache_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_rows(problem.rows_per_kv_head(), [&](auto rows, auto warpgroups) {
        return launch(kernel::decode<decltype(zero), rows(), warpgroups()>, grid,
                      kernel::kThreads<warpgroups()>, sizeof(kernel::Smem<rows(), warpgroups()>), stream,
                      cache_map, problem, tensors, split, items);
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream, CombineStart::kEarly);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const int rows = padded_rows(problem);
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
