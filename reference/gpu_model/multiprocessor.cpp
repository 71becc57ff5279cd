#include "reference/gpu_model/multiprocessor.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>

thread_local constinit uint3 threadIdx{};
thread_local constinit uint3 blockIdx{};
thread_local constinit dim3 blockDim;
thread_local constinit dim3 gridDim;

namespace gpu_model::detail {
namespace {

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

/// Of a multiprocessor.
constexpr unsigned kRegisters = 65536;

/// Literals are mostly the same object; two translation units may have two.
inline bool same(const char* a, const char* b) {
  return a == b || std::strcmp(a, b) == 0;
}

/// FLOP of what a warp does together.
uint64_t flop_of(WarpOperation operation) {
  const bool multiplies = operation == multiply_bfloat16 || operation == multiply_float16;
  return multiplies ? 2 * 16 * 8 * 16 : 0;
}

inline bool same(const Wait& a, const Wait& b) {
  return a.line == b.line && a.mask == b.mask && a.barrier == b.barrier && a.threads == b.threads &&
         a.mbarrier == b.mbarrier && a.parity == b.parity && same(a.what, b.what) &&
         same(a.file, b.file);
}

}  // namespace

std::string describe(const Wait& wait) {
  char argument[64] = "";
  if (wait.mask != 0) std::snprintf(argument, sizeof argument, "(mask 0x%08x)", wait.mask);
  if (wait.barrier > 0) {
    std::snprintf(argument, sizeof argument, "(%d, %d)", wait.barrier, wait.threads);
  }
  if (wait.mbarrier >= 0 && wait.parity < 0) {
    std::snprintf(argument, sizeof argument, "(barrier at byte %d)", wait.mbarrier);
  } else if (wait.mbarrier >= 0) {
    std::snprintf(argument, sizeof argument, "(barrier at byte %d, parity %d)", wait.mbarrier,
                  wait.parity);
  }
  return std::string(wait.what) + argument + " at " + std::string(relative_path(wait.file)) + ":" +
         std::to_string(wait.line);
}

std::string_view relative_path(std::string_view file) {
  static constexpr std::string_view kThisFile = "reference/gpu_model/multiprocessor.cpp";
  std::string_view root = __FILE__;
  root.remove_suffix(std::min(root.size(), kThisFile.size()));
  if (file.starts_with(root)) file.remove_prefix(root.size());
  return file;
}

thread_local constinit Multiprocessor* Multiprocessor::current_ = nullptr;
Multiprocessor* Multiprocessor::first = nullptr;

uint64_t Random::next() {
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

namespace {
constinit std::mutex all_mutex;  // for Multiprocessor::first and the chain from there
}

Multiprocessor::Multiprocessor() {
  const std::scoped_lock lock(all_mutex);
  next = first;
  first = this;
}

Multiprocessor::~Multiprocessor() {
  const std::scoped_lock lock(all_mutex);
  Multiprocessor** link = &first;
  while (*link != this) link = &(*link)->next;
  *link = next;
}

KernelArithmetic::KernelArithmetic() {
  std::feholdexcept(&environment_);
  volatile float inexact = 1;
  inexact = inexact / 3;
}

KernelArithmetic::~KernelArithmetic() {
  std::fesetenv(&environment_);
}

void Multiprocessor::prepare(Launch& launch, std::byte* stacks) {
  launch_ = &launch;
  while (threads_.size() < launch.threads()) {
    const auto number = static_cast<unsigned>(threads_.size());
    threads_.push_back(stacks == nullptr
                           ? std::make_unique<Thread>(number)
                           : std::make_unique<Thread>(number, stacks + number * Fiber::kMapBytes));
  }
  // Odd seeds put shared memory at the front guard zone, so that both ends are exact under some
  // seed.
  const auto place =
      launch.seed % 2 == 0 ? GuardedMemory::Place::kAtEnd : GuardedMemory::Place::kAtStart;
  shared_ = GuardedMemory(launch.shared_bytes, place);
  if (!shared_.valid()) throw std::bad_alloc();
  marks_.assign(launch.shared_bytes / sizeof(Granule), {});
  async_.granules.clear();
  if (launch.profile != nullptr) owned_counters_ = std::make_unique<BlockCounters>();
  counters_ = owned_counters_.get();
}

void Multiprocessor::use_races(const Launch& launch) {
  if (!launch.detect_races) return;
  if (detector_ == nullptr) detector_ = std::make_unique<RaceDetector>(*this);
  races_ = detector_.get();
}

void Multiprocessor::release() {
  if (owned_counters_ != nullptr) {
    const std::scoped_lock lock(launch_->mutex);
    owned_counters_->add_to(launch_->profile->instructions);
    owned_counters_.reset();
    counters_ = nullptr;
  }
  shared_ = GuardedMemory();
}

void Multiprocessor::run(Launch& launch) {
  current_ = this;
  use_races(launch);
  gridDim = launch.grid;
  blockDim = launch.block;
  const KernelArithmetic arithmetic;
  try {
    prepare(launch);
    while (!launch.stopped) {
      const uint64_t turn = launch.next_turn++;
      if (turn >= launch.blocks() || !run_block(turn)) break;
    }
  } catch (const std::bad_alloc&) {
    launch.fail(0, "not enough memory for the stacks or the shared memory of a block");
  }
  RaceDetector::active = races_ = nullptr;
  release();
  current_ = nullptr;
}

bool Multiprocessor::run_block(uint64_t turn) {
  begin_block(launch_->block_at(turn));
  blockIdx = {block_index_.x, block_index_.y, block_index_.z};
  schedule();
  return end_block(turn);
}

void Multiprocessor::begin_block(dim3 index) {
  block_index_ = index;
  // Drawn from the block's index, not from its turn or its OS thread: the same seed gives the same
  // schedule.
  const uint64_t block_number =
      index.x + launch_->grid.x * (index.y + uint64_t{launch_->grid.y} * index.z);
  random_.state = launch_->seed * 0x9e3779b97f4a7c15 + block_number;
  shared_.poison();

  count_ = launch_->threads();
  warp_count_ = (count_ + warpSize - 1) / warpSize;
  finished_ = 0;
  rejected_ = nullptr;
  yields_ = 0;
  scheduling_points_ = 0;
  watchers_.clear();
  released_ = false;
  barriers_.fill({});
  reset_async();
  // What ptxas gives the threads of a block that has the multiprocessor to itself.
  const unsigned registers = std::min(256u, kRegisters / (warp_count_ * warpSize) / 8 * 8);
  free_registers_ = 0;
  for (unsigned w = 0; w < warp_count_; ++w) {
    const unsigned lanes = std::min(count_ - w * warpSize, unsigned{warpSize});
    const uint32_t all = lanes == 32 ? 0xffffffff : (1u << lanes) - 1;
    warps_[w] = {.exists = all, .runnable = all, .registers = registers};
  }
  const dim3 block = launch_->block;
  if (races_ != nullptr) {
    races_->begin_block(GridRaces::instance().first_block() + static_cast<uint32_t>(block_number),
                        count_, shared_.data(), shared_.bytes());
  }
  RaceDetector::active = races_;
  if (counters_ != nullptr) counters_->begin_block(shared_.data(), shared_.bytes(), count_);
  for (unsigned number = 0; number < count_; ++number) {
    Thread& thread = *threads_[number];
    thread.index = {number % block.x, number / block.x % block.y, number / block.x / block.y};
    thread.finished = false;
    thread.wait = {};
    thread.waits_for_registers = false;
    thread.barrier = -1;
    thread.counter = nullptr;
    thread.acquired = {};
    thread.cluster_arrived = false;
    thread.fiber->prepare(run_thread, &thread);
  }
  if (cluster_ == &own_cluster_) own_cluster_.begin(count_);
  recording_ = launch_->recording;
  if (recording_ != nullptr && !recording_->wants(*launch_, block_number)) recording_ = nullptr;
  if (recording_ != nullptr) {
    recorded_block_ = recording_->begin(index.x, index.y, index.z, count_);
  }
  draw_priorities();
}

bool Multiprocessor::end_block(uint64_t turn) {
  if (error_.empty() && !launch_->stopped) check_async_end();
  if (races_ != nullptr && error_.empty() && !launch_->stopped) error_ = races_->check_end();
  if (recording_ != nullptr && error_.empty() && !launch_->stopped) recording_->end(*this);

  if (const ptrdiff_t offset = shared_.damage(); offset != 0 && error_.empty()) {
    error_ = "out-of-bounds shared memory write: at byte " + std::to_string(offset) + " of " +
             std::to_string(shared_.bytes()) + ", block " +
             triple(block_index_.x, block_index_.y, block_index_.z);
  }
  const bool rejected = !error_.empty();
  if (counters_ != nullptr) counters_->end_block();
  if (rejected) launch_->fail(turn, std::exchange(error_, {}));
  for (unsigned number = 0; number < count_; ++number) {
    Thread& thread = *threads_[number];
    thread.copies.clear();
    if (!thread.finished || rejected) thread.fiber->discard();
  }
  count_ = 0;
  return !rejected;
}

void Multiprocessor::draw_priorities() {
  for (unsigned w = 0; w < warp_count_; ++w) {
    // Seed 0 runs warps in order.
    warps_[w].priority = launch_->seed == 0 ? kLowest + 32 - w : kLowest + random_.next() % kLowest;
  }
}

void Multiprocessor::schedule() {
  while (finished_ < count_) {
    if (!loads_.empty()) {
      land_loads_early();
      if (!error_.empty()) return;
    }
    Warp* best = nullptr;
    for (unsigned w = 0; w < warp_count_; ++w) {
      if (warps_[w].runnable != 0 && (best == nullptr || warps_[w].priority > best->priority)) {
        best = &warps_[w];
      }
    }
    if (best == nullptr) {
      if (together_ != nullptr) return;  // who decides what ends the wait
      if (!wake_watchers() && !land_load()) error_ = deadlock();
      if (!error_.empty()) return;
      continue;
    }
    const bool gave_way = best->priority < kLowest;
    if (gave_way && !watchers_.empty()) wake_watchers();
    if (gave_way && !loads_.empty() && async_random_.next() % 4 == 0) {
      land_load();  // only who gave way is left: it may be spinning until the load has landed
      if (!error_.empty()) return;
      continue;
    }
    // One pass over the lanes. Their numbers xor a random number: of any two, either goes first
    // equally often.
    const unsigned first_number = static_cast<unsigned>(best - warps_.data()) * warpSize;
    const unsigned mix = launch_->seed == 0 ? 0 : random_.next() % warpSize;
    if (recording_ != nullptr) recording_->begin_pass(*this, first_number / warpSize);
    for (unsigned i = 0; i < warpSize; ++i) {
      const unsigned lane = i ^ mix;
      if ((best->runnable >> lane & 1) == 0) continue;
      running_ = threads_[first_number + lane].get();
      threadIdx = running_->index;
      ++resumes_;
      running_->fiber->resume();
      running_ = nullptr;
      if (!error_.empty() || launch_->stopped) return;
    }
    if (async_.fenced) publish_stores();
    if (!error_.empty()) return;
    if (together_ != nullptr && (gave_way || released_ || together_->interrupts())) return;
  }
}

void Multiprocessor::run_thread(void* argument) {
  auto& thread = *static_cast<Thread*>(argument);
  Multiprocessor* self = current();
  std::string error;
  try {
    self->launch_->kernel();
  } catch (const std::exception& exception) {
    error = exception.what();
    if (error.empty()) error = "one without a text";
  } catch (...) {
    error = "one that is no std::exception";
  }
  if (!error.empty()) {
    self->fail([&] {
      return "the kernel threw an exception: " + std::exchange(error, {}) + ", " +
             self->place(self->self().number);
    });
  }
  self->finish_thread();
  thread.fiber->leave();
}

void Multiprocessor::finish_thread() {
  Thread& thread = self();
  Warp& warp = warps_[thread.number / warpSize];
  const uint32_t bit = 1u << thread.number % warpSize;
  thread.finished = true;
  ++finished_;
  warp.finished |= bit;
  warp.runnable &= ~bit;
  if (recording_ != nullptr) recording_->returned(*this);
  leave_cluster(thread);
  for (uint32_t lanes = warp.collecting; lanes != 0; lanes &= lanes - 1) {
    const unsigned lane = static_cast<unsigned>(std::countr_zero(lanes));
    const Thread& other = *threads_[thread.number / warpSize * warpSize + lane];
    if ((other.wait.mask & bit) == 0) continue;
    thread.finished = false;  // its stack is still in use
    fail([&] { return place(self().number) + " has returned while " + describe(other); });
  }
}

inline void Multiprocessor::block(Thread& thread, Wait wait) {
  thread.wait = wait;
  warps_[thread.number / warpSize].runnable &= ~(1u << thread.number % warpSize);
}

void Multiprocessor::suspend(Wait wait) {
  block(self(), wait);
  self().fiber->suspend();
}

void Multiprocessor::wake(Thread& thread) {
  thread.wait = {};
  thread.barrier = -1;
  warps_[thread.number / warpSize].runnable |= 1u << thread.number % warpSize;
}

void Multiprocessor::yield() {
  Thread& thread = self();
  warps_[thread.number / warpSize].priority = kLowest - ++yields_;
  thread.fiber->suspend();
}

void Multiprocessor::spin() {
  ++spins_;
  yield();
}

void Multiprocessor::scheduling_point() {
  if (++scheduling_points_ % 64 == 0) yield();
}

inline int Multiprocessor::meet(unsigned expected, bool predicate, Wait wait) {
  Thread& thread = self();
  block(thread, wait);
  Barrier& barrier = barriers_[static_cast<size_t>(wait.barrier)];
  if (barrier.arrived == 0) {
    barrier.first = thread.number;
    barrier.first_wait = wait;
  }
  // A named barrier's threads may come from different lines.
  const Wait& others = barrier.first_wait;
  if (wait.barrier == 0 ? !same(others, wait) : others.threads != wait.threads) {
    fail([&] {
      const uint3 first_index = threads_[barrier.first]->index;
      return "divergent barrier: " + place(thread.number) + " is in " + detail::describe(wait) +
             " while thread " + triple(first_index.x, first_index.y, first_index.z) +
             (barrier.passed.empty() || barrier.passed.front() != barrier.first ? " waits in "
                                                                                : " has passed ") +
             detail::describe(others);
    });
  }
  ++barrier.arrived;
  thread.barrier = wait.barrier;
  thread.predicate = predicate;
  if (races_ != nullptr) races_->come(barrier.meeting, thread.number);
  count_access(nullptr, 0, AccessKind::kNone, wait);
  if (recording_ != nullptr) recording_->meet(*this, wait, expected, true, barrier.arrived);
  if (barrier.arrived == expected) complete(barrier, wait.barrier);
  thread.fiber->suspend();
  return static_cast<int>(thread.result);
}

void Multiprocessor::arrive(Wait wait) {
  Thread& thread = self();
  const auto id = static_cast<size_t>(wait.barrier);
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.first = thread.number;
    barrier.first_wait = wait;
  }
  const auto reject_arrival = [&](const char* why, const Wait& other) {
    fail([&] {
      return "divergent barrier: " + place(thread.number) + " is in " + detail::describe(wait) +
             why + detail::describe(other);
    });
  };
  if (barrier.first_wait.threads != wait.threads) {
    reject_arrival(" while another thread is in ", barrier.first_wait);
  }
  for (size_t i = 0; i < barrier.passed.size(); ++i) {
    if (barrier.passed[i] == thread.number) {
      reject_arrival(", but the barrier has not completed since the same thread passed ",
                     barrier.passed_places[i]);
    }
  }
  barrier.passed.push_back(thread.number);
  barrier.passed_places.push_back(wait);
  ++barrier.arrived;
  if (races_ != nullptr) races_->come(barrier.meeting, thread.number);
  count_access(nullptr, 0, AccessKind::kNone, wait);
  const auto expected = static_cast<unsigned>(wait.threads);
  if (recording_ != nullptr) recording_->meet(*this, wait, expected, false, barrier.arrived);
  if (barrier.arrived == expected) complete(barrier, wait.barrier);
  if (barrier.arrived == 0) let_others_overtake();
}

void Multiprocessor::let_others_overtake() {
  if (launch_->seed != 0 && async_random_.next() % 2 == 0) yield();
}

void Multiprocessor::complete(Barrier& barrier, int id) {
  for (size_t i = 0; i < barrier.passed.size(); ++i) {
    // Hardware counts warps, so all lanes of one must have come, and from one line.
    const unsigned warp = barrier.passed[i] / warpSize;
    uint32_t lanes = 0;
    for (size_t j = 0; j < barrier.passed.size(); ++j) {
      if (barrier.passed[j] / warpSize == warp &&
          same(barrier.passed_places[i], barrier.passed_places[j])) {
        lanes |= 1u << barrier.passed[j] % warpSize;
      }
    }
    if (lanes != warps_[warp].exists) {
      fail([&] {
        return "divergent barrier: lanes of one warp disagree: " + place(barrier.passed[i]) +
               " is in " + detail::describe(barrier.passed_places[i]) +
               ", but not every other lane of its warp is";
      });
    }
  }
  for (unsigned number = 0; number < count_ && id != 0; ++number) {
    const Thread& thread = *threads_[number];
    const Thread& lane_0 = *threads_[number / warpSize * warpSize];
    if ((thread.barrier == id || lane_0.barrier == id) && !same(thread.wait, lane_0.wait)) {
      fail([&] {
        return "divergent barrier: lanes of one warp disagree: " + describe(thread) + " while " +
               describe(lane_0);
      });
    }
  }
  std::vector<Thread*> met;
  uint64_t holds = 0;
  for (unsigned number = 0; number < count_; ++number) {
    Thread& thread = *threads_[number];
    if (thread.barrier != id) continue;
    met.push_back(&thread);
    holds += thread.predicate;
  }
  if (races_ != nullptr) {
    const auto all = RaceDetector::part(barrier.meeting);
    for (const Thread* thread : met) races_->know(thread->number, all);
  }
  if (recording_ != nullptr) recording_->met(*this, id, met.size());
  for (Thread* thread : met) {
    thread->result = holds;
    wake(*thread);
    if (counters_ != nullptr && thread->number % warpSize == 0) {
      counters_->meet(thread->number / warpSize);
    }
  }
  barrier.arrived = 0;
  barrier.passed.clear();
  barrier.passed_places.clear();
  draw_priorities();
}

inline uint64_t Multiprocessor::collect(Wait wait, uint64_t operand, unsigned source,
                                        Combine combine, bool ordering, WarpOperation operation) {
  Thread& thread = self();
  block(thread, wait);
  Warp& warp = warps_[thread.number / warpSize];
  const uint32_t bit = 1u << thread.number % warpSize;
  if ((wait.mask & bit) == 0) {
    fail([&] {
      return place(thread.number) + " calls " + detail::describe(thread.wait) +
             " but is not in the mask";
    });
  }
  if (const uint32_t gone = wait.mask & warp.finished; gone != 0) {
    fail([&] {
      const unsigned first_lane = thread.number / warpSize * warpSize;
      const uint3 other =
          threads_[first_lane + static_cast<unsigned>(std::countr_zero(gone))]->index;
      return place(thread.number) + " calls " + detail::describe(thread.wait) + ", but thread " +
             triple(other.x, other.y, other.z) + " of the mask has returned";
    });
  }
  thread.operand = operand;
  thread.source = source;
  warp.collecting |= bit;
  if (recording_ != nullptr) recording_->come(*this, wait);
  const uint32_t mask = wait.mask & warp.exists;
  if ((mask & ~warp.collecting) == 0) complete(warp, mask, combine, ordering, operation);
  thread.fiber->suspend();
  return thread.result;
}

inline void Multiprocessor::collect_warp(Wait wait, void* operands, WarpOperation operation) {
  if (warps_[self().number / warpSize].exists != wait.mask) {
    fail([&] {
      return place(self().number) + " calls " + detail::describe(wait) +
             " in a warp of fewer than 32 threads";
    });
  }
  collect(wait, reinterpret_cast<uintptr_t>(operands), self().number % warpSize, nullptr, false,
          operation);
}

void Multiprocessor::complete(Warp& warp, unsigned mask, Combine combine, bool ordering,
                              WarpOperation operation) {
  const auto thread_of = [&](unsigned lane) -> Thread& {
    return *threads_[static_cast<unsigned>(&warp - warps_.data()) * warpSize + lane];
  };
  const auto for_each_lane = [&](auto&& function) {
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      function(thread_of(static_cast<unsigned>(std::countr_zero(lanes))));
    }
  };
  Thread& leader = thread_of(static_cast<unsigned>(std::countr_zero(mask)));
  bool first_operand = true;
  uint64_t combined = 0;
  for_each_lane([&](Thread& thread) {
    if (!same(thread.wait, leader.wait)) {
      fail([&] {
        return "lanes of one warp disagree: " + describe(thread) + " while " + describe(leader);
      });
    }
    if (combine != nullptr) {
      combined = first_operand ? thread.operand : combine(combined, thread.operand);
      first_operand = false;
    } else if (!ordering && (mask >> thread.source & 1) == 0) {
      fail([&] {
        return describe(thread) + " and reads from lane " + std::to_string(thread.source) +
               ", which is not in the mask";
      });
    }
  });
  if (counters_ != nullptr) {
    counters_->warp_executes(leader.wait.what, leader.wait.file, leader.wait.line,
                             static_cast<unsigned>(std::popcount(mask)), flop_of(operation));
    counters_->meet(leader.number / warpSize);
  }
  if (operation != nullptr) {
    void* operands[warpSize] = {};
    for_each_lane([&](Thread& thread) {
      operands[thread.number % warpSize] =
          reinterpret_cast<void*>(static_cast<uintptr_t>(thread.operand));
    });
    operation(operands);
  }
  if (ordering && races_ != nullptr) {
    Meeting meeting;
    for_each_lane([&](Thread& thread) { races_->come(meeting, thread.number); });
    const auto all = RaceDetector::part(meeting);
    for_each_lane([&](Thread& thread) { races_->know(thread.number, all); });
  }
  if (recording_ != nullptr) recording_->ran(*this, mask, leader.wait);
  for_each_lane([&](Thread& thread) {
    thread.result = combine != nullptr ? combined : thread_of(thread.source).operand;
    wake(thread);
  });
  warp.collecting &= ~mask;
}

std::byte* Multiprocessor::shared_memory(size_t bytes) {
  if (bytes > shared_.bytes()) {
    fail([&] {
      return "the kernel uses " + std::to_string(bytes) +
             " bytes of dynamic shared memory, but the launch asked for " +
             std::to_string(shared_.bytes()) + ", " + place(self().number);
    });
  }
  return shared_.data();
}

void Multiprocessor::fault(const void* address, const char* access) {
  fail([&] {
    std::string text;
    if (self().fiber->overflows(address)) {
      text = "stack overflow: more than " + std::to_string(Fiber::kStackBytes) +
             " bytes in one GPU thread";
    } else if (shared_.contains(address)) {
      text =
          std::string("out-of-bounds shared memory ") + access + ": " + shared_.describe(address);
    } else if (text = describe_peer_fault(address, access); !text.empty()) {
    } else if (text = describe_global(address, access); text.empty()) {
      char buffer[64];
      std::snprintf(buffer, sizeof buffer, "invalid memory %s: address %p", access, address);
      text = buffer;
    }
    return text + ", " + place(self().number);
  });
}

std::string Multiprocessor::place(unsigned number) const {
  const uint3 thread = threads_[number]->index;
  return "block " + triple(block_index_.x, block_index_.y, block_index_.z) + ", thread " +
         triple(thread.x, thread.y, thread.z);
}

std::string Multiprocessor::describe(const Thread& thread) const {
  const std::string name = "thread " + triple(thread.index.x, thread.index.y, thread.index.z);
  if (thread.wait.what == nullptr) return name + (thread.finished ? " has returned" : " runs");
  return name + " waits in " + detail::describe(thread.wait) + lacks(thread);
}

bool Multiprocessor::divergent() const {
  return finished_ > 0 && barriers_[0].arrived + finished_ == count_;
}

std::string Multiprocessor::block_name() const {
  return triple(block_index_.x, block_index_.y, block_index_.z);
}

std::string Multiprocessor::deadlock() const {
  return (divergent() ? "divergent barrier: block " : "deadlock: block ") + block_name() + ": " +
         describe_waits() +
         (watchers_.empty() ? "" : "; only a cooperative launch promises that other blocks run");
}

std::string Multiprocessor::describe_waits() const {
  std::string text;
  for (unsigned begin = 0, end; begin < count_; begin = end) {
    const Thread& thread = *threads_[begin];
    const auto alike = [&](const Thread& other) {
      if (thread.finished || other.finished) return thread.finished == other.finished;
      if (thread.wait.what == nullptr) return other.wait.what == nullptr;
      return other.wait.what != nullptr && same(thread.wait, other.wait) &&
             thread.counter == other.counter && thread.wanted == other.wanted;
    };
    for (end = begin + 1; end < count_ && alike(*threads_[end]);) ++end;
    const bool one = end == begin + 1;
    text += begin == 0 ? "" : "; ";
    text += one ? "thread " + std::to_string(begin)
                : "threads " + std::to_string(begin) + "-" + std::to_string(end - 1);
    if (thread.finished) {
      text += one ? " has returned" : " have returned";
    } else if (thread.wait.what == nullptr) {
      text += one ? " runs" : " run";
    } else {
      text += (one ? " waits in " : " wait in ") + detail::describe(thread.wait) + lacks(thread);
    }
  }
  for (const Barrier& barrier : barriers_) {
    if (barrier.passed.empty()) continue;
    text += "; " + std::to_string(barrier.passed.size()) + " threads, the first of them thread " +
            std::to_string(barrier.passed.front()) + ", have passed " +
            detail::describe(barrier.passed_places.front());
  }
  return text;
}

void Multiprocessor::called_outside() {
  throw KernelError("a function for kernels was called outside a kernel");
}

// What simt.h and ptx.h call.

int block_barrier(const char* what, bool predicate, const char* file, int line) {
  return Multiprocessor::here().meet(blockDim.x * blockDim.y * blockDim.z, predicate,
                                     {what, file, line});
}

namespace {
Wait check_named_barrier(const char* what, int id, int threads, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const auto require = [&](bool holds, const char* requirement) {
    if (holds) return;
    multiprocessor.fail([&] {
      return std::string(what) + "(" + std::to_string(id) + ", " + std::to_string(threads) +
             ") at " + std::string(relative_path(file)) + ":" + std::to_string(line) + ": " +
             requirement + ", " + multiprocessor.place(multiprocessor.self().number);
    });
  };
  require(id >= 1 && id <= 15, "the barrier's number must be 1 to 15");
  require(threads > 0 && threads % warpSize == 0,
          "the number of threads must be a positive multiple of 32");
  return {what, file, line, 0, id, threads};
}
}  // namespace

int named_barrier(int id, int threads, bool predicate, const char* file, int line) {
  const Wait wait = check_named_barrier("barrier_sync", id, threads, file, line);
  return Multiprocessor::here().meet(static_cast<unsigned>(threads), predicate, wait);
}

void named_barrier_arrive(int id, int threads, const char* file, int line) {
  const Wait wait = check_named_barrier("barrier_arrive", id, threads, file, line);
  Multiprocessor::here().arrive(wait);
}

void warp_barrier(unsigned mask, const char* file, int line) {
  Multiprocessor::here().collect({"__syncwarp", file, line, mask}, 0, lane(), nullptr, true);
}

uint64_t warp_shuffle(const char* what, unsigned mask, uint64_t operand, unsigned source,
                      const char* file, int line) {
  return Multiprocessor::here().collect({what, file, line, mask}, operand, source, nullptr, false);
}

uint64_t warp_reduce(const char* what, unsigned mask, uint64_t operand, Combine combine,
                     const char* file, int line) {
  return Multiprocessor::here().collect({what, file, line, mask}, operand, lane(), combine, false);
}

void warp_operation(const char* what, void* operands, WarpOperation operation, const char* file,
                    int line) {
  Multiprocessor::here().collect_warp({what, file, line, 0xffffffff}, operands, operation);
}

unsigned lane() {
  return Multiprocessor::here().self().number % warpSize;
}

void scheduling_point() {
  Multiprocessor::here().scheduling_point();
}

void yield(const char* what, const char* file, int line) {
  Thread& thread = Multiprocessor::here().self();
  thread.wait = {what, file, line};  // for the report of a deadlock
  Multiprocessor::here().spin();
  thread.wait = {};
}

void thread_fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (RaceDetector* races = multiprocessor.races(); races != nullptr) {
    races->fence(multiprocessor.self().number);
  }
}

void executed(const char* what, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (Recording* recording = multiprocessor.recording(); recording != nullptr) {
    recording->run(multiprocessor, {what, file, line});
  }
}

bool wants_regions() {
  const Recording* recording = Multiprocessor::here().recording();
  return recording != nullptr && recording->wants_regions();
}

void name_regions(const char* names, std::initializer_list<NamedRegion> regions) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  multiprocessor.recording()->name_regions(multiprocessor.shared_memory(0), names, regions.begin(),
                                           regions.size());
}

}  // namespace gpu_model::detail

void* gpu_model::dynamic_shared_memory(size_t bytes) {
  return detail::Multiprocessor::here().shared_memory(bytes);
}
