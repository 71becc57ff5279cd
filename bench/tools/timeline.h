/// @file
/// What one launch's records (stages/common/timeline.h) say: intervals, as a Chrome trace, as an SVG,
/// as a summary.
#pragma once

#include <string>
#include <vector>

#include "stages/common/timeline.h"

namespace mla::bench {

using timeline::Phase;
using timeline::Track;

/// A track in one phase; clocks since the block's first.
struct Interval {
  Track track;
  Phase phase;
  uint64_t begin, end;
  bool in_flight = false;  ///< Beside that, a product of its own is under way.
};

/// What one block did.
struct BlockTimeline {
  int block = 0;
  int multiprocessor = 0;
  double clocks_per_us = 0;  ///< By %globaltimer, over the block's life.
  double start_us = 0;       ///< After the first of the blocks shown.
  uint64_t clocks = 0;       ///< From its first event to its last.
  uint64_t lost = 0;         ///< Events that did not fit.
  std::vector<Interval> intervals;
};

/// "softmax"
const char* name_of(Phase phase);
/// "warpgroup 0"
const char* name_of(Track track);

/// Reads blocks' records, of which `records` holds those of all blocks from 0 on. A block that left
/// none, because the grid was smaller or the kernel says nothing, is an error.
Status read_timelines(const std::vector<timeline::Record>& records, const std::vector<int>& blocks,
                      std::vector<BlockTimeline>* result);

/// What lies between these times, in us since a block's first event.
BlockTimeline cut(const BlockTimeline& timeline, double from_us, double to_us);

/// For chrome://tracing and Perfetto: a process per block, a thread per track.
std::string chrome_trace(const std::vector<BlockTimeline>& timelines, const std::string& title);

/// A picture complete in itself: one lane per track, clocks and us below.
std::string svg(const std::vector<BlockTimeline>& timelines, const std::string& title);

/// Shares of the phases, a tile's period, and how long no warpgroup had a product in flight.
std::string summary(const BlockTimeline& timeline);

/// Clocks between the first product's begin and the last one's end in which no warpgroup was at one or
/// had one in flight.
uint64_t bubble_clocks(const BlockTimeline& timeline, uint64_t* window = nullptr);

}  // namespace mla::bench
