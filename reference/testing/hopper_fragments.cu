// One block runs one instruction, or a chain of one kind, and writes what it got.
#include "reference/testing/hopper_fragments.h"

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/ptx/tensor_map.h"

namespace mla::MLA_MACHINE {
namespace {

struct WgmmaSmem {
  alignas(1024) uint32_t a[kWgmmaABytes / 4];
  alignas(1024) uint32_t b[kWgmmaBBytes / 4];
};

template <typename T, WgmmaForm form>
__global__ void __launch_bounds__(128) wgmma_fragments(const WgmmaInput* in, WgmmaOutput* out) {
  constexpr int kColumns = static_cast<int>(columns_of(form));
  WgmmaSmem& smem = shared_memory<WgmmaSmem>();
  const WgmmaInput& input = in[blockIdx.x];
  const unsigned thread = threadIdx.x;
  for (unsigned i = thread; i < kWgmmaABytes / 4; i += 128) smem.a[i] = input.a_smem[i];
  for (unsigned i = thread; i < kWgmmaBBytes / 4; i += 128) smem.b[i] = input.b_smem[i];
  float d[kColumns / 8][4];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i / 4][i % 4] = input.d[thread][i];
  ptx::fence_proxy_async();
  __syncthreads();

  const ptx::MatrixDescriptor a_begin = ptx::matrix_descriptor(
      smem.a, static_cast<int>(input.a.leading_bytes), static_cast<int>(input.a.stride_bytes));
  const ptx::MatrixDescriptor b_begin = ptx::matrix_descriptor(
      smem.b, static_cast<int>(input.b.leading_bytes), static_cast<int>(input.b.stride_bytes));
#pragma unroll 1
  for (uint32_t step = 0; step < input.steps; ++step) {
    const bool accumulate = step > 0 || input.accumulate != 0;
    const ptx::MatrixDescriptor b = b_begin + input.b.offset[step] / 16;
    if constexpr (form == WgmmaForm::kM64N256Register) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) a[i] = input.a_registers[step][thread][i];
      ptx::wgmma_fence(d, a);
      ptx::wgmma_m64n256k16_trans_b<T>(d, a, b, accumulate);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(d, a);
    } else {
      const ptx::MatrixDescriptor a = a_begin + input.a.offset[step] / 16;
      ptx::wgmma_fence(d);
      if constexpr (form == WgmmaForm::kM64N64) {
        ptx::wgmma_m64n64k16<T>(d, a, b, accumulate);
      } else if constexpr (form == WgmmaForm::kM64N256) {
        ptx::wgmma_m64n256k16_trans_b<T>(d, a, b, accumulate);
      } else if constexpr (facts_of(form).trans_a) {
        ptx::wgmma_m64nNk16_trans_a<T>(d, a, b, accumulate);
      } else {
        ptx::wgmma_m64nNk16<T>(d, a, b, accumulate);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(d);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) out[blockIdx.x][thread][i] = d[i / 4][i % 4];
}

template <typename T>
Status launch_wgmma(WgmmaForm form, const WgmmaInput* in, unsigned count, WgmmaOutput* out) {
  const auto run = [&](auto kernel) {
    return launch(kernel, count, 128, sizeof(WgmmaSmem), nullptr, in, out);
  };
  switch (form) {
    case WgmmaForm::kM64N32:
      return run(wgmma_fragments<T, WgmmaForm::kM64N32>);
    case WgmmaForm::kM64N64:
      return run(wgmma_fragments<T, WgmmaForm::kM64N64>);
    case WgmmaForm::kM64N256:
      return run(wgmma_fragments<T, WgmmaForm::kM64N256>);
    case WgmmaForm::kM64N256Register:
      return run(wgmma_fragments<T, WgmmaForm::kM64N256Register>);
    case WgmmaForm::kM64N8:
      return run(wgmma_fragments<T, WgmmaForm::kM64N8>);
    case WgmmaForm::kM64N16:
      return run(wgmma_fragments<T, WgmmaForm::kM64N16>);
    case WgmmaForm::kM64N24:
      return run(wgmma_fragments<T, WgmmaForm::kM64N24>);
    case WgmmaForm::kM64N8TransA:
      return run(wgmma_fragments<T, WgmmaForm::kM64N8TransA>);
    case WgmmaForm::kM64N16TransA:
      return run(wgmma_fragments<T, WgmmaForm::kM64N16TransA>);
    case WgmmaForm::kM64N24TransA:
      return run(wgmma_fragments<T, WgmmaForm::kM64N24TransA>);
    default:
      return run(wgmma_fragments<T, WgmmaForm::kM64N32TransA>);
  }
}

Status wgmma(WgmmaForm form, DType dtype, const WgmmaInput* in, unsigned count, WgmmaOutput* out) {
  return dtype == DType::kBFloat16 ? launch_wgmma<bfloat16>(form, in, count, out)
                                   : launch_wgmma<float16>(form, in, count, out);
}

struct TmaSmem {
  alignas(1024) uint32_t box[kTmaBoxWords];
  ptx::Mbarrier full;
};

__global__ void tma_load_fragments(const __grid_constant__ TensorMap map, const TmaBox* boxes,
                                   int count, int rank, int box_bytes,
                                   uint32_t (*out)[kTmaBoxWords]) {
  TmaSmem& smem = shared_memory<TmaSmem>();
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::prefetch_tensormap(&map);
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  for (int i = 0; i < count; ++i) {
    for (unsigned word = thread; word < kTmaBoxWords; word += 128) smem.box[word] = kUntouched;
    ptx::fence_proxy_async();
    __syncthreads();
    if (thread == 0) {
      const int32_t* start = boxes[i].start;
      const uint64_t policy =
          i % 2 == 0 ? ptx::createpolicy_evict_first() : ptx::createpolicy_evict_last();
      ptx::mbarrier_arrive_expect_tx(&smem.full, box_bytes);
      if (rank == 5) {
        ptx::cp_async_bulk_tensor_5d(smem.box, &map, start[0], start[1], start[2], start[3],
                                     start[4], &smem.full, policy);
      } else {
        ptx::cp_async_bulk_prefetch_tensor_4d(&map, start[0], start[1], start[2], start[3]);
        ptx::cp_async_bulk_tensor_4d(smem.box, &map, start[0], start[1], start[2], start[3],
                                     &smem.full, policy);
      }
    }
    // A box at an edge that brought fewer bytes would never get past this.
    ptx::mbarrier_wait(&smem.full, i % 2);
    for (unsigned word = thread; word < kTmaBoxWords; word += 128) out[i][word] = smem.box[word];
    __syncthreads();
  }
}

__global__ void tma_store_fragments(const __grid_constant__ TensorMap map, TmaBox box) {
  TmaSmem& smem = shared_memory<TmaSmem>();
  for (unsigned word = threadIdx.x; word < kTmaBoxWords; word += 128) {
    smem.box[word] = (kTmaStored + 2 * word + 1) << 16 | (kTmaStored + 2 * word);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_4d_store(&map, box.start[0], box.start[1], box.start[2], box.start[3],
                                       smem.box);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

Status encode(const TmaTensor& tensor, const void* address, TensorMap* map) {
  TensorShape shape;
  shape.rank = tensor.rank();
  for (int i = 0; i < shape.rank; ++i) {
    shape.size[i] = tensor.size[i];
    shape.stride_bytes[i] = tensor.stride_bytes[i];
    shape.box[i] = tensor.box[i];
  }
  shape.swizzle_128b = tensor.swizzle_128b;
  return encode_tensor_map(address, shape, map);
}

Status tma_load(const TmaTensor& shape, const void* tensor, const TmaBox* boxes, int count,
                uint32_t (*out)[kTmaBoxWords]) {
  TensorMap map;
  MLA_RETURN_IF_ERROR(encode(shape, tensor, &map));
  int box_bytes = 2;
  for (int i = 0; i < shape.rank(); ++i) box_bytes *= static_cast<int>(shape.box[i]);
  return launch(tma_load_fragments, 1, 128, sizeof(TmaSmem), nullptr, map, boxes, count,
                shape.rank(), box_bytes, out);
}

Status tma_store(const TmaTensor& shape, void* tensor, TmaBox box) {
  TensorMap map;
  MLA_RETURN_IF_ERROR(encode(shape, tensor, &map));
  return launch(tma_store_fragments, 1, 128, sizeof(TmaSmem), nullptr, map, box);
}

struct BulkSmem {
  alignas(16) uint32_t words[kBulkWords];
  ptx::Mbarrier full;
};

/// By value: a kernel cannot refer to the host's constants.
struct BulkCopies {
  BulkCopy load[3], store[3];
};

__global__ void bulk_fragments(BulkCopies copies, const uint32_t* in, uint32_t* loaded,
                               uint32_t* stored) {
  BulkSmem& smem = shared_memory<BulkSmem>();
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init();
  }
  for (unsigned word = thread; word < kBulkWords; word += 128) smem.words[word] = kUntouched;
  ptx::fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    uint32_t bytes = 0;
    for (const BulkCopy& copy : copies.load) bytes += copy.bytes;
    ptx::mbarrier_arrive_expect_tx(&smem.full, static_cast<int>(bytes));
    for (const BulkCopy& copy : copies.load) {
      ptx::cp_async_bulk(smem.words + copy.destination / 4, in + copy.source / 4,
                         static_cast<int>(copy.bytes), &smem.full);
    }
  }
  ptx::mbarrier_wait(&smem.full, 0);
  for (unsigned word = thread; word < kBulkWords; word += 128) loaded[word] = smem.words[word];
  if (thread == 0) {
    for (const BulkCopy& copy : copies.store) {
      ptx::cp_async_bulk_store(stored + copy.destination / 4, smem.words + copy.source / 4,
                               static_cast<int>(copy.bytes));
      ptx::cp_async_bulk_commit_group();
    }
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

Status bulk(const uint32_t* in, uint32_t* loaded, uint32_t* stored) {
  BulkCopies copies;
  for (int i = 0; i < 3; ++i) {
    copies.load[i] = kBulkLoads[i];
    copies.store[i] = kBulkStores[i];
  }
  return launch(bulk_fragments, 1, 128, sizeof(BulkSmem), nullptr, copies, in, loaded, stored);
}

struct StmatrixSmem {
  alignas(16) uint32_t rows[32][4];
};

template <bool kTransposed>
__global__ void stmatrix_fragments(uint32_t (*out)[4]) {
  StmatrixSmem& smem = shared_memory<StmatrixSmem>();
  const unsigned lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) smem.rows[lane][i] = kUntouched;
  __syncthreads();
  uint32_t r[4];
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low = 8 * lane + 2 * i + 1;
    r[i] = (low + 1) << 16 | low;
  }
  if constexpr (kTransposed) {
    const uint32_t two[2] = {r[0], r[1]};
    ptx::stmatrix_x2_trans(smem.rows[row_of_lane(lane)], two);
  } else {
    ptx::stmatrix_x4(smem.rows[row_of_lane(lane)], r);
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[lane][i] = smem.rows[lane][i];
}

Status stmatrix(uint32_t (*out)[4]) {
  return launch(stmatrix_fragments<false>, 1, 32, sizeof(StmatrixSmem), nullptr, out);
}

Status stmatrix_trans(uint32_t (*out)[4]) {
  return launch(stmatrix_fragments<true>, 1, 32, sizeof(StmatrixSmem), nullptr, out);
}

struct MbarrierSmem {
  ptx::Mbarrier barrier;
  uint32_t values[4];
};

__global__ void mbarrier_fragments(uint32_t (*out)[128]) {
  MbarrierSmem& smem = shared_memory<MbarrierSmem>();
  const unsigned thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(&smem.barrier, 4);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::mbarrier_wait(&smem.barrier, 1);
  out[0][thread] = 1;
  __syncthreads();  // one that came later might find phase 1 begun, and wait for it
  for (unsigned phase = 0; phase < kMbarrierPhases; ++phase) {
    if (thread % 32 == 0) {
      smem.values[thread / 32] = 100 * phase + thread / 32 + 1;
      if (thread == 0) {
        ptx::mbarrier_arrive_expect_tx(&smem.barrier, 0);
      } else {
        ptx::mbarrier_arrive(&smem.barrier);
      }
    }
    ptx::mbarrier_wait(&smem.barrier, static_cast<int>(phase % 2));
    uint32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += smem.values[i];
    ptx::mbarrier_wait(&smem.barrier, static_cast<int>(phase % 2));  // over: ends at once
    out[phase + 1][thread] = sum;
    __syncthreads();
  }
}

Status mbarrier(uint32_t (*out)[128]) {
  return launch(mbarrier_fragments, 1, 128, sizeof(MbarrierSmem), nullptr, out);
}

}  // namespace

HopperFragments hopper_fragments() {
  return {wgmma, tma_load, tma_store, bulk, stmatrix, stmatrix_trans, mbarrier};
}

}  // namespace mla::MLA_MACHINE
