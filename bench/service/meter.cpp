#include "bench/service/meter.h"

#include <cmath>

#include "bench/measure/nvml.h"

namespace mla::bench {

MeteredEngine::MeteredEngine(Engine& engine)
    : engine_(engine),
      begin_(WallClock::now()),
      last_look_(begin_),
      joules_at_begin_(nvml_energy_joules()) {}

Status MeteredEngine::step(const StepWork& work, double* seconds) {
  constexpr double kBetweenLooks = 0.2;  // s: NVML's own readings are hardly newer
  MLA_RETURN_IF_ERROR(engine_.step(work, seconds));
  if (seconds_since(last_look_) < kBetweenLooks) return {};
  last_look_ = WallClock::now();
  use_sum_ += nvml_use_share();
  hottest_ = std::fmax(hottest_, nvml_temperature_c());  // NaN is no number to it
  ++looks_;
  return {};
}

void MeteredEngine::write(bool all_done, Figures* figures) const {
  const double joules = nvml_energy_joules() - joules_at_begin_;
  if (looks_ > 0) figures->gpu_use_share = use_sum_ / looks_;
  figures->temperature_c = hottest_;
  if (!(joules > 0)) return;  // not read, or the run was over before the counter moved
  figures->power_w = joules / seconds_since(begin_);
  if (all_done && figures->tokens > 0) {
    figures->energy_mj_per_token = 1e3 * joules / static_cast<double>(figures->tokens);
  }
}

}  // namespace mla::bench
