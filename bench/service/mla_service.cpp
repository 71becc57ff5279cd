/// @file
/// mla_service: a decode service in miniature. Requests arrive, are batched over a paged cache and
/// decoded by a stage's kernels; beside it the traditional way, static batches in padded buffers.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <span>

#include "bench/measure/choice_option.h"
#include "bench/measure/format_option.h"
#include "bench/measure/program.h"
#include "bench/measure/progress.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"
#include "bench/service/checks.h"
#include "bench/service/experiments.h"
#include "bench/service/meter.h"
#include "bench/service/rank_threads.h"
#include "bench/service/ranks_engine.h"
#include "bench/service/real_engine.h"
#include "bench/service/report.h"
#include "bench/service/scale.h"
#include "bench/service/scenarios.h"
#include "bench/service/time_model.h"

namespace mla::bench {
namespace {

constexpr const char* kScope =
    "Attention only: no weights, no other layers' work, no prefill (a prompt's rows appear in the\n"
    "cache as if another machine had computed them; appending them counts). One GPU, or several "
    "that\nshare every cache; synthetic data.\n";

constexpr int64_t kMostOnModel = int64_t{256} << 20;  // bytes of caches that the model is for

struct Options {
  std::string scenario = "service";
  std::string way = "both";
  std::string engine = "auto";
  std::string stage = "auto";
  std::string static_stage;  // empty: that of the paged way
  double static_tolerance = 0.05;
  bool static_tolerance_given = false;
  int distinct_caches = 0;
  uint64_t seed = 1;
  std::string out;
  std::vector<CacheFormat> cache_formats = {CacheFormat::k16Bit};
  bool explain_model = false;
  bool list = false;
  std::string model;  // empty: the scenario's
  bool cuda_graphs = true;
  bool cuda_graphs_given = false;
  Thresholds thresholds;
  double alert_window = 0.5;
  double price_per_hour = kUnknown;
  std::vector<std::string> ab;  // two stages, or stage:format
  int pairs = 8;
  std::string rollout;  // the new stage
  /// What the command line replaces in every scenario chosen.
  std::vector<std::function<void(Scenario*)>> changes;
};

/// Set by Ctrl-C, which ends the run under way; the runs before it are kept. The second ends the
/// program.
std::atomic<bool> interrupted = false;

void on_interrupt(int signal) {
  interrupted = true;
  std::signal(signal, SIG_DFL);
}

/// Whether scenarios are others than those of their names.
bool is_changed(const Options& options) {
  return !options.changes.empty() || !options.model.empty();
}

Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

/// The problem of a step with the most sequences of the greatest length.
Problem largest_problem(const Scenario& scenario) {
  return {.cache_format = scenario.cache_format,
          .batch = scenario.max_batch,
          .num_heads_q = scenario.heads,
          .num_pages = static_cast<int>(scenario.num_pages()),
          .max_pages_per_seq = static_cast<int>(pages_for(scenario.max_length, kDefaultPageSize)),
          .softmax_scale = 1};
}

/// ok, or kUnsupported if this stage, a slug or a number, is one that cannot read the scenario's cache.
Status check_reads(const std::string& name, const Scenario& scenario) {
  const Stage* stage = find_stage(MachineKind::kModel, name);
  return stage == nullptr ? Status() : check_cache_format(*stage, largest_problem(scenario));
}

/// What "auto" stands for in tables and recordings: its choice for the largest problem. Empty if none of
/// the stages can be chosen.
std::string chosen_stage(std::span<const Stage> stages, const Scenario& scenario,
                         const DeviceLimits& limits) {
  const Problem problem = largest_problem(scenario);
  if (stages.empty() || !validate(problem).ok()) return "";
  const Choice choice = choose_among(stages, choice_tables(), problem, limits);
  return choice.stage == nullptr ? "" : choice.stage->slug;
}

/// How steps are done, and how long they take: made once, engines scenario by scenario.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual std::string name() const = 0;      ///< "gpu", "simulated", "model"
  virtual std::string title() const = 0;     ///< For a table
  virtual std::string origin() const = 0;    ///< Whose times
  virtual std::string describe() const = 0;  ///< A line or more
  virtual Machine& machine() const = 0;      ///< That the program runs on
  virtual bool spares_static_steps() const { return false; }
  virtual bool has_graphs() const { return false; }
  /// What a GPU did, to compare with: of a simulated clock only.
  virtual RecordedService recorded_service(const Scenario&) const { return {}; }
  /// Called before engine(), for each scenario; says on stdout what is not as asked.
  virtual Status prepare(const Scenario& scenario) = 0;
  /// @param stage  slug, number or "auto"; `slug` is what was meant
  virtual Status engine(const Scenario& scenario, const std::string& stage, std::string* slug,
                        std::unique_ptr<Engine>* engine) = 0;
};

/// Wall time of kernels.
class RealClock final : public Clock {
 public:
  RealClock(Machine& machine, int distinct, bool graphs)
      : machine_(machine), distinct_(distinct), graphs_(graphs) {}
  bool gpu() const { return machine_.kind() == MachineKind::kGpu; }
  std::string name() const override { return gpu() ? "gpu" : "model"; }
  std::string title() const override { return gpu() ? "on the GPU" : "on the GPU model"; }
  std::string origin() const override { return machine_.description(); }
  std::string describe() const override {
    return "clock: wall time of " + machine_.description() +
           (gpu() ? "\n" : ", which says nothing about a GPU\n");
  }
  Machine& machine() const override { return machine_; }
  bool spares_static_steps() const override { return gpu(); }
  bool has_graphs() const override { return graphs_; }

  Status prepare(const Scenario& scenario) override {
    const auto pages = static_cast<int>(scenario.num_pages());
    const int64_t bytes = layer_bytes(pages, scenario.cache_format) * scenario.layers;
    if (!gpu() && bytes > kMostOnModel) {
      return invalid(
          fmt::format("scenario {} has {} MiB of caches, but the GPU model takes at most {}: "
                      "choose scenario tiny, or --engine simulated",
                      scenario.name, bytes >> 20, kMostOnModel >> 20));
    }
    const int distinct = std::min(distinct_, scenario.layers);
    const auto fits = [&](const auto& made, int each) {
      return made != nullptr && made->shape().num_pages == each &&
             made->shape().cache_format == scenario.cache_format &&
             made->layers() == scenario.layers;
    };
    if (scenario.ranks > 1) {
      const int each = pages / scenario.ranks;
      if (!fits(ranks_, each) || ranks_->ranks() != scenario.ranks) {
        caches_.reset();
        ranks_.reset();
        MakeRankTransport make;
        MLA_RETURN_IF_ERROR(make_rank_transports(machine_, scenario.ranks, kRankTimeLimit, &make));
        MLA_RETURN_IF_ERROR(DeviceRanks::create(machine_, scenario.ranks, each,
                                                scenario.cache_format, scenario.layers, distinct,
                                                kRankTimeLimit, make, &ranks_));
      }
    } else if (!fits(caches_, pages)) {
      caches_.reset();
      ranks_.reset();
      MLA_RETURN_IF_ERROR(LayerCaches::create(machine_, pages, scenario.cache_format,
                                              scenario.layers, distinct, &caches_));
    }
    if (scenario.ranks > 1) {
      std::cout << fmt::format("{} {} share each cache: {}\n", scenario.ranks,
                               gpu() ? "GPUs" : "ranks on the GPU model",
                               mla::to_string(exchange_for(scenario.heads, scenario.ranks)));
    }
    if (const int made = scenario.ranks > 1 ? ranks_->distinct() : caches_->distinct();
        made < scenario.layers) {
      std::cout << made << " distinct caches serve " << scenario.layers << " layers in turn"
                << (distinct_ == 0 ? ": memory does not hold more\n" : ", as asked\n");
    }
    return {};
  }

  Status engine(const Scenario& scenario, const std::string& name, std::string* slug,
                std::unique_ptr<Engine>* engine) override {
    note_choice_table("mla_service", name);
    const Stage* stage = find_stage(machine_.kind(), name);
    if (stage == nullptr) return invalid("there is no stage " + name);
    *slug = stage->slug;
    if (name == kAutoSlug) {
      *slug = chosen_stage(stages(machine_.kind()), scenario, machine_.limits());
      std::cout << "auto chooses a stage in every step; in the largest step it is " << *slug
                << "\n";
    }
    if (scenario.ranks > 1) {
      std::unique_ptr<RanksEngine> several;
      MLA_RETURN_IF_ERROR(RanksEngine::create(*ranks_, *stage, scenario.heads, graphs_, &several));
      *engine = std::move(several);
      return {};
    }
    std::unique_ptr<RealEngine> real;
    MLA_RETURN_IF_ERROR(
        RealEngine::create(machine_, *stage, *caches_, scenario.heads, graphs_, &real));
    *engine = std::move(real);
    return {};
  }

 private:
  Machine& machine_;
  int distinct_;
  bool graphs_;
  std::unique_ptr<LayerCaches> caches_;  // of one device
  std::unique_ptr<DeviceRanks> ranks_;   // of several
};

/// A fit to what was recorded.
class SimulatedClock final : public Clock {
 public:
  SimulatedClock(Recorded recorded, bool explain)
      : recorded_(std::move(recorded)), origin_(recorded_.origin()), explain_(explain) {}
  std::string name() const override { return "simulated"; }
  std::string title() const override { return "simulated clock"; }
  std::string origin() const override { return origin_; }
  std::string describe() const override {
    return "simulated clock, fitted to " + recorded_.origin() +
           "; nothing is decoded, and the host takes no time\n";
  }
  Machine& machine() const override { return model_machine(); }
  RecordedService recorded_service(const Scenario& scenario) const override {
    return load_newest_service(std::filesystem::path(recorded_.file).parent_path().string(),
                               scenario);
  }

  /// Quantised caches have recordings of their own.
  Status prepare(const Scenario& scenario) override {
    const CacheFormat format = scenario.cache_format;
    if (format == format_) return {};
    Recorded other;
    MLA_RETURN_IF_ERROR(is_quantised(format) ? load_newest_recorded_of(format, &other)
                                             : load_newest_recorded(&other));
    recorded_ = std::move(other);
    format_ = format;
    if (origin_.find(recorded_.origin()) == std::string::npos) origin_ += "; " + recorded_.origin();
    return {};
  }

  Status engine(const Scenario& scenario, const std::string& name, std::string* slug,
                std::unique_ptr<Engine>* engine) override {
    note_choice_table("mla_service", name);
    const std::string stage = name == kAutoSlug ? best_recorded(scenario) : name;
    TimeModel model;
    MLA_RETURN_IF_ERROR(
        fit_time_model(recorded_, stage, scenario.heads, scenario.cache_format, &model));
    *slug = model.stage;
    const DecodeFit& fit = model.decode;
    std::cout << (explain_ ? model.describe()
                           : fmt::format("fit of {}, {} heads: relative error median {}, worst {} "
                                         "of {} shapes{}\n",
                                         model.stage, scenario.heads, percent(fit.median_error),
                                         percent(fit.worst_error), fit.shapes,
                                         is_quantised(format_) ? " of " + model.origin : ""));
    const Stage* known = find_stage(MachineKind::kModel, model.stage);
    const std::string missing =
        model.not_recorded(known != nullptr && known->plan_shape != nullptr);
    if (!missing.empty()) {
      std::cout << "  not recorded, so without time: " << missing << "\n";
    }
    if (scenario.ranks == 1) {
      *engine = std::make_unique<SimulatedEngine>(std::move(model), scenario.layers);
      return {};
    }
    Links links;
    MLA_RETURN_IF_ERROR(fit_links(load_parallel_reports(), &links));
    const Exchange exchange = exchange_for(scenario.heads, scenario.ranks);
    std::cout << fmt::format("{} GPUs share each sequence; links: {}, {}\n", scenario.ranks,
                             links.origin, mla::to_string(exchange));
    *engine = std::make_unique<SimulatedRanks>(std::move(model), scenario.layers, links, exchange,
                                               scenario.ranks);
    return {};
  }

 private:
  /// What "auto" would choose on the GPU that was recorded, of the stages that were.
  std::string best_recorded(const Scenario& scenario) const {
    std::vector<Stage> recorded;
    for (const Stage& stage : stages(MachineKind::kModel)) {
      const bool known =
          std::any_of(recorded_.entries.begin(), recorded_.entries.end(),
                      [&](const RecordedEntry& entry) { return entry.stage == stage.slug; });
      if (known) recorded.push_back(stage);
    }
    const auto context = [&](const char* key) {
      const auto found = recorded_.context.find(key);
      return found == recorded_.context.end() ? std::string() : found->second;
    };
    DeviceLimits limits;
    limits.name = context("gpu");
    limits.compute_capability = static_cast<int>(
        std::lround(10 * std::strtod(context("compute_capability").c_str(), nullptr)));
    return chosen_stage(recorded, scenario, limits);
  }

  Recorded recorded_;  // of caches of this format
  CacheFormat format_ = CacheFormat::k16Bit;
  std::string origin_;  // of all that served
  bool explain_;
};

Status make_clock(const Options& options, std::unique_ptr<Clock>* clock) {
  std::string why_not;
  Machine* gpu = nullptr;
  if (options.engine == "auto" || options.engine == "gpu") gpu = gpu_machine(&why_not);
  if (gpu == nullptr && options.engine == "gpu") return {StatusCode::kUnavailable, why_not};
  if (gpu != nullptr || options.engine == "model") {
    if (gpu != nullptr) describe_environment(*gpu);  // after which NVML's readings are of this GPU
    // Unasked not on the model, where a graph saves nothing and padding costs.
    const bool graphs = options.cuda_graphs && (gpu != nullptr || options.cuda_graphs_given);
    *clock = std::make_unique<RealClock>(gpu != nullptr ? *gpu : model_machine(),
                                         options.distinct_caches, graphs);
    return {};
  }
  if (!why_not.empty()) std::cout << why_not << "\n";
  Recorded recorded;
  MLA_RETURN_IF_ERROR(load_newest_recorded(&recorded));
  *clock = std::make_unique<SimulatedClock>(std::move(recorded), options.explain_model);
  return {};
}

std::string describe(const Scenario& scenario) {
  const auto& [rate, prompt, output, prefixes] = scenario.workload;
  const std::string shared = prefixes.count > 0 ? fmt::format("one of {} prefixes of {} and ",
                                                              prefixes.count, prefixes.tokens)
                                                : "";
  return fmt::format(
      "{}: {}; {} requests/s, prompts {}{:g} (sd {:g}), outputs {:g} (sd {:g}) tokens\n"
      "{} heads, {} layers, {} pages: {} GB of cache; batch up to {}, length up to {}{}\n",
      title(scenario), scenario.what, number(rate), shared, prompt.mean, prompt.sd, output.mean,
      output.sd, scenario.heads, scenario.layers, scenario.num_pages(),
      number(double(scenario.num_pages() * scenario.page_bytes()) / 1e9), scenario.max_batch,
      scenario.max_length,
      scenario.max_queue ? fmt::format(", queue up to {}", *scenario.max_queue) : "");
}

RunLimits limits_of_run(const Scenario& scenario, const Options& options) {
  RunLimits until;
  if (scenario.seconds > 0) until.seconds = scenario.seconds;
  until.requests = scenario.requests;
  until.stop = &interrupted;
  until.thresholds = options.thresholds;
  until.window = options.alert_window;
  return until;
}

/// Serves a scenario in the paged way by one engine.
/// @param part   the requests that go there
/// @param count  under way at the beginning; -1: as many as in balance
Status serve_paged(const Scenario& scenario, const Options& options, uint64_t seed, Part part,
                   int64_t count, Engine& engine, Figures* figures) {
  const SchedulerLimits limits = limits_of(scenario);
  Workload workload = scenario.workload;
  workload.rate *= part.to - part.from;
  if (count < 0) MLA_RETURN_IF_ERROR(population_in_balance(workload, limits, engine, &count));
  std::unique_ptr<PagedScheduler> scheduler;
  MLA_RETURN_IF_ERROR(PagedScheduler::create(limits, &scheduler));
  MeteredEngine metered(engine);
  MLA_RETURN_IF_ERROR(run_service(
      limits_of_run(scenario, options), requests_under_way(workload, count, seed),
      RequestStream(scenario.workload, seed, count, part), *scheduler, metered, figures));
  metered.write(scenario.ranks == 1, figures);  // one GPU is read
  return {};
}

/// "12:fp8_tile128" or "08", which keeps the scenario's format.
Status read_configuration(const std::string& text, std::string* stage, CacheFormat* format) {
  const size_t colon = text.find(':');
  *stage = text.substr(0, colon);
  if (colon == std::string::npos) return {};
  for (const CacheFormat one : kCacheFormats) {
    if (text.substr(colon + 1) != to_string(one)) continue;
    *format = one;
    return {};
  }
  return invalid("--ab " + text + ": no cache format has that name");
}

/// Two configurations, "stage" or "stage:format", with the same requests of several seeds.
Status compare_two(const Scenario& scenario, const Options& options, Clock& clock,
                   Progress& progress, std::vector<ServiceRun>* runs) {
  std::cout << "\n" << describe(scenario);
  std::vector<ServiceRun> of[2];
  std::vector<int64_t> counts(static_cast<size_t>(options.pairs), scenario.under_way);
  for (size_t i = 0; i < 2; ++i) {
    std::string stage, slug;
    Scenario one = scenario;
    MLA_RETURN_IF_ERROR(read_configuration(options.ab[i], &stage, &one.cache_format));
    MLA_RETURN_IF_ERROR(check_reads(stage, one));
    progress.step(scenario.name + ": caches");
    MLA_RETURN_IF_ERROR(clock.prepare(one));
    std::unique_ptr<Engine> engine;
    MLA_RETURN_IF_ERROR(clock.engine(one, stage, &slug, &engine));
    MLA_RETURN_IF_ERROR(warm_up(*engine));
    for (size_t pair = 0; pair < counts.size(); ++pair) {
      progress.step(fmt::format("{}, {}, pair {}", scenario.name, options.ab[i], pair + 1));
      if (counts[pair] < 0) {  // as many on the other side
        MLA_RETURN_IF_ERROR(
            population_in_balance(one.workload, limits_of(one), *engine, &counts[pair]));
      }
      ServiceRun& run = of[i].emplace_back(
          ServiceRun{one, "paged", slug, {}, options.thresholds, options.price_per_hour});
      MLA_RETURN_IF_ERROR(
          serve_paged(one, options, options.seed + pair, {}, counts[pair], *engine, &run.figures));
    }
  }
  progress.clear();
  std::cout << "\n"
            << compare_pairs(options.ab[0], of[0], options.ab[1], of[1], clock.title())
            << std::flush;
  for (const auto& side : of) runs->insert(runs->end(), side.begin(), side.end());
  return {};
}

/// The new stage gets 5%, 25%, then all of the requests, while it raises no alert.
Status roll_out(const Scenario& scenario, const Options& options, Clock& clock,
                Progress& progress) {
  constexpr double kShares[] = {0.05, 0.25, 1};
  std::cout << "\n" << describe(scenario);
  MLA_RETURN_IF_ERROR(check_reads(options.rollout, scenario));
  progress.step(scenario.name + ": caches");
  MLA_RETURN_IF_ERROR(clock.prepare(scenario));
  std::unique_ptr<Engine> engines[2];
  std::string slugs[2];
  for (const bool by_new : {false, true}) {
    MLA_RETURN_IF_ERROR(clock.engine(scenario, by_new ? options.rollout : options.stage,
                                     &slugs[by_new], &engines[by_new]));
    MLA_RETURN_IF_ERROR(warm_up(*engines[by_new]));
  }
  std::vector<RolloutPhase> phases;
  const auto serve = [&](bool by_new, double from, double to, Figures* figures) {
    progress.step(
        fmt::format("{}, {:.0f}% on {}", scenario.name, 100 * (to - from), slugs[by_new]));
    return serve_paged(scenario, options, options.seed, {from, to}, scenario.under_way,
                       *engines[by_new], figures);
  };
  MLA_RETURN_IF_ERROR(run_rollout(kShares, serve, &phases));
  progress.clear();
  std::cout << "\n" << describe_rollout(slugs[0], slugs[1], phases, clock.title()) << std::flush;
  return {};
}

/// Serves a scenario in the ways that were asked for. Appends each run that came to its end to `runs`.
Status serve(const Scenario& scenario, const Options& options, Clock& clock, Progress& progress,
             std::vector<ServiceRun>* runs) {
  std::cout << "\n" << describe(scenario);
  const SchedulerLimits limits = limits_of(scenario);
  if (options.way != "paged") {  // refused before the other way has run
    std::unique_ptr<StaticScheduler> possible;
    MLA_RETURN_IF_ERROR(StaticScheduler::create(limits, &possible));
  }
  progress.step(scenario.name + ": caches");
  MLA_RETURN_IF_ERROR(clock.prepare(scenario));
  std::string stage, static_stage;
  std::unique_ptr<Engine> engine, static_engine;
  MLA_RETURN_IF_ERROR(clock.engine(scenario, options.stage, &stage, &engine));
  const std::string& named = options.static_stage.empty() ? options.stage : options.static_stage;
  if (options.way != "paged") {
    MLA_RETURN_IF_ERROR(clock.engine(scenario, named, &static_stage, &static_engine));
  }
  // A recording of other requests would be compared with nothing.
  RecordedService recording = clock.recorded_service(scenario);
  if (is_changed(options) || recording.seed != options.seed) recording.runs.clear();
  const auto recorded = [&](const std::string& way, const std::string& slug) {
    const auto* run = recording.find(scenario, way, slug);
    return run == nullptr ? std::map<std::string, double>() : run->figures;
  };
  for (Engine* one : {engine.get(), static_engine.get()}) {
    if (one != nullptr) MLA_RETURN_IF_ERROR(warm_up(*one));
  }
  int64_t count = scenario.under_way;
  if (const auto figures = recorded("paged", stage); count < 0 && !figures.empty()) {
    // A request more or less under way may be the longest, to which a static batch is padded.
    count = std::llround(figures.at("arrived"));
    for (RequestStream arrivals(scenario.workload, options.seed);
         arrivals.peek().arrival <= figures.at("span_s"); arrivals.take()) {
      --count;
    }
    std::cout << count << " requests are half-way at the beginning, as many as on the GPU when "
              << "this scenario was recorded\n";
  } else if (count < 0) {
    progress.step(scenario.name + ": how many are under way");
    MLA_RETURN_IF_ERROR(population_in_balance(scenario.workload, limits, *engine, &count));
    std::cout << count << " requests are half-way at the beginning, as many as the paged way has "
              << "in balance, or can have\n";
  } else if (count > 0) {
    std::cout << count << " requests are half-way at the beginning\n";
  }
  const std::vector<Request> under_way = requests_under_way(scenario.workload, count, options.seed);
  const RequestStream stream(scenario.workload, options.seed, count);
  const RunLimits until = limits_of_run(scenario, options);

  const size_t first_run = runs->size();
  const auto run_one = [&](const char* way, const std::string& slug, Scheduler& scheduler,
                           Engine& decoder, const ReusingEngine* reusing) -> Status {
    ServiceRun run{scenario,           way, slug, {}, options.thresholds, options.price_per_hour,
                   recorded(way, slug)};
    MeteredEngine metered(decoder);
    MLA_RETURN_IF_ERROR(run_service(until, under_way, stream, scheduler, metered, &run.figures));
    // The energy of one GPU, which did every step, is that of the tokens.
    metered.write((reusing == nullptr || reusing->reused() == 0) && scenario.ranks == 1,
                  &run.figures);
    runs->push_back(std::move(run));
    return {};
  };
  const bool shares = scenario.workload.prefixes.count > 0;
  for (const bool share : {true, false}) {
    if (options.way == "static" || (!share && !shares)) continue;
    const char* const way = share ? "paged" : "unshared";
    progress.step(scenario.name + ", " + way);
    std::unique_ptr<PagedScheduler> scheduler;
    MLA_RETURN_IF_ERROR(PagedScheduler::create(limits, &scheduler, share));
    MLA_RETURN_IF_ERROR(run_one(way, stage, *scheduler, *engine, nullptr));
  }
  const auto serve_static = [&](const std::string& slug, Engine& decoder) -> Status {
    progress.step(scenario.name + ", static, " + slug);
    std::unique_ptr<StaticScheduler> scheduler;
    MLA_RETURN_IF_ERROR(StaticScheduler::create(limits, &scheduler));
    ReusingEngine reusing(decoder, options.static_tolerance);
    const bool spares = clock.spares_static_steps();
    Engine& chosen = spares ? static_cast<Engine&>(reusing) : decoder;
    MLA_RETURN_IF_ERROR(run_one("static", slug, *scheduler, chosen, spares ? &reusing : nullptr));
    progress.clear();
    std::cout << "static: batches of up to " << scheduler->slots() << " in buffers of "
              << scenario.max_length << " tokens; batches begun: " << scheduler->batches()
              << ", padded to the longest request, of up to " << scheduler->longest() << " tokens";
    if (spares) {
      std::cout << "; " << reusing.timed() << " steps were done, " << reusing.reused()
                << " took the time of one done, of the same batch and a length within "
                << percent(options.static_tolerance);
    }
    std::cout << "\n";
    return {};
  };
  // With another stage on this side, both serve: so the kernel's part of the ratio is known.
  if (options.way == "both" && static_stage != stage) {
    MLA_RETURN_IF_ERROR(serve_static(stage, *engine));
  }
  if (options.way != "paged") MLA_RETURN_IF_ERROR(serve_static(static_stage, *static_engine));
  progress.clear();
  const std::vector<ServiceRun> both(runs->begin() + static_cast<ptrdiff_t>(first_run),
                                     runs->end());
  std::cout << "\n" << compare_runs(both, clock.title(), recording.origin) << std::flush;
  return {};
}

/// Flags that contradict each other, or that nothing would come of.
Status check_flags(const Options& options) {
  const std::string simulated = " is for kernels, and --engine simulated runs none";
  if (options.way == "paged" && !options.static_stage.empty()) {
    return invalid("--static-stage is for the static way, which --way paged leaves out");
  }
  if (!(options.static_tolerance >= 0 && options.static_tolerance < 1)) {
    return invalid(fmt::format("static tolerance = {:g} must be at least 0 and below 1",
                               options.static_tolerance));
  }
  if (options.static_tolerance_given &&
      (options.way == "paged" || options.engine == "model" || options.engine == "simulated")) {
    return invalid("--static-tolerance is for the static way on a GPU");
  }
  if (options.distinct_caches < 0) {
    return invalid(fmt::format("distinct caches = {} must be at least 0", options.distinct_caches));
  }
  if (options.distinct_caches > 0 && options.engine == "simulated") {
    return invalid("--distinct-caches" + simulated);
  }
  if (options.explain_model && (options.engine == "gpu" || options.engine == "model")) {
    return invalid("--explain-model needs --engine simulated");
  }
  if (!options.ab.empty() && options.ab.size() != 2) {
    return invalid("--ab takes two configurations, such as --ab 08,09 or 10:16bit,12:fp8_tile128");
  }
  if (!options.ab.empty() && !options.rollout.empty()) {
    return invalid("--ab and --rollout exclude each other");
  }
  if (!options.rollout.empty() && !options.out.empty()) {
    return invalid("--rollout writes no results: leave out --out");
  }
  MLA_RETURN_IF_ERROR(check_in("pairs", options.pairs, 1, 1000));
  MLA_RETURN_IF_ERROR(check_number("power budget", options.thresholds.power_w,
                                   options.thresholds.power_w > 0, "above 0 W"));
  MLA_RETURN_IF_ERROR(
      check_number("alert window", options.alert_window, options.alert_window > 0, "above 0 s"));
  if (!std::isnan(options.price_per_hour)) {
    MLA_RETURN_IF_ERROR(check_number("price per hour", options.price_per_hour,
                                     options.price_per_hour > 0, "above 0"));
  }
  return check_writable(options.out);
}

Status choose_scenarios(const Options& options, std::vector<Scenario>* chosen) {
  std::vector<Scenario> named;
  MLA_RETURN_IF_ERROR(select_scenarios(options.scenario, &named));
  for (Scenario& scenario : named) {
    if (!options.model.empty()) MLA_RETURN_IF_ERROR(use_model(options.model, &scenario));
    for (const auto& change : options.changes) change(&scenario);
    for (const CacheFormat format : options.cache_formats) {
      scenario.cache_format = format;
      MLA_RETURN_IF_ERROR(validate(scenario));
      MLA_RETURN_IF_ERROR(check_reads(options.stage, scenario));
      if (!options.static_stage.empty()) {
        MLA_RETURN_IF_ERROR(check_reads(options.static_stage, scenario));
      }
      chosen->push_back(scenario);
    }
  }
  return {};
}

int refuse(const Status& status, int exit_code = kNothingRun) {
  return complain("mla_service", status, exit_code);
}

/// The exit code.
int serve_all(const Options& options) {
  std::vector<Scenario> chosen;
  std::unique_ptr<Clock> clock;
  Status ready = check_flags(options);
  if (ready.ok()) ready = choose_scenarios(options, &chosen);
  if (!ready.ok()) return refuse(ready);
  if (std::any_of(chosen.begin(), chosen.end(), [](const auto& one) { return one.ranks > 1; })) {
    // Before CUDA begins. A kernel that is loaded at its first launch may wait for the device, and so for an exchange
    // that waits for another rank's thread.
    setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  }
  if (const Status status = make_clock(options, &clock); !status.ok()) {
    return refuse(status, status.code() == StatusCode::kFileError ? kWrong : kNothingRun);
  }
  std::cout << kScope << clock->describe();
  std::vector<ServiceRun> runs;
  Progress progress;
  int exit_code = kRight;
  std::signal(SIGINT, on_interrupt);
  const size_t formats = options.cache_formats.size();  // of each scenario, one after another
  size_t first_run = 0;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const Scenario& scenario = chosen[i];
    if (options.out.empty() && !stdout_is_read()) break;  // nobody would know
    if (i % formats == 0) first_run = runs.size();
    if (i % formats == 0 && formats > 1) {
      const auto begin = chosen.begin() + static_cast<ptrdiff_t>(i);
      std::cout << "\n"
                << scenario.name << ": what memory holds\n"
                << compare_memory({begin, begin + static_cast<ptrdiff_t>(formats)});
    }
    const Status served =
        !options.ab.empty()        ? compare_two(scenario, options, *clock, progress, &runs)
        : !options.rollout.empty() ? roll_out(scenario, options, *clock, progress)
                                   : serve(scenario, options, *clock, progress, &runs);
    progress.clear();
    if (served.ok()) {
      if (i % formats == formats - 1) {
        const auto begin = runs.begin() + static_cast<ptrdiff_t>(first_run);
        const std::string table = compare_formats({begin, runs.end()}, clock->title());
        if (!table.empty()) std::cout << "\n" << table << std::flush;
      }
      continue;
    }
    const bool unfit = served.code() == StatusCode::kInvalidArgument ||
                       served.code() == StatusCode::kUnavailable ||
                       served.code() == StatusCode::kUnsupported ||
                       served.code() == StatusCode::kOutOfMemory;
    exit_code = interrupted || !unfit || !runs.empty() ? kWrong : kNothingRun;
    if (interrupted) {
      std::cout << "\nInterrupted: the run under way, of " << title(scenario)
                << ", and what follows are left out.\n";
    } else {
      refuse(served);
    }
    break;
  }
  std::signal(SIGINT, SIG_DFL);
  if (options.out.empty() || runs.empty()) return exit_code;
  Context context = describe_environment(clock->machine());
  context.front().second = kServiceSchema;
  context.emplace_back("clock", clock->name());
  context.emplace_back("clock_origin", clock->origin());
  context.emplace_back("seed", std::to_string(options.seed));
  context.emplace_back("scenarios", is_changed(options) ? "changed" : "as listed");
  context.emplace_back("step",
                       std::string("from the scheduler's turn to the end of its synchronize") +
                           (clock->has_graphs() ? ", in CUDA graphs" : ""));
  if (const Status status = write_runs(options.out, context, runs); !status.ok()) {
    return refuse(status, kWrong);
  }
  std::cout << "\nresults: " << options.out << "\n";
  return exit_code;
}

void add_options(CLI::App& app, Options* options) {
  app.add_option("--scenario", options->scenario, "names, separated by commas; or all (but tiny)")
      ->capture_default_str();
  app.add_flag("--list", options->list, "show the scenarios");
  app.add_option(
         "--cache-format", options->cache_formats,
         "formats of the caches (docs/cache_formats.md), separated by commas: each scenario is "
         "served with each format, and then the formats are compared; default: 16bit")
      ->delimiter(',')
      ->transform(format_names(/*quantised=*/false))
      ->type_name("TEXT");
  app.add_option("--way", options->way, "both, paged or static")
      ->check(CLI::IsMember({"both", "paged", "static"}))
      ->capture_default_str();
  app.add_option("--engine", options->engine,
                 "gpu; simulated: a clock fitted to recorded times; model: kernels on the CPU "
                 "model of a GPU; auto: gpu if there is one, else simulated")
      ->check(CLI::IsMember({"auto", "gpu", "simulated", "model"}))
      ->capture_default_str();
  add_choice_table(&app);
  app.add_option(
         "--stage", options->stage,
         "the stage that decodes in the paged way; auto: the fastest by a table, for each step")
      ->capture_default_str();
  app.add_option(
      "--static-stage", options->static_stage,
      "the stage that decodes static batches, if it is another; then static batches also "
      "run with the paged way's stage, so that the kernel's part is known");
  app.add_option(
         "--static-tolerance", options->static_tolerance,
         "on a GPU, a static step is not run, and takes the time of one that was, if lengths "
         "differ by at most this share; 0: only equal lengths")
      ->capture_default_str();
  app.add_option("--distinct-caches", options->distinct_caches,
                 "caches in memory, which the layers use in turn; 0: one per layer, if they fit")
      ->capture_default_str();
  app.add_option("--seed", options->seed, "seed of the requests")->capture_default_str();
  app.add_option("--out", options->out, "write JSON here")->excludes("--list");
  app.add_flag("--explain-model", options->explain_model,
               "show the formulas of the simulated clock");
  app.add_option("--model", options->model,
                 "the model whose heads and layers are served: deepseek_v3, deepseek_v2, "
                 "deepseek_v2_lite; default: the scenario's");
  app.add_flag(
      "--cuda-graphs,!--no-cuda-graphs", options->cuda_graphs,
      "run steps without new prompts as CUDA graphs, padded to powers of two; the default on a "
      "GPU");
  app.add_option("--price-per-hour", options->price_per_hour,
                 "price of a GPU, in any currency, from which 1000 tokens get a cost");
  const std::string targets = "Targets, and alerts when a window of the run goes over one";
  app.add_option("--target-token-mean", options->thresholds.token_ms_mean,
                 "ms between tokens, mean")
      ->capture_default_str()
      ->group(targets);
  app.add_option("--target-token-p99", options->thresholds.token_ms_p99, "ms between tokens, p99")
      ->capture_default_str()
      ->group(targets);
  app.add_option("--power-budget", options->thresholds.power_w,
                 "W of the GPU: says whether it stays within that, where NVML reads the power")
      ->group(targets);
  app.add_option("--alert-queue", options->thresholds.queue, "requests that wait")->group(targets);
  app.add_option("--alert-pages", options->thresholds.pages_share,
                 "share of pages that are held, such as 0.95")
      ->group(targets);
  app.add_option("--alert-window", options->alert_window, "length of a window, in s")
      ->capture_default_str()
      ->group(targets);
  app.add_option("--ab", options->ab,
                 "two stages, or two of stage:format, that serve the same requests: says which is "
                 "better, and how sure that is")
      ->delimiter(',');
  app.add_option("--pairs", options->pairs, "runs of each side of --ab, with seeds from --seed on")
      ->capture_default_str();
  app.add_option(
      "--rollout", options->rollout,
      "a stage that takes over from --stage: first 5%, then 25%, then all of the requests; "
      "it is rolled back on an alert");
  const auto replace = [&](const char* name, const char* what, auto place) {
    using Value = std::remove_pointer_t<decltype(place(std::declval<Scenario&>()))>;
    const auto change = [options, place](const Value& value) {
      options->changes.push_back([place, value](Scenario* scenario) { *place(*scenario) = value; });
    };
    app.add_option_function<Value>(name, change, what)->group("Instead of what the scenario says");
  };
  using S = Scenario&;
  replace("--rate", "requests per second", [](S s) { return &s.workload.rate; });
  replace("--prompt-mean", "tokens", [](S s) { return &s.workload.prompt.mean; });
  replace("--prefixes", "beginnings that prompts share; 0: none",
          [](S s) { return &s.workload.prefixes.count; });
  replace("--prefix-tokens", "tokens of each beginning, before the prompt's own",
          [](S s) { return &s.workload.prefixes.tokens; });
  replace("--prompt-sd", "tokens", [](S s) { return &s.workload.prompt.sd; });
  replace("--output-mean", "tokens", [](S s) { return &s.workload.output.mean; });
  replace("--output-sd", "tokens", [](S s) { return &s.workload.output.sd; });
  replace("--heads", "query heads", [](S s) { return &s.heads; });
  replace("--layers", "layers, each appended to and decoded", [](S s) { return &s.layers; });
  replace("--cache-gib", "GiB of cache, for all layers",
          [](S s) { return s.pages.reset(), &s.cache_gib; });
  replace("--pages", "pages of each layer, instead of --cache-gib",
          [](S s) { return &s.pages.emplace(); });
  app.get_option("--pages")->excludes("--cache-gib");
  replace("--ranks", "GPUs that share every cache, or threads on the model (docs/parallel.md)",
          [](S s) { return &s.ranks; });
  replace("--max-batch", "sequences in a step", [](S s) { return &s.max_batch; });
  replace("--max-length", "tokens of prompt and output together",
          [](S s) { return &s.max_length; });
  replace("--max-queue", "requests that may wait; default: any number",
          [](S s) { return &s.max_queue.emplace(); });
  replace("--seconds", "virtual time; 0: no limit", [](S s) { return &s.seconds; });
  replace("--requests", "arrivals, after which the run goes on until all have ended; -1: no limit",
          [](S s) { return &s.requests; });
  replace("--under-way", "requests half-way at the beginning; -1: as many as in balance",
          [](S s) { return &s.under_way; });
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      std::string("A decode service in miniature: continuous batching over a paged cache, "
                  "beside static batches.\n") +
      kScope +
      "Examples:\n  mla_service --scenario all --out service.json\n"
      "  mla_service --scenario chat_1000 --static-stage 02\n"
      "  mla_service --scenario small_device_full --cache-format 16bit,fp8_tile128,fp8_tensor\n"
      "  mla_service --engine model --scenario tiny --ranks 2"};
  add_options(app, &options);
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  if (options.list) {
    for (const Scenario& scenario : scenarios()) std::cout << describe(scenario);
    return 0;
  }
  options.static_tolerance_given = app.count("--static-tolerance") > 0;
  options.cuda_graphs_given = app.count("--cuda-graphs") > 0;
  return serve_all(options);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::end_of_program(
      mla::bench::run_program("mla_service", mla::bench::run, argc, argv));
}
