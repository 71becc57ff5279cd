#include "bench/cublas.h"

#include <dlfcn.h>
#include <glob.h>

#include <string>
#include <vector>

namespace mla::bench {
namespace {

// From cublas_api.h and library_types.h, whose values are fixed by the library's binary interface.
using Handle = void*;
constexpr int kNoTranspose = 0;
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

template <typename Function>
Function* function(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

Status cublas_status(int error, const char* what) {
  if (error == 0) return {};
  return {StatusCode::kCudaError, std::string(what) + ": cuBLAS status " + std::to_string(error)};
}

/// Where cuBLAS is looked for, in this order; a slash means a path, with wildcards.
std::vector<std::string> candidates() {
  const std::string names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
  const char* const folders[] = {
      "/usr/local/cuda/lib64/",
      "/usr/local/cuda-*/lib64/",
      "/usr/local/cuda-*/targets/*/lib/",
      "/usr/lib/*-linux-gnu/",
      "/opt/*/.venv/lib/python3*/site-packages/nvidia/*/lib/",
      "/opt/*/lib/python3*/site-packages/nvidia/*/lib/",
      "/usr/local/lib/python3*/*-packages/nvidia/*/lib/",
      "/usr/lib/python3*/*-packages/nvidia/*/lib/",
  };
  std::vector<std::string> result(std::begin(names), std::end(names));
  for (const char* folder : folders) {
    for (const std::string& name : names) {
      glob_t found = {};
      if (glob((folder + name).c_str(), 0, nullptr, &found) == 0) {
        result.insert(result.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
      }
      globfree(&found);
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
    return {StatusCode::kUnavailable, "cuBLAS not found: matrix ceiling not measured"};
  }
  auto* create = function<Create>(library_, "cublasCreate_v2");
  auto* set_workspace = function<SetWorkspace>(library_, "cublasSetWorkspace_v2");
  if (create == nullptr || set_workspace == nullptr ||
      function<Destroy>(library_, "cublasDestroy_v2") == nullptr ||
      function<SetStream>(library_, "cublasSetStream_v2") == nullptr ||
      function<GemmEx>(library_, "cublasGemmEx") == nullptr) {
    return {StatusCode::kUnavailable, "cuBLAS lacks a function: matrix ceiling not measured"};
  }
  if (const int error = create(&handle_); error != 0) {
    handle_ = nullptr;
    return {StatusCode::kUnavailable, "cuBLAS did not start (status " + std::to_string(error) +
                                          "): matrix ceiling not measured"};
  }
  return workspace_.allocate(kWorkspaceBytes);
}

Status Cublas::multiply_bf16(int size, const void* a, const void* b, void* c, cudaStream_t stream) {
  const float one = 1, zero = 0;
  MLA_RETURN_IF_ERROR(cublas_status(
      function<SetStream>(library_, "cublasSetStream_v2")(handle_, stream), "cublasSetStream"));
  // After every change of stream: that puts the library's own workspace back.
  MLA_RETURN_IF_ERROR(cublas_status(function<SetWorkspace>(library_, "cublasSetWorkspace_v2")(
                                        handle_, workspace_.data(), workspace_.bytes()),
                                    "cublasSetWorkspace"));
  return cublas_status(
      function<GemmEx>(library_, "cublasGemmEx")(handle_, kNoTranspose, kNoTranspose, size, size,
                                                 size, &one, a, kBf16, size, b, kBf16, size, &zero,
                                                 c, kBf16, size, kComputeFp32, kDefaultAlgorithm),
      "cublasGemmEx");
}

}  // namespace mla::bench
