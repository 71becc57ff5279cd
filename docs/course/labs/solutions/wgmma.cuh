// Lab 6: wgmma, 64 by 64. A warpgroup brings A and B to shared memory, each 64 rows of 64 bf16 values in the 128-byte swizzle, and has
// the tensor core multiply them from there:
//
//   out[row][column] = sum over k of a[row][k] b[column][k]        [64, 64] floats; k = 0 ... 63
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE::MLA_LAB::wgmma {

constexpr int kThreads = 128;

struct Smem {
  alignas(1024) uint4 a[64][8];
  alignas(1024) uint4 b[64][8];
  MLA_REGIONS(a, b)
};

__global__ void __launch_bounds__(kThreads) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  for (int i = threadIdx.x; i < 64 * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    smem.a[row][chunk ^ row % 8] = static_cast<const uint4*>(d.a)[i];
    smem.b[row][chunk ^ row % 8] = static_cast<const uint4*>(d.b)[i];
  }
  // Both are read by rows (K-major): 1024 bytes from 8 rows to the next 8.
  const ptx::MatrixDescriptor a = ptx::matrix_descriptor(smem.a, 0, 1024);
  const ptx::MatrixDescriptor b = ptx::matrix_descriptor(smem.b, 0, 1024);
  float d_rmem[8][4] = {};
  // Fill in: what makes the stores above visible to wgmma; then four products of 16 columns each, and the wait for them.
  ptx::fence_proxy_async();  // each thread: what it stored, for the asynchronous proxy
  __syncthreads();           // so has everyone
  ptx::wgmma_fence(d_rmem);
  for (int step = 0; step < 4; ++step) {
    const int offset = step * 16 * 2 / 16;  // 16 columns of 2 bytes, in units of 16 bytes
    ptx::wgmma_m64n64k16<bfloat16>(d_rmem, a + offset, b + offset, step > 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>(d_rmem);
  // Until here.
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  auto* out_gmem = reinterpret_cast<float*>(d.out);  // [64][64]
  for (int n = 0; n < 8; ++n) {
    for (int j = 0; j < 4; ++j) {
      out_gmem[(row + j / 2 * 8) * 64 + n * 8 + column + j % 2] = d_rmem[n][j];
    }
  }
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::wgmma
