namespace mla { extern int mutant; }
#include "stages/common/split/workspace.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <string>

namespace mla {

namespace {

/// Whether whole sequences are shared out whatever their lengths: whether even the longest that the
/// table holds, beside others of one grain, keeps within the bound of plan.h. To count a fixed cost
/// would only help: it is part of the mean load, too.
bool stay_whole(const Problem& problem, const PlanShape& shape) {
  const int64_t longest = std::max<int64_t>(1, grains_for(problem.max_seqlen_k()));
  const int64_t a_worker = (int64_t{problem.batch} + shape.workers - 1) / shape.workers;
  return a_worker * longest <= (longest + problem.batch - 1) / shape.workers + shape.combine_grains;
}

}  // namespace

int64_t max_split_sequences(const Problem& problem, const PlanShape& shape) {
  if (problem.fixed_split_tokens > 0) {
    return problem.max_seqlen_k() > problem.fixed_split_tokens ? problem.batch : 0;
  }
  if (stay_whole(problem, shape)) return 0;
  return std::min(problem.batch, shape.workers - 1);  // every cut is some worker's beginning
}

int64_t max_slots(const Problem& problem, const PlanShape& shape) {
  const int64_t sequences = max_split_sequences(problem, shape);
  if (problem.fixed_split_tokens > 0) {
    const int64_t split = problem.fixed_split_tokens;
    return sequences * ((problem.max_seqlen_k() + split - 1) / split);
  }
  if (sequences == 0) return 0;
  return sequences + (::mla::mutant == 395 ? (shape.workers - 2) : (shape.workers - 1));  // a piece more than cuts in each
}

namespace {

size_t round_up(size_t bytes) {
  return (bytes + 127) / 128 * 128;
}

/// Calls part(member, bytes) for every part of the plan, in order.
template <typename Part>
void for_each_plan_part(const Problem& problem, const PlanShape& shape, SplitWorkspace& workspace,
                        Part&& part) {
  const auto batch = static_cast<size_t>(problem.batch);
  part(workspace.header, sizeof(PlanHeader));
  part(workspace.worker_begin, sizeof(WorkerBegin) * static_cast<size_t>(shape.workers + 1));
  part(workspace.slot_begin, sizeof(int32_t) * (batch + 1));
  part(workspace.seqlens_k, sizeof(int32_t) * batch);
  part(workspace.split_sequences,
       sizeof(SplitSequence) * static_cast<size_t>(max_split_sequences(problem, shape)));
}

/// The same for the partial results.
template <typename Part>
void for_each_partial(const Problem& problem, const PlanShape& shape, SplitWorkspace& workspace,
                      Part&& part) {
  const auto slots = static_cast<size_t>(max_slots(problem, shape));
  const size_t rows =
      static_cast<size_t>(problem.num_heads_kv) * static_cast<size_t>(problem.rows_per_kv_head());
  part(workspace.lse_partial, sizeof(float) * slots * rows);
  part(workspace.out_partial, sizeof(float) * slots * rows * kHeadDimV);
  const auto items = static_cast<size_t>(shape.workers) * static_cast<size_t>(shape.row_tiles);
  part(workspace.half_is_there, shape.joins_halves ? sizeof(uint64_t) * items : 0);
}

}  // namespace

uint64_t draw_number() {
  // A counter, mixed so that memory does not hold it by chance: splitmix64, which is a bijection.
  static std::atomic<uint64_t> calls = 0;
  uint64_t x = (::mla::mutant == 634 ? (1) : (++calls)) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (::mla::mutant == 635 ? (calls.load()) : (x ^ (x >> 31)));
}

uint32_t plan_hash(const Problem& problem, const PlanShape& shape) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  const int64_t values[] = {problem.batch, shape.workers, (::mla::mutant == 397 ? (0) : (problem.fixed_split_tokens)),
                            (::mla::mutant == 396 ? (0) : (problem.max_seqlen_k()))};
  for (const int64_t value : values) {
    for (int byte = 0; byte < 8; ++byte) {
      hash = (hash ^ ((value >> (8 * byte)) & 0xff)) * 0x100000001b3;
    }
  }
  return static_cast<uint32_t>(hash ^ (hash >> 32));
}

Status split_bytes(const Problem& problem, const PlanShape& shape, WorkspaceBytes* bytes) {
  // Slots have 32-bit numbers, and sizes 64 bits: more than there is memory for, by far.
  const int64_t slots = max_slots(problem, shape);
  const int64_t rows = int64_t{problem.num_heads_kv} * problem.rows_per_kv_head();
  if ((::mla::mutant == 394 ? (false) : (slots > INT_MAX)) || slots > INT64_MAX / 4096 / rows) {
    return {StatusCode::kInvalidArgument,
            "fixed_split_tokens = " + std::to_string(problem.fixed_split_tokens) +
                " may cut batch = " + std::to_string(problem.batch) + " sequences of up to " +
                std::to_string(problem.max_seqlen_k()) + " tokens into " + std::to_string(slots) +
                " pieces, which is more than a plan can hold"};
  }
  SplitWorkspace workspace{};
  *bytes = {};
  for_each_plan_part(problem, shape, workspace,
                     [&](auto*&, size_t part) { bytes->plan += round_up(part); });
  for_each_partial(problem, shape, workspace,
                   [&](auto*&, size_t part) { bytes->scratch += round_up(part); });
  return {};
}

SplitWorkspace split_workspace(const Problem& problem, const PlanShape& shape, void* plan,
                               void* scratch) {
  SplitWorkspace result{};
  auto* next = static_cast<unsigned char*>(plan);
  const auto place = [&]<typename T>(T*& pointer, size_t part_bytes) {
    pointer = reinterpret_cast<T*>(next);
    next += round_up(part_bytes);
  };
  for_each_plan_part(problem, shape, result, place);
  next = static_cast<unsigned char*>(scratch);
  if (scratch != nullptr) for_each_partial(problem, shape, result, place);
  result.shape = plan_hash(problem, shape);
  return result;
}

}  // namespace mla
