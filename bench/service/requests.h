/// @file
/// What users ask for: requests with their times of arrival, drawn from counters, so that a seed
/// gives the same ones everywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/status.h"

namespace mla::bench {

/// One request of a user.
struct Request {
  int64_t id = 0;             ///< Unique in a run, rising with the arrival.
  double arrival = 0;         ///< s; below 0: before the run
  int64_t prompt = 0;         ///< Tokens; 0 is legal: the first step then appends the first one.
  int64_t prefix = -1;        ///< Which of the shared beginnings the prompt has; -1: none.
  int64_t prefix_tokens = 0;  ///< Of the prompt's, that all requests with this prefix begin with.
  int64_t output = 0;         ///< Tokens to be generated; at least 1.
  int64_t generated = 0;      ///< Of those, so far.
  /// Tokens in the cache when the last one is generated.
  int64_t length() const { return prompt + output; }
};

/// A log-normal number of tokens, by its own mean and standard deviation (not the logarithm's).
struct TokenDistribution {
  double mean = 0;  ///< >= 0
  double sd = 0;    ///< >= 0; 0: always the mean
};

/// Beginnings that prompts share, such as instructions to a model.
struct SharedPrefixes {
  int64_t count = 0;   ///< Of them, each as likely as the others; 0: no prompt shares anything.
  int64_t tokens = 0;  ///< Of each; a request's own prompt follows.
};

/// Who asks, how often, for how much.
struct Workload {
  double rate = 1;  ///< Requests per second, > 0; arrivals are a Poisson process.
  TokenDistribution prompt;
  TokenDistribution output;  ///< Mean >= 1
  SharedPrefixes prefixes = {};
  /// Of a prompt, its prefix included.
  double prompt_mean() const {
    return prompt.mean + (prefixes.count > 0 ? static_cast<double>(prefixes.tokens) : 0);
  }
};

/// @return kInvalidArgument, naming what is not a number or out of range
Status validate(const Workload& workload);

/// Requests that go to one of several services: those whose draw, uniform from 0 to 1, is in [from, to).
struct Part {
  double from = 0;
  double to = 1;
};

/// The requests of a workload, one after the other, without end.
class RequestStream {
 public:
  /// @param first_id  id of the first one
  /// @param part      others are left out
  RequestStream(const Workload& workload, uint64_t seed, int64_t first_id = 0, Part part = {});
  /// The next one to arrive.
  const Request& peek() const { return next_; }
  /// Returns that one, and draws the one after it.
  Request take();

 private:
  void draw(double after);
  void draw_any(double after);
  bool is_in_part() const;
  Workload workload_;
  uint64_t seed_;
  uint64_t key_;
  int64_t first_id_;
  Part part_;
  int64_t index_ = 0;
  Request next_;
};

/// Requests that are half-way when a run begins: what a service that has long been running would
/// show at any moment. A long output is under way longer, so it is met in proportion to its length;
/// its progress is uniform. Ids are 0 ... count - 1, arrivals are before 0 and in order; one that
/// has generated nothing yet arrives at 0.
std::vector<Request> requests_under_way(const Workload& workload, int64_t count, uint64_t seed);

}  // namespace mla::bench
