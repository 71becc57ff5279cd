/// @file
/// Two configurations against each other on the same requests, and a new stage that takes over in steps.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "bench/service/report.h"

namespace mla::bench {

/// What pairs of measurements say of a ratio: the mean of other / base - 1, and half of the interval that
/// holds the true one 95 times of 100, by Student's t. It takes pairs to be independent: each pair has requests
/// of its own, the same ones on both sides.
struct PairedDifference {
  int pairs = 0;
  double mean = kUnknown;
  double half_width = kUnknown;  ///< Unknown of fewer than two pairs
  /// Whether 0 is outside the interval.
  bool is_told() const;
};
PairedDifference paired_difference(std::span<const double> base, std::span<const double> other);

/// A row for each figure, with both means, their difference and a verdict; then the verdict by mean time between
/// tokens in a sentence. `base[i]` and `other[i]` served the same requests.
std::string compare_pairs(const std::string& base_name, std::span<const ServiceRun> base,
                          const std::string& other_name, std::span<const ServiceRun> other,
                          const std::string& clock);

/// A part of a rollout: two services, each with a device of its own, to which a part of the requests goes.
struct RolloutPhase {
  double share = 0;  ///< Of the requests, that go to the new stage
  Figures old_stage, new_stage;
};

/// Serves the requests whose draw is in [from, to) by the new stage or the old one.
using ServePart = std::function<Status(bool by_new, double from, double to, Figures* figures)>;

/// Phase by phase while the new stage raises no alert. If it does, a last phase of share 0 follows: the new stage
/// is rolled back.
/// @param shares  rising, above 0, at most 1
Status run_rollout(std::span<const double> shares, const ServePart& serve,
                   std::vector<RolloutPhase>* phases);

/// A row for each phase and stage, then what came of it in a sentence.
std::string describe_rollout(const std::string& old_name, const std::string& new_name,
                             std::span<const RolloutPhase> phases, const std::string& clock);

}  // namespace mla::bench
