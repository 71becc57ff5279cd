/// @file
/// Counts what the warps of a launch do to memory, by the instruction that does it: the requests that they
/// make, the sectors of global memory and the wavefronts of shared memory that these cost.
///
/// The lanes of a warp run one after the other here, and on a GPU together. So the accesses of one warp
/// are sorted into requests: what its lanes did at the same machine instruction the same number of times
/// since the warp last met (in a barrier, a shuffle, an `mma`) is one request.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gpu_model {

/// What an instruction does to memory.
enum class AccessKind : uint8_t {
  kNone,  ///< Nothing that is counted: a barrier, a product of registers.
  kLoad,
  kStore,
  kAtomic,
  kMatrixLoad,   ///< ldmatrix
  kMatrixStore,  ///< stmatrix
  kAsyncCopy,    ///< cp.async: global memory is read, not through L1, and shared memory written.
  kBulkLoad,     ///< A bulk copy to shared memory
  kBulkStore,    ///< and one from there.
  kProduct,      ///< wgmma, which reads its operands from shared memory.
};

/// What was counted.
struct Counts {
  uint64_t executed =
      0;  ///< By warps. Of what one thread does for all, such as a bulk copy: 1 each.
  uint64_t threads = 0;  ///< Lanes that took part.
  uint64_t flop = 0;     ///< Of tensor cores.

  uint64_t global_requests = 0;  ///< Times that a warp accessed global memory.
  uint64_t global_sectors = 0;  ///< 32-byte sectors that these touch; each counts once per request.
  uint64_t global_lines = 0;    ///< 128-byte lines, likewise.
  uint64_t global_bytes = 0;    ///< What the lanes asked for, each for itself.
  /// Sectors that the block had not loaded before. That many must come from the L2, even if the L1 keeps
  /// everything. Of what does not go through the L1, and of stores, all sectors.
  uint64_t l2_sectors = 0;

  uint64_t shared_requests = 0;    ///< Times that a warp accessed shared memory.
  uint64_t shared_wavefronts = 0;  ///< Passes of 32 banks of 4 bytes that these took,
  uint64_t shared_conflicts = 0;   ///< and how many of them only because of bank conflicts.
  uint64_t shared_bytes = 0;       ///< What the lanes asked for, each for itself.

  /// Adds the other's.
  Counts& operator+=(const Counts& other);
};

/// An instruction of a kernel, and what it did in one launch.
struct CountedInstruction {
  const char* what =
      nullptr;  ///< The model's function, as "mma_m16n8k16"; null for a plain access.
  const char* file = nullptr;  ///< Its place;
  int line = 0;
  const void* code = nullptr;  ///< of a plain access the address behind the machine instruction.
  AccessKind kind = AccessKind::kNone;
  Counts counts;
};

/// What one launch did.
struct CountedLaunch {
  const void* kernel = nullptr;  ///< The function; null if the launch did not say.
  unsigned grid[3] = {}, block[3] = {};
  size_t shared_bytes = 0;  ///< Dynamic, per block.
  unsigned cluster = 1;
  std::vector<CountedInstruction> instructions;
};

/// All launches while Schedule::profile was this, in order.
struct Profile {
  std::vector<CountedLaunch> launches;
};

namespace detail {

class Multiprocessor;

/// What some lanes of a warp did together.
struct Request {
  uint32_t lanes = 0;  ///< Which lanes.
  uint32_t bytes = 0;  ///< Of each lane.
  std::array<uintptr_t, 32> address;
};

/// How often the 32 banks are read or written for a request, and how often they would be without conflicts.
struct Wavefronts {
  unsigned taken = 0, needed = 0;
};
/// Of an access to shared memory; addresses count from its start. Accesses of 8 bytes take the warp's two
/// halves in turn, those of 16 its four quarters. Lanes that access the same word share it. A load in
/// which neighbours (lanes i and i ^ 1, or i and i ^ 2) want the same takes half as many passes, if no
/// two words of the warp share a bank.
Wavefronts count_wavefronts(const Request& request, AccessKind kind);

/// The counters of the blocks that run on one multiprocessor of the model.
class BlockCounters {
 public:
  /// A block begins.
  void begin_block(const std::byte* shared, size_t shared_bytes, unsigned threads);
  /// It has ended.
  void end_block();

  /// A thread accesses memory, or with kNone only executes an instruction. Returns whether its warp's other
  /// lanes should run now: this one is so far ahead that too much would have to be kept.
  bool access(unsigned thread, const void* address, size_t bytes, AccessKind kind,
              const void* code);
  /// The same, of a function of the model.
  bool access(unsigned thread, const void* address, size_t bytes, AccessKind kind, const char* what,
              const char* file, int line);
  /// A cp.async of 16 bytes, or of zeros from nowhere.
  bool async_copy(unsigned thread, const void* destination, const void* source, const char* what,
                  const char* file, int line);

  /// A whole warp executes a function of the model. With `flop`, if tensor cores do it.
  void warp_executes(const char* what, const char* file, int line, unsigned lanes, uint64_t flop);
  /// A warp issues a wgmma, which warp_executes() has counted: what it reads of shared memory, without
  /// conflicts because it is swizzled.
  void product(const char* what, const char* file, int line, size_t shared_bytes, uint64_t flop);
  /// A bulk copy of so many bytes is issued: its counts, for the caller to add the pieces of global memory.
  Counts& bulk_copy(AccessKind kind, size_t bytes, const char* what, const char* file, int line);
  /// A piece of a bulk copy in global memory; pieces come in order.
  void bulk_piece(Counts& counts, const void* address, size_t bytes);

  /// The warp's lanes have met: their accesses so far are complete.
  void meet(unsigned warp);

  /// Adds what was counted to the launch's instructions.
  void add_to(std::vector<CountedInstruction>& instructions) const;

 private:
  struct Key {
    const void* code;  // or `what`
    const char* file;
    int line;
    AccessKind kind;
    bool operator==(const Key&) const = default;
  };
  // What one warp's lanes have done at one instruction since they met.
  struct Pending {
    std::array<uint32_t, 32> times{};  // by lane
    uint32_t first = 0;                // the number of requests[head]
    size_t head = 0;
    std::vector<Request> requests;
    bool touched = false;
  };
  struct Held {
    size_t index;
    Request request;
  };
  struct Region {  // global memory from gpu_model::allocate
    const std::byte* begin = nullptr;
    size_t bytes = 0;
    std::vector<uint32_t> loaded_by;  // by sector: the last block that loaded it
  };
  struct Recent {  // a page, and the region that it is in, if any
    uintptr_t page = 0;
    Region* region = nullptr;
  };

  bool is_shared(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(shared_) < shared_bytes_;
  }
  size_t index_of(const Key& key);
  bool log(unsigned thread, uintptr_t address, uint32_t bytes, size_t index);
  void count(unsigned warp, size_t index, const Request& request);
  // Plain accesses to shared memory that directly follow one another, side by side, are one as wide as
  // it may be: nvcc joins them.
  void hold(unsigned warp, size_t index, const Request& request);
  void count_held(unsigned warp);
  void count_global(CountedInstruction& instruction, const Request& request);
  void count_shared(CountedInstruction& instruction, const Request& request);
  Region* region_of(uintptr_t address);
  uint64_t new_sectors(uintptr_t sector);

  std::vector<CountedInstruction> instructions_;
  std::vector<uint32_t> slots_ = std::vector<uint32_t>(1024);  // hash table: 1 + index
  std::array<std::vector<Pending>, 32> pending_;               // by warp and instruction
  std::array<std::vector<uint32_t>, 32> touched_;              // by warp
  std::array<std::vector<Held>, 32> held_;                     // by warp
  std::array<uint32_t, 32> exists_{};                          // by warp: its lanes
  std::vector<uint32_t> burst_;  // by thread: accesses since others ran
  unsigned warps_ = 0;
  const std::byte* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  uint32_t block_ = 0;  // counts blocks, from 1
  std::vector<Region*> regions_;
  std::array<Recent, 1024> recent_{};
  uintptr_t last_sector_ = 0, last_line_ = 0;  // of the bulk copy

 public:
  BlockCounters() = default;
  BlockCounters(const BlockCounters&) = delete;
  ~BlockCounters();
};

}  // namespace detail
}  // namespace gpu_model
