/// @file
/// Runs as a table and as JSON.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "bench/service/scenarios.h"
#include "bench/service/service.h"

namespace mla::bench {

/// One scenario, served in one way.
struct ServiceRun {
  Scenario scenario;
  std::string way;  ///< "paged", "unshared" (paged, every prompt whole) or "static"
  std::string stage;
  Figures figures;
  Thresholds targets{};
  double price_per_hour = kUnknown;  ///< Of a GPU, in any currency
  /// In the same currency; unknown without a price.
  double cost_per_1000_tokens() const {
    return price_per_hour * scenario.ranks / 3600 * 1000 / figures.tokens_per_s;
  }
  /// What a GPU was recorded to do with the same scenario, way, stage and seed, by the names that
  /// write_runs() gives; empty if nothing is recorded or the clock is no simulated one.
  std::map<std::string, double> recorded{};
};

/// The schema of the results that mla_service writes.
inline constexpr const char* kServiceSchema = "flashmla_stages/service/1";

/// Recorded runs of a service on a GPU.
struct RecordedService {
  struct Run {
    std::string scenario, way, stage;
    std::string cache_format;  ///< "16bit" where the file says none
    std::map<std::string, double> figures;
  };
  std::string origin;
  uint64_t seed = 0;
  std::vector<Run> runs;
  /// Null if there is none.
  const Run* find(const Scenario& scenario, const std::string& way, const std::string& stage) const;
};

/// The newest recording in `folder` of a GPU that served this scenario from caches of its format; one without
/// runs if there is none.
RecordedService load_newest_service(const std::string& folder, const Scenario& scenario);

/// The runs of one scenario side by side, and each over the one before it. Behind a figure of which
/// a recording is known is the clock's error. Below: what the ratios consist of, and what the
/// errors are errors of.
/// @param recording  where the recorded figures come from; empty: the clock is no simulated one
/// @param clock  "simulated clock": printed in the header, so that no figure travels without it
std::string compare_runs(const std::vector<ServiceRun>& runs, const std::string& clock,
                         const std::string& recording);

/// One scenario with several cache formats: a row for each run, ways first, and over the first format's run of
/// the same way. Empty for fewer than two formats.
/// @param clock  as above
std::string compare_formats(const std::vector<ServiceRun>& runs, const std::string& clock);

/// What a scenario's memory holds in its format, and in others: a row for each.
std::string compare_memory(const std::vector<Scenario>& scenarios);

/// Writes "flashmla_stages/service/1": context, and runs with their figures. Unknown figures are
/// null.
/// @return kFileError
Status write_runs(const std::string& path, const Context& context,
                  const std::vector<ServiceRun>& runs);

}  // namespace mla::bench
