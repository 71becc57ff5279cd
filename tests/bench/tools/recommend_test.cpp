// What is recommended when the recorded times are known.
#include "bench/tools/recommend.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Adds records of one stage: us = constant + per_token * tokens, and p90 a tenth above.
void add_times(const char* stage, double constant, double per_token, const char* suffix,
               Recorded* recorded) {
  for (const int batch : {1, 4, 16, 64}) {
    for (const int tokens : {1024, 8192}) {
      RecordedEntry entry{stage,
                          fmt::format("h16_q1_b{}_k{}{}", batch, tokens, suffix),
                          "sustained",
                          constant + per_token * batch * tokens,
                          {}};
      entry.counters["p90_us"] = 1.1 * entry.us;
      recorded->entries.push_back(entry);
    }
  }
}

/// A quick stage with a high throughput, one with a short constant, and one for 8-bit caches.
std::vector<Recorded> records() {
  Recorded one;
  one.file = "one.json";
  add_times("08_seesaw", 20, 0.001, "", &one);
  add_times("10_few_heads", 5, 0.002, "", &one);
  add_times("12_fp8", 25, 0.0015, "_fp8_tile128", &one);
  return {one};
}

std::vector<Candidate> of(const Wish& wish) {
  std::vector<Candidate> found;
  const std::vector<Recorded> all = records();
  EXPECT_OK(recommend(all, wish, &found));
  return found;
}

TEST(Recommend, LatencyIsTheShortestStep) {
  const auto found = of({.goal = Goal::kLatency, .heads = 16, .layers = 10, .context = 1024});
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0].stage, "10_few_heads");
  EXPECT_EQ(found[0].batch, 1);
  EXPECT_NEAR(found[0].step_ms, 10 * (5 + 0.002 * 1024) / 1e3, 1e-6);
  EXPECT_NEAR(found[0].slow_step_ms, 1.1 * found[0].step_ms, 1e-9);
  EXPECT_EQ(found[0].nearest, "h16_q1_b1_k1024");
  EXPECT_NEAR(found[0].cache_bytes, 10.0 * 1024 * 1152, 1);
  // With a longer context, the other stage is faster.
  EXPECT_EQ(of({.goal = Goal::kLatency, .heads = 16, .context = 8192, .batch = 16})[0].stage,
            "08_seesaw");
}

TEST(Recommend, ThroughputTakesTheLargestBatchThatIsAllowed) {
  Wish wish{.goal = Goal::kThroughput, .heads = 16, .layers = 10, .context = 8192};
  EXPECT_EQ(of(wish)[0].stage, "08_seesaw");
  EXPECT_EQ(of(wish)[0].batch, 64);  // no more are recorded
  const double each = 10.0 * 8192 * 1152;
  wish.budget_bytes = 7.5 * each;
  EXPECT_EQ(of(wish)[0].batch, 7);
  wish.budget_bytes = std::numeric_limits<double>::infinity();
  wish.step_ms = 1.1 * 10 * (20 + 0.001 * 20.5 * 8192) / 1e3;
  EXPECT_EQ(of(wish)[0].stage, "08_seesaw");
  EXPECT_EQ(of(wish)[0].batch, 20);
}

TEST(Recommend, MemoryTakesTheSmallestFormatThatIsFastEnough) {
  Wish wish{.goal = Goal::kMemory, .heads = 16, .layers = 10, .context = 8192};
  EXPECT_EQ(of(wish)[0].stage, "12_fp8");
  EXPECT_EQ(of(wish)[0].format, CacheFormat::kFp8Tile128);
  EXPECT_NEAR(of(wish)[0].cache_bytes, 10.0 * 8192 * 656, 1);
  wish.step_ms = 0.35;  // 12 takes 0.41, 08 and 10 less
  const auto found = of(wish);
  EXPECT_EQ(found[0].stage, "10_few_heads");
  EXPECT_EQ(found.back().stage, "12_fp8");
  EXPECT_TRUE(found.back().why_not.starts_with("a slow step takes")) << found.back().why_not;
}

TEST(Recommend, SaysWhatIsNotMet) {
  const Wish wish{.goal = Goal::kLatency, .heads = 16, .context = 8192, .budget_bytes = 1e6};
  const auto found = of(wish);
  EXPECT_TRUE(found[0].why_not.starts_with("its caches take")) << found[0].why_not;
  EXPECT_TRUE(has(describe(wish, found), "Nothing that is recorded meets this"))
      << describe(wish, found);
}

TEST(Recommend, GoesNotBeyondTheRecords) {
  const std::vector<Recorded> all = records();
  std::vector<Candidate> found;
  const auto refuses = [&](const Wish& wish, const char* message) {
    const Status status = recommend(all, wish, &found);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_TRUE(has(status.message(), message)) << status.message();
  };
  refuses({.heads = 16, .context = 8193}, "up to 16 heads, 8193 tokens");
  refuses({.heads = 16, .context = 8192, .batch = 65}, "65 sequences");
  refuses({.heads = 128}, "128 heads");
  refuses({.heads = 0}, "heads = 0 must be at least 1");
  refuses({.heads = 16, .batch = 0}, "batch = 0 must be at least 1");
  refuses({.heads = 16, .budget_bytes = 0}, "budget = 0 must be greater than 0");
}

TEST(Recommend, TakesTheNewestRecords) {
  std::vector<Recorded> all = records();
  Recorded older;
  older.file = "older.json";
  add_times("08_seesaw", 1, 0.0001, "", &older);
  all.push_back(older);
  std::vector<Candidate> found;
  ASSERT_OK(recommend(all, {.goal = Goal::kLatency, .heads = 16, .context = 1024}, &found));
  EXPECT_EQ(found[0].stage, "10_few_heads");
}

// A few records are too few for a fit, so each is used for its own shape alone.
TEST(Recommend, TakesARecordWhereAFitIsNotToBeHad) {
  Recorded one;
  one.file = "one.json";
  for (const int batch : {1, 8}) {
    one.entries.push_back({"12_fp8",
                           fmt::format("h16_q1_b{}_k4096_fp8_tile128", batch),
                           "sustained",
                           10.0 * batch,
                           {}});
  }
  const std::vector<Recorded> all{one};
  std::vector<Candidate> found;
  Wish wish{.goal = Goal::kThroughput, .heads = 16, .layers = 10, .context = 4096};
  ASSERT_OK(recommend(all, wish, &found));
  EXPECT_EQ(found[0].batch, 1);  // a batch of 8 takes 8 times as long: no more throughput
  EXPECT_NEAR(found[0].step_ms, 0.1, 1e-9);
  wish.batch = 8;
  ASSERT_OK(recommend(all, wish, &found));
  EXPECT_NEAR(found[0].step_ms, 0.8, 1e-9);
  EXPECT_TRUE(has(describe(wish, found), "as recorded")) << describe(wish, found);
  wish.batch = 4;  // between two records
  EXPECT_FALSE(recommend(all, wish, &found).ok());
  wish.batch = 1;
  wish.context = 4095;
  EXPECT_FALSE(recommend(all, wish, &found).ok());
}

// The project's own records.
TEST(Recommend, KnowsTheRecordings) {
  const Wish wish{.goal = Goal::kThroughput, .heads = 128, .context = 8192};
  std::vector<Candidate> found;
  ASSERT_OK(recommend(load_all_recorded(), wish, &found));
  EXPECT_TRUE(found[0].why_not.empty());
  EXPECT_GT(found[0].batch, 1);
  EXPECT_TRUE(has(found[0].splits, "workers")) << found[0].splits;
  const std::string text = describe(wish, found);
  EXPECT_TRUE(has(text, "Run stage " + found[0].stage)) << text;
  EXPECT_TRUE(has(text, "NVIDIA H200")) << text;
}

}  // namespace
}  // namespace mla::bench
