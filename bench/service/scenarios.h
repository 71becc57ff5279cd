/// @file
/// The scenarios by name: who asks for what, of which model, with how much memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench/service/requests.h"
#include "bench/service/scheduler.h"
#include "reference/cache_format.h"

namespace mla::bench {

/// One scenario.
struct Scenario {
  std::string name;
  std::string what;
  Workload workload;
  int heads = 128;
  int layers = 61;
  double cache_gib = 64;                           ///< Of all layers; ignored if `pages` is set
  std::optional<int64_t> pages{};                  ///< Of a layer; else as many as cache_gib holds
  CacheFormat cache_format = CacheFormat::k16Bit;  ///< Of every layer's cache
  int ranks = 1;  ///< GPUs that share every sequence's pages, each with a cache of that size.
  int max_batch = 256;
  int64_t max_length = 16384;
  std::optional<int64_t> max_queue{};
  double seconds = 4;      ///< Virtual; 0: no limit
  int64_t requests = -1;   ///< Arrivals; -1: no limit
  int64_t under_way = -1;  ///< Requests half-way at the beginning; -1: as many as in balance

  /// Pages of a layer, on all ranks.
  int64_t num_pages() const;
  /// Bytes of a page, all layers.
  int64_t page_bytes() const;
  /// Bytes of a token, all layers.
  int64_t token_bytes() const { return page_bytes() / kDefaultPageSize; }
};

/// Every scenario. `tiny`, for the GPU model, is the last, and no part of "all".
const std::vector<Scenario>& scenarios();

/// Gives a scenario the heads and layers of a model: deepseek_v3, deepseek_v2, deepseek_v2_lite.
/// @return kUnsupported for a model with keys and values for several heads, which no stage reads, naming what
/// does; kInvalidArgument for one that is not known
Status use_model(const std::string& name, Scenario* scenario);

/// Its name, and its cache's format if that is a quantised one: "tiny, fp8_tile128".
std::string title(const Scenario& scenario);

/// The scenarios that a comma-separated list names; "all": all but `tiny`.
/// @return kInvalidArgument, naming one that does not exist and those that do
Status select_scenarios(const std::string& list, std::vector<Scenario>* chosen);

/// @return kInvalidArgument, naming the value that is out of range
Status validate(const Scenario& scenario);

/// What its schedulers keep to. Of a scenario that validate() accepts.
SchedulerLimits limits_of(const Scenario& scenario);

}  // namespace mla::bench
