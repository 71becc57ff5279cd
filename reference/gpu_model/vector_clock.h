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
///
/// Threads of a grid that is resident at once are too many for a clock each that counts every other
/// (132 blocks of 384 threads: 10 GB). So a clock is its own block's times, and a list of what is known of
/// other blocks. Those entries never change, and whoever learned the same shares them: a barrier
/// of the grid costs one entry per block, not one per pair of blocks.
struct VectorClock {
  uint32_t block = 0;        ///< The block whose slots these are; numbered over all grids,
  uint32_t known_below = 0;  ///< and all that blocks with smaller numbers than this did is known.
  Time release = 0;          ///< The number of the block's last release that is known (GridRaces).
  std::vector<Time> seen;    ///< By slot; what is past the end is 0.
  /// By thread: the last time up to which the thread has fenced its writes to the asynchronous proxy: those
  /// to its own block's memory, and, in as many slots again, those to any of the cluster.
  std::vector<Time> published;
  /// By thread: the last time up to which its mbarrier_init are known, though nothing else is: what
  /// fence_mbarrier_init lets a relaxed arrival hand on.
  std::vector<Time> inits;
  /// What is known of other blocks, by ascending number. These have no others.
  std::vector<std::shared_ptr<const VectorClock>> others;
  uint64_t number =
      0;  ///< Of what is in `others` and never changes: which it is, to compare two only once.

  /// Adds what `other` knows.
  void join(const VectorClock& other);
  /// Adds a clock without others, and keeps it if it is of another block.
  void add(const std::shared_ptr<const VectorClock>& part);
  /// What it knows of its own block alone.
  std::shared_ptr<const VectorClock> own_part() const;
  /// The times of a block's slots; null if nothing is known of it.
  const VectorClock* of(uint32_t other_block) const;

  static Time at(const std::vector<Time>& times, Slot slot) {
    return slot < times.size() ? times[slot] : 0;
  }
  static void raise(std::vector<Time>& times, Slot slot, Time time);

 private:
  void raise_to(const VectorClock& part);
  bool covers(const VectorClock& part) const;
  template <typename Share>
  void add(const VectorClock& part, Share share);
};

}  // namespace gpu_model::detail
