// Timelines of ranks: marks to intervals, clocks that differ, what is refused, and real ones of decodes on the model.
#include "bench/parallel/rank_timeline.h"

#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "bench/parallel/parallel_run.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using std::chrono::milliseconds;
using Json = nlohmann::ordered_json;

// Of one slice, with a tail, by all-gather.
std::vector<TimedMark> marks_from(double start, double exchange_begins, double exchange_ends) {
  return {{RankPhase::kCut, start},
          {RankPhase::kBulk, start + 1},
          {RankPhase::kTail, start + 5},
          {RankPhase::kLocalMerge, start + 7},
          {RankPhase::kWait, start + 8},
          {RankPhase::kExchange, exchange_begins},
          {RankPhase::kExchanged, exchange_ends},
          {RankPhase::kMerge, exchange_ends + 1},
          {RankPhase::kDone, exchange_ends + 3}};
}

// Barriers in which a rank's clock is `ahead`, and takes `before` and `after` the moment that all share.
Barriers barriers(double ahead, const std::vector<double>& before,
                  const std::vector<double>& after) {
  Barriers result;
  for (size_t i = 0; i < before.size(); ++i) {
    const double moment = 1e6 + 1000 * double(i) + ahead;
    result.came_us.push_back(moment - before[i]);
    result.left_us.push_back(moment + after[i]);
  }
  return result;
}

std::vector<RankReading> two_readings(double ahead) {
  std::vector<RankReading> readings(2);
  readings[0].host = "one";
  readings[1].host = "another";
  readings[0].barriers = barriers(0, {9, 1, 50}, {2, 30, 40});
  readings[1].barriers = barriers(ahead, {7, 2, 30}, {3, 50, 60});
  readings[0].marks = marks_from(100, 108, 125);
  readings[1].marks = marks_from(102 + ahead, 120 + ahead, 125.5 + ahead);
  readings[0].uncertainty_us = 0.25;
  readings[1].uncertainty_us = 0.5;
  return readings;
}

TEST(ClockBounds, EveryReadingNarrows) {
  ClockBounds bounds;
  bounds.narrow(-5, 9);
  bounds.narrow(-7, 3);
  EXPECT_EQ(bounds.middle(), -1);
  EXPECT_EQ(bounds.half_width(), 4);
  bounds.narrow(4, 6);  // past what it can be, by 1
  EXPECT_EQ(bounds.middle(), 3.5);
  EXPECT_EQ(bounds.half_width(), 0.5);
}

TEST(RanksTimeline, ClocksAreBroughtTogetherByBarriers) {
  for (const double ahead : {0.0, 12345.0, -7e5}) {
    const std::vector<RankReading> readings = two_readings(ahead);
    const ClockBounds offset = find_offset(readings[0].barriers, readings[1].barriers);
    // At least as far as the first rank's came lies behind the other's left: 1 - (-3) = 9 + 3, 1 + 50, 50 + 60; and so on.
    EXPECT_NEAR(offset.low, -12 - ahead, 1e-6);
    EXPECT_NEAR(offset.high, 9 - ahead, 1e-6);
    RanksTimeline timeline;
    ASSERT_OK(make_timeline(readings, &timeline));
    EXPECT_FALSE(timeline.is_one_clock);
    EXPECT_NEAR(timeline.barrier_us, 10.5, 1e-6);
    EXPECT_NEAR(timeline.uncertainty_us, 10.5 + 0.5 + 0.25, 1e-6);
    ASSERT_EQ(timeline.ranks.size(), 2U);
    // The bounds' middle is off by 1.5; what the clocks say of one rank is exact.
    EXPECT_NEAR(timeline.ranks[0][0].begin_us, 0, 1e-6);
    EXPECT_NEAR(timeline.ranks[1][0].begin_us, 2 - 1.5, 1e-6);
    EXPECT_NEAR(timeline.ranks[1][1].end_us - timeline.ranks[1][1].begin_us, 4, 1e-6);
  }
}

TEST(RanksTimeline, OneHostsClockIsOneUnlessBarriersDeny) {
  std::vector<RankReading> readings = two_readings(0);
  readings[1].host = "one";
  RanksTimeline timeline;
  ASSERT_OK(make_timeline(readings, &timeline));
  EXPECT_TRUE(timeline.is_one_clock);
  EXPECT_EQ(timeline.uncertainty_us, 0.75);
  EXPECT_NEAR(timeline.barrier_us, 10.5, 1e-6);
  EXPECT_EQ(timeline.ranks[1][0].begin_us, 2);
  readings = two_readings(50);  // a clock of its own all the same
  readings[1].host = "one";
  ASSERT_OK(make_timeline(readings, &timeline));
  EXPECT_FALSE(timeline.is_one_clock);
  EXPECT_NEAR(timeline.ranks[1][0].begin_us, 2 - 1.5, 1e-6);
  readings = two_readings(0);
  readings[0].host = readings[1].host = "";  // nothing is known
  ASSERT_OK(make_timeline(readings, &timeline));
  EXPECT_FALSE(timeline.is_one_clock);
}

RanksTimeline right_timeline() {
  std::vector<RankReading> readings = two_readings(0);
  readings[1].host = "one";
  readings[0].uncertainty_us = readings[1].uncertainty_us = 0;
  RanksTimeline timeline;
  EXPECT_OK(make_timeline(readings, &timeline));
  return timeline;
}

TEST(RanksTimeline, WhoComesFirstWaits) {
  const RanksTimeline timeline = right_timeline();
  EXPECT_EQ(timeline.ranks[0][5].waited_us, 12);
  EXPECT_EQ(timeline.ranks[1][5].waited_us, 0);
  EXPECT_OK(check_timeline(timeline, steps_of(1, true, Exchange::kAllGather)));
  const std::string text = summary(timeline);
  EXPECT_NE(text.find("rank 0, slice 0: bulk decode   1.00   5.00   4.00"), std::string::npos)
      << text;
  EXPECT_NE(text.find("rank 0 was in exchanges for 17.00 µs, and of these 12.00 waited"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("rank 1 was in exchanges for 5.50 µs, and of these 0.00 waited"),
            std::string::npos)
      << text;
}

TEST(RanksTimeline, WhatCannotBeIsRefused) {
  const auto steps = steps_of(1, true, Exchange::kAllGather);
  const auto refused = [&](const std::function<void(std::vector<PhaseInterval>&)>& spoil) {
    RanksTimeline timeline = right_timeline();
    spoil(timeline.ranks[1]);
    return check_timeline(timeline, steps).message();
  };
  EXPECT_EQ(refused([](auto&) {}), "");
  EXPECT_EQ(refused([](auto& rank) { rank.erase(rank.begin() + 2); }),
            "timeline of rank 1: 6 phases, not 7");
  EXPECT_EQ(refused([](auto& rank) { std::swap(rank[1].phase, rank[2].phase); }),
            "timeline of rank 1: tail decode of slice 0 where bulk decode of slice 0 should be");
  EXPECT_EQ(refused([](auto& rank) { rank[3].slice = 1; }),
            "timeline of rank 1: local merge of slice 1 where local merge of slice 0 should be");
  EXPECT_EQ(refused([](auto& rank) { rank[1].end_us = rank[1].begin_us - 2; }),
            "timeline of rank 1: bulk decode of slice 0 ends 2.00 µs before it begins");
  EXPECT_EQ(refused([](auto& rank) { rank[1].end_us = NAN; }),
            "timeline of rank 1: bulk decode of slice 0 ends — µs before it begins");
  EXPECT_EQ(
      refused([](auto& rank) { rank[2].begin_us -= 3; }),
      "timeline of rank 1: tail decode of slice 0 begins 3.00 µs before what it needs is there");
  EXPECT_EQ(refused([](auto& rank) { rank[5].begin_us = rank[4].begin_us - 1; }),
            "timeline of rank 1: exchange of slice 0 begins 1.00 µs before what it needs is there");
  EXPECT_EQ(refused([](auto& rank) { rank[5].end_us = rank[6].begin_us + 2; }),
            "timeline of rank 1: merge of slice 0 begins 2.00 µs before what it needs is there");
  // It cannot have got what another rank had not yet to give, unless clocks are that far apart.
  RanksTimeline timeline = right_timeline();
  timeline.ranks[0][5].end_us = 17;
  EXPECT_EQ(check_timeline(timeline, steps).message(),
            "timeline of rank 0: exchange of slice 0 ends 3.00 µs before another rank's begins; "
            "clocks are brought together to 0.00 µs");
  timeline.uncertainty_us = 2.6;
  EXPECT_OK(check_timeline(timeline, steps));
  // Marks without an end.
  std::vector<RankReading> readings = two_readings(0);
  readings[1].marks.pop_back();
  EXPECT_EQ(make_timeline(readings, &timeline).message(), "a decode's marks have no end");
  readings = two_readings(0);
  readings[0].marks.erase(readings[0].marks.begin() + 6);
  EXPECT_EQ(make_timeline(readings, &timeline).message(), "a decode's marks have no end");
  readings[0].marks.clear();
  EXPECT_EQ(make_timeline(readings, &timeline).message(), "a decode's marks have no end");
}

// Decodes on the model, with ranks that are threads: the reports of all.
Json decode(const std::string& shape, int ranks, Exchange exchange, int slices) {
  ParallelOptions options;
  options.stage = "04";
  options.timeline = true;
  options.time_limit = milliseconds(60000);
  ParallelCase one;
  EXPECT_OK(parse_shape(shape, &one.shape));
  one.mode = "context";
  one.division.pages = ranks;
  one.division.settings.exchange = exchange;
  one.division.settings.slices = slices;
  options.cases = {one};
  std::vector<std::unique_ptr<Transport>> transports;
  EXPECT_OK(make_thread_transports(ranks, options.time_limit, &transports));
  const MakeTransport make = [&](const Seat& seat, int, std::unique_ptr<Rendezvous>,
                                 std::unique_ptr<Transport>* transport, NcclApi**) -> Status {
    *transport = std::move(transports[size_t(seat.rank)]);
    return {};
  };
  std::vector<Json> reports(static_cast<size_t>(ranks));
  int code = -1;
  EXPECT_OK(run_threads(
      ranks, options.time_limit,
      [&](const Seat& seat) { return run_rank(options, seat, make, &reports[size_t(seat.rank)]); },
      &code));
  EXPECT_EQ(code, 0);
  EXPECT_TRUE(reports[1].is_null());
  return reports[0];
}

TEST(RanksTimeline, OfDecodesOnTheModel) {
  for (const int ranks : {2, 3}) {
    for (const bool has_tail : {false, true}) {
      for (const int slices : {1, 2}) {
        const Exchange exchange = kExchanges[size_t(ranks + slices + has_tail) % 3];
        SCOPED_TRACE(std::to_string(ranks) + " ranks, " + to_string(exchange));
        const Json report =
            decode(has_tail ? "h6_q2_k200+3+0_causal" : "h6_q1_k200+3", ranks, exchange, slices);
        ASSERT_TRUE(report.contains("timelines"));
        ASSERT_EQ(report["timelines"].size(), 1U);
        const Json& timeline = report["timelines"][0];
        EXPECT_EQ(timeline["clocks"], "one host's");
        EXPECT_EQ(timeline["uncertainty_us"], 0);
        EXPECT_GT(timeline["barrier_us"], 0);
        EXPECT_EQ(timeline["slices"], slices);
        const auto steps = steps_of(slices, has_tail, exchange);
        const Json& phases = timeline["phases"];
        ASSERT_EQ(phases.size(), steps.size() * size_t(ranks));
        double first = 1e300;
        for (size_t i = 0; i < phases.size(); ++i) {
          const Json& phase = phases[i];
          const Step& step = steps[i % steps.size()];
          EXPECT_EQ(phase["rank"], i / steps.size());
          EXPECT_EQ(phase["phase"], to_string(step.phase));
          EXPECT_EQ(phase["slice"], step.slice);
          EXPECT_LE(phase["begin_us"], phase["end_us"]);
          EXPECT_EQ(phase.contains("waited_us"), phase["stream"] == "exchange");
          first = std::min(first, phase["begin_us"].get<double>());
          // A launch on the model takes long, and marks that have none between them do not.
          if (step.phase != RankPhase::kWait && step.phase != RankPhase::kExchange) {
            EXPECT_GT(phase["end_us"].get<double>() - phase["begin_us"].get<double>(), 5);
          }
        }
        EXPECT_EQ(first, 0);
        // Of each exchange one rank comes last, and none leaves before.
        for (size_t step = 0; step < steps.size(); ++step) {
          if (steps[step].phase != RankPhase::kExchange) continue;
          int waited_for = 0;
          double last = 0;
          for (size_t i = step; i < phases.size(); i += steps.size()) {
            last = std::max(last, phases[i]["begin_us"].get<double>());
            if (phases[i]["waited_us"] == 0) ++waited_for;
          }
          EXPECT_EQ(waited_for, 1);
          for (size_t i = step; i < phases.size(); i += steps.size()) {
            EXPECT_GE(phases[i]["end_us"], last);
            EXPECT_NEAR(phases[i]["waited_us"], last - phases[i]["begin_us"].get<double>(), 0.01);
          }
        }
        const Json trace = Json::parse(ranks_chrome_trace(timeline, {{"commit", "abc"}}));
        EXPECT_EQ(trace["otherData"]["commit"], "abc");
        EXPECT_EQ(trace["otherData"]["shape"], timeline["shape"]);
        EXPECT_FALSE(trace["otherData"].contains("phases"));
        size_t shown = 0, nested = 0;
        for (const Json& event : trace["traceEvents"]) {
          if (event["ph"] == "M") continue;
          ASSERT_EQ(event["ph"], "X");
          if (event["name"] == "another rank has not come") {
            ++nested;
            continue;
          }
          const Json& phase = phases[shown++];
          EXPECT_EQ(event["name"], phase["phase"]);
          EXPECT_EQ(event["pid"], phase["rank"]);
          EXPECT_EQ(event["tid"], phase["stream"] == "exchange" ? 1 : 0);
          EXPECT_EQ(event["ts"], phase["begin_us"]);
          EXPECT_NEAR(event["dur"], phase["end_us"].get<double>() - phase["begin_us"].get<double>(),
                      0.01);
        }
        EXPECT_EQ(shown, phases.size());
        EXPECT_GE(nested, size_t(ranks - 1));
      }
    }
  }
}

// ---- How decodes are repeated

TEST(RankClock, NoMoreThanAPieceIsEnqueuedAtOnce) {
  int enqueued = 0, all = 0;
  std::vector<int> pieces;
  std::unique_ptr<RankClock> clock;
  ASSERT_OK(make_rank_clock(
      model_machine(),
      [&](Stream) -> Status {
        pieces.push_back(std::exchange(enqueued, 0));
        return {};
      },
      &clock));
  int handle = 0;
  const auto once = [&](Stream) -> Status {
    ++enqueued;
    ++all;
    return {};
  };
  ASSERT_OK(clock->prepare(once, true, &handle));
  EXPECT_EQ(pieces, std::vector<int>{1});
  for (const int runs : {1, 3, 256, 257, 1000, 2000}) {
    for (const bool timed : {false, true}) {
      pieces.clear();
      all = 0;
      double us = -1;
      ASSERT_OK(clock->run(handle, runs, timed ? &us : nullptr));
      if (timed) {
        EXPECT_EQ(us, 0);
      }
      EXPECT_EQ(pieces.size(), size_t((runs + RankClock::kMostAtOnce - 1) / RankClock::kMostAtOnce));
      EXPECT_EQ(all, runs + (timed ? int(pieces.size()) : 0));  // one more, before time is taken
      const auto [least, most] = std::minmax_element(pieces.begin(), pieces.end());
      EXPECT_LE(*most, RankClock::kMostAtOnce + (timed ? 1 : 0));
      EXPECT_LE(*most - *least, 1);  // so that a mean of means is a mean
    }
  }
}

TEST(RankClock, APieceThatFailsIsTheLast) {
  std::unique_ptr<RankClock> clock;
  int waits = 0;
  ASSERT_OK(make_rank_clock(
      model_machine(),
      [&](Stream) {
        return ++waits < 3 ? Status() : Status(StatusCode::kRankFailed, "rank 1 is gone");
      },
      &clock));
  int handle = 0;
  ASSERT_OK(clock->prepare([](Stream) { return Status(); }, true, &handle));
  EXPECT_EQ(clock->run(handle, 1500, nullptr).message(), "rank 1 is gone");
  EXPECT_EQ(waits, 3);
}

}  // namespace
}  // namespace mla::bench
