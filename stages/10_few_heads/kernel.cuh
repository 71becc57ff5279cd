// 10_few_heads: the operands change places. A product of the tensor cores has 64 rows, and few heads
// do not fill them; its columns come in eights. So tokens become the rows, and query rows the columns:
//
//   S^T [64 tokens, rows]  = K [64, 576] Q^T
//   O^T [512, rows]       += V^T [512, 64] P^T
//
// A warpgroup has up to 32 query rows; where there are more, two have half of them each. One warp
// copies whole tiles. The last block to finish a part of a sequence merges the parts, if they are few.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/arrivals.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::few_heads {

constexpr int kWarps = 4;                 // of a warpgroup
constexpr int kTokens = 64;               // of a tile
constexpr int kBuffers = 2;               // tiles in shared memory
constexpr int kBoxes = kHeadDimQK / 64;   // boxes of 64 columns in a tile of K
constexpr int kVBoxes = kHeadDimV / 64;   // those of V
constexpr int kCopies = 3;                // of a tile, each of so many boxes
constexpr int kCopyBoxes = kBoxes / kCopies;
constexpr int kCopyBytes = kCopyBoxes * kTokens * 128;
constexpr int kGroupBytes = kCopyBoxes * 8 * 128;  // of 8 tokens, in a copy
constexpr int kMaxMerged = 16;            // parts
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// 64 columns of 8 tokens or query rows, in rows of 128 bytes. Chunk c of row r, 16 bytes, lies where
// chunk c ^ r would: wgmma's 128-byte swizzle.
using Atom = uint4[8][8];

// Of a warpgroup. kRows: query rows, a multiple of 8.
template <int kRows>
struct Own {
  Atom q[kBoxes][kRows / 8];
  union {
    Atom p[kRows / 8];                // P^T: query rows by tokens
    float weight[kMaxMerged][kRows];  // of parts to be merged
  };
};
// What needs no alignment.
template <int kRows>
struct OwnSmall {
  float row_max[kWarps][kRows];
  float row_sum[kWarps][kRows];
};

// With two consuming warpgroups registers are short: the producer's warp is in a warpgroup that gives
// its own away.
template <int kWarpgroups>
constexpr int kThreads = kWarpgroups * 128 + (kWarpgroups == 1 ? 32 : 128);
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // a block starts with 168 each

template <int kRows, int kWarpgroups>
struct Smem {
  Atom kv[kBuffers][kCopies][kTokens / 8][kCopyBoxes];
  Own<kRows> own[kWarpgroups];
  ptx::Mbarrier full[kBuffers][kCopies];  // 1 arrival, the producer's, and a copy's bytes
  ptx::Mbarrier empty[kBuffers];          // an arrival of every consuming warp: the tile has been read
  OwnSmall<kRows> small[kWarpgroups];
  int4 part;  // slot of the piece, the first slot and the number of the sequence's; slot -1: none
  int merges;
};

enum Barrier {
  kWarpgroup = 1,    // 128 sync; 1 and 2
  kAllConsumers = 3  // 128 a warpgroup, sync
};

// One item: a worker, for one tile of rows of a KV head.
template <typename T, int kRows, int kWarpgroups>
__global__ void __launch_bounds__(kThreads<kWarpgroups>, 1)
    decode(const __grid_constant__ TensorMap cache_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items) {
  auto& smem = shared_memory<Smem<kRows, kWarpgroups>>();
  static_assert(sizeof(smem) <= 232448, "227 KB");
  constexpr int kConsumers = kWarpgroups * 128;
  constexpr int kTiles = kRows / 8;  // of 8 query rows, in a warpgroup
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const RowTile rows(problem, tensors, items, kRows * kWarpgroups);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows * kWarpgroups));
  };

  if (threadIdx.x == kConsumers) {
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      for (int i = 0; i < kCopies; ++i) ptx::mbarrier_init(&smem.full[buffer][i], 1);
      ptx::mbarrier_init(&smem.empty[buffer], kWarps * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  if (warp >= kConsumers / 32) {  // the producer: a lane for each page of a tile
    if (kWarpgroups > 1) ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp > kConsumers / 32) return;
    const int step = min(kTokens, problem.page_size);
    const int row = lane * step;  // the lane's first in the tile
    if (row >= kTokens) return;
    const uint64_t policy = ptx::createpolicy_evict_first();
    int buffer = 0, parity = 1;  // new barriers let the first copies pass
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
        const int group = problem.row_in_page(token_begin + row) / 8;
        ptx::mbarrier_wait(&smem.empty[buffer], parity);
        for (int i = 0; i < kCopies; ++i) {
          if (lane == 0) ptx::mbarrier_arrive_expect_tx(&smem.full[buffer][i], kCopyBytes);
          ptx::cp_async_bulk_tensor_5d(smem.kv[buffer][i][row / 8], &cache_map, 0, 0,
                                       rows.head_kv * kBoxes + i * kCopyBoxes, group, page,
                                       &smem.full[buffer][i], policy);
        }
        buffer ^= 1;
        if (buffer == 0) parity ^= 1;
      }
    }
    return;
  }

  if (kWarpgroups > 1) ptx::setmaxnreg_inc<kConsumerRegisters>();
  // Of S^T, this thread has tokens own_token and own_token + 8, of O^T columns 64 box + own_token and
  // + 8; in both, the warpgroup's query rows 8 n + own_row + {0, 1}.
  const int warpgroup = warp / kWarps, thread = threadIdx.x % 128;
  const int own_token = warp % kWarps * 16 + lane / 4, own_row = lane % 4 * 2;
  const int first_row = warpgroup * kRows;
  auto& own = smem.own[warpgroup];
  auto& small = smem.small[warpgroup];
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(own.q, 0, 1024);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(own.p, 0, 1024);
  const ptx::MatrixDescriptor kv = ptx::matrix_descriptor(smem.kv, 0, kGroupBytes);
  int buffer = 0, parity = 0;
  const auto box_at = [&](int box) {  // of the buffer's tile
    return kv + ((buffer * kCopies + box / kCopyBoxes) * kCopyBytes + box % kCopyBoxes * 1024) / 16;
  };
  // Barriers that the compiler knows cost less than computed ones.
  const auto any_in_warpgroup = [&](bool predicate) {
    return kWarpgroups == 1 || warpgroup == 0
               ? ptx::barrier_sync_or(kWarpgroup, 128, predicate)
               : ptx::barrier_sync_or(kWarpgroup + 1, 128, predicate);
  };
  const auto sync_warpgroup = [&] {
    if (kWarpgroups == 1 || warpgroup == 0) {
      ptx::barrier_sync(kWarpgroup, 128);
    } else {
      ptx::barrier_sync(kWarpgroup + 1, 128);
    }
  };

  // Of the piece:
  float o_rmem[kVBoxes][kTiles][4];  // O^T
  float m[kTiles][2];
  float l[kTiles][2];  // of this thread's tokens

  // Starts copying Q, if the piece has tokens; rows past the last become 0. 8 threads per row.
  const auto copy_q = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      const int chunk = thread % 8;
#pragma unroll 1
      for (int r = thread / 8; r < kRows; r += 128 / 8) {
        const bool exists = rows.exists(first_row + r);
        const uint4* source = static_cast<const uint4*>(tensors.q);
        if (exists) source += rows.q_place(at.sequence, first_row + r) / 8 + chunk;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          ptx::cp_async_16(&own.q[box][r / 8][r % 8][chunk ^ r % 8],
                           exists ? source + box * 8 : source, exists ? 16 : 0);
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
    const int all_visible = min(at.token_end(), rows.visible(at.seqlen_k, 0));
    const int end = visible_end();

    // Now: at the end all would wait for it.
    const int4 part = threadIdx.x == 0 ? at.part() : make_int4(0, 0, 0, 0);
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();
    ptx::barrier_sync(kAllConsumers, kConsumers);  // Q is there, for wgmma; the old part is read
    if (threadIdx.x == 0) smem.part = part;

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
      // S^T = K Q^T  [64, kRows], 16 columns per step.
      float s_rmem[kTiles][4];
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        if (box % kCopyBoxes == 0) {
          ptx::mbarrier_wait(&smem.full[buffer][box / kCopyBoxes], parity);
          if (box == 0) {
            ptx::wgmma_fence(s_rmem);
          } else {
            ptx::wgmma_fence();  // after each wait: ptxas would insert it
          }
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_m64nNk16<T>(s_rmem, box_at(box) + step * 2,
                                 q + (box * kTiles * 1024 + step * 32) / 16, box + step > 0);
        }
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(s_rmem);

      // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction
      // of m: else P might exceed its bound where S is large.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
      }
      if (token_begin + kTokens > all_visible) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int j = 0; j < 4; ++j) {
            const int token = token_begin + own_token + j / 2 * 8;
            const int r = first_row + n * 8 + own_row + j % 2;
            if (token >= min(at.token_end(), rows.visible(at.seqlen_k, r))) {
              s_rmem[n][j] = -INFINITY;
            }
          }
        }
        // V = 0 past the sequence's end, after S has been made of it: the cache may hold anything there,
        // and 0 * NaN would be NaN.
        const int tokens = at.seqlen_k - token_begin;
        if (tokens < kTokens) {
          ptx::barrier_sync(kAllConsumers, kConsumers);  // all of S is there
          for (int i = tokens * 8 + threadIdx.x; i < kTokens * 8; i += kConsumers) {
            for (int box = 0; box < kVBoxes; ++box) {
              smem.kv[buffer][box / kCopyBoxes][i / 64][box % kCopyBoxes][i / 8 % 8][i % 8] =
                  make_uint4(0, 0, 0, 0);
            }
          }
          if (kWarpgroups > 1) {
            ptx::fence_proxy_async();
            ptx::barrier_sync(kAllConsumers, kConsumers);  // all zeros are there
          }
        }
      }
      // m stays as long as no P exceeds the bound; if one does, m' = max(m, rowmax S + kHeadroom -
      // kLargestP), a = 2^(m - m'), l = a l and O = a O.
      bool exceeds = token_begin == at.token_begin();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) exceeds |= s_rmem[n][j] > m[n][j % 2] + kLargestP<T>;
      }
      if (any_in_warpgroup(exceeds)) {
        float largest[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            largest[n][i] = fmaxf(s_rmem[n][i], s_rmem[n][2 + i]);  // NaN loses
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) {
              largest[n][i] =
                  fmaxf(largest[n][i], __shfl_xor_sync(0xffffffff, largest[n][i], offset));
            }
            if (lane < 4) small.row_max[warp % kWarps][n * 8 + own_row + i] = largest[n][i];
          }
        }
        sync_warpgroup();  // all maxima are there
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            for (int w = 0; w < kWarps; ++w) {
              largest[n][i] = fmaxf(largest[n][i], small.row_max[w][n * 8 + own_row + i]);
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
      // P = 2^(S - m), l = l + rowsum P. P^T to shared memory, 8 query rows at a time.
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
        const int chunk = warp % kWarps * 2 + lane / 8 % 2;
        ptx::stmatrix_x2_trans(&own.p[n][lane % 8][chunk ^ lane % 8], p_rmem);
      }
      ptx::fence_proxy_async();
      sync_warpgroup();  // P is there, for wgmma

      // O^T = O^T + V^T P^T  [512, kRows], 16 tokens per step.
      ptx::wgmma_fence(o_rmem[0], o_rmem[1], o_rmem[2], o_rmem[3], o_rmem[4], o_rmem[5], o_rmem[6],
                       o_rmem[7]);
#pragma unroll
      for (int box = 0; box < kVBoxes; ++box) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_m64nNk16_trans_a<T>(o_rmem[box], box_at(box) + step * 2 * kGroupBytes / 16,
                                         p + step * 2, true);
        }
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(o_rmem[0], o_rmem[1], o_rmem[2], o_rmem[3], o_rmem[4], o_rmem[5],
                               o_rmem[6], o_rmem[7]);
      if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]);  // this warp has read the tile
      buffer ^= 1;
      if (buffer == 0) parity ^= 1;
    }

    // The sums of all tokens.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          l[n][i] += __shfl_xor_sync(0xffffffff, l[n][i], offset);
        }
        if (lane < 4) small.row_sum[warp % kWarps][n * 8 + own_row + i] = l[n][i];
      }
    }
    ptx::barrier_sync(kAllConsumers, kConsumers);  // the sums are there; Q and P have been read
    const int4 of_piece = smem.part;
    const int slot = of_piece.x;
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
        const int own_r = n * 8 + own_row + i, r = first_row + own_r;
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += small.row_sum[w][own_r];
        const bool saw_something = rows.visible(seqlen_k, r) > piece_begin;
        inverse_l[i] = saw_something ? 1 / sum : 0;
        const float lse = kLn2 * (m[n][i] + log2f(sum));
        place[i] = -1;
        if (!rows.exists(r)) continue;
        const bool writes_lse = thread < 4;
        if (slot >= 0) {
          const int64_t at_slot = rows.slot_place(slot, r);
          place[i] = at_slot * kHeadDimV;
          if (writes_lse) split.lse_partial[at_slot] = saw_something ? lse : -INFINITY;
        } else {
          place[i] = rows.out_place(sequence, r);
          if (writes_lse) tensors.lse[rows.lse_place(sequence, r)] = saw_something ? lse : INFINITY;
        }
      }
      if (slot >= 0) {
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

    // The last of the sequence's blocks to come here merges the parts.
    const int pieces = of_piece.z;
    if (slot < 0 || pieces > items.merged_pieces) continue;
    ptx::barrier_sync(kAllConsumers, kConsumers);  // the part is there
    if (threadIdx.x == 0) {
      uint64_t* word = split.arrivals + int64_t{of_piece.y} * items.tiles + rows.tile;
      smem.merges = arrive_last(word, split.call, pieces);
    }
    ptx::barrier_sync(kAllConsumers, kConsumers);  // whether it merges is there
    if (smem.merges == 0) continue;
    const int64_t to_next = int64_t{problem.num_heads_kv} * items.rows;
    const int64_t first = rows.slot_place(of_piece.y, first_row);
    if (thread < kRows && rows.exists(first_row + thread)) {
      const float* lse_partial = split.lse_partial + first + thread;
      float largest = -INFINITY, sum = 0;
      for (int s = 0; s < pieces; ++s) largest = fmaxf(largest, lse_partial[s * to_next]);
      if (largest == -INFINITY) largest = 0;  // nothing seen: the sum below is 0
      for (int s = 0; s < pieces; ++s) {
        const float weight = expf(lse_partial[s * to_next] - largest);
        own.weight[s][thread] = weight;
        sum += weight;
      }
      for (int s = 0; s < pieces; ++s) own.weight[s][thread] *= sum == 0 ? 0 : 1 / sum;
      const float lse = largest + logf(sum);  // -inf for a row that saw nothing, NaN for one with NaN
      tensors.lse[rows.lse_place(sequence, first_row + thread)] = lse == -INFINITY ? INFINITY : lse;
    }
    sync_warpgroup();  // the weights are there
    constexpr int kAhead = 8;  // rows whose loads are in flight
    static_assert(kRows % kAhead == 0);
    const float* out_partial = split.out_partial + first * kHeadDimV + thread * 4;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kAhead) {
      float4 out[kAhead] = {};
#pragma unroll 2
      for (int s = 0; s < pieces; ++s) {
        float4 value[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          value[i] = make_float4(0, 0, 0, 0);
          if (!rows.exists(first_row + row + i)) continue;
          if (own.weight[s][row + i] == 0) continue;  // saw nothing, so there may be anything
          value[i] = *reinterpret_cast<const float4*>(out_partial +
                                                      (s * to_next + row + i) * kHeadDimV);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float weight = own.weight[s][row + i];
          out[i].x += weight * value[i].x;
          out[i].y += weight * value[i].y;
          out[i].z += weight * value[i].z;
          out[i].w += weight * value[i].w;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int r = first_row + row + i;
        if (!rows.exists(r)) continue;
        const float rounded[4] = {out[i].x, out[i].y, out[i].z, out[i].w};
        store_rounded(rounded,
                      static_cast<T*>(tensors.out) + rows.out_place(sequence, r) + thread * 4);
      }
    }
  }
}

}  // namespace mla::MLA_MACHINE::few_heads
