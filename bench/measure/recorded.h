/// @file
/// Results that were recorded, read back: what is explained and simulated from where nothing is measured.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bench/measure/limits.h"
#include "reference/cache_format.h"
#include "reference/status.h"

namespace mla::bench {

/// The schema of the results that mla_bench writes.
inline constexpr const char* kResultsSchema = "flashmla_stages/2";

/// One entry of a results file.
struct RecordedEntry {
  std::string stage;  ///< Slug
  std::string shape;  ///< As parse_shape() takes it
  std::string mode;   ///< "cold", "sustained", "plan", ...
  double us = kUnknown;
  std::map<std::string, double> counters;  ///< "p10_us", "tokens", ...
};

/// A results file of mla_bench.
struct Recorded {
  std::string file;
  std::map<std::string, std::string> context;
  Ceilings ceilings;
  int multiprocessors = 0;             ///< 0: not known
  std::vector<RecordedEntry> entries;  ///< Those with a time, in the file's order
  /// Null if there is none.
  const RecordedEntry* find(const std::string& stage, const std::string& shape,
                            const std::string& mode) const;
  /// "NVIDIA H200, commit 6e841ff, 2026-11-21": where the figures come from.
  std::string origin() const;
};

/// Reads what `mla_bench --out` wrote.
/// @return kFileError, saying what is wrong with the file; `recorded` is then untouched
Status load_recorded(const std::string& path, Recorded* recorded);

/// Reads the newest results of a GPU in `folder` (empty: the project's own bench/results) that hold
/// the shape "h128_q1_b64_k4096", of those that begin with the ladder's lowest rung: a recording of later
/// rungs alone does not stand for all.
/// @return kFileError if there are none
Status load_newest_recorded(Recorded* recorded, const std::string& folder = "");

/// Reads the newest results of a GPU in `folder` (empty: the project's own) that hold shapes with a cache of
/// this quantised format.
/// @return kFileError if there are none
Status load_newest_recorded_of(CacheFormat format, Recorded* recorded,
                               const std::string& folder = "");

/// Reads all results of a GPU in `folder` (empty: the project's own), the newest first.
std::vector<Recorded> load_all_recorded(const std::string& folder = "");

}  // namespace mla::bench
