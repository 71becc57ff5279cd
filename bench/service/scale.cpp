#include "bench/service/scale.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
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

/// Bytes that the kernels around an exchange read and write per row of the problem.
double merged_bytes(Exchange exchange, int ranks) {
  const double n = ranks;
  if (exchange == Exchange::kAllGather) return (n + 1) * kRowBytes;
  if (exchange == Exchange::kAllToAll) return (1 + 1 / n) * kRowBytes;
  const double out = kHeadDimV * 2, sum = kHeadDimV * 4, lse = 4;
  const double weigh = out + n * lse + sum, round = (sum + n * lse + out + lse) / n;
  return weigh + round;
}
int kernels_around(Exchange exchange) {
  return exchange == Exchange::kReduceScatter ? 2 : 1;
}

/// Bytes of a rank's workspace per row of the problem, without those that the stage works in.
double buffer_bytes(Exchange exchange, int ranks) {
  const double n = ranks;
  if (exchange == Exchange::kAllGather) return n * kRowBytes;
  if (exchange == Exchange::kAllToAll) return 2 * kRowBytes;
  return kRowBytes + n * 4 + (1 + 1 / n) * kHeadDimV * 4;
}

/// Whether a row of a report has an exchange's time, which one collective or two took.
bool is_timed(const nlohmann::json& row) {
  return row.value("page_ranks", 1) > 1 && row.value("slices", 1) == 1 &&
         row.contains("exchange_us") && row["exchange_us"].is_number();
}
bool is_timed_over_two(const nlohmann::json& row) {
  return is_timed(row) && row.value("ranks", 0) == 2 && row.value("page_ranks", 1) == 2;
}

/// The kernels around an exchange: what is left of a merge's time. Too few rows leave what is assumed.
Status fit_merge(const nlohmann::json& rows, const std::string& origin, Links* links) {
  std::vector<double> kernels, bytes, us;
  for (const auto& row : rows) {
    if (!is_timed_over_two(row) || !row.contains("merge_us") || !row["merge_us"].is_number()) {
      continue;
    }
    const double left = row["merge_us"].get<double>() - row["exchange_us"].get<double>();
    if (left <= 0) continue;
    Shape shape;
    MLA_RETURN_IF_ERROR(parse_shape(row.value("shape", ""), &shape));
    const std::string name = row.value("exchange", "");
    for (const Exchange exchange : kExchanges) {
      if (name != to_string(exchange)) continue;
      kernels.push_back(kernels_around(exchange));
      bytes.push_back(shape_of(shape.spec).sequences * shape.spec.seqlen_q *
                      shape.spec.num_heads_q * merged_bytes(exchange, 2));
      us.push_back(left);
    }
  }
  if (us.size() < 4) return {};
  const auto fit = fit_non_negative({kernels, bytes}, us);
  if (fit[1] <= 0) return {};
  links->merge_us = fit[0];
  links->memory_gbps = 1e-3 / fit[1];
  links->merge_origin = origin;
  return {};
}

/// From which number of tokens on it is so, by its start on a fine grid; 0: always, infinite: never.
template <typename IsSo>
double from_on(const IsSo& is_so) {
  double from = std::exp2(24);
  if (!is_so(from)) return std::numeric_limits<double>::infinity();
  double before = from;
  while (is_so(before)) {
    from = before;
    before /= std::exp2(0.125);
    if (before < 1) return 0;
  }
  while (from - before > 1) {
    const double middle = (from + before) / 2;
    (is_so(middle) ? from : before) = middle;
  }
  return from;
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

Status fit_links(const std::vector<ParallelReport>& reports, Links* links) {
  nlohmann::json newest;
  std::string newest_name, newest_date;
  bool has_times = false;
  for (const ParallelReport& report : reports) {
    const auto json = nlohmann::json::parse(report.text, nullptr, false);
    if (!json.is_object() || !json.contains("context") ||
        json["context"].value("schema", "") != "flashmla_parallel/1") {
      return {StatusCode::kFileError, report.name + " is no report of mla_parallel"};
    }
    const auto rows = json.value("rows", nlohmann::json::array());
    has_times |= std::any_of(rows.begin(), rows.end(), is_timed);
    const std::string date = json["context"].value("date_utc", "");
    if (date < newest_date || std::none_of(rows.begin(), rows.end(), is_timed_over_two)) continue;
    newest = json;
    newest_name = report.name;
    newest_date = date;
  }
  if (newest_name.empty()) {
    if (!has_times) return {};
    return {StatusCode::kFileError,
            "no report of mla_parallel times exchanges over two GPUs, from which others are "
            "predicted"};
  }
  std::vector<double> bytes, us;
  for (const auto& row : newest["rows"]) {
    // One collective, whose rate is known by its bytes.
    if (!is_timed_over_two(row) || row.value("exchange", "") == "reduce_scatter") continue;
    bytes.push_back(row.value("bytes_sent", 0.0));
    us.push_back(row["exchange_us"].get<double>());
  }
  if (bytes.size() < 4) {
    return {StatusCode::kFileError,
            fmt::format("{} times {} exchanges over two GPUs; a fit needs four", newest_name,
                        bytes.size())};
  }
  const auto fit = fit_non_negative({std::vector<double>(us.size(), 1.0), bytes}, us);
  if (fit[1] <= 0) {
    return {StatusCode::kFileError,
            newest_name + ": exchanges over two GPUs take no longer for more bytes"};
  }
  Links fitted = *links;
  fitted.exchange_us = fit[0];
  fitted.nvlink_gbps = 1e-3 / fit[1];
  fitted.origin = "two GPUs, " + newest_date.substr(0, 10);
  MLA_RETURN_IF_ERROR(fit_merge(newest["rows"], fitted.origin, &fitted));
  *links = fitted;
  return {};
}

ExchangeTime exchange_time(const Links& links, Exchange exchange, double rows, int ranks) {
  const Received bytes = received(exchange, ranks, links.gpus_per_host);
  const int host = std::min(ranks, links.gpus_per_host), hosts = (ranks + host - 1) / host;
  // Each rank sends to every other at once; or what it has goes round by all hosts, one after the other.
  const double latency =
      links.exchange_us + (exchange == Exchange::kAllToAll
                               ? links.hop_us * (ranks - 2) + (hosts > 1 ? links.network_us : 0)
                               : links.hop_us * (host - 2) + links.network_us * (hosts - 1));
  // GB/s are kB/us.
  return {bytes.steps * latency + rows * 1e-3 *
                                      std::max(bytes.in_host / links.nvlink_gbps,
                                               bytes.between_hosts / links.network_gbps),
          links.merge_us * kernels_around(exchange) +
              rows * merged_bytes(exchange, ranks) * 1e-3 / links.memory_gbps};
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
  if (ranks == 1) {
    return {{.way = "one", .decode_us = model.us(spec.num_heads_q, whole), .cache_gb = cache_gb}};
  }
  // Pages are shared among `pages` ranks, which have some of the heads.
  const auto share_pages = [&](int heads, int pages, const std::string& way) {
    const int own = spec.num_heads_q / heads;
    for (const Exchange exchange : kExchanges) {
      if (exchange != Exchange::kAllGather && own % pages != 0) continue;
      Forecast one{.way = way + ", " + to_string(exchange),
                   .ranks = ranks,
                   .head_ranks = heads,
                   .page_ranks = pages};
      one.decode_us = model.us(own, {whole.sequences, whole.tokens / pages, whole.longest / pages});
      // Ranks that share pages are neighbours: of one host, where it has as many.
      const ExchangeTime time = exchange_time(links, exchange, rows / heads, pages);
      one.exchange_us = time.exchange_us;
      one.merge_us = time.merge_us;
      one.cache_gb = cache_gb / pages;
      one.buffers_gb = rows / heads * buffer_bytes(exchange, pages) / 1e9;
      found.push_back(one);
    }
  };
  share_pages(1, ranks, "context");
  for (int heads = 2; spec.num_heads_kv == 1 && heads <= ranks; ++heads) {
    if (ranks % heads != 0 || spec.num_heads_q % heads != 0) continue;
    if (heads == ranks) {
      found.push_back({.way = "heads",
                       .ranks = ranks,
                       .head_ranks = ranks,
                       .decode_us = model.us(spec.num_heads_q / ranks, whole),
                       .cache_gb = cache_gb});
    } else {
      share_pages(heads, ranks / heads, fmt::format("heads {} × context {}", heads, ranks / heads));
    }
  }
  if (ranks <= whole.sequences) {
    const double most = std::ceil(whole.sequences / n) / whole.sequences;
    found.push_back({.way = "batch",
                     .ranks = ranks,
                     .decode_us = model.us(spec.num_heads_q, {whole.sequences * most,
                                                              whole.tokens * most, whole.longest}),
                     .cache_gb = cache_gb * most});
  }
  return found;
}

std::vector<Crossover> crossovers(const ScaleModel& model) {
  std::vector<Crossover> found;
  for (const int heads : {128, 16}) {
    for (const int sequences : {1, 8}) {
      for (const int ranks : {2, 4, 8}) {
        DecodeCase spec;
        spec.num_heads_q = heads;
        spec.batch = sequences;
        const auto is_faster_than = [&](bool one_gpu) {
          return from_on([&](double tokens) {
            spec.seqlen_k = static_cast<int>(tokens);
            double context = std::numeric_limits<double>::infinity(), other = context;
            for (const Forecast& one : forecast(model.decode, model.links, spec, ranks)) {
              if (one.page_ranks == ranks) context = std::min(context, one.us());
              if (one.head_ranks == ranks) other = one.us();
            }
            if (one_gpu) other = forecast(model.decode, model.links, spec, 1).front().us();
            return context < other;
          });
        };
        found.push_back({heads, sequences, ranks, is_faster_than(false), is_faster_than(true)});
      }
    }
  }
  return found;
}

std::string ScaleModel::describe() const {
  return fmt::format(
      "decode: {}\nlinks: {}; an exchange {} µs, NVLink {} GB/s, network {} GB/s per GPU\n"
      "merge: {}; a kernel {} µs, and {} GB/s\n",
      decode.origin, links.origin, number(links.exchange_us), number(links.nvlink_gbps),
      number(links.network_gbps), links.merge_origin, number(links.merge_us),
      number(links.memory_gbps));
}

Status load_scale_model(ScaleModel* model) {
  MLA_RETURN_IF_ERROR(fit_decode_model(load_all_recorded(), &model->decode));
  return fit_links(load_parallel_reports(), &model->links);
}

Status forecast_all(const ScaleModel& model, const Shape& shape, std::span<const int> ranks,
                    std::vector<Forecast>* forecasts, std::string* table) {
  if (!is_fitted(shape.spec, 0, CacheFormat::k16Bit)) {
    return {
        StatusCode::kInvalidArgument,
        shape.name + ": only one query token, one KV head and 16-bit caches in bf16 are predicted"};
  }
  const double one_us = forecast(model.decode, model.links, shape.spec, 1).front().us();
  Table rows({"ranks", "decode", "exchange", "merge", "all, µs", "of one", "cache, GB",
              "buffers, GB", "way"});
  forecasts->clear();
  for (const int count : ranks) {
    const auto all = forecast(model.decode, model.links, shape.spec, count);
    double best_of_both = std::numeric_limits<double>::infinity();
    for (const Forecast& one : all) {
      if (one.is_both()) best_of_both = std::min(best_of_both, one.us());
    }
    for (const Forecast& one : all) {
      forecasts->push_back(one);
      if (one.is_both() && one.us() > best_of_both) continue;
      rows.add({std::to_string(count), microseconds(one.decode_us), microseconds(one.exchange_us),
                microseconds(one.merge_us), microseconds(one.us()), number(one.us() / one_us),
                number(one.cache_gb), number(one.buffers_gb), one.way});
    }
  }
  *table = rows.to_string();
  return {};
}

std::vector<ParallelReport> load_parallel_reports(const std::string& folder) {
  std::vector<ParallelReport> reports;
  std::error_code error;
  for (const auto& file :
       std::filesystem::directory_iterator(folder.empty() ? MLA_RESULTS_FOLDER : folder, error)) {
    const std::string name = file.path().filename().string();
    if (name.find("_parallel_") == std::string::npos || file.path().extension() != ".json") {
      continue;
    }
    std::ifstream stream(file.path());
    std::ostringstream read;
    read << stream.rdbuf();
    reports.push_back({name, read.str()});
  }
  std::sort(reports.begin(), reports.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return reports;
}

}  // namespace mla::bench
