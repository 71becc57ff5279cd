#include "bench/service/experiments.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>

#include "bench/measure/table.h"

namespace mla::bench {
namespace {

/// Student's t that is passed in either direction 5 times of 100, by degrees of freedom from 1 on.
double student_95(int freedom) {
  constexpr double kTable[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
                               2.262,  2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
                               2.110,  2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
                               2.060,  2.056, 2.052, 2.048, 2.045, 2.042};
  constexpr int kEntries = std::size(kTable);
  return kTable[std::min(freedom, kEntries) - 1];  // beyond it falls to 1.960: a little too wide
}

double mean_of(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

std::string signed_percent(double share) {
  return fmt::format("{:+.1f}%", 100 * share);
}

std::string alerts_of(const Figures& figures) {
  if (figures.alerts.empty()) return "none";
  const Alert& first = figures.alerts.front();
  return fmt::format("{}, the first at {:.1f} s: {} {} > {:g}", figures.alerts.size(), first.time,
                     first.what, number(first.value), first.threshold);
}

}  // namespace

bool PairedDifference::is_told() const {
  return std::abs(mean) > half_width;
}

PairedDifference paired_difference(std::span<const double> base, std::span<const double> other) {
  std::vector<double> differences;
  for (size_t i = 0; i < std::min(base.size(), other.size()); ++i) {
    const double difference = other[i] / base[i] - 1;
    if (std::isfinite(difference)) differences.push_back(difference);
  }
  PairedDifference result;
  result.pairs = static_cast<int>(differences.size());
  if (result.pairs == 0) return result;
  result.mean = mean_of(differences);
  if (result.pairs == 1) return result;
  double squares = 0;
  for (const double difference : differences) squares += std::pow(difference - result.mean, 2);
  const double deviation = std::sqrt(squares / (result.pairs - 1));
  result.half_width = student_95(result.pairs - 1) * deviation / std::sqrt(result.pairs);
  return result;
}

std::string compare_pairs(const std::string& base_name, std::span<const ServiceRun> base,
                          const std::string& other_name, std::span<const ServiceRun> other,
                          const std::string& clock) {
  struct Row {
    const char* title;
    double Figures::*figure;
    bool more_is_better;
  };
  constexpr Row kRows[] = {{"token to token, ms: mean", &Figures::token_ms_mean, false},
                           {"  p99", &Figures::token_ms_p99, false},
                           {"request, ms: mean", &Figures::request_ms_mean, false},
                           {"first token, ms: p50", &Figures::first_token_ms_p50, false},
                           {"step, ms: mean", &Figures::step_ms_mean, false},
                           {"tokens/s", &Figures::tokens_per_s, true},
                           {"energy per token, mJ", &Figures::energy_mj_per_token, false}};
  Table table(
      {"pairs of runs, " + clock, base_name, other_name, "difference", "95% interval", "better"});
  std::string sentence;
  for (const Row& row : kRows) {
    std::vector<double> a, b;
    for (const ServiceRun& run : base) a.push_back(run.figures.*row.figure);
    for (const ServiceRun& run : other) b.push_back(run.figures.*row.figure);
    const PairedDifference difference = paired_difference(a, b);
    if (difference.pairs == 0) continue;
    const double low = difference.mean - difference.half_width;
    const double high = difference.mean + difference.half_width;
    const bool other_wins = (difference.mean > 0) == row.more_is_better;
    const std::string better = !difference.is_told() ? "not told apart"
                               : other_wins          ? other_name
                                                     : base_name;
    table.add({row.title, number(mean_of(a)), number(mean_of(b)), signed_percent(difference.mean),
               std::isnan(low) ? "" : signed_percent(low) + " ... " + signed_percent(high),
               better});
    if (!sentence.empty()) continue;
    sentence = fmt::format(
        "{} pairs of runs, the same requests in both runs of a pair. By the mean time between "
        "tokens: ",
        difference.pairs);
    sentence += difference.is_told()
                    ? fmt::format("{} is better; the time of {} differs by {} ({} ... {})\n",
                                  better, other_name, signed_percent(difference.mean),
                                  signed_percent(low), signed_percent(high))
                    : "they are not told apart\n";
  }
  return table.to_string() + sentence;
}

Status run_rollout(std::span<const double> shares, const ServePart& serve,
                   std::vector<RolloutPhase>* phases) {
  phases->clear();
  for (const double share : shares) {
    RolloutPhase& phase = phases->emplace_back();
    phase.share = share;
    if (share < 1) MLA_RETURN_IF_ERROR(serve(false, share, 1, &phase.old_stage));
    MLA_RETURN_IF_ERROR(serve(true, 0, share, &phase.new_stage));
    if (phase.new_stage.alerts.empty()) continue;
    phases->emplace_back();
    return serve(false, 0, 1, &phases->back().old_stage);
  }
  return {};
}

std::string describe_rollout(const std::string& old_name, const std::string& new_name,
                             std::span<const RolloutPhase> phases, const std::string& clock) {
  Table table({"rollout, " + clock, "stage", "requests", "token to token, ms: mean", "p99",
               "request, ms", "alerts"});
  for (const RolloutPhase& phase : phases) {
    for (const bool by_new : {false, true}) {
      if (phase.share == (by_new ? 0 : 1)) continue;
      const Figures& figures = by_new ? phase.new_stage : phase.old_stage;
      table.add({fmt::format("{:.0f}% on {}", 100 * phase.share, new_name),
                 by_new ? new_name : old_name, std::to_string(figures.counts.arrived),
                 number(figures.token_ms_mean), number(figures.token_ms_p99),
                 number(figures.request_ms_mean), alerts_of(figures)});
    }
  }
  const bool rolled_back = !phases.empty() && phases.back().share == 0;
  const std::string end =
      !rolled_back ? fmt::format("{} serves all requests: it raised no alert.\n", new_name)
                   : fmt::format(
                         "{} was rolled back at {:.0f}%, because of alerts: {}. {} serves all "
                         "requests again.\n",
                         new_name, 100 * phases[phases.size() - 2].share,
                         alerts_of(phases[phases.size() - 2].new_stage), old_name);
  return table.to_string() + end;
}

}  // namespace mla::bench
