/// @file
/// Small kernels with one race each, as textbooks and bug reports have them, and the same kernels without.
/// For whatever looks for races: the GPU model's detector, and compute-sanitizer on a GPU.
#pragma once

#include <string>
#include <vector>

#include "stages/common/machine/machine.h"

namespace mla {

/// A kernel in two forms.
struct RaceFault {
  const char* name;  ///< "read_after_write"
  const char* what;  ///< What is missing, or wrong.
  /// Enqueues the kernel: `right`, or with its fault. `in` holds kRaceFaultBytes of finite 16-bit numbers,
  /// `out` takes as many bytes, `counter` has two numbers that are 0.
  Status (*run)(bool right, const void* in, void* out, unsigned* counter);
};

inline constexpr size_t kRaceFaultBytes = 64 * 1024;

/// All of them on a machine.
std::vector<RaceFault> race_faults(MachineKind machine);

/// Runs one on `machine` and waits for its end.
/// @return What launch() or the machine report; from the model kKernelRejected.
Status run_race_fault(Machine& machine, const RaceFault& fault, bool right);

}  // namespace mla
