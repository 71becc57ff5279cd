/// @file
/// The two machines a stage can run on, a GPU and the CPU model of one, behind one small interface:
/// memory, copies, limits. Launching is launch.h, for stages; this is for those who call them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "reference/status.h"

namespace mla {

/// A GPU, or the CPU model of one.
enum class MachineKind { kGpu, kModel };

/// What a launch may ask for, read off the device (the model: off gpu_model::device()).
struct DeviceLimits {
  int compute_capability = 0;  ///< 90 for 9.0
  int multiprocessors = 0;
  size_t max_shared_bytes = 0;  ///< A block, opt-in.
  unsigned max_grid_x = 0;
};

/// A stream of the machine: cudaStream_t on a GPU, ignored by the model, whose launches are
/// synchronous.
using Stream = void*;

/// Memory, copies and limits of a GPU or of the model.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual MachineKind kind() const = 0;
  /// One line: "NVIDIA H200, compute capability 9.0, 132 multiprocessors, driver 580.159"
  virtual std::string description() const = 0;
  virtual DeviceLimits limits() const = 0;
  /// 16-byte aligned (at least) memory; the model's is poisoned and fenced by guard pages.
  virtual Status allocate(size_t bytes, void** pointer) = 0;
  virtual void deallocate(void* pointer) = 0;
  virtual Status copy_to_device(void* destination, const void* source, size_t bytes,
                                Stream stream = nullptr) = 0;
  virtual Status copy_to_host(void* destination, const void* source, size_t bytes,
                              Stream stream = nullptr) = 0;
  /// Sets every byte; 0xff makes NaN of every float type.
  virtual Status fill(void* destination, unsigned char byte, size_t bytes,
                      Stream stream = nullptr) = 0;
  /// Waits for all work and reports what went wrong in it.
  virtual Status synchronize() = 0;
  virtual size_t free_memory() const = 0;
};

/// The GPU model; always there.
Machine& model_machine();

/// The current CUDA device, or null with the reason in `why_not` ("built without CUDA: ...",
/// "no CUDA device: no driver found").
Machine* gpu_machine(std::string* why_not = nullptr);

/// Memory of a machine that a caller lends to a call. The call does not own it.
struct Workspace {
  void* data = nullptr;  ///< 16-byte aligned; may be null if `bytes` is 0.
  size_t bytes = 0;
};

/// Memory of a machine, freed with the object.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer() { reset(); }
  /// Frees what it held, then allocates.
  Status allocate(Machine& machine, size_t bytes);
  /// Allocates and copies from the host.
  Status assign(Machine& machine, const void* source, size_t bytes);
  void reset();
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  /// All of it, to lend to a call.
  operator Workspace() const { return {data_, bytes_}; }

 private:
  Machine* machine_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mla
