// What kernels compiled with -fsanitize=thread call at every access to memory. The program is not linked
// with ThreadSanitizer's library: these functions take its place.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "reference/gpu_model/gpu_model.h"
#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model {
namespace {

bool instrumented = false;

using Kind = detail::RaceDetector::Kind;

[[gnu::always_inline]] inline void access(const volatile void* address, size_t bytes, Kind kind,
                                          AccessKind counted, const void* code) {
  detail::Multiprocessor* multiprocessor = detail::Multiprocessor::current();
  if (multiprocessor == nullptr || !multiprocessor->runs_thread()) return;
  const void* place = const_cast<const void*>(address);
  const unsigned thread = multiprocessor->self().number;
  if (multiprocessor->recording() != nullptr) {
    multiprocessor->record_plain_access(place, bytes, counted != AccessKind::kStore,
                                        counted != AccessKind::kLoad, code);
  }
  if (detail::RaceDetector* races = detail::RaceDetector::active; races != nullptr) {
    races->access(thread, place, bytes, kind, {nullptr, nullptr, 0, code});
  }
  detail::BlockCounters* counters = multiprocessor->counters();
  if (counters != nullptr && counters->access(thread, place, bytes, counted, code)) {
    multiprocessor->let_lanes_catch_up();
  }
}

[[gnu::always_inline]] inline void read(const volatile void* address, size_t bytes,
                                        const void* code) {
  access(address, bytes, Kind::kRead, AccessKind::kLoad, code);
}
[[gnu::always_inline]] inline void write(const volatile void* address, size_t bytes,
                                         const void* code) {
  access(address, bytes, Kind::kWrite, AccessKind::kStore, code);
}

void atomic_access(const volatile void* address, size_t bytes, bool reads, bool writes, int order,
                   const void* code) {
  const AccessKind update = writes ? AccessKind::kStore : AccessKind::kLoad;
  access(address, bytes, writes ? Kind::kAtomicWrite : Kind::kAtomicRead,
         reads && writes ? AccessKind::kAtomic : update, code);
  detail::RaceDetector* races = detail::RaceDetector::active;
  if (races == nullptr || !detail::Multiprocessor::current()->runs_thread()) return;
  const bool acquire = order == __ATOMIC_ACQUIRE || order >= __ATOMIC_ACQ_REL;
  const bool release = order >= __ATOMIC_RELEASE;
  races->atomic(detail::Multiprocessor::current()->self().number, const_cast<const void*>(address),
                reads, writes, acquire, release);
}

}  // namespace

bool kernels_are_instrumented() {
  return instrumented;
}

}  // namespace gpu_model

using gpu_model::atomic_access;

#define CODE __builtin_return_address(0)

// NOLINTBEGIN(bugprone-reserved-identifier): the compiler's names
extern "C" {

void __tsan_init() {
  gpu_model::instrumented = true;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define HOOKS(bytes)                                  \
  void __tsan_read##bytes(void* address) {            \
    gpu_model::read(address, bytes, CODE);            \
  }                                                   \
  void __tsan_write##bytes(void* address) {           \
    gpu_model::write(address, bytes, CODE);           \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* address) {  \
    gpu_model::read(address, bytes, CODE);            \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* address) { \
    gpu_model::write(address, bytes, CODE);           \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

// Volatile accesses are atomic and relaxed, as the PTX ISA has ld.volatile and st.volatile.
#define VOLATILE_HOOKS(bytes)                                           \
  void __tsan_volatile_read##bytes(void* address) {                     \
    atomic_access(address, bytes, true, false, __ATOMIC_RELAXED, CODE); \
  }                                                                     \
  void __tsan_volatile_write##bytes(void* address) {                    \
    atomic_access(address, bytes, false, true, __ATOMIC_RELAXED, CODE); \
  }                                                                     \
  void __tsan_unaligned_volatile_read##bytes(void* address) {           \
    atomic_access(address, bytes, true, false, __ATOMIC_RELAXED, CODE); \
  }                                                                     \
  void __tsan_unaligned_volatile_write##bytes(void* address) {          \
    atomic_access(address, bytes, false, true, __ATOMIC_RELAXED, CODE); \
  }
VOLATILE_HOOKS(1)
VOLATILE_HOOKS(2)
VOLATILE_HOOKS(4)
VOLATILE_HOOKS(8)
VOLATILE_HOOKS(16)

void __tsan_read_range(void* address, unsigned long bytes) {
  gpu_model::read(address, bytes, CODE);
}
void __tsan_write_range(void* address, unsigned long bytes) {
  gpu_model::write(address, bytes, CODE);
}

// clang's names for these functions.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  gpu_model::read(from, bytes, CODE);
  gpu_model::write(to, bytes, CODE);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  gpu_model::read(from, bytes, CODE);
  gpu_model::write(to, bytes, CODE);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  gpu_model::write(to, bytes, CODE);
  return std::memset(to, value, bytes);
}

#define UPDATE(bits, type, name)                                                     \
  type __tsan_atomic##bits##_##name(volatile type* address, type value, int order) { \
    atomic_access(address, bits / 8, true, true, order, CODE);                       \
    return __atomic_##name(address, value, __ATOMIC_SEQ_CST);                        \
  }
#define COMPARE(bits, type, name)                                                           \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile type* address, type* expected, \
                                                    type value, int order, int) {           \
    atomic_access(address, bits / 8, true, true, order, CODE);                              \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST,   \
                                       __ATOMIC_SEQ_CST);                                   \
  }
#define ATOMICS(bits, type)                                                            \
  type __tsan_atomic##bits##_load(const volatile type* address, int order) {           \
    atomic_access(address, bits / 8, true, false, order, CODE);                        \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                 \
  }                                                                                    \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int order) {    \
    atomic_access(address, bits / 8, false, true, order, CODE);                        \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                \
  }                                                                                    \
  type __tsan_atomic##bits##_exchange(volatile type* address, type value, int order) { \
    atomic_access(address, bits / 8, true, true, order, CODE);                         \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                      \
  }                                                                                    \
  UPDATE(bits, type, fetch_add)                                                        \
  UPDATE(bits, type, fetch_sub)                                                        \
  UPDATE(bits, type, fetch_and)                                                        \
  UPDATE(bits, type, fetch_or)                                                         \
  UPDATE(bits, type, fetch_xor)                                                        \
  COMPARE(bits, type, strong)                                                          \
  COMPARE(bits, type, weak)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

void __tsan_atomic_thread_fence(int) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
// NOLINTEND(bugprone-reserved-identifier)
