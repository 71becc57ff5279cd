/// @file
/// The GPU side of the bench in a build without CUDA: says so.
#include "bench/measure/attention_layer.h"
#include "bench/measure/ceilings.h"
#include "bench/measure/cublas_pipeline.h"

namespace mla::bench {
namespace {

Status without_cuda() {
  return {StatusCode::kUnavailable, "built without the CUDA Toolkit"};
}

}  // namespace

Status make_gpu_runner(std::unique_ptr<Runner>*) {
  return without_cuda();
}

Status measure_ceilings(Runner&, const std::function<void(const std::string&)>&, Ceilings*) {
  return without_cuda();
}

Status make_gpu_layer(const LayerPlan&, Element, std::unique_ptr<LayerRunner>*) {
  return without_cuda();
}

const Stage* cublas_pipeline(std::string* why_not) {
  *why_not = without_cuda().message();
  return nullptr;
}

}  // namespace mla::bench
