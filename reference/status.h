/// @file
/// How every public function of the project reports failure.
#pragma once

#include <string>
#include <utility>

namespace mla {

/// What kind of thing went wrong. The message says which argument, its value, and what is allowed.
enum class StatusCode {
  kOk,                 ///< Nothing.
  kInvalidArgument,    ///< A dimension, dtype, pointer or flag outside the contract.
  kOutOfRange,         ///< A length past the block table, a page id past the cache.
  kWorkspaceTooSmall,  ///< Less workspace than the stage asks for.
  kUnavailable,        ///< No GPU, no driver, or built without CUDA.
  kUnsupported,        ///< There is a device, but this stage cannot run on it.
  kOutOfMemory,        ///< Memory of the host or of the device is short.
  kCudaError,          ///< An error that the CUDA runtime reports.
  kKernelRejected,  ///< The GPU model found a race, a deadlock or an illegal access in the kernel.
  kFileError,       ///< A file that is missing, truncated, or of the wrong shape or type.
  kRankFailed,      ///< Another rank of a parallel decode failed, or did not come in time.
};

/// The name of a code, for messages: "invalid argument", "out of range", ...
const char* to_string(StatusCode code);

/// A code and a message. Never thrown, never ignored.
class [[nodiscard]] Status {
 public:
  /// ok
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  /// Whether nothing went wrong.
  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  /// Names the argument, its value and what is allowed; empty if ok.
  const std::string& message() const { return message_; }
  /// "invalid argument: num_heads_q = 5 is not a multiple of num_heads_kv = 2"
  std::string to_string() const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace mla

/// Leaves the enclosing function with the status if it is not ok.
#define MLA_RETURN_IF_ERROR(expression)                                                  \
  do {                                                                                   \
    if (::mla::Status mla_status_ = (expression); !mla_status_.ok()) return mla_status_; \
  } while (false)
