/// @file
/// mla_tune: measures on a device which stage, with which settings of its plan, is fastest for which
/// shapes, and writes the table that the stage "auto" chooses by.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <iostream>

#include "bench/measure/program.h"
#include "bench/measure/progress.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"
#include "bench/tools/tune.h"
#include "stages/common/choose/choose.h"

namespace mla::bench {
namespace {

struct Options {
  std::string machine = "auto";
  std::vector<std::string> stages, shapes;
  std::string out, resume;
  std::string budget = "300s";
  bool plan = false;
};

int refuse(const Status& status, int exit_code = kNothingRun) {
  return complain("mla_tune", status, exit_code);
}

Status invalid(const std::string& message) {
  return {StatusCode::kInvalidArgument, message};
}

std::atomic<bool> interrupted = false;

void on_interrupt(int signal) {
  interrupted = true;
  std::signal(signal, SIG_DFL);  // the second ends the program
}

/// "300s", "5m" or "300"
Status parse_budget(const std::string& text, double* seconds) {
  char* rest = nullptr;
  *seconds = std::strtod(text.c_str(), &rest);
  const std::string unit = rest;
  if (unit == "m") *seconds *= 60;
  if (rest != text.c_str() && *seconds > 0 && (unit.empty() || unit == "s" || unit == "m"))
    return {};
  return invalid("--budget " + text + " is no time such as 300s or 5m");
}

/// All that make a plan, or those that were asked for.
Status select_stages(MachineKind machine, const std::vector<std::string>& names,
                     std::vector<const Stage*>* chosen) {
  for (const Stage& stage : stages(machine)) {
    if (names.empty() && stage.plan_shape != nullptr) chosen->push_back(&stage);
  }
  for (const std::string& name : names) {
    std::string why_not;
    const Stage* stage = find_stage(machine, name, &why_not);
    if (stage == nullptr) return invalid(why_not);
    if (stage->plan_shape == nullptr || stage->slug == kAutoSlug) {
      return invalid("--stages " + name + ": only stages that make a plan are timed");
    }
    chosen->push_back(stage);
  }
  if (chosen->empty())
    return {StatusCode::kUnavailable, "this build has no stage that makes a plan"};
  return {};
}

/// Those that were named; else those of the grid whose cache one of the stages can read here.
Status select_shapes_of_grid(const std::vector<std::string>& names,
                             const std::vector<const Stage*>& chosen, const DeviceLimits& limits,
                             std::vector<Shape>* shapes) {
  const auto is_of_use = [&](const Shape& shape) {
    return std::any_of(chosen.begin(), chosen.end(),
                       [&](const Stage* stage) { return can_be_tuned(*stage, shape, limits); });
  };
  if (names.empty()) *shapes = tune_shapes();
  std::erase_if(*shapes, [&](const Shape& shape) { return !is_of_use(shape); });
  for (const std::string& name : names) {
    Shape& shape = shapes->emplace_back();
    MLA_RETURN_IF_ERROR(parse_shape(name, &shape));
    if (shape.lengths != Lengths::kEqual || shape.spec.fixed_split_tokens != 0) {
      return invalid("--shapes " + name + ": a regime has equal lengths and no fixed splits");
    }
    if (!is_of_use(shape)) {
      return {StatusCode::kUnsupported,
              "--shapes " + name + ": no stage that makes a plan and runs here can read its cache"};
    }
  }
  return {};
}

/// What would be timed.
int print_plan(const Machine& machine, const std::vector<const Stage*>& chosen,
               const std::vector<Shape>& shapes) {
  const DeviceLimits limits = machine.limits();
  size_t most = 0;
  Table table({"shape", "stages", "with settings", "plans of each stage"});
  for (const Shape& shape : shapes) {
    const Problem problem = make_data_set(shape.spec).problem;
    size_t all = 0, count = 0;
    std::string each;
    for (const Stage* stage : chosen) {
      if (!can_be_tuned(*stage, shape, limits)) continue;
      const size_t plans = tune_candidates(*stage, problem, limits).size();
      each += fmt::format("{}{} {}", each.empty() ? "" : ", ", stage->slug.substr(0, 2), plans);
      all += plans;
      ++count;
    }
    most += all;
    table.add({shape.name, std::to_string(count), std::to_string(all), each});
  }
  std::cout << table.to_string()
            << fmt::format(
                   "{} shapes, at most {} candidates on {}; settings are timed for stages "
                   "that take, without settings, at most {} times the time of the fastest\n",
                   shapes.size(), most, machine.description(), kTuneSearched);
  return kRight;
}

/// One line of what came of a shape.
std::string line_of(const TunedShape& tuned) {
  std::vector<TunedTime> times = tuned.times;
  std::erase_if(times, [](const TunedTime& time) { return time.cold.n == 0; });
  if (times.empty()) return tuned.shape.name + ": nothing could be timed\n";
  std::stable_sort(times.begin(), times.end(), [](const TunedTime& a, const TunedTime& b) {
    return a.cold.median < b.cold.median;
  });
  const auto plain = std::find_if(times.begin(), times.end(), [](const TunedTime& time) {
    return time.settings == PlanSettings{};
  });
  const TunedTime& best = times.front();
  std::string text = fmt::format("{:<22} {} {} {} µs", tuned.shape.name, best.stage,
                                 to_string(best.settings), microseconds(best.cold.median));
  if (plain != times.end() && &*plain != &best) {
    text += fmt::format("; without settings {} {}", plain->stage, microseconds(plain->cold.median));
  }
  return text + fmt::format("; {} candidates\n", times.size());
}

Context describe(const Machine& machine) {
  Context context = describe_environment(machine);
  if (value_of(context, "gpu").empty()) {  // the model: a table for tests
    const DeviceLimits limits = machine.limits();
    context.emplace_back("gpu", limits.name);
    context.emplace_back("compute_capability", fmt::format("{}.{}", limits.compute_capability / 10,
                                                           limits.compute_capability % 10));
    context.emplace_back("multiprocessors", std::to_string(limits.multiprocessors));
  }
  std::erase_if(context, [](const auto& entry) { return entry.first == "schema"; });
  return context;
}

int tune(Machine& machine, const Options& options, double budget,
         const std::vector<const Stage*>& chosen, const std::vector<Shape>& shapes) {
  const auto begin = WallClock::now();
  const std::string path = options.resume.empty() ? options.out : options.resume;
  if (const Status status = check_writable(path); !status.ok()) return refuse(status);
  TuneFile file(describe(machine));
  if (!options.resume.empty()) {
    if (const Status status = file.resume(path); !status.ok()) return refuse(status);
  }
  std::unique_ptr<Runner> runner = make_model_runner();
  if (machine.kind() == MachineKind::kGpu) {
    if (const Status status = make_gpu_runner(&runner); !status.ok()) return refuse(status, kWrong);
  }
  std::cout << machine.description() << "; " << file.size() << " shapes are in the table\n";
  Progress progress;
  std::signal(SIGINT, on_interrupt);
  bool failed = false;
  size_t left = 0;
  for (const Shape& shape : shapes) {
    if (file.has(shape)) continue;
    if (interrupted || failed || seconds_since(begin) > budget) {
      ++left;
      continue;
    }
    TunedShape tuned;
    const Status status = tune_shape(
        machine, *runner, chosen, shape,
        [&](const std::string& step) {
          progress.step(step);
          return !interrupted;
        },
        &tuned);
    progress.clear();
    if (interrupted) {
      ++left;
      continue;
    }
    if (status.code() == StatusCode::kOutOfMemory) {
      std::cout << shape.name << ": left out: " << status.message() << "\n";
      continue;
    }
    if (!status.ok()) {
      refuse(status, kWrong);
      failed = true;
      continue;
    }
    for (const TunedTime& time : tuned.times) {
      const bool unfit = time.status.code() == StatusCode::kUnsupported ||
                         time.status.code() == StatusCode::kUnavailable ||
                         time.status.code() == StatusCode::kOutOfMemory;
      if (time.status.ok()) continue;
      std::cout << fmt::format("{}: {} {}: {}\n", shape.name, time.stage, to_string(time.settings),
                               time.status.to_string());
      failed = failed || !unfit;
    }
    std::cout << line_of(tuned) << std::flush;
    file.add(tuned);
    if (const Status written = write_file(path, file.text()); !written.ok()) {
      return refuse(written, kWrong);
    }
  }
  std::signal(SIGINT, SIG_DFL);
  if (file.size() == 0) return refuse({StatusCode::kUnavailable, "nothing was timed"}, kWrong);
  std::cout << fmt::format("{}: {} shapes, {:.0f} s\n", path, file.size(), seconds_since(begin));
  if (left > 0) {
    std::cout << fmt::format("{} shapes are left; go on by mla_tune --resume {}\n", left, path);
  }
  if (runner->lost()) {  // freeing memory would wait for a kernel that does not end
    std::cout << std::flush;
    std::_Exit(kWrong);
  }
  return failed ? kWrong : kRight;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Measures which stage, with which settings of its plan, is fastest on which shapes, and "
      "writes the table that the stage auto chooses by. docs/choosing.md says how it is "
      "used.\nExamples:\n"
      "  mla_tune --out h200.json --budget 300s\n  mla_tune --resume h200.json\n"
      "  mla_tune --plan --machine model\n"
      "  MLA_CHOICE_TABLE=h200.json mla_bench --stages auto,08"};
  app.add_option("--machine", options.machine,
                 "auto: a GPU if there is one, else the CPU model of one, whose times say nothing "
                 "about a GPU")
      ->check(CLI::IsMember({"auto", "gpu", "model"}))
      ->capture_default_str();
  app.add_option("--stages", options.stages, "Numbers or names; by default all that make a plan")
      ->delimiter(',');
  app.add_option(
         "--shapes", options.shapes,
         "Names such as h128_q1_b64_k4096 or ..._fp8_tile128, each a regime; by default the grid")
      ->delimiter(',');
  CLI::Option* out = app.add_option("--out", options.out, "Write the table here, shape by shape");
  app.add_option("--resume", options.resume, "Go on with the table in this file")->excludes(out);
  app.add_option("--budget", options.budget, "Begin no shape after this time, such as 300s or 5m")
      ->capture_default_str();
  app.add_flag("--plan", options.plan, "List what would be timed, and time nothing");
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;

  if (options.plan == (!options.out.empty() || !options.resume.empty())) {
    return refuse(invalid(options.plan ? "--plan writes nothing: --out and --resume have no effect"
                                       : "--out or --resume must say where to write the table"));
  }
  double budget = 0;
  if (const Status status = parse_budget(options.budget, &budget); !status.ok()) {
    return refuse(status);
  }
  std::string why_not;
  Machine* gpu = options.machine == "model" ? nullptr : gpu_machine(&why_not);
  const bool needs_gpu = options.machine == "gpu" || (options.machine == "auto" && !options.plan);
  if (gpu == nullptr && needs_gpu) {
    return refuse({StatusCode::kUnavailable,
                   why_not + "; --plan lists what would be timed, --machine model tries it"});
  }
  Machine& machine = gpu != nullptr ? *gpu : model_machine();
  std::vector<const Stage*> chosen;
  std::vector<Shape> shapes;
  Status status = select_stages(machine.kind(), options.stages, &chosen);
  if (status.ok()) {
    status = select_shapes_of_grid(options.shapes, chosen, machine.limits(), &shapes);
  }
  if (!status.ok()) return refuse(status);
  if (options.plan) return print_plan(machine, chosen, shapes);
  return tune(machine, options, budget, chosen, shapes);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_tune", mla::bench::run, argc, argv);
}
