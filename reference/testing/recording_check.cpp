#include "reference/testing/recording_check.h"

#include <algorithm>
#include <array>
#include <bit>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace mla {
namespace {

using Json = nlohmann::json;

/// What is wrong with a recording.
class Wrong : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void require(bool holds, const std::string& message) {
  if (!holds) throw Wrong(message);
}

/// The kinds of version 1 and their fields, in order, without the file's legend, which must be the same.
constexpr const char* kKinds[][14] = {
    {"begin", "block", "threads"},
    {"end", "block"},
    {"return", "block", "warp", "lanes"},
    {"run", "block", "warp", "lanes", "place", "count", "reads", "writes"},
    {"meet", "block", "warp", "lanes", "place", "barrier", "generation", "expected", "waits",
     "arrived"},
    {"met", "block", "barrier", "generation", "released"},
    {"warp_wait", "block", "warp", "lanes", "place"},
    {"mbarrier", "block", "warp", "lanes", "place", "offset", "count"},
    {"arrive", "block", "warp", "lanes", "place", "at", "offset", "phase", "bytes", "pending",
     "missing"},
    {"phase", "block", "offset", "phase", "released"},
    {"wait", "block", "warp", "lanes", "place", "offset", "phase"},
    {"pass", "block", "warp", "lanes", "place", "offset", "phase"},
    {"copy", "block", "warp", "lanes", "place", "copy", "group", "at", "barrier", "from", "bytes",
     "reads", "writes"},
    {"land", "block", "copy", "phase", "pending", "missing"},
    {"commit", "block", "warp", "lanes", "place", "group"},
    {"settle", "block", "warp", "lanes", "place", "group", "allowed", "count"},
    {"product", "block", "warp", "lanes", "place", "columns", "count", "reads"},
    {"registers", "block", "warp", "lanes", "place", "registers", "wanted", "free"},
    {"grant", "block", "warp", "registers", "free"},
    {"cluster_arrive", "block", "warp", "lanes", "place", "phase", "pending"},
    {"cluster_wait", "block", "warp", "lanes", "place", "phase", "waits"},
    {"cluster_met", "block", "phase", "released"},
    {"counter_wait", "block", "warp", "lanes", "place", "counter", "wanted", "holds"},
    {"counter_met", "block", "warp", "lanes", "counter", "holds"},
    {"counter", "block", "warp", "lanes", "place", "counter", "value"},
};

enum Group { kCopies, kStores, kProducts };

/// Ranges of bytes: begin, end, begin, end, ...
using Ranges = std::vector<uint32_t>;

/// One event, its fields by name.
class Event {
 public:
  Event(const Json& event, const std::vector<std::vector<std::string>>& kinds,
        const std::vector<Ranges>& ranges)
      : event_(event), ranges_(ranges) {
    require(event.is_array() && !event.empty() && event[0].is_number_unsigned() &&
                event[0].get<size_t>() < kinds.size(),
            "is of no kind");
    fields_ = &kinds[event[0].get<size_t>()];
    require(event.size() <= fields_->size(), "has too many fields");
  }
  const std::string& kind() const { return fields_->front(); }
  bool has(std::string_view name) const {
    const size_t i = find(name);
    return i < event_.size();
  }
  int64_t operator()(std::string_view name) const {
    const size_t i = find(name);
    require(i < event_.size() && event_[i].is_number_integer(),
            kind() + " lacks " + std::string(name));
    return event_[i].get<int64_t>();
  }
  Ranges ranges(std::string_view name) const {
    if (!has(name)) return {};
    const auto number = static_cast<size_t>((*this)(name));
    require(number < ranges_.size(), "no such ranges");
    return ranges_[number];
  }

 private:
  size_t find(std::string_view name) const {
    return static_cast<size_t>(std::find(fields_->begin() + 1, fields_->end(), name) -
                               fields_->begin());
  }
  const Json& event_;
  const std::vector<Ranges>& ranges_;
  const std::vector<std::string>* fields_;
};

/// What a lane waits for: a word, and numbers that say which.
struct Waits {
  const char* what = nullptr;  // null: it runs
  int64_t a = 0, b = 0;
  bool operator==(const Waits& other) const {
    return what != nullptr && other.what != nullptr && std::string_view(what) == other.what &&
           a == other.a && b == other.b;
  }
};

struct CopyGroups {
  std::vector<int64_t> open;  // numbers of copies that are in no group yet
  std::deque<std::vector<int64_t>> groups;
};

struct Lane {
  bool returned = false;
  Waits waits;
  CopyGroups copies, stores;
  bool arrived = false;  // at the cluster's barrier, in this phase
  int64_t phase = 0;
};

struct ProductGroup {
  int64_t count = 0;
  std::vector<Ranges> reads;
};

struct Warp {
  uint32_t exists = 0;
  std::array<Lane, 32> lanes;
  int64_t registers = 0;
  ProductGroup open;
  std::deque<ProductGroup> groups;
};

struct Barrier {
  int64_t generation = 0, arrived = 0, expected = 0;
};

struct Mbarrier {
  int64_t count = 0, pending = 0, missing = 0, phase = 0;
  bool due = false;  // its phase is complete, and the event that says so has yet to come
};

struct Block {
  int64_t launch = 0;
  std::tuple<int64_t, int64_t, int64_t, int64_t> cluster;
  bool running = false;
  int64_t threads = 0, free = 0;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::map<int64_t, Mbarrier> mbarriers;
  std::vector<uint16_t> writers, readers;  // of every byte of shared memory, asynchronous ones
};

struct Cluster {
  int64_t phase = 0, pending = 0, running = 0;
};

struct Copy {
  int64_t group = -1, at = -1, barrier = -1, from = -1, bytes = 0;
  bool adds = false;
  uint32_t lanes = 0;  // of a cp.async: those that have not waited for it
  int64_t each = 0;    // copies per lane
  bool settled = false;
  Ranges reads{}, writes{};
};

class Replay {
 public:
  explicit Replay(const Json& file) : file_(file) {}

  void run(RecordingSummary* summary) {
    read_tables();
    size_t number = 0;
    for (const Json& event : file_.at("events")) {
      try {
        step(Event(event, kinds_, ranges_));
      } catch (const Wrong& wrong) {
        throw Wrong("event " + std::to_string(number) + ", " + event.dump() + ": " + wrong.what());
      }
      ++number;
    }
    summary_.events = number;
    require(number == file_.at("events_kept"), "events_kept is not their number");
    const uint64_t left_out = file_.at("events_left_out");
    summary_.truncated = file_.at("truncated");
    require(summary_.truncated == (left_out > 0), "truncated contradicts events_left_out");
    summary_.error = file_.at("error");
    if (!summary_.truncated && summary_.error.empty()) check_end();
    *summary = std::move(summary_);
  }

 private:
  void read_tables() {
    require(file_.is_object() && file_.value("schema", "") == "gpu_model recording",
            "this is no recording");
    require(file_.value("version", 0) == 1,
            "version " + std::to_string(file_.value("version", 0)) + " is not 1");
    for (const Json& kind : file_.at("kinds")) kinds_.push_back(kind);
    require(kinds_.size() == std::size(kKinds), "the list of kinds is not that of version 1");
    for (size_t i = 0; i < kinds_.size(); ++i) {
      const auto end = std::find(std::begin(kKinds[i]), std::end(kKinds[i]), nullptr);
      require(std::equal(kinds_[i].begin(), kinds_[i].end(), std::begin(kKinds[i]), end),
              "kind " + std::to_string(i) + " is not that of version 1");
    }
    const size_t files = file_.at("files").size();
    for (const Json& place : file_.at("places")) {
      require(place.size() == 3 && place[1].get<size_t>() < files && place[2].get<int>() >= 0,
              "a place is not an instruction, a file and a line");
      places_.push_back(place[0]);
    }
    for (const Json& ranges : file_.at("ranges")) {
      require(ranges.size() % 2 == 0, "ranges are no pairs");
      ranges_.push_back(ranges.get<Ranges>());
    }
    counters_ = file_.at("counters").size();
    for (const Json& launch : file_.at("launches")) {
      for (const Json& region : launch.at("regions")) {
        require(region.size() == 3 && region[0].is_string() &&
                    region[1].get<size_t>() + region[2].get<size_t>() <= launch.at("shared_bytes"),
                "a region is not a name, an offset and a size inside shared memory");
      }
    }
    summary_.launches = file_.at("launches").size();
    for (const Json& index : file_.at("blocks")) {
      Block& block = blocks_.emplace_back();
      block.launch = index.at(0);
      const Json& launch = file_.at("launches").at(static_cast<size_t>(block.launch));
      const int64_t cluster = launch.at("cluster");
      block.cluster = {block.launch, index.at(1).get<int64_t>() / cluster, index.at(2),
                       index.at(3)};
      const Json& size = launch.at("block");
      block.threads = size[0].get<int64_t>() * size[1].get<int64_t>() * size[2].get<int64_t>();
      clusters_[block.cluster] = {0, block.threads * cluster, block.threads * cluster};
    }
    summary_.blocks = blocks_.size();
  }

  Block& block_at(int64_t number) {
    require(number >= 0 && number < static_cast<int64_t>(blocks_.size()), "no such block");
    return blocks_[static_cast<size_t>(number)];
  }

  /// Calls function(warp, lane) for the event's lanes, all of which must be running.
  template <typename Function>
  void for_lanes(const Event& event, Function function) {
    Warp& warp = warp_of(event);
    for (uint32_t lanes = lanes_of(event); lanes != 0; lanes &= lanes - 1) {
      Lane& lane = warp.lanes[static_cast<size_t>(std::countr_zero(lanes))];
      require(!lane.returned, "of a lane that has returned");
      if (lane.waits == Waits{"its warp", event.has("place") ? event("place") : -1, 0}) {
        lane.waits = {};
      }
      require(lane.waits.what == nullptr,
              "of a lane that waits for " +
                  std::string(lane.waits.what == nullptr ? "" : lane.waits.what));
      function(warp, lane);
    }
  }
  static uint32_t lanes_of(const Event& event) {
    const int64_t lanes = event("lanes");
    require(lanes == -1 || (lanes > 0 && lanes < 0xffffffff), "lanes are no mask");
    return static_cast<uint32_t>(lanes);
  }
  Warp& warp_of(const Event& event) {
    Block& block = block_at(event("block"));
    require(block.running, "of a block that does not run");
    const auto number = static_cast<size_t>(event("warp"));
    require(number < block.warps.size(), "no such warp");
    require((lanes_of(event) & ~block.warps[number].exists) == 0, "of lanes that are not there");
    return block.warps[number];
  }
  void touch(const Event& event) {
    for_lanes(event, [](Warp&, Lane&) {});
  }

  /// Lets all lanes of a block run that wait for this; returns how many.
  static int64_t release(Block& block, const Waits& what) {
    int64_t released = 0;
    for (Warp& warp : block.warps) {
      for (Lane& lane : warp.lanes) {
        if (!(lane.waits == what)) continue;
        lane.waits = {};
        ++released;
      }
    }
    return released;
  }

  void add(std::vector<uint16_t>& users, const Ranges& ranges, int change) {
    for (size_t i = 0; i < ranges.size(); i += 2) {
      require(ranges[i] < ranges[i + 1] && ranges[i + 1] <= users.size(),
              "a range is not inside shared memory");
      for (size_t at = ranges[i]; at < ranges[i + 1]; ++at) {
        users[at] = static_cast<uint16_t>(users[at] + change);
      }
    }
  }
  static void require_idle(const std::vector<uint16_t>& users, const Ranges& ranges,
                           const char* message) {
    for (size_t i = 0; i < ranges.size(); i += 2) {
      require(ranges[i + 1] <= users.size(), "a range is not inside shared memory");
      for (size_t at = ranges[i]; at < ranges[i + 1]; ++at) {
        require(users[at] == 0, "byte " + std::to_string(at) + message);
      }
    }
  }
  static void require_landed(const Block& block, const Ranges& ranges) {
    require_idle(block.writers, ranges, " is read before the copy to it has landed");
  }
  static void require_free(const Block& block, const Ranges& ranges) {
    require_idle(block.writers, ranges, " is written while a copy to it is under way");
    require_idle(block.readers, ranges, " is written while something asynchronous reads it");
  }

  static void same(int64_t stated, int64_t follows, const char* what) {
    require(stated == follows, std::string(what) + " is " + std::to_string(stated) + ", but " +
                                   std::to_string(follows) + " follows from the events before");
  }

  Mbarrier& mbarrier_at(Block& block, int64_t offset) {
    const auto found = block.mbarriers.find(offset);
    require(found != block.mbarriers.end(), "of a barrier that was not initialised");
    return found->second;
  }
  static void count(Mbarrier& barrier, int64_t arrivals, int64_t bytes, const Event& event) {
    require(!barrier.due, "the phase is complete, and no event said so");
    same(event("phase"), barrier.phase, "phase");
    barrier.pending -= arrivals;
    barrier.missing += bytes;
    same(event("pending"), barrier.pending, "pending");
    same(event("missing"), barrier.missing, "missing");
    barrier.due = barrier.pending == 0 && barrier.missing == 0;
  }

  void step(const Event& event) {
    const std::string& kind = event.kind();
    if (event.has("place")) {
      require(static_cast<size_t>(event("place")) < places_.size(), "no such place");
    }
    if (kind == "begin") return begin(event);
    Block& block = block_at(event("block"));
    require(block.running, "of a block that does not run");
    if (kind == "end") {
      end(block);
    } else if (kind == "return") {
      returned(event, block);
    } else if (kind == "run") {
      touch(event);
      require(event("count") > 0, "count is 0");
      require_landed(block, event.ranges("reads"));
      require_free(block, event.ranges("writes"));
    } else if (kind == "warp_wait") {
      for_lanes(event, [&](Warp&, Lane& lane) { lane.waits = {"its warp", event("place"), 0}; });
    } else if (kind == "meet" || kind == "met") {
      meet(event, block);
    } else if (kind == "mbarrier") {
      touch(event);
      block.mbarriers[event("offset")] = {event("count"), event("count")};
    } else if (kind == "arrive") {
      touch(event);
      count(mbarrier_at(block_at(event("at")), event("offset")), std::popcount(lanes_of(event)),
            event("bytes"), event);
    } else if (kind == "phase") {
      Mbarrier& barrier = mbarrier_at(block, event("offset"));
      require(barrier.due, "the phase is not complete");
      same(event("phase"), barrier.phase, "phase");
      same(event("released"), release(block, {"an mbarrier", event("offset"), barrier.phase}),
           "released");
      barrier = {barrier.count, barrier.count, 0, barrier.phase + 1};
      ++summary_.phases;
    } else if (kind == "wait") {
      same(event("phase"), mbarrier_at(block, event("offset")).phase, "phase");
      begin_wait(event, {"an mbarrier", event("offset"), event("phase")});
    } else if (kind == "pass") {
      touch(event);
      same(event("phase"), mbarrier_at(block, event("offset")).phase, "phase");
    } else if (kind == "copy") {
      copy(event);
    } else if (kind == "land") {
      land(event);
    } else if (kind == "commit") {
      commit(event);
    } else if (kind == "settle") {
      settle(event, block);
    } else if (kind == "product") {
      touch(event);
      const Ranges reads = event.ranges("reads");
      require_landed(block, reads);
      add(block.readers, reads, 1);
      ProductGroup& open = warp_of(event).open;
      open.count += event("count");
      open.reads.push_back(reads);
      summary_.products += static_cast<uint64_t>(event("count"));
    } else if (kind == "registers" || kind == "grant") {
      registers(event, block);
    } else if (kind.starts_with("cluster_")) {
      cluster(event, block);
    } else {
      counter(event, block);
    }
  }

  static bool waits_of(const Event& event) {
    require(event("waits") == 0 || event("waits") == 1, "waits is neither 0 nor 1");
    return event("waits") == 1;
  }

  void begin_wait(const Event& event, const Waits& what) {
    for_lanes(event, [&](Warp&, Lane& lane) { lane.waits = what; });
    ++summary_.waits;
  }

  void begin(const Event& event) {
    Block& block = block_at(event("block"));
    require(!block.running && block.warps.empty(), "a block begins twice");
    same(event("threads"), block.threads, "threads");
    block.running = true;
    block.warps.resize(static_cast<size_t>((block.threads + 31) / 32));
    for (size_t i = 0; i < block.warps.size(); ++i) {
      const int64_t lanes = std::min<int64_t>(32, block.threads - static_cast<int64_t>(i) * 32);
      block.warps[i].exists = lanes == 32 ? 0xffffffff : (1u << lanes) - 1;
      // What a block begins with that has the multiprocessor to itself.
      block.warps[i].registers =
          std::min<int64_t>(256, 65536 / static_cast<int64_t>(block.warps.size() * 32) / 8 * 8);
    }
    const size_t bytes =
        file_.at("launches").at(static_cast<size_t>(block.launch)).at("shared_bytes");
    block.writers.resize(bytes);
    block.readers.resize(bytes);
  }

  void end(Block& block) {
    for (const Warp& warp : block.warps) {
      for (size_t i = 0; i < 32; ++i) {
        require((warp.exists >> i & 1) == 0 || warp.lanes[i].returned,
                "a block ends before its threads have returned");
      }
      require(warp.groups.empty() && warp.open.count == 0, "products were not waited for");
    }
    for (const auto& [number, copy] : under_way_) {
      require((copy.at < 0 || &block_at(copy.at) != &block) &&
                  (copy.from < 0 || &block_at(copy.from) != &block),
              "copy " + std::to_string(number) + " is under way");
    }
    for (const auto& [offset, barrier] : block.mbarriers) {
      require(!barrier.due, "no event said that a phase of the barrier at byte " +
                                std::to_string(offset) + " is complete");
    }
    block.running = false;
    block.writers = block.readers = {};
  }

  void returned(const Event& event, Block& block) {
    Cluster& cluster = clusters_[block.cluster];
    for_lanes(event, [&](Warp&, Lane& lane) {
      lane.returned = true;
      --cluster.running;
      if (!lane.arrived || lane.phase != cluster.phase) --cluster.pending;
    });
  }

  void meet(const Event& event, Block& block) {
    Barrier& barrier = block.barriers.at(static_cast<size_t>(event("barrier")));
    same(event("generation"), barrier.generation, "generation");
    if (event.kind() == "met") {
      require(barrier.arrived > 0 && barrier.arrived == barrier.expected,
              std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
                  " threads have arrived");
      same(event("released"), release(block, {"a barrier", event("barrier"), barrier.generation}),
           "released");
      barrier = {barrier.generation + 1, 0, 0};
      return;
    }
    if (barrier.arrived == 0) barrier.expected = event("expected");
    same(event("expected"), barrier.expected, "expected");
    barrier.arrived += std::popcount(lanes_of(event));
    same(event("arrived"), barrier.arrived, "arrived");
    require(barrier.arrived <= barrier.expected, "more threads arrive than the barrier expects");
    if (waits_of(event)) {
      begin_wait(event, {"a barrier", event("barrier"), barrier.generation});
    } else {
      touch(event);
    }
  }

  void copy(const Event& event) {
    const int64_t number = event("copy");
    require(numbers_.insert(number).second, "a copy's number is used twice");
    Copy copy{.group = event("group"),
              .at = event("at"),
              .barrier = event("barrier"),
              .from = event("from"),
              .bytes = event("bytes")};
    copy.adds = places_[static_cast<size_t>(event("place"))].starts_with("red_async");
    copy.reads = event.ranges("reads");
    copy.writes = event.ranges("writes");
    copy.lanes = lanes_of(event);
    const int64_t lanes = std::popcount(copy.lanes);
    for_lanes(event, [&](Warp&, Lane& lane) {
      if (copy.group == kCopies) lane.copies.open.push_back(number);
      if (copy.group == kStores) lane.stores.open.push_back(number);
    });
    if (copy.group == kCopies) {
      copy.each = copy.bytes / 16 / lanes;
      require(copy.each * 16 * lanes == copy.bytes, "lanes copy unequal numbers of bytes");
    } else {
      require(lanes == 1, "a bulk copy is issued by one thread");
    }
    if (copy.from >= 0) {
      Block& source = block_at(copy.from);
      require_landed(source, copy.reads);
      add(source.readers, copy.reads, 1);
    }
    if (copy.at >= 0) {
      Block& target = block_at(copy.at);
      require(target.running, "it writes to a block that does not run");
      if (copy.group < 0) mbarrier_at(target, copy.barrier);
      require_idle(target.readers, copy.writes,
                   " is written while something asynchronous reads it");
      if (!copy.adds) {
        require_idle(target.writers, copy.writes, " is written while a copy to it is under way");
        add(target.writers, copy.writes, 1);
      }
    }
    under_way_.emplace(number, std::move(copy));
    ++summary_.copies;
  }

  void finish(std::map<int64_t, Copy>::iterator found) {
    const Copy& copy = found->second;
    if (copy.from >= 0 && !copy.settled) add(block_at(copy.from).readers, copy.reads, -1);
    if (copy.at >= 0 && !copy.adds) add(block_at(copy.at).writers, copy.writes, -1);
    under_way_.erase(found);
  }

  void land(const Event& event) {
    const auto found = under_way_.find(event("copy"));
    require(found != under_way_.end(), "it lands, but is not under way");
    const Copy& copy = found->second;
    if (copy.group == kStores) {
      require(copy.settled, "a store lands before its thread has waited");
    } else {
      require(copy.group < 0, "a cp.async ends in its thread's wait");
      require(&block_at(event("block")) == &block_at(copy.at), "it lands in another block");
      count(mbarrier_at(block_at(copy.at), copy.barrier), 0, -copy.bytes, event);
    }
    finish(found);
  }

  void commit(const Event& event) {
    const int64_t group = event("group");
    require(group >= kCopies && group <= kProducts, "no such group");
    if (group == kProducts) {
      touch(event);
      Warp& warp = warp_of(event);
      warp.groups.push_back(std::exchange(warp.open, {}));
      return;
    }
    for_lanes(event, [&](Warp&, Lane& lane) {
      CopyGroups& all = group == kCopies ? lane.copies : lane.stores;
      all.groups.push_back(std::exchange(all.open, {}));
    });
  }

  void settle(const Event& event, Block& block) {
    const int64_t group = event("group");
    const auto allowed = static_cast<size_t>(event("allowed"));
    int64_t settled = 0;
    if (group == kProducts) {
      touch(event);
      Warp& warp = warp_of(event);
      for (; warp.groups.size() > allowed; warp.groups.pop_front()) {
        settled += warp.groups.front().count;
        for (const Ranges& reads : warp.groups.front().reads) add(block.readers, reads, -1);
      }
      return same(event("count"), settled, "count");
    }
    for_lanes(event, [&](Warp& warp, Lane& lane) {
      const uint32_t bit = 1u << (&lane - warp.lanes.data());
      CopyGroups& all = group == kCopies ? lane.copies : lane.stores;
      for (; all.groups.size() > allowed; all.groups.pop_front()) {
        for (const int64_t number : all.groups.front()) {
          const auto found = under_way_.find(number);
          require(found != under_way_.end(), "it waits for a copy that has landed");
          Copy& copy = found->second;
          settled += group == kCopies ? copy.each : 1;
          copy.lanes &= ~bit;
          if (group == kStores) {
            copy.settled = true;
            add(block.readers, copy.reads, -1);
          } else if (copy.lanes == 0) {
            finish(found);
          }
        }
      }
    });
    same(event("count"), settled, "count");
  }

  void registers(const Event& event, Block& block) {
    if (event.kind() == "grant") {
      const auto number = static_cast<size_t>(event("warp"));
      require(number < block.warps.size(), "no such warp");
      Warp& warp = block.warps[number];
      block.free -= (event("registers") - warp.registers) * 32;
      same(event("free"), block.free, "free");
      warp.registers = event("registers");
      for (Lane& lane : warp.lanes) {
        require(lane.waits == Waits{"registers"}, "granted to a warp that does not wait");
        lane.waits = {};
      }
      return;
    }
    Warp& warp = warp_of(event);
    if (event("wanted") > 0) {
      begin_wait(event, {"registers"});
    } else {
      touch(event);
      block.free += (warp.registers - event("registers")) * 32;
      warp.registers = event("registers");
    }
    same(event("registers"), warp.registers, "registers");
    same(event("free"), block.free, "free");
  }

  void cluster(const Event& event, Block& block) {
    Cluster& cluster = clusters_[block.cluster];
    if (event.kind() == "cluster_arrive") {
      same(event("phase"), cluster.phase, "phase");
      for_lanes(event, [&](Warp&, Lane& lane) {
        require(!lane.arrived, "it arrives twice");
        lane.arrived = true;
        lane.phase = cluster.phase;
        --cluster.pending;
      });
      same(event("pending"), cluster.pending, "pending");
    } else if (event.kind() == "cluster_wait") {
      const bool waits = waits_of(event);
      require(waits == (event("phase") == cluster.phase), "waits contradicts the phase");
      for_lanes(event, [&](Warp&, Lane& lane) {
        require(lane.arrived && lane.phase == event("phase"), "it has not arrived");
        lane.arrived = waits;
        if (waits) lane.waits = {"the cluster", event("phase")};
      });
      summary_.waits += waits;
    } else {
      same(event("phase"), cluster.phase, "phase");
      same(0, cluster.pending, "pending");
      int64_t released = 0;
      for (Block& other : blocks_) {
        if (!other.running || other.cluster != block.cluster) continue;
        for (Warp& warp : other.warps) {
          for (Lane& lane : warp.lanes) {
            if (!(lane.waits == Waits{"the cluster", cluster.phase})) continue;
            lane.waits = {};
            lane.arrived = false;
            ++released;
          }
        }
      }
      same(event("released"), released, "released");
      ++cluster.phase;
      cluster.pending = cluster.running;
    }
  }

  void counter(const Event& event, Block& block) {
    const int64_t number = event("counter");
    require(number >= 0 && static_cast<size_t>(number) < counters_, "no such counter");
    if (event.kind() == "counter_wait") {
      require(event("holds") < event("wanted"), "it waits for what is there");
      begin_wait(event, {"a counter", number, event("wanted")});
    } else if (event.kind() == "counter_met") {
      Warp& warp = block.warps.at(static_cast<size_t>(event("warp")));
      for (uint32_t lanes = lanes_of(event); lanes != 0; lanes &= lanes - 1) {
        Lane& lane = warp.lanes[static_cast<size_t>(std::countr_zero(lanes))];
        require(lane.waits == Waits{"a counter", number, lane.waits.b} &&
                    event("holds") >= lane.waits.b,
                "released, but not by what it waits for");
        lane.waits = {};
      }
    } else {
      touch(event);
    }
  }

  void check_end() const {
    for (const Block& block : blocks_) require(!block.running, "a block does not end");
    require(under_way_.empty(), "a copy does not land");
  }

  const Json& file_;
  std::vector<std::vector<std::string>> kinds_;
  std::vector<std::string> places_;  // their instructions
  std::vector<Ranges> ranges_;
  size_t counters_ = 0;
  std::vector<Block> blocks_;
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t>, Cluster> clusters_;
  std::map<int64_t, Copy> under_way_;
  std::set<int64_t> numbers_;  // of all copies
  RecordingSummary summary_;
};

}  // namespace

Status check_recording(std::string_view json, RecordingSummary* summary) {
  try {
    const Json file = Json::parse(json);
    Replay(file).run(summary);
  } catch (const std::exception& error) {  // Wrong, or what is missing or of another type
    return {StatusCode::kInvalidArgument, error.what()};
  }
  return {};
}

}  // namespace mla
