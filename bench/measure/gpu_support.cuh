/// @file
/// What the GPU side of the bench shares: buffers of random data, the kernel that reads one,
/// waiting with a limit.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#include "stages/common/machine/cuda_handles.h"

namespace mla::bench {

using gpu::cuda_status;
using gpu::CudaEvent;
using gpu::CudaStream;

/// No single step of the bench takes this long; a kernel that does is taken for hung.
inline constexpr auto kHangLimit = std::chrono::seconds(120);

/// Device memory that frees itself.
class GpuBuffer {
 public:
  GpuBuffer() = default;
  GpuBuffer(const GpuBuffer&) = delete;
  GpuBuffer& operator=(const GpuBuffer&) = delete;
  ~GpuBuffer() { cudaFree(data_); }
  Status allocate(size_t bytes);
  /// Allocates, and fills with 16-bit floats of either kind that are random in [-2, 2], none of
  /// them zero.
  Status allocate_random(size_t bytes, cudaStream_t stream);
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  /// Enqueues one read of the first `bytes`, 16 bytes per load, 8 loads in flight per thread. `blocks`
  /// 0: as many as give each thread 8 loads.
  Status enqueue_read(size_t bytes, cudaStream_t stream, unsigned blocks = 0) const;

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Waits until `query()` (cudaStreamQuery, cudaEventQuery) stops saying cudaErrorNotReady. After
/// kHangLimit: kCudaError, and `*hung` is set.
template <typename Query>
Status wait(Query&& query, bool* hung) {
  const auto deadline = std::chrono::steady_clock::now() + kHangLimit;
  cudaError_t error;
  while ((error = query()) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() > deadline) {
      *hung = true;
      return {StatusCode::kCudaError, "a kernel did not end within 120 s"};
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  if (cudaPeekAtLastError() == cudaErrorNotReady) cudaGetLastError();  // no error of a later call
  return cuda_status(error, "a kernel");
}

/// Time between two events that have passed, in us.
inline Status elapsed_us(const CudaEvent& begin, const CudaEvent& end, double* us) {
  float milliseconds = 0;
  MLA_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()),
                                  "cudaEventElapsedTime"));
  *us = 1e3 * static_cast<double>(milliseconds);
  return {};
}

}  // namespace mla::bench
