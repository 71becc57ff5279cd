/// @file
/// The plan of a split decode: which worker attends to which tokens of which sequence.
///
/// Sequences are cut between *grains* of 64 tokens, whatever the page size. All grains of all sequences are laid out on one line,
/// in order; each sequence begins with a stretch that represents the cost of beginning it. Every
/// worker gets an equally long interval of the line. A worker's share of one sequence is a *piece*.
/// If a piece is the whole sequence, its worker finishes the sequence. Otherwise each worker leaves a
/// partial result, its *part*, in a *slot* of its scratch memory (workspace.h), and the combine
/// (split_combine.h) merges the parts.
///
/// The largest load is at most the mean plus one grain plus one sequence's fixed cost. If giving every
/// worker the same number of whole sequences costs at most the mean plus PlanShape::combine_grains plus
/// one sequence's fixed cost, then that is the plan, and nothing is cut. If there are several workers
/// for each sequence, and cutting every sequence evenly into as many pieces exceeds the mean by no more
/// than one sequence's fixed cost, then that is the plan: no worker has two pieces. With
/// Problem::fixed_split_tokens the sequence alone decides where it is cut, and workers get whole
/// pieces.
///
/// A plan is made in make_plan.cu (on the device) and make_plan.cpp (the same on the host), checked in
/// check_plan.cpp and printed in print_plan.cpp.
#pragma once

#include <string>
#include <vector>

#include "reference/problem.h"
#include "stages/common/cache/context_share.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// Most workers of a plan: products of two of their numbers fit 32 bits.
inline constexpr int kMaxWorkers = 65535;

/// Bytes of device memory that a decode needs beside its tensors.
struct WorkspaceBytes {
  size_t plan = 0;     ///< For the plan; 0 for a stage that makes none. A multiple of 128.
  size_t scratch = 0;  ///< For partial results, or scores. Each decode under way needs its own.
  /// For both together, the plan first: what decode() asks for.
  size_t total() const { return plan + scratch; }
  /// The plan's part of such a workspace.
  Workspace plan_in(const Workspace& workspace) const { return {workspace.data, plan}; }
  /// The scratch part of it.
  Workspace scratch_in(const Workspace& workspace) const {
    return {static_cast<unsigned char*>(workspace.data) + plan, scratch};
  }
};

/// What a stage asks of its plan. Depends on shapes and the device alone.
struct PlanShape {
  int row_tiles = 1;     ///< Tiles of query rows, over all KV heads; each has `workers` workers.
  int workers = 1;       ///< 1 ... kMaxWorkers
  int fixed_grains = 0;  ///< What a piece costs beside its own grains, in grains.
  int min_grains =
      1;  ///< Least load of a worker, in grains: with less work, fewer workers are used.
  int combine_grains = 1;  ///< What avoiding the combine is worth, in grains.
  int team = 1;            ///< Blocks of a worker, which share the grains of each of its pieces.
  /// Whether the decode itself puts together the two pieces of sequences, their halves, if no sequence
  /// has more. The combine then has nothing to do. Not with fixed_split_tokens.
  bool joins_halves = false;
};

/// A plan on a device: how it splits, and the memory that holds it. Null for a stage without one.
struct DevicePlan {
  PlanShape shape;
  void* memory = nullptr;
};

/// What to ask of a plan instead of what the stage asks of it. A value below 0: as the stage has it.
struct PlanSettings {
  int workers_percent = -1;  ///< Workers, in per cent of the stage's own.
  int min_grains = -1;       ///< PlanShape::min_grains
  int fixed_grains = -1;     ///< PlanShape::fixed_grains
  int combine_grains = -1;   ///< PlanShape::combine_grains
  int max_tile_rows = -1;    ///< DeviceLimits::max_tile_rows
  bool operator==(const PlanSettings&) const = default;
};

/// "min_grains=1 fixed_grains=0": those that are set. Empty: none.
std::string to_string(const PlanSettings& settings);
/// The limits of a device as a stage with these settings gets them.
DeviceLimits with_settings(const PlanSettings& settings, DeviceLimits limits);
/// The same of what a stage asks of its plan.
PlanShape with_settings(const PlanSettings& settings, PlanShape shape);

/// Tiles of `tile_rows` query rows that a problem has, over all KV heads.
int row_tiles_of(const Problem& problem, int tile_rows);

/// Workers per row tile that keep `resident_blocks` thread blocks of a kernel busy: as many as run at
/// the same time or, where the row tiles alone (nearly) fill the device, up to four. There, one more
/// worker must leave a tenth less of the device idle.
int workers_for(int64_t row_tiles, int resident_blocks);

/// Where a worker begins; it ends where the next worker begins.
struct alignas(16) WorkerBegin {
  int32_t sequence;  ///< `batch`: after the last one
  int32_t grain;     ///< Within that sequence, 0 for its first.
  int32_t split;     ///< How many earlier pieces of that sequence belong to other workers.
  int32_t seqlen_k;  ///< Of that sequence, in tokens, so that a worker can begin at once.
  bool operator==(const WorkerBegin&) const = default;
};

/// A sequence that has several pieces, for the combine.
struct alignas(16) SplitSequence {
  int32_t sequence;
  int32_t slot_begin;
  int32_t slots;
  int32_t unused;
  bool operator==(const SplitSequence&) const = default;
};

/// Whether there is a plan, and whether a decode has missed one. What the first bytes of its memory
/// hold; plan_state() copies it.
struct alignas(16) PlanState {
  uint32_t made;        ///< kPlanMade; anything else: there is no plan here.
  uint32_t shape;       ///< Of batch, workers, table and fixed splits: tells what it was made for.
  uint32_t generation;  ///< One more for every plan made in this memory, from whatever it held.
  /// Not 0: since this plan was made, a decode found that it is not one for its problem, and left its
  /// outputs alone.
  uint32_t refused;
  bool operator==(const PlanState&) const = default;
};

/// What a plan was made for, and how much of it there is.
struct PlanHeader {
  PlanState state;
  int32_t batch;
  int32_t workers;
  int32_t fixed_split_tokens;
  int32_t fixed_grains;         ///< As used: 0 where it would only leave workers idle.
  int32_t num_split_sequences;  ///< Sequences of more than one piece.
  int32_t num_slots;            ///< Pieces of those.
  bool operator==(const PlanHeader&) const = default;
  /// Whether no sequence has more than two pieces. Then a decode may join the halves itself
  /// (PlanShape::joins_halves), and has no need of the combine.
  MLA_HOST_DEVICE bool cuts_in_halves() const { return num_slots == 2 * num_split_sequences; }
};
inline constexpr uint32_t kPlanMade = 0x4e414c50;  ///< "PLAN"

/// What makes a plan one of a rank that holds a share of every sequence: lengths are then those of whole
/// sequences, and the plan's are the rank's own.
struct SharedLengths {
  SequenceShares shares;
  int max_seqlen_k = 0;    ///< Of a whole sequence; the problem has the rank's own table.
  int32_t* own = nullptr;  ///< [batch], in device memory: where the rank's lengths are written.
};

/// Enqueues the making of a plan: one kernel of one thread block, without a host synchronisation, for
/// any batch.
/// @param seqlens_k  [batch] in device memory, in tokens, each in 0 ... max_seqlen_k(), which
///                   check_paging() checks. Any other length counts as the nearest of these.
/// @param plan       split_bytes().plan bytes, 16-byte aligned
/// @param shared     null: the lengths are the plan's own
Status make_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                 const int32_t* seqlens_k, void* plan, Stream stream,
                 const SharedLengths* shared = nullptr);

/// Enqueues only the last step of a decode: combining the partial results that a decode by this plan
/// left in `scratch`. For measuring; out and lse get the same bits again.
Status combine_again(Machine& machine, const Problem& problem, const PlanShape& shape,
                     const Tensors& tensors, void* plan, void* scratch, Stream stream);

/// A plan in host memory.
struct HostPlan {
  PlanHeader header{};
  std::vector<WorkerBegin> worker_begin;
  std::vector<int32_t> slot_begin, seqlens_k;
  std::vector<SplitSequence> split_sequences;
  bool operator==(const HostPlan&) const = default;
};

/// The same plan as make_plan's, made by the same rules on the host, of generation 0. `seqlens_k` is
/// [batch], in tokens.
HostPlan make_plan_on_host(const Problem& problem, const PlanShape& shape,
                           const std::vector<int32_t>& seqlens_k);

/// Reads a plan back, after all work on `stream`.
/// @return kInvalidArgument if there is no plan for this problem
Status read_plan(Machine& machine, const Problem& problem, const PlanShape& shape, void* plan,
                 HostPlan* read_back, Stream stream = nullptr);

/// Whether the plan was made for these lengths ([batch], in device memory), and no decode since has
/// found it to be another problem's. Waits for the stream.
/// @return kInvalidArgument, naming the first sequence whose length differs, or as of read_plan()
Status check_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                  const int32_t* seqlens_k, void* plan, Stream stream = nullptr);

/// Slots whose parts the combine merges.
int64_t combined_slots(const HostPlan& plan, const PlanShape& shape);

/// A worker's share of one sequence.
struct Piece {
  int sequence;
  int grain_begin, grain_end;  ///< An empty sequence has one grain, without tokens.
  int slot;                    ///< -1: the piece is the whole sequence.
};

/// Every worker's pieces, in order.
std::vector<std::vector<Piece>> pieces_of(const HostPlan& plan);

/// A picture of the plan: one line per worker (its load, a bar, its pieces), with long plans shortened
/// in the middle, and the balance of the loads.
std::string describe_plan(const HostPlan& plan, int max_lines = 40);

}  // namespace mla
