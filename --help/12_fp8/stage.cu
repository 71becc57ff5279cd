// 12_fp8: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/machine/quantised_types.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = fp8;

// Calls f(rows of a tile): as many as there are, padded, or 32 where there are more, or fewer as
// limits.max_tile_rows has it.
template <typename F>
decltype(auto) visit_rows(const Problem& problem, const DeviceLimits& limits, F&& f) {
  const int rows = std::min(problem.rows_per_kv_head(), limits.max_tile_rows);
  if (rows <= 8) return f(std::integral_constant<int, 8>());
  if (rows <= 16) return f(std::integral_constant<int, 16>());
  return f(std::integral_constant<int, 32>());
}

int tile_rows(const Problem& problem, const DeviceLimits& limits) {
  return visit_rows(problem, limits, [](auto rows) { return int{rows()}; });
}

PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = row_tiles_of(problem, tile_rows(problem, limits));
  return {.row_tiles = tiles,
          .workers = workers_for(tiles, limits.multiprocessors),
          .fixed_grains = 2,
          .min_grains = 2,
          .combine_grains = 4};
}

// One box is all of a row: words of 32 bits, because a box has no more than 256 of a dimension. Words past a
// row's end are outside the tensor: the copy makes them 0.
Status encode(const Problem& problem, const Tensors& tensors, TensorMap* map) {
  const int row_bytes = has_tile_scales(problem.cache_format)
                            ? kernel::kRowBytes<CacheFormat::kFp8Tile128>
                            : kernel::kRowBytes<CacheFormat::kFp8Tensor>;
  const CacheStrides& strides = tensors.kv_strides;
  TensorShape shape;
  shape.element_bytes = 4;
  shape.rank = 4;
  const int64_t size[] = {problem.cache_row_bytes() / 4, problem.num_heads_kv, problem.page_size,
                          problem.num_pages};
  const int64_t stride[] = {4, strides.head, strides.token, strides.page};
  const int box[] = {row_bytes / 4, 1, std::min(kernel::kTokens, problem.page_size), 1};
  for (int i = 0; i < shape.rank; ++i) {
    shape.size[i] = static_cast<uint64_t>(size[i]);
    shape.stride_bytes[i] = static_cast<uint64_t>(stride[i]);
    shape.box[i] = static_cast<uint32_t>(box[i]);
  }
  return encode_tensor_map(tensors.kv_cache, shape, map);
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  TensorMap cache_map;
  MLA_RETURN_IF_ERROR(encode(problem, tensors, &cache_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_quantised_types(problem, [&](auto zero, auto format) {
      return visit_rows(problem, limits, [&](auto rows) {
        return launch(kernel::decode<decltype(zero), format(), rows()>, grid, kernel::kThreads,
                      sizeof(kernel::Smem<format(), rows()>), stream, cache_map, problem, tensors,
                      split, items);
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream, CombineStart::kEarly);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const int rows = tile_rows(problem, limits);
  const int versions = has_tile_scales(problem.cache_format) ? kernel::kGroups : 1;
  const double tiles = double(total_tokens) / kernel::kTokens * shape.row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tiles * rows * kernel::kTokens * (kHeadDimQK + kHeadDimV);
  // A tile's bytes: codes of K and of V, and the way in; Q; P written, and read for each of its boxes.
  prediction.shared_bytes =
      tiles * (kernel::kTokens * (2 * problem.cache_row_bytes() + kHeadDimV) +
               2 * rows * (kHeadDimQK + (kernel::kVBoxes + versions) * kernel::kTokens));
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  // Of each of 4 schedulers: 256 conversions of 4 clocks, products, 900 other instructions (README.md,
  // "Prediction"). A warp converts, then multiplies.
  prediction.grain_clocks =
      1024 + 2.0 * rows * kernel::kTokens * (kHeadDimQK + kHeadDimV) / 4096 + 900;
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "an 8-bit cache: codes become fp16 on their way to a product, scales stay outside";
  stage.min_compute_capability = stage.max_compute_capability = 90;
  stage.cache_formats = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                         CacheFormat::kInt8Tile128};
  stage.sustained_warmup_s = kTensorCoreWarmup;
  stage.plan_shape = plan_shape;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
