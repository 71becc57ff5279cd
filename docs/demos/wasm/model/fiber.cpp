#include "reference/gpu_model/fiber.h"

#include <cstdlib>
#include <new>

namespace gpu_model::detail {
namespace {

/// What runs the fibers: the stack that called the first one.
emscripten_fiber_t* scheduler() {
  static emscripten_fiber_t fiber;
  static char unwound[64 * 1024];
  static bool known = false;
  if (!known) emscripten_fiber_init_from_current_context(&fiber, unwound, sizeof unwound);
  known = true;
  return &fiber;
}

}  // namespace

Fiber::Fiber(unsigned number)
    : Fiber(number, static_cast<std::byte*>(std::aligned_alloc(16, kStackBytes))) {
  owns_stack_ = true;
}

Fiber::Fiber(unsigned /*number*/, std::byte* stack)
    : stack_(stack),
      unwound_(static_cast<std::byte*>(std::malloc(kUnwoundBytes))),
      owns_stack_(false) {
  if (stack_ == nullptr || unwound_ == nullptr) throw std::bad_alloc();
}

Fiber::~Fiber() {
  if (owns_stack_) std::free(stack_);
  std::free(unwound_);
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  emscripten_fiber_init(&fiber_, entry, argument, stack_, kStackBytes, unwound_, kUnwoundBytes);
}

void Fiber::resume() {
  emscripten_fiber_swap(scheduler(), &fiber_);
}

void Fiber::suspend() {
  emscripten_fiber_swap(&fiber_, scheduler());
}

void Fiber::leave() {
  suspend();
  __builtin_unreachable();
}

}  // namespace gpu_model::detail
