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
#ifdef GPU_MODEL_TSAN
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::Fiber(unsigned number, std::byte* stack)
    : stack_(stack + kGuardBytes), number_(number), owns_stack_(false) {
#ifdef GPU_MODEL_TSAN
  tsan_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  asan_unpoison(stack_, kMapBytes - kGuardBytes);
#ifdef GPU_MODEL_TSAN
  __tsan_destroy_fiber(tsan_);
#endif
  if (owns_stack_) munmap(stack_ - kGuardBytes, kMapBytes);
}

void Fiber::prepare(void (*entry)(void*), void* argument, [[maybe_unused]] unsigned gpu_thread) {
  entry_ = entry;
  argument_ = argument;
  std::byte* top = stack_ + kMapBytes - kGuardBytes - (number_ % kColours) * kColourBytes;
  context_ = make_fcontext(top, kStackBytes, start);
#ifdef GPU_MODEL_TSAN
  __tsan_set_fiber_name(tsan_, ("GPU thread " + std::to_string(gpu_thread)).c_str());
#endif
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
  // Its record of the functions it is in is wrong now. The new one comes after all that it did.
  release_to(this);
  __tsan_acquire(this);
  __tsan_destroy_fiber(tsan_);
  tsan_ = __tsan_create_fiber(0);
#endif
}

bool Fiber::overflows(const void* address) const {
  return address >= stack_ - kGuardBytes && address < stack_;
}

}  // namespace gpu_model::detail
