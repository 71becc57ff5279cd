// Lanes of a warp run one after the other here, and together on a GPU. So what the lanes of one pass
// do at the same place is one event, as if they had; and what a warp does in a row, alike, is one
// event with a count. Both leave the order alone wherever anyone else could see it: an effect on
// others (a phase that completes, a copy that lands) ends what can be joined.
#include "reference/gpu_model/recording.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <mutex>
#include <utility>

#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/source_line.h"

namespace gpu_model {
namespace {

/// How an event of one kind is written: [kind, block, fields...].
struct Format {
  const char* fields;    ///< The kind's name, then those of the fields after it.
  bool by_warp = false;  ///< Whether warp and lanes come first,
  bool placed = false;   ///< then the place,
  size_t keys = 0;       ///< then so many of Event::key,
  bool sums = false;     ///< the sum,
  size_t lasts = 0;      ///< so many of `last`,
  bool reads = false;    ///< what is read,
  bool writes = false;   ///< and what is written.
};

using detail::Multiprocessor;
using detail::Wait;

constexpr Format kFormats[] = {
    {.fields = "begin block threads", .keys = 1},
    {.fields = "end block"},
    {.fields = "return block warp lanes", .by_warp = true},
    {.fields = "run block warp lanes place count reads writes",
     .by_warp = true,
     .placed = true,
     .sums = true,
     .reads = true,
     .writes = true},
    {.fields = "meet block warp lanes place barrier generation expected waits arrived",
     .by_warp = true,
     .placed = true,
     .keys = 4,
     .lasts = 1},
    {.fields = "met block barrier generation released", .keys = 3},
    {.fields = "warp_wait block warp lanes place", .by_warp = true, .placed = true},
    {.fields = "mbarrier block warp lanes place offset count",
     .by_warp = true,
     .placed = true,
     .keys = 2},
    {.fields = "arrive block warp lanes place at offset phase bytes pending missing",
     .by_warp = true,
     .placed = true,
     .keys = 3,
     .sums = true,
     .lasts = 2},
    {.fields = "phase block offset phase released", .keys = 3},
    {.fields = "wait block warp lanes place offset phase",
     .by_warp = true,
     .placed = true,
     .keys = 2},
    {.fields = "pass block warp lanes place offset phase",
     .by_warp = true,
     .placed = true,
     .keys = 2},
    {.fields = "copy block warp lanes place copy group at barrier from bytes reads writes",
     .by_warp = true,
     .placed = true,
     .keys = 5,
     .sums = true,
     .reads = true,
     .writes = true},
    {.fields = "land block copy phase pending missing", .keys = 4},
    {.fields = "commit block warp lanes place group", .by_warp = true, .placed = true, .keys = 1},
    {.fields = "settle block warp lanes place group allowed count",
     .by_warp = true,
     .placed = true,
     .keys = 2,
     .sums = true},
    {.fields = "product block warp lanes place columns count reads",
     .by_warp = true,
     .placed = true,
     .keys = 1,
     .sums = true,
     .reads = true},
    {.fields = "registers block warp lanes place registers wanted free",
     .by_warp = true,
     .placed = true,
     .keys = 3},
    {.fields = "grant block warp registers free", .keys = 3},
    {.fields = "cluster_arrive block warp lanes place phase pending",
     .by_warp = true,
     .placed = true,
     .keys = 1,
     .lasts = 1},
    {.fields = "cluster_wait block warp lanes place phase waits",
     .by_warp = true,
     .placed = true,
     .keys = 2},
    {.fields = "cluster_met block phase released", .keys = 2},
    {.fields = "counter_wait block warp lanes place counter wanted holds",
     .by_warp = true,
     .placed = true,
     .keys = 2,
     .lasts = 1},
    {.fields = "counter_met block warp lanes counter holds",
     .by_warp = true,
     .keys = 1,
     .lasts = 1},
    {.fields = "counter block warp lanes place counter value",
     .by_warp = true,
     .placed = true,
     .keys = 1,
     .lasts = 1},
};

void append(std::string& text, int64_t value) {
  char digits[24];
  text.append(digits, std::to_chars(digits, std::end(digits), value).ptr);
}

/// As a JSON string. Names and messages hold no control characters but line breaks.
void append(std::string& text, std::string_view value) {
  text += '"';
  for (const char c : value) {
    if (c == '"' || c == '\\') text += '\\';
    text += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  text += '"';
}

void append_list(std::string& text, const std::vector<std::string>& items) {
  for (size_t i = 0; i < items.size(); ++i) text += (i == 0 ? "\n" : ",\n") + items[i];
}

/// "[begin, end, begin, end]", neighbours joined.
std::string text_of(std::vector<std::pair<uint32_t, uint32_t>>& ranges) {
  std::sort(ranges.begin(), ranges.end());
  std::string text = "[";
  for (size_t i = 0; i < ranges.size();) {
    auto [begin, end] = ranges[i];
    for (; i < ranges.size() && ranges[i].first <= end; ++i) end = std::max(end, ranges[i].second);
    if (text.back() != '[') text += ',';
    append(text, int64_t{begin});
    text += ',';
    append(text, int64_t{end});
  }
  return text + ']';
}

/// source_line(), which takes a while, of code that may have been asked for before.
std::string known_source_line(const void* code) {
  static std::mutex mutex;
  static std::map<const void*, std::string> known;
  const std::scoped_lock lock(mutex);
  std::string& line = known[code];
  if (line.empty()) line = detail::source_line(code);
  return line;
}

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "[" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + "]";
}

}  // namespace

Recording::Recording(RecordingOptions options) : options_(std::move(options)) {}

bool Recording::Event::fits(const Event& other) const {
  return !alone && !other.alone && kind == other.kind && block == other.block &&
         warp == other.warp && place == other.place && key == other.key;
}

bool Recording::Event::counts_with(const Event& other) const {
  if (kind != other.kind || kFormats[static_cast<size_t>(kind)].lasts == 0) return false;
  return key[0] == other.key[0] && (kind != Kind::kArrive || key[1] == other.key[1]);
}

void Recording::Event::add(const Event& other) {
  lanes |= other.lanes;
  sum += other.sum;
  last = other.last;
  reads.insert(reads.end(), other.reads.begin(), other.reads.end());
  writes.insert(writes.end(), other.writes.begin(), other.writes.end());
}

int Recording::place(std::string_view what, std::string_view file, int line) {
  auto known = files_.find(file);
  if (known == files_.end()) {
    known = files_.emplace(std::string(file), static_cast<int>(files_.size())).first;
  }
  const auto number = static_cast<int>(places_.size());
  return places_.try_emplace({std::string(what), known->second, line}, number).first->second;
}

int Recording::place(const Wait& wait) {
  return place(wait.what, detail::relative_path(wait.file), wait.line);
}

int Recording::counter_number(const unsigned* counter) {
  const auto [known, is_new] =
      counters_.try_emplace(counter, static_cast<int>(counter_names_.size()));
  if (is_new) counter_names_.push_back(detail::describe_place(counter));
  return known->second;
}

Recording::Event Recording::of_thread(Multiprocessor& block, Kind kind, const Wait& wait) {
  Event event = of_warp(block, kind, wait);
  event.lanes = 1u << block.self().number % warpSize;
  return event;
}

Recording::Event Recording::of_warp(Multiprocessor& block, Kind kind, const Wait& wait) {
  Event event = of_block(block, kind);
  event.warp = static_cast<int>(block.self().number / warpSize);
  event.lanes = 0xffffffff;
  if (wait.what != nullptr) event.place = place(wait);
  return event;
}

Recording::Event Recording::of_block(const Multiprocessor& block, Kind kind) {
  Event event;
  event.kind = kind;
  event.block = block.recorded_block();
  return event;
}

Recording::WarpState& Recording::warp_of(Multiprocessor& block) {
  return blocks_[block.recorded_block()].warps[block.self().number / warpSize];
}

void Recording::add_by_thread(Event event) {
  const auto lane = static_cast<size_t>(std::countr_zero(event.lanes));
  // A thread that returns changes what a cluster's barrier waits for.
  size_t i = event.kind == Kind::kReturn ? std::max(next_[lane], pass_.size() - !pass_.empty())
                                         : next_[lane];
  for (; i < pass_.size(); ++i) {
    if ((pass_[i].lanes & event.lanes) != 0 || !pass_[i].fits(event)) continue;
    const auto counts = [&](const Event& later) { return later.counts_with(event); };
    if (event.counts_with(event) &&
        std::any_of(pass_.begin() + static_cast<ptrdiff_t>(i) + 1, pass_.end(), counts)) {
      continue;
    }
    pass_[i].add(event);
    next_[lane] = i + 1;
    return;
  }
  pass_.push_back(std::move(event));
  next_[lane] = pass_.size();
}

void Recording::add(Event event) {
  if (!pass_.empty() && event.kind == Kind::kCounterMet && pass_.back().fits(event)) {
    pass_.back().add(event);
    return;
  }
  pass_.push_back(std::move(event));
  next_.fill(pass_.size());
}

void Recording::end_pass() {
  if (pass_warp_ >= 0) {
    WarpState& warp = blocks_[pass_block_].warps[static_cast<size_t>(pass_warp_)];
    for (uint32_t lanes = warp.coming & ~warp.announced; lanes != 0; lanes &= lanes - 1) {
      const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
      Event event;
      event.kind = Kind::kWarpWait;
      event.block = pass_block_;
      event.warp = pass_warp_;
      event.lanes = 1u << lane;
      event.place = warp.places[lane];
      add_by_thread(std::move(event));
    }
    warp.announced = warp.coming;
  }
  for (Event& event : pass_) gather(std::move(event));
  pass_.clear();
  next_.fill(0);
  pass_warp_ = -1;
}

int Recording::ranges_number(std::vector<Range>& ranges) {
  const auto [known, is_new] =
      ranges_.try_emplace(text_of(ranges), static_cast<int>(ranges_.size()));
  if (is_new) ranges_bytes_ += known->first.size();
  return known->second;
}

bool Recording::gathers(const Event& event) {
  return event.kind == Kind::kRun || event.kind == Kind::kProduct ||
         (event.kind == Kind::kCopy && !event.alone);
}

void Recording::gather(Event event) {
  if (!gathers(event)) {
    write_gathered();
    write(event);
    return;
  }
  if (!gathered_.empty() &&
      (gathered_.front().block != event.block || gathered_.front().warp != event.warp)) {
    write_gathered();
  }
  for (size_t i = gathered_.size(); i-- > 0;) {
    Event& other = gathered_[i];
    if (other.lanes == event.lanes && other.fits(event)) {
      other.add(event);
      return;
    }
    // A copy must not come before what came between, if that used the memory that it writes.
    if (event.kind == Kind::kCopy && !(other.reads.empty() && other.writes.empty())) break;
  }
  gathered_.push_back(std::move(event));
}

void Recording::write_gathered() {
  for (Event& event : gathered_) write(event);
  gathered_.clear();
}

void Recording::write(Event& event) {
  if (left_out_ > 0 || events_ == options_.max_events) {
    ++left_out_;
    return;
  }
  const size_t before = text_.size();
  const auto number = [&](int64_t value) {
    text_ += ',';
    append(text_, value);
  };
  const Format& format = kFormats[static_cast<size_t>(event.kind)];
  text_ += events_ == 0 ? "\n[" : ",\n[";
  append(text_, static_cast<int64_t>(event.kind));
  number(event.block);
  if (format.by_warp) {
    number(event.warp);
    number(event.lanes == 0xffffffff ? -1 : int64_t{event.lanes});
  }
  if (format.placed) number(event.place);
  if (event.kind == Kind::kCopy && !event.alone) event.key[0] = static_cast<int64_t>(copies_++);
  for (size_t i = 0; i < format.keys; ++i) number(event.key[i]);
  if (format.sums) number(event.sum);
  for (size_t i = 0; i < format.lasts; ++i) number(event.last[i]);
  if (format.reads && (event.kind != Kind::kRun || !event.reads.empty() || !event.writes.empty())) {
    number(ranges_number(event.reads));
    if (format.writes) number(ranges_number(event.writes));
  }
  text_ += ']';
  if (text_.size() + ranges_bytes_ > options_.max_bytes) {
    text_.resize(before);
    ++left_out_;
    return;
  }
  ++events_;
}

std::string Recording::json(const std::vector<std::pair<std::string, std::string>>& about) {
  end_pass();
  write_gathered();
  std::string file = "{\n\"schema\":\"gpu_model recording\",\n\"version\":";
  append(file, int64_t{kVersion});
  file += ",\n\"about\":{";
  for (size_t i = 0; i < about.size(); ++i) {
    if (i > 0) file += ',';
    append(file, about[i].first);
    file += ':';
    append(file, about[i].second);
  }
  file += "},\n\"error\":";
  append(file, error_);
  file += ",\n\"truncated\":";
  file += left_out_ > 0 ? "true" : "false";
  for (const auto& [name, value] :
       {std::pair("events_kept", events_), std::pair("events_left_out", left_out_),
        std::pair("max_events", options_.max_events),
        std::pair("max_bytes", uint64_t{options_.max_bytes})}) {
    file += std::string(",\n\"") + name + "\":";
    append(file, static_cast<int64_t>(value));
  }
  file += ",\n\"kinds\":[";
  for (const Format& format : kFormats) {
    file += &format == kFormats ? "\n[" : ",\n[";
    const std::string_view fields = format.fields;
    for (size_t begin = 0, end; begin < fields.size(); begin = end + 1) {
      end = std::min(fields.find(' ', begin), fields.size());
      if (begin > 0) file += ',';
      append(file, fields.substr(begin, end - begin));
    }
    file += ']';
  }
  file += "],\n\"files\":[";
  std::vector<std::string> names(files_.size()), places(places_.size()), ranges(ranges_.size());
  std::vector<std::string> counters, blocks;
  for (const auto& [name, number] : files_) append(names[static_cast<size_t>(number)], name);
  append_list(file, names);
  file += "],\n\"places\":[";
  for (const auto& [what, number] : places_) {
    std::string& text = places[static_cast<size_t>(number)];
    append(text += '[', std::get<0>(what));
    text += "," + std::to_string(std::get<1>(what)) + "," + std::to_string(std::get<2>(what)) + "]";
  }
  append_list(file, places);
  file += "],\n\"ranges\":[";
  for (const auto& [text, number] : ranges_) ranges[static_cast<size_t>(number)] = text;
  append_list(file, ranges);
  file += "],\n\"counters\":[";
  for (const std::string& name : counter_names_) append(counters.emplace_back(), name);
  append_list(file, counters);
  file += "],\n\"launches\":[";
  std::vector<std::string> launches;
  for (const auto& [text, regions] : launches_) {
    launches.push_back(text + ",\"regions\":[" + regions + "]}");
  }
  append_list(file, launches);
  file += "],\n\"blocks\":[";
  for (const Block& block : blocks_) {
    const auto [x, y, z] = block.index;
    blocks.push_back("[" + std::to_string(block.launch) + "," + std::to_string(x) + "," +
                     std::to_string(y) + "," + std::to_string(z) + "]");
  }
  append_list(file, blocks);
  return file + "],\n\"events\":[" + text_ + "]\n}\n";
}

// What the model tells.

void Recording::begin_launch(const detail::Launch& launch) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  const dim3 grid = launch.grid, block = launch.block;
  has_spoken_ = false;
  std::string& text = launches_.emplace_back().text;
  text = "{\"seed\":" + std::to_string(launch.seed) +
         ",\"grid\":" + triple(grid.x, grid.y, grid.z) +
         ",\"block\":" + triple(block.x, block.y, block.z) +
         ",\"shared_bytes\":" + std::to_string(launch.shared_bytes) +
         ",\"cooperative\":" + flag(launch.options.cooperative) +
         ",\"cluster\":" + std::to_string(launch.options.cluster) +
         ",\"dependent\":" + flag(launch.options.dependent);
}

void Recording::end_launch(const std::string& error) {
  end_pass();
  if (error_.empty()) error_ = error;
}

bool Recording::wants(const detail::Launch& launch, uint64_t block_number) const {
  return options_.blocks.empty() ||
         std::any_of(options_.blocks.begin(), options_.blocks.end(), [&](uint64_t number) {
           return number / launch.options.cluster == block_number / launch.options.cluster;
         });
}

void Recording::name_regions(const std::byte* shared_memory, const char* names,
                             const detail::NamedRegion* regions, size_t count) {
  std::string& text = launches_.back().regions;
  std::string_view rest = names;
  for (size_t i = 0; i < count; ++i) {
    const size_t end = std::min(rest.find(','), rest.size());
    append(text += i == 0 ? "[" : ",[", rest.substr(0, end));
    rest.remove_prefix(std::min(rest.find_first_not_of(", ", end), rest.size()));
    const auto offset = static_cast<const std::byte*>(regions[i].begin) - shared_memory;
    text += "," + std::to_string(offset) + "," + std::to_string(regions[i].bytes) + "]";
  }
}

unsigned Recording::begin(unsigned x, unsigned y, unsigned z, unsigned threads) {
  end_pass();
  Block& block = blocks_.emplace_back();
  block.launch = launches_.size() - 1;
  block.index = {x, y, z};
  block.warps.resize((threads + warpSize - 1) / warpSize);
  Event event;
  event.kind = Kind::kBegin;
  event.block = static_cast<unsigned>(blocks_.size() - 1);
  event.key[0] = threads;
  const unsigned number = event.block;
  add(std::move(event));
  return number;
}

void Recording::end(const Multiprocessor& block) {
  end_pass();
  add(of_block(block, Kind::kEnd));
  blocks_[block.recorded_block()].warps = {};
}

void Recording::begin_pass(const Multiprocessor& block, unsigned warp) {
  end_pass();
  pass_block_ = block.recorded_block();
  pass_warp_ = static_cast<int>(warp);
}

void Recording::returned(Multiprocessor& block) {
  add_by_thread(of_thread(block, Kind::kReturn, {}));
}

void Recording::run(Multiprocessor& block, const Wait& wait) {
  Event event = of_thread(block, Kind::kRun, wait);
  event.sum = 1;
  add_by_thread(std::move(event));
}

void Recording::come(Multiprocessor& block, const Wait& wait) {
  WarpState& warp = warp_of(block);
  const unsigned lane = block.self().number % warpSize;
  warp.coming |= 1u << lane;
  warp.places[lane] = place(wait);
}

void Recording::ran(Multiprocessor& block, unsigned mask, const Wait& wait) {
  WarpState& warp = warp_of(block);
  warp.coming &= ~mask;
  warp.announced &= ~mask;
  if (std::exchange(has_spoken_, false)) return;
  Event event = of_warp(block, Kind::kRun, wait);
  event.lanes = mask;
  event.sum = 1;
  event.reads = std::exchange(warp.reads, {});
  event.writes = std::exchange(warp.writes, {});
  add(std::move(event));
}

void Recording::access(Multiprocessor& block, size_t offset, size_t bytes, bool writes) {
  WarpState& warp = warp_of(block);
  (writes ? warp.writes : warp.reads)
      .emplace_back(static_cast<uint32_t>(offset), static_cast<uint32_t>(offset + bytes));
}

void Recording::plain_access(Multiprocessor& block, const void* code, size_t offset, size_t bytes,
                             bool reads, bool writes) {
  const int kind = (reads ? 1 : 0) + (writes ? 2 : 0);
  auto known = code_places_.find({code, kind});
  if (known == code_places_.end()) {
    const std::string line = known_source_line(code);  // "path:41"
    const size_t colon = line.rfind(':');
    int number = 0;
    if (colon != line.npos) {
      std::from_chars(line.data() + colon + 1, line.data() + line.size(), number);
    }
    const char* const names[] = {"", "load", "store", "atomic"};
    known = code_places_
                .emplace(std::pair(code, kind),
                         place(names[kind], std::string_view(line).substr(0, colon), number))
                .first;
  }
  Event event = of_thread(block, Kind::kRun, {});
  event.place = known->second;
  event.sum = 1;
  const Range range(static_cast<uint32_t>(offset), static_cast<uint32_t>(offset + bytes));
  if (reads) event.reads = {range};
  if (writes) event.writes = {range};
  add_by_thread(std::move(event));
}

void Recording::meet(Multiprocessor& block, const Wait& wait, unsigned expected, bool waits,
                     unsigned arrived) {
  Event event = of_thread(block, Kind::kMeet, wait);
  const uint64_t generation = blocks_[event.block].generations[static_cast<size_t>(wait.barrier)];
  event.key = {wait.barrier, static_cast<int64_t>(generation), expected, waits};
  event.last[0] = arrived;
  add_by_thread(std::move(event));
}

void Recording::met(const Multiprocessor& block, int barrier, size_t released) {
  Event event = of_block(block, Kind::kMet);
  uint64_t& generation = blocks_[event.block].generations[static_cast<size_t>(barrier)];
  event.key = {barrier, static_cast<int64_t>(generation++), static_cast<int64_t>(released)};
  add(std::move(event));
}

void Recording::mbarrier(Multiprocessor& block, const Wait& wait, int count) {
  Event event = of_thread(block, Kind::kMbarrier, wait);
  event.key = {wait.mbarrier, count};
  event.alone = true;
  add_by_thread(std::move(event));
}

void Recording::arrive(Multiprocessor& block, const Wait& wait, const Multiprocessor& at,
                       const detail::MbarrierState& barrier, int64_t bytes) {
  Event event = of_thread(block, Kind::kArrive, wait);
  event.key = {at.recorded_block(), static_cast<int64_t>(barrier.offset),
               static_cast<int64_t>(barrier.phase)};
  event.sum = bytes;
  event.last = {int64_t{barrier.pending} - 1, barrier.bytes + bytes};
  add_by_thread(std::move(event));
}

void Recording::phase(const Multiprocessor& block, const detail::MbarrierState& barrier,
                      size_t released) {
  Event event = of_block(block, Kind::kPhase);
  event.key = {static_cast<int64_t>(barrier.offset), static_cast<int64_t>(barrier.phase) - 1,
               static_cast<int64_t>(released)};
  add(std::move(event));
}

void Recording::wait(Multiprocessor& block, const Wait& wait, uint64_t phase) {
  Event event = of_thread(block, Kind::kWait, wait);
  event.key = {wait.mbarrier, static_cast<int64_t>(phase)};
  add_by_thread(std::move(event));
}

void Recording::pass(Multiprocessor& block, const Wait& wait, uint64_t phase) {
  Event event = of_thread(block, Kind::kPass, wait);
  event.key = {wait.mbarrier, static_cast<int64_t>(phase)};
  add_by_thread(std::move(event));
}

void Recording::copy(Multiprocessor& block, const Wait& wait, size_t offset) {
  constexpr size_t kBytes = sizeof(detail::Granule);
  Event event = of_thread(block, Kind::kCopy, wait);
  event.key = {0, static_cast<int64_t>(Group::kCopies), event.block, -1, -1};
  event.sum = kBytes;
  event.writes = {{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset + kBytes)}};
  add_by_thread(std::move(event));
}

void Recording::copy(Multiprocessor& block, const Multiprocessor& at, detail::BulkCopy& copy,
                     bool stores) {
  Event event = of_thread(block, Kind::kCopy, {copy.what, copy.file, copy.line});
  event.alone = true;
  copy.number = copies_++;
  const auto range = [&](size_t offset) {
    return Range(static_cast<uint32_t>(offset), static_cast<uint32_t>(offset + copy.bytes));
  };
  const bool reads = stores || copy.source != nullptr;
  event.key = {static_cast<int64_t>(copy.number),
               stores ? static_cast<int64_t>(Group::kStores) : -1,
               stores ? -1 : int64_t{at.recorded_block()},
               stores ? -1 : static_cast<int64_t>(copy.barrier), reads ? int64_t{event.block} : -1};
  event.sum = static_cast<int64_t>(copy.bytes);
  if (reads) event.reads = {range(stores ? copy.offset : copy.source_offset)};
  if (!stores) event.writes = {range(copy.offset)};
  add_by_thread(std::move(event));
}

void Recording::land(const Multiprocessor& block, const detail::BulkCopy& copy, uint64_t phase,
                     unsigned pending, int64_t missing) {
  Event event = of_block(block, Kind::kLand);
  event.key = {static_cast<int64_t>(copy.number), static_cast<int64_t>(phase), pending, missing};
  add(std::move(event));
}

void Recording::commit(Multiprocessor& block, const Wait& wait, Group group) {
  const bool by_warp = group == Group::kProducts;
  Event event =
      by_warp ? of_warp(block, Kind::kCommit, wait) : of_thread(block, Kind::kCommit, wait);
  event.key[0] = static_cast<int64_t>(group);
  if (by_warp) {
    has_spoken_ = true;
    add(std::move(event));
  } else {
    add_by_thread(std::move(event));
  }
}

void Recording::settle(Multiprocessor& block, const Wait& wait, Group group, size_t allowed,
                       size_t count) {
  const bool by_warp = group == Group::kProducts;
  Event event =
      by_warp ? of_warp(block, Kind::kSettle, wait) : of_thread(block, Kind::kSettle, wait);
  event.key = {static_cast<int64_t>(group), static_cast<int64_t>(allowed)};
  event.sum = static_cast<int64_t>(count);
  if (by_warp) {
    has_spoken_ = true;
    add(std::move(event));
  } else {
    add_by_thread(std::move(event));
  }
}

void Recording::product(Multiprocessor& block, const Wait& wait, int columns,
                        const uint16_t* granules, size_t count) {
  Event event = of_warp(block, Kind::kProduct, wait);
  event.key[0] = columns;
  event.sum = 1;
  for (size_t i = 0; i < count; ++i) {
    const auto offset = static_cast<uint32_t>(granules[i] * sizeof(detail::Granule));
    event.reads.emplace_back(offset, offset + sizeof(detail::Granule));
  }
  has_spoken_ = true;
  add(std::move(event));
}

void Recording::registers(Multiprocessor& block, const Wait& wait, unsigned registers,
                          unsigned wanted, unsigned free) {
  Event event = of_warp(block, Kind::kRegisters, wait);
  event.key = {registers, wanted, free};
  has_spoken_ = true;
  add(std::move(event));
}

void Recording::grant(const Multiprocessor& block, unsigned warp, unsigned registers,
                      unsigned free) {
  Event event = of_block(block, Kind::kGrant);
  event.key = {warp, registers, free};
  add(std::move(event));
}

void Recording::cluster_arrive(Multiprocessor& block, const Wait& wait, uint64_t phase,
                               unsigned pending) {
  Event event = of_thread(block, Kind::kClusterArrive, wait);
  event.key[0] = static_cast<int64_t>(phase);
  event.last[0] = pending;
  add_by_thread(std::move(event));
}

void Recording::cluster_wait(Multiprocessor& block, const Wait& wait, uint64_t phase, bool waits) {
  Event event = of_thread(block, Kind::kClusterWait, wait);
  event.key = {static_cast<int64_t>(phase), waits};
  add_by_thread(std::move(event));
}

void Recording::cluster_met(const Multiprocessor& block, uint64_t phase, size_t released) {
  Event event = of_block(block, Kind::kClusterMet);
  event.key = {static_cast<int64_t>(phase), static_cast<int64_t>(released)};
  add(std::move(event));
}

void Recording::counter_wait(Multiprocessor& block, const Wait& wait, const unsigned* counter,
                             unsigned wanted, unsigned holds) {
  Event event = of_thread(block, Kind::kCounterWait, wait);
  event.key = {counter_number(counter), wanted};
  event.last[0] = holds;
  add_by_thread(std::move(event));
}

void Recording::counter_met(const Multiprocessor& block, unsigned thread, const unsigned* counter,
                            unsigned holds) {
  Event event = of_block(block, Kind::kCounterMet);
  event.warp = static_cast<int>(thread / warpSize);
  event.lanes = 1u << thread % warpSize;
  event.key[0] = counter_number(counter);
  event.last[0] = holds;
  add(std::move(event));
}

void Recording::counter(Multiprocessor& block, const Wait& wait, const unsigned* counter,
                        unsigned value) {
  Event event = of_thread(block, Kind::kCounter, wait);
  event.key[0] = counter_number(counter);
  event.last[0] = value;
  add_by_thread(std::move(event));
}

}  // namespace gpu_model
