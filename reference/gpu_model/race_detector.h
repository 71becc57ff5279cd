/// @file
/// Finds races by what orders accesses, not by what they do to results: two accesses to the same
/// bytes, one of them a write, race unless a barrier, an mbarrier, a wait, a fence or the end of a grid
/// orders them. One run under any schedule is enough, because an order that is missing is missing in
/// every run. The idea is FastTrack's (Flanagan and Freund, PLDI 2009): vector clocks for threads,
/// single epochs for memory.
///
/// Who makes an access has a slot (vector_clock.h). A wgmma reads in its warp's slot, whose time passes
/// when the warp waits for it; a bulk load writes in its mbarrier's slot, whose time passes with the
/// phase. So what is asynchronous is known to no one before it has been waited for, whenever it happens.
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

/// The clock of an mbarrier.
struct BarrierClock {
  Meeting arrivals;                              ///< Of the current phase, and all before it.
  std::shared_ptr<const VectorClock> completed;  ///< Up to the last complete phase.
  /// Of the last wait: what a thread knew, and what it then knew.
  std::shared_ptr<const VectorClock> knew, knows;
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

  /// What was released to a place in memory by atomics.
  std::unordered_map<const void*, std::shared_ptr<const VectorClock>> released;

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

/// Races of one block's threads.
class RaceDetector {
 public:
  explicit RaceDetector(Multiprocessor& of) : multiprocessor_(of) {}

  /// The one of the block that runs on this OS thread; null if it does not look for races.
  static thread_local constinit RaceDetector* active;

  void begin_block(uint32_t number, unsigned threads, std::byte* shared, size_t bytes);

  // Accesses by a thread. `bytes` from `address`, in any memory.
  enum class Kind { kRead, kWrite, kAtomicRead, kAtomicWrite };
  void access(unsigned thread, const void* address, size_t bytes, Kind kind, const Place& place);

  // cp.async: its thread writes when it waits; until then nobody may touch the bytes.
  void issue_copy(unsigned thread, const void* destination, const void* source, const Wait& wait);
  void finish_copy(unsigned thread, const void* destination, const Wait& wait);

  // Bulk copies. Offsets are in shared memory.
  void issue_load(unsigned thread, size_t offset, size_t bytes, Slot barrier, Time phase,
                  const Wait& wait);
  void issue_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait);
  void finish_store(unsigned thread, size_t offset, size_t bytes, const Wait& wait);
  void read_global(unsigned thread, const void* address, size_t bytes, const Wait& wait);
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
  void wait(BarrierClock& barrier, unsigned thread);
  void fence_proxy(unsigned thread);
  void fence(unsigned thread);
  /// An atomic access, which what the thread fenced is released by, and acquired from at its next fence;
  /// with `release` and `acquire` at once.
  void atomic(unsigned thread, const void* address, bool reads, bool writes, bool acquire,
              bool release);
  void wait_for_grids(unsigned thread);

  Slot slot_of_mbarrier(size_t index) const { return threads_ + warps_ + static_cast<Slot>(index); }

 private:
  struct Agent {
    std::shared_ptr<const VectorClock> base;      // what it knows of others
    Time now = 1;                                 // its own time,
    Time fenced = 0;                              // and that of its last fence between the proxies
    std::shared_ptr<const VectorClock> released;  // what it knew at its last fence
    std::shared_ptr<VectorClock> acquired;        // what it would know after a fence
  };
  // Who makes an access.
  struct Actor {
    unsigned thread;          // whose knowledge counts,
    bool whole_warp = false;  // with that of all its lanes
    bool async = false;       // through the asynchronous proxy
    Epoch epoch;
  };
  static constexpr Slot kNobody = 1 << 20;  // a slot that is never known

  Actor thread_actor(unsigned thread, const Place& place, bool atomic = false) const;
  Epoch epoch(Slot slot, Time time, const Wait& wait) const;
  bool knows(unsigned thread, const Epoch& epoch) const;
  bool before(const Actor& actor, const Epoch& epoch) const;
  bool published(const Actor& actor, const Epoch& epoch) const;
  bool known_reads(const Actor& actor, const Reads& reads, unsigned* lane) const;
  void read(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor);
  void record_read(ShadowMemory& shadow, Cell& cell, uint32_t bytes, const Actor& actor);
  void write(ShadowMemory& shadow, size_t offset, size_t bytes, const Actor& actor);
  std::shared_ptr<VectorClock> snapshot(unsigned thread) const;
  void release_into(VectorClock& clock, unsigned thread, const VectorClock* joined) const;
  void acquire(unsigned thread, const VectorClock& clock);
  [[noreturn]] void report(const char* kind, size_t bytes, const Actor& actor,
                           const char* other_kind, const Epoch& other, bool only_unpublished) const;
  std::string who(const Epoch& epoch) const;
  std::string missing(const Actor& actor, const Epoch& other, bool only_unpublished) const;
  std::string describe(const char* kind, size_t bytes, const Epoch& epoch) const;

  Multiprocessor& multiprocessor_;
  GridRaces& grid_ = GridRaces::instance();
  uint32_t block_ = 0;
  Slot threads_ = 0, warps_ = 0;
  std::byte* shared_ = nullptr;
  ShadowMemory shadow_;  // of shared memory
  std::vector<Agent> agents_;
  std::array<Time, 32> warp_times_ = {};
  // Of the last griddepcontrol_wait: what a thread knew, and what it then knew.
  std::shared_ptr<const VectorClock> knew_, knows_;
};

}  // namespace gpu_model::detail
