/// @file
/// A recording of the GPU model as a Chrome trace.
#pragma once

#include <string>
#include <string_view>

#include "reference/status.h"

namespace mla::bench {

/// For chrome://tracing and Perfetto: a process per block, a thread per warp, and threads for copies:
/// as many per engine as it ever has under way at once. A microsecond is one event: there is no clock.
/// @param json    a recording that check_recording() takes
/// @return kInvalidArgument for anything else
Status chrome_recording(std::string_view json, std::string* trace);

}  // namespace mla::bench
