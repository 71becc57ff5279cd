/// @file
/// The two machines a stage can run on, a GPU and the CPU model of one, behind one small interface:
/// memory, copies, limits. Stages launch with launch.h; this is for those who call stages.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "reference/status.h"

namespace mla {

/// A GPU, or the CPU model of one.
enum class MachineKind { kGpu, kModel };

/// What a launch may ask for, read from the device, or from gpu_model::device().
struct DeviceLimits {
  int compute_capability = 0;  ///< 90 for 9.0
  int multiprocessors = 0;
  size_t max_shared_bytes = 0;  ///< Dynamic shared memory per block, if the kernel opts in.
  unsigned max_grid_x = 0;      ///< Blocks.
  /// Most query rows of a tile, for a stage that has tiles of several sizes: a caller's choice.
  int max_tile_rows = 1 << 30;
  std::string name = {};  ///< Of the device: "NVIDIA H200".
};

/// A stream of the machine: cudaStream_t on a GPU, ignored by the model, whose launches are
/// synchronous.
using Stream = void*;

/// Memory, copies and limits of a GPU or of the model.
class Machine {
 public:
  virtual ~Machine() = default;
  /// Which of the two it is.
  virtual MachineKind kind() const = 0;
  /// One line: "NVIDIA H200, compute capability 9.0, 132 multiprocessors, driver for CUDA 13.0"
  virtual std::string description() const = 0;
  /// What a launch may ask for.
  virtual DeviceLimits limits() const = 0;
  /// Allocates memory, aligned to at least 16 bytes. The model's holds NaN and lies between guard
  /// pages.
  /// @return kOutOfMemory, or another error of the machine; `*pointer` is then null.
  virtual Status allocate(size_t bytes, void** pointer) = 0;
  /// Frees what allocate() gave; null is fine.
  virtual void deallocate(void* pointer) = 0;
  /// Copies from the host, in the order of `stream`; done when it returns.
  /// @return The machine's error.
  virtual Status copy_to_device(void* destination, const void* source, size_t bytes,
                                Stream stream = nullptr) = 0;
  /// Copies to the host, in the order of `stream`; done when it returns.
  /// @return The machine's error, also one of the work before it.
  virtual Status copy_to_host(void* destination, const void* source, size_t bytes,
                              Stream stream = nullptr) = 0;
  /// Enqueues a copy to the host and does not wait; only to pinned memory is it asynchronous.
  /// @return The machine's error.
  virtual Status enqueue_copy_to_host(void* destination, const void* source, size_t bytes,
                                      Stream stream) = 0;
  /// Sets every byte, in the order of `stream`; 0xff makes a NaN of every float type.
  virtual Status fill(void* destination, unsigned char byte, size_t bytes,
                      Stream stream = nullptr) = 0;
  /// Waits for all work and reports what went wrong in it.
  virtual Status synchronize() = 0;
  /// Bytes that can still be allocated.
  virtual size_t free_memory() const = 0;
};

/// The GPU model. Not there in a program that links the component for GPUs alone.
Machine& model_machine();

/// The current CUDA device, or null with the reason in `why_not`: "no GPU code: built without the
/// CUDA Toolkit (12.8 or newer)".
Machine* gpu_machine(std::string* why_not = nullptr);

/// Either of the two, or null with the reason in `why_not`.
Machine* find_machine(MachineKind kind, std::string* why_not = nullptr);

/// The function gpu::`name` or model::`name`, whichever runs on `machine`; a build without CUDA has the
/// latter only, one for GPUs alone the former. A macro, because a name without its namespace cannot be an
/// argument.
#ifdef MLA_GPU_ONLY
#define MLA_ON_MACHINE(machine, name) (static_cast<void>(machine), gpu::name)
#elif defined(MLA_HAVE_CUDA)
#define MLA_ON_MACHINE(machine, name) \
  ((machine).kind() == ::mla::MachineKind::kGpu ? gpu::name : model::name)
#else
#define MLA_ON_MACHINE(machine, name) (static_cast<void>(machine), model::name)
#endif

/// Memory of a machine that a caller lends to a call. The call does not own it.
struct Workspace {
  void* data = nullptr;  ///< 16-byte aligned; may be null if `bytes` is 0.
  size_t bytes = 0;
};

/// Memory of a machine, freed with the object.
class DeviceBuffer {
 public:
  /// Holds no memory.
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer() { reset(); }
  /// Frees what it held, then allocates.
  /// @return As Machine::allocate; it then holds nothing.
  Status allocate(Machine& machine, size_t bytes);
  /// Allocates `bytes` and copies them from `source` on the host.
  /// @return As allocate() and Machine::copy_to_device.
  Status assign(Machine& machine, const void* source, size_t bytes);
  /// Frees the memory.
  void reset();
  /// Its address; null if it holds none.
  void* data() const { return data_; }
  /// The same, as a pointer to T.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  /// Its size, as asked for.
  size_t bytes() const { return bytes_; }
  /// All of it, to lend to a call.
  operator Workspace() const { return {data_, bytes_}; }

 private:
  Machine* machine_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mla
