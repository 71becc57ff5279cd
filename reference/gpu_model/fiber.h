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

  /// `number` names the fiber in ThreadSanitizer's reports. Throws std::bad_alloc if there is no
  /// stack.
  explicit Fiber(unsigned number);
  /// The same on a stack of kMapBytes that somebody else owns. The guard zone is its lowest part,
  /// but nothing guards it.
  Fiber(unsigned number, std::byte* stack);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  /// The next resume() calls entry(argument), which must end in leave(). `gpu_thread` is for
  /// ThreadSanitizer's reports.
  void prepare(void (*entry)(void*), void* argument, unsigned gpu_thread);

  /// From the scheduler: runs the fiber until it suspends or leaves.
  void resume();
  /// From the fiber: back to the scheduler, until the next resume().
  void suspend();
  /// From the fiber: what the caller does from here to leave() is the scheduler's doing, as
  /// ThreadSanitizer sees it.
  void become_scheduler();
  /// From the fiber: calls function(), which is the scheduler's doing, as ThreadSanitizer sees it.
  template <typename Function>
  void as_scheduler(Function function);
  /// From the fiber, or from a signal handler on top of it: back to the scheduler for good.
  [[noreturn]] void leave();
  /// From the scheduler, after a fiber left before its functions returned.
  void discard();

  /// Whether an access to `address` went past the end of this stack.
  bool overflows(const void* address) const;

  /// Calls function(), which ThreadSanitizer attributes to this fiber. Not from inside the function
  /// of another such call.
  template <typename Function>
  void impersonate(Function function);

  /// For ThreadSanitizer: what the fiber did before release_to is visible to whoever calls
  /// acquire_from with the same token afterwards.
  void release_to(void* token);
  void acquire_from(void* token);

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
  // For the sanitizers.
  [[maybe_unused]] void* tsan_ = nullptr;
  [[maybe_unused]] void* scheduler_tsan_ = nullptr;
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
#ifdef GPU_MODEL_TSAN
  scheduler_tsan_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
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
  become_scheduler();
  scheduler_ = boost::context::detail::jump_fcontext(scheduler_, nullptr).fctx;
#ifdef GPU_MODEL_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

template <typename Function>
void Fiber::impersonate(Function function) {
#ifdef GPU_MODEL_TSAN
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
  function();
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#else
  function();
#endif
}

inline void Fiber::release_to(void* token) {
  impersonate([=] { tsan_release(token); });
}

inline void Fiber::acquire_from(void* token) {
  impersonate([=] { tsan_acquire(token); });
}

inline void Fiber::become_scheduler() {
#ifdef GPU_MODEL_TSAN
  __tsan_switch_to_fiber(scheduler_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
}

template <typename Function>
void Fiber::as_scheduler(Function function) {
  become_scheduler();
  function();
#ifdef GPU_MODEL_TSAN
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void Fiber::leave() {
#ifdef GPU_MODEL_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
#endif
  become_scheduler();
  boost::context::detail::jump_fcontext(scheduler_, nullptr);
  __builtin_unreachable();
}

}  // namespace gpu_model::detail
