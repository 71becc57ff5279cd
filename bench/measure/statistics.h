/// @file
/// What is reported of a series of samples.
#pragma once

#include <chrono>
#include <limits>
#include <vector>

namespace mla::bench {

/// A figure that was not measured.
inline constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

using WallClock = std::chrono::steady_clock;
/// Wall time, in s.
inline double seconds_since(WallClock::time_point begin) {
  return std::chrono::duration<double>(WallClock::now() - begin).count();
}

/// Value below which the share `q` (0 ... 1) of the samples lies, linear between neighbours;
/// kUnknown of nothing.
double quantile(std::vector<double> samples, double q);

/// Middle and spread of a series.
struct Summary {
  double median = kUnknown;
  double p10 = kUnknown;
  double p90 = kUnknown;
  int n = 0;
  double mean = kUnknown;
  double variance = kUnknown;  ///< Of the samples, about their mean; of one sample unknown
};
Summary summarize(const std::vector<double>& samples);

}  // namespace mla::bench
