// 02_shared_tiled: launch, workspace, prediction.
#include <algorithm>

#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

using namespace shared_tiled;

static_assert(kHeadDimQK % kTileK == 0, "the depth of S is walked in whole steps");
static_assert(kHeadDimV % kTileN == 0, "O is cut into whole column tiles");
static_assert(kThreads == kTileN, "each thread of `scores` brings one token of K");
static_assert(
    kMinPageSize % kStepTokens == 0,
    "a step of `values` reads whole float4s of a score row, whose width is that of the table");

// Scores of one sequence: [num_heads_kv, rows_per_kv_head, max_seqlen_k] floats.
int64_t score_bytes(const Problem& problem) {
  return int64_t{problem.num_heads_kv} * problem.rows_per_kv_head() * problem.max_seqlen_k() * 4;
}

// Sequences whose scores are held at once: as many as fit 1 GiB, at least one.
int sequences_at_once(const Problem& problem) {
  return static_cast<int>(
      std::clamp<int64_t>((int64_t{1} << 30) / score_bytes(problem), 1, problem.batch));
}

size_t scratch_bytes(const Problem& problem, const DeviceLimits&) {
  return static_cast<size_t>(sequences_at_once(problem) * score_bytes(problem));
}

// Rows a block: 16 where 64 would mostly be padding.
int rows_per_tile(const Problem& problem) {
  return problem.rows_per_kv_head() <= 16 ? 16 : 64;
}

// Blocks that share the scores of a tile of rows: enough of them to keep the device busy, whatever the
// width of the table, because what they do follows the lengths.
int parts_of(const Problem& problem, int64_t tiles, const DeviceLimits& limits) {
  const int64_t enough = (int64_t{64} * limits.multiprocessors + tiles - 1) / tiles;
  return static_cast<int>(std::min(enough, (problem.max_seqlen_k() + kTileN - 1) / kTileN));
}

template <typename T, int kRows>
Status decode_tiled(const Problem& problem, const Tensors& tensors, float* scores_gmem,
                    const DeviceLimits& limits, Stream stream) {
  const int at_once = sequences_at_once(problem);
  const int64_t row_tiles = (problem.rows_per_kv_head() + kRows - 1) / kRows;
  for (int first = 0; first < problem.batch; first += at_once) {
    const int64_t matrices =
        int64_t{std::min(at_once, problem.batch - first)} * problem.num_heads_kv;
    const int64_t tiles = matrices * row_tiles;
    const int parts = parts_of(problem, tiles, limits);
    MLA_RETURN_IF_ERROR(launch(scores<T, kRows>, grid_for(tiles * parts), kThreads,
                               sizeof(ScoresSmem<kRows>), stream, problem, tensors, first,
                               row_tiles, parts, tiles * parts, scores_gmem));
    const int64_t rows = matrices * problem.rows_per_kv_head();
    MLA_RETURN_IF_ERROR(launch(softmax, grid_for(rows), kSoftmaxThreads, sizeof(SoftmaxSmem),
                               stream, problem, tensors, first, rows, scores_gmem));
    const int64_t outputs = tiles * (kHeadDimV / kTileN);
    MLA_RETURN_IF_ERROR(launch(values<T, kRows>, grid_for(outputs), kThreads,
                               sizeof(ValuesSmem<kRows>), stream, problem, tensors, first, outputs,
                               scores_gmem));
  }
  return {};
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  auto* scores_gmem = static_cast<float*>(scratch);
  return visit_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    return rows_per_tile(problem) == 16
               ? decode_tiled<T, 16>(problem, tensors, scores_gmem, limits, stream)
               : decode_tiled<T, 64>(problem, tensors, scores_gmem, limits, stream);
  });
}

Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const int tile_rows = rows_per_tile(problem);
  const double row_tiles = std::ceil(double(problem.rows_per_kv_head()) / tile_rows);
  const double padded = row_tiles * tile_rows * problem.num_heads_kv * double(total_tokens);
  const double scores = double(problem.seqlen_q) * problem.num_heads_q * double(total_tokens);
  Prediction prediction;
  prediction.fp32_flop = 2 * padded * (kHeadDimQK + kHeadDimV);
  // Passes of shared memory, at 128 bytes each (README.md, "Why 8 x 8"): four columns cost a warp's
  // n x n results n reads of Q at 2 passes and n of K at 4, for 4 n n FMAs a lane.
  const double n = tile_rows == 64 ? 8 : 4;
  prediction.shared_bytes = padded * (kHeadDimQK + kHeadDimV) * (6 * n * 128) / (4 * n * n * 32);
  // KV is read by both passes; the score matrix is written twice and read three times.
  prediction.dram_bytes =
      double(total_tokens) * problem.num_heads_kv * (kHeadDimQK + kHeadDimV) * 2 + scores * 4 * 5;
  // The passes differ in blocks: the share of multiprocessors is that of the whole time.
  const double matrices = double(problem.batch) * problem.num_heads_kv * row_tiles;
  const auto busy = [&](double blocks) { return std::min(1.0, blocks / limits.multiprocessors); };
  const double token_tiles = std::ceil(double(total_tokens) / problem.batch / kTileN);
  prediction.busy_fraction =
      (kHeadDimQK + kHeadDimV) / (kHeadDimQK / busy(matrices * token_tiles) +
                                  kHeadDimV / busy(matrices * (kHeadDimV / kTileN)));
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "a KV tile in shared memory serves all heads; register tiles";
  stage.scratch_bytes = scratch_bytes;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
