/// @file
/// How blocks that share a sequence merge its parts without a second kernel: each writes its part and
/// arrives; the last to arrive has all parts before it, and merges them. Nobody waits.
#pragma once

#include "stages/common/ptx/ptx.h"
#include "stages/common/split/workspace.h"

namespace mla::MLA_MACHINE {

/// One thread of a block calls this, after a barrier that all of the block's stores came before. Returns
/// whether all `pieces` have now arrived; their parts may then be read, after one more barrier.
///
/// The word counts in its low 8 bits, and is 0 again after the last. Before the first it may hold
/// anything: a word whose other bits are not those of this call counts nothing.
__device__ __forceinline__ bool arrive_last(uint64_t* word, uint64_t call, int pieces) {
  uint64_t expected = 0;
  while (true) {
    const uint64_t arrived = (expected & ~uint64_t{0xff}) == call ? expected : call;
    const uint64_t last = static_cast<uint64_t>(pieces);
    const bool is_last = (arrived & 0xff) + 1 == last;
    const uint64_t found = ptx::atom_cas_acq_rel(word, expected, is_last ? 0 : arrived + 1);
    if (found == expected) return is_last;
    expected = found;
  }
}

}  // namespace mla::MLA_MACHINE
