/// @file
/// The simulated clock: what a step takes on a GPU that is not here, from times that were recorded
/// on it.
///
/// A layer of a step is an append and a decode; the plan comes before the layers. Each is a sum of
/// terms with coefficients that are not negative, fitted to recorded sustained times so that the
/// sum of squared relative errors is least.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "bench/measure/recorded.h"
#include "bench/service/engine.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {

/// What the time of a decode depends on.
struct DecodeShape {
  double sequences = 0;
  double tokens = 0;   ///< Sum of lengths
  double longest = 0;  ///< Length
};

/// A recorded time.
struct DecodeTime {
  std::string name;  ///< Of its shape
  DecodeShape shape;
  double us = 0;
};

/// How a stage's time follows from a shape, in us.
struct DecodeFit {
  /// Sum:     a + b sequences + c tokens + d longest
  /// Largest: a + max(b sequences + c tokens, d longest), where a long sequence runs beside others
  bool largest = false;
  double a = 0;
  double b = 0;
  double c = 0;
  double d = 0;
  double median_error = 0;  ///< Of |fitted / recorded - 1| over the shapes
  double worst_error = 0;
  std::string worst_shape;
  int shapes = 0;
  double us(const DecodeShape& shape) const;
};

/// Coefficients >= 0 of the columns that make the sum of ((sum of column * coefficient) / time -
/// 1)^2 least: every subset of columns is solved, so few columns only.
/// @param columns  [columns][times]
std::vector<double> fit_non_negative(const std::vector<std::vector<double>>& columns,
                                     std::span<const double> times);

/// The better of both forms. Needs at least one time.
DecodeFit fit_decode(const std::vector<DecodeTime>& times);

/// A fitted GPU.
struct TimeModel {
  std::string stage;  ///< Slug
  int heads = 0;
  CacheFormat format = CacheFormat::k16Bit;  ///< Of the cache
  std::string origin;                        ///< "NVIDIA H200, commit 6e841ff, 2026-11-21"
  DecodeFit decode;
  double plan_us[2] = {0, 0};  ///< Constant, and per sequence. 0 for a stage without a plan.
  /// Constant, per run of up to 8 rows, per row; of one layer. 0 if no appends are recorded.
  double append_us[3] = {0, 0, 0};
  bool has_appends() const { return append_us[0] + append_us[1] + append_us[2] > 0; }
  /// What steps have and the fit has not: "plans", "appends", "plans, appends".
  std::string not_recorded(bool makes_plans) const;
  /// Of a whole step, in us.
  double step_us(const StepWork& work, int layers) const;
  /// Lines that say what was fitted to what, and how well.
  std::string describe() const;
};

/// Whether times of a shape are fitted for these heads (0: any) and a cache of this format: it has one query
/// token, one KV head, bf16, and no fixed splits.
bool is_fitted(const DecodeCase& spec, int heads, CacheFormat format);

/// Fits a stage to its sustained entries that is_fitted() takes; appends to those into such a cache.
/// @param stage  slug or number
/// @return kInvalidArgument if fewer than four such entries are recorded
Status fit_time_model(const Recorded& recorded, const std::string& stage, int heads,
                      CacheFormat format, TimeModel* model);

/// Steps that only take time.
class SimulatedEngine final : public Engine {
 public:
  SimulatedEngine(TimeModel model, int layers) : model_(std::move(model)), layers_(layers) {}
  Status step(const StepWork& work, double* seconds) override;

 private:
  TimeModel model_;
  int layers_;
};

}  // namespace mla::bench
