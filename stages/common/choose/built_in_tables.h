/// @file
/// The tables that the library holds: the files in `tables`, as the build found them.
#pragma once

#include <span>

namespace mla {

/// The text of each.
std::span<const char* const> built_in_tables();

}  // namespace mla
