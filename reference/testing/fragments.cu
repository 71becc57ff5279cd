// One warp runs one instruction, and writes what it got.
#include "reference/testing/fragments.h"

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx.h"

namespace mla::MLA_MACHINE {
namespace {

struct LdmatrixSmem {
  alignas(16) uint16_t rows[32][8];
};

__global__ void ldmatrix_fragments(uint32_t (*out)[32][4]) {
  LdmatrixSmem& smem = shared_memory<LdmatrixSmem>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) smem.rows[lane][i] = static_cast<uint16_t>(lane * 8 + i);
  __syncthreads();
  uint32_t plain[4], transposed[4];
  ptx::ldmatrix_x4(plain, smem.rows[row_of_lane(lane)]);
  ptx::ldmatrix_x4_trans(transposed, smem.rows[row_of_lane(lane)]);
  for (int i = 0; i < 4; ++i) {
    out[0][lane][i] = plain[i];
    out[1][lane][i] = transposed[i];
  }
}

template <typename T>
__global__ void mma_fragments(const MmaInput (*in)[32], float (*out)[32][4]) {
  const MmaInput input = in[blockIdx.x][threadIdx.x];
  float d[4] = {input.c[0], input.c[1], input.c[2], input.c[3]};
  ptx::mma_m16n8k16<T>(d, input.a, input.b[0], input.b[1]);
  for (int i = 0; i < 4; ++i) out[blockIdx.x][threadIdx.x][i] = d[i];
}

struct CopySmem {
  alignas(16) uint32_t words[32][4];
};

__global__ void cp_async_fragments(const uint32_t (*in)[4], uint32_t (*out)[4]) {
  CopySmem& smem = shared_memory<CopySmem>();
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) smem.words[lane][i] = 0xabababab;
  __syncthreads();
  ptx::cp_async_16(smem.words[lane], in[lane], lane % 2 == 0 ? 16 : 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < 4; ++i) out[lane][i] = smem.words[lane][i];
}

}  // namespace

Status launch_fragments(const FragmentBuffers& buffers) {
  MLA_RETURN_IF_ERROR(
      launch(ldmatrix_fragments, 1, 32, sizeof(LdmatrixSmem), nullptr, buffers.ldmatrix));
  MLA_RETURN_IF_ERROR(launch(mma_fragments<bfloat16>, buffers.mma_count, 32, 0, nullptr,
                             buffers.bfloat16_in, buffers.bfloat16_out));
  MLA_RETURN_IF_ERROR(launch(mma_fragments<float16>, buffers.mma_count, 32, 0, nullptr,
                             buffers.float16_in, buffers.float16_out));
  return launch(cp_async_fragments, 1, 32, sizeof(CopySmem), nullptr, buffers.copy_in,
                buffers.copy_out);
}

}  // namespace mla::MLA_MACHINE
