// The kernel of an append: new rows to their pages, and the rows of pages that are copied on write.
#include "stages/common/cache/paged_cache.h"

#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

// 8 tokens of one head are 576 vectors of 16 bytes: three per thread, all of them under way at
// once. One token keeps 72 threads busy.
constexpr int kThreads = 192;
constexpr int kInFlight = 3;
constexpr int64_t kVectorsPerRow = kHeadDimQK * 2 / sizeof(uint4);

// One block per run, which is contiguous at both ends: neighbouring threads copy neighbouring
// vectors. Rows that are copied within the cache belong to a page that several sequences share.
// Rows before its end are never written again while it is shared, and at most rows past its end are
// written in this launch (by the last sharer), so nothing is both read and written: hence
// __restrict__.
__global__ void __launch_bounds__(kThreads)
    copy_rows(const RowRun* __restrict__ runs, int64_t num_runs, const uint4* __restrict__ rows,
              uint4* cache, int64_t vectors_per_token) {
  for (int64_t i = blockIdx.x; i < num_runs; i += gridDim.x) {
    const RowRun run = runs[i];
    const uint4* __restrict__ source =
        (run.from_cache != 0 ? cache : rows) + run.source * vectors_per_token;
    uint4* __restrict__ destination = cache + run.destination * vectors_per_token;
    const int64_t vectors = run.tokens * vectors_per_token;
    for (int64_t j = threadIdx.x; j < vectors; j += kInFlight * kThreads) {
      uint4 values[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (j + k * kThreads < vectors) values[k] = source[j + k * kThreads];
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (j + k * kThreads < vectors) destination[j + k * kThreads] = values[k];
      }
    }
  }
}

}  // namespace

Status launch_copy_runs(const RowRun* runs, int64_t num_runs, const void* rows, void* cache,
                        int num_heads_kv, Stream stream) {
  return launch(copy_rows, grid_for(num_runs), kThreads, 0, stream, runs, num_runs,
                static_cast<const uint4*>(rows), static_cast<uint4*>(cache),
                num_heads_kv * kVectorsPerRow);
}

}  // namespace mla::MLA_MACHINE
