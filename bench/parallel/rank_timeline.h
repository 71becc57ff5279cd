/// @file
/// What the ranks did during one decode, on one clock: which phase, from when to when, and who waited for whom.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/parallel/rank_clock.h"
#include "stages/common/parallel/parallel.h"
#include "stages/common/parallel/rendezvous.h"

namespace mla::bench {

/// "bulk decode"
const char* to_string(RankPhase phase);

/// One rank in one phase.
struct PhaseInterval {
  RankPhase phase = RankPhase::kCut;
  int slice = 0;
  double begin_us = 0, end_us = 0;
  double waited_us = 0;  ///< Of an exchange: until the last rank had come to it.
};

/// All ranks; us since the first mark of any of them.
struct RanksTimeline {
  std::vector<std::vector<PhaseInterval>> ranks;
  /// Times of two ranks can be compared to so much, in either direction.
  double uncertainty_us = 0;
  /// The same for the ranks' host clocks alone, by barriers; 0 for one rank.
  double barrier_us = 0;
  bool is_one_clock = false;  ///< Barriers were not needed: all ranks read the clock of one host.
};

/// When a rank came to several barriers, and left them, by its own clock.
struct Barriers {
  std::vector<double> came_us, left_us;
};

/// What a rank knows of its decode.
struct RankReading {
  std::string host;  ///< A name for its clock, or empty: nothing is known of it.
  Barriers barriers;
  std::vector<TimedMark> marks;
  double uncertainty_us = 0;  ///< Of the marks by this clock.
};

/// What to add to `other`'s clock to have `first`'s. Of each barrier all ranks leave after all have come: a moment that
/// each rank's two readings enclose.
ClockBounds find_offset(const Barriers& first, const Barriers& other);

/// Brings ranks' readings to the clock of rank 0, and finds who waited in exchanges.
/// @return kInvalidArgument for marks that are no phases: an end that is missing
Status make_timeline(const std::vector<RankReading>& readings, RanksTimeline* timeline);

/// A phase that a decode must have.
struct Step {
  RankPhase phase;
  int slice;
};
/// In the order in which a rank enqueues them.
std::vector<Step> steps_of(int slices, bool has_tail, Exchange exchange);

/// Whether every rank has these phases, in this order, and time goes on in each; exchanges begin after the decode whose
/// result they send, and end after every rank's has begun; a rank merges after its last exchange.
/// @return kInvalidArgument with the first that is not so
Status check_timeline(const RanksTimeline& timeline, const std::vector<Step>& steps);

/// Takes several barriers, and hands the readings round: all ranks call it, and get the same.
Status share_readings(Rendezvous& world, RankReading own, std::vector<RankReading>* all);

/// One of {"rank", "stream", "phase", "slice", "begin_us", "end_us", "waited_us"} for each interval.
nlohmann::ordered_json phases_json(const RanksTimeline& timeline);

/// For chrome://tracing and Perfetto: a process per rank, a thread per stream.
/// @param timeline  a record of the report of mla_parallel, which has `phases`
/// @param context   where it was taken
std::string ranks_chrome_trace(const nlohmann::ordered_json& timeline,
                               const nlohmann::ordered_json& context);

/// A line per interval, and one per rank: how long it waited for others.
std::string summary(const RanksTimeline& timeline);

}  // namespace mla::bench
