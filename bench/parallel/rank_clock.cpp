#include "bench/parallel/rank_clock.h"

#include <utility>
#include <vector>

namespace mla::bench {
namespace {

class ModelClock final : public RankClock {
 public:
  explicit ModelClock(Wait wait) : wait_(std::move(wait)) {}
  Stream stream() const override { return nullptr; }
  Status prepare(const Enqueue& enqueue, bool, int* handle) override {
    *handle = static_cast<int>(kept_.size());
    kept_.push_back(enqueue);
    return run(*handle, 1, nullptr);
  }
  Status run(int handle, int runs, double* us) override {
    for (int i = 0; i < runs; ++i) MLA_RETURN_IF_ERROR(kept_[static_cast<size_t>(handle)](nullptr));
    if (us != nullptr) *us = 0;
    return wait_(nullptr);
  }
  void forget(int handle) override { kept_[static_cast<size_t>(handle)] = nullptr; }

 private:
  Wait wait_;
  std::vector<Enqueue> kept_;
};

/// Another clock, whose errors are told.
class TellingClock final : public RankClock {
 public:
  TellingClock(std::unique_ptr<RankClock> clock, Fail fail)
      : clock_(std::move(clock)), fail_(std::move(fail)) {}
  Stream stream() const override { return clock_->stream(); }
  Status prepare(const Enqueue& enqueue, bool as_graph, int* handle) override {
    return told(clock_->prepare(enqueue, as_graph, handle));
  }
  Status run(int handle, int runs, double* us) override {
    return told(clock_->run(handle, runs, us));
  }
  void forget(int handle) override { clock_->forget(handle); }

 private:
  Status told(Status status) const {
    if (!status.ok()) fail_(status);
    return status;
  }
  std::unique_ptr<RankClock> clock_;
  Fail fail_;
};

}  // namespace

#ifdef MLA_HAVE_CUDA
Status make_gpu_clock(RankClock::Wait wait, std::unique_ptr<RankClock>* clock);  // rank_clock.cu
#else
int count_gpus() {
  return 0;
}
Status use_gpu(int) {
  return {StatusCode::kUnavailable, "built without the CUDA Toolkit"};
}
#endif

Status make_rank_clock(Machine& machine, RankClock::Wait wait, std::unique_ptr<RankClock>* clock,
                       RankClock::Fail fail) {
  if (machine.kind() == MachineKind::kGpu) {
#ifdef MLA_HAVE_CUDA
    MLA_RETURN_IF_ERROR(make_gpu_clock(std::move(wait), clock));
#endif
  } else {
    *clock = std::make_unique<ModelClock>(std::move(wait));
  }
  if (fail) *clock = std::make_unique<TellingClock>(std::move(*clock), std::move(fail));
  return {};
}

}  // namespace mla::bench
