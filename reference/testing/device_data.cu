// Data generation kernels; device_data.cpp owns the memory.
#include "reference/testing/data_generator.h"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

constexpr int kThreads = 192;
static_assert(kHeadDimQK % kThreads == 0, "each thread makes three columns of a row");

struct RowValues {
  float values[kHeadDimQK];
};

// A stage only reads these; here they are made.
__device__ uint16_t* writable(const void* tensor) {
  return static_cast<uint16_t*>(const_cast<void*>(tensor));
}

// One item: a row of q.
__global__ void fill_q(Problem problem, uint64_t seed, DataKind kind, int64_t rows,
                       Tensors tensors) {
  uint16_t* const q = writable(tensors.q);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int head = static_cast<int>(row % problem.num_heads_q);
    const int64_t token = row / problem.num_heads_q;
    const int sequence = static_cast<int>(token / problem.seqlen_q);
    const int query = static_cast<int>(token % problem.seqlen_q);
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      q[tensors.q_place(sequence, query, head) + column] =
          q_bits(seed, problem.dtype, kind, sequence, query, head, column);
    }
  }
}

// One item: a row of the cache, NaN where no sequence has a token.
__global__ void fill_cache(Problem problem, uint64_t seed, DataKind kind, int64_t rows,
                           const int32_t* __restrict__ page_sequence,
                           const int32_t* __restrict__ page_position, Tensors tensors) {
  uint16_t* const cache = writable(tensors.kv_cache);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int head = static_cast<int>(row % problem.num_heads_kv);
    const int64_t page = row / problem.num_heads_kv / problem.page_size;
    const int row_in_page = static_cast<int>(row / problem.num_heads_kv % problem.page_size);
    const int sequence = page_sequence[page];
    const int64_t token = int64_t{page_position[page]} * problem.page_size + row_in_page;
    const bool exists = sequence >= 0 && token < tensors.seqlens_k[sequence];
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      cache[tensors.page_place(page, row_in_page, head) + column] =
          exists ? kv_bits(seed, problem.dtype, kind, sequence, token, head, column)
                 : nan_bits(problem.dtype);
    }
  }
}

// The same for a quantised cache: a row's values in shared memory, then each part by a thread of its
// own. 0xff where no sequence has a token.
__global__ void fill_quantised_cache(Problem problem, uint64_t seed, DataKind kind, ScaleRule rule,
                                     int64_t rows, const int32_t* __restrict__ page_sequence,
                                     const int32_t* __restrict__ page_position,
                                     const Needle* __restrict__ needles,
                                     const int32_t* __restrict__ needle_begin, Tensors tensors) {
  float* const values_smem = shared_memory<RowValues>().values;
  uint8_t* const cache = static_cast<uint8_t*>(const_cast<void*>(tensors.kv_cache));
  for (int64_t item = blockIdx.x; item < rows; item += gridDim.x) {
    const int head = static_cast<int>(item % problem.num_heads_kv);
    const int64_t page = item / problem.num_heads_kv / problem.page_size;
    const int row_in_page = static_cast<int>(item / problem.num_heads_kv % problem.page_size);
    const int sequence = page_sequence[page];
    const int64_t token = int64_t{page_position[page]} * problem.page_size + row_in_page;
    uint8_t* const row = cache + tensors.page_place(page, row_in_page, head);
    if (sequence < 0 || token >= tensors.seqlens_k[sequence]) {
      for (int byte = threadIdx.x; byte < problem.cache_row_bytes(); byte += kThreads) {
        row[byte] = 0xff;
      }
      continue;
    }
    for (int column = threadIdx.x; column < kHeadDimQK; column += kThreads) {
      values_smem[column] = kv_value(seed, problem.dtype, kind, sequence, token, head, column,
                                     needles + needle_begin[sequence],
                                     needle_begin[sequence + 1] - needle_begin[sequence]);
    }
    __syncthreads();
    if (threadIdx.x < kRowParts) quantise_part(problem, rule, values_smem, threadIdx.x, row);
    __syncthreads();  // the values have been read
  }
}

// Column 575 of every KV head of the needles. One block a sequence.
__global__ void plant_needles(Problem problem, const Needle* __restrict__ needles,
                              const int32_t* __restrict__ needle_begin, Tensors tensors) {
  uint16_t* const cache = writable(tensors.kv_cache);
  for (int64_t item = blockIdx.x; item < problem.batch; item += gridDim.x) {
    const int sequence = static_cast<int>(item);
    const int32_t* table = tensors.table_row(sequence);
    for (int n = needle_begin[sequence] + threadIdx.x; n < needle_begin[sequence + 1];
         n += kThreads) {
      for (int head = 0; head < problem.num_heads_kv; ++head) {
        cache[cache_place(problem, tensors, table, needles[n].token, head) + kHeadDimQK - 1] =
            needles[n].bits;
      }
    }
  }
}

}  // namespace

Status launch_generate(const Problem& problem, uint64_t seed, DataKind kind, ScaleRule rule,
                       const int32_t* page_sequence, const int32_t* page_position,
                       const Needle* needles, const int32_t* needle_begin, const Tensors& tensors) {
  const int64_t q_rows = problem.q_elements() / kHeadDimQK;
  const int64_t kv_rows = problem.kv_elements() / problem.cache_row_elements();
  MLA_RETURN_IF_ERROR(
      launch(fill_q, grid_for(q_rows), kThreads, 0, nullptr, problem, seed, kind, q_rows, tensors));
  if (is_quantised(problem.cache_format)) {
    return launch(fill_quantised_cache, grid_for(kv_rows), kThreads, sizeof(RowValues), nullptr,
                  problem, seed, kind, rule, kv_rows, page_sequence, page_position, needles,
                  needle_begin, tensors);
  }
  MLA_RETURN_IF_ERROR(launch(fill_cache, grid_for(kv_rows), kThreads, 0, nullptr, problem, seed,
                             kind, kv_rows, page_sequence, page_position, tensors));
  return launch(plant_needles, grid_for(problem.batch), kThreads, 0, nullptr, problem, needles,
                needle_begin, tensors);
}

}  // namespace mla::MLA_MACHINE
