/// @file
/// What every rank of mla_parallel does: checks, times, and what it does to others when it fails.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/measure/shapes.h"
#include "bench/parallel/rank_clock.h"
#include "bench/parallel/rank_data.h"
#include "bench/parallel/ranks.h"

namespace mla::bench {

/// What a rank is told to do wrong, for a test.
enum class Fault {
  kNone,
  kKill,       ///< It is killed before its first exchange.
  kKillLater,  ///< It is killed amid decodes that all repeat, as graphs on a GPU.
  kStop,       ///< It does not come, and does not end.
  kShape,      ///< It decodes a sequence less.
  kError,      ///< Its workspace is too small.
};

/// "is killed before its first exchange"
const char* to_string(Fault fault);

/// One decode to check or time.
struct ParallelCase {
  Shape shape;
  Division division;
  std::string mode;
  /// "context round-robin, all_gather, 2 slices"
  std::string title() const;
};

struct ParallelOptions {
  MachineKind machine = MachineKind::kModel;
  std::string stage = "auto";
  std::vector<ParallelCase> cases;
  bool check = false, times = false, graphs = true;
  bool repeat = false;      ///< Each case has two decodes, whose bits must be the same.
  bool timeline = false;    ///< Of each case, in which all ranks must share pages.
  bool share_gpus = false;  ///< There may be more ranks than GPUs.
  double warmup_s = -1;     ///< Less than 0: the stage's own.
  int rounds = 3;  ///< Of times, in which all that is timed takes turns; medians are taken.
  Fault fault = Fault::kNone;  ///< In the first case, in which all ranks must share pages.
  int faulty_rank = 0;
  std::chrono::milliseconds time_limit{10000};
};

/// The rank that prints, and gets the report: 0, or another if that is to fail.
int reporting_rank(const ParallelOptions& options);

/// Makes the end of this rank's group, of two or more. `api` is what it goes through, or null where it is no NCCL.
using MakeTransport =
    std::function<Status(const Seat&, int group_ranks, std::unique_ptr<Rendezvous>,
                         std::unique_ptr<Transport>*, NcclApi** api)>;

/// How a mode divides a problem among ranks.
/// @return kInvalidArgument for a mode that is none, and for "both" of fewer than four ranks or an odd number
Status divide(const std::string& mode, int ranks, Division* division);

/// Does all cases as one rank. One rank prints a line for each, and gets the report of all: of a fault no rows, but
/// what it made of it.
/// @return the exit code; of a fault never kRight
int run_rank(const ParallelOptions& options, const Seat& seat, const MakeTransport& make_transport,
             nlohmann::ordered_json* report);

/// Many small cases over `ranks` ranks that share pages: both dtypes, all exchanges, shares and slices, with
/// lengths around every cut, none, and shorter than there are ranks.
std::vector<ParallelCase> conformance_cases(int ranks, int page_size);

}  // namespace mla::bench
