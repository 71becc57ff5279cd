#include "bench/service/time_model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <optional>
#include <set>

#include "bench/measure/shapes.h"
#include "bench/measure/table.h"

namespace mla::bench {
namespace {

using Columns = std::vector<std::vector<double>>;

constexpr int64_t kRunRows = 8;  // kMaxRunTokens: what a block of an append copies

/// Solves A x = b, symmetric and positive definite, by Cholesky's factors. False if A is singular.
bool solve(Columns a, std::vector<double> b, std::vector<double>* x) {
  const size_t n = b.size();
  for (size_t j = 0; j < n; ++j) {
    for (size_t k = 0; k < j; ++k) a[j][j] -= a[j][k] * a[j][k];
    if (a[j][j] < 1e-10) return false;
    a[j][j] = std::sqrt(a[j][j]);
    for (size_t i = j + 1; i < n; ++i) {
      for (size_t k = 0; k < j; ++k) a[i][j] -= a[i][k] * a[j][k];
      a[i][j] /= a[j][j];
    }
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t k = 0; k < i; ++k) b[i] -= a[i][k] * b[k];
    b[i] /= a[i][i];
  }
  for (size_t i = n; i-- > 0;) {
    for (size_t k = i + 1; k < n; ++k) b[i] -= a[k][i] * b[k];
    b[i] /= a[i][i];
  }
  *x = std::move(b);
  return true;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

std::vector<double> column(const std::vector<DecodeTime>& times, auto value) {
  std::vector<double> result;
  for (const DecodeTime& time : times) result.push_back(value(time));
  return result;
}

double squared_errors(const DecodeFit& fit, const std::vector<DecodeTime>& times) {
  double sum = 0;
  for (const DecodeTime& time : times) {
    const double error = fit.us(time.shape) / time.us - 1;
    sum += error * error;
  }
  return sum;
}

std::vector<double> times_of(const std::vector<DecodeTime>& times) {
  return column(times, [](const DecodeTime& time) { return time.us; });
}

DecodeFit fit_sum(const std::vector<DecodeTime>& times) {
  const auto x = fit_non_negative({std::vector<double>(times.size(), 1.0),
                                   column(times, [](auto& time) { return time.shape.sequences; }),
                                   column(times, [](auto& time) { return time.shape.tokens; }),
                                   column(times, [](auto& time) { return time.shape.longest; })},
                                  times_of(times));
  DecodeFit fit;
  fit.a = x[0];
  fit.b = x[1];
  fit.c = x[2];
  fit.d = x[3];
  return fit;
}

/// For every place where the largest term may change from the longest sequence to all tokens.
DecodeFit fit_largest(const std::vector<DecodeTime>& times) {
  std::set<double> thresholds;
  for (const DecodeTime& time : times) thresholds.insert(time.shape.tokens / time.shape.longest);
  DecodeFit best;
  for (const double threshold : thresholds) {
    const auto all = [&](const DecodeTime& time) {
      return time.shape.tokens / time.shape.longest > threshold ? 1.0 : 0.0;
    };
    const auto x = fit_non_negative(
        {std::vector<double>(times.size(), 1.0),
         column(times, [&](auto& time) { return all(time) * time.shape.sequences; }),
         column(times, [&](auto& time) { return all(time) * time.shape.tokens; }),
         column(times, [&](auto& time) { return (1 - all(time)) * time.shape.longest; })},
        times_of(times));
    DecodeFit fit;
    fit.largest = true;
    fit.a = x[0];
    fit.b = x[1];
    fit.c = x[2];
    fit.d = x[3];
    if (!best.largest || squared_errors(fit, times) < squared_errors(best, times)) best = fit;
  }
  return best;
}

/// The shape of an entry that counts: of this mode, these heads (0: any), one query token, one KV head.
std::optional<DecodeShape> shape_of(const RecordedEntry& entry, const std::string& mode,
                                    int heads) {
  Shape shape;
  if (entry.mode != mode || !parse_shape(entry.shape, &shape).ok()) return {};
  const DecodeCase& spec = shape.spec;
  if ((heads > 0 && spec.num_heads_q != heads) || spec.seqlen_q != 1 || spec.num_heads_kv != 1 ||
      spec.variable_lengths || spec.fixed_split_tokens != 0 || spec.dtype != DType::kBFloat16) {
    return {};
  }
  if (spec.lengths.empty()) {
    return DecodeShape{double(spec.batch), double(spec.batch) * spec.seqlen_k,
                       double(spec.seqlen_k)};
  }
  return DecodeShape{double(spec.lengths.size()),
                     std::accumulate(spec.lengths.begin(), spec.lengths.end(), 0.0),
                     double(*std::max_element(spec.lengths.begin(), spec.lengths.end()))};
}

void fit_appends(const Recorded& recorded, TimeModel* model) {
  std::vector<double> runs, rows, us;
  for (const RecordedEntry& entry : recorded.entries) {
    int batch = 0, tokens = 0;
    if (entry.stage != "cache" || entry.mode != "sustained") continue;
    if (std::sscanf(entry.shape.c_str(), "append_b%d_t%d", &batch, &tokens) != 2) continue;
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
    const auto shape = shape_of(entry, "plan", 0);
    if (entry.stage != model->stage || !shape) continue;
    sequences.push_back(shape->sequences);
    us.push_back(entry.us);
  }
  if (us.empty()) return;
  const auto x = fit_non_negative({std::vector<double>(us.size(), 1.0), sequences}, us);
  std::copy(x.begin(), x.end(), model->plan_us);
}

}  // namespace

double DecodeFit::us(const DecodeShape& shape) const {
  const double all = b * shape.sequences + c * shape.tokens;
  const double one = d * shape.longest;
  return a + (largest ? std::max(all, one) : all + one);
}

std::vector<double> fit_non_negative(const Columns& columns, std::span<const double> times) {
  // Relative errors: rows over their time, to be 1. Columns of length 1, so that none is "small".
  Columns scaled = columns;
  std::vector<double> norms;
  for (std::vector<double>& one : scaled) {
    for (size_t i = 0; i < times.size(); ++i) one[i] /= times[i];
    norms.push_back(std::sqrt(dot(one, one)));
    for (double& value : one) value /= norms.back() > 0 ? norms.back() : 1;
  }
  const std::vector<double> ones(times.size(), 1.0);
  std::vector<double> best(columns.size(), 0.0);
  double best_error = static_cast<double>(times.size());
  for (unsigned subset = 1; subset < 1u << columns.size(); ++subset) {
    std::vector<size_t> chosen;
    for (size_t j = 0; j < columns.size(); ++j) {
      if ((subset >> j & 1) != 0) chosen.push_back(j);
    }
    Columns products(chosen.size(), std::vector<double>(chosen.size()));
    std::vector<double> right, x;
    for (size_t j = 0; j < chosen.size(); ++j) {
      for (size_t k = 0; k < chosen.size(); ++k) {
        products[j][k] = dot(scaled[chosen[j]], scaled[chosen[k]]);
      }
      right.push_back(dot(scaled[chosen[j]], ones));
    }
    if (!solve(products, right, &x) || *std::min_element(x.begin(), x.end()) < 0) continue;
    const double error = static_cast<double>(times.size()) - dot(x, right);  // |A x - 1|^2
    if (error >= best_error) continue;
    best_error = error;
    std::fill(best.begin(), best.end(), 0.0);
    for (size_t j = 0; j < chosen.size(); ++j) best[chosen[j]] = x[j] / norms[chosen[j]];
  }
  return best;
}

DecodeFit fit_decode(const std::vector<DecodeTime>& times) {
  const DecodeFit sum = fit_sum(times), largest = fit_largest(times);
  DecodeFit fit = squared_errors(largest, times) < squared_errors(sum, times) ? largest : sum;
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

std::string TimeModel::describe() const {
  const auto term = [](double factor, const char* what) {
    return factor > 0 ? " + " + number(factor) + " " + what : std::string();
  };
  std::string text =
      stage + ", " + std::to_string(heads) + " heads: decode of a layer, us = " + number(decode.a);
  const std::string all = term(decode.b, "sequences") + term(decode.c, "tokens");
  const std::string one = term(decode.d, "longest");
  if (decode.largest && !all.empty() && !one.empty()) {
    text += " + max(" + all.substr(3) + ", " + one.substr(3) + ")";
  } else {
    text += all + one;
  }
  text += "\n  fitted to " + std::to_string(decode.shapes) + " sustained times of " + origin +
          ": relative error median " + percent(decode.median_error) + ", worst " +
          percent(decode.worst_error) + " (" + decode.worst_shape + ")\n";
  if (plan_us[0] + plan_us[1] > 0) {
    text += "  plan of a step, us = " + number(plan_us[0]) + term(plan_us[1], "sequences") + "\n";
  }
  const auto is_zero = [](double us) { return us == 0; };
  if (std::all_of(std::begin(append_us), std::end(append_us), is_zero)) {
    return text + "  appends: none recorded, they take no time\n";
  }
  return text + "  append of a layer, us = " + number(append_us[0]) +
         term(append_us[1], "runs of up to 8 rows") + term(append_us[2], "rows") + "\n";
}

Status fit_time_model(const Recorded& recorded, const std::string& stage, int heads,
                      TimeModel* model) {
  TimeModel result;
  result.heads = heads;
  result.origin = recorded.origin();
  std::vector<DecodeTime> times;
  for (const RecordedEntry& entry : recorded.entries) {
    if (entry.stage != stage && entry.stage.substr(0, entry.stage.find('_')) != stage) continue;
    const auto shape = shape_of(entry, "sustained", heads);
    if (!shape) continue;
    result.stage = entry.stage;
    times.push_back({entry.shape, *shape, entry.us});
  }
  if (times.size() < 4) {
    return {StatusCode::kInvalidArgument,
            "the simulated clock has " + std::to_string(times.size()) +
                " recorded times of stage " + stage + " with " + std::to_string(heads) +
                " heads, and needs 4 (" + recorded.origin() + ")"};
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
