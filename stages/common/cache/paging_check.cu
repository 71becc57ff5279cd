// The device-side check of lengths and page ids; paging_check.cpp reads its verdict.
#include "stages/common/cache/context_share.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128;

// One block per sequence. The verdict is the least (sequence << 32 | place) of all errors, where
// place 0 is the length and 1 + e is entry e of the table, so the first error is reported whatever
// the schedule.
__global__ void check(Problem problem, Tensors tensors, SequenceShares shares,
                      unsigned long long* first_offender) {
  for (int64_t item = blockIdx.x; item < problem.batch; item += gridDim.x) {
    const int sequence = static_cast<int>(item);
    const unsigned long long prefix = static_cast<unsigned long long>(sequence) << 32;
    const int64_t length = tensors.seqlens_k[sequence];
    if (length < 0 || length > problem.max_seqlen_k()) {
      if (threadIdx.x == 0) atomicMin(first_offender, prefix);
      continue;
    }
    const int64_t pages = shares.of(sequence).pages(pages_for(length, problem.page_size));
    for (int64_t slot = threadIdx.x; slot < pages; slot += kThreads) {
      const int32_t page = tensors.table_row(sequence)[slot];
      if (page < 0 || page >= problem.num_pages) {
        atomicMin(first_offender, prefix | static_cast<unsigned long long>(slot + 1));
      }
    }
  }
}

}  // namespace

Status launch_paging_check(const Problem& problem, const Tensors& tensors,
                           const SequenceShares& shares, unsigned long long* first_offender,
                           Stream stream) {
  return launch(check, grid_for(problem.batch), kThreads, 0, stream, problem, tensors, shares,
                first_offender);
}

}  // namespace mla::MLA_MACHINE
