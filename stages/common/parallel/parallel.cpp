#include "stages/common/parallel/parallel.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "stages/common/parallel/parallel_kernels.h"

namespace mla {

namespace {

/// A rank's result: out and lse of every head, for all query tokens. Each head has a record, out [tokens, 512]
/// and then lse [tokens], so that the records of a rank's heads are one piece to send. With kReduceScatter,
/// where lse is sent first, all out [num_heads_q, tokens, 512] come before all lse.
struct ResultShape {
  int64_t heads = 0, tokens = 0;
  bool is_sum = false;  ///< kReduceScatter

  int64_t out_bytes() const { return tokens * kHeadDimV * int64_t{sizeof(uint16_t)}; }
  int64_t lse_bytes() const { return tokens * int64_t{sizeof(float)}; }
  int64_t record_bytes() const { return (out_bytes() + lse_bytes() + 15) / 16 * 16; }
  int64_t bytes() const { return heads * (is_sum ? out_bytes() + lse_bytes() : record_bytes()); }
  int64_t lse_begin() const { return is_sum ? heads * out_bytes() : out_bytes(); }
  int64_t out_head() const { return (is_sum ? out_bytes() : record_bytes()) / 2; }  ///< elements
  int64_t lse_head() const { return (is_sum ? lse_bytes() : record_bytes()) / 4; }
};

/// The decode of one slice of the batch: its problems, and where the workspace has what.
struct Layout {
  Problem whole;   ///< As the caller has it.
  Problem bulk;    ///< Tokens that every query token sees.
  Problem tail;    ///< The others: every query token is a sequence. Of batch 0 if there are none.
  Problem merged;  ///< The heads that this rank's outputs have.
  int first = 0;   ///< The slice's first sequence.
  WorkspaceBytes bulk_bytes, tail_bytes;  ///< Of the stage.
  ResultShape result;

  /// @name Offsets into the plan's memory, in bytes
  /// @{
  size_t bulk_plan = 0, tail_plan = 0;
  size_t bulk_lengths = 0, tail_lengths = 0, tail_table = 0;
  /// @}
  /// @name Offsets into the slices' buffers
  /// @{
  size_t parts = 0;          ///< two results, bulk and tail, if there is a tail
  size_t mine = 0;           ///< this rank's result, if it is not a part of `all`
  bool is_in_place = false;  ///< it is
  size_t all = 0;            ///< what was received: records of the merged heads; lse of all heads
  size_t weighted = 0, sum = 0;  ///< fp32, of kReduceScatter
  /// @}
  bool has_tail() const { return tail.batch > 0; }
};

/// All slices. Each has plans of its own; the scratch memory of the stage they share.
struct Slices {
  std::vector<Layout> layouts;
  size_t stage_scratch = 0;  ///< At the scratch memory's beginning, before the slices' buffers.
  WorkspaceBytes bytes;      ///< Of all.
};

Status at_least_one(const char* name, int value) {
  if (value >= 1) return {};
  return {StatusCode::kInvalidArgument,
          std::string(name) + " = " + std::to_string(value) + " must be at least 1"};
}

size_t aligned(int64_t bytes, size_t to = 16) {
  return (static_cast<size_t>(bytes) + to - 1) / to * to;
}

/// `bytes` more of so many as are taken: where they begin.
size_t take(int64_t bytes, size_t* taken) {
  const size_t begin = *taken;
  *taken += aligned(bytes);
  return begin;
}

/// Columns of a rank's block table.
int columns_of(const Problem& problem, const ParallelSettings& settings, int ranks) {
  if (settings.own_lengths) return problem.max_pages_per_seq;
  return share_columns(problem.max_pages_per_seq, ranks, settings.pages_per_turn);
}

/// The first sequence of slice `slice` of so many; of the one behind the last, the batch.
int first_of_slice(const Problem& problem, int64_t slice, int slices) {
  return static_cast<int>(slice * problem.batch / slices);
}

Problem slice_of(const Problem& problem, int slice, int slices) {
  Problem part = problem;
  part.batch = first_of_slice(problem, slice + 1, slices) - first_of_slice(problem, slice, slices);
  return part;
}

/// Of a slice, what a rank decodes of the tokens that every query token sees.
Problem bulk_of(const Problem& problem, const ParallelSettings& settings, int ranks) {
  Problem bulk = problem;
  bulk.causal = false;
  bulk.max_pages_per_seq = columns_of(problem, settings, ranks);
  return bulk;
}

/// Of the others, where every query token is a sequence. Of batch 0 if there are none.
Problem tail_of(const Problem& problem, const ParallelSettings& settings, int ranks) {
  Problem tail = bulk_of(problem, settings, ranks);
  tail.batch = 0;
  tail.seqlen_q = 1;
  if (problem.causal && problem.seqlen_q > 1) {
    // The last query token sees seqlen_q - 1 tokens more than the first, and up to a page less one lies
    // before them in their first page.
    tail.batch = problem.batch * problem.seqlen_q;
    tail.max_pages_per_seq = static_cast<int>(
        pages_for(int64_t{problem.seqlen_q} - 1 + problem.page_size - 1, problem.page_size));
  }
  return tail;
}

/// Of `problem`, a slice: it takes its memory of what all take.
Status find_layout(const Stage& stage, const Problem& problem, const ParallelSettings& settings,
                   int ranks, Layout* layout, Slices* all) {
  const bool by_heads = settings.exchange != Exchange::kAllGather;
  const int64_t tokens = int64_t{problem.batch} * problem.seqlen_q;
  layout->result = {problem.num_heads_q, tokens, settings.exchange == Exchange::kReduceScatter};
  layout->whole = layout->merged = problem;
  layout->bulk = bulk_of(problem, settings, ranks);
  layout->tail = tail_of(problem, settings, ranks);
  layout->merged.num_heads_kv = 1;  // heads are rows here
  if (by_heads) layout->merged.num_heads_q /= ranks;

  MLA_RETURN_IF_ERROR(workspace_bytes(stage, layout->bulk, &layout->bulk_bytes));
  MLA_RETURN_IF_ERROR(workspace_bytes(stage, layout->tail, &layout->tail_bytes));
  all->stage_scratch =
      std::max({all->stage_scratch, layout->bulk_bytes.scratch, layout->tail_bytes.scratch});

  const auto plan = [&](int64_t bytes) { return take(bytes, &all->bytes.plan); };
  const auto buffer = [&](int64_t bytes) { return take(bytes, &all->bytes.scratch); };
  const ResultShape& result = layout->result;
  layout->bulk_plan = plan(static_cast<int64_t>(layout->bulk_bytes.plan));
  layout->bulk_lengths = plan(problem.batch * int64_t{sizeof(int32_t)});
  if (layout->has_tail()) {
    layout->tail_plan = plan(static_cast<int64_t>(layout->tail_bytes.plan));
    layout->tail_lengths = plan(tokens * int64_t{sizeof(int32_t)});
    layout->tail_table = plan(layout->tail.block_table_elements() * int64_t{sizeof(int32_t)});
    layout->parts = buffer(2 * static_cast<int64_t>(aligned(result.bytes())));
  }
  layout->is_in_place = settings.exchange == Exchange::kAllGather;
  if (!layout->is_in_place) layout->mine = buffer(result.bytes());
  if (result.is_sum) {
    const int64_t row_bytes = kHeadDimV * int64_t{sizeof(float)};
    layout->all = buffer(ranks * result.heads * result.lse_bytes());
    layout->weighted = buffer(problem.lse_elements() * row_bytes);
    layout->sum = buffer(layout->merged.lse_elements() * row_bytes);
  } else {
    layout->all = buffer(int64_t{ranks} * layout->merged.num_heads_q * result.record_bytes());
  }
  return {};
}

Status find_slices(const Stage& stage, const Problem& problem, const ParallelSettings& settings,
                   int ranks, Slices* slices) {
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(at_least_one("ranks", ranks));
  MLA_RETURN_IF_ERROR(at_least_one("pages_per_turn", settings.pages_per_turn));
  MLA_RETURN_IF_ERROR(at_least_one("slices", settings.slices));
  if (settings.exchange != Exchange::kAllGather && problem.num_heads_q % ranks != 0) {
    return {StatusCode::kInvalidArgument,
            std::string(to_string(settings.exchange)) +
                ": num_heads_q = " + std::to_string(problem.num_heads_q) +
                " must be a multiple of ranks = " + std::to_string(ranks)};
  }
  if (settings.own_lengths && problem.causal && problem.seqlen_q > 1) {
    return {StatusCode::kInvalidArgument,
            "own_lengths: a causal decode must have seqlen_q = 1, not " +
                std::to_string(problem.seqlen_q)};
  }
  const int64_t tokens = int64_t{problem.batch} * problem.seqlen_q;
  if (tokens > std::numeric_limits<int>::max()) {
    return {StatusCode::kInvalidArgument,
            "batch * seqlen_q = " + std::to_string(tokens) + " must be less than 2^31"};
  }
  if (ranks == 1) return workspace_bytes(stage, problem, &slices->bytes);  // as one device does
  const int count = count_slices(problem, settings);
  for (int slice = 0; slice < count; ++slice) {
    Layout layout;
    layout.first = first_of_slice(problem, slice, count);
    MLA_RETURN_IF_ERROR(
        find_layout(stage, slice_of(problem, slice, count), settings, ranks, &layout, slices));
    slices->layouts.push_back(layout);
  }
  slices->stage_scratch = aligned(static_cast<int64_t>(slices->stage_scratch));
  slices->bytes.scratch += slices->stage_scratch;
  slices->bytes.plan = aligned(static_cast<int64_t>(slices->bytes.plan), 128);
  return {};
}

/// Checks the tensors of the whole batch, and fills in their strides.
Status check_tensors(const Problem& problem, const ParallelSettings& settings, int ranks,
                     Tensors* tensors) {
  Problem in_problem = problem, out_problem = problem;
  in_problem.causal = false;
  in_problem.max_pages_per_seq = columns_of(problem, settings, ranks);
  out_problem.num_heads_kv = 1;
  if (settings.exchange != Exchange::kAllGather) out_problem.num_heads_q /= ranks;
  Tensors in = *tensors, out = *tensors;
  in.out_strides = in.lse_strides = {};
  MLA_RETURN_IF_ERROR(validate(in_problem, in));
  out.q_strides = {};
  out.kv_strides = {};
  out.block_table_stride = kContiguous;
  MLA_RETURN_IF_ERROR(validate(out_problem, out));
  in = with_strides(in_problem, in);
  out = with_strides(out_problem, out);
  const RowStrides q = in.q_strides;
  if (problem.causal && problem.seqlen_q > 1 && problem.batch > 1 &&
      q.batch != problem.seqlen_q * q.token) {
    return {StatusCode::kInvalidArgument, "q_strides.batch = " + std::to_string(q.batch) +
                                              " must be seqlen_q * q_strides.token = " +
                                              std::to_string(problem.seqlen_q * q.token) +
                                              " for a causal decode"};
  }
  *tensors = in;
  tensors->out_strides = out.out_strides;
  tensors->lse_strides = out.lse_strides;
  return {};
}

/// The tensors from sequence `first` on.
Tensors from_sequence(Tensors tensors, int first) {
  constexpr int64_t kBytes = sizeof(uint16_t);
  tensors.q = static_cast<const char*>(tensors.q) + first * tensors.q_strides.batch * kBytes;
  tensors.block_table += first * tensors.block_table_stride;
  tensors.seqlens_k += first;
  tensors.out = static_cast<char*>(tensors.out) + first * tensors.out_strides.batch * kBytes;
  tensors.lse += first * tensors.lse_strides.batch;
  return tensors;
}

/// One rank's decode of one slice, once its arguments are checked.
struct Rank {
  const Stage& stage;
  const Layout& layout;
  Tensors tensors;  ///< Of the slice, with strides.
  Machine& machine;
  Transport& transport;
  char* plan_memory;
  Workspace stage_scratch;
  Stream stream;

  /// In the slices' buffers, which are behind the stage's scratch memory.
  template <typename T = void>
  T* at(size_t offset) const {
    auto* buffers = static_cast<char*>(stage_scratch.data) + stage_scratch.bytes;
    return static_cast<T*>(static_cast<void*>(buffers + offset));
  }
  /// In the plan's memory.
  int32_t* lengths_at(size_t offset) const {
    return static_cast<int32_t*>(static_cast<void*>(plan_memory + offset));
  }
  Workspace bulk_plan() const { return {plan_memory + layout.bulk_plan, layout.bulk_bytes.plan}; }
  Workspace tail_plan() const { return {plan_memory + layout.tail_plan, layout.tail_bytes.plan}; }
  /// What this rank decodes, but for lengths that are its own.
  RankLengths lengths() const {
    RankLengths lengths;
    lengths.bulk = lengths_at(layout.bulk_lengths);
    if (layout.has_tail()) {
      lengths.tail = lengths_at(layout.tail_lengths);
      lengths.tail_table = lengths_at(layout.tail_table);
      lengths.tail_columns = layout.tail.max_pages_per_seq;
    }
    return lengths;
  }

  /// Lets `out` and `lse` be those of the result at `offset`.
  void write_to(size_t offset, int64_t tokens_per_sequence, Tensors* to) const {
    const ResultShape& result = layout.result;
    to->out = at(offset);
    to->lse = at<float>(offset + static_cast<size_t>(result.lse_begin()));
    to->out_strides = {tokens_per_sequence * kHeadDimV, kHeadDimV, result.out_head()};
    to->lse_strides = {tokens_per_sequence, 1, result.lse_head()};
  }

  /// `count` results, or records of heads, from `offset` on, `bytes` from one to the next.
  Parts parts(size_t offset, int64_t bytes, int count) const {
    const ResultShape& result = layout.result;
    return {at(offset),
            at<float>(offset + static_cast<size_t>(result.lse_begin())),
            bytes / 2,
            bytes / 4,
            result.out_head(),
            result.lse_head(),
            count,
            -1,
            nullptr,
            nullptr};
  }

  /// Where this rank's result is: with kAllGather its place among those that are received.
  size_t mine() const {
    const auto place = static_cast<size_t>(transport.rank()) * static_cast<size_t>(merged_bytes());
    return layout.is_in_place ? layout.all + place : layout.mine;
  }

  Status mark(RankPhase phase) const { return transport.mark(phase, stream); }

  /// What this rank's decodes need of lengths and table: which tokens are its own, and the plans of these.
  Status plan(const ParallelSettings& settings) const {
    MLA_RETURN_IF_ERROR(mark(RankPhase::kCut));
    if (settings.own_lengths) {  // nothing to cut, and no tail
      return plan_decode(stage, layout.bulk, tensors.seqlens_k, bulk_plan(), stream);
    }
    SequenceShares shares;
    shares.share = {transport.rank(), transport.ranks(), settings.pages_per_turn};
    if (settings.first_ranks != nullptr) shares.first_ranks = settings.first_ranks + layout.first;
    const RankLengths own = lengths();
    if (!layout.has_tail() && stage.plan_shape != nullptr) {
      // The plan's kernel cuts: one step less.
      const SharedLengths shared = {shares, static_cast<int>(layout.whole.max_seqlen_k()),
                                    own.bulk};
      return plan_decode(stage, layout.bulk, tensors.seqlens_k, bulk_plan(), stream, &shared);
    }
    MLA_RETURN_IF_ERROR(
        MLA_ON_MACHINE(machine, launch_cut)(layout.whole, tensors, shares, own, stream));
    MLA_RETURN_IF_ERROR(plan_decode(stage, layout.bulk, own.bulk, bulk_plan(), stream));
    if (!layout.has_tail()) return {};
    return plan_decode(stage, layout.tail, own.tail, tail_plan(), stream);
  }

  /// This rank's result over the tokens that it holds, by its plans.
  Status decode_share(const ParallelSettings& settings) const {
    const Problem& problem = layout.whole;
    Tensors bulk = tensors;
    if (!settings.own_lengths) bulk.seqlens_k = lengths().bulk;
    write_to(layout.has_tail() ? layout.parts : mine(), problem.seqlen_q, &bulk);
    MLA_RETURN_IF_ERROR(mark(RankPhase::kBulk));
    MLA_RETURN_IF_ERROR(
        decode_planned(stage, layout.bulk, bulk, bulk_plan(), stage_scratch, stream));
    if (!layout.has_tail()) return {};

    const size_t result_bytes = aligned(layout.result.bytes());
    Tensors tail = tensors;
    tail.q_strides.batch = tail.q_strides.token;
    tail.block_table = lengths().tail_table;
    tail.block_table_stride = kContiguous;
    tail.seqlens_k = lengths().tail;
    write_to(layout.parts + result_bytes, 1, &tail);
    MLA_RETURN_IF_ERROR(mark(RankPhase::kTail));
    MLA_RETURN_IF_ERROR(
        decode_planned(stage, layout.tail, tail, tail_plan(), stage_scratch, stream));
    Tensors both = tensors;
    write_to(mine(), problem.seqlen_q, &both);
    MLA_RETURN_IF_ERROR(mark(RankPhase::kLocalMerge));
    return MLA_ON_MACHINE(machine, launch_merge)(
        problem, parts(layout.parts, static_cast<int64_t>(result_bytes), 2), both, stream);
  }

  int64_t sum_rows() const { return layout.merged.lse_elements(); }
  int64_t merged_bytes() const {  // records of the heads that are merged here
    return layout.merged.num_heads_q * layout.result.record_bytes();
  }

  /// Sends this rank's result, and enqueues what receives the others'.
  Status exchange(Exchange kind) const {
    const ResultShape& result = layout.result;
    if (kind == Exchange::kAllGather) {
      return transport.all_gather(at(mine()), at(layout.all), static_cast<size_t>(merged_bytes()),
                                  stream);
    }
    if (kind == Exchange::kAllToAll) {
      return transport.all_to_all(at(mine()), at(layout.all), static_cast<size_t>(merged_bytes()),
                                  stream);
    }
    const int64_t lse_bytes = result.heads * result.lse_bytes();
    const char* lse = at<char>(mine()) + result.lse_begin();
    MLA_RETURN_IF_ERROR(
        transport.all_gather(lse, at(layout.all), static_cast<size_t>(lse_bytes), stream));
    MLA_RETURN_IF_ERROR(transport.join(stream));
    auto* weighted = at<float>(layout.weighted);
    MLA_RETURN_IF_ERROR(mark(RankPhase::kWeigh));
    MLA_RETURN_IF_ERROR(MLA_ON_MACHINE(machine, launch_weigh)(layout.whole, all_lse(0),
                                                              transport.rank(), weighted, stream));
    MLA_RETURN_IF_ERROR(mark(RankPhase::kWait));
    return transport.reduce_scatter(weighted, at<float>(layout.sum),
                                    static_cast<size_t>(sum_rows() * kHeadDimV), stream);
  }

  /// This rank's out, and all ranks' lse from head `head` on, of kReduceScatter.
  Parts all_lse(int head) const {
    Parts all = parts(mine(), 0, transport.ranks());
    all.lse_stride = layout.result.heads * layout.result.tokens;
    all.lse = at<float>(layout.all) + head * layout.result.tokens;
    return all;
  }

  /// Makes all ranks' results one, once they are there.
  Status merge(Exchange kind) const {
    const Problem& merged = layout.merged;
    MLA_RETURN_IF_ERROR(mark(RankPhase::kMerge));
    if (kind == Exchange::kReduceScatter) {
      return MLA_ON_MACHINE(machine, launch_finish)(merged,
                                                    all_lse(transport.rank() * merged.num_heads_q),
                                                    at<float>(layout.sum), tensors, stream);
    }
    Parts all = parts(layout.all, merged_bytes(), transport.ranks());
    if (kind == Exchange::kAllToAll) {  // this rank's own part was not sent
      const Parts own = parts(
          mine() + static_cast<size_t>(transport.rank()) * static_cast<size_t>(merged_bytes()), 0,
          1);
      all.apart = transport.rank();
      all.apart_out = own.out;
      all.apart_lse = own.lse;
    }
    return MLA_ON_MACHINE(machine, launch_merge)(merged, all, tensors, stream);
  }
};

/// Which parts of a decode to do.
struct Work {
  bool plans = false, decodes = false, merges = false;
};

/// Memory that a caller lends: for plan and scratch apart, or `whole` for both.
struct Memory {
  Workspace plan = {}, scratch = {};
  const Workspace* whole = nullptr;
};

Status check_memory(const std::string& name, size_t needed, const Workspace& memory) {
  if (memory.bytes < needed) {
    return {StatusCode::kWorkspaceTooSmall, name + ".bytes = " + std::to_string(memory.bytes) +
                                                ", this decode needs " + std::to_string(needed)};
  }
  if (needed > 0 &&
      (memory.data == nullptr || reinterpret_cast<uintptr_t>(memory.data) % 16 != 0)) {
    return {StatusCode::kInvalidArgument, name + ".data is null or not 16-byte aligned"};
  }
  return {};
}

/// Checks what the work needs of it, and cuts a whole one in two.
Status take_memory(const WorkspaceBytes& needs, const Work& work, Memory* memory) {
  if (memory->whole != nullptr) {
    MLA_RETURN_IF_ERROR(check_memory("workspace", needs.total(), *memory->whole));
    memory->plan = needs.plan_in(*memory->whole);
    memory->scratch = needs.scratch_in(*memory->whole);
    return {};
  }
  MLA_RETURN_IF_ERROR(check_memory("plan", needs.plan, memory->plan));
  return work.decodes ? check_memory("scratch", needs.scratch, memory->scratch) : Status();
}

Status work_as_rank(const Stage& stage, const Problem& problem, Tensors tensors,
                    const ParallelSettings& settings, Transport& transport, Memory memory,
                    const Work& work, Stream stream) {
  Slices slices;
  MLA_RETURN_IF_ERROR(find_slices(stage, problem, settings, transport.ranks(), &slices));
  MLA_RETURN_IF_ERROR(check_tensors(problem, settings, transport.ranks(), &tensors));
  MLA_RETURN_IF_ERROR(take_memory(slices.bytes, work, &memory));
  if (problem.batch == 0) return {};
  if (transport.ranks() == 1) {  // nothing to cut, exchange or merge
    if (work.plans) {
      MLA_RETURN_IF_ERROR(plan_decode(stage, problem, tensors.seqlens_k, memory.plan, stream));
    }
    if (!work.decodes) return {};
    return decode_planned(stage, problem, tensors, memory.plan, memory.scratch, stream);
  }
  std::string why_not;
  Machine* machine = find_machine(stage.machine, &why_not);
  if (machine == nullptr) return {StatusCode::kUnavailable, why_not};
  std::vector<Rank> ranks;
  for (const Layout& layout : slices.layouts) {
    ranks.push_back({stage, layout, from_sequence(tensors, layout.first), *machine, transport,
                     static_cast<char*>(memory.plan.data),
                     Workspace{memory.scratch.data, slices.stage_scratch}, stream});
  }
  for (const Rank& rank : ranks) {
    if (work.plans) MLA_RETURN_IF_ERROR(rank.plan(settings));
    if (work.decodes) MLA_RETURN_IF_ERROR(rank.decode_share(settings));
    if (work.decodes || work.merges) MLA_RETURN_IF_ERROR(rank.mark(RankPhase::kWait));
    if (work.merges) MLA_RETURN_IF_ERROR(rank.exchange(settings.exchange));
  }
  if (!work.merges) return {};
  MLA_RETURN_IF_ERROR(transport.join(stream));
  for (const Rank& rank : ranks) MLA_RETURN_IF_ERROR(rank.merge(settings.exchange));
  return transport.mark(RankPhase::kDone, stream);
}

Status work_or_fail(const Stage& stage, const Problem& problem, const Tensors& tensors,
                    const ParallelSettings& settings, Transport& transport, const Memory& memory,
                    const Work& work, Stream stream) {
  const Status status =
      work_as_rank(stage, problem, tensors, settings, transport, memory, work, stream);
  if (!status.ok()) transport.fail(status);  // the others wait for this rank
  return status;
}

}  // namespace

int count_slices(const Problem& problem, const ParallelSettings& settings) {
  return std::clamp(settings.slices, 1, std::max(1, problem.batch));
}

Status parallel_workspace_bytes(const Stage& stage, const Problem& problem,
                                const ParallelSettings& settings, int ranks,
                                WorkspaceBytes* bytes) {
  Slices slices;
  MLA_RETURN_IF_ERROR(find_slices(stage, problem, settings, ranks, &slices));
  *bytes = slices.bytes;
  return {};
}

Status parallel_workspace_bytes(const Stage& stage, const Problem& problem,
                                const ParallelSettings& settings, int ranks, size_t* bytes) {
  WorkspaceBytes both;
  MLA_RETURN_IF_ERROR(parallel_workspace_bytes(stage, problem, settings, ranks, &both));
  *bytes = both.total();
  return {};
}

Status decode_parallel(const Stage& stage, const Problem& problem, const Tensors& tensors,
                       const ParallelSettings& settings, Transport& transport,
                       const Workspace& workspace, Stream stream) {
  return work_or_fail(stage, problem, tensors, settings, transport, {.whole = &workspace},
                      {.plans = true, .decodes = true, .merges = true}, stream);
}

Status plan_parallel(const Stage& stage, const Problem& problem, const Tensors& tensors,
                     const ParallelSettings& settings, Transport& transport, const Workspace& plan,
                     Stream stream) {
  return work_or_fail(stage, problem, tensors, settings, transport, {.plan = plan}, {.plans = true},
                      stream);
}

Status decode_parallel_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                               const ParallelSettings& settings, Transport& transport,
                               const Workspace& plan, const Workspace& scratch, Stream stream) {
  return work_or_fail(stage, problem, tensors, settings, transport,
                      {.plan = plan, .scratch = scratch}, {.decodes = true, .merges = true},
                      stream);
}

Status decode_share(const Stage& stage, const Problem& problem, const Tensors& tensors,
                    const ParallelSettings& settings, Transport& transport,
                    const Workspace& workspace, Stream stream) {
  return work_or_fail(stage, problem, tensors, settings, transport, {.whole = &workspace},
                      {.plans = true, .decodes = true}, stream);
}

Status merge_shares(const Stage& stage, const Problem& problem, const Tensors& tensors,
                    const ParallelSettings& settings, Transport& transport,
                    const Workspace& workspace, Stream stream) {
  return work_or_fail(stage, problem, tensors, settings, transport, {.whole = &workspace},
                      {.merges = true}, stream);
}

std::vector<Problem> decoded_problems(const Problem& problem, const ParallelSettings& settings,
                                      int ranks) {
  if (ranks == 1) return {problem};
  std::vector<Problem> decoded;
  const int count = count_slices(problem, settings);
  for (int slice = 0; slice < count; ++slice) {
    const Problem part = slice_of(problem, slice, count);
    decoded.push_back(bulk_of(part, settings, ranks));
    const Problem tail = tail_of(part, settings, ranks);
    if (tail.batch > 0) decoded.push_back(tail);
  }
  return decoded;
}

int64_t exchange_bytes(const Problem& problem, Exchange exchange, int ranks) {
  const ResultShape result = {problem.num_heads_q, int64_t{problem.batch} * problem.seqlen_q,
                              false};
  const int64_t all = result.heads * result.record_bytes();
  if (exchange == Exchange::kAllGather) return all;
  if (exchange == Exchange::kAllToAll) return all / ranks;
  const int64_t rows = problem.lse_elements();
  return (rows + rows / ranks * kHeadDimV) * int64_t{sizeof(float)};
}

}  // namespace mla
