#include "bench/measure/sampler.h"

namespace mla::bench {

void sample(Runner& runner, GoogleBenchmark& google, std::span<Contender> contenders,
            const std::function<void(const std::string&)>& progress) {
  std::vector<RunCounts> counts;
  for (Contender& contender : contenders) {
    contender.once = contender.expected_us > kOnceMicroseconds;
    counts.push_back(runner.run_counts(contender.expected_us));
  }
  // Runs `step`, unless the contender dropped out or the device is gone.
  const auto attempt = [&](Contender& contender, const std::string& what, auto&& step) -> Status {
    if (!contender.status.ok()) return contender.status;
    if (runner.lost()) {
      return {StatusCode::kUnavailable,
              "not run, because the device was lost in another stage's run"};
    }
    progress(what);
    return step();
  };
  for (size_t i = 0; i < contenders.size(); ++i) {
    Contender& contender = contenders[i];
    if (!google.is_chosen(contender.cold_name)) continue;
    contender.status = attempt(contender, contender.cold_name + ": warm-up", [&] {
      std::vector<double> unused;
      return runner.run_cold(contender.handle, counts[i].warmups, &unused);
    });
  }
  std::vector<GoogleRun> cold;
  for (size_t i = 0; i < contenders.size(); ++i) {
    Contender* one = &contenders[i];
    const auto measure = [&, one](int runs, std::vector<double>* us) {
      return attempt(*one, one->cold_name, [&] {
        runner.rest(one->expected_us);
        return runner.run_cold(one->handle, runs, us);
      });
    };
    cold.push_back({one->cold_name, counts[i].runs, counts[i].rounds, measure, one->per_iteration,
                    &one->cold});
  }
  const std::vector<Status> statuses = google.run(cold);
  for (size_t i = 0; i < contenders.size(); ++i) {
    if (contenders[i].status.ok()) contenders[i].status = statuses[i];
  }
  for (size_t i = 0; i < contenders.size(); ++i) {
    Contender& contender = contenders[i];
    const bool due = counts[i].sustained && !contender.once && !contender.sustained_name.empty();
    if (!due || !contender.status.ok()) continue;
    const auto measure = [&](int runs, std::vector<double>* us) {
      return attempt(contender, contender.sustained_name, [&] {
        return runner.run_sustained(contender.handle, contender.expected_us,
                                    contender.sustained_warmup_s, runs, us, &contender.readings);
      });
    };
    // In one round: another would cost another warm-up, and without it the clocks would recover.
    const GoogleRun sustained{contender.sustained_name,
                              counts[i].rounds * counts[i].runs,
                              1,
                              measure,
                              contender.per_iteration,
                              &contender.sustained};
    contender.status = google.run({&sustained, 1}).front();
  }
  for (Contender& contender : contenders) {
    if (contender.status.ok()) continue;
    contender.cold.clear();
    contender.sustained.clear();
  }
}

}  // namespace mla::bench
