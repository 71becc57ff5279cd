namespace mla { extern int mutant; }
#include "reference/gpu_model/race_detector.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "reference/gpu_model/memory.h"
#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/source_line.h"

namespace gpu_model::detail {
namespace {

// Of global memory that many blocks read, the readers of so many are remembered one by one, beside the own
// block's.
constexpr int kReadersOfOtherBlocks = 2;
constexpr int kFewReads = 3;

Place place_of(const Wait& wait) {
  return {wait.what, wait.file, wait.line, nullptr};
}

}  // namespace

// What grids share --------------------------------------------------------------------------------

GridRaces& GridRaces::instance() {
  static auto* one = new GridRaces;  // never destroyed, like the multiprocessors
  return *one;
}

void GridRaces::begin_grid(uint64_t blocks, bool dependent) {
  if (!dependent) {
    // All that ran has ended: its accesses are before whatever comes.
    ended_below_ = next_block_;
    for (const auto& region : regions_) region->shadow.clear();
    regions_.clear();
    released.clear();
    releases = 0;
  }
  recent_ = {};
  first_block_ = next_block_;
  next_block_ += static_cast<uint32_t>(blocks);
}

ShadowMemory* GridRaces::find(const void* address, size_t* offset) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  const auto inside = [&](const Region& region) {
    *offset = number - reinterpret_cast<uintptr_t>(region.begin);
    return *offset < region.shadow.bytes();
  };
  Recent& recent = recent_[number / 4096 % recent_.size()];
  if (recent.page == number / 4096) {
    if (recent.region == nullptr) return nullptr;
    if (inside(*recent.region)) return &recent.region->shadow;
  }
  const auto known = std::find_if(regions_.begin(), regions_.end(),
                                  [&](const auto& region) { return inside(*region); });
  Region* found = known == regions_.end() ? nullptr : known->get();
  if (found == nullptr) {
    size_t bytes = 0;
    if (const std::byte* begin = find_allocation(address, &bytes); begin != nullptr) {
      regions_.push_back(std::make_unique<Region>(Region{begin, ShadowMemory(bytes)}));
      found = regions_.back().get();
      inside(*found);
    }
  }
  recent = {number / 4096, found};
  return found == nullptr ? nullptr : &found->shadow;
}

uint32_t GridRaces::index_of(const Place& place) {
  const auto hash = static_cast<uint64_t>((reinterpret_cast<uintptr_t>(place.code) ^
                                           reinterpret_cast<uintptr_t>(place.file) * 31 ^
                                           static_cast<uintptr_t>(place.line)) *
                                          0x9e3779b97f4a7c15);
  uint32_t& recent = recent_places_[hash >> 54];
  if (places_[recent] == place && recent != 0) return recent;
  for (auto [at, end] = place_index_.equal_range(hash); at != end; ++at) {
    if (places_[at->second] == place) return recent = at->second;
  }
  recent = static_cast<uint32_t>(places_.size());
  places_.push_back(place);
  place_index_.emplace(hash, recent);
  return recent;
}

// Clocks ------------------------------------------------------------------------------------------

thread_local constinit RaceDetector* RaceDetector::active = nullptr;

void RaceDetector::begin_block(uint32_t number, unsigned threads, std::byte* shared, size_t bytes) {
  block_ = number;
  threads_ = threads;
  warps_ = (threads + 31) / 32;
  shared_ = shared;
  if (shadow_.bytes() == bytes) {
    shadow_.clear(number);
  } else {
    shadow_ = ShadowMemory(bytes, number);
  }
  const auto start = std::make_shared<VectorClock>();
  start->block = number;
  start->known_below = grid_.ended_below();
  agents_.assign(threads, {});
  for (Agent& agent : agents_) agent.base = start;
  warp_times_ = {};
  peers_ = multiprocessor_.cluster_size() - 1;
  used_by_others_ = false;
  ran_ = nullptr;
  released_.clear();
  from_grids_ = from_atomics_ = {};
}

RaceDetector::Moment RaceDetector::moment(unsigned thread) const {
  Moment now = agents_[thread];
  now.products = warp_times_[thread / 32];
  now.release = ++grid_.releases;
  return now;
}

void RaceDetector::release_into(VectorClock& clock, unsigned thread, const Moment& at,
                                const VectorClock* joined) const {
  if (at.base.get() != joined) clock.join(*at.base);
  clock.release = std::max(clock.release, at.release);
  VectorClock::raise(clock.seen, thread, at.now);
  VectorClock::raise(clock.seen, threads_ + thread / 32, at.products);
  VectorClock::raise(clock.published, thread, at.fenced);
  if (at.fenced_cluster != 0) {
    VectorClock::raise(clock.published, threads_ + thread, at.fenced_cluster);
  }
}

std::shared_ptr<VectorClock> RaceDetector::snapshot(unsigned thread, const Moment& at) const {
  auto clock = std::make_shared<VectorClock>(*at.base);
  release_into(*clock, thread, at, at.base.get());
  return clock;
}

const std::shared_ptr<const VectorClock>& RaceDetector::released_by_fence(unsigned thread) {
  Agent& agent = agents_[thread];
  if (agent.released == nullptr && agent.fence.base != nullptr) {
    agent.released = snapshot(thread, agent.fence);
  }
  return agent.released;
}

void RaceDetector::learn(Lesson& lesson, unsigned thread,
                         const std::shared_ptr<const VectorClock>& clock) {
  std::shared_ptr<const VectorClock>& base = agents_[thread].base;
  if (clock == nullptr || (lesson.clock == clock && lesson.knows == base)) return;
  if (lesson.clock != clock || lesson.knew != base) {
    auto joined = std::make_shared<VectorClock>(*base);
    joined->join(*clock);
    lesson = {clock, base, std::move(joined)};
  }
  base = lesson.knows;
}

void RaceDetector::come(Meeting& meeting, unsigned thread) {
  Agent& agent = agents_[thread];
  if (meeting.clock == nullptr) {
    meeting.clock = snapshot(thread, moment(thread));
  } else {
    release_into(*meeting.clock, thread, moment(thread), meeting.last.get());
  }
  meeting.last = agent.base;
  ++agent.now;
}

std::shared_ptr<const VectorClock> RaceDetector::part(Meeting& meeting) {
  meeting.last = nullptr;
  return std::exchange(meeting.clock, nullptr);
}

void RaceDetector::arrive(BarrierClock& barrier, unsigned thread) {
  Meeting& meeting = barrier.arrivals;
  if (meeting.clock == nullptr && barrier.completed != nullptr) {
    meeting.clock = std::make_shared<VectorClock>(*barrier.completed);
  }
  come(meeting, thread);
}

void RaceDetector::complete_phase(BarrierClock& barrier, Slot slot, Time phase) {
  if (barrier.arrivals.clock == nullptr) {  // none of the block's own threads has arrived
    barrier.arrivals.clock = barrier.completed != nullptr
                                 ? std::make_shared<VectorClock>(*barrier.completed)
                                 : std::make_shared<VectorClock>();
    barrier.arrivals.clock->block = block_;
  }
  { if (::mla::mutant == 580) {  } else { VectorClock::raise(barrier.arrivals.clock->seen, slot, phase); } }
  barrier.completed = barrier.completed_cluster = part(barrier.arrivals);
  if (barrier.foreign == nullptr) return;
  auto all = std::make_shared<VectorClock>(*barrier.foreign);
  all->join(*barrier.completed);
  barrier.completed_cluster = std::move(all);
}

void RaceDetector::wait(BarrierClock& barrier, unsigned thread, bool cluster) {
  if (cluster) {
    learn(barrier.lesson_cluster, thread, (::mla::mutant == 579 ? (barrier.completed) : (barrier.completed_cluster)));
    return;
  }
  learn(barrier.lesson, thread, (::mla::mutant == 578 ? (barrier.completed_cluster) : (barrier.completed)));
  if (barrier.foreign != nullptr) agents_[thread].withheld = barrier.completed_cluster;
}

void RaceDetector::fence_proxy(unsigned thread, bool cluster) {
  Agent& agent = agents_[thread];
  agent.fenced = agent.now++;
  if (cluster) agent.fenced_cluster = agent.fenced;
}

void RaceDetector::fence(unsigned thread) {
  Agent& agent = agents_[thread];
  learn(from_atomics_, thread, (::mla::mutant == 589 ? (nullptr) : (std::exchange(agent.acquired, nullptr))));
  { if (::mla::mutant == 590) {  } else { agent.fence = moment(thread); } }
  agent.released = nullptr;
  ++agent.now;
}

void RaceDetector::atomic(unsigned thread, const void* address, bool reads, bool writes,
                          bool acquires, bool releases) {
  Agent& agent = agents_[thread];
  size_t offset = 0;
  RaceDetector* block = owner(address, &offset);
  // Other memory is the host's. Where a kernel's file has functions in common with the model, such as those of
  // std::shared_ptr, the linker may take the instrumented ones, and calls come from within this detector.
  if (block == nullptr && grid_.find(address, &offset) == nullptr) return;
  std::shared_ptr<const VectorClock>& released =
      block != nullptr ? block->released_[address] : grid_.released[address];
  const std::shared_ptr<const VectorClock> before = released;
  if (writes) {
    std::shared_ptr<const VectorClock> own = released_by_fence(thread);
    if ((::mla::mutant == 588 ? (true) : (releases))) {
      own = snapshot(thread, moment(thread));
      ++agent.now;
    }
    if (own != nullptr && reads &&
        before != nullptr) {  // a read-modify-write hands on what was there
      auto joined = std::make_shared<VectorClock>(*own);
      { if (::mla::mutant == 591) { released = std::move(joined); } else { joined->join(*before);
      released = std::move(joined); } }
    } else if (own != nullptr || !reads) {
      released = std::move(own);
    }
  }
  if (!reads || before == nullptr) return;
  if ((::mla::mutant == 587 ? (true) : (acquires))) {
    learn(from_atomics_, thread, before);
  } else if (agent.acquired == nullptr) {
    agent.acquired = before;
  } else if (agent.acquired != before) {
    auto joined = std::make_shared<VectorClock>(*agent.acquired);
    joined->join(*before);
    agent.acquired = std::move(joined);
  }
}

void RaceDetector::wait_for_grids(unsigned thread) {
  if (agents_[thread].base->known_below >= grid_.first_block()) return;
  if (from_grids_.clock == nullptr) {
    auto ended = std::make_shared<VectorClock>();
    ended->block = block_;
    ended->known_below = grid_.first_block();
    from_grids_.clock = std::move(ended);
  }
  learn(from_grids_, thread, from_grids_.clock);
}

// Accesses ----------------------------------------------------------------------------------------

Epoch RaceDetector::epoch(Slot slot, Time time, const Wait& wait) const {
  return {block_, time, slot, grid_.index_of(place_of(wait)) & 0x7fffffff, 0};
}

RaceDetector::Actor RaceDetector::thread_actor(unsigned thread, const Place& place,
                                               bool atomic) const {
  return {
      .thread = thread,
      .epoch = {block_, agents_[thread].now, thread, grid_.index_of(place) & 0x7fffffff, atomic}};
}

bool RaceDetector::knows(unsigned thread, const Epoch& of) const {
  const VectorClock& base = *agents_[thread].base;
  if (of.block == block_) {
    if (of.slot == thread) return true;
    if (of.slot == threads_ + thread / 32) return of.time <= warp_times_[thread / 32];
    return VectorClock::at(base.seen, of.slot) >= of.time;
  }
  if (of.block < base.known_below) return true;
  const VectorClock* other = base.of(of.block);
  return other != nullptr && VectorClock::at(other->seen, of.slot) >= of.time;
}

bool RaceDetector::before(const Actor& actor, const Epoch& of) const {
  if (knows(actor.thread, of)) return true;
  if (!actor.whole_warp) return false;
  const unsigned first = actor.thread / 32 * 32;
  if (of.block == block_ && of.slot / 32 == first / 32 && of.slot < threads_)
    return true;  // a lane's own
  for (unsigned lane = first; lane < std::min(first + 32, threads_); ++lane) {
    if (knows(lane, of)) return true;
  }
  return false;
}

// Of what ordinary means wrote, the asynchronous proxy sees what its writer has fenced.
bool RaceDetector::published(const Actor& actor, const Epoch& of,
                             const ShadowMemory& shadow) const {
  if (of.slot >= threads_) return true;
  const bool far = (::mla::mutant == 584 ? (false) : (shadow.block() != 0 && shadow.block() != of.block));
  const unsigned first = actor.whole_warp ? actor.thread / 32 * 32 : actor.thread;
  const unsigned end = actor.whole_warp ? std::min(first + 32, threads_) : first + 1;
  for (unsigned thread = first; thread < end; ++thread) {
    const VectorClock& base = *agents_[thread].base;
    if (of.block < base.known_below) return true;
    const Agent& agent = agents_[thread];
    const Time fenced = far ? agent.fenced_cluster : agent.fenced;
    if (of.block == block_ && of.slot == thread && fenced >= of.time) return true;
    const VectorClock* other = base.of(of.block);
    const Slot slot = far ? threads_ + of.slot : of.slot;
    if (other != nullptr && VectorClock::at(other->published, slot) >= of.time) return true;
  }
  return false;
}

// Whether all of the reads come before what the actor does; if not, `lane` is one that does not. Of those
// of many blocks: whether they may.
bool RaceDetector::known_reads(const Actor& actor, const Reads& reads, unsigned* lane) const {
  *lane = 0;
  if (reads.epoch.block == 0) {
    const VectorClock& base = *agents_[actor.thread].base;
    if (reads.epoch.slot < base.known_below) return true;
    uint32_t maybe = 1u << block_ % 32;
    for (const auto& other : base.others) {
      if ((::mla::mutant == 586 ? (false) : (other->release > reads.epoch.time))) maybe |= 1u << other->block % 32;
    }
    { if (::mla::mutant == 585) { return true; } else { return (reads.lanes & ~maybe) == 0; } }
  }
  if (reads.lanes == 0) return before(actor, reads.epoch);
  for (uint32_t left = reads.lanes; left != 0; left &= left - 1) {
    *lane = static_cast<unsigned>(std::countr_zero(left));
    Epoch each = reads.epoch;
    each.slot += *lane;
    if (!before(actor, each)) return false;
  }
  return true;
}

void RaceDetector::record_read(ShadowMemory& shadow, Cell& cell, uint32_t bytes,
                               const Actor& actor) {
  const Epoch& own = actor.epoch;
  const bool is_thread = own.slot < threads_;
  const Slot slot = is_thread ? own.slot / 32 * 32 : own.slot;
  const uint32_t lane = is_thread ? 1u << own.slot % 32 : 0;
  const auto one = [&] {
    Actor alone = actor;
    alone.whole_warp = false;  // which is quickly told
    return alone;
  };
  unsigned unknown = 0;
  int others = 0, count = 0;
  // One record for all blocks that are not remembered one by one. It says too little to tell whether a write
  // comes after all of these reads. But a write by one that knows no later release of some block surely does not.
  const auto add_to_many = [&](Reads& reads) {
    if (reads.epoch.block != 0 || reads.epoch.slot != grid_.first_block() ||
        reads.epoch.atomic != own.atomic || reads.bytes != bytes) {
      return false;
    }
    reads.lanes |= 1u << own.block % 32;
    return true;
  };
  if (cell.reads != 0 && add_to_many(shadow.reads(cell.reads))) return;  // as most of global memory
  for (uint32_t* at = &cell.reads; *at != 0;) {
    Reads& reads = shadow.reads(*at);
    if (reads.epoch.block == 0) {
      if (add_to_many(reads)) return;
      at = &reads.next;
      continue;
    }
    const bool mine = reads.epoch.block == own.block && reads.epoch.slot == slot &&
                      reads.epoch.atomic == own.atomic && (reads.lanes != 0) == is_thread &&
                      reads.bytes == bytes;
    if (mine && (reads.epoch.time == own.time || !is_thread)) {
      reads.epoch.time =
          own.time;  // what comes after this read comes after the slot's earlier ones
      reads.lanes |= lane;
      return;
    }
    if (mine) reads.lanes &= ~lane;
    // What comes before this read comes before whatever comes after it. Worth its time where there is much.
    const bool drops = ++count > kFewReads && reads.bytes == bytes;
    if ((mine && reads.lanes == 0) || (drops && known_reads(one(), reads, &unknown))) {
      shadow.drop_reads_at(*at);
      continue;
    }
    others += reads.epoch.block != block_;
    at = &reads.next;
  }
  if (others >= kReadersOfOtherBlocks && shadow.block() == 0) {
    Epoch epoch = own;
    epoch.block = 0;
    epoch.slot = grid_.first_block();
    epoch.time = grid_.releases;
    shadow.add_reads(cell, {epoch, 1u << own.block % 32, bytes, 0});
    return;
  }
  Epoch of = own;
  of.slot = slot;
  shadow.add_reads(cell, {of, lane, bytes, 0});
}

void RaceDetector::read(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor) {
  Epoch known;  // neighbours mostly have the same writer
  shadow.for_each<false>(offset, bytes, [&](Cell& cell, uint32_t part) {
    const Epoch& write = cell.write;
    const bool same =
        write.time == known.time && write.slot == known.slot && write.block == known.block;
    if (!same && !(write.atomic && actor.epoch.atomic)) {
      if (!before(actor, write) && !knows_init(actor, write)) {
        report("read", bytes, actor, "write", write, nullptr);
      }
      if (actor.async && !published(actor, write, shadow)) {
        report("read", bytes, actor, "write", write, &shadow);
      }
      known = write;
    }
    // When another block's mbarrier is no longer used is what its phase says.
    if (!actor.barrier || shadow.block() == block_) record_read(shadow, cell, part, actor);
  });
}

void RaceDetector::write(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor) {
  shadow.for_each<true>(offset, bytes, [&](Cell& cell, uint32_t) {
    const Epoch& last = cell.write;
    if (last.time != 0 && !(last.atomic && actor.epoch.atomic)) {
      if (!before(actor, last)) report("write", bytes, actor, "write", last, nullptr);
      if (actor.async && !published(actor, last, shadow)) {
        report("write", bytes, actor, "write", last, &shadow);
      }
    }
    for (uint32_t at = cell.reads; at != 0; at = shadow.reads(at).next) {
      const Reads& reads = shadow.reads(at);
      if (reads.epoch.atomic && actor.epoch.atomic) continue;
      unsigned lane = 0;
      if (known_reads(actor, reads, &lane)) continue;
      Epoch other = reads.epoch;
      if (reads.lanes != 0 && other.block != 0) other.slot += lane;
      report("write", bytes, actor, "read", other, nullptr);
    }
    cell.write = actor.epoch;
    shadow.drop_reads(cell);
  });
}

void RaceDetector::access(unsigned thread, const void* address, size_t bytes, Kind kind,
                          const Place& place) {
  const bool writes = kind == Kind::kWrite || kind == Kind::kAtomicWrite;
  const bool atomic = kind == Kind::kAtomicRead || kind == Kind::kAtomicWrite;
  size_t offset = 0;
  RaceDetector* block = owner(address, &offset);
  ShadowMemory* shadow = block != nullptr ? &block->shadow_ : grid_.find(address, &offset);
  if (shadow == nullptr) return;
  bytes = std::min(bytes, shadow->bytes() - offset);  // what is past the end is an error of its own
  Actor actor = thread_actor(thread, place, atomic);
  actor.barrier = kind == Kind::kBarrier;
  if (block != this && block != nullptr) {
    check_started(*block, writes ? "write" : "read", bytes, actor);
    block->used_by_others_ = true;
  }
  writes ? write(*shadow, offset, bytes, actor) : read(*shadow, offset, bytes, actor);
}

void RaceDetector::issue_copy(unsigned thread, const void* destination, const void* source,
                              const Wait& wait) {
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(destination) - shared_);
  Actor actor = thread_actor(thread, place_of(wait));
  actor.epoch.slot = kNobody;
  write(shadow_, offset, sizeof(Granule), actor);
  if (source != nullptr) access(thread, source, sizeof(Granule), Kind::kRead, place_of(wait));
}

void RaceDetector::finish_copy(unsigned thread, const void* destination, const Wait& wait) {
  const auto offset = static_cast<size_t>(static_cast<const std::byte*>(destination) - shared_);
  const Epoch written = epoch(thread, agents_[thread].now, wait);
  shadow_.for_each<true>(offset, sizeof(Granule),
                         [&](Cell& cell, uint32_t) { cell.write = written; });
}

void RaceDetector::issue_load(unsigned thread, RaceDetector& target, size_t offset, size_t bytes,
                              Landing landing, Slot barrier, Time phase, const Wait& wait) {
  // st.async and red.async are performed in the generic proxy, as the PTX ISA says in their sections.
  Actor actor{thread, false, (::mla::mutant == 581 ? (true) : (landing == Landing::kBulk)), epoch(barrier, phase, wait)};
  actor.epoch.block = target.block_;
  { if (::mla::mutant == 582) {  } else { actor.epoch.atomic = landing == Landing::kAdd; } }
  if (&target != this) {
    check_started(target, "write", bytes, actor);
    target.used_by_others_ = true;
  }
  write(target.shadow_, offset, bytes, actor);
}

void RaceDetector::issue_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait) {
  read(shadow_, offset, bytes, {thread, false, true, epoch(kNobody, 1, wait)});
}

void RaceDetector::finish_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait) {
  const Actor actor = thread_actor(thread, place_of(wait));
  const uint32_t place = actor.epoch.place;
  shadow_.for_each<false>(offset, bytes, [&](Cell& cell, uint32_t part) {
    for (uint32_t* at = &cell.reads; *at != 0;) {
      const Epoch& each = shadow_.reads(*at).epoch;
      if (each.slot == kNobody && each.place == place) {
        shadow_.drop_reads_at(*at);
      } else {
        at = &shadow_.reads(*at).next;
      }
    }
    record_read(shadow_, cell, part, actor);
  });
}

void RaceDetector::read_global(unsigned thread, const RaceDetector& target, const void* address,
                               size_t bytes, Slot barrier, Time phase, const Wait& wait) {
  size_t offset = 0;
  ShadowMemory* shadow = grid_.find(address, &offset);
  if (shadow == nullptr) return;
  Actor actor{thread, false, true, epoch(barrier, phase, wait)};
  actor.epoch.block = target.block_;
  { if (::mla::mutant == 583) {  } else { read(*shadow, offset, bytes, actor); } }
}

void RaceDetector::write_global(unsigned thread, const void* address, size_t bytes,
                                const Wait& wait) {
  size_t offset = 0;
  ShadowMemory* shadow = grid_.find(address, &offset);
  if (shadow == nullptr) return;
  write(*shadow, offset, bytes, {thread, false, true, epoch(kNobody, 1, wait)});
}

void RaceDetector::issue_product(unsigned warp, size_t offset, size_t bytes, Time product,
                                 const Wait& wait) {
  read(shadow_, offset, bytes, {warp * 32, true, true, epoch(threads_ + warp, product, wait)});
}

// Reports -----------------------------------------------------------------------------------------

std::string RaceDetector::describe(const char* kind, size_t bytes, const Epoch& of) const {
  const Place& place = grid_.place(of.place);
  if (place.what != nullptr) {
    return std::string(place.what) + " at " + std::string(relative_path(place.file)) + ":" +
           std::to_string(place.line);
  }
  return std::string(of.atomic ? "atomic " : "") + kind +
         (bytes != 0 ? " of " + std::to_string(bytes) + " bytes" : "") + " at " +
         source_line(place.code);
}

std::string RaceDetector::who(const Epoch& of) const {
  const uint32_t block = of.block != 0 ? of.block : of.slot;
  if (block < grid_.first_block()) return "by an earlier grid";
  if (of.block == 0) return "by one of many blocks";
  const std::string whose = of.block == block_ ? "" : " of block " + name_of_block(of.block);
  if (of.slot < threads_) {
    const uint3 index = multiprocessor_.thread(of.slot).index;
    return "by thread (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
           std::to_string(index.z) + ")" + whose;
  }
  if (of.slot < threads_ + warps_) return "by warp " + std::to_string(of.slot - threads_) + whose;
  return "under way";
}

std::string RaceDetector::missing(const Actor& actor, const Epoch& other,
                                  const ShadowMemory* unpublished) const {
  if (unpublished != nullptr) {
    const bool far = unpublished->block() != 0 && unpublished->block() != other.block;
    return std::string("that thread has called no fence_proxy_async") + (far ? "_cluster" : "") +
           " since";
  }
  const auto& withheld = agents_[actor.thread].withheld;
  if (const VectorClock* known = withheld == nullptr ? nullptr : withheld->of(other.block);
      known != nullptr && VectorClock::at(known->seen, other.slot) >= other.time) {
    return "it was released to this block, but mbarrier_wait acquires only what the own block's "
           "threads release; mbarrier_wait_cluster acquires the rest";
  }
  if (other.block != block_) {
    const uint32_t block = other.block != 0 ? other.block : other.slot;
    if (block < grid_.first_block()) return "no griddepcontrol_wait came before";
    return other.slot >= threads_ + warps_ && other.slot < kNobody && other.block != 0
               ? "nothing here says that it has ended"
               : "nothing released there is acquired here";
  }
  if (other.slot == kNobody) return "the thread that issued it has not waited for it";
  if (other.slot < threads_) {
    return actor.thread / 32 == other.slot / 32 ? "no __syncwarp or barrier between them"
                                                : "no barrier between them";
  }
  if (other.slot < threads_ + warps_) {
    return other.time > warp_times_[other.slot - threads_]
               ? "the warp has not waited for it"
               : "the warp has waited for it, but nothing orders this access after that";
  }
  return multiprocessor_.phase_is_complete(other.slot - threads_ - warps_, other.time)
             ? "this thread has not waited for the mbarrier's phase " +
                   std::to_string(other.time - 1)
             : "it has not landed";
}

void RaceDetector::report(const char* kind, size_t bytes, const Actor& actor,
                          const char* other_kind, const Epoch& other,
                          const ShadowMemory* unpublished) const {
  multiprocessor_.fail([&] {
    const bool by_warp = actor.epoch.slot >= threads_ && actor.epoch.slot < threads_ + warps_;
    return "race: " + describe(kind, bytes, actor.epoch) +
           (by_warp ? " of warp " + std::to_string(actor.epoch.slot - threads_) : "") + " after " +
           describe(other_kind, 0, other) + " " + who(other) + ": " +
           missing(actor, other, unpublished) + ", " + multiprocessor_.place(actor.thread);
  });
}

}  // namespace gpu_model::detail
