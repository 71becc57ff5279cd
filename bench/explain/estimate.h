/// @file
/// How long a decode will take: not a bound, but the time of its steps that wait for one another.
#pragma once

#include "bench/explain/explain.h"
#include "bench/measure/limits.h"

namespace mla::bench {

/// The steps of a decode by a plan, in s; kUnknown without ceilings.
///
/// Rates are the measured ceilings; the clock is the one at which the shared-memory ceiling was measured. Blocks
/// share the memory's rate evenly. But half of the multiprocessors can keep all of the memory busy (as in
/// OwnLimit), so a block gets at most twice an even share.
struct Estimate {
  double launch = kUnknown;  ///< An empty kernel.
  /// Four loads that wait for one another: the kernel's own instructions, which a cold run has to fetch, the
  /// plan, the block table, the first bytes; then Q and the first grain of every block.
  double first_tile = kUnknown;
  /// All grains of the busiest multiprocessor, by Prediction::grain_clocks or the largest limit; or all
  /// other bytes of the cache, and then the last grain's work.
  double tiles = kUnknown;
  double end = kUnknown;  ///< O written: parts in fp32, or out.
  /// A second kernel, which begins when the last block has ended, and fetches its instructions and the plan.
  /// If there are parts, also: one more load to wait for, the parts, out.
  double combine = kUnknown;
  double seconds() const { return launch + first_tile + tiles + end + combine; }
};

/// Time of one load from device memory that must be waited for, in s. It was not measured by itself: with two
/// such loads less, stage 08 took 0.6 to 1.4 us less (its notes).
inline constexpr double kLoadLatency = 0.5e-6;
/// From the last block of a kernel to the first of the next in its stream, in s: 1 to 2 us on an H200.
inline constexpr double kNextKernel = 1.5e-6;

/// The estimate for a stage of `input`, by the plan that it makes; kUnknown for a stage without a plan.
Estimate estimate_of(const StageFacts& stage, const ExplainInput& input);

}  // namespace mla::bench
