/// @file
/// Runs as a table and as JSON.
#pragma once

#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "bench/service/scenarios.h"
#include "bench/service/service.h"

namespace mla::bench {

/// One scenario, served in one way.
struct ServiceRun {
  Scenario scenario;
  std::string way;  ///< "paged" or "static"
  std::string stage;
  Figures figures;
};

/// The ways of one scenario side by side; with two of them, the second over the first.
/// @param clock  "simulated clock": printed in the header, so that no figure travels without it
std::string compare_runs(const std::vector<ServiceRun>& runs, const std::string& clock);

/// Writes "flashmla_stages/service/1": context, and runs with their figures. Unknown figures are
/// null.
/// @return kFileError
Status write_runs(const std::string& path, const Context& context,
                  const std::vector<ServiceRun>& runs);

}  // namespace mla::bench
