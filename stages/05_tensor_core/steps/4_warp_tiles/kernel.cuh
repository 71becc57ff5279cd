// Step 4 from 04_split_kv to 05_tensor_core: S stays in the registers that mma left it in, P is made there, and all that
// warps tell each other of S is row maxima. What step 3 kept S in is free, so a tile may have 64 tokens, and a warp 16 x 32
// of its scores: each fragment of Q serves four products instead of two.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::warp_tiles {

// How a block's warps share S [kRows, kTokens]: 16 rows for each, and some tokens.
template <int kRows>
struct Tiling {
  static constexpr int kTokens = kRows == 64 ? 64 : 32;
  static constexpr int kRowWarps = kRows / 16, kTokenWarps = kRows == 64 ? 2 : 4;
  static constexpr int kWarps = kRowWarps * kTokenWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpColumns = kHeadDimV / kWarps;  // of O
  static constexpr int kStrideP = kTokens + 8;             // + 8: ldmatrix without a bank conflict
};

// Rows of q and K are 72 chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would:
// the eight rows of an 8x8 matrix are 1152 bytes apart, and so get banks of their own.
template <int kRows, typename Tile = Tiling<kRows>>
struct Smem {
  uint4 q[kRows][kHeadDimQK / 8];
  uint4 kv[2][Tile::kTokens][kHeadDimQK / 8];  // K; its first 512 columns are V
  uint16_t p[kRows][Tile::kStrideP];
  float row_max[Tile::kTokenWarps][kRows];  // at the end: row sums
  float rescale[kRows];                     // a; at the end 1 / l
  int64_t out_row[kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
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

// One item: a worker, for one tile of kRows packed rows of a KV head.
template <typename T, int kRows>
__global__ void __launch_bounds__(Tiling<kRows>::kThreads, kRows == 16 ? 2 : 1)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  using Tile = Tiling<kRows>;
  constexpr int kTokens = Tile::kTokens;
  constexpr int kTokenTiles = Tile::kWarpTokens / 8;  // 16x8 fragments of a warp's share of S
  auto& smem = shared_memory<Smem<kRows>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token_warp = warp % Tile::kTokenWarps, row_warp = warp / Tile::kTokenWarps;
  // The softmax's share: rows own_row and own_row + 8, tokens own_token + 8 n + {0, 1}.
  const int own_row = row_warp * 16 + lane / 4;
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
  // S = Q K^T  [16, kWarpTokens], 32 columns per step
  const auto issue_qk = [&](float(&s_rmem)[kTokenTiles][4]) {
#pragma unroll
    for (int k = 0; k < kHeadDimQK / 8; k += 4) {  // in chunks of 8 columns
      uint32_t q_rmem[2][4];                       // [16 columns][16 rows]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_warp * 16 + lane % 16, chunk = k + i * 2 + lane / 16;
        ptx::ldmatrix_x4(q_rmem[i], &smem.q[row][chunk ^ lane % 8]);
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint32_t k_rmem[4];  // 8 tokens, 32 columns
        const int token = token_warp * Tile::kWarpTokens + n * 8 + lane % 8;
        const int chunk = k + lane / 8;
        ptx::ldmatrix_x4(k_rmem, &smem.kv[buffer][token][chunk ^ lane % 8]);
        ptx::mma_m16n8k16<T>(s_rmem[n], q_rmem[0], k_rmem[0], k_rmem[1]);
        ptx::mma_m16n8k16<T>(s_rmem[n], q_rmem[1], k_rmem[2], k_rmem[3]);
      }
    }
  };
  // S = scale log2(e) S, -inf for what a row does not see
  const auto scale_and_mask = [&](float(&s_rmem)[kTokenTiles][4], int token_begin) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      for (int j = 0; j < 4; ++j) {
        s_rmem[n][j] *= items.scale_log2;
        const int token = token_begin + own_token + n * 8 + j % 2;
        if (token >= own_visible[j / 2]) s_rmem[n][j] = -INFINITY;
      }
    }
  };
  // m' = max(m, rowmax S), a = 2^(m - m'); P = 2^(S - m'), l = a l + rowsum P
  const auto softmax = [&](const float(&s_rmem)[kTokenTiles][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -INFINITY;
      for (int n = 0; n < kTokenTiles; ++n) {
        largest = fmaxf(largest, fmaxf(s_rmem[n][2 * i], s_rmem[n][2 * i + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      if (lane % 4 == 0) smem.row_max[token_warp][own_row + 8 * i] = largest;
    }
    __syncthreads();  // all maxima are there
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m_new = m[i];
      for (int w = 0; w < Tile::kTokenWarps; ++w) {
        m_new = fmaxf(m_new, smem.row_max[w][own_row + 8 * i]);
      }
      const float a = ptx::ex2_approx(m[i] - m_new);  // old minus new: at most 1
      m[i] = m_new;
      l[i] *= a;
      moved |= a != 1;
      if (token_warp == 0 && lane % 4 == 0) smem.rescale[own_row + 8 * i] = a;
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = ptx::ex2_approx(s_rmem[n][2 * i] - m[i]);
        const float p1 = ptx::ex2_approx(s_rmem[n][2 * i + 1] - m[i]);
        l[i] += p0 + p1;
        *reinterpret_cast<uint32_t*>(&smem.p[own_row + 8 * i][own_token + n * 8]) = pack<T>(p0, p1);
      }
    }
    return __syncthreads_or(moved);  // also: P and a are there
  };
  const auto rescale = [&] {  // O = a O
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
    const int end = visible_end();
    buffer = 0;

    for (int token_begin = at.token_begin(); token_begin < end;
         token_begin += kTokens, buffer ^= 1) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // K is there for all, and the other buffer has been read by all
      if (token_begin + kTokens < end) copy_kv(token_begin + kTokens, buffer ^ 1);
      ptx::cp_async_commit_group();
      float s_rmem[kTokenTiles][4] = {};
      issue_qk(s_rmem);
      scale_and_mask(s_rmem, token_begin);
      if (softmax(s_rmem)) rescale();
      issue_pv();
    }

    const int slot = at.slot();
    write_lse(slot);
    at.next();
    begin_piece();  // the next piece's Q and K come while O is written
    write_out(slot);
  }
}

}  // namespace mla::MLA_MACHINE::warp_tiles
