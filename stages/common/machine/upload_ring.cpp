#include "stages/common/machine/upload_ring.h"

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "stages/common/machine/cuda_status.h"
#endif

namespace mla {

#ifdef MLA_HAVE_CUDA

namespace {

using gpu::cuda_status;

constexpr size_t kSlots = 8;  // an append and its tables are three copies: two steps ahead, and one

}  // namespace

// Pinned memory, and the event after the last copy from it.
struct UploadRing::Slot {
  void* memory = nullptr;
  size_t bytes = 0;
  cudaEvent_t arrived = nullptr;

  Slot() = default;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() {
    if (arrived != nullptr) {
      cudaEventSynchronize(arrived);
      cudaEventDestroy(arrived);
    }
    cudaFreeHost(memory);
  }

  // Waits for the last copy, then makes room.
  Status acquire(size_t needed) {
    if (arrived == nullptr) {
      MLA_RETURN_IF_ERROR(cuda_status(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming),
                                      "cudaEventCreateWithFlags"));
    }
    MLA_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(arrived), "cudaEventSynchronize"));
    if (needed <= bytes) return {};
    cudaFreeHost(memory);
    memory = nullptr;
    const size_t size = std::max(needed, 2 * bytes);
    bytes = 0;
    const cudaError_t error = cudaMallocHost(&memory, size);
    if (error != cudaSuccess) {
      cudaGetLastError();  // not sticky
      memory = nullptr;
      return cuda_status(error, "cudaMallocHost of " + std::to_string(size) + " bytes");
    }
    bytes = size;
    return {};
  }
};

UploadRing::UploadRing(Machine& machine) : machine_(machine) {
  if (machine.kind() != MachineKind::kGpu) return;
  for (size_t i = 0; i < kSlots; ++i) slots_.push_back(std::make_unique<Slot>());
}

Status UploadRing::check(Stream stream) const {
  if (slots_.empty()) return {};
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  MLA_RETURN_IF_ERROR(cuda_status(
      cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture), "cudaStreamIsCapturing"));
  if (capture == cudaStreamCaptureStatusNone) return {};
  return {StatusCode::kInvalidArgument,
          "stream is being captured; append and write_tables must run outside graphs"};
}

Status UploadRing::copy(void* destination, const void* source, size_t bytes, Stream stream) {
  MLA_RETURN_IF_ERROR(check(stream));
  if (slots_.empty()) return machine_.copy_to_device(destination, source, bytes, stream);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Slot& slot = *slots_[next_];
  MLA_RETURN_IF_ERROR(slot.acquire(bytes));
  std::memcpy(slot.memory, source, bytes);
  MLA_RETURN_IF_ERROR(cuda_status(
      cudaMemcpyAsync(destination, slot.memory, bytes, cudaMemcpyHostToDevice, cuda_stream),
      "copy to the device"));
  MLA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(slot.arrived, cuda_stream), "cudaEventRecord"));
  next_ = (next_ + 1) % slots_.size();
  return {};
}

#else

struct UploadRing::Slot {};

UploadRing::UploadRing(Machine& machine) : machine_(machine) {}

Status UploadRing::check(Stream) const {
  return {};
}

Status UploadRing::copy(void* destination, const void* source, size_t bytes, Stream stream) {
  return machine_.copy_to_device(destination, source, bytes, stream);
}

#endif

UploadRing::~UploadRing() = default;

}  // namespace mla
