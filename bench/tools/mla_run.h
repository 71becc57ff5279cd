/// @file
/// What the subcommands of mla_run share: the problem they are about, and the stages that do it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bench/measure/program.h"
#include "bench/tools/dump.h"
#include "bench/tools/recommend.h"
#include "reference/quantise.h"
#include "stages/common/stage.h"

namespace mla::bench {

/// The command line of a subcommand; each has some of these.
struct RunOptions {
  std::string stage;  ///< A slug, its number, "all" or "reference"
  std::string machine = "auto";
  DumpFiles files;
  std::string scale;  ///< As typed: "0.135234", "1/24"
  std::string shape;
  std::optional<std::string> data;   ///< By default needles
  std::optional<uint64_t> seed;      ///< By default 0
  std::string out, lse, out_format;  ///< The format "bits" or "fp32"; empty: bits
  std::string check_out, check_lse;
  std::string schedules;  ///< "3", "17..19"; empty: 1
  std::string device;     ///< Of the model; empty: its default
  bool json = false;
  std::vector<int> ranks;  ///< Of `predict`: numbers of GPUs; empty: a stage on one
  bool listing = false;    ///< The sources with counts beside them.
  uint64_t schedule = 0;   ///< The model's schedule while it counts.
};

/// What `quantise` takes beside that.
struct QuantiseOptions {
  std::optional<CacheFormat> format;  ///< By default all.
  ScaleRule rule = ScaleRule::kLargest;
  std::optional<float> cache_scale;  ///< Of fp8_tensor; by default from the largest value.
  std::string out;                   ///< Where the quantised cache goes; empty: nowhere.
};

/// What `trace` takes beside that.
struct TraceOptions {
  std::vector<uint64_t> blocks = {0};
  bool all_blocks = false;
  std::optional<uint64_t> schedule;  ///< By default the seed of the data.
  int multiprocessors = 0;  ///< Of the device that the model pretends to be; 0: as many as usual.
  uint64_t max_events = 1'000'000;
  uint32_t max_mib = 64;
  std::string chrome, check;  ///< Files.
};

/// What `recommend` takes.
struct RecommendOptions {
  Wish wish;
  std::string budget, p99;  ///< As typed: "2GiB", "50ms"
};

/// A stage on the machine it is to run on, or why it cannot.
struct Placement {
  std::string slug;
  std::string idea;
  const Stage* stage = nullptr;
  Machine* machine = nullptr;
  Status why_not;        ///< Not ok: cannot run.
  std::string fallback;  ///< Why the model and not the GPU, under --machine auto.
};

/// The stages that `name` asks for ("all": every one), each on its machine.
/// @return kInvalidArgument for a name that no stage has
Status place(const std::string& name, const std::string& machine,
             std::vector<Placement>* placements);

/// Marks the stages that cannot read the problem's cache: they cannot run.
void leave_out_unable(const Problem& problem, std::vector<Placement>* placements);

/// Prints the message; returns the exit code.
int refuse(const Status& status, int exit_code = kNothingRun);

/// "bf16, b=2 s_q=1 h_q=3 h_kv=1, 5 to 70 tokens in 3 pages, scale 0.135234, not causal"
std::string describe(const Dump& dump);

/// Whether two paths name one file, or would if it were there.
bool same_file(const std::string& a, const std::string& b);

/// The arguments that name the same problem again: "--shape h16_q1_b2_k256 --seed 3 --data flat".
std::string problem_arguments(const RunOptions& options);

// The subcommands: each does its work, prints it, and returns the exit code.

int run_decode(const RunOptions& options);
int run_plan(const RunOptions& options);
int run_predict(const RunOptions& options);
int run_predict_ranks(const RunOptions& options);
int run_explain(const RunOptions& options);
/// Where this program's kernels cannot be counted, `arguments` go to the one beside it whose can.
int run_profile(const RunOptions& options, char** arguments);
int run_trace(const RunOptions& options, const TraceOptions& trace);
int run_quantise(const RunOptions& options, const QuantiseOptions& quantise);
int run_recommend(RecommendOptions options);
int run_list();

/// Where a problem is to be decoded; nothing is if only its lengths are asked for.
struct Use {
  bool decodes = false;        ///< q and the cache are needed.
  Machine* machine = nullptr;  ///< Null: the CPU reference alone decodes.
};

/// Reads or makes the problem. Refuses one that memory does not hold.
Status load_problem(const RunOptions& options, const Use& use, Dump* dump);

}  // namespace mla::bench
