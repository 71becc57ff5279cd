/// @file
/// The work of a decode, what the device was measured to give, and the shares that follow.
#pragma once

#include <cstdint>
#include <string>

#include "bench/measure/protocol.h"
#include "bench/measure/statistics.h"
#include "reference/problem.h"
#include "stages/common/stage.h"

namespace mla::bench {

/// What a decode must do, whoever does it: the core of absorbed MLA, as the cost model has it.
struct Work {
  double flop = 0;   ///< 2 * s_q * h_q * sum(s_k) * (576 + 512); a causal mask is not deducted
  double bytes = 0;  ///< every cache row in its format, q and out once
  double intensity() const { return flop / bytes; }  ///< FLOP per byte
};
Work work_of(const Problem& problem, int64_t total_tokens);

/// Rates measured in the same run as the kernels, in SI units; kUnknown where not measured.
struct Ceilings {
  double read = kUnknown;              ///< B/s, 16-byte loads of a buffer far larger than L2
  double read_302mb = kUnknown;        ///< B/s, the same over 302 MB
  double fp32 = kUnknown;              ///< FLOP/s, FMA in registers
  double matrix_cold = kUnknown;       ///< FLOP/s, cuBLAS bf16 8192^3, one run at a time
  double matrix_sustained = kUnknown;  ///< FLOP/s, the same after 1.2 s back to back
  double shared = kUnknown;  ///< B/s, 16-byte loads from shared memory, all multiprocessors
  double shared_bytes_per_clock = kUnknown;  ///< The same, per clock and multiprocessor
  double launch = kUnknown;                  ///< s, a graph of one empty kernel
  std::string matrix_note;                   ///< Why there is no matrix rate, if there is none
};

/// Least time for the work in its parts, in s, the same for all stages; kUnknown without ceilings,
/// and its bound kNone.
struct Floor {
  enum class Bound { kNone, kMemory, kMatrix, kLaunch };
  double memory = kUnknown;  ///< Unique bytes at the read rate
  double matrix = kUnknown;  ///< FLOP at the matrix rate
  double launch = kUnknown;  ///< An empty kernel
  double seconds() const;    ///< max(memory, launch + matrix)
  /// Which side is the larger one; of launch + matrix, the larger of the two.
  Bound bound() const;
  double lead() const;  ///< seconds() over the other side
};
Floor floor_of(const Work& work, const Ceilings& ceilings, Mode mode);

/// The terms of a stage's own limit, in s; 0 for what it does not use. It is never below the floor.
struct OwnLimit {
  // The launch and the work; the work is divided by the share of the multiprocessors that have any.
  double fp32 = 0;
  double matrix = 0;
  double shared = 0;
  double dram = 0;           ///< Half of the multiprocessors can keep all of the memory busy
  double seconds() const;    ///< The largest; kUnknown if one that counts has no ceiling.
  const char* name() const;  ///< Which one is the largest.
};
/// `work`: what every design must do; the bytes count that a prediction leaves out, q and out.
OwnLimit own_limit(const Prediction& prediction, const Work& work, const Ceilings& ceilings,
                   Mode mode);

}  // namespace mla::bench
