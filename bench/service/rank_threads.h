/// @file
/// Ranks of this process: a thread for each, on which all of its work is done.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "reference/status.h"

namespace mla::bench {

/// The threads. They are told what to do by one other thread, which waits for them, but not for ever: a rank that does
/// not come back is lost, and left behind with what its job holds, which is why jobs own what they use.
class RankThreads {
 public:
  using Job = std::function<Status(int rank)>;
  /// @param time_limit  from when the first rank has done a job until the last must have
  RankThreads(int ranks, std::chrono::milliseconds time_limit);
  RankThreads(const RankThreads&) = delete;
  RankThreads& operator=(const RankThreads&) = delete;
  ~RankThreads();

  int ranks() const { return static_cast<int>(threads_.size()); }
  /// What each() has returned for good, or ok.
  const Status& failure() const { return failure_; }

  /// Every rank does the job; waits for them.
  /// @return the first failure, of the rank that began it, where that is known; kRankFailed for a rank that is lost.
  ///         It stays: later jobs are not done, and return it
  Status each(Job job);
  /// The same to give back what ranks hold: done after a failure, too, by a rank that is lost if it comes back.
  void clean_up(Job job);

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::vector<std::thread> threads_;
  Status failure_;
};

}  // namespace mla::bench
