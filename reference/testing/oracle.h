/// @file
/// A reference that is fast enough for the full list of cases on a GPU: plain fp64 kernels, one row
/// at a time, on the machine that holds the tensors. oracle_test checks it against the Eigen
/// reference.
#pragma once

#include <span>

#include "reference/attention.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// Decodes `rows` (all heads of each), in double, on the machine that holds `tensors`, whose out
/// and lse are ignored.
/// @param machine  where the tensors are
/// @param problem  what to decode
/// @param tensors  as for a decode
/// @param rows     which rows; each must be in the batch
/// @param result   on the host: out [rows, num_heads_q, 512], lse [rows, num_heads_q], in the
///                 order of `rows`
/// @return validate()'s errors, or the machine's.
Status oracle_decode(Machine& machine, const Problem& problem, const Tensors& tensors,
                     std::span<const QueryRow> rows, ReferenceResult* result);

/// The same for every row, in the layout of reference_attention: lse is [batch, num_heads_q,
/// seqlen_q].
Status oracle_decode(Machine& machine, const Problem& problem, const Tensors& tensors,
                     ReferenceResult* result);

}  // namespace mla
