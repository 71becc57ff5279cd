/// @file
/// In the place of the real launch.h where stages are compiled to WebAssembly for what they predict: a launch does nothing,
/// and is inlined, so that no kernel is linked.
#pragma once

#include <cstdint>
#include <type_traits>

#include "stages/common/machine/device.h"
#include "stages/common/machine/machine.h"

namespace mla::model {

template <typename... Arguments>
[[gnu::always_inline]] inline Status launch(Arguments...) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
template <typename... Arguments>
[[gnu::always_inline]] inline Status launch_dependent(Arguments...) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
template <typename... Arguments>
[[gnu::always_inline]] inline Status launch_cooperative(Arguments...) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
template <typename... Arguments>
[[gnu::always_inline]] inline Status launch_cluster(Arguments...) {
  return {StatusCode::kUnavailable, "no kernels here"};
}
template <typename... Parameters>
[[gnu::always_inline]] inline int resident_clusters(void (*)(Parameters...), unsigned, unsigned,
                                                    size_t) {
  return 0;
}
template <typename F>
decltype(auto) visit_flag(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}
inline DeviceLimits device_limits() {
  return {};
}
inline unsigned grid_for(int64_t) {
  return 1;
}

}  // namespace mla::model
