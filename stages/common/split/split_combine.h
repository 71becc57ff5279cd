/// @file
/// Putting the partial results of split sequences together.
#pragma once

#include "stages/common/machine/launch.h"
#include "stages/common/split/workspace.h"

namespace mla::MLA_MACHINE {

/// When the combine's blocks may start.
enum class CombineStart {
  kAfter,  ///< When the grid before has ended.
  kEarly,  ///< Programmatic dependent launch: as soon as all blocks of the grid before have called
           ///< griddepcontrol_launch_dependents() and leave room; they then wait for its end.
};

/// Whether the combine has a thread block for a quarter of a row, and not a warp for a row. Blocks are for few
/// rows of many splits, which a warp takes one after the other.
bool combines_by_block(const Problem& problem, const PlanShape& shape, int multiprocessors);

/// Most blocks of a grid that a multiprocessor gets, if they are spread evenly.
unsigned blocks_each(unsigned grid, const DeviceLimits& limits);
/// Shared memory for each block that leaves room for so many on a multiprocessor and no more, as far as
/// `limits` go. The combine's blocks come while most multiprocessors still decode: without it they would crowd
/// on the first that are free.
size_t spreading_bytes(unsigned grid, const DeviceLimits& limits);

/// Enqueues the kernel that turns every slot's partial results into out and lse, for the sequences
/// that the plan split and no others; nor for halves that the decode has joined. The order of summation
/// depends on a sequence's number of pieces, the row count and, without fixed_split_tokens, on the batch.
Status launch_combine(const Problem& problem, const PlanShape& shape, const SplitWorkspace& split,
                      const Tensors& tensors, Stream stream,
                      CombineStart start = CombineStart::kAfter);

/// The same once more, on partial results that a decode left: combine_again() of plan.h.
Status launch_combine_again(const Problem& problem, const PlanShape& shape,
                            const SplitWorkspace& split, const Tensors& tensors, Stream stream);

}  // namespace mla::MLA_MACHINE
