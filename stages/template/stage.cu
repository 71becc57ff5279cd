// A stage of your own: launch, workspace, prediction. The build passes the stage's name, from its folder.
#include "kernel.cuh"

#include "stages/common/machine/launch.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

namespace kernel = my_stage;

static_assert(kHeadDimV == 4 * kernel::kThreads, "a thread owns four output columns");

// Arguments are checked before this is called. Enqueue on `stream` and return; never wait.
Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void* /*scratch*/,
              const DeviceLimits&, Stream stream) {
  const int64_t items = int64_t{problem.batch} * problem.seqlen_q * problem.num_heads_q;
  return visit_dtype(problem.dtype, [&](auto zero) {
    return launch(kernel::decode<decltype(zero)>, grid_for(items), kernel::kThreads,
                  sizeof(kernel::Smem), stream, problem, tensors, items);
  });
}

// What this kernel must spend: the bench compares it with what it took. Predict before you measure.
Prediction predict(const Problem& problem, int64_t total_tokens, const DeviceLimits&) {
  const double scores = double(problem.seqlen_q) * problem.num_heads_q * double(total_tokens);
  Prediction prediction;
  prediction.fp32_flop = 2 * scores * (kHeadDimQK + kHeadDimV);
  prediction.dram_bytes = cache_bytes(problem, total_tokens);
  return prediction;
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "your idea, in one line";
  stage.decode = decode;
  stage.predict = predict;
  return stage;
}

}  // namespace mla::MLA_MACHINE
