/// @file
/// Which of the two 16-bit types a tensor has. The types themselves are in float16.h.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MLA_HOST_DEVICE __host__ __device__
#else
#define MLA_HOST_DEVICE
#endif

namespace mla {

/// Element type of q, kv_cache and out.
enum class DType { kBFloat16, kFloat16 };

/// The bit pattern of a quiet NaN in `dtype`.
MLA_HOST_DEVICE constexpr uint16_t nan_bits(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x7FC0 : 0x7E00;
}

/// "bf16" or "fp16".
inline const char* to_string(DType dtype) {
  return dtype == DType::kBFloat16 ? "bf16" : "fp16";
}

}  // namespace mla
