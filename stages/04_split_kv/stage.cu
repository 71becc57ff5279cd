// 04_split_kv: plan, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = split_kv;

static_assert(kHeadDimQK % (4 * kernel::kWarps) == 0, "S is split over the warps in whole float4s");
static_assert(kHeadDimV == 64 * kernel::kWarps, "O is split over the warps by 64 columns");
static_assert(sizeof(kernel::Smem<64>) <= 232448, "64 rows fit a Hopper block's shared memory");
static_assert(sizeof(kernel::Smem<32>) <= 166912, "32 rows fit sm_80's");
static_assert(sizeof(kernel::Smem<16>) <= 101376, "16 rows fit any device's from sm_80 on");

// Rows a block: the fewest that hold all rows of a KV head, as far as the device's shared memory
// goes.
int rows_per_tile(const Problem& problem, const DeviceLimits& limits) {
  const int rows = problem.rows_per_kv_head();
  if (rows > 32 && sizeof(kernel::Smem<64>) <= limits.max_shared_bytes) return 64;
  if (rows > 16 && sizeof(kernel::Smem<32>) <= limits.max_shared_bytes) return 32;
  return 16;
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem, limits);
  const int resident = limits.multiprocessors * (tile_rows == 16 ? 2 : 1);
  const int tiles = row_tiles_of(problem, tile_rows);
  return {.row_tiles = tiles, .workers = workers_for(tiles, resident), .fixed_grains = 1};
}

template <typename T, int kRows>
Status decode_tiled(const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return launch(kernel::decode<T, kRows>, grid, kernel::kThreads, sizeof(kernel::Smem<kRows>),
                  stream, problem, tensors, split, items);
  }));
  return launch_combine(problem, shape, split, tensors, stream);
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (rows_per_tile(problem, limits)) {
      case 64:
        return decode_tiled<T, 64>(problem, tensors, plan, scratch, stream);
      case 32:
        return decode_tiled<T, 32>(problem, tensors, plan, scratch, stream);
      default:
        return decode_tiled<T, 16>(problem, tensors, plan, scratch, stream);
    }
  });
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem, limits);
  const PlanShape shape = plan_shape(problem, limits);
  const double padded = double(shape.row_tiles) * tile_rows * double(total_tokens);
  Prediction prediction;
  prediction.fp32_flop = 2 * padded * (kHeadDimQK + kHeadDimV);
  // Passes of shared memory per tile, at 128 bytes each (README.md, "Prediction"): every read of 16
  // bytes per lane takes 2; then the shares of S, and the tile's own way in.
  const double passes = kernel::kWarps * 18 * 2 * (4 + tile_rows / 8.0) +
                        kernel::kWarps * 4 * 2 * (8 + tile_rows / 4.0) + 12.0 * tile_rows + 576 +
                        tile_rows;
  prediction.shared_bytes = padded / (tile_rows * kernel::kTokens) * passes * 128;
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  // An FMA waits for its operands to come from shared memory, and two warps per scheduler hide little of
  // that: 128 FMAs per clock, and then the passes.
  prediction.grain_clocks =
      kGrainTokens * (tile_rows * (kHeadDimQK + kHeadDimV) / 128.0 + passes / kernel::kTokens);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea =
      "the sequence split over blocks by a plan made on the GPU; partial results combined by lse";
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
