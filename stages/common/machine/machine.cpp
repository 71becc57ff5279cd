#include "stages/common/machine/machine.h"

#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "stages/common/machine/gpus.h"

#ifndef MLA_GPU_ONLY
#include "reference/gpu_model/gpu_model.h"
#endif

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>

#include "stages/common/machine/cuda_status.h"
#endif

namespace mla {
namespace {

#ifndef MLA_GPU_ONLY

class ModelMachine final : public Machine {
 public:
  MachineKind kind() const override { return MachineKind::kModel; }
  std::string description() const override {
    const int set = gpu_model::schedule().os_threads;
    const unsigned cores =
        set > 0 ? static_cast<unsigned>(set) : std::max(1u, std::thread::hardware_concurrency());
    return "GPU model on " + std::to_string(cores) + " CPU cores";
  }
  DeviceLimits limits() const override {
    const gpu_model::Device& device = gpu_model::device();
    return {.compute_capability = device.compute_capability,
            .multiprocessors = device.multiprocessors,
            .max_shared_bytes = device.max_shared_bytes,
            .max_grid_x = device.max_grid_x,
            .name = "GPU model"};
  }
  Status allocate(size_t bytes, void** pointer) override {
    *pointer = gpu_model::allocate(bytes);
    if (*pointer != nullptr) return {};
    return {StatusCode::kOutOfMemory,
            "cannot allocate " + std::to_string(bytes) + " bytes for the GPU model"};
  }
  void deallocate(void* pointer) override { gpu_model::deallocate(pointer); }
  Status copy_to_device(void* destination, const void* source, size_t bytes, Stream) override {
    std::memcpy(destination, source, bytes);
    return {};
  }
  Status copy_to_host(void* destination, const void* source, size_t bytes, Stream) override {
    std::memcpy(destination, source, bytes);
    return {};
  }
  Status enqueue_copy_to_host(void* destination, const void* source, size_t bytes,
                              Stream stream) override {
    return copy_to_host(destination, source, bytes, stream);
  }
  Status fill(void* destination, unsigned char byte, size_t bytes, Stream) override {
    std::memset(destination, byte, bytes);
    return {};
  }
  Status synchronize() override { return {}; }
  size_t free_memory() const override { return gpu_model::free_memory(); }
};

#endif

#ifdef MLA_HAVE_CUDA

using gpu::cuda_status;

/// The device's name, asked for once: the driver takes its time.
std::string device_name(int device) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> result;
    int count = 0;
    cudaGetDeviceCount(&count);
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      result.push_back(cudaGetDeviceProperties(&properties, i) == cudaSuccess ? properties.name
                                                                              : "");
    }
    return result;
  }();
  return static_cast<size_t>(device) < names.size() ? names[static_cast<size_t>(device)] : "";
}

class GpuMachine final : public Machine {
 public:
  MachineKind kind() const override { return MachineKind::kGpu; }
  std::string description() const override {
    int device = 0, driver = 0;
    cudaDeviceProp properties{};
    cudaGetDevice(&device);
    cudaGetDeviceProperties(&properties, device);
    cudaDriverGetVersion(&driver);
    return std::string(properties.name) + ", compute capability " +
           std::to_string(properties.major) + "." + std::to_string(properties.minor) + ", " +
           std::to_string(properties.multiProcessorCount) + " multiprocessors, driver for CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  }
  DeviceLimits limits() const override {
    DeviceLimits limits;
    int major = 0, minor = 0, shared = 0, grid = 0, device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&grid, cudaDevAttrMaxGridDimX, device);
    limits.compute_capability = 10 * major + minor;
    limits.max_shared_bytes = static_cast<size_t>(shared);
    limits.max_grid_x = static_cast<unsigned>(grid);
    limits.name = device_name(device);
    return limits;
  }
  Status allocate(size_t bytes, void** pointer) override {
    const cudaError_t error = cudaMalloc(pointer, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // a failed allocation is not sticky; forget it
      *pointer = nullptr;
    }
    return cuda_status(error, "cudaMalloc of " + std::to_string(bytes) + " bytes");
  }
  void deallocate(void* pointer) override { cudaFree(pointer); }
  Status copy_to_device(void* destination, const void* source, size_t bytes,
                        Stream stream) override {
    return copy(destination, source, bytes, cudaMemcpyHostToDevice, stream, "copy to the device");
  }
  Status copy_to_host(void* destination, const void* source, size_t bytes, Stream stream) override {
    return copy(destination, source, bytes, cudaMemcpyDeviceToHost, stream, "copy to the host");
  }
  Status enqueue_copy_to_host(void* destination, const void* source, size_t bytes,
                              Stream stream) override {
    return cuda_status(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToHost,
                                       static_cast<cudaStream_t>(stream)),
                       "copy to the host");
  }
  Status fill(void* destination, unsigned char byte, size_t bytes, Stream stream) override {
    return cuda_status(cudaMemsetAsync(destination, byte, bytes, static_cast<cudaStream_t>(stream)),
                       "cudaMemsetAsync");
  }
  Status synchronize() override {
    return cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  size_t free_memory() const override {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return free;
  }

 private:
  // In the stream's order, and done when it returns.
  static Status copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind,
                     Stream stream, const char* what) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    MLA_RETURN_IF_ERROR(
        cuda_status(cudaMemcpyAsync(destination, source, bytes, kind, cuda_stream), what));
    return cuda_status(cudaStreamSynchronize(cuda_stream), what);
  }
};

#endif

}  // namespace

#ifndef MLA_GPU_ONLY
Machine& model_machine() {
  static ModelMachine machine;
  return machine;
}
#endif

Machine* find_machine(MachineKind kind, std::string* why_not) {
  if (kind == MachineKind::kGpu) return gpu_machine(why_not);
#ifdef MLA_GPU_ONLY
  if (why_not != nullptr) *why_not = "no GPU model: this program links the stages for GPUs alone";
  return nullptr;
#else
  return &model_machine();
#endif
}

Machine* gpu_machine(std::string* why_not) {
#ifdef MLA_HAVE_CUDA
  static GpuMachine machine;
  static const std::string reason = [] {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
      cudaGetLastError();
      // What the runtime says without any driver, too.
      if (error == cudaErrorInsufficientDriver) {
        return std::string("no GPU: no NVIDIA driver here, or one too old for CUDA ") +
               std::to_string(CUDART_VERSION / 1000);
      }
      return std::string("no GPU: ") + cudaGetErrorString(error);
    }
    return std::string(count == 0 ? "no GPU: the driver finds none" : "");
  }();
  if (reason.empty()) return &machine;
#else
  static const std::string reason = "no GPU code: built without the CUDA Toolkit (12.8 or newer)";
#endif
  if (why_not != nullptr) *why_not = reason;
  return nullptr;
}

int gpu_count() {
  int count = 0;
#ifdef MLA_HAVE_CUDA
  if (cudaGetDeviceCount(&count) != cudaSuccess) return cudaGetLastError(), 0;
#endif
  return count;
}

std::string too_few_gpus(int ranks, int gpus) {
  return std::to_string(ranks) + " ranks need as many GPUs; there " + (gpus == 1 ? "is " : "are ") +
         std::to_string(gpus);
}

Status use_gpu(int index) {
#ifdef MLA_HAVE_CUDA
  return cuda_status(cudaSetDevice(index), "GPU " + std::to_string(index));
#else
  return {StatusCode::kUnavailable,
          "GPU " + std::to_string(index) + ": built without the CUDA Toolkit"};
#endif
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(machine_, other.machine_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Status DeviceBuffer::allocate(Machine& machine, size_t bytes) {
  reset();
  void* data = nullptr;
  MLA_RETURN_IF_ERROR(machine.allocate(bytes, &data));
  machine_ = &machine;
  data_ = data;
  bytes_ = bytes;
  return {};
}

Status DeviceBuffer::assign(Machine& machine, const void* source, size_t bytes) {
  MLA_RETURN_IF_ERROR(allocate(machine, bytes));
  return machine.copy_to_device(data_, source, bytes);
}

void DeviceBuffer::reset() {
  if (data_ != nullptr) machine_->deallocate(data_);
  machine_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace mla
