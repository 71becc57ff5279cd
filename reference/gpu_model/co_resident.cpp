// Blocks that run together. As with the warps of a block, the adversary runs the block with the
// highest of random priorities as far as it can, and looks at what would end a wait (a load that is
// under way, a counter that has reached what is wanted) mostly when nothing else can run.
#include "reference/gpu_model/co_resident.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <utility>

#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/sanitizer.h"

namespace gpu_model::detail {
namespace {

/// How often every block may run while all threads only spin, until that is a deadlock.
constexpr uint64_t kSpinRounds = 10000;

/// How many kinds of waiting blocks a report describes.
constexpr int kMaxDescribed = 8;

// The largest area that is gone, for the next launch: a first touch of every stack takes a fifth of a launch's time.
constinit std::mutex idle_mutex;
constinit std::byte* idle_area = nullptr;
constinit size_t idle_bytes = 0;

unsigned load(const unsigned* counter) {
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(counter)).load(std::memory_order_relaxed);
}

}  // namespace

bool AcquiredValues::same_as_before(const void* address, uint64_t value) {
  for (Seen& seen : seen_) {
    if (seen.address != address) continue;
    if (seen.value == value) return true;
    seen_ = {};  // something has changed, so what was seen elsewhere may be worth another look
    break;
  }
  seen_[next_++ % seen_.size()] = {address, value};
  return false;
}

StackArea::StackArea(size_t stacks) : bytes_(stacks * Fiber::kMapBytes) {
  {
    const std::scoped_lock lock(idle_mutex);
    if (idle_bytes >= bytes_) {
      bytes_ = std::exchange(idle_bytes, 0);
      data_ = std::exchange(idle_area, nullptr);
      return;
    }
  }
  void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  madvise(map, bytes_, MADV_NOHUGEPAGE);  // or a stack's first page would cost 2 MiB
  data_ = static_cast<std::byte*>(map);
}

StackArea::~StackArea() {
  asan_unpoison(data_, bytes_);
  {
    const std::scoped_lock lock(idle_mutex);
    if (bytes_ > idle_bytes) {
      std::swap(idle_area, data_);
      std::swap(idle_bytes, bytes_);
    }
  }
  if (data_ != nullptr) munmap(data_, bytes_);
}

CoResidentBlocks::CoResidentBlocks(Launch& launch) : launch_(launch) {
  const size_t count = launch.blocks_together();
  const size_t stacks = count * launch.threads();
  if (stacks > kMaxGuardedStacks) stacks_ = std::make_unique<StackArea>(stacks);
  blocks_.resize(count);
  clusters_.resize(count / launch.options.cluster);
  for (size_t i = 0; i < count; ++i) {
    auto& multiprocessor = blocks_[i].multiprocessor;
    multiprocessor = std::make_unique<Multiprocessor>();
    multiprocessor->together_ = this;
    multiprocessor->cluster_ = &clusters_[i / launch.options.cluster];
    multiprocessor->cluster_->blocks.push_back(multiprocessor.get());
    multiprocessor->use_races(launch);
    multiprocessor->prepare(
        launch,
        stacks_ == nullptr ? nullptr : stacks_->data() + i * launch.threads() * Fiber::kMapBytes);
  }
}

CoResidentBlocks::~CoResidentBlocks() {
  for (Block& block : blocks_) {
    if (block.multiprocessor != nullptr) block.multiprocessor->release();
  }
}

void CoResidentBlocks::run() {
  gridDim = launch_.grid;
  blockDim = launch_.block;
  const KernelArithmetic arithmetic;
  while (!launch_.stopped) {
    const uint64_t turn = launch_.next_turn++;
    if (turn >= launch_.turns()) break;
    run_turn(turn);
  }
  Multiprocessor::current_ = nullptr;
  RaceDetector::active = nullptr;
}

void CoResidentBlocks::run_turn(uint64_t turn) {
  begin(turn);
  const uint64_t patience = kSpinRounds * blocks_.size();
  std::string error;
  while (ended_ < blocks_.size() && !launch_.stopped) {
    if (Block* block = rejected(); block != nullptr) {
      end(*block, turn);
      break;
    }
    Block* block = choose();
    if (block == nullptr) {
      if (wake_watchers() || land_load()) continue;
      error = deadlock();
      break;
    }
    // Only threads that gave way are left: what they wait for may be one of these.
    if (block->priority < kLowest) {
      wake_watchers();
      if (draw() % 4 == 0) land_load();
      if (idle_ > patience) {
        error = deadlock();
        break;
      }
    } else if (launch_.seed != 0 && draw() % 4 == 0) {
      wake_watchers();
    }
    run_block(*block);
    if (block->multiprocessor->finished_ == block->multiprocessor->count_) end(*block, turn);
  }
  if (!error.empty()) launch_.fail(turn, std::move(error));
  for (Block& block : blocks_) {
    if (!block.ended) end(block, turn);
  }
}

void CoResidentBlocks::begin(uint64_t turn) {
  random_ = launch_.seed * 0x9e3779b97f4a7c15 + turn + 0x626c6f636b73;
  const uint64_t odds[] = {0, 64, 8};
  interrupt_odds_ = launch_.seed == 0 ? 0 : odds[draw() % 3];
  ended_ = 0;
  yields_ = 0;
  idle_ = 0;
  for (Cluster& cluster : clusters_) cluster.begin(launch_.options.cluster * launch_.threads());
  for (size_t i = 0; i < blocks_.size(); ++i) {
    blocks_[i].ended = false;
    Multiprocessor& multiprocessor = *blocks_[i].multiprocessor;
    multiprocessor.open();
    multiprocessor.begin_block(launch_.block_at(turn, i));
    multiprocessor.close();
    multiprocessor.presence_ = Multiprocessor::Presence::kNotStarted;
  }
  draw_priorities();
}

/// A block in which something is wrong, by its own doing or another's.
CoResidentBlocks::Block* CoResidentBlocks::rejected() {
  for (Block& block : blocks_) {
    if (!block.multiprocessor->error_.empty()) return &block;
  }
  return nullptr;
}

CoResidentBlocks::Block* CoResidentBlocks::choose() {
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (block.ended || (best != nullptr && block.priority <= best->priority)) continue;
    if (block.multiprocessor->can_run()) best = &block;
  }
  return best;
}

void CoResidentBlocks::run_block(Block& block) {
  Multiprocessor& multiprocessor = *block.multiprocessor;
  const uint64_t resumes = multiprocessor.resumes_, spins = multiprocessor.spins_;
  if (multiprocessor.presence_ == Multiprocessor::Presence::kNotStarted) multiprocessor.open();
  Multiprocessor::current_ = &multiprocessor;
  RaceDetector::active = multiprocessor.races_;
  const dim3 index = multiprocessor.block_index_;
  blockIdx = {index.x, index.y, index.z};
  multiprocessor.schedule();
  if (std::exchange(multiprocessor.released_, false)) wake_watchers();
  const bool idle = multiprocessor.resumes_ - resumes == multiprocessor.spins_ - spins;
  idle_ = idle ? idle_ + 1 : 0;
  if (multiprocessor.gave_way()) {
    block.priority = kLowest - ++yields_;
  } else if (multiprocessor.can_run()) {
    draw_priorities();  // it was interrupted
  }
}

void CoResidentBlocks::end(Block& block, uint64_t turn) {
  Multiprocessor& multiprocessor = *block.multiprocessor;
  Multiprocessor::current_ = &multiprocessor;
  if (multiprocessor.presence_ == Multiprocessor::Presence::kNotStarted) multiprocessor.open();
  multiprocessor.end_block(turn);
  multiprocessor.presence_ = Multiprocessor::Presence::kEnded;
  multiprocessor.close();
  block.ended = true;
  ++ended_;
  idle_ = 0;
}

bool CoResidentBlocks::interrupts() {
  return interrupt_odds_ != 0 && draw() % interrupt_odds_ == 0;
}

bool CoResidentBlocks::wake_watchers() {
  bool woken = false;
  for (Block& block : blocks_) {
    if (!block.ended && block.multiprocessor->wake_watchers()) woken = true;
  }
  if (woken) draw_priorities();
  return woken;
}

bool CoResidentBlocks::land_load() {
  const size_t first = launch_.seed == 0 ? 0 : draw() % blocks_.size();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[(first + i) % blocks_.size()];
    if (!block.ended && block.multiprocessor->land_load()) {
      idle_ = 0;
      return true;
    }
  }
  return false;
}

void CoResidentBlocks::draw_priorities() {
  for (size_t i = 0; i < blocks_.size(); ++i) {
    // Seed 0 runs blocks in order.
    blocks_[i].priority =
        launch_.seed == 0 ? kLowest + blocks_.size() - i : kLowest + draw() % kLowest;
  }
}

uint64_t CoResidentBlocks::draw() {
  Random random{random_};
  const uint64_t drawn = random.next();
  random_ = random.state;
  return drawn;
}

std::string CoResidentBlocks::deadlock() const {
  std::string text;
  bool divergent = false;
  size_t ended = 0, others = 0;
  int described = 0;
  for (size_t begin = 0, end; begin < blocks_.size(); begin = end) {
    end = begin + 1;
    const Multiprocessor& block = *blocks_[begin].multiprocessor;
    if (blocks_[begin].ended) {
      ++ended;
      continue;
    }
    divergent = divergent || block.divergent();
    const std::string waits = block.describe_waits();
    while (end < blocks_.size() && !blocks_[end].ended &&
           blocks_[end].multiprocessor->describe_waits() == waits) {
      ++end;
    }
    if (described++ == kMaxDescribed) {
      others = blocks_.size() - begin;
      break;
    }
    const std::string last = blocks_[end - 1].multiprocessor->block_name();
    text += (text.empty() ? "" : "; ") +
            (end == begin + 1 ? "block " + last
                              : "blocks " + block.block_name() + " to " + last + ", each") +
            ": " + waits;
  }
  if (others > 0) text += "; and so on for the last " + std::to_string(others) + " blocks";
  if (ended > 0) text += "; " + std::to_string(ended) + " blocks have ended";
  return (divergent ? "divergent barrier: " : "deadlock: ") + text;
}

bool Multiprocessor::can_run() const {
  for (unsigned w = 0; w < warp_count_; ++w) {
    if (warps_[w].runnable != 0) return true;
  }
  return false;
}

bool Multiprocessor::gave_way() const {
  bool any = false;
  for (unsigned w = 0; w < warp_count_; ++w) {
    if (warps_[w].runnable == 0) continue;
    if (warps_[w].priority >= kLowest) return false;
    any = true;
  }
  return any;
}

bool Multiprocessor::wake_watchers() {
  bool woken = false;
  for (size_t i = 0; i < watchers_.size();) {
    Thread& thread = *watchers_[i];
    const bool later = woken && launch_->seed != 0 && random_.next() % 2 == 0;
    if (later || load(thread.counter) < thread.wanted) {
      ++i;
      continue;
    }
    watchers_.erase(watchers_.begin() + static_cast<ptrdiff_t>(i));
    if (recording_ != nullptr) {
      recording_->counter_met(*this, thread.number, thread.counter, load(thread.counter));
    }
    wake(thread);
    woken = true;
  }
  if (woken) draw_priorities();
  return woken;
}

void Multiprocessor::wait_for_counter(const unsigned* counter, unsigned wanted, const Wait& wait) {
  Thread& thread = self();
  thread.counter = counter;
  thread.wanted = wanted;
  watchers_.push_back(&thread);
  if (recording_ != nullptr) {
    recording_->counter_wait(*this, wait, counter, wanted, load(counter));
  }
  suspend(wait);
  thread.counter = nullptr;
}

std::string Multiprocessor::lacks(const Thread& thread) const {
  if (thread.waits_for_registers) {
    const Warp& warp = warps_[thread.number / warpSize];
    return ": a warp wants " + std::to_string((warp.wanted - warp.registers) * warpSize) +
           " registers more, and the block has " + std::to_string(free_registers_) + " to give";
  }
  if (thread.counter != nullptr) return ": " + describe_counter(thread.counter, thread.wanted);
  if (thread.wait.barrier == Wait::kCluster) return cluster_phase();
  return phase(thread.wait);
}

void Multiprocessor::acquired(const unsigned* address, unsigned value, const Wait& wait) {
  Thread& thread = self();
  if (!thread.acquired.same_as_before(address, value)) {
    if (recording_ != nullptr) recording_->counter(*this, wait, address, value);
    scheduling_point();
    return;
  }
  thread.wait = wait;  // for the report of a deadlock
  thread.counter = address;
  thread.wanted = 0;
  spin();
  thread.wait = {};
  thread.counter = nullptr;
}

void Multiprocessor::released() {
  if (launch_->seed == 0 || async_random_.next() % 2 == 0) return;
  released_ = true;
  yield();
}

std::string describe_counter(const unsigned* counter, unsigned wanted) {
  return "the counter at " + describe_place(counter) +
         (wanted == 0 ? "" : " wants " + std::to_string(wanted) + " and") + " holds " +
         std::to_string(load(counter));
}

// What ptx.h calls.

void acquired(const char* what, const unsigned* address, unsigned value, const char* file,
              int line) {
  Multiprocessor::here().acquired(address, value, {what, file, line});
}

void released(const char* what, const unsigned* address, unsigned value, const char* file,
              int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (Recording* recording = multiprocessor.recording(); recording != nullptr) {
    recording->counter(multiprocessor, {what, file, line}, address, value);
  }
  multiprocessor.released();
}

void wait_for_counter(const unsigned* counter, unsigned wanted, const char* file, int line) {
  Multiprocessor::here().wait_for_counter(counter, wanted, {"wait_until_at_least", file, line});
}

}  // namespace gpu_model::detail
