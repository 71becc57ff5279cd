#include "reference/gpu_model/counters.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "reference/gpu_model/memory.h"

namespace gpu_model {

Counts& Counts::operator+=(const Counts& other) {
  executed += other.executed;
  threads += other.threads;
  flop += other.flop;
  global_requests += other.global_requests;
  global_sectors += other.global_sectors;
  global_lines += other.global_lines;
  global_bytes += other.global_bytes;
  l2_sectors += other.l2_sectors;
  shared_requests += other.shared_requests;
  shared_wavefronts += other.shared_wavefronts;
  shared_conflicts += other.shared_conflicts;
  shared_bytes += other.shared_bytes;
  return *this;
}

namespace detail {
namespace {

constexpr unsigned kLanes = 32;
constexpr uintptr_t kSectorBytes = 32, kLineBytes = 128, kWordBytes = 4, kBanks = 32;
// How far a lane may run ahead of the others, and how many requests wait for lanes that do not come.
constexpr uint32_t kBurst = 512;
constexpr size_t kMostPending = 4096;

template <typename Function>
void for_each_lane(uint32_t lanes, Function function) {
  for (; lanes != 0; lanes &= lanes - 1) {
    function(static_cast<unsigned>(std::countr_zero(lanes)));
  }
}

/// The most words that any bank has of these lanes' accesses.
unsigned most_words_of_a_bank(const Request& request, uint32_t lanes, uintptr_t words) {
  std::array<uintptr_t, kBanks> first;
  std::array<unsigned, kBanks> count{};
  std::array<uintptr_t, 4 * kLanes> others;
  size_t other_count = 0;
  unsigned most = 0;
  for_each_lane(lanes, [&](unsigned lane) {
    for (uintptr_t i = 0; i < words; ++i) {
      const uintptr_t word = request.address[lane] / kWordBytes + i, bank = word % kBanks;
      if (count[bank] == 0) {
        first[bank] = word;
      } else if (first[bank] == word || std::find(others.begin(), others.begin() + other_count,
                                                  word) != others.begin() + other_count) {
        continue;
      } else {
        others[other_count++] = word;
      }
      most = std::max(most, ++count[bank]);
    }
  });
  return most;
}

/// Whether every lane wants the same as lane ^ distance, if that takes part.
bool neighbours_agree(const Request& request, unsigned distance) {
  bool agree = true;
  for_each_lane(request.lanes, [&](unsigned lane) {
    const unsigned other = lane ^ distance;
    agree &= (request.lanes >> other & 1) == 0 || request.address[lane] == request.address[other];
  });
  return agree;
}

/// A short list of different numbers, which mostly come in order.
class Distinct {
 public:
  bool add(uintptr_t value) {
    if (count_ > 0 && value <= values_[count_ - 1] &&
        std::find(values_.begin(), values_.begin() + count_, value) != values_.begin() + count_) {
      return false;
    }
    values_[count_++] = value;
    return true;
  }
  size_t size() const { return count_; }

 private:
  std::array<uintptr_t, 2 * kLanes> values_;
  size_t count_ = 0;
};

}  // namespace

Wavefronts count_wavefronts(const Request& request, AccessKind kind) {
  const uintptr_t words = std::max<uintptr_t>(1, request.bytes / kWordBytes);
  const auto lanes_per_pass = static_cast<unsigned>(kLanes / words);
  Wavefronts result;
  for (unsigned first = 0; first < kLanes; first += lanes_per_pass) {
    const uint32_t all = lanes_per_pass == kLanes ? ~0u : (1u << lanes_per_pass) - 1;
    const uint32_t lanes = request.lanes & all << first;
    if (lanes == 0) continue;
    ++result.needed;
    result.taken += most_words_of_a_bank(request, lanes, words);
  }
  const auto halved = static_cast<unsigned>(words / 2);
  if (kind == AccessKind::kLoad && words > 1 && result.needed > halved &&
      (neighbours_agree(request, 1) || neighbours_agree(request, 2)) &&
      most_words_of_a_bank(request, request.lanes, words) == 1) {
    result = {halved, halved};
  }
  return result;
}

BlockCounters::~BlockCounters() {
  for (const Region* region : regions_) delete region;
}

void BlockCounters::begin_block(const std::byte* shared, size_t shared_bytes, unsigned threads) {
  shared_ = shared;
  shared_bytes_ = shared_bytes;
  ++block_;
  warps_ = (threads + kLanes - 1) / kLanes;
  for (unsigned warp = 0; warp < warps_; ++warp) {
    const unsigned lanes = std::min(threads - warp * kLanes, kLanes);
    exists_[warp] = lanes == kLanes ? ~0u : (1u << lanes) - 1;
  }
  burst_.assign(threads, 0);
}

void BlockCounters::end_block() {
  for (unsigned warp = 0; warp < warps_; ++warp) meet(warp);
}

size_t BlockCounters::index_of(const Key& key) {
  const size_t mask = slots_.size() - 1;
  const auto hash =
      (reinterpret_cast<uintptr_t>(key.code) ^ reinterpret_cast<uintptr_t>(key.file) ^
       static_cast<uintptr_t>(key.line) << 20 ^ static_cast<uintptr_t>(key.kind) << 3) *
      0x9e3779b97f4a7c15;
  size_t slot = hash >> 40 & mask;
  for (; slots_[slot] != 0; slot = (slot + 1) & mask) {
    const CountedInstruction& known = instructions_[slots_[slot] - 1];
    const void* code = known.what != nullptr ? static_cast<const void*>(known.what) : known.code;
    if (key == Key{code, known.file, known.line, known.kind}) return slots_[slot] - 1;
  }
  CountedInstruction instruction;
  instruction.file = key.file;
  instruction.line = key.line;
  instruction.kind = key.kind;
  if (key.file != nullptr) {
    instruction.what = static_cast<const char*>(key.code);
  } else {
    instruction.code = key.code;
  }
  instructions_.push_back(instruction);
  slots_[slot] = static_cast<uint32_t>(instructions_.size());
  if (2 * instructions_.size() > slots_.size()) {
    std::vector<uint32_t> larger(2 * slots_.size());
    slots_.swap(larger);
    const std::vector<CountedInstruction> all = std::move(instructions_);
    instructions_.clear();
    for (const CountedInstruction& one : all) {
      const void* code = one.what != nullptr ? static_cast<const void*>(one.what) : one.code;
      instructions_[index_of({code, one.file, one.line, one.kind})].counts = one.counts;
    }
  }
  return instructions_.size() - 1;
}

bool BlockCounters::access(unsigned thread, const void* address, size_t bytes, AccessKind kind,
                           const void* code) {
  auto at = reinterpret_cast<uintptr_t>(address);
  // A thread's own variables, and parameters, are registers and constants on a GPU.
  if (!is_shared(at) && region_of(at) == nullptr) return false;
  const size_t index = index_of({code, nullptr, 0, kind});
  // A larger one is made of the largest that a thread can make there.
  bool far_ahead = false;
  while (bytes > 16) {
    const size_t piece = std::min<size_t>(16, at & -at);
    far_ahead |= log(thread, at, static_cast<uint32_t>(piece), index);
    at += piece;
    bytes -= piece;
  }
  return log(thread, at, static_cast<uint32_t>(bytes), index) || far_ahead;
}

bool BlockCounters::access(unsigned thread, const void* address, size_t bytes, AccessKind kind,
                           const char* what, const char* file, int line) {
  return log(thread, reinterpret_cast<uintptr_t>(address), static_cast<uint32_t>(bytes),
             index_of({what, file, line, kind}));
}

bool BlockCounters::async_copy(unsigned thread, const void* destination, const void* source,
                               const char* what, const char* file, int line) {
  bool far_ahead = access(thread, destination, 16, AccessKind::kAsyncCopy, what, file, line);
  if (source == nullptr) return far_ahead;
  // The place with its sign changed is that of the source; add_to() puts them together.
  return access(thread, source, 16, AccessKind::kAsyncCopy, what, file, -line) || far_ahead;
}

bool BlockCounters::log(unsigned thread, uintptr_t address, uint32_t bytes, size_t index) {
  const unsigned warp = thread / kLanes, lane = thread % kLanes;
  std::vector<Pending>& all = pending_[warp];
  if (index >= all.size()) all.resize(index + 1);
  Pending& pending = all[index];
  if (!pending.touched) {
    pending.touched = true;
    touched_[warp].push_back(static_cast<uint32_t>(index));
  }
  const uint32_t number = pending.times[lane]++;
  if (number < pending.first) {  // too late: what the others did has been counted
    Request alone;
    alone.lanes = 1u << lane;
    alone.bytes = bytes;
    alone.address[lane] = address;
    count(warp, index, alone);
    return false;
  }
  const size_t at = pending.head + (number - pending.first);
  if (at >= pending.requests.size()) pending.requests.resize(at + 1);
  Request& request = pending.requests[at];
  request.lanes |= 1u << lane;
  request.bytes = std::max(request.bytes, bytes);
  request.address[lane] = address;
  const bool full = pending.requests.size() - pending.head > kMostPending;
  if (request.lanes == exists_[warp]) {
    count(warp, index, request);
    request.lanes = 0;
  } else if (full) {
    count(warp, index, pending.requests[pending.head]);
    pending.requests[pending.head].lanes = 0;
  }
  while (pending.head < pending.requests.size() && pending.requests[pending.head].lanes == 0) {
    ++pending.head;
    ++pending.first;
  }
  if (pending.head == pending.requests.size()) {
    pending.requests.clear();
    pending.head = 0;
  } else if (pending.head >= kMostPending) {
    pending.requests.erase(pending.requests.begin(),
                           pending.requests.begin() + static_cast<ptrdiff_t>(pending.head));
    pending.head = 0;
  }
  if (++burst_[thread] < kBurst) return false;
  burst_[thread] = 0;
  return true;
}

void BlockCounters::meet(unsigned warp) {
  for (const uint32_t index : touched_[warp]) {
    Pending& pending = pending_[warp][index];
    for (size_t i = pending.head; i < pending.requests.size(); ++i) {
      if (pending.requests[i].lanes != 0) count(warp, index, pending.requests[i]);
    }
    pending.requests.clear();
    pending.times.fill(0);
    pending.first = 0;
    pending.head = 0;
    pending.touched = false;
  }
  touched_[warp].clear();
  count_held(warp);
}

void BlockCounters::count(unsigned warp, size_t index, const Request& request) {
  CountedInstruction& instruction = instructions_[index];
  if (instruction.kind == AccessKind::kNone) {
    ++instruction.counts.executed;
    instruction.counts.threads += static_cast<uint64_t>(std::popcount(request.lanes));
    return;
  }
  Request shared = request, global = request;
  for_each_lane(request.lanes, [&](unsigned lane) {
    (is_shared(request.address[lane]) ? global : shared).lanes &= ~(1u << lane);
  });
  const bool plain = instruction.what == nullptr && instruction.kind != AccessKind::kAtomic;
  if (global.lanes == 0 && plain) {
    hold(warp, index, shared);
    return;
  }
  count_held(warp);
  ++instruction.counts.executed;
  instruction.counts.threads += static_cast<uint64_t>(std::popcount(request.lanes));
  if (shared.lanes != 0) count_shared(instruction, shared);
  if (global.lanes != 0) count_global(instruction, global);
}

void BlockCounters::hold(unsigned warp, size_t index, const Request& request) {
  std::vector<Held>& held = held_[warp];
  if (!held.empty()) {
    const Request& last = held.back().request;
    bool goes_on = instructions_[held.back().index].kind == instructions_[index].kind &&
                   last.lanes == request.lanes && last.bytes == request.bytes;
    for_each_lane(request.lanes, [&](unsigned lane) {
      goes_on &= goes_on && request.address[lane] == last.address[lane] + last.bytes;
    });
    if (!goes_on) count_held(warp);
  }
  held.push_back({index, request});
  if (held.size() * request.bytes >= 16) count_held(warp);
}

void BlockCounters::count_held(unsigned warp) {
  std::vector<Held>& held = held_[warp];
  for (size_t i = 0; i < held.size();) {
    Request request = held[i].request;
    uintptr_t misaligned = 0;
    for_each_lane(request.lanes, [&](unsigned lane) {
      misaligned |= request.address[lane] - reinterpret_cast<uintptr_t>(shared_);
    });
    size_t joined = 1;
    for (const uint32_t width : {16u, 8u, 4u}) {
      const size_t wanted = width / request.bytes;
      if (wanted < 2 || i + wanted > held.size() || misaligned % width != 0) continue;
      joined = wanted;
      request.bytes = width;
      break;
    }
    CountedInstruction& instruction = instructions_[held[i].index];
    ++instruction.counts.executed;
    instruction.counts.threads += static_cast<uint64_t>(std::popcount(request.lanes));
    count_shared(instruction, request);
    i += joined;
  }
  held.clear();
}

void BlockCounters::count_global(CountedInstruction& instruction, const Request& request) {
  Counts& counts = instruction.counts;
  Distinct sectors, lines;
  for_each_lane(request.lanes, [&](unsigned lane) {
    const uintptr_t first = request.address[lane], last = first + request.bytes - 1;
    for (uintptr_t sector = first / kSectorBytes; sector <= last / kSectorBytes; ++sector) {
      if (!sectors.add(sector)) continue;
      lines.add(sector / (kLineBytes / kSectorBytes));
      counts.l2_sectors += instruction.kind == AccessKind::kLoad ? new_sectors(sector) : 1;
    }
    counts.global_bytes += request.bytes;
  });
  ++counts.global_requests;
  counts.global_sectors += sectors.size();
  counts.global_lines += lines.size();
}

void BlockCounters::count_shared(CountedInstruction& instruction, const Request& request) {
  Counts& counts = instruction.counts;
  Request relative = request;
  for_each_lane(request.lanes, [&](unsigned lane) {
    relative.address[lane] -= reinterpret_cast<uintptr_t>(shared_);
  });
  const Wavefronts wavefronts = count_wavefronts(relative, instruction.kind);
  ++counts.shared_requests;
  counts.shared_wavefronts += wavefronts.taken;
  counts.shared_conflicts += wavefronts.taken - wavefronts.needed;
  counts.shared_bytes +=
      uint64_t{request.bytes} * static_cast<unsigned>(std::popcount(request.lanes));
}

BlockCounters::Region* BlockCounters::region_of(uintptr_t address) {
  constexpr uintptr_t kPageBytes = 4096;
  const uintptr_t page = address / kPageBytes;
  Recent& recent = recent_[page % recent_.size()];
  if (recent.page == page) return recent.region;
  recent = {page, nullptr};
  size_t bytes = 0;
  const std::byte* begin = find_allocation(reinterpret_cast<const void*>(address), &bytes);
  if (begin == nullptr) return nullptr;
  for (Region* region : regions_) {
    if (region->begin == begin) return recent.region = region;
  }
  auto* region = new Region{begin, bytes, std::vector<uint32_t>(bytes / kSectorBytes + 2)};
  regions_.push_back(region);
  return recent.region = region;
}

uint64_t BlockCounters::new_sectors(uintptr_t sector) {
  Region* region = region_of(sector * kSectorBytes);
  if (region == nullptr) return 1;  // it begins before the allocation does
  const uintptr_t first = reinterpret_cast<uintptr_t>(region->begin) / kSectorBytes;
  uint32_t& loaded_by = region->loaded_by[sector - first];
  return std::exchange(loaded_by, block_) != block_;
}

void BlockCounters::warp_executes(const char* what, const char* file, int line, unsigned lanes,
                                  uint64_t flop) {
  Counts& counts = instructions_[index_of({what, file, line, AccessKind::kNone})].counts;
  ++counts.executed;
  counts.threads += lanes;
  counts.flop += flop;
}

void BlockCounters::product(const char* what, const char* file, int line, size_t shared_bytes,
                            uint64_t flop) {
  Counts& counts = instructions_[index_of({what, file, line, AccessKind::kProduct})].counts;
  counts.flop += flop;
  ++counts.shared_requests;
  counts.shared_wavefronts += shared_bytes / kLineBytes;
  counts.shared_bytes += shared_bytes;
}

Counts& BlockCounters::bulk_copy(AccessKind kind, size_t bytes, const char* what, const char* file,
                                 int line) {
  Counts& counts = instructions_[index_of({what, file, line, kind})].counts;
  ++counts.executed;
  ++counts.threads;
  ++counts.global_requests;
  ++counts.shared_requests;
  counts.shared_wavefronts += (bytes + kLineBytes - 1) / kLineBytes;
  counts.shared_bytes += bytes;
  last_sector_ = last_line_ = 0;
  return counts;
}

void BlockCounters::bulk_piece(Counts& counts, const void* address, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(address), last = first + bytes - 1;
  for (uintptr_t sector = first / kSectorBytes; sector <= last / kSectorBytes; ++sector) {
    if (std::exchange(last_sector_, sector) == sector) continue;
    ++counts.global_sectors;
    ++counts.l2_sectors;
    const uintptr_t line = sector / (kLineBytes / kSectorBytes);
    counts.global_lines += std::exchange(last_line_, line) != line;
  }
  counts.global_bytes += bytes;
}

void BlockCounters::add_to(std::vector<CountedInstruction>& instructions) const {
  for (CountedInstruction one : instructions_) {
    if (one.line < 0) {  // the source of a cp.async
      one.line = -one.line;
      one.counts.executed = one.counts.threads = 0;
    }
    const auto same = [&](const CountedInstruction& other) {
      const auto equal = [](const char* a, const char* b) {
        return a == b || (a != nullptr && b != nullptr && std::strcmp(a, b) == 0);
      };
      return one.code == other.code && one.line == other.line && one.kind == other.kind &&
             equal(one.what, other.what) && equal(one.file, other.file);
    };
    const auto found = std::find_if(instructions.begin(), instructions.end(), same);
    if (found == instructions.end()) {
      instructions.push_back(one);
    } else {
      found->counts += one.counts;
    }
  }
}

}  // namespace detail
}  // namespace gpu_model
