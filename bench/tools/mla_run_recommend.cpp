// mla_run recommend: what to run for what is wanted, from records.
#include <cstdlib>
#include <iostream>

#include "bench/tools/mla_run.h"

namespace mla::bench {
namespace {

/// Reads "2GiB" or "50ms": a number and one of these units.
Status parse_quantity(const char* flag, const std::string& text,
                      const std::vector<std::pair<const char*, double>>& units, double* value) {
  if (text.empty()) return {};
  char* rest = nullptr;
  const double number = std::strtod(text.c_str(), &rest);
  std::string names;
  for (const auto& [name, factor] : units) {
    if (rest != text.c_str() && std::string(rest) == name) {
      *value = number * factor;
      return {};
    }
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return {StatusCode::kInvalidArgument, std::string(flag) + " " + text +
                                            " must be a number and one of " + names + ", as in 50" +
                                            units.front().first};
}

}  // namespace

int run_recommend(RecommendOptions options) {
  Status status =
      parse_quantity("--budget", options.budget, {{"GiB", 0x1p30}, {"MiB", 0x1p20}, {"GB", 1e9}},
                     &options.wish.budget_bytes);
  if (status.ok())
    status = parse_quantity("--p99", options.p99, {{"ms", 1}, {"us", 1e-3}, {"s", 1e3}},
                            &options.wish.step_ms);
  std::vector<Candidate> candidates;
  if (status.ok()) status = recommend(load_all_recorded(), options.wish, &candidates);
  if (!status.ok()) return refuse(status);
  std::cout << describe(options.wish, candidates);
  return candidates.front().why_not.empty() ? kRight : kWrong;
}

}  // namespace mla::bench
