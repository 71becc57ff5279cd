/// @file
/// The check of what only device memory knows: lengths against the block table, page ids against
/// the cache.
#pragma once

#include "reference/problem.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// Runs one small kernel over `seqlens_k` and the used slots of `block_table`, waits for it, all in the order of `stream`, and
/// reports the first offender by sequence and slot.
/// @param machine  where the tensors live
/// @return kOutOfRange with the value and what is allowed; validate()'s errors for a bad problem
Status check_paging(Machine& machine, const Problem& problem, const int32_t* block_table,
                    const int32_t* seqlens_k, Stream stream = nullptr);

}  // namespace mla
