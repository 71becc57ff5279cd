#include "bench/parallel/rank_clock.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace mla::bench {

void ClockBounds::narrow(double least, double most) {
  low = std::max(low, least);
  high = std::min(high, most);
}

double host_us() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int gpu_of_rank(int local_rank, int visible, bool share) {
  return visible == 1 || (share && visible > 0) ? local_rank % visible : local_rank;
}

Status RankClock::run(int handle, int runs, double* us, int most) {
  const int pieces = (runs + most - 1) / most;
  double all_us = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {  // of the same length but for one
    const int64_t first = piece * runs / pieces, end = (piece + 1) * runs / pieces;
    double piece_us = 0;
    MLA_RETURN_IF_ERROR(
        run_piece(handle, static_cast<int>(end - first), us != nullptr ? &piece_us : nullptr));
    all_us += piece_us;
  }
  if (us != nullptr) *us = all_us / runs;
  return {};
}

namespace {

class HostPhaseClock final : public PhaseClock {
 public:
  Status mark(RankPhase phase, Stream) override {
    marks_.push_back({phase, host_us()});
    return {};
  }
  void begin() override { marks_.clear(); }
  Status read(std::vector<TimedMark>* marks, double* uncertainty_us) override {
    *marks = marks_;
    *uncertainty_us = 0;
    return {};
  }

 private:
  std::vector<TimedMark> marks_;
};

class ModelClock final : public RankClock {
 public:
  explicit ModelClock(Wait wait) : wait_(std::move(wait)) {}
  Stream stream() const override { return nullptr; }
  Status prepare(const Enqueue& enqueue, bool, int* handle) override {
    *handle = static_cast<int>(kept_.size());
    kept_.push_back(enqueue);
    return run_piece(*handle, 1, nullptr);
  }
  void forget(int handle) override { kept_[static_cast<size_t>(handle)] = nullptr; }
  Status make_phase_clock(std::unique_ptr<PhaseClock>* clock) override {
    *clock = std::make_unique<HostPhaseClock>();
    return {};
  }

 private:
  Status run_piece(int handle, int runs, double* total_us) override {
    if (total_us != nullptr) {
      ++runs;
      *total_us = 0;
    }
    for (int i = 0; i < runs; ++i) MLA_RETURN_IF_ERROR(kept_[static_cast<size_t>(handle)](nullptr));
    return wait_(nullptr);
  }

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
  Status run_piece(int handle, int runs, double* total_us) override {
    return told(clock_->run_piece(handle, runs, total_us));
  }
  void forget(int handle) override { clock_->forget(handle); }
  Status make_phase_clock(std::unique_ptr<PhaseClock>* clock) override {
    return clock_->make_phase_clock(clock);
  }

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
