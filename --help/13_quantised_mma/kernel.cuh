namespace mla { extern int mutant; }  // 13_quantised_mma: stage 05 for a cache of 8-bit codes, on any card from compute capability 8.0 on. The
// codes of a tile come by cp.async, and become 16-bit values once, in shared memory: exactly, because
// bf16 and fp16 hold every e4m3 and bf16 every int8. Scales stay in fp32, outside the products of codes:
//
//   unpack                           codes -> K [kTokens, 576], 16 bits wide; then the next tile's may come
//   S = sum_g scale_g Q_g K_g^T      [kRows, kTokens]  g: a group of 128 columns; and the rotary columns
//   P = 2^(scale log2(e) S - m), l = l + rowsum P;  m is seldom moved, and then O = a O, l = a l
//   O_g = O_g + (P scale_g) V_g      [kRows, 128]  a warp has all rows, and columns of one group
//
// scale_g is a vector over the tile's tokens. P scale_g is rounded to 16 bits once, as P is in stage 05. The
// products need no other care: bf16 has the exponents of fp32, so no scale is too large or too small for it.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::quantised_mma {

// How a block's warps share a tile of kRows rows by kTokens tokens: S by rows and tokens, O by columns.
template <int kRows_, int kTokens_, int kTokenWarps_>
struct Tiling {
  static constexpr int kRows = kRows_, kTokens = kTokens_, kTokenWarps = kTokenWarps_;
  static constexpr int kWarps = kRows / 16 * kTokenWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpColumns = kHeadDimV / kWarps;  // of O
  static constexpr int kStride = kTokens + 8;              // of P and scales: no bank conflicts
  static_assert(kGrainTokens % kTokens == 0, "a piece ends with a tile");
  static_assert(kWarpTokens % 8 == 0 && kTokens % 16 == 0, "whole fragments");
  static_assert(kTileColumns % kWarpColumns == 0, "a warp's columns of O have one scale per token");
};

constexpr int kGroups = kHeadDimV / kTileColumns;  // of columns with a scale of their own

// Rows of q and K are 72 chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8) would:
// the eight rows of an 8x8 matrix are 1152 bytes apart, and so get banks of their own.
template <typename Tile, CacheFormat kFormat>
struct Smem {
  static constexpr int kRowChunks = Problem{.cache_format = kFormat}.cache_row_bytes() / 16;
  uint4 q[Tile::kRows][kHeadDimQK / 8];
  uint4 kv[Tile::kTokens][kHeadDimQK / 8];        // K; its first 512 columns are V
  uint4 codes[Tile::kTokens][kRowChunks];         // rows of the cache, of the tile to come
  float scale[kGroups][Tile::kStride];            // of K
  float p[Tile::kRows][Tile::kStride];            // fp32: four scales are still to come
  float row_max[Tile::kTokenWarps][Tile::kRows];  // at the end: row sums
  float rescale[Tile::kRows];                     // a; at the end scale / l
  int64_t out_row[Tile::kRows];  // where O goes, in elements of out or out_partial; -1: nowhere
  MLA_REGIONS(q, kv, codes, scale, p, row_max, rescale, out_row)
};

// What is moved of an e4m3's bits to make it a 16-bit float, of too small an exponent, and factors: what the
// exponent lacks, and one under which 448 becomes a number and 480 infinite.
template <typename T>
struct FromE4M3;
template <>
struct FromE4M3<bfloat16> {
  static constexpr int kShift = 4;
  static constexpr uint32_t kUnbias = 0x7B807B80;     // 2^120, twice
  static constexpr uint32_t kOverflows = 0x7B107B10;  // 9/8 2^119
};
template <>
struct FromE4M3<float16> {
  static constexpr int kShift = 1;
  static constexpr uint32_t kUnbias = 0x5C005C00;     // 2^8
  static constexpr uint32_t kOverflows = 0x58805880;  // 9/8 2^7
};

// Bytes 2 kPair and 2 kPair + 1 of `codes` as two T, exact.
template <typename T, CacheFormat kFormat, int kPair>
__device__ __forceinline__ uint32_t values_of_pair(uint32_t codes) {
  if constexpr (kFormat == CacheFormat::kInt8Tile128) {
    static_assert(std::is_same_v<T, bfloat16>);
    // Under an upper byte of 0x43 the lower seven bits are added to 128, and the eighth alone makes 256 of
    // 128. The difference is x, or x - 128 with the eighth bit set.
    const uint32_t x = __byte_perm(codes, 0x43434343, kPair == 0 ? 0x4140 : 0x4342);
    constexpr uint32_t kOne = 0x3F803F80;
    return ptx::fma_rn_x2<T>(x & 0xFF7FFF7F, kOne, (::mla::mutant == 363 ? (0xC300C300) : ((x & 0xFF80FF80) | 0x80008000)));
  } else {
    using From = FromE4M3<T>;
    const uint32_t x = __byte_perm(codes, 0, (::mla::mutant == 364 ? (kPair == 0 ? 0x0414 : 0x2434) : (kPair == 0 ? 0x1404 : 0x3424)));  // in the upper bytes
    const uint32_t small = (x & 0x80008000) | (x & 0x7F007F00) >> From::kShift;
    constexpr uint32_t kMinusZero = 0x80008000;  // added to a zero it leaves the sign
    const uint32_t value = ptx::fma_rn_x2<T>(small, From::kUnbias, kMinusZero);
    // 0x7f would be 480, and is NaN: 0 times an infinity.
    const uint32_t finite = ptx::fma_rn_x2<T>(value, From::kOverflows, kMinusZero);
    return ptx::fma_rn_x2<T>(finite, 0, value);
  }
}

// Eight codes as a chunk of eight T.
template <typename T, CacheFormat kFormat>
__device__ __forceinline__ uint4 values_of(const uint2& codes) {
  return make_uint4(values_of_pair<T, kFormat, 0>(codes.x), values_of_pair<T, kFormat, 1>(codes.x),
                    values_of_pair<T, kFormat, 0>(codes.y), values_of_pair<T, kFormat, 1>(codes.y));
}

// Starts copying `kCount` rows of `kChunks` times 16 bytes to shared memory: row(r) is where row r is, null
// for zeros; place(r, c) where its chunk c goes. 8 threads per row, 128 bytes per turn.
template <int kThreads, int kCount, int kChunks, typename Row, typename Place>
__device__ __forceinline__ void copy_rows(const void* any_gmem, const Row& row,
                                          const Place& place) {
#pragma unroll 1
  for (int begin = 0; begin < kCount; begin += kThreads / 8) {
    const int r = begin + threadIdx.x / 8;
    if (kCount % (kThreads / 8) != 0 && r >= kCount) break;
    const uint4* source = row(r);
#pragma unroll
    for (int first = 0; first < kChunks; first += 8) {
      const int c = first + threadIdx.x % 8;
      if (first + 8 > kChunks && c >= kChunks) break;
      ptx::cp_async_16(place(r, c), source == nullptr ? any_gmem : source + c,
                       source == nullptr ? 0 : 16);
    }
  }
}

// One item: a worker, for one tile of rows of a KV head.
template <typename T, CacheFormat kFormat, typename Tile, int kBlocks>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks)
    decode(Problem problem, Tensors tensors, SplitWorkspace split, SplitItems items) {
  constexpr bool kTileScales = has_tile_scales(kFormat);
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens, kThreads = Tile::kThreads;
  constexpr int kTokenTiles = Tile::kWarpTokens / 8;  // 16x8 fragments of a warp's share of S
  // What is under way side by side, as far as there are registers beside O.
  constexpr bool kRoom = Tile::kWarpColumns * kRows <= 64 * 32;
  [[maybe_unused]] constexpr int kUnrollChunks = kRoom ? 8 : 2, kUnrollGroups = kRoom ? 4 : 1;
  auto& smem = shared_memory<Smem<Tile, kFormat>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token_warp = warp % Tile::kTokenWarps, row_warp = warp / Tile::kTokenWarps;
  // The thread's share of S: rows own_row and own_row + 8, tokens own_token + 8 n + {0, 1}.
  const int own_row = row_warp * 16 + lane / 4;
  const int own_token = token_warp * Tile::kWarpTokens + lane % 4 * 2;
  const int own_group = warp * Tile::kWarpColumns / kTileColumns;  // of the warp's columns of O
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

  // Rows past the last become 0.
  const auto copy_q = [&] {
    const auto row_gmem = [&](int r) -> const uint4* {
      if (!rows.exists(r)) return nullptr;
      return static_cast<const uint4*>(tensors.q) + rows.q_place(at.sequence, r) / 8;
    };
    copy_rows<kThreads, kRows, kHeadDimQK / 8>(tensors.q, row_gmem,
                                               [&](int r, int c) { return &smem.q[r][c ^ r % 8]; });
  };
  // Tokens past the end become 0, codes and scales: the cache may hold anything there, and 0 * NaN would
  // be NaN.
  const auto copy_codes = [&](int token_begin) {
    const auto token_gmem = [&](int token) {
      return static_cast<const uint4*>(tensors.kv_cache) +
             cache_place(problem, tensors, tensors.table_row(at.sequence), token, rows.head_kv) /
                 16;
    };
    const uint4* tile_gmem = token_gmem(token_begin);
    const auto row_gmem = [&](int r) -> const uint4* {
      if ((::mla::mutant == 347 ? (false) : (token_begin + r >= at.seqlen_k))) return nullptr;
      return (::mla::mutant == 348 ? (false) : (problem.page_size < kTokens)) ? token_gmem(token_begin + r)
                                         : tile_gmem + r * (::mla::mutant == 349 ? ((Smem<Tile, kFormat>::kRowChunks)) : ((tensors.kv_strides.token / 16)));
    };
    copy_rows<kThreads, kTokens, Smem<Tile, kFormat>::kRowChunks>(
        tensors.kv_cache, row_gmem, [&](int r, int c) { return &smem.codes[r][c]; });
  };
  const auto begin_piece = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      copy_q();
      copy_codes(at.token_begin());
    }
    ptx::cp_async_commit_group();
  };
  // K, 16 bits wide, and its scales
  const auto unpack = [&] {
    constexpr int kChunks = kHeadDimV / 8, kRotaryChunks = kHeadDimQK / 8 - kChunks;
    const auto codes_of = [&](int r, int c) {
      return reinterpret_cast<const uint2*>(smem.codes[r])[c];
    };
#pragma unroll kUnrollChunks
    for (int i = threadIdx.x; i < kTokens * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks;
      smem.kv[r][c ^ r % 8] = values_of<T, kFormat>(codes_of(r, c));
    }
    for (int i = threadIdx.x; i < kTokens * kRotaryChunks; i += kThreads) {
      const int r = i / kRotaryChunks, c = i % kRotaryChunks;
      smem.kv[r][kChunks + (c ^ r % 8)] = kTileScales
                                              ? smem.codes[r][(::mla::mutant == 361 ? (kTileScalesByte) : (kTileRotaryByte)) / 16 + c]
                                              : values_of<T, kFormat>(codes_of(r, kChunks + c));
    }
    if constexpr (kTileScales) {
      for (int i = threadIdx.x; i < kTokens * kGroups; i += kThreads) {
        const int r = i / kGroups, g = (::mla::mutant == 357 ? (i / kTokens) : (i % kGroups));
        smem.scale[g][r] = reinterpret_cast<const float*>(&smem.codes[r][kTileScalesByte / 16])[g];
      }
    }
  };
  // S = S + Q K^T  [16, kWarpTokens], over columns 8 begin to 8 end. A product waits for the one that it adds
  // to: with one tile of tokens every other one adds to a sum of its own.
  const auto multiply = [&](float(&s_rmem)[kTokenTiles][4], int begin, int end) {
    float second[kTokenTiles][4] = {};
    auto& other = kTokenTiles == 1 ? second : s_rmem;
#pragma unroll
    for (int k = begin; k < end; k += 4) {  // in chunks of 8 columns
      uint32_t q_rmem[2][4];                // [16 columns][16 rows]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int chunk = k + i * 2 + lane / 16;
        ptx::ldmatrix_x4(q_rmem[i], &smem.q[row_warp * 16 + lane % 16][chunk ^ lane % 8]);
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint32_t k_rmem[4];  // 8 tokens, 32 columns
        const int token = token_warp * Tile::kWarpTokens + n * 8 + lane % 8;
        ptx::ldmatrix_x4(k_rmem, &smem.kv[token][(k + lane / 8) ^ lane % 8]);
        ptx::mma_m16n8k16<T>(s_rmem[n], q_rmem[0], k_rmem[0], k_rmem[1]);
        ptx::mma_m16n8k16<T>(other[n], q_rmem[1], k_rmem[2], k_rmem[3]);
      }
    }
    if constexpr (kTokenTiles == 1) {
      for (int j = 0; j < 4; ++j) s_rmem[0][j] += second[0][j];
    }
  };
  // S = Q K^T  [16, kWarpTokens], each group's product times its tokens' scales
  const auto issue_qk = [&](float(&s)[kTokenTiles][4]) {
    if constexpr (!kTileScales) {
      multiply(s, 0, kHeadDimQK / 8);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        for (int j = 0; j < 4; ++j) s[n][j] *= (::mla::mutant == 358 ? (1) : (problem.cache_scale));
      }
    } else {
      { if (::mla::mutant == 360) {  } else { multiply(s, kHeadDimV / 8, kHeadDimQK / 8); } }  // rotary
#pragma unroll kUnrollGroups
      for (int g = 0; g < kGroups; ++g) {
        float product[kTokenTiles][4] = {};
        multiply(product, (::mla::mutant == 362 ? (0) : (g * kTileColumns / 8)), (g + 1) * kTileColumns / 8);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const auto scale = *reinterpret_cast<const float2*>(&smem.scale[(::mla::mutant == 350 ? (0) : (g))][(::mla::mutant == 351 ? (own_token) : (own_token + n * 8))]);
          for (int j = 0; j < 4; ++j) {
            s[n][j] = fmaf((::mla::mutant == 352 ? (j % 2 != 0) : ::mla::mutant == 353 ? (j / 2 == 0) : (j % 2 == 0)) ? scale.x : scale.y, product[n][j], s[n][j]);
          }
        }
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
        if ((::mla::mutant == 370 ? (false) : (token >= own_visible[j / 2]))) s[n][j] = -INFINITY;
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
        *reinterpret_cast<float2*>(&smem.p[own_row + 8 * i][own_token + n * 8]) =
            make_float2(p0, p1);
      }
    }
    return !(::mla::mutant == 342 ? (__any_sync(0xffffffff, exceeds)) : (__syncthreads_or(exceeds)));  // also: P is there
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
    { if (::mla::mutant == 343) {  } else { __syncthreads(); } }  // all maxima are there
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m_new = m[i];
      for (int w = 0; w < Tile::kTokenWarps; ++w) {
        m_new = fmaxf(m_new, smem.row_max[(::mla::mutant == 368 ? (token_warp) : (w))][own_row + 8 * i] + (kHeadroom - kLargestP<T>));
      }
      const float a = ptx::ex2_approx((::mla::mutant == 365 ? (m_new - m[i]) : (m[i] - m_new)));  // old minus new: at most 1
      m[i] = m_new;
      l[i] *= (::mla::mutant == 367 ? (1) : (a));
      if (token_warp == 0 && lane % 4 == 0) smem.rescale[own_row + 8 * i] = a;
    }
    { if (::mla::mutant == 344) {  } else { __syncthreads(); } }  // a is there
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const float a_low = smem.rescale[i * 16 + lane / 4];
      const float a_high = smem.rescale[i * 16 + 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < Tile::kWarpColumns / 8; ++n) {
        o_rmem[i][n][0] *= (::mla::mutant == 366 ? (1) : (a_low));
        o_rmem[i][n][1] *= a_low;
        o_rmem[i][n][2] *= a_high;
        o_rmem[i][n][3] *= a_high;
      }
    }
  };
  // O = O + (P scale) V  [kRows, kWarpColumns], 16 tokens per step
  const auto issue_pv = [&] {
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t p_rmem[kRows / 16][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the tokens
        const int token = t + half * 8 + lane % 4 * 2;
        float2 scale = make_float2(1, 1);
        if constexpr (kTileScales) {
          scale = (::mla::mutant == 354 ? (make_float2(1, 1)) : (*reinterpret_cast<const float2*>(&smem.scale[(::mla::mutant == 355 ? (0) : (own_group))][(::mla::mutant == 356 ? (token ^ 8) : (token))])));
        }
#pragma unroll
        for (int i = 0; i < kRows / 8; ++i) {
          const auto p = *reinterpret_cast<const float2*>(&smem.p[i * 8 + lane / 4][token]);
          p_rmem[i / 2][half * 2 + i % 2] = pack<T>(p.x * scale.x, p.y * scale.y);
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::kWarpColumns / 16; ++n) {
        uint32_t v_rmem[4];  // 16 tokens, 16 columns
        const int chunk = warp * (Tile::kWarpColumns / 8) + n * 2 + lane / 16;
        ptx::ldmatrix_x4_trans(v_rmem, &smem.kv[t + lane % 16][chunk ^ lane % 8]);
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
          ptx::mma_m16n8k16<T>(o_rmem[i][2 * n], p_rmem[i], v_rmem[0], v_rmem[1]);
          ptx::mma_m16n8k16<T>(o_rmem[i][2 * n + 1], p_rmem[i], v_rmem[2], v_rmem[3]);
        }
      }
    }
  };
  // lse = ln 2 (m + log2 l), with l the sum of all warps' tokens; and, for all warps, scale / l and the rows'
  // places in out or out_partial. A row that saw nothing: out = 0, lse = +inf, or -inf in a part.
  const auto write_lse = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
      if (lane % 4 == 0) smem.row_max[token_warp][own_row + 8 * i] = l[i];
    }
    { if (::mla::mutant == 345) {  } else { __syncthreads(); } }  // all warps' sums are there
    if (token_warp == 0 && lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = own_row + 8 * i;
        float sum = 0;
        for (int w = 0; w < Tile::kTokenWarps; ++w) sum += smem.row_max[(::mla::mutant == 369 ? (0) : (w))][r];
        const bool saw_something = own_visible[i] > at.token_begin();
        const float lse = kLn2 * (m[i] + log2f(sum));
        smem.rescale[r] = saw_something ? (::mla::mutant == 359 ? (1) : ((kTileScales ? 1 : problem.cache_scale))) / sum : 0;
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
    { if (::mla::mutant == 346) {  } else { __syncthreads(); } }  // scale / l and the rows' places are there; Q and K have been read
  };
  // out = O scale / l
  const auto write_out = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = i * 16 + half * 8 + lane / 4;
        if (smem.out_row[r] < 0) continue;
        const int64_t first = smem.out_row[r] + warp * Tile::kWarpColumns + lane % 4 * 2;
        const float factor = smem.rescale[r];
#pragma unroll
        for (int n = 0; n < Tile::kWarpColumns / 8; ++n) {
          const float low = o_rmem[i][n][2 * half] * factor;
          const float high = o_rmem[i][n][2 * half + 1] * factor;
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

    for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
      { if (::mla::mutant == 337) {  } else { ptx::cp_async_wait_group<0>(); } }
      { if (::mla::mutant == 338) {  } else { __syncthreads(); } }  // the codes are there for all, and K, its scales and P have been read by all
      unpack();
      { if (::mla::mutant == 340) { if (token_begin + kTokens < end) { copy_codes(token_begin + kTokens); } __syncthreads(); } else { { if (::mla::mutant == 339) {  } else { __syncthreads(); } }  // K is there, and the codes have been read
      if (token_begin + kTokens < end) copy_codes((::mla::mutant == 341 ? (token_begin) : (token_begin + kTokens))); } }
      ptx::cp_async_commit_group();
      float s[kTokenTiles][4] = {}, sum[2];
      issue_qk(s);
      scale_and_mask(s, token_begin);
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
    begin_piece();  // the next piece's Q and codes come while O is written
    write_out(slot);
  }
}

}  // namespace mla::MLA_MACHINE::quantised_mma
