/// @file
/// What the model tells AddressSanitizer. The model itself is always built without it. GPU_MODEL_ASAN
/// says that the program is linked with its runtime. Without that these functions do nothing.
#pragma once

#include <cstddef>

#ifdef GPU_MODEL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gpu_model::detail {

/// An access to this memory is an error from here on.
inline void asan_poison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef GPU_MODEL_ASAN
  __asan_poison_memory_region(memory, bytes);
#endif
}

/// This memory may be accessed again.
inline void asan_unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef GPU_MODEL_ASAN
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace gpu_model::detail
