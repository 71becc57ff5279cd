// The chooser: which table, which regime, which stage, with which settings. Bad tables are refused, and the
// built-in ones read. The stage "auto" must do what was chosen and nothing else.
#include "stages/common/choose/choose.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "stages/common/choose/built_in_tables.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

// For EXPECT_PRED2.
bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Problem problem_of(int rows, int batch, int tokens, int num_heads_kv = 1) {
  return {.batch = batch,
          .seqlen_q = 1,
          .num_heads_q = rows * num_heads_kv,
          .num_heads_kv = num_heads_kv,
          .num_pages = 1 << 20,
          .max_pages_per_seq = tokens / kDefaultPageSize,
          .softmax_scale = 1};
}

DeviceLimits limits_of(const std::string& name, int capability) {
  return {.compute_capability = capability,
          .multiprocessors = 132,
          .max_shared_bytes = 232448,
          .max_grid_x = 2147483647,
          .name = name};
}

Stage fake(const std::string& slug, int least, int most, bool plans = true) {
  Stage stage;
  stage.slug = slug;
  stage.min_compute_capability = least;
  stage.max_compute_capability = most;
  if (plans) stage.plan_shape = [](const Problem&, const DeviceLimits&) { return PlanShape{}; };
  return stage;
}

const std::vector<Stage> kStages = {fake("01_old", 80, 1 << 30, false),
                                    fake("02_anywhere", 80, 1 << 30), fake("03_hopper", 90, 90),
                                    fake("04_hopper", 90, 90)};

ChoiceTable table_of(std::vector<RegimeTimes> regimes, const std::string& device = "A card",
                     int capability = 90) {
  ChoiceTable table;
  table.origin = "a test";
  table.device = device;
  table.compute_capability = capability;
  table.measured = "today";
  for (RegimeTimes& one : regimes) table.add(std::move(one));
  return table;
}

Choice choose_by(const ChoiceTable& table, const DeviceLimits& limits = limits_of("A card", 90),
                 const Problem& problem = problem_of(16, 1, 512)) {
  return choose_among(kStages, {&table, 1}, problem, limits);
}

TEST(Choose, ARegimeIsWhatTheHostKnows) {
  Problem problem = problem_of(16, 5, 640, 2);
  problem.seqlen_q = 3;
  EXPECT_EQ(regime_of(problem), (Regime{48, 10, 640}));
  problem.page_size = 32;
  EXPECT_EQ(regime_of(problem).tokens, 320);
  EXPECT_EQ(to_string(Regime{1, 10, 640}), "1 row, 10 sequences, 640 tokens");
}

// Otherwise the batch could lead to another stage, and so change a sequence's bits.
TEST(Choose, WithFixedSplitsTheBatchDoesNotCount) {
  Problem few = problem_of(16, 1, 512), many = problem_of(16, 128, 65536);
  few.fixed_split_tokens = many.fixed_split_tokens = 1024;
  EXPECT_EQ(regime_of(few), regime_of(many));
  many.num_heads_q = 32;
  EXPECT_NE(regime_of(few), regime_of(many));
}

TEST(Choose, RowsCountUpToWhatATableHas) {
  const ChoiceTable table =
      table_of({{{64, 1, 64}, {}}, {{16, 1, 64}, {}}, {{128, 1, 64}, {}}, {{16, 1, 4096}, {}}});
  EXPECT_EQ(nearest(table, {1, 1, 64})->regime.rows, 16);
  EXPECT_EQ(nearest(table, {16, 1, 64})->regime.rows, 16);
  EXPECT_EQ(nearest(table, {17, 1, 64})->regime.rows, 64);
  EXPECT_EQ(nearest(table, {65, 1, 64})->regime.rows, 128);
  EXPECT_EQ(nearest(table, {1000, 1, 64})->regime.rows, 128);
  // However far away the only regime with these rows is.
  EXPECT_EQ(nearest(table, {17, 1, 4096})->regime, (Regime{64, 1, 64}));
}

TEST(Choose, ARegimeIsOfItsCacheFormat) {
  constexpr CacheFormat kTile = CacheFormat::kFp8Tile128;
  Problem problem = problem_of(16, 5, 640);
  problem.cache_format = kTile;
  EXPECT_EQ(regime_of(problem), (Regime{16, 5, 640, kTile}));
  problem.fixed_split_tokens = 64;
  EXPECT_EQ(regime_of(problem).cache_format, kTile);
  EXPECT_EQ(to_string(Regime{2, 1, 640, kTile}),
            "2 rows, 1 sequence, 640 tokens, cache fp8_tile128");
  // Rows, too, are compared among the regimes of one format only.
  const ChoiceTable table = table_of({{{16, 1, 64}, {}},
                                      {{64, 4, 64, kTile}, {}},
                                      {{32, 1, 64, kTile}, {}},
                                      {{64, 1, 64, kTile}, {}}});
  EXPECT_EQ(nearest(table, {16, 1, 64, kTile})->regime, (Regime{32, 1, 64, kTile}));
  EXPECT_EQ(nearest(table, {33, 1, 64, kTile})->regime, (Regime{64, 1, 64, kTile}));
  EXPECT_EQ(nearest(table, {200, 9, 64, kTile})->regime, (Regime{64, 4, 64, kTile}));
  EXPECT_EQ(nearest(table, {64, 1, 64})->regime, (Regime{16, 1, 64}));
  EXPECT_EQ(nearest(table, {64, 1, 64, CacheFormat::kFp8Tensor}), nullptr);
}

TEST(Choose, SequencesAndTokensCountByFactors) {
  const ChoiceTable table = table_of(
      {{{16, 1, 512}, {}}, {{16, 16, 512}, {}}, {{16, 1, 8192}, {}}, {{16, 16, 8192}, {}}});
  EXPECT_EQ(nearest(table, {16, 3, 512})->regime, (Regime{16, 1, 512}));
  EXPECT_EQ(nearest(table, {16, 5, 512})->regime, (Regime{16, 16, 512}));
  EXPECT_EQ(nearest(table, {16, 4, 512})->regime, (Regime{16, 1, 512}))
      << "of two that are equally near, the first";
  EXPECT_EQ(nearest(table, {16, 5, 2049})->regime, (Regime{16, 16, 8192}));
  EXPECT_EQ(nearest(table, {16, 200, 1 << 20})->regime, (Regime{16, 16, 8192}));
  EXPECT_EQ(nearest(table, {16, 0, 512})->regime, (Regime{16, 1, 512})) << "an empty batch";
}

TEST(Choose, RowsBeyondTheTablesAreFurtherSequences) {
  const ChoiceTable table =
      table_of({{{256, 1, 512}, {}}, {{256, 4, 512}, {}}, {{256, 64, 512}, {}}});
  EXPECT_EQ(nearest(table, {256, 1, 512})->regime, (Regime{256, 1, 512}));
  EXPECT_EQ(nearest(table, {3 * 256, 1, 512})->regime, (Regime{256, 4, 512}));
  EXPECT_EQ(nearest(table, {2 * 256 + 1, 1, 512})->regime, (Regime{256, 4, 512})) << "three tiles";
  EXPECT_EQ(nearest(table, {100 * 256, 2, 512})->regime, (Regime{256, 64, 512}));
}

TEST(Choose, TheTableIsTheDevicesOrOneOfItsKind) {
  const std::vector<ChoiceTable> tables = {table_of({}, "A100", 80), table_of({}, "H200", 90),
                                           table_of({}, "H100", 90)};
  const auto device = [&](const char* name, int capability) {
    return table_for(tables, limits_of(name, capability), CacheFormat::k16Bit)->device;
  };
  EXPECT_EQ(device("H100", 90), "H100");
  EXPECT_EQ(device("GH200", 90), "H200") << "the first of the same compute capability";
  EXPECT_EQ(device("H100", 80), "A100") << "the name alone says nothing";
  EXPECT_EQ(device("RTX 4090", 89), "A100") << "the first";
  EXPECT_EQ(table_for({}, limits_of("H200", 90), CacheFormat::k16Bit), nullptr);
}

TEST(Choose, TheTableHasTheCacheFormatIfOneHas) {
  const CacheFormat fp8 = CacheFormat::kFp8Tile128;
  const std::vector<ChoiceTable> tables = {
      table_of({{{16, 1, 512}, {}}}, "H200", 90), table_of({{{16, 1, 512, fp8}, {}}}, "A100", 80),
      table_of({{{16, 1, 512, fp8}, {}}}, "H100", 90), table_of({{{16, 1, 512}, {}}}, "H100", 90)};
  const auto index = [&](const char* name, CacheFormat format) {
    return table_for(tables, limits_of(name, 90), format) - tables.data();
  };
  EXPECT_EQ(index("H200", fp8), 2)
      << "of the same kind, and not the device's own without the format";
  EXPECT_EQ(index("H200", CacheFormat::k16Bit), 0);
  EXPECT_EQ(index("H100", fp8), 2);
  EXPECT_EQ(index("H100", CacheFormat::k16Bit), 3);
  EXPECT_EQ(index("H100", CacheFormat::kInt8Tile128), 2)
      << "none has it: the first of the device's";
  const ChoiceTable both = table_of({{{16, 1, 512}, {}}, {{16, 1, 512, fp8}, {}}});
  EXPECT_TRUE(both.has(CacheFormat::k16Bit) && both.has(fp8));
  EXPECT_FALSE(both.has(CacheFormat::kInt8Tile128));
}

TEST(Choose, TheLeastTimeOfThoseThatCanRun) {
  const ChoiceTable table = table_of({{{16, 1, 512},
                                       {{"05_missing", {}, 1},
                                        {"01_old", {}, 2},
                                        {"02_anywhere", {}, 30},
                                        {"04_hopper", {}, 10},
                                        {"03_hopper", {}, 20}}}});
  const Choice choice = choose_by(table);
  EXPECT_EQ(choice.stage->slug, "04_hopper") << "without a plan none takes part beside others";
  EXPECT_EQ(choice.us, 10);
  EXPECT_EQ(choose_by(table, limits_of("Another card", 90)).stage->slug, "04_hopper");
  EXPECT_EQ(choose_by(table, limits_of("A card", 80)).stage->slug, "02_anywhere");
  EXPECT_EQ(choose_by(table, limits_of("A card", 120)).stage->slug, "02_anywhere");
}

TEST(Choose, WithoutATimeTheLastThatCanRun) {
  const ChoiceTable table = table_of({{{16, 1, 512}, {{"05_missing", {}, 1}}}});
  EXPECT_EQ(choose_by(table).stage->slug, "04_hopper");
  EXPECT_EQ(choose_by(table).us, 0);
  EXPECT_EQ(choose_by(table, limits_of("", 86)).stage->slug, "02_anywhere");
  EXPECT_EQ(choose_by(table, limits_of("", 50)).stage->slug, "04_hopper") << "none can: the last";
  EXPECT_EQ(choose_among(kStages, {}, problem_of(16, 1, 512), limits_of("", 90)).stage->slug,
            "04_hopper");
  const Stage& old = kStages.front();
  EXPECT_EQ(choose_among({&old, 1}, {&table, 1}, problem_of(16, 1, 512), limits_of("", 90)).stage,
            &old);
}

// A stage that cannot read the cache is not chosen, whatever the table says. A table without a regime of the
// format does not help.
TEST(Choose, OnlyAStageThatReadsTheCacheIsChosen) {
  constexpr CacheFormat kTile = CacheFormat::kFp8Tile128, kInt8 = CacheFormat::kInt8Tile128;
  std::vector<Stage> all = kStages;
  all.push_back(fake("05_fp8_hopper", 90, 90));
  all.back().cache_formats = {kTile};
  all.push_back(fake("06_all", 80, 1 << 30));
  all.back().cache_formats = {CacheFormat::k16Bit, kTile};
  all.push_back(fake("07_fp8", 80, 1 << 30));
  all.back().cache_formats = {kTile, CacheFormat::kFp8Tensor};
  all.push_back(fake("08_no_plan", 80, 1 << 30, false));
  all.back().cache_formats = {kInt8};
  const ChoiceTable table = table_of(
      {{{16, 1, 512}, {{"07_fp8", {}, 1}, {"05_fp8_hopper", {}, 2}, {"03_hopper", {}, 5}}},
       {{16, 1, 512, kTile},
        {{"03_hopper", {}, 1}, {"05_fp8_hopper", {}, 3}, {"07_fp8", {}, 4}, {"06_all", {}, 5}}}});
  const auto slug = [&](CacheFormat format, int capability, const ChoiceTable& by) {
    Problem problem = problem_of(16, 1, 512);
    problem.cache_format = format;
    const Choice choice = choose_among(all, {&by, 1}, problem, limits_of("A card", capability));
    return choice.stage == nullptr ? "none" : choice.stage->slug;
  };
  EXPECT_EQ(slug(CacheFormat::k16Bit, 90, table), "03_hopper");
  EXPECT_EQ(slug(kTile, 90, table), "05_fp8_hopper");
  EXPECT_EQ(slug(kTile, 80, table), "07_fp8");
  // Without a regime of the format, or without a time in it, the stages that can run and read it compete: the
  // one made for the newest devices is chosen, otherwise the last.
  EXPECT_EQ(slug(CacheFormat::kFp8Tensor, 90, table), "07_fp8");
  EXPECT_EQ(slug(CacheFormat::k16Bit, 80, table), "06_all");
  const ChoiceTable plain = table_of({{{16, 1, 512}, {{"06_all", {}, 1}}}});
  EXPECT_EQ(slug(kTile, 90, plain), "05_fp8_hopper");
  EXPECT_EQ(slug(kTile, 80, plain), "07_fp8");
  EXPECT_EQ(slug(kInt8, 90, table), "none") << "no stage with a plan reads it";
  Problem problem = problem_of(16, 1, 512);
  problem.cache_format = kTile;
  const Choice choice = choose_among(all, {&plain, 1}, problem, limits_of("A card", 90));
  EXPECT_EQ(describe(choice, limits_of("A card", 90)),
            "05_fp8_hopper, made for the newest devices of those that run here: the table has no "
            "regime of such a cache.");

  EXPECT_OK(check_candidates(all, problem, limits_of("A card", 80)));
  all.pop_back();
  all.pop_back();
  all.back().cache_formats = {CacheFormat::k16Bit};
  EXPECT_OK(check_candidates(all, problem, limits_of("A card", 90)));
  const Status status = check_candidates(all, problem, limits_of("A card", 80));
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(),
            "auto has no stage here for a cache of cache_format = fp8_tile128: 05_fp8_hopper needs "
            "compute capability 9.0 exactly, the device has 8.0");
}

// A stage that reads quantised caches alone does not keep one that reads 16 bits from being chosen.
TEST(Choose, NoStageOfQuantisedCachesAlone) {
  std::vector<Stage> stages = {kStages[0], kStages[1], fake("05_codes", 80, 1 << 30)};
  stages.back().cache_formats = {CacheFormat::kFp8Tensor};
  const ChoiceTable table =
      table_of({{{16, 1, 512}, {{"05_codes", {}, 1}, {"02_anywhere", {}, 2}}}});
  const auto choose_by_tables = [&](std::span<const ChoiceTable> tables) {
    return choose_among(stages, tables, problem_of(16, 1, 512), limits_of("A card", 90)).stage;
  };
  EXPECT_EQ(choose_by_tables({&table, 1}), &stages[1]);
  EXPECT_EQ(choose_by_tables({}), &stages[1]);
  stages.erase(stages.begin() + 1);
  EXPECT_EQ(choose_by_tables({}), &stages[0]) << "the other cannot read it";
  Problem codes = problem_of(16, 1, 512);
  codes.cache_format = CacheFormat::kFp8Tensor;
  EXPECT_EQ(choose_among(stages, {}, codes, limits_of("A card", 90)).stage, nullptr)
      << "of two stages, one without a plan takes no part";
  stages.erase(stages.begin());
  EXPECT_EQ(choose_among(stages, {}, codes, limits_of("A card", 90)).stage, &stages[0]);
}

TEST(Choose, SettingsMustBeWorthIt) {
  const PlanSettings one{.min_grains = 1};
  const auto with = [&](double us) {
    return choose_by(table_of({{{16, 1, 512}, {{"03_hopper", one, us}, {"03_hopper", {}, 100}}}}));
  };
  EXPECT_EQ(with(98).settings, PlanSettings{}) << "a gain of two per cent may be chance";
  EXPECT_EQ(with(98).us, 100);
  EXPECT_EQ(with(96).settings, one);
  EXPECT_EQ(with(96).us, 96);
  // A stage is chosen by its least time. Its settings must gain over its own time without them.
  const ChoiceTable three = table_of(
      {{{16, 1, 512}, {{"03_hopper", one, 97.5}, {"04_hopper", {}, 98}, {"03_hopper", {}, 100}}}});
  EXPECT_EQ(choose_by(three).stage->slug, "03_hopper");
  EXPECT_EQ(choose_by(three).settings, PlanSettings{});
  // Settings alone may make another stage the choice.
  const ChoiceTable table =
      table_of({{{16, 1, 512}, {{"04_hopper", one, 90}, {"03_hopper", {}, 100}}}});
  EXPECT_EQ(choose_by(table).stage->slug, "04_hopper");
  // Settings found on one architecture say nothing about another.
  const ChoiceTable ampere = table_of(
      {{{16, 1, 512}, {{"02_anywhere", one, 90}, {"02_anywhere", {}, 100}}}}, "A card", 80);
  EXPECT_EQ(choose_by(ampere, limits_of("A card", 80)).settings, one);
  EXPECT_EQ(choose_by(ampere).settings, PlanSettings{});
  EXPECT_EQ(choose_by(ampere).us, 100);
}

TEST(Choose, SaysWhatAndWhy) {
  const ChoiceTable table = table_of({{{16, 1, 512},
                                       {{"03_hopper", {.min_grains = 1, .fixed_grains = 0}, 12.345},
                                        {"04_hopper", {}, 345.6},
                                        {"03_hopper", {}, 20}}}});
  std::string text = describe(choose_by(table), limits_of("A card", 90));
  EXPECT_EQ(text,
            "03_hopper min_grains=1 fixed_grains=0, which takes 12.3 µs cold in the table; others: "
            "03_hopper 20.0 µs, 04_hopper 346 µs. Its regime: 16 rows, 1 sequence, 512 tokens. "
            "Measured on A card, today, in a test.");
  const Choice far = choose_by(table, limits_of("B", 90), problem_of(20, 2, 640));
  text = describe(far, limits_of("B", 90));
  EXPECT_PRED2(has, text, "512 tokens, the nearest to 20 rows, 2 sequences, 640 tokens.");
  EXPECT_PRED2(has, text, "another device than this one, of the same compute capability.");
  text = describe(choose_by(table, limits_of("A card", 80)), limits_of("A card", 80));
  EXPECT_EQ(text,
            "02_anywhere, made for the newest devices of those that run here: the table has no "
            "time of one that "
            "does.");
}

// ---- files

std::string json_of(const std::string& regimes, const std::string& gpu = "A card") {
  return R"({"schema": "flashmla_choice/1", "context": {"gpu": ")" + gpu +
         R"(", "compute_capability": "9.0", "date_utc": "2026-11-29T01:02:03Z", "commit": "abc"},
             "regimes": )" +
         regimes + "}";
}

std::string regime_json(const std::string& times) {
  return R"([{"rows": 16, "sequences": 1, "tokens": 512, "times": )" + times + "}]";
}

TEST(ChoiceTable, IsRead) {
  ChoiceTable table;
  ASSERT_OK(parse_choice_table(
      json_of(regime_json(
          R"([{"stage": "08_seesaw", "settings": {"min_grains": 1, "max_tile_rows": 16}, "us": 18.5},
              {"stage": "05_tensor_core", "us": 24, "runs": 100}])")),
      "here", &table));
  EXPECT_EQ(table.device, "A card");
  EXPECT_EQ(table.compute_capability, 90);
  EXPECT_EQ(table.measured, "2026-11-29, commit abc");
  EXPECT_EQ(table.origin, "here");
  ASSERT_EQ(table.regimes.size(), 1u);
  EXPECT_EQ(table.regimes[0].regime, (Regime{16, 1, 512}));
  ASSERT_EQ(table.regimes[0].times.size(), 2u);
  EXPECT_EQ(table.regimes[0].times[0].settings,
            (PlanSettings{.min_grains = 1, .max_tile_rows = 16}));
  EXPECT_EQ(table.regimes[0].times[0].us, 18.5);
  EXPECT_EQ(table.regimes[0].times[1].stage, "05_tensor_core");
  EXPECT_EQ(table.regimes[0].times[1].settings, PlanSettings{});
  ASSERT_OK(parse_choice_table(
      json_of(R"([{"rows": 16, "sequences": 1, "tokens": 512, "cache_format": "fp8_tensor",
                   "times": [{"stage": "12_fp8", "us": 1}]}])"),
      "here", &table));
  EXPECT_EQ(table.regimes[0].regime, (Regime{16, 1, 512, CacheFormat::kFp8Tensor}));
}

TEST(ChoiceTable, BadOnesAreRefusedWithTheReason) {
  const std::pair<std::string, const char*> cases[] = {
      {"{", "parse error"},
      {"[]", "the table has no schema"},
      {R"({"schema": "flashmla_stages/2"})", "its schema is 'flashmla_stages/2', not"},
      {R"({"schema": "flashmla_choice/1"})", "the table has no context"},
      {json_of("[]"), "the table: regimes must be a list"},
      {json_of("[{}]"), "regimes[0] has no rows"},
      {json_of(R"([{"rows": 0}])"), "regimes[0]: rows = 0 must be 1 to"},
      {json_of(R"([{"rows": 1.5}])"), "regimes[0]: rows = 1.5 must be"},
      {json_of(R"([{"rows": 1, "sequences": 1, "tokens": 1}])"), "regimes[0] has no times"},
      {json_of(R"([{"rows": 1, "sequences": 1, "tokens": 1, "cache_format": "fp4"}])"),
       "regimes[0]: no cache format is named fp4"},
      {json_of(R"([{"rows": 1, "sequences": 1, "tokens": 1, "cache_format": 1}])"),
       "regimes[0]: cache_format must be a text"},
      {json_of(regime_json("[]")), "regimes[0]: times must be a list"},
      {json_of(regime_json(R"([{"us": 1}])")), "regimes[0].times[0] has no stage"},
      {json_of(regime_json(R"([{"stage": "08"}])")), "regimes[0].times[0] has no us"},
      {json_of(regime_json(R"([{"stage": "08", "us": 0}])")), "us = 0 must be a time"},
      {json_of(regime_json(R"([{"stage": 8, "us": 1}])")), "stage must be a text"},
      {json_of(regime_json(R"([{"stage": "08", "us": 1, "settings": {"min_blocks": 1}}])")),
       "no setting is named min_blocks"},
      {json_of(regime_json(R"([{"stage": "08", "us": 1, "settings": {"min_grains": 0}}])")),
       "min_grains = 0 must be 1 to 64"},
  };
  for (const auto& [text, why] : cases) {
    ChoiceTable table;
    table.device = "as it was";
    const Status status = parse_choice_table(text, "bad.json", &table);
    EXPECT_EQ(status.code(), StatusCode::kFileError) << text;
    EXPECT_PRED2(has, status.message(), "bad.json: no table to choose by: ") << text;
    EXPECT_PRED2(has, status.message(), why) << text;
    EXPECT_EQ(table.device, "as it was");
  }
}

TEST(ChoiceTable, SettingsReachAPlan) {
  const PlanShape shape{.row_tiles = 2, .workers = 66, .fixed_grains = 2, .min_grains = 2};
  const auto with = [&](const PlanSettings& settings) { return with_settings(settings, shape); };
  EXPECT_EQ(with({}).workers, 66);
  EXPECT_EQ(with({.workers_percent = 50}).workers, 33);
  EXPECT_EQ(with({.workers_percent = 1}).workers, 1);
  EXPECT_EQ(with({.workers_percent = 200}).workers, 132);
  EXPECT_EQ(with({.min_grains = 1}).min_grains, 1);
  EXPECT_EQ(with({.fixed_grains = 0}).fixed_grains, 0);
  EXPECT_EQ(with({.combine_grains = 16}).combine_grains, 16);
  PlanShape huge{.row_tiles = 1 << 30, .workers = 4};
  EXPECT_EQ(with_settings({.workers_percent = 1600}, huge).workers, 4) << "blocks fit 32 bits";
  EXPECT_EQ(with_settings(PlanSettings{.max_tile_rows = 16}, limits_of("", 90)).max_tile_rows, 16);
  EXPECT_EQ(to_string(PlanSettings{}), "");
}

// ---- what is shipped

std::vector<ChoiceTable> shipped() {
  std::vector<ChoiceTable> tables;
  for (const char* text : built_in_tables()) {
    EXPECT_OK(parse_choice_table(text, "built in", &tables.emplace_back()));
  }
  return tables;
}

TEST(BuiltInTables, EachIsReadAndNoneIsLeftOut) {
  EXPECT_OK(choice_table_status());
  const std::vector<ChoiceTable> tables = shipped();
  ASSERT_FALSE(tables.empty());
  ASSERT_EQ(choice_tables().size(), tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    EXPECT_EQ(choice_tables()[i].device, tables[i].device);
    EXPECT_EQ(choice_tables()[i].origin, "built in");
  }
  for (const CacheFormat format : {CacheFormat::k16Bit, CacheFormat::kFp8Tile128}) {
    EXPECT_EQ(table_for(tables, limits_of("NVIDIA H200", 90), format)->device, "NVIDIA H200");
    EXPECT_EQ(table_for(tables, limits_of("NVIDIA H100 80GB HBM3", 90), format)->compute_capability,
              90);
  }
}

// In no regime of a table is the choice more than 3% slower than the fastest stage of this build.
TEST(BuiltInTables, NothingThatIsChosenIsSlow) {
  constexpr double kMost = 1.03;
  const std::vector<Stage>& built = stages(MachineKind::kModel);
  for (const ChoiceTable& table : shipped()) {
    const DeviceLimits limits = limits_of(table.device, table.compute_capability);
    for (const RegimeTimes& one : table.regimes) {
      Problem problem =
          problem_of(static_cast<int>(one.regime.rows), static_cast<int>(one.regime.sequences),
                     static_cast<int>(one.regime.tokens));
      problem.cache_format = one.regime.cache_format;
      ASSERT_OK(validate(problem));
      ASSERT_EQ(regime_of(problem), one.regime);
      double least = 0;
      for (const TimedStage& time : one.times) {
        const bool known = std::any_of(built.begin(), built.end(), [&](const Stage& stage) {
          return stage.slug == time.stage && check_device(stage, limits).ok();
        });
        if (known && (least == 0 || time.us < least)) least = time.us;
      }
      const Choice choice = choose_among(built, {&table, 1}, problem, limits);
      EXPECT_EQ(choice.regime->regime, one.regime) << "two entries of a regime";
      EXPECT_GT(choice.us, 0);
      EXPECT_LE(choice.us, kMost * least) << to_string(one.regime) << ": " << name_of(choice);
    }
  }
}

// ---- the stage

class AutoStage : public testing::Test {
 protected:
  void TearDown() override {
    gpu_model::device() = {};
    use_table(built_in_tables().front());
    std::remove(path_.c_str());
  }

  void use_table(const std::string& text) {
    std::ofstream(path_) << text;
    ASSERT_OK(use_choice_table(path_));
  }

  static const Stage& chooser() { return *find_stage(MachineKind::kModel, "auto"); }

  // Decodes twice by one plan. Returns the second out, as bits, and the second lse, which any other cut
  // would change.
  std::pair<std::vector<uint16_t>, std::vector<float>> decode_twice(const Stage& stage,
                                                                    const DataSet& data) {
    Machine& machine = model_machine();
    DeviceTensors tensors;
    WorkspaceBytes bytes;
    DeviceBuffer plan, scratch;
    EXPECT_OK(generate_on_device(machine, data, &tensors));
    EXPECT_OK(workspace_bytes(stage, data.problem, &bytes));
    EXPECT_OK(plan.allocate(machine, bytes.plan));
    EXPECT_OK(scratch.allocate(machine, bytes.scratch));
    EXPECT_OK(plan_decode(stage, data.problem, tensors.tensors().seqlens_k, plan));
    for (int i = 0; i < 2; ++i) {
      EXPECT_OK(tensors.poison_outputs(machine));
      EXPECT_OK(decode_planned(stage, data.problem, tensors.tensors(), plan, scratch));
    }
    EXPECT_OK(check_plan(stage, data.problem, tensors.tensors().seqlens_k, plan));
    std::vector<uint16_t> out(tensors.out.bytes() / 2);
    std::vector<float> lse(tensors.lse.bytes() / 4);
    EXPECT_OK(machine.copy_to_host(out.data(), tensors.out.data(), tensors.out.bytes()));
    EXPECT_OK(machine.copy_to_host(lse.data(), tensors.lse.data(), tensors.lse.bytes()));
    HostTensors host = generate(data);
    ReferenceResult expected;
    EXPECT_OK(reference_attention(data.problem, host.tensors(data), &expected));
    EXPECT_OK(compare_decode(data.problem, gather_out(data.problem, data.layout(), out),
                             gather_lse(data.problem, data.layout(), lse), expected))
        << stage.slug << " " << to_string(stage.settings);
    return {out, lse};
  }

  std::string path_ = testing::TempDir() + "choose_test_table.json";
};

DataSet small_data(int heads, CacheFormat format = CacheFormat::k16Bit) {
  DecodeCase spec;
  spec.cache_format = format;
  spec.num_heads_q = heads;
  spec.data = DataKind::kNeedles;
  spec.lengths = {700, 64, 0, 330};
  return make_data_set(spec);
}

TEST_F(AutoStage, IsFoundAndNotListed) {
  EXPECT_EQ(chooser().slug, "auto");
  EXPECT_EQ(&chooser(), &auto_stage(MachineKind::kModel));
  EXPECT_NE(chooser().plan_shape, nullptr);
  EXPECT_EQ(chooser().min_compute_capability, 80);
  EXPECT_EQ(chooser().sustained_warmup_s, kTensorCoreWarmup);
  for (const Stage& stage : stages(MachineKind::kModel)) EXPECT_NE(stage.slug, "auto");
  std::string why_not;
  EXPECT_EQ(find_stage(MachineKind::kModel, "77", &why_not), nullptr);
  EXPECT_PRED2(has, why_not, ", auto");
}

// It reads the formats that its stages read, on the devices where they run. Other formats are refused by name.
TEST_F(AutoStage, ReadsWhatSomeStageReads) {
  for (const CacheFormat format : kCacheFormats) {
    for (const int capability : {80, 86, 90}) {
      gpu_model::device() = {};
      gpu_model::device().compute_capability = capability;
      const DeviceLimits limits = model_machine().limits();
      Problem problem = problem_of(16, 4, 512);
      problem.cache_format = format;
      bool reads = false, runs = false;
      for (const Stage& stage : stages(MachineKind::kModel)) {
        if (stage.plan_shape == nullptr || !can_read(stage, format)) continue;
        reads = true;
        runs |= check_device(stage, limits).ok();
      }
      EXPECT_EQ(can_read(chooser(), format), reads) << to_string(format);
      Choice choice;
      const Status status = choose(MachineKind::kModel, problem, limits, &choice);
      WorkspaceBytes bytes;
      const Status decodes = workspace_bytes(chooser(), problem, &bytes);
      EXPECT_EQ(decodes.code(), status.code()) << decodes.to_string();
      EXPECT_EQ(status.ok(), runs) << status.to_string();
      if (runs) {
        EXPECT_TRUE(can_read(*choice.stage, format)) << choice.stage->slug;
        EXPECT_OK(check_device(*choice.stage, limits));
      } else {
        EXPECT_EQ(status.code(), StatusCode::kUnsupported);
        EXPECT_PRED2(has, status.message(), "auto");
        EXPECT_PRED2(has, status.message(), std::string("cache_format = ") + to_string(format));
      }
    }
  }
}

TEST_F(AutoStage, ABadFileLeavesTheTablesAlone) {
  std::ofstream(path_) << "{}";
  const ChoiceTable* before = choice_tables().data();
  EXPECT_EQ(use_choice_table(path_).code(), StatusCode::kFileError);
  EXPECT_EQ(use_choice_table("/no/such/file").code(), StatusCode::kFileError);
  EXPECT_EQ(choice_tables().data(), before);
}

// One plan serves two decodes. Stage and settings are those of the table, by rows and by batch.
TEST_F(AutoStage, DoesWhatWasChosen) {
  use_table(json_of(
      R"([{"rows": 16, "sequences": 4, "tokens": 704, "times":
            [{"stage": "05_tensor_core", "us": 1, "settings": {"min_grains": 4, "fixed_grains": 0}}]},
          {"rows": 40, "sequences": 4, "tokens": 704, "times":
            [{"stage": "05_tensor_core", "us": 1, "settings": {"workers_percent": 50, "max_tile_rows": 16}}]},
          {"rows": 40, "sequences": 64, "tokens": 704, "times": [{"stage": "04_split_kv", "us": 1}]},
          {"rows": 128, "sequences": 4, "tokens": 704, "times": [{"stage": "08_seesaw", "us": 1}]}])"));
  const DeviceLimits limits = model_machine().limits();
  struct Expected {
    int heads;
    const char* stage;
    PlanSettings settings;
  };
  for (const Expected& expected :
       {Expected{16, "05", {.min_grains = 4, .fixed_grains = 0}},  // three pieces, and not eleven
        Expected{33, "05", {.workers_percent = 50, .max_tile_rows = 16}}, Expected{70, "08", {}}}) {
    const DataSet data = small_data(expected.heads);
    Stage direct = *find_stage(MachineKind::kModel, expected.stage);
    direct.settings = expected.settings;
    Choice choice;
    ASSERT_OK(choose(MachineKind::kModel, data.problem, limits, &choice));
    EXPECT_EQ(choice.stage->slug, direct.slug);
    EXPECT_EQ(choice.settings, direct.settings);
    PlanShape mine, its;
    ASSERT_OK(plan_shape(chooser(), data.problem, limits, &mine));
    ASSERT_OK(plan_shape(direct, data.problem, limits, &its));
    EXPECT_EQ(mine.row_tiles, its.row_tiles);
    EXPECT_EQ(mine.workers, its.workers);
    EXPECT_EQ(mine.min_grains, its.min_grains);
    EXPECT_EQ(mine.fixed_grains, its.fixed_grains);
    Prediction expects, its_prediction;
    ASSERT_OK(predict(chooser(), data.problem, 1094, limits, &expects));
    ASSERT_OK(predict(direct, data.problem, 1094, limits, &its_prediction));
    EXPECT_EQ(expects.matrix_flop, its_prediction.matrix_flop);
    EXPECT_EQ(expects.busy_fraction, its_prediction.busy_fraction);
    EXPECT_EQ(decode_twice(chooser(), data), decode_twice(direct, data));
  }
  Choice choice;
  Problem many = small_data(33).problem;
  many.batch = 64;
  ASSERT_OK(choose(MachineKind::kModel, many, limits, &choice));
  EXPECT_EQ(choice.stage->slug, "04_split_kv");
}

// An earlier choice is not used for another regime: each has min_grains of its own.
TEST_F(AutoStage, ChoosesAnewForWhatDiffers) {
  const auto regime = [](const std::string& key, const char* stage, int min_grains) {
    return "{" + key + R"(, "times": [{"us": 1, "stage": ")" + stage +
           R"(", "settings": {"min_grains": )" + std::to_string(min_grains) + "}}]}";
  };
  const std::string small = R"("rows": 16, "sequences": 4, "tokens": 512)";
  use_table(
      json_of("[" + regime(small, "05_tensor_core", 11) + ", " +
              regime(R"("rows": 128, "sequences": 4, "tokens": 512)", "05_tensor_core", 12) + ", " +
              regime(R"("rows": 16, "sequences": 64, "tokens": 512)", "05_tensor_core", 13) + ", " +
              regime(R"("rows": 16, "sequences": 4, "tokens": 65536)", "05_tensor_core", 14) +
              ", " + regime(small + R"(, "cache_format": "fp8_tensor")", "12_fp8", 15) + "]"));
  DeviceLimits limits = model_machine().limits();
  const auto min_grains = [&](const Problem& problem) {
    PlanShape shape;
    EXPECT_OK(plan_shape(chooser(), problem, limits, &shape));
    return shape.min_grains;
  };
  Problem fp8 = problem_of(16, 4, 512);
  fp8.cache_format = CacheFormat::kFp8Tensor;
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(min_grains(problem_of(16, 4, 512)), 11);
    EXPECT_EQ(min_grains(problem_of(128, 4, 512)), 12);
    EXPECT_EQ(min_grains(problem_of(16, 64, 512)), 13);
    EXPECT_EQ(min_grains(problem_of(16, 4, 65536)), 14);
    EXPECT_EQ(min_grains(fp8), 15);
  }
  EXPECT_EQ(min_grains(problem_of(16, 4, 512)), 11);
  limits.compute_capability = 80;  // where settings of 9.0 do not hold
  EXPECT_NE(min_grains(problem_of(16, 4, 512)), 11);
  limits.compute_capability = 90;
  EXPECT_EQ(min_grains(problem_of(16, 4, 512)), 11);
  use_table(json_of("[" + regime(small, "05_tensor_core", 16) + "]"));
  EXPECT_EQ(min_grains(problem_of(16, 4, 512)), 16);
}

TEST_F(AutoStage, RunsOnDevicesThatTheTableIsNotOf) {
  gpu_model::device().compute_capability = 80;
  gpu_model::device().max_shared_bytes = 166912;
  const DataSet data = small_data(16);
  Choice choice;
  ASSERT_OK(choose(MachineKind::kModel, data.problem, model_machine().limits(), &choice));
  EXPECT_EQ(choice.stage->slug, "05_tensor_core");
  EXPECT_EQ(choice.settings, PlanSettings{});
  decode_twice(chooser(), data);
  gpu_model::device().compute_capability = 70;
  DeviceBuffer workspace;
  EXPECT_EQ(allocate_workspace(chooser(), data.problem, &workspace).code(),
            StatusCode::kUnsupported);
  EXPECT_EQ(choose(MachineKind::kModel, data.problem, model_machine().limits(), &choice).code(),
            StatusCode::kUnsupported);
}

// Every stage that makes a plan decodes by the plan that it is given. A stage that asked its own plan_shape
// would refuse a plan for other workers.
TEST_F(AutoStage, EveryStageTakesSettings) {
  for (Stage stage : stages(MachineKind::kModel)) {
    if (stage.plan_shape == nullptr) continue;
    const DataSet data = small_data(20, stage.cache_formats.front());
    for (const PlanSettings& settings :
         {PlanSettings{.workers_percent = 3, .min_grains = 1, .fixed_grains = 0},
          PlanSettings{.workers_percent = 50, .combine_grains = 0, .max_tile_rows = 16}}) {
      stage.settings = settings;
      decode_twice(stage, data);
    }
  }
}

}  // namespace
}  // namespace mla
