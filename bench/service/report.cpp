#include "bench/service/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "bench/measure/table.h"
#include "bench/measure/write_file.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

double gigabytes(const Scenario& scenario) {
  return static_cast<double>(scenario.num_pages() * scenario.page_bytes()) / 1e9;
}

/// Every reason but "none".
Json reasons(const RequestCounts& counts) {
  Json json = Json::object();
  for (size_t i = 1; i < kRejections; ++i) {
    json[to_string(static_cast<Rejection>(i))] = counts.rejected[i];
  }
  return json;
}

/// "mean", "p99", "mean and p99": of the time between tokens, what is over its target. Empty: nothing.
std::string missed_targets(const ServiceRun& run) {
  const bool mean = run.figures.token_ms_mean > run.targets.token_ms_mean;
  const bool p99 = run.figures.token_ms_p99 > run.targets.token_ms_p99;
  return mean && p99 ? "mean and p99" : mean ? "mean" : p99 ? "p99" : "";
}

Json figures_of(const ServiceRun& run) {
  const Figures& figures = run.figures;
  const RequestCounts& counts = figures.counts;
  return {{"arrived", counts.arrived},
          {"finished", counts.finished},
          {"rejected", counts.rejected_total()},
          {"queued", counts.queued},
          {"running", counts.running},
          {"span_s", figures.span},
          {"steps", figures.steps},
          {"step_ms_mean", figures.step_ms_mean},
          {"step_ms_p50", figures.step_ms_p50},
          {"step_ms_p99", figures.step_ms_p99},
          {"token_ms_mean", figures.token_ms_mean},
          {"token_ms_p50", figures.token_ms_p50},
          {"token_ms_p99", figures.token_ms_p99},
          {"first_token_ms_p50", figures.first_token_ms_p50},
          {"first_token_ms_p99", figures.first_token_ms_p99},
          {"tokens", figures.tokens},
          {"tokens_per_s", figures.tokens_per_s},
          {"batch_mean", figures.batch_mean},
          {"pages_total", figures.pages_total},
          {"pages_peak", figures.pages_peak},
          {"pages_mean", figures.pages_mean},
          {"waste_share", figures.waste_share},
          {"cache_gb", gigabytes(run.scenario)},
          {"queue_mean", figures.queue_mean},
          {"queue_max", figures.queue_max},
          {"preemptions", counts.preemptions},
          {"request_ms_mean", figures.request_ms_mean},
          {"request_ms_p50", figures.request_ms_p50},
          {"request_ms_p99", figures.request_ms_p99},
          {"requests_timed", figures.requests_timed},
          {"busy_share", figures.busy_share},
          {"target_token_ms_mean", run.targets.token_ms_mean},
          {"target_token_ms_p99", run.targets.token_ms_p99},
          {"targets_met", missed_targets(run).empty()},
          {"power_budget_w", std::isfinite(run.targets.power_w) ? run.targets.power_w : kUnknown},
          {"alerts", figures.alerts.size()},
          {"prompts", counts.prompts},
          {"prompt_tokens", counts.prompt_tokens},
          {"prefix_hits", counts.prefix_hits},
          {"prefix_hit_tokens", counts.prefix_hit_tokens},
          {"power_w", figures.power_w},
          {"energy_mj_per_token", figures.energy_mj_per_token},
          {"gpu_use_share", figures.gpu_use_share},
          {"temperature_c", figures.temperature_c},
          {"price_per_hour", run.price_per_hour},
          {"cost_per_1000_tokens", run.cost_per_1000_tokens()}};
}

bool is_of(const RecordedService::Run& run, const Scenario& scenario) {
  return run.scenario == scenario.name && run.cache_format == to_string(scenario.cache_format);
}

std::string rejected(const RequestCounts& counts) {
  std::string text = std::to_string(counts.rejected_total());
  const char* separator = " (";
  for (size_t i = 1; i < kRejections; ++i) {
    if (counts.rejected[i] == 0) continue;
    text += separator + std::string(to_string(static_cast<Rejection>(i)));
    separator = ", ";
  }
  return counts.rejected_total() > 0 ? text + ")" : text;
}

}  // namespace

const RecordedService::Run* RecordedService::find(const Scenario& scenario, const std::string& way,
                                                  const std::string& stage) const {
  for (const Run& run : runs) {
    if (is_of(run, scenario) && run.way == way && run.stage == stage) return &run;
  }
  return nullptr;
}

RecordedService load_newest_service(const std::string& folder, const Scenario& scenario) {
  RecordedService newest;
  std::string newest_date;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(folder, error)) {
    if (file.path().extension() != ".json") continue;
    std::ifstream stream(file.path());
    const Json json = Json::parse(stream, nullptr, false);
    if (!json.is_object() || !json.contains("context") || !json.contains("runs")) continue;
    const Json& context = json["context"];
    const auto get = [&](const char* key) {
      return context.contains(key) && context[key].is_string() ? context[key].get<std::string>()
                                                               : std::string();
    };
    const std::string date = get("date_utc");
    if (get("schema") != kServiceSchema || get("clock") != "gpu" || date <= newest_date) continue;
    if (get("scenarios") == "changed") continue;  // no run of these by other values
    RecordedService recording{get("gpu") + ", commit " + get("commit") + ", " + date.substr(0, 10),
                              std::strtoull(get("seed").c_str(), nullptr, 10),
                              {}};
    for (const Json& one : json["runs"]) {
      auto& run = recording.runs.emplace_back();
      run = {one.value("scenario", ""),
             one.value("way", ""),
             one.value("stage", ""),
             one.value("cache_format", to_string(CacheFormat::k16Bit)),
             {}};
      const Json figures = one.value("figures", Json::object());
      for (const auto& [key, value] : figures.items()) {
        if (value.is_number()) run.figures[key] = value.get<double>();
      }
    }
    const auto& runs = recording.runs;
    if (std::any_of(runs.begin(), runs.end(),
                    [&](const auto& run) { return is_of(run, scenario); })) {
      newest_date = date;
      newest = std::move(recording);
    }
  }
  return newest;
}

std::string compare_runs(const std::vector<ServiceRun>& runs, const std::string& clock,
                         const std::string& recording) {
  if (runs.empty()) return "";
  std::vector<std::string> header{title(runs.front().scenario) + ", " + clock};
  for (const ServiceRun& run : runs) header.push_back(run.way + ", " + run.stage.substr(0, 2));
  for (size_t i = 1; i < runs.size(); ++i) {
    const bool ways = runs[i].way != runs[i - 1].way;
    header.push_back(ways ? runs[i].way + " / " + runs[i - 1].way
                          : runs[i].stage.substr(0, 2) + " / " + runs[i - 1].stage.substr(0, 2));
  }
  Table table(header);
  const auto row = [&](const std::string& name, auto cell) {
    std::vector<std::string> cells{name};
    for (const ServiceRun& run : runs) cells.push_back(cell(run));
    cells.resize(header.size());
    table.add(std::move(cells));
  };
  const auto measured = [&](const std::string& name, const char* key, auto value) {
    std::vector<std::string> cells{name};
    for (const ServiceRun& run : runs) {
      const auto known = run.recorded.find(key);
      const double error =
          known != run.recorded.end() ? 100 * (value(run.figures) / known->second - 1) : kUnknown;
      cells.push_back(number(value(run.figures)) +
                      (std::isfinite(error) ? fmt::format(" ({:+.0f}%)", error) : ""));
    }
    for (size_t i = 1; i < runs.size(); ++i) {
      const double ratio = value(runs[i].figures) / value(runs[i - 1].figures);
      cells.push_back(std::isfinite(ratio) ? number(ratio) + "x" : "");
    }
    table.add(std::move(cells));
  };
  const auto counted = [&](const std::string& name, auto value) {
    row(name, [&](const ServiceRun& run) { return std::to_string(value(run.figures)); });
  };
  using F = const Figures&;
  counted("requests arrived", [](F f) { return f.counts.arrived; });
  counted("  finished", [](F f) { return f.counts.finished; });
  row("  rejected", [](const ServiceRun& run) { return rejected(run.figures.counts); });
  counted("  queued at the end", [](F f) { return f.counts.queued; });
  counted("  running at the end", [](F f) { return f.counts.running; });
  measured("virtual time, s", "span_s", [](F f) { return f.span; });
  counted("steps", [](F f) { return f.steps; });
  measured("step, ms: mean", "step_ms_mean", [](F f) { return f.step_ms_mean; });
  measured("  p50", "step_ms_p50", [](F f) { return f.step_ms_p50; });
  measured("  p99", "step_ms_p99", [](F f) { return f.step_ms_p99; });
  measured("token to token, ms: mean", "token_ms_mean", [](F f) { return f.token_ms_mean; });
  measured("  p50", "token_ms_p50", [](F f) { return f.token_ms_p50; });
  measured("  p99", "token_ms_p99", [](F f) { return f.token_ms_p99; });
  measured("first token, ms: p50", "first_token_ms_p50", [](F f) { return f.first_token_ms_p50; });
  measured("  p99", "first_token_ms_p99", [](F f) { return f.first_token_ms_p99; });
  measured("request, ms: mean", "request_ms_mean", [](F f) { return f.request_ms_mean; });
  measured("  p50", "request_ms_p50", [](F f) { return f.request_ms_p50; });
  row("  p99, of how many", [](const ServiceRun& run) {
    return number(run.figures.request_ms_p99) + ", " + std::to_string(run.figures.requests_timed);
  });
  const Thresholds& targets = runs.front().targets;
  row(fmt::format("targets: token mean {:g}, p99 {:g} ms", targets.token_ms_mean,
                  targets.token_ms_p99),
      [](const ServiceRun& run) {
        const std::string missed = missed_targets(run);
        return missed.empty() ? std::string("met") : "missed: " + missed;
      });
  measured("tokens/s", "tokens_per_s", [](F f) { return f.tokens_per_s; });
  row("share of the time in steps",
      [](const ServiceRun& run) { return percent(run.figures.busy_share); });
  const auto if_known = [&](const std::string& name, const char* key, auto value) {
    if (std::any_of(runs.begin(), runs.end(),
                    [&](const ServiceRun& run) { return std::isfinite(value(run.figures)); })) {
      measured(name, key, value);
    }
  };
  if_known("GPU in use, % (NVML)", "gpu_use", [](F f) { return 100 * f.gpu_use_share; });
  if_known("power, W", "power_w", [](F f) { return f.power_w; });
  if (std::isfinite(targets.power_w)) {
    row(fmt::format("power budget of {:g} W", targets.power_w), [](const ServiceRun& run) {
      const double power = run.figures.power_w;
      return std::isnan(power)             ? std::string("power is not read")
             : power > run.targets.power_w ? "passed"
                                           : "kept";
    });
  }
  if_known("energy per token, mJ", "energy_mj_per_token",
           [](F f) { return f.energy_mj_per_token; });
  if_known("hottest, °C", "temperature_c", [](F f) { return f.temperature_c; });
  if (std::isfinite(runs.front().price_per_hour)) {
    row(fmt::format("cost of 1000 tokens, at {:g} per hour", runs.front().price_per_hour),
        [](const ServiceRun& run) { return fmt::format("{:.3g}", run.cost_per_1000_tokens()); });
  }
  measured("batch, mean", "batch_mean", [](F f) { return f.batch_mean; });
  row("pages held: mean, peak, all", [](const ServiceRun& run) {
    return number(run.figures.pages_mean) + ", " + std::to_string(run.figures.pages_peak) + ", " +
           std::to_string(run.figures.pages_total);
  });
  row("share of their rows wasted",
      [](const ServiceRun& run) { return percent(run.figures.waste_share); });
  row("queue: mean, largest", [](const ServiceRun& run) {
    return number(run.figures.queue_mean) + ", " + std::to_string(run.figures.queue_max);
  });
  counted("preemptions", [](F f) { return f.counts.preemptions; });
  if (runs.front().scenario.workload.prefixes.count > 0) {
    const auto share = [](int64_t part, int64_t of) {
      return of == 0 ? std::string() : percent(static_cast<double>(part) / static_cast<double>(of));
    };
    row("prefix found: share of prompts, of tokens", [&](const ServiceRun& run) {
      const RequestCounts& counts = run.figures.counts;
      return counts.prompts == 0 ? std::string()
                                 : share(counts.prefix_hits, counts.prompts) + ", " +
                                       share(counts.prefix_hit_tokens, counts.prompt_tokens);
    });
  }
  counted("alerts", [](F f) { return f.alerts.size(); });
  std::string text = table.to_string();
  for (const ServiceRun& run : runs) {
    const std::vector<Alert>& alerts = run.figures.alerts;
    if (alerts.empty()) continue;
    text += fmt::format("{}, {}: the first alert at {:.1f} s: {} {} > {:g}\n", run.way,
                        run.stage.substr(0, 2), alerts.front().time, alerts.front().what,
                        number(alerts.front().value), alerts.front().threshold);
  }
  for (size_t i = 1; i < runs.size(); ++i) {
    const ServiceRun &one = runs[i - 1], &other = runs[i];
    std::string apart;
    if (one.way != other.way) {
      const bool shared = one.way == "paged" && other.way == "unshared";
      apart += shared ? "whether prompts share beginnings" : "batching and memory";
    }
    if (one.stage != other.stage) apart += apart.empty() ? "the kernel" : ", and in the kernel";
    text += fmt::format(
        "{}, {} generates {}x the tokens/s of {}, {}. They differ in {}{}.\n", one.way,
        one.stage.substr(0, 2), number(one.figures.tokens_per_s / other.figures.tokens_per_s),
        other.way, other.stage.substr(0, 2), apart,
        apart.find("kernel") == std::string::npos ? "; the kernel is the same" : "");
  }
  if (recording.empty()) return text;
  for (const ServiceRun& run : runs) {
    text += fmt::format("{}, {}: ", run.way, run.stage.substr(0, 2)) +
            (run.recorded.empty() ? "no run is recorded, so the clock's error is not known\n"
                                  : "in brackets the clock's error against " + recording + "\n");
  }
  return text;
}

std::string compare_formats(const std::vector<ServiceRun>& runs, const std::string& clock) {
  std::set<CacheFormat> formats;
  for (const ServiceRun& run : runs) formats.insert(run.scenario.cache_format);
  if (formats.size() < 2) return "";
  const Scenario& first = runs.front().scenario;
  Table table({first.name + ", " + clock, "cache", "pages", "batch, mean", "tokens/s",
               std::string("of ") + to_string(first.cache_format), "step, ms", "token to token, ms",
               "p99", "first token, ms", "finished", "queued", "preemptions", "mJ per token", "W"});
  for (const char* way : {"paged", "static"}) {
    std::map<CacheFormat, std::vector<const ServiceRun*>> by_format;
    for (const ServiceRun& run : runs) {
      if (run.way != way) continue;
      by_format[run.scenario.cache_format].push_back(&run);
      const auto& base = by_format[first.cache_format];
      const size_t place = by_format[run.scenario.cache_format].size() - 1;
      const Figures& figures = run.figures;
      const double ratio =
          place < base.size() ? figures.tokens_per_s / base[place]->figures.tokens_per_s : kUnknown;
      table.add({run.way + ", " + run.stage.substr(0, 2), to_string(run.scenario.cache_format),
                 std::to_string(figures.pages_total), number(figures.batch_mean),
                 number(figures.tokens_per_s), std::isfinite(ratio) ? number(ratio) + "x" : "",
                 number(figures.step_ms_mean), number(figures.token_ms_mean),
                 number(figures.token_ms_p99), number(figures.first_token_ms_p50),
                 std::to_string(figures.counts.finished), std::to_string(figures.counts.queued),
                 std::to_string(figures.counts.preemptions), number(figures.energy_mj_per_token),
                 number(figures.power_w)});
    }
  }
  return table.to_string();
}

std::string compare_memory(const std::vector<Scenario>& scenarios) {
  Table table({"cache", "bytes per token", "pages", "tokens", "requests of mean length",
               "buffers of the largest length"});
  for (const Scenario& scenario : scenarios) {
    const SchedulerLimits limits = limits_of(scenario);
    table.add({to_string(scenario.cache_format), std::to_string(scenario.token_bytes()),
               std::to_string(scenario.num_pages()),
               std::to_string(scenario.num_pages() * kDefaultPageSize),
               std::to_string(most_half_way(scenario.workload, limits)),
               std::to_string(std::min<int64_t>(
                   limits.max_batch,
                   scenario.num_pages() / pages_for(scenario.max_length, kDefaultPageSize)))});
  }
  return table.to_string();
}

Status write_runs(const std::string& path, const Context& context,
                  const std::vector<ServiceRun>& runs) {
  Json json{{"context", Json::object()}, {"runs", Json::array()}};
  for (const char* key : {"schema", "machine", "gpu", "driver", "nvcc", "host_compiler", "commit",
                          "date_utc", "clock", "clock_origin", "max_sm_mhz", "power_limit_w"}) {
    json["context"][key] = nullptr;  // known or not
  }
  for (const auto& [key, value] : context) json["context"][key] = value;
  for (const ServiceRun& run : runs) {
    json["runs"].push_back({{"scenario", run.scenario.name},
                            {"way", run.way},
                            {"stage", run.stage},
                            {"layers", run.scenario.layers},
                            {"heads", run.scenario.heads},
                            {"cache_format", to_string(run.scenario.cache_format)},
                            {"ranks", run.scenario.ranks},
                            {"figures", figures_of(run)},
                            {"rejected_by_reason", reasons(run.figures.counts)}});
  }
  return write_file(path, json.dump(2) + "\n");
}

}  // namespace mla::bench
