/// @file
/// Suite paged: what the paged cache costs. Host time of its bookkeeping, device time of an append,
/// memory against contiguous buffers.
#pragma once

#include <string>
#include <vector>

#include "bench/measure/google.h"
#include "bench/measure/progress.h"
#include "bench/measure/runner.h"

namespace mla::bench {

/// The suite's benchmarks: cache/host_*/wall, cache/append_*/cold (and sustained on a GPU, returned,
/// all) and cache/memory_*/bytes, which has no time.
std::vector<std::string> cache_benchmark_names(MachineKind machine);

/// Does those that are chosen, prints their tables, and adds the figures to the library's reports.
/// `quick`: few samples, to see that it works.
/// @return kKernelRejected if an append put a row in the wrong place; any error of the machine
Status measure_cache(Machine& machine, Runner& runner, GoogleBenchmark& google, Progress& progress,
                     bool quick);

}  // namespace mla::bench
