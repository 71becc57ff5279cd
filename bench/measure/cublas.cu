#include "bench/measure/cublas.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace mla::bench {
namespace {

// From cublas_api.h and library_types.h, whose values are fixed by the library's binary interface.
using Handle = void*;
constexpr int kNoTranspose = 0;
constexpr int kTranspose = 1;
constexpr int kFp32 = 0;          // CUDA_R_32F
constexpr int kFp16 = 2;          // CUDA_R_16F
constexpr int kBf16 = 14;         // CUDA_R_16BF
constexpr int kComputeFp32 = 68;  // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
using Create = int(Handle*);
using Destroy = int(Handle);
using SetStream = int(Handle, cudaStream_t);
using SetWorkspace = int(Handle, void*, size_t);
using GemmEx = int(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*,
                   int, int, const void*, void*, int, int, int, int);
using GemmStridedBatchedEx = int(Handle, int, int, int, int, int, const void*, const void*, int,
                                 int, long long, const void*, int, int, long long, const void*,
                                 void*, int, int, long long, int, int, int);

template <typename Function>
Function* function(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

Status cublas_status(int error, const char* what) {
  if (error == 0) return {};
  return {StatusCode::kCudaError, std::string(what) + ": cuBLAS status " + std::to_string(error)};
}

/// Where cuBLAS is looked for, in this order: MLA_CUBLAS alone if that is set, else where the loader
/// and a CUDA Toolkit have it.
std::vector<std::string> candidates() {
  if (const char* file = std::getenv("MLA_CUBLAS")) return {file};
  std::vector<std::string> folders = {""};  // the loader's own
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* toolkit = std::getenv(variable)) {
      folders.push_back(std::string(toolkit) + "/lib64/");
    }
  }
  folders.push_back("/usr/local/cuda/lib64/");
  std::vector<std::string> result;
  for (const std::string& folder : folders) {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      result.push_back(folder + name);
    }
  }
  return result;
}

}  // namespace

Cublas::~Cublas() {
  if (handle_ != nullptr) function<Destroy>(library_, "cublasDestroy_v2")(handle_);
  // The library stays loaded: its kernels may still be known to the runtime.
}

Status Cublas::load() {
  for (const std::string& candidate : candidates()) {
    library_ = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ != nullptr) break;
  }
  if (library_ == nullptr) {
    return {StatusCode::kUnavailable, "cuBLAS not found (MLA_CUBLAS can name its file)"};
  }
  auto* create = function<Create>(library_, "cublasCreate_v2");
  auto* set_workspace = function<SetWorkspace>(library_, "cublasSetWorkspace_v2");
  if (create == nullptr || set_workspace == nullptr ||
      function<Destroy>(library_, "cublasDestroy_v2") == nullptr ||
      function<SetStream>(library_, "cublasSetStream_v2") == nullptr ||
      function<GemmEx>(library_, "cublasGemmEx") == nullptr ||
      function<GemmStridedBatchedEx>(library_, "cublasGemmStridedBatchedEx") == nullptr) {
    return {StatusCode::kUnavailable, "cuBLAS lacks a function"};
  }
  if (const int error = create(&handle_); error != 0) {
    handle_ = nullptr;
    return {StatusCode::kUnavailable,
            "cuBLAS did not start (status " + std::to_string(error) + ")"};
  }
  return workspace_.allocate(kWorkspaceBytes);
}

Status Cublas::use_stream(cudaStream_t stream) {
  MLA_RETURN_IF_ERROR(cublas_status(
      function<SetStream>(library_, "cublasSetStream_v2")(handle_, stream), "cublasSetStream"));
  // After every change of stream: that puts the library's own workspace back.
  return cublas_status(function<SetWorkspace>(library_, "cublasSetWorkspace_v2")(
                           handle_, workspace_.data(), workspace_.bytes()),
                       "cublasSetWorkspace");
}

Status Cublas::multiply_batched(DType dtype, const Shape& shape, bool transpose_a, const Matrix& a,
                                const Matrix& b, const Matrix& c, int count, cudaStream_t stream) {
  const float one = 1, zero = 0;
  const int type = dtype == DType::kBFloat16 ? kBf16 : kFp16;
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  MLA_RETURN_IF_ERROR(use_stream(stream));
  return cublas_status(
      function<GemmStridedBatchedEx>(library_, "cublasGemmStridedBatchedEx")(
          handle_, transpose_a ? kTranspose : kNoTranspose, kNoTranspose, narrow(shape.m),
          narrow(shape.n), narrow(shape.k), &one, a.data, type, narrow(a.leading), a.stride, b.data,
          type, narrow(b.leading), b.stride, &zero, const_cast<void*>(c.data), kFp32,
          narrow(c.leading), c.stride, count, kComputeFp32, kDefaultAlgorithm),
      "cublasGemmStridedBatchedEx");
}

Status Cublas::multiply_bf16(int size, const void* a, const void* b, void* c, cudaStream_t stream) {
  const float one = 1, zero = 0;
  MLA_RETURN_IF_ERROR(use_stream(stream));
  return cublas_status(
      function<GemmEx>(library_, "cublasGemmEx")(handle_, kNoTranspose, kNoTranspose, size, size,
                                                 size, &one, a, kBf16, size, b, kBf16, size, &zero,
                                                 c, kBf16, size, kComputeFp32, kDefaultAlgorithm),
      "cublasGemmEx");
}

}  // namespace mla::bench
