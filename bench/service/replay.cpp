#include "bench/service/replay.h"

#include <vector>

namespace mla::bench {
namespace {

class ModelReplays final : public Replays {
 public:
  Stream stream() const override { return nullptr; }
  Status capture(Enqueue enqueue, int* index) override {
    *index = static_cast<int>(kept_.size());
    kept_.push_back(std::move(enqueue));
    return {};
  }
  Status launch(int index) override { return kept_[static_cast<size_t>(index)](nullptr); }
  void clear() override { kept_.clear(); }

 private:
  std::vector<Enqueue> kept_;
};

}  // namespace

#ifdef MLA_HAVE_CUDA
Status create_gpu_replays(std::unique_ptr<Replays>* replays);  // replay.cu
#endif

Status Replays::create(Machine& machine, std::unique_ptr<Replays>* replays) {
#ifdef MLA_HAVE_CUDA
  if (machine.kind() == MachineKind::kGpu) return create_gpu_replays(replays);
#endif
  static_cast<void>(machine);
  *replays = std::make_unique<ModelReplays>();
  return {};
}

}  // namespace mla::bench
