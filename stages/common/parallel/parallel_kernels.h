/// @file
/// The kernels of a parallel decode, as its host code calls them.
#pragma once

#include "stages/common/machine/machine.h"
#include "stages/common/parallel/share.h"

namespace mla {

/// What a rank decodes of a batch, in device memory.
struct RankLengths {
  int32_t* bulk = nullptr;  ///< [batch] Tokens that every query token sees.
  /// @name Where query tokens see different tokens; else null
  /// @{
  int32_t* tail = nullptr;  ///< [batch, seqlen_q] Tokens past those that the query token sees.
  int32_t* tail_table = nullptr;  ///< [batch, seqlen_q, tail_columns] The pages of these.
  int tail_columns = 0;
  /// @}
};

/// Results over disjoint sets of tokens, head by head: out [parts, heads, tokens, 512], lse
/// [parts, heads, tokens], where `tokens` are the query tokens of all sequences. Both have strides, in
/// elements, from one part to the next and from head to head.
struct Parts {
  const void* out = nullptr;
  const float* lse = nullptr;
  int64_t out_stride = 0, lse_stride = 0;
  int64_t out_head = 0, lse_head = 0;
  int count = 0;
  /// A part that lies apart from the others; by default none.
  int apart = -1;
  const void* apart_out = nullptr;
  const float* apart_lse = nullptr;
};

#define MLA_PARALLEL_KERNELS                                                                         \
  /* What this rank decodes. `problem` is the whole one, the block table the rank's. */              \
  Status launch_cut(const Problem& problem, const Tensors& tensors, const SequenceShares& shares,    \
                    const RankLengths& lengths, Stream stream);                                      \
  /* Merges parts of `problem`'s heads into the tensors' out and lse. */                             \
  Status launch_merge(const Problem& problem, const Parts& parts, const Tensors& tensors,            \
                      Stream stream);                                                                \
  /* weighted [heads, tokens, 512] = part `mine` of out, which alone is there, times its weight    \
     among the parts of lse. */ \
  Status launch_weigh(const Problem& problem, const Parts& parts, int mine, float* weighted,         \
                      Stream stream);                                                                \
  /* Rounds sum [heads, tokens, 512] to the tensors' out, and merges the parts of lse. */            \
  Status launch_finish(const Problem& problem, const Parts& parts, const float* sum,                 \
                       const Tensors& tensors, Stream stream);

namespace gpu {
MLA_PARALLEL_KERNELS
}
namespace model {
MLA_PARALLEL_KERNELS
}
#undef MLA_PARALLEL_KERNELS

}  // namespace mla
