/// @file
/// An mbarrier on the model.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpu_model::detail {

struct MbarrierState {
  size_t offset = 0;  ///< In shared memory.
  unsigned count = 0;
  unsigned pending = 0;  ///< Arrivals that the current phase wants.
  int64_t bytes = 0;   ///< Bytes that it wants; below zero when they come before they are expected.
  uint64_t phase = 0;  ///< How many are complete.
  unsigned thread = 0;    ///< Who initialised it,
  bool fenced = false;    ///< and whether that thread has made it visible to bulk copies.
  uint64_t observed = 0;  ///< Phases up to this number have been waited for.
  uint64_t landed = 0;    ///< One more than the last phase that a bulk load completed bytes of,
  const char* what = nullptr;  ///< and that load.
  const char* file = nullptr;
  int line = 0;

  /// What lies in the kernel's memory.
  uint64_t mark() const { return 0x6d62617272696572 ^ offset << 8; }
};

}  // namespace gpu_model::detail
