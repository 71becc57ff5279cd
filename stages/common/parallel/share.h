/// @file
/// Which rank holds what: a share of every sequence's pages (context parallel, context_share.h), a share of
/// the heads (tensor parallel).
#pragma once

#include "reference/problem.h"
#include "reference/status.h"
#include "stages/common/cache/context_share.h"

namespace mla {

/// One rank's share of the heads. Heads need nothing of each other: a rank decodes the problem with its own
/// heads, and no result is exchanged.
///
/// Both together: the ranks that have the same share of the heads form a group of their own, with a
/// transport of their own, in which they share the pages.
struct HeadShare {
  int first_q = 0, num_q = 0;    ///< Query heads.
  int first_kv = 0, num_kv = 0;  ///< The KV heads that these read.
};

/// The share of rank `rank` of `ranks`. KV heads are shared, too, or where there are fewer than ranks, each
/// is held by equally many: with one KV head, as in DeepSeek's models, every rank has the whole cache.
/// @param problem  with all heads; validate() accepts it
/// @return kInvalidArgument for a rank outside 0 ... ranks - 1; if ranks do not divide num_heads_q; or if
///         neither of ranks and num_heads_kv divides the other
Status share_heads(const Problem& problem, int rank, int ranks, HeadShare* share);

}  // namespace mla
