/// @file
/// Work that is enqueued once and then repeated: on a GPU as CUDA graphs, on the model by doing it again.
#pragma once

#include <functional>
#include <memory>

#include "stages/common/machine/machine.h"

namespace mla::bench {

/// The graphs of one engine, on a stream of their own: the default stream cannot be captured.
class Replays {
 public:
  using Enqueue = std::function<Status(Stream)>;
  /// @return the machine's error
  static Status create(Machine& machine, std::unique_ptr<Replays>* replays);
  virtual ~Replays() = default;
  /// Null on the model.
  virtual Stream stream() const = 0;
  /// Keeps what `enqueue` puts on the stream as number `*index`, counted from 0. Nothing runs.
  virtual Status capture(Enqueue enqueue, int* index) = 0;
  /// Enqueues that again, with the same arguments: what they point to may hold other values.
  virtual Status launch(int index) = 0;
  /// Forgets all of them.
  virtual void clear() = 0;
};

}  // namespace mla::bench
