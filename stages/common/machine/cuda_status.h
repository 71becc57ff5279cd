/// @file
/// The CUDA runtime's errors as a Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "reference/status.h"

namespace mla::gpu {

/// @return ok, or kOutOfMemory or kCudaError with "what: reason".
inline Status cuda_status(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  const StatusCode code =
      error == cudaErrorMemoryAllocation ? StatusCode::kOutOfMemory : StatusCode::kCudaError;
  return {code, what + ": " + cudaGetErrorString(error)};
}

}  // namespace mla::gpu
