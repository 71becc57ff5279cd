// 04_split_kv: the inner loop of 03_online_softmax, but a block has no sequence of its own. It is a
// *worker*, and a plan made on the GPU (stages/common/split/plan.h) tells it which tokens of which
// sequences are its pieces:
//
//   for each piece of the worker: tokens [begin, end) of a sequence
//     (m, l, O) over these tokens, as in stage 03
//     the whole sequence:   out = O / l, lse = ln 2 (m + log2 l)
//     less than that:       the same in fp32, with lse = -inf for nothing, to a slot of the workspace
//
// and a second kernel (stages/common/split/split_combine.cu) weighs the parts of a sequence by their lse.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::split_kv {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 16;                // of a tile
constexpr int kStrideQK = kHeadDimQK + 4;  // row strides in floats; + 4 lets 8 neighbouring rows
constexpr int kStrideS = kTokens + 4;      //   be read (or written) without a bank conflict

template <int kRows>
struct Smem {
  float q[kRows][kStrideQK];
  float kv[kTokens][kStrideQK];              // K; its first 512 columns are V
  float partial_s[kWarps][kRows][kStrideS];  // each warp's share of S
  float p[kRows][kStrideS];
  float rescale[kRows];    // a; at the end 1 / l
  int64_t out_row[kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
  MLA_REGIONS(q, kv, partial_s, p, rescale, out_row)
};

// The 16-bit values of a tile on their way from global memory, fetched while the tile before is
// worked on: 16 threads per token, one chunk of 16 bytes per thread and turn.
constexpr int kTokenThreads = kThreads / kTokens;
constexpr int kTurns = (kHeadDimQK / 8 + kTokenThreads - 1) / kTokenThreads;
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
    if (token_gmem != nullptr && column < kHeadDimQK) {
      fetch.packed[turn] = *reinterpret_cast<const uint4*>(token_gmem + column);
    }
  }
}

// The fetched token to shared memory, converted to fp32 once for all rows.
template <typename T, int kRows>
__device__ __forceinline__ void store_token(const Fetch& fetch, Smem<kRows>& smem) {
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int column = (turn * kTokenThreads + threadIdx.x % kTokenThreads) * 8;
    if (column < kHeadDimQK) {
      store_as_float<T>(fetch.packed[turn], &smem.kv[threadIdx.x / kTokenThreads][column]);
    }
  }
}

// One item: a worker, for one tile of kRows packed rows of a KV head.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 16 ? 2 : 1)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  Smem<kRows>& smem = shared_memory<Smem<kRows>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Who holds what. Lanes are numbered so that a read of shared memory finds the same place in lanes
  // one apart (tokens, columns) or two apart (rows): such reads take half the passes.
  // S: lane (y, x) of every warp has rows y + 8 i, tokens x + 4 j, of the warp's 72 columns.
  constexpr int kScoreRows = kRows / 8, kScoreTokens = kTokens / 4;
  const int score_y = lane / 8 * 2 + lane % 2, score_x = lane / 2 % 4;
  // Softmax: each thread has kOwned neighbouring tokens of one row.
  constexpr int kOwned = kRows * kTokens / kThreads, kRowThreads = kTokens / kOwned;
  const int own_row = threadIdx.x / kRowThreads, own_token = threadIdx.x % kRowThreads * kOwned;
  // O: lane (y, x) has rows y + 4 i, columns 4 x + {0..3} and 32 more, of the warp's 64 columns.
  constexpr int kOutRows = kRows / 4;
  const int out_y = lane / 16 * 2 + lane % 2, out_column = warp * 64 + lane / 2 % 8 * 4;

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

    // Q [kRows, 576] as fp32, for all tiles. Rows past the end: 0.
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < kRows * kHeadDimQK / 8; chunk += kThreads) {
      const int r = chunk / (kHeadDimQK / 8), column = chunk % (kHeadDimQK / 8) * 8;
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (rows.exists(r)) {
        packed = *reinterpret_cast<const uint4*>(static_cast<const T*>(tensors.q) +
                                                 rows.q_place(at.sequence, r) + column);
      }
      store_as_float<T>(packed, &smem.q[r][column]);
    }

    float o_rmem[kOutRows][8] = {};
    float m = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet, not NaN
    float l = 0;         // of this thread's tokens

    for (int token_begin = at.token_begin(); token_begin < tokens; token_begin += kTokens) {
      store_token<T>(fetch, smem);
      __syncthreads();  // K (and, the first time, Q) is there

      // S = Q K^T  [kRows, 16], this warp's 72 of the 576 columns
      float s_rmem[kScoreRows][kScoreTokens] = {};
#pragma unroll 1
      for (int k = warp * (kHeadDimQK / kWarps); k < (warp + 1) * (kHeadDimQK / kWarps); k += 4) {
        float4 k_rmem[kScoreTokens];
#pragma unroll
        for (int j = 0; j < kScoreTokens; ++j) {
          k_rmem[j] = *reinterpret_cast<const float4*>(&smem.kv[score_x + 4 * j][k]);
        }
#pragma unroll
        for (int i = 0; i < kScoreRows; ++i) {
          const float4 q_rmem = *reinterpret_cast<const float4*>(&smem.q[score_y + 8 * i][k]);
#pragma unroll
          for (int j = 0; j < kScoreTokens; ++j) {
            s_rmem[i][j] += q_rmem.x * k_rmem[j].x;
            s_rmem[i][j] += q_rmem.y * k_rmem[j].y;
            s_rmem[i][j] += q_rmem.z * k_rmem[j].z;
            s_rmem[i][j] += q_rmem.w * k_rmem[j].w;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
#pragma unroll
        for (int j = 0; j < kScoreTokens; ++j) {
          smem.partial_s[warp][score_y + 8 * i][score_x + 4 * j] = s_rmem[i][j];
        }
      }
      __syncthreads();                       // all eight shares of S are there
      if (token_begin + kTokens < tokens) {  // not before S, which needs all registers
        fetch_token(token_gmem(token_begin + kTokens), fetch);
      }

      // m' = max(m, rowmax S); P = 2^(S - m'); l = a l + rowsum P
      float s[kOwned] = {};
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
#pragma unroll
        for (int t = 0; t < kOwned; ++t) s[t] += smem.partial_s[from][own_row][own_token + t];
      }
      float m_new = m;
#pragma unroll
      for (int t = 0; t < kOwned; ++t) {
        s[t] = token_begin + own_token + t < own_visible ? items.scale_log2 * s[t] : -INFINITY;
        m_new = fmaxf(m_new, s[t]);
      }
#pragma unroll
      for (int offset = 1; offset < kRowThreads; offset *= 2) {
        m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, offset));
      }
      const float a = exp2f(m - m_new);  // old minus new: at most 1
      m = m_new;
      l *= a;
#pragma unroll
      for (int t = 0; t < kOwned; ++t) {
        const float p = exp2f(s[t] - m);
        l += p;
        smem.p[own_row][own_token + t] = p;
      }
      if (threadIdx.x % kRowThreads == 0) smem.rescale[own_row] = a;

      // O = a O, only if some row's maximum moved
      if (__syncthreads_or(a != 1)) {  // also: P and a are there
#pragma unroll
        for (int i = 0; i < kOutRows; ++i) {
          const float a_row = smem.rescale[out_y + 4 * i];
#pragma unroll
          for (int j = 0; j < 8; ++j) o_rmem[i][j] *= a_row;
        }
      }

      // O += P V  [kRows, 512], this warp's 64 columns, four tokens per step
#pragma unroll 1
      for (int t = 0; t < kTokens; t += 4) {
        float4 v_rmem[4][2];
#pragma unroll
        for (int depth = 0; depth < 4; ++depth) {
          v_rmem[depth][0] = *reinterpret_cast<const float4*>(&smem.kv[t + depth][out_column]);
          v_rmem[depth][1] = *reinterpret_cast<const float4*>(&smem.kv[t + depth][out_column + 32]);
        }
#pragma unroll
        for (int i = 0; i < kOutRows; ++i) {
          const float4 p4 = *reinterpret_cast<const float4*>(&smem.p[out_y + 4 * i][t]);
          const float p_rmem[4] = {p4.x, p4.y, p4.z, p4.w};
#pragma unroll
          for (int depth = 0; depth < 4; ++depth) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              o_rmem[i][4 * half + 0] += p_rmem[depth] * v_rmem[depth][half].x;
              o_rmem[i][4 * half + 1] += p_rmem[depth] * v_rmem[depth][half].y;
              o_rmem[i][4 * half + 2] += p_rmem[depth] * v_rmem[depth][half].z;
              o_rmem[i][4 * half + 3] += p_rmem[depth] * v_rmem[depth][half].w;
            }
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
    for (int i = 0; i < kOutRows; ++i) {
      if (smem.out_row[out_y + 4 * i] < 0) continue;
      const int64_t first = smem.out_row[out_y + 4 * i] + out_column;
      const float inverse_l = smem.rescale[out_y + 4 * i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float o[4] = {o_rmem[i][4 * half] * inverse_l, o_rmem[i][4 * half + 1] * inverse_l,
                            o_rmem[i][4 * half + 2] * inverse_l,
                            o_rmem[i][4 * half + 3] * inverse_l};
        if (slot >= 0) {
          *reinterpret_cast<float4*>(split.out_partial + first + 32 * half) =
              make_float4(o[0], o[1], o[2], o[3]);
        } else {
          store_rounded(o, static_cast<T*>(tensors.out) + first + 32 * half);
        }
      }
    }
    __syncthreads();  // Q and 1 / l have been read: the next piece may overwrite them
  }
}

}  // namespace mla::MLA_MACHINE::split_kv
