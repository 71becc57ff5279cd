/// @file
/// Launching a kernel on the machine this file is compiled for: `kernel<<<...>>>` under nvcc, the
/// GPU model otherwise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <new>
#include <string>
#include <type_traits>

#include "stages/common/machine/device.h"
#include "stages/common/machine/machine.h"

#ifdef __CUDACC__
#include "stages/common/machine/cuda_status.h"
#endif

namespace mla::MLA_MACHINE {

namespace detail {
/// A grid consists of whole clusters.
inline Status check_cluster(unsigned grid, unsigned cluster) {
  if (cluster > 0 && grid % cluster == 0) return {};
  return {StatusCode::kInvalidArgument,
          "grid = " + std::to_string(grid) +
              " is not a multiple of cluster = " + std::to_string(cluster)};
}
}  // namespace detail

#ifdef __CUDACC__

namespace detail {
/// Above the default limit of shared memory a kernel must opt in.
template <typename Kernel>
Status allow_shared_bytes(Kernel* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return {};
  return cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)),
                     "cudaFuncSetAttribute");
}

/// A launch with one attribute, which must outlive it.
inline cudaLaunchConfig_t launch_config(unsigned grid, unsigned block, size_t shared_bytes,
                                        Stream stream, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}
}  // namespace detail

/// Enqueues kernel(arguments...) on `stream`: `grid` blocks of `block` threads, each block with
/// `shared_bytes` of dynamic shared memory.
/// @return kCudaError if the runtime refuses the launch. Errors while it runs come later.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes,
              Stream stream, Arguments... arguments) {
  MLA_RETURN_IF_ERROR(detail::allow_shared_bytes(kernel, shared_bytes));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  return cuda_status(cudaGetLastError(), "kernel launch");
}

/// The same for a kernel that may start before the grid ahead of it in `stream` has ended: as soon as
/// all blocks of that grid have called griddepcontrol_launch_dependents() or ended. The kernel must
/// call griddepcontrol_wait() before it touches anything that grid wrote.
template <typename... Parameters, typename... Arguments>
Status launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                        size_t shared_bytes, Stream stream, Arguments... arguments) {
  MLA_RETURN_IF_ERROR(detail::allow_shared_bytes(kernel, shared_bytes));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config =
      detail::launch_config(grid, block, shared_bytes, stream, &attribute);
  return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                     "kernel launch");
}

/// The same as launch() for a kernel whose blocks wait for each other: all of them are resident at
/// once.
/// @return kUnsupported if the device has no room for that, with the numbers.
template <typename... Parameters, typename... Arguments>
Status launch_cooperative(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                          size_t shared_bytes, Stream stream, Arguments... arguments) {
  MLA_RETURN_IF_ERROR(detail::allow_shared_bytes(kernel, shared_bytes));
  int each = 0, device = 0, multiprocessors = 0;
  MLA_RETURN_IF_ERROR(cuda_status(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                      &each, kernel, static_cast<int>(block), shared_bytes),
                                  "cudaOccupancyMaxActiveBlocksPerMultiprocessor"));
  MLA_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  MLA_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                  "cudaDeviceGetAttribute"));
  if (const int64_t most = int64_t{each} * multiprocessors; grid > most) {
    return {StatusCode::kUnsupported,
            "the grid has " + std::to_string(grid) + " blocks, but at most " +
                std::to_string(most) + " are resident at once: " + std::to_string(each) +
                " on each of " + std::to_string(multiprocessors) + " multiprocessors"};
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  const cudaLaunchConfig_t config =
      detail::launch_config(grid, block, shared_bytes, stream, &attribute);
  return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                     "kernel launch");
}

/// The same as launch() for a kernel whose blocks form clusters of `cluster` neighbours: 2, 4, 8, or
/// 16 where the device has room for that many.
/// @return kUnsupported if the device has no room for one cluster.
template <typename... Parameters, typename... Arguments>
Status launch_cluster(void (*kernel)(Parameters...), unsigned cluster, unsigned grid,
                      unsigned block, size_t shared_bytes, Stream stream, Arguments... arguments) {
  MLA_RETURN_IF_ERROR(detail::check_cluster(grid, cluster));
  MLA_RETURN_IF_ERROR(detail::allow_shared_bytes(kernel, shared_bytes));
  if (cluster > 8) {
    MLA_RETURN_IF_ERROR(
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                    "cudaFuncSetAttribute"));
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config =
      detail::launch_config(grid, block, shared_bytes, stream, &attribute);
  int clusters = 0;
  MLA_RETURN_IF_ERROR(cuda_status(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
                                  "cudaOccupancyMaxActiveClusters"));
  if (clusters == 0) {
    return {StatusCode::kUnsupported, "the device has no room for a cluster of " +
                                          std::to_string(cluster) + " blocks of " +
                                          std::to_string(block) + " threads and " +
                                          std::to_string(shared_bytes) + " bytes of shared memory"};
  }
  return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                     "kernel launch");
}

/// Clusters of `cluster` blocks that the current device runs at the same time; 0 without a device. A
/// cluster lies within one group of multiprocessors, so they are fewer than the multiprocessors would
/// make: an H200 with 132 was seen to run 15 clusters of 8.
template <typename... Parameters>
int resident_clusters(void (*kernel)(Parameters...), unsigned cluster, unsigned block,
                      size_t shared_bytes) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config =
      detail::launch_config(cluster, block, shared_bytes, nullptr, &attribute);
  int clusters = 0;
  if (!detail::allow_shared_bytes(kernel, shared_bytes).ok() ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // not the next launch's
    return 0;
  }
  return clusters;
}

#else

namespace detail {
/// Runs a kernel on the model: what it throws as a Status.
inline Status run_on_model(unsigned grid, unsigned block, size_t shared_bytes,
                           const std::function<void()>& kernel,
                           const gpu_model::LaunchOptions& options) {
  try {
    gpu_model::launch(dim3(grid), dim3(block), shared_bytes, kernel, options);
  } catch (const gpu_model::KernelError& error) {
    return {StatusCode::kKernelRejected, error.what()};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "not enough memory for the GPU model's threads"};
  }
  return {};
}
}  // namespace detail

/// Runs kernel(arguments...) to its end on the model.
/// @return kKernelRejected with what the model found, or kOutOfMemory.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes,
              Stream /*stream*/, Arguments... arguments) {
  return detail::run_on_model(grid, block, shared_bytes,
                              [&] { kernel(static_cast<Parameters>(arguments)...); },
                              {.kernel = reinterpret_cast<const void*>(kernel)});
}

/// The same as launch() for a kernel whose blocks wait for each other: all of them are resident at
/// once.
/// @return kUnsupported if the device has no room for that, with the numbers.
template <typename... Parameters, typename... Arguments>
Status launch_cooperative(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                          size_t shared_bytes, Stream /*stream*/, Arguments... arguments) {
  const std::string why = gpu_model::check_resident(grid, block, shared_bytes);
  if (!why.empty()) return {StatusCode::kUnsupported, why};
  return detail::run_on_model(
      grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
      {.cooperative = true, .kernel = reinterpret_cast<const void*>(kernel)});
}

/// See above. The grid runs when the one before has ended. The race detector knows that it might
/// have begun earlier.
template <typename... Parameters, typename... Arguments>
Status launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                        size_t shared_bytes, Stream /*stream*/, Arguments... arguments) {
  return detail::run_on_model(grid, block, shared_bytes,
                              [&] { kernel(static_cast<Parameters>(arguments)...); },
                              {.dependent = true, .kernel = reinterpret_cast<const void*>(kernel)});
}

/// The same as launch() for a kernel whose blocks form clusters of `cluster` neighbours: 2, 4, 8, or
/// 16 where the device has room for that many.
template <typename... Parameters, typename... Arguments>
Status launch_cluster(void (*kernel)(Parameters...), unsigned cluster, unsigned grid,
                      unsigned block, size_t shared_bytes, Stream /*stream*/,
                      Arguments... arguments) {
  MLA_RETURN_IF_ERROR(detail::check_cluster(grid, cluster));
  return detail::run_on_model(
      grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
      {.cluster = cluster, .kernel = reinterpret_cast<const void*>(kernel)});
}

/// Clusters of `cluster` blocks that the model's device runs at the same time: it knows no groups of
/// multiprocessors.
template <typename... Parameters>
int resident_clusters(void (* /*kernel*/)(Parameters...), unsigned cluster, unsigned /*block*/,
                      size_t /*shared_bytes*/) {
  return gpu_model::device().multiprocessors / static_cast<int>(cluster);
}

#endif

/// Calls f(std::true_type{}) or f(std::false_type{}): makes `flag` a template argument.
template <typename F>
decltype(auto) visit_flag(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

/// Limits of the device that launch() uses; all zero without a GPU.
inline DeviceLimits device_limits() {
#ifdef __CUDACC__
  const Machine* machine = gpu_machine();
  return machine != nullptr ? machine->limits() : DeviceLimits{};
#else
  return model_machine().limits();
#endif
}

/// Blocks for a grid-stride loop over `items`: one per item, or as many as a grid can have.
inline unsigned grid_for(int64_t items) {
  const int64_t limit = device_limits().max_grid_x;
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(items, limit)));
}

}  // namespace mla::MLA_MACHINE
