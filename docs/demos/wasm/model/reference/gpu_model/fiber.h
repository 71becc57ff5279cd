/// @file
/// In the place of the real fiber.h in a browser: Emscripten's fibers, which unwind WebAssembly's stack and rewind it.
#pragma once

#include <emscripten/fiber.h>

#include <cstddef>

namespace gpu_model::detail {

/// A stack, and the function that runs on it.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 16 * 1024;  ///< For what has an address,
  static constexpr size_t kUnwoundBytes =
      8 * 1024;  ///< and for WebAssembly's own while it does not run.
  static constexpr size_t kMapBytes = kStackBytes;

  explicit Fiber(unsigned number);
  Fiber(unsigned number, std::byte* stack);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void prepare(void (*entry)(void*), void* argument);
  void resume();
  void suspend();
  [[noreturn]] void leave();
  void discard() {}
  bool overflows(const void*) const { return false; }  // nothing guards it

 private:
  emscripten_fiber_t fiber_ = {};
  std::byte* stack_;
  std::byte* unwound_;
  bool owns_stack_;
};

}  // namespace gpu_model::detail
