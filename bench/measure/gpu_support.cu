#include "bench/measure/gpu_support.cuh"

namespace mla::bench {
namespace {

constexpr int kThreads = 512;
constexpr int kLoadsInFlight = 8;

/// 0xBC00 ... 0xC000 and 0x3C00 ... 0x4000: as fp16 1 <= |x| < 2, as bf16 about 0.0078 <= |x| < 2;
/// both signs.
__global__ void fill_random(uint32_t* words, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + static_cast<uint32_t>(i >> 32);
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    x ^= x >> 16;
    words[i] = (x & 0x83ff83ffu) | 0x3c003c00u;
  }
}

/// Reads count 16-byte words. `sink` [1] is written only if their xor is one value in 2^32, so that
/// no load is dropped.
__global__ void __launch_bounds__(kThreads)
    read_all(const uint4* data, size_t count, uint32_t* sink) {
  const size_t step = size_t{gridDim.x} * kThreads * kLoadsInFlight;
  uint32_t seen = 0;
  for (size_t i = size_t{blockIdx.x} * kThreads * kLoadsInFlight + threadIdx.x; i < count;
       i += step) {
    uint4 words[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const size_t place = i + size_t{kThreads} * j;
      words[j] = place < count ? data[place] : uint4{};
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      seen ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
    }
  }
  if (seen == 0x9e3779b9u) *sink = seen;
}

}  // namespace

Status GpuBuffer::allocate(size_t bytes) {
  const cudaError_t error = cudaMalloc(&data_, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return {StatusCode::kOutOfMemory,
            "no " + std::to_string(bytes >> 20) +
                " MiB of device memory are left for the bench's own buffers"};
  }
  bytes_ = bytes;
  return cuda_status(error, "cudaMalloc");
}

Status GpuBuffer::allocate_random(size_t bytes, cudaStream_t stream) {
  MLA_RETURN_IF_ERROR(allocate(bytes));
  fill_random<<<1024, kThreads, 0, stream>>>(static_cast<uint32_t*>(data_), bytes / 4);
  return cuda_status(cudaGetLastError(), "fill_random");
}

Status GpuBuffer::enqueue_read(size_t bytes, cudaStream_t stream, unsigned blocks) const {
  const size_t count = bytes / sizeof(uint4);
  const size_t a_block = size_t{kThreads} * kLoadsInFlight;
  if (blocks == 0) blocks = static_cast<unsigned>((count + a_block - 1) / a_block);
  // The sink lies in the buffer itself: what it would overwrite is as random as what it writes.
  read_all<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(data_), count,
                                            static_cast<uint32_t*>(data_));
  return cuda_status(cudaGetLastError(), "read_all");
}

}  // namespace mla::bench
