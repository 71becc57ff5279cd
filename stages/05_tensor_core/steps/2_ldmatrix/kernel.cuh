// Step 2 from 04_split_kv to 05_tensor_core: fragments by ldmatrix, which gives a warp four 8x8 matrices at once, K's and
// P's as they lie and V's transposed. Rows of q and K are swizzled instead of padded: that takes no bytes, and keeps
// chunks of 16 bytes whole, as ldmatrix wants them. All else is step 1's.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::ldmatrix {

// How a block's warps share S [kRows, kTokens]: 16 rows for each, some tokens and some of the 576 columns.
template <int kRows>
struct Tiling {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTokens = 32;  // half of a page
  static constexpr int kRowWarps = kRows / 16, kTokenWarps = kRows == 16 ? 4 : kWarps / kRowWarps;
  static constexpr int kDepthWarps = kWarps / (kRowWarps * kTokenWarps);
  static constexpr int kWarpTokens = kTokens / kTokenWarps, kDepth = kHeadDimQK / kDepthWarps;
  static constexpr int kStrideS = kTokens + 8;  // of P, too; + 8: without a bank conflict
};

// Rows of q and K are 72 chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would:
// the eight rows of an 8x8 matrix are 1152 bytes apart, and so get banks of their own.
template <int kRows, typename Tile = Tiling<kRows>>
struct Smem {
  uint4 q[kRows][kHeadDimQK / 8];
  uint4 kv[Tile::kTokens][kHeadDimQK / 8];                    // K; its first 512 columns are V
  float partial_s[Tile::kDepthWarps][kRows][Tile::kStrideS];  // S, from a share of the columns
  uint16_t p[kRows][Tile::kStrideS];
  float rescale[kRows];    // a; at the end 1 / l
  int64_t out_row[kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
  MLA_REGIONS(q, kv, partial_s, p, rescale, out_row)
};

// The 16-bit values of a tile on their way from global memory, fetched while the tile before is
// worked on: 8 threads per token, one chunk of 16 bytes per thread and turn.
constexpr int kTokenThreads = 8, kTurns = kHeadDimQK / 8 / kTokenThreads;
struct Fetch {
  uint4 packed[kTurns];
};

// `token_gmem` is this thread's token of the tile [576]; null past the end, where the cache may
// hold anything: such tokens become 0, because 0 * NaN would be NaN.
template <typename T>
__device__ __forceinline__ void fetch_token(const T* token_gmem, Fetch& fetch) {
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int column = (turn * kTokenThreads + threadIdx.x % kTokenThreads) * 8;
    fetch.packed[turn] = make_uint4(0, 0, 0, 0);
    if (token_gmem != nullptr) {
      fetch.packed[turn] = *reinterpret_cast<const uint4*>(token_gmem + column);
    }
  }
}

// The fetched token to shared memory.
template <int kRows>
__device__ __forceinline__ void store_token(const Fetch& fetch, Smem<kRows>& smem) {
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int token = threadIdx.x / kTokenThreads;
    const int chunk = turn * kTokenThreads + threadIdx.x % kTokenThreads;
    smem.kv[token][chunk ^ token % 8] = fetch.packed[turn];
  }
}

// One item: a worker, for one tile of kRows packed rows of a KV head.
template <typename T, int kRows>
__global__ void __launch_bounds__(Tiling<kRows>::kThreads, kRows == 16 ? 2 : 1)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  using Tile = Tiling<kRows>;
  constexpr int kThreads = Tile::kThreads, kWarps = Tile::kWarps, kTokens = Tile::kTokens;
  Smem<kRows>& smem = shared_memory<Smem<kRows>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Who holds what. Of a 16x8 fragment a lane has rows y and y + 8, columns x and x + 1.
  const int y = lane / 4, x = lane % 4 * 2;
  // S: the warp's 16 rows from score_row on, kWarpTokens tokens, kDepth of the columns.
  const int depth = warp % Tile::kDepthWarps, row_warp = warp / (kWarps / Tile::kRowWarps);
  const int token_warp = warp / Tile::kDepthWarps % Tile::kTokenWarps;
  const int score_row = row_warp * 16, score_token = token_warp * Tile::kWarpTokens;
  // Softmax: each thread has pairs of neighbouring tokens of one row, kRowThreads pairs apart.
  constexpr int kPairs = kRows * kTokens / kThreads / 2, kRowThreads = kTokens / kPairs / 2;
  const int own_row = threadIdx.x / kRowThreads, own_token = threadIdx.x % kRowThreads * 2;
  // O: all rows, and the warp's 64 columns.
  const int out_column = warp * 64;

  const RowTile rows(problem, tensors, items, kRows);

  for (PieceCursor at(problem, tensors, split, rows.worker); at.more(); at.next()) {
    const int tokens = min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
    const int own_visible = rows.visible(at.seqlen_k, own_row);

    // This thread's token of the tile at `token_begin`.
    const auto token_gmem = [&](int token_begin) -> const T* {
      const int token = token_begin + threadIdx.x / kTokenThreads;
      if (token >= at.token_end()) return nullptr;
      return static_cast<const T*>(tensors.kv_cache) +
             cache_place(problem, tensors, tensors.table_row(at.sequence), token, rows.head_kv);
    };

    Fetch fetch;
    fetch_token(token_gmem(at.token_begin()), fetch);

    // Q [kRows, 576], for all tiles. Rows past the end: 0.
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < kRows * kHeadDimQK / 8; chunk += kThreads) {
      const int r = chunk / (kHeadDimQK / 8), c = chunk % (kHeadDimQK / 8);
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (rows.exists(r)) {
        packed = *reinterpret_cast<const uint4*>(static_cast<const T*>(tensors.q) +
                                                 rows.q_place(at.sequence, r) + c * 8);
      }
      smem.q[r][c ^ r % 8] = packed;
    }

    float o_rmem[kRows / 16][8][4] = {};
    float m = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet, not NaN
    float l = 0;         // of this thread's tokens

    for (int token_begin = at.token_begin(); token_begin < tokens; token_begin += kTokens) {
      store_token(fetch, smem);
      __syncthreads();  // K (and, the first time, Q) is there

      // S = Q K^T  [16, kWarpTokens], over the warp's columns, 32 per step
      float s_rmem[Tile::kWarpTokens / 8][4] = {};
#pragma unroll 2
      for (int k = depth * Tile::kDepth / 8; k < (depth + 1) * Tile::kDepth / 8; k += 4) {
        uint32_t q_rmem[2][4];  // [16 columns][16 rows]
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = score_row + lane % 16, chunk = k + i * 2 + lane / 16;
          ptx::ldmatrix_x4(q_rmem[i], &smem.q[row][chunk ^ row % 8]);
        }
#pragma unroll
        for (int n = 0; n < Tile::kWarpTokens / 8; ++n) {
          uint32_t k_rmem[4];  // 8 tokens, 32 columns
          const int token = score_token + n * 8 + lane % 8, chunk = k + lane / 8;
          ptx::ldmatrix_x4(k_rmem, &smem.kv[token][chunk ^ token % 8]);
          ptx::mma_m16n8k16<T>(s_rmem[n], q_rmem[0], k_rmem[0], k_rmem[1]);
          ptx::mma_m16n8k16<T>(s_rmem[n], q_rmem[1], k_rmem[2], k_rmem[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::kWarpTokens / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float2*>(
              &smem.partial_s[depth][score_row + y + half * 8][score_token + n * 8 + x]) =
              make_float2(s_rmem[n][2 * half], s_rmem[n][2 * half + 1]);
        }
      }
      __syncthreads();                       // all shares of S are there
      if (token_begin + kTokens < tokens) {  // not before S, which needs all registers
        fetch_token(token_gmem(token_begin + kTokens), fetch);
      }

      // m' = max(m, rowmax S); P = 2^(S - m'); l = a l + rowsum P
      float2 s[kPairs] = {};
#pragma unroll
      for (int from = 0; from < Tile::kDepthWarps; ++from) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 pair = *reinterpret_cast<const float2*>(
              &smem.partial_s[from][own_row][own_token + i * 2 * kRowThreads]);
          s[i] = make_float2(s[i].x + pair.x, s[i].y + pair.y);
        }
      }
      float m_new = m;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int token = token_begin + own_token + i * 2 * kRowThreads;
        s[i].x = token < own_visible ? items.scale_log2 * s[i].x : -INFINITY;
        s[i].y = token + 1 < own_visible ? items.scale_log2 * s[i].y : -INFINITY;
        m_new = fmaxf(m_new, fmaxf(s[i].x, s[i].y));
      }
#pragma unroll
      for (int offset = 1; offset < kRowThreads; offset *= 2) {
        m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, offset));
      }
      const float a = exp2f(m - m_new);  // old minus new: at most 1
      m = m_new;
      l *= a;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float p0 = exp2f(s[i].x - m), p1 = exp2f(s[i].y - m);
        l += p0 + p1;
        *reinterpret_cast<uint32_t*>(&smem.p[own_row][own_token + i * 2 * kRowThreads]) =
            pack<T>(p0, p1);
      }
      if (threadIdx.x % kRowThreads == 0) smem.rescale[own_row] = a;

      // O = a O, only if some row's maximum moved
      if (__syncthreads_or(a != 1)) {  // also: P and a are there
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
          const float a_low = smem.rescale[i * 16 + y], a_high = smem.rescale[i * 16 + 8 + y];
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            o_rmem[i][n][0] *= a_low;
            o_rmem[i][n][1] *= a_low;
            o_rmem[i][n][2] *= a_high;
            o_rmem[i][n][3] *= a_high;
          }
        }
      }

      // O += P V  [kRows, 512], this warp's 64 columns, 16 tokens per step
#pragma unroll 1
      for (int t = 0; t < kTokens; t += 16) {
        uint32_t p_rmem[kRows / 16][4];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
          ptx::ldmatrix_x4(p_rmem[i], &smem.p[i * 16 + lane % 16][t + lane / 16 * 8]);
        }
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          uint32_t v_rmem[4];  // 16 tokens, 16 columns
          const int chunk = out_column / 8 + n + lane / 16;
          ptx::ldmatrix_x4_trans(v_rmem, &smem.kv[t + lane % 16][chunk ^ lane % 8]);
#pragma unroll
          for (int i = 0; i < kRows / 16; ++i) {
            ptx::mma_m16n8k16<T>(o_rmem[i][n], p_rmem[i], v_rmem[0], v_rmem[1]);
            ptx::mma_m16n8k16<T>(o_rmem[i][n + 1], p_rmem[i], v_rmem[2], v_rmem[3]);
          }
        }
      }
      __syncthreads();  // K, P and a have been read: the next tile may overwrite them
    }

    // out = O / l, lse = ln 2 (m + log2 l): final, or a part. A row that saw nothing: out = 0, lse = +inf,
    // or -inf in a part.
#pragma unroll
    for (int offset = 1; offset < kRowThreads; offset *= 2) {
      l += __shfl_xor_sync(0xffffffff, l, offset);
    }
    const int slot = at.slot();
    if (threadIdx.x % kRowThreads == 0) {
      const bool saw_something = own_visible > at.token_begin();
      const float lse = kLn2 * (m + log2f(l));
      smem.rescale[own_row] = saw_something ? 1 / l : 0;
      smem.out_row[own_row] = -1;
      if (rows.exists(own_row) && slot >= 0) {
        const int64_t place = rows.slot_place(slot, own_row);
        split.lse_partial[place] = saw_something ? lse : -INFINITY;
        smem.out_row[own_row] = place * kHeadDimV;
      } else if (rows.exists(own_row)) {
        tensors.lse[rows.lse_place(at.sequence, own_row)] = saw_something ? lse : INFINITY;
        smem.out_row[own_row] = rows.out_place(at.sequence, own_row);
      }
    }
    __syncthreads();  // 1 / l and the rows' places are there
#pragma unroll
    for (int i = 0; i < 2 * (kRows / 16); ++i) {
      const int r = i * 8 + y, half = i % 2;
      if (smem.out_row[r] < 0) continue;
      const int64_t first = smem.out_row[r] + out_column + x;
      const float inverse_l = smem.rescale[r];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float low = o_rmem[i / 2][n][2 * half] * inverse_l;
        const float high = o_rmem[i / 2][n][2 * half + 1] * inverse_l;
        if (slot >= 0) {
          *reinterpret_cast<float2*>(split.out_partial + first + n * 8) = make_float2(low, high);
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(tensors.out) + first + n * 8) =
              pack<T>(low, high);
        }
      }
    }
    __syncthreads();  // Q and 1 / l have been read: the next piece may overwrite them
  }
}

}  // namespace mla::MLA_MACHINE::ldmatrix
