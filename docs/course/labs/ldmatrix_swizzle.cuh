// Lab 2: a swizzle, and ldmatrix through it. One warp brings 16 rows of 64 16-bit values, 128 bytes each, to shared memory, and
// loads them as four fragments of A, 16 rows by 16 columns:
//
//   out[step][lane][i] = register i of the fragment of columns 16 step ... 16 step + 15
//
// No store and no ldmatrix may meet a bank conflict.
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE::MLA_LAB::ldmatrix_swizzle {

struct Smem {
  uint4 chunk[16][8];  // 16 rows of 8 chunks of 16 bytes
  MLA_REGIONS(chunk)
};

__global__ void __launch_bounds__(32) kernel(LabData d) {
  auto& smem = shared_memory<Smem>();
  const auto* a_gmem = static_cast<const uint4*>(d.a);  // [16][8]
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 8; i += 32) {
    const int row = i / 8, chunk = i % 8;
    // Fill in: store a_gmem[i] where the swizzle puts chunk `chunk` of row `row`.
    // Until here.
  }
  __syncwarp();  // all rows are there
  for (int step = 0; step < 4; ++step) {
    uint32_t a_rmem[4] = {};
    // Fill in: load the fragment. Lanes 0 to 15 give rows 0 to 15 of its left chunk, the others of its right one.
    // Until here.
    for (int i = 0; i < 4; ++i) d.out[(step * 32 + lane) * 4 + i] = a_rmem[i];
  }
}

inline Status run(const LabData& d) {
  return launch(kernel, 1, 32, sizeof(Smem), nullptr, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::ldmatrix_swizzle
