/// @file
/// Measures what the device gives, in the same run as the kernels: no figure is taken from a data
/// sheet.
#pragma once

#include <functional>
#include <string>

#include "bench/measure/limits.h"
#include "bench/measure/runner.h"

namespace mla::bench {

/// Measures all rates on the current CUDA device. A rate that cannot be measured stays unknown (the
/// matrix rate with the reason); a rate whose result is wrong is an error.
Status measure_ceilings(Runner& runner, const std::function<void(const std::string&)>& progress,
                        Ceilings* ceilings);

}  // namespace mla::bench
