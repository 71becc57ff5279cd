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
/// There is one thread.
template <typename T>
class atomic_ref {
 public:
  explicit atomic_ref(T& object) : object_(object) {}
  T load(memory_order) const { return object_; }
  void store(T value, memory_order) const { object_ = value; }
  T exchange(T value, memory_order) const {
    const T old = object_;
    object_ = value;
    return old;
  }
  T fetch_add(T value, memory_order) const { return exchange(object_ + value, {}); }
  bool compare_exchange_strong(T& expected, T value, memory_order) const {
    const bool same = __builtin_memcmp(&object_, &expected, sizeof(T)) == 0;
    (same ? object_ : expected) = same ? value : object_;
    return same;
  }
  bool compare_exchange_weak(T& expected, T value, memory_order order) const {
    return compare_exchange_strong(expected, value, order);
  }

 private:
  T& object_;
};
#endif

}  // namespace std
