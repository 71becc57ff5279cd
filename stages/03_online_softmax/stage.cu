// 03_online_softmax: launch, prediction. No workspace.
#include <algorithm>

#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = online_softmax;

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

int64_t num_tiles(const Problem& problem, int tile_rows) {
  return int64_t{problem.batch} * problem.num_heads_kv *
         ((problem.rows_per_kv_head() + tile_rows - 1) / tile_rows);
}

template <typename T, int kRows>
Status decode_tiled(const Problem& problem, const Tensors& tensors, Stream stream) {
  const int64_t tiles = num_tiles(problem, kRows);
  return launch(kernel::decode<T, kRows>, grid_for(tiles), kernel::kThreads,
                sizeof(kernel::Smem<kRows>), stream, problem, tensors, tiles);
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void*,
              const DeviceLimits& limits, Stream stream) {
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (rows_per_tile(problem, limits)) {
      case 64:
        return decode_tiled<T, 64>(problem, tensors, stream);
      case 32:
        return decode_tiled<T, 32>(problem, tensors, stream);
      default:
        return decode_tiled<T, 16>(problem, tensors, stream);
    }
  });
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem, limits);
  const double tiles = double(num_tiles(problem, tile_rows));
  const double padded = tiles / problem.batch * tile_rows * double(total_tokens);
  Prediction prediction;
  prediction.fp32_flop = 2 * padded * (kHeadDimQK + kHeadDimV);
  // Passes of shared memory a tile, at 128 bytes each (README.md, "Prediction"): every read of 16
  // bytes per lane takes 2; then the shares of S, and the tile's own way in.
  const double passes = kernel::kWarps * 18 * 2 * (4 + tile_rows / 8.0) +
                        kernel::kWarps * 4 * 2 * (8 + tile_rows / 4.0) + 12.0 * tile_rows + 576 +
                        tile_rows;
  prediction.shared_bytes = padded / (tile_rows * kernel::kTokens) * passes * 128;
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  prediction.busy_fraction = std::min(1.0, tiles / limits.multiprocessors);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "one fused pass: running maximum and sum; the K tile is V";
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
