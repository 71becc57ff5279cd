#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model {
namespace detail {
namespace {

constexpr size_t kSignalStackBytes = 64 * 1024;

/// Every stack takes two of the process's memory mappings, of which Linux allows 65530.
constexpr unsigned kMaxStacks = 16384;

struct sigaction previous_segv, previous_bus;

const char* access_kind([[maybe_unused]] const ucontext_t* context) {
#ifdef __x86_64__
  return (context->uc_mcontext.gregs[REG_ERR] & 2) != 0 ? "write" : "read";
#else
  return "access";
#endif
}

/// A fault of a GPU thread ends that thread's block; any other is none of the model's business.
void on_fault(int number, siginfo_t* info, void* context) {
  Multiprocessor* multiprocessor = Multiprocessor::current();
  if (multiprocessor != nullptr && multiprocessor->runs_thread() && info->si_code > 0) {
    auto* interrupted = static_cast<ucontext_t*>(context);
    // The handler never returns, so what it would restore is restored here.
    pthread_sigmask(SIG_SETMASK, &interrupted->uc_sigmask, nullptr);
    multiprocessor->fault(info->si_addr, access_kind(interrupted));
  }
  const struct sigaction& previous = number == SIGSEGV ? previous_segv : previous_bus;
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else {
    sigaction(number, &previous, nullptr);  // the access is repeated, and ends the process
  }
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
  });
}

/// A stack for the fault handler, while this lives: the GPU thread's own may be what overflowed.
class SignalStack {
 public:
  SignalStack() : memory_(new char[kSignalStackBytes]) {
    stack_t stack = {};
    stack.ss_sp = memory_.get();
    stack.ss_size = kSignalStackBytes;
    sigaltstack(&stack, &previous_);
  }
  ~SignalStack() { sigaltstack(&previous_, nullptr); }
  SignalStack(const SignalStack&) = delete;

 private:
  std::unique_ptr<char[]> memory_;
  stack_t previous_ = {};
};

// Multiprocessors are kept between launches, with their stacks, and never destroyed: a launch may
// outlive statics.
constinit std::mutex idle_mutex;
constinit Multiprocessor* idle = nullptr;

Multiprocessor& take_multiprocessor() {
  const std::scoped_lock lock(idle_mutex);
  if (idle == nullptr) return *new Multiprocessor;
  return *std::exchange(idle, idle->next_idle);
}

void run_on_this_thread(Launch& launch) {
  if (launch.together()) {
    const SignalStack stack;
    try {
      CoResidentBlocks(launch).run();
    } catch (const std::bad_alloc&) {
      launch.fail(0, "not enough memory for the stacks or the shared memory of all blocks");
    }
    return;
  }
  Multiprocessor& multiprocessor = take_multiprocessor();
  {
    const SignalStack stack;
    multiprocessor.run(launch);
  }
  const std::scoped_lock lock(idle_mutex);
  multiprocessor.next_idle = std::exchange(idle, &multiprocessor);
}

/// Cores this process may use; `taskset -c 0` makes them one.
int available_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 1;
  return CPU_COUNT(&cores);
}

void check(const Launch& launch) {
  const auto require = [](bool holds, const std::string& name, uint64_t value, uint64_t limit) {
    if (holds) return;
    throw KernelError("launch: " + name + " = " + std::to_string(value) + " must be 1 to " +
                      std::to_string(limit));
  };
  const auto dimension = [&](const char* name, uint64_t value, uint64_t limit) {
    require(value >= 1 && value <= limit, name, value, limit);
  };
  dimension("grid.x", launch.grid.x, device().max_grid_x);
  dimension("grid.y", launch.grid.y, 65535);
  dimension("grid.z", launch.grid.z, 65535);
  dimension("block.x", launch.block.x, 1024);
  dimension("block.y", launch.block.y, 1024);
  dimension("block.z", launch.block.z, 64);
  dimension("block.x * block.y * block.z", launch.threads(),
            std::min(device().max_threads_per_block, 1024u));
  if (launch.shared_bytes > device().max_shared_bytes) {
    throw KernelError("launch: shared_bytes = " + std::to_string(launch.shared_bytes) +
                      " must be at most " + std::to_string(device().max_shared_bytes) +
                      ", the shared memory of a block");
  }
  if (const unsigned cluster = launch.options.cluster; cluster != 1) {
    const bool known = cluster == 2 || cluster == 4 || cluster == 8 || cluster == 16;
    const std::string wrong = "launch: cluster = " + std::to_string(cluster);
    if (!known) throw KernelError(wrong + " must be 1, 2, 4, 8 or 16");
    if (device().compute_capability < 90) {
      throw KernelError(wrong + " needs compute capability 9.0");
    }
    if (launch.grid.x % cluster != 0) {
      throw KernelError(wrong + " does not divide grid.x = " + std::to_string(launch.grid.x));
    }
  }
  if (!launch.options.cooperative) return;
  const std::string why =
      gpu_model::check_resident(launch.blocks(), launch.threads(), launch.shared_bytes);
  if (!why.empty()) throw KernelError("launch: " + why);
}

/// Where the launch is counted; null if it is not.
CountedLaunch* begin_profile(const Launch& launch) {
  if (schedule().profile == nullptr) return nullptr;
  CountedLaunch& counted = schedule().profile->launches.emplace_back();
  counted.kernel = launch.options.kernel;
  const auto copy = [](unsigned(&to)[3], dim3 from) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
  };
  copy(counted.grid, launch.grid);
  copy(counted.block, launch.block);
  counted.shared_bytes = launch.shared_bytes;
  counted.cluster = launch.options.cluster;
  return &counted;
}

}  // namespace

Launch::Launch(dim3 grid_, dim3 block_, size_t shared_bytes_, const std::function<void()>& kernel_,
               const LaunchOptions& options_)
    : grid(grid_),
      block(block_),
      shared_bytes(shared_bytes_),
      kernel(kernel_),
      options(options_),
      seed(schedule().seed),
      profile(begin_profile(*this)),
      detect_races(schedule().detect_races),
      recording(schedule().recording) {}

dim3 Launch::block_at(uint64_t turn, uint64_t number) const {
  uint64_t index = turn;
  if (seed != 0) {
    // turn * stride + offset visits every turn once if the stride has no factor in common with
    // their number.
    Random random{seed};
    uint64_t stride = random.next() % turns() | 1;
    while (std::gcd(stride, turns()) != 1) stride += 2;
    __extension__ using Wide = unsigned __int128;
    index = static_cast<uint64_t>((Wide{turn} * stride + random.next()) % turns());
  }
  index = index * blocks_together() + number;
  return dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
              static_cast<unsigned>(index / grid.x / grid.y));
}

void Launch::fail(uint64_t turn, std::string message) {
  stopped = true;
  const std::scoped_lock lock(mutex);
  if (turn >= error_turn) return;
  error_turn = turn;
  error = std::move(message);
}

}  // namespace detail

Device& device() {
  static Device device;
  return device;
}

Schedule& schedule() {
  static Schedule schedule;
  return schedule;
}

Residency residency(unsigned threads, size_t shared_bytes, unsigned registers) {
  // A multiprocessor has 1 KiB more than a block may use, and reserves 1 KiB for each block.
  constexpr size_t kReserved = 1024;
  // Registers are given to warps, 256 at a time.
  constexpr unsigned kRegisters = 65536, kUnit = 256;
  const int capability = device().compute_capability;
  const unsigned max_threads = capability == 86 || capability == 89 ? 1536 : 2048;
  const unsigned warps = (threads + 31) / 32;
  Residency result = {};
  result.by_threads = max_threads / (warps * 32);
  result.by_shared_memory =
      static_cast<unsigned>((device().max_shared_bytes + kReserved) / (shared_bytes + kReserved));
  result.blocks = std::min({result.by_threads, result.by_shared_memory, 32u});
  if (registers > 0) {
    const unsigned per_warp = (registers * 32 + kUnit - 1) / kUnit * kUnit;
    // A quarter of the registers, and of the warps, belongs to each of the four schedulers.
    result.by_registers = kRegisters / 4 / per_warp * 4 / warps;
    result.blocks = std::min(result.blocks, result.by_registers);
  }
  return result;
}

std::string check_resident(uint64_t blocks, unsigned threads, size_t shared_bytes) {
  const Residency each = residency(threads, shared_bytes);
  const uint64_t most = uint64_t{each.blocks} * static_cast<uint64_t>(device().multiprocessors);
  if (blocks <= most) return {};
  return "the grid has " + std::to_string(blocks) + " blocks, but at most " + std::to_string(most) +
         " are resident at once: " + std::to_string(each.blocks) + " on each of " +
         std::to_string(device().multiprocessors) + " multiprocessors (" +
         std::to_string(each.by_threads) + " by their " + std::to_string(threads) + " threads, " +
         std::to_string(each.by_shared_memory) + " by their " + std::to_string(shared_bytes) +
         " bytes of shared memory)";
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            const LaunchOptions& options) {
  using namespace detail;
  if (Multiprocessor::current() != nullptr) throw KernelError("launch: called inside a kernel");
  Launch launch(grid, block, shared_bytes, kernel, options);
  check(launch);
  install_fault_handler();

  // The detector keeps no locks: with it one OS thread at a time runs blocks.
  static std::mutex detecting;
  std::unique_lock<std::mutex> lock;
  if (launch.detect_races) {
    lock = std::unique_lock(detecting);
    GridRaces::instance().begin_grid(launch.blocks(), options.dependent);
  }
  if (launch.recording != nullptr) launch.recording->begin_launch(launch);
  const bool one = launch.detect_races || launch.recording != nullptr;
  const int wanted = one                         ? 1
                     : schedule().os_threads > 0 ? schedule().os_threads
                                                 : available_cores();
  const uint64_t os_threads =
      std::min({static_cast<uint64_t>(wanted), launch.turns(),
                std::max<uint64_t>(1, kMaxStacks / (launch.threads() * launch.blocks_together()))});
  std::vector<std::thread> workers;
  try {
    workers.reserve(os_threads);
    for (uint64_t i = 1; i < os_threads; ++i) {
      workers.emplace_back([&] { run_on_this_thread(launch); });
    }
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  run_on_this_thread(launch);
  for (std::thread& worker : workers) worker.join();
  if (launch.recording != nullptr) launch.recording->end_launch(launch.error);
  if (!launch.error.empty()) throw KernelError(launch.error);
}

}  // namespace gpu_model
