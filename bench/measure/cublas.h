/// @file
/// cuBLAS, loaded at run time: what it reaches is the matrix ceiling, and the traditional pipeline
/// is made of it (cublas_pipeline.h).
#pragma once

#include <cuda_runtime.h>

#include "bench/measure/gpu_support.cuh"
#include "reference/problem.h"

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

  /// A batch of matrices, column-major as cuBLAS has them.
  struct Matrix {
    const void* data;
    int64_t leading;  ///< Elements from a column to the next
    int64_t stride;   ///< Elements from a matrix to the next
  };
  /// c is [m, n], a [m, k] (in memory [k, m] if transposed), b [k, n].
  struct Shape {
    int64_t m, n, k;
  };
  /// What a matrix holds. Sums are in fp64 where all is, else in fp32.
  enum class Type { kFp32 = 0, kFp64 = 1, kFp16 = 2, kBf16 = 14 };  // as cudaDataType has them
  /// Enqueues c = a * b for each of `count` matrices; a and b of type `in`, c of type `out`.
  Status multiply_batched(Type in, Type out, const Shape& shape, bool transpose_a, const Matrix& a,
                          const Matrix& b, const Matrix& c, int count, cudaStream_t stream);
  /// The same of 16 bits, c in fp32.
  Status multiply_batched(DType dtype, const Shape& shape, bool transpose_a, const Matrix& a,
                          const Matrix& b, const Matrix& c, int count, cudaStream_t stream);

  /// Matrices anywhere: their addresses lie in device memory.
  struct Matrices {
    void* const* data;  ///< [count]
    int64_t leading;
  };
  /// The same for matrices that lie anywhere.
  Status multiply_each(Type in, Type out, const Shape& shape, bool transpose_a, const Matrices& a,
                       const Matrices& b, const Matrices& c, int count, cudaStream_t stream);

 private:
  /// The stream of the next product, and our workspace for it.
  Status use_stream(cudaStream_t stream);

  void* library_ = nullptr;
  void* handle_ = nullptr;
  GpuBuffer workspace_;  // ours, so that a multiply can be captured in a graph
};

}  // namespace mla::bench
