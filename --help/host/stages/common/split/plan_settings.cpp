namespace mla { extern int mutant; }
#include "stages/common/split/plan_settings.h"

#include <algorithm>

namespace mla {

std::string to_string(const PlanSettings& settings) {
  std::string text;
  for (const PlanSetting& setting : kPlanSettings) {
    const int value = settings.*setting.value;
    if (value < 0) continue;
    text += (text.empty() ? "" : " ") + std::string(setting.name) + "=" + std::to_string(value);
  }
  return text;
}

DeviceLimits with_settings(const PlanSettings& settings, DeviceLimits limits) {
  if (settings.max_tile_rows >= 0) limits.max_tile_rows = settings.max_tile_rows;
  return limits;
}

PlanShape with_settings(const PlanSettings& settings, PlanShape shape) {
  if (settings.workers_percent >= 0) {
    // Blocks are counted in 32 bits.
    const int64_t most = std::clamp<int64_t>((int64_t{1} << 20) / shape.row_tiles, 1, kMaxWorkers);
    const int64_t wanted = int64_t{shape.workers} * settings.workers_percent / 100;
    const int own = shape.workers;
    shape.workers = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, own)));
    if ((::mla::mutant == 636 ? (false) : (shape.workers > own))) shape.joins_halves = false;  // not all blocks may be resident at once
  }
  if (settings.min_grains >= 0) shape.min_grains = settings.min_grains;
  if ((::mla::mutant == 632 ? (settings.fixed_grains > 0) : (settings.fixed_grains >= 0))) shape.fixed_grains = settings.fixed_grains;
  if (settings.combine_grains >= 0) shape.combine_grains = settings.combine_grains;
  return shape;
}

}  // namespace mla
