#include "bench/service/scale.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "bench/measure/table.h"

namespace mla::bench {
namespace {

constexpr double kRowBytes = kHeadDimV * 2 + 4;  // out and lse of a row
constexpr double kTokenBytes = kHeadDimQK * 2;

bool is_plain(const DecodeCase& spec) {
  return is_fitted(spec, 0, CacheFormat::k16Bit) && spec.page_size == kDefaultPageSize &&
         !spec.strided && spec.softmax_scale == 0;
}

DecodeShape shape_of(const DecodeCase& spec) {
  if (spec.lengths.empty()) {
    return {double(spec.batch), double(spec.batch) * spec.seqlen_k, double(spec.seqlen_k)};
  }
  DecodeShape shape{double(spec.lengths.size()), 0, 0};
  for (const int32_t length : spec.lengths) {
    shape.tokens += length;
    shape.longest = std::max(shape.longest, double(length));
  }
  return shape;
}

/// Bytes that every rank gets per row of the problem, through NVLink, and from other hosts.
struct Received {
  double in_host = 0, between_hosts = 0;
  int steps = 1;  ///< Collectives, one after the other.
};
Received received(Exchange exchange, int ranks, int gpus_per_host) {
  const double n = ranks, host = std::min(ranks, gpus_per_host), others = n - host;
  // Gathered bytes enter a host once, through all its GPUs' links, and are passed on inside.
  const auto gathered = [&](double bytes) {
    return Received{(n - 1) * bytes, others / host * bytes, 1};
  };
  if (exchange == Exchange::kAllGather) return gathered(kRowBytes);
  if (exchange == Exchange::kAllToAll) {
    return {(host - 1) / n * kRowBytes, others / n * kRowBytes, 1};
  }
  const Received lse = gathered(4);
  // Sums are made inside a host first.
  return {lse.in_host + (n - 1) / n * kHeadDimV * 4,
          lse.between_hosts + others / n / host * kHeadDimV * 4, 2};
}

}  // namespace

double DecodeModel::us(int heads, const DecodeShape& shape) const {
  const auto upper = of_heads.lower_bound(heads);
  if (upper == of_heads.end()) {
    const auto& [most, fit] = *of_heads.rbegin();
    return fit.us(shape) * heads / most;
  }
  if (upper->first == heads || upper == of_heads.begin()) return upper->second.us(shape);
  return std::max(std::prev(upper)->second.us(shape),
                  upper->second.us(shape) * heads / upper->first);
}

Status fit_decode_model(const std::vector<Recorded>& files, DecodeModel* model) {
  std::map<int, std::map<std::string, DecodeTime>> best;
  DecodeModel result;
  for (const Recorded& file : files) {
    const auto gpu = file.context.find("gpu");
    if (gpu == file.context.end() || gpu->second.find("H200") == std::string::npos) continue;
    bool is_used = false;
    for (const RecordedEntry& entry : file.entries) {
      Shape shape;
      if (entry.mode != "sustained" || entry.stage.size() < 2 || entry.stage[0] > '9' ||
          !parse_shape(entry.shape, &shape).ok() || !is_plain(shape.spec) || shape.peak != 0 ||
          shape.lengths != Lengths::kEqual) {
        continue;
      }
      DecodeTime& time =
          best[shape.spec.num_heads_q]
              .try_emplace(entry.shape, DecodeTime{entry.shape, shape_of(shape.spec), entry.us})
              .first->second;
      time.us = std::min(time.us, entry.us);
      is_used = true;
    }
    if (is_used) result.origin += (result.origin.empty() ? "" : "; ") + file.origin();
  }
  for (const auto& [heads, of_shapes] : best) {
    std::vector<DecodeTime> times;
    for (const auto& [name, time] : of_shapes) times.push_back(time);
    if (times.size() >= 4) result.of_heads[heads] = fit_decode(times);
  }
  if (result.of_heads.empty()) {
    return {StatusCode::kInvalidArgument, "no times of an H200 are recorded to predict from"};
  }
  *model = std::move(result);
  return {};
}

Status fit_links(const std::string& report, Links* links) {
  if (report.empty()) return {};
  const auto json = nlohmann::json::parse(report, nullptr, false);
  if (json.is_discarded() || !json.contains("context") ||
      json["context"].value("schema", "") != "flashmla_parallel/1") {
    return {StatusCode::kFileError, "no report of mla_parallel"};
  }
  std::vector<double> bytes, us;
  for (const auto& row : json.value("rows", nlohmann::json::array())) {
    // One collective, whose rate is known by its bytes.
    if (row.value("page_ranks", 1) != 2 || row.value("slices", 1) != 1 ||
        row.value("exchange", "") == "reduce_scatter" || !row.contains("exchange_us") ||
        !row["exchange_us"].is_number()) {
      continue;
    }
    bytes.push_back(row["bytes_sent"].get<double>());
    us.push_back(row["exchange_us"].get<double>());
  }
  if (bytes.size() < 4) return {};
  const auto fit = fit_non_negative({std::vector<double>(us.size(), 1.0), bytes}, us);
  if (fit[1] <= 0) return {};
  links->exchange_us = fit[0];
  links->nvlink_gbps = 1e-3 / fit[1];
  links->origin = "two GPUs, " + json["context"].value("date_utc", "").substr(0, 10);
  return {};
}

ExchangeTime exchange_time(const Links& links, Exchange exchange, double rows, int ranks) {
  const Received bytes = received(exchange, ranks, links.gpus_per_host);
  const int host = std::min(ranks, links.gpus_per_host), hosts = (ranks + host - 1) / host;
  const double latency =
      links.exchange_us + links.hop_us * (host - 2) + links.network_us * (hosts - 1);
  const double merged = exchange == Exchange::kAllGather ? ranks : 1;
  // GB/s are kB/us.
  return {
      bytes.steps * latency +
          rows * 1e-3 *
              std::max(bytes.in_host / links.nvlink_gbps, bytes.between_hosts / links.network_gbps),
      links.merge_us * bytes.steps + rows * (merged + 1) * kRowBytes * 1e-3 / links.memory_gbps};
}

Status SimulatedRanks::step(const StepWork& work, double* seconds) {
  // As on one GPU, but for what the ranks share, and for what they exchange.
  const auto sequences = static_cast<double>(work.sequences.size());
  const auto tokens = static_cast<double>(work.decoded()), n = static_cast<double>(ranks_);
  const auto longest = static_cast<double>(work.longest());
  const DecodeShape whole{sequences, tokens, longest};
  const DecodeShape share{sequences, tokens / n, longest / n};
  const double plan = model_.plan_us[0] + model_.plan_us[1] * sequences;
  const double append =
      (model_.step_us(work, 1) - plan - model_.decode.us(whole) - model_.append_us[0]) / n +
      model_.append_us[0];
  const ExchangeTime time = exchange_time(links_, exchange_, sequences * model_.heads, ranks_);
  const double layer = (work.appended() > 0 ? append : 0) + model_.decode.us(share) +
                       (sequences > 0 ? time.exchange_us + time.merge_us : 0);
  *seconds = 1e-6 * (plan + layers_ * layer);
  return {};
}

std::vector<Forecast> forecast(const DecodeModel& model, const Links& links, const DecodeCase& spec,
                               int ranks) {
  const DecodeShape whole = shape_of(spec);
  const double rows = whole.sequences * spec.seqlen_q * spec.num_heads_q, n = ranks;
  const double cache_gb = whole.tokens * spec.num_heads_kv * kTokenBytes / 1e9;
  std::vector<Forecast> found;
  if (ranks == 1) return {{"one", 1, model.us(spec.num_heads_q, whole), 0, 0, cache_gb}};
  for (const Exchange exchange : kExchanges) {
    if (exchange != Exchange::kAllGather && spec.num_heads_q % ranks != 0) continue;
    Forecast one{std::string("context, ") + to_string(exchange), ranks, 0, 0, 0, 0};
    one.memory_gb = cache_gb / n;
    one.decode_us =
        model.us(spec.num_heads_q, {whole.sequences, whole.tokens / n, whole.longest / n});
    const ExchangeTime time = exchange_time(links, exchange, rows, ranks);
    one.exchange_us = time.exchange_us;
    one.merge_us = time.merge_us;
    found.push_back(one);
  }
  if (spec.num_heads_q % ranks == 0 && spec.num_heads_kv == 1) {
    found.push_back({"heads", ranks, model.us(spec.num_heads_q / ranks, whole), 0, 0, cache_gb});
  }
  if (ranks <= whole.sequences) {
    const double most = std::ceil(whole.sequences / n) / whole.sequences;
    found.push_back(
        {"batch", ranks,
         model.us(spec.num_heads_q, {whole.sequences * most, whole.tokens * most, whole.longest}),
         0, 0, cache_gb * most});
  }
  return found;
}

std::string ScaleModel::describe() const {
  return fmt::format(
      "decode: {}\nlinks: {}; an exchange {} µs, NVLink {} GB/s, network {} GB/s per GPU\n",
      decode.origin, links.origin, number(links.exchange_us), number(links.nvlink_gbps),
      number(links.network_gbps));
}

Status load_scale_model(ScaleModel* model) {
  MLA_RETURN_IF_ERROR(fit_decode_model(load_all_recorded(), &model->decode));
  return fit_links(newest_parallel_report(), &model->links);
}

Status forecast_all(const ScaleModel& model, const Shape& shape, std::span<const int> ranks,
                    std::vector<Forecast>* forecasts, std::string* table) {
  if (!is_fitted(shape.spec, 0, CacheFormat::k16Bit)) {
    return {StatusCode::kInvalidArgument,
            shape.name + ": predicted are one query token, one KV head and 16-bit caches in bf16"};
  }
  const double one_us = forecast(model.decode, model.links, shape.spec, 1).front().us();
  Table rows({"ranks", "decode", "exchange", "merge", "all, µs", "of one", "cache, GB", "way"});
  forecasts->clear();
  for (const int count : ranks) {
    for (const Forecast& one : forecast(model.decode, model.links, shape.spec, count)) {
      rows.add({std::to_string(count), microseconds(one.decode_us), microseconds(one.exchange_us),
                microseconds(one.merge_us), microseconds(one.us()), number(one.us() / one_us),
                number(one.memory_gb), one.way});
      forecasts->push_back(one);
    }
  }
  *table = rows.to_string();
  return {};
}

std::string newest_parallel_report(const std::string& folder) {
  std::string newest, text;
  std::error_code error;
  for (const auto& file :
       std::filesystem::directory_iterator(folder.empty() ? MLA_RESULTS_FOLDER : folder, error)) {
    const std::string name = file.path().filename().string();
    if (name.find("_parallel_") == std::string::npos || file.path().extension() != ".json" ||
        name < newest) {
      continue;
    }
    newest = name;
    std::ifstream stream(file.path());
    std::ostringstream read;
    read << stream.rdbuf();
    text = read.str();
  }
  return text;
}

}  // namespace mla::bench
