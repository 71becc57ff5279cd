/// @file
/// The check of what only device memory knows: lengths against the block table, page ids against
/// the cache.
#pragma once

#include "reference/problem.h"
#include "stages/common/cache/context_share.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// Checks `seqlens_k`, and the entries of `block_table` that they use, with one small kernel in the
/// order of `stream`. Waits for it, and reports the first error by sequence and entry.
/// @param block_table_stride  as in Tensors
/// @return kOutOfRange with the value and what is allowed; kInvalidArgument for a null pointer;
/// validate()'s errors for a bad problem; the machine's errors.
Status check_paging(Machine& machine, const Problem& problem, const int32_t* block_table,
                    const int32_t* seqlens_k, Stream stream = nullptr,
                    int64_t block_table_stride = kContiguous);

/// The same for one rank's share of every sequence: whole lengths, and the rank's own table and cache.
/// @param problem      max_pages_per_seq is that of a whole sequence, num_pages the rank's own
/// @param block_table  with share_columns() columns
/// @param first_ranks  [batch], in device memory, or null; see ContextShare::begun_by()
/// @return also kInvalidArgument for a share that cannot be
Status check_paging(Machine& machine, const Problem& problem, const ContextShare& share,
                    const int32_t* block_table, const int32_t* seqlens_k, Stream stream = nullptr,
                    int64_t block_table_stride = kContiguous, const int32_t* first_ranks = nullptr);

}  // namespace mla
