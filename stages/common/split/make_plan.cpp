#include <algorithm>

#include "stages/common/split/plan.h"
#include "stages/common/split/workspace.h"

namespace mla {

namespace gpu {
Status launch_make_plan(const Problem&, const PlanShape&, const int32_t*, const SharedLengths*,
                        const SplitWorkspace&, Stream);
Status launch_combine_again(const Problem&, const PlanShape&, const SplitWorkspace&, const Tensors&,
                            Stream);
}  // namespace gpu
namespace model {
Status launch_make_plan(const Problem&, const PlanShape&, const int32_t*, const SharedLengths*,
                        const SplitWorkspace&, Stream);
Status launch_combine_again(const Problem&, const PlanShape&, const SplitWorkspace&, const Tensors&,
                            Stream);
}  // namespace model

int row_tiles_of(const Problem& problem, int tile_rows) {
  return problem.num_heads_kv * ((problem.rows_per_kv_head() + tile_rows - 1) / tile_rows);
}

int workers_for(int64_t row_tiles, int resident_blocks) {
  constexpr int kMany = 4;
  // Two workers write and read 2 x 2 x 128 KB of parts for a tile of 64 rows, which at 4096 tokens is
  // a tenth and more of its time.
  constexpr double kWorth = 0.1;
  resident_blocks = std::max(1, resident_blocks);  // none: a machine without its device
  if (row_tiles * kMany <= resident_blocks) {
    return static_cast<int>(std::min<int64_t>(resident_blocks / row_tiles, kMaxWorkers));
  }
  int best = 1;
  double best_use = 0;
  for (int workers = 1; workers <= kMany; ++workers) {
    const int64_t blocks = row_tiles * workers;
    const int64_t waves = (blocks + resident_blocks - 1) / resident_blocks;
    const double use = double(blocks) / double(waves * resident_blocks);
    if (use > best_use + kWorth) {
      best = workers;
      best_use = use;
    }
  }
  return best;
}

namespace {

/// Where on a line of this length worker `worker` of `workers` begins.
int64_t interval_begin(int64_t length, int worker, int workers) {
  return length / workers * worker + length % workers * worker / workers;
}

}  // namespace

Status make_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                 const int32_t* seqlens_k, void* plan, Stream stream, const SharedLengths* shared) {
  return MLA_ON_MACHINE(machine, launch_make_plan)(
      problem, shape, seqlens_k, shared, split_workspace(problem, shape, plan, nullptr), stream);
}

Status combine_again(Machine& machine, const Problem& problem, const PlanShape& shape,
                     const Tensors& tensors, void* plan, void* scratch, Stream stream) {
  return MLA_ON_MACHINE(machine, launch_combine_again)(
      problem, shape, split_workspace(problem, shape, plan, scratch), tensors, stream);
}

int64_t combined_slots(const HostPlan& plan, const PlanShape& shape) {
  return shape.joins_halves && plan.header.cuts_in_halves() ? 0 : plan.header.num_slots;
}

HostPlan make_plan_on_host(const Problem& problem, const PlanShape& shape,
                           const std::vector<int32_t>& seqlens_k) {
  const auto length_of = [&](int sequence) {
    return clamped_length(problem, seqlens_k[static_cast<size_t>(sequence)]);
  };
  const auto grains_in = [&](int sequence) {
    return std::max<int64_t>(1, grains_for(length_of(sequence)));
  };
  const int64_t piece_grains = problem.fixed_split_tokens / kGrainTokens;  // 0: anywhere
  int64_t total_grains = 0, total_pieces = 0, longest = 0;
  for (int i = 0; i < problem.batch; ++i) {
    total_grains += grains_in(i);
    longest = std::max(longest, grains_in(i));
    total_pieces += piece_grains > 0 ? (grains_in(i) + piece_grains - 1) / piece_grains : 1;
  }
  // With a grain or less for every block, or all of them on one sequence, all pay the fixed cost
  // alike, and to count it would leave some without work.
  const bool alike = piece_grains == 0 &&
                     (problem.batch == 1 || total_grains <= int64_t{shape.workers} * shape.team);
  const int64_t fixed = alike ? 0 : shape.fixed_grains;
  const int64_t length = total_grains + fixed * total_pieces;
  // Nothing is cut where so many whole sequences per worker do not exceed the bound on the load.
  const int64_t a_worker = (int64_t{problem.batch} + shape.workers - 1) / shape.workers;
  const bool whole = piece_grains == 0 && a_worker * (longest + fixed) <=
                                              length / shape.workers + fixed + shape.combine_grains;
  // Every sequence gets as many workers where that balances as well as cutting anywhere: there are
  // fewer pieces.
  const int64_t each = std::min(shape.workers / int64_t{problem.batch}, longest / shape.min_grains);
  const bool even = piece_grains == 0 && !alike && each >= 2 &&
                    (longest + each - 1) / each <= length / shape.workers;
  const int64_t up = shape.team > 1 ? shape.min_grains - 1 : 0;  // a round is for all of a team
  const int used = whole  ? static_cast<int>((problem.batch + a_worker - 1) / a_worker)
                   : even ? static_cast<int>(problem.batch * each)
                          : static_cast<int>(std::clamp<int64_t>((length + up) / shape.min_grains,
                                                                 1, shape.workers));

  HostPlan plan;
  plan.worker_begin.assign(static_cast<size_t>(shape.workers) + 1, {problem.batch, 0, 0, 0});
  plan.slot_begin.push_back(0);
  int worker = 0;
  int64_t start = 0;  // of the sequence, on the line
  for (int i = 0; i < problem.batch; ++i) {
    const int64_t grains = grains_in(i);
    const int64_t pieces = piece_grains > 0 ? (grains + piece_grains - 1) / piece_grains : 1;
    const int64_t end = start + grains + fixed * pieces;
    int32_t splits = piece_grains > 0 ? static_cast<int32_t>(pieces) : 1;
    const auto begins_before_end = [&] {
      if (whole) return worker * a_worker <= i;
      if (even) return worker < (i + 1) * each;
      return interval_begin(length, worker, used) < end;
    };
    for (; worker < used && begins_before_end(); ++worker) {
      const int64_t offset = interval_begin(length, worker, used) - start;
      WorkerBegin& begin = plan.worker_begin[static_cast<size_t>(worker)];
      if (whole) {
        begin = {i, 0, 0, 0};
      } else if (even && worker % each >= grains) {  // a short sequence has fewer pieces
        begin = {i + 1, 0, 0, 0};
      } else if (piece_grains == 0) {
        const int64_t grain = even ? interval_begin(grains, static_cast<int>(worker % each),
                                                    static_cast<int>(std::min(each, grains)))
                                   : std::max<int64_t>(0, offset - fixed);
        const bool cut = grain > 0;
        begin = {i, static_cast<int32_t>(grain), cut ? splits++ : 0, 0};
      } else {
        const int64_t piece = (offset + fixed + piece_grains - 1) / (fixed + piece_grains);
        begin = piece < pieces ? WorkerBegin{i, static_cast<int32_t>(piece * piece_grains),
                                             static_cast<int32_t>(piece), 0}
                               : WorkerBegin{i + 1, 0, 0, 0};
      }
      if (begin.sequence < problem.batch) begin.seqlen_k = length_of(begin.sequence);
    }
    if (splits > 1) plan.split_sequences.push_back({i, plan.slot_begin.back(), splits, 0});
    plan.slot_begin.push_back(plan.slot_begin.back() + (splits > 1 ? splits : 0));
    start = end;
  }
  for (int i = 0; i < problem.batch; ++i) plan.seqlens_k.push_back(length_of(i));
  plan.header = {.state = {.made = kPlanMade,
                           .shape = plan_hash(problem, shape),
                           .generation = 0,
                           .refused = 0},
                 .batch = problem.batch,
                 .workers = shape.workers,
                 .fixed_split_tokens = problem.fixed_split_tokens,
                 .fixed_grains = static_cast<int32_t>(fixed),
                 .num_split_sequences = static_cast<int32_t>(plan.split_sequences.size()),
                 .num_slots = plan.slot_begin.back()};
  return plan;
}

}  // namespace mla
