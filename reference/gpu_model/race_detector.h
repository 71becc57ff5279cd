/// @file
/// Finds races by what orders accesses, not by what they do to results: two accesses to the same
/// bytes, one of them a write, race unless a barrier, an mbarrier, a wait, a fence or the end of a grid
/// orders them. One run under any schedule is enough, because an order that is missing is missing in
/// every run. The idea is FastTrack's (Flanagan and Freund, PLDI 2009): vector clocks for threads,
/// single epochs for memory.
///
/// Whatever makes an access has a slot (vector_clock.h). A wgmma reads in its warp's slot, whose time passes
/// when the warp waits for it; a bulk load writes in its mbarrier's slot, whose time passes with the
/// phase. So what is asynchronous is known to no one before it has been waited for, whenever it happens.
///
/// Shared memory has the shadow of its block, where the accesses of all blocks of a cluster meet. How
/// clocks of many blocks are kept: vector_clock.h. What clusters add: cluster_races.cpp.
///
/// The detector sees plain accesses of kernels that are compiled with -fsanitize=thread
/// (access_hooks.cpp); the model tells it of all else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "reference/gpu_model/shadow_memory.h"
#include "reference/gpu_model/vector_clock.h"

namespace gpu_model::detail {

class Multiprocessor;
struct Wait;

/// Where a kernel accesses memory: a named instruction at a line, or a machine instruction.
struct Place {
  const char* what = nullptr;  ///< The function in ptx.h or ptx_sm90.h; null for a plain access.
  const char* file = nullptr;
  int line = 0;
  const void* code = nullptr;  ///< Of a plain access: the address behind the machine instruction.

  bool operator==(const Place&) const = default;
};

/// Threads that meet: what they all know, up to there.
struct Meeting {
  std::shared_ptr<VectorClock> clock;
  std::shared_ptr<const VectorClock> last;  ///< What was joined last, which is mostly joined next.
};

/// What a thread learned from a clock: another that knows the same and learns from it, too, then knows the same.
struct Lesson {
  std::shared_ptr<const VectorClock> clock, knew, knows;
};

/// The clock of an mbarrier. Threads of other blocks release to it at the scope of the cluster, which a
/// wait at that of the block does not acquire.
struct BarrierClock {
  Meeting arrivals;                      ///< Of the block's threads: this phase, and all before it.
  std::shared_ptr<VectorClock> foreign;  ///< Of other blocks' threads.
  /// Up to the last complete phase: of the block, and with what other blocks' threads released.
  std::shared_ptr<const VectorClock> completed, completed_cluster;
  Lesson lesson, lesson_cluster;
};

/// The clocks of a cluster's barrier, and what they are of one of its blocks.
struct ClusterClock {
  struct Part {
    uint32_t block = 0;  ///< Its number; 0: none of its threads has come.
    Meeting arrivals;    ///< What those released who came since the barrier was last complete,
    Meeting ran;         ///< and what they had done, though they came relaxed.
    std::shared_ptr<const VectorClock> completed;  ///< What those know who wait,
    std::shared_ptr<const VectorClock> all_ran;    ///< and what has happened.
    Lesson lesson;
  };
  std::vector<Part> parts;  ///< By rank.

  /// The barrier is complete.
  void complete();
};

/// What is common to the blocks of a grid, and to grids that overlap. Used by one OS thread at a time.
class GridRaces {
 public:
  /// Those of the process.
  static GridRaces& instance();

  /// A grid begins; `dependent`: it may run while the one before still does.
  void begin_grid(uint64_t blocks, bool dependent);
  /// The number of the grid's first block.
  uint32_t first_block() const { return first_block_; }
  /// All blocks below this number have ended before the grid began.
  uint32_t ended_below() const { return ended_below_; }

  /// The shadow of the global memory at `address`, and how far from the start of that memory it is;
  /// null for memory that gpu_model::allocate did not give.
  ShadowMemory* find(const void* address, size_t* offset);

  uint32_t index_of(const Place& place);
  const Place& place(uint32_t index) const { return places_[index]; }

  /// What was released to a place in global memory by atomics.
  std::unordered_map<const void*, std::shared_ptr<const VectorClock>> released;
  /// How often any thread has released anything.
  Time releases = 0;

 private:
  struct Region {
    const std::byte* begin = nullptr;
    ShadowMemory shadow;
  };
  struct Recent {  // a page, and the region that it is in
    uintptr_t page = 0;
    Region* region = nullptr;
  };

  uint32_t first_block_ = 1, next_block_ = 1, ended_below_ = 1;
  std::vector<std::unique_ptr<Region>> regions_;
  std::array<Recent, 256> recent_ = {};
  std::vector<Place> places_ = std::vector<Place>(1);
  std::array<uint32_t, 1024> recent_places_ = {};
  std::unordered_multimap<uint64_t, uint32_t> place_index_;
};

/// How what a thread has issued writes shared memory.
enum class Landing { kBulk, kStore, kAdd };

/// Races of one block's threads.
class RaceDetector {
 public:
  explicit RaceDetector(Multiprocessor& of) : multiprocessor_(of) {}

  /// The one of the block that runs on this OS thread; null if it does not look for races.
  static thread_local constinit RaceDetector* active;

  void begin_block(uint32_t number, unsigned threads, std::byte* shared, size_t bytes);

  // Accesses by a thread. `bytes` from `address`, in any memory.
  // kBarrier is the use of an mbarrier, which reads it.
  enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite, kBarrier };
  void access(unsigned thread, const void* address, size_t bytes, Kind kind, const Place& place);

  // cp.async: its thread writes when it waits; until then nobody may touch the bytes.
  void issue_copy(unsigned thread, const void* destination, const void* source, const Wait& wait);
  void finish_copy(unsigned thread, const void* destination, const Wait& wait);

  // Bulk copies, st_async and red_async. Offsets are in shared memory.
  /// To be written: the shared memory of `target`, whose mbarrier has that slot.
  void issue_load(unsigned thread, RaceDetector& target, size_t offset, size_t bytes,
                  Landing landing, Slot barrier, Time phase, const Wait& wait);
  /// To be read until then: this block's shared memory.
  void issue_source(unsigned thread, const RaceDetector& target, size_t offset, size_t bytes,
                    Slot barrier, Time phase, const Wait& wait);
  void issue_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait);
  void finish_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait);
  /// What issue_load() brings is read until then, too.
  void read_global(unsigned thread, const RaceDetector& target, const void* address, size_t bytes,
                   Slot barrier, Time phase, const Wait& wait);
  void write_global(unsigned thread, const void* address, size_t bytes, const Wait& wait);

  // wgmma: products of a warp, numbered from 1.
  void issue_product(unsigned warp, size_t offset, size_t bytes, Time product, const Wait& wait);
  void finish_products(unsigned warp, Time last) { warp_times_[warp] = last; }

  // What orders accesses.
  void come(Meeting& meeting, unsigned thread);
  /// All who know it know what those who came knew.
  static std::shared_ptr<const VectorClock> part(Meeting& meeting);
  void know(unsigned thread, const std::shared_ptr<const VectorClock>& clock) {
    agents_[thread].base = clock;
  }
  void arrive(BarrierClock& barrier, unsigned thread);
  void complete_phase(BarrierClock& barrier, Slot slot, Time phase);
  void wait(BarrierClock& barrier, unsigned thread, bool cluster);
  /// `cluster`: for the shared memory of all of its blocks.
  void fence_proxy(unsigned thread, bool cluster = false);
  void fence_inits(unsigned thread);
  void fence(unsigned thread);
  /// An atomic access, which what the thread fenced is released by, and acquired from at its next fence;
  /// with `release` and `acquire` at once.
  void atomic(unsigned thread, const void* address, bool reads, bool writes, bool acquire,
              bool release);
  void wait_for_grids(unsigned thread);

  // The same between the blocks of a cluster.
  void arrive(BarrierClock& barrier, const RaceDetector& owner, unsigned thread);
  void arrive(ClusterClock::Part& part, unsigned thread, bool release);
  void wait(ClusterClock::Part& part, unsigned thread);
  /// What is wrong with the block's end: others have used its memory, and nothing says that they are done.
  /// Empty if nothing is.
  std::string check_end();

  Slot slot_of_mbarrier(size_t index) const { return threads_ + warps_ + static_cast<Slot>(index); }

 private:
  // What a thread knows at a moment.
  struct Moment {
    std::shared_ptr<const VectorClock> base;  // of others
    Time now = 1;                             // Its own time,
    Time fenced = 0;                          // that of its last fence between the proxies,
    Time fenced_cluster = 0;                  // and of its last for the whole cluster.
    Time products = 0;                        // Its warp's products that have ended,
    Time release = 0;                         // and the number of the release that this is.
  };
  struct Agent : Moment {
    Time inits = 0;                               // when it last called fence_mbarrier_init
    Moment fence;                                 // its last __threadfence, if it has a base,
    std::shared_ptr<const VectorClock> released;  // and what it knew there, once that is wanted
    std::shared_ptr<const VectorClock> acquired;  // what it would also know after a fence
    std::shared_ptr<const VectorClock> withheld;  // what a wait had not the scope to acquire
  };
  // Who makes an access.
  struct Actor {
    unsigned thread;          // whose knowledge counts,
    bool whole_warp = false;  // with that of all its lanes
    bool async = false;       // through the asynchronous proxy
    Epoch epoch;
    bool barrier = false;  // uses an mbarrier
  };
  static constexpr Slot kNobody = 1 << 20;  // a slot that is never known

  Actor thread_actor(unsigned thread, const Place& place, bool atomic = false) const;
  Epoch epoch(Slot slot, Time time, const Wait& wait) const;
  bool knows(unsigned thread, const Epoch& epoch) const;
  bool before(const Actor& actor, const Epoch& epoch) const;
  bool knows_init(const Actor& actor, const Epoch& epoch) const;
  bool published(const Actor& actor, const Epoch& epoch, const ShadowMemory& shadow) const;
  bool known_reads(const Actor& actor, const Reads& reads, unsigned* lane) const;
  void read(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor);
  void record_read(ShadowMemory& shadow, Cell& cell, uint32_t bytes, const Actor& actor);
  void write(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor);
  Moment moment(unsigned thread) const;
  std::shared_ptr<VectorClock> snapshot(unsigned thread, const Moment& at) const;
  void release_into(VectorClock& clock, unsigned thread, const Moment& at,
                    const VectorClock* joined) const;
  const std::shared_ptr<const VectorClock>& released_by_fence(unsigned thread);
  void learn(Lesson& lesson, unsigned thread, const std::shared_ptr<const VectorClock>& clock);
  /// The block of this cluster in whose shared memory the address is, and where; null if none.
  RaceDetector* owner(const void* address, size_t* offset) {
    *offset = static_cast<size_t>(static_cast<const std::byte*>(address) - shared_);
    return *offset < shadow_.bytes() ? this : peers_ > 0 ? peer(address, offset) : nullptr;
  }
  RaceDetector* peer(const void* address, size_t* offset);
  /// Rejects an access to the memory of a block of which nothing is known, not even that it runs.
  void check_started(const RaceDetector& target, const char* kind, size_t bytes,
                     const Actor& actor) const;
  [[noreturn]] void report(const char* kind, size_t bytes, const Actor& actor,
                           const char* other_kind, const Epoch& other,
                           const ShadowMemory* unpublished) const;
  std::string name_of_block(uint32_t number) const;
  std::string who(const Epoch& epoch) const;
  /// `unpublished`: it is ordered, but of that memory the asynchronous proxy does not see it.
  std::string missing(const Actor& actor, const Epoch& other,
                      const ShadowMemory* unpublished) const;
  std::string describe(const char* kind, size_t bytes, const Epoch& epoch) const;

  Multiprocessor& multiprocessor_;
  GridRaces& grid_ = GridRaces::instance();
  uint32_t block_ = 0;
  Slot threads_ = 0, warps_ = 0;
  unsigned peers_ = 0;  // other blocks of the cluster
  std::byte* shared_ = nullptr;
  ShadowMemory shadow_;  // of shared memory
  std::vector<Agent> agents_;
  std::array<Time, 32> warp_times_ = {};
  bool used_by_others_ = false;  // whether other blocks have used its shared memory
  // What happened before the cluster's barrier last let it go on.
  std::shared_ptr<const VectorClock> ran_;
  // What was released to a place in this block's shared memory by atomics.
  std::unordered_map<const void*, std::shared_ptr<const VectorClock>> released_;
  Lesson from_grids_, from_atomics_;
};

}  // namespace gpu_model::detail
