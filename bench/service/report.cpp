#include "bench/service/report.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/measure/table.h"

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
          {"preemptions", counts.preemptions}};
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

std::string compare_runs(const std::vector<ServiceRun>& runs, const std::string& clock) {
  if (runs.empty()) return "";
  std::vector<std::string> header{runs.front().scenario.name + ", " + clock};
  for (const ServiceRun& run : runs) header.push_back(run.way + ", " + run.stage.substr(0, 2));
  if (runs.size() == 2) header.push_back(runs[1].way + " / " + runs[0].way);
  Table table(header);
  const auto row = [&](const std::string& name, auto cell) {
    std::vector<std::string> cells{name};
    for (const ServiceRun& run : runs) cells.push_back(cell(run));
    if (runs.size() == 2) cells.emplace_back();
    table.add(std::move(cells));
  };
  const auto measured = [&](const std::string& name, auto value) {
    std::vector<std::string> cells{name};
    for (const ServiceRun& run : runs) cells.push_back(number(value(run.figures)));
    if (runs.size() == 2) {
      const double ratio = value(runs[1].figures) / value(runs[0].figures);
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
  measured("virtual time, s", [](F f) { return f.span; });
  counted("steps", [](F f) { return f.steps; });
  measured("step, ms: mean", [](F f) { return f.step_ms_mean; });
  measured("  p50", [](F f) { return f.step_ms_p50; });
  measured("  p99", [](F f) { return f.step_ms_p99; });
  measured("token to token, ms: mean", [](F f) { return f.token_ms_mean; });
  measured("  p50", [](F f) { return f.token_ms_p50; });
  measured("  p99", [](F f) { return f.token_ms_p99; });
  measured("first token, ms: p50", [](F f) { return f.first_token_ms_p50; });
  measured("  p99", [](F f) { return f.first_token_ms_p99; });
  measured("tokens/s", [](F f) { return f.tokens_per_s; });
  measured("batch, mean", [](F f) { return f.batch_mean; });
  row("pages held: mean, peak, of", [](const ServiceRun& run) {
    return number(run.figures.pages_mean) + ", " + std::to_string(run.figures.pages_peak) + ", " +
           std::to_string(run.figures.pages_total);
  });
  row("of their rows wasted",
      [](const ServiceRun& run) { return percent(run.figures.waste_share); });
  row("queue: mean, largest", [](const ServiceRun& run) {
    return number(run.figures.queue_mean) + ", " + std::to_string(run.figures.queue_max);
  });
  counted("preemptions", [](F f) { return f.counts.preemptions; });
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
                            {"figures", figures_of(run)},
                            {"rejected_by_reason", reasons(run.figures.counts)}});
  }
  std::ofstream stream(path);
  stream << json.dump(2) << "\n";
  stream.close();
  if (stream.good()) return {};
  return {StatusCode::kFileError, path + ": cannot be written"};
}

}  // namespace mla::bench
