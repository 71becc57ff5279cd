/// @file
/// The benchmark: every stage over a list of shapes, checked, timed, side by side.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>

#include "bench/ceilings.h"
#include "bench/google.h"
#include "bench/present.h"

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
  bool list = false;
  bool print_gpu = false;
  bool show_google = false;
};

int complain(const Status& status) {
  std::cerr << "mla_bench: " << status.to_string() << "\n";
  return 2;
}

/// The stages of the registry that were asked for, by slug or number.
Status select_stages(MachineKind machine, const std::vector<std::string>& names,
                     std::vector<const Stage*>* chosen) {
  std::string known;
  for (const Stage& stage : stages(machine)) {
    if (names.empty()) chosen->push_back(&stage);
    known += (known.empty() ? "" : ", ") + stage.slug;
  }
  for (const std::string& name : names) {
    const Stage* stage = find_stage(machine, name);
    if (stage == nullptr) {
      return {StatusCode::kInvalidArgument, "no stage '" + name + "'; there are " + known};
    }
    chosen->push_back(stage);
  }
  return {};
}

void print_list(MachineKind machine) {
  std::cout << "stages\n";
  for (const Stage& stage : stages(machine))
    std::cout << "  " << stage.slug << "  " << stage.idea << "\n";
  for (const char* name : {"smoke", "main", "table", "invariant", "plan"}) {
    std::cout << "suite " << name << "\n";
    for (const std::string& shape : suite(name)) std::cout << "  " << shape << "\n";
  }
}

/// Measures, prints a table a shape, writes the files. The exit code.
int measure(Machine& machine, const Options& options, const std::vector<Shape>& shapes,
            std::vector<std::string> google_arguments) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  Progress progress;
  std::unique_ptr<Runner> runner = make_model_runner();
  std::vector<const Stage*> chosen;
  Ceilings ceilings;
  Context context = describe_environment(machine);
  if (const Status status = select_stages(machine.kind(), options.stages, &chosen); !status.ok()) {
    return complain(status);
  }
  const bool nothing_to_do =
      std::all_of(shapes.begin(), shapes.end(), [](const Shape& s) { return s.plan_only; }) &&
      std::none_of(chosen.begin(), chosen.end(),
                   [](const Stage* stage) { return stage->plan_shape != nullptr; });
  if (nothing_to_do) {
    return complain({StatusCode::kInvalidArgument, "none of these stages makes a plan"});
  }
  if (gpu) {
    Status status = make_gpu_runner(&runner);
    if (!status.ok()) return complain(status);
    status = measure_ceilings(
        *runner, [&](const std::string& text) { progress.step(text); }, &ceilings);
    progress.clear();
    if (!status.ok()) return complain(status);
    const Context measured = describe_ceilings(ceilings);
    context.insert(context.end(), measured.begin(), measured.end());
  }
  std::cout << describe(context) << std::flush;

  const Bench bench{machine, *runner, chosen, ceilings, progress};
  std::vector<ShapeResult> results;
  bool failed = false;
  for (const Shape& shape : shapes) {
    const ShapeResult& result = results.emplace_back(measure_shape(bench, shape));
    std::cout << side_by_side(result, machine.kind()) << std::flush;
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
  if (!run_google_benchmark(results, context, std::move(google_arguments), options.out,
                            options.show_google)) {
    return 2;
  }
  if (!options.out.empty()) std::cout << "\nresults: " << options.out << "\n";
  if (!options.samples.empty()) {
    std::ofstream file(options.samples);
    write_samples(results, file);
    if (!file) return complain({StatusCode::kFileError, options.samples + ": cannot be written"});
  }
  if (failed) std::cout << "\nFAILED: see above\n";
  if (runner->lost()) {  // freeing memory would wait for a kernel that does not end
    std::cout << std::flush;
    std::_Exit(1);
  }
  return failed ? 1 : 0;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Times every stage on a list of shapes, checks each result before it is timed, and prints "
      "the stages side by "
      "side.\nExamples:\n  mla_bench\n  mla_bench --stages 02,03 --shapes h128_q1_b64_k4096 --out "
      "results.json\n"
      "  mla_bench --machine model --shapes h64_q1_b1_k1024"};
  app.add_option("--machine", options.machine,
                 "auto: a GPU if there is one, else the CPU model of one")
      ->check(CLI::IsMember({"auto", "gpu", "model"}))
      ->capture_default_str();
  app.add_option(
         "--suite", options.suite,
         "main (default on a GPU), table (all recorded shapes, then those of plan), invariant "
         "(what "
         "batch-invariant mode costs), plan (the making of plans alone), smoke (default on the "
         "model)")
      ->check(CLI::IsMember({"main", "table", "invariant", "plan", "smoke"}));
  app.add_option("--stages", options.stages,
                 "numbers or names, separated by commas: 01,03_online_softmax")
      ->delimiter(',');
  app.add_option("--shapes", options.shapes,
                 "names such as h128_q1_b64_k4096, or regular expressions over the suite's, "
                 "separated by commas");
  const std::map<std::string, DType> dtypes{{"bf16", DType::kBFloat16}, {"fp16", DType::kFloat16}};
  app.add_option("--dtype", options.dtype, "bf16 (default) or fp16")
      ->transform(CLI::CheckedTransformer(dtypes, CLI::ignore_case));
  app.add_option("--out", options.out, "write Google Benchmark's JSON here");
  app.add_option("--samples", options.samples, "write every raw sample here, as CSV");
  app.add_flag("--list", options.list, "list stages, suites and their shapes");
  app.add_flag("--print-gpu", options.print_gpu,
               "print a file name for the GPU and exit; without one say why and exit with 1");
  app.add_flag("--google", options.show_google, "also print Google Benchmark's own listing");
  app.allow_extras();  // Google Benchmark's own flags
  app.footer("Google Benchmark's flags (--benchmark_filter=...) are passed on.");
  CLI11_PARSE(app, argc, argv);

  std::vector<std::string> google_arguments{argv[0]};
  for (const std::string& extra : app.remaining()) {
    if (!extra.starts_with("--benchmark_")) {
      return complain(
          {StatusCode::kInvalidArgument, "unknown argument '" + extra + "', see --help"});
    }
    google_arguments.push_back(extra);
  }

  std::string why_not;
  Machine* gpu = options.machine == "model" ? nullptr : gpu_machine(&why_not);
  if (options.print_gpu) {
    if (gpu == nullptr) return std::cout << why_not << "\n", 1;
    std::cout << gpu_slug(value_of(describe_environment(*gpu), "gpu")) << "\n";
    return 0;
  }
  if (gpu == nullptr && options.machine == "gpu")
    return complain({StatusCode::kUnavailable, why_not});
  Machine& machine = gpu != nullptr ? *gpu : model_machine();
  if (options.list) return print_list(machine.kind()), 0;
  if (options.machine == "auto" && gpu == nullptr) {
    std::cout << why_not << ": running on the CPU model of a GPU\n";
  }
  if (options.suite.empty()) options.suite = gpu != nullptr ? "main" : "smoke";
  std::vector<Shape> shapes;
  if (const Status status = select_shapes(options.suite, options.shapes, options.dtype, &shapes);
      !status.ok()) {
    return complain(status);
  }
  for (const std::string& file : {options.out, options.samples}) {
    if (const Status status = check_writable(file); !status.ok()) return complain(status);
  }
  return measure(machine, options, shapes, std::move(google_arguments));
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run(argc, argv);
}
