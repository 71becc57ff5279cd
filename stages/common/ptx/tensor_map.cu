#include "stages/common/ptx/tensor_map.h"

#include <algorithm>
#include <string>

#ifdef __CUDACC__
#include "stages/common/machine/cuda_status.h"
#endif

namespace mla::MLA_MACHINE {

Status encode_tensor_map(const void* address, const TensorShape& shape, TensorMap* map) {
#ifdef __CUDACC__
  // From the runtime, not by -lcuda: a program linked with that does not start without a driver.
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    cudaGetLastError();  // the caller hears of it below, and only there
    return found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)
               : nullptr;
  }();
  if (encode == nullptr) {
    return {StatusCode::kCudaError, "the driver has no cuTensorMapEncodeTiled: it is too old"};
  }
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], stride_bytes[5];
  cuuint32_t box[5];
  for (int i = 0; i < 5; ++i) {
    size[i] = shape.size[i];
    stride_bytes[i] = shape.stride_bytes[i];
    box[i] = shape.box[i];
  }
  const CUresult result = encode(
      map,
      shape.element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
      static_cast<cuuint32_t>(shape.rank), const_cast<void*>(address), size, stride_bytes + 1, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      shape.swizzle_128b  ? CU_TENSOR_MAP_SWIZZLE_128B
      : shape.swizzle_64b ? CU_TENSOR_MAP_SWIZZLE_64B
                          : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::kCudaError, "cuTensorMapEncodeTiled failed with CUDA driver error " +
                                      std::to_string(static_cast<int>(result))};
#else
  gpu_model::TensorMap made;
  made.address = address;
  made.element_bytes = shape.element_bytes;
  made.rank = shape.rank;
  for (int i = 0; i < 5; ++i) {
    made.size[i] = shape.size[i];
    made.stride_bytes[i] = shape.stride_bytes[i];
    made.box[i] = shape.box[i];
  }
  made.swizzle_128b = shape.swizzle_128b;
  made.swizzle_64b = shape.swizzle_64b;
  if (const std::string wrong = gpu_model::check_tensor_map(made); !wrong.empty()) {
    return {StatusCode::kInvalidArgument, wrong};
  }
  *map = made;
  return {};
#endif
}

Status encode_cache_map(const Problem& problem, const Tensors& tensors, TensorMap* map, int tokens,
                        int columns) {
  const CacheStrides& strides = tensors.kv_strides;
  TensorShape shape;
  shape.rank = 4;
  const int64_t size[] = {kHeadDimQK, problem.num_heads_kv, problem.page_size, problem.num_pages};
  const int64_t stride[] = {1, strides.head, strides.token, strides.page};
  const int box[] = {columns, 1, std::min(tokens, problem.page_size), 1};
  for (int i = 0; i < 4; ++i) {
    shape.size[i] = static_cast<uint64_t>(size[i]);
    shape.stride_bytes[i] = static_cast<uint64_t>(stride[i]) * 2;
    shape.box[i] = static_cast<uint32_t>(box[i]);
  }
  shape.swizzle_128b = columns == 64;
  shape.swizzle_64b = columns == 32;
  return encode_tensor_map(tensors.kv_cache, shape, map);
}

}  // namespace mla::MLA_MACHINE
