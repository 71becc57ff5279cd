#include "stages/common/split/workspace.h"

#include <algorithm>
#include <climits>

namespace mla {

int64_t max_split_sequences(const Problem& problem, const PlanShape& shape) {
  if (problem.fixed_split_tokens > 0) {
    return problem.max_seqlen_k() > problem.fixed_split_tokens ? problem.batch : 0;
  }
  return std::min(problem.batch, shape.workers - 1);  // every cut is some worker's beginning
}

int64_t max_slots(const Problem& problem, const PlanShape& shape) {
  const int64_t sequences = max_split_sequences(problem, shape);
  if (problem.fixed_split_tokens > 0) {
    const int64_t blocks = problem.fixed_split_tokens / kPageSize;
    return sequences * ((problem.max_pages_per_seq + blocks - 1) / blocks);
  }
  return sequences + shape.workers - 1;  // a piece more than cuts in each
}

namespace {

size_t round_up(size_t bytes) {
  return (bytes + 127) / 128 * 128;
}

/// Calls part(member, bytes) for every part of the workspace, in order.
template <typename Part>
void for_each_part(const Problem& problem, const PlanShape& shape, SplitWorkspace& workspace,
                   Part&& part) {
  const auto batch = static_cast<size_t>(problem.batch);
  const auto slots = static_cast<size_t>(max_slots(problem, shape));
  const size_t rows =
      static_cast<size_t>(problem.num_heads_kv) * static_cast<size_t>(problem.rows_per_kv_head());
  part(workspace.header, sizeof(PlanHeader));
  part(workspace.worker_begin, sizeof(WorkerBegin) * static_cast<size_t>(shape.workers + 1));
  part(workspace.slot_begin, sizeof(int32_t) * (batch + 1));
  part(workspace.seqlens_k, sizeof(int32_t) * batch);
  part(workspace.split_sequences,
       sizeof(SplitSequence) * static_cast<size_t>(max_split_sequences(problem, shape)));
  part(workspace.lse_partial, sizeof(float) * slots * rows);
  part(workspace.out_partial, sizeof(float) * slots * rows * kHeadDimV);
}

}  // namespace

size_t split_workspace_bytes(const Problem& problem, const PlanShape& shape) {
  // Slots have 32-bit numbers, and sizes 64 bits: more than there is memory for, by far.
  const int64_t slots = max_slots(problem, shape);
  const int64_t rows = int64_t{problem.num_heads_kv} * problem.rows_per_kv_head();
  if (slots > INT_MAX || slots * rows > INT64_MAX / 4096) return SIZE_MAX;
  SplitWorkspace workspace{};
  size_t bytes = 0;
  for_each_part(problem, shape, workspace,
                [&](auto*&, size_t part_bytes) { bytes += round_up(part_bytes); });
  return bytes;
}

SplitWorkspace split_workspace(const Problem& problem, const PlanShape& shape, void* workspace) {
  SplitWorkspace result{};
  auto* next = static_cast<unsigned char*>(workspace);
  for_each_part(problem, shape, result, [&]<typename T>(T*& pointer, size_t part_bytes) {
    pointer = reinterpret_cast<T*>(next);
    next += round_up(part_bytes);
  });
  return result;
}

}  // namespace mla
