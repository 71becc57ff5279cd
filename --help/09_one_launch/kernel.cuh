namespace mla { extern int mutant; }  // 09_one_launch: a decode that mostly ends in its first kernel. The main loop is stage 08's seesaw. With
// K0, V0 and K1, V1 of a pair of tiles, L and R the left and the right 256 columns of V and O:
//
//   warpgroup 0 has O_L                            warpgroup 1 has O_R
//   S0 = Q K0^T                                    S1 = Q K1^T, issued
//   P0, m, l; gives P0 and m to the other   --->   O_R = a O_R; O_R += P0 V0_R, issued
//   O_L = a O_L; O_L += P0 V0_L                    P1, m, l;  gives P1 and m to the other
//   O_L = a O_L; O_L += P1 V1_L             <---   O_R = a O_R; O_R += P1 V1_R
//
// Three producers refill what has been read, one thread for each region of a tile: the left boxes, the
// right ones and the rotary one.
//
// What is new comes after the loop. Where a sequence has two pieces, the worker of the second half begins
// with it, and leaves its part in memory, as before. The worker of the first half ends with it, so its O
// is in registers when that part has long been there: it adds the part, and writes out. If the plan has
// sequences of more pieces, too, all are left to the combine, which is then needed in any case.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/row_columns.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/raised_flags.h"
#include "stages/common/split/split_items.h"
#include "stages/common/timeline.h"

namespace mla::MLA_MACHINE::one_launch {

constexpr int kConsumers = 256;             // two warpgroups
constexpr int kThreads = kConsumers + 128;  // and the producers'
// Registers per thread. A block starts with 168 for each of its 384 threads, and asking for more than
// there are in all would wait for ever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 168 * kThreads);
constexpr int kRows = 64, kTokens = 64;  // of a tile
constexpr int kBoxes = kHeadDimQK / 64;  // boxes of 64 columns in a row of Q or K
constexpr int kColumns = kHeadDimV / 2;  // of O, per warpgroup
constexpr int kBoxBytes = 64 * 128;      // 64 rows of 64 columns
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// The regions of a tile of K, from box 4 region on: boxes 0-3 are V_L, boxes 4-7 V_R, box 8 the rotary
// columns.
enum Region { kLeft, kRight, kRotary, kRegions };
constexpr int kRotaryBox = 8;

// A box: rows of 128 bytes. Chunk c of row r, 16 bytes, lies where chunk c ^ (r % 8) would: wgmma's
// 128-byte swizzle.
using Box = uint4[64][8];

struct Smem {
  Box q[kBoxes];
  Box kv[2][kBoxes];
  uint4 p[4][128];                // [warp of a warpgroup][16 tokens][lane]: registers, as they are
  float2 row_max[128];            // [warp of a warpgroup][lane]: m of its two rows
  float row_sum[2][kRows];        // of a warpgroup's tokens
  int slot;                       // of the piece; of a first half, that of the second
  Half half;                      // which the piece is
  ptx::Mbarrier full[2][kBoxes];  // 1 arrival, a producer's, and a box's bytes: the box is there
  ptx::Mbarrier empty[2]
                     [kRegions];  // 4 arrivals, the last reader's warps: the region has been read
  MLA_REGIONS(q, kv, p, row_max, row_sum, slot, full, empty)
};
static_assert(sizeof(Smem) <= 232448, "227 KB");

// Named barriers. Those of P are of two warps, one of each warpgroup, that have the same rows.
enum Barrier {
  kAllConsumers = 1,  // 256 sync
  kWarpgroup = 2,     // 128 sync; 2 and 3
  kP0Ready = 4,       // 32 arrive, 32 sync; 4 to 7: P0 and its m are in shared memory
  kP1Ready = 8,       // 32 arrive, 32 sync; 8 to 11: P1 and its m are in shared memory
};

// One item: a worker, for one tile of rows of a KV head. kPagesOf64: the page
// size is 64, which the compiler then knows.
template <typename T, bool kPagesOf64>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items, RaisedFlags half_is_there) {
  if (kPagesOf64) problem.page_size = 64;
  auto& smem = shared_memory<Smem>();
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible = [&](int r) { return rows.visible(at.seqlen_k, r); };
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensormap(&cache_map);
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int box = 0; box < kBoxes; ++box) ptx::mbarrier_init(&smem.full[buffer][box], 1);
      for (int i = 0; i < kRegions; ++i) ptx::mbarrier_init(&smem.empty[buffer][i], 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  using timeline::Phase;
  const auto track = static_cast<timeline::Track>(warpgroup);
  if (warpgroup == 2) {  // the producers: one thread for each region of the tiles
    ptx::setmaxnreg_dec<kProducerRegisters>();
    const int region = warp;
    if (region == kRegions || lane != 0) return;
    if (region == kLeft) timeline::begin(track);
    const uint64_t policy = ptx::createpolicy_evict_first();
    int parity = 3;  // of empty, a bit per buffer: new barriers let the first copies pass
    for (; at.more(); at.next()) {
      // A copy brings a tile or, where pages are smaller, a page of it. Past the sequence's end, where
      // the table may hold anything, page -1 makes zeros.
      const int step = min(kTokens, problem.page_size);
      const int end = (visible_end() + kTokens - 1) / kTokens * kTokens;  // whole tiles
      const int32_t* table = tensors.table_row(at.sequence);
      const auto page_at = [&](int token) {
        return token < at.seqlen_k ? table[problem.page_of(token)] : -1;
      };
      int next_page = page_at(at.token_begin());
      int buffer = 0;
      for (int token = at.token_begin(); token < end; token += step) {
        const int page = next_page;
        const int r = token % kTokens;  // the copy's first row in the tile
        next_page = page_at(token + step);
        if (r == 0) {
          if (region == kLeft) timeline::enter(track, Phase::kWaitSlot);
          ptx::mbarrier_wait(&smem.empty[buffer][region], parity >> buffer & 1);
          if (region == kLeft) timeline::enter(track, Phase::kIssueCopy);
        }
        for (int box = region * 4; box < min(region * 4 + 4, kBoxes); ++box) {
          if (r == 0) ptx::mbarrier_arrive_expect_tx(&smem.full[buffer][box], kBoxBytes);
          ptx::cp_async_bulk_tensor_4d(smem.kv[buffer][box][r], &cache_map, box * 64, rows.head_kv,
                                       problem.row_in_page(token), page, &smem.full[buffer][box],
                                       policy);
        }
        if (r + step == kTokens) {
          parity ^= 1 << buffer;
          buffer ^= 1;
        }
      }
    }
    if (region == kLeft) timeline::end(track);
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  timeline::begin(track);
  // Of S and of O alike: rows own_row and own_row + 8; in 8 n + {0, 1} columns.
  const int own_row = warp * 16 + lane / 4;
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, 1024);
  int parity = 0;                                  // of full, a bit per buffer
  const unsigned item = items.first + blockIdx.x;  // the next worker's is items.tiles further on

  // Of the piece:
  float o_rmem[kColumns / 8][4];  // [64, kColumns]
  float m[2] = {};
  float l[2] = {};  // of this thread's tokens
  int all_visible;  // tokens that all rows see

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
  const auto release = [&](int buffer, Region region) {  // this warp has read it
    if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer][region]);
  };
  // S = Q K^T  [64, 64], box by box, 16 columns per step. To be waited for.
  const auto issue_qk = [&](float(&s_rmem)[kTokens / 8][4], int buffer) {
    const ptx::MatrixDescriptor k = ptx::matrix_descriptor(smem.kv[buffer], 0, 1024);
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int box = (i + kRotaryBox) % kBoxes;
      if (i == 0) timeline::enter(track, Phase::kWaitCopy);
      ptx::mbarrier_wait(&smem.full[buffer][box], parity >> buffer & 1);
      if (i == 0) {
        timeline::enter(track, Phase::kQk);
        ptx::wgmma_fence(s_rmem);
      } else {
        ptx::wgmma_fence();  // after each wait: ptxas would insert it
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int offset = (box * kBoxBytes + step * 32) / 16;
        ptx::wgmma_m64n64k16<T>(s_rmem, q + offset, k + offset, i + step > 0);
      }
    }
    ptx::wgmma_commit_group();
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else P might exceed its bound where S is large.
  const auto scale_and_mask = [&](float(&s_rmem)[kTokens / 8][4], int token_begin) {
    timeline::enter(track, Phase::kSoftmax, warpgroup == 1);  // in 1, P0 V0_R is under way
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
    }
    if (token_begin + kTokens <= all_visible) return;
    const int own_visible[2] = {visible(own_row), visible(own_row + 8)};
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) {
        const int token = token_begin + lane % 4 * 2 + n * 8 + j % 2;
        if (token >= own_visible[j / 2]) s_rmem[n][j] = -INFINITY;
      }
    }
  };
  // P = 2^(S - m), l = l + rowsum P. m stays as long as no P of the warp's rows exceeds the bound; if one
  // does, m' = max(m, rowmax S + kHeadroom - kLargestP), a = 2^(m - m') and l = a l, and the caller does
  // O = a O.
  const auto softmax = [&](float(&s_rmem)[kTokens / 8][4], uint32_t(&p_rmem)[4][4], float(&a)[2]) {
    float largest[2] = {-INFINITY, -INFINITY};  // of this thread's S; NaN loses
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) largest[j / 2] = fmaxf(largest[j / 2], s_rmem[n][j]);
    }
    a[0] = a[1] = 1;
    const bool exceeds = largest[0] > m[0] + kLargestP<T> || largest[1] > m[1] + kLargestP<T>;
    if (__any_sync(0xffffffff, exceeds)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 1));
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(0xffffffff, largest[i], 2));
        const float m_new = fmaxf(m[i], largest[i] + (kHeadroom - kLargestP<T>));
        a[i] = ptx::ex2_approx(m[i] - m_new);  // old minus new: at most 1
        m[i] = m_new;
        l[i] *= a[i];
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = ptx::ex2_approx(s_rmem[n][2 * i] - m[i]);
        const float p1 = ptx::ex2_approx(s_rmem[n][2 * i + 1] - m[i]);
        l[i] += p0 + p1;
        p_rmem[n / 2][n % 2 * 2 + i] = pack<T>(p0, p1);
      }
    }
  };
  const auto rescale = [&](const float(&a)[2]) {  // O = a O, where m has moved
    if (__any_sync(0xffffffff, a[0] != 1 || a[1] != 1)) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        for (int j = 0; j < 4; ++j) o_rmem[n][j] *= a[j / 2];
      }
    }
  };
  // P and m, from the registers of one warp to those of the other warpgroup's warp with the same rows.
  const auto give = [&](const uint32_t(&p_rmem)[4][4], int barrier) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      smem.p[t][threadIdx.x % 128] =
          make_uint4(p_rmem[t][0], p_rmem[t][1], p_rmem[t][2], p_rmem[t][3]);
    }
    smem.row_max[threadIdx.x % 128] = make_float2(m[0], m[1]);
    // A barrier that the compiler knows costs less than a computed one.
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (warp == w) ptx::barrier_arrive(barrier + w, 64);
    }
  };
  // a = 2^(m - m'), l = a l, for the other's m'; the caller does O = a O.
  const auto take = [&](uint32_t(&p_rmem)[4][4], float(&a)[2], int barrier) {
    timeline::enter(track, Phase::kWaitOther);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (warp == w) ptx::barrier_sync(barrier + w, 64);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint4 four = smem.p[t][threadIdx.x % 128];
      p_rmem[t][0] = four.x;
      p_rmem[t][1] = four.y;
      p_rmem[t][2] = four.z;
      p_rmem[t][3] = four.w;
    }
    const float2 m_new = smem.row_max[threadIdx.x % 128];
    a[0] = ptx::ex2_approx(m[0] - m_new.x);
    a[1] = ptx::ex2_approx(m[1] - m_new.y);
    m[0] = m_new.x;
    m[1] = m_new.y;
    l[0] *= a[0];
    l[1] *= a[1];
  };
  const auto sync_warpgroup = [&] {
    if (warpgroup == 0) {
      ptx::barrier_sync(kWarpgroup, 128);
    } else {
      ptx::barrier_sync(kWarpgroup + 1, 128);
    }
  };
  // V = 0 past a sequence's end, in this warpgroup's half, after S has been made of it: the cache may
  // hold anything there, and 0 * NaN would be NaN.
  const auto clear_tail = [&](int token_begin, int buffer) {
    const int tokens = at.seqlen_k - token_begin;
    if (tokens >= kTokens) return;
    sync_warpgroup();  // all of S is there
    for (int i = tokens * 8 + threadIdx.x % 128; i < kTokens * 8; i += 128) {
      for (int box = 0; box < 4; ++box) {
        smem.kv[buffer][warpgroup * 4 + box][i / 8][i % 8] = make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_proxy_async();
    sync_warpgroup();  // all zeros are there
  };
  // O = O + P V  [64, kColumns], 16 tokens per step. To be waited for.
  const auto issue_pv = [&](uint32_t(&p_rmem)[4][4], int buffer) {
    const ptx::MatrixDescriptor v =
        ptx::matrix_descriptor(smem.kv[buffer][warpgroup * 4], kBoxBytes, 1024);
    timeline::enter(track, Phase::kPv);
    ptx::wgmma_fence(o_rmem, p_rmem);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      ptx::wgmma_m64n256k16_trans_b<T>(o_rmem, p_rmem[t], v + t * 16 * 128 / 16, true);
    }
    ptx::wgmma_commit_group();
  };
  // The part of the second half, O2, comes into row own_row + 8 i: O = w O / l + w2 O2 with w = e^(lse - lse
  // of both), as the combine would do it.
  const auto join = [&](int i, int slot, float& lse, bool& saw_something, float& inverse_l) {
    const int r = own_row + 8 * i;
    const int64_t at_slot =
        rows.slot_place(slot, rows.exists(r) ? (::mla::mutant == 173 ? (own_row) : (r)) : 0);  // any: lanes stay together
    const float* part =
        split.out_partial + at_slot * kHeadDimV + (::mla::mutant == 174 ? (0) : (warpgroup * kColumns)) + four_columns();
    constexpr int kAhead = 8;  // loads that are under way together, each of 16 of the row's columns
    float4 four[kAhead];
    const auto load = [&](int begin) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        four[n] = *reinterpret_cast<const float4*>(part + (begin + n) * 16);
      }
    };
    load(0);  // it does not wait for the weights
    const float first = saw_something ? lse : -INFINITY, second = split.lse_partial[at_slot];
    float largest = fmaxf(first, second);
    if (largest == -INFINITY) largest = 0;  // nothing seen: the sum below is 0
    float w = expf(first - largest), w2 = (::mla::mutant == 172 ? (1.f) : (expf(second - largest)));
    const float sum = w + w2;
    saw_something = sum != 0;
    { if (::mla::mutant == 171) {  } else { lse = largest + logf(sum); } }
    { if (::mla::mutant == 168) { const float other = w; w = w2 * inverse_l / (saw_something ? sum : 1); w2 = other / (saw_something ? sum : 1); } else { w *= (::mla::mutant == 169 ? (1.f) : (inverse_l)) / (saw_something ? sum : 1);
    w2 /= saw_something ? sum : 1; } }
    { if (::mla::mutant == 170) {  } else { inverse_l = 1; } }
#pragma unroll
    for (int begin = 0; begin < kColumns / 16; begin += kAhead) {
      if (begin > 0) load(begin);
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        float2 o2[2];
        from_four(four[n], o2[0], o2[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float(&o)[4] = o_rmem[(begin + n) * 2 + half];
          o[2 * i] = w * o[2 * i] + w2 * o2[half].x;
          o[2 * i + 1] = w * o[2 * i + 1] + w2 * o2[half].y;
        }
      }
    }
  };
  // lse = ln 2 (m + log2 l), with l the sum of both warpgroups' tokens; and, of the thread's two rows,
  // 1 / l and the place in out or out_partial, -1 for none. A row that saw nothing: out = 0, lse = +inf,
  // or -inf in a part. A first half becomes the whole sequence here.
  const auto write_lse = [&](float(&inverse_l)[2], int64_t(&place)[2], int& slot, Half& half) {
    timeline::enter(track, Phase::kWriteOut);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
      if (lane % 4 == 0) smem.row_sum[warpgroup][own_row + 8 * i] = l[i];
    }
    // The next worker began with the second half: mostly it has long been there. It waits for nothing
    // before, so the waits make no circle.
    { if (::mla::mutant == 164) { ptx::barrier_sync(kAllConsumers, kConsumers); if (threadIdx.x == 0 && smem.half == Half::kFirst) { half_is_there.wait(item + items.tiles); half_is_there.lower(item + items.tiles); } } else { if (threadIdx.x == 0 && smem.half == Half::kFirst) {
      { if (::mla::mutant == 163) { half_is_there.lower(item + items.tiles); half_is_there.wait(item + items.tiles); } else { { if (::mla::mutant == 154) {  } else { half_is_there.wait((::mla::mutant == 155 ? (item) : ::mla::mutant == 156 ? (item + 1) : (item + items.tiles))); } }
      { if (::mla::mutant == 162) {  } else { half_is_there.lower(item + items.tiles); } } } }
    }
    // The sums are there, and the second half; Q and P have been read.
    { if (::mla::mutant == 176) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } } } }
    slot = smem.slot;
    half = smem.half;
    const int second_half = slot;
    { if (::mla::mutant == 166) {  } else { if (half == Half::kFirst) slot = -1; } }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = own_row + 8 * i;
      const float sum = smem.row_sum[0][r] + smem.row_sum[1][r];
      bool saw_something = visible(r) > at.token_begin();
      inverse_l[i] = saw_something ? 1 / sum : 0;
      float lse = kLn2 * (m[i] + log2f(sum));
      if ((::mla::mutant == 167 ? (false) : (half == Half::kFirst))) join(i, second_half, lse, saw_something, inverse_l[i]);
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
      const int64_t first = place[i] + warpgroup * kColumns + four_columns();
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        const float(&left)[4] = o_rmem[n], (&right)[4] = o_rmem[n + 1];
        const float4 four =
            to_four(make_float2(left[2 * i] * inverse_l[i], left[2 * i + 1] * inverse_l[i]),
                    make_float2(right[2 * i] * inverse_l[i], right[2 * i + 1] * inverse_l[i]));
        if (place[i] < 0) continue;
        if (slot >= 0) {
          *reinterpret_cast<float4*>(split.out_partial + first + n * 8) = four;
        } else {
          const float rounded[4] = {four.x, four.y, four.z, four.w};
          store_rounded(rounded, static_cast<T*>(tensors.out) + first + n * 8);
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
    all_visible = min(at.token_end(), visible(0));
    const int end = visible_end();

    // Now: at the end all would wait for it.
    int next_slot = 0;
    Half next_half = Half::kNone;
    if (threadIdx.x == 0) {
      if (half_is_there.flags != nullptr) next_half = at.half();
      next_slot = next_half == Half::kFirst ? (::mla::mutant == 165 ? (at.slot()) : (at.second_half_slot())) : at.slot();
    }
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();
    { if (::mla::mutant == 175) { if (threadIdx.x == 0) { smem.slot = next_slot; smem.half = next_half; } ptx::barrier_sync(kAllConsumers, kConsumers); } else { ptx::barrier_sync(kAllConsumers, kConsumers);  // Q is there, for wgmma; the old slot is read
    if (threadIdx.x == 0) {
      smem.slot = next_slot;
      smem.half = next_half;
    } } }

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += 2 * kTokens) {
      const bool is_pair = token_begin + kTokens < end;
      float a[2];
      if (warpgroup == 0) {
        float s_rmem[kTokens / 8][4];
        uint32_t p_rmem[4][4];
        issue_qk(s_rmem, 0);
        ptx::wgmma_wait_group<0>(s_rmem);
        release(0, kRotary);
        scale_and_mask(s_rmem, token_begin);
        softmax(s_rmem, p_rmem, a);
        give(p_rmem, kP0Ready);
        rescale(a);
        clear_tail(token_begin, 0);
        issue_pv(p_rmem, 0);
        ptx::wgmma_wait_group<0>(o_rmem, p_rmem);
        release(0, kLeft);
        if (is_pair) {
          take(p_rmem, a, kP1Ready);
          rescale(a);
          clear_tail(token_begin + kTokens, 1);
          issue_pv(p_rmem, 1);
          ptx::wgmma_wait_group<0>(o_rmem, p_rmem);
          release(1, kLeft);
        }
      } else if (is_pair) {
        float s_rmem[kTokens / 8][4];
        uint32_t p0_rmem[4][4], p1_rmem[4][4];
        issue_qk(s_rmem, 1);
        take(p0_rmem, a, kP0Ready);
        rescale(a);
        issue_pv(p0_rmem, 0);
        ptx::wgmma_wait_group<1>(s_rmem);
        release(1, kRotary);
        scale_and_mask(s_rmem, token_begin + kTokens);
        softmax(s_rmem, p1_rmem, a);
        give(p1_rmem, kP1Ready);
        timeline::enter(track, Phase::kPv);  // still that of P0
        ptx::wgmma_wait_group<0>(o_rmem, p0_rmem);
        release(0, kRight);
        rescale(a);
        clear_tail(token_begin + kTokens, 1);
        issue_pv(p1_rmem, 1);
        ptx::wgmma_wait_group<0>(o_rmem, p1_rmem);
        release(1, kRight);
      } else {
        uint32_t p0_rmem[4][4];
        take(p0_rmem, a, kP0Ready);
        rescale(a);
        clear_tail(token_begin, 0);
        issue_pv(p0_rmem, 0);
        ptx::wgmma_wait_group<0>(o_rmem, p0_rmem);
        release(0, kRight);
      }
      parity ^= is_pair ? 3 : 1;
    }

    float inverse_l[2];
    int64_t place[2];
    int slot;
    Half half;
    write_lse(inverse_l, place, slot, half);
    at.next();
    copy_q();  // the next piece's Q comes while O is written
    // Not earlier: blocks of the combine that came while few multiprocessors are free would crowd there.
    if (!at.more()) ptx::griddepcontrol_launch_dependents();
    { if (::mla::mutant == 160) { if (half == Half::kSecond && threadIdx.x == 0) half_is_there.raise(item); write_out(inverse_l, place, slot); } else { write_out(inverse_l, place, slot); } }
    if ((::mla::mutant == 161 ? (true) : (half == Half::kSecond))) {
      { if (::mla::mutant == 159) {  } else { ptx::barrier_sync(kAllConsumers, kConsumers); } }  // the part is there
      if (threadIdx.x == 0) { if (::mla::mutant == 157) {  } else { half_is_there.raise((::mla::mutant == 158 ? (item / items.tiles * items.tiles) : (item))); } }
    }
  }
  timeline::end(track);
}

}  // namespace mla::MLA_MACHINE::one_launch
