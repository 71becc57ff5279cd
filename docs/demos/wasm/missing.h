/// @file
/// What the C++ library of Emscripten 3.1.6 (Debian 12's) lacks. Included before everything else.
#pragma once

#include <atomic>
#include <bit>

namespace std {

#if __cpp_lib_bit_cast < 201806L
template <typename To, typename From>
constexpr To bit_cast(const From& from) noexcept {
  return __builtin_bit_cast(To, from);
}
#endif

#if __cpp_lib_atomic_ref < 201806L
/// What is used of it. By the builtins, so that the race detector sees an atomic access.
template <typename T>
class atomic_ref {
 public:
  explicit atomic_ref(T& object) : object_(object) {}
  T load(memory_order) const {
    T value;
    __atomic_load(&object_, &value, __ATOMIC_ACQUIRE);
    return value;
  }
  void store(T value, memory_order) const { __atomic_store(&object_, &value, __ATOMIC_RELEASE); }
  T exchange(T value, memory_order) const {
    T old;
    __atomic_exchange(&object_, &value, &old, __ATOMIC_ACQ_REL);
    return old;
  }
  bool compare_exchange_strong(T& expected, T value, memory_order) const {
    return __atomic_compare_exchange(&object_, &expected, &value, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE);
  }
  bool compare_exchange_weak(T& expected, T value, memory_order order) const {
    return compare_exchange_strong(expected, value, order);
  }
  T fetch_add(T value, memory_order order) const {
    T old = load(order);
    while (!compare_exchange_strong(old, old + value, order)) {
    }
    return old;
  }

 private:
  T& object_;
};
#endif

}  // namespace std
