/// @file
/// Everything that is done for one shape: data, checks, times, shares.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "bench/measure/google.h"
#include "bench/measure/limits.h"
#include "bench/measure/progress.h"
#include "bench/measure/sampler.h"
#include "bench/measure/shapes.h"
#include "bench/measure/truth.h"

namespace mla::bench {

/// What making a stage's plan takes on a shape. A stage's own times are without it.
struct PlanTimes {
  std::vector<double> alone;  ///< us: the plan's kernel, warm
  Contender with_decode;      ///< Plan and decode, cold
  /// Median, cold, of plan and decode less that of the decode by a plan made before, in us.
  double marginal_us = kUnknown;
};

/// What combining partial results takes of a stage's decode on a shape. Empty where nothing is split.
struct CombineTimes {
  std::vector<double>
      warm;  ///< us: the kernel alone, its partial results in the L2 as after a decode
  std::vector<double> cold;  ///< us: the same, from memory
  int slots = 0;     ///< Of the plan; each is a partial result of every query row of its sequence
  double bytes = 0;  ///< Of all partial results, read once
};

/// What a stage came to on a shape.
struct StageResult {
  enum class Outcome {
    kMeasured,
    kCannotRun,  ///< Not on this device, or not in its memory: `reason`
    kLeftOut,    ///< It would take too long: `reason`
    kFailed,     ///< An error or a wrong result: `reason`
  };
  bool peer = false;  ///< One of Bench::peers
  std::string stage;  ///< Slug
  std::string idea;
  Outcome outcome = Outcome::kMeasured;
  std::string reason;
  Contender times;             ///< Raw samples, of decodes by a plan made before if there is one
  Summary cold, sustained;     ///< us
  PlanTimes plan;              ///< Of a stage that makes one
  CombineTimes combine;        ///< Likewise
  DecodeComparison check;      ///< Of the data that were timed
  size_t workspace_bytes = 0;  ///< Plan and scratch
  OwnLimit cold_limit, sustained_limit;
  double cold_speedup = kUnknown;  ///< Over the stage before that has a time
  double sustained_speedup = kUnknown;
};

struct ShapeResult {
  Shape shape;
  Work work;
  int64_t total_tokens = 0;
  int32_t longest = 0;  ///< Tokens of the longest sequence
  bool checked_whole = true;
  double cold_floor = kUnknown;  ///< s
  double sustained_floor = kUnknown;
  double reference_seconds = kUnknown;  ///< Wall time of the CPU reference over the whole shape
  double cache_bytes = 0;               ///< Of the device, all pages
  double tensor_bytes = 0;              ///< The cache, q, out, lse, block table and lengths
  std::vector<StageResult> stages;
  std::vector<std::string> unable;  ///< Stages and peers that cannot read such a cache: left out
};

/// Where and what to measure.
struct Bench {
  Machine& machine;
  Runner& runner;
  std::vector<const Stage*> stages;
  std::vector<const Stage*> peers;  ///< Other implementations as stages: checked and timed alike
  Ceilings ceilings;
  Progress& progress;
  GoogleBenchmark& google;  ///< Knows the names of every shape to measure
};

/// "08_seesaw/h128_q1_b64_k4096/cold"
std::string benchmark_name(const std::string& who, const Shape& shape, const std::string& mode);
/// The benchmarks of a shape: "reference/SHAPE/wall" where the CPU reference is timed; of each
/// contender that can read the cache "STAGE/SHAPE/cold" and, on a GPU, ".../sustained"; of one that makes a plan, too,
/// ".../plan_and_decode", ".../plan", ".../combine" and ".../combine_cold". Of a shape of errors
/// alone ".../error", of plans alone ".../plan".
std::vector<std::string> benchmark_names(MachineKind machine, const Shape& shape,
                                         std::span<const Stage* const> stages,
                                         std::span<const Stage* const> peers);

/// Does what is chosen of a shape. Checks every stage on needle data and on flat data, times those that are right on the flat data,
/// and checks that a run after the timed ones still gives the same bits. Of a shape of errors alone:
/// checks on the flat data and times nothing. Of a shape of plans alone: compares every stage's plan
/// with the host's and times it; stages without one, and peers, have no entry. What it measured is added
/// to the library's reports.
ShapeResult measure_shape(const Bench& bench, const Shape& shape);

}  // namespace mla::bench
