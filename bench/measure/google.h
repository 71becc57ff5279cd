/// @file
/// Figures as Google Benchmark's entries and its JSON: what every program of the bench writes.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "bench/measure/present.h"

namespace mla::bench {

/// One entry of the JSON: its time in us, or why it has none.
struct GoogleEntry {
  std::string name;  ///< "stage/shape/cold"
  double us = 0;
  std::map<std::string, double> counters;  ///< kUnknown ones are left out
  std::string label;
  std::string why_not;  ///< Empty, or the error that takes the place of a time
};

/// Every result as entries "stage/shape/cold", ".../sustained", ".../plan", ".../combine" (medians) and
/// ".../error" (no time).
std::vector<GoogleEntry> google_entries(const std::vector<ShapeResult>& results,
                                        MachineKind machine);

/// Runs entries as benchmarks of Google Benchmark, whose manual time is theirs. `arguments` are the
/// library's own (--benchmark_...), after the program's name; `out` is the JSON file, or empty;
/// `show`: also print the library's own listing. False if it rejects an argument.
bool run_google_benchmark(const std::vector<GoogleEntry>& entries, const Context& context,
                          std::vector<std::string> arguments, const std::string& out, bool show);

}  // namespace mla::bench
