/// @file
/// What the transport over GPUs asks of NCCL and of the CUDA runtime: one interface, so that its host code is
/// tested without either.
#pragma once

#include <memory>
#include <string>

#include "reference/status.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// One rank's communicator, its stream, and the events that tie this to a caller's. Nothing here waits: a
/// communicator that is at work says so in progress().
class NcclApi {
 public:
  /// Frees the communicator, if abort() has not.
  virtual ~NcclApi() = default;
  /// "NCCL 2.28.9 of /usr/lib/x86_64-linux-gnu/libnccl.so.2"
  virtual std::string description() const = 0;
  /// What rank 0 makes, and every rank connects by.
  virtual Status make_id(std::string* id) = 0;
  /// Begins to make the communicator.
  virtual Status connect(const std::string& id, int rank, int ranks) = 0;
  /// Whether the communicator is still at its last call; its error, if it has one.
  virtual Status progress(bool* is_busy) = 0;

  /// The communicator's own.
  virtual Stream stream() const = 0;
  /// @name Collectives on the communicator's stream; as of Transport
  /// @{
  virtual Status all_gather(const void* send, void* receive, size_t bytes) = 0;
  virtual Status all_to_all(const void* send, void* receive, size_t bytes) = 0;
  virtual Status reduce_scatter(const float* send, float* receive, size_t count) = 0;
  /// @}

  /// The communicator's stream.
  virtual Stream stream() const = 0;
  /// What is enqueued on the communicator's stream from now on waits for what is on `stream`.
  virtual Status follow(Stream stream) = 0;
  /// What is enqueued on `stream` from now on waits for what is on the communicator's.
  virtual Status lead(Stream stream) = 0;
  /// Whether all work on `stream` is done; the device's error, if it has one.
  virtual Status query(Stream stream, bool* is_done) = 0;
  /// Ends what the communicator does, on the device, too, and frees it.
  virtual void abort() = 0;
};

/// NCCL's library, found when the program runs: $MLA_NCCL_LIBRARY, where the build found it, or the system's.
/// Of the current CUDA device.
/// @return kUnavailable, saying what is missing: this build's header, the library, a GPU
Status make_nccl_api(std::unique_ptr<NcclApi>* api);

}  // namespace mla
