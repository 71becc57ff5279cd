/// @file
/// Where the ranks of a parallel decode meet, on the host: what they tell each other beside the exchange on
/// their devices. A transport for GPUs needs it to begin, and to learn why a rank does not come.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "reference/status.h"

namespace mla {

/// The middle of a group of ranks: each has a TCP connection to it. It compares what they announce, hands
/// round what they share, and tells all of them the first failure: a rank's own; calls that differ; a rank that
/// does not come within the time limit; a connection that ends without a farewell, as of a process that was killed.
/// A thread of this process does that until the object is destroyed.
class Hub {
 public:
  virtual ~Hub() = default;
  /// "127.0.0.1:43210": what join_hub() of the ranks takes.
  virtual const std::string& address() const = 0;
};

/// Opens a hub.
/// @param address     "127.0.0.1:0" for the ranks of this host, at any port that is free. Who can reach another
///                    address can join or disturb the group: use a network that is yours alone
/// @param ranks       >= 1
/// @param time_limit  from when the first rank has come to a call until the last must have
/// @return kInvalidArgument for ranks < 1 and for an address that is none; kUnavailable if it cannot be had
Status open_hub(const std::string& address, int ranks, std::chrono::milliseconds time_limit,
                std::unique_ptr<Hub>* hub);

/// One rank's end. Of one thread at a time. All ranks announce and share the same things in the same order.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual int rank() const = 0;
  virtual int ranks() const = 0;
  /// How long a rank waits for the others.
  virtual std::chrono::milliseconds time_limit() const = 0;

  /// Says which call this rank makes, and does not wait for the others. If they say another, all get
  /// kInvalidArgument, with both.
  /// @return failure()
  virtual Status announce(const std::string& call) = 0;
  /// Waits for the others, and gets what each of them gave.
  /// @param all  [ranks]
  /// @return failure(); kRankFailed past the time limit
  virtual Status share(const std::string& mine, std::vector<std::string>* all) = 0;
  /// Says that this rank has failed. The first failure of a group is the one that counts.
  virtual void fail(const Status& why) = 0;
  /// The group's failure, if it has one and this rank has heard of it; does not wait. It stays.
  virtual Status failure() = 0;
};

/// Joins a hub as one of its ranks. Waits until all have, so that a group is whole or is none.
/// @param address     Hub::address()
/// @param rank        0 ... ranks - 1; each once
/// @param time_limit  for which the hub may be away, and the others
/// @return kInvalidArgument for a rank outside; kUnavailable if there is no hub; kRankFailed if a rank does not
///         come, or if another has come as `rank`, or with another number of ranks
Status join_hub(const std::string& address, int rank, int ranks,
                std::chrono::milliseconds time_limit, std::unique_ptr<Rendezvous>* rendezvous);

}  // namespace mla
