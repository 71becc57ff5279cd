// The timeline's reader and writers, on known records.
#include "bench/tools/timeline.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

namespace mla::bench {
namespace {

using timeline::Record;

/// A record that ends with an idle event; the clock runs at 2 GHz.
Record make_record(uint64_t begin, std::vector<std::pair<uint64_t, Phase>> events) {
  Record record = {};
  record.begin_clock = begin;
  record.begin_ns = 5000 + begin / 2;
  record.end_clock = events.back().first;
  record.end_ns = 5000 + record.end_clock / 2;
  record.multiprocessor = 7;
  for (const auto& [clock, phase] : events) {
    record.events[record.count++] = clock << 8 | static_cast<uint64_t>(phase);
  }
  return record;
}

/// One block. One warpgroup has products at clocks 1100-1300 and 1500-1600, the other at 1250-1400.
std::vector<Record> one_block() {
  return {make_record(1000, {{1100, Phase::kQk},
                             {1300, Phase::kSoftmax},
                             {1500, Phase::kQk},
                             {1600, Phase::kWriteOut},
                             {2000, Phase::kIdle}}),
          make_record(1010, {{1250, Phase::kPv}, {1400, Phase::kIdle}}), Record{}};
}

std::vector<BlockTimeline> read(const std::vector<Record>& records) {
  std::vector<BlockTimeline> timelines;
  const Status status = read_timelines(records, {0}, &timelines);
  EXPECT_OK(status);
  return timelines;
}

TEST(Timeline, ReadsIntervalsByTheBlocksFirstClock) {
  const BlockTimeline block = read(one_block()).at(0);
  EXPECT_EQ(block.multiprocessor, 7);
  EXPECT_DOUBLE_EQ(block.clocks_per_us, 2000);
  EXPECT_EQ(block.clocks, 1000u);
  EXPECT_EQ(block.lost, 0u);
  ASSERT_EQ(block.intervals.size(), 5u);
  EXPECT_EQ(block.intervals[1].phase, Phase::kSoftmax);
  EXPECT_EQ(block.intervals[1].begin, 300u);
  EXPECT_EQ(block.intervals[1].end, 500u);
  EXPECT_EQ(block.intervals[4].track, Track::kWarpgroup1);
}

TEST(Timeline, CountsTheTimeInWhichNoWarpgroupIsAtAProduct) {
  uint64_t window = 0;
  EXPECT_EQ(bubble_clocks(read(one_block()).at(0), &window), 100u);  // 400 to 500
  EXPECT_EQ(window, 500u);                                           // 100 to 600
  const std::string text = summary(read(one_block()).at(0));
  EXPECT_NE(text.find("100 of 500 clocks, 20.0%"), std::string::npos) << text;
  EXPECT_NE(text.find("a tile every 400 clocks"), std::string::npos) << text;
}

TEST(Timeline, SeesAProductInFlightBesideAnotherPhase) {
  std::vector<Record> records = one_block();
  records[0].events[1] |= 128;  // the softmax, 300 to 500
  const BlockTimeline block = read(records).at(0);
  EXPECT_EQ(block.intervals[1].phase, Phase::kSoftmax);
  EXPECT_EQ(bubble_clocks(block), 0u);
  EXPECT_NE(chrome_trace({block}, "").find("\"clocks\":200,\"product in flight\":true}"),
            std::string::npos);
}

TEST(Timeline, CutsAtBothEnds) {
  const BlockTimeline part = cut(read(one_block()).at(0), 0.1, 0.2);  // clocks 200 to 400
  ASSERT_EQ(part.intervals.size(), 3u);
  EXPECT_EQ(part.intervals[0].begin, 200u);
  EXPECT_EQ(part.intervals[1].end, 400u);
  EXPECT_NE(svg({part}, "t").find("<title>Q K^T: 100 clocks, 200 to 300</title>"),
            std::string::npos);
}

TEST(Timeline, WritesTheTraceInMicrosecondsAndClocks) {
  const std::string trace = chrome_trace(read(one_block()), "a \"title\"");
  EXPECT_NE(trace.find("\"title\":\"a \\\"title\\\"\""), std::string::npos) << trace;
  EXPECT_NE(
      trace.find("{\"ph\":\"X\",\"name\":\"softmax\",\"pid\":0,\"tid\":0,\"ts\":0.15,\"dur\":0.1,"
                 "\"args\":{\"clock\":300,\"clocks\":200}}"),
      std::string::npos)
      << trace;
  EXPECT_NE(svg(read(one_block()), "a < b").find("a &lt; b"), std::string::npos);
}

TEST(Timeline, SaysWhatWasLostAndWhatIsNotThere) {
  std::vector<Record> records = one_block();
  records[0].count = Record::kCapacity + 3;
  EXPECT_EQ(read(records).at(0).lost, 3u);
  std::vector<BlockTimeline> timelines;
  EXPECT_NE(
      read_timelines(std::vector<Record>(3), {0}, &timelines).to_string().find("left no record"),
      std::string::npos);
}

}  // namespace
}  // namespace mla::bench
