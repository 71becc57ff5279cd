// Lab 4: one box by TMA. A tensor has 100 rows and 128 columns of 16 bits. One copy brings its box of rows 40 to 103 and columns 64 to
// 127: 64 rows of 128 bytes, swizzled. The last four rows lie outside of the tensor. 128 threads wait for the box:
//
//   out[row][chunk * 4 + word] = the box as it was in the tensor, zeros outside
#pragma once

#include "docs/course/labs/labs.h"
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE::MLA_LAB::tma_box {

constexpr int kThreads = 128, kBoxBytes = 64 * 128;

struct Smem {
  alignas(1024) uint4 box[64][8];
  ptx::Mbarrier full;
  MLA_REGIONS(box, full)
};

__global__ void __launch_bounds__(kThreads)
    kernel(const __grid_constant__ TensorMap map, LabData d) {
  auto& smem = shared_memory<Smem>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barrier is there
  // Fill in: one thread announces the bytes and starts the copy; all wait for it. Coordinates are (column, row, 0, 0).
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    ptx::cp_async_bulk_tensor_4d(&smem.box, &map, 64, 40, 0, 0, &smem.full,
                                 ptx::createpolicy_evict_first());
  }
  ptx::mbarrier_wait(&smem.full, 0);
  // Until here.
  auto* out_gmem = reinterpret_cast<uint4*>(d.out);  // [64][8]
  for (int i = threadIdx.x; i < 64 * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    out_gmem[i] = smem.box[row][chunk ^ row % 8];
  }
}

inline Status run(const LabData& d) {
  TensorShape shape;
  shape.rank = 4;
  shape.swizzle_128b = true;
  const uint64_t size[] = {128, 100, 1, 1}, stride[] = {2, 256, 25600, 25600};
  const uint32_t box[] = {64, 64, 1, 1};
  for (int i = 0; i < 4; ++i) {
    shape.size[i] = size[i];
    shape.stride_bytes[i] = stride[i];
    shape.box[i] = box[i];
  }
  TensorMap map;
  MLA_RETURN_IF_ERROR(encode_tensor_map(d.a, shape, &map));
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, map, d);
}

}  // namespace mla::MLA_MACHINE::MLA_LAB::tma_box
