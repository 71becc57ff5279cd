namespace mla { extern int mutant; }  // Step 1 from 07_tma_pipeline to 08_seesaw: two tiles at a time, one of each warpgroup's own. While one warpgroup makes P
// of its tile, the tensor cores work for the other. With K0, V0 and K1, V1 of a pair of tiles, L and R the left and the
// right 256 columns of V and O:
//
//   warpgroup 0 has O_L                            warpgroup 1 has O_R
//   S0 = Q K0^T                                    S1 = Q K1^T, issued
//   P0, m, l; P0 and m to shared memory     --->   O_R = a O_R; O_R += P0 V0_R, issued
//   O_L = a O_L; O_L += P0 V0_L                    P1, m, l; P1 and m to shared memory
//   O_L = a O_L; O_L += P1 V1_L             <---   O_R = a O_R; O_R += P1 V1_R
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"
#include "stages/common/timeline.h"

namespace mla::MLA_MACHINE::two_columns {

constexpr int kConsumers = 256;             // two warpgroups
constexpr int kThreads = kConsumers + 128;  // and the producer's
// Registers per thread. A block starts with 168 for each of its 384 threads, and asking for more than
// there are in all would wait for ever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 168 * kThreads);
constexpr int kRows = 64, kTokens = 64;  // of a tile
constexpr int kBoxes = kHeadDimQK / 64;  // boxes of 64 columns in a row of Q or K
constexpr int kColumns = kHeadDimV / 2;  // of O, per warpgroup
constexpr int kBoxBytes = 64 * 128;      // 64 rows of 64 columns
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// A box: rows of 128 bytes. Chunk c of row r, 16 bytes, lies where chunk c ^ (r % 8) would: wgmma's
// 128-byte swizzle.
using Box = uint4[64][8];

struct Smem {
  Box q[kBoxes];
  Box kv[2][kBoxes];              // K; its first 8 boxes are V
  Box p;                          // [64 rows, 64 tokens], of one tile
  float row_max[kRows];           // m, that P was made with
  float row_sum[2][kRows];        // of a warpgroup's tokens
  ptx::Mbarrier full[2][kBoxes];  // 1 arrival, the producer's, and a box's bytes: the box is there
  ptx::Mbarrier empty[2];         // 8 arrivals, the consumers' warps: the tile has been read
  MLA_REGIONS(q, kv, p, row_max, row_sum, full, empty)
};
static_assert(sizeof(Smem) <= 232448, "227 KB");

enum Barrier {        // named
  kAllConsumers = 1,  // 256 sync
  kWarpgroup = 2,     // 128 sync: the warpgroup that has the last tile
  kP0Ready = 3,       // 256 sync: P0 and its m are in shared memory
  kP0Read = 4,        // 128 arrive, 128 sync: O_L has been made of P0, P1 may come
  kP1Ready = 5,       // 256 sync: P1 and its m are in shared memory
  kP1Read = 6,        // 128 arrive, 128 sync: O_R has been made of P1, the next P0 may come
};

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
      for (int box = 0; box < kBoxes; ++box) ptx::mbarrier_init(&smem.full[buffer][box], 1);
      ptx::mbarrier_init(&smem.empty[buffer], kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  using timeline::Phase;
  const auto track = static_cast<timeline::Track>(warpgroup);
  if (warpgroup == 2) {  // the producer
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x != kConsumers) return;
    timeline::begin(track);
    const uint64_t policy = ptx::createpolicy_evict_first();
    int parity = 3;  // of empty, a bit per buffer: new barriers let the first copies pass
    for (; at.more(); at.next()) {
      // A copy brings a tile or, where pages are smaller, a page of it. Past the sequence's end, where
      // the table may hold anything, page -1 makes zeros.
      const int step = min(kTokens, problem.page_size);
      const int end = (visible_end() + kTokens - 1) / kTokens * kTokens;  // whole tiles
      const int32_t* table = tensors.table_row(at.sequence);
      int buffer = 0;
      for (int token = at.token_begin(); token < end; token += step) {
        const int page = token < at.seqlen_k ? table[problem.page_of(token)] : -1;
        const int r = token % kTokens;  // the copy's first row in the tile
        if (r == 0) {
          timeline::enter(track, Phase::kWaitSlot);
          ptx::mbarrier_wait(&smem.empty[buffer], parity >> buffer & 1);
          timeline::enter(track, Phase::kIssueCopy);
        }
#pragma unroll 3  // the producer has few registers
        for (int box = 0; box < kBoxes; ++box) {
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
    timeline::end(track);
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  timeline::begin(track);
  // Of S and of O alike: rows own_row and own_row + 8; in 8 n + {0, 1} columns.
  const int own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, 1024);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, 1024);
  int parity = 0;  // of full, a bit per buffer

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
  // S = Q K^T  [64, 64], box by box, 16 columns per step. To be waited for.
  const auto issue_qk = [&](float(&s_rmem)[kTokens / 8][4], int buffer) {
    const ptx::MatrixDescriptor k = ptx::matrix_descriptor(smem.kv[buffer], 0, 1024);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if (box == 0) timeline::enter(track, Phase::kWaitCopy);
      ptx::mbarrier_wait(&smem.full[buffer][box], parity >> buffer & 1);
      if (box == 0) {
        timeline::enter(track, Phase::kQk);
        ptx::wgmma_fence(s_rmem);
      } else {
        ptx::wgmma_fence();  // after each wait: ptxas would insert it
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int offset = (box * kBoxBytes + step * 32) / 16;
        ptx::wgmma_m64n64k16<T>(s_rmem, q + offset, k + offset, box + step > 0);
      }
    }
    ptx::wgmma_commit_group();
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else the largest S of a row might exceed the m made of it, and P its bound, for ever.
  const auto scale_and_mask = [&](float(&s_rmem)[kTokens / 8][4], int token_begin) {
    timeline::enter(track, Phase::kSoftmax, warpgroup == 1);  // in 1, P0 V0_R is under way
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
    }
    if (token_begin + kTokens <= all_visible) return;
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
  // P and m to shared memory, for wgmma of both warpgroups.
  const auto give = [&](const uint32_t(&p_rmem)[4][4]) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // 16 rows, 16 tokens
      const int row = threadIdx.x % 128 / 32 * 16 + lane % 16, chunk = t * 2 + lane / 16;
      ptx::stmatrix_x4(&smem.p[row][chunk ^ row % 8], p_rmem[t]);
    }
    if (lane % 4 == 0) smem.row_max[own_row] = m[0], smem.row_max[own_row + 8] = m[1];
    { if (::mla::mutant == 150) {  } else { ptx::fence_proxy_async(); } }
  };
  // a = 2^(m - m'), l = a l, for the m' of the other's P; the caller does O = a O.
  const auto take = [&](float(&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m_new = smem.row_max[own_row + 8 * i];
      a[i] = ptx::ex2_approx(m[i] - m_new);
      m[i] = m_new;
      l[i] *= a[i];
    }
  };
  const auto release = [&](int buffer) {  // this warp has read it
    if (lane == 0) ptx::mbarrier_arrive(&smem.empty[buffer]);
  };
  // V = 0 past a sequence's end: the cache may hold anything there, and 0 * NaN would be NaN.
  const auto clear_tail = [&](int token_begin, int buffer) {
    const int tokens = at.seqlen_k - token_begin;
    if (tokens >= kTokens) return;
    for (int box = 0; box < kBoxes; ++box) {
      ptx::mbarrier_wait(&smem.full[buffer][box], parity >> buffer & 1);
    }
    for (int i = tokens * 8 + threadIdx.x % 128; i < kTokens * 8; i += 128) {
      for (int box = 0; box < kHeadDimV / 64; ++box) {
        smem.kv[buffer][box][i / 8][i % 8] = make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_proxy_async();
    { if (::mla::mutant == 153) {  } else { ptx::barrier_sync(kWarpgroup, 128); } }  // all zeros are there
  };
  // O = O + P V  [64, kColumns], 16 tokens per step. To be waited for.
  const auto issue_pv = [&](int buffer) {
    const ptx::MatrixDescriptor v =
        ptx::matrix_descriptor(smem.kv[buffer][warpgroup * (kColumns / 64)], kBoxBytes, 1024);
    timeline::enter(track, Phase::kPv);
    ptx::wgmma_fence(o_rmem);
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      ptx::wgmma_m64n256k16_trans_b<T>(o_rmem, p + t * 2 / 16, v + t * 128 / 16, true);
    }
    ptx::wgmma_commit_group();
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
    ptx::barrier_sync(kAllConsumers, kConsumers);  // the sums are there; Q has been read
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

    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();
    ptx::barrier_sync(kAllConsumers, kConsumers);  // Q is there, for wgmma

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += 2 * kTokens) {
      const bool is_pair = token_begin + kTokens < end;
      float a[2];
      if (warpgroup == 0) {
        float s_rmem[kTokens / 8][4];
        uint32_t p_rmem[4][4];
        clear_tail(token_begin, 0);
        issue_qk(s_rmem, 0);
        ptx::wgmma_wait_group<0>(s_rmem);
        scale_and_mask(s_rmem, token_begin);
        softmax(s_rmem, p_rmem, a);
        { if (::mla::mutant == 147) {  } else { if (token_begin > at.token_begin()) ptx::barrier_sync(kP1Read, kConsumers); } }
        give(p_rmem);
        { if (::mla::mutant == 140) {  } else { ptx::barrier_sync(kP0Ready, kConsumers); } }
        rescale(a);
        issue_pv(0);
        { if (::mla::mutant == 144) {  } else { ptx::wgmma_wait_group<0>(o_rmem); } }
        release(0);
        if (is_pair) {
          { if (::mla::mutant == 143) {  } else { ptx::barrier_arrive(kP0Read, kConsumers); } }
          { if (::mla::mutant == 145) {  } else { ptx::barrier_sync(kP1Ready, kConsumers); } }
          take(a);
          rescale(a);
          issue_pv(1);
          ptx::wgmma_wait_group<0>(o_rmem);
          release(1);
        }
      } else if (is_pair) {
        float s_rmem[kTokens / 8][4];
        uint32_t p_rmem[4][4];
        clear_tail(token_begin + kTokens, 1);
        issue_qk(s_rmem, 1);
        { if (::mla::mutant == 141) {  } else { ptx::barrier_sync(kP0Ready, kConsumers); } }
        take(a);
        rescale(a);
        issue_pv(0);
        ptx::wgmma_wait_group<1>(s_rmem);
        scale_and_mask(s_rmem, token_begin + kTokens);
        softmax(s_rmem, p_rmem, a);
        timeline::enter(track, Phase::kPv);  // still that of P0
        { if (::mla::mutant == 151) {  } else { ptx::wgmma_wait_group<0>(o_rmem); } }
        { if (::mla::mutant == 152) {  } else { release(0); } }
        { if (::mla::mutant == 142) {  } else { ptx::barrier_sync(kP0Read, kConsumers); } }
        give(p_rmem);
        { if (::mla::mutant == 146) {  } else { ptx::barrier_sync(kP1Ready, kConsumers); } }
        rescale(a);
        issue_pv(1);
        ptx::wgmma_wait_group<0>(o_rmem);
        release(1);
        { if (::mla::mutant == 148) {  } else { if ((::mla::mutant == 149 ? (true) : (token_begin + 2 * kTokens < end))) ptx::barrier_arrive(kP1Read, kConsumers); } }
      } else {
        ptx::barrier_sync(kP0Ready, kConsumers);
        take(a);
        rescale(a);
        issue_pv(0);
        ptx::wgmma_wait_group<0>(o_rmem);
        release(0);
      }
      parity ^= is_pair ? 3 : 1;
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

}  // namespace mla::MLA_MACHINE::two_columns
