#include "bench/tools/chrome_recording.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>
#include <vector>

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

/// A slice that has begun.
struct Slice {
  std::string name;
  int64_t begin = 0, thread = 0, block = 0;
  Json arguments;
};

class Trace {
 public:
  explicit Trace(const Json& file) : file_(file) {
    for (const Json& block : file.at("blocks")) {
      const Json& launch = file.at("launches").at(block[0].get<size_t>());
      const auto number = static_cast<int64_t>(regions_.size());
      regions_.push_back(&launch.at("regions"));
      name("process_name", number, -1,
           "launch " + block[0].dump() + ", block (" + block[1].dump() + "," + block[2].dump() +
               "," + block[3].dump() + ")");
      int64_t threads = 1;
      for (const Json& size : launch.at("block")) threads *= size.get<int64_t>();
      for (int64_t warp = 0; warp * 32 < threads; ++warp) {
        name("thread_name", number, warp, "warp " + std::to_string(warp));
      }
    }
  }

  Json run() {
    for (const Json& event : file_.at("events")) {
      const Json& fields = file_.at("kinds").at(event.at(0).get<size_t>());
      Json named = Json::object();
      for (size_t i = 1; i < event.size(); ++i) named[fields.at(i).get<std::string>()] = event[i];
      step(fields.at(0), named);
      ++now_;
    }
    while (!waits_.empty()) end_wait(waits_.begin(), "nothing");
    while (!copies_.empty()) end_copy(copies_.begin());
    return std::move(events_);
  }

 private:
  void name(const char* what, int64_t block, int64_t thread, const std::string& text) {
    Json event{{"ph", "M"}, {"name", what}, {"pid", block}, {"args", {{"name", text}}}};
    if (thread >= 0) event["tid"] = thread;
    events_.push_back(std::move(event));
  }

  /// "full+8" for a byte of shared memory.
  std::string place_in(int64_t block, int64_t offset) const {
    for (const Json& region : *regions_.at(static_cast<size_t>(block))) {
      const int64_t distance = offset - region[1].get<int64_t>();
      if (distance < 0 || distance >= region[2].get<int64_t>()) continue;
      return region[0].get<std::string>() + (distance == 0 ? "" : "+" + std::to_string(distance));
    }
    return "byte " + std::to_string(offset);
  }

  void emit(Slice slice, int64_t end) {
    events_.push_back({{"ph", "X"},
                       {"name", std::move(slice.name)},
                       {"pid", slice.block},
                       {"tid", slice.thread},
                       {"ts", slice.begin},
                       {"dur", std::max<int64_t>(1, end - slice.begin)},
                       {"args", std::move(slice.arguments)}});
  }

  using Waits = std::multimap<std::string, Slice>;

  void end_wait(Waits::iterator wait, const std::string& released_by) {
    wait->second.arguments["released by"] = released_by;
    emit(std::move(wait->second), now_);
    waits_.erase(wait);
  }
  void end_waits(const std::string& key, const std::string& released_by) {
    for (auto wait = waits_.find(key); wait != waits_.end(); wait = waits_.find(key)) {
      end_wait(wait, released_by);
    }
  }

  using Copies = std::map<int64_t, std::pair<Slice, std::string>>;
  void end_copy(Copies::iterator copy) {
    auto& [slice, engine] = copy->second;
    busy_[{slice.block, engine}][static_cast<size_t>(slice.thread % kLanes)] = false;
    emit(std::move(slice), now_);
    copies_.erase(copy);
  }

  /// A lane that is free, of those of a copy engine.
  int64_t lane_of(int64_t block, const std::string& engine) {
    const auto first =
        engines_.try_emplace(engine, (1 + static_cast<int64_t>(engines_.size())) * kLanes);
    std::vector<bool>& busy = busy_[{block, engine}];
    const auto free = std::find(busy.begin(), busy.end(), false) - busy.begin();
    const int64_t thread = first.first->second + free;
    if (static_cast<size_t>(free) == busy.size()) {
      busy.push_back(true);
      name("thread_name", block, thread, engine + " " + std::to_string(free));
    }
    busy[static_cast<size_t>(free)] = true;
    return thread;
  }

  void step(const std::string& kind, const Json& event) {
    const auto number = [&](const char* field) { return event.at(field).get<int64_t>(); };
    const int64_t block = number("block");
    const auto key = [&](const char* what, std::initializer_list<int64_t> of) {
      std::string text = what;
      for (const int64_t part : of) text += " " + std::to_string(part);
      return text;
    };
    if (kind == "met") {
      return end_waits(key("barrier", {block, number("barrier")}), "the last to arrive");
    }
    if (kind == "phase") {
      return end_waits(key("mbarrier", {block, number("offset")}), "the phase is complete");
    }
    if (kind == "grant")
      return end_waits(key("registers", {block, number("warp")}), "another warp");
    if (kind == "cluster_met") {
      return end_waits(key("cluster", {cluster_of(block)}), "the last to arrive");
    }
    if (kind == "counter_met") {
      return end_waits(key("counter", {block, number("warp"), number("counter")}), "its value");
    }
    if (kind == "land") {
      if (const auto copy = copies_.find(number("copy")); copy != copies_.end()) end_copy(copy);
      return;
    }
    if (!event.contains("place")) return;

    const Json& place = file_.at("places").at(event.at("place").get<size_t>());
    const std::string what = place[0];
    Slice slice{what, now_, number("warp"), block, Json::object()};
    slice.arguments["line"] =
        file_.at("files").at(place[1].get<size_t>()).get<std::string>() + ":" + place[2].dump();
    for (const auto& [field, value] : event.items()) {
      if (field != "block" && field != "warp" && field != "place") slice.arguments[field] = value;
    }
    end_waits(key("warp", {block, slice.thread}), "its other lanes");
    if (kind == "copy") {
      Slice copy = slice;
      const std::string engine = number("group") == 0
                                     ? "cp.async of warp " + std::to_string(slice.thread)
                                 : what.find("bulk") != std::string::npos ? "bulk copies"
                                                                          : "st.async";
      copy.block = number("at") >= 0 ? number("at") : block;
      const Json& writes = file_.at("ranges").at(event.at("writes").get<size_t>());
      if (!writes.empty()) copy.name += " to " + place_in(copy.block, writes[0]);
      copy.thread = lane_of(copy.block, engine);
      if (number("group") == 0) by_warp_[{block, slice.thread}].push_back(number("copy"));
      copies_.emplace(number("copy"), std::pair(std::move(copy), engine));
    } else if (kind == "settle" && number("group") == 0 && number("allowed") == 0) {
      // Exact for a wait for all, and what waits for fewer is then not shown to end before.
      for (const int64_t copy : std::exchange(by_warp_[{block, slice.thread}], {})) {
        if (const auto found = copies_.find(copy); found != copies_.end()) end_copy(found);
      }
    }
    std::string wait;
    if (kind == "wait") {
      slice.name += " " + place_in(block, number("offset"));
      wait = key("mbarrier", {block, number("offset")});
    } else if (kind == "meet" && number("waits") != 0) {
      wait = key("barrier", {block, number("barrier")});
    } else if (kind == "registers" && number("wanted") > 0) {
      wait = key("registers", {block, slice.thread});
    } else if (kind == "cluster_wait" && number("waits") != 0) {
      wait = key("cluster", {cluster_of(block)});
    } else if (kind == "counter_wait") {
      wait = key("counter", {block, slice.thread, number("counter")});
    } else if (kind == "warp_wait") {
      wait = key("warp", {block, slice.thread});
    }
    if (wait.empty()) return emit(std::move(slice), now_ + 1);
    waits_.emplace(wait, std::move(slice));
  }

  /// The number of the first block of a block's cluster.
  int64_t cluster_of(int64_t block) const {
    const auto place = [&](const Json& one) {
      const Json& launch = file_.at("launches").at(one[0].get<size_t>());
      return std::tuple(one[0].get<int64_t>(),
                        one[1].get<int64_t>() / launch.at("cluster").get<int64_t>(),
                        one[2].get<int64_t>(), one[3].get<int64_t>());
    };
    const Json& blocks = file_.at("blocks");
    const auto own = place(blocks.at(static_cast<size_t>(block)));
    return std::find_if(blocks.begin(), blocks.end(),
                        [&](const Json& one) { return place(one) == own; }) -
           blocks.begin();
  }

  static constexpr int64_t kLanes = 100000;  // of an engine, at most

  const Json& file_;
  std::vector<const Json*> regions_;  // by block
  Json events_ = Json::array();
  int64_t now_ = 0;
  Waits waits_;  // by what ends them
  Copies copies_;
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> by_warp_;  // cp.async not waited for
  std::map<std::string, int64_t> engines_;                               // their first threads
  std::map<std::pair<int64_t, std::string>, std::vector<bool>> busy_;
};

}  // namespace

Status chrome_recording(std::string_view json, std::string* trace) {
  try {
    const Json file = Json::parse(json);
    const Json result{{"displayTimeUnit", "ms"},
                      {"otherData",
                       {{"about", file.at("about")},
                        {"time", "one microsecond is one event, because there is no clock"}}},
                      {"traceEvents", Trace(file).run()}};
    *trace = result.dump() + "\n";
  } catch (const std::exception& error) {
    return {StatusCode::kInvalidArgument, std::string("not a recording: ") + error.what()};
  }
  return {};
}

}  // namespace mla::bench
