/// @file
/// Runs one operation again and again and takes its times: the machine's side of the sampler.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "bench/measure/protocol.h"
#include "bench/measure/statistics.h"
#include "stages/common/machine/machine.h"

namespace mla::bench {

/// What to time: enqueues the operation, and nothing else, on the stream it is given.
using Operation = std::function<Status(Stream)>;

/// What the device said of itself while it ran back to back; kUnknown where it says nothing.
struct Readings {
  double sm_mhz = kUnknown;        ///< Towards the end
  double watts = kUnknown;         ///< Mean over the warm-up, less its first fifth
  double joules_a_run = kUnknown;  ///< Likewise
};

class Runner {
 public:
  virtual ~Runner() = default;
  /// How often to run what takes `microseconds`.
  virtual RunCounts run_counts(double microseconds) const = 0;
  /// Makes the operation ready to be run, and may run it for that; `handle` names it from now on.
  virtual Status prepare(const Operation& operation, int* handle) = 0;
  /// Lets the device rest before the next cold runs of what takes `expected_us` (kRest). The model needs
  /// no rest.
  virtual void rest(double expected_us) { static_cast<void>(expected_us); }
  /// Runs it `runs` times, each time after other data went through the caches; adds the times in us
  /// to `samples`.
  virtual Status run_cold(int handle, int runs, std::vector<double>* samples) = 0;
  /// The same, but times each second of two runs: what it reads lies in the caches.
  virtual Status run_warm(int handle, int runs, std::vector<double>* samples) = 0;
  /// Runs it back to back, for `warmup_seconds` and then `runs` times; adds the times of the
  /// latter.
  virtual Status run_sustained(int handle, double expected_us, double warmup_seconds, int runs,
                               std::vector<double>* samples, Readings* readings) = 0;
  /// Forgets all prepared operations.
  virtual void clear() = 0;
  /// A kernel did not end or broke the device: nothing more can run in this process.
  virtual bool lost() const = 0;
};

/// Times wall time on the GPU model; "cold" is all it has.
std::unique_ptr<Runner> make_model_runner();

/// CUDA graphs timed by CUDA events.
Status make_gpu_runner(std::unique_ptr<Runner>* runner);

}  // namespace mla::bench
