/// @file
/// The stage, and the settings of its plan, that are fastest for a problem by a table of measured times
/// (choice_table.h), and the stage "auto", which does what was chosen.
#pragma once

#include <span>
#include <string>

#include "stages/common/choose/choice_table.h"
#include "stages/common/stage.h"

namespace mla {

/// The name of the stage that chooses.
inline constexpr const char* kAutoSlug = "auto";

/// Settings are taken where they make their stage faster by more than this share; less is chance.
inline constexpr double kWorthSettings = 0.03;

/// What is to decode a problem, and why.
struct Choice {
  const Stage* stage = nullptr;
  PlanSettings settings;
  /// Time of that in `regime`; 0: the table has none that can run here, and the stage for the newest
  /// devices that can was taken.
  double us = 0;
  const ChoiceTable* table = nullptr;   ///< Null: there is none.
  const RegimeTimes* regime = nullptr;  ///< Of the table: the nearest; null: none has such a cache.
  Regime asked;                         ///< The problem's.
};

/// Chooses among the stages for `machine` that run on a device with these limits, read the problem's cache
/// and make a plan; among the others where no stage for this machine makes one. A function of its
/// arguments and the tables: plan and decode of a problem choose alike.
/// @return kInvalidArgument for a problem that validate() refuses; kUnavailable if there is no stage;
///         kUnsupported if none runs on that device, or none of them reads such a cache
Status choose(MachineKind machine, const Problem& problem, const DeviceLimits& limits,
              Choice* choice);

/// The same among these stages (one at least) by these tables, of a problem that is checked. Where no
/// stage runs on the device it is the last that reads the problem's cache all the same; null if none does.
Choice choose_among(std::span<const Stage> stages, std::span<const ChoiceTable> tables,
                    const Problem& problem, const DeviceLimits& limits);

/// ok if one of these stages can be chosen for the problem on that device; else kUnsupported, saying for
/// each that reads such a cache why it cannot run.
Status check_candidates(std::span<const Stage> stages, const Problem& problem,
                        const DeviceLimits& limits);

/// "08_seesaw" or "08_seesaw min_grains=1"
std::string name_of(const Choice& choice);

/// What was chosen and why, in sentences: the regime, the times of the candidates, whose they are.
std::string describe(const Choice& choice, const DeviceLimits& limits);

/// The stage that chooses for every problem anew, which find_stage("auto") finds. stages(machine) is not
/// empty, and does not list it. It makes a plan if some stage for this machine does.
const Stage& auto_stage(MachineKind machine);

}  // namespace mla
