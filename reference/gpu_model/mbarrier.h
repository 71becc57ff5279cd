/// @file
/// An mbarrier on the model.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reference/gpu_model/race_detector.h"

namespace gpu_model::detail {

/// What the model knows of an mbarrier.
struct MbarrierState {
  size_t offset = 0;      ///< In shared memory, in bytes.
  unsigned count = 0;     ///< Arrivals of a phase.
  unsigned pending = 0;   ///< Arrivals that the current phase still wants.
  int64_t bytes = 0;      ///< Bytes that it still wants; negative if they came before expected.
  uint64_t phase = 0;     ///< How many phases are complete.
  unsigned thread = 0;    ///< Who initialised it,
  bool fenced = false;    ///< and whether that thread has made it visible to bulk copies.
  uint64_t observed = 0;  ///< Phases up to this number have been waited for.
  uint64_t landed = 0;    ///< 1 + the last phase in which a bulk load completed bytes,
  const char* what = nullptr;  ///< and that load: its instruction and its place.
  const char* file = nullptr;
  int line = 0;
  BarrierClock clock;  ///< For the race detector.

  /// What the kernel's memory holds in its place, to notice ordinary stores.
  uint64_t mark() const { return 0x6d62617272696572 ^ offset << 8; }
};

}  // namespace gpu_model::detail
