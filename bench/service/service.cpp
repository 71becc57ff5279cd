#include "bench/service/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace mla::bench {
namespace {

double mean(const std::vector<double>& samples) {
  if (samples.empty()) return kUnknown;
  return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
}

/// The virtual clock, and integrals over it.
class Ledger {
 public:
  explicit Ledger(const Scheduler& scheduler) : scheduler_(scheduler) {}
  double now() const { return now_; }

  void advance_to(double time) {
    const double seconds = time - now_;
    const Holding holding = scheduler_.holding();
    const auto rows = static_cast<double>(holding.pages * kDefaultPageSize);
    queue_ += seconds * static_cast<double>(scheduler_.counts().queued);
    pages_ += seconds * static_cast<double>(holding.pages);
    rows_ += seconds * rows;
    empty_rows_ += seconds * (rows - static_cast<double>(holding.tokens));
    now_ = time;
  }
  void look() {
    queue_max_ = std::max(queue_max_, scheduler_.counts().queued);
    pages_peak_ = std::max(pages_peak_, scheduler_.holding().pages);
  }
  void write(Figures* figures) const {
    figures->span = now_;
    figures->queue_max = queue_max_;
    figures->pages_peak = pages_peak_;
    if (now_ > 0) {
      figures->queue_mean = queue_ / now_;
      figures->pages_mean = pages_ / now_;
    }
    if (rows_ > 0) figures->waste_share = empty_rows_ / rows_;
  }

 private:
  const Scheduler& scheduler_;
  double now_ = 0;
  double queue_ = 0, pages_ = 0, rows_ = 0, empty_rows_ = 0;  // times s
  int64_t queue_max_ = 0, pages_peak_ = 0;
};

/// Latencies of tokens.
class TokenClock {
 public:
  void generated(const std::vector<GeneratedToken>& tokens, double now) {
    for (const GeneratedToken& token : tokens) {
      ++count_;
      const auto [last, is_first] = last_.try_emplace(token.request.id, 0.0);
      if (is_first && token.request.generated == 1) {
        first_.push_back(1e3 * (now - token.request.arrival));
      } else {
        between_.push_back(1e3 * (now - last->second));  // under way at the beginning: since then
      }
      last->second = now;
      if (!token.last()) continue;
      last_.erase(last);
      if (token.request.arrival >= 0) whole_.push_back(1e3 * (now - token.request.arrival));
    }
  }
  /// Those since the last call, of a window.
  std::span<const double> fresh() {
    const std::span<const double> all(between_);
    return all.subspan(std::exchange(reported_, between_.size()));
  }
  void write(Figures* figures) const {
    figures->tokens = count_;
    if (figures->span > 0) figures->tokens_per_s = static_cast<double>(count_) / figures->span;
    figures->token_ms_mean = mean(between_);
    figures->token_ms_p50 = quantile(between_, 0.5);
    figures->token_ms_p99 = quantile(between_, 0.99);
    figures->first_token_ms_p50 = quantile(first_, 0.5);
    figures->first_token_ms_p99 = quantile(first_, 0.99);
    figures->requests_timed = static_cast<int64_t>(whole_.size());
    figures->request_ms_mean = mean(whole_);
    figures->request_ms_p50 = quantile(whole_, 0.5);
    if (figures->requests_timed >= kSamplesOfP99) figures->request_ms_p99 = quantile(whole_, 0.99);
  }

 private:
  int64_t count_ = 0;
  std::unordered_map<int64_t, double> last_;
  std::vector<double> first_, between_, whole_;  // ms
  size_t reported_ = 0;
};

/// Looks at the end of every window whether a threshold has been passed.
class Watch {
 public:
  Watch(const RunLimits& limits, const Scheduler& scheduler)
      : thresholds_(limits.thresholds), window_(limits.window), scheduler_(scheduler) {}

  void look(double now, TokenClock* clock) {
    const SchedulerLimits& limits = scheduler_.limits();
    queue_ = std::max(queue_, static_cast<double>(scheduler_.counts().queued));
    pages_ = std::max(pages_, static_cast<double>(scheduler_.holding().pages) / limits.num_pages);
    if (now < end_ + window_) return;
    end_ = window_ * std::floor(now / window_);
    const auto fresh = clock->fresh();
    const std::vector<double> tokens(fresh.begin(), fresh.end());
    compare("token mean, ms", mean(tokens), thresholds_.token_ms_mean);
    compare("token p99, ms", quantile(tokens, 0.99), thresholds_.token_ms_p99);
    compare("queue", std::exchange(queue_, 0), thresholds_.queue);
    compare("share of pages held", std::exchange(pages_, 0), thresholds_.pages_share);
  }
  std::vector<Alert> alerts() && { return std::move(alerts_); }

 private:
  void compare(const char* what, double value, double threshold) {
    if (value > threshold) alerts_.push_back({end_, what, value, threshold});
  }
  Thresholds thresholds_;
  double window_;
  const Scheduler& scheduler_;
  double end_ = 0, queue_ = 0, pages_ = 0;
  std::vector<Alert> alerts_;
};

/// Tokens of a request of mean lengths that has half of its output.
int32_t length_half_way(const Workload& workload, const SchedulerLimits& limits) {
  const double context = workload.prompt_mean() + workload.output.mean / 2;
  return static_cast<int32_t>(
      std::clamp(std::ceil(context), 1.0, static_cast<double>(limits.max_length)));
}

}  // namespace

Status run_service(const RunLimits& limits, std::span<const Request> under_way,
                   RequestStream stream, Scheduler& scheduler, Engine& engine, Figures* figures) {
  if (!(limits.seconds > 0) || (std::isinf(limits.seconds) && limits.requests < 0)) {
    return {StatusCode::kInvalidArgument,
            "a run needs a time above 0 or a number of requests, after which it ends"};
  }
  if (!(limits.window > 0)) {
    return {StatusCode::kInvalidArgument, "a window of alerts must be longer than 0 s"};
  }
  Ledger ledger(scheduler);
  TokenClock clock;
  Watch watch(limits, scheduler);
  std::vector<double> step_ms;
  double batches = 0;
  double ending = 0;  // s that the books of the step before took on the host
  int64_t left = limits.requests;
  const auto arrive_until = [&](double time) {
    while (left != 0 && stream.peek().arrival <= time) {
      ledger.advance_to(stream.peek().arrival);
      scheduler.arrive(stream.take());
      ledger.look();
      if (left > 0) --left;
    }
    ledger.advance_to(time);
  };

  for (const Request& request : under_way) scheduler.resume(request);
  StepWork work;
  std::vector<GeneratedToken> tokens;
  while (ledger.now() < limits.seconds) {
    if (limits.stop != nullptr && *limits.stop) return {StatusCode::kUnavailable, "interrupted"};
    const auto scheduling = WallClock::now();
    MLA_RETURN_IF_ERROR(scheduler.begin_step(&work));
    const double host_seconds = ending + seconds_since(scheduling);
    ledger.look();
    if (work.empty()) {
      if (left == 0) break;
      arrive_until(std::min(stream.peek().arrival, limits.seconds));
      continue;
    }
    double seconds = 0;
    MLA_RETURN_IF_ERROR(engine.step(work, &seconds));
    if (!(seconds > 0) || std::isinf(seconds)) {
      return {StatusCode::kInvalidArgument,
              fmt::format("a step took {} s, which is no possible time", seconds)};
    }
    if (engine.counts_host_time()) seconds += host_seconds;
    arrive_until(ledger.now() + seconds);
    const auto ended = WallClock::now();
    MLA_RETURN_IF_ERROR(scheduler.end_step(&tokens));
    ending = seconds_since(ended);
    clock.generated(tokens, ledger.now());
    watch.look(ledger.now(), &clock);
    step_ms.push_back(1e3 * seconds);
    batches += static_cast<double>(tokens.size());
  }

  Figures result;
  result.counts = scheduler.counts();
  result.pages_total = scheduler.limits().num_pages;
  result.steps = static_cast<int64_t>(step_ms.size());
  if (!step_ms.empty()) result.batch_mean = batches / static_cast<double>(step_ms.size());
  result.step_ms_mean = mean(step_ms);
  result.step_ms_p50 = quantile(step_ms, 0.5);
  result.step_ms_p99 = quantile(step_ms, 0.99);
  ledger.write(&result);
  clock.write(&result);
  if (result.span > 0) {
    result.busy_share = 1e-3 * std::accumulate(step_ms.begin(), step_ms.end(), 0.0) / result.span;
  }
  result.alerts = std::move(watch).alerts();
  *figures = std::move(result);
  return {};
}

Status warm_up(Engine& engine) {
  const int32_t page = 0;
  StepWork work;
  work.sequences.push_back({0, 0, 1, 1, {&page, 1}});
  double seconds = 0;
  return engine.step(work, &seconds);
}

int64_t most_half_way(const Workload& workload, const SchedulerLimits& limits) {
  const int32_t length = length_half_way(workload, limits);
  const int64_t pages = std::min<int64_t>(pages_for(length, kDefaultPageSize), limits.num_pages);
  return std::clamp<int64_t>(limits.num_pages / pages, 1, limits.max_batch);
}

Status population_in_balance(const Workload& workload, const SchedulerLimits& limits,
                             Engine& engine, int64_t* population) {
  const int32_t length = length_half_way(workload, limits);
  const int64_t pages = std::min<int64_t>(pages_for(length, kDefaultPageSize), limits.num_pages);
  const int64_t most = most_half_way(workload, limits);
  std::vector<int32_t> all(static_cast<size_t>(limits.num_pages));
  std::iota(all.begin(), all.end(), 0);
  const auto gains = [&](int64_t batch, bool* enough) -> Status {
    StepWork work;
    for (int64_t i = 0; i < batch; ++i) {
      const int32_t decoded = std::min(length, static_cast<int32_t>(pages * kDefaultPageSize));
      work.sequences.push_back(
          {i, decoded - 1, 1, decoded,
           std::span(all).subspan(static_cast<size_t>(i * pages), static_cast<size_t>(pages))});
    }
    double seconds = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {  // the first is a warm-up
      MLA_RETURN_IF_ERROR(engine.step(work, &seconds));
    }
    *enough = static_cast<double>(batch) >= workload.rate * workload.output.mean * seconds;
    return {};
  };
  bool enough = false;
  int64_t low = 0, high = 1;  // low is too few
  while (true) {
    MLA_RETURN_IF_ERROR(gains(high, &enough));
    if (enough || high == most) break;
    low = high;
    high = std::min(2 * high, most);
  }
  while (enough && high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    bool middle_is = false;
    MLA_RETURN_IF_ERROR(gains(middle, &middle_is));
    (middle_is ? high : low) = middle;
  }
  *population = high;
  return {};
}

}  // namespace mla::bench
