// What the pages of docs/demos are compared with, as JSON. On standard input: {"requests": [{"bytes": 16, "addresses": [...]}],
// "plans": [...]}: accesses of a warp to shared memory, whose passes are counted as the GPU model counts them, and settings of plans.
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <vector>

#include "reference/gpu_model/counters.h"
#include "reference/lse_merge.h"
#include "stages/common/machine/machine.h"
#include "stages/common/split/plan.h"

namespace mla {
namespace model {
Status dump_box(const void* rows_gmem, uint32_t* out, int row_bytes);
}

namespace {

// JSON has no infinity.
nlohmann::json number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
}

// [place] = row * chunks of a row + chunk, of which chunk lies there.
Status places(int row_bytes, nlohmann::json& result) {
  const int chunks = 64 * row_bytes / 16;
  std::vector<uint32_t> rows(chunks * 4), box(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint32_t>(i / 4);
  Machine& machine = model_machine();
  DeviceBuffer in, out;
  MLA_RETURN_IF_ERROR(in.assign(machine, rows.data(), rows.size() * 4));
  MLA_RETURN_IF_ERROR(out.allocate(machine, rows.size() * 4));
  MLA_RETURN_IF_ERROR(model::dump_box(in.data(), out.as<uint32_t>(), row_bytes));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  MLA_RETURN_IF_ERROR(machine.copy_to_host(box.data(), out.data(), out.bytes()));
  for (int i = 0; i < chunks; ++i) result.push_back(box[i * 4]);
  return {};
}

unsigned passes(const nlohmann::json& access) {
  gpu_model::detail::Request request;
  request.bytes = access["bytes"];
  request.address.fill(0);
  for (size_t lane = 0; lane < access["addresses"].size(); ++lane) {
    request.lanes |= 1u << lane;
    request.address.at(lane) = access["addresses"][lane];
  }
  return gpu_model::detail::count_wavefronts(request, gpu_model::AccessKind::kStore).taken;
}

// [worker][piece]: sequence, grains from and to, slot.
nlohmann::json pieces(const nlohmann::json& settings) {
  const std::vector<int32_t> lengths = settings["lengths"];
  Problem problem;
  problem.batch = static_cast<int>(lengths.size());
  problem.max_pages_per_seq = 1 << 20;
  problem.fixed_split_tokens = settings["split"];
  PlanShape shape;
  shape.workers = settings["workers"];
  shape.fixed_grains = settings["fixed"];
  shape.min_grains = settings["min"];
  shape.combine_grains = settings["combine"];
  auto result = nlohmann::json::array();
  for (const auto& worker : pieces_of(make_plan_on_host(problem, shape, lengths))) {
    auto own = nlohmann::json::array();
    for (const Piece& piece : worker) {
      own.push_back({piece.sequence, piece.grain_begin, piece.grain_end, piece.slot});
    }
    result.push_back(own);
  }
  return result;
}

int run() {
  nlohmann::json result;
  const double values[] = {0,   1,    -3,       std::log(10.0), std::log(36.0),
                           700, -700, INFINITY, -INFINITY,      NAN};
  for (double a : values) {
    for (double b : values) {
      const LseMerge<double> merged = merge_lse(a, b);
      result["merge"].push_back({number(a), number(b), number(merged.weight_a),
                                 number(merged.weight_b), number(merged.lse)});
    }
  }
  for (int row_bytes : {128, 64}) {
    const Status status = places(row_bytes, result["places"][std::to_string(row_bytes)]);
    if (!status.ok()) {
      std::cerr << status.message() << "\n";
      return 1;
    }
  }
  const auto input = nlohmann::json::parse(std::cin);
  for (const auto& request : input["requests"]) {
    result["passes"].push_back(passes(request));
  }
  for (const auto& settings : input["plans"]) result["plans"].push_back(pieces(settings));
  std::cout << result << "\n";
  return 0;
}

}  // namespace
}  // namespace mla

int main() {
  return mla::run();
}
