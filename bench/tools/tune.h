/// @file
/// The search behind mla_tune: which stages, with which settings of the plan, are timed for a shape, and
/// the table of choose.h that comes of it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "bench/measure/runner.h"
#include "bench/measure/shapes.h"
#include "stages/common/choose/choice_table.h"
#include "stages/common/stage.h"

namespace mla::bench {

/// After a first look, a stage is timed further if it takes at most this many times as long as the fastest one.
inline constexpr double kTuneStays = 1.5;
/// Then settings are searched for stages that take at most this many times as long, because a smaller tile of
/// rows can halve a time.
inline constexpr double kTuneSearched = 2;
/// Runs of the first look.
inline constexpr int kTuneFirstLook = 5;

/// The shapes of the grid, one per regime: a coarse grid first, then what lies between, so that a table
/// that had to end early covers everything thinly. All have equal lengths and full block tables; some
/// have a quantised cache.
std::vector<Shape> tune_shapes();

/// Whether the stage makes a plan, reads the shape's cache and runs on a device with these limits.
bool can_be_tuned(const Stage& stage, const Shape& shape, const DeviceLimits& limits);

/// The stage with its own settings, then with every other combination that is searched and gives another
/// plan for this problem with all sequences at their full length.
std::vector<Stage> tune_candidates(const Stage& stage, const Problem& problem,
                                   const DeviceLimits& limits);

/// The time of a stage in a regime.
struct TunedTime {
  std::string stage;
  PlanSettings settings;
  Summary cold;   ///< us; of a failure nothing
  Status status;  ///< Not ok: it failed or was wrong, and has no time
};

/// What was timed of a shape.
struct TunedShape {
  Shape shape;
  std::vector<TunedTime> times;
};

/// Checks every candidate against the fp64 reference, and times those that are right: all stages once
/// for a first look; then those that stay, with their settings, in interleaved rounds of the protocol's
/// counts, cold. Calls `progress` before each step; ends early if that returns false.
/// @return an error of the machine, or kFileError "interrupted"; candidates that fail are in `result`
Status tune_shape(Machine& machine, Runner& runner, const std::vector<const Stage*>& stages,
                  const Shape& shape, const std::function<bool(const std::string&)>& progress,
                  TunedShape* result);

/// A table while it is made: its JSON, shape by shape.
class TuneFile {
 public:
  /// An empty one, for what `context` says.
  explicit TuneFile(Context context);
  ~TuneFile();
  TuneFile(const TuneFile&) = delete;
  TuneFile& operator=(const TuneFile&) = delete;
  /// Takes over the shapes of a table that was begun.
  /// @return kFileError, also for one of another device or of another commit
  Status resume(const std::string& path);
  /// Whether the shape is there.
  bool has(const Shape& shape) const;
  /// Adds a shape, and of each stage its time without settings and its best with any; a shape without a
  /// time is left out.
  void add(const TunedShape& shape);
  /// How many shapes there are.
  size_t size() const;
  /// The file, ended by a newline: one line per shape.
  std::string text() const;

 private:
  struct Data;
  Context context_;
  std::unique_ptr<Data> data_;
};

}  // namespace mla::bench
