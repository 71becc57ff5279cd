#include "stages/common/parallel/nccl_transport.h"

#include <condition_variable>
#include <mutex>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

namespace mla {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

class NcclTransport final : public Transport {
 public:
  NcclTransport(std::unique_ptr<Rendezvous> rendezvous, std::unique_ptr<NcclApi> api)
      : rendezvous_(std::move(rendezvous)), api_(std::move(api)) {}
  ~NcclTransport() override {
    Lock lock(mutex_);
    // Work that other ranks no longer do would never end, and a device's memory is freed when its work has ended.
    if (!failure().ok()) return;
    const Status done = poll("its last exchange", lock, [this](bool* is_done) {
      return api_->query(api_->stream(), is_done);
    });
    // NCCL does not free a communicator that is at work or has an error, unless it is aborted.
    bool is_busy = false;
    if (done.ok() && (!api_->progress(&is_busy).ok() || is_busy)) end();
  }

  int rank() const override { return rendezvous_->rank(); }
  int ranks() const override { return rendezvous_->ranks(); }

  Status connect() {
    Lock lock(mutex_);
    std::string id;
    Status made;
    if (rank() == 0) made = api_->make_id(&id);
    if (!made.ok()) return end(made);
    std::vector<std::string> ids;
    MLA_RETURN_IF_ERROR(rendezvous_->share(id, &ids));
    if (const Status begun = api_->connect(ids[0], rank(), ranks()); !begun.ok()) return end(begun);
    MLA_RETURN_IF_ERROR(settle("the ranks to connect", lock));
    watcher_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
    return {};
  }

  Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) override {
    return call("all_gather", bytes, stream,
                [&] { return api_->all_gather(send, receive, bytes); });
  }
  Status all_to_all(const void* send, void* receive, size_t bytes, Stream stream) override {
    return call("all_to_all", bytes, stream,
                [&] { return api_->all_to_all(send, receive, bytes); });
  }
  Status reduce_scatter(const float* send, float* receive, size_t count, Stream stream) override {
    return call("reduce_scatter", count * sizeof(float), stream,
                [&] { return api_->reduce_scatter(send, receive, count); });
  }

  Status join(Stream stream) override {
    const Lock lock(mutex_);
    MLA_RETURN_IF_ERROR(failure());
    const Status led = api_->lead(stream);
    return led.ok() ? led : end(led);
  }

  Status wait(Stream stream) override {
    Lock lock(mutex_);
    MLA_RETURN_IF_ERROR(failure());
    return poll("its work with the others", lock, [&](bool* is_done) -> Status {
      bool is_busy = false;
      MLA_RETURN_IF_ERROR(api_->progress(&is_busy));
      return api_->query(stream, is_done);
    });
  }

  void fail(const Status& why) override {
    const Lock lock(mutex_);
    static_cast<void>(end(why));
  }

 private:
  template <typename Enqueue>
  Status call(const char* name, size_t bytes, Stream stream, Enqueue enqueue) {
    Lock lock(mutex_);
    MLA_RETURN_IF_ERROR(failure());
    const Status announced =
        rendezvous_->announce(name + (" of " + std::to_string(bytes)) + " bytes");
    if (!announced.ok()) return failure();
    Status status = api_->follow(stream);
    if (status.ok()) status = mark(RankPhase::kExchange, api_->stream());
    if (status.ok()) status = enqueue();
    if (!status.ok()) return end(status);
    MLA_RETURN_IF_ERROR(settle(name, lock));
    const Status marked = mark(RankPhase::kExchanged, api_->stream());
    return marked.ok() ? marked : end(marked);
  }

  /// Waits until the communicator has taken a call: the first of a kind connects the ranks.
  Status settle(const std::string& what, Lock& lock) {
    return poll(what, lock, [&](bool* is_done) {
      bool is_busy = false;
      Status status = api_->progress(&is_busy);
      *is_done = !is_busy;
      return status;
    });
  }

  /// Asks until `is_done`, which a failure of the group or the time limit ends. Between two questions `lock` is let go.
  template <typename IsDone>
  Status poll(const std::string& what, Lock& lock, IsDone ask) {
    const auto begin = Clock::now();
    // A little longer than the hub waits, which can say for whom.
    const auto limit = rendezvous_->time_limit() + rendezvous_->time_limit() / 4;
    for (int turn = 0;; ++turn) {
      bool is_done = false;
      if (const Status status = ask(&is_done); !status.ok()) return end(status);
      if (is_done) return {};
      const auto waited = Clock::now() - begin;
      // Most work is short. Later a socket is read, too, and the core is left to others.
      if (waited < std::chrono::milliseconds(1)) continue;
      if (waited >= limit) {
        return end({StatusCode::kRankFailed,
                    "waited " + std::to_string(limit.count()) + " ms for " + what});
      }
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(turn < 1000 ? 50 : 500));
      lock.lock();
      MLA_RETURN_IF_ERROR(failure());  // before another question: the watcher may have aborted
    }
  }

  /// Hears of a failure while this rank's own thread asks for none: in a launch that waits for room in the device's
  /// queue, which comes when the work that hangs is aborted.
  void watch(const std::stop_token& stop) {
    Lock lock(mutex_);
    while (!stop.stop_requested() && failure().ok()) {
      stopped_.wait_for(lock, stop, std::chrono::milliseconds(20), [] { return false; });
    }
  }

  /// The group's failure. What this rank has under way then ends.
  Status failure() {
    const Status status = rendezvous_->failure();
    if (!status.ok()) end();
    return status;
  }

  /// This rank fails: the others are told. Returns why.
  Status end(const Status& why) {
    if (why.code() == StatusCode::kRankFailed) {
      // NCCL may notice that another rank is gone before the hub's word comes, which says whose fault it is.
      const auto deadline = Clock::now() + std::chrono::milliseconds(500);
      while (rendezvous_->failure().ok() && Clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      MLA_RETURN_IF_ERROR(failure());
    }
    rendezvous_->fail(why);
    end();
    return why;
  }
  void end() {
    if (!std::exchange(has_ended_, true)) api_->abort();
  }

  /// Of all below. The watcher may abort while no call of the other thread is under way.
  std::mutex mutex_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::unique_ptr<NcclApi> api_;
  bool has_ended_ = false;
  std::condition_variable_any stopped_;
  std::jthread watcher_;  // last: it uses the others
};

}  // namespace

Status make_nccl_transport(std::unique_ptr<Rendezvous> rendezvous, std::unique_ptr<NcclApi> api,
                           std::unique_ptr<Transport>* transport) {
  auto made = std::make_unique<NcclTransport>(std::move(rendezvous), std::move(api));
  MLA_RETURN_IF_ERROR(made->connect());
  *transport = std::move(made);
  return {};
}

Status make_nccl_transport(std::unique_ptr<Rendezvous> rendezvous,
                           std::unique_ptr<Transport>* transport) {
  std::unique_ptr<NcclApi> api;
  if (const Status made = make_nccl_api(&api); !made.ok()) {
    rendezvous->fail(made);
    return made;
  }
  return make_nccl_transport(std::move(rendezvous), std::move(api), transport);
}

}  // namespace mla
