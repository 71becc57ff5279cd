// Every stage of the registry is compared with the reference, on every case of the list.
//
//   conformance_test [--machine model|gpu] [--stage 02_shared_tiled] [--cases sample|full]
//                    [--shard i/n] [--gtest_...]
//
// conformance_02 is the same with that stage alone.
//
// On the model: a seeded sample of small cases, under one or two schedules each, on pretended
// devices of several sizes. On a GPU: the full product, checked against the fp64 oracle; the loop is case ->
// data -> reference -> stages. A stage runs on the cache formats that it reads: on a GPU on all, on the model
// on one format per case, in turn. A stage stops after three failing cases. The report of each ends with the
// command that repeats it.
#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <sstream>

#include "reference/attention.h"
#include "reference/float16.h"
#include "reference/gpu_model/named_devices.h"
#include "reference/quantise.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "reference/testing/oracle.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

struct Options {
  MachineKind machine = MachineKind::kModel;
  std::string stage;  // empty: all
  bool full = false;
  int shard = 0, shards = 1;
  bool ran = false;  // whether any stage ran
} options;

constexpr std::pair<int, int> kHeads[] = {{1, 1},   {3, 1},   {3, 3},   {9, 1},  {9, 3},   {63, 1},
                                          {63, 3},  {64, 1},  {64, 2},  {64, 8}, {126, 1}, {126, 2},
                                          {126, 3}, {128, 1}, {128, 2}, {128, 8}};

// b x s_q x s_k x heads x variable x causal x dtype, and a case in which half of the sequences are empty.
// The scale alternates by the seed.
std::vector<DecodeCase> full_product() {
  std::vector<DecodeCase> cases;
  for (const int batch : {1, 2, 6, 64}) {
    for (const int seqlen_q : {1, 2, 4}) {
      for (const int seqlen_k : {20, 140, 4096}) {
        for (const auto& [num_heads_q, num_heads_kv] : kHeads) {
          for (const bool variable : {false, true}) {
            for (const bool causal : {false, true}) {
              for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
                DecodeCase spec;
                spec.dtype = dtype;
                spec.batch = batch;
                spec.seqlen_q = seqlen_q;
                spec.seqlen_k = seqlen_k;
                spec.num_heads_q = num_heads_q;
                spec.num_heads_kv = num_heads_kv;
                spec.variable_lengths = variable;
                spec.causal = causal;
                spec.empty_fraction = variable && batch >= 6 ? 0.1 : 0;
                spec.seed = cases.size() / 2 * 3 + (cases.size() & 1);
                cases.push_back(spec);
              }
            }
          }
        }
      }
    }
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const bool causal : {false, true}) {
      DecodeCase spec;
      spec.dtype = dtype;
      spec.batch = 128;
      spec.seqlen_q = 2;
      spec.seqlen_k = 4096;
      spec.num_heads_q = 128;
      spec.variable_lengths = true;
      spec.empty_fraction = 0.5;
      spec.causal = causal;
      spec.seed = cases.size();
      cases.push_back(spec);
    }
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    DecodeCase spec;  // a cache of more than 2^31 elements
    spec.dtype = dtype;
    spec.batch = 128;
    spec.seqlen_k = 32768;
    spec.num_heads_q = 16;
    spec.seed = cases.size();
    cases.push_back(spec);
  }
  return cases;
}

int64_t products(const DecodeCase& spec) {
  return int64_t{spec.batch} * spec.seqlen_q * spec.num_heads_q * spec.seqlen_k;
}

// The number of products of up to 64 rows with a tile of 64 tokens.
int64_t tile_products(const DecodeCase& spec) {
  const int64_t rows = int64_t{spec.seqlen_q} * spec.num_heads_q / spec.num_heads_kv;
  return spec.batch * spec.num_heads_kv * ((rows + 63) / 64) * grains_for(spec.seqlen_k);
}

bool is_long(const DecodeCase& spec) {
  return spec.seqlen_k == 4096;
}
bool is_wide(const DecodeCase& spec) {
  return spec.batch == 64;
}

// Whether the model runs a case in a few tenths of a second. The first stages take time by their products,
// the later ones by their tiles.
bool is_quick(const DecodeCase& spec) {
  const bool few = is_long(spec) || is_wide(spec);
  return tile_products(spec) <= (few ? 64 : 18) && products(spec) <= 18000;
}

// 120 cases of the product that the model runs quickly: every pair of heads and every flag, ten cases with
// 4096 tokens, six with 64 sequences, each dtype equally often. They are the same for every stage and every run.
// The full list (--cases full) takes days on the model, and minutes on a GPU.
std::vector<DecodeCase> small_sample() {
  constexpr size_t kCases = 120;
  std::vector<DecodeCase> pool;
  for (const DecodeCase& spec : full_product()) {
    if (is_quick(spec)) pool.push_back(spec);
  }
  std::mt19937_64 random(1);
  std::shuffle(pool.begin(), pool.end(), random);
  std::map<std::pair<int, int>, int> heads_seen;
  int long_seen = 0, wide_seen = 0;
  std::vector<DecodeCase> sample, rest;
  for (const DecodeCase& spec : pool) {
    if (is_long(spec) || is_wide(spec)) {
      const bool wanted = is_long(spec) ? ++long_seen <= 10 : ++wide_seen <= 6;
      if (wanted) sample.push_back(spec);
    } else if (++heads_seen[{spec.num_heads_q, spec.num_heads_kv}] <= 5) {
      sample.push_back(spec);
    } else {
      rest.push_back(spec);
    }
  }
  for (const DecodeCase& spec : rest) {
    if (sample.size() < kCases) sample.push_back(spec);
  }
  return sample;
}

// For each case of a list, how many before it have the same heads. By this number, a stage that reads
// several formats takes them in turn, so that every pair of heads meets every format.
std::vector<size_t> turns_of(const std::vector<DecodeCase>& cases) {
  std::map<std::pair<int, int>, size_t> seen;
  std::vector<size_t> turns;
  for (const DecodeCase& spec : cases) {
    turns.push_back(seen[{spec.num_heads_q, spec.num_heads_kv}]++);
  }
  return turns;
}

bool go_together(CacheFormat format, DType dtype) {
  return !has_tile_scales(format) || dtype == DType::kBFloat16;
}

// Cases for the extreme data kinds: ordinary shapes, hostile values. Only quantised caches have scales of
// tiles. These are several formats, so the model runs half of the shapes on them.
std::vector<DecodeCase> extreme_cases(MachineKind machine, bool quantised) {
  std::vector<DecodeCase> cases;
  std::vector<DataKind> kinds = {DataKind::kExtremeValues, DataKind::kExtremeLogits};
  if (quantised) kinds.insert(kinds.end(), {DataKind::kScaledTiles, DataKind::kGrowingValues});
  for (const DataKind kind : kinds) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (const bool causal : {false, true}) {
        for (const int seqlen_k : {20, 300}) {
          const bool half = machine == MachineKind::kModel && quantised;
          if (half && causal != (seqlen_k == 300)) continue;
          DecodeCase spec;
          spec.dtype = dtype;
          spec.data = kind;
          spec.batch = 3;
          spec.seqlen_q = 2;
          spec.seqlen_k = seqlen_k;
          spec.num_heads_q = 20;
          spec.num_heads_kv = 2;
          spec.variable_lengths = true;
          spec.causal = causal;
          spec.seed = cases.size();
          cases.push_back(spec);
        }
      }
    }
  }
  return cases;
}

// Shapes at the edges of the kernels' tiles. On a GPU in their true sizes, on the model in smaller ones.
// A million tokens are only in the full list.
std::vector<DecodeCase> edge_cases(MachineKind machine, bool full) {
  const bool on_gpu = machine == MachineKind::kGpu;
  std::vector<DecodeCase> cases;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    // The model runs each with one dtype only: what breaks here are counts and places.
    auto add = [&, index = 0](DecodeCase spec) mutable {
      spec.dtype = dtype;
      spec.seed = cases.size() / 2 * 3 + (cases.size() & 1);
      const bool wanted = on_gpu || index++ % 2 == (dtype == DType::kFloat16);
      if (wanted) cases.push_back(spec);
    };
    // Lengths around a page, in one batch.
    DecodeCase pages;
    pages.seqlen_q = 2;
    pages.num_heads_q = 5;
    pages.causal = true;
    pages.lengths = {1, 63, 64, 65, 0, 128};
    add(pages);
    // Rows that no tile divides: 77 per KV head.
    DecodeCase rows;
    rows.batch = 2;
    rows.seqlen_q = 11;
    rows.seqlen_k = on_gpu ? 1000 : 100;
    rows.num_heads_q = 7;
    add(rows);
    rows.num_heads_q = 14;
    rows.num_heads_kv = 2;
    rows.causal = true;
    add(rows);
    // More sequences than the planning kernel looks at together, of a token each.
    DecodeCase sequences;
    sequences.batch = on_gpu ? 8192 : 2100;
    sequences.seqlen_k = 1;
    if (!on_gpu) {  // most of them empty, which costs the model little
      sequences.lengths.assign(2100, 0);
      for (size_t i = 3; i < sequences.lengths.size(); i += 8) sequences.lengths[i] = 1;
    }
    sequences.num_heads_q = on_gpu ? 16 : 1;
    add(sequences);
    // More queries than tokens, so that some see nothing; and a few tokens more than queries.
    DecodeCase queries;
    queries.seqlen_q = on_gpu ? 512 : 130;
    queries.num_heads_q = on_gpu ? 6 : 1;
    queries.causal = true;
    queries.lengths = {100, on_gpu ? 700 : 140};
    add(queries);
    // Many tokens.
    DecodeCase tokens;
    tokens.seqlen_k = on_gpu && full ? 1000000 : on_gpu ? 20000 : 10000;
    tokens.num_heads_q = on_gpu ? 4 : 1;
    add(tokens);
  }
  return cases;
}

// Tensors as engines have them: every page size, contiguous and with strides, lengths around pages and
// tiles of every size.
std::vector<DecodeCase> layout_cases(MachineKind machine) {
  const bool on_gpu = machine == MachineKind::kGpu;
  std::vector<DecodeCase> cases;
  for (const int page_size : {16, 32, 64, 128, 256}) {
    for (const bool strided : {false, true}) {
      if (page_size == 64 && !strided) continue;  // all other cases
      const auto add = [&](DecodeCase spec) {
        spec.page_size = page_size;
        spec.strided = strided;
        spec.dtype = cases.size() % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
        spec.seed = cases.size();
        cases.push_back(spec);
      };
      DecodeCase short_ones;
      short_ones.seqlen_q = 2;
      short_ones.num_heads_q = 6;
      short_ones.num_heads_kv = strided ? 2 : 1;
      short_ones.causal = true;
      short_ones.lengths = {1, 15, 16, 17, 0, 33, 63, 65, 128};
      add(short_ones);
      DecodeCase long_ones;
      long_ones.num_heads_q = on_gpu ? 128 : 17;
      long_ones.num_heads_kv = strided ? 1 : on_gpu ? 2 : 17;
      if (!on_gpu && !strided) long_ones.num_heads_q = 34;
      long_ones.lengths = {on_gpu ? 5000 : 330, 257, on_gpu ? 70000 : 127};
      add(long_ones);
      if (!on_gpu) continue;
      long_ones.fixed_split_tokens = 512;
      long_ones.seqlen_q = 3;
      add(long_ones);
      DecodeCase many;
      many.batch = 64;
      many.seqlen_k = 2000;
      many.variable_lengths = true;
      many.empty_fraction = 0.1;
      many.num_heads_q = 16;
      add(many);
    }
  }
  return cases;
}

// The devices that the model pretends to be, in turn. A stage that picks tiles by shared memory has to use all
// of its tiles, a grid limit of 5 blocks makes every kernel loop over its items, and with 3 multiprocessors a
// worker has many tiles.
const gpu_model::NamedDevice& pretend_device(size_t turn) {
  const auto devices = gpu_model::named_devices();
  const gpu_model::NamedDevice& chosen = devices[turn % devices.size()];
  gpu_model::device() = chosen.device;
  return chosen;
}

// What failed in this run of the program. A fault shows in nearly every case: three are enough.
constexpr int kMostFailures = 3;
struct Failures {
  int cases = 0;
  int left_out = 0;    // the cases after them
  std::string repeat;  // the command that repeats the first
};
std::map<std::string, Failures> failures;

// Counts a failing case of a stage and reports it. The report's last line is the command that repeats it.
void fail(const std::string& stage, const std::string& what, const std::string& repeat) {
  ADD_FAILURE() << stage << ": " << what << "\nrepeat: " << repeat;
  Failures& so_far = failures[stage];
  if (++so_far.cases == 1) so_far.repeat = repeat;
  if (so_far.cases < kMostFailures) return;
  std::printf("[ STOPPED  ] %s: %d cases failed; the others are left out\n", stage.c_str(),
              kMostFailures);
}

// Whether a stage still runs. If not, the case is counted as left out.
bool goes_on(const std::string& stage) {
  Failures& so_far = failures[stage];
  if (so_far.cases < kMostFailures) return true;
  ++so_far.left_out;
  return false;
}

// The command that repeats the running test, for cases that mla_run cannot express.
std::string repeat_test(const std::string& stage) {
  const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
  const bool is_step = stage.rfind("step_", 0) == 0;
  return "build/tests/conformance_" +
         (is_step ? stage.substr(5, 2) + " --stage " + stage : stage.substr(0, 2)) + " --machine " +
         std::string(options.machine == MachineKind::kModel ? "model" : "gpu") +
         " --gtest_filter=" + test->test_suite_name() + "." + test->name();
}

// What the buffers of out and lse hold.
struct Outputs {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Outputs& other) const {
    return out == other.out &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

Status run(Machine& machine, const Stage& stage, const DataSet& data, DeviceTensors& tensors,
           Outputs* outputs) {
  DeviceBuffer workspace;
  MLA_RETURN_IF_ERROR(allocate_workspace(stage, data.problem, &workspace));
  MLA_RETURN_IF_ERROR(tensors.poison_outputs(machine));
  MLA_RETURN_IF_ERROR(decode(stage, data.problem, tensors.tensors(), workspace));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  outputs->out.resize(tensors.out.bytes() / sizeof(uint16_t));
  outputs->lse.resize(tensors.lse.bytes() / sizeof(float));
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(outputs->out.data(), tensors.out.data(), tensors.out.bytes()));
  return machine.copy_to_host(outputs->lse.data(), tensors.lse.data(), tensors.lse.bytes());
}

// What is wrong with the outputs. Empty if nothing is.
std::string judge(const DataSet& data, const Outputs& outputs, const ReferenceResult& expected) {
  const Layout layout = data.layout();
  const DecodeComparison comparison =
      compare_decode(data.problem, gather_out(data.problem, layout, outputs.out),
                     gather_lse(data.problem, layout, outputs.lse), expected);
  if (!comparison.ok()) return comparison.describe();
  const bool untouched = gaps_hold(data.problem, layout, outputs.out, 0xffff, outputs.lse,
                                   std::bit_cast<float>(0xffffffff));
  return untouched ? "" : "wrote between the rows of out or lse";
}

// All stages of the registry; or those whose slug begins with --stage, which may also be the one that chooses, or steps.
std::vector<const Stage*> stages_asked_for() {
  std::vector<const Stage*> chosen;
  const auto add = [&](const Stage& stage) {
    if (stage.slug.rfind(options.stage, 0) == 0) chosen.push_back(&stage);
  };
  for (const Stage& stage : stages(options.machine)) add(stage);
  if (options.stage.empty()) return chosen;
  for (const Stage& step : steps(options.machine)) add(step);
  if (const Stage* chooser = find_stage(options.machine, options.stage);
      options.stage == "auto" && chooser != nullptr) {
    add(*chooser);
  }
  return chosen;
}

class Conformance : public testing::Test {
 protected:
  void SetUp() override {
    std::string why_not;
    machine_ = find_machine(options.machine, &why_not);
    if (machine_ == nullptr) GTEST_SKIP() << why_not;
    for (const Stage* stage : stages_asked_for()) {
      const Status fit = check_device(*stage, machine_->limits());
      if (fit.ok() && !goes_on(stage->slug)) {
        std::printf("[ STOPPED  ] %s\n", stage->slug.c_str());
      } else if (fit.ok()) {
        stages_.push_back(stage);
      } else {
        std::printf("[ SKIPPED  ] %s\n", fit.to_string().c_str());
      }
    }
    if (stages_.empty()) GTEST_SKIP() << "no stage to run";
    options.ran = true;
    started_ = std::chrono::steady_clock::now();
  }

  void TearDown() override {
    gpu_model::device() = {};
    gpu_model::schedule() = {};
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
    for (const auto& [what, count] : runs_) {
      const auto& [slug, format] = what;
      const std::string cache = is_quantised(format) ? std::string(" ") + to_string(format) : "";
      std::printf("[   RUNS   ] %s%s: bf16 %d of %d, fp16 %d of %d passed\n", slug.c_str(),
                  cache.c_str(), count.passed[0], count.run[0], count.passed[1], count.run[1]);
    }
    if (!runs_.empty()) std::printf("[   TIME   ] %.1f s\n", seconds);
  }

  // Whether case `index` of a list belongs to this shard.
  static bool in_shard(size_t index) {
    return index % static_cast<size_t>(options.shards) == static_cast<size_t>(options.shard);
  }

  // Stages that read this format.
  std::vector<const Stage*> readers_of(CacheFormat format) const {
    std::vector<const Stage*> readers;
    for (const Stage* stage : stages_) {
      if (can_read(*stage, format)) readers.push_back(stage);
    }
    return readers;
  }

  // The formats that some stage reads.
  std::vector<CacheFormat> formats() const {
    std::vector<CacheFormat> some;
    for (const CacheFormat format : kCacheFormats) {
      if (!readers_of(format).empty()) some.push_back(format);
    }
    return some;
  }

  // Calls `check(format, dtype)` for each of these formats, with each dtype that goes with it.
  template <typename Check>
  void for_each_format(const Check& check) {
    for (const CacheFormat format : formats()) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        if (go_together(format, dtype)) check(format, dtype);
        if (HasFatalFailure()) return;
      }
    }
  }

  // Runs every stage on one case, in every format that it reads.
  void check_all_formats(const DecodeCase& spec, DataKind kind,
                         std::span<const uint64_t> schedules) {
    for (const CacheFormat format : kCacheFormats) {
      check_readers(spec, kind, format, readers_of(format), schedules);
      if (HasFatalFailure()) return;
    }
  }

  // On a GPU the same. On the model in one format per stage, in turn, so that a stage takes the same time
  // however many formats it reads.
  void check_case(const DecodeCase& spec, DataKind kind, size_t turn,
                  std::span<const uint64_t> schedules) {
    if (options.machine == MachineKind::kGpu) return check_all_formats(spec, kind, schedules);
    for (const CacheFormat format : kCacheFormats) {
      std::vector<const Stage*> now;
      for (const Stage* stage : stages_) {
        const std::vector<CacheFormat>& formats = stage->cache_formats;
        if (formats[turn % formats.size()] == format) now.push_back(stage);
      }
      DecodeCase fitting = spec;
      if (has_tile_scales(format)) fitting.dtype = DType::kBFloat16;
      check_readers(fitting, kind, format, now, schedules);
      if (HasFatalFailure()) return;
    }
  }

  // Runs these stages on one case, in a format that they read. On the model they run under the given
  // schedules, and the results must agree to the bit.
  void check_readers(DecodeCase spec, DataKind kind, CacheFormat format,
                     const std::vector<const Stage*>& readers,
                     std::span<const uint64_t> schedules) {
    if (!go_together(format, spec.dtype)) return;
    spec.data = kind;
    spec.cache_format = format;
    std::vector<const Stage*> left;
    for (const Stage* stage : readers) {
      if (goes_on(stage->slug)) left.push_back(stage);
    }
    if (left.empty()) return;
    const DataSet data = make_data_set(spec);
    DeviceTensors tensors;
    const Status made = generate_on_device(*machine_, data, &tensors);
    ASSERT_OK(made) << spec.name() << ": " << made.to_string();
    ReferenceResult expected;
    const Status known = options.machine == MachineKind::kGpu
                             ? oracle_decode(*machine_, data.problem, tensors.tensors(), &expected)
                             : reference_attention(data.problem, tensors.tensors(), &expected);
    ASSERT_OK(known) << spec.name() << ": " << known.to_string();

    const gpu_model::Device pretended = gpu_model::device();
    for (const Stage* stage : left) {
      gpu_model::device() = pretended;  // or the usual device, if the stage cannot run on this one
      const bool fits = check_device(*stage, machine_->limits()).ok();
      if (!fits) gpu_model::device() = {};
      check_stage(*stage, data, tensors, expected, schedules, fits ? device_ : "");
    }
  }

  // The runs of one stage; the first that fails is reported and ends them.
  void check_stage(const Stage& stage, const DataSet& data, DeviceTensors& tensors,
                   const ReferenceResult& expected, std::span<const uint64_t> schedules,
                   const std::string& device) {
    Outputs first;
    for (size_t i = 0; i < schedules.size(); ++i) {
      gpu_model::schedule().seed = schedules[i];
      Count& count = runs_[{stage.slug, data.spec.cache_format}];
      const int dtype = data.spec.dtype == DType::kFloat16;
      ++count.run[dtype];
      Outputs outputs;
      const Status status = run(*machine_, stage, data, tensors, &outputs);
      std::string wrong;
      size_t from = i;  // the first schedule that the repetition needs
      if (!status.ok()) {
        wrong = status.to_string();
      } else if (wrong = judge(data, outputs, expected);
                 wrong.empty() && i > 0 && !(outputs == first)) {
        wrong = "other bits than under the schedule before";
        from = 0;
      }
      if (wrong.empty()) {
        ++count.passed[dtype];
        if (i == 0) first = std::move(outputs);
        continue;
      }
      std::ostringstream repeat;
      const bool on_model = options.machine == MachineKind::kModel;
      repeat << "build/bench/mla_run decode --stage " << stage.slug << " --machine "
             << (on_model ? "model" : "gpu") << " --shape " << shape_name(data) << " --seed "
             << data.spec.seed << " --data " << to_string(data.spec.data);
      if (on_model) repeat << " --schedules " << schedules[from] << ".." << schedules[i];
      if (on_model && !device.empty()) repeat << " --device " << device;
      fail(stage.slug, data.spec.name() + ": " + wrong, repeat.str());
      return;
    }
  }

  struct Count {
    int run[2] = {}, passed[2] = {};
  };
  Machine* machine_ = nullptr;
  std::vector<const Stage*> stages_;
  std::string device_;  // the model's, by name
  std::map<std::pair<std::string, CacheFormat>, Count> runs_;
  std::chrono::steady_clock::time_point started_;
};

TEST_F(Conformance, Cases) {
  const bool on_model = options.machine == MachineKind::kModel;
  const std::vector<DecodeCase> cases = options.full ? full_product() : small_sample();
  const std::vector<size_t> turns = turns_of(cases);
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!in_shard(i)) continue;
    if (on_model) {
      device_ = pretend_device(i / static_cast<size_t>(options.shards)).name;
      // Each case once; and in turn some again under another schedule, on flat data, or with all threads in order.
      const uint64_t seed = 2 * i + 1;
      const bool twice = i % 6 == 0;
      check_case(cases[i], DataKind::kNeedles, turns[i],
                 twice ? std::vector<uint64_t>{seed, seed + 1} : std::vector<uint64_t>{seed});
      if (i % 6 == 2) {
        check_case(cases[i], DataKind::kFlat, turns[i], std::vector<uint64_t>{seed + 1});
      }
      if (i % 6 == 4) {
        check_case(cases[i], DataKind::kNeedles, turns[i], std::vector<uint64_t>{0});
      }
    } else {
      check_all_formats(cases[i], DataKind::kFlat, std::vector<uint64_t>{0});
      check_all_formats(cases[i], DataKind::kNeedles, std::vector<uint64_t>{0});
      if (i % 500 == 0) std::fprintf(stderr, "case %zu of %zu\n", i, cases.size());
    }
    if (HasFatalFailure()) return;
  }
}

TEST_F(Conformance, Edges) {
  const std::vector<DecodeCase> cases = edge_cases(options.machine, options.full);
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!in_shard(i)) continue;
    device_ = pretend_device(i / static_cast<size_t>(options.shards)).name;
    check_case(cases[i], DataKind::kNeedles, i, std::vector<uint64_t>{i});
    if (HasFatalFailure()) return;
  }
}

TEST_F(Conformance, PageSizesAndStrides) {
  const std::vector<DecodeCase> cases = layout_cases(options.machine);
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!in_shard(i)) continue;
    device_ = pretend_device(i / static_cast<size_t>(options.shards)).name;
    check_case(cases[i], DataKind::kNeedles, i, std::vector<uint64_t>{i});
    if (HasFatalFailure()) return;
  }
}

// Data of 16 bits on the host, which a test may change. Then a cache of any format is made of them.
struct HostData {
  std::vector<uint16_t> q, cache;
  std::vector<uint8_t> cache_bytes;

  Status read(Machine& machine, const DeviceTensors& tensors) {
    q.resize(tensors.q.bytes() / 2);
    cache.resize(tensors.kv_cache.bytes() / 2);
    MLA_RETURN_IF_ERROR(machine.copy_to_host(q.data(), tensors.q.data(), tensors.q.bytes()));
    return machine.copy_to_host(cache.data(), tensors.kv_cache.data(), tensors.kv_cache.bytes());
  }

  // Makes the data set and its tensors those of a cache in this format, with these values.
  Status write(Machine& machine, CacheFormat format, ScaleRule rule, DataSet* data,
               DeviceTensors* tensors) {
    Problem& problem = data->problem;
    if (is_quantised(format)) {
      data->spec.cache_format = problem.cache_format = format;
      float largest = 0;  // NaN does not count
      for (const uint16_t bits : cache) {
        largest = std::max(largest, std::abs(to_float(problem.dtype, bits)));
      }
      problem.cache_scale = scale_for(format, largest, rule);
      MLA_RETURN_IF_ERROR(quantise_cache(problem, cache.data(), rule, &cache_bytes));
    } else {
      cache_bytes.resize(cache.size() * 2);
      std::memcpy(cache_bytes.data(), cache.data(), cache_bytes.size());
    }
    tensors->layout = data->layout();
    MLA_RETURN_IF_ERROR(machine.copy_to_device(tensors->q.data(), q.data(), tensors->q.bytes()));
    return tensors->kv_cache.assign(machine, cache_bytes.data(), cache_bytes.size());
  }
};

// The reference for data whose q and cache a test has changed.
Status reference_on(const DataSet& data, const HostData& changed, ReferenceResult* expected) {
  Tensors host;
  host.q = changed.q.data();
  host.kv_cache = changed.cache_bytes.data();
  host.block_table = data.block_table.data();
  host.seqlens_k = data.seqlens_k.data();
  return reference_attention(data.problem, host, expected);
}

void expect_right(Machine& machine, const std::vector<const Stage*>& stages, const DataSet& data,
                  DeviceTensors& tensors, const ReferenceResult& expected) {
  for (const Stage* stage : stages) {
    if (!goes_on(stage->slug)) continue;
    Outputs outputs;
    const Status status = run(machine, *stage, data, tensors, &outputs);
    const std::string wrong = status.ok() ? judge(data, outputs, expected) : status.to_string();
    if (!wrong.empty()) {
      fail(stage->slug, data.spec.name() + ": " + wrong, repeat_test(stage->slug));
    }
  }
}

// A length that the block table cannot describe counts as the nearest that it can, with causal masking,
// too.
TEST_F(Conformance, LengthsAreClamped) {
  const auto check = [&](CacheFormat format, bool causal) {
    DecodeCase spec;
    spec.seqlen_q = 2;
    spec.num_heads_q = 5;
    spec.causal = causal;
    spec.lengths = {70, 100, 64, 128};
    const DataSet data = make_data_set(spec);
    DeviceTensors tensors;
    ASSERT_OK(generate_on_device(*machine_, data, &tensors));
    DataSet clamped = data;  // a table of two pages, all in use
    clamped.problem.max_pages_per_seq = 2;
    clamped.block_table.clear();
    for (int b = 0; b < 4; ++b) {
      const int32_t* row = data.block_table.data() + int64_t{b} * data.problem.max_pages_per_seq;
      clamped.block_table.insert(clamped.block_table.end(), {row[0], b == 2 ? row[0] : row[1]});
    }
    clamped.seqlens_k = {0, 128, 64, 128};
    ReferenceResult expected;
    HostData host;
    ASSERT_OK(host.read(*machine_, tensors));
    // Rows past the end of sequence 1 are NaN: give them a value, because now they are seen.
    for (int token = 100; token < 128; ++token) {
      const int64_t place = cache_place(data.problem, with_strides(data.problem, {}),
                                        &clamped.block_table[2], token, 0);
      std::fill_n(host.cache.begin() + place, kHeadDimQK, uint16_t{0});
    }
    ASSERT_OK(host.write(*machine_, format, ScaleRule::kLargest, &clamped, &tensors));
    ASSERT_OK(reference_on(clamped, host, &expected));
    const std::vector<int32_t> given = {-5, 1 << 30, 64, 2147483647};
    ASSERT_OK(tensors.seqlens_k.assign(*machine_, given.data(), given.size() * 4));
    ASSERT_OK(tensors.block_table.assign(*machine_, clamped.block_table.data(),
                                         clamped.block_table.size() * 4));
    expect_right(*machine_, readers_of(format), clamped, tensors, expected);
  };
  for (const CacheFormat format : formats()) {
    for (const bool causal : {false, true}) check(format, causal);
  }
}

TEST_F(Conformance, ExtremeValuesAndLogits) {
  for (const CacheFormat format : kCacheFormats) {
    const std::vector<DecodeCase> cases = extreme_cases(options.machine, is_quantised(format));
    for (size_t i = 0; i < cases.size(); ++i) {
      if (!in_shard(i)) continue;
      device_ = pretend_device(i / static_cast<size_t>(options.shards)).name;
      check_readers(cases[i], cases[i].data, format, readers_of(format),
                    std::vector<uint64_t>{i + 1});
      if (HasFatalFailure()) return;
    }
  }
}

// A NaN among a sequence's own tokens reaches all of its rows, lse included, and no other's.
TEST_F(Conformance, NanStaysInItsOwnSequence) {
  for_each_format([&](CacheFormat format, DType dtype) {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.batch = 3;
    spec.seqlen_q = 2;
    spec.seqlen_k = 100;
    spec.num_heads_q = 20;
    DataSet data = make_data_set(spec);
    DeviceTensors tensors;
    ASSERT_OK(generate_on_device(*machine_, data, &tensors));
    HostData host;
    ASSERT_OK(host.read(*machine_, tensors));
    const int32_t* table = data.block_table.data() + data.problem.max_pages_per_seq;  // sequence 1
    host.cache[static_cast<size_t>(
        cache_place(data.problem, with_strides(data.problem, {}), table, 70, 0) + 5)] =
        nan_bits(dtype);
    ASSERT_OK(host.write(*machine_, format, ScaleRule::kLargest, &data, &tensors));
    ReferenceResult expected;
    ASSERT_OK(reference_on(data, host, &expected));
    ASSERT_TRUE(std::isnan(expected.lse[2 * 20]));  // sequence 1
    ASSERT_FALSE(std::isnan(expected.lse[0]));
    expect_right(*machine_, readers_of(format), data, tensors, expected);
  });
}

// Data that a test chooses: q is `q575` in column 575 and 0 elsewhere, so a token's logit is q575 times
// its column 575. V is constant over a token's columns.
struct Token {
  float v, k575;
};
// The scales of quantised caches are powers of two, so that the values of the tests below are exact.
void run_on_tokens(Machine& machine, const std::vector<const Stage*>& stages, CacheFormat format,
                   const DecodeCase& spec, float softmax_scale, float q575,
                   const std::function<Token(int)>& token_at) {
  DataSet data = make_data_set(spec);
  data.problem.softmax_scale = softmax_scale;
  DeviceTensors tensors;
  ASSERT_OK(generate_on_device(machine, data, &tensors));
  const auto bits = [&](float value) {
    return visit_dtype(spec.dtype, [&](auto zero) {
      return std::bit_cast<uint16_t>(from_float<decltype(zero)>(value));
    });
  };
  HostData host;
  host.q.assign(tensors.q.bytes() / 2, 0);
  host.cache.assign(tensors.kv_cache.bytes() / 2, 0xffff);
  for (size_t i = 0; i < host.q.size(); i += kHeadDimQK) host.q[i + kHeadDimQK - 1] = bits(q575);
  const Tensors contiguous = with_strides(data.problem, {});
  for (int token = 0; token < spec.seqlen_k; ++token) {
    const auto [v, k575] = token_at(token);
    uint16_t* row = &host.cache[static_cast<size_t>(
        cache_place(data.problem, contiguous, data.block_table.data(), token, 0))];
    std::fill(row, row + kHeadDimV, bits(v));
    std::fill(row + kHeadDimV, row + kHeadDimQK, uint16_t{0});
    row[kHeadDimQK - 1] = bits(k575);
  }
  ASSERT_OK(host.write(machine, format, ScaleRule::kPowerOfTwo, &data, &tensors));
  ReferenceResult expected;
  ASSERT_OK(reference_on(data, host, &expected));
  expect_right(machine, stages, data, tensors, expected);
}

// One token outweighs each other one by far, but not all of them together. V is 0 for the heavy token and 1
// for the others, so V shows what 16-bit weights lose of the others. Weights are powers of two, which every
// 16-bit type holds exactly within its range. Other weights would all be rounded alike, by up to 2^-8 in bf16.
TEST_F(Conformance, OneHeavyTokenAmongMany) {
  for_each_format([&](CacheFormat format, DType dtype) {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.num_heads_q = 2;
    spec.seqlen_k = options.machine == MachineKind::kGpu ? 65536 : 4096;
    spec.fixed_split_tokens = spec.seqlen_k;             // all in one piece, with one maximum
    for (const float heavy : {8.f, 12.f, 15.f, 17.f}) {  // in e4m3 17 is 16
      run_on_tokens(*machine_, readers_of(format), format, spec, std::log(2.f), 1, [&](int token) {
        return token == 0 ? Token{0, heavy} : Token{1, 0};
      });
    }
  });
}

// Equal logits give the mean of V, however large they are: no weight may be computed from a rounded lse.
TEST_F(Conformance, LargeEqualLogits) {
  for_each_format([&](CacheFormat format, DType dtype) {
    DecodeCase spec;
    spec.dtype = dtype;
    spec.num_heads_q = 2;
    spec.seqlen_k = 1000;
    for (const float k575 : {1.f, 1024.f, 8192.f}) {  // logits up to 2^23
      run_on_tokens(*machine_, readers_of(format), format, spec, 1, 1024, [&](int) {
        return Token{1, k575};
      });
    }
  });
}

// Values of the size that a layer's norm leaves, 1, and larger ones; logits of deviation 0.3, 3 and 4.
TEST_F(Conformance, DataOfOtherSizes) {
  struct Factors {
    float q, cache;  // factors on flat data, whose deviation is 0.1
  };
  for_each_format([&](CacheFormat format, DType dtype) {
    for (const auto [q_factor, cache_factor] :
         {Factors{3, 10}, Factors{40, 10}, Factors{3, 20}, Factors{3, 1000}, Factors{40, 0.1F}}) {
      DecodeCase spec;
      spec.dtype = dtype;
      spec.lengths = {11, 0, 501, 130};
      spec.batch = 4;
      spec.num_heads_q = 16;
      DataSet data = make_data_set(spec);
      DeviceTensors tensors;
      ASSERT_OK(generate_on_device(*machine_, data, &tensors));
      HostData host;
      ASSERT_OK(host.read(*machine_, tensors));
      const auto scale = [&](std::vector<uint16_t>* values, float factor) {
        visit_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          for (uint16_t& bits : *values) {
            bits =
                std::bit_cast<uint16_t>(from_float<T>(factor * to_float(std::bit_cast<T>(bits))));
          }
        });
      };
      scale(&host.q, q_factor);
      scale(&host.cache, cache_factor);
      ASSERT_OK(host.write(*machine_, format, ScaleRule::kLargest, &data, &tensors));
      ReferenceResult expected;
      ASSERT_OK(reference_on(data, host, &expected));
      expect_right(*machine_, readers_of(format), data, tensors, expected);
    }
  });
}

// Scales of tiles and codes that quantising would never make are taken as they are: scales of 0,
// negative ones, subnormal ones, and the code -128.
TEST_F(Conformance, ScalesAndCodesAreTakenAsTheyAre) {
  for (const CacheFormat format : formats()) {
    if (!has_tile_scales(format)) continue;
    DecodeCase spec;
    spec.cache_format = format;
    spec.data = DataKind::kScaledTiles;
    spec.seqlen_q = 2;
    spec.num_heads_q = 20;
    spec.lengths = {300, 17, 0, 129};
    const DataSet data = make_data_set(spec);
    DeviceTensors tensors;
    ASSERT_OK(generate_on_device(*machine_, data, &tensors));
    HostTensors generated = generate(data);
    HostData host;
    host.q = generated.q;
    host.cache_bytes = generated.quantised_cache;
    std::mt19937_64 random(11);
    const Tensors contiguous = with_strides(data.problem, {});
    for (int b = 0; b < data.problem.batch; ++b) {
      const int32_t* table = &data.block_table[size_t(b) * size_t(data.problem.max_pages_per_seq)];
      for (int token = 0; token < data.seqlens_k[size_t(b)]; ++token) {
        uint8_t* const row = &host.cache_bytes[static_cast<size_t>(
            cache_place(data.problem, contiguous, table, token, 0))];
        for (int tile = 0; tile < kHeadDimV / kTileColumns; ++tile) {
          constexpr float kFactors[] = {1, 1, -1, -1, 3, 0, 0x1p-130f};
          float scale = 0;
          std::memcpy(&scale, row + kTileScalesByte + 4 * tile, sizeof scale);
          scale *= kFactors[random() % std::size(kFactors)];
          std::memcpy(row + kTileScalesByte + 4 * tile, &scale, sizeof scale);
        }
        for (int code = 0; code < 4; ++code) row[random() % kHeadDimV] = 0x80;  // -128, or -0
      }
    }
    ASSERT_OK(tensors.kv_cache.assign(*machine_, host.cache_bytes.data(), host.cache_bytes.size()));
    ReferenceResult expected;
    ASSERT_OK(reference_on(data, host, &expected));
    expect_right(*machine_, readers_of(format), data, tensors, expected);
  }
}

// The same input gives the same bits, run after run.
TEST_F(Conformance, BitwiseRepeatable) {
  DecodeCase spec;
  spec.batch = 5;
  spec.seqlen_q = 2;
  spec.seqlen_k = options.machine == MachineKind::kGpu ? 2000 : 100;
  spec.num_heads_q = options.machine == MachineKind::kGpu ? 128 : 24;
  spec.variable_lengths = true;
  spec.causal = true;
  std::vector<uint64_t> schedules(options.machine == MachineKind::kGpu ? 1000 : 4);
  for (size_t i = 0; i < schedules.size(); ++i) schedules[i] = i;
  check_all_formats(spec, DataKind::kNeedles, schedules);
}

// The sample covers what it promises, whatever is changed in the list.
TEST(ConformanceSample, CoversWhatItMust) {
  const std::vector<DecodeCase> sample = small_sample();
  EXPECT_EQ(sample.size(), 120u);
  const std::vector<size_t> turns = turns_of(sample);
  for (const size_t formats : {2, 3, 4}) {
    std::set<std::tuple<int, int, size_t>> met;
    for (size_t i = 0; i < sample.size(); ++i) {
      met.insert({sample[i].num_heads_q, sample[i].num_heads_kv, turns[i] % formats});
    }
    EXPECT_EQ(met.size(), formats * std::size(kHeads));
  }
  std::set<std::pair<int, int>> heads;
  std::map<std::string, int> seen;
  for (const DecodeCase& spec : sample) {
    EXPECT_TRUE(is_quick(spec)) << spec.name();
    heads.insert({spec.num_heads_q, spec.num_heads_kv});
    seen[to_string(spec.dtype)]++;
    seen["long"] += spec.seqlen_k == 4096;
    seen[spec.causal ? "causal" : "not causal"]++;
    seen[spec.variable_lengths ? "variable" : "fixed"]++;
    seen["s_q " + std::to_string(spec.seqlen_q)]++;
    seen["b " + std::to_string(spec.batch)]++;
    seen[spec.seed % 2 == 0 ? "scale 576^-1/2" : "scale 0.135"]++;
  }
  EXPECT_EQ(heads.size(), std::size(kHeads));
  EXPECT_GE(seen["long"], 10);
  for (const char* each :
       {"bf16", "fp16", "causal", "not causal", "variable", "fixed", "s_q 1", "s_q 2", "s_q 4",
        "b 1", "b 2", "b 6", "b 64", "scale 576^-1/2", "scale 0.135"}) {
    EXPECT_GE(seen[each], 5) << each;
  }
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  mla::Options& options = mla::options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
    if (flag == "--machine" && (value == "gpu" || value == "model")) {
      options.machine = value == "gpu" ? mla::MachineKind::kGpu : mla::MachineKind::kModel;
    } else if (flag == "--stage" && !value.empty()) {
      options.stage = value;
    } else if (flag == "--cases" && (value == "sample" || value == "full")) {
      options.full = value == "full";
    } else if (flag == "--shard" &&
               std::sscanf(value.c_str(), "%d/%d", &options.shard, &options.shards) == 2 &&
               options.shard >= 0 && options.shard < options.shards) {
    } else {
      std::fprintf(stderr,
                   "unknown or incomplete argument '%s'\nusage: %s [--machine model|gpu] "
                   "[--stage SLUG] [--cases sample|full] [--shard i/n, 0 <= i < n]\n",
                   flag.c_str(), argv[0]);
      return 2;
    }
    ++i;
  }
  if (mla::stages_asked_for().empty() && !mla::stages(options.machine).empty()) {
    std::fprintf(stderr, "no stage '%s'\n", options.stage.c_str());
    return 2;
  }
  const int result = RUN_ALL_TESTS();
  for (const auto& [stage, failed] : mla::failures) {
    if (failed.cases == 0) continue;
    std::printf("%s: %d cases failed, %d not run\nrepeat: %s\n", stage.c_str(), failed.cases,
                failed.left_out, failed.repeat.c_str());
  }
  // No stage ran, because there is no GPU or none that fits. The exit code tells CTest that the test was skipped.
  return result == 0 && !options.ran ? 77 : result;
}
