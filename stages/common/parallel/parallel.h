/// @file
/// A decode whose cache lies on several ranks (context parallel): each decodes the tokens that it holds,
/// with any stage, and the results are merged by their lse. docs/parallel.md explains it.
#pragma once

#include <vector>

#include "stages/common/parallel/share.h"
#include "stages/common/parallel/transport.h"
#include "stages/common/stage.h"

namespace mla {

/// How the ranks' results become one.
enum class Exchange {
  kAllGather,  ///< Every rank gets all results and merges all rows: out and lse of all heads everywhere.
  /// Every rank gets the results of its share of the heads, and merges these: rank r of n has heads
  /// r * num_heads_q / n and on.
  kAllToAll,
  /// As kAllToAll, but every rank weighs its result by all ranks' lse, and the transport adds up, in fp32.
  kReduceScatter,
};
/// All of them.
inline constexpr Exchange kExchanges[] = {Exchange::kAllGather, Exchange::kAllToAll,
                                          Exchange::kReduceScatter};
/// "all_gather", "all_to_all", "reduce_scatter"
constexpr const char* to_string(Exchange exchange) {
  return exchange == Exchange::kAllGather  ? "all_gather"
         : exchange == Exchange::kAllToAll ? "all_to_all"
                                           : "reduce_scatter";
}

/// How a decode is shared among ranks. The same on all of them.
struct ParallelSettings {
  int pages_per_turn = 1;  ///< See ContextShare.
  Exchange exchange = Exchange::kAllGather;
  /// Into how many slices the batch is cut, >= 1: while one is exchanged the next is decoded, where the
  /// transport has a stream of its own. No more than there are sequences.
  int slices = 1;
  /// [batch], in device memory: the rank with which each sequence's turns begin, see ContextShare::begun_by().
  /// Null: rank 0 for all. Its values are the same on all ranks.
  const int32_t* first_ranks = nullptr;
  /// Each rank says itself which tokens it holds: tensors.seqlens_k are the lengths of its own part of every
  /// sequence, whichever pages these are, and its table is [batch, max_pages_per_seq]. Then pages_per_turn is not
  /// read. Not with a mask over several query tokens, which would need to know the pages' places.
  bool own_lengths = false;
};

/// Bytes of memory that a rank's decode needs beside its tensors, on the device where the stage runs. By shapes
/// alone, and the same for all ranks.
/// @param problem  as for decode_parallel()
/// @param ranks    >= 1
/// @return kInvalidArgument for a problem that validate() refuses, ranks, pages_per_turn or slices below 1,
///         num_heads_q that ranks do not divide where the exchange is by heads, own lengths under a mask, or
///         batch * seqlen_q past 32 bits; workspace_bytes()'s errors for the stage
Status parallel_workspace_bytes(const Stage& stage, const Problem& problem,
                                const ParallelSettings& settings, int ranks, WorkspaceBytes* bytes);
/// Their total alone: what decode_parallel() asks for.
Status parallel_workspace_bytes(const Stage& stage, const Problem& problem,
                                const ParallelSettings& settings, int ranks, size_t* bytes);

/// One rank's part of a decode: all ranks of the transport call it. A row that sees no token on any rank
/// gets out = 0 and lse = +inf. Repeatable to the bit for the same number of ranks, with kReduceScatter if
/// the transport's sum is; with kAllGather the same on all of them. One rank alone decodes as decode()
/// does, to the bit. No host synchronisation; asynchronous as decode() where the transport is: wait for the
/// results by Transport::wait(). May be captured in a CUDA graph, after one decode that was not: its first
/// exchange connects the ranks.
///
/// `problem` and `tensors` are the same on all ranks but for the cache:
/// - problem.max_pages_per_seq is that of a whole sequence, tensors.seqlens_k are whole lengths; or with
///   settings.own_lengths both are the rank's own, and the first is the same on all ranks;
/// - problem.num_pages, tensors.kv_cache and tensors.block_table are the rank's own. Its table is
///   [batch, share_columns()], and column c names the page that holds the sequence's page
///   ContextShare::page_in(c), of the share begun_by() the sequence's first rank. A rank without a token needs
///   a page all the same: it is not read;
/// - tensors.out and tensors.lse are of all heads with kAllGather, else of num_heads_q / ranks.
///
/// Tensors may have strides, but where problem.causal and seqlen_q > 1 the query tokens of all sequences
/// must be equally far apart in q: q_strides.batch = seqlen_q * q_strides.token.
///
/// @param workspace  parallel_workspace_bytes() or more, 16-byte aligned
/// @return parallel_workspace_bytes()'s, validate()'s and decode()'s errors, kWorkspaceTooSmall, the
///         transport's. On any, the other ranks get a status, too, and what out and lse hold is not defined
Status decode_parallel(const Stage& stage, const Problem& problem, const Tensors& tensors,
                       const ParallelSettings& settings, Transport& transport,
                       const Workspace& workspace, Stream stream = nullptr);

/// @name The plan of decode_parallel(), and the rest
/// One plan can serve several decodes of the same lengths and the same block table, for example those of all layers of
/// a model. Arguments, errors and bits are those of decode_parallel().
/// @{

/// Finds which tokens this rank decodes, and plans the decodes of these. Asks nothing of the transport; of the tensors
/// lengths and block table are read, and all are checked.
/// @param plan  WorkspaceBytes::plan of parallel_workspace_bytes() or more, 16-byte aligned
Status plan_parallel(const Stage& stage, const Problem& problem, const Tensors& tensors,
                     const ParallelSettings& settings, Transport& transport, const Workspace& plan,
                     Stream stream = nullptr);
/// Decodes by the plan, which must have been made on this rank for the same problem, settings, lengths and table: with
/// others, or with none, the results are wrong.
/// @param plan     as plan_parallel() left it; only read
/// @param scratch  WorkspaceBytes::scratch or more, 16-byte aligned
Status decode_parallel_planned(const Stage& stage, const Problem& problem, const Tensors& tensors,
                               const ParallelSettings& settings, Transport& transport,
                               const Workspace& plan, const Workspace& scratch,
                               Stream stream = nullptr);
/// @}

/// @name What a rank does alone, and with the others
/// For programs that time them. Arguments and errors are those of decode_parallel().
/// @{

/// Plans, and decodes this rank's tokens: the result is in the workspace. Asks nothing of the transport.
Status decode_share(const Stage& stage, const Problem& problem, const Tensors& tensors,
                    const ParallelSettings& settings, Transport& transport,
                    const Workspace& workspace, Stream stream = nullptr);
/// Exchanges what decode_share() left there, and merges it.
Status merge_shares(const Stage& stage, const Problem& problem, const Tensors& tensors,
                    const ParallelSettings& settings, Transport& transport,
                    const Workspace& workspace, Stream stream = nullptr);
/// Into how many slices several ranks cut the batch.
int count_slices(const Problem& problem, const ParallelSettings& settings);
/// What the stage decodes for a rank: of every slice the tokens that every query token sees, then the others, if there
/// are any. Of one rank the problem itself.
std::vector<Problem> decoded_problems(const Problem& problem, const ParallelSettings& settings,
                                      int ranks);
/// Bytes that a rank sends to each other rank, without what collectives add.
int64_t exchange_bytes(const Problem& problem, Exchange exchange, int ranks);
/// @}

}  // namespace mla
