#include "bench/measure/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla::bench {

double quantile(std::vector<double> samples, double q) {
  if (samples.empty()) return kUnknown;
  std::sort(samples.begin(), samples.end());
  const double place = q * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<size_t>(std::floor(place));
  const size_t above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (place - std::floor(place)) * (samples[above] - samples[below]);
}

Summary summarize(const std::vector<double>& samples) {
  Summary summary{quantile(samples, 0.5), quantile(samples, 0.1), quantile(samples, 0.9),
                  static_cast<int>(samples.size())};
  const auto n = static_cast<double>(samples.size());
  if (samples.empty()) return summary;
  summary.mean = std::accumulate(samples.begin(), samples.end(), 0.0) / n;
  if (samples.size() == 1) return summary;
  double squares = 0;
  for (const double sample : samples) {
    squares += (sample - summary.mean) * (sample - summary.mean);
  }
  summary.variance = squares / (n - 1);
  return summary;
}

}  // namespace mla::bench
