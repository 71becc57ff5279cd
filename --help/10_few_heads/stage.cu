// 10_few_heads: checks, launch, prediction.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/split/split_combine.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = few_heads;

// Calls f(rows of a tile): as many as there are, padded, or 32 where there are more, or fewer as
// limits.max_tile_rows has it.
template <typename F>
decltype(auto) visit_rows(const Problem& problem, const DeviceLimits& limits, F&& f) {
  const int rows = std::min(problem.rows_per_kv_head(), limits.max_tile_rows);
  if (rows <= 8) return f(std::integral_constant<int, 8>());
  if (rows <= 16) return f(std::integral_constant<int, 16>());
  if (rows <= 24) return f(std::integral_constant<int, 24>());
  return f(std::integral_constant<int, 32>());
}

int tile_rows(const Problem& problem, const DeviceLimits& limits) {
  return visit_rows(problem, limits, [](auto rows) { return int{rows()}; });
}

constexpr int kTeam = 8;  // blocks of a worker that is not one

// Teams that run at the same time, on a device with these limits.
int resident_teams(const DeviceLimits& limits) {
  using Block = kernel::BlockSmem<8, kTeam>;
  const int room = limits.multiprocessors / kTeam;
  const int resident =
      resident_clusters(kernel::decode<bfloat16, 8, kTeam>, kTeam, kernel::kThreads, sizeof(Block));
  return resident > 0 ? std::min(room, resident) : room;
}

// The one place that says where a worker is a team: where the host knows that no sequence will be cut, so
// that nothing has to be combined, and where they are few. A piece costs a team an exchange, and a round
// of tiles that not all of its blocks have. With fixed splits nothing may depend on the batch.
PlanShape plan_shape(const Problem& problem, const DeviceLimits& limits) {
  const int tiles = row_tiles_of(problem, tile_rows(problem, limits));
  const PlanShape single = {.row_tiles = tiles,
                            .workers = workers_for(tiles, limits.multiprocessors),
                            .fixed_grains = 2,
                            .min_grains = 2,
                            .combine_grains = 4};
  if (problem.fixed_split_tokens > 0 || limits.multiprocessors < kTeam ||
      limits.max_grid_x < kTeam) {
    return single;
  }
  const PlanShape teams = {.row_tiles = tiles,
                           .workers = workers_for(tiles, resident_teams(limits)),
                           .fixed_grains = kTeam,
                           .min_grains = kTeam,
                           .combine_grains = 3 * kTeam,
                           .team = kTeam};
  // A team for each. Two where there is but one team, so that the model's tests see it go on to another.
  const bool few = tiles * teams.workers <= resident_teams(limits) &&
                   problem.batch <= std::max(teams.workers, 2);
  return few && max_split_sequences(problem, teams) == 0 ? teams : single;
}

// Calls f(blocks of a worker).
template <typename F>
decltype(auto) visit_team(int team, F&& f) {
  if (team == kTeam) return f(std::integral_constant<int, kTeam>());
  return f(std::integral_constant<int, 1>());
}

Status encode(const Problem& problem, const Tensors& tensors, TensorMap* map,
              kernel::TileMap* tile_map) {
  const CacheStrides& strides = tensors.kv_strides;
  if (problem.num_heads_kv > 1 && strides.head % 64 != 0) {
    tile_map->head_boxes = 0;
    return encode_cache_map(problem, tensors, map, 8);
  }
  // Heads are boxes further on. With one head any number will do.
  tile_map->head_boxes =
      problem.num_heads_kv > 1 ? static_cast<int>(strides.head / 64) : kernel::kBoxes;
  TensorShape shape;
  shape.rank = 5;
  const int64_t size[] = {64, 8, tile_map->head_boxes * (problem.num_heads_kv - 1) + kernel::kBoxes,
                          problem.page_size / 8, problem.num_pages};
  const int64_t stride[] = {1, strides.token, 64, strides.token * 8, strides.page};
  const int box[] = {64, 8, kernel::kCopyBoxes, std::min(kernel::kTokens, problem.page_size) / 8,
                     1};
  for (int i = 0; i < shape.rank; ++i) {
    shape.size[i] = static_cast<uint64_t>(size[i]);
    shape.stride_bytes[i] = static_cast<uint64_t>(stride[i]) * 2;
    shape.box[i] = static_cast<uint32_t>(box[i]);
  }
  shape.swizzle_128b = true;
  return encode_tensor_map(tensors.kv_cache, shape, map);
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan& plan, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  const PlanShape& shape = plan.shape;
  const SplitWorkspace split = split_workspace(problem, shape, plan.memory, scratch);
  TensorMap cache_map;
  kernel::TileMap tile_map;
  MLA_RETURN_IF_ERROR(encode(problem, tensors, &cache_map, &tile_map));
  MLA_RETURN_IF_ERROR(for_all_items(problem, shape, [&](const SplitItems& items, unsigned grid) {
    return visit_dtype(problem.dtype, [&](auto zero) {
      return visit_rows(problem, limits, [&](auto rows) {
        return visit_team(shape.team, [&](auto team) {
          const auto decode = kernel::decode<decltype(zero), rows(), team()>;
          constexpr size_t kBytes = sizeof(kernel::BlockSmem<rows(), team()>);
          if constexpr (team() == 1) {
            return launch(decode, grid, kernel::kThreads, kBytes, stream, cache_map, tile_map,
                          problem, tensors, split, items);
          } else {
            return launch_cluster(decode, team(), grid, kernel::kThreads, kBytes, stream, cache_map,
                                  tile_map, problem, tensors, split, items);
          }
        });
      });
    });
  }));
  return launch_combine(problem, shape, split, tensors, stream, CombineStart::kEarly);
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const PlanShape shape = plan_shape(problem, limits);
  const int rows = tile_rows(problem, limits);
  const double tiles = double(total_tokens) / kernel::kTokens * shape.row_tiles;
  Prediction prediction;
  prediction.matrix_flop = 2 * tiles * rows * kernel::kTokens * (kHeadDimQK + kHeadDimV);
  // A tile's bytes: K, Q; V, and P for each of its boxes; the way in; P written.
  prediction.shared_bytes = tiles * 2 *
                            (kernel::kTokens * (2 * kHeadDimQK + kHeadDimV) +
                             rows * (kHeadDimQK + (kernel::kVBoxes + 1) * kernel::kTokens));
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
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
