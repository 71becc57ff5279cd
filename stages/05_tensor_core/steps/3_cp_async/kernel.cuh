// Step 3 from 04_split_kv to 05_tensor_core: K comes by cp.async, straight to shared memory, into one of two buffers
// while the other is worked on; and so do the next piece's Q and first tile while O is written. The registers of the
// fetched tile are free, and so is the barrier behind it. From here on a kernel's steps have names, and its main loop is
// the list of their calls.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::cp_async {

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
  uint4 kv[2][Tile::kTokens][kHeadDimQK / 8];                 // K; its first 512 columns are V
  float partial_s[Tile::kDepthWarps][kRows][Tile::kStrideS];  // S, from a share of the columns
  uint16_t p[kRows][Tile::kStrideS];
  float rescale[kRows];    // a; at the end 1 / l
  int64_t out_row[kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
  MLA_REGIONS(q, kv, partial_s, p, rescale, out_row)
};

// Starts copying `kCount` rows of 576 values to shared memory: row(r) is where row r is, null for
// zeros. 8 threads per row, 128 bytes per turn.
template <int kThreads, int kCount, typename Row>
__device__ __forceinline__ void copy_rows(uint4 (*rows_smem)[kHeadDimQK / 8], const void* any_gmem,
                                          const Row& row) {
  const int chunk = threadIdx.x % 8;
#pragma unroll 1
  for (int begin = 0; begin < kCount; begin += kThreads / 8) {
    const int r = begin + threadIdx.x / 8;
    if (kCount % (kThreads / 8) != 0 && r >= kCount) break;
    const uint4* source = row(r);
#pragma unroll
    for (int c = 0; c < kHeadDimQK / 8; c += 8) {
      ptx::cp_async_16(&rows_smem[r][c + (chunk ^ r % 8)],
                       source == nullptr ? any_gmem : source + c + chunk,
                       source == nullptr ? 0 : 16);
    }
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
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  // Of the piece:
  float o_rmem[kRows / 16][8][4];  // [kRows, 64]
  float m = 0;
  float l = 0;      // of this thread's tokens
  int own_visible;  // tokens that the thread's row sees
  int buffer;       // of the tile

  // Rows past the last become 0.
  const auto copy_q = [&] {
    copy_rows<kThreads, kRows>(smem.q, tensors.q, [&](int r) -> const uint4* {
      if (!rows.exists(r)) return nullptr;
      return static_cast<const uint4*>(tensors.q) + rows.q_place(at.sequence, r) / 8;
    });
  };
  // Tokens past the end become 0: the cache may hold anything there, and 0 * NaN would be NaN.
  const auto copy_kv = [&](int token_begin, int to) {
    const auto token_gmem = [&](int token) {
      return static_cast<const uint4*>(tensors.kv_cache) +
             cache_place(problem, tensors, tensors.table_row(at.sequence), token, rows.head_kv) / 8;
    };
    const uint4* tile_gmem = token_gmem(token_begin);
    copy_rows<kThreads, kTokens>(smem.kv[to], tensors.kv_cache, [&](int r) -> const uint4* {
      if (token_begin + r >= at.seqlen_k) return nullptr;
      return problem.page_size < kTokens ? token_gmem(token_begin + r)
                                         : tile_gmem + r * (tensors.kv_strides.token / 8);
    });
  };
  const auto begin_piece = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      copy_q();
      copy_kv(at.token_begin(), 0);
    }
    ptx::cp_async_commit_group();
  };
  // S = Q K^T  [16, kWarpTokens], over the warp's columns, 32 per step
  const auto issue_qk = [&] {
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
        ptx::ldmatrix_x4(k_rmem, &smem.kv[buffer][token][chunk ^ token % 8]);
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
  };
  // m' = max(m, rowmax S); P = 2^(S - m'); l = a l + rowsum P
  const auto softmax = [&](int token_begin) {
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
    return a;
  };
  const auto rescale = [&] {  // O = a O
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
  };
  // O += P V  [kRows, 512], this warp's 64 columns, 16 tokens per step
  const auto issue_pv = [&] {
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
        ptx::ldmatrix_x4_trans(v_rmem, &smem.kv[buffer][t + lane % 16][chunk ^ lane % 8]);
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
          ptx::mma_m16n8k16<T>(o_rmem[i][n], p_rmem[i], v_rmem[0], v_rmem[1]);
          ptx::mma_m16n8k16<T>(o_rmem[i][n + 1], p_rmem[i], v_rmem[2], v_rmem[3]);
        }
      }
    }
  };
  // lse = ln 2 (m + log2 l); and, for all warps, 1 / l and the rows' places in out or out_partial. A row that saw nothing:
  // out = 0, lse = +inf, or -inf in a part.
  const auto write_lse = [&](int slot) {
#pragma unroll
    for (int offset = 1; offset < kRowThreads; offset *= 2) {
      l += __shfl_xor_sync(0xffffffff, l, offset);
    }
    __syncthreads();  // the last tile's a, or the 1 / l of the piece before, has been read
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
    __syncthreads();  // 1 / l and the rows' places are there; Q and K have been read
  };
  // out = O / l
  const auto write_out = [&](int slot) {
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
  };

  begin_piece();
  while (at.more()) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        for (int j = 0; j < 4; ++j) o_rmem[i][n][j] = 0;
      }
    }
    m = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet, not NaN
    l = 0;
    own_visible = rows.visible(at.seqlen_k, own_row);
    const int end = visible_end();
    buffer = 0;

    for (int token_begin = at.token_begin(); token_begin < end;
         token_begin += kTokens, buffer ^= 1) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // K is there for all, and the other buffer has been read by all
      if (token_begin + kTokens < end) copy_kv(token_begin + kTokens, buffer ^ 1);
      ptx::cp_async_commit_group();
      issue_qk();
      __syncthreads();  // all shares of S are there
      const float a = softmax(token_begin);
      if (__syncthreads_or(a != 1)) rescale();  // also: P and a are there
      issue_pv();
    }

    const int slot = at.slot();
    write_lse(slot);
    at.next();
    begin_piece();  // the next piece's Q and K come while O is written
    write_out(slot);
  }
}

}  // namespace mla::MLA_MACHINE::cp_async
