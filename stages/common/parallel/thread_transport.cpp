#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>

#include "stages/common/parallel/transport.h"

namespace mla {
namespace {

enum class Kind { kAllGather, kAllToAll, kReduceScatter };

const char* name_of(Kind kind) {
  return kind == Kind::kAllGather  ? "all_gather"
         : kind == Kind::kAllToAll ? "all_to_all"
                                   : "reduce_scatter";
}

struct Call {
  Kind kind = Kind::kAllGather;
  const void* send = nullptr;
  void* receive = nullptr;
  size_t bytes = 0;
  std::string name() const { return name_of(kind) + (" of " + std::to_string(bytes)) + " bytes"; }
};

/// Where the threads meet. Whoever comes last copies for all, under the lock: no other rank can leave, and
/// free a buffer, before that is done.
class Group {
 public:
  Group(size_t ranks, std::chrono::milliseconds time_limit)
      : time_limit_(time_limit), calls_(ranks), is_here_(ranks, false) {}

  size_t ranks() const { return calls_.size(); }

  Status meet(size_t rank, const Call& call) {
    std::unique_lock lock(mutex_);
    if (!failure_.ok()) return failure_;
    calls_[rank] = call;
    is_here_[rank] = true;
    if (std::find(is_here_.begin(), is_here_.end(), false) == is_here_.end()) {
      failure_ = compare();
      if (failure_.ok()) copy();
      is_here_.assign(ranks(), false);
      ++meetings_;
      changed_.notify_all();
      return failure_;
    }
    const uint64_t before = meetings_;
    const bool came =
        changed_.wait_for(lock, time_limit_, [&] { return meetings_ != before || !failure_.ok(); });
    if (!came) {
      failure_ = {StatusCode::kRankFailed, absent() + " did not come to " + call.name() +
                                               " within " + std::to_string(time_limit_.count()) +
                                               " ms"};
      changed_.notify_all();
    }
    // A failure after the meeting is the next call's.
    return meetings_ != before && outcome_ok_ ? Status() : failure_;
  }

  Status failure() {
    const std::scoped_lock lock(mutex_);
    return failure_;
  }

  void fail(size_t rank, const Status& why) {
    const std::scoped_lock lock(mutex_);
    if (!failure_.ok()) return;
    failure_ = {StatusCode::kRankFailed,
                "rank " + std::to_string(rank) + " failed: " + why.to_string()};
    changed_.notify_all();
  }

 private:
  Status compare() {
    for (size_t rank = 1; rank < ranks(); ++rank) {
      if (calls_[rank].kind == calls_[0].kind && calls_[rank].bytes == calls_[0].bytes) continue;
      outcome_ok_ = false;
      return {StatusCode::kInvalidArgument, "rank 0 calls " + calls_[0].name() + ", rank " +
                                                std::to_string(rank) + " " + calls_[rank].name()};
    }
    return {};
  }

  void copy() {
    for (size_t to = 0; to < ranks(); ++to) {
      auto* receive = static_cast<char*>(calls_[to].receive);
      const size_t bytes = calls_[to].bytes;
      if (calls_[to].kind == Kind::kReduceScatter) {
        add(to);
        continue;
      }
      for (size_t from = 0; from < ranks() && bytes > 0; ++from) {
        const bool is_own = from == to && (calls_[to].kind == Kind::kAllToAll ||
                                           calls_[to].send == receive + from * bytes);
        if (is_own) continue;
        const size_t place = calls_[to].kind == Kind::kAllToAll ? to * bytes : 0;
        std::memcpy(receive + from * bytes, static_cast<const char*>(calls_[from].send) + place,
                    bytes);
      }
    }
  }

  // In the order of ranks.
  void add(size_t to) {
    const size_t count = calls_[to].bytes / sizeof(float);
    auto* sum = static_cast<float*>(calls_[to].receive);
    std::fill_n(sum, count, 0.0f);
    for (const Call& from : calls_) {
      const float* part = static_cast<const float*>(from.send) + to * count;
      for (size_t i = 0; i < count; ++i) sum[i] += part[i];
    }
  }

  std::string absent() const {
    std::string names;
    for (size_t rank = 0; rank < ranks(); ++rank) {
      if (!is_here_[rank]) names += (names.empty() ? "rank " : ", rank ") + std::to_string(rank);
    }
    return names;
  }

  const std::chrono::milliseconds time_limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // All below are the mutex's.
  std::vector<Call> calls_;
  std::vector<bool> is_here_;
  uint64_t meetings_ = 0;
  bool outcome_ok_ = true;  // of the last meeting
  Status failure_;
};

class ThreadTransport : public Transport {
 public:
  ThreadTransport(std::shared_ptr<Group> group, size_t rank)
      : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return static_cast<int>(rank_); }
  int ranks() const override { return static_cast<int>(group_->ranks()); }
  Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) override {
    return call({Kind::kAllGather, send, receive, bytes}, stream);
  }
  Status all_to_all(const void* send, void* receive, size_t bytes, Stream stream) override {
    return call({Kind::kAllToAll, send, receive, bytes}, stream);
  }
  Status reduce_scatter(const float* send, float* receive, size_t count, Stream stream) override {
    return call({Kind::kReduceScatter, send, receive, count * sizeof(float)}, stream);
  }
  // A call is done when it returns.
  Status join(Stream) override { return group_->failure(); }
  Status wait(Stream) override { return group_->failure(); }
  void fail(const Status& why) override { group_->fail(rank_, why); }

 private:
  Status call(const Call& call, Stream stream) {
    MLA_RETURN_IF_ERROR(mark(RankPhase::kExchange, stream));
    MLA_RETURN_IF_ERROR(group_->meet(rank_, call));
    return mark(RankPhase::kExchanged, stream);
  }

  std::shared_ptr<Group> group_;
  size_t rank_;
};

}  // namespace

Status make_thread_transports(int ranks, std::chrono::milliseconds time_limit,
                              std::vector<std::unique_ptr<Transport>>* transports) {
  if (ranks < 1) {
    return {StatusCode::kInvalidArgument,
            "ranks = " + std::to_string(ranks) + " must be at least 1"};
  }
  const auto count = static_cast<size_t>(ranks);
  const auto group = std::make_shared<Group>(count, time_limit);
  transports->clear();
  for (size_t rank = 0; rank < count; ++rank) {
    transports->push_back(std::make_unique<ThreadTransport>(group, rank));
  }
  return {};
}

}  // namespace mla
