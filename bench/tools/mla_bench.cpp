/// @file
/// The benchmark: every stage over a list of shapes, checked, timed, side by side.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

#include "bench/explain/explain_input.h"
#include "bench/measure/cache_suite.h"
#include "bench/measure/catalogue.h"
#include "bench/measure/ceilings.h"
#include "bench/measure/choice_option.h"
#include "bench/measure/cublas_pipeline.h"
#include "bench/measure/memory.h"
#include "bench/measure/present.h"
#include "bench/measure/program.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"
#include "bench/tools/save_inputs.h"

namespace mla::bench {
namespace {

struct Options {
  std::string machine = "auto";
  std::string suite;  // empty: main on a GPU, smoke on the model
  std::vector<std::string> stages;
  std::string shapes;
  DType dtype = DType::kBFloat16;
  std::string out;
  std::string samples;
  std::string save;  // a folder
  bool list = false;
  bool json = false;
  bool print_gpu = false;
  bool show_google = false;
  GoogleFlags google;
  bool quick = false;  // of suite paged
  bool peers = true;
  bool explain = false;
  std::string why_no_gpu;
};

/// Beside those of shapes.h: the paged cache. "all" has it, too.
constexpr const char* kPagedSuite = "paged";

int refuse(const Status& status, int exit_code = kNothingRun) {
  return complain("mla_bench", status, exit_code);
}

/// Flags that contradict each other, or that nothing would come of.
Status check_flags(const Options& options, bool dtype_given) {
  const auto invalid = [](const std::string& message) {
    return Status(StatusCode::kInvalidArgument, message);
  };
  // What ends before anything is measured, and what is only of measuring.
  const std::pair<const char*, bool> instead[] = {{"--print-gpu", options.print_gpu},
                                                  {"--list", options.list},
                                                  {"--save-inputs", !options.save.empty()},
                                                  {"--benchmark_list_tests", options.google.list}};
  const std::pair<const char*, bool> of_measuring[] = {{"--out", !options.out.empty()},
                                                       {"--samples", !options.samples.empty()},
                                                       {"--explain", options.explain},
                                                       {"--quick", options.quick},
                                                       {"--google", options.show_google}};
  const char* ends = nullptr;
  for (const auto& [name, given] : instead) {
    if (given && ends != nullptr)
      return invalid(fmt::format("{} and {} exclude each other", ends, name));
    if (given) ends = name;
  }
  for (const auto& [name, given] : of_measuring) {
    if (given && ends != nullptr) {
      return invalid(fmt::format("{} has no effect: {} measures nothing", name, ends));
    }
  }
  if (options.json && !options.list) return invalid("--json needs --list");
  if (!options.save.empty() && !options.stages.empty()) {
    return invalid("--stages has no effect: --save-inputs runs no stage");
  }
  const bool paged = options.suite == kPagedSuite;
  if (paged && !options.shapes.empty())
    return invalid("--shapes has no effect: suite paged has no shapes");
  const std::pair<const char*, bool> of_decodes[] = {{"--stages", !options.stages.empty()},
                                                     {"--dtype", dtype_given},
                                                     {"--samples", !options.samples.empty()},
                                                     {"--explain", options.explain}};
  for (const auto& [name, given] : of_decodes) {
    if (given && paged)
      return invalid(fmt::format("{} has no effect: suite paged decodes nothing", name));
  }
  if (options.quick && !paged && options.suite != "all") {
    return invalid("--quick is for suite paged alone");
  }
  if (!options.out.empty() && options.out == options.samples) {
    return invalid("--out and --samples are the same file, " + options.out);
  }
  return {};
}

/// Those that run on the CPU, and so in no GPU's time.
std::vector<const Stage*> stages_on_cpu() {
  std::vector<const Stage*> found;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (stage.on_cpu) found.push_back(&stage);
  }
  return found;
}

/// Whether stages were named, and all of them run on the CPU.
bool are_on_cpu(const std::vector<std::string>& names) {
  return !names.empty() && std::all_of(names.begin(), names.end(), [](const std::string& name) {
    const Stage* stage = find_stage(MachineKind::kModel, name);
    return stage != nullptr && stage->on_cpu;
  });
}

/// The stages of the registry that were asked for, by slug or number.
Status select_stages(MachineKind machine, const std::vector<std::string>& names,
                     std::vector<const Stage*>* chosen) {
  for (const Stage& stage : stages(machine)) {
    if (names.empty()) chosen->push_back(&stage);
  }
  if (names.empty() && machine == MachineKind::kGpu) chosen->push_back(&auto_stage(machine));
  for (const std::string& name : names) {
    note_choice_table("mla_bench", name);
    std::string why_not;
    const Stage* stage = find_stage(machine, name, &why_not);
    if (stage == nullptr) return {StatusCode::kInvalidArgument, why_not};
    chosen->push_back(stage);
  }
  return {};
}

/// Of a suite; of a larger one --list says how many more there are.
constexpr size_t kShapesListed = 40;

void print_list(MachineKind machine) {
  std::vector<const Stage*> listed = stages_on_cpu();
  for (const Stage& stage : stages(machine)) {
    if (!stage.on_cpu) listed.push_back(&stage);
  }
  std::cout << "stages\n";
  for (const Stage* stage : listed) {
    std::cout << "  " << stage->slug << "  " << stage->idea;
    if (reads_quantised(*stage)) std::cout << "; reads " << names_of_formats(*stage);
    std::cout << "\n";
  }
  std::cout << "  " << kAutoSlug << "  " << auto_stage(machine).idea << "\n";
  for (const Suite& suite : suites()) {
    std::cout << "suite " << suite.name << ": " << suite.what << "\n";
    if (suite.name == "all") continue;
    const size_t shown = std::min(suite.shapes.size(), kShapesListed);
    for (size_t i = 0; i < shown; ++i) std::cout << "  " << suite.shapes[i] << "\n";
    if (shown < suite.shapes.size()) {
      std::cout << "  and " << suite.shapes.size() - shown << " more: --suite " << suite.name
                << " --list --json\n";
    }
  }
  std::cout << "suite " << kPagedSuite
            << ": the paged cache: allocate, append, fork, free; its memory and that of contiguous "
               "buffers\n";
}

/// "suite_table" and its shapes, for every suite that may be in a file of suite `chosen`: so that a report
/// knows which belong together.
Context describe_suites(const std::string& chosen) {
  Context context;
  for (const Suite& suite : suites()) {
    if (suite.name == "all" || (suite.apart && suite.name != chosen)) continue;
    context.emplace_back("suite_" + suite.name, fmt::format("{}", fmt::join(suite.shapes, ",")));
  }
  return context;
}

bool has_paged_suite(const Options& options) {
  return options.shapes.empty() && (options.suite == kPagedSuite || options.suite == "all");
}

/// Times that Ctrl-C was pressed. What is measured by the first is kept; the third ends the program
/// (coreutils' timeout sends two).
std::atomic<int> interrupted = 0;

void on_interrupt(int signal) {
  if (++interrupted == 2) std::signal(signal, SIG_DFL);
}

/// Writes each file that was asked for, whatever became of the other. False if one failed.
bool write_results(const Options& options, const std::string& results,
                   const std::vector<ShapeResult>& shapes) {
  bool written = true;
  const auto write = [&](const std::string& path, const std::string& text) {
    if (path.empty()) return false;
    const Status status = write_file(path, text);
    if (!status.ok()) refuse(status);
    written = written && status.ok();
    return status.ok();
  };
  if (write(options.out, results)) std::cout << "\nresults: " << options.out << "\n";
  std::ostringstream samples;
  write_samples(shapes, samples);
  write(options.samples, samples.str());
  return written;
}

bool is_timed(const Shape& shape) {
  return shape.measure == Measure::kTimes || shape.measure == Measure::kEnergy;
}

/// Measures, prints a table per shape, writes the files. The exit code.
int measure(Machine& machine, const Options& options, const std::vector<Shape>& shapes) {
  const auto begin = WallClock::now();
  const bool gpu = machine.kind() == MachineKind::kGpu;
  Progress progress;
  std::unique_ptr<Runner> runner = make_model_runner();
  std::vector<const Stage*> chosen;
  Ceilings ceilings;
  Context context = describe_environment(machine);
  if (const Status status = select_stages(machine.kind(), options.stages, &chosen); !status.ok()) {
    return refuse(status);
  }
  const bool nothing_to_do =
      !shapes.empty() &&
      std::all_of(shapes.begin(), shapes.end(),
                  [](const Shape& shape) { return shape.measure == Measure::kPlans; }) &&
      std::none_of(chosen.begin(), chosen.end(),
                   [](const Stage* stage) { return stage->plan_shape != nullptr; });
  if (nothing_to_do) {
    return refuse({StatusCode::kInvalidArgument, "none of these stages makes a plan"});
  }
  std::vector<const Stage*> peers;
  std::string why_no_peer;
  if (gpu && options.peers) {
    const Stage* peer = cublas_pipeline(&why_no_peer);
    if (peer != nullptr) peers.push_back(peer);
  }
  const bool none_can_read =
      !shapes.empty() && std::none_of(shapes.begin(), shapes.end(), [&](const Shape& shape) {
        return std::any_of(chosen.begin(), chosen.end(), [&](const Stage* stage) {
          return can_read(*stage, shape.spec.cache_format);
        });
      });
  if (none_can_read) {
    return refuse({StatusCode::kUnsupported,
                   "none of these stages can read a cache of these shapes; mla_bench --list says "
                   "what each reads"});
  }
  std::vector<std::string> names;
  std::vector<std::vector<std::string>> names_by_shape;
  for (const Shape& shape : shapes) {
    const auto& more =
        names_by_shape.emplace_back(benchmark_names(machine.kind(), shape, chosen, peers));
    names.insert(names.end(), more.begin(), more.end());
  }
  if (has_paged_suite(options)) {
    const auto more = cache_benchmark_names(machine.kind());
    names.insert(names.end(), more.begin(), more.end());
  }
  std::unique_ptr<GoogleBenchmark> google;
  if (const Status status =
          GoogleBenchmark::create(names, options.google, options.show_google, &google);
      !status.ok()) {
    return refuse(status);
  }
  if (options.google.list) return std::cout << google->listing(), 0;
  for (const std::string& file : {options.out, options.samples}) {
    if (const Status status = check_writable(file); !status.ok()) return refuse(status);
  }
  if (options.machine == "auto" && !gpu) {
    std::cout << options.why_no_gpu << ": running on the CPU model of a GPU\n";
  }

  if (gpu) {
    Status status = make_gpu_runner(&runner);
    if (!status.ok()) return refuse(status, kWrong);
    status = measure_ceilings(
        *runner, [&](const std::string& text) { progress.step(text); }, &ceilings);
    progress.clear();
    if (!status.ok()) return refuse(status, kWrong);
    const Context measured = describe_ceilings(ceilings);
    context.insert(context.end(), measured.begin(), measured.end());
  }
  std::cout << describe(context) << std::flush;
  if (gpu && options.stages.empty()) {
    for (const Stage* stage : stages_on_cpu()) {
      std::cout << stage->slug << " left out: it runs on the CPU; --stages "
                << stage->slug.substr(0, 2) << " times it\n";
    }
  }
  if (!why_no_peer.empty()) {
    std::cout << "peer cublas_pipeline left out: " << why_no_peer << "\n";
  }

  const Bench bench{machine, *runner, chosen, peers, ceilings, progress, *google};
  std::vector<ShapeResult> results;
  bool failed = false;
  const bool writes = !options.out.empty() || !options.samples.empty();
  std::signal(SIGINT, on_interrupt);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& shape = shapes[i];
    if (!google->is_any_chosen(names_by_shape[i])) continue;
    if (!writes && !stdout_is_read()) break;  // nobody would know
    if (interrupted > 0) {
      std::cout << "\nInterrupted: " << shape.name << " and what follows are left out.\n";
      failed = true;
      break;
    }
    const ShapeResult& result = results.emplace_back(measure_shape(bench, shape));
    std::cout << side_by_side(result, machine.kind()) << std::flush;
    if (options.explain && is_timed(shape))
      std::cout << "\n" << explain(bench, result) << std::flush;
    for (const StageResult& entry : result.stages) {
      failed = failed || entry.outcome == StageResult::Outcome::kFailed;
    }
    if (runner->lost()) {
      std::cout << "\nThe GPU cannot be used any more by this process; the remaining shapes are "
                   "left out.\n";
      failed = true;
      break;
    }
  }
  std::cout << std::flush;
  std::signal(SIGINT, SIG_DFL);
  if (has_paged_suite(options) && interrupted > 0) {
    std::cout << "\nInterrupted: suite " << kPagedSuite << " is left out.\n";
    failed = true;
  } else if (has_paged_suite(options) && !runner->lost()) {
    const Status status = measure_cache(machine, *runner, *google, progress, options.quick);
    progress.clear();
    if (!status.ok()) {
      std::cout << "suite " << kPagedSuite << ": " << status.to_string() << "\n";
      failed = true;
    }
  }
  const Context suites = describe_suites(options.suite);
  context.insert(context.end(), suites.begin(), suites.end());
  context.emplace_back("wall_s", number(seconds_since(begin), 4));
  failed = !write_results(options, google->json(context), results) || failed;
  if (failed) std::cout << "\nFAILED: see above\n";
  if (runner->lost()) {  // freeing memory would wait for a kernel that does not end
    std::cout << std::flush;
    std::fflush(stdout);
    std::_Exit(kWrong);
  }
  return failed ? kWrong : kRight;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Checks and times every stage on a list of shapes, and prints the stages side by "
      "side.\nExamples:\n  mla_bench\n  mla_bench --stages 02,03 --shapes h128_q1_b64_k4096 --out "
      "results.json\n"
      "  mla_bench --machine model --shapes h64_q1_b1_k1024"};
  app.add_option("--machine", options.machine,
                 "auto: a GPU if there is one, else the CPU model of one")
      ->check(CLI::IsMember({"auto", "gpu", "model"}))
      ->capture_default_str();
  std::vector<std::string> suite_choices = suite_names();
  suite_choices.push_back(kPagedSuite);
  app.add_option(
         "--suite", options.suite,
         "main (default on a GPU), smoke (default on the model), all (what is recorded), or "
         "one of the others that --list shows")
      ->check(CLI::IsMember(suite_choices));
  app.add_option(
         "--stages", options.stages,
         "numbers or names, separated by commas: 01,03_online_softmax; auto chooses by a table")
      ->delimiter(',');
  add_choice_table(&app);
  app.add_option(
      "--shapes", options.shapes,
      "names such as h128_q1_b64_k4096, or regular expressions that choose from the suite, "
      "separated by commas");
  const std::map<std::string, DType> dtypes{{"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}};
  app.add_option("--dtype", options.dtype, "bf16 (default) or fp16")
      ->transform(CLI::CheckedTransformer(dtypes, CLI::ignore_case));
  app.add_option("--out", options.out, "write Google Benchmark's JSON here");
  app.add_option("--samples", options.samples, "write every raw sample here, as CSV");
  app.add_flag("!--no-peers", options.peers,
               "leave out the cuBLAS pipeline, which is timed beside the stages on a GPU");
  app.add_flag("--explain", options.explain,
               "after each shape, say what binds it and what could be done");
  app.add_flag("--quick", options.quick, "suite paged: few samples, to see that it works");
  app.add_flag("--list", options.list, "list stages, suites and their shapes");
  app.add_flag(
      "--json", options.json,
      "with --list: print JSON, with the protocol, the tolerances, and what the name of each "
      "shape of --suite or --shapes (by default all) means and what it costs");
  app.add_option(
      "--save-inputs", options.save,
      "write the inputs of the one shape of --shapes, and the results that they should give, "
      "into this folder as .npy files, which mla_run reads; measure nothing");
  app.add_flag(
      "--print-gpu", options.print_gpu,
      "print a name for files of this GPU and exit; without a GPU, say why and exit with 1");
  app.add_flag("--google", options.show_google, "also print Google Benchmark's own listing");
  app.allow_extras();  // Google Benchmark's own flags
  app.footer(
      "Google Benchmark runs everything. These of its flags have their usual meaning: "
      "--benchmark_list_tests, _filter, _repetitions (rounds), _enable_random_interleaving, "
      "_min_time and _min_warmup_time (in place of the protocol's counts), _out, "
      "_report_aggregates_only, _display_aggregates_only, _counters_tabular, _color, _context. The "
      "others are refused.\nExample:\n"
      "  mla_bench --shapes h16_q1_b2_k256 --benchmark_filter='0[23].*/cold' "
      "--benchmark_repetitions=5 --google\n\n" +
      std::string(kExitCodes));
  if (int code = 0; !parse(app, argc, argv, &code)) return code;

  std::vector<std::string> google_arguments;
  for (const std::string& extra : app.remaining()) {
    if (!extra.starts_with("--benchmark_")) {
      return refuse({StatusCode::kInvalidArgument, "unknown argument '" + extra + "', see --help"});
    }
    google_arguments.push_back(extra);
  }
  if (const Status status = read_google_flags(google_arguments, &options.google); !status.ok()) {
    return refuse(status);
  }
  if (!options.google.out.empty()) {
    if (!options.out.empty() && options.out != options.google.out) {
      return refuse({StatusCode::kInvalidArgument, "--out and --benchmark_out name two files"});
    }
    options.out = options.google.out;
  }

  const bool dtype_given = app.count("--dtype") > 0;
  if (const Status status = check_flags(options, dtype_given); !status.ok()) return refuse(status);
  if (dtype_given && options.dtype == DType::kBFloat16) {
    for (const std::string& shape : CLI::detail::split(options.shapes, ',')) {
      if (shape.ends_with("_fp16")) {
        return refuse({StatusCode::kInvalidArgument,
                       "--shapes " + shape + " ends with _fp16, but --dtype says bf16"});
      }
    }
  }
  std::string why_not;
  if (options.machine == "auto" && are_on_cpu(options.stages)) options.machine = "model";
  Machine* gpu = options.machine == "model" ? nullptr : gpu_machine(&why_not);
  if (options.print_gpu) {
    if (gpu == nullptr) return std::cout << why_not << "\n", 1;
    std::cout << gpu_slug(value_of(describe_environment(*gpu), "gpu")) << "\n";
    return 0;
  }
  if (gpu == nullptr && options.machine == "gpu")
    return refuse({StatusCode::kUnavailable, why_not});
  Machine& machine = gpu != nullptr ? *gpu : model_machine();
  if (options.list && !options.json) return print_list(machine.kind()), 0;
  options.why_no_gpu = why_not;
  std::vector<Shape> shapes;
  const bool whole_list = options.list && options.suite.empty() && options.shapes.empty();
  if (options.suite.empty()) options.suite = gpu != nullptr ? "main" : "smoke";
  if (whole_list) {
    shapes = every_shape();
  } else if (options.suite == kPagedSuite) {
    // It has none.
  } else if (const Status status =
                 select_shapes(options.suite, options.shapes, options.dtype, &shapes);
             !status.ok()) {
    return refuse(status);
  }
  if (!options.shapes.empty()) {  // a suite's shape that does not fit is left out, with the reason
    const bool decodes = !options.list && options.suite != "plan";
    for (const Shape& shape : shapes) {
      const std::string what = "shape " + shape.name;
      const Footprint one = footprint(shape.spec);
      const Status status = decodes ? check_fits(what, one, &machine, gpu == nullptr ? 1 : 0)
                                    : check_tables_fit(what, one);
      if (!status.ok()) return refuse(status);
    }
  }
  if (options.list) return std::cout << catalogue(machine.kind(), shapes), 0;
  const bool any_timed = std::any_of(shapes.begin(), shapes.end(), is_timed);
  if (options.explain && !any_timed) {
    return refuse({StatusCode::kInvalidArgument, "--explain has no effect: decodes of suite " +
                                                     options.suite + " are not timed"});
  }
  if (!options.save.empty()) {
    if (shapes.size() != 1) {
      return refuse(
          {StatusCode::kInvalidArgument,
           fmt::format("--save-inputs needs --shapes with one shape; it names {}", shapes.size())});
    }
    const Status status = save_inputs(machine, shapes.front().spec, options.save);
    return status.ok() ? kRight : refuse(status, kWrong);
  }
  return measure(machine, options, shapes);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_bench", mla::bench::run, argc, argv);
}
