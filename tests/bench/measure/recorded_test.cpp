// Results files are read back: what they hold, what is wrong with them, which one is the newest.
#include "bench/measure/recorded.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

namespace mla::bench {
namespace {

class RecordedTest : public testing::Test {
 protected:
  RecordedTest()
      : folder_(std::filesystem::path(testing::TempDir()) /
                testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::create_directories(folder_);
  }
  ~RecordedTest() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& text) {
    const std::string path = (folder_ / name).string();
    std::ofstream(path) << text;
    return path;
  }

  /// A results file with one time (a row per round and rows for all samples), one failed entry and
  /// one entry of a plan.
  static std::string results(const std::string& date, const std::string& machine = "gpu") {
    return R"({"context": {"schema": "flashmla_stages/2", "machine": ")" + machine +
           R"(", "gpu": "NVIDIA H200", "commit": "abc1234", "date_utc": ")" + date +
           R"(", "multiprocessors": "132", "ceiling_read_gbps": "4547",
               "ceiling_launch_us": "3.7", "num_cpus": 16},
             "benchmarks": [
              {"name": "08_seesaw/h128_q1_b64_k4096/cold/iterations:1/manual_time",
               "real_time": 121.5, "run_type": "iteration"},
              {"name": "08_seesaw/h128_q1_b64_k4096/cold/iterations:1/manual_time_mean",
               "real_time": 121.6, "run_type": "aggregate", "aggregate_name": "mean"},
              {"name": "08_seesaw/h128_q1_b64_k4096/cold/iterations:1/manual_time_samples",
               "real_time": 120.9, "run_type": "aggregate", "aggregate_name": "samples",
               "p10_us": 119.5, "label": "seesaw"},
              {"name": "07_tma_pipeline/h128_q1_b64_k4096/cold/iterations:1/manual_time",
               "error_occurred": true, "error_message": "cannot run here"},
              {"name": "08_seesaw/h128_q1_b1_klognormal2048/plan/iterations:1/manual_time",
               "real_time": 5.3}]})";
  }

  std::filesystem::path folder_;
};

TEST_F(RecordedTest, ReadsTimesCountersAndCeilings) {
  Recorded recorded;
  ASSERT_OK(load_recorded(write("a.json", results("2026-11-21T00:00:00Z")), &recorded));
  EXPECT_EQ(recorded.entries.size(), 2u);
  EXPECT_EQ(recorded.multiprocessors, 132);
  EXPECT_DOUBLE_EQ(recorded.ceilings.read, 4547e9);
  EXPECT_DOUBLE_EQ(recorded.ceilings.launch, 3.7e-6);
  EXPECT_TRUE(std::isnan(recorded.ceilings.fp32));
  const RecordedEntry* entry = recorded.find("08_seesaw", "h128_q1_b64_k4096", "cold");
  ASSERT_NE(entry, nullptr);
  EXPECT_DOUBLE_EQ(entry->us, 120.9);
  EXPECT_DOUBLE_EQ(entry->counters.at("p10_us"), 119.5);
  EXPECT_EQ(recorded.find("07_tma_pipeline", "h128_q1_b64_k4096", "cold"), nullptr);
  EXPECT_NE(recorded.find("08_seesaw", "h128_q1_b1_klognormal2048", "plan"), nullptr);
  EXPECT_EQ(recorded.origin(), "NVIDIA H200, commit abc1234, 2026-11-21");
}

TEST_F(RecordedTest, SaysWhatIsWrongWithAFile) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "parse error"},
      {"{}", "not a results file"},
      {R"({"context": {"schema": "flashmla_stages_cache/1"}})", "not a results file"},
      {R"({"context": 3})", "not a results file"}};
  Recorded recorded;
  recorded.file = "untouched";
  for (const auto& [text, why] : cases) {
    const std::string path = write("bad.json", text);
    const Status status = load_recorded(path, &recorded);
    EXPECT_EQ(status.code(), StatusCode::kFileError) << text;
    EXPECT_NE(status.message().find(path), std::string::npos);
    EXPECT_NE(status.message().find(why), std::string::npos) << status.message();
  }
  EXPECT_EQ(load_recorded("/nonexistent.json", &recorded).code(), StatusCode::kFileError);
  EXPECT_EQ(recorded.file, "untouched");
}

TEST_F(RecordedTest, TheNewestOfAGpuIsTaken) {
  write("old.json", results("2026-11-20T00:00:00Z"));
  const std::string newest = write("new.json", results("2026-11-21T00:00:00Z"));
  write("model.json", results("2026-11-22T00:00:00Z", "model"));
  write("broken.json", "{");
  std::string later = results("2026-11-23T00:00:00Z");  // of later rungs alone
  for (size_t at = 0; (at = later.find("08_seesaw")) != std::string::npos;) {
    later.replace(at, 9, "11_cluster");
  }
  later.replace(later.find("07_tma_pipeline"), 15, "10_few_heads");
  write("later.json", later);
  Recorded recorded;
  ASSERT_OK(load_newest_recorded(&recorded, folder_.string()));
  EXPECT_EQ(recorded.file, newest);
  EXPECT_EQ(load_newest_recorded(&recorded, "/nonexistent").code(), StatusCode::kFileError);
}

TEST_F(RecordedTest, TheNewestFileThatHasTheCacheFormatIsTaken) {
  const auto quantised = [](const std::string& date, const std::string& machine = "gpu") {
    std::string text = results(date, machine);
    const std::string shape = "08_seesaw/h128_q1_b64_k4096/";
    text.replace(text.find(shape), shape.size(), "12_fp8/h128_q1_b64_k4096_fp8_tensor/");
    return text;
  };
  write("old.json", quantised("2026-11-20T00:00:00Z"));
  const std::string newest = write("new.json", quantised("2026-11-21T00:00:00Z"));
  write("model.json", quantised("2026-11-22T00:00:00Z", "model"));
  write("plain.json", results("2026-11-23T00:00:00Z"));
  Recorded recorded;
  ASSERT_OK(load_newest_recorded_of(CacheFormat::kFp8Tensor, &recorded, folder_.string()));
  EXPECT_EQ(recorded.file, newest);
  const Status status =
      load_newest_recorded_of(CacheFormat::kInt8Tile128, &recorded, folder_.string());
  EXPECT_EQ(status.code(), StatusCode::kFileError);
  EXPECT_NE(status.message().find("with a cache of int8_tile128"), std::string::npos);
  EXPECT_EQ(recorded.file, newest);
}

TEST_F(RecordedTest, TheProjectHasResults) {
  Recorded recorded;
  ASSERT_OK(load_newest_recorded(&recorded));
  EXPECT_GT(recorded.ceilings.matrix_cold, 0);
  EXPECT_NE(recorded.find("08_seesaw", "h128_q1_b64_k4096", "cold"), nullptr);
}

}  // namespace
}  // namespace mla::bench
