/// @file
/// Reads a recording of the GPU model (docs/recording.md) and replays it: an account of its own of
/// what waits, what is under way and what barriers count, from the events alone.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "reference/status.h"

namespace mla {

/// What a recording holds.
struct RecordingSummary {
  uint64_t launches = 0, blocks = 0, events = 0;
  uint64_t waits = 0;     ///< How often lanes of a warp began to wait for something outside it.
  uint64_t copies = 0;    ///< Of them all, merged cp.async counted once.
  uint64_t phases = 0;    ///< Of mbarriers, completed.
  uint64_t products = 0;  ///< Warps' parts of wgmma.
  bool truncated = false;
  std::string error;  ///< Why the model rejected the kernel; empty: it did not.
};

/// Replays a recording. Every wait must be released by what it waits for, every copy land before
/// anything reads what it writes, every barrier and phase complete when its counts say so, and every
/// number that the recording states must be the one that follows from the events before it. What is
/// cut short, by its bound or because the kernel was rejected, may end anywhere.
/// @param json     the file
/// @param summary  what it holds, if it is right
/// @return kInvalidArgument, with the first event that is wrong and why
Status check_recording(std::string_view json, RecordingSummary* summary);

}  // namespace mla
