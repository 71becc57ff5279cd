/// @file
/// cuBLAS, loaded at run time: what it reaches is the matrix ceiling, and nothing else here needs
/// it.
#pragma once

#include <cuda_runtime.h>

#include "bench/gpu_support.cuh"

namespace mla::bench {

class Cublas {
 public:
  Cublas() = default;
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;
  ~Cublas();
  /// kUnavailable if no libcublas.so (.13, .12, or plain) lies in the loader's path, beside a
  /// toolkit, or in a Python environment's nvidia packages.
  Status load();
  /// Enqueues c = a * b, all [size, size] in bf16, accumulated in fp32.
  Status multiply_bf16(int size, const void* a, const void* b, void* c, cudaStream_t stream);

 private:
  void* library_ = nullptr;
  void* handle_ = nullptr;
  GpuBuffer workspace_;  // ours, so that a multiply can be captured in a graph
};

}  // namespace mla::bench
