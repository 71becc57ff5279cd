/// @file
/// What the blocks of a split decode have to do: an item is one worker's pieces for one tile of query
/// rows of one KV head. The host counts and launches the items; a block finds its own, and the places
/// of its rows in every tensor.
#pragma once

#include "stages/common/machine/launch.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/split/plan.h"

namespace mla::MLA_MACHINE {

/// Divided out by the host: kernels are short of registers.
struct SplitItems {
  int group;         ///< Query heads that share a KV head.
  int rows;          ///< Query rows of a KV head.
  int row_tiles;     ///< Tiles of rows, of a KV head.
  unsigned tiles;    ///< Of all KV heads.
  unsigned first;    ///< Item of the grid's first block.
  int sequences;     ///< Of a worker, if all are whole and have as many.
  float scale_log2;  ///< softmax_scale log2(e)
};

/// Calls launch_part(items, grid) for as many grids as it takes to have one worker's blocks
/// (PlanShape::team) per item: one, on any device there is.
template <typename LaunchPart>
Status for_all_items(const Problem& problem, const PlanShape& shape, LaunchPart&& launch_part) {
  SplitItems items;
  items.group = problem.group_size();
  items.rows = problem.rows_per_kv_head();
  items.row_tiles = shape.row_tiles / problem.num_heads_kv;
  items.tiles = static_cast<unsigned>(shape.row_tiles);
  items.sequences = (problem.batch + shape.workers - 1) / shape.workers;
  items.scale_log2 = problem.softmax_scale * kLog2e;
  const int64_t count = int64_t{items.tiles} * shape.workers;  // below 2^32: workers_for()
  const auto team = static_cast<unsigned>(shape.team);
  for (int64_t first = 0; first < count;) {
    const unsigned part = grid_for((count - first) * team) / team;  // whole teams
    items.first = static_cast<unsigned>(first);
    MLA_RETURN_IF_ERROR(launch_part(items, part * team));
    first += part;
  }
  return {};
}

/// The tile of query rows that this block's item has. Row r of the tile is row `begin` + r of KV head
/// `head_kv`; rows past the last may lie in the tile, but not in any tensor.
struct RowTile {
  const Problem& problem;
  const Tensors& tensors;
  const SplitItems& items;
  const unsigned worker;  ///< That has the item.
  const int head_kv;
  const int begin;

  // Row tiles first: workers that run side by side read the same pages.
  __device__ __forceinline__ RowTile(const Problem& problem_, const Tensors& tensors_,
                                     const SplitItems& items_, int tile_rows, int team = 1)
      : problem(problem_),
        tensors(tensors_),
        items(items_),
        worker((items.first + blockIdx.x / team) / items.tiles),
        head_kv(static_cast<int>((items.first + blockIdx.x / team) % items.tiles) /
                items.row_tiles),
        begin(static_cast<int>((items.first + blockIdx.x / team) % items.tiles) % items.row_tiles *
              tile_rows) {}

  __device__ __forceinline__ bool exists(int r) const { return begin + r < items.rows; }

  /// Tokens that row r sees of a sequence; 0 or less: none.
  __device__ __forceinline__ int visible(int seqlen_k, int r) const {
    return static_cast<int>(problem.visible_tokens(seqlen_k, (begin + r) / items.group));
  }
  /// Tokens that some row of the tile sees: the last row sees most.
  __device__ __forceinline__ int visible_to_any(int seqlen_k, int tile_rows) const {
    return visible(seqlen_k, min(tile_rows, items.rows - begin) - 1);
  }

  /// Where row r of a sequence lies, in elements of q, out and lse.
  __device__ __forceinline__ int64_t q_place(int sequence, int r) const {
    return tensors.q_place(sequence, query(r), head(r));
  }
  __device__ __forceinline__ int64_t out_place(int sequence, int r) const {
    return tensors.out_place(sequence, query(r), head(r));
  }
  __device__ __forceinline__ int64_t lse_place(int sequence, int r) const {
    return tensors.lse_place(sequence, query(r), head(r));
  }
  /// Where row r of a slot lies in lse_partial and, in rows, in out_partial.
  __device__ __forceinline__ int64_t slot_place(int slot, int r) const {
    return (int64_t{slot} * problem.num_heads_kv + head_kv) * items.rows + begin + r;
  }

 private:
  __device__ __forceinline__ int query(int r) const { return (begin + r) / items.group; }
  __device__ __forceinline__ int head(int r) const {
    return head_kv * items.group + (begin + r) % items.group;
  }
};

}  // namespace mla::MLA_MACHINE
