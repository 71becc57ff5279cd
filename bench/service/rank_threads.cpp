#include "bench/service/rank_threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>

namespace mla::bench {
namespace {

std::atomic<bool> any_left_behind = false;

}  // namespace

/// What the threads share with who tells them what to do. All are the mutex's but the time limit.
struct RankThreads::Shared {
  struct Rank {
    uint64_t done = 0;  ///< The last job
    Status status;      ///< That it ended with
  };
  Shared(int ranks, std::chrono::milliseconds limit)
      : time_limit(limit), of(static_cast<size_t>(ranks)) {}

  const std::chrono::milliseconds time_limit;
  std::mutex mutex;
  std::condition_variable changed;
  Job job;
  uint64_t number = 0;  ///< Of the job
  bool ends = false;
  std::vector<Rank> of;

  bool is_done(const Rank& rank) const { return rank.done == number; }
  bool any_done() const {
    return std::any_of(of.begin(), of.end(), [&](const Rank& rank) { return is_done(rank); });
  }
  bool all_done() const {
    return std::all_of(of.begin(), of.end(), [&](const Rank& rank) { return is_done(rank); });
  }
  bool has_failed() const {
    return std::any_of(of.begin(), of.end(),
                       [&](const Rank& rank) { return is_done(rank) && !rank.status.ok(); });
  }

  void serve(int rank) {
    Rank& mine = of[static_cast<size_t>(rank)];
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return ends || mine.done != number; });
      if (mine.done == number) break;  // a job comes before the end
      const uint64_t taken = number;
      Job now = job;
      lock.unlock();
      Status status;
      try {
        status = now(rank);
      } catch (const std::bad_alloc&) {
        status = Status(StatusCode::kOutOfMemory, "no host memory for that");
      }
      now = nullptr;  // what it holds goes here, before the next
      lock.lock();
      mine.status = status;
      mine.done = taken;
      changed.notify_all();
    }
  }

  void post(Job next) {
    job = std::move(next);
    ++number;
    changed.notify_all();
  }

  /// "rank 1, rank 3": those that have not done the job.
  std::string lost() const {
    std::string names;
    for (size_t rank = 0; rank < of.size(); ++rank) {
      if (!is_done(of[rank])) names += (names.empty() ? "rank " : ", rank ") + std::to_string(rank);
    }
    return names;
  }
};

RankThreads::RankThreads(int ranks, std::chrono::milliseconds time_limit)
    : shared_(std::make_shared<Shared>(ranks, time_limit)) {
  for (int rank = 0; rank < ranks; ++rank) {
    threads_.emplace_back([shared = shared_, rank] { shared->serve(rank); });
  }
}

RankThreads::~RankThreads() {
  std::unique_lock lock(shared_->mutex);
  shared_->ends = true;
  shared_->changed.notify_all();
  shared_->changed.wait_for(lock, shared_->time_limit / 4, [&] { return shared_->all_done(); });
  std::vector<bool> done;
  for (const Shared::Rank& rank : shared_->of) done.push_back(shared_->is_done(rank));
  lock.unlock();
  for (size_t rank = 0; rank < threads_.size(); ++rank) {
    if (done[rank]) {
      threads_[rank].join();
    } else {
      threads_[rank].detach();
      any_left_behind = true;
    }
  }
}

Status RankThreads::each(Job job) {
  if (!failure_.ok()) return failure_;
  std::unique_lock lock(shared_->mutex);
  shared_->post(std::move(job));
  auto limit = 2 * shared_->time_limit;
  if (shared_->changed.wait_for(lock, limit, [&] { return shared_->any_done(); })) {
    limit = shared_->time_limit;
    shared_->changed.wait_for(lock, limit,
                              [&] { return shared_->all_done() || shared_->has_failed(); });
    // Who fails tells the others, which then end, too: perhaps one of them knows more.
    if (!shared_->all_done()) {
      shared_->changed.wait_for(lock, limit / 4, [&] { return shared_->all_done(); });
    }
  }
  for (size_t rank = 0; rank < shared_->of.size(); ++rank) {
    const Shared::Rank& one = shared_->of[rank];
    if (!shared_->is_done(one) || one.status.ok()) continue;
    const bool is_cause = one.status.code() != StatusCode::kRankFailed;
    if (!failure_.ok() && !is_cause) continue;
    failure_ = is_cause ? Status(one.status.code(),
                                 "rank " + std::to_string(rank) + ": " + one.status.message())
                        : one.status;
    if (is_cause) break;
  }
  if (failure_.ok() && !shared_->all_done()) {
    failure_ = {StatusCode::kRankFailed, shared_->lost() + " did not come back within " +
                                             std::to_string(limit.count()) + " ms"};
  }
  return failure_;
}

void RankThreads::clean_up(Job job) {
  std::unique_lock lock(shared_->mutex);
  const auto is_lost = [&](const Shared::Rank& rank) { return !shared_->is_done(rank); };
  std::vector<bool> lost;
  for (const Shared::Rank& rank : shared_->of) lost.push_back(is_lost(rank));
  shared_->post(std::move(job));
  shared_->changed.wait_for(lock, shared_->time_limit, [&] {
    for (size_t rank = 0; rank < lost.size(); ++rank) {
      if (!lost[rank] && !shared_->is_done(shared_->of[rank])) return false;
    }
    return true;
  });
}

int end_of_program(int exit_code) {
  if (any_left_behind) std::_Exit(exit_code);
  return exit_code;
}

}  // namespace mla::bench
