#include "reference/gpu_model/tensor_map.h"

namespace gpu_model {

std::string check_tensor_map(const TensorMap& map) {
  const auto name = [](const char* field, int i) {
    return std::string(field) + "[" + std::to_string(i) + "]";
  };
  const auto wrong = [](const std::string& what, uint64_t value, const char* allowed) {
    return "tensor map: " + what + " = " + std::to_string(value) + " must be " + allowed;
  };
  if (map.element_bytes != 2 && map.element_bytes != 4) {
    return wrong("element_bytes", static_cast<uint64_t>(map.element_bytes), "2 or 4");
  }
  if (map.rank < 1 || map.rank > 5) {
    return wrong("rank", static_cast<uint64_t>(map.rank), "1 to 5");
  }
  const auto address = reinterpret_cast<uintptr_t>(map.address);
  if (address == 0 || address % 16 != 0)
    return wrong("address", address, "a multiple of 16, and not null");
  for (int i = 0; i < map.rank; ++i) {
    if (map.size[i] < 1 || map.size[i] > uint64_t{1} << 32) {
      return wrong(name("size", i), map.size[i], "1 to 2^32");
    }
    if (map.box[i] < 1 || map.box[i] > 256) return wrong(name("box", i), map.box[i], "1 to 256");
    if (i > 0 && (map.stride_bytes[i] % 16 != 0 || map.stride_bytes[i] >= uint64_t{1} << 40)) {
      return wrong(name("stride_bytes", i), map.stride_bytes[i], "a multiple of 16 less than 2^40");
    }
  }
  const uint32_t row_bytes = map.row_bytes();
  if (row_bytes % 16 != 0) {
    return wrong("box[0]", map.box[0],
                 map.element_bytes == 2 ? "a multiple of 8" : "a multiple of 4");
  }
  if (map.swizzle_128b && row_bytes > 128) {
    return wrong("box[0]", map.box[0], "at most 64 with a 128-byte swizzle");
  }
  if (map.swizzle_64b && (map.swizzle_128b || row_bytes > 64)) {
    return wrong("box[0]", map.box[0], "at most 32 with a 64-byte swizzle, and that alone");
  }
  return {};
}

}  // namespace gpu_model
