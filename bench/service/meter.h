/// @file
/// What a GPU takes while it serves: power, energy, how busy it is, its temperature. By NVML, where it
/// reads them.
#pragma once

#include "bench/service/engine.h"
#include "bench/service/service.h"

namespace mla::bench {

/// Does another engine's steps, and looks at the GPU between them, outside their times.
class MeteredEngine final : public Engine {
 public:
  explicit MeteredEngine(Engine& engine);
  Status step(const StepWork& work, double* seconds) override;
  bool counts_host_time() const override { return engine_.counts_host_time(); }
  /// From the first step until now. Virtual time in which nothing runs takes no real time, so this is what work
  /// takes, without what a GPU takes that waits for requests. What NVML does not read stays unknown.
  /// @param all_done  every step was, by this GPU alone: else energy is not of all tokens
  void write(bool all_done, Figures* figures) const;

 private:
  Engine& engine_;
  WallClock::time_point begin_, last_look_;
  double joules_at_begin_;
  double use_sum_ = 0;
  double hottest_ = kUnknown;
  int looks_ = 0;
};

}  // namespace mla::bench
