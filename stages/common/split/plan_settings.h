/// @file
/// The members of PlanSettings by name: for files, messages and searches. A new one is a member there, a
/// row here, a line of with_settings(), and what is searched of it in bench/tools/tune.cpp.
#pragma once

#include "stages/common/split/plan.h"

namespace mla {

/// A member of PlanSettings: its name in files and messages, and what it may be.
struct PlanSetting {
  const char* name;
  int PlanSettings::*value;
  int least, most;
};
/// All of them, in order.
inline constexpr PlanSetting kPlanSettings[] = {
    {"workers_percent", &PlanSettings::workers_percent, 1, 1600},
    {"min_grains", &PlanSettings::min_grains, 1, 64},
    {"fixed_grains", &PlanSettings::fixed_grains, 0, 64},
    {"combine_grains", &PlanSettings::combine_grains, 0, 1024},
    {"max_tile_rows", &PlanSettings::max_tile_rows, 1, 1024}};

}  // namespace mla
