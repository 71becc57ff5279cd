/// @file
/// A fiber: a stack of its own and what runs on it, switched in a few nanoseconds by Boost.Context.
///
/// A fiber can be left for good in the middle of a function: nothing on its stack is destroyed.
/// That is how the model stops a kernel that did something wrong.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#include "reference/gpu_model/memory.h"
#include "reference/gpu_model/sanitizer.h"

namespace gpu_model::detail {

/// A stack, and the function that runs on it.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;  ///< Only pages that are touched cost memory.

  /// `number` colours the stack. Throws std::bad_alloc if there is none.
  explicit Fiber(unsigned number);
  /// The same on a stack of kMapBytes that somebody else owns. The guard zone is its lowest part,
  /// but nothing guards it.
  Fiber(unsigned number, std::byte* stack);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  /// The next resume() calls entry(argument), which must end in leave().
  void prepare(void (*entry)(void*), void* argument);

  /// From the scheduler: runs the fiber until it suspends or leaves.
  void resume();
  /// From the fiber: back to the scheduler, until the next resume().
  void suspend();
  /// From the fiber, or from a signal handler on top of it: back to the scheduler for good.
  [[noreturn]] void leave();
  /// From the scheduler, after a fiber left before its functions returned.
  void discard();

  /// Whether an access to `address` went past the end of this stack.
  bool overflows(const void* address) const;

  /// Stacks that all began at the same distance from a page would compete for the same cache sets.
  static constexpr size_t kColours = 128;
  static constexpr size_t kColourBytes = 192;
  /// A stack with its guard zone.
  static constexpr size_t kMapBytes = kGuardBytes + kStackBytes + kColours * kColourBytes;

 private:
  static void start(boost::context::detail::transfer_t transfer);

  std::byte* stack_ = nullptr;                            // the guard zone lies below
  boost::context::detail::fcontext_t context_ = nullptr;  // where the fiber goes on; read by gdb.py
  boost::context::detail::fcontext_t scheduler_ = nullptr;  // where the scheduler goes on
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  unsigned number_;
  bool owns_stack_ = true;
  // For AddressSanitizer.
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_stack_bytes_ = 0;
};

// Inline, and so are their callers: a switch spoils the processor's prediction of every return that
// was pending.

inline void Fiber::resume() {
#ifdef GPU_MODEL_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kMapBytes - kGuardBytes);
#endif
  context_ = boost::context::detail::jump_fcontext(context_, this).fctx;
#ifdef GPU_MODEL_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

inline void Fiber::suspend() {
#ifdef GPU_MODEL_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
  scheduler_ = boost::context::detail::jump_fcontext(scheduler_, nullptr).fctx;
#ifdef GPU_MODEL_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

inline void Fiber::leave() {
#ifdef GPU_MODEL_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
#endif
  boost::context::detail::jump_fcontext(scheduler_, nullptr);
  __builtin_unreachable();
}

}  // namespace gpu_model::detail
