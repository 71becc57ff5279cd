/// @file
/// What a kernel sees. Included by every kernel.cuh, compiled twice: by nvcc for a GPU, and by the
/// host compiler for the GPU model, which supplies the same names (threadIdx, __syncthreads,
/// shuffles, ...).
///
/// Kernels live in `namespace mla::MLA_MACHINE::<stage>`, that is mla::gpu or mla::model, so that
/// one program can hold both builds of one source.
#pragma once

#include "reference/float16.h"
#include "reference/problem.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define MLA_MACHINE gpu
#define MLA_REGIONS(...)
#else
#include "reference/gpu_model/simt.h"
#define MLA_MACHINE model
#define MLA_REGIONS(...) GPU_MODEL_REGIONS(__VA_ARGS__)
#endif

namespace mla::MLA_MACHINE {

/// The block's dynamic shared memory as one struct, which lays out every array of the kernel. The
/// launch must ask for sizeof(Smem) bytes. A struct that ends with MLA_REGIONS(q, kv, ...) names its
/// members for recordings on the model (docs/recording.md); for a GPU that is nothing.
template <typename Smem>
__device__ __forceinline__ Smem& shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Smem*>(dynamic_shared_memory);
#else
  auto& smem = *static_cast<Smem*>(gpu_model::dynamic_shared_memory(sizeof(Smem)));
  if constexpr (requires { smem.name_regions(); }) {
    if (gpu_model::detail::wants_regions()) smem.name_regions();
  }
  return smem;
#endif
}

}  // namespace mla::MLA_MACHINE
