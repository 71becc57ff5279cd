#include <sys/wait.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "bench/parallel/rank_clock.h"
#include "stages/common/machine/cuda_handles.h"

namespace mla::bench {

using gpu::cuda_status;

int count_gpus() {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess ? count : 0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 0;
  return WEXITSTATUS(status);
}

Status use_gpu(int index) {
  return cuda_status(cudaSetDevice(index), "GPU " + std::to_string(index));
}

namespace {

class GpuClock final : public RankClock {
 public:
  explicit GpuClock(Wait wait) : wait_(std::move(wait)) {}
  Status create() {
    MLA_RETURN_IF_ERROR(gpu::create(&stream_));
    MLA_RETURN_IF_ERROR(gpu::create(&behind_));
    MLA_RETURN_IF_ERROR(gpu::create(&turn_));
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
  Status run(int handle, int runs, double* us) override {
    const Kept& kept = kept_[static_cast<size_t>(handle)];
    MLA_RETURN_IF_ERROR(record(begin_));
    for (int i = 0; i < runs; ++i) {
      if (i > 0 && i % kTurn == 0) MLA_RETURN_IF_ERROR(end_turn(i));
      MLA_RETURN_IF_ERROR(
          kept.enqueue
              ? kept.enqueue(stream_.get())
              : cuda_status(cudaGraphLaunch(kept.graph.get(), stream_.get()), "cudaGraphLaunch"));
    }
    MLA_RETURN_IF_ERROR(record(end_));
    MLA_RETURN_IF_ERROR(wait_(stream_.get()));
    float milliseconds = 0;
    MLA_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()),
                                    "cudaEventElapsedTime"));
    if (us != nullptr) *us = 1e3 * static_cast<double>(milliseconds) / runs;
    return {};
  }

  void forget(int handle) override { kept_[static_cast<size_t>(handle)] = {}; }

 private:
  struct Kept {
    gpu::CudaGraphExec graph;
    Enqueue enqueue;
  };
  /// A launch that finds the device's queue full waits, and hears of no rank that has failed. So no more than two turns
  /// of runs are under way: the one before the last is waited for, by a stream that is behind by one.
  Status end_turn(int runs) {
    if (runs > kTurn) MLA_RETURN_IF_ERROR(wait_(behind_.get()));
    MLA_RETURN_IF_ERROR(record(turn_));
    return cuda_status(cudaStreamWaitEvent(behind_.get(), turn_.get(), 0), "cudaStreamWaitEvent");
  }
  Status record(const gpu::CudaEvent& event) {
    return cuda_status(cudaEventRecord(event.get(), stream_.get()), "cudaEventRecord");
  }

  static constexpr int kTurn = 32;
  gpu::CudaStream stream_, behind_;
  gpu::CudaEvent begin_, end_, turn_;
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
