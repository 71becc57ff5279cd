// The program itself: which results it writes, and which input it refuses.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace {

using Json = nlohmann::json;

std::string temporary(const std::string& name) {
  return testing::TempDir() + "/mla_service_test_" + name;
}

std::string read(const std::string& path) {
  std::ifstream stream(path);
  std::stringstream text;
  text << stream.rdbuf();
  return text.str();
}

struct Result {
  int code;
  std::string output;  // both streams
};

Result run(const std::string& arguments) {
  const char* program = std::getenv("MLA_SERVICE");
  EXPECT_NE(program, nullptr);
  const std::string log = temporary("log");
  const int status = std::system((std::string(program != nullptr ? program : "false") + " " +
                                  arguments + " > " + log + " 2>&1")
                                     .c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(log)};
}

TEST(MlaService, WritesItsResults) {
  const std::string path = temporary("all.json");
  const Result result = run("--engine simulated --scenario all --out " + path);
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("simulated clock, fitted to NVIDIA"), std::string::npos);
  EXPECT_NE(result.output.find("Attention only"), std::string::npos);
  EXPECT_NE(result.output.find("relative error median"), std::string::npos);
  const Json json = Json::parse(read(path));
  const Json& context = json["context"];
  EXPECT_EQ(context["schema"], "flashmla_stages/service/1");
  EXPECT_EQ(context["clock"], "simulated");
  EXPECT_EQ(context["machine"], "model");
  EXPECT_NE(context["clock_origin"].get<std::string>().find("NVIDIA"), std::string::npos);
  for (const char* key : {"gpu", "driver", "nvcc", "host_compiler", "commit", "date_utc",
                          "max_sm_mhz", "power_limit_w"}) {
    EXPECT_TRUE(context.contains(key)) << key;
  }
  ASSERT_EQ(json["runs"].size(), 2 * 10u + 1);
  std::string first_stage;
  for (size_t i = 0; i < json["runs"].size(); ++i) {
    const Json& one = json["runs"][i];
    const bool begins = i == 0 || one["scenario"] != json["runs"][i - 1]["scenario"];
    const bool ends =
        i + 1 == json["runs"].size() || one["scenario"] != json["runs"][i + 1]["scenario"];
    EXPECT_EQ(one["way"], begins ? "paged" : ends ? "static" : "unshared");
    if (!begins && !ends) {
      EXPECT_EQ(one["scenario"], "shared_prompt");
    }
    // All runs use the stage that auto chooses, so a ratio between them is not due to the kernel.
    if (begins) first_stage = one["stage"];
    EXPECT_EQ(one["stage"], first_stage);
    EXPECT_GE(one["stage"], "05") << one["scenario"];
    const Json& figures = one["figures"];
    for (const char* key : {"arrived",
                            "finished",
                            "rejected",
                            "queued",
                            "running",
                            "span_s",
                            "steps",
                            "step_ms_mean",
                            "step_ms_p50",
                            "step_ms_p99",
                            "token_ms_mean",
                            "token_ms_p50",
                            "token_ms_p99",
                            "first_token_ms_p50",
                            "first_token_ms_p99",
                            "tokens",
                            "tokens_per_s",
                            "batch_mean",
                            "pages_total",
                            "pages_peak",
                            "pages_mean",
                            "waste_share",
                            "cache_gb",
                            "queue_mean",
                            "queue_max",
                            "preemptions",
                            "request_ms_mean",
                            "request_ms_p99",
                            "requests_timed",
                            "targets_met",
                            "alerts",
                            "prefix_hits",
                            "power_w",
                            "energy_mj_per_token",
                            "cost_per_1000_tokens"}) {
      EXPECT_TRUE(figures.contains(key)) << key;
    }
    EXPECT_EQ(figures["arrived"].get<int64_t>(),
              figures["finished"].get<int64_t>() + figures["rejected"].get<int64_t>() +
                  figures["queued"].get<int64_t>() + figures["running"].get<int64_t>());
    EXPECT_GT(figures["tokens"].get<int64_t>(), 0);
    int64_t rejected = 0;
    for (const auto& [reason, count] : one["rejected_by_reason"].items()) {
      rejected += count.get<int64_t>();
    }
    EXPECT_EQ(figures["rejected"], rejected);
  }
  // The same command gives the same results.
  const std::string again = temporary("again.json");
  ASSERT_EQ(run("--engine simulated --scenario all --out " + again).code, 0);
  EXPECT_EQ(Json::parse(read(again))["runs"], json["runs"]);
  ASSERT_EQ(run("--engine simulated --scenario all --seed 2 --out " + again).code, 0);
  EXPECT_NE(Json::parse(read(again))["runs"], json["runs"]);
  std::filesystem::remove(path);
  std::filesystem::remove(again);
}

// The clock's error that is printed is the error of the printed figure. It is given only where the
// same run was recorded.
TEST(MlaService, SaysTheErrorOfItsClock) {
  const std::string path = temporary("errors.json");
  const Result both =
      run("--engine simulated --stage 08 --scenario chat_5000 --static-stage 02 --out " + path);
  ASSERT_EQ(both.code, 0) << both.output;
  const Json runs = Json::parse(read(path))["runs"];
  // Paged by 08, static by 08, static by 02: each differs from the next in one thing.
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[1]["stage"], "08_seesaw");
  EXPECT_EQ(runs[2]["stage"], "02_shared_tiled");
  EXPECT_NE(both.output.find("They differ in batching and memory; the kernel is the same"),
            std::string::npos);
  EXPECT_NE(both.output.find("They differ in the kernel."), std::string::npos);
  EXPECT_NE(both.output.find("paged, 08: in brackets the clock's error against NVIDIA"),
            std::string::npos);
  EXPECT_NE(both.output.find("static, 02: in brackets"), std::string::npos);
  EXPECT_NE(both.output.find("static, 08: no run is recorded"), std::string::npos);
  Json recorded;
  for (const auto& file : std::filesystem::directory_iterator(std::getenv("MLA_RESULTS"))) {
    if (file.path().filename().string().find("_service_") == std::string::npos) continue;
    const Json one = Json::parse(read(file.path().string()));
    const bool has_it = std::any_of(one["runs"].begin(), one["runs"].end(), [](const Json& run) {
      return run["scenario"] == "chat_5000" && run.value("cache_format", "16bit") == "16bit";
    });
    if (!has_it) continue;
    if (recorded.is_null() || one["context"]["date_utc"] > recorded["context"]["date_utc"]) {
      recorded = one;
    }
  }
  for (const Json& one : recorded["runs"]) {
    if (one["scenario"] != "chat_5000") continue;
    const Json& mine = runs[one["way"] == "paged" ? 0 : 2]["figures"];
    const double simulated = mine["tokens_per_s"], measured = one["figures"]["tokens_per_s"];
    char text[32];
    std::snprintf(text, sizeof text, "(%+.0f%%)", 100 * (simulated / measured - 1));
    const size_t line = both.output.find("tokens/s  ");
    ASSERT_NE(line, std::string::npos);
    EXPECT_NE(both.output.substr(line, both.output.find('\n', line) - line).find(text),
              std::string::npos)
        << text << "\n"
        << both.output;
    // It begins with as many requests as the recorded one, so the batch has the same pages.
    if (one["way"] == "static") {
      EXPECT_EQ(mine["pages_peak"], one["figures"]["pages_peak"]);
    }
    EXPECT_LT(std::abs(simulated / measured - 1), 0.1);
  }
  for (const char* other : {"--rate 5", "--seed 2"}) {
    const Result changed =
        run("--engine simulated --scenario chat_5000 --way paged " + std::string(other));
    EXPECT_EQ(changed.code, 0);
    EXPECT_EQ(changed.output.find("in brackets"), std::string::npos) << changed.output;
    EXPECT_NE(changed.output.find("no run is recorded"), std::string::npos) << changed.output;
  }
  std::filesystem::remove(path);
}

TEST(MlaService, SharesPromptsInLessMemory) {
  const std::string path = temporary("shared.json");
  const Result result =
      run("--engine simulated --scenario shared_prompt --price-per-hour 2 --out " + path);
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("prompts one of 4 prefixes of 4096 and 512"), std::string::npos);
  EXPECT_NE(result.output.find("They differ in whether prompts share beginnings"),
            std::string::npos);
  EXPECT_NE(result.output.find("cost of 1000 tokens, at 2 per hour"), std::string::npos);
  const Json runs = Json::parse(read(path))["runs"];
  ASSERT_EQ(runs.size(), 3u);
  const Json &shared = runs[0]["figures"], &apart = runs[1]["figures"];
  EXPECT_GT(shared["prefix_hits"].get<double>(), 0.9 * shared["prompts"].get<double>());
  EXPECT_EQ(apart["prefix_hits"], 0);
  EXPECT_LT(shared["pages_mean"].get<double>(), 0.6 * apart["pages_mean"].get<double>());
  EXPECT_GT(shared["batch_mean"].get<double>(), apart["batch_mean"].get<double>());
  EXPECT_NEAR(shared["cost_per_1000_tokens"].get<double>() * shared["tokens_per_s"].get<double>(),
              2000.0 / 3600, 1e-6);
  std::filesystem::remove(path);
}

TEST(MlaService, ExperimentsEndWithAVerdict) {
  const std::string paired = "--engine simulated --scenario chat_1000 --pairs 4 --ab ";
  Result result = run(paired + "08,05");
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find(
                "By the mean time between tokens: 08 is better; the time of 05 differs by +"),
            std::string::npos)
      << result.output;
  result = run(paired + "08,08");
  EXPECT_NE(result.output.find("they are not told apart"), std::string::npos) << result.output;
  EXPECT_EQ(run(paired + "08:nonesuch,05").code, 2);
  EXPECT_EQ(run(paired + "08").code, 2);
  EXPECT_EQ(run(paired + "08,05 --rollout 05").code, 2);
  result = run(paired + "08:fp8_tile128,05");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.output.find("08_seesaw cannot read a cache"), std::string::npos);

  const std::string rollout = "--engine simulated --stage 08 --rollout ";
  result = run(rollout + "05 --scenario chat_1000");
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("05_tensor_core serves all requests: it raised no alert."),
            std::string::npos)
      << result.output;
  result = run(rollout + "02 --scenario chat_5000");
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("02_shared_tiled was rolled back at 25%"), std::string::npos)
      << result.output;
  EXPECT_NE(result.output.find("08_seesaw serves all requests again."), std::string::npos);
  EXPECT_EQ(run(rollout + "05 --out " + temporary("none.json")).code, 2);
}

TEST(MlaService, TakesModelsTargetsAndGraphs) {
  Result result =
      run("--engine simulated --scenario service --model deepseek_v2 --way paged "
          "--target-token-p99 0.5 --alert-pages 0.01");
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("128 heads, 60 layers"), std::string::npos);
  EXPECT_NE(result.output.find("missed: p99"), std::string::npos);
  EXPECT_NE(result.output.find("the first alert at 0.5 s"), std::string::npos);
  result = run("--engine simulated --model llama_3_8b");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.output.find("mla_traditional"), std::string::npos) << result.output;
  for (const char* wrong : {"--alert-window 0", "--price-per-hour -1", "--pairs 0",
                            "--power-budget 0", "--prefixes -1", "--prefix-tokens -5"}) {
    EXPECT_EQ(run("--engine simulated " + std::string(wrong)).code, 2) << wrong;
  }
  const std::string path = temporary("graphs.json");
  for (const bool graphs : {false, true}) {  // the model has them when asked
    result = run("--engine model --scenario tiny --way paged --stage 03 --requests 2 " +
                 std::string(graphs ? "--cuda-graphs " : "") +
                 "--prefixes 1 --prefix-tokens 64 --out " + path);
    ASSERT_EQ(result.code, 0) << result.output;
    EXPECT_NE(result.output.find("prefix found"), std::string::npos) << result.output;
    const auto step = Json::parse(read(path))["context"]["step"].get<std::string>();
    EXPECT_EQ(step.find("in CUDA graphs") != std::string::npos, graphs) << step;
  }
  std::filesystem::remove(path);
}

// Ctrl-C keeps the runs that were finished, and no others: here those of the first scenario, and perhaps one of the
// second, if that ended before the interrupt came.
TEST(MlaService, KeepsWhatItHasWhenInterrupted) {
  const std::string path = temporary("interrupted.json"), log = temporary("interrupted.log");
  const std::string command =
      std::string(std::getenv("MLA_SERVICE")) +
      " --engine model --scenario tiny,tiny --requests 12 --stage 03 --out " + path + " > " + log +
      " 2>&1 & for i in $(seq 3000); do grep -q tokens/s.of " + log +
      " && break; sleep 0.02; done; kill -INT $!; wait $!";
  std::remove(log.c_str());
  const int status = std::system(("bash -c '" + command + "'").c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1) << read(log);
  EXPECT_NE(read(log).find("Interrupted: the run under way, of tiny"), std::string::npos)
      << read(log);
  EXPECT_NE(read(log).find("results: " + path), std::string::npos) << read(log);
  const Json runs = Json::parse(read(path))["runs"];
  ASSERT_GE(runs.size(), 2u);
  EXPECT_LT(runs.size(), 4u);
  for (const Json& run : runs) EXPECT_EQ(run["figures"]["finished"], 12);
  std::filesystem::remove(path);
}

TEST(MlaService, DecodesOnTheModel) {
  const std::string path = temporary("tiny.json");
  const Result result = run("--engine model --scenario tiny --requests 3 --out " + path);
  ASSERT_EQ(result.code, 0) << result.output;
  EXPECT_NE(result.output.find("says nothing about a GPU"), std::string::npos);
  const Json json = Json::parse(read(path));
  EXPECT_EQ(json["context"]["clock"], "model");
  for (const Json& one : json["runs"]) {
    EXPECT_EQ(one["figures"]["finished"], 3);
    EXPECT_EQ(one["stage"], json["runs"][0]["stage"]);
    EXPECT_GT(one["stage"].get<std::string>(),
              "05");  // the last stage that can; the model can run all of them
  }
  std::filesystem::remove(path);
}

// The scenario is served from each format; the last table compares all of them.
TEST(MlaService, ServesFromQuantisedCachesOnTheModel) {
  const std::string path = temporary("formats.json");
  const std::string formats[] = {"16bit", "fp8_tile128", "fp8_tensor", "int8_tile128"};
  const Result result =
      run("--engine model --scenario tiny --requests 2 --cache-gib 0.001 --cache-format "
          "16bit,fp8_tile128,fp8_tensor,int8_tile128 --out " +
          path);
  ASSERT_EQ(result.code, 0) << result.output;
  const Json runs = Json::parse(read(path))["runs"];
  ASSERT_EQ(runs.size(), 8u);
  const int pages[] = {14, 25, 29, 25};  // of 2^30 / 1000 bytes, a page being 64 rows
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(runs[i]["cache_format"], formats[i / 2]);
    EXPECT_EQ(runs[i]["way"], i % 2 == 0 ? "paged" : "static");
    EXPECT_EQ(runs[i]["figures"]["pages_total"], pages[i / 2]);
    EXPECT_EQ(runs[i]["figures"]["finished"], 2);
    EXPECT_EQ(runs[i]["stage"].get<std::string>() >= "12", i > 1) << runs[i]["stage"];
  }
  EXPECT_NE(result.output.find("tiny: what memory holds"), std::string::npos);
  EXPECT_NE(result.output.find("tiny, fp8_tensor, on the GPU model"), std::string::npos);
  const size_t compared = result.output.rfind("tiny, on the GPU model");
  ASSERT_NE(compared, std::string::npos) << result.output;
  for (const std::string& format : formats) {
    EXPECT_NE(result.output.find(" " + format + " ", compared), std::string::npos) << format;
  }
  std::filesystem::remove(path);
}

// It names what it cannot do before it takes memory.
TEST(MlaService, RefusesFormatsByName) {
  const std::pair<const char*, const char*> cases[] = {
      {"--engine model --scenario tiny --stage 03 --cache-format fp8_tile128",
       "03_online_softmax cannot read a cache of cache_format = fp8_tile128, only 16bit"},
      {"--engine model --scenario tiny --static-stage 02 --cache-format fp8_tensor",
       "02_shared_tiled cannot read a cache of cache_format = fp8_tensor"},
      {"--engine model --scenario tiny --stage 13", "13_quantised_mma cannot read a cache of"},
      {"--engine model --scenario tiny --stage 03 --cache-format 16bit,fp8_tensor",
       "03_online_softmax cannot read a cache of cache_format = fp8_tensor"},
      {"--engine simulated --stage 08 --cache-format int8_tile128",
       "08_seesaw cannot read a cache of cache_format = int8_tile128"},
      {"--engine simulated --scenario small_device_full --heads 5 --stage 13 --cache-format "
       "fp8_tile128",
       "0 recorded times of stage 13 with 5 heads and a cache of fp8_tile128, and needs 4 (NVIDIA"},
      {"--engine model --scenario tiny --cache-format fp4", "--cache-format"},
  };
  for (const auto& [arguments, message] : cases) {
    const Result result = run(arguments);
    EXPECT_EQ(result.code, 2) << arguments;
    EXPECT_NE(result.output.find(message), std::string::npos) << arguments << "\n" << result.output;
  }
}

TEST(MlaService, ExplainsItsClock) {
  const Result result = run("--engine simulated --explain-model --way paged --seconds 0.1");
  EXPECT_EQ(result.code, 0);
  EXPECT_NE(result.output.find("decode of a layer, us ="), std::string::npos);
  EXPECT_NE(result.output.find("append of a layer, us ="), std::string::npos);
}

TEST(MlaService, ShowsHelpAndScenarios) {
  const Result help = run("--help");
  EXPECT_EQ(help.code, 0);
  EXPECT_NE(help.output.find("Attention only: no weights"), std::string::npos);
  const Result list = run("--list");
  EXPECT_EQ(list.code, 0);
  EXPECT_NE(list.output.find("chat_5000"), std::string::npos);
}

TEST(MlaService, SeveralGpusShareEveryCache) {
  const std::string arguments = "--scenario chat_1000 --way paged --seconds 1 --ranks 4 --engine ";
  const Result simulated = run(arguments + "simulated");
  EXPECT_EQ(simulated.code, 0) << simulated.output;
  EXPECT_NE(simulated.output.find("4 GPUs share each sequence; links: "), std::string::npos);
  EXPECT_NE(simulated.output.find("chat_1000, 4 GPUs: "), std::string::npos);
  const Result decoded = run("--scenario tiny --engine model --ranks 3 --stage 03");
  EXPECT_EQ(decoded.code, 0) << decoded.output;
  EXPECT_NE(decoded.output.find("3 ranks on the GPU model share each cache: all_gather"),
            std::string::npos);
  EXPECT_NE(decoded.output.find("16 heads, 1 layers, 36 pages"), std::string::npos);
  EXPECT_NE(decoded.output.find("tiny, 3 GPUs, on the GPU model"), std::string::npos)
      << decoded.output;
  const Result none = run("--scenario tiny --engine gpu --ranks 1000");
  EXPECT_EQ(none.code, 2);
  EXPECT_TRUE(none.output.find("1000 ranks need as many GPUs; there ") != std::string::npos ||
              none.output.find("unavailable: no GPU") != std::string::npos)
      << none.output;
}

TEST(MlaService, RefusesBadInput) {
  const std::pair<const char*, const char*> cases[] = {
      {"--rate -1", "rate = -1"},
      {"--rate nan", "rate = nan"},
      {"--pages 0", "pages = 0"},
      {"--pages -5", "pages = -5"},
      {"--cache-gib 0", "cache"},
      {"--cache-gib 0.000001", "at least a page of every layer"},
      {"--scenario nonesuch", "scenario 'nonesuch' is not one of all, service"},
      {"--max-batch 0", "max batch = 0"},
      {"--max-length 0", "max length = 0"},
      {"--max-queue 0", "max queue = 0"},
      {"--seconds -1", "seconds = -1"},
      {"--seconds 0", "would not end"},
      {"--output-mean 0", "output mean = 0"},
      {"--prompt-sd -1", "prompt sd = -1"},
      {"--layers 0", "layers = 0"},
      {"--ranks 0", "ranks = 0"},
      {"--heads 5", "recorded times of stage"},
      {"--stage 77", "recorded times of stage 77"},
      {"--way sideways", "--way"},
      {"--static-tolerance 2", "static tolerance = 2"},
      {"--pages 3 --max-length 256", "do not hold one buffer"},
      {"--out /nonesuch/a.json", "/nonesuch/a.json: cannot be written"},
      {"--list --out a.json", "--list excludes --out"},
      {"--pages 3 --cache-gib 1", "--cache-gib excludes --pages"},
      {"--way paged --static-stage 02", "--static-stage is for the static way"},
      {"--way paged --static-tolerance 0.1", "--static-tolerance is for the static way"},
      {"--static-tolerance 0.1", "on a GPU"},
      {"--distinct-caches 2", "--distinct-caches is for kernels"},
      {"--distinct-caches -1", "distinct caches = -1"},
      {"--nonesuch", "nonesuch"},
  };
  for (const auto& [arguments, message] : cases) {
    const Result result = run("--engine simulated " + std::string(arguments));
    EXPECT_EQ(result.code, 2) << arguments;
    EXPECT_NE(result.output.find(message), std::string::npos) << arguments << "\n" << result.output;
  }
  const Result large = run("--engine model --scenario service");
  EXPECT_EQ(large.code, 2);
  EXPECT_NE(large.output.find("the GPU model takes at most 256"), std::string::npos);
}

}  // namespace
