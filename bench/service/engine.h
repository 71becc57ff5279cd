/// @file
/// Does steps and says how long they take: kernels on a machine, or a model of their times.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "bench/service/scheduler.h"

namespace mla::bench {

/// Does steps.
class Engine {
 public:
  virtual ~Engine() = default;
  /// Appends and decodes, in all layers.
  /// @param seconds  what the step took
  virtual Status step(const StepWork& work, double* seconds) = 0;
  /// Whether the scheduler's time on the host is a part of a step's time: it is with kernels, not with a fit.
  virtual bool counts_host_time() const { return false; }
};

/// Spares steps of static batches. A step whose batch was timed before, with a padded length within a tolerance,
/// is not done, and takes the time of that one. Steps that bring prompts in are always done.
class ReusingEngine final : public Engine {
 public:
  /// @param tolerance  0.05: lengths that differ by 5%; 0: same lengths only
  ReusingEngine(Engine& engine, double tolerance) : engine_(engine), tolerance_(tolerance) {}
  Status step(const StepWork& work, double* seconds) override;
  bool counts_host_time() const override { return engine_.counts_host_time(); }
  int64_t timed() const { return timed_; }
  int64_t reused() const { return reused_; }

 private:
  Engine& engine_;
  double tolerance_;
  std::map<size_t, std::map<int64_t, double>> seconds_;  // by batch, by length
  int64_t timed_ = 0;
  int64_t reused_ = 0;
};

}  // namespace mla::bench
