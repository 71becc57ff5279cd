#include "bench/service/replay.h"

#include <vector>

#include "stages/common/machine/cuda_handles.h"

namespace mla::bench {
namespace {

class GpuReplays final : public Replays {
 public:
  Status create() { return gpu::create(&stream_); }
  Stream stream() const override { return stream_.get(); }
  Status capture(Enqueue enqueue, int* index) override {
    gpu::CudaGraphExec graph;
    MLA_RETURN_IF_ERROR(gpu::capture(
        stream_.get(), [&](cudaStream_t s) { return enqueue(s); }, &graph));
    *index = static_cast<int>(graphs_.size());
    graphs_.push_back(std::move(graph));
    return {};
  }
  Status launch(int index) override {
    return gpu::cuda_status(
        cudaGraphLaunch(graphs_[static_cast<size_t>(index)].get(), stream_.get()),
        "cudaGraphLaunch");
  }
  void clear() override { graphs_.clear(); }

 private:
  gpu::CudaStream stream_;
  std::vector<gpu::CudaGraphExec> graphs_;  // go before their stream
};

}  // namespace

Status create_gpu_replays(std::unique_ptr<Replays>* replays);

Status create_gpu_replays(std::unique_ptr<Replays>* replays) {
  auto result = std::make_unique<GpuReplays>();
  MLA_RETURN_IF_ERROR(result->create());
  *replays = std::move(result);
  return {};
}

}  // namespace mla::bench
