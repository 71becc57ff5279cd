#include "bench/measure/ceilings.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bench/measure/cublas.h"
#include "bench/measure/gpu_support.cuh"

namespace mla::bench {
namespace {

constexpr int kFmaThreads = 256;
constexpr int kFmaBlocks = 8;  // a multiprocessor: all of its 2048 threads
constexpr int kFmaChains =
    8;  // independent, so that the latency of 4 cycles is hidden many times over
constexpr int kFmaSteps = 65536;
constexpr float kFmaFactor =
    0.99991f;  // with kFmaTerm: a slow way to 1.9, full mantissas all along
constexpr float kFmaTerm = 0.000171f;

constexpr int kSharedThreads = 1024;
constexpr int kSharedSteps = 2048;
constexpr int kSharedLoads = 16;  // a step
constexpr size_t kSharedWords = size_t{2} * kSharedThreads;

__global__ void empty_kernel() {}

/// out[thread] = sum of its chains, each kFmaSteps of x = x * factor + term. 2 FLOP per step: the
/// host repeats a few threads' chains with fmaf and compares bits, so every one of them was
/// executed.
__global__ void __launch_bounds__(kFmaThreads, kFmaBlocks)
    fma_chains(float factor, float term, float* out) {
  float x[kFmaChains];
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) x[i] = static_cast<float>(threadIdx.x + 256 * i) / 1024;
#pragma unroll 16
  for (int step = 0; step < kFmaSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kFmaChains; ++i) x[i] = __fmaf_rn(x[i], factor, term);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFmaChains; ++i) sum += x[i];
  out[blockIdx.x * kFmaThreads + threadIdx.x] = sum;
}

/// The same on the host.
float fma_chain_sum(unsigned thread) {
  float sum = 0;
  for (unsigned i = 0; i < kFmaChains; ++i) {
    float x = static_cast<float>(thread + 256 * i) / 1024;
    for (int step = 0; step < kFmaSteps; ++step) x = std::fmaf(x, kFmaFactor, kFmaTerm);
    sum += x;
  }
  return sum;
}

/// Every thread loads 16 bytes at a time from shared memory, neighbours from neighbouring places:
/// no bank conflicts. clocks[block] = cycles for kSharedSteps * kSharedLoads loads per thread.
__global__ void __launch_bounds__(kSharedThreads) read_shared(long long* clocks, uint32_t* sink) {
  __shared__ uint4 words[kSharedWords];
  for (size_t i = threadIdx.x; i < kSharedWords; i += kSharedThreads) {
    const auto value = static_cast<uint32_t>(i * 0x9e3779b9u);
    words[i] = {value, value ^ 0x55555555u, ~value, value * 3};
  }
  __syncthreads();
  const long long begin = clock64();
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(words + threadIdx.x));
  uint32_t seen = 0;
  for (int step = 0; step < kSharedSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kSharedLoads; ++i) {
      uint4 word;
      // ld.volatile: ptxas may not load once and reuse, which asm volatile alone allows
      asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                   : "r"(place + static_cast<uint32_t>(i % 2 * kSharedThreads * sizeof(uint4))));
      seen ^= word.x ^ word.y ^ word.z ^ word.w;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
  if (seen == 0x9e3779b9u) *sink = seen;
}

Status copy_back(void* host, const void* device, size_t bytes) {
  return cuda_status(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

/// Median of cold runs, in s.
Status cold_seconds(Runner& runner, int runs, const Operation& operation, double* seconds) {
  int handle = 0;
  std::vector<double> samples, unused;
  MLA_RETURN_IF_ERROR(runner.prepare(operation, &handle));
  MLA_RETURN_IF_ERROR(runner.run_cold(handle, 2, &unused));
  MLA_RETURN_IF_ERROR(runner.run_cold(handle, runs, &samples));
  *seconds = 1e-6 * summarize(samples).median;
  return {};
}

cudaStream_t cuda(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}

Status measure_read(Runner& runner, unsigned multiprocessors, Ceilings* ceilings) {
  size_t free_bytes = 0, total_bytes = 0;
  MLA_RETURN_IF_ERROR(cuda_status(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo"));
  const size_t large = std::min(size_t{1208} << 20, free_bytes / 2 / 4096 * 4096);
  const size_t small = std::min(size_t{302} * 1000 * 1000 / 4096 * 4096, large);
  GpuBuffer buffer;
  MLA_RETURN_IF_ERROR(buffer.allocate_random(large, nullptr));
  MLA_RETURN_IF_ERROR(cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
  const auto rate = [&](size_t bytes, double* best) -> Status {
    *best = 0;
    for (const unsigned blocks :
         {0u, 4 * multiprocessors}) {  // many short blocks, or few long ones
      double seconds = 0;
      MLA_RETURN_IF_ERROR(cold_seconds(
          runner, 25, [&](Stream s) { return buffer.enqueue_read(bytes, cuda(s), blocks); },
          &seconds));
      *best = std::max(*best, static_cast<double>(bytes) / seconds);
    }
    return {};
  };
  MLA_RETURN_IF_ERROR(rate(large, &ceilings->read));
  return rate(small, &ceilings->read_302mb);
}

Status measure_fp32(Runner& runner, unsigned multiprocessors, Ceilings* ceilings) {
  const unsigned blocks = multiprocessors * kFmaBlocks;
  const size_t threads = size_t{blocks} * kFmaThreads;
  GpuBuffer out;
  MLA_RETURN_IF_ERROR(out.allocate(threads * sizeof(float)));
  double seconds = 0;
  MLA_RETURN_IF_ERROR(cold_seconds(
      runner, 9,
      [&](Stream s) {
        fma_chains<<<blocks, kFmaThreads, 0, cuda(s)>>>(kFmaFactor, kFmaTerm,
                                                        static_cast<float*>(out.data()));
        return cuda_status(cudaGetLastError(), "fma_chains");
      },
      &seconds));
  std::vector<float> sums(threads);
  MLA_RETURN_IF_ERROR(copy_back(sums.data(), out.data(), out.bytes()));
  for (const unsigned thread : {0u, 1u, 97u, 255u}) {
    const float expected = fma_chain_sum(thread);
    if (sums[thread] != expected || sums[threads - kFmaThreads + thread] != expected) {
      return {StatusCode::kCudaError,
              "the fp32 ceiling's kernel computed something else than its FMAs"};
    }
  }
  ceilings->fp32 = 2.0 * kFmaChains * kFmaSteps * static_cast<double>(threads) / seconds;
  return {};
}

Status measure_shared(Runner& runner, unsigned multiprocessors, Ceilings* ceilings) {
  GpuBuffer out;
  MLA_RETURN_IF_ERROR(out.allocate((multiprocessors + 1) * sizeof(long long)));
  auto* clocks = static_cast<long long*>(out.data());
  double seconds = 0;
  MLA_RETURN_IF_ERROR(cold_seconds(
      runner, 9,
      [&](Stream s) {
        read_shared<<<multiprocessors, kSharedThreads, 0, cuda(s)>>>(
            clocks, reinterpret_cast<uint32_t*>(clocks + multiprocessors));
        return cuda_status(cudaGetLastError(), "read_shared");
      },
      &seconds));
  std::vector<long long> cycles(multiprocessors);
  MLA_RETURN_IF_ERROR(copy_back(cycles.data(), clocks, multiprocessors * sizeof(long long)));
  constexpr double kBytes = 16.0 * kSharedThreads * kSharedSteps * kSharedLoads;
  ceilings->shared = kBytes * multiprocessors / seconds;
  ceilings->shared_bytes_per_clock = kBytes / summarize({cycles.begin(), cycles.end()}).median;
  return {};
}

Status measure_matrix(Runner& runner, Ceilings* ceilings) {
  constexpr int kSize = 8192;
  constexpr double kFlop = 2.0 * kSize * kSize * kSize;
  constexpr size_t kMatrixBytes = size_t{2} * kSize * kSize;
  Cublas cublas;
  if (const Status loaded = cublas.load(); !loaded.ok()) {
    ceilings->matrix_note = loaded.message() + ": matrix ceiling not measured";
    return {};
  }
  GpuBuffer a, b, c;
  MLA_RETURN_IF_ERROR(a.allocate_random(kMatrixBytes, nullptr));
  MLA_RETURN_IF_ERROR(b.allocate_random(kMatrixBytes, nullptr));
  MLA_RETURN_IF_ERROR(c.allocate(kMatrixBytes));
  MLA_RETURN_IF_ERROR(cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
  const auto multiply = [&](Stream s) {
    return cublas.multiply_bf16(kSize, a.data(), b.data(), c.data(), cuda(s));
  };
  MLA_RETURN_IF_ERROR(
      multiply(nullptr));  // outside the graph once: it loads and chooses its kernels here
  double seconds = 0;
  Readings unused;
  MLA_RETURN_IF_ERROR(cold_seconds(runner, 36, multiply, &seconds));
  ceilings->matrix_cold = kFlop / seconds;
  int handle = 0;
  std::vector<double> samples;
  MLA_RETURN_IF_ERROR(runner.prepare(multiply, &handle));
  MLA_RETURN_IF_ERROR(
      runner.run_sustained(handle, 1e6 * seconds, kTensorCoreWarmup, 36, &samples, &unused));
  ceilings->matrix_sustained = kFlop / (1e-6 * summarize(samples).median);
  return {};
}

}  // namespace

Status measure_ceilings(Runner& runner, const std::function<void(const std::string&)>& progress,
                        Ceilings* ceilings) {
  const auto multiprocessors = static_cast<unsigned>(gpu::device_limits().multiprocessors);
  progress("ceilings: empty launch");
  MLA_RETURN_IF_ERROR(cold_seconds(
      runner, 100,
      [](Stream s) {
        empty_kernel<<<1, 32, 0, cuda(s)>>>();
        return cuda_status(cudaGetLastError(), "empty_kernel");
      },
      &ceilings->launch));
  progress("ceilings: read bandwidth");
  MLA_RETURN_IF_ERROR(measure_read(runner, multiprocessors, ceilings));
  progress("ceilings: fp32 FMA rate");
  MLA_RETURN_IF_ERROR(measure_fp32(runner, multiprocessors, ceilings));
  progress("ceilings: shared-memory bandwidth");
  MLA_RETURN_IF_ERROR(measure_shared(runner, multiprocessors, ceilings));
  progress("ceilings: cuBLAS bf16 8192^3");
  const Status matrix = measure_matrix(runner, ceilings);
  if (runner.lost()) return matrix;
  if (!matrix.ok()) ceilings->matrix_note = matrix.message() + ": matrix ceiling not measured";
  runner.clear();
  return {};
}

}  // namespace mla::bench
