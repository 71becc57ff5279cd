/// @file
/// What the steps to 05_tensor_core share beside their kernels: plan, launch, prediction. A step's stage.cu includes its
/// kernel, names the kernel's namespace `kernel`, and includes this.
#pragma once

#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

static_assert(sizeof(kernel::Smem<64>) <= 232448, "64 rows fit a Hopper block's shared memory");
static_assert(sizeof(kernel::Smem<16>) <= 101376, "16 rows fit any device's from sm_80 on");

int rows_per_tile(const Problem& problem, const DeviceLimits& limits) {
  const bool fits = sizeof(kernel::Smem<64>) <= limits.max_shared_bytes;
  return problem.rows_per_kv_head() > 16 && fits ? 64 : 16;
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem, limits);
  const int tiles = row_tiles_of(problem, tile_rows);
  const int resident = limits.multiprocessors * (tile_rows == 16 ? 2 : 1);
  return {.row_tiles = tiles, .workers = workers_for(tiles, resident), .fixed_grains = 1};
}

template <typename T, int kRows>
Status decode_tiled(const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, plan.shape, plan.memory, scratch);
  MLA_RETURN_IF_ERROR(
      for_all_items(problem, plan.shape, [&](const SplitItems& items, unsigned grid) {
        return launch(kernel::decode<T, kRows>, grid, kernel::Tiling<kRows>::kThreads,
                      sizeof(kernel::Smem<kRows>), stream, problem, tensors, split, items);
      }));
  return launch_combine(problem, plan.shape, split, tensors, stream);
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    return rows_per_tile(problem, limits) == 64
               ? decode_tiled<T, 64>(problem, tensors, plan, scratch, stream)
               : decode_tiled<T, 16>(problem, tensors, plan, scratch, stream);
  });
}

// Bytes through shared memory per token of a tile: fragments for S and for O, the way in, P.
template <int kRows>
double tile_bytes() {
  using Tile = kernel::Tiling<kRows>;
  constexpr int kDepthWarps = Tile::kWarps / (Tile::kRowWarps * Tile::kTokenWarps);
  double bytes = Tile::kWarps * 2.0 * (kHeadDimQK / kDepthWarps) * (16 + Tile::kWarpTokens) +
                 Tile::kWarps * 2.0 * Tile::kTokens * (kRows + kHeadDimV / Tile::kWarps) +
                 Tile::kTokens * 2.0 * kHeadDimQK + kRows * Tile::kTokens * 2.0;
  if constexpr (requires(kernel::Smem<kRows> smem) { smem.partial_s; }) {  // written and read
    bytes += kRows * Tile::kTokens * 8.0 * kDepthWarps;
  }
  return bytes / Tile::kTokens;
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem, limits);
  const double tokens = double(total_tokens) * plan_shape(problem, limits).row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tokens * tile_rows * (kHeadDimQK + kHeadDimV);
  prediction.shared_bytes = tokens * (tile_rows == 64 ? tile_bytes<64>() : tile_bytes<16>());
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  return prediction;
}

Stage step(const char* idea) {
  Stage stage;
  stage.idea = idea;
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace
}  // namespace mla::MLA_MACHINE
