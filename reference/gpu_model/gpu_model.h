/// @file
/// The GPU model, as its callers see it: a launch, the device it pretends to be, the schedule it
/// draws.
///
/// Kernels see simt.h instead. What is modelled, and what is not, stands in
/// reference/gpu_model/README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace gpu_model {

/// The kernel did something a GPU would not survive, or not always: the message says what, in which
/// block and thread, at which file and line.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The device the model pretends to be. Tests lower a limit to see a stage cope.
struct Device {
  int compute_capability = 90;
  int multiprocessors = 132;
  size_t max_shared_bytes = 232448;  ///< 227 KiB, a Hopper block's limit
  unsigned max_grid_x = 2147483647;
  unsigned max_threads_per_block = 1024;
};
/// The device of all launches from now on; assign to change it.
Device& device();

/// How launches are scheduled from now on.
struct Schedule {
  uint64_t seed = 0;   ///< Draws warp priorities, lane order, block order.
  int os_threads = 0;  ///< Blocks run on this many cores; 0: all.
};
/// The schedule of all launches from now on; assign to change it.
Schedule& schedule();

/// Memory that kernels may touch: filled with 0xff (NaN), ending at a guard page, so that an access
/// past either end is reported. 16-byte aligned at least. Null if there is none.
void* allocate(size_t bytes);
/// Frees what allocate() gave; null is fine.
void deallocate(void* pointer);

/// Bytes between kernels' allocations and the machine's memory, for reports.
size_t free_memory();

}  // namespace gpu_model
