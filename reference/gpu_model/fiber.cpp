#include "reference/gpu_model/fiber.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>

#include "reference/gpu_model/memory.h"
#include "reference/gpu_model/sanitizer.h"

namespace gpu_model::detail {

using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

namespace {

// Stacks of fibers that are gone, for the next: blocks that run together are made anew for each launch, and to map
// and unmap their stacks would take a third of its time. Each has the next one's address in its highest word.
constexpr size_t kMaxIdleStacks = 8192;
constinit std::mutex idle_mutex;
constinit std::byte* idle_stack = nullptr;
constinit size_t idle_stacks = 0;

std::byte*& next_of(std::byte* stack) {
  return *reinterpret_cast<std::byte**>(stack + Fiber::kMapBytes - kGuardBytes - sizeof stack);
}

std::byte* take_idle_stack() {
  const std::scoped_lock lock(idle_mutex);
  if (idle_stack == nullptr) return nullptr;
  --idle_stacks;
  return std::exchange(idle_stack, next_of(idle_stack));
}

/// Whether it is kept.
bool keep_stack(std::byte* stack) {
  const std::scoped_lock lock(idle_mutex);
  if (idle_stacks == kMaxIdleStacks) return false;
  ++idle_stacks;
  next_of(stack) = std::exchange(idle_stack, stack);
  return true;
}

}  // namespace

Fiber::Fiber(unsigned number) : stack_(take_idle_stack()), number_(number) {
  if (stack_ != nullptr) return;
  void* map =
      mmap(nullptr, kMapBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<std::byte*>(map) + kGuardBytes;
  if (mprotect(stack_, kMapBytes - kGuardBytes, PROT_READ | PROT_WRITE) != 0) {
    munmap(map, kMapBytes);
    throw std::bad_alloc();
  }
}

Fiber::Fiber(unsigned number, std::byte* stack)
    : stack_(stack + kGuardBytes), number_(number), owns_stack_(false) {}

Fiber::~Fiber() {
  asan_unpoison(stack_, kMapBytes - kGuardBytes);
  if (owns_stack_ && !keep_stack(stack_)) munmap(stack_ - kGuardBytes, kMapBytes);
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
}

bool Fiber::overflows(const void* address) const {
  return address >= stack_ - kGuardBytes && address < stack_;
}

}  // namespace gpu_model::detail
