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
  double nvlink_gbps = 450;   ///< GB/s; NVLink 4's nominal rate
  double hop_us = 1.5;        ///< For every further rank of a host that a ring passes. Assumed.
  double network_gbps = 50;   ///< GB/s between hosts: 400 Gbit/s per GPU, nominal.
  double network_us = 10;     ///< Of a hop between hosts. Assumed.
  double merge_us = 6;        ///< Kernels around an exchange, without their bytes.
  double memory_gbps = 4600;  ///< At which these read and write.
  int gpus_per_host = 8;
  std::string origin = "nominal";  ///< Of the first two: "nominal", or what they were fitted to.
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
  /// Between two recorded numbers of heads: as long as the lower, which reads as much, or the upper's share, which
  /// computes as much, whichever is more.
  double us(int heads, const DecodeShape& shape) const;
};

/// What one way to share a problem is predicted to take.
struct Forecast {
  std::string way;  ///< "context, all_gather", "heads", "batch"
  int ranks = 1;
  double decode_us = 0;    ///< Of the share
  double exchange_us = 0;  ///< Latency and bytes
  double merge_us = 0;
  double memory_gb = 0;  ///< The cache of a rank
  double us() const { return decode_us + exchange_us + merge_us; }
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

/// Fits latency and rate of an exchange to what mla_parallel recorded on two GPUs; leaves `links` alone if
/// `report` is empty. `report` is the file's text.
/// @return kFileError for what is no such report
Status fit_links(const std::string& report, Links* links);

/// What a decode of equal lengths takes in every way that divides it among `ranks` GPUs, but for those that do
/// not; of one GPU "one" alone.
std::vector<Forecast> forecast(const DecodeModel& model, const Links& links, const DecodeCase& spec,
                               int ranks);

/// What the programs predict from: everything recorded, and the newest report of mla_parallel.
struct ScaleModel {
  DecodeModel decode;
  Links links;
  std::string describe() const;  ///< Two lines
};
/// @return the fits' errors
Status load_scale_model(ScaleModel* model);

/// The forecasts of a shape over each of these numbers of GPUs, and a table of them.
/// @return kInvalidArgument for a shape that is not predicted
Status forecast_all(const ScaleModel& model, const Shape& shape, std::span<const int> ranks,
                    std::vector<Forecast>* forecasts, std::string* table);

/// The newest report of mla_parallel in `folder` (empty: the project's own bench/results); empty if there is none.
std::string newest_parallel_report(const std::string& folder = "");

}  // namespace mla::bench
