#include <sys/wait.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "bench/parallel/rank_clock.h"
#include "stages/common/machine/cuda_handles.h"
#include "stages/common/machine/gpus.h"

namespace mla::bench {

using gpu::cuda_status;

int count_gpus() {
  const pid_t child = fork();
  if (child == 0) _exit(gpu_count());
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 0;
  return WEXITSTATUS(status);
}

namespace {

class GpuPhaseClock final : public PhaseClock {
 public:
  explicit GpuPhaseClock(cudaStream_t stream) : stream_(stream) {}
  Status create() { return gpu::create(&probe_); }

  // Events are made when a decode is first enqueued, and used again when it is captured.
  Status mark(RankPhase phase, Stream of) override {
    auto* stream = static_cast<cudaStream_t>(of);
    if (marks_.size() == events_.size()) {
      events_.emplace_back();
      MLA_RETURN_IF_ERROR(gpu::create(&events_.back()));
    }
    cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
    MLA_RETURN_IF_ERROR(
        cuda_status(cudaStreamIsCapturing(stream, &state), "cudaStreamIsCapturing"));
    // A node of the graph: without the flag an event only orders what is captured.
    const unsigned flags =
        state == cudaStreamCaptureStatusActive ? cudaEventRecordExternal : cudaEventRecordDefault;
    cudaEvent_t event = events_[marks_.size()].get();
    marks_.push_back(phase);
    return cuda_status(cudaEventRecordWithFlags(event, stream, flags), "cudaEventRecordWithFlags");
  }
  void begin() override { marks_.clear(); }

  Status read(std::vector<TimedMark>* marks, double* uncertainty_us) override {
    if (marks_.empty()) return {StatusCode::kInvalidArgument, "no phase was marked"};
    // When the first mark was, by the host: before the probe was done, whose distance the GPU knows, and after it was
    // enqueued.
    ClockBounds first;
    for (int i = 0; i < kProbes; ++i) {
      const double before = host_us();
      MLA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(probe_.get(), stream_), "cudaEventRecord"));
      MLA_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(probe_.get()), "cudaEventSynchronize"));
      const double after = host_us();
      double distance = 0;
      MLA_RETURN_IF_ERROR(since_first(probe_.get(), &distance));
      first.narrow(before - distance, after - distance);
    }
    *uncertainty_us = first.half_width();
    marks->clear();
    for (size_t i = 0; i < marks_.size(); ++i) {
      double distance = 0;
      MLA_RETURN_IF_ERROR(since_first(events_[i].get(), &distance));
      marks->push_back({marks_[i], first.middle() + distance});
    }
    return {};
  }

 private:
  static constexpr int kProbes = 64;

  Status since_first(cudaEvent_t event, double* us) {
    float milliseconds = 0;
    MLA_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&milliseconds, events_[0].get(), event),
                                    "cudaEventElapsedTime"));
    *us = 1e3 * static_cast<double>(milliseconds);
    return {};
  }

  cudaStream_t stream_;
  gpu::CudaEvent probe_;
  std::vector<gpu::CudaEvent> events_;
  std::vector<RankPhase> marks_;
};

class GpuClock final : public RankClock {
 public:
  explicit GpuClock(Wait wait) : wait_(std::move(wait)) {}
  Status create() {
    MLA_RETURN_IF_ERROR(gpu::create(&stream_));
    MLA_RETURN_IF_ERROR(gpu::create(&begin_));
    return gpu::create(&end_);
  }
  Stream stream() const override { return stream_.get(); }
  Status prepare(const Enqueue& enqueue, bool as_graph, int* handle) override {
    // Once without a graph: kernels are loaded, and ranks connected, at the first call.
    MLA_RETURN_IF_ERROR(enqueue(stream_.get()));
    MLA_RETURN_IF_ERROR(wait_(stream_.get()));
    Kept kept;
    if (as_graph) {
      MLA_RETURN_IF_ERROR(gpu::capture(
          stream_.get(), [&](cudaStream_t stream) { return enqueue(stream); }, &kept.graph));
    } else {
      kept.enqueue = enqueue;
    }
    *handle = static_cast<int>(kept_.size());
    kept_.push_back(std::move(kept));
    return {};
  }

  void forget(int handle) override { kept_[static_cast<size_t>(handle)] = {}; }
  Status make_phase_clock(std::unique_ptr<PhaseClock>* clock) override {
    auto made = std::make_unique<GpuPhaseClock>(stream_.get());
    MLA_RETURN_IF_ERROR(made->create());
    *clock = std::move(made);
    return {};
  }

 private:
  struct Kept {
    gpu::CudaGraphExec graph;
    Enqueue enqueue;
  };

  Status run_piece(int handle, int runs, double* total_us) override {
    const Kept& kept = kept_[static_cast<size_t>(handle)];
    const auto once = [&] {
      return kept.enqueue
                 ? kept.enqueue(stream_.get())
                 : cuda_status(cudaGraphLaunch(kept.graph.get(), stream_.get()), "cudaGraphLaunch");
    };
    if (total_us != nullptr) MLA_RETURN_IF_ERROR(once());
    MLA_RETURN_IF_ERROR(record(begin_));
    for (int i = 0; i < runs; ++i) MLA_RETURN_IF_ERROR(once());
    MLA_RETURN_IF_ERROR(record(end_));
    MLA_RETURN_IF_ERROR(wait_(stream_.get()));
    float milliseconds = 0;
    MLA_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()),
                                    "cudaEventElapsedTime"));
    if (total_us != nullptr) *total_us = 1e3 * static_cast<double>(milliseconds);
    return {};
  }

  Status record(const gpu::CudaEvent& event) {
    return cuda_status(cudaEventRecord(event.get(), stream_.get()), "cudaEventRecord");
  }

  gpu::CudaStream stream_;
  gpu::CudaEvent begin_, end_;
  Wait wait_;
  std::vector<Kept> kept_;
};

}  // namespace

Status make_gpu_clock(RankClock::Wait wait, std::unique_ptr<RankClock>* clock) {
  auto made = std::make_unique<GpuClock>(std::move(wait));
  MLA_RETURN_IF_ERROR(made->create());
  *clock = std::move(made);
  return {};
}

}  // namespace mla::bench
