#include "bench/explain/estimate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla::bench {

Estimate estimate_of(const StageFacts& stage, const ExplainInput& input) {
  if (!stage.plan) return {};
  const Problem& problem = input.problem;
  const Prediction& prediction = stage.prediction;
  const Ceilings& ceilings = input.ceilings;
  const int multiprocessors = input.limits.multiprocessors;
  const Balance balance = balance_of(problem, *stage.plan, input.seqlens_k, multiprocessors);
  const auto total_tokens =
      std::accumulate(input.seqlens_k.begin(), input.seqlens_k.end(), int64_t{0});
  constexpr double kAlone = 2;  // times an even share of the memory's rate
  const double share = kAlone * ceilings.read / multiprocessors;
  const double clock = ceilings.shared / ceilings.shared_bytes_per_clock / multiprocessors;
  const PlanShape& shape = balance.shape;
  const double grain_bytes = double(kGrainTokens) * problem.cache_row_bytes();
  const double grains = std::max(1.0, double(total_tokens) / kGrainTokens * shape.row_tiles);
  const double bytes = std::max(prediction.dram_bytes, work_of(problem, total_tokens).bytes);
  const double rows = double(problem.seqlen_q) * problem.num_heads_q / shape.row_tiles;
  const auto blocks = static_cast<double>(balance.blocks);
  // `of_block` by every block, `of_all` at most by all of them: row tiles read the same pages.
  const auto moved = [&](double of_block, double of_all) {
    return std::max(of_block / share, std::min(of_all, of_block * blocks) / ceilings.read);
  };

  Estimate estimate;
  estimate.launch = ceilings.launch;
  const double first_bytes = grain_bytes + rows * kHeadDimQK * 2;
  const double first_moved = moved(first_bytes, bytes);
  estimate.first_tile = 4 * kLoadLatency + first_moved;

  // The busiest multiprocessor takes its blocks' grains one after another.
  const double rounds = std::max(1.0, std::ceil(blocks / multiprocessors));
  const double busiest = double(balance.largest - balance.fixed) / shape.team * rounds;
  const OwnLimit limit = own_limit(prediction, {}, ceilings, Mode::kCold);
  const double most = std::max({limit.fp32, limit.matrix, limit.shared}) - ceilings.launch;
  double grain = most * prediction.busy_fraction * multiprocessors / grains;
  grain = std::max(grain, prediction.grain_clocks / clock);
  const double cached = bytes / ceilings.read - first_moved;
  estimate.tiles = std::max(busiest * grain, cached + grain);

  const double out_bytes = rows * kHeadDimV * 2;
  const bool parts = balance.parts > 0;
  const double part_bytes = parts ? balance.partial_bytes / std::max(1.0, blocks) : out_bytes;
  estimate.end = moved(part_bytes, part_bytes * blocks);
  estimate.combine = kNextKernel + 2 * kLoadLatency;
  if (parts) {
    const double out =
        double(problem.batch) * problem.seqlen_q * problem.num_heads_q * kHeadDimV * 2;
    estimate.combine += kLoadLatency + (balance.partial_bytes + out) / ceilings.read;
  }
  return estimate;
}

}  // namespace mla::bench
