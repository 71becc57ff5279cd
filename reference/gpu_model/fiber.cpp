#include "reference/gpu_model/fiber.h"

#include <sys/mman.h>

#include <new>
#include <string>

#include "reference/gpu_model/memory.h"
#include "reference/gpu_model/sanitizer.h"

namespace gpu_model::detail {

using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

Fiber::Fiber(unsigned number) : number_(number) {
  void* map =
      mmap(nullptr, kMapBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<std::byte*>(map) + kGuardBytes;
  if (mprotect(stack_, kMapBytes - kGuardBytes, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, kMapBytes);
    throw std::bad_alloc();
  }
  create_tsan_context();
}

Fiber::~Fiber() {
  discard();
#ifdef GPU_MODEL_TSAN
  __tsan_destroy_fiber(tsan_);
#endif
  munmap(stack_ - kGuardBytes, kMapBytes);
}

void Fiber::create_tsan_context() {
#ifdef GPU_MODEL_TSAN
  tsan_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(tsan_, ("GPU thread " + std::to_string(number_)).c_str());
#endif
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  std::byte* top = stack_ + kMapBytes - kGuardBytes - (number_ % kColours) * kColourBytes;
  context_ = make_fcontext(top, kStackBytes, start);
}

void Fiber::start(transfer_t transfer) {
  auto* self = static_cast<Fiber*>(transfer.data);
  self->scheduler_ = transfer.fctx;
#ifdef GPU_MODEL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_stack_, &self->scheduler_stack_bytes_);
#endif
  self->entry_(self->argument_);
}

void Fiber::discard() {
  asan_unpoison(stack_, kMapBytes - kGuardBytes);  // redzones of functions that never returned
#ifdef GPU_MODEL_TSAN
  __tsan_destroy_fiber(tsan_);  // its record of the functions it is in is wrong now
  create_tsan_context();
#endif
}

bool Fiber::overflows(const void* address) const {
  return address >= stack_ - kGuardBytes && address < stack_;
}

void Fiber::release_to([[maybe_unused]] void* token) {
#ifdef GPU_MODEL_TSAN
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
  __tsan_release(token);
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#endif
}

void Fiber::acquire_from([[maybe_unused]] void* token) {
#ifdef GPU_MODEL_TSAN
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(token);
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#endif
}

}  // namespace gpu_model::detail
