#include "bench/service/scenarios.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "bench/service/checks.h"
#include "stages/common/cache/paged_cache.h"

namespace mla::bench {
namespace {

/// `users` who send a request per minute each, on average.
Scenario chat(int users) {
  return {.name = "chat_" + std::to_string(users),
          .what = std::to_string(users) + " users, each with a request per minute",
          .workload = {users / 60.0, {1024, 1024}, {200, 100}},
          .max_length = 8192};
}

}  // namespace

const std::vector<Scenario>& scenarios() {
  static const std::vector<Scenario> all = {
      {.name = "service",
       .what = "a language model's service",
       .workload = {32, {2048, 1024}, {256, 128}},
       .seconds = 6},
      chat(100),
      chat(500),
      chat(1000),
      chat(2000),
      chat(5000),
      {.name = "documents",
       .what = "long requests, more than fit",
       .workload = {3, {65536, 32768}, {512, 256}},
       .max_length = 262144,
       .seconds = 10},
      {.name = "shared_prompt",
       .what = "every prompt begins with one of four sets of instructions",
       .workload = {24, {512, 512}, {256, 128}, {4, 4096}},
       .cache_gib = 4,
       .seconds = 6},
      {.name = "small_device",
       .what = "V2-Lite's layers in 2 GiB",
       .workload = {32, {8192, 4096}, {256, 128}},
       .heads = 16,
       .layers = 27,
       .cache_gib = 2,
       .max_batch = 8,
       .max_length = 32768,
       .seconds = 3},
      {.name = "small_device_full",
       .what = "V2-Lite's layers in 2 GiB, with more requests than fit",
       .workload = {128, {8192, 4096}, {256, 128}},
       .heads = 16,
       .layers = 27,
       .cache_gib = 2,
       .max_batch = 64,
       .max_length = 32768,
       .seconds = 3},
      {.name = "tiny",
       .what = "small enough for the GPU model; no figure of it says anything about a GPU",
       .workload = {20, {40, 40}, {6, 3}},
       .heads = 16,
       .layers = 1,
       .pages = 12,
       .max_batch = 4,
       .max_length = 256,
       .seconds = 0,
       .requests = 5,
       .under_way = 0},
  };
  return all;
}

int64_t Scenario::page_bytes() const {
  return CacheShape{.num_pages = 1, .cache_format = cache_format}.page_bytes() * layers;
}

int64_t Scenario::num_pages() const {
  if (pages) return *pages * ranks;
  return ranks * static_cast<int64_t>(cache_gib * 1073741824.0 / static_cast<double>(page_bytes()));
}

Status use_model(const std::string& name, Scenario* scenario) {
  struct Model {
    const char* name;
    int layers;
    int heads;
    int kv_heads;  // 0: latent attention, one row for all heads
  };
  constexpr Model kModels[] = {{"deepseek_v3", 61, 128, 0},     {"deepseek_v2", 60, 128, 0},
                               {"deepseek_v2_lite", 27, 16, 0}, {"llama_2_70b", 80, 64, 8},
                               {"llama_3_8b", 32, 32, 8},       {"mistral_7b", 32, 32, 8}};
  std::string names;
  for (const Model& model : kModels) {
    names += (names.empty() ? "" : ", ") + std::string(model.name);
    if (model.name != name) continue;
    if (model.kv_heads > 0) {
      return {
          StatusCode::kUnsupported,
          fmt::format("model {0} has {1} heads of keys and values for {2} query heads, and a "
                      "stage decodes one latent row per token. Its attention is measured by "
                      "mla_traditional --forms grouped --heads {2} --kv-heads {1} --head-dim 128",
                      name, model.kv_heads, model.heads)};
    }
    scenario->heads = model.heads;
    scenario->layers = model.layers;
    return {};
  }
  return {StatusCode::kInvalidArgument, "model '" + name + "' is not one of " + names};
}

std::string title(const Scenario& scenario) {
  return scenario.name +
         (is_quantised(scenario.cache_format) ? std::string(", ") + to_string(scenario.cache_format)
                                              : "") +
         (scenario.ranks > 1 ? ", " + std::to_string(scenario.ranks) + " GPUs" : "");
}

Status select_scenarios(const std::string& list, std::vector<Scenario>* chosen) {
  std::vector<Scenario> result;
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');) {
    std::string names;
    bool found = false;
    for (const Scenario& scenario : scenarios()) {
      names += (names.empty() ? "" : ", ") + scenario.name;
      if (scenario.name != item && (item != "all" || scenario.name == "tiny")) continue;
      result.push_back(scenario);
      found = true;
    }
    if (!found) {
      return {StatusCode::kInvalidArgument, "scenario '" + item + "' is not one of all, " + names};
    }
  }
  if (result.empty()) return {StatusCode::kInvalidArgument, "no scenario is named"};
  *chosen = std::move(result);
  return {};
}

Status validate(const Scenario& scenario) {
  MLA_RETURN_IF_ERROR(validate(scenario.workload));
  MLA_RETURN_IF_ERROR(check_in("heads", scenario.heads, 1, 1024));
  MLA_RETURN_IF_ERROR(check_in("layers", scenario.layers, 1, 10000));
  MLA_RETURN_IF_ERROR(check_in("ranks", scenario.ranks, 1, 1024));
  if (!scenario.pages) {
    const double gib = scenario.cache_gib;
    MLA_RETURN_IF_ERROR(
        check_number("cache", gib, gib > 0 && gib <= 1e6, "above 0 and at most 1e6 GiB"));
    MLA_RETURN_IF_ERROR(
        check_number("cache", gib, scenario.num_pages() > 0, "at least a page of every layer"));
  }
  MLA_RETURN_IF_ERROR(check_in("pages", scenario.num_pages(), 1, (1 << 30) / kDefaultPageSize));
  MLA_RETURN_IF_ERROR(check_number("seconds", scenario.seconds,
                                   scenario.seconds >= 0 && scenario.seconds <= 1e9,
                                   "in 0 ... 1e9"));
  MLA_RETURN_IF_ERROR(check_in("requests", scenario.requests, -1, INT64_MAX));
  if (scenario.seconds == 0 && scenario.requests < 0) {
    return {StatusCode::kInvalidArgument,
            "seconds = 0 is no limit, and requests has no limit either: the run would not end"};
  }
  MLA_RETURN_IF_ERROR(check_in("under way", scenario.under_way, -1, 1000000));
  return validate(limits_of(scenario));
}

SchedulerLimits limits_of(const Scenario& scenario) {
  return {.num_pages = static_cast<int>(scenario.num_pages()),
          .max_batch = scenario.max_batch,
          .max_length = scenario.max_length,
          .max_queue = scenario.max_queue};
}

}  // namespace mla::bench
