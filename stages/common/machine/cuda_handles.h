/// @file
/// Streams, events and graphs of CUDA, owned by objects. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "stages/common/machine/launch.h"

namespace mla::gpu {

/// Owns one handle of the CUDA runtime, which `destroy` frees.
template <typename Handle, cudaError_t (*destroy)(Handle)>
class CudaHandle {
 public:
  CudaHandle() = default;
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~CudaHandle() { reset(); }

  /// The handle, or null.
  Handle get() const { return handle_; }
  /// Where a call of the runtime that creates a handle puts it. Frees what was held before.
  Handle* receive() {
    reset();
    return &handle_;
  }
  /// Frees the handle.
  void reset() {
    if (handle_ != nullptr) destroy(std::exchange(handle_, nullptr));
  }

 private:
  Handle handle_ = nullptr;
};

/// A stream, destroyed with the object.
using CudaStream = CudaHandle<cudaStream_t, cudaStreamDestroy>;
/// The same for an event.
using CudaEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;
/// The same for a graph as captured.
using CudaGraph = CudaHandle<cudaGraph_t, cudaGraphDestroy>;
/// The same for a graph that can be launched.
using CudaGraphExec = CudaHandle<cudaGraphExec_t, cudaGraphExecDestroy>;

/// Makes a stream that does not wait for the default stream.
inline Status create(CudaStream* stream) {
  return cuda_status(cudaStreamCreateWithFlags(stream->receive(), cudaStreamNonBlocking),
                     "cudaStreamCreateWithFlags");
}

/// Makes an event that records its time.
inline Status create(CudaEvent* event) {
  return cuda_status(cudaEventCreate(event->receive()), "cudaEventCreate");
}

/// Captures what enqueue(stream), which returns a Status, puts on the stream, ready to be launched
/// as a graph. Nothing runs.
/// @return The error of `enqueue` or of the runtime; the stream is then no longer captured.
template <typename Enqueue>
Status capture(cudaStream_t stream, Enqueue&& enqueue, CudaGraphExec* executable) {
  MLA_RETURN_IF_ERROR(cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                                  "cudaStreamBeginCapture"));
  const Status enqueued = enqueue(stream);
  CudaGraph graph;
  const cudaError_t ended = cudaStreamEndCapture(stream, graph.receive());
  if (!enqueued.ok()) {
    cudaGetLastError();  // the broken capture's own error says less than the cause
    return enqueued;
  }
  MLA_RETURN_IF_ERROR(cuda_status(ended, "cudaStreamEndCapture"));
  return cuda_status(cudaGraphInstantiate(executable->receive(), graph.get(), 0),
                     "cudaGraphInstantiate");
}

}  // namespace mla::gpu
