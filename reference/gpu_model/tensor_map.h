/// @file
/// The model's tensor maps. stages/common/ptx/tensor_map.h explains the terms.
#pragma once

#include <cstdint>
#include <string>

namespace gpu_model {

/// A tensor in global memory, and the box of it that one copy takes.
struct alignas(64) TensorMap {
  const void* address = nullptr;  ///< 16-byte aligned.
  int element_bytes = 2;          ///< 2 or 4
  int rank = 0;                   ///< 1 ... 5
  uint64_t size[5] = {};          ///< Elements, innermost dimension first.
  uint64_t stride_bytes[5] = {};  ///< Multiples of 16; [0] is not used.
  uint32_t box[5] = {};           ///< Elements, 1 ... 256.
  bool swizzle_128b = false;      ///< See TensorShape.
  bool swizzle_64b = false;       ///< The same.

  /// Of a row of the box.
  uint32_t row_bytes() const { return box[0] * static_cast<uint32_t>(element_bytes); }
};

/// Where a box begins, innermost dimension first.
struct Coordinates {
  int rank = 0;  ///< 4 or 5, that of the tensor map.
  int start[5] = {};
};

/// Why a driver would refuse the map, with the member, its value and what is allowed; empty if it
/// would not.
std::string check_tensor_map(const TensorMap& map);

}  // namespace gpu_model
