// mla_run predict --ranks: what a decode over several GPUs is predicted to take.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "bench/service/scale.h"
#include "bench/tools/mla_run.h"

namespace mla::bench {

int run_predict_ranks(const RunOptions& options) {
  const auto refuse_use = [](const char* why) {
    return refuse({StatusCode::kInvalidArgument, why});
  };
  if (!options.stage.empty()) {
    return refuse_use("--ranks predicts the fastest stage: leave out --stage");
  }
  if (options.shape.empty()) return refuse_use("--ranks needs a --shape");
  Shape shape;
  ScaleModel model;
  std::vector<Forecast> forecasts;
  std::string table;
  Status status = parse_shape(options.shape, &shape);
  if (status.ok()) status = load_scale_model(&model);
  if (status.ok()) status = forecast_all(model, shape, options.ranks, &forecasts, &table);
  if (!status.ok()) return refuse(status);
  if (!options.json) {
    fmt::print("{}\n{}\n{}", model.describe(), shape.title(), table);
    return kRight;
  }
  for (const Forecast& one : forecasts) {
    const nlohmann::ordered_json json{{"shape", shape.name},
                                      {"way", one.way},
                                      {"ranks", one.ranks},
                                      {"decode_s", 1e-6 * one.decode_us},
                                      {"exchange_s", 1e-6 * one.exchange_us},
                                      {"merge_s", 1e-6 * one.merge_us},
                                      {"predicted_s", 1e-6 * one.us()},
                                      {"cache_bytes", 1e9 * one.cache_gb},
                                      {"buffer_bytes", 1e9 * one.buffers_gb}};
    fmt::print("{}\n", json.dump());
  }
  return kRight;
}

}  // namespace mla::bench
