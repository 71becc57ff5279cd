// Lab 3: mma.sync, its fragments by hand. One warp multiplies 16 rows by 8 columns over 64 values each, in bf16, with sums in fp32:
//
//   out[row][column] = sum over k of a[row][k] b[column][k]        [16, 8] floats; k = 0 ... 63
//
// No ldmatrix and no shared memory: a lane loads from global memory just what mma.m16n8k16 wants from it.
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE::MLA_LAB::mma {

__global__ void __launch_bounds__(32) kernel(LabData d) {
  const auto* a_gmem = static_cast<const uint32_t*>(d.a);  // [16][32]: two values each
  const auto* b_gmem = static_cast<const uint32_t*>(d.b);  // [8][32]
  const int x = threadIdx.x % 4, y = threadIdx.x / 4;
  const auto a_at = [&](int row, int k) {
    return a_gmem[row * 32 + k / 2];
  };  // a[row][k], a[row][k + 1]
  const auto b_at = [&](int column, int k) { return b_gmem[column * 32 + k / 2]; };

  float d_rmem[4] = {};
  for (int k = 0; k < 64; k += 16) {
    uint32_t a_rmem[4] = {}, b0 = 0, b1 = 0;
    // Fill in: the lane's part of A [16 rows, 16 k] and of B [16 k, 8 columns].
    a_rmem[0] = a_at(y, k + 2 * x);
    a_rmem[1] = a_at(y + 8, k + 2 * x);
    a_rmem[2] = a_at(y, k + 2 * x + 8);
    a_rmem[3] = a_at(y + 8, k + 2 * x + 8);
    b0 = b_at(y, k + 2 * x);
    b1 = b_at(y, k + 2 * x + 8);
    // Until here.
    ptx::mma_m16n8k16<bfloat16>(d_rmem, a_rmem, b0, b1);
  }

  auto* out_gmem = reinterpret_cast<float*>(d.out);  // [16][8]
  // Fill in: store the lane's four results.
  out_gmem[y * 8 + 2 * x] = d_rmem[0];
  out_gmem[y * 8 + 2 * x + 1] = d_rmem[1];
  out_gmem[(y + 8) * 8 + 2 * x] = d_rmem[2];
  out_gmem[(y + 8) * 8 + 2 * x + 1] = d_rmem[3];
  // Until here.
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, 32, 0, nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::mma
