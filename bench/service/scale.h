/// @file
/// A model of scale: how long a decode over many GPUs takes, predicted from times that were recorded on one, and
/// what moves between two. Nothing here needs a GPU.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "bench/measure/recorded.h"
#include "bench/measure/shapes.h"
#include "bench/service/time_model.h"
#include "stages/common/parallel/parallel.h"

namespace mla::bench {

/// How ranks that share pages exchange their results in a service: by heads, which brings each the least, where they
/// divide them.
inline Exchange exchange_for(int heads, int ranks) {
  return heads % ranks == 0 ? Exchange::kAllToAll : Exchange::kAllGather;
}

/// What an exchange costs beside its bytes, and the rates at which bytes move, per GPU and direction.
struct Links {
  double exchange_us =
      15;  ///< An exchange of nothing between two ranks of a host: launch, events, one hop.
  double nvlink_gbps = 450;  ///< GB/s; NVLink 4's nominal rate
  /// For every further rank that a ring passes in a host, or that is sent to. Assumed.
  double hop_us = 1.5;
  double network_gbps = 50;   ///< GB/s between hosts: 400 Gbit/s per GPU, nominal.
  double network_us = 10;     ///< Of a hop between hosts. Assumed.
  double merge_us = 6;        ///< A kernel around an exchange, without its bytes.
  double memory_gbps = 4600;  ///< At which such kernels read and write.
  int gpus_per_host = 8;
  std::string origin = "nominal";  ///< Of the first two: "nominal", or what they were fitted to.
  std::string merge_origin = "assumed";  ///< Of merge_us and memory_gbps, the same.
};

/// What the ranks' results take to become one, in us.
struct ExchangeTime {
  double exchange_us = 0, merge_us = 0;
};
/// @param rows   query tokens and heads of the whole batch
/// @param ranks  >= 2
ExchangeTime exchange_time(const Links& links, Exchange exchange, double rows, int ranks);

/// Times of a decode on one GPU as a sum of terms, one for each recorded number of heads: those of the fastest
/// stage of each shape.
struct DecodeModel {
  std::map<int, DecodeFit> of_heads;
  std::string origin;
  /// Between two recorded numbers of heads, the larger of two times: that of the lower number, which reads as much,
  /// and the share of the upper one, which computes as much.
  double us(int heads, const DecodeShape& shape) const;
};

/// What one way to share a problem is predicted to take.
struct Forecast {
  /// "context, all_gather", "heads", "batch", "heads 2 × context 4, all_gather"
  std::string way;
  int ranks = 1;
  int head_ranks = 1, page_ranks = 1;  ///< How many ranks share heads, and how many share pages.
  double decode_us = 0;                ///< Of the share
  double exchange_us = 0;              ///< Latency and bytes
  double merge_us = 0;
  double cache_gb = 0;  ///< Of a rank
  /// What a rank's exchange needs beside: of parallel_workspace_bytes(), without the stage's
  double buffers_gb = 0;
  double us() const { return decode_us + exchange_us + merge_us; }
  double memory_gb() const { return cache_gb + buffers_gb; }
  /// Heads are shared and pages, both.
  bool is_both() const { return head_ranks > 1 && page_ranks > 1; }
};

/// Steps of a service whose sequences lie on several GPUs (context parallel), that only take time: a rank decodes its
/// share of the tokens, and has its share of new ones to append; then each layer has an exchange.
class SimulatedRanks final : public Engine {
 public:
  SimulatedRanks(TimeModel model, int layers, const Links& links, Exchange exchange, int ranks)
      : model_(std::move(model)),
        layers_(layers),
        links_(links),
        exchange_(exchange),
        ranks_(ranks) {}
  Status step(const StepWork& work, double* seconds) override;

 private:
  TimeModel model_;
  int layers_;
  Links links_;
  Exchange exchange_;
  int ranks_;
};

/// Fits the decode's terms to what was recorded on H200 in `files`.
/// @return kInvalidArgument if too little is recorded
Status fit_decode_model(const std::vector<Recorded>& files, DecodeModel* model);

/// A report of mla_parallel: the file's name, and its text.
struct ParallelReport {
  std::string name, text;
};
/// Those in `folder` (empty: the project's own bench/results), by name.
std::vector<ParallelReport> load_parallel_reports(const std::string& folder = "");

/// Fits latency and rate of an exchange, and of the kernels around it, to what was recorded on two GPUs: to the
/// report that is newest by its date among those that time such exchanges. Leaves `links` alone if none times any.
/// @return kFileError for what is no such report, for one with too little to fit, or if exchanges are timed over
///         other numbers of GPUs alone
Status fit_links(const std::vector<ParallelReport>& reports, Links* links);

/// What a decode of equal lengths takes in every way that divides it among `ranks` GPUs, but for those that do
/// not; of one GPU "one" alone. Heads and pages are shared both in every factorisation of `ranks`.
std::vector<Forecast> forecast(const DecodeModel& model, const Links& links, const DecodeCase& spec,
                               int ranks);

/// What the programs predict from: everything recorded, and mla_parallel's reports.
struct ScaleModel {
  DecodeModel decode;
  Links links;
  std::string describe() const;  ///< Three lines
};
/// @return the fits' errors
Status load_scale_model(ScaleModel* model);

/// The tokens per sequence from which on sharing pages is predicted faster than sharing heads, and than one GPU.
/// 0: always; infinite: never.
struct Crossover {
  int heads = 0, sequences = 0, ranks = 0;
  double over_heads = 0, over_one = 0;
};
/// Of 128 and 16 heads, 1 and 8 sequences, 2, 4 and 8 GPUs, by the best exchange.
std::vector<Crossover> crossovers(const ScaleModel& model);

/// The forecasts of a shape over each of these numbers of GPUs, and a table of them, which has of the ways that share
/// heads and pages both the best alone.
/// @return kInvalidArgument for a shape that is not predicted
Status forecast_all(const ScaleModel& model, const Shape& shape, std::span<const int> ranks,
                    std::vector<Forecast>* forecasts, std::string* table);

}  // namespace mla::bench
