namespace mla { extern int mutant; }  // 06_wgmma: both products by wgmma, which reads shared memory itself: Q, K, P and V lie there in the
// swizzled layout that it knows, and no warp loads a fragment any more. Two warpgroups share a tile:
//
//   S = Q K^T      [64, 64]   per warpgroup all 64 rows and 32 of the 64 tokens
//   P = 2^(scale log2(e) S - m), l = l + rowsum P;  m is seldom moved, and then O = a O, l = a l
//   O = O + P V    [64, 512]  per warpgroup all 64 rows and 256 of the 512 columns
//
// Both need all of P, so it goes through shared memory. K comes by cp.async into one of two buffers;
// the plan, the combine and the seldom moved m are those of stages 04 and 05.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::wgmma {

constexpr int kThreads = 256;            // two warpgroups
constexpr int kRows = 64, kTokens = 64;  // of a tile
constexpr int kBoxes = kHeadDimQK / 64;  // boxes of 64 columns in a row of Q or K
constexpr int kColumns = kHeadDimV / 2;  // of O, per warpgroup
constexpr int kOwnTokens = kTokens / 2;  // of S, per warpgroup
constexpr int kBoxBytes = 64 * 128;      // 64 rows of 64 columns
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// A box: rows of 128 bytes. Chunk c of row r, 16 bytes, lies where chunk c ^ (r % 8) would: wgmma's
// 128-byte swizzle.
using Box = uint4[64][8];

struct Smem {
  Box q[kBoxes];
  Box kv[2][kBoxes];        // K; its first 8 boxes are V
  Box p;                    // [64 rows, 64 tokens]
  float row_max[2][kRows];  // of a warpgroup's tokens
  float row_sum[2][kRows];
  MLA_REGIONS(q, kv, p, row_max, row_sum)
};
static_assert(sizeof(Smem) <= 232448, "227 KB");

// Starts copying 64 rows of 576 values to boxes: row(r) is where row r is, null for zeros. 8 threads per
// row, 128 bytes per turn.
template <typename Row>
__device__ __forceinline__ void copy_rows(Box* boxes_smem, const void* any_gmem, const Row& row) {
  const int chunk = threadIdx.x % 8;
#pragma unroll 1
  for (int r = threadIdx.x / 8; r < 64; r += kThreads / 8) {
    const uint4* source = row(r);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      ptx::cp_async_16(&boxes_smem[box][r][chunk ^ r % 8],
                       source == nullptr ? any_gmem : source + box * 8 + chunk,
                       source == nullptr ? 0 : 16);
    }
  }
}

// One item: a worker, for one tile of rows of a KV head. kPagesOf64: the page
// size is 64, which the compiler then knows.
template <typename T, bool kPagesOf64>
__global__ void __launch_bounds__(kThreads, 1)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  if (kPagesOf64) problem.page_size = 64;
  auto& smem = shared_memory<Smem>();
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  // Of S and of O alike: rows own_row and own_row + 8; in 8 n + {0, 1} columns.
  const int own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int own_token = warpgroup * kOwnTokens + lane % 4 * 2;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible = [&](int r) { return rows.visible(at.seqlen_k, r); };
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, 1024);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, 1024);

  // Of the piece:
  float o_rmem[kColumns / 8][4];  // [64, kColumns]
  float m[2] = {};
  float l[2] = {};     // of this thread's tokens
  int own_visible[2];  // tokens that the thread's two rows see
  int all_visible;     // tokens that all rows see
  int buffer;          // of the tile

  // Rows past the last become 0.
  const auto copy_q = [&] {
    copy_rows(smem.q, tensors.q, [&](int r) -> const uint4* {
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
    copy_rows(smem.kv[to], tensors.kv_cache, [&](int r) -> const uint4* {
      { if (::mla::mutant == 18) {  } else { if (token_begin + r >= at.seqlen_k) return nullptr; } }
      return (::mla::mutant == 24 ? (tile_gmem + r * (tensors.kv_strides.token / 8)) : (problem.page_size < kTokens ? token_gmem(token_begin + r)
                                         : tile_gmem + r * ((::mla::mutant == 25 ? (kHeadDimQK / 8) : (tensors.kv_strides.token / 8)))));
    });
  };
  const auto begin_piece = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      copy_q();
      copy_kv(at.token_begin(), 0);
    }
    ptx::cp_async_commit_group();
  };
  // S = Q K^T  [64, kOwnTokens], 16 columns per step. To be waited for.
  const auto issue_qk = [&](float(&s_rmem)[kOwnTokens / 8][4]) {
    const ptx::MatrixDescriptor k =
        ptx::matrix_descriptor(smem.kv[buffer][0][warpgroup * kOwnTokens], 0, 1024);
    { if (::mla::mutant == 11) {  } else { ptx::wgmma_fence(s_rmem); } }
#pragma unroll
    for (int step = 0; step < kHeadDimQK / 16; ++step) {
      const int offset = (step / 4 * kBoxBytes + step % 4 * 32) / 16;
      ptx::wgmma_m64nNk16<T>(s_rmem, q + offset, k + offset, step > 0);
    }
    { if (::mla::mutant == 13) {  } else { ptx::wgmma_commit_group(); } }
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else the largest S of a row might exceed the m made of it, and P its bound, for ever.
  const auto scale_and_mask = [&](float(&s_rmem)[kOwnTokens / 8][4], int token_begin) {
#pragma unroll
    for (int n = 0; n < kOwnTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
    }
    if (token_begin + kTokens <= all_visible) return;
#pragma unroll
    for (int n = 0; n < kOwnTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) {
        const int token = token_begin + own_token + n * 8 + j % 2;
        if (token >= own_visible[j / 2]) s_rmem[n][j] = -INFINITY;
      }
    }
  };
  // P = 2^(S - m), sum = rowsum P of this thread's tokens. False if some P of any thread exceeds the bound.
  const auto softmax = [&](const float(&s_rmem)[kOwnTokens / 8][4], float(&sum)[2]) {
    bool exceeds = false;
    sum[0] = sum[1] = 0;
    uint32_t p_rmem[kOwnTokens / 8][2];
#pragma unroll
    for (int n = 0; n < kOwnTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = ptx::ex2_approx(s_rmem[n][2 * i] - m[i]);
        const float p1 = ptx::ex2_approx(s_rmem[n][2 * i + 1] - m[i]);
        exceeds |= p0 > kBound<T> || p1 > kBound<T>;
        sum[i] += p0 + p1;
        p_rmem[n][i] = pack<T>(p0, p1);
      }
    }
#pragma unroll
    for (int n = 0; n < kOwnTokens / 8; n += 2) {  // 16 rows, 16 tokens
      const uint32_t four[4] = {p_rmem[n][0], p_rmem[n][1], p_rmem[n + 1][0], p_rmem[n + 1][1]};
      const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
      const int chunk = warpgroup * (kOwnTokens / 8) + n + lane / 16;
      ptx::stmatrix_x4(&smem.p[row][chunk ^ row % 8], four);
    }
    { if (::mla::mutant == 5) {  } else { ptx::fence_proxy_async(); } }
    return !(::mla::mutant == 7 ? (__any_sync(0xffffffff, exceeds)) : (__syncthreads_or(exceeds)));  // also: P is there, for wgmma
  };
  // m' = max(m, rowmax S + kHeadroom - kLargestP), a = 2^(m - m'), l = a l, O = a O
  const auto rescale = [&](const float(&s_rmem)[kOwnTokens / 8][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -INFINITY;
      for (int n = 0; n < kOwnTokens / 8; ++n) {
        largest = fmaxf(largest, fmaxf(s_rmem[n][2 * i], s_rmem[n][2 * i + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      if (lane % 4 == 0) smem.row_max[warpgroup][own_row + 8 * i] = largest;
    }
    { if (::mla::mutant == 8) {  } else { __syncthreads(); } }  // the maxima of both warpgroups are there
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float largest =
          (::mla::mutant == 22 ? (smem.row_max[warpgroup][own_row + 8 * i]) : (fmaxf(smem.row_max[0][own_row + 8 * i], smem.row_max[1][own_row + 8 * i])));
      const float m_new = fmaxf(m[i], largest + (kHeadroom - kLargestP<T>));
      const float a = ptx::ex2_approx((::mla::mutant == 19 ? (m_new - m[i]) : (m[i] - m_new)));  // old minus new: at most 1
      m[i] = m_new;
      { if (::mla::mutant == 21) {  } else { l[i] *= a; } }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        { if (::mla::mutant == 20) {  } else { o_rmem[n][2 * i] *= a;
        o_rmem[n][2 * i + 1] *= a; } }
      }
    }
  };
  // O = O + P V  [64, kColumns], 16 tokens per step. To be waited for.
  const auto issue_pv = [&] {
    const ptx::MatrixDescriptor v =
        ptx::matrix_descriptor(smem.kv[buffer][(::mla::mutant == 23 ? ((1 - warpgroup) * (kColumns / 64)) : (warpgroup * (kColumns / 64)))], kBoxBytes, 1024);
    { if (::mla::mutant == 12) {  } else { ptx::wgmma_fence(o_rmem); } }
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      ptx::wgmma_m64n256k16_trans_b<T>(o_rmem, p + t * 2 / 16, v + t * 128 / 16, true);
    }
    { if (::mla::mutant == 14) {  } else { ptx::wgmma_commit_group(); } }
  };
  // lse = ln 2 (m + log2 l), with l the sum of both warpgroups' tokens; and, of the thread's two rows,
  // 1 / l and the place in out or out_partial, -1 for none. A row that saw nothing: out = 0, lse = +inf,
  // or -inf in a part.
  const auto write_lse = [&](float(&inverse_l)[2], int64_t(&place)[2], int slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
      if (lane % 4 == 0) smem.row_sum[warpgroup][own_row + 8 * i] = l[i];
    }
    { if (::mla::mutant == 9) {  } else { __syncthreads(); } }  // the sums are there; Q and K have been read
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = own_row + 8 * i;
      const float sum = smem.row_sum[0][r] + smem.row_sum[1][r];
      const bool saw_something = own_visible[i] > at.token_begin();
      inverse_l[i] = saw_something ? 1 / sum : 0;
      const float lse = kLn2 * (m[i] + log2f(sum));
      const bool writes_lse = warpgroup == 0 && lane % 4 == 0;
      place[i] = -1;
      if (rows.exists(r) && slot >= 0) {
        const int64_t at_slot = rows.slot_place(slot, r);
        place[i] = at_slot * kHeadDimV;
        if (writes_lse) split.lse_partial[at_slot] = saw_something ? lse : -INFINITY;
      } else if (rows.exists(r)) {
        place[i] = rows.out_place(at.sequence, r);
        if (writes_lse) {
          tensors.lse[rows.lse_place(at.sequence, r)] = saw_something ? lse : INFINITY;
        }
      }
    }
  };
  // out = O / l
  const auto write_out = [&](const float(&inverse_l)[2], const int64_t(&place)[2], int slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (place[i] < 0) continue;
      const int64_t first = place[i] + warpgroup * kColumns + lane % 4 * 2;
      float* partial_gmem = split.out_partial + first;
      T* out_gmem = static_cast<T*>(tensors.out) + first;
      if (slot >= 0) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          *reinterpret_cast<float2*>(partial_gmem + n * 8) =
              make_float2(o_rmem[n][2 * i] * inverse_l[i], o_rmem[n][2 * i + 1] * inverse_l[i]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          *reinterpret_cast<uint32_t*>(out_gmem + n * 8) =
              pack<T>(o_rmem[n][2 * i] * inverse_l[i], o_rmem[n][2 * i + 1] * inverse_l[i]);
        }
      }
    }
  };

  begin_piece();
  while (at.more()) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      for (int j = 0; j < 4; ++j) o_rmem[n][j] = 0;
    }
    m[0] = m[1] = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet
    l[0] = l[1] = 0;
    own_visible[0] = visible(own_row);
    own_visible[1] = visible(own_row + 8);
    all_visible = min(at.token_end(), visible(0));
    const int end = visible_end();
    buffer = 0;

    for (int token_begin = at.token_begin(); token_begin < end;
         token_begin += kTokens, buffer ^= 1) {
      float s_rmem[kOwnTokens / 8][4], sum[2];
      // What cp.async wrote, wgmma reads through the asynchronous proxy: each thread fences what it
      // copied itself, and then all meet.
      { if (::mla::mutant == 4) { ptx::fence_proxy_async(); ptx::cp_async_wait_group<0>(); } else { { if (::mla::mutant == 1) {  } else if (::mla::mutant == 2) { ptx::cp_async_wait_group<1>(); } else { ptx::cp_async_wait_group<0>(); } }
      { if (::mla::mutant == 3) {  } else { ptx::fence_proxy_async(); } } } }
      { if (::mla::mutant == 6) {  } else { __syncthreads(); } }  // the tile is there; the other buffer and P have been read
      issue_qk(s_rmem);
      if (token_begin + kTokens < end) copy_kv(token_begin + kTokens, (::mla::mutant == 17 ? (buffer) : (buffer ^ 1)));  // meanwhile
      ptx::cp_async_commit_group();
      { if (::mla::mutant == 15) { ptx::wgmma_wait_group<1>(s_rmem); } else { ptx::wgmma_wait_group<0>(s_rmem); } }
      scale_and_mask(s_rmem, token_begin);
      // m stays as long as no P exceeds the bound; when one does, as in the first tile, m moves, and P is
      // made again.
      while (!softmax(s_rmem, sum)) rescale(s_rmem);
      l[0] += sum[0];
      l[1] += sum[1];
      issue_pv();
      { if (::mla::mutant == 16) {  } else { ptx::wgmma_wait_group<0>(o_rmem); } }
    }

    // Without a tile there was no barrier yet behind the reads of the sums of the piece before.
    { if (::mla::mutant == 10) {  } else { if (at.token_begin() >= end) __syncthreads(); } }
    float inverse_l[2];
    int64_t place[2];
    const int slot = at.slot();
    write_lse(inverse_l, place, slot);
    at.next();
    begin_piece();  // the next piece's Q and K come while O is written
    write_out(inverse_l, place, slot);
  }
}

}  // namespace mla::MLA_MACHINE::wgmma
