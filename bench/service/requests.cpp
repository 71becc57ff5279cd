#include "bench/service/requests.h"

#include <algorithm>
#include <cmath>

#include "bench/measure/draws.h"
#include "bench/service/checks.h"

namespace mla::bench {
namespace {

constexpr double kLongest = 1e12;  // tokens: far beyond every limit, far below overflow

/// Where the draws of one kind begin.
uint64_t key_of(uint64_t seed, uint64_t kind) {
  return counter_random::mix(counter_random::mix(seed + counter_random::kStep) +
                             kind * counter_random::kStep);
}

/// @param biased  in proportion to the length: again log-normal, its logarithm's mean one variance
/// further
int64_t tokens(const TokenDistribution& distribution, double z, int64_t least,
               bool biased = false) {
  double value = distribution.mean;
  if (distribution.mean > 0 && distribution.sd > 0) {
    const double ratio = distribution.sd / distribution.mean;
    const double variance = std::log1p(ratio * ratio);
    value *= std::exp(std::sqrt(variance) * z + (biased ? variance / 2 : -variance / 2));
  }
  return std::max(least, static_cast<int64_t>(std::llround(std::min(value, kLongest))));
}

/// Puts one of the prefixes before the prompt of a request, the `index`th of its kind.
void add_prefix(const SharedPrefixes& prefixes, uint64_t key, int64_t index, Request* request) {
  if (prefixes.count == 0) return;
  const double drawn = uniform(key, index) * static_cast<double>(prefixes.count);
  request->prefix = std::min(static_cast<int64_t>(drawn), prefixes.count - 1);
  request->prefix_tokens = prefixes.tokens;
  request->prompt += prefixes.tokens;
}

}  // namespace

Status validate(const Workload& workload) {
  const auto check = [](const char* name, double value, double least) {
    const char* range = least == 0 ? "at least 0 and at most 1e12" : "at least 1 and at most 1e12";
    return check_number(name, value, value >= least && value <= kLongest, range);
  };
  MLA_RETURN_IF_ERROR(check_number("rate", workload.rate,
                                   workload.rate > 0 && workload.rate <= kLongest,
                                   "above 0 and at most 1e12"));
  MLA_RETURN_IF_ERROR(check("prompt mean", workload.prompt.mean, 0));
  MLA_RETURN_IF_ERROR(check("prompt sd", workload.prompt.sd, 0));
  MLA_RETURN_IF_ERROR(check("output mean", workload.output.mean, 1));
  MLA_RETURN_IF_ERROR(check_in("prefixes", workload.prefixes.count, 0, 1000000));
  MLA_RETURN_IF_ERROR(check_in("prefix tokens", workload.prefixes.tokens, 0, 1 << 30));
  return check("output sd", workload.output.sd, 0);
}

RequestStream::RequestStream(const Workload& workload, uint64_t seed, int64_t first_id, Part part)
    : workload_(workload), seed_(seed), key_(key_of(seed, 1)), first_id_(first_id), part_(part) {
  draw(0);
}

void RequestStream::draw(double after) {
  do {
    draw_any(after);
    after = next_.arrival;
  } while (!is_in_part());
}

/// Of the request drawn last: the same in every run, however the parts are cut.
bool RequestStream::is_in_part() const {
  const double drawn = uniform(key_of(seed_, 5), index_ - 1);
  return drawn >= part_.from && drawn < part_.to;
}

void RequestStream::draw_any(double after) {
  constexpr int64_t kDraws = 5;
  const int64_t first = index_ * kDraws;
  next_.id = first_id_ + index_++;
  next_.arrival = after - std::log(uniform(key_, first)) / workload_.rate;
  next_.prompt = tokens(workload_.prompt, normal(key_, first + 1), 0);
  next_.output = tokens(workload_.output, normal(key_, first + 3), 1);
  add_prefix(workload_.prefixes, key_of(seed_, 3), index_ - 1, &next_);
}

Request RequestStream::take() {
  const Request request = next_;
  draw(request.arrival);
  return request;
}

std::vector<Request> requests_under_way(const Workload& workload, int64_t count, uint64_t seed) {
  const uint64_t key = key_of(seed, 2);
  std::vector<Request> requests;
  for (int64_t i = 0; i < count; ++i) {
    constexpr int64_t kDraws = 5;
    Request request;
    request.id = i;
    request.prompt = tokens(workload.prompt, normal(key, kDraws * i), 0);
    add_prefix(workload.prefixes, key_of(seed, 4), i, &request);
    request.output = tokens(workload.output, normal(key, kDraws * i + 2), 1, true);
    const double progress = uniform(key, kDraws * i + 4) * static_cast<double>(request.output);
    request.generated = std::min(static_cast<int64_t>(progress), request.output - 1);
    requests.push_back(request);
  }
  // Those that began first stand first; how long ago matters to nothing else.
  std::stable_sort(requests.begin(), requests.end(),
                   [](const Request& a, const Request& b) { return a.generated > b.generated; });
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests[static_cast<size_t>(i)];
    request.id = i;
    request.arrival = request.generated > 0 ? static_cast<double>(i - count) * 1e-6 : 0;
  }
  return requests;
}

}  // namespace mla::bench
