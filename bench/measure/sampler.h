/// @file
/// The order of runs: which contender runs when, and what is kept.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "bench/measure/google.h"
#include "bench/measure/runner.h"

namespace mla::bench {

/// One operation to be timed against others, and its samples.
struct Contender {
  std::string cold_name;       ///< Its benchmark's
  std::string sustained_name;  ///< Likewise; empty: no sustained runs
  int handle = 0;
  double expected_us = 0;                            ///< Of a run made before, not the first
  double sustained_warmup_s = 0.2;                   ///< Stage::sustained_warmup_s
  std::map<std::string, double> per_iteration = {};  ///< As GoogleRun has it
  std::vector<double> cold;                          ///< us, in the order taken
  std::vector<double> sustained;  ///< us, in the order taken; empty if none were due
  Readings readings;              ///< Of the sustained runs
  bool once = false;              ///< Over kOnceMicroseconds
  Status status;                  ///< Not ok: it dropped out, and has no samples
};

/// Warm-ups, then rounds of cold runs, in which contenders take turns as the library draws them, then
/// each contender's sustained ones in a round of their own, as often as the runner says for its expected time. Only what is
/// chosen runs. Calls `progress` before each step.
void sample(Runner& runner, GoogleBenchmark& google, std::span<Contender> contenders,
            const std::function<void(const std::string&)>& progress);

}  // namespace mla::bench
