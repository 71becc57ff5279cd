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

/// Where a hub will be: the port is taken, and ranks that come wait until the hub is opened. A process that is
/// forked meanwhile has a copy, which it destroys.
class HubPlace {
 public:
  virtual ~HubPlace() = default;
  /// As Hub::address().
  virtual const std::string& address() const = 0;
  /// Opens the hub, once.
  /// @param ranks       >= 1
  /// @param time_limit  from when the first rank has come to a call until the last must have
  /// @return kInvalidArgument for ranks < 1; kUnavailable where this process may open no more files
  virtual Status open(int ranks, std::chrono::milliseconds time_limit,
                      std::unique_ptr<Hub>* hub) = 0;
};

/// Takes a place for a hub.
/// @param address  host:port. "127.0.0.1:0" for the ranks of this host, at any port that is free; "[fd00::2]:29517"
///                 for one with colons. At a host's name, but "localhost", it listens at all addresses of this host:
///                 others have their own for the name, and here it may be the loopback's. Who can reach it can join or
///                 disturb the group: use a network that is yours alone
/// @return kInvalidArgument for an address that is none, or whose host is not known; kUnavailable if it cannot be had
Status take_hub_place(const std::string& address, std::unique_ptr<HubPlace>* place);

/// Takes a place, and opens a hub there.
/// @return the errors of both
Status open_hub(const std::string& address, int ranks, std::chrono::milliseconds time_limit,
                std::unique_ptr<Hub>* hub);

/// One rank's end. Of one thread at a time. All ranks announce and share the same things in the same order.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual int rank() const = 0;
  virtual int ranks() const = 0;
  /// This host's address on the way to the hub, where the others find it, too, if it is not the loopback's:
  /// "192.0.2.2", "[fd00::2]".
  virtual std::string host() const = 0;
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
/// @param above       of a larger group, if not null: its failure ends the wait
/// @return kInvalidArgument for a rank outside, and at once for a host that is not known; kUnavailable if there is no
///         hub; kRankFailed if a rank does not come, or if another has come as `rank`, or with another number of
///         ranks; the failure above
Status join_hub(const std::string& address, int rank, int ranks,
                std::chrono::milliseconds time_limit, std::unique_ptr<Rendezvous>* rendezvous,
                Rendezvous* above = nullptr);

}  // namespace mla
