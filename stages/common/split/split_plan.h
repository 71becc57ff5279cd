/// @file
/// The plan of a split decode: which worker attends to which tokens of which sequence.
///
/// Sequences are cut into blocks of 64 tokens, a page each. All blocks of all sequences stand on one
/// line, in order, each sequence led by a stretch that stands for what beginning it costs; workers
/// get equally long intervals of the line. A worker's part of one sequence is a *piece*. A
/// sequence that is one worker's piece as a whole is finished by that worker; of any other, each
/// worker leaves partial results in a *slot* of the workspace, which split_combine.h puts
/// together.
///
/// The largest load is at most the mean plus one block plus one sequence's fixed cost. Where whole
/// sequences, as many for each worker, come to at most the mean plus PlanShape::combine_blocks plus
/// one sequence's fixed cost, that is the plan, and nothing is cut. With Problem::fixed_split_tokens
/// the cuts are where the sequence alone says, and workers get whole pieces.
#pragma once

#include <string>
#include <vector>

#include "reference/problem.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// Most workers of a plan: products of two of their numbers fit 32 bits.
inline constexpr int kMaxWorkers = 65535;

/// What a stage wants of its plan. From shapes and the device alone.
struct PlanShape {
  int row_tiles = 1;     ///< Tiles of query rows, over all KV heads; each has `workers` workers.
  int workers = 1;       ///< 1 ... kMaxWorkers
  int fixed_blocks = 0;  ///< What a piece costs beside its blocks, in blocks.
  int min_blocks = 1;  ///< Fewer are no worker's share, as long as that can be: less than this many
                       ///< for each worker go to fewer workers.
  int combine_blocks = 1;  ///< What not having to combine is worth, in blocks.
};

/// Workers for each row tile that keep `resident_blocks` blocks of a kernel busy: as many as run at
/// a time or, where the tiles alone (nearly) fill the device, up to four: a worker more must leave a
/// tenth of it less idle.
int workers_for(int64_t row_tiles, int resident_blocks);

/// Where a worker begins; it ends where the next one begins.
struct alignas(16) WorkerBegin {
  int32_t sequence;  ///< `batch`: behind the last
  int32_t block;     ///< Of that sequence.
  int32_t split;     ///< How many pieces of that sequence other workers have before.
  int32_t seqlen_k;  ///< Of that sequence: a worker need not look further to begin.
  bool operator==(const WorkerBegin&) const = default;
};

/// A sequence of several pieces, for the combine.
struct alignas(16) SplitSequence {
  int32_t sequence;
  int32_t slot_begin;
  int32_t slots;
  int32_t unused;
  bool operator==(const SplitSequence&) const = default;
};

/// What a plan was made for, and how much of it there is.
struct alignas(16) PlanHeader {
  uint32_t made;  ///< kPlanMade, or there is no plan here.
  int32_t batch;
  int32_t workers;
  int32_t fixed_split_tokens;
  int32_t fixed_blocks;         ///< As used: 0 where it would only leave workers idle.
  int32_t num_split_sequences;  ///< Sequences of more than one piece.
  int32_t num_slots;            ///< Pieces of those.
  int32_t unused;
  bool operator==(const PlanHeader&) const = default;
};
inline constexpr uint32_t kPlanMade = 0x4e414c50;  ///< "PLAN"

/// A plan and the partial results in a workspace: pointers into it.
struct SplitWorkspace {
  PlanHeader* header;
  WorkerBegin* worker_begin;  ///< [workers + 1]
  int32_t* slot_begin;  ///< [batch + 1]: slots of the sequences before; a sequence's number of
                        ///< slots is that of its pieces, or 0 if it is not split
  int32_t* seqlens_k;   ///< [batch]: the lengths it was made for
  SplitSequence* split_sequences;  ///< [num_split_sequences]
  /// [slots, num_heads_kv * rows_per_kv_head()]: natural log; -inf for a row that saw nothing.
  float* lse_partial;
  /// [slots, num_heads_kv * rows_per_kv_head(), 512]: normalised; not read where lse is -inf.
  float* out_partial;
};

/// Most sequences that a plan can split. From shapes alone.
int64_t max_split_sequences(const Problem& problem, const PlanShape& shape);
/// Most slots that a plan can need. From shapes alone.
int64_t max_slots(const Problem& problem, const PlanShape& shape);

/// Bytes of workspace for plan and partial results, from shapes alone; SIZE_MAX for more slots than
/// can be numbered, 2^31 - 1, or bytes than can be counted.
size_t split_workspace_bytes(const Problem& problem, const PlanShape& shape);

/// Lays plan and partial results out in `workspace`, which is 16-byte aligned and has
/// split_workspace_bytes.
SplitWorkspace split_workspace(const Problem& problem, const PlanShape& shape, void* workspace);

/// Enqueues the making of a plan for sequences of these lengths, in device memory: one kernel of one
/// block, without a host synchronisation; any batch. Lengths are to be in 0 ... max_seqlen_k(), which
/// check_paging() checks; the plan takes others as the nearest allowed, a decode does not.
Status make_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                 const int32_t* seqlens_k, void* workspace, Stream stream);

/// Enqueues what ends a decode, alone: the combining of the partial results that a decode by the
/// plan in this workspace left there. For measuring; out and lse get the same bits again.
Status combine_again(Machine& machine, const Problem& problem, const PlanShape& shape,
                     const Tensors& tensors, void* workspace, Stream stream);

/// A plan in host memory.
struct HostPlan {
  PlanHeader header{};
  std::vector<WorkerBegin> worker_begin;
  std::vector<int32_t> slot_begin, seqlens_k;
  std::vector<SplitSequence> split_sequences;
  bool operator==(const HostPlan&) const = default;
};

/// The same plan as make_plan's, from the same rules, by one thread on the host.
HostPlan make_plan_on_host(const Problem& problem, const PlanShape& shape,
                           const std::vector<int32_t>& seqlens_k);

/// Reads a plan back, after all work on `stream`.
/// @return kInvalidArgument if there is no plan for this problem in the workspace
Status read_plan(Machine& machine, const Problem& problem, const PlanShape& shape, void* workspace,
                 HostPlan* plan, Stream stream = nullptr);

/// A worker's part of one sequence.
struct Piece {
  int sequence;
  int block_begin, block_end;  ///< Blocks of 64 tokens. An empty sequence has one, without tokens.
  int slot;                    ///< -1: the whole sequence.
};

/// Every worker's pieces, in order.
std::vector<std::vector<Piece>> pieces_of(const HostPlan& plan);

/// A picture of the plan: a line a worker (its load, a bar, its pieces), long plans shortened in
/// the middle, and the balance of the loads.
std::string describe_plan(const HostPlan& plan, int max_lines = 40);

}  // namespace mla
