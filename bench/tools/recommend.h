/// @file
/// What to run: a stage, a cache format and a batch for what a user wants of a decode service, from recorded times.
#pragma once

#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench/measure/recorded.h"
#include "bench/service/time_model.h"

namespace mla::bench {

enum class Goal {
  kLatency,     ///< The shortest step
  kThroughput,  ///< The most tokens per second
  kMemory,      ///< The fewest bytes per token of the cache
};
/// "latency", "throughput", "memory"
const char* to_string(Goal goal);

/// What is wanted.
struct Wish {
  Goal goal = Goal::kLatency;
  int heads = 128;             ///< Query heads, one KV head
  int layers = 61;             ///< Of the model, each with a cache of its own
  int context = 8192;          ///< Tokens of each sequence
  std::optional<int> batch{};  ///< Sequences; else 1, or for throughput as many as pay
  double budget_bytes = std::numeric_limits<double>::infinity();  ///< Of all layers' caches
  double step_ms = std::numeric_limits<double>::infinity();  ///< A slow step takes at most this
};

/// A stage with a cache format, at the best batch for the goal.
struct Candidate {
  std::string stage;  ///< Slug
  CacheFormat format = CacheFormat::k16Bit;
  int batch = 0;
  double step_ms = 0;       ///< All layers' decodes
  double slow_step_ms = 0;  ///< The same, times the ratio of p90 to median of the nearest record
  double tokens_per_s = 0;
  double cache_bytes = 0;  ///< Of all sequences and layers
  std::string splits;      ///< "132 workers, sequences in up to 2 parts"; empty: not known
  TimeModel model;         ///< What the times follow from; of no shapes: the record itself
  std::string nearest;     ///< The record that is nearest: its shape
  double nearest_us = 0;   ///< and its time
  std::string why_not;     ///< What of the wish it does not meet; empty: it meets all
};

/// Candidates, the best first, those that do not meet the wish last; of the newest records of each stage and
/// format. Times are those of a fit; where records are too few for one, of a record with this very batch and
/// length. No candidate goes beyond its records: batch and length are at most the largest recorded.
/// @param recorded  the newest first
/// @return kInvalidArgument for a wish that is out of range, or that no record is near
Status recommend(std::span<const Recorded> recorded, const Wish& wish,
                 std::vector<Candidate>* candidates);

/// Tables and what they rest on.
std::string describe(const Wish& wish, const std::vector<Candidate>& candidates);

}  // namespace mla::bench
