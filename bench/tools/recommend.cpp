#include "bench/tools/recommend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>

#include "bench/explain/explain_input.h"
#include "bench/measure/shapes.h"
#include "bench/measure/table.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/stage.h"

namespace mla::bench {
namespace {

/// Sustained: the layers of a step follow each other without a pause.
constexpr const char* kMode = "sustained";

/// An entry of equal lengths.
struct Record {
  int batch = 0, tokens = 0;  // of each sequence
  const RecordedEntry* entry = nullptr;
};

/// What is recorded of a stage that a fit would take.
std::vector<Record> records_of(const Recorded& recorded, const std::string& stage,
                               CacheFormat format, int heads) {
  std::vector<Record> records;
  for (const RecordedEntry& entry : recorded.entries) {
    Shape shape;
    if (entry.stage == stage && entry.mode == kMode && parse_shape(entry.shape, &shape).ok() &&
        shape.lengths == Lengths::kEqual && is_fitted(shape.spec, heads, format)) {
      records.push_back({shape.spec.batch, shape.spec.seqlen_k, &entry});
    }
  }
  return records;
}

/// The nearest by ratios of batch and length.
const Record& nearest(const std::vector<Record>& records, int batch, int tokens) {
  const auto distance = [&](const Record& one) {
    return std::abs(std::log(double(one.batch) / batch)) +
           std::abs(std::log(double(one.tokens) / tokens));
  };
  return *std::min_element(records.begin(), records.end(), [&](const Record& a, const Record& b) {
    return distance(a) < distance(b);
  });
}

double bytes_per_sequence(CacheFormat format, const Wish& wish) {
  const CacheShape shape{.num_pages = static_cast<int>(pages_for(wish.context, kDefaultPageSize)),
                         .cache_format = format};
  return static_cast<double>(shape.page_bytes() * shape.num_pages) * wish.layers;
}

/// How the stage's plan cuts such a batch on the recorded device.
std::string splits_of(const Recorded& recorded, const Candidate& candidate, const Wish& wish) {
  DeviceLimits limits;
  const Stage* stage = find_stage(MachineKind::kModel, candidate.stage);
  if (stage == nullptr || !recorded_limits(recorded, &limits).ok()) return "";
  DecodeCase spec;
  spec.num_heads_q = wish.heads;
  spec.batch = candidate.batch;
  spec.seqlen_k = wish.context;
  spec.cache_format = candidate.format;
  const DataSet data = make_data_set(spec);
  PlanShape shape;
  if (!plan_shape(*stage, data.problem, limits, &shape).ok()) return "";
  const HostPlan plan = make_plan_on_host(data.problem, shape, data.seqlens_k);
  std::vector<int> parts(static_cast<size_t>(candidate.batch));
  for (const std::vector<Piece>& pieces : pieces_of(plan)) {
    for (const Piece& piece : pieces) ++parts[static_cast<size_t>(piece.sequence)];
  }
  const int most = *std::max_element(parts.begin(), parts.end());
  return fmt::format("{} workers, sequences {}", shape.workers * shape.row_tiles,
                     most == 1 ? "whole" : fmt::format("in up to {} parts", most));
}

std::string mib_or_gib(double bytes) {
  const double gib = bytes / (1 << 30);
  return gib < 1 ? number(gib * 1024) + " MiB" : number(gib) + " GiB";
}

/// Fills in times and memory for a batch, from the record that is nearest, and from the fit if there is one;
/// and what of the wish is not met.
void set_batch(int batch, const Record& near, const Wish& wish, Candidate* candidate) {
  const DecodeShape shape{double(batch), double(batch) * wish.context, double(wish.context)};
  const auto p90 = near.entry->counters.find("p90_us");
  const double slowness = p90 == near.entry->counters.end() ? 1 : p90->second / near.entry->us;
  const DecodeFit& fit = candidate->model.decode;
  candidate->batch = batch;
  candidate->nearest = near.entry->shape;
  candidate->nearest_us = near.entry->us;
  candidate->step_ms = wish.layers * (fit.shapes > 0 ? fit.us(shape) : near.entry->us) / 1e3;
  candidate->slow_step_ms = candidate->step_ms * slowness;
  candidate->tokens_per_s = batch / (candidate->step_ms / 1e3);
  candidate->cache_bytes = batch * bytes_per_sequence(candidate->format, wish);
  if (candidate->cache_bytes > wish.budget_bytes) {
    candidate->why_not = "its caches take " + mib_or_gib(candidate->cache_bytes);
  } else if (candidate->slow_step_ms > wish.step_ms) {
    candidate->why_not = "a slow step takes " + number(candidate->slow_step_ms) + " ms";
  }
}

/// The candidate of a stage and format; false if its records do not reach so far.
bool make_candidate(const Recorded& recorded, const std::string& stage, CacheFormat format,
                    const Wish& wish, Candidate* candidate) {
  std::vector<Record> records = records_of(recorded, stage, format, wish.heads);
  Candidate base;
  base.stage = stage;
  base.format = format;
  const bool fits = fit_time_model(recorded, stage, wish.heads, format, &base.model).ok();
  if (!fits) {
    base.model.origin = recorded.origin();
    std::erase_if(records, [&](const Record& one) { return one.tokens != wish.context; });
  }
  int largest = 0, longest = 0;
  for (const Record& one : records) {
    largest = std::max(largest, one.batch);
    longest = std::max(longest, one.tokens);
  }
  if (records.empty() || wish.context > longest || wish.batch.value_or(1) > largest) return false;

  const int last = wish.batch.value_or(wish.goal == Goal::kThroughput ? largest : 1);
  Candidate best;
  for (int batch = wish.batch.value_or(1); batch <= last; ++batch) {
    const Record& near = nearest(records, batch, wish.context);
    if (!fits && near.batch != batch) continue;
    Candidate next = base;
    set_batch(batch, near, wish, &next);
    if (best.batch == 0 || (next.why_not.empty() && next.tokens_per_s > best.tokens_per_s))
      best = std::move(next);
  }
  if (best.batch == 0) return false;
  *candidate = std::move(best);
  candidate->splits = splits_of(recorded, *candidate, wish);
  return true;
}

/// The smaller, the better.
std::tuple<bool, double, double> rank(const Candidate& one, Goal goal) {
  const bool fails = !one.why_not.empty();
  switch (goal) {
    case Goal::kLatency:
      return {fails, one.step_ms, 0};
    case Goal::kThroughput:
      return {fails, -one.tokens_per_s, 0};
    default:
      return {fails, one.cache_bytes / one.batch, one.step_ms};
  }
}

}  // namespace

const char* to_string(Goal goal) {
  constexpr const char* kNames[] = {"latency", "throughput", "memory"};
  return kNames[static_cast<int>(goal)];
}

Status recommend(std::span<const Recorded> recorded, const Wish& wish,
                 std::vector<Candidate>* candidates) {
  const std::pair<const char*, int> counts[] = {{"heads", wish.heads},
                                                {"layers", wish.layers},
                                                {"context", wish.context},
                                                {"batch", wish.batch.value_or(1)}};
  for (const auto& [name, value] : counts) {
    if (value >= 1) continue;
    return {StatusCode::kInvalidArgument, fmt::format("{} = {} must be at least 1", name, value)};
  }
  for (const auto& [name, value] :
       {std::pair("budget", wish.budget_bytes), {"p99", wish.step_ms}}) {
    if (value > 0) continue;
    return {StatusCode::kInvalidArgument,
            fmt::format("{} = {} must be greater than 0", name, value)};
  }
  std::vector<Candidate> found;
  std::set<std::pair<std::string, CacheFormat>> done;
  for (const Recorded& one : recorded) {
    std::set<std::string> stages;
    for (const RecordedEntry& entry : one.entries) {
      if (entry.stage[0] >= '0' && entry.stage[0] <= '9') stages.insert(entry.stage);
    }
    for (const std::string& stage : stages) {
      for (const CacheFormat format : kCacheFormats) {
        Candidate candidate;
        if (done.contains({stage, format}) || !make_candidate(one, stage, format, wish, &candidate))
          continue;
        done.insert({stage, format});
        found.push_back(std::move(candidate));
      }
    }
  }
  if (found.empty()) {
    return {StatusCode::kInvalidArgument,
            fmt::format("no stage has recorded times up to {} heads, {} tokens{}", wish.heads,
                        wish.context,
                        wish.batch ? fmt::format(", {} sequences", *wish.batch) : std::string())};
  }
  std::stable_sort(found.begin(), found.end(), [&](const Candidate& a, const Candidate& b) {
    return rank(a, wish.goal) < rank(b, wish.goal);
  });
  *candidates = std::move(found);
  return {};
}

std::string describe(const Wish& wish, const std::vector<Candidate>& candidates) {
  std::string text = fmt::format("goal: {}; {} heads, {} layers, sequences of {} tokens",
                                 to_string(wish.goal), wish.heads, wish.layers, wish.context);
  if (wish.batch) text += fmt::format(", {} at once", *wish.batch);
  if (std::isfinite(wish.budget_bytes))
    text += "; caches of at most " + mib_or_gib(wish.budget_bytes);
  if (std::isfinite(wish.step_ms))
    text += "; a slow step of at most " + number(wish.step_ms) + " ms";
  Table table(
      {"stage", "cache", "batch", "step, ms", "slow step, ms", "tokens/s", "caches", "why not"});
  for (const Candidate& one : candidates) {
    table.add({one.stage, mla::to_string(one.format), std::to_string(one.batch),
               number(one.step_ms), number(one.slow_step_ms), number(one.tokens_per_s),
               mib_or_gib(one.cache_bytes), one.why_not});
  }
  text += "\n\n" + table.to_string() + "\n";
  const Candidate& first = candidates.front();
  if (!first.why_not.empty()) {
    text += "Nothing that is recorded meets this goal.\n";
  } else {
    text += fmt::format("Run stage {} with a cache of {} and a batch of {}{}.\n", first.stage,
                        mla::to_string(first.format), first.batch,
                        first.splits.empty() ? "" : ": " + first.splits);
  }
  text += "\nThis rests on:\n";
  for (const Candidate& one : candidates) {
    const DecodeFit& fit = one.model.decode;
    const std::string how =
        fit.shapes == 0
            ? "as recorded: too few shapes for a fit"
            : fmt::format("{} shapes, fitted with an error of {} (median), {} (worst)", fit.shapes,
                          percent(fit.median_error), percent(fit.worst_error));
    text += fmt::format("  {}, {}: {}; nearest is {}, {} µs per layer; {}\n", one.stage,
                        mla::to_string(one.format), how, one.nearest, microseconds(one.nearest_us),
                        one.model.origin);
  }
  return text +
         "A step is the attention of all layers, one after the other, and nothing else of a model. "
         "A "
         "slow step is longer by\nthe ratio of p90 to median in the nearest record, because "
         "records of "
         "one shape have no p99. Batches and lengths\nbeyond the records are not recommended. What "
         "an 8-bit cache does to results: docs/quantisation.md\n";
}

}  // namespace mla::bench
