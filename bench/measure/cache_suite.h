/// @file
/// Suite paged: what the paged cache costs. Host time of its bookkeeping, device time of an append,
/// memory against contiguous buffers.
#pragma once

#include <vector>

#include "bench/measure/google.h"
#include "bench/measure/progress.h"
#include "bench/measure/runner.h"

namespace mla::bench {

/// Measures, and prints three tables. Entries are named cache/host_*/wall, cache/append_*/cold (and
/// sustained, returned, all) and cache/memory_*/bytes. `quick`: few samples, to see that it works.
/// @return kKernelRejected if an append put a row in the wrong place; any error of the machine
Status measure_cache(Machine& machine, Runner& runner, Progress& progress, bool quick,
                     std::vector<GoogleEntry>* entries);

}  // namespace mla::bench
