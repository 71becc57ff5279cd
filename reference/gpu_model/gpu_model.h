/// @file
/// The GPU model, as its callers see it: the device it pretends to be, the schedule it draws, its
/// memory. Kernels see simt.h instead. reference/gpu_model/README.md says what is modelled, and
/// what is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace gpu_model {

/// The kernel did something that a GPU would not survive, or not always. The message says what, in
/// which block and thread, at which file and line.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The device the model pretends to be. Tests lower a limit to see a stage cope.
struct Device {
  int compute_capability = 90;            ///< 90 for 9.0.
  int multiprocessors = 132;              ///< What kernels are told; blocks run on the CPU's cores.
  size_t max_shared_bytes = 232448;       ///< Per block: 227 KiB, Hopper's limit.
  unsigned max_grid_x = 2147483647;       ///< Blocks.
  unsigned max_threads_per_block = 1024;  ///< At most 1024.
};
/// The device of all launches from now on; assign to change it.
Device& device();

/// Whether any kernel of this program is compiled for the race detector: with -fsanitize=thread, and linked
/// without.
bool kernels_are_instrumented();

struct Profile;
class Recording;  // recording.h

/// How launches are scheduled from now on.
struct Schedule {
  uint64_t seed = 0;   ///< Draws warp priorities, lane order and block order. 0: all in order.
  int os_threads = 0;  ///< How many cores blocks run on; 0: all.
  /// Whether every pair of accesses that nothing orders is an error (race_detector.h). Plain accesses
  /// are seen in kernels that are compiled for it; blocks then run on one core.
  bool detect_races = kernels_are_instrumented();
  /// Where to what all launches do is added (counters.h); null: nothing is counted. Plain accesses are seen in
  /// kernels that are compiled for the race detector. Memory that is allocated meanwhile is aligned to a
  /// page, because sectors depend on it.
  Profile* profile = nullptr;
  /// What happens in launches is written here, if anywhere; blocks then run on one core.
  Recording* recording = nullptr;
};
/// The schedule of all launches from now on; assign to change it.
Schedule& schedule();

/// What a launch promises its kernel.
struct LaunchOptions {
  bool cooperative = false;  ///< All blocks are resident at once, so they may wait for each other.
  /// Blocks per cluster, neighbours in x: 1, 2, 4 or 8; 16 is more than every Hopper GPU has room
  /// for.
  unsigned cluster = 1;
  /// A GPU may start the grid while the one before still runs: programmatic dependent launch. Here it runs
  /// when that one has ended, but to the race detector it knows nothing of what that one did before
  /// griddepcontrol_wait.
  bool dependent = false;
  const void* kernel = nullptr;  ///< The kernel's function, by which a profile names the launch.
};

/// How many blocks a multiprocessor of device() has room for at once.
struct Residency {
  unsigned by_threads, by_shared_memory;  ///< If nothing but these bounded it,
  unsigned by_registers;                  ///< nor this, if it is known; else 0.
  unsigned blocks;                        ///< By all that is known; at most 32.
};
/// `registers` per thread, as ptxas gives them; 0: not known. Shared memory is in bytes per block.
Residency residency(unsigned threads, size_t shared_bytes, unsigned registers = 0);

/// Why the grid cannot be resident all at once on device(), with the numbers; empty if it can.
std::string check_resident(uint64_t blocks, unsigned threads, size_t shared_bytes);

/// Memory that kernels may touch, filled with 0xff (NaN), between guard pages, so that an access
/// past either end is reported. Aligned to at least 16 bytes, with a profile to 4096. Null if there is not enough.
void* allocate(size_t bytes);
/// Frees what allocate() returned; null is fine.
void deallocate(void* pointer);

/// Bytes that allocate() can still give: the machine's memory less what is allocated.
size_t free_memory();

}  // namespace gpu_model
