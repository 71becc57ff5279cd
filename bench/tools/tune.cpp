#include "bench/tools/tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "bench/measure/limits.h"
#include "bench/measure/memory.h"
#include "bench/measure/truth.h"
#include "reference/testing/device_data.h"
#include "stages/common/split/plan_settings.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

/// A value of the grid, and how early it is timed: 0 first.
struct GridValue {
  int value;
  int level;
};
// Rows: what kernels pad to, and several row tiles. Most tokens in all: the cache of the largest fits
// any card that has 16-bit tensor cores.
constexpr GridValue kRows[] = {{8, 1}, {16, 0}, {32, 1}, {64, 0}, {128, 0}, {256, 1}};
constexpr GridValue kSequences[] = {{1, 0},  {2, 2},  {4, 1},  {8, 2},
                                    {16, 0}, {32, 2}, {64, 0}, {128, 1}};
constexpr GridValue kTokens[] = {{512, 0},   {1024, 2},  {2048, 1},  {4096, 0},  {8192, 1},
                                 {16384, 2}, {32768, 1}, {65536, 2}, {131072, 2}};
constexpr int64_t kMostTokens = int64_t{1} << 20;
constexpr int kHeads = 128;  // more rows: more query tokens

// What is searched. -1: as the stage has it.
constexpr int kWorkersPercent[] = {-1, 50, 200};
constexpr int kMinGrains[] = {-1, 1, 2, 4};
constexpr int kFixedGrains[] = {-1, 0, 1, 4};
constexpr int kCombineGrains[] = {-1, 0, 16};
constexpr int kMaxTileRows[] = {-1, 8, 16, 24, 32};

/// On a GPU so much work is never left to the CPU reference.
constexpr double kOnDeviceFlop = 1e15;

// The same for a cache in fp8_tile128, thinly.
constexpr GridValue kQuantisedRows[] = {{8, 2}, {16, 1}, {32, 2}, {64, 1}, {128, 1}};
constexpr GridValue kQuantisedSequences[] = {{1, 0}, {16, 0}, {128, 0}};
constexpr GridValue kQuantisedTokens[] = {{512, 0}, {8192, 0}};

Shape shape_of(int rows, int sequences, int tokens, const char* suffix) {
  const int heads = std::min(rows, kHeads);
  Shape shape;
  static_cast<void>(parse_shape(
      fmt::format("h{}_q{}_b{}_k{}{}", heads, rows / heads, sequences, tokens, suffix), &shape));
  return shape;
}

/// What makes two plans the same work.
std::vector<int32_t> numbers_of(const PlanShape& shape, const HostPlan& plan) {
  std::vector<int32_t> numbers{shape.row_tiles};
  for (const WorkerBegin& begin : plan.worker_begin) {
    numbers.insert(numbers.end(), {begin.sequence, begin.grain});
  }
  while (numbers.size() > 3 && numbers[numbers.size() - 2] == plan.header.batch) {
    numbers.resize(numbers.size() - 2);  // workers without work
  }
  return numbers;
}

/// A candidate on the machine.
struct Candidate {
  Stage stage;
  TunedTime result;
  WorkspaceBytes needs;
  DeviceBuffer workspace;
  int handle = 0;
  std::vector<double> samples;
  double median() const { return summarize(samples).median; }
};

class ShapeTuner {
 public:
  ShapeTuner(Machine& machine, Runner& runner, const Shape& shape,
             const std::function<bool(const std::string&)>& progress)
      : machine_(machine), runner_(runner), shape_(shape), progress_(progress) {}

  Status run(const std::vector<const Stage*>& stages, TunedShape* result) {
    MLA_RETURN_IF_ERROR(prepare());
    for (const Stage* stage : stages) {
      if (!can_be_tuned(*stage, shape_, machine_.limits())) continue;
      MLA_RETURN_IF_ERROR(enter(*stage));
    }
    MLA_RETURN_IF_ERROR(first_look());
    const double least = least_median();
    const size_t own = candidates_.size();
    for (size_t i = 0; i < own; ++i) {
      if (!(candidates_[i]->median() <= kTuneSearched * least)) continue;
      const std::vector<Stage> more =
          tune_candidates(candidates_[i]->stage, data_.problem, machine_.limits());
      for (size_t j = 1; j < more.size(); ++j) MLA_RETURN_IF_ERROR(enter(more[j]));
    }
    MLA_RETURN_IF_ERROR(first_look());
    MLA_RETURN_IF_ERROR(rounds(kTuneStays * least_median()));
    result->shape = shape_;
    for (const auto& candidate : candidates_) {
      candidate->result.cold = summarize(candidate->samples);
      result->times.push_back(candidate->result);
    }
    runner_.clear();
    return {};
  }

 private:
  Status step(const std::string& what) {
    if (progress_(shape_.name + ": " + what)) return {};
    return {StatusCode::kFileError, "interrupted"};
  }

  Status prepare() {
    MLA_RETURN_IF_ERROR(step("data and fp64 reference"));
    runner_.clear();
    data_ = make_data_set(shape_.spec);
    MLA_RETURN_IF_ERROR(check_fits("shape " + shape_.name, footprint(data_.problem), &machine_,
                                   machine_.kind() == MachineKind::kModel ? 1 : 0));
    MLA_RETURN_IF_ERROR(generate_on_device(machine_, data_, &tensors_));
    const double flop = machine_.kind() == MachineKind::kGpu
                            ? kOnDeviceFlop
                            : work_of(data_.problem, data_.total_tokens()).flop;
    return truth_.evaluate(machine_, data_, tensors_, flop);
  }

  /// Checks a candidate; it stays without samples if it is wrong. An error: the machine is lost.
  Status enter(const Stage& stage) {
    const std::string settings = to_string(stage.settings);
    MLA_RETURN_IF_ERROR(step(stage.slug + (settings.empty() ? "" : " " + settings)));
    Candidate& candidate = *candidates_.emplace_back(std::make_unique<Candidate>());
    candidate.stage = stage;
    candidate.result.stage = stage.slug;
    candidate.result.settings = stage.settings;
    candidate.result.status = check(candidate);
    return runner_.lost() ? candidate.result.status : Status();
  }

  Status check(Candidate& candidate) {
    const Stage& stage = candidate.stage;
    MLA_RETURN_IF_ERROR(workspace_bytes(stage, data_.problem, &candidate.needs));
    MLA_RETURN_IF_ERROR(candidate.workspace.allocate(machine_, candidate.needs.total()));
    MLA_RETURN_IF_ERROR(plan(candidate));
    MLA_RETURN_IF_ERROR(runner_.prepare(
        [this, &candidate](Stream stream) {
          return decode_planned(candidate.stage, data_.problem, tensors_.tensors(),
                                candidate.needs.plan_in(candidate.workspace),
                                candidate.needs.scratch_in(candidate.workspace), stream);
        },
        &candidate.handle));
    MLA_RETURN_IF_ERROR(plan(candidate));  // nothing that the run before left
    MLA_RETURN_IF_ERROR(tensors_.poison_outputs(machine_));
    MLA_RETURN_IF_ERROR(machine_.synchronize());
    std::vector<double> unused;
    MLA_RETURN_IF_ERROR(runner_.run_cold(candidate.handle, 1, &unused));
    DecodeComparison comparison;
    uint64_t fingerprint = 0;
    MLA_RETURN_IF_ERROR(truth_.compare(machine_, data_, tensors_, &comparison, &fingerprint));
    if (comparison.ok()) return {};
    return {StatusCode::kKernelRejected, "wrong result: " + comparison.describe()};
  }

  /// A workspace that holds the plan and nothing else of use.
  Status plan(Candidate& candidate) {
    MLA_RETURN_IF_ERROR(
        machine_.fill(candidate.workspace.data(), 0xff, candidate.workspace.bytes()));
    MLA_RETURN_IF_ERROR(plan_decode(candidate.stage, data_.problem, tensors_.tensors().seqlens_k,
                                    candidate.needs.plan_in(candidate.workspace)));
    return machine_.synchronize();
  }

  /// A few runs of everyone who has none yet, in turn.
  Status first_look() {
    MLA_RETURN_IF_ERROR(step("first look"));
    std::vector<Candidate*> fresh;
    for (const auto& candidate : candidates_) {
      if (candidate->result.status.ok() && candidate->samples.empty()) {
        fresh.push_back(candidate.get());
      }
    }
    const int runs = machine_.kind() == MachineKind::kGpu ? kTuneFirstLook : 1;
    for (int run = 0; run < runs; ++run) {
      for (Candidate* candidate : fresh) MLA_RETURN_IF_ERROR(sample(*candidate, 1));
    }
    return {};
  }

  Status sample(Candidate& candidate, int runs) {
    return runner_.run_cold(candidate.handle, runs, &candidate.samples);
  }

  double least_median() const {
    double least = std::numeric_limits<double>::infinity();
    for (const auto& candidate : candidates_) least = std::fmin(least, candidate->median());
    return least;
  }

  /// Rounds of those that take at most `most`, each beginning with another one. What they ran before
  /// counts as warm-up.
  Status rounds(double most) {
    std::vector<Candidate*> staying;
    for (const auto& candidate : candidates_) {
      if (candidate->median() <= most) staying.push_back(candidate.get());
    }
    if (staying.empty()) return {};
    std::vector<double> expected_us;
    std::vector<RunCounts> counts;
    for (Candidate* candidate : staying) {
      expected_us.push_back(candidate->median());
      counts.push_back(runner_.run_counts(candidate->median()));
      candidate->samples.clear();
    }
    const int all =
        std::max_element(counts.begin(), counts.end(), [](const RunCounts& a, const RunCounts& b) {
          return a.rounds < b.rounds;
        })->rounds;
    for (int round = 0; round < all; ++round) {
      MLA_RETURN_IF_ERROR(step(fmt::format("{} candidates, round {}", staying.size(), round + 1)));
      for (size_t i = 0; i < staying.size(); ++i) {
        const size_t j =
            (i + static_cast<size_t>(round) * staying.size() / static_cast<size_t>(all)) %
            staying.size();
        if (round >= counts[j].rounds) continue;
        runner_.rest(expected_us[j]);
        MLA_RETURN_IF_ERROR(sample(*staying[j], counts[j].runs));
      }
    }
    return {};
  }

  Machine& machine_;
  Runner& runner_;
  const Shape& shape_;
  const std::function<bool(const std::string&)>& progress_;
  DataSet data_;
  DeviceTensors tensors_;
  Truth truth_;
  std::vector<std::unique_ptr<Candidate>> candidates_;
};

Json time_json(const TunedTime& time) {
  Json json{{"stage", time.stage}};
  for (const PlanSetting& setting : kPlanSettings) {
    const int value = time.settings.*setting.value;
    if (value >= 0) json["settings"][setting.name] = value;
  }
  json["us"] = std::round(time.cold.median * 100) / 100;
  json["runs"] = time.cold.n;
  return json;
}

}  // namespace

std::vector<Shape> tune_shapes() {
  struct Place {
    int level;
    Shape shape;
  };
  std::vector<Place> places;
  const auto add = [&](const auto& all_rows, const auto& all_sequences, const auto& all_tokens,
                       const char* suffix) {
    for (const GridValue& rows : all_rows) {
      for (const GridValue& sequences : all_sequences) {
        for (const GridValue& tokens : all_tokens) {
          if (int64_t{sequences.value} * tokens.value > kMostTokens) continue;
          places.push_back({rows.level + sequences.level + tokens.level,
                            shape_of(rows.value, sequences.value, tokens.value, suffix)});
        }
      }
    }
  };
  add(kRows, kSequences, kTokens, "");
  for (const char* suffix : {"_fp8_tile128", "_fp8_tensor", "_int8_tile128"}) {
    add(kQuantisedRows, kQuantisedSequences, kQuantisedTokens, suffix);
  }
  std::stable_sort(places.begin(), places.end(),
                   [](const Place& a, const Place& b) { return a.level < b.level; });
  std::vector<Shape> shapes;
  for (Place& place : places) shapes.push_back(std::move(place.shape));
  return shapes;
}

bool can_be_tuned(const Stage& stage, const Shape& shape, const DeviceLimits& limits) {
  return stage.plan_shape != nullptr && can_read(stage, shape.spec.cache_format) &&
         check_device(stage, limits).ok();
}

std::vector<Stage> tune_candidates(const Stage& stage, const Problem& problem,
                                   const DeviceLimits& limits) {
  std::vector<Stage> candidates;
  std::set<std::vector<int32_t>> seen;
  const std::vector<int32_t> lengths(static_cast<size_t>(problem.batch),
                                     static_cast<int32_t>(problem.max_seqlen_k()));
  for (const int tile_rows : kMaxTileRows) {
    for (const int workers : kWorkersPercent) {
      for (const int least : kMinGrains) {
        for (const int fixed : kFixedGrains) {
          for (const int combine : kCombineGrains) {
            Stage one = stage;
            one.settings = {.workers_percent = workers,
                            .min_grains = least,
                            .fixed_grains = fixed,
                            .combine_grains = combine,
                            .max_tile_rows = tile_rows};
            PlanShape shape;
            if (!plan_shape(one, problem, limits, &shape).ok()) return {stage};
            const HostPlan plan = make_plan_on_host(problem, shape, lengths);
            if (seen.insert(numbers_of(shape, plan)).second) candidates.push_back(one);
          }
        }
      }
    }
  }
  return candidates;
}

Status tune_shape(Machine& machine, Runner& runner, const std::vector<const Stage*>& stages,
                  const Shape& shape, const std::function<bool(const std::string&)>& progress,
                  TunedShape* result) {
  auto tuner = std::make_unique<ShapeTuner>(machine, runner, shape, progress);
  const Status status = tuner->run(stages, result);
  // Freeing memory waits for all kernels: not for one that never ends.
  if (runner.lost()) static_cast<void>(tuner.release());
  return status;
}

struct TuneFile::Data {
  std::vector<Json> regimes;
};

TuneFile::TuneFile(Context context)
    : context_(std::move(context)), data_(std::make_unique<Data>()) {}
TuneFile::~TuneFile() = default;

Status TuneFile::resume(const std::string& path) {
  const auto refused = [&](const std::string& why) {
    return Status(StatusCode::kFileError, path + ": " + why);
  };
  std::ifstream file(path);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) return refused("cannot be read");
  ChoiceTable table;
  MLA_RETURN_IF_ERROR(parse_choice_table(text, path, &table));
  const Json json = Json::parse(text);
  for (const char* key : {"gpu", "multiprocessors", "commit"}) {
    const std::string there = json["context"].value(key, ""), here = value_of(context_, key);
    if (there != here) {
      return refused(
          fmt::format("was begun with {} {}, but this is {}: begin a new table", key, there, here));
    }
  }
  for (const Json& regime : json["regimes"]) data_->regimes.push_back(regime);
  return {};
}

bool TuneFile::has(const Shape& shape) const {
  return std::any_of(data_->regimes.begin(), data_->regimes.end(),
                     [&](const Json& regime) { return regime.value("shape", "") == shape.name; });
}

void TuneFile::add(const TunedShape& tuned) {
  const Regime regime = regime_of(make_data_set(tuned.shape.spec).problem);
  Json json{{"rows", regime.rows}, {"sequences", regime.sequences}, {"tokens", regime.tokens}};
  if (is_quantised(regime.cache_format)) json["cache_format"] = mla::to_string(regime.cache_format);
  json["shape"] = tuned.shape.name;
  json["times"] = Json::array();
  std::vector<TunedTime> times = tuned.times;
  std::erase_if(times, [](const TunedTime& time) { return time.cold.n == 0; });
  std::stable_sort(times.begin(), times.end(), [](const TunedTime& a, const TunedTime& b) {
    return a.cold.median < b.cold.median;
  });
  // Of each stage the time without settings and the best with any: nothing else could be chosen.
  std::set<std::pair<std::string, bool>> seen;
  for (const TunedTime& time : times) {
    if (seen.insert({time.stage, time.settings == PlanSettings{}}).second) {
      json["times"].push_back(time_json(time));
    }
  }
  if (!times.empty()) data_->regimes.push_back(std::move(json));
}

size_t TuneFile::size() const {
  return data_->regimes.size();
}

std::string TuneFile::text() const {
  Json head{
      {"schema", kChoiceSchema},
      {"made_of",
       "mla_tune: cold medians in interleaved rounds; equal lengths, block tables full; every "
       "candidate checked before it was timed"}};
  for (const auto& [key, value] : context_) head["context"][key] = value;
  std::string text = head.dump(1);
  text.erase(text.size() - 2);  // the end of the object
  text += ",\n \"regimes\": [";
  for (size_t i = 0; i < data_->regimes.size(); ++i) {
    text += (i == 0 ? "\n  " : ",\n  ") + data_->regimes[i].dump();
  }
  return text + "\n ]\n}\n";
}

}  // namespace mla::bench
