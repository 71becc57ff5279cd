#include "stages/common/split/split_plan.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <utility>

namespace mla {

namespace gpu {
Status launch_make_plan(const Problem&, const PlanShape&, const int32_t*, const SplitWorkspace&,
                        Stream);
Status launch_combine_again(const Problem&, const PlanShape&, const SplitWorkspace&, const Tensors&,
                            Stream);
}  // namespace gpu
namespace model {
Status launch_make_plan(const Problem&, const PlanShape&, const int32_t*, const SplitWorkspace&,
                        Stream);
Status launch_combine_again(const Problem&, const PlanShape&, const SplitWorkspace&, const Tensors&,
                            Stream);
}  // namespace model

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

/// Where on a line of this length worker `worker` of `workers` begins.
int64_t interval_begin(int64_t length, int worker, int workers) {
  return length / workers * worker + length % workers * worker / workers;
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

Status make_plan(Machine& machine, const Problem& problem, const PlanShape& shape,
                 const int32_t* seqlens_k, void* workspace, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, shape, workspace);
#ifdef MLA_HAVE_CUDA
  if (machine.kind() == MachineKind::kGpu) {
    return gpu::launch_make_plan(problem, shape, seqlens_k, split, stream);
  }
#endif
  static_cast<void>(machine);
  return model::launch_make_plan(problem, shape, seqlens_k, split, stream);
}

Status combine_again(Machine& machine, const Problem& problem, const PlanShape& shape,
                     const Tensors& tensors, void* workspace, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, shape, workspace);
#ifdef MLA_HAVE_CUDA
  if (machine.kind() == MachineKind::kGpu) {
    return gpu::launch_combine_again(problem, shape, split, tensors, stream);
  }
#endif
  static_cast<void>(machine);
  return model::launch_combine_again(problem, shape, split, tensors, stream);
}

HostPlan make_plan_on_host(const Problem& problem, const PlanShape& shape,
                           const std::vector<int32_t>& seqlens_k) {
  const auto blocks_of = [&](int sequence) {
    const int64_t length =
        std::clamp<int64_t>(seqlens_k[static_cast<size_t>(sequence)], 0, problem.max_seqlen_k());
    return std::max<int64_t>(1, pages_for(length));
  };
  const int64_t piece_blocks = problem.fixed_split_tokens / kPageSize;  // 0: anywhere
  int64_t total_blocks = 0, total_pieces = 0, longest = 0;
  for (int i = 0; i < problem.batch; ++i) {
    total_blocks += blocks_of(i);
    longest = std::max(longest, blocks_of(i));
    total_pieces += piece_blocks > 0 ? (blocks_of(i) + piece_blocks - 1) / piece_blocks : 1;
  }
  // With a block or less for every worker, or all of them on one sequence, all pay the fixed cost
  // alike, and to count it would leave some without work.
  const bool alike = piece_blocks == 0 && (problem.batch == 1 || total_blocks <= shape.workers);
  const int64_t fixed = alike ? 0 : shape.fixed_blocks;
  const int64_t length = total_blocks + fixed * total_pieces;
  // Nothing is cut where so many whole sequences a worker do not exceed the bound on the load.
  const int64_t a_worker = (int64_t{problem.batch} + shape.workers - 1) / shape.workers;
  const bool whole = piece_blocks == 0 && a_worker * (longest + fixed) <=
                                              length / shape.workers + fixed + shape.combine_blocks;
  const int used =
      whole ? static_cast<int>((problem.batch + a_worker - 1) / a_worker)
            : static_cast<int>(std::clamp<int64_t>(length / shape.min_blocks, 1, shape.workers));

  HostPlan plan;
  plan.worker_begin.assign(static_cast<size_t>(shape.workers) + 1, {problem.batch, 0, 0, 0});
  plan.slot_begin.push_back(0);
  int worker = 0;
  int64_t start = 0;  // of the sequence, on the line
  for (int i = 0; i < problem.batch; ++i) {
    const int64_t blocks = blocks_of(i);
    const int64_t pieces = piece_blocks > 0 ? (blocks + piece_blocks - 1) / piece_blocks : 1;
    const int64_t end = start + blocks + fixed * pieces;
    int32_t splits = piece_blocks > 0 ? static_cast<int32_t>(pieces) : 1;
    for (; worker < used &&
           (whole ? worker * a_worker <= i : interval_begin(length, worker, used) < end);
         ++worker) {
      const int64_t offset = interval_begin(length, worker, used) - start;
      WorkerBegin& begin = plan.worker_begin[static_cast<size_t>(worker)];
      if (whole) {
        begin = {i, 0, 0, 0};
      } else if (piece_blocks == 0) {
        const int64_t block = std::max<int64_t>(0, offset - fixed);
        const bool cut = block > 0;
        begin = {i, static_cast<int32_t>(block), cut ? splits++ : 0, 0};
      } else {
        const int64_t piece = (offset + fixed + piece_blocks - 1) / (fixed + piece_blocks);
        begin = piece < pieces ? WorkerBegin{i, static_cast<int32_t>(piece * piece_blocks),
                                             static_cast<int32_t>(piece), 0}
                               : WorkerBegin{i + 1, 0, 0, 0};
      }
      if (begin.sequence < problem.batch) {
        begin.seqlen_k = static_cast<int32_t>(std::clamp<int64_t>(
            seqlens_k[static_cast<size_t>(begin.sequence)], 0, problem.max_seqlen_k()));
      }
    }
    if (splits > 1) plan.split_sequences.push_back({i, plan.slot_begin.back(), splits, 0});
    plan.slot_begin.push_back(plan.slot_begin.back() + (splits > 1 ? splits : 0));
    start = end;
  }
  for (int i = 0; i < problem.batch; ++i) {
    plan.seqlens_k.push_back(seqlens_k[static_cast<size_t>(i)]);
  }
  plan.header = {.made = kPlanMade,
                 .batch = problem.batch,
                 .workers = shape.workers,
                 .fixed_split_tokens = problem.fixed_split_tokens,
                 .fixed_blocks = static_cast<int32_t>(fixed),
                 .num_split_sequences = static_cast<int32_t>(plan.split_sequences.size()),
                 .num_slots = plan.slot_begin.back(),
                 .unused = 0};
  return plan;
}

Status read_plan(Machine& machine, const Problem& problem, const PlanShape& shape, void* workspace,
                 HostPlan* plan, Stream stream) {
  const SplitWorkspace split = split_workspace(problem, shape, workspace);
  HostPlan result;
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(&result.header, split.header, sizeof(PlanHeader), stream));
  const PlanHeader& header = result.header;
  if (header.made != kPlanMade || header.batch != problem.batch ||
      header.workers != shape.workers || header.fixed_split_tokens != problem.fixed_split_tokens) {
    return {StatusCode::kInvalidArgument, "workspace holds no plan for this problem"};
  }
  const auto read = [&](auto& values, int64_t count, const auto* source) -> Status {
    values.resize(static_cast<size_t>(count));
    if (count == 0) return {};
    return machine.copy_to_host(values.data(), source, values.size() * sizeof(values[0]), stream);
  };
  MLA_RETURN_IF_ERROR(read(result.worker_begin, shape.workers + 1, split.worker_begin));
  MLA_RETURN_IF_ERROR(read(result.slot_begin, problem.batch + 1, split.slot_begin));
  MLA_RETURN_IF_ERROR(read(result.seqlens_k, problem.batch, split.seqlens_k));
  MLA_RETURN_IF_ERROR(
      read(result.split_sequences, header.num_split_sequences, split.split_sequences));
  *plan = std::move(result);
  return {};
}

std::vector<std::vector<Piece>> pieces_of(const HostPlan& plan) {
  const int piece_blocks =
      plan.header.fixed_split_tokens > 0 ? plan.header.fixed_split_tokens / kPageSize : INT_MAX;
  const auto blocks_of = [&](int sequence) {
    const int64_t length = std::max(0, plan.seqlens_k[static_cast<size_t>(sequence)]);
    return static_cast<int>(std::max<int64_t>(1, pages_for(length)));
  };
  std::vector<std::vector<Piece>> workers(static_cast<size_t>(plan.header.workers));
  for (size_t w = 0; w < workers.size(); ++w) {
    WorkerBegin at = plan.worker_begin[w];
    const WorkerBegin end = plan.worker_begin[w + 1];
    while (at.sequence < end.sequence || (at.sequence == end.sequence && at.block < end.block)) {
      const auto sequence = static_cast<size_t>(at.sequence);
      const int blocks = blocks_of(at.sequence);
      const int limit = at.sequence == end.sequence ? end.block : blocks;
      const int until = at.block + std::min(limit - at.block, piece_blocks);
      const bool split = plan.slot_begin[sequence + 1] > plan.slot_begin[sequence];
      workers[w].push_back(
          {at.sequence, at.block, until, split ? plan.slot_begin[sequence] + at.split : -1});
      at = until < blocks ? WorkerBegin{at.sequence, until, at.split + 1, 0}
                          : WorkerBegin{at.sequence + 1, 0, 0, 0};
    }
  }
  return workers;
}

std::string describe_plan(const HostPlan& plan, int max_lines) {
  max_lines = std::max(1, max_lines);
  constexpr int kBar = 24, kPieces = 4;
  const auto workers = pieces_of(plan);
  std::vector<int64_t> loads;
  int64_t largest = 1, sum = 0;
  for (const auto& pieces : workers) {
    int64_t load = 0;
    for (const Piece& piece : pieces) {
      load += piece.block_end - piece.block_begin + plan.header.fixed_blocks;
    }
    loads.push_back(load);
    largest = std::max(largest, load);
    sum += load;
  }
  std::string text;
  char line[160];
  const int count = static_cast<int>(workers.size());
  for (int w = 0; w < count; ++w) {
    if (count > max_lines && w == max_lines / 2) {
      const int skipped = count - max_lines;
      std::snprintf(line, sizeof line, "  ...     %d more workers\n", skipped);
      text += line;
      w += skipped;
    }
    const auto& pieces = workers[static_cast<size_t>(w)];
    const int64_t load = loads[static_cast<size_t>(w)];
    const auto bar = static_cast<size_t>((load * kBar + largest - 1) / largest);
    std::snprintf(line, sizeof line, "worker %3d %6lld %s%s", w, static_cast<long long>(load),
                  std::string(bar, '#').c_str(), std::string(kBar - bar, '.').c_str());
    text += line;
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (i == kPieces && pieces.size() > kPieces + 1) {
        text += ", and " + std::to_string(pieces.size() - i) + " more";
        break;
      }
      const Piece& piece = pieces[i];
      const int64_t length = std::max(0, plan.seqlens_k[static_cast<size_t>(piece.sequence)]);
      const int64_t end = std::min<int64_t>(length, int64_t{piece.block_end} * kPageSize);
      text += (i == 0 ? "  " : ", ") + std::to_string(piece.sequence) + ":" +
              std::to_string(int64_t{piece.block_begin} * kPageSize) + "-" + std::to_string(end);
      if (piece.slot >= 0) text += " (slot " + std::to_string(piece.slot) + ")";
    }
    text += "\n";
  }
  const double mean = static_cast<double>(sum) / std::max(1, count);
  std::snprintf(line, sizeof line,
                "load in blocks of 64 tokens, %d for beginning a piece: mean %.1f, largest %lld "
                "(%.0f%% of the mean)\n",
                plan.header.fixed_blocks, mean, static_cast<long long>(largest),
                100 * static_cast<double>(largest) / std::max(mean, 1e-9));
  text += line;
  std::snprintf(line, sizeof line, "%d of %d sequences split, into %d pieces\n",
                plan.header.num_split_sequences, plan.header.batch, plan.header.num_slots);
  return text + line;
}

}  // namespace mla
