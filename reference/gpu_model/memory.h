/// @file
/// Memory that ends, and begins, at pages nobody may touch.
#pragma once

#include <cstddef>
#include <string>

namespace gpu_model::detail {

/// Distance from the last byte of memory within which a stray access is still recognised as one
/// past its end.
constexpr size_t kGuardBytes = 64 * 1024;

/// A mapping with a guard zone on either side. What lies between guard and data is padding,
/// poisoned like the data.
class GuardedMemory {
 public:
  /// Which guard zone the data touches. At the end the data starts at the largest power of two, up
  /// to a page, that divides its size rounded up to 16.
  enum class Place { kAtEnd, kAtStart };

  GuardedMemory() = default;
  /// Not valid if the machine has no such memory.
  GuardedMemory(size_t bytes, Place place);
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory& operator=(GuardedMemory&& other) noexcept;
  ~GuardedMemory();

  bool valid() const { return map_ != nullptr; }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  /// Fills data and padding with 0xff, which is NaN in every float format.
  void poison();
  /// A padding byte that the kernel changed, as an offset from data(); 0 if there is none.
  ptrdiff_t damage() const;

  bool contains(const void* address) const;  ///< Guard zones included.
  /// "4 bytes past the end of 1024 bytes"
  std::string describe(const void* address) const;

 private:
  std::byte* map_ = nullptr;
  size_t map_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

/// "out-of-bounds global memory access: ..." if gpu_model::allocate gave out memory near `address`,
/// or else empty.
std::string describe_global(const void* address, const char* access);

}  // namespace gpu_model::detail
