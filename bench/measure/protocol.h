/// @file
/// The protocol of measuring: what cold and sustained mean, how often each is run, and what is too
/// slow to be run at all. docs/measuring.md says why; `mla_bench --list --json` prints it.
///
/// - Cold: one run after kFlushBytes of other data were read through the caches. All contenders
///   take turns, in rounds.
/// - Sustained: run after run without a pause, after Stage::sustained_warmup_s of the same work. One
///   contender after the other, because each would have to be warmed up anew.
#pragma once

#include <chrono>
#include <cstddef>
#include <limits>
#include <string>

namespace mla::bench {

enum class Mode { kCold, kSustained };
const char* to_string(Mode mode);

/// How often an operation is run.
struct RunCounts {
  int warmups = 0;         ///< Cold runs before the first round, not kept
  int rounds = 1;          ///< Over all contenders in turn
  int runs = 1;            ///< Per round; as many sustained ones as in all rounds together
  bool sustained = false;  ///< Whether there are sustained runs
};

/// How often what takes less than `below_us` is run.
struct RunClass {
  double below_us;
  RunCounts counts;
};

/// On a GPU. What takes longer than kOnceMicroseconds has no sustained runs, whatever this says.
inline constexpr RunClass kGpuRunClasses[] = {
    {1e3, {.warmups = 10, .rounds = 4, .runs = 25, .sustained = true}},
    {20e3, {.warmups = 2, .rounds = 4, .runs = 9, .sustained = true}},
    {std::numeric_limits<double>::infinity(),
     {.warmups = 0, .rounds = 4, .runs = 1, .sustained = true}}};

/// The counts of the class that an operation of this time belongs to.
RunCounts gpu_run_counts(double microseconds);
/// The GPU model knows no caches, no clocks and no power: cold is all it has.
RunCounts model_run_counts(double microseconds);

/// What is read before each cold run: far more than any L2.
inline constexpr size_t kFlushBytes = size_t{256} << 20;

/// How long a GPU rests before each turn of an operation whose runs take longer than kRestMicroseconds.
/// Without it, the operation would have the clocks that a heavy one before it left.
inline constexpr std::chrono::milliseconds kRest{15};
inline constexpr double kRestMicroseconds = 100;

/// A run that takes longer is shown once: 4 cold runs, no sustained ones.
inline constexpr double kOnceMicroseconds = 200e3;

/// What is predicted to take longer is left out, so that one stage cannot make a suite take an hour.
inline constexpr double kLeaveOutMicroseconds = 2e6;

}  // namespace mla::bench
