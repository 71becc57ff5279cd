/// @file
/// The order of runs: which contender runs when, how often, and what is kept.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "bench/runner.h"

namespace mla::bench {

/// A run that takes longer is shown once: 4 cold runs, no sustained ones.
inline constexpr double kOnceMicroseconds = 200e3;

/// One operation to be timed against others, and its samples.
struct Contender {
  std::string name;
  int handle = 0;
  double expected_us = 0;              ///< Of a run made before, not the first
  double sustained_warmup_s = 0.2;     ///< 1.2 from stage 05 on
  std::vector<double> cold;            ///< us, in the order taken
  std::vector<double> sustained;       ///< us, in the order taken; empty if none were due
  double sustained_sm_mhz = kUnknown;  ///< Median of the rounds
  bool once = false;                   ///< Over kOnceMicroseconds
  Status status;                       ///< Not ok: it dropped out, and has no samples
};

/// Warm-ups, then interleaved rounds (A, B, A, B, ...) of cold runs, then of sustained ones, as
/// many as `runner` plans for each contender's expected time. Calls `progress` before each step.
void sample(Runner& runner, std::span<Contender> contenders,
            const std::function<void(const std::string&)>& progress);

}  // namespace mla::bench
