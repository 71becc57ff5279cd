/// @file
/// How blocks of one decode tell each other that something is there: flags in scratch memory, which
/// nobody initialises.
///
/// A flag is raised if it holds the number of the decode, which the host draws anew for each. So what an
/// earlier decode left, or another on another stream in its own scratch, raises nothing; nor does
/// whatever the memory held before, except by a chance of 1 in 2^64 per flag. A graph that is replayed
/// has its number again: so whoever has seen a flag raised lowers it.
///
/// A block that waits keeps its multiprocessor. All blocks must be resident at once
/// (launch_cooperative()), and none may wait for one that waits for it.
#pragma once

#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE {

/// The flags of a decode, as its kernel gets them.
struct RaisedFlags {
  uint64_t* flags;  ///< Null: there are none, and nobody raises or waits.
  uint64_t number;  ///< Of the decode: draw_number() (workspace.h).

  /// Raises a flag: after what it tells of, by one thread behind a barrier of those that wrote it.
  __device__ __forceinline__ void raise(unsigned flag) const {
    ptx::st_release(flags + flag, number);
  }
  /// Waits until a flag is raised. Called by one thread; the others come behind a barrier.
  __device__ __forceinline__ void wait(unsigned flag) const {
    while (ptx::ld_acquire(flags + flag) != number) {
    }
  }
  /// Lowers a flag that the calling thread has waited for.
  __device__ __forceinline__ void lower(unsigned flag) const { flags[flag] = 0; }
};

}  // namespace mla::MLA_MACHINE
