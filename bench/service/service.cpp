#include "bench/service/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

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
      if (token.last()) last_.erase(last);
    }
  }
  void write(Figures* figures) const {
    figures->tokens = count_;
    if (figures->span > 0) figures->tokens_per_s = static_cast<double>(count_) / figures->span;
    figures->token_ms_mean = mean(between_);
    figures->token_ms_p50 = quantile(between_, 0.5);
    figures->token_ms_p99 = quantile(between_, 0.99);
    figures->first_token_ms_p50 = quantile(first_, 0.5);
    figures->first_token_ms_p99 = quantile(first_, 0.99);
  }

 private:
  int64_t count_ = 0;
  std::unordered_map<int64_t, double> last_;
  std::vector<double> first_, between_;  // ms
};

/// Tokens of a request of mean lengths that has half of its output.
int32_t length_half_way(const Workload& workload, const SchedulerLimits& limits) {
  const double context = workload.prompt.mean + workload.output.mean / 2;
  return static_cast<int32_t>(
      std::clamp(std::ceil(context), 1.0, static_cast<double>(limits.max_length)));
}

}  // namespace

Status run_service(const RunLimits& limits, std::span<const Request> under_way,
                   RequestStream stream, Scheduler& scheduler, Engine& engine, Figures* figures) {
  if (!(limits.seconds > 0) || (std::isinf(limits.seconds) && limits.requests < 0)) {
    return {StatusCode::kInvalidArgument,
            "a run needs a time above 0, or a number of requests, after which it ends"};
  }
  Ledger ledger(scheduler);
  TokenClock clock;
  std::vector<double> step_ms;
  double batches = 0;
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
    MLA_RETURN_IF_ERROR(scheduler.begin_step(&work));
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
              fmt::format("a step took {} s, which is no time", seconds)};
    }
    arrive_until(ledger.now() + seconds);
    MLA_RETURN_IF_ERROR(scheduler.end_step(&tokens));
    clock.generated(tokens, ledger.now());
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
  *figures = result;
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
