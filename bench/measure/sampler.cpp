#include "bench/measure/sampler.h"

#include <algorithm>

namespace mla::bench {

void sample(Runner& runner, std::span<Contender> contenders,
            const std::function<void(const std::string&)>& progress) {
  std::vector<RunCounts> counts;
  int rounds = 0;
  for (Contender& contender : contenders) {
    contender.once = contender.expected_us > kOnceMicroseconds;
    counts.push_back(runner.run_counts(contender.expected_us));
    if (contender.once || contender.only_cold) counts.back().sustained = false;
    rounds = std::max(rounds, counts.back().rounds);
  }
  // Runs `step` of contender i, unless it dropped out or the device is gone.
  const auto attempt = [&](size_t i, const std::string& what, auto&& step) {
    Contender& contender = contenders[i];
    if (!contender.status.ok()) return;
    if (runner.lost()) {
      contender.status = {StatusCode::kUnavailable, "the device was lost in another stage's run"};
      return;
    }
    progress(contender.name + ": " + what);
    contender.status = step(contender, counts[i]);
  };
  for (size_t i = 0; i < contenders.size(); ++i) {
    attempt(i, "warm-up", [&](Contender& contender, const RunCounts& due) -> Status {
      std::vector<double> unused;
      return runner.run_cold(contender.handle, due.warmups, &unused);
    });
  }
  for (int round = 0; round < rounds; ++round) {
    const std::string what =
        "cold round " + std::to_string(round + 1) + " of " + std::to_string(rounds);
    for (size_t i = 0; i < contenders.size(); ++i) {
      if (round >= counts[i].rounds) continue;
      attempt(i, what, [&](Contender& contender, const RunCounts& due) {
        return runner.run_cold(contender.handle, due.runs, &contender.cold);
      });
    }
  }
  for (size_t i = 0; i < contenders.size(); ++i) {
    if (!counts[i].sustained) continue;
    attempt(i, "sustained", [&](Contender& contender, const RunCounts& due) {
      return runner.run_sustained(contender.handle, contender.expected_us,
                                  contender.sustained_warmup_s, due.rounds * due.runs,
                                  &contender.sustained, &contender.readings);
    });
  }
  for (Contender& contender : contenders) {
    if (contender.status.ok()) continue;
    contender.cold.clear();
    contender.sustained.clear();
  }
}

}  // namespace mla::bench
