/// @file
/// What binds a decode, what its stages spend on it, and what could be done about it, in words.
///
/// Everything here is a function of its arguments: no device is asked and no file read.
/// explain_input.h gathers the arguments.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/measure/limits.h"
#include "bench/measure/statistics.h"
#include "reference/status.h"
#include "stages/common/stage.h"

namespace mla::bench {

/// A plan's worth: who has work, how evenly, and what cutting costs.
struct Balance {
  PlanShape shape;
  int64_t blocks = 0;        ///< Blocks of the kernel that have work: workers with a piece, for
                             ///< all row tiles
  double busy = 0;           ///< Share of the multiprocessors that have such a block
  int64_t largest = 0;       ///< Largest load: grains, beginnings of pieces included
  int fixed = 0;             ///< What the beginning of a piece adds to a load, in grains
  double mean = 0;           ///< Mean over all workers, idle ones too
  int cut_sequences = 0;     ///< Sequences of more than one piece
  int64_t pieces = 0;        ///< Pieces of those
  int64_t parts = 0;         ///< Pieces that leave a partial result; two joined halves leave one
  double partial_bytes = 0;  ///< Partial results: written once, and read as often
  double imbalance() const;  ///< largest / mean
};
Balance balance_of(const Problem& problem, const PlanShape& shape,
                   const std::vector<int32_t>& seqlens_k, int multiprocessors);

/// What the cache takes, in bytes. A page that sequences share counts for each of them.
struct MemoryUse {
  int64_t pages = 0;
  double cache = 0;       ///< These pages
  double padding = 0;     ///< Of that: rows past the end of a sequence, in its last page
  double contiguous = 0;  ///< One buffer per sequence, each as long as the longest
  double expanded = 0;    ///< Keys and values of every query head, as without a latent cache
};
MemoryUse memory_of(const Problem& problem, const std::vector<int32_t>& seqlens_k);

/// What is known of a stage on the problem.
struct StageFacts {
  std::string slug;
  Status device;  ///< Not ok: it cannot run on the device, and why
  Status cache;   ///< Not ok: it cannot read the problem's cache, and why
  bool can_run() const { return device.ok() && cache.ok(); }
  Prediction prediction;
  size_t workspace_bytes = 0;
  std::optional<PlanShape> plan;  ///< Of a stage that makes one
  Summary cold;                   ///< us; n = 0: no time
  double sustained_us = kUnknown;
};

/// What a stage asks for and expects on a device with these limits: all but its time.
StageFacts facts_of(const Stage& stage, const Problem& problem, int64_t total_tokens,
                    const DeviceLimits& limits);

/// The limits of a device of this compute capability ("9.0"), whose name is left alone.
/// @return whether its size of shared memory is known, and the number of multiprocessors is one
bool limits_of(const std::string& compute_capability, int multiprocessors, DeviceLimits* limits);

/// All that an explanation is made from.
struct ExplainInput {
  Problem problem;
  std::vector<int32_t> seqlens_k;
  std::string device;  ///< "NVIDIA H200, compute capability 9.0, 132 multiprocessors"
  DeviceLimits limits;
  Ceilings ceilings;
  std::string ceilings_origin;  ///< "measured in this run"; without ceilings: why there are none
  std::vector<StageFacts> stages;
  std::string times_origin;  ///< Of all times in `stages`
  std::string stage;         ///< Slug of the stage that is asked about; empty: all of them
  std::string choice;        ///< Of the stage that chooses: what, and why
};

/// The stage that advice is about: the one asked for; else the one with the least time, or the least
/// own limit, of those that can run (the later one where two are within 5%). Null if none can.
const StageFacts* subject_of(const ExplainInput& input);

/// A piece of advice, by the rule that gave it.
struct Advice {
  std::string rule;
  std::string text;
};
/// What the rules have to say, in their order. Each is silent where its condition does not hold.
/// Of a stage that cannot run on the device, or on the cache, only that is said.
std::vector<Advice> advise(const ExplainInput& input);
/// Names of all rules, in order.
std::vector<std::string> advice_rules();

/// Work, floor, stages, plan, memory and advice, a few lines each, ended by a newline.
std::string explain(const ExplainInput& input);

}  // namespace mla::bench
