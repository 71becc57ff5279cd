#include "bench/parallel/rank_timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "bench/measure/table.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

/// CUDA's events are that exact.
constexpr double kEventStepUs = 0.5;

constexpr int kBarriers = 32;

/// The same for all processes that read one clock: it counts from the boot.
std::string name_of_clock() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string name;
  std::getline(file, name);
  return name;
}

/// A rank's intervals, by its own clock.
Status read_phases(const std::vector<TimedMark>& marks, std::vector<PhaseInterval>* intervals) {
  constexpr size_t kNone = SIZE_MAX;
  size_t decode = kNone, exchange = kNone;  // what goes on
  int slice = -1, merged = 0;
  const auto end = [&](size_t* open, double us) {
    if (*open != kNone) (*intervals)[*open].end_us = us;
    *open = kNone;
  };
  for (const auto& [phase, us] : marks) {
    const bool is_exchange = phase == RankPhase::kExchange || phase == RankPhase::kExchanged;
    size_t* open = is_exchange ? &exchange : &decode;
    end(open, us);
    if (phase == RankPhase::kExchanged || phase == RankPhase::kDone) continue;
    if (phase == RankPhase::kCut) ++slice;
    *open = intervals->size();
    intervals->push_back({phase, phase == RankPhase::kMerge ? merged++ : slice, us, us});
  }
  if (marks.empty() || decode != kNone || exchange != kNone) {
    return {StatusCode::kInvalidArgument, "a decode's marks have no end"};
  }
  return {};
}

std::string name_of(const Step& step) {
  return fmt::format("{} of slice {}", to_string(step.phase), step.slice);
}

double rounded(double us) {
  return std::round(1e3 * us) / 1e3;
}

}  // namespace

const char* to_string(RankPhase phase) {
  switch (phase) {
    case RankPhase::kCut:
      return "cut";
    case RankPhase::kBulk:
      return "bulk decode";
    case RankPhase::kTail:
      return "tail decode";
    case RankPhase::kLocalMerge:
      return "local merge";
    case RankPhase::kWait:
      return "wait";
    case RankPhase::kExchange:
      return "exchange";
    case RankPhase::kExchanged:
      return "no exchange";
    case RankPhase::kWeigh:
      return "weigh";
    case RankPhase::kMerge:
      return "merge";
    case RankPhase::kDone:
      break;
  }
  return "done";
}

ClockBounds find_offset(const Barriers& first, const Barriers& other) {
  ClockBounds bounds;
  for (size_t i = 0; i < std::min(first.came_us.size(), other.came_us.size()); ++i) {
    bounds.narrow(first.came_us[i] - other.left_us[i], first.left_us[i] - other.came_us[i]);
  }
  return bounds;
}

Status make_timeline(const std::vector<RankReading>& readings, RanksTimeline* timeline) {
  *timeline = {};
  timeline->is_one_clock = true;
  std::vector<double> uncertain;  // of each rank's times, by rank 0's clock
  double start_us = 1e300;
  for (const RankReading& reading : readings) {
    ClockBounds offset = find_offset(readings[0].barriers, reading.barriers);
    if (&reading == &readings[0]) offset = {0, 0};
    timeline->barrier_us = std::max(timeline->barrier_us, offset.half_width());
    // One clock, unless barriers say otherwise: a container may have its own.
    if (!reading.host.empty() && reading.host == readings[0].host && offset.low <= 0 &&
        offset.high >= 0) {
      offset = {0, 0};
    } else if (&reading != &readings[0]) {
      timeline->is_one_clock = false;
    }
    uncertain.push_back(reading.uncertainty_us + offset.half_width());
    std::vector<PhaseInterval> intervals;
    MLA_RETURN_IF_ERROR(read_phases(reading.marks, &intervals));
    for (PhaseInterval& interval : intervals) {
      interval.begin_us += offset.middle();
      interval.end_us += offset.middle();
      start_us = std::min(start_us, interval.begin_us);
    }
    timeline->ranks.push_back(std::move(intervals));
  }
  std::sort(uncertain.rbegin(), uncertain.rend());
  if (uncertain.size() > 1) timeline->uncertainty_us = uncertain[0] + uncertain[1];
  // All ranks make the same exchanges: the n-th of each is one.
  std::vector<double> last_us;
  for (const bool finds : {true, false}) {
    for (auto& intervals : timeline->ranks) {
      size_t n = 0;
      for (PhaseInterval& interval : intervals) {
        if (finds) {
          interval.begin_us -= start_us;
          interval.end_us -= start_us;
        }
        if (interval.phase != RankPhase::kExchange) continue;
        if (n == last_us.size()) last_us.push_back(interval.begin_us);
        last_us[n] = std::max(last_us[n], interval.begin_us);
        if (!finds) interval.waited_us = last_us[n] - interval.begin_us;
        ++n;
      }
    }
  }
  return {};
}

std::vector<Step> steps_of(int slices, bool has_tail, Exchange exchange) {
  std::vector<Step> steps;
  const auto add = [&](int slice, std::initializer_list<RankPhase> phases) {
    for (const RankPhase phase : phases) steps.push_back({phase, slice});
  };
  for (int slice = 0; slice < slices; ++slice) {
    add(slice, {RankPhase::kCut, RankPhase::kBulk});
    if (has_tail) add(slice, {RankPhase::kTail, RankPhase::kLocalMerge});
    add(slice, {RankPhase::kWait, RankPhase::kExchange});
    if (exchange == Exchange::kReduceScatter) {
      add(slice, {RankPhase::kWeigh, RankPhase::kWait, RankPhase::kExchange});
    }
  }
  for (int slice = 0; slice < slices; ++slice) add(slice, {RankPhase::kMerge});
  return steps;
}

Status check_timeline(const RanksTimeline& timeline, const std::vector<Step>& steps) {
  const auto refuse = [](size_t rank, const std::string& what) {
    return Status(StatusCode::kInvalidArgument, fmt::format("timeline of rank {}: {}", rank, what));
  };
  for (size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    const std::vector<PhaseInterval>& intervals = timeline.ranks[rank];
    if (intervals.size() != steps.size()) {
      return refuse(rank, fmt::format("{} phases, not {}", intervals.size(), steps.size()));
    }
    double decoded_us = -1e300, exchanged_us = -1e300;  // when either stream was free
    for (size_t i = 0; i < steps.size(); ++i) {
      const PhaseInterval& now = intervals[i];
      const Step found{now.phase, now.slice};
      if (found.phase != steps[i].phase || found.slice != steps[i].slice) {
        return refuse(rank,
                      fmt::format("{} where {} should be", name_of(found), name_of(steps[i])));
      }
      if (!(now.end_us >= now.begin_us)) {
        return refuse(rank, fmt::format("{} ends {} µs before it begins", name_of(found),
                                        number(now.begin_us - now.end_us)));
      }
      const bool is_exchange = now.phase == RankPhase::kExchange;
      // What is exchanged is there when the rank begins to wait; then it needs what others sent.
      double ready_us =
          is_exchange ? std::max(intervals[i - 1].begin_us, exchanged_us) : decoded_us;
      if (now.phase == RankPhase::kWeigh || now.phase == RankPhase::kMerge) {
        ready_us = std::max(ready_us, exchanged_us);
      }
      if (!(now.begin_us >= ready_us - kEventStepUs)) {
        return refuse(rank, fmt::format("{} begins {} µs before what it needs is there",
                                        name_of(found), number(ready_us - now.begin_us)));
      }
      (is_exchange ? exchanged_us : decoded_us) = now.end_us;
      const double early_us = now.begin_us + now.waited_us - now.end_us;
      if (is_exchange && !(early_us <= timeline.uncertainty_us + kEventStepUs)) {
        return refuse(
            rank, fmt::format("{} ends {} µs before another rank's begins; clocks are "
                              "brought together to {} µs",
                              name_of(found), number(early_us), number(timeline.uncertainty_us)));
      }
    }
  }
  return {};
}

Status share_readings(Rendezvous& world, RankReading own, std::vector<RankReading>* all) {
  std::vector<std::string> said;
  for (int i = 0; i < kBarriers; ++i) {
    own.barriers.came_us.push_back(host_us());
    MLA_RETURN_IF_ERROR(world.share("", &said));
    own.barriers.left_us.push_back(host_us());
  }
  Json text{{"host", name_of_clock()},
            {"came", own.barriers.came_us},
            {"left", own.barriers.left_us},
            {"uncertainty", own.uncertainty_us},
            {"marks", Json::array()}};
  for (const auto& [phase, us] : own.marks) text["marks"].push_back({static_cast<int>(phase), us});
  MLA_RETURN_IF_ERROR(world.share(text.dump(), &said));
  all->clear();
  for (const std::string& one : said) {
    const Json read = Json::parse(one);
    RankReading reading;
    reading.host = read["host"];
    reading.barriers.came_us = read["came"].get<std::vector<double>>();
    reading.barriers.left_us = read["left"].get<std::vector<double>>();
    reading.uncertainty_us = read["uncertainty"];
    for (const Json& mark : read["marks"]) {
      reading.marks.push_back({static_cast<RankPhase>(mark[0].get<int>()), mark[1].get<double>()});
    }
    all->push_back(std::move(reading));
  }
  return {};
}

Json phases_json(const RanksTimeline& timeline) {
  Json phases = Json::array();
  for (size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    for (const PhaseInterval& one : timeline.ranks[rank]) {
      const bool is_exchange = one.phase == RankPhase::kExchange;
      phases.push_back({{"rank", rank},
                        {"stream", is_exchange ? "exchange" : "decode"},
                        {"phase", to_string(one.phase)},
                        {"slice", one.slice},
                        {"begin_us", rounded(one.begin_us)},
                        {"end_us", rounded(one.end_us)}});
      if (is_exchange) phases.back()["waited_us"] = rounded(one.waited_us);
    }
  }
  return phases;
}

std::string ranks_chrome_trace(const Json& timeline, const Json& context) {
  Json events = Json::array(), about = context;
  for (const auto& [key, value] : timeline.items()) {
    if (key != "phases") about[key] = value;
  }
  const auto name = [&](const char* what, int rank, int thread, const std::string& text) {
    events.push_back(
        {{"ph", "M"}, {"name", what}, {"pid", rank}, {"tid", thread}, {"args", {{"name", text}}}});
  };
  for (int rank = 0; rank < timeline.at("ranks").get<int>(); ++rank) {
    name("process_name", rank, 0, fmt::format("rank {}", rank));
    name("thread_name", rank, 0, "decode");
    name("thread_name", rank, 1, "exchange");
  }
  for (const Json& one : timeline.at("phases")) {
    const double begin = one.at("begin_us"), end = one.at("end_us");
    const bool is_exchange = one.contains("waited_us");
    const auto add = [&](const std::string& phase, double us) {
      events.push_back({{"ph", "X"},
                        {"name", phase},
                        {"pid", one.at("rank")},
                        {"tid", is_exchange ? 1 : 0},
                        {"ts", begin},
                        {"dur", rounded(us)},
                        {"args", {{"slice", one.at("slice")}}}});
    };
    add(one.at("phase"), end - begin);
    if (is_exchange && one.at("waited_us") > 0) {  // the exchange's first part
      add("another rank has not come", std::min(one.at("waited_us").get<double>(), end - begin));
    }
  }
  const Json trace{{"displayTimeUnit", "ns"}, {"otherData", about}, {"traceEvents", events}};
  return trace.dump() + "\n";
}

std::string summary(const RanksTimeline& timeline) {
  const auto us = [](double value) { return fmt::format("{:.2f}", value); };
  Table table({"", "begin", "end", "µs", "waited for others"});
  std::string waits;
  for (size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    double waited = 0, exchanged = 0;
    for (const PhaseInterval& one : timeline.ranks[rank]) {
      const double length = one.end_us - one.begin_us;
      const bool is_exchange = one.phase == RankPhase::kExchange;
      table.add({fmt::format("rank {}, slice {}: {}", rank, one.slice, to_string(one.phase)),
                 us(one.begin_us), us(one.end_us), us(length),
                 is_exchange ? us(one.waited_us) : ""});
      if (!is_exchange) continue;
      waited += std::min(one.waited_us, length);
      exchanged += length;
    }
    waits += fmt::format("rank {} was in exchanges for {} µs, and of these {} waited for others\n",
                         rank, us(exchanged), us(waited));
  }
  return table.to_string() + waits;
}

}  // namespace mla::bench
