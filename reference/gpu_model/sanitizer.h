/// @file
/// What the model tells AddressSanitizer and ThreadSanitizer. The model itself is always built
/// without them. GPU_MODEL_ASAN or GPU_MODEL_TSAN says which runtime the program is linked with.
/// Without that these functions do nothing.
#pragma once

#include <cstddef>
#include <string>

#ifdef GPU_MODEL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef GPU_MODEL_TSAN
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>
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

/// This memory (whole pages) is about to serve another block, whose accesses must not count as a
/// race with earlier ones. Only a new mapping makes ThreadSanitizer forget these; ordering the
/// blocks instead would hide races between blocks.
inline void tsan_forget([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef GPU_MODEL_TSAN
  if (bytes == 0) return;
  mmap(memory, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
}

/// What this thread did so far is visible to whoever acquires the token afterwards.
inline void tsan_release([[maybe_unused]] void* token) {
#ifdef GPU_MODEL_TSAN
  __tsan_release(token);
#endif
}

/// See tsan_release.
inline void tsan_acquire([[maybe_unused]] void* token) {
#ifdef GPU_MODEL_TSAN
  __tsan_acquire(token);
#endif
}

/// The race that ThreadSanitizer has found in a GPU thread of this OS thread since the last call;
/// empty if none.
#ifdef GPU_MODEL_TSAN
std::string tsan_take_report();
/// Forgets it: this GPU thread has faulted, and ThreadSanitizer has ended its ignoring of races
/// where it called the handler.
void tsan_drop_report();
#else
inline void tsan_drop_report() {}
inline std::string tsan_take_report() {
  return {};
}
#endif

}  // namespace gpu_model::detail
