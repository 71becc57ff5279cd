#include "bench/measure/cublas_pipeline.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "bench/measure/cublas.h"
#include "bench/measure/over_block.cuh"

namespace mla::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMostScoreBytes = int64_t{4} << 30;
constexpr int kRowVectors = kHeadDimQK * 2 / 16;  // a cache row in 16-byte words

/// Sizes of one call.
struct Sizes {
  int64_t tokens;  ///< A sequence, padded
  int64_t rows;    ///< Query rows per sequence
  int64_t chunk;   ///< Sequences at a time
  explicit Sizes(const Problem& problem)
      : tokens(problem.max_seqlen_k()),
        rows(int64_t{problem.seqlen_q} * problem.num_heads_q),
        chunk(std::clamp<int64_t>(kMostScoreBytes / (rows * tokens * 4), 1, problem.batch)) {}
};

/// Parts of the workspace, each for one chunk.
struct Parts {
  uint4* gathered;  ///< [chunk, tokens, 576] of 16 bits
  float* scores;    ///< [chunk, rows, tokens]
  void* weights;    ///< [chunk, rows, tokens] of 16 bits
  float* products;  ///< [chunk, rows, 512]
  float* sums;      ///< [chunk, rows]
  size_t bytes;
  Parts(const Sizes& sizes, void* workspace) {
    auto* const begin = static_cast<std::byte*>(workspace);
    size_t offset = 0;
    const auto take = [&](int64_t elements, size_t size) {
      void* const place = begin + offset;
      offset += (static_cast<size_t>(elements) * size + 255) / 256 * 256;
      return place;
    };
    const int64_t pairs = sizes.chunk * sizes.rows * sizes.tokens;
    gathered = static_cast<uint4*>(take(sizes.chunk * sizes.tokens * kHeadDimQK, 2));
    scores = static_cast<float*>(take(pairs, 4));
    weights = take(pairs, 2);
    products = static_cast<float*>(take(sizes.chunk * sizes.rows * kHeadDimV, 4));
    sums = static_cast<float*>(take(sizes.chunk * sizes.rows, 4));
    bytes = offset;
  }
};

/// A warp per row: a token of the paged cache, or zeros past a sequence's end, where the cache may hold
/// anything.
__global__ void __launch_bounds__(kThreads)
    gather_rows(Problem problem, Tensors tensors, int first, int64_t tokens, int64_t rows,
                uint4* gathered) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (row >= rows) return;
  const int sequence = static_cast<int>(first + row / tokens);
  const int token = static_cast<int>(row % tokens);
  const bool there = token < tensors.seqlens_k[sequence];
  const uint4* source = nullptr;
  if (there) {
    source = static_cast<const uint4*>(tensors.kv_cache) +
             cache_place(problem, tensors, tensors.table_row(sequence), token, 0) / 8;
  }
  for (int i = static_cast<int>(threadIdx.x % kWarp); i < kRowVectors; i += kWarp) {
    gathered[row * kRowVectors + i] = there ? source[i] : uint4{};
  }
}

/// A block per row. T: the 16-bit type.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    softmax(Problem problem, Tensors tensors, int first, Sizes sizes, const float* scores,
            T* weights, float* sums) {
  const int64_t row = blockIdx.x;
  const int64_t sequence = first + row / sizes.rows;
  const auto packed = static_cast<int>(row % sizes.rows);
  const int query = packed / problem.num_heads_q;
  const int head = packed % problem.num_heads_q;
  const int hidden = problem.causal ? problem.seqlen_q - 1 - query : 0;
  const int64_t visible = max(tensors.seqlens_k[sequence] - hidden, 0);
  scores += row * sizes.tokens;
  weights += row * sizes.tokens;

  float largest = -INFINITY;
  for (int64_t t = threadIdx.x; t < visible; t += kThreads) largest = fmaxf(largest, scores[t]);
  largest = over_block<kThreads>(largest, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int64_t t = threadIdx.x; t < sizes.tokens; t += kThreads) {
    const float weight = t < visible ? expf(problem.softmax_scale * (scores[t] - largest)) : 0.0f;
    weights[t] = static_cast<T>(weight);
    sum += weight;
  }
  sum = over_block<kThreads>(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) {
    sums[row] = sum;
    tensors.lse[(sequence * problem.num_heads_q + head) * problem.seqlen_q + query] =
        visible == 0 ? INFINITY : problem.softmax_scale * largest + logf(sum);
  }
}

/// One thread per element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    divide(const float* products, const float* sums, int64_t elements, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const float sum = sums[i / kHeadDimV];
  out[i] = static_cast<T>(sum == 0 ? 0.0f : products[i] / sum);
}

unsigned grid_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

/// Loaded once and never unloaded: its kernels may be in graphs.
Cublas& cublas() {
  static Cublas& library = *new Cublas;
  return library;
}

template <typename T>
Status run_chunk(const Problem& problem, const Tensors& tensors, int first, int count,
                 const Sizes& sizes, const Parts& parts, cudaStream_t stream) {
  const int64_t rows = count * sizes.rows;
  gather_rows<<<grid_for(count * sizes.tokens * kWarp), kThreads, 0, stream>>>(
      problem, tensors, first, sizes.tokens, count * sizes.tokens, parts.gathered);
  MLA_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "gather_rows"));

  // Row-major matrices are cuBLAS's transposed: S^T = K Q^T, O^T = V^T P^T.
  const T* const q = static_cast<const T*>(tensors.q) + first * sizes.rows * kHeadDimQK;
  const Cublas::Matrix keys{parts.gathered, kHeadDimQK, sizes.tokens * kHeadDimQK};
  const Cublas::Matrix queries{q, kHeadDimQK, sizes.rows * kHeadDimQK};
  const Cublas::Matrix weights{parts.weights, sizes.tokens, sizes.rows * sizes.tokens};
  MLA_RETURN_IF_ERROR(cublas().multiply_batched(
      problem.dtype, {sizes.tokens, sizes.rows, kHeadDimQK}, /*transpose_a=*/true, keys, queries,
      {parts.scores, sizes.tokens, sizes.rows * sizes.tokens}, count, stream));
  softmax<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      problem, tensors, first, sizes, parts.scores, static_cast<T*>(parts.weights), parts.sums);
  MLA_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "softmax"));
  MLA_RETURN_IF_ERROR(cublas().multiply_batched(
      problem.dtype, {kHeadDimV, sizes.rows, sizes.tokens}, /*transpose_a=*/false, keys, weights,
      {parts.products, kHeadDimV, sizes.rows * kHeadDimV}, count, stream));
  divide<T><<<grid_for(rows * kHeadDimV), kThreads, 0, stream>>>(
      parts.products, parts.sums, rows * kHeadDimV,
      static_cast<T*>(tensors.out) + first * sizes.rows * kHeadDimV);
  return cuda_status(cudaGetLastError(), "divide");
}

Status decode(const Problem& problem, const Tensors& tensors, const DevicePlan&, void* scratch,
              const DeviceLimits&, Stream stream) {
  if (problem.num_heads_kv != 1) {
    return {StatusCode::kUnsupported, "num_heads_kv = " + std::to_string(problem.num_heads_kv) +
                                          ", but this peer takes one KV head"};
  }
  const Sizes sizes(problem);
  const Parts parts(sizes, scratch);
  for (int64_t first = 0; first < problem.batch; first += sizes.chunk) {
    const auto count = static_cast<int>(std::min(sizes.chunk, problem.batch - first));
    const auto run = [&](auto zero) {
      return run_chunk<decltype(zero)>(problem, tensors, static_cast<int>(first), count, sizes,
                                       parts, static_cast<cudaStream_t>(stream));
    };
    MLA_RETURN_IF_ERROR(problem.dtype == DType::kBFloat16 ? run(__nv_bfloat16{}) : run(__half{}));
  }
  return {};
}

size_t scratch_bytes(const Problem& problem, const DeviceLimits&) {
  const Sizes sizes(problem);
  return Parts(sizes, nullptr).bytes;
}

Prediction predict(const Problem& problem, int64_t, const DeviceLimits&) {
  const Sizes sizes(problem);
  const double rows = double(sizes.rows) * problem.batch;
  const double tokens = double(sizes.tokens) * problem.batch;
  const double pairs = rows * double(sizes.tokens);
  Prediction prediction;
  prediction.matrix_flop = 2 * pairs * (kHeadDimQK + kHeadDimV);
  // Cache: gathered (read, written), then read by both products. Scores: written, read twice, and
  // the weights written and read. Products: written and read.
  prediction.dram_bytes =
      tokens * kHeadDimQK * 2 * 4 + pairs * (3 * 4 + 2 * 2) + rows * kHeadDimV * 2 * 4;
  return prediction;
}

}  // namespace

const Stage* cublas_pipeline(std::string* why_not) {
  static const Status loaded = cublas().load();
  if (!loaded.ok()) {
    *why_not = loaded.message();
    return nullptr;
  }
  static const Stage stage = [] {
    Stage result;
    result.slug = "cublas_pipeline";
    result.idea = "the traditional way: gather, batched Q K^T, softmax, batched P V (cuBLAS)";
    result.machine = MachineKind::kGpu;
    result.scratch_bytes = scratch_bytes;
    result.decode = decode;
    result.predict = predict;
    return result;
  }();
  return &stage;
}

}  // namespace mla::bench
