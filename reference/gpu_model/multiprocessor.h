/// @file
/// What one OS thread needs to run blocks, one after the other: fibers for the GPU threads, shared
/// memory, and the scheduler that decides which GPU thread runs next.
#pragma once

#include <array>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "reference/gpu_model/async_copy.h"
#include "reference/gpu_model/bulk_copy.h"
#include "reference/gpu_model/cluster.h"
#include "reference/gpu_model/co_resident.h"
#include "reference/gpu_model/counters.h"
#include "reference/gpu_model/fiber.h"
#include "reference/gpu_model/mbarrier.h"
#include "reference/gpu_model/memory.h"
#include "reference/gpu_model/proxy.h"
#include "reference/gpu_model/race_detector.h"
#include "reference/gpu_model/recording.h"
#include "reference/gpu_model/simt.h"
#include "reference/gpu_model/wgmma.h"

namespace gpu_model::detail {

/// What the multiprocessors share while a grid runs.
struct Launch {
  Launch(dim3 grid_, dim3 block_, size_t shared_bytes_, const std::function<void()>& kernel_,
         const LaunchOptions& options_);

  const dim3 grid, block;
  const size_t shared_bytes;            ///< Dynamic shared memory per block.
  const std::function<void()>& kernel;  ///< What every thread runs.
  const LaunchOptions options;
  const uint64_t seed;           ///< Schedule::seed at the launch.
  CountedLaunch* const profile;  ///< Where it is counted; null: nowhere.
  const bool detect_races;       ///< Schedule::detect_races at the launch.
  Recording* const recording;    ///< Schedule::recording at the launch.

  /// Threads per block.
  unsigned threads() const { return block.x * block.y * block.z; }
  /// Whether the blocks of a turn run together.
  bool together() const { return options.cooperative || options.cluster > 1; }
  /// How many blocks run together: those of a turn.
  uint64_t blocks_together() const { return options.cooperative ? blocks() : options.cluster; }
  uint64_t turns() const { return blocks() / blocks_together(); }
  /// Blocks of the grid.
  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  /// The block that runs in this turn, 0 ... turns() - 1; if there are several, one of them.
  dim3 block_at(uint64_t turn, uint64_t number = 0) const;

  std::atomic<uint64_t> next_turn = 0;
  std::atomic<bool> stopped = false;  ///< Whether a block was rejected.
  /// Rejects the kernel for what the block of this turn did.
  void fail(uint64_t turn, std::string message);

  std::mutex mutex;
  std::string error;  ///< Empty if there is none; of several, that of the earliest turn.
  uint64_t error_turn = UINT64_MAX;
};

/// Of the priorities that are drawn, for warps and for blocks: above what those get that gave way.
constexpr uint64_t kLowest = uint64_t{1} << 32;

/// Splitmix64: good enough to draw schedules, and the same everywhere.
struct Random {
  uint64_t state = 0;
  uint64_t next();
};

/// The path of a file of this source tree without the tree's root.
std::string_view relative_path(std::string_view file);

/// What a GPU thread waits for; `what` is null while it waits for nothing.
struct Wait {
  const char* what = nullptr;  ///< The function,
  const char* file = nullptr;  ///< and the place of the call.
  int line = 0;
  unsigned mask = 0;  ///< The lanes that must meet, or 0 if no mask is given.
  int barrier = 0;    ///< The number of a named barrier, or 0,
  int threads = 0;    ///< and how many threads must meet there.
  int mbarrier = -1;  ///< An mbarrier's offset in shared memory, or -1,
  int parity = -1;    ///< and the parity that is waited for, or -1.

  static constexpr int kCluster = -1;  ///< As `barrier`: the cluster's.
};

/// "__syncwarp(mask 0x0000ffff) at stages/01_naive/kernel.cuh:41"
std::string describe(const Wait& wait);

/// A GPU thread.
struct Thread {
  explicit Thread(unsigned number_) : fiber(std::make_unique<Fiber>(number_)), number(number_) {}
  /// The same with a given stack.
  Thread(unsigned number_, std::byte* stack)
      : fiber(std::make_unique<Fiber>(number_, stack)), number(number_) {}

  std::unique_ptr<Fiber> fiber;
  unsigned number;        ///< In the block, 0 ... Launch::threads() - 1,
  uint3 index{};          ///< and as threadIdx.
  bool finished = false;  ///< Whether it has returned.
  Wait wait;              ///< What it waits for.
  bool waits_for_registers = false;
  int barrier = -1;        ///< The number of the barrier it waits at, or -1,
  bool predicate = false;  ///< and the predicate it brings there.
  uint64_t operand = 0;    ///< What it brings to a warp function,
  unsigned source = 0;     ///< the lane it reads from,
  uint64_t result = 0;     ///< and what it gets, from a warp function or a barrier.
  CopyQueue copies;
  StoreQueue stores;
  std::vector<uint32_t> written;  ///< Granules that it wrote by ordinary means and has not fenced.
  std::vector<FencedRegisters> registers;
  const unsigned* counter = nullptr;  ///< A counter in global memory that it waits for, or null,
  unsigned wanted = 0;                ///< and what that must reach; 0: to change.
  AcquiredValues acquired;
  bool cluster_arrived = false;  ///< Whether it has arrived at the cluster's barrier, not waited,
  uint64_t cluster_phase = 0;    ///< and in which phase.
};

/// The lanes of a warp, as bits, by what they do.
struct Warp {
  uint32_t exists = 0;
  uint32_t runnable = 0;
  uint32_t finished = 0;
  uint32_t collecting = 0;  ///< Lanes that wait in a warp function.
  uint64_t priority = 0;    ///< Of all warps with runnable lanes, that with the highest one runs.
  unsigned registers = 0;   ///< Per thread,
  unsigned wanted = 0;      ///< and how many it waits for; 0: none.
};

/// A block barrier: __syncthreads' or a named one.
struct Barrier {
  unsigned arrived = 0;             ///< How many threads have arrived since it was last complete.
  unsigned first = 0;               ///< The number of the thread that arrived first,
  Wait first_wait;                  ///< and where.
  std::vector<unsigned> passed;     ///< Threads that arrived without waiting,
  std::vector<Wait> passed_places;  ///< and where each of them did.
  Meeting meeting;                  ///< What all of these know, for the race detector.
};

/// While this lives no floating-point operation traps, as none does on a GPU, and the flag for
/// inexact results is up: a fiber that raises its own doubles what switching costs.
class KernelArithmetic {
 public:
  KernelArithmetic();
  ~KernelArithmetic();
  KernelArithmetic(const KernelArithmetic&) = delete;

 private:
  std::fenv_t environment_;
};

/// Runs blocks on one OS thread: one after the other, or, if it is one of a CoResidentBlocks, one
/// block while others run, too.
class Multiprocessor {
 public:
  Multiprocessor();
  ~Multiprocessor();

  /// The one of this OS thread; null if it runs no kernel.
  static Multiprocessor* current() { return current_; }
  /// The same, for GPU threads: an error outside a kernel.
  static Multiprocessor& here() {
    if (current_ == nullptr) called_outside();
    return *current_;
  }

  /// Runs blocks of the launch on this OS thread until none is left or one is rejected.
  void run(Launch& launch);

  // co_resident.cpp.
  /// Waits until the counter has been seen to be at least what is wanted.
  void wait_for_counter(const unsigned* counter, unsigned wanted, const Wait& wait);
  /// This thread loaded `value` from `address`. If it did before, it spins.
  void acquired(const unsigned* address, unsigned value, const Wait& wait);
  /// This thread has released something: others, in other blocks, too, may overtake it.
  void released();

  // cluster.cpp. What takes an address takes one of any block of the cluster.
  unsigned cluster_rank() const;
  const Cluster& cluster() const { return *cluster_; }
  unsigned cluster_size() const { return static_cast<unsigned>(cluster_->blocks.size()); }
  void cluster_arrive(bool release, const Wait& wait);
  void cluster_wait(const Wait& wait);
  /// Where the variable at `address` lies in the block of this rank.
  void* map_address(const void* address, unsigned rank, const Wait& wait);
  /// The block to which an address belongs, and its offset there, or an error.
  Multiprocessor& reach(const void* address, size_t bytes, size_t alignment, size_t& offset,
                        const Wait& wait);
  void arrive_in_cluster(const ptx::Mbarrier* barrier, uint64_t mark, int bytes, const Wait& wait);
  /// Checks and remembers what will be written; begin_cluster_load() lets it land.
  void check_cluster_load(BulkCopy copy, void* destination, const ptx::Mbarrier* barrier,
                          uint64_t mark, size_t alignment, const Wait& wait);
  void begin_cluster_load();
  void fence_proxy_async_cluster(const Wait& wait);

  // The rest is called by GPU threads.

  /// The GPU thread that runs.
  Thread& self() { return *running_; }
  Thread& thread(unsigned number) { return *threads_[number]; }
  bool runs_thread() const { return running_ != nullptr; }
  /// The race detector; null if this launch has none.
  RaceDetector* races() { return races_; }
  /// The counters; null if this launch has none.
  BlockCounters* counters() { return counters_; }
  /// Lets the other lanes of the warp run: this one is far ahead.
  void let_lanes_catch_up() { running_->fiber->suspend(); }
  /// Counts an instruction of this thread, which accesses shared memory or, with kNone, nothing.
  void count_access(const void* address, size_t bytes, AccessKind kind, const Wait& wait) {
    if (counters_ == nullptr) return;
    counters_->access(self().number, address, bytes, kind, wait.what, wait.file, wait.line);
  }
  /// Tells the race detector of an access by an instruction of this thread, which it does not see itself.
  void note_access(const void* address, size_t bytes, RaceDetector::Kind kind, const Wait& wait) {
    if (races_ == nullptr) return;
    races_->access(self().number, address, bytes, kind, {wait.what, wait.file, wait.line, nullptr});
  }
  /// Where the events of this block go; null if nowhere.
  Recording* recording() const { return recording_; }
  /// Its number there.
  unsigned recorded_block() const { return recorded_block_; }
  /// Tells the recording that this thread's warp is about to read or write 16 bytes at an address.
  void record_access(const void* address, bool writes) {
    if (recording_ == nullptr) return;
    const auto offset = static_cast<const std::byte*>(address) - shared_.data();
    recording_->access(*this, static_cast<size_t>(offset), sizeof(Granule), writes);
  }
  /// The same of a plain access, if it is one to this block's shared memory.
  void record_plain_access(const void* address, size_t bytes, bool reads, bool writes,
                           const void* code) {
    const auto offset =
        static_cast<size_t>(static_cast<const std::byte*>(address) - shared_.data());
    if (recording_ == nullptr || offset >= shared_.bytes()) return;
    recording_->plain_access(*this, code, offset, bytes, reads, writes);
  }
  /// Whether the phase before this one of the block's mbarrier number `index` is complete.
  bool phase_is_complete(size_t index, uint64_t phase) const {
    return index < mbarriers_.size() && mbarriers_[index].phase >= phase;
  }
  Slot slot_of(const MbarrierState& state) const {
    return races_->slot_of_mbarrier(static_cast<size_t>(&state - mbarriers_.data()));
  }
  /// The block's dynamic shared memory, or an error if it is smaller than `bytes`.
  std::byte* shared_memory(size_t bytes);

  /// Meets `expected` threads at barrier wait.barrier, 0 being __syncthreads'. Returns how many of
  /// them brought a true predicate.
  int meet(unsigned expected, bool predicate, Wait wait);
  /// Counts this thread at the named barrier wait.barrier, but does not wait.
  void arrive(Wait wait);

  /// Meets the lanes of wait.mask. Returns the combination of their operands, or without `combine`
  /// the operand of lane `source`. With `ordering` it orders memory, too. The last lane to come
  /// calls `operation`, if there is one.
  [[gnu::always_inline]] uint64_t collect(Wait wait, uint64_t operand, unsigned source,
                                          Combine combine, bool ordering,
                                          WarpOperation operation = nullptr);
  /// Meets all 32 lanes of a whole warp, for `operation`.
  [[gnu::always_inline]] void collect_warp(Wait wait, void* operands, WarpOperation operation);

  // proxy.cpp. Granules are numbered by their offset in shared memory.

  /// The mark of the granule at `address`, or an error if that is misaligned or if something
  /// asynchronous writes it. `does` is the verb of the message: " reads".
  GranuleMark& granule(const char* does, const void* address, const Wait& wait);
  /// The same, and an error, too, if something asynchronous reads the granule.
  GranuleMark& granule_to_write(const void* address, const Wait& wait);
  /// This thread has written a granule.
  void mark_written(size_t index, const char* file = nullptr, int line = 0);
  void fence_proxy_async(const Wait& wait);
  /// Makes the asynchronous view, if this block has none yet.
  void use_async_view();
  /// Rejects an asynchronous access to a granule that something else still writes, or that ordinary
  /// stores have written since the last fence.
  void check_async_access(size_t index, const char* does, const Wait& wait) {
    if (marks_[index].state != GranuleMark::State::kIdle ||
        !equal(generic_granules()[index], async_.granules[index])) {
      reject_async_access(index, does, wait);
    }
  }
  /// A bulk copy that `issuer` (1 + the rank of a thread's block in the cluster; 0: this block) has issued
  /// is to write the granules from `begin` to `end`.
  void mark_landing(size_t begin, size_t end, unsigned thread, uint8_t issuer, const Wait& wait);
  /// Rejects an asynchronous write to a granule that something asynchronous reads.
  void check_no_reader(size_t index, const Wait& wait);
  Granule* generic_granules() { return reinterpret_cast<Granule*>(shared_.data()); }
  /// The offset of an address in shared memory, or an error if it is misaligned or if `bytes` from
  /// there are not in shared memory.
  size_t shared_offset(const void* address, size_t bytes, size_t alignment, const char* does,
                       const Wait& wait);

  // mbarrier.cpp.
  uint64_t mbarrier_init(const ptx::Mbarrier* barrier, int count, const Wait& wait);
  void fence_mbarrier_init(const Wait& wait);
  MbarrierState& mbarrier(uint64_t state, const Wait& wait);
  /// Counts arrivals and completed bytes (negative: expected bytes) of the current phase.
  void mbarrier_update(MbarrierState& state, unsigned arrivals, int64_t bytes, const Wait& wait);
  void mbarrier_wait(uint64_t state, bool cluster, const Wait& wait);
  /// The mbarrier at an offset in shared memory, or null.
  MbarrierState* find_mbarrier(size_t offset);

  // bulk_copy.cpp.
  size_t check_load(BulkCopy copy, void* destination, uint64_t barrier_state, const Wait& wait);
  void begin_load();
  void store(BulkCopy copy, const void* source, const Wait& wait);
  void commit_stores(const Wait& wait);
  void wait_stores(size_t pending, const Wait& wait);

  // wgmma.cpp.
  void issue_product(void* const* lanes);
  void fence_registers(void* const* lanes);
  void commit_products(void* const* lanes);
  void wait_products(void* const* lanes);
  /// Checks that all warps of this thread's warpgroup execute the same instruction.
  void warpgroup_instruction(WarpgroupInstruction instruction);
  /// This thread's warp gives registers back, or asks for more: `count` per thread.
  void ask_for_registers(unsigned count, const Wait& wait);
  /// Waits until this thread's warp has the registers that it asked for.
  void wait_for_registers(const Wait& wait);

  /// As the functions of these names in ptx.h.
  bool issue_copy(const Copy& copy, int source_bytes, Wait wait);
  bool take_copy(size_t pending, Copy& copy);

  /// Runs another thread; returns when wake() was called for this one.
  void suspend(Wait wait);
  void wake(Thread& thread);
  /// Lets every other runnable thread run first.
  void yield();
  /// yield() at every 64th call: enough to end a wait that spins.
  void scheduling_point();
  /// Called after this thread let others go on without waiting itself. Yields now and then, because
  /// what it does next must not depend on its doing so first.
  void let_others_overtake();
  /// yield() by a thread that has done nothing else since it last ran.
  void spin();

  /// Rejects the kernel, from a GPU thread or not.
  template <typename Message>
  void reject(Message message) {
    if (running_ != nullptr) fail(message);
    if (error_.empty()) error_ = message();
  }
  /// Rejects the kernel with the text that message() returns. Nothing on this GPU thread's stack is
  /// destroyed, so the callers must own nothing; that is why the text is made in here.
  template <typename Message>
  [[noreturn]] void fail(Message message) {
    RaceDetector::active = nullptr;  // the text may be made by functions that kernels have, too
    counters_ = nullptr;
    rejected_ = running_;
    if (error_.empty()) error_ = message();
    self().fiber->leave();
  }
  /// The same, for a hardware fault.
  [[noreturn]] void fault(const void* address, const char* access);
  /// "block (0,0,0), thread (17,0,0)"
  std::string place(unsigned number) const;

 private:
  friend class CoResidentBlocks;

  [[noreturn]] static void called_outside();
  static void run_thread(void* thread);
  /// Gets what a block of the launch needs. Its threads' stacks lie at `stacks`, or are its own.
  void prepare(Launch& launch, std::byte* stacks = nullptr);
  /// Has a race detector if the launch has.
  void use_races(const Launch& launch);
  void release();
  bool run_block(uint64_t turn);
  void begin_block(dim3 index);
  bool end_block(uint64_t turn);
  /// Runs the block until it has ended or is rejected. If others run, too, only until none of its
  /// threads can run, or the adversary or a thread that spins lets the others run.
  void schedule();
  /// Whether others may use the block's shared memory.
  enum class Presence { kNotStarted, kRuns, kEnded };
  /// Makes accesses to shared memory fault, or lets them through: the block starts.
  void close();
  void open();
  std::string absence() const;
  std::string describe_peer_fault(const void* address, const char* access) const;
  MbarrierState& reach_mbarrier(Multiprocessor& block, size_t offset, uint64_t mark,
                                const Wait& wait);
  void complete_cluster_barrier();
  void leave_cluster(const Thread& thread);
  std::string cluster_phase() const;
  const BulkCopy* find_cluster_reader(size_t begin, size_t last) const;
  void land_value(const BulkCopy& load);
  void read_source(BulkCopy& copy);
  /// Tells the race detector what a load to `target` reads of global memory.
  void note_source(const BulkCopy& copy, const Multiprocessor& target, const MbarrierState& barrier,
                   const Wait& wait);
  bool can_run() const;
  /// Whether all threads that can run have given way.
  bool gave_way() const;
  bool wake_watchers();
  void block(Thread& thread, Wait wait);
  void draw_priorities();
  void complete(Barrier& barrier, int id);
  void complete(Warp& warp, unsigned mask, Combine combine, bool ordering, WarpOperation operation);
  void finish_thread();
  std::string phase(const Wait& wait) const;
  /// What lacks of what a thread waits for.
  std::string lacks(const Thread& thread) const;
  void reset_async();
  void check_async_end();
  void publish_stores();
  [[gnu::cold]] void reject_async_access(size_t index, const char* does, const Wait& wait);
  /// "thread (0,0,0) at stages/06_wgmma/kernel.cuh:41"
  std::string writer(const GranuleMark& mark) const;
  /// What still writes 16 bytes of shared memory, and why that is not over.
  std::string pending_write(const GranuleMark& mark) const;
  std::string reader(size_t index);
  /// Lands a bulk load, if any is under way.
  bool land_load();
  BulkCopy& add_load(BulkCopy copy);
  void land_loads_early();
  void land(size_t load);
  void probe(const BulkCopy& copy);
  void count_bulk_copy(const BulkCopy& copy, AccessKind kind);
  void write_global(BulkCopy& store);
  void read_store(BulkCopy& store);
  void compute_products(unsigned warp, uint64_t end);
  void compute_product(unsigned warp, WarpProduct& product);
  /// Calls function(granule) for all granules that a warp's rows of a product need: A's, then B's.
  template <typename Function>
  static void for_each_granule(const Product& product, unsigned warp, Function function);
  void check_registers(Thread& thread, const uint32_t* begin, size_t count, const char* name,
                       const Product& product);
  void record_registers(Thread& thread, const uint32_t* begin, size_t count);
  std::string deadlock() const;
  bool divergent() const;
  std::string block_name() const;
  std::string describe_waits() const;
  std::string describe(const Thread& thread) const;

  static thread_local constinit Multiprocessor* current_;

  Launch* launch_ = nullptr;
  dim3 block_index_;
  Random random_;
  std::vector<std::unique_ptr<Thread>> threads_;  // at least as many as the block has
  unsigned count_ = 0;                            // how many it has; 0 between blocks
  unsigned finished_ = 0;
  std::array<Warp, 32> warps_;
  unsigned warp_count_ = 0;
  std::array<Barrier, 16> barriers_;
  Thread* running_ = nullptr;
  Thread* rejected_ = nullptr;  // for gdb.py
  uint64_t yields_ = 0;
  unsigned scheduling_points_ = 0;
  uint64_t resumes_ = 0, spins_ = 0;      // how often a thread ran, and how often it only spun
  std::vector<Thread*> watchers_;         // threads that wait for a counter
  bool released_ = false;                 // whether another block may go on at once
  CoResidentBlocks* together_ = nullptr;  // those that it runs with, if any
  Cluster own_cluster_{.blocks = {this}};
  Cluster* cluster_ = &own_cluster_;
  Presence presence_ = Presence::kRuns;
  Multiprocessor* cluster_target_ = nullptr;  // of the load that a thread is about to begin
  GuardedMemory shared_;
  std::vector<GranuleMark> marks_;  // for every 16 bytes of shared_
  bool marks_used_ = false;         // by this block
  AsyncView async_;
  std::vector<MbarrierState> mbarriers_;
  // Under way, in the order of issue, of which there may be thousands: where they are kept does not move.
  std::vector<BulkCopy*> loads_;
  std::deque<BulkCopy> load_places_;
  std::vector<BulkCopy*> free_load_places_;
  BulkCopy landing_;              // the one that lands
  std::vector<BulkCopy> writes_;  // stores that have read shared memory, but not written
  unsigned free_registers_ = 0;   // of those that the block began with, in all threads
  std::array<WarpProducts, 32> products_;
  std::array<Warpgroup, 8> warpgroups_;
  // When what is asynchronous happens: drawn apart from the schedule, which it leaves alone.
  enum class Pace { kLate, kNowAndThen, kEarly };
  Pace pace_ = Pace::kLate;
  Random async_random_;
  std::string error_;
  std::unique_ptr<RaceDetector> detector_;
  RaceDetector* races_ = nullptr;  // the same, while a launch looks for races
  std::unique_ptr<BlockCounters> owned_counters_;
  BlockCounters* counters_ = nullptr;  // the same, until a thread is rejected
  Recording* recording_ = nullptr;
  unsigned recorded_block_ = 0;

 public:
  Multiprocessor* next_idle = nullptr;
  // All there are, for gdb.py.
  static Multiprocessor* first;
  Multiprocessor* next = nullptr;
};

}  // namespace gpu_model::detail
