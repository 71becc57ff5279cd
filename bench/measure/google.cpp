#include "bench/measure/google.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sstream>
#include <unordered_map>

namespace mla::bench {
namespace {

using Run = benchmark::BenchmarkReporter::Run;

Status invalid(const std::string& message) {
  return {StatusCode::kInvalidArgument, message};
}

/// "--benchmark_NAME=VALUE"
struct Flag {
  std::string name;
  std::string value;
  bool has_value = false;
};

Flag parse_flag(const std::string& argument) {
  constexpr size_t kPrefix = std::string_view("--benchmark_").size();
  const size_t equals = argument.find('=');
  if (equals == std::string::npos) return {argument.substr(kPrefix), "", false};
  return {argument.substr(kPrefix, equals - kPrefix), argument.substr(equals + 1), true};
}

bool is_number(const std::string& text, double least) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && last == end && value >= least;
}

/// true, 1, yes, on, or nothing; false, 0, no, off.
std::optional<bool> truth_of(const Flag& flag) {
  const auto is_one_of = [&](std::initializer_list<const char*> words) {
    return std::find(words.begin(), words.end(), flag.value) != words.end();
  };
  if (!flag.has_value || is_one_of({"true", "1", "yes", "on"})) return true;
  if (is_one_of({"false", "0", "no", "off"})) return false;
  return std::nullopt;
}

/// What cannot be honoured, and why.
constexpr std::pair<const char*, const char*> kRefused[] = {
    {"format", "the listing that --google prints is text; JSON goes to --benchmark_out"},
    {"time_unit", "every time is in microseconds"},
    {"perf_counters", "it counts the host's events, not a GPU's"},
    {"dry_run", "a benchmark that does not run has nothing to show"},
};

/// A regular expression that matches one of these names and nothing else, whatever the library
/// appends ("/iterations:25/manual_time").
std::string pattern_of(std::span<const GoogleRun> runs) {
  std::string names;
  for (const GoogleRun& run : runs) {
    if (!names.empty()) names += '|';
    for (const char c : run.name)
      names += c == '+' || c == '.' ? fmt::format("[{}]", c) : std::string(1, c);
  }
  return "^(" + names + ")(/|$)";
}

/// Google Benchmark's JSON, less what names the machine's owner: host name and path of the program.
class JsonReporter final : public benchmark::JSONReporter {
 public:
  bool ReportContext(const Context& context) override {
    std::ostream& file = GetOutputStream();
    std::stringstream text;
    SetOutputStream(&text);
    const bool go_on = JSONReporter::ReportContext(context);
    SetOutputStream(&file);
    for (std::string line; std::getline(text, line);) {
      const bool owner = line.find("\"host_name\":") != std::string::npos ||
                         line.find("\"executable\":") != std::string::npos;
      if (!owner) file << line << '\n';
    }
    return go_on;
  }
};

/// Takes what the library prints when it only lists.
class Lister final : public benchmark::BenchmarkReporter {
 public:
  Lister() {
    SetOutputStream(&names);
    SetErrorStream(&errors);
  }
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}

  std::stringstream names, errors;
};

}  // namespace

Status read_google_flags(const std::vector<std::string>& arguments, GoogleFlags* flags) {
  GoogleFlags result;
  for (const std::string& argument : arguments) {
    const Flag flag = parse_flag(argument);
    for (const auto& [name, why] : kRefused) {
      if (flag.name == name) return invalid(argument + " cannot be honoured: " + why);
    }
    const bool on_or_off = flag.name == "list_tests" || flag.name == "display_aggregates_only" ||
                           flag.name == "report_aggregates_only" ||
                           flag.name == "enable_random_interleaving" ||
                           flag.name == "counters_tabular";
    const std::optional<bool> on = truth_of(flag);
    if (on_or_off && !on) return invalid(argument + ": true or false is needed");
    if (!on_or_off && flag.value.empty()) return invalid(argument + ": a value is missing");
    const std::string digits = flag.value.substr(0, flag.value.find_last_not_of("sx") + 1);
    if (flag.name == "list_tests") {
      result.list = *on;
    } else if (flag.name == "display_aggregates_only") {
      result.display_aggregates_only = *on;
    } else if (flag.name == "out") {
      result.out = flag.value;
    } else if (flag.name == "out_format") {
      if (flag.value != "json") return invalid(argument + " cannot be honoured: only json can");
    } else if (flag.name == "repetitions") {
      if (!is_number(flag.value, 1) || flag.value.find('.') != std::string::npos) {
        return invalid(argument + ": a whole number from 1 on is needed");
      }
      result.repetitions = std::stoi(flag.value);
    } else if (flag.name == "min_time" || flag.name == "min_warmup_time") {
      if (!is_number(digits, 0)) return invalid(argument + ": a time in seconds is needed");
      result.own_order = result.own_iterations = true;
      result.for_the_library.push_back(argument);
    } else if (flag.name == "enable_random_interleaving") {
      result.own_order |= *on;
      result.for_the_library.push_back(argument);
    } else if (on_or_off || flag.name == "filter" || flag.name == "color" ||
               flag.name == "context" || flag.name == "v") {
      result.for_the_library.push_back(argument);
    } else {
      return invalid(argument + " is not a flag of this program, see --help");
    }
  }
  *flags = std::move(result);
  return {};
}

/// The library's global state, and what it reported so far.
class GoogleBenchmark::Library final : public benchmark::BenchmarkReporter {
 public:
  Library(const std::vector<std::string>& names, const GoogleFlags& flags, bool show)
      : flags_(flags) {
    for (const std::string& name : names) {
      if (benchmarks_.contains(name)) continue;
      Benchmark& one = benchmarks_[name];
      one.index = static_cast<int64_t>(order_.size());
      order_.push_back(name);
      one.registered = benchmark::RegisterBenchmark(
          name.c_str(), [this, &one](benchmark::State& state) { iterate(one, state); });
      one.registered->UseManualTime()->Unit(benchmark::kMicrosecond);
    }
    if (show) display_.reset(benchmark::CreateDefaultDisplayReporter());
  }
  ~Library() override { benchmark::ClearRegisteredBenchmarks(); }

  Status choose() {
    Lister lister;
    initialize(/*list=*/true, 1);
    benchmark::RunSpecifiedBenchmarks(&lister);
    listing_ = lister.names.str();
    for (std::string line; std::getline(lister.names, line);) {
      benchmarks_.at(line.substr(0, line.rfind("/manual_time"))).chosen = true;
      longest_ = std::max(longest_, line.size());
    }
    if (!listing_.empty()) return {};
    std::string why = lister.errors.str();
    while (!why.empty() && why.back() == '\n') why.pop_back();
    return invalid(why.empty() ? "there is no benchmark to run" : why);
  }

  std::vector<Status> run(std::span<const GoogleRun> runs) {
    std::vector<GoogleRun> turn;
    for (const GoogleRun& one : runs) {
      if (is_chosen(one.name)) turn.push_back(one);
    }
    if (turn.empty()) return std::vector<Status>(runs.size());
    int rounds = flags_.repetitions.value_or(0);
    if (!flags_.repetitions) {
      for (const GoogleRun& one : turn) rounds = std::max(rounds, one.rounds);
    }
    for (GoogleRun& one : turn) {
      Benchmark& known = benchmarks_.at(one.name);
      known.turn = &one;
      known.status = {};
      known.calls.clear();
      known.taken = 0;
      if (!flags_.own_iterations) known.registered->Iterations(one.iterations);
      if (flags_.repetitions) one.rounds = rounds;
      if (one.rounds != rounds) known.registered->Repetitions(one.rounds);
    }
    if (!flags_.own_order) take_rounds_in_turn(turn, rounds);
    initialize(/*list=*/false, rounds);
    benchmark::RunSpecifiedBenchmarks(this, pattern_of(turn));
    for (const GoogleRun& one : turn) {
      Benchmark& known = benchmarks_.at(one.name);
      known.turn = nullptr;
      if (one.us == nullptr || !known.status.ok()) continue;
      // Those before were the library's way to find out how often to run.
      const size_t counted = std::min(known.calls.size(), static_cast<size_t>(one.rounds));
      const size_t first = known.calls.size() - counted;
      for (size_t i = first; i < known.calls.size(); ++i) {
        one.us->insert(one.us->end(), known.calls[i].begin(), known.calls[i].end());
      }
    }
    std::vector<Status> statuses;
    for (const GoogleRun& one : runs) {
      statuses.push_back(is_chosen(one.name) ? benchmarks_.at(one.name).status : Status());
    }
    return statuses;
  }

  void add(const GoogleEntry& entry) {
    if (!is_chosen(entry.name)) return;
    Benchmark& one = benchmarks_.at(entry.name);
    if (!entry.why_not.empty()) {
      const GoogleRun failing{entry.name, 1, 1, [&](int, std::vector<double>*) {
                                return Status(StatusCode::kUnavailable, entry.why_not);
                              }};
      run({&failing, 1});
      return;
    }
    if (one.reported.empty()) return;
    Run samples = one.reported.front();
    samples.run_type = Run::RT_Aggregate;
    samples.aggregate_name = "samples";
    samples.aggregate_unit = benchmark::kTime;
    samples.iterations = 1;
    samples.real_accumulated_time = 1e-6 * entry.us;
    samples.cpu_accumulated_time = 0;
    samples.report_label = entry.label;
    samples.counters.clear();
    for (const auto& [key, value] : entry.counters) {
      if (!std::isnan(value)) samples.counters[key] = value;
    }
    one.reported.push_back(std::move(samples));
  }

  void forget(const std::string& name) {
    if (is_chosen(name)) benchmarks_.at(name).reported.clear();
  }

  std::string json(const mla::bench::Context& context) const {
    for (const auto& [key, value] : context) benchmark::AddCustomContext(key, value);
    std::ostringstream text;
    JsonReporter reporter;
    reporter.SetOutputStream(&text);
    reporter.ReportContext(benchmark::BenchmarkReporter::Context());
    for (const std::string& name : order_) {
      const std::vector<Run>& reported = benchmarks_.at(name).reported;
      if (!reported.empty()) reporter.ReportRuns(reported);
    }
    reporter.Finalize();
    return text.str();
  }

  const std::string& listing() const { return listing_; }
  bool is_chosen(const std::string& name) const {
    const auto found = benchmarks_.find(name);
    return found != benchmarks_.end() && found->second.chosen;
  }

  // The library's reports, of every call to it as if it were one.
  bool ReportContext(const Context& context) override {
    if (display_ == nullptr || context_shown_) return true;
    context_shown_ = true;
    Context wide = context;
    wide.name_field_width = longest_ + std::string("/iterations:100_median").size();
    return display_->ReportContext(wide);
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    if (runs.empty()) return;
    Benchmark& one = benchmarks_.at(runs.front().run_name.function_name);
    for (const Run& run : runs) {
      Run& kept = one.reported.emplace_back(run);
      kept.family_index = one.index;
      kept.per_family_instance_index = 0;
    }
    const bool aggregates = runs.front().run_type == Run::RT_Aggregate;
    const bool hidden =
        flags_.display_aggregates_only && !aggregates && runs.front().repetitions > 1;
    if (display_ != nullptr && !hidden) display_->ReportRuns(runs);
  }

 private:
  struct Benchmark {
    int64_t index = 0;
    benchmark::internal::Benchmark* registered = nullptr;
    bool chosen = false;
    const GoogleRun* turn = nullptr;         ///< While it runs
    Status status;                           ///< Of its turn
    std::vector<std::vector<double>> calls;  ///< us, by rounds, or by the library's calls
    size_t taken = 0;                        ///< Of `calls`, by the library
    std::vector<Run> reported;
  };

  /// Sets the library's flags. The later one wins, also over its environment variables.
  void initialize(bool list, int repetitions) {
    std::vector<std::string> arguments{"mla_bench", "--benchmark_out=", "--benchmark_filter=.",
                                       "--benchmark_enable_random_interleaving=false"};
    arguments.insert(arguments.end(), flags_.for_the_library.begin(), flags_.for_the_library.end());
    arguments.push_back(fmt::format("--benchmark_repetitions={}", repetitions));
    arguments.push_back(fmt::format("--benchmark_list_tests={}", list));
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    auto argc = static_cast<int>(argv.size());
    benchmark::Initialize(&argc, argv.data());
  }

  void take_rounds_in_turn(std::span<const GoogleRun> runs, int rounds) {
    for (int round = 0; round < rounds; ++round) {
      for (const GoogleRun& one : runs) {
        if (round < one.rounds) measure(benchmarks_.at(one.name), one.iterations);
      }
    }
  }

  static void measure(Benchmark& one, int count) {
    if (!one.status.ok()) return;
    one.status = one.turn->measure(count, &one.calls.emplace_back());
  }

  /// What the library calls to have this many iterations: it gives a time for each.
  static void iterate(Benchmark& one, benchmark::State& state) {
    if (one.taken == one.calls.size()) measure(one, static_cast<int>(state.max_iterations));
    if (!one.status.ok()) {
      state.SkipWithError(one.status.message().c_str());
      return;
    }
    const std::vector<double>& us = one.calls[one.taken++];
    size_t next = 0;
    for ([[maybe_unused]] auto _ : state) state.SetIterationTime(1e-6 * us.at(next++));
    for (const auto& [name, amount] : one.turn->per_iteration) {
      state.counters[name] =
          benchmark::Counter(amount, benchmark::Counter::kIsIterationInvariantRate);
    }
  }

  const GoogleFlags flags_;
  std::vector<std::string> order_;
  std::unordered_map<std::string, Benchmark> benchmarks_;  ///< Its elements stay where they are
  std::string listing_;
  size_t longest_ = 0;  ///< Of the listed names
  std::unique_ptr<benchmark::BenchmarkReporter> display_;
  bool context_shown_ = false;
};

GoogleBenchmark::GoogleBenchmark(std::unique_ptr<Library> library) : library_(std::move(library)) {}
GoogleBenchmark::~GoogleBenchmark() = default;

Status GoogleBenchmark::create(const std::vector<std::string>& names, const GoogleFlags& flags,
                               bool show, std::unique_ptr<GoogleBenchmark>* result) {
  auto library = std::make_unique<Library>(names, flags, show);
  MLA_RETURN_IF_ERROR(library->choose());
  result->reset(new GoogleBenchmark(std::move(library)));
  return {};
}

const std::string& GoogleBenchmark::listing() const {
  return library_->listing();
}
bool GoogleBenchmark::is_chosen(const std::string& name) const {
  return library_->is_chosen(name);
}
bool GoogleBenchmark::is_any_chosen(const std::vector<std::string>& names) const {
  return std::any_of(names.begin(), names.end(),
                     [this](const std::string& name) { return is_chosen(name); });
}
std::vector<Status> GoogleBenchmark::run(std::span<const GoogleRun> runs) {
  return library_->run(runs);
}
void GoogleBenchmark::add(const std::vector<GoogleEntry>& entries) {
  for (const GoogleEntry& entry : entries) library_->add(entry);
}
void GoogleBenchmark::forget(const std::string& name) {
  library_->forget(name);
}
std::string GoogleBenchmark::json(const Context& context) const {
  return library_->json(context);
}

}  // namespace mla::bench
