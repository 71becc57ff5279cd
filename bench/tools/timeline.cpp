#include "bench/tools/timeline.h"

#include <fmt/format.h>
#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace mla::bench {
namespace {

struct Look {
  const char* name;
  const char* colour;  // of a middle lightness: on white and on black alike
};
constexpr Look kLooks[timeline::kPhases] = {
    {"idle", "none"},          {"wait for copy", "#8a8a8a"},
    {"Q K^T", "#3b7dd8"},      {"softmax", "#d9822b"},
    {"P V", "#2e9e5b"},        {"wait for other", "#b5b5b5"},
    {"rescale O", "#c94f7c"},  {"write out", "#8e63ce"},
    {"issue copy", "#1aa3a3"}, {"wait for slot", "#6b7785"}};
constexpr const char* kTrackNames[timeline::kTracks] = {"warpgroup 0", "warpgroup 1", "TMA"};

/// Appends to a string.
template <typename... Values>
void print(std::string* text, fmt::format_string<Values...> format, Values&&... values) {
  fmt::format_to(std::back_inserter(*text), format, std::forward<Values>(values)...);
}

/// For XML.
std::string escape(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '&' || c == '<' || c == '>') {
      result += c == '&' ? "&amp;" : c == '<' ? "&lt;" : "&gt;";
    } else if (static_cast<unsigned char>(c) >= ' ') {
      result += c;
    }
  }
  return result;
}

/// 1, 2 or 5 times a power of ten: about `count` of them make `length`.
double tick_of(double length, int count) {
  const double power = std::pow(10, std::floor(std::log10(length / count)));
  const double ratio = length / count / power;
  return power * (ratio > 5 ? 10 : ratio > 2 ? 5 : ratio > 1 ? 2 : 1);
}

bool at_product(const Interval& interval) {
  return interval.track != Track::kTma &&
         (interval.in_flight || interval.phase == Phase::kQk || interval.phase == Phase::kPv);
}

uint64_t first_clock(const BlockTimeline& timeline) {
  uint64_t first = std::numeric_limits<uint64_t>::max();
  for (const Interval& interval : timeline.intervals) first = std::min(first, interval.begin);
  return first;
}

}  // namespace

const char* name_of(Phase phase) {
  return kLooks[static_cast<int>(phase)].name;
}
const char* name_of(Track track) {
  return kTrackNames[static_cast<int>(track)];
}

Status read_timelines(const std::vector<timeline::Record>& records, const std::vector<int>& blocks,
                      std::vector<BlockTimeline>* result) {
  std::vector<uint64_t> starts;  // ns
  for (const int block : blocks) {
    BlockTimeline timeline;
    timeline.block = block;
    uint64_t start_ns = 0, start_clock = std::numeric_limits<uint64_t>::max(), last_clock = 0;
    const auto record_of = [&](int track) -> const timeline::Record& {
      return records[static_cast<size_t>(block) * timeline::kTracks + static_cast<size_t>(track)];
    };
    for (int i = 0; i < timeline::kTracks; ++i) {
      const timeline::Record& record = record_of(i);
      if (record.count == 0) continue;
      timeline.multiprocessor = static_cast<int>(record.multiprocessor);
      if (record.begin_clock < start_clock) {
        start_clock = record.begin_clock;
        start_ns = record.begin_ns;
      }
      if (record.end_clock > last_clock && record.end_ns > record.begin_ns) {
        last_clock = record.end_clock;
        timeline.clocks_per_us = 1e3 * double(record.end_clock - record.begin_clock) /
                                 double(record.end_ns - record.begin_ns);
      }
    }
    if (timeline.clocks_per_us <= 0) {
      return {StatusCode::kInvalidArgument,
              "block " + std::to_string(block) +
                  " left no record: is the grid as large, and does the kernel call timeline::end?"};
    }
    for (int i = 0; i < timeline::kTracks; ++i) {
      const timeline::Record& record = record_of(i);
      const uint64_t kept = std::min<uint64_t>(record.count, timeline::Record::kCapacity);
      timeline.lost += record.count - kept;
      for (uint64_t n = 0; n + 1 < kept; ++n) {
        const uint64_t event = record.events[n], next = record.events[n + 1];
        const uint64_t phase = event & 127;
        if (phase >= timeline::kPhases) {
          return {StatusCode::kInvalidArgument,
                  "an event of unknown phase " + std::to_string(phase)};
        }
        timeline.clocks = std::max(timeline.clocks, (next >> 8) - start_clock);
        if (phase == 0 && (event & 128) == 0) continue;
        timeline.intervals.push_back({static_cast<Track>(i), static_cast<Phase>(phase),
                                      (event >> 8) - start_clock, (next >> 8) - start_clock,
                                      (event & 128) != 0});
      }
    }
    starts.push_back(start_ns);
    result->push_back(std::move(timeline));
  }
  for (size_t i = 0; i < starts.size(); ++i) {
    (*result)[i].start_us =
        double(starts[i] - *std::min_element(starts.begin(), starts.end())) / 1e3;
  }
  return {};
}

BlockTimeline cut(const BlockTimeline& timeline, double from_us, double to_us) {
  BlockTimeline result = timeline;
  result.intervals.clear();
  const auto clock_at = [&](double us) {
    return static_cast<uint64_t>(
        std::clamp(us * timeline.clocks_per_us, 0.0, static_cast<double>(timeline.clocks)));
  };
  const uint64_t from = clock_at(from_us), to = clock_at(to_us);
  for (Interval interval : timeline.intervals) {
    interval.begin = std::max(interval.begin, from);
    interval.end = std::min(interval.end, to);
    if (interval.begin < interval.end) result.intervals.push_back(interval);
  }
  result.clocks = to;
  return result;
}

std::string chrome_trace(const std::vector<BlockTimeline>& timelines, const std::string& title) {
  using Json = nlohmann::ordered_json;
  Json events = Json::array();
  const auto name = [&](const char* what, int block, const std::string& text) -> Json& {
    events.push_back({{"ph", "M"}, {"name", what}, {"pid", block}, {"args", {{"name", text}}}});
    return events.back();
  };
  const auto us_of = [](const BlockTimeline& timeline, uint64_t clocks) {
    return std::round(1e4 * double(clocks) / timeline.clocks_per_us) / 1e4;
  };
  for (const BlockTimeline& timeline : timelines) {
    name("process_name", timeline.block,
         fmt::format("block {}, multiprocessor {}", timeline.block, timeline.multiprocessor));
    for (int i = 0; i < timeline::kTracks; ++i) {
      name("thread_name", timeline.block, kTrackNames[i])["tid"] = i;
    }
    for (const Interval& interval : timeline.intervals) {
      const uint64_t clocks = interval.end - interval.begin;
      Json arguments{{"clock", interval.begin}, {"clocks", clocks}};
      if (interval.in_flight) arguments["product in flight"] = true;
      events.push_back({{"ph", "X"},
                        {"name", name_of(interval.phase)},
                        {"pid", timeline.block},
                        {"tid", static_cast<int>(interval.track)},
                        {"ts", timeline.start_us + us_of(timeline, interval.begin)},
                        {"dur", us_of(timeline, clocks)},
                        {"args", std::move(arguments)}});
    }
  }
  const Json trace{
      {"displayTimeUnit", "ns"}, {"otherData", {{"title", title}}}, {"traceEvents", events}};
  return trace.dump() + "\n";
}

std::string svg(const std::vector<BlockTimeline>& timelines, const std::string& title) {
  constexpr double kLeft = 100, kWidth = 1300, kLane = 30, kTop = 66;
  constexpr double kBlock = timeline::kTracks * kLane + 76;
  std::string text = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0f} {:.0f}\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n"
      "<style>svg{{background:#fff}} text{{fill:#222}} .l{{stroke:#8884}}\n"
      "@media (prefers-color-scheme:dark){{svg{{background:#111}} text{{fill:#ddd}}}}",
      kLeft + kWidth + 30, kTop + kBlock * double(timelines.size()));
  for (int i = 0; i < timeline::kPhases; ++i) {
    print(&text, " .p{}{{fill:{}}}", i, kLooks[i].colour);
  }
  print(&text, "</style>\n<text x=\"10\" y=\"22\" font-size=\"15\">{}</text>\n", escape(title));
  for (int i = 1; i < timeline::kPhases; ++i) {
    print(&text,
          "<rect class=\"p{0}\" x=\"{1}\" y=\"34\" width=\"12\" height=\"12\"/>"
          "<text x=\"{2}\" y=\"44\">{3}</text>\n",
          i, 140 * i - 130, 140 * i - 113, kLooks[i].name);
  }
  double top = kTop;
  for (const BlockTimeline& timeline : timelines) {
    const uint64_t first = timeline.intervals.empty() ? 0 : first_clock(timeline);
    const double length = std::max(1.0, double(timeline.clocks) - double(first));
    const auto place = [&](double clock) {
      return kLeft + (clock - double(first)) / length * kWidth;
    };
    print(&text, "<text x=\"10\" y=\"{:.0f}\">block {}, multiprocessor {}, {:.0f} MHz</text>\n",
          top + 12, timeline.block, timeline.multiprocessor, timeline.clocks_per_us);
    top += 20;
    for (int i = 0; i < timeline::kTracks; ++i) {
      print(&text, "<text x=\"10\" y=\"{:.0f}\">{}</text>\n", top + i * kLane + 19, kTrackNames[i]);
    }
    for (const Interval& interval : timeline.intervals) {
      const double x = place(double(interval.begin)), wide = place(double(interval.end)) - x;
      const double lane = top + static_cast<int>(interval.track) * kLane;
      print(
          &text,
          "<rect class=\"p{}\" x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"{:.0f}\"><title>"
          "{}: {} clocks, {} to {}</title></rect>\n",
          static_cast<int>(interval.phase), x, lane + 3, wide, kLane - 6, name_of(interval.phase),
          interval.end - interval.begin, interval.begin, interval.end);
      if (interval.in_flight) {  // a line below, in the colour of a product
        print(&text,
              "<rect class=\"p2\" x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"3\"/>\n", x,
              lane + kLane - 3, wide);
      }
    }
    top += timeline::kTracks * kLane;
    // Two axes: clocks, then us, of the same time.
    for (const bool us : {false, true}) {
      const double unit = us ? timeline.clocks_per_us : 1;
      const double tick = tick_of(length / unit, 10);
      const double y = us ? top + 32 : top + 16;
      print(&text, "<text x=\"10\" y=\"{:.0f}\">{}</text>\n", y, us ? "µs" : "clocks");
      for (double t = std::ceil(double(first) / unit / tick) * tick;
           t * unit <= double(first) + length; t += tick) {
        const double x = place(t * unit);
        if (!us) {
          print(&text,
                "<line class=\"l\" x1=\"{0:.2f}\" x2=\"{0:.2f}\" y1=\"{1:.0f}\" y2=\"{2:.0f}\"/>\n",
                x, top - timeline::kTracks * kLane, top + 4);
        }
        print(&text, "<text x=\"{:.2f}\" y=\"{:.0f}\" text-anchor=\"middle\">{:g}</text>\n", x, y,
              t);
      }
    }
    top += kBlock - 20 - timeline::kTracks * kLane;
  }
  return text + "</svg>\n";
}

uint64_t bubble_clocks(const BlockTimeline& timeline, uint64_t* window) {
  std::vector<Interval> products;
  std::copy_if(timeline.intervals.begin(), timeline.intervals.end(), std::back_inserter(products),
               at_product);
  std::sort(products.begin(), products.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  uint64_t bubble = 0, end = products.empty() ? 0 : products.front().begin;
  for (const Interval& product : products) {
    if (product.begin > end) bubble += product.begin - end;
    end = std::max(end, product.end);
  }
  if (window != nullptr) *window = products.empty() ? 0 : end - products.front().begin;
  return bubble;
}

std::string summary(const BlockTimeline& timeline) {
  std::string text;
  const uint64_t first = timeline.intervals.empty() ? 0 : first_clock(timeline);
  const double length = std::max(1.0, double(timeline.clocks) - double(first));
  print(&text, "block {}, multiprocessor {}: {:.0f} clocks, {:.2f} us at {:.0f} MHz\n",
        timeline.block, timeline.multiprocessor, length, length / timeline.clocks_per_us,
        timeline.clocks_per_us);
  for (int i = 0; i < timeline::kTracks; ++i) {
    double spent[timeline::kPhases] = {};
    std::vector<uint64_t> tiles;  // where Q K^T begins
    for (const Interval& interval : timeline.intervals) {
      if (interval.track != static_cast<Track>(i)) continue;
      spent[static_cast<int>(interval.phase)] += double(interval.end - interval.begin);
      if (interval.phase == Phase::kQk) tiles.push_back(interval.begin);
    }
    print(&text, "  {:12}", kTrackNames[i]);
    for (int phase = 1; phase < timeline::kPhases; ++phase) {
      if (spent[phase] > 0) {
        print(&text, " {} {:.1f}%,", kLooks[phase].name, 100 * spent[phase] / length);
      }
    }
    for (size_t n = 0; n + 1 < tiles.size(); ++n) tiles[n] = tiles[n + 1] - tiles[n];
    if (tiles.size() > 1) {
      tiles.pop_back();
      std::nth_element(tiles.begin(), tiles.begin() + std::ptrdiff_t(tiles.size() / 2),
                       tiles.end());
      print(&text, " a tile every {} clocks,", tiles[tiles.size() / 2]);
    }
    text.back() = '\n';
  }
  uint64_t window = 0;
  const uint64_t bubble = bubble_clocks(timeline, &window);
  print(&text, "  no product in flight: {} of {} clocks, {:.1f}%\n", bubble, window,
        window > 0 ? 100 * double(bubble) / double(window) : 0.0);
  if (timeline.lost > 0) {
    print(&text, "  {} events were lost: a record holds {} per track\n", timeline.lost,
          static_cast<int>(timeline::Record::kCapacity));
  }
  return text;
}

}  // namespace mla::bench
