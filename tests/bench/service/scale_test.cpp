// The model of a decode on several GPUs: its terms one by one, and what it is fitted to.
#include "bench/service/scale.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

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
  EXPECT_DOUBLE_EQ(gathered.memory_gb, 1e6 * 1152 / 4 / 1e9);
  const Forecast& sent = of(four, "context, all_to_all");
  EXPECT_DOUBLE_EQ(sent.exchange_us, 22 + 0.75 * rows * out / 100e3);
  EXPECT_DOUBLE_EQ(sent.merge_us, 5 + 2 * rows * out / 1e6);
  const Forecast& summed = of(four, "context, reduce_scatter");
  EXPECT_DOUBLE_EQ(summed.exchange_us, 44 + rows * (3 * 4 + 0.75 * 2048) / 100e3);
  EXPECT_DOUBLE_EQ(of(four, "heads").us(), 1010);  // a GPU's 32 heads read the whole cache
  EXPECT_DOUBLE_EQ(of(four, "heads").memory_gb, 1e6 * 1152 / 1e9);
  EXPECT_DOUBLE_EQ(of(four, "batch").us(), 10 + 2e-3 * 300'000);  // one has three of ten sequences
  EXPECT_EQ(forecast(simple_model(), links, spec, 1).size(), 1u);
  EXPECT_DOUBLE_EQ(forecast(simple_model(), links, spec, 1)[0].us(), 2010);
  EXPECT_EQ(forecast(simple_model(), links, spec, 3).size(), 2u);   // 3 does not divide the heads
  EXPECT_EQ(forecast(simple_model(), links, spec, 16).size(), 4u);  // 10 sequences are too few
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
  EXPECT_DOUBLE_EQ(of(all, "context, all_to_all").exchange_us, 20 + 6 + 30 + rows * out / 2 / 10e3);
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

TEST(Links, AreFittedToWhatWasMeasured) {
  nlohmann::json report;
  report["context"] = {{"schema", "flashmla_parallel/1"}, {"date_utc", "2026-01-02T03:04:05Z"}};
  for (const double bytes : {1e5, 1e6, 4e6, 16e6}) {
    report["rows"].push_back({{"page_ranks", 2},
                              {"slices", 1},
                              {"exchange", bytes < 1e6 ? "all_to_all" : "all_gather"},
                              {"bytes_sent", bytes},
                              {"exchange_us", 12 + bytes / 300e3}});
  }
  report["rows"].push_back(
      {{"page_ranks", 2}, {"exchange", "reduce_scatter"}, {"bytes_sent", 1}, {"exchange_us", 999}});
  report["rows"].push_back({{"page_ranks", 1}, {"exchange", "all_gather"}});
  Links links;
  ASSERT_OK(fit_links(report.dump(), &links));
  EXPECT_NEAR(links.exchange_us, 12, 1e-6);
  EXPECT_NEAR(links.nvlink_gbps, 300, 1e-6);
  EXPECT_EQ(links.origin, "two GPUs, 2026-01-02");
  Links nominal;
  ASSERT_OK(fit_links("", &nominal));
  EXPECT_EQ(nominal.origin, "nominal");
  EXPECT_EQ(fit_links("{}", &nominal).code(), StatusCode::kFileError);
  EXPECT_EQ(fit_links("nothing", &nominal).code(), StatusCode::kFileError);
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
