/// @file
/// How the ranks of a parallel decode exchange buffers: one small interface, so that the decode does not
/// know what carries them.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <vector>

#include "reference/status.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// What a decode over ranks is at (decode_parallel()).
enum class RankPhase {
  kCut,         ///< Finds which tokens the rank decodes, and makes the plans.
  kBulk,        ///< Decodes tokens that every query token sees.
  kTail,        ///< Decodes the others.
  kLocalMerge,  ///< Merges these two.
  kWait,        ///< Has given its result to the exchange.
  kExchange,    ///< Where the transport has a stream of its own, there.
  kExchanged,   ///< Nothing on that stream.
  kWeigh,       ///< Weighs its result by all ranks' lse.
  kMerge,       ///< Merges all ranks' results.
  kDone,        ///< Nothing.
};

/// Is told what a rank's decodes are at, as they are enqueued.
class RankObserver {
 public:
  virtual ~RankObserver() = default;
  /// What is enqueued on `stream` from now on belongs to `phase`, until the next mark: kExchange lasts until
  /// kExchanged, the others until the next that is none of these two.
  virtual Status mark(RankPhase phase, Stream stream) = 0;
};

/// One rank's end of a group of ranks. All ranks of the group make the same calls, in the same order, with
/// the same sizes; a call is of one thread at a time. Where one rank fails, does not come within the time
/// limit, or makes another call, every rank gets a status, then and for every later call: the group is of
/// no more use, and its ranks must make a new one.
///
/// A call may only enqueue: it then begins when all work before it on `stream` is done, and what it receives
/// is there for work that is enqueued after join().
class Transport {
 public:
  virtual ~Transport() = default;
  /// Which of the ranks this is: 0 ... ranks() - 1.
  virtual int rank() const = 0;
  /// How many there are, >= 1.
  virtual int ranks() const = 0;

  /// Every rank gets what every rank sent.
  /// @param send     [bytes], in the machine's memory
  /// @param receive  [ranks, bytes], in the machine's memory, in the order of ranks. `send` may be this rank's
  ///                 place in it, where nothing is then to be copied, and overlaps no other
  /// @return kRankFailed as above; kInvalidArgument if the ranks' calls differ, naming two that do
  virtual Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) = 0;
  /// Every rank gets what every other rank sent to it. What is its own stays where it is: neither is
  /// send[rank()] read nor receive[rank()] written.
  /// @param send     [ranks, bytes]: for rank 0, for rank 1, ...
  /// @param receive  [ranks, bytes]: from rank 0, from rank 1, ...; not overlapping `send`
  /// @return as all_gather()
  virtual Status all_to_all(const void* send, void* receive, size_t bytes, Stream stream) = 0;
  /// Every rank gets the sum of what every rank sent to it, in an order of the transport's own: that of
  /// ranks where they are threads; NCCL says nothing of its own.
  /// @param send     [ranks, count]: for rank 0, for rank 1, ...
  /// @param receive  [count]
  /// @return as all_gather()
  virtual Status reduce_scatter(const float* send, float* receive, size_t count, Stream stream) = 0;

  /// Lets work that is enqueued on `stream` from now on come after all calls before.
  /// @return as all_gather()
  virtual Status join(Stream stream) = 0;
  /// Waits until all work on `stream` is done, a replayed graph's too, but not much longer than the time limit: what
  /// to call instead of a synchronisation, which would wait for ever where a rank has failed.
  /// @return as all_gather(); the device's error
  virtual Status wait(Stream stream) = 0;

  /// Says that this rank has failed: calls of the others that wait, and all later ones, return
  /// kRankFailed with this rank and `why`. The first failure of a group is the one that counts. A program
  /// says so where a call of its own fails beside a decode, such as a graph's launch: the others wait for it.
  virtual void fail(const Status& why) = 0;

  /// Lets `observer` be told of decodes from now on; null: nobody, as at first.
  void observe(RankObserver* observer) { observer_ = observer; }
  /// Tells the observer, if there is one.
  Status mark(RankPhase phase, Stream stream) const {
    return observer_ == nullptr ? Status() : observer_->mark(phase, stream);
  }

 private:
  RankObserver* observer_ = nullptr;
};

/// The ends of a group whose ranks are threads of this process, and whose buffers are the model's. What a
/// call copies it copies when the last rank has come, so nothing is read after a rank's call has returned.
/// @param ranks       >= 1
/// @param time_limit  for which a call waits for the others
/// @param transports  [ranks], one for each thread
/// @return kInvalidArgument for ranks < 1
Status make_thread_transports(int ranks, std::chrono::milliseconds time_limit,
                              std::vector<std::unique_ptr<Transport>>* transports);

}  // namespace mla
