// NCCL behind NcclApi. The library is loaded when it is asked for, so that a program starts without it.
#include "stages/common/parallel/nccl_api.h"

#ifdef MLA_HAVE_NCCL

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <future>
#include <thread>
#include <utility>
#include <vector>

#include "stages/common/machine/cuda_status.h"

namespace mla {
namespace {

using gpu::cuda_status;

/// The functions that are called here, by their names.
struct Library {
  decltype(&ncclGetVersion) get_version = nullptr;
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRankConfig) comm_init = nullptr;
  decltype(&ncclCommGetAsyncError) comm_async_error = nullptr;
  decltype(&ncclCommAbort) comm_abort = nullptr;
  decltype(&ncclCommDestroy) comm_destroy = nullptr;
  decltype(&ncclGroupStart) group_start = nullptr;
  decltype(&ncclGroupEnd) group_end = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) receive = nullptr;
  decltype(&ncclAllGather) all_gather = nullptr;
  decltype(&ncclReduceScatter) reduce_scatter = nullptr;
  decltype(&ncclGetErrorString) error_string = nullptr;
  decltype(&ncclGetLastError) last_error = nullptr;
  std::string file;

  Status load(const std::string& name) {
    // Never closed: NCCL has threads of its own.
    void* const handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return {StatusCode::kUnavailable, dlerror()};
    file = name;
    std::string missing;
    const auto find = [&](const char* symbol, auto* function) {
      *function =
          reinterpret_cast<std::remove_reference_t<decltype(*function)>>(dlsym(handle, symbol));
      if (*function == nullptr) missing = symbol;
    };
    find("ncclGetVersion", &get_version);
    find("ncclGetUniqueId", &get_unique_id);
    find("ncclCommInitRankConfig", &comm_init);
    find("ncclCommGetAsyncError", &comm_async_error);
    find("ncclCommAbort", &comm_abort);
    find("ncclCommDestroy", &comm_destroy);
    find("ncclGroupStart", &group_start);
    find("ncclGroupEnd", &group_end);
    find("ncclSend", &send);
    find("ncclRecv", &receive);
    find("ncclAllGather", &all_gather);
    find("ncclReduceScatter", &reduce_scatter);
    find("ncclGetErrorString", &error_string);
    find("ncclGetLastError", &last_error);
    if (missing.empty()) return {};
    return {StatusCode::kUnavailable,
            name + " has no " + missing + ": NCCL 2.14 or newer is needed"};
  }
};

Status find_library(const Library** found) {
  static Library library;
  static const Status status = [] {
    std::vector<std::string> names;
    if (const char* set = std::getenv("MLA_NCCL_LIBRARY"); set != nullptr && *set != '\0') {
      names = {set};  // that one or none
    } else {
      if (*MLA_NCCL_LIBRARY != '\0') names.emplace_back(MLA_NCCL_LIBRARY);
      names.emplace_back("libnccl.so.2");
    }
    std::string why;
    for (const std::string& name : names) {
      const Status loaded = library.load(name);
      if (loaded.ok()) return loaded;
      why += (why.empty() ? "" : "; ") + loaded.message();
    }
    return Status(StatusCode::kUnavailable,
                  "no NCCL: " + why + ". MLA_NCCL_LIBRARY may name its libnccl.so.2");
  }();
  *found = &library;
  return status;
}

class NcclOfLibrary final : public NcclApi {
 public:
  explicit NcclOfLibrary(const Library& library) : nccl_(library) {}
  ~NcclOfLibrary() override {
    // Not finalised: that waits for the others, who may have failed.
    end(nccl_.comm_destroy);
    // What a graph still holds NCCL does not free; after a while that is left to the end of the process.
    if (ended_.valid()) ended_.wait_for(std::chrono::seconds(2));
    if (event_ != nullptr) cudaEventDestroy(event_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status open() {
    int least = 0, greatest = 0;
    MLA_RETURN_IF_ERROR(cuda_status(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                                    "cudaDeviceGetStreamPriorityRange"));
    // An exchange that waits behind a decode's blocks keeps other ranks waiting, too.
    MLA_RETURN_IF_ERROR(
        cuda_status(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
                    "cudaStreamCreateWithPriority"));
    return cuda_status(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming),
                       "cudaEventCreateWithFlags");
  }

  std::string description() const override {
    int version = 0;
    nccl_.get_version(&version);
    return "NCCL " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
           "." + std::to_string(version % 100) + " of " + nccl_.file;
  }
  Status make_id(std::string* id) override {
    ncclUniqueId made;
    MLA_RETURN_IF_ERROR(status_of(nccl_.get_unique_id(&made), "ncclGetUniqueId"));
    id->assign(made.internal, sizeof made.internal);
    return {};
  }
  Status connect(const std::string& id, int rank, int ranks) override {
    ncclUniqueId unique;
    if (id.size() != sizeof unique.internal) {
      return {StatusCode::kInvalidArgument, "rank 0's NCCL has ids of another size"};
    }
    std::memcpy(unique.internal, id.data(), id.size());
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    rank_ = rank;
    ranks_ = ranks;
    return status_of(nccl_.comm_init(&comm_, ranks, unique, rank, &config),
                     "ncclCommInitRankConfig");
  }
  Status progress(bool* is_busy) override {
    ncclResult_t state = ncclSuccess;
    MLA_RETURN_IF_ERROR(status_of(nccl_.comm_async_error(comm_, &state), "ncclCommGetAsyncError"));
    *is_busy = state == ncclInProgress;
    return status_of(state, "NCCL");
  }

  Stream stream() const override { return stream_; }
  Status all_gather(const void* send, void* receive, size_t bytes) override {
    return status_of(nccl_.all_gather(send, receive, bytes, ncclChar, comm_, stream_),
                     "ncclAllGather");
  }
  Status all_to_all(const void* send, void* receive, size_t bytes) override {
    MLA_RETURN_IF_ERROR(status_of(nccl_.group_start(), "ncclGroupStart"));
    Status status;
    for (int rank = 0; rank < ranks_ && status.ok(); ++rank) {
      if (rank == rank_) continue;
      const size_t place = static_cast<size_t>(rank) * bytes;
      status = status_of(
          nccl_.send(static_cast<const char*>(send) + place, bytes, ncclChar, rank, comm_, stream_),
          "ncclSend");
      if (!status.ok()) break;
      status = status_of(
          nccl_.receive(static_cast<char*>(receive) + place, bytes, ncclChar, rank, comm_, stream_),
          "ncclRecv");
    }
    const Status ended = status_of(nccl_.group_end(), "ncclGroupEnd");
    return status.ok() ? ended : status;
  }
  Status reduce_scatter(const float* send, float* receive, size_t count) override {
    return status_of(nccl_.reduce_scatter(send, receive, count, ncclFloat, ncclSum, comm_, stream_),
                     "ncclReduceScatter");
  }

  Stream stream() const override { return stream_; }
  Status follow(Stream stream) override {
    return order(static_cast<cudaStream_t>(stream), stream_);
  }
  Status lead(Stream stream) override { return order(stream_, static_cast<cudaStream_t>(stream)); }
  Status query(Stream stream, bool* is_done) override {
    const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(stream));
    *is_done = state == cudaSuccess;
    if (state != cudaErrorNotReady) return cuda_status(state, "the decode's stream");
    if (cudaPeekAtLastError() == cudaErrorNotReady) cudaGetLastError();  // no error of a later call
    return {};
  }
  void abort() override { end(nccl_.comm_abort); }

 private:
  /// On a thread of its own: NCCL returns when no graph holds calls of the communicator any more.
  void end(decltype(&ncclCommAbort) how) {
    if (comm_ == nullptr) return;
    std::packaged_task<void()> task([how, comm = std::exchange(comm_, nullptr)] { how(comm); });
    ended_ = task.get_future();
    std::thread(std::move(task)).detach();
  }
  /// What comes on `second` waits for what is on `first`. A captured stream takes the other along.
  Status order(cudaStream_t first, cudaStream_t second) {
    MLA_RETURN_IF_ERROR(cuda_status(cudaEventRecord(event_, first), "cudaEventRecord"));
    return cuda_status(cudaStreamWaitEvent(second, event_, 0), "cudaStreamWaitEvent");
  }
  Status status_of(ncclResult_t result, const char* what) const {
    if (result == ncclSuccess || result == ncclInProgress) return {};
    std::string message = what + (": " + std::string(nccl_.error_string(result)));
    if (const char* more = nccl_.last_error(nullptr); more != nullptr && *more != '\0') {
      message += ": " + std::string(more);
    }
    return {result == ncclRemoteError ? StatusCode::kRankFailed : StatusCode::kCudaError, message};
  }

  const Library& nccl_;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
  int rank_ = 0, ranks_ = 0;
  std::future<void> ended_;
};

}  // namespace

Status make_nccl_api(std::unique_ptr<NcclApi>* api) {
  std::string why_not;
  if (gpu_machine(&why_not) == nullptr) return {StatusCode::kUnavailable, why_not};
  const Library* library = nullptr;
  MLA_RETURN_IF_ERROR(find_library(&library));
  auto made = std::make_unique<NcclOfLibrary>(*library);
  MLA_RETURN_IF_ERROR(made->open());
  *api = std::move(made);
  return {};
}

}  // namespace mla

#else

namespace mla {

Status make_nccl_api(std::unique_ptr<NcclApi>*) {
#ifdef MLA_HAVE_CUDA
  return {StatusCode::kUnavailable, "no NCCL: built without its header nccl.h (NCCL_ROOT)"};
#else
  return {StatusCode::kUnavailable, "no NCCL: built without the CUDA Toolkit (12.8 or newer)"};
#endif
}

}  // namespace mla

#endif
