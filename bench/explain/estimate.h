/// @file
/// How long a decode will take: not a bound, but the time of its steps that wait for one another.
#pragma once

#include "bench/explain/explain.h"
#include "bench/measure/limits.h"

namespace mla::bench {

/// The steps of a decode by a plan, in s; kUnknown without ceilings.
///
/// Rates are the measured ceilings, the clock is that of the shared-memory ceiling. Blocks read and write
/// at the rate of the memory, shared out; but half of the multiprocessors can keep all of the memory busy
/// (as in OwnLimit), so that a block alone gets twice an even share.
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
  /// If there are parts: one load more to wait for, the parts, out.
  double combine = kUnknown;
  double seconds() const { return launch + first_tile + tiles + end + combine; }
};

/// Of one load that must be waited for, from device memory, in s. Not measured by itself; two such loads
/// less in stage 08 gained 0.6 to 1.4 us (its notes).
inline constexpr double kLoadLatency = 0.5e-6;
/// From the last block of a kernel to the first of the next in its stream, in s: 1 to 2 us on an H200.
inline constexpr double kNextKernel = 1.5e-6;

/// Of a stage of `input`, by the plan that it makes; nothing is known of one without a plan.
Estimate estimate_of(const StageFacts& stage, const ExplainInput& input);

}  // namespace mla::bench
