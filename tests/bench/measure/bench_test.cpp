// What the bench computes and prints, and in which order it runs things. No machine is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "bench/measure/catalogue.h"
#include "bench/measure/limits.h"
#include "bench/measure/recorded.h"
#include "bench/measure/sampler.h"
#include "bench/measure/shapes.h"
#include "bench/measure/statistics.h"
#include "bench/measure/table.h"
#include "reference/counter_random.h"
#include "reference/float16.h"
#include "reference/testing/compare.h"
#include "tests/bench/measure/google_driver.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

TEST(Statistics, QuantilesAreLinearBetweenSamples) {
  const std::vector<double> samples{5, 1, 4, 2, 3};
  EXPECT_DOUBLE_EQ(quantile(samples, 0.5), 3);
  EXPECT_DOUBLE_EQ(quantile(samples, 0.1), 1.4);
  EXPECT_DOUBLE_EQ(quantile(samples, 1), 5);
  EXPECT_DOUBLE_EQ(quantile({1, 2}, 0.5), 1.5);
  EXPECT_TRUE(std::isnan(quantile({}, 0.5)));
  EXPECT_EQ(summarize(samples).n, 5);
  EXPECT_DOUBLE_EQ(summarize({1, 2, 6}).mean, 3);
  EXPECT_DOUBLE_EQ(summarize({1, 2, 6}).variance, 7);
  EXPECT_TRUE(std::isnan(summarize({4}).variance));
  EXPECT_TRUE(std::isnan(summarize({}).mean));
}

TEST(Shapes, NamesSayEverything) {
  Shape shape;
  ASSERT_OK(parse_shape("h128_q1_b64_k4096", &shape));
  EXPECT_EQ(shape.spec.num_heads_q, 128);
  EXPECT_EQ(shape.spec.num_heads_kv, 1);
  EXPECT_EQ(shape.spec.seqlen_q, 1);
  EXPECT_EQ(shape.spec.batch, 64);
  EXPECT_EQ(shape.spec.seqlen_k, 4096);
  EXPECT_FALSE(shape.spec.causal);
  EXPECT_TRUE(shape.spec.lengths.empty());
  EXPECT_EQ(shape.title(), "h_q=128 s_q=1, 64 x 4096, bf16");

  ASSERT_OK(parse_shape("h16x2_q2_b3_kskew1000_causal_fp16", &shape));
  EXPECT_EQ(shape.spec.num_heads_kv, 2);
  EXPECT_TRUE(shape.spec.causal);
  EXPECT_EQ(shape.spec.dtype, DType::kFloat16);
  EXPECT_EQ(shape.spec.lengths, (std::vector<int32_t>{512, 512, 1000}));
  EXPECT_EQ(shape.spec.fixed_split_tokens, 0);
}

TEST(Shapes, LengthsCanBeListed) {
  for (const char* name : {"h16_q2_k256+0+1024_causal", "h16_q2_b3_k256+0+1024_causal"}) {
    Shape shape;
    ASSERT_OK(parse_shape(name, &shape));
    EXPECT_EQ(shape.spec.batch, 3);
    EXPECT_EQ(shape.spec.lengths, (std::vector<int32_t>{256, 0, 1024}));
    EXPECT_EQ(shape.spec.seqlen_k, 1024);
    EXPECT_TRUE(shape.spec.causal);
    EXPECT_EQ(shape.title(), "h_q=16 s_q=2 causal, 3 x up to 1024, bf16");
    EXPECT_EQ(make_data_set(shape.spec).seqlens_k, shape.spec.lengths);
    EXPECT_EQ(padded(name), "h16_q2_b3_k1024_causal");
  }
  Shape shape;
  const Status status = parse_shape("h16_q1_b2_k1+2+3", &shape);
  EXPECT_NE(status.message().find("lists 3 lengths for 2 sequences"), std::string::npos);
}

TEST(Shapes, ASplitReachesTheProblem) {
  Shape shape;
  ASSERT_OK(parse_shape("h16_q2_b3_k2000_causal_split1024_fp16", &shape));
  EXPECT_TRUE(shape.spec.causal);
  EXPECT_EQ(shape.spec.dtype, DType::kFloat16);
  EXPECT_EQ(shape.title(), "h_q=16 s_q=2 causal, 3 x 2000 split every 1024, fp16");
  EXPECT_NE(shape.spec.name().find(" causal split=1024 "), std::string::npos) << shape.spec.name();
  const DataSet data = make_data_set(shape.spec);
  EXPECT_EQ(data.problem.fixed_split_tokens, 1024);
  EXPECT_OK(validate(data.problem));
}

TEST(Shapes, AFormatReachesTheProblem) {
  Shape shape;
  ASSERT_OK(parse_shape("h16_q1_b2_k100_page16_strided_int8_tile128_peak4", &shape));
  EXPECT_EQ(
      shape.title(),
      "h_q=16 s_q=1, 2 x 100, pages of 16, strided, cache int8_tile128, logits of deviation 4, "
      "bf16");
  EXPECT_EQ(make_data_set(shape.spec).problem.cache_format, CacheFormat::kInt8Tile128);
  EXPECT_EQ(shape.peak, 4);
  ASSERT_OK(parse_shape("h16_q1_b2_k100_fp8_tensor_fp16", &shape));
  EXPECT_EQ(shape.spec.cache_format, CacheFormat::kFp8Tensor);
  EXPECT_EQ(shape.spec.dtype, DType::kFloat16);
  EXPECT_EQ(padded("h16_q1_k100+20_fp8_tensor_fp16"), "h16_q1_b2_k100_fp8_tensor_fp16");
  const Status status = parse_shape("h1_q1_b1_k1_fp8_tile128_fp16", &shape);
  EXPECT_NE(status.message().find("fp8_tile128 needs bf16"), std::string::npos)
      << status.to_string();
}

TEST(Shapes, LogNormalLengthsHaveTheirMean) {
  Shape shape;
  ASSERT_OK(parse_shape("h1_q1_b4000_klognormal8192", &shape));
  const std::vector<int32_t>& lengths = shape.spec.lengths;
  const double mean = std::accumulate(lengths.begin(), lengths.end(), 0.0) / 4000;
  double variance = 0;
  for (const int32_t length : lengths) variance += (length - mean) * (length - mean) / 4000;
  EXPECT_NEAR(mean, 8192, 300);
  EXPECT_NEAR(std::sqrt(variance), 4096, 400);
}

TEST(Shapes, ACaseOfTheTestsIsReadBackAsItIs) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    DecodeCase spec;
    auto draw = [&, next = 0](int count) mutable {
      return static_cast<int>(counter_random::draw(seed, next++) % static_cast<uint64_t>(count));
    };
    spec.dtype = draw(2) == 0 ? DType::kBFloat16 : DType::kFloat16;
    spec.batch = 1 + draw(6);
    spec.seqlen_q = 1 + draw(3);
    spec.seqlen_k = 1 + draw(300);
    spec.num_heads_kv = 1 + draw(2);
    spec.num_heads_q = spec.num_heads_kv * (1 + draw(8));
    spec.variable_lengths = draw(2) == 1;
    spec.empty_fraction = spec.batch > 1 && draw(2) == 1 ? 0.5 : 0;
    spec.causal = draw(2) == 1;
    spec.fixed_split_tokens = draw(3) == 0 ? 64 : 0;
    spec.data = draw(2) == 0 ? DataKind::kNeedles : DataKind::kFlat;
    spec.seed = seed;
    spec.page_size = draw(2) == 0 ? kDefaultPageSize : 16;
    spec.strided = draw(2) == 1;
    spec.cache_format = kCacheFormats[draw(4)];
    if (has_tile_scales(spec.cache_format)) spec.dtype = DType::kBFloat16;
    const DataSet data = make_data_set(spec);
    SCOPED_TRACE(shape_name(data) + " of " + spec.name());
    Shape shape;
    const Status status = parse_shape(shape_name(data), &shape);
    ASSERT_OK(status);
    shape.spec.seed = spec.seed;
    shape.spec.data = spec.data;
    const DataSet again = make_data_set(shape.spec);
    EXPECT_EQ(again.seqlens_k, data.seqlens_k);
    EXPECT_EQ(again.block_table, data.block_table);
    EXPECT_EQ(again.problem.softmax_scale, data.problem.softmax_scale);
    EXPECT_EQ(again.problem.causal, data.problem.causal);
    EXPECT_EQ(again.problem.fixed_split_tokens, data.problem.fixed_split_tokens);
    const HostTensors first = generate(data), second = generate(again);
    EXPECT_EQ(first.q, second.q);
    EXPECT_EQ(first.kv_cache, second.kv_cache);
    EXPECT_EQ(first.quantised_cache, second.quantised_cache);
  }
}

TEST(Shapes, WrongNamesAreNamed) {
  for (const char* name :
       {"", "h128", "h128_q1_b64_k", "h0_q1_b64_k4096", "h128_q1_b64_k4096_casual",
        "h128_q1_b99999999999_k1", "h128_q1_b64_k4096_split100", "h128_q1_b64_k4096_split0",
        "h128_q1_b64_k4096_fp16_split64", "h128_q1_k4096", "h128_q1_k1+", "h128_q1_b1_k0",
        "h128_q1_kskew1+2", "h1_q1_b1_k1_fp8_tile128_fp16", "h1_q1_b1_k1_int8_tile128_fp16",
        "h1_q1_b1_k1_fp8", "h1_q1_b1_k1_16bit", "h1_q1_b1_k1_fp8_tensor_strided",
        "h1_q1_b1_k1_fp8_tensor_fp8_tile128"}) {
    Shape shape;
    const Status status = parse_shape(name, &shape);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << name;
    EXPECT_NE(status.message().find(name), std::string::npos);
    for (const char* form : {"h128_q1_b64_k4096", "h16x2", "klognormal8192", "kstepped32768",
                             "kskew131072", "kvaried256", "k256+512+1024", "_causal", "_split1024",
                             "_peak4", "_fp16", "fp8_tile128", "fp8_tensor", "int8_tile128"}) {
      EXPECT_NE(status.message().find(form), std::string::npos) << form;
    }
  }
}

TEST(Shapes, EveryNameOfEverySuiteParses) {
  for (const Suite& suite : suites()) {
    std::vector<Shape> shapes;
    EXPECT_OK(select_shapes(suite.name, "", DType::kBFloat16, &shapes)) << suite.name;
    EXPECT_EQ(shapes.size(), suite.shapes.size()) << suite.name;
    if (suite.name == "all") continue;
    for (const Shape& shape : shapes) EXPECT_EQ(shape.measure, suite.measure) << shape.name;
  }
}

TEST(Shapes, AllHasEveryShapeOnceWithAllThatIsDoneWithIt) {
  std::vector<Shape> all;
  ASSERT_OK(select_shapes("all", "", DType::kBFloat16, &all));
  std::map<std::string, Measure> measures;
  for (const Shape& shape : all) EXPECT_TRUE(measures.emplace(shape.name, shape.measure).second);
  for (const Suite& suite : suites()) {
    if (suite.apart || suite.name == "all") continue;
    for (const std::string& name : suite.shapes) EXPECT_EQ(measures.count(name), 1u) << name;
  }
  EXPECT_EQ(measures.count("h8_q2_b16_k512_causal_fp16"), 0u);    // of texts, not a part of all
  EXPECT_EQ(measures.at("h128_q1_b64_k4096"), Measure::kEnergy);  // of main and of resources
  EXPECT_EQ(measures.at("h128_q1_b128_k8192"), Measure::kTimes);
  EXPECT_EQ(measures.at("h128_q1_b1_klognormal2048"), Measure::kPlans);
  EXPECT_EQ(measures.at("h16_q1_b2_k256_peak4_fp16"), Measure::kErrors);
  EXPECT_EQ(measures.count("h16_q1_b2_k256"), 1u);  // of numerics, not of smoke
  // In fp16, too, although no suite has the names with _fp16.
  ASSERT_OK(select_shapes("all", "", DType::kFloat16, &all));
  for (const Shape& shape : all) {
    const auto known = measures.find(shape.name.substr(0, shape.name.rfind("_fp16")));
    EXPECT_EQ(shape.measure, known->second) << shape.name;
  }
}

TEST(Shapes, TheTextsGridIsWhole) {
  const Suite& texts = *find_suite("texts");
  EXPECT_TRUE(texts.apart);
  const auto has = [&](const std::string& name) {
    return std::count(texts.shapes.begin(), texts.shapes.end(), name) == 1;
  };
  for (const int heads : {8, 16, 32, 64, 128}) {
    for (const int batch : {1, 2, 4, 8, 16}) {
      for (int tokens = 512; tokens <= 16384; tokens *= 2) {
        for (const char* dtype : {"", "_fp16"}) {
          const std::string rest = "_b" + std::to_string(batch) + "_k" + std::to_string(tokens);
          const std::string begin = "h" + std::to_string(heads);
          EXPECT_TRUE(has(begin + "_q1" + rest + dtype)) << begin << rest;
          EXPECT_TRUE(has(begin + "_q2" + rest + "_causal" + dtype)) << begin << rest;
        }
      }
    }
  }
  // A list of equal lengths is a shape of the grid by another name; log-normal shapes have a padded
  // partner.
  EXPECT_EQ(padded("h128_q1_k2048+2048+2048+2048+2048+2048+2048+2048"), "h128_q1_b8_k2048");
  for (const char* batch : {"4", "8", "16"}) {
    const std::string name = "h128_q1_b" + std::string(batch) + "_klognormal2048";
    EXPECT_TRUE(has(name) && has(padded(name))) << name;
    EXPECT_NE(padded(name), name);
  }
}

TEST(Shapes, CrossAttentionHasNoMask) {
  std::vector<Shape> shapes;
  ASSERT_OK(select_shapes("cross", "", DType::kBFloat16, &shapes));
  for (const Shape& shape : shapes) {
    EXPECT_FALSE(shape.spec.causal) << shape.name;
    EXPECT_GT(shape.spec.seqlen_q, 1) << shape.name;
  }
}

TEST(Shapes, InvariantShapesComeInPairs) {
  const std::vector<std::string>& names = find_suite("invariant")->shapes;
  ASSERT_EQ(names.size(), 6u);
  for (size_t i = 0; i < names.size(); i += 2) EXPECT_EQ(names[i + 1], names[i] + "_split1024");
  EXPECT_EQ(find_suite("none"), nullptr);
}

TEST(Shapes, PaddingMakesAllAsLongAsTheLongest) {
  EXPECT_EQ(padded("h128_q1_b128_kskew131072"), "h128_q1_b128_k131072");
  EXPECT_EQ(padded("h16_q2_b4_kstepped1000_causal_fp16"), "h16_q2_b4_k1000_causal_fp16");
  EXPECT_EQ(padded("h128_q1_b64_k4096"), "h128_q1_b64_k4096");
  Shape uneven;
  ASSERT_OK(parse_shape("h1_q1_b128_klognormal2048", &uneven));
  const std::vector<int32_t>& lengths = uneven.spec.lengths;
  Shape even;
  ASSERT_OK(parse_shape(padded(uneven.name), &even));
  EXPECT_EQ(even.spec.seqlen_k, *std::max_element(lengths.begin(), lengths.end()));
  // The suite also has, for each batch of unequal lengths, the padded one.
  const std::vector<std::string>& names = find_suite("varlen")->shapes;
  for (const std::string& name : names) {
    EXPECT_NE(std::find(names.begin(), names.end(), padded(name)), names.end()) << name;
  }
}

TEST(Shapes, SteppedLengthsAreEvenSteps) {
  Shape shape;
  ASSERT_OK(parse_shape("h1_q1_b128_kstepped32768", &shape));
  for (int i = 0; i < 128; ++i) EXPECT_EQ(shape.spec.lengths[size_t(i)], 256 * (i + 1));
  ASSERT_OK(parse_shape("h1_q1_b3_kstepped100", &shape));
  EXPECT_EQ(shape.spec.lengths, (std::vector<int32_t>{34, 67, 100}));
}

TEST(Shapes, APeakIsTheDeviationOfTheLogits) {
  Shape shape;
  ASSERT_OK(parse_shape("h4_q1_b1_k2000_split64_peak4_fp16", &shape));
  EXPECT_EQ(shape.title(), "h_q=4 s_q=1, 1 x 2000 split every 64, logits of deviation 4, fp16");
  const DataSet data = make_data_set(shape.spec);
  EXPECT_OK(validate(data.problem));
  double sum = 0, squares = 0;
  for (int token = 0; token < 2000; ++token) {
    double logit = 0;
    for (int column = 0; column < kHeadDimQK; ++column) {
      const uint16_t q = q_bits(0, DType::kFloat16, DataKind::kFlat, 0, 0, 0, column);
      const uint16_t k = kv_bits(0, DType::kFloat16, DataKind::kFlat, 0, token, 0, column);
      logit +=
          double(to_float(std::bit_cast<float16>(q))) * double(to_float(std::bit_cast<float16>(k)));
    }
    logit *= double(data.problem.softmax_scale);
    sum += logit;
    squares += logit * logit;
  }
  const double mean = sum / 2000;
  EXPECT_NEAR(std::sqrt(squares / 2000 - mean * mean), 4, 0.4);
}

TEST(Shapes, SelectionTakesNamesAndExpressions) {
  std::vector<Shape> shapes;
  ASSERT_OK(select_shapes("main", "h16_.*k8192,h3_q1_b1_k20", DType::kFloat16, &shapes));
  ASSERT_EQ(shapes.size(), 3u);
  EXPECT_EQ(shapes[2].name, "h3_q1_b1_k20_fp16");
  EXPECT_EQ(select_shapes("main", "h16_.*k8192,nothing", DType::kBFloat16, &shapes).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(select_shapes("main", "(", DType::kBFloat16, &shapes).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(select_shapes("mane", "", DType::kBFloat16, &shapes).code(),
            StatusCode::kInvalidArgument);
}

TEST(Protocol, RunsAreCountedByTime) {
  EXPECT_EQ(gpu_run_counts(999).runs, 25);
  EXPECT_EQ(gpu_run_counts(1000).runs, 9);
  EXPECT_EQ(gpu_run_counts(1e9).runs, 1);
}

TEST(Catalogue, HasWhatTheScriptsNeed) {
  const auto json = nlohmann::json::parse(catalogue(MachineKind::kModel, every_shape()));
  for (const Suite& suite : suites()) {
    for (const std::string& name : suite.shapes) EXPECT_TRUE(json["shapes"].contains(name)) << name;
  }
  const auto& shape = json["shapes"]["h128_q2_b128_k4096_causal"];
  EXPECT_EQ(shape["h_q"], 128);
  EXPECT_EQ(shape["tokens"], 128 * 4096);
  EXPECT_EQ(shape["flop"], 2.0 * 2 * 128 * 128 * 4096 * 1088);
  EXPECT_EQ(shape["suites"].dump(), R"(["main","table","compute","causal","choice","all"])");
  const auto& uneven = json["shapes"]["h16_q2_b2_kvaried256_causal"];
  EXPECT_EQ(uneven["lengths"], "varied");
  EXPECT_EQ(uneven["seqlens_k"].size(), 2u);
  EXPECT_EQ(json["shapes"]["h16_q1_b2_k256_peak4_fp16"]["peak"], 4);
  EXPECT_EQ(json["protocol"]["run_counts"][0]["below_us"], 1000);
  EXPECT_TRUE(json["protocol"]["run_counts"][2]["below_us"].is_null());
  EXPECT_EQ(json["tolerances"]["out"]["abs"], kOutTolerance.abs_tol);
}

TEST(Limits, WorkOfTheFlagshipShape) {
  Problem problem;
  problem.batch = 64;
  problem.num_heads_q = 128;
  const Work work = work_of(problem, 64 * 4096);
  EXPECT_DOUBLE_EQ(work.flop, 2.0 * 64 * 128 * 4096 * 1088);
  EXPECT_DOUBLE_EQ(work.bytes, 64.0 * 4096 * 1152 + 64 * 128 * (576 + 512) * 2);
  problem.cache_format = CacheFormat::kFp8Tile128;
  const Work quantised = work_of(problem, 64 * 4096);
  EXPECT_EQ(quantised.flop, work.flop);
  EXPECT_DOUBLE_EQ(quantised.bytes, 64.0 * 4096 * 656 + 64 * 128 * (576 + 512) * 2);
}

TEST(Limits, SharesTakeTheLargestTerm) {
  Ceilings ceilings;
  ceilings.read = 4e12;
  ceilings.fp32 = 60e12;
  ceilings.shared = 30e12;
  ceilings.launch = 3e-6;
  ceilings.matrix_cold = 800e12;
  Prediction prediction;
  prediction.fp32_flop = 60e9;     // 1 ms
  prediction.shared_bytes = 15e9;  // 0.5 ms
  prediction.dram_bytes = 4e8;     // 0.1 ms
  prediction.busy_fraction = 0.5;
  const OwnLimit limit = own_limit(prediction, {1, 1}, ceilings, Mode::kCold);
  EXPECT_DOUBLE_EQ(limit.seconds(), 3e-6 + 2e-3);
  EXPECT_STREQ(limit.name(), "fp32");
  EXPECT_DOUBLE_EQ(floor_of({80e9, 1e6}, ceilings, Mode::kCold).seconds(), 3e-6 + 1e-4);
  EXPECT_DOUBLE_EQ(floor_of({1e9, 4e9}, ceilings, Mode::kCold).seconds(), 1e-3);
}

TEST(Limits, AMissingCeilingIsNotGuessed) {
  Ceilings ceilings;
  ceilings.read = 4e12;
  ceilings.launch = 3e-6;
  EXPECT_TRUE(std::isnan(floor_of({1e9, 4e9}, ceilings, Mode::kCold).seconds()));
  Prediction prediction;
  prediction.dram_bytes = 4e8;
  const auto seconds = [&] {
    return own_limit(prediction, {1, 1}, ceilings, Mode::kCold).seconds();
  };
  EXPECT_DOUBLE_EQ(seconds(), 1e-4);
  prediction.matrix_flop = 1;
  EXPECT_TRUE(std::isnan(seconds()));
}

TEST(Limits, NoOwnLimitIsBelowTheFloor) {
  Recorded recorded;
  ASSERT_OK(load_newest_recorded(&recorded));
  const DeviceLimits h200{90, 132, 232448, 2147483647};
  for (const Shape& shape : every_shape()) {
    const DataSet data = make_data_set(shape.spec);
    const Work work = work_of(data.problem, data.total_tokens());
    for (const Stage& stage : stages(MachineKind::kModel)) {
      if (stage.on_cpu || !can_read(stage, shape.spec.cache_format)) continue;
      Prediction prediction;
      ASSERT_OK(predict(stage, data.problem, data.total_tokens(), h200, &prediction));
      for (const Mode mode : {Mode::kCold, Mode::kSustained}) {
        const double floor = floor_of(work, recorded.ceilings, mode).seconds();
        EXPECT_GE(own_limit(prediction, work, recorded.ceilings, mode).seconds(),
                  floor * (1 - 1e-12))
            << stage.slug << " " << shape.name;
      }
    }
  }
}

TEST(Table, AlignsUtf8) {
  Table table({"a", "µs", "note"});
  table.add({"long name", "1", "—"});
  table.add({"b", "12.5", "text"});
  EXPECT_EQ(table.to_string(),
            "a            µs  note\n"
            "─────────  ────  ────\n"
            "long name     1  —\n"
            "b          12.5  text\n");
}

TEST(Table, Numbers) {
  EXPECT_EQ(number(0.01234), "0.0123");
  EXPECT_EQ(number(12345), "12345");
  EXPECT_EQ(number(kUnknown), "—");
  EXPECT_EQ(microseconds(9.876), "9.88");
  EXPECT_EQ(microseconds(118.44), "118.4");
  EXPECT_EQ(microseconds(12345.6), "12346");
  EXPECT_EQ(percent(0.814), "81%");
  EXPECT_EQ(percent(0.0123), "1.2%");
  EXPECT_EQ(factor(3.44), "3.4×");
  EXPECT_EQ(spread({118.44, 117.9, 119.6, 36}), "118.4 (117.9–119.6)");
}

/// Writes down what it is asked to run.
class RecordingRunner final : public Runner {
 public:
  RunCounts run_counts(double us) const override {
    if (us > 1000) return {.warmups = 0, .rounds = 2, .runs = 1, .sustained = true};
    return {.warmups = 3, .rounds = 2, .runs = 4, .sustained = true};
  }
  Status prepare(const Operation&, int*) override { return {}; }
  void rest(double expected_us) override { rests.push_back(expected_us); }
  Status run_cold(int handle, int runs, std::vector<double>* samples) override {
    if (runs > 0) note('c', handle, runs);
    if (handle == broken) return {StatusCode::kCudaError, "broken"};
    samples->insert(samples->end(), static_cast<size_t>(runs), 1.0);
    return {};
  }
  Status run_warm(int handle, int runs, std::vector<double>*) override {
    note('w', handle, runs);
    return {};
  }
  Status run_sustained(int handle, double, double warmup_s, int runs, std::vector<double>* samples,
                       Readings* readings) override {
    note('s', handle, runs);
    warmups.push_back(warmup_s);
    samples->insert(samples->end(), static_cast<size_t>(runs), 2.0);
    readings->sm_mhz = 1000;
    return {};
  }
  void clear() override {}
  bool lost() const override { return is_lost; }

  void note(char what, int handle, int runs) {
    log += what + std::to_string(handle) + 'x' + std::to_string(runs) + ' ';
  }

  std::vector<double> warmups;  ///< s, of the sustained runs
  std::vector<double> rests;    ///< us that the run after each rest was expected to take
  std::string log;              ///< "c0x4 ": 4 cold runs of handle 0; s for sustained
  int broken = -1;
  bool is_lost = false;
};

/// Benchmarks a/cold, a/sustained, b/cold, b/sustained.
std::unique_ptr<GoogleBenchmark> a_and_b(const std::vector<std::string>& arguments = {}) {
  return driver({"a/cold", "a/sustained", "b/cold", "b/sustained"}, arguments);
}

std::vector<Contender> two_contenders(double second_us) {
  std::vector<Contender> contenders(2);
  contenders[0].cold_name = "a/cold";
  contenders[0].sustained_name = "a/sustained";
  contenders[1].cold_name = "b/cold";
  contenders[1].sustained_name = "b/sustained";
  contenders[0].expected_us = 10;
  contenders[1].handle = 1;
  contenders[1].expected_us = second_us;
  return contenders;
}

const auto kSilent = [](const std::string&) {};

TEST(Sampler, RoundsAreInterleaved) {
  RecordingRunner runner;
  auto contenders = two_contenders(5000);
  sample(runner, *a_and_b(), contenders, kSilent);
  EXPECT_EQ(runner.log, "c0x3 c0x4 c1x1 c0x4 c1x1 s0x8 s1x2 ");
  EXPECT_EQ(runner.rests, (std::vector<double>{10, 5000, 10, 5000}));
  EXPECT_EQ(contenders[0].cold.size(), 8u);  // warm-ups are not samples
  EXPECT_EQ(contenders[0].sustained.size(), 8u);
  EXPECT_EQ(contenders[1].cold.size(), 2u);
  EXPECT_EQ(contenders[0].readings.sm_mhz, 1000);
}

TEST(Sampler, OverTwoHundredMillisecondsIsShownOnce) {
  RecordingRunner runner;
  auto contenders = two_contenders(201e3);
  sample(runner, *a_and_b(), contenders, kSilent);
  EXPECT_TRUE(contenders[1].once);
  EXPECT_FALSE(contenders[0].once);
  EXPECT_EQ(contenders[1].cold.size(), 2u);
  EXPECT_TRUE(contenders[1].sustained.empty());
}

TEST(Sampler, WhatIsTimedOnlyColdHasNoSustainedRuns) {
  RecordingRunner runner;
  auto contenders = two_contenders(5000);
  contenders[0].sustained_name = "";
  sample(runner, *a_and_b(), contenders, kSilent);
  EXPECT_EQ(runner.log, "c0x3 c0x4 c1x1 c0x4 c1x1 s1x2 ");
}

TEST(Sampler, RoundsComeInRandomOrderIfAsked) {
  // Only one in two million random orders of 12 rounds of two contenders is not interleaved.
  RecordingRunner runner;
  auto contenders = two_contenders(5000);
  const std::vector<std::string> flags{"--benchmark_repetitions=12",
                                       "--benchmark_enable_random_interleaving=true"};
  sample(runner, *a_and_b(flags), contenders, kSilent);
  const std::string cold = runner.log.substr(0, runner.log.find('s'));
  EXPECT_EQ(contenders[0].cold.size(), 48u);
  EXPECT_EQ(contenders[1].cold.size(), 12u);
  EXPECT_LT(cold.find("c1x1"), cold.rfind("c0x4")) << cold;
}

TEST(Sampler, WhatIsNotChosenDoesNotRun) {
  RecordingRunner runner;
  auto contenders = two_contenders(10);
  sample(runner, *a_and_b({"--benchmark_filter=b/sus"}), contenders, kSilent);
  EXPECT_EQ(runner.log, "s1x8 ");
  EXPECT_TRUE(contenders[0].cold.empty());
}

TEST(Sampler, EverySustainedRoundWarmsUp) {
  RecordingRunner runner;
  auto contenders = two_contenders(10);
  contenders[0].sustained_warmup_s = 1.2;
  sample(runner, *a_and_b({"--benchmark_filter=a/sus", "--benchmark_repetitions=2"}), contenders,
         kSilent);
  EXPECT_EQ(runner.log, "s0x8 s0x8 ");
  EXPECT_EQ(runner.warmups, (std::vector<double>{1.2, 1.2}));
}

TEST(Sampler, TensorCoresAreWarmedUpLonger) {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    EXPECT_EQ(stage.sustained_warmup_s, stage.slug < "05" ? 0.2 : 1.2) << stage.slug;
  }
}

TEST(Sampler, AnErrorLeavesNoSamples) {
  RecordingRunner runner;
  runner.broken = 1;
  auto contenders = two_contenders(10);
  sample(runner, *a_and_b(), contenders, kSilent);
  EXPECT_OK(contenders[0].status);
  EXPECT_EQ(contenders[1].status.message(), "broken");
  EXPECT_TRUE(contenders[1].cold.empty());
  EXPECT_EQ(runner.log.find("s1"), std::string::npos);
}

TEST(Sampler, NothingRunsOnALostDevice) {
  RecordingRunner runner;
  runner.is_lost = true;
  auto contenders = two_contenders(10);
  sample(runner, *a_and_b(), contenders, kSilent);
  EXPECT_EQ(runner.log, "");
  EXPECT_EQ(contenders[0].status.code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace mla::bench
