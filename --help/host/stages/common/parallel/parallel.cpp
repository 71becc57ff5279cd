namespace mla { extern int mutant; }
#include "stages/common/parallel/parallel.h"

#include <algorithm>
#include <limits>
#include <string>

#include "stages/common/parallel/parallel_kernels.h"

namespace mla {

const char* to_string(Exchange exchange) {
  return exchange == Exchange::kAllGather  ? "all_gather"
         : exchange == Exchange::kAllToAll ? "all_to_all"
                                           : "reduce_scatter";
}

namespace {

/// The problems that make up a rank's decode, and where its memory has what.
struct Layout {
  Problem bulk;    ///< Tokens that every query token sees.
  Problem tail;    ///< The others: every query token is a sequence. Of batch 0 if there are none.
  Problem merged;  ///< The heads that this rank's outputs have.
  int64_t tokens = 0, rows = 0;  ///< Query tokens of all sequences; these times heads.

  /// Offsets into the workspace, in bytes. Results are [num_heads_q, tokens, ...], so that those of a
  /// rank's heads are one piece.
  size_t bulk_lengths = 0, tail_lengths = 0, tail_table = 0;
  size_t part_out = 0, part_lse = 0;  ///< [2, rows, ...] bulk and tail, if there is a tail
  size_t mine_out = 0, mine_lse = 0;  ///< [rows, ...] this rank's result
  size_t all_out = 0, all_lse = 0;    ///< what was received
  size_t weighted = 0, sum = 0;       ///< fp32, of kReduceScatter
  size_t stage = 0, stage_bytes = 0;
  size_t total = 0;
};

Status at_least_one(const char* name, int value) {
  if (value >= 1) return {};
  return {StatusCode::kInvalidArgument,
          std::string(name) + " = " + std::to_string(value) + " must be at least 1"};
}

Status find_layout(const Stage& stage, const Problem& problem, const ParallelSettings& settings,
                   int ranks, Layout* layout) {
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(at_least_one("ranks", ranks));
  { if (::mla::mutant == 719) {  } else { MLA_RETURN_IF_ERROR(at_least_one("pages_per_turn", settings.pages_per_turn)); } }
  const bool by_heads = settings.exchange != Exchange::kAllGather;
  if ((::mla::mutant == 720 ? (false) : (by_heads && problem.num_heads_q % ranks != 0))) {
    return {StatusCode::kInvalidArgument,
            std::string(to_string(settings.exchange)) +
                ": num_heads_q = " + std::to_string(problem.num_heads_q) +
                " must be a multiple of ranks = " + std::to_string(ranks)};
  }
  layout->tokens = int64_t{problem.batch} * problem.seqlen_q;
  layout->rows = layout->tokens * problem.num_heads_q;
  if (layout->tokens > std::numeric_limits<int>::max()) {
    return {StatusCode::kInvalidArgument,
            "batch * seqlen_q = " + std::to_string(layout->tokens) + " must be less than 2^31"};
  }
  layout->bulk = problem;
  { if (::mla::mutant == 705) {  } else { layout->bulk.causal = false; } }
  layout->bulk.max_pages_per_seq =
      share_columns(problem.max_pages_per_seq, ranks, settings.pages_per_turn);
  layout->tail = layout->bulk;
  layout->tail.batch = 0;
  layout->tail.seqlen_q = 1;
  if ((::mla::mutant == 707 ? (false) : (problem.causal && problem.seqlen_q > 1))) {
    // The last query token sees seqlen_q - 1 tokens more than the first, and up to a page less one lies
    // before them in their first page.
    layout->tail.batch = static_cast<int>(layout->tokens);
    layout->tail.max_pages_per_seq = static_cast<int>(
        pages_for((::mla::mutant == 706 ? (int64_t{problem.seqlen_q} - 1) : (int64_t{problem.seqlen_q} - 1 + problem.page_size - 1)), problem.page_size));
  }
  layout->merged = problem;
  layout->merged.num_heads_kv = 1;  // heads are rows here
  if (by_heads) layout->merged.num_heads_q /= ranks;

  WorkspaceBytes bulk_bytes, tail_bytes;
  MLA_RETURN_IF_ERROR(workspace_bytes(stage, layout->bulk, &bulk_bytes));
  MLA_RETURN_IF_ERROR(workspace_bytes(stage, layout->tail, &tail_bytes));

  const auto take = [&](int64_t elements, size_t size) {
    const size_t begin = layout->total;
    layout->total += (static_cast<size_t>(elements) * size + 15) / 16 * 16;
    return begin;
  };
  constexpr size_t kOutBytes = kHeadDimV * sizeof(uint16_t);
  const int64_t rows = layout->rows, received = layout->merged.lse_elements() * ranks;
  layout->bulk_lengths = take(problem.batch, sizeof(int32_t));
  if (layout->tail.batch > 0) {
    layout->tail_lengths = take(layout->tokens, sizeof(int32_t));
    layout->tail_table = take(layout->tail.block_table_elements(), sizeof(int32_t));
    layout->part_out = take(2 * rows, kOutBytes);
    layout->part_lse = take(2 * rows, sizeof(float));
  }
  layout->mine_out = take(rows, kOutBytes);
  layout->mine_lse = take(rows, sizeof(float));
  if (settings.exchange == Exchange::kReduceScatter) {
    layout->all_lse = take(rows * ranks, sizeof(float));
    layout->weighted = take(rows, kHeadDimV * sizeof(float));
    layout->sum = take(rows / ranks, kHeadDimV * sizeof(float));
  } else {
    layout->all_out = take(received, kOutBytes);
    layout->all_lse = take(received, sizeof(float));
  }
  layout->stage_bytes = std::max(bulk_bytes.total(), (::mla::mutant == 708 ? (bulk_bytes.total()) : (tail_bytes.total())));
  layout->stage = take(static_cast<int64_t>(layout->stage_bytes), 1);
  return {};
}

Status check_tensors(const Layout& layout, const Problem& problem, const Tensors& tensors) {
  Tensors in = tensors, out = tensors;
  in.out_strides = in.lse_strides = {};
  MLA_RETURN_IF_ERROR(validate(layout.bulk, in));
  out.q_strides = {};
  out.kv_strides = {};
  out.block_table_stride = kContiguous;
  { if (::mla::mutant == 718) {  } else { MLA_RETURN_IF_ERROR(validate(layout.merged, out)); } }
  const RowStrides q = with_strides(layout.bulk, tensors).q_strides;
  if (layout.tail.batch > 0 && problem.batch > 1 && (::mla::mutant == 717 ? (false) : (q.batch != problem.seqlen_q * q.token))) {
    return {StatusCode::kInvalidArgument, "q_strides.batch = " + std::to_string(q.batch) +
                                              " must be seqlen_q * q_strides.token = " +
                                              std::to_string(problem.seqlen_q * q.token) +
                                              " for a causal decode"};
  }
  return {};
}

/// One rank's decode, once its arguments are checked.
struct Rank {
  const Stage& stage;
  const Problem& problem;
  const Tensors& tensors;
  const Layout& layout;
  Machine& machine;
  Transport& transport;
  char* memory;
  Stream stream;

  template <typename T = void>
  T* at(size_t offset) const {
    return static_cast<T*>(static_cast<void*>(memory + offset));
  }

  /// Lets `out` and `lse` be those of part `part` of [parts, num_heads_q, tokens, ...].
  void write_to(size_t out, size_t lse, int part, int64_t tokens_per_sequence, Tensors* to) const {
    to->out = at<char>(out) + part * layout.rows * kHeadDimV * int64_t{sizeof(uint16_t)};
    to->lse = at<float>(lse) + part * layout.rows;
    to->out_strides = {tokens_per_sequence * kHeadDimV, kHeadDimV, layout.tokens * kHeadDimV};
    to->lse_strides = {tokens_per_sequence, 1, layout.tokens};
  }

  Parts parts(size_t out, size_t lse, int64_t rows, int count) const {
    return {at(out), at<float>(lse), rows * kHeadDimV, rows, count};
  }

  /// This rank's result over the tokens that it holds.
  Status decode_share(const ContextShare& share) const {
    const Workspace stage_memory = {memory + layout.stage, layout.stage_bytes};
    const bool has_tail = layout.tail.batch > 0;
    RankLengths lengths;
    lengths.bulk = at<int32_t>(layout.bulk_lengths);
    if (has_tail) {
      lengths.tail = at<int32_t>(layout.tail_lengths);
      lengths.tail_table = at<int32_t>(layout.tail_table);
      lengths.tail_columns = layout.tail.max_pages_per_seq;
    }
    MLA_RETURN_IF_ERROR(MLA_ON_MACHINE(machine, launch_cut)(
        problem, with_strides(layout.bulk, tensors), share, lengths, stream));

    Tensors bulk = tensors;
    bulk.seqlens_k = lengths.bulk;
    write_to(layout.mine_out, layout.mine_lse, 0, problem.seqlen_q, &bulk);
    if (!has_tail) return decode(stage, layout.bulk, bulk, stage_memory, stream);

    const Tensors mine = bulk;
    write_to(layout.part_out, layout.part_lse, 0, problem.seqlen_q, &bulk);
    MLA_RETURN_IF_ERROR(decode(stage, layout.bulk, bulk, stage_memory, stream));
    Tensors tail = with_strides(layout.bulk, tensors);  // those of the cache stay
    { if (::mla::mutant == 711) {  } else { tail.q_strides.batch = tail.q_strides.token; } }
    tail.block_table = lengths.tail_table;
    tail.block_table_stride = kContiguous;
    tail.seqlens_k = lengths.tail;
    write_to(layout.part_out, layout.part_lse, (::mla::mutant == 709 ? (0) : (1)), (::mla::mutant == 710 ? (problem.seqlen_q) : (1)), &tail);
    MLA_RETURN_IF_ERROR(decode(stage, layout.tail, tail, stage_memory, stream));
    return MLA_ON_MACHINE(machine, launch_merge)(
        problem, parts(layout.part_out, layout.part_lse, layout.rows, 2), mine, stream);
  }

  /// All ranks' results are made one.
  Status merge(Exchange exchange) const {
    const Problem& merged = layout.merged;
    const int ranks = transport.ranks();
    const Tensors to = with_strides(merged, tensors);
    const int64_t rows = merged.lse_elements();  // of one rank's heads, or of all
    const size_t out_bytes = static_cast<size_t>(rows) * kHeadDimV * sizeof(uint16_t);
    const size_t lse_bytes = static_cast<size_t>(rows) * sizeof(float);
    void *out = at(layout.mine_out), *lse = at(layout.mine_lse);
    void *all_out = at(layout.all_out), *all_lse = at(layout.all_lse);
    if (exchange == Exchange::kReduceScatter) {
      const Parts all = {out, at<float>(layout.all_lse), 0, layout.rows, ranks};
      Parts of_heads = all;
      { if (::mla::mutant == 712) {  } else { of_heads.lse += rows * transport.rank(); } }
      auto *weighted = at<float>(layout.weighted), *sum = at<float>(layout.sum);
      MLA_RETURN_IF_ERROR(transport.all_gather(
          lse, all_lse, static_cast<size_t>(layout.rows) * sizeof(float), stream));
      MLA_RETURN_IF_ERROR(
          MLA_ON_MACHINE(machine, launch_weigh)(problem, all, transport.rank(), weighted, stream));
      MLA_RETURN_IF_ERROR(
          transport.reduce_scatter(weighted, sum, static_cast<size_t>(rows) * kHeadDimV, stream));
      return MLA_ON_MACHINE(machine, launch_finish)(merged, of_heads, sum, to, stream);
    }
    if (exchange == Exchange::kAllGather) {
      MLA_RETURN_IF_ERROR(transport.all_gather(out, all_out, out_bytes, stream));
      MLA_RETURN_IF_ERROR(transport.all_gather(lse, all_lse, lse_bytes, stream));
    } else {
      MLA_RETURN_IF_ERROR(transport.all_to_all(out, all_out, out_bytes, stream));
      MLA_RETURN_IF_ERROR(transport.all_to_all(lse, all_lse, lse_bytes, stream));
    }
    return MLA_ON_MACHINE(machine, launch_merge)(
        merged, parts(layout.all_out, layout.all_lse, rows, ranks), to, stream);
  }
};

Status decode_rank(const Stage& stage, const Problem& problem, const Tensors& tensors,
                   const ParallelSettings& settings, Transport& transport,
                   const Workspace& workspace, Stream stream) {
  Layout layout;
  MLA_RETURN_IF_ERROR(find_layout(stage, problem, settings, transport.ranks(), &layout));
  MLA_RETURN_IF_ERROR(check_tensors(layout, problem, tensors));
  if ((::mla::mutant == 715 ? (false) : (workspace.bytes < layout.total))) {
    return {StatusCode::kWorkspaceTooSmall, "workspace.bytes = " + std::to_string(workspace.bytes) +
                                                ", this decode needs " +
                                                std::to_string(layout.total)};
  }
  if (layout.total > 0 &&
      (workspace.data == nullptr || (::mla::mutant == 716 ? (false) : (reinterpret_cast<uintptr_t>(workspace.data) % 16 != 0)))) {
    return {StatusCode::kInvalidArgument, "workspace.data is null or not 16-byte aligned"};
  }
  if (problem.batch == 0) return {};
  std::string why_not;
  Machine* machine = find_machine(stage.machine, &why_not);
  if (machine == nullptr) return {StatusCode::kUnavailable, why_not};
  const Rank rank{
      stage, problem, tensors, layout, *machine, transport, static_cast<char*>(workspace.data),
      stream};
  MLA_RETURN_IF_ERROR(
      rank.decode_share({(::mla::mutant == 713 ? (0) : (transport.rank())), transport.ranks(), settings.pages_per_turn}));
  return rank.merge(settings.exchange);
}

}  // namespace

Status parallel_workspace_bytes(const Stage& stage, const Problem& problem,
                                const ParallelSettings& settings, int ranks, size_t* bytes) {
  Layout layout;
  MLA_RETURN_IF_ERROR(find_layout(stage, problem, settings, ranks, &layout));
  *bytes = layout.total;
  return {};
}

Status decode_parallel(const Stage& stage, const Problem& problem, const Tensors& tensors,
                       const ParallelSettings& settings, Transport& transport,
                       const Workspace& workspace, Stream stream) {
  const Status status =
      decode_rank(stage, problem, tensors, settings, transport, workspace, stream);
  { if (::mla::mutant == 714) {  } else { if (!status.ok()) transport.fail(status); } }  // the others wait for this rank
  return status;
}

}  // namespace mla
