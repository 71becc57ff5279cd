// merge_lse as a kernel calls it: one thread per pair.
#include "reference/lse_merge.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128;

template <typename Real>
__global__ void merge_pairs(const Real* __restrict__ lse_a, const Real* __restrict__ lse_b,
                            LseMerge<Real>* __restrict__ merged, int64_t pairs) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pairs;
       i += int64_t{gridDim.x} * kThreads) {
    merged[i] = merge_lse(lse_a[i], lse_b[i]);
  }
}

template <typename Real>
Status launch_for(const Real* lse_a, const Real* lse_b, LseMerge<Real>* merged, int64_t pairs) {
  return launch(merge_pairs<Real>, grid_for((pairs + kThreads - 1) / kThreads), kThreads, 0,
                nullptr, lse_a, lse_b, merged, pairs);
}

}  // namespace

Status launch_merge(const float* lse_a, const float* lse_b, LseMerge<float>* merged,
                    int64_t pairs) {
  return launch_for(lse_a, lse_b, merged, pairs);
}
Status launch_merge(const double* lse_a, const double* lse_b, LseMerge<double>* merged,
                    int64_t pairs) {
  return launch_for(lse_a, lse_b, merged, pairs);
}

}  // namespace mla::MLA_MACHINE
