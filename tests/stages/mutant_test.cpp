// Kernels with one fault each (mutants.txt). Under at least one of ten schedules, the model must reject
// the kernel, or its results must be wrong. The kernels without a fault must pass the very same runs.
//
//   mutant_test [--stage 07] [--name "wait for S"] [--messages] [--table]
//
// A fault is not run again once it is found as mutants.txt says, unless --messages prints every
// schedule's message, or --table prints docs/mutants.md instead of lines for a terminal.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <regex>
#include <string>
#include <vector>

#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "stages/common/split/workspace.h"
#include "stages/common/stage.h"

namespace mla {

extern int mutant;
int mutant = 0;  // Which fault the kernels have; 0: none.

namespace {

constexpr uint64_t kSeeds = 10;

// A factor on the logits. Needles rise by e^4 along a sequence. Kernels that keep their maximum until
// something exceeds it by 2^8 would move it in the first tile alone, and would never rescale anything.
constexpr float kSharpen = 6;

struct Mutant {
  int id;
  int line;  // of kernel.cuh
  std::string stage, name, expected;
  std::string error;  // not empty: its text does not fit the kernel
};
const std::vector<Mutant> kMutants = {
#include "mutants.inc"
};

// The shapes in which a fault can show. They are few, but they have workers that end one sequence and
// begin the next, odd and even numbers of tiles, tails with NaN after them, sequences of several
// workers, maxima that move, rows of more than one tile, and pages smaller and larger than a tile. There
// are few multiprocessors, so workers get many tiles.
struct Case {
  DecodeCase spec;
  int multiprocessors;
  std::string stage = "";  // the only stage that runs it; empty: all do
};
std::vector<Case> cases() {
  std::vector<Case> result;
  const auto add = [&](DType dtype, std::vector<int32_t> lengths, int seqlen_q, int heads,
                       int multiprocessors, int page_size = kDefaultPageSize,
                       const char* stage = "") {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.lengths = std::move(lengths);
    spec.batch = static_cast<int>(spec.lengths.size());
    spec.seqlen_q = seqlen_q;
    spec.num_heads_q = heads;
    spec.causal = seqlen_q > 1;
    spec.page_size = page_size;
    spec.strided = page_size != kDefaultPageSize;
    spec.data = DataKind::kNeedles;
    spec.seed = result.size();
    result.push_back({spec, multiprocessors, stage});
  };
  add(DType::kBFloat16, {200, 50, 64, 420}, 1, 64, 2);  // two workers, several pieces each
  add(DType::kFloat16, {150, 0, 321}, 1, 40, 1);        // one worker: all sequences
  add(DType::kBFloat16, {70, 300}, 2, 65, 3);      // 130 rows: three tiles or more, a worker each
  add(DType::kFloat16, {576, 130}, 2, 65, 6);      // two workers each
  add(DType::kBFloat16, {20, 150}, 1, 16, 1, 16);  // tiles of up to four pages, gaps between rows
  add(DType::kFloat16, {150, 0, 321}, 1, 16, 1, 256);  // pages of four tiles
  // A team of eight blocks has two pieces, of two rounds of tiles or of no tile. There are 16 rows, then 32,
  // which take two exchanges.
  add(DType::kBFloat16, {580, 0}, 1, 16, 8, 32, "10");
  add(DType::kFloat16, {70, 150}, 2, 16, 8, 64, "10");
  // Two workers. The second begins within a sequence, so its first page is not the sequence's first.
  add(DType::kBFloat16, {64, 1280}, 1, 16, 2, 64, "10");
  // Halves of three row tiles; a worker with a second half and other pieces; halves beside a sequence of three
  // pieces, which the combine puts together.
  add(DType::kFloat16, {580}, 2, 65, 6, 64, "09");
  add(DType::kBFloat16, {50, 330, 60, 420}, 1, 20, 3, 64, "09");
  add(DType::kBFloat16, {50, 114, 498}, 1, 20, 5, 64, "09");
  // A cluster of two, with sequences of a tile each, so that one warpgroup may be a piece ahead.
  add(DType::kBFloat16, {20, 33, 0, 50, 64, 10}, 1, 128, 2, 64, "11");
  // Scales of all sizes, then scales that grow past what P can hold; each in every format.
  for (int turn = 0; turn < 6; ++turn) {
    add(DType::kBFloat16, {turn < 3 ? 300 : 500, 17}, 1, 20, 2, 64, "12");
    result.back().spec.data = turn < 3 ? DataKind::kExtremeValues : DataKind::kGrowingValues;
  }
  return result;
}

// A case with its data and the right result.
struct Prepared {
  Case from;
  size_t turn;
  DataSet data;
  DeviceTensors tensors;
  ReferenceResult expected;
  std::vector<uint16_t> first_out;  // what the current mutant gave under the first seed
};

// Whether a flag that a worker has waited for is still raised. The next replay of a graph has the same number, and
// would take it for its own.
bool leaves_a_flag(const Stage& stage, const Problem& problem, void* workspace) {
  PlanShape shape;
  WorkspaceBytes needs;
  HostPlan plan;
  if (!plan_shape(stage, problem, model_machine().limits(), &shape).ok() || !shape.joins_halves ||
      !workspace_bytes(stage, problem, &needs).ok() ||
      !read_plan(stage, problem, {workspace, needs.plan}, &plan).ok() ||
      combined_slots(plan, shape) > 0) {  // then no halves are joined
    return false;
  }
  const SplitWorkspace split =
      split_workspace(problem, shape, workspace, static_cast<std::byte*>(workspace) + needs.plan);
  for (int worker = 0; worker < shape.workers; ++worker) {
    const WorkerBegin begin = plan.worker_begin[static_cast<size_t>(worker)];
    if (begin.grain == 0) continue;
    const int32_t* slots = &plan.slot_begin[static_cast<size_t>(begin.sequence)];
    for (int tile = 0; tile < shape.row_tiles && slots[1] - slots[0] == 2; ++tile) {
      if (split.half_is_there[worker * shape.row_tiles + tile] != 0) return true;
    }
  }
  return false;
}

// Whether a stage runs a case in this format: it takes the formats that it reads in turn.
bool has_turn(const Stage& stage, const Case& from, size_t turn, CacheFormat format) {
  return stage.slug.starts_with(from.stage) &&
         stage.cache_formats[turn % stage.cache_formats.size()] == format;
}
bool runs(const Stage& stage, const Prepared& each) {
  return has_turn(stage, each.from, each.turn, each.data.problem.cache_format);
}

// What was wrong with one run. Empty if it was right.
std::string run(const Stage& stage, Prepared& prepared, uint64_t seed, bool detect_races) {
  Machine& machine = model_machine();
  gpu_model::device() = {};
  gpu_model::device().multiprocessors = prepared.from.multiprocessors;
  gpu_model::schedule() = {.seed = seed, .detect_races = detect_races};
  const Problem& problem = prepared.data.problem;
  DeviceBuffer workspace;
  Status status = allocate_workspace(stage, problem, &workspace);
  if (status.ok()) status = prepared.tensors.poison_outputs(machine);
  if (status.ok()) {
    status = decode(stage, problem, prepared.tensors.tensors(), workspace);
  }
  if (status.code() == StatusCode::kKernelRejected) return "model: " + status.message();
  if (!status.ok()) return "error: " + status.to_string();
  std::vector<uint16_t> out(prepared.tensors.out.bytes() / sizeof(uint16_t));
  std::vector<float> lse(prepared.tensors.lse.bytes() / sizeof(float));
  std::memcpy(out.data(), prepared.tensors.out.data(), prepared.tensors.out.bytes());
  std::memcpy(lse.data(), prepared.tensors.lse.data(), prepared.tensors.lse.bytes());
  const DecodeComparison comparison =
      compare_decode(problem, gather_out(problem, prepared.tensors.layout, out),
                     gather_lse(problem, prepared.tensors.layout, lse), prepared.expected);
  if (!comparison.ok()) return "conformance: " + comparison.describe();
  if (leaves_a_flag(stage, problem, workspace.data())) return "conformance: a flag is left raised";
  if (prepared.first_out.empty()) prepared.first_out = out;
  return out == prepared.first_out ? "" : "conformance: results differ between schedules";
}

// What all runs of a mutant, or of a kernel without a fault, showed.
struct Findings {
  int seeds_by_model = 0, seeds_by_conformance = 0;
  std::vector<std::string> messages;  // one for each seed that found something
  std::string friendly;               // what the first seed found with the race detector
};
// Ends the schedules with a message that is enough.
Findings run_all(const Stage& stage, std::deque<Prepared>& prepared, uint64_t seeds,
                 bool detect_races, const std::function<bool(const std::string&)>& enough) {
  Findings findings;
  for (Prepared& each : prepared) each.first_out.clear();
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    std::string found;
    for (Prepared& each : prepared) {
      if (!runs(stage, each)) continue;
      found = run(stage, each, seed, false);
      if (!found.empty()) break;
    }
    if (found.empty()) continue;
    ++(found.starts_with("conformance") ? findings.seeds_by_conformance : findings.seeds_by_model);
    findings.messages.push_back(found);
    if (enough(found)) break;
  }
  for (Prepared& each : prepared) {
    if (!detect_races) break;
    if (!runs(stage, each)) continue;
    each.first_out.clear();
    findings.friendly = run(stage, each, 0, true);
    if (!findings.friendly.empty()) break;
  }
  return findings;
}

// A message without the parts that change from run to run or do not help: places, threads, numbers of
// errors.
std::string shorten(std::string message) {
  const std::pair<const char*, const char*> rules[] = {
      {"^model: ", ""},
      {"^conformance: results differ.*", "results differ between schedules"},
      {"^conformance: a flag", "a flag"},
      {"^conformance: [^]*", "wrong results"},
      {" at [^ ]*\\.(cuh|h):[0-9]+", ""},
      {",? ?(by |in )?block \\([0-9,]*\\)(, thread \\([0-9,]*\\))?:?", ""},
      {" of thread \\([0-9,]*\\)", ""},
      {" by thread \\([0-9,]*\\)", " by a thread"},
      {"threads [0-9]+-[0-9]+", "threads"},
      {"\n", " "},
  };
  for (const auto& [pattern, with] : rules) {
    message = std::regex_replace(message, std::regex(pattern), with);
  }
  constexpr size_t kLongest = 110;
  if (message.size() > kLongest) message = message.substr(0, kLongest - 3) + "...";
  return message;
}

// Escaped for Markdown.
std::string escaped(std::string text) {
  for (size_t i = 0; (i = text.find_first_of("|_<>", i)) != text.npos; i += 2) text.insert(i, "\\");
  return text;
}

// "08" of a stage, "step_08_1" of a step.
std::string short_name(const std::string& slug) {
  return slug.substr(0, slug.starts_with("step_") ? std::strlen("step_08_1") : 2);
}

struct Options {
  std::string stage, name;
  bool messages = false, table = false;
};

constexpr const char* kPage = R"(# What the tests would notice

A test that passes shows little until it has been seen to fail. These are the kernels of stages 06 to 13 and one of the
steps to 08, with one fault each, mostly a synchronisation that is removed, weakened or misplaced. The table says what finds the fault: the
[GPU model](../reference/gpu_model/README.md), which rejects the kernel with a message, or the comparison with the
reference, because *results* are wrong or change with the schedule. Each kernel runs on six to nine small batches under ten
schedules, without the race detector. The column "schedules" says under how many of these the fault was found; the message
is from one of them, without the places in the source. The last column says what one more run found, under the friendly
schedule and with the [race detector](../reference/gpu_model/README.md#races-without-luck): *a race*, or *yes* if another rule
or the results rejected it first. The kernels without a fault pass the same runs.

The faults are listed in `stages/mutants/mutants.txt`, each as a text of the kernel and its replacement, so that they
follow the kernels. `mutant_test` fails if one of them survives, and `build/tests/mutant_test --table > docs/mutants.md`
writes this page. A dash marks what is not found.

Fourteen of the faults are exercises, in stages 07 to 13: `stages/exercise begin 07 4` takes the line out and shows what
the model says. Find what is missing; `stages/exercise check 07 4` tells whether you did. Nine faults of 07 and 08 can be
watched, step by step, in [the player](demos/player.md#watch-the-race).

| stage | fault | found by | message | schedules | with the detector |
|---|---|---|---|---|---|
)";

int run_mutants(const Options& options) {
  const auto started = std::chrono::steady_clock::now();
  std::deque<Prepared> prepared;
  const std::vector<Case> all_cases = cases();
  for (size_t turn = 0; turn < all_cases.size(); ++turn) {
    for (const CacheFormat format : kCacheFormats) {
      const std::vector<Stage>& all = stages(MachineKind::kModel);
      if (std::none_of(all.begin(), all.end(), [&](const Stage& stage) {
            return stage.slug.starts_with(options.stage) &&
                   has_turn(stage, all_cases[turn], turn, format);
          })) {
        continue;
      }
      Prepared& next = prepared.emplace_back();
      next.from = all_cases[turn];
      next.turn = turn;
      DecodeCase& spec = next.from.spec;
      spec.cache_format = format;
      if (has_tile_scales(format)) spec.dtype = DType::kBFloat16;
      next.data = make_data_set(spec);
      next.data.problem.softmax_scale *= kSharpen;
      if (!generate_on_device(model_machine(), next.data, &next.tensors).ok() ||
          !reference_attention(next.data.problem, next.tensors.tensors(), &next.expected).ok()) {
        std::fprintf(stderr, "no data for %s\n", spec.name().c_str());
        return 1;
      }
    }
  }
  int failures = 0;
  const auto fail = [&](const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
  };

  // First the kernels without a fault: if these were rejected, a rejection would prove nothing.
  mutant = 0;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (!stage.slug.starts_with(options.stage)) continue;
    const Findings findings =
        run_all(stage, prepared, kSeeds, true, [](const std::string&) { return false; });
    for (const std::string& message : findings.messages) fail(stage.slug + " as it is: " + message);
    if (!findings.friendly.empty()) fail(stage.slug + " as it is: " + findings.friendly);
  }

  if (options.table) std::printf("%s", kPage);
  int run = 0;
  for (const Mutant& each : kMutants) {
    if (!each.stage.starts_with(options.stage)) continue;
    if (each.name.find(options.name) == std::string::npos) continue;
    ++run;
    const std::string name = short_name(each.stage) + " " + each.name;
    if (!each.error.empty()) {
      fail(name + ": " + each.error);
      continue;
    }
    mutant = each.id;
    const auto begun = std::chrono::steady_clock::now();
    // With the race detector, a friendly run must find every fault that is a race.
    const bool only_race = each.expected == "race", is_race = only_race || each.expected == "any";
    const std::string wanted = each.expected.starts_with("model: ") ? each.expected.substr(7) : "";
    const auto is_expected = [&](const std::string& message) {
      const bool by_model = message.starts_with("model: ");
      const bool by_results = message.starts_with("conformance");
      return each.expected == "any" ? by_model || by_results
             : each.expected == "conformance"
                 ? by_results
                 : by_model && !wanted.empty() && message.find(wanted) != message.npos;
    };
    const bool all_schedules = options.table || options.messages;
    const Findings findings =
        run_all(*find_stage(MachineKind::kModel, each.stage), prepared,
                only_race && !all_schedules ? 0 : kSeeds, is_race || options.table,
                [&](const std::string& message) { return !all_schedules && is_expected(message); });
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    const int seeds = static_cast<int>(findings.messages.size());

    // The first message of the expected kind is shown for all.
    std::string shown = seeds > 0 ? findings.messages[0] : "";
    bool as_expected = false;
    for (const std::string& message : findings.messages) {
      as_expected = is_expected(message);
      if (as_expected) {
        shown = message;
        break;
      }
    }
    const bool is_blind_spot = each.expected.starts_with("not modelled: ");
    if (is_blind_spot) as_expected = seeds == 0;
    if (only_race) as_expected = true;
    const char* finder = findings.seeds_by_model == 0 && findings.seeds_by_conformance == 0 ? "-"
                         : findings.seeds_by_conformance == 0 ? "model"
                         : findings.seeds_by_model == 0       ? "results"
                                                              : "model, results";
    const std::string text = only_race    ? shorten(findings.friendly)
                             : seeds == 0 ? each.expected
                                          : shorten(shown);
    if (options.table) {
      std::printf("| %s | %s | %s | %s | %d of %d | %s |\n", short_name(each.stage).c_str(),
                  escaped(each.name).c_str(), finder, escaped(text).c_str(), seeds,
                  static_cast<int>(kSeeds),
                  findings.friendly.empty()                               ? "-"
                  : findings.friendly.find("race: ") != std::string::npos ? "a race"
                                                                          : "yes");
    } else {
      std::printf("%-2s %-72s line %3d  %-14s %5.2f s  %s\n", short_name(each.stage).c_str(),
                  each.name.c_str(), each.line, finder, seconds, text.c_str());
    }
    if (options.messages) {
      for (const std::string& message : findings.messages) std::printf("    %s\n", message.c_str());
      std::printf("    with the detector: %s\n", findings.friendly.c_str());
    }
    std::fflush(stdout);
    if (is_race && findings.friendly.empty()) {
      fail(name + ": the race detector does not find it in a friendly run");
    }
    if (as_expected) continue;
    if (seeds == 0) {
      fail(name + ": survives every schedule: its line is superfluous, or these runs are too weak");
    } else if (is_blind_spot) {
      fail(name + ": is found now: say so in mutants.txt");
    } else {
      fail(name + ": expected \"" + each.expected + "\", found \"" + findings.messages[0] + "\"");
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  std::fprintf(stderr, "%d mutants, %d failures, %.1f s\n", run, failures, seconds);
  return failures == 0 && run > 0 ? 0 : 1;
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  mla::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--messages") {
      options.messages = true;
    } else if (flag == "--table") {
      options.table = true;
    } else if ((flag == "--stage" || flag == "--name") && i + 1 < argc) {
      (flag == "--stage" ? options.stage : options.name) = argv[++i];
    } else {
      std::fprintf(stderr,
                   "unknown or incomplete argument '%s'\nusage: %s [--stage 07] [--name TEXT] "
                   "[--messages] [--table]\n",
                   flag.c_str(), argv[0]);
      return 2;
    }
  }
  return mla::run_mutants(options);
}
