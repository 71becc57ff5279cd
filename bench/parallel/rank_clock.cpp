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

}  // namespace

#ifdef MLA_HAVE_CUDA
Status make_gpu_clock(RankClock::Wait wait, std::unique_ptr<RankClock>* clock);  // rank_clock.cu
#else
int count_gpus() {
  return 0;
}
#endif

Status make_rank_clock(Machine& machine, RankClock::Wait wait, std::unique_ptr<RankClock>* clock) {
#ifdef MLA_HAVE_CUDA
  if (machine.kind() == MachineKind::kGpu) return make_gpu_clock(std::move(wait), clock);
#endif
  static_cast<void>(machine);
  *clock = std::make_unique<ModelClock>(std::move(wait));
  return {};
}

}  // namespace mla::bench
