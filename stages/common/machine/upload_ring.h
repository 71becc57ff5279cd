/// @file
/// Copies small host tables to a machine without waiting for the machine.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "stages/common/machine/machine.h"

namespace mla {

/// Copies in the order of a stream, from pinned memory of its own, so that the caller may reuse its
/// memory on return and the host does not wait for work enqueued before. A few copies can be under
/// way at once; the next one waits until the oldest has arrived. On the model a copy is done when
/// it returns.
class UploadRing {
 public:
  /// Copies to `machine`, which must outlive it.
  explicit UploadRing(Machine& machine);
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;
  /// Waits for the copies under way.
  ~UploadRing();

  /// @return kInvalidArgument if `stream` is being captured, because a graph would copy again from
  /// memory that is reused; or ok.
  Status check(Stream stream) const;
  /// Copies `bytes` from `source` on the host to `destination` on the machine.
  /// @return check()'s error, or the machine's.
  Status copy(void* destination, const void* source, size_t bytes, Stream stream);

 private:
  struct Slot;
  Machine& machine_;
  std::vector<std::unique_ptr<Slot>> slots_;
  [[maybe_unused]] size_t next_ = 0;  // not by the model
};

}  // namespace mla
