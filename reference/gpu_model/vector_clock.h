/// @file
/// What a GPU thread knows of the others: the logical clocks of the race detector (race_detector.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gpu_model::detail {

/// Counts, for one slot, what others may come to know of. 0 is before everything.
using Time = uint32_t;

/// Slots of a block, one clock each: its threads, then its warps, for the wgmma that they have under
/// way, then its mbarriers, for the bulk copies that complete on them.
using Slot = uint32_t;

/// A moment, as far as it is known: of each slot of a block the last time that comes before it.
struct VectorClock {
  uint32_t block = 0;        ///< The block whose slots these are; numbered over all grids,
  uint32_t known_below = 0;  ///< and all that blocks with smaller numbers than this did is known.
  std::vector<Time> seen;    ///< By slot; what is past the end is 0.
  /// By thread: the last time up to which the thread has fenced its writes to the asynchronous proxy.
  std::vector<Time> published;
  std::vector<std::shared_ptr<const VectorClock>> others;  ///< What is known of other blocks.

  /// Adds what `other` knows.
  void join(const VectorClock& other);
  /// The times of a block's slots; null if nothing is known of it.
  const VectorClock* of(uint32_t other_block) const;

  static Time at(const std::vector<Time>& times, Slot slot) {
    return slot < times.size() ? times[slot] : 0;
  }
  static void raise(std::vector<Time>& times, Slot slot, Time time);
};

}  // namespace gpu_model::detail
