// 05_tensor_core: tile sizes by the device's shared memory, launch, prediction.
#include <algorithm>

#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = tensor_core;
using kernel::Tiling;

// rows, tokens, and the warps that share rows, tokens and columns of S
using Rows16 = Tiling<16, 32, 1, 4, 1>;      // any device from sm_80 on; two blocks on Hopper
using Rows32 = Tiling<32, 32, 2, 2, 1>;      // sm_80; two blocks on Hopper
using Rows64 = Tiling<64, 32, 2, 2, 2>;      // sm_80
using Rows64Wide = Tiling<64, 64, 2, 2, 2>;  // Hopper
static_assert(sizeof(kernel::Smem<Rows16>) <= 101376, "99 KB");
static_assert(sizeof(kernel::Smem<Rows32>) <= 115712, "two blocks in 228 KB");
static_assert(sizeof(kernel::Smem<Rows64>) <= 166912, "163 KB");
static_assert(sizeof(kernel::Smem<Rows64Wide>) <= 232448, "227 KB");

template <typename Tile>
constexpr int kBlocks = Tile::kRows <= 32 ? 2 : 1;  // that registers leave room for

// Calls f(Tile{}) with the tile for the problem: the fewest rows that hold all rows of a KV head, as
// far as the device's shared memory and limits.max_tile_rows go.
template <typename F>
auto visit_tiling(const Problem& problem, const DeviceLimits& limits, F&& f) {
  const int rows = std::min(problem.rows_per_kv_head(), limits.max_tile_rows);
  const auto fits = [&](size_t bytes) { return bytes <= limits.max_shared_bytes; };
  if (rows > 32 && fits(sizeof(kernel::Smem<Rows64Wide>))) return f(Rows64Wide{});
  if (rows > 32 && fits(sizeof(kernel::Smem<Rows64>))) return f(Rows64{});
  if (rows > 16 && fits(sizeof(kernel::Smem<Rows32>))) return f(Rows32{});
  return f(Rows16{});
}

template <typename Tile>
PlanShape plan_shape_of(const Problem& problem, const DeviceLimits& limits) {
  constexpr size_t kReserved = 1024;  // of shared memory, for every block
  const size_t resident =
      (limits.max_shared_bytes + kReserved) / (sizeof(kernel::Smem<Tile>) + kReserved);
  const int tiles = row_tiles_of(problem, Tile::kRows);
  const int blocks = std::clamp(static_cast<int>(resident), 1, kBlocks<Tile>);
  return {.row_tiles = tiles,
          .workers = workers_for(tiles, limits.multiprocessors * blocks),
          .fixed_grains = 2};
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  return visit_tiling(problem, limits,
                      [&]<typename Tile>(Tile) { return plan_shape_of<Tile>(problem, limits); });
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_tiling(problem, limits, [&]<typename Tile>(Tile) {
        return visit_flag(problem.page_size == 64, [&](auto pages_of_64) {
          return launch(kernel::decode<decltype(zero), Tile, kBlocks<Tile>, pages_of_64()>, grid,
                        Tile::kThreads, sizeof(kernel::Smem<Tile>), stream, problem, tensors, split,
                        items);
        });
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  return visit_tiling(problem, limits, [&]<typename Tile>(Tile) {
    const PlanShape shape = plan_shape_of<Tile>(problem, limits);
    const double tokens = double(total_tokens) * shape.row_tiles;
    Prediction prediction;
    prediction.matrix_flop = 2 * tokens * Tile::kRows * (kHeadDimQK + kHeadDimV);
    // A tile's bytes (README.md, "Prediction"): ldmatrix for S and for O, the way in, exchange, P.
    const double bytes = Tile::kWarps * 2.0 * (kHeadDimQK / Tile::kDepthWarps) *
                             (Tile::kWarpRows + Tile::kWarpTokens) +
                         Tile::kWarps * 2.0 * Tile::kTokens * (Tile::kRows + Tile::kWarpColumns) +
                         Tile::kTokens * 2.0 * kHeadDimQK +
                         Tile::kRows * Tile::kTokens * (Tile::kDepthWarps == 2 ? 8.0 : 0.0) +
                         Tile::kRows * Tile::kTokens * 2.0;
    prediction.shared_bytes = tokens / Tile::kTokens * bytes;
    prediction.dram_bytes = cache_bytes(problem, total_tokens);
    // mma.sync waits for ldmatrix, and two warps per scheduler hide little of that: 4096 FLOP per clock, and
    // then 128 bytes.
    prediction.grain_clocks = kGrainTokens * (Tile::kRows * 2.0 * (kHeadDimQK + kHeadDimV) / 4096 +
                                              bytes / Tile::kTokens / 128);
    return prediction;
  });
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "both products on tensor cores: mma.sync, ldmatrix, swizzle, cp.async";
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
