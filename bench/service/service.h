/// @file
/// A run of the service: arrivals on a virtual clock that steps move on, and what came of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "bench/measure/statistics.h"
#include "bench/service/engine.h"
#include "bench/service/requests.h"
#include "bench/service/scheduler.h"

namespace mla::bench {

/// What an alert is for. Latencies are targets of a run, too; infinity: none.
struct Thresholds {
  double token_ms_mean = 50;
  double token_ms_p99 = 100;
  double queue = std::numeric_limits<double>::infinity();        ///< Requests that wait
  double pages_share = std::numeric_limits<double>::infinity();  ///< Of all, that are held; 0.95
  /// Of the GPU, mean over the run: a target, and no alert.
  double power_w = std::numeric_limits<double>::infinity();
};

/// A threshold was passed in a window of the virtual time.
struct Alert {
  double time = 0;   ///< s, the window's end
  std::string what;  ///< "token p99, ms", "queue", ...
  double value = 0;
  double threshold = 0;
};

/// When a run ends, and what it is watched for.
struct RunLimits {
  double seconds =
      std::numeric_limits<double>::infinity();  ///< Virtual; a step under way is ended.
  int64_t requests = -1;  ///< Arrivals; the run goes on until they have ended. -1: no limit.
  const std::atomic<bool>* stop = nullptr;  ///< Once true, the run ends with kUnavailable.
  Thresholds thresholds = {};
  double window = 0.5;  ///< s, of an alert
};

/// The latencies of fewer requests than this say little about the slowest of a hundred.
inline constexpr int64_t kSamplesOfP99 = 100;

/// What a run came to. Times are virtual; means over time unless said otherwise.
struct Figures {
  RequestCounts counts;
  double span = 0;  ///< s, to the end of the run
  int64_t steps = 0;
  double step_ms_mean = kUnknown, step_ms_p50 = kUnknown, step_ms_p99 = kUnknown;
  /// Between two tokens of a request, waiting included.
  double token_ms_mean = kUnknown, token_ms_p50 = kUnknown, token_ms_p99 = kUnknown;
  /// From a request's arrival; of requests under way at the beginning, only where none was made.
  double first_token_ms_p50 = kUnknown, first_token_ms_p99 = kUnknown;
  /// From a request's arrival to its last token, for requests that arrived in the run and finished. The p99 is
  /// unknown for fewer than kSamplesOfP99.
  double request_ms_mean = kUnknown, request_ms_p50 = kUnknown, request_ms_p99 = kUnknown;
  int64_t requests_timed = 0;  ///< How many these are
  double busy_share = 0;       ///< Of the span, in which a step ran
  std::vector<Alert> alerts = {};
  /// Of a GPU that NVML can read, during the steps (Meter).
  double power_w = kUnknown, energy_mj_per_token = kUnknown, gpu_use_share = kUnknown,
         temperature_c = kUnknown;
  int64_t tokens = 0;  ///< Generated
  double tokens_per_s = 0;
  double batch_mean = 0;  ///< Unfinished requests in a step, over the steps
  int64_t pages_total = 0;
  int64_t pages_peak = 0;
  double pages_mean = 0;
  double waste_share = 0;  ///< Rows of held pages without a token of an unfinished request
  double queue_mean = 0;
  int64_t queue_max = 0;
};

/// Runs until the limits. Both a time without end and no limit of requests is kInvalidArgument.
/// @param under_way  arrive first, at time 0
/// @return the engine's and the scheduler's errors; kInvalidArgument for a step of no finite time
Status run_service(const RunLimits& limits, std::span<const Request> under_way,
                   RequestStream stream, Scheduler& scheduler, Engine& engine, Figures* figures);

/// Does a small step that no run counts: kernels are loaded at their first launch.
Status warm_up(Engine& engine);

/// How many requests of mean lengths, half-way, memory and batch hold.
int64_t most_half_way(const Workload& workload, const SchedulerLimits& limits);

/// How many requests are under way in a service in balance: the least batch whose steps, at these
/// lengths, generate what arrives. Steps are asked of `engine`, on made-up pages of all in turn.
/// At most most_half_way(): then the service is overloaded.
Status population_in_balance(const Workload& workload, const SchedulerLimits& limits,
                             Engine& engine, int64_t* population);

}  // namespace mla::bench
