/// @file
/// The model's tensor maps; see stages/common/ptx/tensor_map.h, whose terms these are.
#pragma once

#include <cstdint>
#include <string>

namespace gpu_model {

/// A tensor of 16-bit elements in global memory, and the box of it that one copy takes.
struct alignas(64) TensorMap {
  const void* address = nullptr;
  int rank = 0;
  uint64_t size[5] = {};
  uint64_t stride_bytes[5] = {};
  uint32_t box[5] = {};
  bool swizzle_128b = false;
};

/// What a driver would refuse the map for; empty if nothing.
std::string check_tensor_map(const TensorMap& map);

}  // namespace gpu_model
