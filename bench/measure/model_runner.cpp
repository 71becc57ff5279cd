#include "bench/measure/runner.h"

namespace mla::bench {
namespace {

class ModelRunner final : public Runner {
 public:
  RunCounts run_counts(double microseconds) const override {
    return model_run_counts(microseconds);
  }

  Status prepare(const Operation& operation, int* handle) override {
    *handle = static_cast<int>(operations_.size());
    operations_.push_back(operation);
    return {};
  }

  Status run_cold(int handle, int runs, std::vector<double>* samples) override {
    for (int i = 0; i < runs; ++i) {
      const auto begin = WallClock::now();
      MLA_RETURN_IF_ERROR(operations_[static_cast<size_t>(handle)](nullptr));
      samples->push_back(1e6 * seconds_since(begin));
    }
    return {};
  }

  Status run_warm(int handle, int runs, std::vector<double>* samples) override {
    return run_cold(handle, runs, samples);  // a model of no caches
  }

  Status run_sustained(int, double, double, int, std::vector<double>*, Readings*) override {
    return {StatusCode::kUnsupported, "the GPU model has no sustained runs"};
  }

  void clear() override { operations_.clear(); }
  bool lost() const override { return false; }

 private:
  std::vector<Operation> operations_;
};

}  // namespace

std::unique_ptr<Runner> make_model_runner() {
  return std::make_unique<ModelRunner>();
}

}  // namespace mla::bench
