/// @file
/// A cluster on the model: blocks that run together and reach into each other's shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/gpu_model/race_detector.h"

namespace gpu_model::detail {

class Multiprocessor;

/// The blocks of a cluster, and their barrier. A block of a plain launch is one of its own.
struct Cluster {
  std::vector<Multiprocessor*> blocks;  ///< By rank.
  uint64_t phase = 0;                   ///< How often the barrier has completed.
  unsigned arrived = 0;                 ///< Threads that have arrived in this phase,
  unsigned pending = 0;                 ///< those that have yet to arrive or return,
  unsigned running = 0;                 ///< and those that have not returned.
  ClusterClock clock = {};              ///< For the race detector.

  /// Before the blocks start.
  void begin(unsigned threads) {
    phase = arrived = 0;
    pending = running = threads;
    clock.parts.assign(blocks.size(), {});
  }
};

}  // namespace gpu_model::detail
