// Google Benchmark drives the runs: names are known before anything runs, its flags work,
// repetitions are real, and the JSON file does not name its owner.
#include "bench/measure/google.h"
#include "tests/bench/measure/google_driver.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace mla::bench {
namespace {

using Json = nlohmann::json;

/// Counts its calls, and gives 1, 2, 3, ... us.
struct Counting {
  std::vector<int> calls;
  double last = 0;
  std::vector<double> us;

  GoogleRun run(const std::string& name, int iterations, int rounds) {
    const auto measure = [this](int count, std::vector<double>* samples) {
      calls.push_back(count);
      for (int i = 0; i < count; ++i) samples->push_back(++last);
      return Status();
    };
    return {name, iterations, rounds, measure, {{"bytes", 1e3}}, &us};
  }
};

Json benchmarks(const GoogleBenchmark& google) {
  return Json::parse(google.json({}))["benchmarks"];
}

TEST(GoogleBenchmark, ListsAndFiltersBeforeAnythingRuns) {
  auto google = driver({"a/x/cold", "a/x/sustained", "b/x/cold"}, {"--benchmark_filter=a/"});
  EXPECT_EQ(google->listing(), "a/x/cold/manual_time\na/x/sustained/manual_time\n");
  EXPECT_TRUE(google->is_chosen("a/x/cold"));
  EXPECT_FALSE(google->is_chosen("b/x/cold"));
  EXPECT_FALSE(google->is_chosen("never heard of"));
  Counting wanted, unwanted;
  const GoogleRun runs[] = {wanted.run("a/x/cold", 1, 1), unwanted.run("b/x/cold", 1, 1)};
  for (const Status& status : google->run(runs)) EXPECT_OK(status);
  EXPECT_EQ(wanted.us.size(), 1u);
  EXPECT_TRUE(unwanted.calls.empty());
  google.reset();
  google = driver({"a/cold", "b/cold"}, {"--benchmark_filter=-^a"});
  EXPECT_EQ(google->listing(), "b/cold/manual_time\n");
}

TEST(GoogleBenchmark, AFilterThatMatchesNothingIsRefused) {
  for (const char* filter : {"nothing", "("}) {
    std::unique_ptr<GoogleBenchmark> google;
    const Status status =
        GoogleBenchmark::create({"a/cold"}, flags_of({std::string("--benchmark_filter=") + filter}),
                                /*show=*/false, &google);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(filter), std::string::npos) << status.message();
    EXPECT_EQ(google, nullptr);
  }
}

TEST(GoogleBenchmark, RepetitionsAreRoundsWithATrueSpread) {
  const auto google = driver({"a/x/cold"}, {"--benchmark_repetitions=3"});
  Counting a;
  const GoogleRun run = a.run("a/x/cold", 2, 4);
  EXPECT_OK(google->run({&run, 1}).front());
  EXPECT_EQ(a.calls, (std::vector<int>{2, 2, 2}));
  EXPECT_EQ(a.us, (std::vector<double>{1, 2, 3, 4, 5, 6}));
  std::map<std::string, double> times;
  std::vector<double> rounds;
  for (const Json& entry : benchmarks(*google)) {
    EXPECT_EQ(entry["time_unit"], "us");
    const double us = entry["real_time"];
    if (entry["run_type"] == "iteration") rounds.push_back(us);
    if (entry["run_type"] == "aggregate") times[entry["aggregate_name"]] = us;
  }
  ASSERT_EQ(rounds.size(), 3u);
  EXPECT_NEAR(rounds[0], 1.5, 1e-9);  // the mean of its samples
  EXPECT_NEAR(rounds[2], 5.5, 1e-9);
  EXPECT_NEAR(times["mean"], 3.5, 1e-9);
  EXPECT_NEAR(times["median"], 3.5, 1e-9);
  EXPECT_NEAR(times["stddev"], 2, 1e-9);
  EXPECT_NEAR(times["cv"], 2 / 3.5, 1e-9);
}

TEST(GoogleBenchmark, CountsAreTheProtocolsUnlessAFlagSaysOtherwise) {
  Counting a, b;
  auto google = driver({"a/cold", "b/cold"});
  const GoogleRun runs[] = {a.run("a/cold", 5, 4), b.run("b/cold", 1, 2)};
  google->run(runs);
  EXPECT_EQ(a.calls, (std::vector<int>{5, 5, 5, 5}));
  EXPECT_EQ(b.calls, (std::vector<int>{1, 1}));

  // By time: runs take 1, 2, 3, ... us until their sum is 200 us. Those that only served to find
  // their number are no samples.
  Counting by_time;
  google.reset();
  google = driver({"a/cold"}, {"--benchmark_min_time=0.0002"});
  const GoogleRun run = by_time.run("a/cold", 5, 2);
  google->run({&run, 1});
  ASSERT_GT(by_time.calls.size(), 2u);
  EXPECT_EQ(by_time.calls.front(), 1);
  EXPECT_EQ(by_time.us.size(), 2u * static_cast<size_t>(by_time.calls.back()));
  EXPECT_EQ(by_time.us.back(), by_time.last);
}

TEST(GoogleBenchmark, AFailureIsReportedAndLeavesNoSamples) {
  const auto google = driver({"a/cold", "b/cold"});
  std::vector<double> us;
  int calls = 0;
  const GoogleRun failing{"a/cold",
                          2,
                          3,
                          [&](int, std::vector<double>* samples) {
                            samples->push_back(1);
                            return ++calls == 2 ? Status(StatusCode::kCudaError, "it broke")
                                                : (samples->push_back(1), Status());
                          },
                          {},
                          &us};
  const Status status = google->run({&failing, 1}).front();
  EXPECT_EQ(status.code(), StatusCode::kCudaError);
  EXPECT_TRUE(us.empty());
  EXPECT_EQ(calls, 2);
  // An entry without a result is reported by its reason alone, whatever was reported of it before.
  google->forget("a/cold");
  google->add({{"a/cold", 0, {}, "", "failed: it broke"}, {"b/cold", 0, {}, "", "left out"}});
  const Json reported = benchmarks(*google);
  ASSERT_EQ(reported.size(), 2u) << reported.dump(1);
  const auto why = [](const Json& entry) {
    return entry.contains("error_message") ? entry["error_message"] : entry["skip_message"];
  };
  EXPECT_EQ(why(reported[0]), "failed: it broke");
  EXPECT_EQ(why(reported[1]), "left out");
}

TEST(GoogleBenchmark, FiguresOfAllSamplesAreOneMoreAggregate) {
  const auto google = driver({"a/x/cold"});
  Counting a;
  const GoogleRun run = a.run("a/x/cold", 2, 2);
  google->run({&run, 1});
  google->add({{"a/x/cold", 2.5, {{"p10_us", 1.3}, {"unknown", kUnknown}}, "an idea", ""},
               {"not chosen", 1, {}, "", ""}});
  const Json reported = benchmarks(*google);
  const Json& samples = reported.back();
  EXPECT_EQ(samples["aggregate_name"], "samples");
  EXPECT_EQ(samples["run_type"], "aggregate");
  EXPECT_NEAR(samples["real_time"].get<double>(), 2.5, 1e-9);
  EXPECT_EQ(samples["p10_us"], 1.3);
  EXPECT_EQ(samples["label"], "an idea");
  EXPECT_FALSE(samples.contains("unknown"));
}

TEST(GoogleBenchmark, TheFileDoesNotNameItsOwner) {
  const auto google = driver({"a/cold"});
  const Json file = Json::parse(google->json({{"gpu", "a name"}}));
  EXPECT_EQ(file["context"]["gpu"], "a name");
  EXPECT_FALSE(file["context"].contains("host_name"));
  EXPECT_FALSE(file["context"].contains("executable"));
}

TEST(GoogleFlags, AreReadOrRefusedByName) {
  const GoogleFlags flags =
      flags_of({"--benchmark_list_tests", "--benchmark_repetitions=5", "--benchmark_out=x.json",
                "--benchmark_display_aggregates_only=true", "--benchmark_min_time=0.5s"});
  EXPECT_TRUE(flags.list);
  EXPECT_EQ(flags.repetitions, 5);
  EXPECT_EQ(flags.out, "x.json");
  EXPECT_TRUE(flags.display_aggregates_only);
  EXPECT_TRUE(flags.own_iterations);
  EXPECT_FALSE(flags_of({"--benchmark_list_tests=false"}).list);
  for (const char* wrong :
       {"--benchmark_format=json", "--benchmark_time_unit=ms", "--benchmark_perf_counters=CYCLES",
        "--benchmark_out_format=csv", "--benchmark_repetitions=0", "--benchmark_repetitions=1.5",
        "--benchmark_repetitions=many", "--benchmark_min_time=soon", "--benchmark_list_tests=maybe",
        "--benchmark_filter=", "--benchmark_filter", "--benchmark_nothing=1"}) {
    GoogleFlags unused;
    const Status status = read_google_flags({wrong}, &unused);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << wrong;
    EXPECT_NE(status.message().find(wrong), std::string::npos) << status.message();
  }
}

}  // namespace
}  // namespace mla::bench
