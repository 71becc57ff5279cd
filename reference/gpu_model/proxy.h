/// @file
/// What the model knows of every 16 bytes of shared memory, a granule: who writes it
/// asynchronously, who wrote it by ordinary means, who reads it. And the second view of shared
/// memory, that of the asynchronous proxy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/gpu_model/ptx.h"

namespace gpu_model::detail {

/// The last known write to a granule.
struct GranuleMark {
  enum class State : uint8_t {
    kIdle,     ///< Nothing of the following.
    kCopying,  ///< cp.async writes it, and its thread has not waited for it.
    kLanding,  ///< A bulk copy writes it.
    kWritten,  ///< cp.async or stmatrix wrote it, and its thread has not fenced the proxies.
  };
  const char* file = nullptr;  ///< Where the write was issued,
  int line = 0;
  uint16_t thread = 0;  ///< and the number of the thread that did.
  uint16_t listed = 0;  ///< 1 + the thread whose Thread::written lists this granule; 0: none.
  State state = State::kIdle;
  uint8_t issuer = 0;  ///< 1 + the rank of the thread's block in the cluster, or 0: this block.
};

/// An array of granules. Not a plain vector, which would drop what their type says about aliasing.
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

/// Shared memory as wgmma and bulk copies see it: what they wrote themselves, and those ordinary
/// stores that were fenced. A block that uses none of these has none.
struct AsyncView {
  GranuleArray granules;
  std::vector<uint16_t> readers;  ///< How many operations under way read each granule.
  bool used = false;              ///< Whether this block has used it.
  bool fenced = false;            ///< Whether stores of unknown threads have yet to be published.
};

inline bool equal(const Granule& a, const Granule& b) {
  const Granule difference = a ^ b;
  uint64_t halves[2];
  __builtin_memcpy(halves, &difference, sizeof halves);
  return (halves[0] | halves[1]) == 0;
}

}  // namespace gpu_model::detail
