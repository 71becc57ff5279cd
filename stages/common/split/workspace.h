/// @file
/// Where a split decode keeps its plan and its partial results, and how many bytes that takes.
#pragma once

#include "stages/common/split/plan.h"

namespace mla {

/// A plan and the partial results of one decode, as pointers into their memory. One plan can serve
/// decodes on several streams at a time, each with partial results of its own.
struct SplitWorkspace {
  uint32_t shape;  ///< plan_hash(): what PlanState::shape is if the plan was made for the problem.
  PlanHeader* header;
  WorkerBegin* worker_begin;  ///< [workers + 1]
  int32_t* slot_begin;  ///< [batch + 1]: slots of all earlier sequences. A split sequence has one
                        ///< slot per piece, any other none.
  int32_t* seqlens_k;   ///< [batch]: the lengths that the plan was made for, in tokens
  SplitSequence* split_sequences;  ///< [num_split_sequences]
  /// [slots, num_heads_kv * rows_per_kv_head()]: natural log; -inf for a row that saw nothing.
  float* lse_partial;
  /// [slots, num_heads_kv * rows_per_kv_head(), 512]: normalised; the combine does not
  /// read it where lse is -inf.
  float* out_partial;
  /// [workers * row_tiles], or none without PlanShape::joins_halves: by item (split_items.h), whether
  /// the second half that it begins with is in its slot (raised_flags.h).
  uint64_t* half_is_there;
};

/// Most sequences that a plan can split. Depends on shapes alone.
int64_t max_split_sequences(const Problem& problem, const PlanShape& shape);
/// Most slots that a plan can need. Depends on shapes alone.
int64_t max_slots(const Problem& problem, const PlanShape& shape);

/// A number that no other call in this process returns, and never 0: for a decode (raised_flags.h).
uint64_t draw_number();

/// Tells plans for different problems apart: of all that decides where a plan's numbers may point.
uint32_t plan_hash(const Problem& problem, const PlanShape& shape);

/// Bytes that plan and partial results take. Depends on shapes alone.
/// @return kInvalidArgument if there might be more than 2^31 - 1 slots, or more bytes than can be
///         counted
Status split_bytes(const Problem& problem, const PlanShape& shape, WorkspaceBytes* bytes);

/// Lays a plan and partial results out in memory of split_bytes(), 16-byte aligned.
/// @param scratch  null where only the plan is looked at
SplitWorkspace split_workspace(const Problem& problem, const PlanShape& shape, void* plan,
                               void* scratch);

}  // namespace mla
