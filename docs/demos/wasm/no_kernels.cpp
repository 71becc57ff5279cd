// What only a launch would use, in a build without kernels (launch.h beside this file).
#include "stages/common/ptx/tensor_map.h"
#include "stages/common/split/split_combine.h"

namespace mla::model {

Status launch_combine(const Problem&, const PlanShape&, const SplitWorkspace&, const Tensors&,
                      Stream, CombineStart) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
Status encode_cache_map(const Problem&, const Tensors&, TensorMap*, int, int) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
Status encode_tensor_map(const void*, const TensorShape&, TensorMap*) {
  return {StatusCode::kUnavailable, "no kernels here"};
}

}  // namespace mla::model
