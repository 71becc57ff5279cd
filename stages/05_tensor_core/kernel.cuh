// 05_tensor_core: both products on tensor cores, by mma.sync m16n8k16 with fp32 accumulators. q and K
// stay 16 bits wide; K comes by cp.async into one of two buffers while the other is worked on; the
// plan and the combine are stage 04's.
//
//   S = Q K^T      [kRows, kTokens]  a warp has a share of the rows, of the tokens and of the 576 columns
//   exchange                         two warps with the same rows and tokens add their sums, and share the rows
//   P = 2^(scale log2(e) S - m), l = l + rowsum P;  m is seldom moved, and then O = a O, l = a l
//   O = O + P V    [kRows, 512]      a warp has all rows, and 512 / kWarps columns
//
// What limits the tensor cores is shared memory, so the shares are as large as registers allow: every
// value that ldmatrix brings is used by as many mma as can be.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::tensor_core {

// How a block's warps share a tile of kRows rows by kTokens tokens.
template <int kRows_, int kTokens_, int kRowWarps_, int kTokenWarps_, int kDepthWarps_>
struct Tiling {
  static constexpr int kRows = kRows_, kTokens = kTokens_;
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_;
  static constexpr int kDepthWarps = kDepthWarps_;  // that share the 576 columns of the same S
  static constexpr int kWarps = kRowWarps * kTokenWarps * kDepthWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpColumns = kHeadDimV / kWarps;  // of O
  static constexpr int kStrideP = kTokens + 8;             // + 8: ldmatrix without a bank conflict
  static_assert(kGrainTokens % kTokens == 0, "a piece ends with a tile");
  static_assert(kWarpRows == 16 * kDepthWarps, "after the exchange a warp has 16 rows of S");
  static_assert(kDepthWarps == 1 || (kDepthWarps == 2 && kRowWarps == 2), "room for the exchange");
  static_assert(kWarpTokens % 8 == 0 && kWarpColumns % 16 == 0, "whole fragments");
};

// Rows of q and K are 72 chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would:
// the eight rows of an 8x8 matrix are 1152 bytes apart, and so get banks of their own.
template <typename Tile>
struct Smem {
  uint4 q[Tile::kRows][kHeadDimQK / 8];
  uint4 kv[2][Tile::kTokens][kHeadDimQK / 8];  // K; its first 512 columns are V
  uint16_t p[Tile::kRows][Tile::kStrideP];
  float row_max[Tile::kTokenWarps][Tile::kRows];  // at the end: row sums
  float rescale[Tile::kRows];                     // a; at the end 1 / l
  int64_t out_row[Tile::kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
  MLA_REGIONS(q, kv, p, row_max, rescale, out_row)
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

// One item: a worker, for one tile of rows of a KV head. kPagesOf64: the page
// size is 64, which the compiler then knows.
template <typename T, typename Tile, int kBlocks, bool kPagesOf64>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  if (kPagesOf64) problem.page_size = 64;
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens, kDepth = Tile::kDepthWarps;
  constexpr int kTokenTiles = Tile::kWarpTokens / 8;  // 16x8 fragments of a warp's share of S
  auto& smem = shared_memory<Smem<Tile>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int depth = warp % kDepth, token_warp = warp / kDepth % Tile::kTokenWarps;
  const int row_warp = warp / (kDepth * Tile::kTokenWarps);
  // The softmax's share: rows own_row and own_row + 8, tokens own_token + 8 n + {0, 1}.
  const int own_row = row_warp * Tile::kWarpRows + depth * 16 + lane / 4;
  const int own_token = token_warp * Tile::kWarpTokens + lane % 4 * 2;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible = [&](int r) { return rows.visible(at.seqlen_k, r); };
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  // Of the piece:
  float o_rmem[kRows / 16][Tile::kWarpColumns / 8][4];  // [kRows, kWarpColumns]
  float m[2] = {};
  float l[2] = {};     // of this thread's tokens
  int own_visible[2];  // tokens that the thread's two rows see
  int all_visible;     // tokens that all rows see
  int buffer;          // of the tile

  // Rows past the last become 0.
  const auto copy_q = [&] {
    copy_rows<Tile::kThreads, kRows>(smem.q, tensors.q, [&](int r) -> const uint4* {
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
    copy_rows<Tile::kThreads, kTokens>(smem.kv[to], tensors.kv_cache, [&](int r) -> const uint4* {
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
  // S = Q K^T  [kWarpRows, kWarpTokens], over this warp's 32 of every 32 kDepth columns
  const auto issue_qk = [&](float(&s_rmem)[kDepth][kTokenTiles][4]) {
#pragma unroll
    for (int k = 0; k < kHeadDimQK / 8; k += 4 * kDepth) {  // in chunks of 8 columns
      uint32_t q_rmem[2][kDepth][4];                        // [16 columns][16 rows]
#pragma unroll
      for (int i = 0; i < 2 * kDepth; ++i) {
        const int row = row_warp * Tile::kWarpRows + i / 2 * 16 + lane % 16;
        const int chunk = k + 4 * depth + i % 2 * 2 + lane / 16;
        ptx::ldmatrix_x4(q_rmem[i % 2][i / 2], &smem.q[row][chunk ^ lane % 8]);
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint32_t k_rmem[4];  // 8 tokens, 32 columns
        const int token = token_warp * Tile::kWarpTokens + n * 8 + lane % 8;
        const int chunk = k + 4 * depth + lane / 8;
        ptx::ldmatrix_x4(k_rmem, &smem.kv[buffer][token][chunk ^ lane % 8]);
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
          ptx::mma_m16n8k16<T>(s_rmem[i][n], q_rmem[0][i], k_rmem[0], k_rmem[1]);
          ptx::mma_m16n8k16<T>(s_rmem[i][n], q_rmem[1][i], k_rmem[2], k_rmem[3]);
        }
      }
    }
  };
  // The two warps of the same rows and tokens give each other the half of the rows that the other keeps,
  // through memory that is idle now: the rows' places in P, and the tokens' rotary columns.
  const auto exchange = [&](const float(&s_rmem)[kDepth][kTokenTiles][4],
                            float(&s)[kTokenTiles][4]) {
    if constexpr (kDepth == 1) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        for (int j = 0; j < 4; ++j) s[n][j] = s_rmem[0][n][j];
      }
    } else {
      constexpr int kHalf = Tile::kThreads / 2;
      float4* in_p = reinterpret_cast<float4*>(smem.p[row_warp * Tile::kWarpRows]) +
                     token_warp * kTokenTiles * 32 + lane;
      const auto in_kv = [&](int n) {
        const int place = (row_warp * kTokenTiles + n) * 32 + lane;
        const int token = token_warp * Tile::kWarpTokens + place / 8;
        return reinterpret_cast<float4*>(&smem.kv[buffer][token][kHeadDimV / 8 + place % 8]);
      };
      ptx::barrier_sync(1 + token_warp, kHalf);  // these tokens' rotary columns have been read
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const auto& give = s_rmem[1][n];
        const auto& keep = s_rmem[0][n];
        for (int j = 0; j < 4; ++j) s[n][j] = depth == 0 ? keep[j] : give[j];
        *(depth == 0 ? &in_p[n * 32] : in_kv(n)) =
            depth == 0 ? make_float4(give[0], give[1], give[2], give[3])
                       : make_float4(keep[0], keep[1], keep[2], keep[3]);
      }
      ptx::barrier_sync(3 + row_warp, kHalf);  // the other half's sums are there
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const float4 other = *(depth == 0 ? in_kv(n) : &in_p[n * 32]);
        s[n][0] += other.x;
        s[n][1] += other.y;
        s[n][2] += other.z;
        s[n][3] += other.w;
      }
    }
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else the largest S of a row might exceed the m made of it, and P its bound, for ever.
  const auto scale_and_mask = [&](float(&s)[kTokenTiles][4], int token_begin) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      for (int j = 0; j < 4; ++j) s[n][j] = __fmul_rn(s[n][j], items.scale_log2);
    }
    if (token_begin + kTokens <= all_visible) return;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      for (int j = 0; j < 4; ++j) {
        const int token = token_begin + own_token + n * 8 + j % 2;
        if (token >= own_visible[j / 2]) s[n][j] = -INFINITY;
      }
    }
  };
  // P = 2^(S - m), sum = rowsum P of this thread's tokens. False if some P of any thread exceeds the bound.
  const auto softmax = [&](const float(&s)[kTokenTiles][4], float(&sum)[2]) {
    bool exceeds = false;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = ptx::ex2_approx(s[n][2 * i] - m[i]);
        const float p1 = ptx::ex2_approx(s[n][2 * i + 1] - m[i]);
        exceeds |= p0 > kBound<T> || p1 > kBound<T>;
        sum[i] += p0 + p1;
        *reinterpret_cast<uint32_t*>(&smem.p[own_row + 8 * i][own_token + n * 8]) = pack<T>(p0, p1);
      }
    }
    return !__syncthreads_or(exceeds);  // also: P is there
  };
  // m' = max(m, rowmax S + kHeadroom - kLargestP), a = 2^(m - m'), l = a l, O = a O
  const auto rescale = [&](const float(&s)[kTokenTiles][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -INFINITY;
      for (int n = 0; n < kTokenTiles; ++n) {
        largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      if (lane % 4 == 0) smem.row_max[token_warp][own_row + 8 * i] = largest;
    }
    __syncthreads();  // all maxima are there
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m_new = m[i];
      for (int w = 0; w < Tile::kTokenWarps; ++w) {
        m_new = fmaxf(m_new, smem.row_max[w][own_row + 8 * i] + (kHeadroom - kLargestP<T>));
      }
      const float a = ptx::ex2_approx(m[i] - m_new);  // old minus new: at most 1
      m[i] = m_new;
      l[i] *= a;
      if (token_warp == 0 && lane % 4 == 0) smem.rescale[own_row + 8 * i] = a;
    }
    __syncthreads();  // a is there
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const float a_low = smem.rescale[i * 16 + lane / 4];
      const float a_high = smem.rescale[i * 16 + 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < Tile::kWarpColumns / 8; ++n) {
        o_rmem[i][n][0] *= a_low;
        o_rmem[i][n][1] *= a_low;
        o_rmem[i][n][2] *= a_high;
        o_rmem[i][n][3] *= a_high;
      }
    }
  };
  // O = O + P V  [kRows, kWarpColumns], 16 tokens per step
  const auto issue_pv = [&] {
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t p_rmem[kRows / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        ptx::ldmatrix_x4(p_rmem[i], &smem.p[i * 16 + lane % 16][t + lane / 16 * 8]);
      }
#pragma unroll
      for (int n = 0; n < Tile::kWarpColumns / 16; ++n) {
        uint32_t v_rmem[4];  // 16 tokens, 16 columns
        const int chunk = warp * (Tile::kWarpColumns / 8) + n * 2 + lane / 16;
        ptx::ldmatrix_x4_trans(v_rmem, &smem.kv[buffer][t + lane % 16][chunk ^ lane % 8]);
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
          ptx::mma_m16n8k16<T>(o_rmem[i][2 * n], p_rmem[i], v_rmem[0], v_rmem[1]);
          ptx::mma_m16n8k16<T>(o_rmem[i][2 * n + 1], p_rmem[i], v_rmem[2], v_rmem[3]);
        }
      }
    }
  };
  // lse = ln 2 (m + log2 l), with l the sum of all warps' tokens; and, for all warps, 1 / l and the rows'
  // places in out or out_partial. A row that saw nothing: out = 0, lse = +inf, or -inf in a part.
  const auto write_lse = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
      if (lane % 4 == 0) smem.row_max[token_warp][own_row + 8 * i] = l[i];
    }
    __syncthreads();  // all warps' sums are there
    if (token_warp == 0 && lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = own_row + 8 * i;
        float sum = 0;
        for (int w = 0; w < Tile::kTokenWarps; ++w) sum += smem.row_max[w][r];
        const bool saw_something = own_visible[i] > at.token_begin();
        const float lse = kLn2 * (m[i] + log2f(sum));
        smem.rescale[r] = saw_something ? 1 / sum : 0;
        smem.out_row[r] = -1;
        if (rows.exists(r) && slot >= 0) {
          const int64_t place = rows.slot_place(slot, r);
          split.lse_partial[place] = saw_something ? lse : -INFINITY;
          smem.out_row[r] = place * kHeadDimV;
        } else if (rows.exists(r)) {
          tensors.lse[rows.lse_place(at.sequence, r)] = saw_something ? lse : INFINITY;
          smem.out_row[r] = rows.out_place(at.sequence, r);
        }
      }
    }
    __syncthreads();  // 1 / l and the rows' places are there; Q and K have been read
  };
  // out = O / l
  const auto write_out = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = i * 16 + half * 8 + lane / 4;
        if (smem.out_row[r] < 0) continue;
        const int64_t first = smem.out_row[r] + warp * Tile::kWarpColumns + lane % 4 * 2;
        const float inverse_l = smem.rescale[r];
#pragma unroll
        for (int n = 0; n < Tile::kWarpColumns / 8; ++n) {
          const float low = o_rmem[i][n][2 * half] * inverse_l;
          const float high = o_rmem[i][n][2 * half + 1] * inverse_l;
          if (slot >= 0) {
            *reinterpret_cast<float2*>(split.out_partial + first + n * 8) = make_float2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(static_cast<T*>(tensors.out) + first + n * 8) =
                pack<T>(low, high);
          }
        }
      }
    }
  };

  begin_piece();
  while (at.more()) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpColumns / 8; ++n) {
        for (int j = 0; j < 4; ++j) o_rmem[i][n][j] = 0;
      }
    }
    m[0] = m[1] = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet
    l[0] = l[1] = 0;
    own_visible[0] = visible(own_row);
    own_visible[1] = visible(own_row + 8);
    all_visible = visible(0);
    const int end = visible_end();
    buffer = 0;

    for (int token_begin = at.token_begin(); token_begin < end;
         token_begin += kTokens, buffer ^= 1) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // K is there for all, and the other buffer has been read by all
      if (token_begin + kTokens < end) copy_kv(token_begin + kTokens, buffer ^ 1);
      ptx::cp_async_commit_group();
      float s_rmem[kDepth][kTokenTiles][4] = {};
      float s[kTokenTiles][4], sum[2];
      issue_qk(s_rmem);
      exchange(s_rmem, s);
      scale_and_mask(s, token_begin);
      if constexpr (kDepth == 2) {
        ptx::barrier_sync(3 + row_warp, Tile::kThreads / 2);  // the exchange has been read from P
      }
      // Any m will do on which P, l and O agree. It stays as long as no P exceeds the bound; when one
      // does, as in the first tile, m moves, and P is made again.
      while (!softmax(s, sum)) rescale(s);
      l[0] += sum[0];
      l[1] += sum[1];
      issue_pv();
    }

    const int slot = at.slot();
    write_lse(slot);
    at.next();
    begin_piece();  // the next piece's Q and K come while O is written
    write_out(slot);
  }
}

}  // namespace mla::MLA_MACHINE::tensor_core
