// The model of a decode on several GPUs: its terms one by one, and what it is fitted to.
#include "bench/service/scale.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stages/common/parallel/parallel.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

DecodeCase case_of(int heads, int batch, int tokens) {
  DecodeCase spec;
  spec.num_heads_q = heads;
  spec.batch = batch;
  spec.seqlen_k = tokens;
  return spec;
}

// 10 us, and per thousand tokens another 1 us with 16 heads, or 2 us with 128 heads.
DecodeModel simple_model() {
  DecodeModel model;
  for (const int heads : {16, 128}) model.of_heads[heads].a = 10;
  model.of_heads[16].c = 1e-3;
  model.of_heads[128].c = 2e-3;
  return model;
}

const Forecast& of(const std::vector<Forecast>& all, const std::string& way) {
  for (const Forecast& one : all) {
    if (one.way == way) return one;
  }
  ADD_FAILURE() << "no " << way;
  return all.front();
}

TEST(DecodeModel, BetweenRecordedHeads) {
  const DecodeModel model = simple_model();
  const DecodeShape shape{1, 1e6, 1e6};
  EXPECT_DOUBLE_EQ(model.us(16, shape), 1010);
  EXPECT_DOUBLE_EQ(model.us(1, shape), 1010);
  EXPECT_DOUBLE_EQ(model.us(128, shape), 2010);
  EXPECT_DOUBLE_EQ(model.us(256, shape), 4020);
  EXPECT_DOUBLE_EQ(model.us(96, shape), 2010 * 0.75);  // by FLOP, as of 128 heads
  EXPECT_DOUBLE_EQ(model.us(32, shape), 1010);         // by bytes, as of 16 heads
}

TEST(Scale, TermsInAHost) {
  Links links;
  links.exchange_us = 20;
  links.nvlink_gbps = 100;
  links.hop_us = 1;
  links.merge_us = 5;
  links.memory_gbps = 1000;
  const DecodeCase spec = case_of(128, 10, 100'000);
  const double rows = 1280, out = 1028;
  const auto four = forecast(simple_model(), links, spec, 4);
  const Forecast& gathered = of(four, "context, all_gather");
  EXPECT_DOUBLE_EQ(gathered.decode_us, 10 + 2e-3 * 250'000);
  EXPECT_DOUBLE_EQ(gathered.exchange_us, 22 + 3 * rows * out / 100e3);
  EXPECT_DOUBLE_EQ(gathered.merge_us, 5 + 5 * rows * out / 1e6);
  EXPECT_DOUBLE_EQ(gathered.cache_gb, 1e6 * 1152 / 4 / 1e9);
  EXPECT_DOUBLE_EQ(gathered.memory_gb(), gathered.cache_gb + 4 * rows * out / 1e9);
  const Forecast& sent = of(four, "context, all_to_all");
  EXPECT_DOUBLE_EQ(sent.exchange_us, 22 + 0.75 * rows * out / 100e3);
  EXPECT_DOUBLE_EQ(sent.merge_us, 5 + 1.25 * rows * out / 1e6);
  const Forecast& summed = of(four, "context, reduce_scatter");
  EXPECT_DOUBLE_EQ(summed.exchange_us, 44 + rows * (3 * 4 + 0.75 * 2048) / 100e3);
  // Weighing reads out and lse and writes fp32; rounding reads a quarter of that and lse.
  const double weigh = 1024 + 4 * 4 + 2048, round = (2048 + 4 * 4 + 1028) / 4.0;
  EXPECT_NEAR(summed.merge_us, 10 + rows * (weigh + round) / 1e6, 1e-9);
  EXPECT_DOUBLE_EQ(of(four, "heads").us(), 1010);  // a GPU's 32 heads read the whole cache
  EXPECT_DOUBLE_EQ(of(four, "heads").memory_gb(), 1e6 * 1152 / 1e9);
  EXPECT_DOUBLE_EQ(of(four, "batch").us(), 10 + 2e-3 * 300'000);  // one has three of ten sequences
  EXPECT_EQ(forecast(simple_model(), links, spec, 1).size(), 1u);
  EXPECT_DOUBLE_EQ(forecast(simple_model(), links, spec, 1)[0].us(), 2010);
  EXPECT_EQ(forecast(simple_model(), links, spec, 3).size(), 2u);  // 3 does not divide the heads
  for (const Forecast& one : forecast(simple_model(), links, spec, 16)) {
    EXPECT_NE(one.way, "batch");  // 10 sequences are too few
  }
}

// Groups of ranks with the same heads share pages: rows and exchanges are the group's alone.
TEST(Scale, HeadsTimesContext) {
  const Links links;
  const DecodeCase spec = case_of(128, 10, 100'000);
  const auto sixteen = forecast(simple_model(), links, spec, 16);
  std::vector<std::string> both;
  for (const Forecast& one : sixteen) {
    if (one.is_both()) both.push_back(one.way);
  }
  std::vector<std::string> expected;
  for (const char* way : {"heads 2 × context 8", "heads 4 × context 4", "heads 8 × context 2"}) {
    for (const Exchange exchange : kExchanges) {
      expected.push_back(std::string(way) + ", " + to_string(exchange));
    }
  }
  EXPECT_EQ(both, expected);
  const Forecast& one = of(sixteen, "heads 4 × context 4, all_to_all");
  const ExchangeTime time = exchange_time(links, Exchange::kAllToAll, 1280 / 4.0, 4);
  EXPECT_EQ(one.ranks, 16);
  EXPECT_DOUBLE_EQ(one.decode_us, 10 + 1e-3 * 250'000);  // 32 heads, a quarter of the tokens
  EXPECT_DOUBLE_EQ(one.exchange_us, time.exchange_us);   // all in one host
  EXPECT_DOUBLE_EQ(one.merge_us, time.merge_us);
  EXPECT_DOUBLE_EQ(one.cache_gb, 1e6 * 1152 / 4 / 1e9);
  EXPECT_DOUBLE_EQ(one.buffers_gb, 2 * 320 * 1028 / 1e9);
  // Heads by the exchange are the group's: of two, four ranks have none each.
  std::vector<std::string> few;
  for (const Forecast& way : forecast(simple_model(), links, case_of(16, 1, 1000), 32)) {
    if (way.head_ranks == 8) few.push_back(way.way);
  }
  EXPECT_EQ(few, std::vector<std::string>{"heads 8 × context 4, all_gather"});
}

// The terminal's table has of these ways the best alone.
TEST(Scale, TheTableHasTheBestOfBoth) {
  ScaleModel model;
  model.decode = simple_model();
  Shape shape;
  ASSERT_OK(parse_shape("h128_q1_b10_k100000", &shape));
  std::vector<Forecast> all;
  std::string table;
  ASSERT_OK(forecast_all(model, shape, std::vector<int>{16}, &all, &table));
  const Forecast* best = nullptr;
  for (const Forecast& one : all) {
    if (one.is_both() && (best == nullptr || one.us() < best->us())) best = &one;
  }
  ASSERT_NE(best, nullptr);
  const size_t found = table.find("heads ");
  ASSERT_NE(found, std::string::npos) << table;
  EXPECT_EQ(table.substr(found, best->way.size()), best->way) << table;
  EXPECT_EQ(table.find(" × ", found + best->way.size()), std::string::npos) << table;
}

// What the model says of memory is what a rank asks for.
TEST(Scale, BuffersAreThoseOfTheWorkspace) {
  Stage stage;
  stage.slug = "none";  // and works in nothing
  for (const int ranks : {2, 4, 64}) {
    for (const Exchange exchange : kExchanges) {
      Problem problem;
      problem.batch = 64;
      problem.seqlen_q = 1;
      problem.num_heads_q = 128;
      problem.num_heads_kv = 1;
      problem.page_size = 64;
      problem.max_pages_per_seq = 128;
      problem.num_pages = 64 * 128;
      problem.softmax_scale = 0.1F;
      size_t bytes = 0;
      ASSERT_OK(parallel_workspace_bytes(stage, problem, {.exchange = exchange}, ranks, &bytes));
      const auto all = forecast(simple_model(), {}, case_of(128, 64, 8192), ranks);
      const Forecast& one = of(all, std::string("context, ") + to_string(exchange));
      EXPECT_NEAR(one.buffers_gb * 1e9 / static_cast<double>(bytes), 1, 0.01)
          << ranks << " " << to_string(exchange);
    }
  }
}

TEST(Scale, FromHowManyTokensOn) {
  ScaleModel model;
  model.decode = simple_model();
  model.links.exchange_us = 90;
  model.links.hop_us = model.links.merge_us = 0;
  model.links.nvlink_gbps = model.links.memory_gbps = 1e9;
  int compared = 0;
  for (const Crossover& one : crossovers(model)) {
    // 10 us + c T / n + 90 us of either exchange; over one GPU this is less from T c (1 - 1 / n) = 90 us on.
    const double c = one.heads == 128 ? 2e-3 : 1e-3, n = one.ranks, tokens = 90 / (1 - 1 / n);
    EXPECT_NEAR(one.over_one, tokens / c / one.sequences, 2) << one.heads << " " << n;
    // By heads 128 take as long as 16, or as their share if that is more: on two GPUs as 16.
    if (one.heads == 16) {
      EXPECT_EQ(one.over_heads, one.over_one);
    } else if (one.ranks == 2) {  // the same time, and an exchange: never
      EXPECT_TRUE(std::isinf(one.over_heads));
      ++compared;
    } else {  // 1 us for a thousand, against 2 / n
      EXPECT_NEAR(one.over_heads, 90 / (1e-3 - 2e-3 / n) / one.sequences, 2) << n;
      ++compared;
    }
  }
  EXPECT_EQ(compared, 6);
  model.links.exchange_us = 0;
  for (const Crossover& one : crossovers(model)) EXPECT_LT(one.over_one, 2);
}

TEST(Scale, TermsAcrossHosts) {
  Links links;
  links.exchange_us = 20;
  links.hop_us = 1;
  links.network_us = 30;
  links.network_gbps = 10;
  const DecodeCase spec = case_of(128, 1, 1'000'000);
  const double rows = 128, out = 1028;
  const auto all = forecast(simple_model(), links, spec, 16);
  // Each of a host's eight GPUs fetches an eighth of what the other host has.
  EXPECT_DOUBLE_EQ(of(all, "context, all_gather").exchange_us,
                   20 + 6 + 30 + rows * out * 8 / 8 / 10e3);
  // Sends to the others, 14 after the first, all of which pass the network at once.
  EXPECT_DOUBLE_EQ(of(all, "context, all_to_all").exchange_us,
                   20 + 14 + 30 + rows * out / 2 / 10e3);
  EXPECT_DOUBLE_EQ(exchange_time(links, Exchange::kAllToAll, 0, 64).exchange_us, 20 + 62 + 30);
  EXPECT_DOUBLE_EQ(exchange_time(links, Exchange::kAllGather, 0, 64).exchange_us, 20 + 6 + 7 * 30);
  EXPECT_DOUBLE_EQ(of(all, "context, reduce_scatter").exchange_us,
                   2 * 56 + rows * (4.0 * 8 / 8 + 2048.0 * 8 / 16 / 8) / 10e3);
}

TEST(SimulatedRanks, ShareTokensAndAppends) {
  TimeModel model;
  model.heads = 128;
  model.decode.a = 10;
  model.decode.c = 2e-3;
  model.plan_us[0] = 3;
  model.append_us[0] = 4;
  model.append_us[2] = 0.5;
  Links links;
  StepWork work;
  for (int i = 0; i < 10; ++i) {
    SequenceWork sequence;
    sequence.decoded = 100'000;
    sequence.appended = 8;
    work.sequences.push_back(sequence);
  }
  const ExchangeTime time = exchange_time(links, Exchange::kAllToAll, 1280, 4);
  SimulatedRanks ranks(model, 3, links, Exchange::kAllToAll, 4);
  double seconds = 0;
  ASSERT_OK(ranks.step(work, &seconds));
  const double decode = 10 + 2e-3 * 250'000, append = 4 + 80 * 0.5 / 4;
  EXPECT_NEAR(seconds * 1e6, 3 + 3 * (decode + append + time.exchange_us + time.merge_us), 1e-6);
  for (SequenceWork& sequence : work.sequences) sequence.appended = 0;
  ASSERT_OK(ranks.step(work, &seconds));
  EXPECT_NEAR(seconds * 1e6, 3 + 3 * (decode + time.exchange_us + time.merge_us), 1e-6);
}

/// A report of exchanges over two ranks: 12 us and 300 GB/s; a kernel around them: 4 us and 2000 GB/s.
nlohmann::json report_of(const std::string& date) {
  nlohmann::json report;
  report["context"] = {{"schema", "flashmla_parallel/1"}, {"date_utc", date + "T03:04:05Z"}};
  for (const int batch : {1, 8, 32, 128}) {
    const double rows = 128.0 * batch;
    for (const Exchange exchange : kExchanges) {
      const bool is_gather = exchange == Exchange::kAllGather;
      const bool is_sum = exchange == Exchange::kReduceScatter;
      const double bytes = rows * 1028 / (is_gather ? 1 : 2),
                   us = is_sum ? 999 : 12 + bytes / 300e3;
      const double moved = is_gather ? 3 * 1028 : is_sum ? 3080 + (2056 + 1028) / 2.0 : 1.5 * 1028;
      report["rows"].push_back({{"shape", "h128_q1_b" + std::to_string(batch) + "_k1000"},
                                {"ranks", 2},
                                {"page_ranks", 2},
                                {"slices", 1},
                                {"exchange", to_string(exchange)},
                                {"bytes_sent", bytes},
                                {"exchange_us", us},
                                {"merge_us", us + (is_sum ? 8 : 4) + rows * moved / 2000e3}});
    }
  }
  report["rows"].push_back({{"ranks", 2}, {"page_ranks", 1}, {"exchange", "all_gather"}});
  return report;
}

TEST(Links, AreFittedToWhatWasMeasured) {
  Links links;
  ASSERT_OK(fit_links({{"one.json", report_of("2026-01-02").dump()}}, &links));
  EXPECT_NEAR(links.exchange_us, 12, 1e-6);
  EXPECT_NEAR(links.nvlink_gbps, 300, 1e-6);
  EXPECT_EQ(links.origin, "two GPUs, 2026-01-02");
  EXPECT_NEAR(links.merge_us, 4, 1e-6);
  EXPECT_NEAR(links.memory_gbps, 2000, 1e-3);
  EXPECT_EQ(links.merge_origin, "two GPUs, 2026-01-02");
  // Without times of merges what is assumed stays, and is called so.
  nlohmann::json bare = report_of("2026-01-02");
  for (auto& row : bare["rows"]) row.erase("merge_us");
  Links assumed;
  ASSERT_OK(fit_links({{"one.json", bare.dump()}}, &assumed));
  EXPECT_NEAR(assumed.exchange_us, 12, 1e-6);
  EXPECT_EQ(assumed.merge_us, Links().merge_us);
  EXPECT_EQ(assumed.merge_origin, "assumed");
  Links nominal;
  ASSERT_OK(fit_links({}, &nominal));
  EXPECT_EQ(nominal.origin, "nominal");
  for (const char* text : {"{}", "nothing", "[]"}) {
    const Status status = fit_links({{"bad.json", text}}, &nominal);
    EXPECT_EQ(status.code(), StatusCode::kFileError);
    EXPECT_NE(status.message().find("bad.json is no report"), std::string::npos);
  }
}

// By date and by what it has, not by name; and never by terms that only look fitted.
TEST(Links, TheReportIsTheNewestOfTwoGpus) {
  const std::string older = report_of("2026-01-02").dump(), newer = report_of("2026-01-05").dump();
  nlohmann::json four = report_of("2026-01-09");
  for (auto& row : four["rows"]) row["ranks"] = 4;  // by two groups of two
  nlohmann::json timeline = report_of("2026-01-10");
  for (auto& row : timeline["rows"]) row.erase("exchange_us");
  Links links;
  ASSERT_OK(fit_links({{"h200x2_parallel_2026-01-05.json", newer},
                       {"h200x4_parallel_2026-01-02.json", older},
                       {"h200x4_parallel_2026-01-09.json", four.dump()},
                       {"h200x8_parallel_2026-01-10.json", timeline.dump()}},
                      &links));
  EXPECT_EQ(links.origin, "two GPUs, 2026-01-05");
  EXPECT_EQ(fit_links({{"four.json", four.dump()}}, &links).code(), StatusCode::kFileError);
  Links nominal;
  ASSERT_OK(fit_links({{"timeline.json", timeline.dump()}}, &nominal));
  EXPECT_EQ(nominal.origin, "nominal");

  nlohmann::json few = report_of("2026-01-09");
  few["rows"].erase(few["rows"].begin() + 3, few["rows"].end());
  Status status = fit_links({{"old.json", older}, {"few.json", few.dump()}}, &nominal);
  EXPECT_EQ(status.code(), StatusCode::kFileError);
  EXPECT_NE(status.message().find("few.json times 2 exchanges"), std::string::npos)
      << status.message();
  nlohmann::json flat = report_of("2026-01-09");
  for (auto& row : flat["rows"]) row["exchange_us"] = 12;
  status = fit_links({{"flat.json", flat.dump()}}, &nominal);
  EXPECT_EQ(status.code(), StatusCode::kFileError);
  EXPECT_NE(status.message().find("flat.json: "), std::string::npos) << status.message();
  EXPECT_EQ(nominal.origin, "nominal");  // a fit that fails changes nothing
}

TEST(Links, AllReportsOfAFolderAreRead) {
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / "scale_test";
  std::filesystem::create_directories(folder);
  for (const char* name : {"h200x4_parallel_a.json", "h200x2_parallel_b.json",
                           "parallel_scale.json", "h200x2_parallel_b.txt"}) {
    std::ofstream(folder / name) << name;
  }
  const auto reports = load_parallel_reports(folder.string());
  std::filesystem::remove_all(folder);
  ASSERT_EQ(reports.size(), 2u);
  EXPECT_EQ(reports[0].name, "h200x2_parallel_b.json");
  EXPECT_EQ(reports[0].text, reports[0].name);
  EXPECT_EQ(reports[1].name, "h200x4_parallel_a.json");
}

TEST(DecodeModel, IsFittedToTheRecordings) {
  DecodeModel model;
  ASSERT_OK(fit_decode_model(load_all_recorded(), &model));
  for (const int heads : {16, 128}) {
    ASSERT_TRUE(model.of_heads.contains(heads)) << heads;
    EXPECT_LT(model.of_heads[heads].median_error, 0.2) << heads;
  }
  EXPECT_EQ(fit_decode_model({}, &model).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mla::bench
