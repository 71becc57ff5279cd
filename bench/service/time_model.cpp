#include "bench/service/time_model.h"

#include <fmt/format.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>
#include <set>
#include <tuple>

#include "bench/measure/shapes.h"
#include "bench/measure/table.h"

namespace mla::bench {
namespace {

using Columns = std::vector<std::vector<double>>;

constexpr int64_t kRunRows = 8;  // kMaxRunTokens: what a block of an append copies

double squared_errors(const DecodeFit& fit, const std::vector<DecodeTime>& times) {
  double sum = 0;
  for (const DecodeTime& time : times) {
    const double error = fit.us(time.shape) / time.us - 1;
    sum += error * error;
  }
  return sum;
}

/// The sum of all terms; or the largest, which is the longest sequence's up to this many mean lengths
/// of it, and all tokens' beyond.
DecodeFit fit_form(const std::vector<DecodeTime>& times, std::optional<double> threshold) {
  Columns columns(4);
  std::vector<double> us;
  for (const DecodeTime& time : times) {
    const DecodeShape& shape = time.shape;
    const bool all = !threshold || shape.tokens / shape.longest > *threshold;
    const bool longest = !threshold || !all;
    columns[0].push_back(1);
    columns[1].push_back(all ? shape.sequences : 0);
    columns[2].push_back(all ? shape.tokens : 0);
    columns[3].push_back(longest ? shape.longest : 0);
    us.push_back(time.us);
  }
  const std::vector<double> x = fit_non_negative(columns, us);
  DecodeFit fit;
  fit.largest = threshold.has_value();
  std::tie(fit.a, fit.b, fit.c, fit.d) = std::tie(x[0], x[1], x[2], x[3]);
  return fit;
}

/// The shape of an entry that counts: of this mode, and is_fitted().
std::optional<DecodeShape> shape_of(const RecordedEntry& entry, const std::string& mode, int heads,
                                    CacheFormat format) {
  Shape shape;
  if (entry.mode != mode || !parse_shape(entry.shape, &shape).ok()) return {};
  const DecodeCase& spec = shape.spec;
  if (!is_fitted(spec, heads, format)) return {};
  if (spec.lengths.empty()) {
    return DecodeShape{double(spec.batch), double(spec.batch) * spec.seqlen_k,
                       double(spec.seqlen_k)};
  }
  return DecodeShape{double(spec.lengths.size()),
                     std::accumulate(spec.lengths.begin(), spec.lengths.end(), 0.0),
                     double(*std::max_element(spec.lengths.begin(), spec.lengths.end()))};
}

void fit_appends(const Recorded& recorded, TimeModel* model) {
  const std::string format =
      is_quantised(model->format) ? to_string(model->format) + std::string("_") : "";
  std::vector<double> runs, rows, us;
  for (const RecordedEntry& entry : recorded.entries) {
    int batch = 0, tokens = 0;
    if (entry.stage != "cache" || entry.mode != "sustained") continue;
    if (!entry.shape.starts_with(format)) continue;
    const char* const name = entry.shape.c_str() + format.size();
    if (std::sscanf(name, "append_b%d_t%d", &batch, &tokens) != 2) continue;
    if (batch < 1 || tokens < 1) continue;
    runs.push_back(double(batch) * double((tokens + kRunRows - 1) / kRunRows));
    rows.push_back(double(batch) * tokens);
    us.push_back(entry.us);
  }
  if (us.empty()) return;
  const auto x = fit_non_negative({std::vector<double>(us.size(), 1.0), runs, rows}, us);
  std::copy(x.begin(), x.end(), model->append_us);
}

void fit_plan(const Recorded& recorded, TimeModel* model) {
  std::vector<double> sequences, us;
  for (const RecordedEntry& entry : recorded.entries) {
    const auto shape = shape_of(entry, "plan", 0, model->format);
    if (entry.stage != model->stage || !shape) continue;
    sequences.push_back(shape->sequences);
    us.push_back(entry.us);
  }
  if (us.empty()) return;
  const auto x = fit_non_negative({std::vector<double>(us.size(), 1.0), sequences}, us);
  std::copy(x.begin(), x.end(), model->plan_us);
}

}  // namespace

bool is_fitted(const DecodeCase& spec, int heads, CacheFormat format) {
  return (heads == 0 || spec.num_heads_q == heads) && spec.seqlen_q == 1 &&
         spec.num_heads_kv == 1 && !spec.variable_lengths && spec.fixed_split_tokens == 0 &&
         spec.dtype == DType::kBFloat16 && spec.cache_format == format;
}

double DecodeFit::us(const DecodeShape& shape) const {
  const double all = b * shape.sequences + c * shape.tokens;
  const double one = d * shape.longest;
  return a + (largest ? std::max(all, one) : all + one);
}

std::vector<double> fit_non_negative(const Columns& columns, std::span<const double> times) {
  const auto rows = static_cast<Eigen::Index>(times.size());
  const auto count = static_cast<Eigen::Index>(columns.size());
  // Relative errors: rows over their time, to be 1. Columns of length 1, so that none is "small".
  Eigen::MatrixXd scaled(rows, count);
  Eigen::VectorXd norms(count);
  for (Eigen::Index j = 0; j < count; ++j) {
    const Eigen::Map<const Eigen::ArrayXd> values(columns[size_t(j)].data(), rows);
    const Eigen::Map<const Eigen::ArrayXd> us(times.data(), rows);
    scaled.col(j) = (values / us).matrix();
    norms(j) = scaled.col(j).norm();
    if (norms(j) > 0) scaled.col(j) /= norms(j);
  }
  const Eigen::VectorXd ones = Eigen::VectorXd::Ones(rows);
  Eigen::VectorXd best = Eigen::VectorXd::Zero(count);
  double best_error = static_cast<double>(rows);
  for (unsigned subset = 1; subset < 1u << count; ++subset) {
    std::vector<Eigen::Index> chosen;
    for (Eigen::Index j = 0; j < count; ++j) {
      if ((subset >> j & 1) != 0) chosen.push_back(j);
    }
    const Eigen::MatrixXd part = scaled(Eigen::all, chosen);
    auto factors = part.colPivHouseholderQr();
    factors.setThreshold(1e-5);
    if (factors.rank() < part.cols()) continue;
    const Eigen::VectorXd x = factors.solve(ones);
    const double error = (part * x - ones).squaredNorm();
    if (x.minCoeff() < 0 || error >= best_error) continue;
    best_error = error;
    best.setZero();
    best(chosen) = x.cwiseQuotient(norms(chosen));
  }
  return {best.begin(), best.end()};
}

DecodeFit fit_decode(const std::vector<DecodeTime>& times) {
  DecodeFit fit = fit_form(times, {});
  std::set<double> thresholds;
  for (const DecodeTime& time : times) thresholds.insert(time.shape.tokens / time.shape.longest);
  for (const double threshold : thresholds) {
    const DecodeFit other = fit_form(times, threshold);
    if (squared_errors(other, times) < squared_errors(fit, times)) fit = other;
  }
  std::vector<double> errors;
  for (const DecodeTime& time : times) {
    errors.push_back(std::abs(fit.us(time.shape) / time.us - 1));
    if (errors.back() >= fit.worst_error) {
      fit.worst_error = errors.back();
      fit.worst_shape = time.name;
    }
  }
  fit.median_error = quantile(errors, 0.5);
  fit.shapes = static_cast<int>(times.size());
  return fit;
}

double TimeModel::step_us(const StepWork& work, int layers) const {
  double runs = 0;
  for (const SequenceWork& sequence : work.sequences) {
    runs += static_cast<double>((sequence.appended + kRunRows - 1) / kRunRows);
  }
  const double rows = static_cast<double>(work.appended());
  const double append = rows > 0 ? append_us[0] + append_us[1] * runs + append_us[2] * rows : 0;
  const auto sequences = static_cast<double>(work.sequences.size());
  const DecodeShape shape{sequences, static_cast<double>(work.decoded()),
                          static_cast<double>(work.longest())};
  return plan_us[0] + plan_us[1] * sequences + layers * (append + decode.us(shape));
}

std::string TimeModel::not_recorded(bool makes_plans) const {
  const bool no_plans = makes_plans && plan_us[0] + plan_us[1] == 0;
  if (has_appends()) return no_plans ? "plans" : "";
  return no_plans ? "plans, appends" : "appends";
}

std::string TimeModel::describe() const {
  const auto term = [](double factor, const char* what) {
    return factor > 0 ? " + " + number(factor) + " " + what : std::string();
  };
  const std::string all = term(decode.b, "sequences") + term(decode.c, "tokens");
  const std::string one = term(decode.d, "longest");
  const bool of_two = decode.largest && !all.empty() && !one.empty();
  std::string text = fmt::format(
      "{}, {} heads: decode of a layer, us = {}{}\n"
      "  fitted to {} sustained times of {}: relative error median {}, worst {} ({})\n",
      stage, heads, number(decode.a),
      of_two ? fmt::format(" + max({}, {})", all.substr(3), one.substr(3)) : all + one,
      decode.shapes, origin, percent(decode.median_error), percent(decode.worst_error),
      decode.worst_shape);
  if (plan_us[0] + plan_us[1] > 0) {
    text += "  plan of a step, us = " + number(plan_us[0]) + term(plan_us[1], "sequences") + "\n";
  }
  if (!has_appends()) {
    return text + "  appends: none are recorded, so they take no time\n";
  }
  return text + "  append of a layer, us = " + number(append_us[0]) +
         term(append_us[1], "runs of up to 8 rows") + term(append_us[2], "rows") + "\n";
}

Status fit_time_model(const Recorded& recorded, const std::string& stage, int heads,
                      CacheFormat format, TimeModel* model) {
  TimeModel result;
  result.heads = heads;
  result.format = format;
  result.origin = recorded.origin();
  std::vector<DecodeTime> times;
  for (const RecordedEntry& entry : recorded.entries) {
    if (entry.stage != stage && entry.stage.substr(0, entry.stage.find('_')) != stage) continue;
    const auto shape = shape_of(entry, "sustained", heads, format);
    if (!shape) continue;
    result.stage = entry.stage;
    times.push_back({entry.shape, *shape, entry.us});
  }
  if (times.size() < 4) {
    return {
        StatusCode::kInvalidArgument,
        fmt::format("the simulated clock has {} recorded times of stage {} with {} heads{}, and "
                    "needs 4 ({})",
                    times.size(), stage, heads,
                    is_quantised(format) ? std::string(" and a cache of ") + to_string(format) : "",
                    recorded.origin())};
  }
  result.decode = fit_decode(times);
  fit_plan(recorded, &result);
  fit_appends(recorded, &result);
  *model = std::move(result);
  return {};
}

Status SimulatedEngine::step(const StepWork& work, double* seconds) {
  *seconds = model_.step_us(work, layers_) * 1e-6;
  return {};
}

}  // namespace mla::bench
