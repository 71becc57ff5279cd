// Clusters: their barrier, and what one block does to another's shared memory. What is asynchronous
// is under way in the block whose memory it writes: there are the marks, the readers and the
// mbarrier that it must respect.
#include "reference/gpu_model/cluster.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {
namespace {

constexpr size_t kGranule = sizeof(Granule);

}  // namespace

unsigned Multiprocessor::cluster_rank() const {
  const auto& blocks = cluster_->blocks;
  return static_cast<unsigned>(std::find(blocks.begin(), blocks.end(), this) - blocks.begin());
}

void Multiprocessor::cluster_arrive(bool release, const Wait& wait) {
  Thread& thread = self();
  Cluster& cluster = *cluster_;
  if (thread.cluster_arrived) {
    fail([&] {
      return place(thread.number) + " calls " + detail::describe(wait) +
             ", but has not called barrier_cluster_wait since it last arrived";
    });
  }
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  if (races_ != nullptr) {
    races_->arrive(cluster.clock.parts[cluster_rank()], thread.number, release);
  }
  ++cluster.arrived;
  --cluster.pending;
  if (recording_ != nullptr) {
    recording_->cluster_arrive(*this, wait, cluster.phase, cluster.pending);
  }
  complete_cluster_barrier();
  if (release) released();
}

void Multiprocessor::cluster_wait(const Wait& wait) {
  Thread& thread = self();
  if (!thread.cluster_arrived) {
    fail([&] {
      return place(thread.number) + " calls " + detail::describe(wait) +
             ", but has not arrived at the cluster's barrier";
    });
  }
  const bool waits = cluster_->phase == thread.cluster_phase;
  if (recording_ != nullptr) recording_->cluster_wait(*this, wait, thread.cluster_phase, waits);
  if (waits) suspend(wait);
  if (races_ != nullptr) races_->wait(cluster_->clock.parts[cluster_rank()], thread.number);
  thread.cluster_arrived = false;
}

void Multiprocessor::complete_cluster_barrier() {
  Cluster& cluster = *cluster_;
  if (cluster.pending > 0 || cluster.arrived == 0) return;
  ++cluster.phase;
  if (races_ != nullptr) cluster.clock.complete();
  cluster.arrived = 0;
  cluster.pending = cluster.running;
  size_t released = 0;
  for (Multiprocessor* block : cluster.blocks) {
    for (unsigned number = 0; number < block->count_; ++number) {
      Thread& thread = *block->threads_[number];
      if (thread.wait.barrier != Wait::kCluster) continue;
      block->wake(thread);
      ++released;
    }
    block->draw_priorities();
  }
  if (recording_ != nullptr) recording_->cluster_met(*this, cluster.phase - 1, released);
}

void Multiprocessor::leave_cluster(const Thread& thread) {
  --cluster_->running;
  if (thread.cluster_arrived && thread.cluster_phase == cluster_->phase) return;
  --cluster_->pending;
  complete_cluster_barrier();
}

std::string Multiprocessor::cluster_phase() const {
  return ": " + std::to_string(cluster_->pending) + " of " + std::to_string(cluster_->running) +
         " threads of the cluster have yet to arrive";
}

void Multiprocessor::close() {
  shared_.protect(false);
}

void Multiprocessor::open() {
  presence_ = Presence::kRuns;
  shared_.protect(true);
}

std::string Multiprocessor::absence() const {
  return "the shared memory of block " + block_name() +
         (presence_ == Presence::kNotStarted
              ? ", which has not started: no cluster barrier came before"
              : ", which has ended: it must wait until others no longer use its memory");
}

std::string Multiprocessor::describe_peer_fault(const void* address, const char* access) const {
  for (const Multiprocessor* block : cluster_->blocks) {
    if (block == this || !block->shared_.contains(address)) continue;
    const auto offset = static_cast<const std::byte*>(address) - block->shared_.data();
    if (offset >= 0 && static_cast<size_t>(offset) < block->shared_.bytes() &&
        block->presence_ != Presence::kRuns) {
      return std::string("invalid ") + access + " of " + block->absence();
    }
    return "out-of-bounds " + std::string(access) + " of the shared memory of block " +
           block->block_name() + ": " + block->shared_.describe(address);
  }
  return {};
}

void* Multiprocessor::map_address(const void* address, unsigned rank, const Wait& wait) {
  const size_t offset = shared_offset(address, 1, 1, " maps", wait);
  if (rank >= cluster_->blocks.size()) {
    fail([&] {
      return detail::describe(wait) + ": rank = " + std::to_string(rank) + " must be less than " +
             std::to_string(cluster_->blocks.size()) + ", the blocks of the cluster, " +
             place(self().number);
    });
  }
  return cluster_->blocks[rank]->shared_.data() + offset;
}

Multiprocessor& Multiprocessor::reach(const void* address, size_t bytes, size_t alignment,
                                      size_t& offset, const Wait& wait) {
  for (Multiprocessor* block : cluster_->blocks) {
    if (!block->shared_.contains(address)) continue;
    if (block->presence_ != Presence::kRuns) {
      fail([&] {
        return detail::describe(wait) + " uses " + block->absence() + ", " + place(self().number);
      });
    }
    const auto distance = static_cast<const std::byte*>(address) - block->shared_.data();
    offset = static_cast<size_t>(distance);
    if (distance >= 0 && offset + bytes <= block->shared_.bytes() && offset % alignment == 0) {
      return *block;
    }
    fail([&] {
      return detail::describe(wait) + " uses " + std::to_string(bytes) + " bytes at byte " +
             std::to_string(distance) + " of " + std::to_string(block->shared_.bytes()) +
             " of block " + block->block_name() + ": they must lie inside, at a multiple of " +
             std::to_string(alignment) + ", " + place(self().number);
    });
  }
  fail([&] {
    return detail::describe(wait) +
           " uses an address that is not in the dynamic shared memory of the cluster, " +
           place(self().number);
  });
}

MbarrierState& Multiprocessor::reach_mbarrier(Multiprocessor& block, size_t offset, uint64_t mark,
                                              const Wait& wait) {
  note_access(block.shared_.data() + offset, sizeof(ptx::Mbarrier), RaceDetector::Kind::kBarrier,
              wait);
  MbarrierState* state = block.find_mbarrier(offset);
  if (state != nullptr && mark == state->mark()) return *state;
  fail([&] {
    return detail::describe(wait) + ": the barrier at byte " + std::to_string(offset) +
           " of block " + block.block_name() +
           (state == nullptr ? " is not initialised" : " was overwritten by ordinary stores") +
           ", " + place(self().number);
  });
}

void Multiprocessor::arrive_in_cluster(const ptx::Mbarrier* barrier, uint64_t mark, int bytes,
                                       const Wait& wait) {
  size_t offset = 0;
  Multiprocessor& block = reach(barrier, sizeof *barrier, 8, offset, wait);
  MbarrierState& state = reach_mbarrier(block, offset, mark, wait);
  if (bytes < 0) {
    fail([&] {
      return detail::describe(wait) + ": bytes = " + std::to_string(bytes) +
             " must be at least 0, " + place(self().number);
    });
  }
  if (races_ != nullptr && &block == this) {
    races_->arrive(state.clock, self().number);
  } else if (races_ != nullptr) {
    races_->arrive(state.clock, *block.races_, self().number);
  }
  if (recording_ != nullptr) recording_->arrive(*this, wait, block, state, bytes);
  block.mbarrier_update(state, 1, -int64_t{bytes}, wait);
  if (!block.error_.empty() && &block != this) {
    fail([&] {
      return std::exchange(block.error_, {}) + ", of the barrier at byte " +
             std::to_string(offset) + " of block " + block.block_name() + ", " +
             place(self().number);
    });
  }
  released();
}

void Multiprocessor::check_cluster_load(BulkCopy copy, void* destination,
                                        const ptx::Mbarrier* barrier, uint64_t mark,
                                        size_t alignment, const Wait& wait) {
  Multiprocessor& block = reach(destination, copy.bytes, alignment, copy.offset, wait);
  if (&reach(barrier, sizeof *barrier, 8, copy.barrier, wait) != &block) {
    fail([&] {
      return detail::describe(wait) + ": the barrier is not in the block that is written to, " +
             place(self().number);
    });
  }
  const MbarrierState& barrier_state = reach_mbarrier(block, copy.barrier, mark, wait);
  if (!barrier_state.fenced) {
    fail([&] {
      return detail::describe(wait) +
             ": the thread that initialised the barrier has not called fence_mbarrier_init, " +
             place(self().number);
    });
  }
  copy.what = wait.what;
  copy.file = wait.file;
  copy.line = wait.line;
  copy.thread = self().number;
  copy.issuer = this;
  if (copy.kind == BulkCopy::Kind::kBulk && copy.source == nullptr) probe(copy);
  const bool bulk = copy.kind == BulkCopy::Kind::kBulk;
  if (copy.source != nullptr) {
    use_async_view();
    const size_t begin = copy.source_offset / kGranule, end = begin + copy.bytes / kGranule;
    for (size_t i = begin; i < end; ++i) check_async_access(i, " reads", wait);
    for (size_t i = begin; i < end; ++i) ++async_.readers[i];
  }
  block.use_async_view();
  if (bulk && block.async_.fenced) block.publish_stores();
  const size_t begin = copy.offset / kGranule;
  const size_t end = (copy.offset + copy.bytes + kGranule - 1) / kGranule;
  const auto reject_at = [&](size_t index, auto&& why) {
    fail([&] {
      return detail::describe(wait) + " writes shared memory at byte " +
             std::to_string(index * kGranule) + " of block " + block.block_name() + " that " +
             why() + ", " + place(self().number);
    });
  };
  for (size_t i = begin; i < end; ++i) {
    const GranuleMark& granule_mark = block.marks_[i];
    using State = GranuleMark::State;
    if (granule_mark.state == State::kCopying || granule_mark.state == State::kLanding) {
      reject_at(i, [&] { return block.pending_write(granule_mark); });
    }
    if (bulk && (granule_mark.state == State::kWritten ||
                 !equal(block.generic_granules()[i], block.async_.granules[i]))) {
      reject_at(i, [] {
        return std::string("was written by ordinary stores, with no fence_proxy_async since");
      });
    }
    if (block.async_.readers[i] != 0) {
      reject_at(i, [&] { return block.reader(i) + " still reads"; });
    }
    if (i == copy.barrier / kGranule && bulk) {
      reject_at(i, [] { return std::string("holds its own barrier"); });
    }
  }
  if (races_ != nullptr) {
    const Landing landing = bulk                                  ? Landing::kBulk
                            : copy.kind == BulkCopy::Kind::kStore ? Landing::kStore
                                                                  : Landing::kAdd;
    const Slot slot = block.slot_of(barrier_state);
    const auto phase = static_cast<Time>(barrier_state.phase + 1);
    races_->issue_load(self().number, *block.races_, copy.offset, copy.bytes, landing, slot, phase,
                       wait);
    if (copy.source != nullptr) {
      races_->issue_source(self().number, *block.races_, copy.source_offset, copy.bytes, slot,
                           phase, wait);
    } else if (bulk) {
      note_source(copy, block, barrier_state, wait);
    }
  }
  if (bulk) {
    const auto issuer = static_cast<uint8_t>(cluster_rank() + 1);
    block.mark_landing(begin, end, self().number, issuer, wait);
  }
  if (recording_ != nullptr) recording_->copy(*this, block, copy, false);
  block.add_load(std::move(copy));
  cluster_target_ = &block;
}

void Multiprocessor::begin_cluster_load() {
  Multiprocessor& block = *cluster_target_;
  BulkCopy& load = *block.loads_.back();
  load.begun = true;
  const bool early = launch_->seed != 0 && async_random_.next() % 2 == 0;
  if (early && load.kind == BulkCopy::Kind::kBulk) block.read_source(load);
  released();
}

/// A copy under way from this block's shared memory to another's that reads a granule from `begin`
/// to `last`.
const BulkCopy* Multiprocessor::find_cluster_reader(size_t begin, size_t last) const {
  for (const Multiprocessor* block : cluster_->blocks) {
    for (const BulkCopy* load : block->loads_) {
      if (load->source != this) continue;
      const size_t source = load->source_offset / kGranule;
      if (source <= last && begin < source + load->bytes / kGranule) return load;
    }
  }
  return nullptr;
}

void Multiprocessor::land_value(const BulkCopy& load) {
  std::byte* target = shared_.data() + load.offset;
  if (load.kind == BulkCopy::Kind::kAdd) {
    std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(target))
        .fetch_add(load.value[0], std::memory_order_relaxed);
    return;
  }
  for (size_t i = 0; i < load.bytes; ++i) {
    if (target[i] != std::byte{0xff} && error_.empty()) {
      error_ = detail::describe({load.what, load.file, load.line}) +
               " writes shared memory at byte " + std::to_string(load.offset) + " of block " +
               block_name() + ", where an ordinary store wrote while it was under way, issued by " +
               load.issuer->place(load.thread);
      return;
    }
  }
  std::memcpy(target, load.value.data(), load.bytes);
}

void Multiprocessor::fence_proxy_async_cluster(const Wait& wait) {
  fence_proxy_async(wait);
  if (races_ != nullptr) races_->fence_proxy(self().number, true);
  for (Multiprocessor* block : cluster_->blocks) {
    if (block == this || block->presence_ != Presence::kRuns) continue;
    block->use_async_view();
    block->publish_stores();
  }
}

// What ptx_sm90.h calls.

unsigned cluster_rank() {
  return Multiprocessor::here().cluster_rank();
}

unsigned cluster_size() {
  return Multiprocessor::here().cluster_size();
}

void cluster_arrive(const char* what, bool release, const char* file, int line) {
  Multiprocessor::here().cluster_arrive(release, {what, file, line});
}

void cluster_wait(const char* file, int line) {
  Wait wait{"barrier_cluster_wait", file, line};
  wait.barrier = Wait::kCluster;
  Multiprocessor::here().cluster_wait(wait);
}

void* map_address(const void* address, unsigned rank, const char* file, int line) {
  return Multiprocessor::here().map_address(address, rank, {"mapa", file, line});
}

void fence_proxy_async_cluster(const char* file, int line) {
  Multiprocessor::here().fence_proxy_async_cluster({"fence_proxy_async_cluster", file, line});
}

void check_in_cluster(const char* what, const void* address, size_t bytes, const char* file,
                      int line) {
  size_t offset = 0;
  Multiprocessor::here().reach(address, bytes, bytes, offset, {what, file, line});
}

void arrive_in_cluster(const char* what, const ptx::Mbarrier* barrier, uint64_t mark, int bytes,
                       const char* file, int line) {
  Multiprocessor::here().arrive_in_cluster(barrier, mark, bytes, {what, file, line});
}

void check_value(const char* what, bool add, void* destination, const CopiedValue& value,
                 size_t bytes, const ptx::Mbarrier* barrier, uint64_t mark, const char* file,
                 int line) {
  BulkCopy copy;
  copy.kind = add ? BulkCopy::Kind::kAdd : BulkCopy::Kind::kStore;
  copy.value = value;
  copy.bytes = bytes;
  Multiprocessor::here().check_cluster_load(std::move(copy), destination, barrier, mark, bytes,
                                            {what, file, line});
}

void check_multicast_mask(unsigned mask, const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  if (mask != 0 && mask >> multiprocessor.cluster_size() == 0) return;
  multiprocessor.fail([&] {
    char text[16];
    std::snprintf(text, sizeof text, "0x%04x", mask);
    return describe({"cp_async_bulk_tensor_4d_multicast", file, line}) + ": the mask " + text +
           " must name one or more of the " + std::to_string(multiprocessor.cluster_size()) +
           " blocks of the cluster, and no other, " +
           multiprocessor.place(multiprocessor.self().number);
  });
}

void begin_cluster_load() {
  Multiprocessor::here().begin_cluster_load();
}

}  // namespace gpu_model::detail
