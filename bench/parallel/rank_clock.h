/// @file
/// A rank's GPU: its choice, its stream, and the times of graphs.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "stages/common/machine/machine.h"

namespace mla::bench {

/// GPUs that a process would see. Asked of a process of its own, because a CUDA that has begun does not
/// survive a fork.
int count_gpus();

/// Makes GPU `index` the current one.
Status use_gpu(int index);

/// Times what is enqueued on a stream of its own.
class RankClock {
 public:
  using Enqueue = std::function<Status(Stream)>;
  /// Waits for a stream: Transport::wait of the rank.
  using Wait = std::function<Status(Stream)>;
  /// Tells the others of an error: Transport::fail of the rank.
  using Fail = std::function<void(const Status&)>;
  virtual ~RankClock() = default;
  /// Null on the model.
  virtual Stream stream() const = 0;
  /// Does it once, waits, and keeps it: as a CUDA graph, if `as_graph`, or to be enqueued again.
  virtual Status prepare(const Enqueue& enqueue, bool as_graph, int* handle) = 0;
  /// Does it `runs` times back to back; `us`: the mean of one. On the model 0.
  virtual Status run(int handle, int runs, double* us) = 0;
  /// Forgets it, before memory that it uses is freed.
  virtual void forget(int handle) = 0;
};

/// @param fail  told of every error of prepare() and run(), before they return it: what is under way on the device
///              may be waiting for the others, and they for this rank, which announces no replay of a graph
/// @return the machine's error
Status make_rank_clock(Machine& machine, RankClock::Wait wait, std::unique_ptr<RankClock>* clock,
                       RankClock::Fail fail = nullptr);

}  // namespace mla::bench
