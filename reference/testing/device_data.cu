// Data generation kernels; device_data.cpp owns the memory.
#include "reference/testing/data_generator.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 192;
static_assert(kHeadDimQK % kThreads == 0, "each thread makes three columns of a row");

// One item: a row of q.
__global__ void fill_q(Problem problem, uint64_t seed, DataKind kind, int64_t rows,
                       uint16_t* __restrict__ q) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int head = static_cast<int>(row % problem.num_heads_q);
    const int64_t token = row / problem.num_heads_q;
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      q[row * kHeadDimQK + column] =
          q_bits(seed, problem.dtype, kind, static_cast<int>(token / problem.seqlen_q),
                 static_cast<int>(token % problem.seqlen_q), head, column);
    }
  }
}

// One item: a row of the cache, NaN where no sequence has a token.
__global__ void fill_cache(Problem problem, uint64_t seed, DataKind kind, int64_t rows,
                           const int32_t* __restrict__ page_sequence,
                           const int32_t* __restrict__ page_position,
                           const int32_t* __restrict__ seqlens_k, uint16_t* __restrict__ cache) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int head = static_cast<int>(row % problem.num_heads_kv);
    const int64_t place = row / problem.num_heads_kv, page = place / kPageSize;
    const int sequence = page_sequence[page];
    const int64_t token = int64_t{page_position[page]} * kPageSize + place % kPageSize;
    const bool exists = sequence >= 0 && token < seqlens_k[sequence];
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      cache[row * kHeadDimQK + column] =
          exists ? kv_bits(seed, problem.dtype, kind, sequence, token, head, column)
                 : nan_bits(problem.dtype);
    }
  }
}

// Column 575 of every KV head of the needles. One block a sequence.
__global__ void plant_needles(Problem problem, const Needle* __restrict__ needles,
                              const int32_t* __restrict__ needle_begin,
                              const int32_t* __restrict__ block_table,
                              uint16_t* __restrict__ cache) {
  for (int64_t sequence = blockIdx.x; sequence < problem.batch; sequence += gridDim.x) {
    const int32_t* table = block_table + sequence * problem.max_pages_per_seq;
    for (int n = needle_begin[sequence] + threadIdx.x; n < needle_begin[sequence + 1];
         n += kThreads) {
      for (int head = 0; head < problem.num_heads_kv; ++head) {
        const int64_t row = cache_row(table, needles[n].token, problem.num_heads_kv, head);
        cache[row * kHeadDimQK + kHeadDimQK - 1] = needles[n].bits;
      }
    }
  }
}

}  // namespace

Status launch_generate(const Problem& problem, uint64_t seed, DataKind kind,
                       const int32_t* page_sequence, const int32_t* page_position,
                       const Needle* needles, const int32_t* needle_begin,
                       const int32_t* block_table, const int32_t* seqlens_k, uint16_t* q,
                       uint16_t* cache) {
  const int64_t q_rows = problem.q_elements() / kHeadDimQK;
  const int64_t kv_rows = problem.kv_elements() / kHeadDimQK;
  MLA_RETURN_IF_ERROR(
      launch(fill_q, grid_for(q_rows), kThreads, 0, nullptr, problem, seed, kind, q_rows, q));
  MLA_RETURN_IF_ERROR(launch(fill_cache, grid_for(kv_rows), kThreads, 0, nullptr, problem, seed,
                             kind, kv_rows, page_sequence, page_position, seqlens_k, cache));
  return launch(plant_needles, grid_for(problem.batch), kThreads, 0, nullptr, problem, needles,
                needle_begin, block_table, cache);
}

}  // namespace mla::MLA_MACHINE
