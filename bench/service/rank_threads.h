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
/// not come back is lost. A thread cannot be ended from outside, so it is left behind with what its job holds, which is
/// why jobs own what they use.
class RankThreads {
 public:
  using Job = std::function<Status(int rank)>;
  /// @param time_limit  that of the ranks' transport: by so much the last rank may come back from a job after the first.
  ///                    The first may take twice as long, so that an exchange that waits in vain says for whom
  RankThreads(int ranks, std::chrono::milliseconds time_limit);
  RankThreads(const RankThreads&) = delete;
  RankThreads& operator=(const RankThreads&) = delete;
  /// Waits a quarter of the time limit for ranks that are lost, then leaves them behind.
  ~RankThreads();

  int ranks() const { return static_cast<int>(threads_.size()); }
  /// What each() has returned for good, or ok.
  const Status& failure() const { return failure_; }

  /// Every rank does the job; waits for them. A job that finds no host memory may throw.
  /// @return the first failure, of the rank that began it, where that is known; kRankFailed, naming them, for ranks that
  ///         are lost. It stays: later jobs are not done, and return it
  Status each(Job job);
  /// The same to give back what ranks hold: done after a failure, too, and the last one by a rank that is lost if it
  /// comes back. Waits for the others alone, and no longer than the time limit.
  void clean_up(Job job);

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::vector<std::thread> threads_;
  Status failure_;
};

/// What main() returns: the exit code. Where a thread was left behind it ends the process at once instead: the thread
/// may use static objects, and the end of CUDA might wait for it. So it comes after all output.
int end_of_program(int exit_code);

}  // namespace mla::bench
