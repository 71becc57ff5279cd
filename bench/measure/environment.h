/// @file
/// What a results file says about where its figures come from.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bench/measure/limits.h"

namespace mla::bench {

/// Key and value, in the order they are shown.
using Context = std::vector<std::pair<std::string, std::string>>;

/// GPU, driver, clocks and power limit where readable, compilers, commit, date.
Context describe_environment(const Machine& machine);

/// The measured ceilings, in GB/s, TFLOP/s and us.
Context describe_ceilings(const Ceilings& ceilings);

/// "h200" for "NVIDIA H200": a name for files. Empty without a GPU.
std::string gpu_slug(const std::string& gpu_name);

/// The value of a key, or empty.
std::string value_of(const Context& context, const std::string& key);

}  // namespace mla::bench
