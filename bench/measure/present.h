/// @file
/// Results as a side-by-side table, as Google Benchmark entries in a JSON file, and as raw samples.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "bench/measure/measure.h"

namespace mla::bench {

/// Where the figures come from and the measured ceilings, one per line.
std::string describe(const Context& context);

/// "cannot run here"
std::string outcome_name(StageResult::Outcome outcome);

/// One shape's stages side by side, the CPU reference first; then their plans. On the model: wall
/// times, labelled as such, no shares.
std::string side_by_side(const ShapeResult& result, MachineKind machine);

/// A line per sample: stage,shape,mode,index,us. Modes are cold, sustained, plan,
/// plan+decode, combine and combine cold.
void write_samples(const std::vector<ShapeResult>& results, std::ostream& file);

}  // namespace mla::bench
