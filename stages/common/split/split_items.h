/// @file
/// What the blocks of a split decode have to do: an item is one worker's pieces for one tile of query
/// rows of one KV head.
#pragma once

#include "stages/common/machine/launch.h"
#include "stages/common/split/plan.h"

namespace mla::MLA_MACHINE {

/// Divided out by the host: kernels are short of registers.
struct SplitItems {
  int group;         ///< Query heads that share a KV head.
  int rows;          ///< Query rows of a KV head.
  int row_tiles;     ///< Tiles of rows, of a KV head.
  unsigned tiles;    ///< Of all KV heads.
  unsigned first;    ///< Item of the grid's first block.
  float scale_log2;  ///< softmax_scale log2(e)
};

/// Calls launch_part(items, grid) for as many grids as it takes to have a block an item: one, on any
/// device there is.
template <typename LaunchPart>
Status for_all_items(const Problem& problem, const PlanShape& shape, LaunchPart&& launch_part) {
  SplitItems items;
  items.group = problem.group_size();
  items.rows = problem.rows_per_kv_head();
  items.row_tiles = shape.row_tiles / problem.num_heads_kv;
  items.tiles = static_cast<unsigned>(shape.row_tiles);
  items.scale_log2 = problem.softmax_scale * 1.44269504f;
  const unsigned count = items.tiles * static_cast<unsigned>(shape.workers);
  for (items.first = 0; items.first < count; items.first += grid_for(count - items.first)) {
    MLA_RETURN_IF_ERROR(launch_part(items, grid_for(count - items.first)));
  }
  return {};
}

}  // namespace mla::MLA_MACHINE
