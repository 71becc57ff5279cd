/// @file
/// What gpu_model::Profile counted, by kernel and by source line, as tables, as a listing and as JSON.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "reference/gpu_model/counters.h"
#include "reference/gpu_model/gpu_model.h"

namespace mla::bench {

/// What was counted at one line of a kernel, of one kind.
struct LineProfile {
  std::string file;  ///< "stages/01_naive/kernel.cuh"; empty: not known.
  int line = 0;
  std::string what;  ///< "load", "store", "atomic", or the model's function.
  gpu_model::AccessKind kind = gpu_model::AccessKind::kNone;
  /// The lines from which inlined functions were called, outermost last.
  std::vector<std::string> callers;
  gpu_model::Counts counts;
};

/// All launches of one kernel.
struct KernelProfile {
  std::string name;                     ///< "scores"; "launch 1" if it is not known.
  unsigned launches = 0;                ///< How many,
  uint64_t blocks = 0;                  ///< and their blocks in all.
  unsigned threads = 0;                 ///< Per block,
  size_t shared_bytes = 0;              ///< of the largest launch,
  unsigned cluster = 1;                 ///< blocks per cluster.
  unsigned registers = 0;               ///< Per thread, as ptxas gave them; 0: not known.
  gpu_model::Residency residency = {};  ///< Blocks that a multiprocessor has room for.
  std::vector<LineProfile> lines;       ///< By file and line.

  /// Sum over the lines of this kind.
  gpu_model::Counts of(gpu_model::AccessKind kind) const;
  /// How often warps executed each of the model's functions.
  std::map<std::string, uint64_t> executed() const;
  /// Of tensor cores.
  uint64_t flop() const;
};

/// Sorts what was counted by kernels and lines. Asks addr2line once. `registers` per thread, by kernel.
std::vector<KernelProfile> profile_kernels(const gpu_model::Profile& profile,
                                           const std::map<std::string, unsigned>& registers);

/// A table of each kernel.
std::string profile_table(const std::vector<KernelProfile>& kernels);

/// The lines of the kernels' files with the counts beside them: of a kernel.cuh all, of other files
/// those with counts. `root` is the folder of the sources.
std::string profile_listing(const std::vector<KernelProfile>& kernels, const std::string& root);

/// Everything.
nlohmann::ordered_json profile_json(const std::vector<KernelProfile>& kernels);

}  // namespace mla::bench
