// 01_naive: launch, workspace, prediction.
#include <algorithm>

#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

using namespace naive;

static_assert(kHeadDimV == 2 * kThreads, "a thread of `values` makes two columns");

// Who computes a score: README.md has both measured. -DMLA_NAIVE_UNCOALESCED builds the other.
#ifdef MLA_NAIVE_UNCOALESCED
constexpr Mapping kMapping = Mapping::kThreadPerScore;
#else
constexpr Mapping kMapping = Mapping::kWarpPerScore;
#endif

// Scores of one sequence: [seqlen_q * num_heads_q, max_seqlen_k] floats.
int64_t score_bytes(const Problem& problem) {
  return int64_t{problem.seqlen_q} * problem.num_heads_q * problem.max_seqlen_k() * 4;
}

// Sequences whose scores are held at once: as many as fit 1 GiB, at least one.
int sequences_at_once(const Problem& problem) {
  return static_cast<int>(
      std::clamp<int64_t>((int64_t{1} << 30) / score_bytes(problem), 1, problem.batch));
}

size_t scratch_bytes(const Problem& problem, const DeviceLimits&) {
  return static_cast<size_t>(sequences_at_once(problem) * score_bytes(problem));
}

// Blocks that share a row's scores: enough of them to keep the device busy, whatever the width of the
// table, because what they do follows the lengths.
int parts_of(const Problem& problem, int64_t rows, const DeviceLimits& limits) {
  const int64_t enough = (int64_t{64} * limits.multiprocessors + rows - 1) / rows;
  return static_cast<int>(std::min(enough, grains_for(problem.max_seqlen_k())));
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void* scratch,
              const DeviceLimits& limits, Stream stream) {
  auto* scores_gmem = static_cast<float*>(scratch);
  const int at_once = sequences_at_once(problem);
  return visit_dtype(problem.dtype, [&](auto zero) -> Status {
    using T = decltype(zero);
    for (int first = 0; first < problem.batch; first += at_once) {
      const int64_t sequences = std::min(at_once, problem.batch - first);
      const int64_t rows = sequences * problem.seqlen_q * problem.num_heads_q;
      const int parts = parts_of(problem, rows, limits);
      MLA_RETURN_IF_ERROR(launch(scores<T, kMapping>, grid_for(rows * parts), kThreads, 0, stream,
                                 problem, tensors, first, parts, rows * parts, scores_gmem));
      MLA_RETURN_IF_ERROR(launch(softmax, grid_for(rows), kThreads, sizeof(SoftmaxSmem), stream,
                                 problem, tensors, first, rows, scores_gmem));
      MLA_RETURN_IF_ERROR(launch(values<T>, grid_for(rows), kThreads, 0, stream, problem, tensors,
                                 first, rows, scores_gmem));
    }
    return {};
  });
}

// Every row reads every token's K and V, 576 and 512 columns, through the caches; the score matrix is
// written three times (scores, exponentials, probabilities) and read four times.
Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits& limits) {
  const double rows = double(problem.seqlen_q) * problem.num_heads_q;
  const double scores = rows * double(total_tokens);
  Prediction prediction;
  prediction.fp32_flop = 2 * scores * (kHeadDimQK + kHeadDimV);
  // Loads go through the L1, which is the same memory as shared memory, and starts at most one per
  // clock: in the time of 128 bytes. A score takes a warp 18 loads of q, 18 of k; in `values` eight
  // warps load v twice and p once.
  prediction.shared_bytes = scores * (18 + 18 + 8 * 3) * 128;
  prediction.dram_bytes =
      cache_bytes(problem, total_tokens) * (1 + double(kHeadDimV) / kHeadDimQK) + scores * 4 * 7;
  prediction.busy_fraction = std::min(1.0, problem.batch * rows / limits.multiprocessors);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "three kernels, one row at a time; scores in global memory";
  stage.scratch_bytes = scratch_bytes;
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
