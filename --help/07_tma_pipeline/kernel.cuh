namespace mla { extern int mutant; }  // 07_tma_pipeline: K comes by TMA, sent for by a thread of its own. Nine boxes of 64 columns per tile, each
// with an mbarrier, so that S begins when the first box is there; two tiles, each with an mbarrier by
// which the warpgroups say that it has been read.
//
//   producer      wait empty[t % 2];  nine copies of tile t, each to complete full[t % 2][box]
//   warpgroups    S = Q K^T, box by box as full[t % 2][box] completes;  P;  O = O + P V;
//                 arrive at empty[t % 2]
//
// What the warpgroups compute, and how they share it, is stage 06's.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"
#include "stages/common/timeline.h"

namespace mla::MLA_MACHINE::tma_pipeline {

constexpr int kConsumers = 256;             // two warpgroups
constexpr int kThreads = kConsumers + 128;  // and the producer's
// Registers per thread. A block starts with 168 for each of its 384 threads, and asking for more than
// there are in all would wait for ever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 168 * kThreads);
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
  ptx::Mbarrier full[2][kBoxes];  // 1 arrival, the producer's, and a box's bytes: the box is there
  ptx::Mbarrier empty[2];         // 8 arrivals, the consumers' warps: the tile has been read
  MLA_REGIONS(q, kv, p, row_max, row_sum, full, empty)
};
static_assert(sizeof(Smem) <= 232448, "227 KB");

constexpr int kAllConsumers = 1;  // named barrier: 256 sync

// One item: a worker, for one tile of rows of a KV head. kPagesOf64: the page
// size is 64, which the compiler then knows.
template <typename T, bool kPagesOf64>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items) {
  if (kPagesOf64) problem.page_size = 64;
  auto& smem = shared_memory<Smem>();
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int lane = threadIdx.x % 32;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible = [&](int r) { return rows.visible(at.seqlen_k, r); };
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  if (threadIdx.x == kConsumers) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int box = 0; box < kBoxes; ++box) { if (::mla::mutant == 26) { ptx::mbarrier_init(&smem.full[buffer][box], 2); } else { ptx::mbarrier_init(&smem.full[buffer][box], 1); } }
      { if (::mla::mutant == 27) { ptx::mbarrier_init(&smem.empty[buffer], kConsumers / 32 - 1); } else if (::mla::mutant == 28) { ptx::mbarrier_init(&smem.empty[buffer], kConsumers / 32 + 1); } else { ptx::mbarrier_init(&smem.empty[buffer], kConsumers / 32); } }
    }
    { if (::mla::mutant == 29) {  } else { ptx::fence_mbarrier_init(); } }
  }
  { if (::mla::mutant == 30) {  } else { __syncthreads(); } }  // the barriers are there

  using timeline::Phase;
  const auto track = static_cast<timeline::Track>(warpgroup);
  int buffer = 0;
  if (warpgroup == 2) {  // the producer
    { if (::mla::mutant == 31) { if (threadIdx.x < kConsumers + 32) ptx::setmaxnreg_dec<kProducerRegisters>(); } else if (::mla::mutant == 33) {  } else { ptx::setmaxnreg_dec<kProducerRegisters>(); } }
    if (threadIdx.x != kConsumers) return;
    timeline::begin(track);
    const uint64_t policy = ptx::createpolicy_evict_first();
    int parity = (::mla::mutant == 35 ? (0) : (1));  // of empty: new barriers let the first copies pass
    for (; at.more(); at.next()) {
      // A copy brings a tile or, where pages are smaller, a page of it. Past the sequence's end, where
      // the table may hold anything, page -1 makes zeros.
      const int step = min(kTokens, problem.page_size);
      const int end = (::mla::mutant == 75 ? (visible_end()) : ((visible_end() + kTokens - 1) / kTokens * kTokens));  // whole tiles
      const int32_t* table = (::mla::mutant == 77 ? (tensors.table_row(0)) : (tensors.table_row(at.sequence)));
      for (int token = at.token_begin(); token < end; token += step) {
        const int page = token < at.seqlen_k ? table[problem.page_of(token)] : -1;
        const int r = token % kTokens;  // the copy's first row in the tile
        if (r == 0) {
          timeline::enter(track, Phase::kWaitSlot);
          { if (::mla::mutant == 34) {  } else { ptx::mbarrier_wait(&smem.empty[buffer], parity); } }
          timeline::enter(track, Phase::kIssueCopy);
        }
#pragma unroll 3  // the producer has few registers
        for (int box = 0; box < kBoxes; ++box) {
          { if (::mla::mutant == 73) { ptx::mbarrier_arrive_expect_tx(&smem.full[buffer][box], kBoxBytes); } else { if (r == 0) { if (::mla::mutant == 40) { ptx::mbarrier_arrive(&smem.full[buffer][box]); } else { ptx::mbarrier_arrive_expect_tx(&smem.full[buffer][box], (::mla::mutant == 38 ? (kBoxBytes / 2) : ::mla::mutant == 39 ? (kBoxBytes + 128) : (kBoxBytes))); } } } }
          ptx::cp_async_bulk_tensor_4d((::mla::mutant == 72 ? (smem.kv[buffer][box][0]) : (smem.kv[buffer][box][r])), &cache_map, box * 64, rows.head_kv,
                                       (::mla::mutant == 76 ? (0) : (problem.row_in_page(token))), page, &smem.full[buffer][box],
                                       policy);
        }
        if ((::mla::mutant == 74 ? (true) : (r + step == kTokens))) {
          { if (::mla::mutant == 36) {  } else { parity ^= buffer; } }
          buffer ^= 1;
        }
      }
    }
    timeline::end(track);
    return;
  }

  { if (::mla::mutant == 32) { if (threadIdx.x % 128 < 32) ptx::setmaxnreg_inc<kConsumerRegisters>(); } else { ptx::setmaxnreg_inc<kConsumerRegisters>(); } }
  timeline::begin(track);
  // Of S and of O alike: rows own_row and own_row + 8; in 8 n + {0, 1} columns.
  const int own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int own_token = warpgroup * kOwnTokens + lane % 4 * 2;
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, 1024);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, 1024);
  int parity = 0;  // of full

  // Of the piece:
  float o_rmem[kColumns / 8][4];  // [64, kColumns]
  float m[2] = {};
  float l[2] = {};     // of this thread's tokens
  int own_visible[2];  // tokens that the thread's two rows see
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
  // S = Q K^T  [64, kOwnTokens], box by box, 16 columns per step. To be waited for.
  const auto issue_qk = [&](float(&s_rmem)[kOwnTokens / 8][4]) {
    const ptx::MatrixDescriptor k =
        ptx::matrix_descriptor(smem.kv[buffer][0][warpgroup * kOwnTokens], 0, 1024);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (box == 0) timeline::enter(track, Phase::kWaitCopy);
      { if (::mla::mutant == 49) {  } else { ptx::mbarrier_wait((::mla::mutant == 50 ? (&smem.full[buffer][0]) : (&smem.full[buffer][box])), (::mla::mutant == 51 ? (parity ^ 1) : (parity))); } }
      if (box == 0) {
        timeline::enter(track, Phase::kQk);
        { if (::mla::mutant == 52) {  } else { ptx::wgmma_fence(s_rmem); } }
      } else {
        ptx::wgmma_fence();  // after each wait: ptxas would insert it
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int offset = (box * kBoxBytes + step * 32) / 16;
        ptx::wgmma_m64nNk16<T>(s_rmem, q + offset, k + offset, box + step > 0);
      }
    }
    { if (::mla::mutant == 61) {  } else { ptx::wgmma_commit_group(); } }
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else the largest S of a row might exceed the m made of it, and P its bound, for ever.
  const auto scale_and_mask = [&](float(&s_rmem)[kOwnTokens / 8][4], int token_begin) {
    timeline::enter(track, Phase::kSoftmax);
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
    { if (::mla::mutant == 44) {  } else { ptx::fence_proxy_async(); } }
    // Also: P is there, for wgmma.
    return !(::mla::mutant == 58 ? (__any_sync(0xffffffff, exceeds)) : (ptx::barrier_sync_or(kAllConsumers, kConsumers, exceeds)));
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
    { if (::mla::mutant == 59) { ptx::barrier_arrive(kAllConsumers, kConsumers); } else if (::mla::mutant == 60) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // the maxima of both warpgroups are there
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float largest =
          fmaxf(smem.row_max[0][own_row + 8 * i], smem.row_max[1][own_row + 8 * i]);
      const float m_new = fmaxf(m[i], largest + (kHeadroom - kLargestP<T>));
      const float a = ptx::ex2_approx((::mla::mutant == 68 ? (m_new - m[i]) : (m[i] - m_new)));  // old minus new: at most 1
      m[i] = m_new;
      { if (::mla::mutant == 70) {  } else { l[i] *= a; } }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        { if (::mla::mutant == 69) {  } else { o_rmem[n][2 * i] *= a;
        o_rmem[n][2 * i + 1] *= a; } }
      }
    }
  };
  // V = 0 past a sequence's end: the cache may hold anything there, and 0 * NaN would be NaN.
  const auto clear_tail = [&](int token_begin) {
    const int tokens = at.seqlen_k - token_begin;
    if (tokens >= kTokens) return;
    { if (::mla::mutant == 46) {  } else { for (int box = 0; box < kBoxes; ++box) ptx::mbarrier_wait(&smem.full[buffer][box], parity); } }
    for (int i = tokens * 8 + threadIdx.x; i < kTokens * 8; i += kConsumers) {
      for (int box = 0; box < kHeadDimV / 64; ++box) {
        { if (::mla::mutant == 48) {  } else { smem.kv[buffer][box][i / 8][i % 8] = make_uint4(0, 0, 0, 0); } }
      }
    }
    { if (::mla::mutant == 43) {  } else { ptx::fence_proxy_async(); } }
    { if (::mla::mutant == 47) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // all zeros are there
  };
  // O = O + P V  [64, kColumns], 16 tokens per step. To be waited for.
  const auto issue_pv = [&] {
    const ptx::MatrixDescriptor v =
        ptx::matrix_descriptor(smem.kv[buffer][(::mla::mutant == 71 ? ((1 - warpgroup) * (kColumns / 64)) : (warpgroup * (kColumns / 64)))], kBoxBytes, 1024);
    timeline::enter(track, Phase::kPv);
    { if (::mla::mutant == 53) {  } else { ptx::wgmma_fence(o_rmem); } }
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      ptx::wgmma_m64n256k16_trans_b<T>(o_rmem, p + t * 2 / 16, v + t * 128 / 16, true);
    }
    { if (::mla::mutant == 62) {  } else { ptx::wgmma_commit_group(); } }
  };
  // lse = ln 2 (m + log2 l), with l the sum of both warpgroups' tokens; and, of the thread's two rows,
  // 1 / l and the place in out or out_partial, -1 for none. A row that saw nothing: out = 0, lse = +inf,
  // or -inf in a part.
  const auto write_lse = [&](float(&inverse_l)[2], int64_t(&place)[2], int slot) {
    timeline::enter(track, Phase::kWriteOut);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
      if (lane % 4 == 0) smem.row_sum[warpgroup][own_row + 8 * i] = l[i];
    }
    { if (::mla::mutant == 67) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // the sums are there; Q has been read
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

  copy_q();
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

    { if (::mla::mutant == 41) {  } else { ptx::cp_async_wait_group<0>(); } }
    { if (::mla::mutant == 42) {  } else { ptx::fence_proxy_async(); } }
    { if (::mla::mutant == 45) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // Q is there, for wgmma

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
      float s_rmem[kOwnTokens / 8][4], sum[2];
      clear_tail(token_begin);
      issue_qk(s_rmem);
      { if (::mla::mutant == 54) {  } else if (::mla::mutant == 55) { ptx::barrier_sync(kAllConsumers, kConsumers / 2); } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // P of the tile before has been read
      { if (::mla::mutant == 56) {  } else if (::mla::mutant == 57) { ptx::wgmma_wait_group<1>(s_rmem); } else { ptx::wgmma_wait_group<0>(s_rmem); } }
      scale_and_mask(s_rmem, token_begin);
      // m stays as long as no P exceeds the bound; when one does, as in the first tile, m moves, and P is
      // made again.
      while (!softmax(s_rmem, sum)) rescale(s_rmem);
      l[0] += sum[0];
      l[1] += sum[1];
      issue_pv();
      { if (::mla::mutant == 66) { if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]); ptx::wgmma_wait_group<0>(o_rmem); } else { { if (::mla::mutant == 63) { ptx::wgmma_wait_group<1>(o_rmem); } else { ptx::wgmma_wait_group<0>(o_rmem); } }
      { if (::mla::mutant == 65) { if (lane < 2) ptx::mbarrier_arrive(&smem.empty[buffer]); } else { if (lane == 0) { if (::mla::mutant == 64) {  } else { ptx::mbarrier_arrive(&smem.empty[buffer]); } } } } } }  // this warp has read it
      { if (::mla::mutant == 37) {  } else { parity ^= buffer; } }
      buffer ^= 1;
    }

    float inverse_l[2];
    int64_t place[2];
    const int slot = at.slot();
    write_lse(inverse_l, place, slot);
    at.next();
    copy_q();  // the next piece's Q comes while O is written
    write_out(inverse_l, place, slot);
  }
  timeline::end(track);
}

}  // namespace mla::MLA_MACHINE::tma_pipeline
