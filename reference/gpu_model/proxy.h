/// @file
/// What the model knows of every 16 bytes of shared memory: who writes them asynchronously, who
/// wrote them by ordinary means, who reads them; and the second view of shared memory, that of the
/// asynchronous proxy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/gpu_model/ptx.h"

namespace gpu_model::detail {

/// The instruction that has, or had, to do with 16 bytes of shared memory.
struct GranuleMark {
  enum class State : uint8_t {
    kIdle,
    kCopying,  ///< cp.async writes them, and its thread has not waited for it.
    kLanding,  ///< A bulk copy writes them.
    kWritten,  ///< cp.async or stmatrix wrote them, and its thread has not fenced the proxies.
  };
  const char* file = nullptr;
  int line = 0;
  uint16_t thread = 0;
  uint16_t listed = 0;  ///< One more than the thread whose list of written granules has this.
  State state = State::kIdle;
};

/// Granules. In a class, since a vector drops what their type says of aliasing.
class GranuleArray {
 public:
  void resize(size_t count) { holders_.resize(count); }
  void clear() { holders_.clear(); }
  size_t size() const { return holders_.size(); }
  Granule& operator[](size_t i) { return holders_[i].granule; }
  const Granule* data() const { return &holders_.data()->granule; }
  Granule* data() { return &holders_.data()->granule; }

 private:
  struct Holder {
    Granule granule;
  };
  std::vector<Holder> holders_;
};

/// Shared memory as wgmma and bulk copies see it: what they wrote themselves, and of ordinary
/// stores what was fenced. A block that uses none of them has none.
struct AsyncView {
  GranuleArray granules;
  std::vector<uint16_t> readers;  ///< How many operations under way read each granule.
  bool used = false;              ///< By this block.
  bool fenced = false;            ///< Stores of unknown threads are to be published.
};

// The model's own copies. Not memcpy, which ThreadSanitizer would take for an access by whatever
// thread runs; for the same reason the compiler may not make one of these loops.

inline bool equal(const Granule& a, const Granule& b) {
  const Granule difference = a ^ b;
  uint64_t halves[2];
  __builtin_memcpy(halves, &difference, sizeof halves);
  return (halves[0] | halves[1]) == 0;
}

}  // namespace gpu_model::detail
