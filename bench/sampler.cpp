#include "bench/sampler.h"

#include <algorithm>
#include <cstdlib>

namespace mla::bench {

double sustained_warmup_seconds(const std::string& stage) {
  return std::atoi(stage.c_str()) >= 5 ? 1.2 : 0.2;
}

void sample(Runner& runner, std::span<Contender> contenders,
            const std::function<void(const std::string&)>& progress) {
  std::vector<Plan> plans;
  std::vector<std::vector<double>> clocks(contenders.size());
  int rounds = 0;
  for (Contender& contender : contenders) {
    contender.once = contender.expected_us > kOnceMicroseconds;
    plans.push_back(runner.plan(contender.expected_us));
    if (contender.once || contender.only_cold) plans.back().sustained = false;
    rounds = std::max(rounds, plans.back().rounds);
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
    contender.status = step(contender, plans[i]);
  };
  const auto in_rounds = [&](const std::string& what, auto&& step) {
    for (int round = 0; round < rounds; ++round) {
      const std::string text =
          what + " round " + std::to_string(round + 1) + " of " + std::to_string(rounds);
      for (size_t i = 0; i < contenders.size(); ++i) {
        if (round < plans[i].rounds) attempt(i, text, step(i));
      }
    }
  };

  for (size_t i = 0; i < contenders.size(); ++i) {
    attempt(i, "warm-up", [&](Contender& contender, const Plan& plan) -> Status {
      std::vector<double> unused;
      return runner.run_cold(contender.handle, plan.warmups, &unused);
    });
  }
  in_rounds("cold", [&](size_t) {
    return [&](Contender& contender, const Plan& plan) -> Status {
      return runner.run_cold(contender.handle, plan.runs, &contender.cold);
    };
  });
  in_rounds("sustained", [&](size_t i) {
    return [&, i](Contender& contender, const Plan& plan) -> Status {
      if (!plan.sustained) return {};
      return runner.run_sustained(contender.handle, contender.expected_us,
                                  contender.sustained_warmup_s, plan.runs, &contender.sustained,
                                  &clocks[i].emplace_back(kUnknown));
    };
  });
  for (size_t i = 0; i < contenders.size(); ++i) {
    if (!contenders[i].status.ok()) {
      contenders[i].cold.clear();
      contenders[i].sustained.clear();
    }
    contenders[i].sustained_sm_mhz = quantile(clocks[i], 0.5);
  }
}

}  // namespace mla::bench
