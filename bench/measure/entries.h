/// @file
/// Results as the entries of the JSON: figures of all samples, beside what Google Benchmark reports.
#pragma once

#include <vector>

#include "bench/measure/google.h"
#include "bench/measure/measure.h"

namespace mla::bench {

/// Every result as entries "stage/shape/cold", ".../sustained", ".../plan", ".../combine" (medians) and
/// ".../error" (no time).
std::vector<GoogleEntry> google_entries(const ShapeResult& result, MachineKind machine);

}  // namespace mla::bench
