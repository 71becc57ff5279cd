/// @file
/// Launching a kernel on the machine this file is compiled for: `kernel<<<...>>>` under nvcc, the
/// GPU model otherwise.
#pragma once

#include <algorithm>
#include <new>
#include <string>
#include <type_traits>

#include "stages/common/machine/device.h"
#include "stages/common/machine/machine.h"

#ifdef __CUDACC__
#include "stages/common/machine/cuda_status.h"
#endif

namespace mla::MLA_MACHINE {

#ifdef __CUDACC__

/// Enqueues kernel(arguments...) on `stream`: `grid` blocks of `block` threads, each block with
/// `shared_bytes` of dynamic shared memory.
/// @return kCudaError if the runtime refuses the launch. Errors while it runs come later.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes,
              Stream stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // above the default limit a kernel must opt in
    MLA_RETURN_IF_ERROR(
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_bytes)),
                    "cudaFuncSetAttribute"));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  return cuda_status(cudaGetLastError(), "kernel launch");
}

/// The same for a kernel with at most 48 KB of shared memory that may start before the grid ahead
/// of it in `stream` has ended: as soon as all blocks of that grid have called
/// griddepcontrol_launch_dependents() or ended. The kernel must call griddepcontrol_wait() before
/// it touches anything that grid wrote.
template <typename... Parameters, typename... Arguments>
Status launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                        size_t shared_bytes, Stream stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                     "kernel launch");
}

#else

/// Runs kernel(arguments...) to its end on the model, as `launch_grid` of simt.h does.
/// @return kKernelRejected with what the model found, or kOutOfMemory.
template <typename... Parameters, typename... Arguments>
Status run_on_model(decltype(gpu_model::launch)* launch_grid, void (*kernel)(Parameters...),
                    unsigned grid, unsigned block, size_t shared_bytes, Arguments... arguments) {
  try {
    launch_grid(dim3(grid), dim3(block), shared_bytes,
                [&] { kernel(static_cast<Parameters>(arguments)...); });
  } catch (const gpu_model::KernelError& error) {
    return {StatusCode::kKernelRejected, error.what()};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "not enough memory for the GPU model's threads"};
  }
  return {};
}

/// See above.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared_bytes,
              Stream /*stream*/, Arguments... arguments) {
  return run_on_model(gpu_model::launch, kernel, grid, block, shared_bytes, arguments...);
}

/// See above. The grid runs when the one before has ended; that it might have begun earlier, the race
/// detector knows.
template <typename... Parameters, typename... Arguments>
Status launch_dependent(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                        size_t shared_bytes, Stream /*stream*/, Arguments... arguments) {
  return run_on_model(gpu_model::launch_dependent, kernel, grid, block, shared_bytes, arguments...);
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
