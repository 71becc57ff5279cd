// 13_quantised_mma: tile sizes by the device's shared memory, launch, prediction.
#include <algorithm>

#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/machine/quantised_types.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = quantised_mma;
using kernel::Tiling;

// rows, tokens, and the warps that share the tokens of S
using Rows16 = Tiling<16, 32, 4>;  // any device from sm_80 on; two blocks on Hopper and A100
using Rows32 = Tiling<32, 32, 4>;  // any device
using Rows64 = Tiling<64, 32, 2>;  // A100 and Hopper

// Of the formats, those with scales take most.
template <typename Tile>
constexpr size_t kSharedBytes = sizeof(kernel::Smem<Tile, CacheFormat::kFp8Tile128>);
static_assert(kSharedBytes<Rows16> <= 82944, "two blocks in 164 KB");
static_assert(kSharedBytes<Rows32> <= 101376, "99 KB");
static_assert(kSharedBytes<Rows64> <= 166912, "163 KB");

template <typename Tile>
constexpr int kBlocks = Tile::kWarps <= 4 ? 2 : 1;  // that registers leave room for

// Calls f(Tile{}) with the tile for the problem: the fewest rows that hold all rows of a KV head, as
// far as the device's shared memory and limits.max_tile_rows go.
template <typename F>
auto visit_tiling(const Problem& problem, const DeviceLimits& limits, F&& f) {
  const int rows = std::min(problem.rows_per_kv_head(), limits.max_tile_rows);
  if (rows > 32 && kSharedBytes<Rows64> <= limits.max_shared_bytes) return f(Rows64{});
  if (rows > 16) return f(Rows32{});
  return f(Rows16{});
}

template <typename Tile>
PlanShape plan_shape_of(const Problem& problem, const DeviceLimits& limits) {
  constexpr size_t kReserved = 1024;  // of shared memory, for every block
  const size_t resident = (limits.max_shared_bytes + kReserved) / (kSharedBytes<Tile> + kReserved);
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
    return visit_quantised_types(problem, [&](auto zero, auto format) {
      return visit_tiling(problem, limits, [&]<typename Tile>(Tile) {
        return launch(kernel::decode<decltype(zero), format(), Tile, kBlocks<Tile>>, grid,
                      Tile::kThreads, sizeof(kernel::Smem<Tile, format()>), stream, problem,
                      tensors, split, items);
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
    // A tile's bytes (README.md, "Prediction"): ldmatrix for S; V, and P in fp32, for O; codes in and out,
    // K in; P.
    const double bytes =
        Tile::kWarps * 2.0 * kHeadDimQK * (16 + Tile::kWarpTokens) +
        Tile::kWarps * Tile::kTokens * (2.0 * Tile::kWarpColumns + 4.0 * Tile::kRows) +
        Tile::kTokens * (2.0 * problem.cache_row_bytes() + 2.0 * kHeadDimQK) +
        Tile::kRows * Tile::kTokens * 4.0;
    prediction.shared_bytes = tokens / Tile::kTokens * bytes;
    prediction.dram_bytes = cache_bytes(problem, total_tokens);
    // As in stage 05; and unpack: 7 instructions of a warp for each of 4 schedulers per 64 values of K.
    const double unpack = Tile::kTokens * kHeadDimQK / 64.0 / 4 * 7;
    prediction.grain_clocks = kGrainTokens * (Tile::kRows * 2.0 * (kHeadDimQK + kHeadDimV) / 4096 +
                                              (bytes / 128 + unpack) / Tile::kTokens);
    return prediction;
  });
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea =
      "8-bit caches on any tensor core: codes unpacked exactly, scales outside the products";
  stage.cache_formats = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                         CacheFormat::kInt8Tile128};
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
