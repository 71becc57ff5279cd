namespace mla { extern int mutant; }
// The device-side check of lengths and page ids; paging_check.cpp reads its verdict.
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128;

// One block per sequence. The verdict is the least (sequence << 32 | place) of all errors, where
// place 0 is the length and 1 + e is entry e of the table, so the first error is reported whatever
// the schedule.
__global__ void check(Problem problem, Tensors tensors, unsigned long long* first_offender) {
  for (int64_t item = blockIdx.x; item < problem.batch; item += (::mla::mutant == 566 ? (problem.batch) : (gridDim.x))) {
    const int sequence = static_cast<int>(item);
    const unsigned long long prefix = static_cast<unsigned long long>(sequence) << 32;
    const int64_t length = tensors.seqlens_k[sequence];
    if ((::mla::mutant == 561 ? (false) : (length < 0)) || (::mla::mutant == 560 ? (length >= problem.max_seqlen_k()) : (length > problem.max_seqlen_k()))) {
      if (threadIdx.x == 0) atomicMin(first_offender, prefix);
      continue;
    }
    for (int64_t slot = threadIdx.x; (::mla::mutant == 564 ? (slot < problem.max_pages_per_seq) : (slot < pages_for(length, problem.page_size)));
         slot += (::mla::mutant == 565 ? (problem.max_pages_per_seq) : (kThreads))) {
      const int32_t page = tensors.table_row(sequence)[slot];
      if ((::mla::mutant == 562 ? (false) : (page < 0)) || (::mla::mutant == 563 ? (page > problem.num_pages) : (page >= problem.num_pages))) {
        { if (::mla::mutant == 567) { *first_offender = prefix | static_cast<unsigned long long>(slot + 1); } else { atomicMin(first_offender, prefix | static_cast<unsigned long long>(slot + 1)); } }
      }
    }
  }
}

}  // namespace

Status launch_paging_check(const Problem& problem, const Tensors& tensors,
                           unsigned long long* first_offender, Stream stream) {
  return launch(check, grid_for(problem.batch), kThreads, 0, stream, problem, tensors,
                first_offender);
}

}  // namespace mla::MLA_MACHINE
