#include <algorithm>
#include <optional>
#include <thread>

#include "bench/measure/gpu_support.cuh"
#include "bench/measure/nvml.h"
#include "bench/measure/runner.h"

namespace mla::bench {
namespace {

/// The energy counter moves every 20 to 100 ms: over less than this its difference says little.
constexpr double kLeastEnergySeconds = 0.8;

class GpuRunner final : public Runner {
 public:
  Status create() {
    MLA_RETURN_IF_ERROR(gpu::create(&stream_));
    MLA_RETURN_IF_ERROR(other_data_.allocate_random(kFlushBytes, stream_.get()));
    return wait_for_stream();
  }

  RunCounts run_counts(double microseconds) const override { return gpu_run_counts(microseconds); }

  Status prepare(const Operation& operation, int* handle) override {
    // Once without a graph: kernels are loaded at their first launch, which neither a capture nor a
    // time should see.
    MLA_RETURN_IF_ERROR(operation(stream_.get()));
    MLA_RETURN_IF_ERROR(wait_for_stream());
    gpu::CudaGraphExec graph;
    MLA_RETURN_IF_ERROR(gpu::capture(
        stream_.get(), [&](cudaStream_t s) { return operation(s); }, &graph));
    *handle = static_cast<int>(graphs_.size());
    graphs_.push_back(std::move(graph));
    return {};
  }

  void rest(double expected_us) override {
    if (expected_us > kRestMicroseconds) std::this_thread::sleep_for(kRest);
  }

  Status run_cold(int handle, int runs, std::vector<double>* samples) override {
    return run_apart(handle, /*warm=*/false, runs, samples);
  }

  Status run_warm(int handle, int runs, std::vector<double>* samples) override {
    return run_apart(handle, /*warm=*/true, runs, samples);
  }

  Status run_sustained(int handle, double expected_us, double warmup_seconds, int runs,
                       std::vector<double>* samples, Readings* readings) override {
    MLA_RETURN_IF_ERROR(make_events(runs + 1));
    MLA_RETURN_IF_ERROR(keep_busy(handle, expected_us, warmup_seconds, readings));
    MLA_RETURN_IF_ERROR(record(0));
    for (int i = 0; i < runs;
         ++i) {  // one event between two runs, which ends one and begins the next
      MLA_RETURN_IF_ERROR(launch(handle));
      MLA_RETURN_IF_ERROR(record(i + 1));
    }
    readings->sm_mhz = nvml_sm_clock_mhz();  // while the last of them run
    MLA_RETURN_IF_ERROR(wait_for_stream());
    return read_times(runs, 1, samples);
  }

  void clear() override { graphs_.clear(); }
  bool lost() const override { return lost_; }

 private:
  // read 256 MB | begin | operation | end | read 256 MB | begin | ...: the host enqueues ahead, while
  // reads run, so that no gap of its making lies between two events. Warm, the operation runs
  // before `begin`, too.
  Status run_apart(int handle, bool warm, int runs, std::vector<double>* samples) {
    MLA_RETURN_IF_ERROR(make_events(2 * runs));
    for (int i = 0; i < runs; ++i) {
      MLA_RETURN_IF_ERROR(other_data_.enqueue_read(kFlushBytes, stream_.get()));
      if (warm) MLA_RETURN_IF_ERROR(launch(handle));
      MLA_RETURN_IF_ERROR(record(2 * i));
      MLA_RETURN_IF_ERROR(launch(handle));
      MLA_RETURN_IF_ERROR(record(2 * i + 1));
    }
    MLA_RETURN_IF_ERROR(wait_for_stream());
    return read_times(runs, 2, samples);
  }
  Status launch(int handle) {
    return cuda_status(cudaGraphLaunch(graphs_[static_cast<size_t>(handle)].get(), stream_.get()),
                       "cudaGraphLaunch");
  }
  Status record(int event) {
    return cuda_status(cudaEventRecord(events_[static_cast<size_t>(event)].get(), stream_.get()),
                       "cudaEventRecord");
  }
  Status make_events(int count) {
    while (static_cast<int>(events_.size()) < count) {
      CudaEvent event;
      MLA_RETURN_IF_ERROR(gpu::create(&event));
      events_.push_back(std::move(event));
    }
    return {};
  }
  Status wait_for_stream() {
    bool hung = false;
    const Status status = wait([&] { return cudaStreamQuery(stream_.get()); }, &hung);
    lost_ = lost_ || hung || !status.ok();  // errors of kernels stay with the device context
    return status;
  }
  /// Appends the times from event i * stride to the one after it.
  Status read_times(int runs, int stride, std::vector<double>* samples) {
    for (int i = 0; i < runs; ++i) {
      const auto begin = static_cast<size_t>(i * stride);
      MLA_RETURN_IF_ERROR(elapsed_us(events_[begin], events_[begin + 1], &samples->emplace_back()));
    }
    return {};
  }

  /// Energy since the driver was loaded, and when it was read.
  struct EnergyMark {
    std::chrono::steady_clock::time_point time = std::chrono::steady_clock::now();
    double joules = nvml_energy_joules();
  };

  /// Back-to-back runs for so long, one chunk of about 2 ms running while the next is enqueued. The
  /// last chunk may still run on return, so that the stream is idle for as long as reading the energy
  /// takes longer than that, if at all.
  Status keep_busy(int handle, double expected_us, double seconds, Readings* readings) {
    const auto begin = std::chrono::steady_clock::now();
    const auto end = begin + std::chrono::duration<double>(seconds);
    const auto settled = begin + std::chrono::duration<double>(seconds / 5);
    std::optional<EnergyMark> mark;
    int chunks_since = 0;
    const int chunk = std::clamp(static_cast<int>(2e3 / std::max(expected_us, 1.0)), 1, 400);
    CudaEvent chunk_done[2];
    MLA_RETURN_IF_ERROR(gpu::create(&chunk_done[0]));
    MLA_RETURN_IF_ERROR(gpu::create(&chunk_done[1]));
    for (int i = 0; std::chrono::steady_clock::now() < end; ++i) {
      for (int j = 0; j < chunk; ++j) MLA_RETURN_IF_ERROR(launch(handle));
      MLA_RETURN_IF_ERROR(
          cuda_status(cudaEventRecord(chunk_done[i % 2].get(), stream_.get()), "cudaEventRecord"));
      if (i == 0) continue;
      const cudaEvent_t previous = chunk_done[(i + 1) % 2].get();
      MLA_RETURN_IF_ERROR(wait([&] { return cudaEventQuery(previous); }, &lost_));
      if (mark) ++chunks_since;
      if (!mark && std::chrono::steady_clock::now() > settled) mark.emplace();
    }
    if (!mark) return {};
    const EnergyMark now;
    const double passed = std::chrono::duration<double>(now.time - mark->time).count();
    if (passed < kLeastEnergySeconds || chunks_since == 0) return {};
    readings->watts = (now.joules - mark->joules) / passed;
    readings->joules_a_run =
        (now.joules - mark->joules) / (static_cast<double>(chunks_since) * chunk);
    return {};
  }

  CudaStream stream_;
  GpuBuffer other_data_;
  std::vector<CudaEvent> events_;
  std::vector<gpu::CudaGraphExec> graphs_;
  bool lost_ = false;
};

}  // namespace

Status make_gpu_runner(std::unique_ptr<Runner>* runner) {
  auto result = std::make_unique<GpuRunner>();
  MLA_RETURN_IF_ERROR(result->create());
  *runner = std::move(result);
  return {};
}

}  // namespace mla::bench
