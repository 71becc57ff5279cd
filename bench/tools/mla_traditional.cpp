/// @file
/// mla_traditional: what attention layers take in the forms before MLA, and absorbed: computed, and measured on
/// the CPU by Eigen and on a GPU by cuBLAS.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <map>
#include <thread>

#include "bench/measure/attention_layer.h"
#include "bench/measure/ceilings.h"
#include "bench/measure/google.h"
#include "bench/measure/memory.h"
#include "bench/measure/present.h"
#include "bench/measure/program.h"
#include "bench/measure/progress.h"
#include "bench/measure/sampler.h"
#include "bench/measure/table.h"
#include "bench/measure/write_file.h"

namespace mla::bench {
namespace {

constexpr const char* kSchema = "flashmla_traditional/1";

struct Options {
  std::string machine = "both";
  std::vector<int64_t> heads{8, 16, 32, 64, 128};
  int64_t kv_heads = 0;  // 0: an eighth of the heads
  std::vector<int64_t> head_dims{64};
  int64_t tokens = 2048;
  int64_t queries = 256;
  int64_t batch = 4;
  std::vector<LayerMode> modes{LayerMode::kPrefill, LayerMode::kDecode};
  std::vector<LayerForm> forms{kLayerForms.begin(), kLayerForms.end()};
  bool causal = false;
  Element dtype = Element::kBf16;
  double most_gflop = 150;
  int threads = 0;
  std::string out;
};

/// The forms of one configuration, which are measured side by side.
struct Setting {
  LayerMode mode;
  int64_t head_dim;
  std::string name;  ///< "prefill_h32_d64_n2048_b4"
  std::vector<LayerPlan> plans;
};

enum class Where { kCpu, kGpu };
const char* to_string(Where where) {
  return where == Where::kCpu ? "cpu" : "cold";
}

std::string benchmark_name(const LayerPlan& plan, const std::string& setting, Where where,
                           std::optional<LayerPart> part = {}) {
  return std::string(to_string(plan.of.form)) + "/" + setting + "/" + to_string(where) +
         (part ? std::string("_") + to_string(*part) : "");
}

/// A form on a machine.
struct Measured {
  const LayerPlan* plan = nullptr;
  std::unique_ptr<LayerRunner> layer;
  Status status;            ///< Not ok: not measured
  bool left_out = false;    ///< and that is no failure
  double error = kUnknown;  ///< relative L2 against float64
  double score_bytes = kUnknown;
  std::vector<std::optional<LayerPart>> parts;  ///< Of times; the first is the whole layer
  std::vector<Contender> times;

  double us(std::optional<LayerPart> part = {}) const {
    for (size_t i = 0; i < times.size(); ++i) {
      if (parts[i] == part) return summarize(times[i].cold).median;
    }
    return kUnknown;
  }
};

/// All that measuring needs.
struct Lab {
  const Options& options;
  GoogleBenchmark& google;
  Progress progress;
  std::unique_ptr<Runner> cpu = make_model_runner();  // wall time
  std::unique_ptr<Runner> gpu;                        // null: no GPU
  Ceilings ceilings;

  Element element(Where where) const {
    return where == Where::kCpu ? Element::kFp32 : options.dtype;
  }
  Status make(const LayerPlan& plan, Where where, Element element,
              std::unique_ptr<LayerRunner>* layer) const {
    return where == Where::kCpu ? make_cpu_layer(plan, element, options.threads, layer)
                                : make_gpu_layer(plan, element, layer);
  }
};

double bytes_of(const LayerPlan& plan, Element element) {
  double bytes = 0;
  using Kind = LayerBuffer::Kind;
  for (const Kind kind : {Kind::kInput, Kind::kWeight, Kind::kCache, Kind::kActivation}) {
    bytes += plan.bytes(kind, bytes_of(element));
  }
  return bytes;
}

/// Runs once, on activations that are NaN.
Status run_once(LayerRunner& layer, std::vector<double>* y) {
  MLA_RETURN_IF_ERROR(layer.poison());
  MLA_RETURN_IF_ERROR(layer.run({}, nullptr));
  return layer.result(y);
}

/// Checks a result against float64.
Status compare(const std::vector<double>& y, const std::vector<double>& truth, Element element,
               int roundings, double* error) {
  *error = relative_l2(y, truth);
  const double limit = error_limit(element, roundings);
  if (*error <= limit) return {};  // false for NaN
  return {StatusCode::kKernelRejected,
          fmt::format("wrong result: relative L2 error {:.1e} in {}, at most {:.1e} is allowed",
                      *error, to_string(element), limit)};
}

/// The same form, small enough for float64 on the CPU.
LayerPlan small_plan(const LayerPlan& plan) {
  LayerCase layer = plan.of;
  const int64_t group = std::min<int64_t>(layer.heads / layer.kv_heads, 2);
  layer.heads = std::min<int64_t>(layer.heads, 4);
  layer.kv_heads = std::max<int64_t>(layer.heads / group, 1);
  layer.tokens = std::min<int64_t>(layer.tokens, 150);
  layer.queries = std::min<int64_t>(layer.queries, 70);
  layer.batch = std::min<int64_t>(layer.batch, 2);
  LayerPlan small;
  static_cast<void>(plan_layer(layer, &small));  // smaller than one that could be planned
  return small;
}

/// What cuBLAS gives, in the type that is measured and in fp64, is what Eigen gives.
Status check_gpu_small(const Lab& lab, const LayerPlan& of) {
  const LayerPlan plan = small_plan(of);
  std::vector<double> truth;
  {
    std::unique_ptr<LayerRunner> layer;
    MLA_RETURN_IF_ERROR(make_cpu_layer(plan, Element::kFp64, lab.options.threads, &layer));
    MLA_RETURN_IF_ERROR(run_once(*layer, &truth));
  }
  for (const Element element : {Element::kFp64, lab.options.dtype}) {
    std::unique_ptr<LayerRunner> layer;
    std::vector<double> y;
    double error = 0;
    MLA_RETURN_IF_ERROR(make_gpu_layer(plan, element, &layer));
    MLA_RETURN_IF_ERROR(run_once(*layer, &y));
    MLA_RETURN_IF_ERROR(compare(y, truth, element, plan.roundings, &error));
  }
  return {};
}

/// Puts the layer in place, and checks its result against float64 on the same machine.
Status prepare(Lab& lab, Where where, Measured* one) {
  const LayerPlan& plan = *one->plan;
  const std::string form = to_string(plan.of.form);
  std::vector<double> truth, y;
  if (where == Where::kCpu) {
    MLA_RETURN_IF_ERROR(
        check_memory(form, bytes_of(plan, Element::kFp64), host_memory_there(), "host memory"));
  }
  {
    lab.progress.step(form + " in fp64");
    std::unique_ptr<LayerRunner> layer;
    MLA_RETURN_IF_ERROR(lab.make(plan, where, Element::kFp64, &layer));
    MLA_RETURN_IF_ERROR(run_once(*layer, &truth));
  }
  const Element element = lab.element(where);
  lab.progress.step(form + " in " + to_string(element));
  MLA_RETURN_IF_ERROR(lab.make(plan, where, element, &one->layer));
  MLA_RETURN_IF_ERROR(run_once(*one->layer, &y));
  one->score_bytes = one->layer->score_bytes();
  return compare(y, truth, element, plan.roundings, &one->error);
}

/// The whole layer and each of its parts as what is timed.
Status add_contenders(Lab& lab, Where where, const std::string& setting, Measured* one) {
  Runner& runner = where == Where::kCpu ? *lab.cpu : *lab.gpu;
  one->parts = {std::nullopt};
  for (const LayerPart part : kLayerParts) {
    if (one->plan->has(part)) one->parts.emplace_back(part);
  }
  for (const auto& part : one->parts) {
    Contender contender;
    contender.cold_name = benchmark_name(*one->plan, setting, where, part);
    LayerRunner* layer = one->layer.get();
    MLA_RETURN_IF_ERROR(runner.prepare(
        [layer, part](Stream stream) { return layer->run(part, stream); }, &contender.handle));
    std::vector<double> us;
    for (int run = 0; run < 2; ++run) {
      MLA_RETURN_IF_ERROR(runner.run_cold(contender.handle, 1, &us));
    }
    contender.expected_us = us.back();
    const double flop = part ? one->plan->flop(*part) : one->plan->flop();
    contender.per_iteration = {{"FLOP", flop}};
    one->times.push_back(std::move(contender));
  }
  return {};
}

bool is_no_failure(const Status& status) {
  return status.code() == StatusCode::kUnavailable || status.code() == StatusCode::kOutOfMemory ||
         status.code() == StatusCode::kUnsupported;
}

void drop(Measured* one, const Status& status, bool left_out) {
  if (status.ok()) return;
  one->status = status;
  one->left_out = left_out;
  one->times.clear();
  one->layer.reset();
}

std::vector<Measured> measure_setting(Lab& lab, Where where, const Setting& setting) {
  std::vector<Measured> forms;
  for (const LayerPlan& plan : setting.plans) {
    Measured& one = forms.emplace_back();
    one.plan = &plan;
    const double gflop = 1e-9 * plan.flop();
    if (where == Where::kCpu && gflop > lab.options.most_gflop) {
      drop(&one,
           {StatusCode::kUnsupported, fmt::format("{:.0f} GFLOP, more than --most-gflop {:g}",
                                                  gflop, lab.options.most_gflop)},
           true);
      continue;
    }
    Status status = prepare(lab, where, &one);
    if (status.ok()) status = add_contenders(lab, where, setting.name, &one);
    drop(&one, status, is_no_failure(status));
  }
  std::vector<Contender> contenders;
  std::vector<Contender*> from;
  for (Measured& one : forms) {
    for (Contender& contender : one.times) from.push_back(&contender);
  }
  for (Contender* one : from) contenders.push_back(std::move(*one));
  Runner& runner = where == Where::kCpu ? *lab.cpu : *lab.gpu;
  sample(runner, lab.google, contenders, [&](const std::string& text) { lab.progress.step(text); });
  for (size_t i = 0; i < from.size(); ++i) *from[i] = std::move(contenders[i]);
  for (Measured& one : forms) {
    for (const Contender& contender : one.times) {
      if (contender.status.ok()) continue;
      drop(&one, contender.status, false);
      break;
    }
  }
  runner.clear();
  lab.progress.clear();
  return forms;
}

// --- Theory --------------------------------------------------------------------------------------

/// Least time of a part, in us: its FLOP and its bytes at the measured ceilings. kUnknown without them.
double least_us(const Lab& lab, const LayerPlan& plan, LayerPart part) {
  const double flop = plan.flop(part) / lab.ceilings.matrix_cold;
  const double bytes = plan.bytes(part, bytes_of(lab.options.dtype)) / lab.ceilings.read;
  return 1e6 * (flop > bytes ? flop : bytes + 0 * flop);  // NaN of either is NaN
}

/// What the form should take: least time on a GPU, FLOP on a CPU, of which no ceiling was measured.
double theory(const Lab& lab, Where where, const LayerPlan& plan) {
  if (where == Where::kCpu) return plan.flop();
  double sum = 0;
  for (const LayerPart part : kLayerParts) sum += least_us(lab, plan, part);
  return sum;
}

const Measured* find(const std::vector<Measured>& forms, LayerForm form) {
  for (const Measured& one : forms) {
    if (one.plan->of.form == form) return &one;
  }
  return nullptr;
}

// --- Printing ------------------------------------------------------------------------------------

std::string megabytes(double bytes) {
  return number(bytes / 1e6);
}

/// "1.2× / 1.1×": in theory, measured.
std::string ratio(double theory_ratio, double measured_ratio) {
  return factor(theory_ratio) + " / " + factor(measured_ratio);
}

std::string tables(const Lab& lab, Where where, const Setting& setting,
                   const std::vector<Measured>& forms) {
  const Element element = lab.element(where);
  const bool gpu = where == Where::kGpu;
  Table speed({"form", "GFLOP", "µs (p10–p90)", "TFLOP/s", "of peak", "over multi-head*",
               "absorbed over it*", "error"});
  Table parts({"form", "projections", "latent", "core", "reconstruction", "output", "not core",
               "core µs per head"});
  Table memory({"form", "weights MB", "cache", "activations", "scores", "together"});
  const Measured* base = find(forms, LayerForm::kMultiHead);
  const Measured* best = find(forms, LayerForm::kAbsorbed);
  std::string left_out;
  for (const Measured& one : forms) {
    const LayerPlan& plan = *one.plan;
    const std::string form = to_string(plan.of.form);
    if (!one.status.ok()) {
      left_out += form + (one.left_out ? " left out: " : " FAILED: ") + one.status.message() + "\n";
      continue;
    }
    const double us = one.us();
    const auto over = [&](const Measured* slow, const Measured* fast) {
      if (slow == nullptr || fast == nullptr || slow == fast) return std::string("—");
      return ratio(theory(lab, where, *slow->plan) / theory(lab, where, *fast->plan),
                   slow->us() / fast->us());
    };
    const double rate = plan.flop() / us * 1e6;
    speed.add({form, number(1e-9 * plan.flop()), spread(summarize(one.times[0].cold)),
               number(1e-12 * rate), percent(gpu ? rate / lab.ceilings.matrix_cold : kUnknown),
               over(base, &one), over(&one, best), error(one.error)});
    std::vector<std::string> cells{form};
    double all = 0;  // of parts, each timed alone; the layer as a whole may take less
    for (const LayerPart part : kLayerParts) {
      cells.push_back(microseconds(one.us(part)));
      if (plan.has(part)) all += one.us(part);
    }
    const double core = one.us(LayerPart::kCore);
    cells.push_back(percent(1 - core / all));
    cells.push_back(microseconds(core / double(plan.core().heads)));
    parts.add(cells);
    using Kind = LayerBuffer::Kind;
    const int64_t size = bytes_of(element);
    const double activations = plan.bytes(Kind::kActivation, size) + plan.bytes(Kind::kInput, size);
    memory.add({form, megabytes(plan.bytes(Kind::kWeight, size)),
                megabytes(plan.bytes(Kind::kCache, size)), megabytes(activations),
                megabytes(one.score_bytes), megabytes(bytes_of(plan, element) + one.score_bytes)});
  }
  const bool any =
      std::any_of(forms.begin(), forms.end(), [](const Measured& one) { return one.status.ok(); });
  const std::string title =
      fmt::format("\n{}, {}, {}\n", setting.name,
                  gpu ? "GPU, cuBLAS, cold" : "CPU, Eigen, wall time", to_string(element));
  if (!any) return title + left_out;
  return title + speed.to_string() +
         fmt::format("* how many times as fast: by {} / measured\n\n",
                     gpu ? "least time at the measured ceilings" : "FLOP") +
         parts.to_string() + "\n" + memory.to_string() + left_out;
}

/// What the results file says beyond Google Benchmark's own figures.
std::vector<GoogleEntry> entries(const Lab& lab, Where where, const Setting& setting,
                                 const std::vector<Measured>& forms) {
  std::vector<GoogleEntry> result;
  using Kind = LayerBuffer::Kind;
  const int64_t size = bytes_of(lab.element(where));
  for (const Measured& one : forms) {
    const LayerPlan& plan = *one.plan;
    if (!one.status.ok()) {
      result.push_back({benchmark_name(plan, setting.name, where),
                        0,
                        {},
                        "",
                        (one.left_out ? "left out: " : "failed: ") + one.status.message()});
      continue;
    }
    for (size_t i = 0; i < one.times.size(); ++i) {
      const Summary times = summarize(one.times[i].cold);
      const auto part = one.parts[i];
      const double flop = part ? plan.flop(*part) : plan.flop();
      std::map<std::string, double> counters{{"p10_us", times.p10},
                                             {"p90_us", times.p90},
                                             {"n", times.n},
                                             {"flop", flop},
                                             {"TFLOPs", flop / times.median / 1e6}};
      if (part) {
        counters["least_us"] = where == Where::kGpu ? least_us(lab, plan, *part) : kUnknown;
      } else {
        counters["least_us"] = where == Where::kGpu ? theory(lab, where, plan) : kUnknown;
        counters["rel_l2"] = one.error;
        counters["core_heads"] = double(plan.core().heads);
        counters["weight_bytes"] = plan.bytes(Kind::kWeight, size);
        counters["cache_bytes"] = plan.bytes(Kind::kCache, size);
        counters["activation_bytes"] =
            plan.bytes(Kind::kActivation, size) + plan.bytes(Kind::kInput, size);
        counters["score_bytes"] = one.score_bytes;
      }
      result.push_back({one.times[i].cold_name, times.median, counters, "", ""});
    }
  }
  return result;
}

// --- Running -------------------------------------------------------------------------------------

/// Each value once, where it comes first.
template <typename T>
std::vector<T> once(const std::vector<T>& values) {
  std::vector<T> result;
  for (const T value : values) {
    if (std::find(result.begin(), result.end(), value) == result.end()) result.push_back(value);
  }
  return result;
}

/// The configurations that the options spell, a mode after the other.
Status make_settings(const Options& options, std::vector<Setting>* settings) {
  const auto add = [&](LayerMode mode, int64_t head_dim, int64_t heads) -> Status {
    Setting& setting = settings->emplace_back();
    setting.mode = mode;
    setting.head_dim = head_dim;
    LayerCase layer;
    layer.mode = mode;
    layer.heads = heads;
    layer.head_dim = head_dim;
    layer.kv_heads = options.kv_heads > 0 ? options.kv_heads : std::max<int64_t>(heads / 8, 1);
    layer.tokens = options.tokens;
    layer.queries = options.queries;
    layer.batch = options.batch;
    layer.causal = options.causal;
    setting.name = fmt::format("{}_h{}_d{}_n{}", to_string(mode), heads, head_dim, options.tokens);
    if (mode == LayerMode::kCross) setting.name += fmt::format("_q{}", options.queries);
    setting.name += fmt::format("_b{}", options.batch);
    if (options.kv_heads > 0) setting.name += fmt::format("_kv{}", options.kv_heads);
    if (options.causal) setting.name += "_causal";
    if (options.dtype == Element::kFp16) setting.name += "_fp16";
    for (const LayerForm form : once(options.forms)) {
      layer.form = form;
      MLA_RETURN_IF_ERROR(plan_layer(layer, &setting.plans.emplace_back()));
    }
    return {};
  };
  for (const LayerMode mode : once(options.modes)) {
    for (const int64_t head_dim : once(options.head_dims)) {
      for (const int64_t heads : once(options.heads))
        MLA_RETURN_IF_ERROR(add(mode, head_dim, heads));
    }
  }
  return {};
}

std::vector<std::string> names_of(const std::vector<Setting>& settings,
                                  const std::vector<Where>& machines) {
  std::vector<std::string> names;
  for (const Setting& setting : settings) {
    for (const Where where : machines) {
      for (const LayerPlan& plan : setting.plans) {
        names.push_back(benchmark_name(plan, setting.name, where));
        for (const LayerPart part : kLayerParts) {
          if (plan.has(part)) names.push_back(benchmark_name(plan, setting.name, where, part));
        }
      }
    }
  }
  return names;
}

/// Where the figures come from.
Context describe_run(const Lab& lab, const Machine* gpu) {
  Context context = describe_environment(gpu != nullptr ? *gpu : model_machine());
  const unsigned cores = std::thread::hardware_concurrency();
  const unsigned threads = lab.options.threads > 0 ? unsigned(lab.options.threads) : cores;
  const std::string cpu = fmt::format("{} of {} cores", threads, cores);
  for (auto& [key, value] : context) {
    if (key == "schema") value = kSchema;
    if (gpu == nullptr && key == "machine") value = "cpu";
    if (gpu == nullptr && key == "machine_description") value = "CPU, " + cpu;
  }
  context.emplace_back("cpu", cpu);
  return context;
}

/// Says which forms are not, on a GPU.
bool is_right_small(const Lab& lab, const Setting& setting) {
  bool right = true;
  for (const LayerPlan& plan : setting.plans) {
    const Status status = check_gpu_small(lab, plan);
    if (status.ok()) continue;
    right = right && is_no_failure(status);
    std::cout << to_string(plan.of.form) << " on a small layer: " << status.to_string() << "\n";
  }
  return right;
}

/// Times that Ctrl-C was pressed. What is measured by the first is kept; the third ends the program.
std::atomic<int> interrupted = 0;

void on_interrupt(int signal) {
  if (++interrupted == 2) std::signal(signal, SIG_DFL);
}

int measure(const Options& options, const std::vector<Setting>& settings) {
  const auto refuse = [](const Status& status, int code = kNothingRun) {
    return complain("mla_traditional", status, code);
  };
  std::string why_not;
  Machine* gpu = options.machine == "cpu" ? nullptr : gpu_machine(&why_not);
  if (options.machine == "gpu" && gpu == nullptr) {
    return refuse({StatusCode::kUnavailable, why_not});
  }
  std::vector<Where> machines;
  if (gpu != nullptr) machines.push_back(Where::kGpu);  // first, because a CPU may be interrupted
  if (options.machine != "gpu") machines.push_back(Where::kCpu);
  std::unique_ptr<GoogleBenchmark> google;
  if (const Status status =
          GoogleBenchmark::create(names_of(settings, machines), {}, /*show=*/false, &google);
      !status.ok()) {
    return refuse(status);
  }
  if (const Status status = check_writable(options.out); !status.ok()) return refuse(status);
  Lab lab{options, *google, {}, make_model_runner(), nullptr, {}};
  const auto begin = WallClock::now();
  Context context = describe_run(lab, gpu);
  if (gpu != nullptr) {
    Status status = make_gpu_runner(&lab.gpu);
    if (status.ok()) {
      status = measure_ceilings(
          *lab.gpu, [&](const std::string& text) { lab.progress.step(text); }, &lab.ceilings);
    }
    lab.progress.clear();
    if (!status.ok()) return refuse(status, kWrong);
    const Context measured = describe_ceilings(lab.ceilings);
    context.insert(context.end(), measured.begin(), measured.end());
  }
  std::cout << describe(context);
  if (options.machine == "both" && gpu == nullptr) {
    std::cout << "GPU left out: " << why_not << "\n";
  }
  bool failed = false;
  std::signal(SIGINT, on_interrupt);
  for (const Where where : machines) {
    std::pair<std::optional<LayerMode>, int64_t> checked;
    for (const Setting& setting : settings) {
      if (interrupted > 0) {
        std::cout << "\nInterrupted: " << setting.name << " and what follows are left out.\n";
        failed = true;
        break;
      }
      // Once for a mode and a width: other heads are alike.
      const std::pair<std::optional<LayerMode>, int64_t> kind{setting.mode, setting.head_dim};
      if (where == Where::kGpu && checked != kind) {
        checked = kind;
        failed = !is_right_small(lab, setting) || failed;
      }
      const std::vector<Measured> forms = measure_setting(lab, where, setting);
      for (const Measured& one : forms) failed = failed || (!one.status.ok() && !one.left_out);
      std::cout << tables(lab, where, setting, forms) << std::flush;
      google->add(entries(lab, where, setting, forms));
      if (where == Where::kGpu && lab.gpu->lost()) {
        std::cout << "\nThe GPU cannot be used any more by this process.\n" << std::flush;
        std::_Exit(kWrong);  // freeing memory would wait for a kernel that does not end
      }
    }
  }
  std::signal(SIGINT, SIG_DFL);
  context.emplace_back("wall_s", number(seconds_since(begin), 4));
  if (!options.out.empty()) {
    if (const Status status = write_file(options.out, google->json(context)); !status.ok()) {
      return refuse(status, kWrong);
    }
    std::cout << "\nresults: " << options.out << "\n";
  }
  if (failed) std::cout << "\nFAILED: see above\n";
  return failed ? kWrong : kRight;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Measures one attention layer as multi-head, grouped-query, traditional latent (plain and "
      "fused) and\nabsorbed multi-head latent attention: time beside theory, the share of time "
      "outside the core, memory, error.\nAll forms have the width heads * head-dim; MLA's heads "
      "are 576 and 512 wide whatever head-dim is.\nExamples:\n"
      "  mla_traditional --heads 32 --head-dim 64 --n 2048 --batch 4\n"
      "  mla_traditional --modes cross --queries 77 --n 1024 --heads 16 --forms "
      "multi_head,absorbed\n"
      "  mla_traditional --machine gpu --head-dim 128 --out traditional.json"};
  app.add_option("--machine", options.machine,
                 "both (a GPU if there is one), cpu (fp32, Eigen), gpu (cuBLAS)")
      ->check(CLI::IsMember({"both", "cpu", "gpu"}))
      ->capture_default_str();
  app.add_option("--heads", options.heads, "query heads, separated by commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--kv-heads", options.kv_heads,
                 "KV heads of the grouped form; default: an eighth of --heads")
      ->check(CLI::PositiveNumber);
  app.add_option(
         "--head-dim", options.head_dims,
         "widths of a head, in traditional latent forms of the latent head; separated by commas")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--n", options.tokens, "tokens that each query reads")->capture_default_str();
  app.add_option("--queries", options.queries, "queries of each sequence, in mode cross")
      ->capture_default_str();
  app.add_option("--batch", options.batch, "sequences")->capture_default_str();
  std::map<std::string, LayerMode> modes;
  for (const LayerMode mode : {LayerMode::kPrefill, LayerMode::kDecode, LayerMode::kCross}) {
    modes[to_string(mode)] = mode;
  }
  app.add_option("--modes", options.modes,
                 "prefill (all tokens are new), decode (one is new), cross (another sequence's "
                 "cache); default: "
                 "prefill,decode")
      ->delimiter(',')
      ->transform(CLI::CheckedTransformer(modes));
  std::map<std::string, LayerForm> forms;
  for (const LayerForm form : kLayerForms) forms[to_string(form)] = form;
  app.add_option("--forms", options.forms,
                 "multi_head, grouped, latent_plain, latent_fused, absorbed; default: all")
      ->delimiter(',')
      ->transform(CLI::CheckedTransformer(forms));
  app.add_flag("--causal", options.causal,
               "mask, bottom-right; it saves no time here, because products are whole");
  const std::map<std::string, Element> dtypes{{"bf16", Element::kBf16}, {"fp16", Element::kFp16}};
  app.add_option("--dtype", options.dtype, "type of the GPU's layers: bf16 (default) or fp16")
      ->transform(CLI::CheckedTransformer(dtypes, CLI::ignore_case));
  app.add_option("--most-gflop", options.most_gflop, "on the CPU, leave out forms with more work")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--threads", options.threads, "threads of the CPU; default: all cores")
      ->check(CLI::PositiveNumber);
  app.add_option("--out", options.out, "write Google Benchmark's JSON here");
  app.footer(kExitCodes);
  if (int code = 0; !parse(app, argc, argv, &code)) return code;
  const bool cross = std::find(options.modes.begin(), options.modes.end(), LayerMode::kCross) !=
                     options.modes.end();
  if (app.count("--queries") > 0 && !cross) {
    return complain("mla_traditional", {StatusCode::kInvalidArgument,
                                        "--queries has no effect without --modes cross"});
  }
  std::vector<Setting> settings;
  if (const Status status = make_settings(options, &settings); !status.ok()) {
    return complain("mla_traditional", status);
  }
  return measure(options, settings);
}

}  // namespace
}  // namespace mla::bench

int main(int argc, char** argv) {
  return mla::bench::run_program("mla_traditional", mla::bench::run, argc, argv);
}
