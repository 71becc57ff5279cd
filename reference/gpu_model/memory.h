/// @file
/// Memory that begins and ends at pages that nobody may touch.
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
  /// Which guard zone the data touches. With kAtEnd the data is aligned to the largest power of
  /// two, up to a page, that divides its size rounded up to 16.
  enum class Place { kAtEnd, kAtStart };

  /// No memory; not valid.
  GuardedMemory() = default;
  /// Not valid if the machine has too little memory.
  GuardedMemory(size_t bytes, Place place);
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory& operator=(GuardedMemory&& other) noexcept;
  ~GuardedMemory();

  bool valid() const { return map_ != nullptr; }  ///< Whether there is memory.
  std::byte* data() const { return data_; }       ///< [bytes()]
  size_t bytes() const { return bytes_; }         ///< As asked for, without padding.

  /// Lets accesses fault, or no longer.
  void protect(bool accessible);
  /// Fills data and padding with 0xff, which is NaN in every float format.
  void poison();
  /// A padding byte that the kernel changed, as an offset from data(); 0 if there is none.
  ptrdiff_t damage() const;

  /// Whether the address is in the data, its padding or a guard zone.
  bool contains(const void* address) const;
  /// Where an address outside the data is: "4 bytes past the end of 1024 bytes".
  std::string describe(const void* address) const;

 private:
  std::byte* map_ = nullptr;
  size_t map_bytes_ = 0;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Where the memory from gpu_model::allocate begins that `address` is in, and its size; null if none is.
const std::byte* find_allocation(const void* address, size_t* bytes);

/// "out-of-bounds global memory `access`: ..." if gpu_model::allocate gave out memory near
/// `address`; empty otherwise.
std::string describe_global(const void* address, const char* access);

/// "byte 16 of an allocation of 64 bytes", or the address if gpu_model::allocate did not give it.
std::string describe_place(const void* address);

}  // namespace gpu_model::detail
