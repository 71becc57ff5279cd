/// @file
/// Blocks that run together on one OS thread, so that they may wait for each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "reference/gpu_model/cluster.h"

namespace gpu_model::detail {

struct Launch;

/// What a GPU thread saw in its last loads that acquire: one that sees the same again spins.
class AcquiredValues {
 public:
  /// Remembers a value; returns whether it is the one that was last seen there.
  bool same_as_before(const void* address, uint64_t value);

 private:
  struct Seen {
    const void* address = nullptr;
    uint64_t value = 0;
  };
  std::array<Seen, 4> seen_;  // a loop that looks at more places is not known to spin
  unsigned next_ = 0;
};

/// Stacks in one mapping, without guard zones that work. Linux allows a process some 65530
/// mappings, and a guarded stack takes two. The largest that is destroyed is kept for the next.
class StackArea {
 public:
  /// Throws std::bad_alloc if there is no memory.
  explicit StackArea(size_t stacks);
  ~StackArea();
  StackArea(const StackArea&) = delete;

  std::byte* data() const { return data_; }  ///< Fiber::kMapBytes for each.

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Runs the blocks of one turn of a launch, interleaved on this OS thread.
class CoResidentBlocks {
 public:
  /// Throws std::bad_alloc if there is not enough memory.
  explicit CoResidentBlocks(Launch& launch);
  ~CoResidentBlocks();
  CoResidentBlocks(const CoResidentBlocks&) = delete;

  /// Runs turns until none is left or a block is rejected.
  void run();

  /// Whether the adversary lets another block go on, although this one could.
  bool interrupts();

 private:
  /// With more stacks than this they have no guard zones.
  static constexpr size_t kMaxGuardedStacks = 8192;

  struct Block {
    std::unique_ptr<Multiprocessor> multiprocessor;
    bool ended = false;
    uint64_t priority = 0;  // of all that can run, that with the highest one does
  };

  void run_turn(uint64_t turn);
  Block* rejected();
  void begin(uint64_t turn);
  Block* choose();
  void run_block(Block& block);
  void end(Block& block, uint64_t turn);
  bool wake_watchers();
  bool land_load();
  void draw_priorities();
  uint64_t draw();
  std::string deadlock() const;

  Launch& launch_;
  std::unique_ptr<StackArea> stacks_;  // if there are too many for guard zones
  std::vector<Cluster> clusters_;
  std::vector<Block> blocks_;
  size_t ended_ = 0;
  uint64_t random_ = 0;
  uint64_t interrupt_odds_ = 0;  // one in so many; 0: never
  uint64_t yields_ = 0;
  uint64_t idle_ = 0;  // how often in a row a block ran whose threads only spun
};

/// "the counter at byte 16 of an allocation of 64 bytes wants 4 and holds 2"
std::string describe_counter(const unsigned* counter, unsigned wanted);

}  // namespace gpu_model::detail
