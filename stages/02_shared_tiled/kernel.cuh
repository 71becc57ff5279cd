// 02_shared_tiled: still scores, softmax, values; but a tile of KV in shared memory serves many
// rows, and a tile of results in registers makes every value read from shared memory count eight
// times.
//
//   scores   S[rows, 128 tokens]  = scale * Q K^T     over 576 columns, 32 at a time
//   softmax  P[row, :] = exp(S - max) / sum           one block per row, in place
//   values   O[rows, 128 columns] = P V               over the tokens, 16 at a time
//
// Rows are packed: the query heads that share a KV head, times the query tokens, are the rows of
// one matrix.
#pragma once

#include "stages/common/machine/device.h"
#include "stages/common/machine/vector8.h"

namespace mla::MLA_MACHINE::shared_tiled {

constexpr int kThreads = 128;
constexpr int kTileN = 128;          // tokens of `scores`, columns of `values`
constexpr int kTileK = 32;           // columns per step of `scores`
constexpr int kPadded = kTileK + 4;  // row stride in floats: neighbouring rows start 4 banks apart

// How kRows x 128 results are spread over 4 warps, and a warp's share over its 4 x 8 lanes. Results
// of a lane lie 4 rows and 8 tokens apart, so that the lanes of a warp read neighbouring rows of
// shared memory: no bank conflicts.
template <int kRows>
struct Tile {
  static constexpr int kRowWarps = kRows == 64 ? 2 : 1;
  static constexpr int kColumnWarps = 4 / kRowWarps;
  static constexpr int kLaneRows = kRows / kRowWarps / 4;         // rows per lane
  static constexpr int kLaneColumns = kTileN / kColumnWarps / 8;  // per lane; of S: tokens
  static_assert(kRows == 64 || kRows == 16, "lane shares are 8 x 8 or 4 x 4");

  int row;     // the lane's first
  int column;  // its place among the 8 lanes of a row, plus its warp's first column
  __device__ Tile() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = warp / kColumnWarps * (kRows / kRowWarps) + lane / 8;
    column = warp % kColumnWarps * (kTileN / kColumnWarps) + lane % 8;
  }
};

// One (sequence, KV head)'s rows that a block works on.
struct RowTile {
  int sequence, head_kv;
  int begin, end;  // rows of this KV head
  int64_t matrix;  // (sequence in the turn, KV head): which score matrix
  int visible;     // tokens its last row sees: none sees more

  __device__ RowTile(const Problem& problem, const Tensors& tensors, int first_sequence,
                     int64_t index, int rows_per_tile) {
    const int rows = problem.rows_per_kv_head();
    const int tiles = (rows + rows_per_tile - 1) / rows_per_tile;
    matrix = index / tiles;
    sequence = first_sequence + static_cast<int>(matrix / problem.num_heads_kv);
    head_kv = static_cast<int>(matrix % problem.num_heads_kv);
    begin = static_cast<int>(index % tiles) * rows_per_tile;
    end = min(begin + rows_per_tile, rows);
    visible = visible_to(problem, tensors, end - 1);
  }

  // Tokens that packed row `row` sees; 0 or less: none.
  __device__ int visible_to(const Problem& problem, const Tensors& tensors, int row) const {
    return static_cast<int>(problem.visible_tokens(
        clamped_length(problem, tensors.seqlens_k[sequence]), query(problem, row)));
  }
  // The query token and the query head of packed row `row`.
  __device__ int query(const Problem& problem, int row) const { return row / problem.group_size(); }
  __device__ int head(const Problem& problem, int row) const {
    return head_kv * problem.group_size() + row % problem.group_size();
  }
};

// Eight 16-bit values from `row_gmem`, or zeros if there is no such row.
template <typename T>
__device__ __forceinline__ uint4 load_or_zero(const T* row_gmem, int column) {
  return row_gmem != nullptr ? *reinterpret_cast<const uint4*>(row_gmem + column)
                             : make_uint4(0, 0, 0, 0);
}

template <int kRows>
struct ScoresSmem {
  float q[kRows][kPadded];
  float k[kTileN][kPadded];
  MLA_REGIONS(q, k)
};

// S = scale * Q K^T. One item: kRows rows against every `parts`-th stretch of 128 tokens.
//   scores_gmem: [matrices, rows_per_kv_head, max_seqlen_k], a matrix being one (sequence, KV head)
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 4)
    scores(Problem problem, Tensors tensors, int first_sequence, int64_t row_tiles, int parts,
           int64_t num_items, float* __restrict__ scores_gmem) {
  using Share = Tile<kRows>;
  ScoresSmem<kRows>& smem = shared_memory<ScoresSmem<kRows>>();
  const Share share;

  for (int64_t item = blockIdx.x, turn = 0; item < num_items; ++turn) {
    // Row tiles vary fastest: blocks that read the same tokens run at the same time and meet in the
    // L2.
    const int64_t row_tile = item % row_tiles, part = item / row_tiles % parts;
    const RowTile tile(problem, tensors, first_sequence,
                       item / (row_tiles * parts) * row_tiles + row_tile, kRows);
    if ((part + turn * parts) * kTileN >= tile.visible) {  // the whole block agrees: the next item
      item += gridDim.x;
      turn = -1;
      continue;
    }
    const int token_begin = static_cast<int>((part + turn * parts) * kTileN);

    // Each thread brings chunks of one row of Q and one token of K, the same in every step. Rows
    // past the end and tokens past the end: 0.
    constexpr int kRowThreads = kThreads / kRows, kChunks = kTileK / 8;
    const int q_row = threadIdx.x / kRowThreads, k_token = threadIdx.x;
    const T* q_gmem = nullptr;  // [576]
    const T* k_gmem = nullptr;  // [576]
    if (tile.begin + q_row < tile.end) {
      q_gmem = static_cast<const T*>(tensors.q) +
               tensors.q_place(tile.sequence, tile.query(problem, tile.begin + q_row),
                               tile.head(problem, tile.begin + q_row));
    }
    if (token_begin + k_token < tile.visible) {
      k_gmem = static_cast<const T*>(tensors.kv_cache) +
               cache_place(problem, tensors, tensors.table_row(tile.sequence),
                           token_begin + k_token, tile.head_kv);
    }

    float s_rmem[Share::kLaneRows][Share::kLaneColumns] = {};
    for (int column = 0; column < kHeadDimQK; column += kTileK) {
      // Q [kRows, 32] and K [128, 32] to shared memory, 8 values per turn, converted to fp32 once.
#pragma unroll
      for (int chunk = threadIdx.x % kRowThreads; chunk < kChunks; chunk += kRowThreads) {
        store_as_float<T>(load_or_zero(q_gmem, column + 8 * chunk), &smem.q[q_row][8 * chunk]);
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        store_as_float<T>(load_or_zero(k_gmem, column + 8 * chunk), &smem.k[k_token][8 * chunk]);
      }
      __syncthreads();  // the tiles are filled

      // S += Q K^T, four columns per step: kLaneRows + kLaneColumns 16-byte reads for
      // 4 kLaneRows kLaneColumns FMAs
#pragma unroll 1
      for (int k = 0; k < kTileK; k += 4) {
        float4 q_rmem[Share::kLaneRows];
#pragma unroll
        for (int i = 0; i < Share::kLaneRows; ++i) {
          q_rmem[i] = *reinterpret_cast<const float4*>(&smem.q[share.row + 4 * i][k]);
        }
#pragma unroll
        for (int j = 0; j < Share::kLaneColumns; ++j) {
          const float4 k_rmem = *reinterpret_cast<const float4*>(&smem.k[share.column + 8 * j][k]);
#pragma unroll
          for (int i = 0; i < Share::kLaneRows; ++i) {
            s_rmem[i][j] += q_rmem[i].x * k_rmem.x;
            s_rmem[i][j] += q_rmem[i].y * k_rmem.y;
            s_rmem[i][j] += q_rmem[i].z * k_rmem.z;
            s_rmem[i][j] += q_rmem[i].w * k_rmem.w;
          }
        }
      }
      __syncthreads();  // the tiles have been read: the next step may overwrite them
    }

#pragma unroll
    for (int i = 0; i < Share::kLaneRows; ++i) {
      const int row = tile.begin + share.row + 4 * i;
      if (row >= tile.end) continue;
      float* s_gmem =
          scores_gmem + (tile.matrix * problem.rows_per_kv_head() + row) * problem.max_seqlen_k();
#pragma unroll
      for (int j = 0; j < Share::kLaneColumns; ++j) {
        const int token = token_begin + share.column + 8 * j;
        if (token < tile.visible) s_gmem[token] = problem.softmax_scale * s_rmem[i][j];
      }
    }
  }
}

constexpr int kSoftmaxThreads = 256;

// What the block's warps tell each other: one value per warp.
struct SoftmaxSmem {
  float of_warp[kSoftmaxThreads / 32];
  MLA_REGIONS(of_warp)
};

// The sum or the maximum of `value` over the block, in every thread.
template <typename Combine>
__device__ float block_reduce(SoftmaxSmem& smem, float value, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // the last reduction's values have been read
  if (threadIdx.x % 32 == 0) smem.of_warp[threadIdx.x / 32] = value;
  __syncthreads();  // every warp's value is there
  value = smem.of_warp[0];
  for (int warp = 1; warp < kSoftmaxThreads / 32; ++warp) {
    value = combine(value, smem.of_warp[warp]);
  }
  return value;
}

// P = softmax(S), in place, and lse. One item: one packed row of one matrix.
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax(Problem problem, Tensors tensors, int first_sequence, int64_t num_items,
            float* __restrict__ scores_gmem) {
  SoftmaxSmem& smem = shared_memory<SoftmaxSmem>();
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const RowTile row(problem, tensors, first_sequence, item, 1);
    float* s_gmem = scores_gmem + item * problem.max_seqlen_k();  // [max_seqlen_k]

    float maximum = -INFINITY;
    for (int t = threadIdx.x; t < row.visible; t += kSoftmaxThreads) {
      maximum = fmaxf(maximum, s_gmem[t]);
    }
    maximum = block_reduce(smem, maximum, [](float a, float b) { return fmaxf(a, b); });

    float sum = 0;
    for (int t = threadIdx.x; t < row.visible; t += kSoftmaxThreads) {
      sum += expf(s_gmem[t] - maximum);
    }
    sum = block_reduce(smem, sum, [](float a, float b) { return a + b; });

    // One more exponential is cheaper than one more round trip of the score matrix.
    const float inverse_sum = 1 / sum;
    for (int t = threadIdx.x; t < row.visible; t += kSoftmaxThreads) {
      s_gmem[t] = expf(s_gmem[t] - maximum) * inverse_sum;
    }
    if (threadIdx.x == 0) {
      tensors.lse[tensors.lse_place(row.sequence, row.query(problem, row.begin),
                                    row.head(problem, row.begin))] =
          row.visible > 0 ? maximum + logf(sum) : INFINITY;
    }
  }
}

constexpr int kStepTokens =
    16;  // of `values`: 32 would keep so many loads in flight that registers spill

template <int kRows>
struct ValuesSmem {
  float p[kRows][kStepTokens + 4];
  float v[kStepTokens][kTileN];
  MLA_REGIONS(p, v)
};

// O = P V. One item: kRows rows, 128 of the 512 columns, all tokens.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 4)
    values(Problem problem, Tensors tensors, int first_sequence, int64_t num_items,
           const float* __restrict__ scores_gmem) {
  using Share = Tile<kRows>;
  ValuesSmem<kRows>& smem = shared_memory<ValuesSmem<kRows>>();
  const Share share;
  // Here a lane's columns come in fours, 32 apart: one 16-byte read each.
  const int lane_column = share.column / 8 * 8 + share.column % 8 * 4;
  constexpr int kColumnTiles = kHeadDimV / kTileN;

  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int column_begin = static_cast<int>(item % kColumnTiles) * kTileN;
    const RowTile tile(problem, tensors, first_sequence, item / kColumnTiles, kRows);
    const int32_t* table = tensors.table_row(tile.sequence);

    // Each thread brings chunks of one row of P, the same in every step, and of one token of V.
    constexpr int kRowThreads = kThreads / kRows, kTokenThreads = kThreads / kStepTokens;
    const int p_row = threadIdx.x / kRowThreads;
    const int v_token = threadIdx.x / kTokenThreads;
    const float* p_gmem =
        scores_gmem + (tile.matrix * problem.rows_per_kv_head() + tile.begin + p_row) *
                          problem.max_seqlen_k();  // [max_seqlen_k]
    int p_visible = 0;
    if (tile.begin + p_row < tile.end) {
      p_visible = tile.visible_to(problem, tensors, tile.begin + p_row);
    }

    float o_rmem[Share::kLaneRows][Share::kLaneColumns] = {};
    for (int token_begin = 0; token_begin < tile.visible; token_begin += kStepTokens) {
      // P [kRows, 16], as it is; what a row may not see was never written, and counts 0.
#pragma unroll
      for (int chunk = threadIdx.x % kRowThreads; chunk < kStepTokens / 4; chunk += kRowThreads) {
        const int token = token_begin + 4 * chunk;
        float4 p = make_float4(0, 0, 0, 0);
        if (token < p_visible) p = *reinterpret_cast<const float4*>(p_gmem + token);
        if (token + 1 >= p_visible) p.y = 0;
        if (token + 2 >= p_visible) p.z = 0;
        if (token + 3 >= p_visible) p.w = 0;
        *reinterpret_cast<float4*>(&smem.p[p_row][4 * chunk]) = p;
      }
      // V [16, 128 columns] as fp32. Tokens past the end: 0, because 0 * NaN would be NaN.
      const T* v_gmem = nullptr;  // [128]
      if (token_begin + v_token < tile.visible) {
        v_gmem = static_cast<const T*>(tensors.kv_cache) +
                 cache_place(problem, tensors, table, token_begin + v_token, tile.head_kv) +
                 column_begin;
      }
#pragma unroll
      for (int chunk = threadIdx.x % kTokenThreads; chunk < kTileN / 8; chunk += kTokenThreads) {
        store_as_float<T>(load_or_zero(v_gmem, 8 * chunk), &smem.v[v_token][8 * chunk]);
      }
      __syncthreads();  // the tiles are filled

      // O += P V, two tokens per step: four would not fit the registers
#pragma unroll 1
      for (int k = 0; k < kStepTokens; k += 2) {
        float4 v_rmem[2][Share::kLaneColumns / 4];
#pragma unroll
        for (int depth = 0; depth < 2; ++depth) {
#pragma unroll
          for (int j = 0; j < Share::kLaneColumns / 4; ++j) {
            v_rmem[depth][j] =
                *reinterpret_cast<const float4*>(&smem.v[k + depth][lane_column + 32 * j]);
          }
        }
#pragma unroll
        for (int i = 0; i < Share::kLaneRows; ++i) {
          const float2 p2 = *reinterpret_cast<const float2*>(&smem.p[share.row + 4 * i][k]);
          const float p_rmem[2] = {p2.x, p2.y};
#pragma unroll
          for (int depth = 0; depth < 2; ++depth) {
#pragma unroll
            for (int j = 0; j < Share::kLaneColumns / 4; ++j) {
              o_rmem[i][4 * j + 0] += p_rmem[depth] * v_rmem[depth][j].x;
              o_rmem[i][4 * j + 1] += p_rmem[depth] * v_rmem[depth][j].y;
              o_rmem[i][4 * j + 2] += p_rmem[depth] * v_rmem[depth][j].z;
              o_rmem[i][4 * j + 3] += p_rmem[depth] * v_rmem[depth][j].w;
            }
          }
        }
      }
      __syncthreads();  // the tiles have been read: the next step may overwrite them
    }

#pragma unroll
    for (int i = 0; i < Share::kLaneRows; ++i) {
      const int row = tile.begin + share.row + 4 * i;
      if (row >= tile.end) continue;
      T* out_gmem =
          static_cast<T*>(tensors.out) +
          tensors.out_place(tile.sequence, tile.query(problem, row), tile.head(problem, row));
#pragma unroll
      for (int j = 0; j < Share::kLaneColumns; j += 4) {
        const float o[4] = {o_rmem[i][j], o_rmem[i][j + 1], o_rmem[i][j + 2], o_rmem[i][j + 3]};
        store_rounded(o, out_gmem + column_begin + lane_column + 8 * j);
      }
    }
  }
}

}  // namespace mla::MLA_MACHINE::shared_tiled
