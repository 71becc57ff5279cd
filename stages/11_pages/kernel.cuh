// 10_few_heads: the operands change places. A product of the tensor cores has 64 rows, and few heads
// do not fill them; its columns come in eights. So tokens become the rows, and query rows the columns:
//
//   S^T [64 tokens, rows]  = K [64, 576] Q^T
//   O^T [512, rows]       += V^T [512, 64] P^T
//
// One warpgroup multiplies, one warp copies: boxes of 64 tokens by 64 columns go round in a ring that
// fills what shared memory the rest leaves.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::pages {

constexpr int kConsumers = 128;            // one warpgroup
constexpr int kThreads = kConsumers + 32;  // and the producer
constexpr int kWarps = kConsumers / 32;    // of consumers
constexpr int kTokens = 64;                // of a tile
constexpr int kBoxes = kHeadDimQK / 64;    // boxes of 64 columns in a tile of K
constexpr int kVBoxes = kHeadDimV / 64;    // those of V
constexpr int kRotaryBox = 8;
constexpr int kBoxBytes = kTokens * 128;
constexpr size_t kMaxSharedBytes = 232448;  // 227 KB
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// Rows of 128 bytes. Chunk c of row r, 16 bytes, lies where chunk c ^ (r % 8) would: wgmma's 128-byte
// swizzle.
template <int kRows>
using Box = uint4[kRows][8];

// kRows: of a tile, a multiple of 8.
template <int kRows>
struct Small {
  float row_max[kWarps][kRows];
  float row_sum[kWarps][kRows];
  int slot;  // of the piece
};
constexpr int kPages = 2;
constexpr int kGroupBytes = kBoxes * 1024, kPageBytes = kBoxes * kBoxBytes;

template <int kRows>
struct Smem {
  uint4 kv[kPages][kTokens / 8][kBoxes][8][8];
  Box<kRows> q[kBoxes];
  Box<kRows> p;                          // P^T: rows by tokens
  ptx::Mbarrier full[kPages];
  ptx::Mbarrier empty[kPages];
  Small<kRows> small;
};

enum Barrier { kConsumersOnly = 1 };  // 128 sync

// One item: a worker, for one tile of rows of a KV head.
template <typename T, int kRows, bool kPagesOf64>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items) {
  if (kPagesOf64) problem.page_size = 64;
  auto& smem = shared_memory<Smem<kRows>>();
  static_assert(sizeof(Smem<kRows>) <= kMaxSharedBytes);
  constexpr int kTiles = kRows / 8;  // of 8 rows
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible = [&](int r) { return rows.visible(at.seqlen_k, r); };
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < kPages; ++i) {
      ptx::mbarrier_init(&smem.full[i], 1);
      ptx::mbarrier_init(&smem.empty[i], kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  if (warp == kWarps) {  // the producer: a lane for each page of a tile
    const int step = min(kTokens, problem.page_size);
    const int row = lane * step;  // the lane's first in the tile
    if (row >= kTokens) return;
    const uint64_t policy = ptx::createpolicy_evict_first();
    int slot = 0, parity = 1;  // new barriers let the first copies pass
    for (; at.more(); at.next()) {
      const int end = visible_end();
      const int32_t* table = tensors.table_row(at.sequence);
      const auto page_at = [&](int token) {  // past the sequence's end page -1, which makes zeros
        return token < at.seqlen_k ? table[problem.page_of(token)] : -1;
      };
      int next_page = page_at(at.token_begin() + row);
      for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
        const int page = next_page;
        next_page = page_at(token_begin + kTokens + row);
        const int row_in_page = problem.row_in_page(token_begin + row);
        ptx::mbarrier_wait(&smem.empty[slot], parity);
        if (lane == 0) ptx::mbarrier_arrive_expect_tx(&smem.full[slot], kPageBytes);
        ptx::cp_async_bulk_tensor_5d(smem.kv[slot][row / 8], &cache_map, 0, 0, 0, row_in_page / 8,
                                     page, &smem.full[slot], policy);
        if (++slot == kPages) {
          slot = 0;
          parity ^= 1;
        }
      }
    }
    return;
  }

  // Of S^T, this thread has tokens own_token and own_token + 8, of O^T columns 64 box + own_token and
  // + 8; in both, query rows 8 n + own_row + {0, 1}.
  const int own_token = warp * 16 + lane / 4, own_row = lane % 4 * 2;
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, 1024);
  const ptx::MatrixDescriptor kv = ptx::matrix_descriptor(smem.kv, 0, kGroupBytes);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, 1024);
  int slot = 0, parity = 0;  // of the ring, where the tile begins

  // Of the piece:
  float o_rmem[kVBoxes][kTiles][4];  // O^T
  float m[kTiles][2];
  float l[kTiles][2];  // of this thread's tokens
  int all_visible;     // tokens that all rows see

  // Starts copying Q, if the piece has tokens; rows past the last become 0. 8 threads per row.
  const auto copy_q = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      const int chunk = threadIdx.x % 8;
#pragma unroll 1
      for (int r = threadIdx.x / 8; r < kRows; r += kConsumers / 8) {
        const bool exists = rows.exists(r);
        const uint4* source = static_cast<const uint4*>(tensors.q);
        if (exists) source += rows.q_place(at.sequence, r) / 8 + chunk;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          ptx::cp_async_16(&smem.q[box][r][chunk ^ r % 8], exists ? source + box * 8 : source,
                           exists ? 16 : 0);
        }
      }
    }
    ptx::cp_async_commit_group();
  };
  copy_q();
  while (at.more()) {
#pragma unroll
    for (int box = 0; box < kVBoxes; ++box) {
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) o_rmem[box][n][j] = 0;
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      m[n][0] = m[n][1] = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet
      l[n][0] = l[n][1] = 0;
    }
    all_visible = min(at.token_end(), visible(0));
    const int end = visible_end();

    // Now: at the end all would wait for it.
    const int next_slot = threadIdx.x == 0 ? at.slot() : 0;
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();
    ptx::barrier_sync(kConsumersOnly, kConsumers);  // Q is there, for wgmma; the old slot is read
    if (threadIdx.x == 0) smem.small.slot = next_slot;

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
      // S^T = K Q^T  [64, kRows], box by box, 16 columns per step.
      float s_rmem[kTiles][4];
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        const int box = (i + kRotaryBox) % kBoxes;
        if (i == 0) ptx::mbarrier_wait(&smem.full[slot], parity);
        if (i == 0) {
          ptx::wgmma_fence(s_rmem);
        } else {
          ptx::wgmma_fence();
        }
        const ptx::MatrixDescriptor k = kv + slot * (kPageBytes / 16) + box * 64;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_m64nNk16<T>(s_rmem, k + step * 2, q + (box * kRows * 128 + step * 32) / 16,
                                 i + step > 0);
        }
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(s_rmem);

      // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction
      // of m: else P might exceed its bound where S is large.
      bool exceeds = token_begin == at.token_begin();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
      }
      if (token_begin + kTokens > all_visible) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int j = 0; j < 4; ++j) {
            const int token = token_begin + own_token + j / 2 * 8;
            if (token >= min(at.token_end(), visible(n * 8 + own_row + j % 2))) {
              s_rmem[n][j] = -INFINITY;
            }
          }
        }
        // V = 0 past the sequence's end: the cache may hold anything there, and 0 * NaN would be NaN.
        // All of S is there before the barrier below only if all warps have come.
        const int tokens = at.seqlen_k - token_begin;
        if (tokens < kTokens) {
          ptx::barrier_sync(kConsumersOnly, kConsumers);  // all of S is there
          for (int i = tokens * 8 + threadIdx.x; i < kTokens * 8; i += kConsumers) {
            for (int box = 0; box < kVBoxes; ++box) {
              smem.kv[slot][i / 64][box][i / 8 % 8][i % 8] = make_uint4(0, 0, 0, 0);
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) exceeds |= s_rmem[n][j] > m[n][j % 2] + kLargestP<T>;
      }
      // m stays as long as no P exceeds the bound; if one does, m' = max(m, rowmax S + kHeadroom -
      // kLargestP), a = 2^(m - m'), l = a l and O = a O.
      if (ptx::barrier_sync_or(kConsumersOnly, kConsumers, exceeds)) {
        float largest[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            largest[n][i] = fmaxf(s_rmem[n][i], s_rmem[n][2 + i]);
            for (int offset = 4; offset < 32; offset *= 2) {
              largest[n][i] =
                  fmaxf(largest[n][i], __shfl_xor_sync(0xffffffff, largest[n][i], offset));
            }
            if (lane < 4) smem.small.row_max[warp][n * 8 + own_row + i] = largest[n][i];
          }
        }
        ptx::barrier_sync(kConsumersOnly, kConsumers);  // all maxima are there
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            for (int w = 0; w < kWarps; ++w) {
              largest[n][i] = fmaxf(largest[n][i], smem.small.row_max[w][n * 8 + own_row + i]);
            }
            const float m_new = fmaxf(m[n][i], largest[n][i] + (kHeadroom - kLargestP<T>));
            const float a = ptx::ex2_approx(m[n][i] - m_new);  // old minus new: at most 1
            m[n][i] = m_new;
            l[n][i] *= a;
#pragma unroll
            for (int box = 0; box < kVBoxes; ++box) {
              o_rmem[box][n][i] *= a;
              o_rmem[box][n][2 + i] *= a;
            }
          }
        }
      }
      // P = 2^(S - m), l = l + rowsum P. 8 rows at a time to shared memory.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t p_rmem[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p0 = ptx::ex2_approx(s_rmem[n][2 * i] - m[n][0]);
          const float p1 = ptx::ex2_approx(s_rmem[n][2 * i + 1] - m[n][1]);
          l[n][0] += p0;
          l[n][1] += p1;
          p_rmem[i] = pack<T>(p0, p1);
        }
        ptx::stmatrix_x2_trans(&smem.p[n * 8 + lane % 8][(warp * 2 + lane / 8 % 2) ^ lane % 8],
                               p_rmem);
      }
      ptx::fence_proxy_async();
      ptx::barrier_sync(kConsumersOnly, kConsumers);  // P is there, for wgmma

      // O^T = O^T + V^T P^T  [512, kRows], 16 tokens per step.
      ptx::wgmma_fence(o_rmem[0], o_rmem[1], o_rmem[2], o_rmem[3], o_rmem[4], o_rmem[5], o_rmem[6],
                       o_rmem[7]);
#pragma unroll
      for (int box = 0; box < kVBoxes; ++box) {
        const ptx::MatrixDescriptor v = kv + slot * (kPageBytes / 16) + box * 64;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_m64nNk16_trans_a<T>(o_rmem[box], v + step * 2 * kGroupBytes / 16, p + step * 2, true);
        }
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(o_rmem[0], o_rmem[1], o_rmem[2], o_rmem[3], o_rmem[4], o_rmem[5],
                               o_rmem[6], o_rmem[7]);
      if (lane == 0) ptx::mbarrier_arrive(&smem.empty[slot]);
      if (++slot == kPages) {
        slot = 0;
        parity ^= 1;
      }
    }

    // The sums of all tokens.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      for (int i = 0; i < 2; ++i) {
        for (int offset = 4; offset < 32; offset *= 2) {
          l[n][i] += __shfl_xor_sync(0xffffffff, l[n][i], offset);
        }
        if (lane < 4) smem.small.row_sum[warp][n * 8 + own_row + i] = l[n][i];
      }
    }
    ptx::barrier_sync(kConsumersOnly, kConsumers);  // the sums are there; Q and P have been read
    const int piece_slot = smem.small.slot;
    const int sequence = at.sequence, seqlen_k = at.seqlen_k, piece_begin = at.token_begin();
    at.next();
    copy_q();  // the next piece's Q comes while O is written
    // Not earlier: blocks of the combine that came while few multiprocessors are free would crowd there.
    if (!at.more()) ptx::griddepcontrol_launch_dependents();

    // out = O / l, lse = ln 2 (m + log2 l). A row that saw nothing: out = 0, lse = +inf, or -inf in a
    // part.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float inverse_l[2];
      int64_t place[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = n * 8 + own_row + i;
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += smem.small.row_sum[w][r];
        const bool saw_something = rows.visible(seqlen_k, r) > piece_begin;
        inverse_l[i] = saw_something ? 1 / sum : 0;
        const float lse = kLn2 * (m[n][i] + log2f(sum));
        place[i] = -1;
        if (!rows.exists(r)) continue;
        const bool writes_lse = warp == 0 && lane < 4;
        if (piece_slot >= 0) {
          const int64_t at_slot = rows.slot_place(piece_slot, r);
          place[i] = at_slot * kHeadDimV;
          if (writes_lse) split.lse_partial[at_slot] = saw_something ? lse : -INFINITY;
        } else {
          place[i] = rows.out_place(sequence, r);
          if (writes_lse) tensors.lse[rows.lse_place(sequence, r)] = saw_something ? lse : INFINITY;
        }
      }
      if (piece_slot >= 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (place[i] < 0) continue;
#pragma unroll
          for (int box = 0; box < kVBoxes; ++box) {
            float* to = split.out_partial + place[i] + box * 64 + own_token;
            to[0] = o_rmem[box][n][i] * inverse_l[i];
            to[8] = o_rmem[box][n][2 + i] * inverse_l[i];
          }
        }
        continue;
      }
      // Neighbouring columns are in lanes 4 apart: the first takes both of the first row, the second
      // those of the second.
      const bool odd = lane / 4 % 2 == 1;
      const int64_t own_place = odd ? place[1] : place[0];
      T* out_gmem = static_cast<T*>(tensors.out) + own_place + own_token - int{odd};
#pragma unroll
      for (int box = 0; box < kVBoxes; ++box) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float first = o_rmem[box][n][2 * half] * inverse_l[0];
          const float second = o_rmem[box][n][2 * half + 1] * inverse_l[1];
          const float other = __shfl_xor_sync(0xffffffff, odd ? first : second, 4);
          if (own_place < 0) continue;
          *reinterpret_cast<uint32_t*>(out_gmem + box * 64 + half * 8) =
              odd ? pack<T>(other, second) : pack<T>(first, other);
        }
      }
    }
  }
}

}  // namespace mla::MLA_MACHINE::pages
