/// @file
/// A recording: every event of some blocks, in order, as docs/recording.md describes it. Not a
/// timeline (stages/common/timeline.h), in which a kernel on a GPU says what it does when: here the
/// model says what happened, and there is no clock.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "reference/gpu_model/gpu_model.h"

namespace gpu_model {
namespace detail {
struct BulkCopy;
struct Launch;
struct MbarrierState;
class Multiprocessor;
struct NamedRegion;
struct Wait;
}  // namespace detail

/// What is recorded, and how much of it.
struct RecordingOptions {
  /// Blocks, by their number in each grid (x runs fastest), together with all blocks of their
  /// clusters. Empty: every block.
  std::vector<uint64_t> blocks = {0};
  uint64_t max_events = 1'000'000;      ///< Events after that are counted, not kept.
  size_t max_bytes = size_t{64} << 20;  ///< The same, for the text of all events.
};

/// Writes down what happens in launches while schedule().recording is its address. These must come one
/// after the other.
class Recording {
 public:
  /// The schema of the file; a file of another version is another format.
  static constexpr int kVersion = 1;

  explicit Recording(RecordingOptions options = {});
  Recording(const Recording&) = delete;

  /// The file, in JSON. `about`: what the caller knows of it, as names and texts.
  std::string json(const std::vector<std::pair<std::string, std::string>>& about = {});

  /// What an event is: the index in the file's list of kinds.
  enum class Kind : uint8_t {
    kBegin,
    kEnd,
    kReturn,
    kRun,
    kMeet,
    kMet,
    kWarpWait,
    kMbarrier,
    kArrive,
    kPhase,
    kWait,
    kPass,
    kCopy,
    kLand,
    kCommit,
    kSettle,
    kProduct,
    kRegisters,
    kGrant,
    kClusterArrive,
    kClusterWait,
    kClusterMet,
    kCounterWait,
    kCounterMet,
    kCounter,
  };
  /// What a thread or warp commits in groups and waits for.
  enum class Group : uint8_t { kCopies, kStores, kProducts };

  // The rest is called by the model. A function that takes a Wait is told by the GPU thread that runs.

  /// What begins here are the events of another launch.
  void begin_launch(const detail::Launch& launch);
  /// It has ended, or was rejected with this text.
  void end_launch(const std::string& error);
  /// Whether the block of this number is to be recorded.
  bool wants(const detail::Launch& launch, uint64_t block_number) const;
  /// Whether the launch's regions have no names yet.
  bool wants_regions() const { return launches_.back().regions.empty(); }
  /// See gpu_model::detail::name_regions().
  void name_regions(const std::byte* shared_memory, const char* names,
                    const detail::NamedRegion* regions, size_t count);

  /// A block begins; its index among the recorded ones.
  unsigned begin(unsigned x, unsigned y, unsigned z, unsigned threads);
  void end(const detail::Multiprocessor& block);
  /// Lanes of this warp run now, one after the other; no other GPU thread does until the next call.
  void begin_pass(const detail::Multiprocessor& block, unsigned warp);
  void returned(detail::Multiprocessor& block);
  /// An instruction of one thread.
  void run(detail::Multiprocessor& block, const detail::Wait& wait);
  /// This lane has come to a function of its warp.
  void come(detail::Multiprocessor& block, const detail::Wait& wait);
  /// The lanes of `mask` have met there.
  void ran(detail::Multiprocessor& block, unsigned mask, const detail::Wait& wait);
  /// This thread is about to read, or write, shared memory with its warp.
  void access(detail::Multiprocessor& block, size_t offset, size_t bytes, bool writes);
  /// A plain access of this thread to its block's shared memory, by the instruction at `code`: of
  /// kernels that are compiled for the race detector.
  void plain_access(detail::Multiprocessor& block, const void* code, size_t offset, size_t bytes,
                    bool reads, bool writes);
  void meet(detail::Multiprocessor& block, const detail::Wait& wait, unsigned expected, bool waits,
            unsigned arrived);
  void met(const detail::Multiprocessor& block, int barrier, size_t released);

  void mbarrier(detail::Multiprocessor& block, const detail::Wait& wait, int count);
  /// This thread is about to arrive at a barrier of block `at`, which shall expect bytes more.
  void arrive(detail::Multiprocessor& block, const detail::Wait& wait,
              const detail::Multiprocessor& at, const detail::MbarrierState& barrier,
              int64_t bytes);
  void phase(const detail::Multiprocessor& block, const detail::MbarrierState& barrier,
             size_t released);
  void wait(detail::Multiprocessor& block, const detail::Wait& wait, uint64_t phase);
  void pass(detail::Multiprocessor& block, const detail::Wait& wait, uint64_t phase);

  /// A cp.async of 16 bytes.
  void copy(detail::Multiprocessor& block, const detail::Wait& wait, size_t offset);
  /// Any other copy, into or out of block `at`, which gets a number.
  void copy(detail::Multiprocessor& block, const detail::Multiprocessor& at, detail::BulkCopy& copy,
            bool stores);
  /// It has landed: a load, with what its mbarrier's phase wants after that, or a store.
  void land(const detail::Multiprocessor& block, const detail::BulkCopy& copy, uint64_t phase,
            unsigned pending, int64_t missing);
  void commit(detail::Multiprocessor& block, const detail::Wait& wait, Group group);
  /// A wait for all but `allowed` groups, which completes `count` copies, stores or products.
  void settle(detail::Multiprocessor& block, const detail::Wait& wait, Group group, size_t allowed,
              size_t count);
  /// A warp's part of a wgmma, which reads these granules.
  void product(detail::Multiprocessor& block, const detail::Wait& wait, int columns,
               const uint16_t* granules, size_t count);
  void registers(detail::Multiprocessor& block, const detail::Wait& wait, unsigned registers,
                 unsigned wanted, unsigned free);
  void grant(const detail::Multiprocessor& block, unsigned warp, unsigned registers, unsigned free);

  void cluster_arrive(detail::Multiprocessor& block, const detail::Wait& wait, uint64_t phase,
                      unsigned pending);
  void cluster_wait(detail::Multiprocessor& block, const detail::Wait& wait, uint64_t phase,
                    bool waits);
  void cluster_met(const detail::Multiprocessor& block, uint64_t phase, size_t released);

  void counter_wait(detail::Multiprocessor& block, const detail::Wait& wait,
                    const unsigned* counter, unsigned wanted, unsigned holds);
  void counter_met(const detail::Multiprocessor& block, unsigned thread, const unsigned* counter,
                   unsigned holds);
  /// This thread has loaded the value there, or has made it that.
  void counter(detail::Multiprocessor& block, const detail::Wait& wait, const unsigned* counter,
               unsigned value);

 private:
  using Range = std::pair<uint32_t, uint32_t>;  // of bytes of shared memory: begin and end

  /// An event that may still become one of more lanes. Those of one kind, warp, place and key do;
  /// sums are then added up, and of `last` the later counts.
  struct Event {
    Kind kind = Kind::kRun;
    unsigned block = 0;
    int warp = -1;  // -1: not of a warp
    uint32_t lanes = 0;
    int place = -1;
    bool alone = false;  // stays an event of its own
    std::array<int64_t, 6> key{};
    int64_t sum = 0;
    std::array<int64_t, 2> last{};
    std::vector<Range> reads, writes;

    bool fits(const Event& other) const;
    // Whether both change what the other says of a barrier or a counter.
    bool counts_with(const Event& other) const;
    void add(const Event& other);
  };
  /// What is remembered of a warp.
  struct WarpState {
    uint32_t coming = 0;               // lanes that wait in a warp function
    uint32_t announced = 0;            // of these, those of which an event says so
    std::array<int, 32> places{};      // where each does
    std::vector<Range> reads, writes;  // of what comes next
  };
  /// A launch in JSON; its regions follow the text.
  struct LaunchText {
    std::string text, regions;
  };
  struct Block {
    size_t launch = 0;
    std::array<unsigned, 3> index{};
    std::array<uint64_t, 16> generations{};  // of its barriers
    std::vector<WarpState> warps;
  };

  int ranges_number(std::vector<Range>& ranges);
  static bool gathers(const Event& event);
  int place(std::string_view what, std::string_view file, int line);
  int place(const detail::Wait& wait);
  int counter_number(const unsigned* counter);
  Event of_thread(detail::Multiprocessor& block, Kind kind, const detail::Wait& wait);
  Event of_warp(detail::Multiprocessor& block, Kind kind, const detail::Wait& wait);
  static Event of_block(const detail::Multiprocessor& block, Kind kind);
  WarpState& warp_of(detail::Multiprocessor& block);
  void add_by_thread(Event event);
  void add(Event event);
  void end_pass();
  void gather(Event event);
  void write_gathered();
  void write(Event& event);

  RecordingOptions options_;
  std::string text_;
  size_t ranges_bytes_ = 0;
  uint64_t events_ = 0;    // written
  uint64_t left_out_ = 0;  // that did not fit
  uint64_t copies_ = 0;    // numbered so far
  std::string error_;
  std::vector<Block> blocks_;
  std::vector<LaunchText> launches_;
  std::map<std::string, int, std::less<>> files_;
  std::map<std::tuple<std::string, int, int>, int> places_;  // what, file, line
  std::map<std::string, int, std::less<>> ranges_;           // in JSON
  std::map<std::pair<const void*, int>, int> code_places_;   // code, and what it does there
  std::map<const unsigned*, int> counters_;
  std::vector<std::string> counter_names_;

  // The pass: events, and per lane how many of them come before its next one.
  std::vector<Event> pass_;
  std::array<size_t, 32> next_{};
  unsigned pass_block_ = 0;
  int pass_warp_ = -1;       // -1: none
  bool has_spoken_ = false;  // the operation of a warp function has said more than that it ran
  // Of one warp in a row, with nothing else in between: those that are alike become one.
  std::vector<Event> gathered_;
};

}  // namespace gpu_model
