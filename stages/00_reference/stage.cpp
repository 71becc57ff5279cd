// 00_reference: the loop over a batch, on all cores. No kernel: it runs where the GPU model does.
#include <new>

#include "kernel.h"
#include "reference/parallel_for.h"
#include "stages/common/stage.h"

namespace mla::model {
namespace {

// One item: one query token of one sequence, with the query heads of one KV head.
Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void* /*scratch*/,
              const DeviceLimits&, Stream) {
  const int64_t tokens = int64_t{problem.batch} * problem.seqlen_q;
  try {
    visit_dtype(problem.dtype, [&](auto zero) {
      parallel_for(tokens * problem.num_heads_kv, /*num_threads=*/0, [&](int64_t item) {
        const int64_t token = item / problem.num_heads_kv;
        plain::attend<decltype(zero)>(problem, tensors, static_cast<int>(token / problem.seqlen_q),
                                      static_cast<int>(token % problem.seqlen_q),
                                      static_cast<int>(item % problem.num_heads_kv));
      });
    });
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "no memory on the host for a sequence's scores"};
  }
  return {};
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "the formula on the CPU, in double; V is the first 512 columns of K";
  stage.on_cpu = true;
  stage.min_compute_capability = 0;
  stage.decode = decode;
  return stage;
}

}  // namespace mla::model
