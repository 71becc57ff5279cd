// A box of 64 rows as TMA leaves it in shared memory, for demo_values.cpp.
#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 128, kRows = 64;

struct Smem {
  alignas(1024) uint4 box[kRows * 8];
  ptx::Mbarrier full;
  MLA_REGIONS(box, full)
};

__global__ void __launch_bounds__(kThreads)
    kernel(const __grid_constant__ TensorMap map, uint4* out, int chunks) {
  auto& smem = shared_memory<Smem>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.full, chunks * 16);
    ptx::cp_async_bulk_tensor_4d(&smem.box, &map, 0, 0, 0, 0, &smem.full,
                                 ptx::createpolicy_evict_first());
  }
  __syncthreads();  // the barrier is there
  ptx::mbarrier_wait(&smem.full, 0);
  for (int i = threadIdx.x; i < chunks; i += kThreads) out[i] = smem.box[i];
}

}  // namespace

// Copies [64][row_bytes] bytes with the swizzle of such rows, which have 128 or 64 bytes.
Status dump_box(const void* rows_gmem, uint32_t* out, int row_bytes) {
  TensorShape shape;
  shape.rank = 4;
  (row_bytes == 128 ? shape.swizzle_128b : shape.swizzle_64b) = true;
  const uint64_t bytes = row_bytes, size[] = {bytes / 2, kRows, 1, 1},
                 stride[] = {2, bytes, kRows * bytes, kRows * bytes};
  for (int i = 0; i < 4; ++i) {
    shape.size[i] = size[i];
    shape.stride_bytes[i] = stride[i];
    shape.box[i] = static_cast<uint32_t>(size[i]);
  }
  TensorMap map;
  MLA_RETURN_IF_ERROR(encode_tensor_map(rows_gmem, shape, &map));
  return launch(kernel, 1, kThreads, sizeof(Smem), nullptr, map, reinterpret_cast<uint4*>(out),
                kRows * row_bytes / 16);
}

}  // namespace mla::MLA_MACHINE
