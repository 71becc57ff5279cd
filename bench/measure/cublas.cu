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
constexpr int kBf16 = static_cast<int>(Cublas::Type::kBf16);
constexpr int kComputeFp32 = 68;  // CUBLAS_COMPUTE_32F
constexpr int kComputeFp64 = 70;  // CUBLAS_COMPUTE_64F
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
using GemmBatchedEx = int(Handle, int, int, int, int, int, const void*, const void* const*, int,
                          int, const void* const*, int, int, const void*, void* const*, int, int,
                          int, int, int);

/// The factors of a product: c = 1 a b + 0 c, in the type of its sums.
struct Factors {
  float one = 1, zero = 0;
  double one_fp64 = 1, zero_fp64 = 0;
  bool fp64;
  explicit Factors(Cublas::Type in) : fp64(in == Cublas::Type::kFp64) {}
  const void* alpha() const { return fp64 ? static_cast<const void*>(&one_fp64) : &one; }
  const void* beta() const { return fp64 ? static_cast<const void*>(&zero_fp64) : &zero; }
  int compute() const { return fp64 ? kComputeFp64 : kComputeFp32; }
};

int narrow(int64_t value) {
  return static_cast<int>(value);
}

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
      function<GemmBatchedEx>(library_, "cublasGemmBatchedEx") == nullptr ||
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

Status Cublas::multiply_batched(Type in, Type out, const Shape& shape, bool transpose_a,
                                const Matrix& a, const Matrix& b, const Matrix& c, int count,
                                cudaStream_t stream) {
  const Factors factors(in);
  const int type = static_cast<int>(in);
  MLA_RETURN_IF_ERROR(use_stream(stream));
  return cublas_status(
      function<GemmStridedBatchedEx>(library_, "cublasGemmStridedBatchedEx")(
          handle_, transpose_a ? kTranspose : kNoTranspose, kNoTranspose, narrow(shape.m),
          narrow(shape.n), narrow(shape.k), factors.alpha(), a.data, type, narrow(a.leading),
          a.stride, b.data, type, narrow(b.leading), b.stride, factors.beta(),
          const_cast<void*>(c.data), static_cast<int>(out), narrow(c.leading), c.stride, count,
          factors.compute(), kDefaultAlgorithm),
      "cublasGemmStridedBatchedEx");
}

Status Cublas::multiply_batched(DType dtype, const Shape& shape, bool transpose_a, const Matrix& a,
                                const Matrix& b, const Matrix& c, int count, cudaStream_t stream) {
  const Type type = dtype == DType::kBFloat16 ? Type::kBf16 : Type::kFp16;
  return multiply_batched(type, Type::kFp32, shape, transpose_a, a, b, c, count, stream);
}

Status Cublas::multiply_each(Type in, Type out, const Shape& shape, bool transpose_a,
                             const Matrices& a, const Matrices& b, const Matrices& c, int count,
                             cudaStream_t stream) {
  const Factors factors(in);
  const int type = static_cast<int>(in);
  MLA_RETURN_IF_ERROR(use_stream(stream));
  return cublas_status(
      function<GemmBatchedEx>(library_, "cublasGemmBatchedEx")(
          handle_, transpose_a ? kTranspose : kNoTranspose, kNoTranspose, narrow(shape.m),
          narrow(shape.n), narrow(shape.k), factors.alpha(), a.data, type, narrow(a.leading),
          b.data, type, narrow(b.leading), factors.beta(), c.data, static_cast<int>(out),
          narrow(c.leading), count, factors.compute(), kDefaultAlgorithm),
      "cublasGemmBatchedEx");
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
