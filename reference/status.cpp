#include "reference/status.h"

namespace mla {

const char* to_string(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return "ok";
    case StatusCode::kInvalidArgument:
      return "invalid argument";
    case StatusCode::kOutOfRange:
      return "out of range";
    case StatusCode::kWorkspaceTooSmall:
      return "workspace too small";
    case StatusCode::kUnavailable:
      return "unavailable";
    case StatusCode::kUnsupported:
      return "unsupported";
    case StatusCode::kOutOfMemory:
      return "out of memory";
    case StatusCode::kCudaError:
      return "CUDA error";
    case StatusCode::kKernelRejected:
      return "kernel rejected by the GPU model";
    case StatusCode::kFileError:
      return "file error";
    case StatusCode::kRankFailed:
      return "another rank failed";
  }
  return "unknown";
}

std::string Status::to_string() const {
  if (ok()) return "ok";
  return std::string(mla::to_string(code_)) + ": " + message_;
}

}  // namespace mla
