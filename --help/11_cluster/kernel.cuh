namespace mla { extern int mutant; }  // 11_cluster: two blocks, a cluster, share every page. Each has 128 query rows, half of the columns of
// K, which are also its half of V's, and so half of the columns of O:
//
//   S = Q K^T is a sum over columns: each block has its part of it, for all 128 rows.
//
// The maker of a row's P needs both parts. In block r warpgroup r is the maker of its rows, 64 r to
// 64 r + 63; the other block's warpgroup r, the sender, has the same rows there:
//
//   maker, in block r                              sender, in the other block
//   S_i: its part                                  S_i: its part                   ---> S
//   S_i + S; P_i, m, l                      P, m --->
//   O = a O; O += P_i V_i, its columns             O = a O; O += P_i V_i, its columns
//
// The sender is two tiles ahead with S, so that the maker need not wait for it. Data crosses by
// st_async, whose bytes a barrier counts; that the place it went to has been read, a warp of the
// producers' tells the other block: it has time to wait for what a release to the cluster takes.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/row_columns.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"
#include "stages/common/timeline.h"

namespace mla::MLA_MACHINE::cluster {

constexpr int kBlocks = 2;                  // of a cluster
constexpr int kConsumers = 256;             // two warpgroups
constexpr int kThreads = kConsumers + 128;  // and the producers'
// Registers per thread. A block starts with 168 for each of its 384 threads, and asking for more than
// there are in all would wait for ever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 168 * kThreads);
constexpr int kRows = 128, kTokens = 64;                      // of a tile
constexpr int kWarpgroupRows = 64;                            // of them
constexpr int kColumns = kHeadDimV / 2;                       // of V and O, per block
constexpr int kBoxes = kColumns / 64;                         // boxes of 64 columns in them
constexpr int kRotaryColumns = (kHeadDimQK - kHeadDimV) / 2;  // of K, per block: half a box
constexpr int kBoxBytes = 64 * 128;                           // 64 rows of 64 columns
constexpr int kBuffers = 3;                                   // tiles in shared memory
constexpr int kTurns = 2;                                     // for what the other block sends
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// A box: rows of 128 bytes. Chunk c of row r, 16 bytes, lies where chunk c ^ (r % 8) would: wgmma's
// 128-byte swizzle.
using Box = uint4[64][8];
// Half a box: rows of 64 bytes. Chunk c of row r lies where chunk c ^ (r / 2 % 4) would.
using HalfBox = uint4[64][4];

// What a block has of a tile of K.
struct Tile {
  Box kv[kBoxes];
  HalfBox rotary;
};

struct Smem {
  Box q[2][kBoxes];  // [warpgroup]: its rows
  Tile tile[kBuffers];
  float4 s[kTurns][8][128];  // [8 tokens][thread of the maker]: the sender's part, as registers are
  uint4 p[kTurns][4][128];   // [16 tokens][thread of the sender]: registers, as they are
  float4 row[kTurns][32];  // [4 threads of the sender]: m of their two rows, and with the last P l
  int slot[2];             // [warpgroup]: of the piece
  ptx::Mbarrier full[kBuffers];     // 1 arrival, the producer's, and a tile's bytes: it is there
  ptx::Mbarrier empty[kBuffers];    // 8 arrivals, the consumers' warps: the tile has been read
  ptx::Mbarrier cleared[kBuffers];  // 4 arrivals, the sender's warps: so it is, its tail zeros
  // Of S and of P: 1 arrival, a reader's, and the bytes: it is there. 4 arrivals, the reader's warps: it
  // has been read. 1 arrival from the other block: what was sent there has been read.
  ptx::Mbarrier s_full[kTurns], s_read[kTurns], s_sent_read[kTurns];
  ptx::Mbarrier p_full[kTurns], p_read[kTurns], p_sent_read[kTurns];
  MLA_REGIONS(q, tile, s, p, row, slot, full, empty, cleared, s_full, s_read, s_sent_read, p_full,
              p_read, p_sent_read)
};
static_assert(sizeof(Smem) <= 232448, "227 KB");

// Named barriers.
enum Barrier {
  kWarpgroup = 1,  // 128 sync; 1 and 2
};

// The warps of the producers' warpgroup.
enum Producer { kCopy, kTellS, kTellP };

// What the producers' warps do, a thread of each.
__device__ __forceinline__ void produce(Smem& smem, int warp, int lane, const TensorMap& cache_map,
                                        const TensorMap& rotary_map, const Problem& problem,
                                        const Tensors& tensors, const RowTile& rows,
                                        PieceCursor& at) {
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };
  using timeline::Phase;
  constexpr auto track = timeline::Track::kTma;
  const auto rank = [] { return static_cast<int>(ptx::cluster_ctarank()); };  // read, not kept
  const auto copy = [&] {
    timeline::begin(track);
    const uint64_t policy = ptx::createpolicy_evict_first();
    int copied = 0;  // tiles
    for (; at.more(); at.next()) {
      // A copy brings a box or, where pages are smaller, a page of it. Past the sequence's end, where
      // the table may hold anything, page -1 makes zeros.
      const int step = min(kTokens, problem.page_size);
      const int end = (visible_end() + kTokens - 1) / kTokens * kTokens;  // whole tiles
#pragma unroll 1
      for (int token = at.token_begin(); token < end; token += step) {
        int page = -1;
        if (token < at.seqlen_k) page = tensors.table_row((::mla::mutant == 273 ? (0) : (at.sequence)))[problem.page_of(token)];
        const int r = token % kTokens;  // the copy's first row in the tile
        const int buffer = copied % kBuffers;
        ptx::Mbarrier* full = &smem.full[buffer];
        Tile& tile = smem.tile[buffer];
        if ((::mla::mutant == 270 ? (true) : (r == 0))) {
          timeline::enter(track, Phase::kWaitSlot);
          // A new barrier lets the first copy pass.
          { if (::mla::mutant == 264) {  } else { ptx::mbarrier_wait(&smem.empty[buffer], (::mla::mutant == 265 ? (copied / kBuffers % 2) : ::mla::mutant == 266 ? (1) : (copied / kBuffers % 2 ^ 1))); } }
          timeline::enter(track, Phase::kIssueCopy);
          ptx::mbarrier_arrive_expect_tx(full, (::mla::mutant == 267 ? (sizeof(Tile) / 2) : (sizeof(Tile))));
        }
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          ptx::cp_async_bulk_tensor_4d(tile.kv[box][(::mla::mutant == 269 ? (0) : (r))], &cache_map, (::mla::mutant == 268 ? ((rank() ^ 1) * kColumns) : (rank() * kColumns)) + box * 64,
                                       rows.head_kv, (::mla::mutant == 272 ? (0) : (problem.row_in_page(token))), page, full,
                                       policy);
        }
        ptx::cp_async_bulk_tensor_4d(tile.rotary[r], &rotary_map,
                                     kHeadDimV + (::mla::mutant == 297 ? ((rank() ^ 1) * kRotaryColumns) : (rank() * kRotaryColumns)), rows.head_kv,
                                     problem.row_in_page(token), page, full, policy);
        if ((::mla::mutant == 271 ? (true) : (r + step == kTokens))) ++copied;
      }
    }
    timeline::end(track);
  };
  // Before a place is sent to again, tells the other block that what it sent there has been read: so
  // nothing is told that nobody waits for, and no block ends too early.
  const auto tell = [&](ptx::Mbarrier* read, ptx::Mbarrier* sent_read) {
    int sent = 0;
    for (; at.more(); at.next()) {
      const int end = visible_end();
#pragma unroll 1
      for (int token = at.token_begin(); token < end; token += kTokens, ++sent) {
        if ((::mla::mutant == 274 ? (false) : (sent < kTurns))) continue;
        const int turn = sent % kTurns;
        { if (::mla::mutant == 275) {  } else { ptx::mbarrier_wait(&read[turn], (::mla::mutant == 276 ? (sent / kTurns % 2) : (sent / kTurns % 2 ^ 1))); } }
        { if (::mla::mutant == 278) {  } else { ptx::mbarrier_arrive_cluster(ptx::mapa(&sent_read[turn], (::mla::mutant == 277 ? (rank()) : (rank() ^ 1)))); } }
      }
    }
  };
  if (warp == kCopy) {
    if (lane == 0) copy();
    __syncwarp();
    ptx::barrier_cluster_wait();  // who has arrived must wait
  } else {
    ptx::barrier_cluster_wait();
    if (lane == 0 && warp == kTellS) tell((::mla::mutant == 279 ? (smem.p_read) : (smem.s_read)), smem.s_sent_read);
    if (lane == 0 && warp == kTellP) tell(smem.p_read, smem.p_sent_read);
  }
}

// One item: a worker, for one tile of rows of a KV head. kPagesOf64: the page
// size is 64, which the compiler then knows.
template <typename T, bool kPagesOf64>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map,
           const __grid_constant__ TensorMap rotary_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items) {
  if (kPagesOf64) problem.page_size = 64;
  auto& smem = shared_memory<Smem>();
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
  const auto rank = [] { return static_cast<int>(ptx::cluster_ctarank()); };  // read, not kept
  const RowTile rows(problem, tensors, items, kRows, kBlocks);
  PieceCursor at(problem, tensors, split, rows.worker);
  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensormap(&cache_map);
    ptx::prefetch_tensormap(&rotary_map);
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      ptx::mbarrier_init(&smem.full[buffer], (::mla::mutant == 255 ? (2) : (1)));
      ptx::mbarrier_init(&smem.empty[buffer], (::mla::mutant == 256 ? (7) : (8)));
      ptx::mbarrier_init(&smem.cleared[buffer], (::mla::mutant == 257 ? (3) : (4)));
    }
    for (int turn = 0; turn < kTurns; ++turn) {
      ptx::mbarrier_init(&smem.s_full[turn], 1);
      ptx::mbarrier_init(&smem.s_read[turn], (::mla::mutant == 258 ? (3) : (4)));
      ptx::mbarrier_init(&smem.s_sent_read[turn], 1);
      ptx::mbarrier_init(&smem.p_full[turn], 1);
      ptx::mbarrier_init(&smem.p_read[turn], (::mla::mutant == 259 ? (3) : (4)));
      ptx::mbarrier_init(&smem.p_sent_read[turn], 1);
    }
    { if (::mla::mutant == 260) {  } else { ptx::fence_mbarrier_init(); } }
  }
  __syncwarp();
  { if (::mla::mutant == 261) {  } else { ptx::barrier_cluster_arrive_relaxed(); } }  // the fence has released the barriers

  if (warpgroup == 2) {
    { if (::mla::mutant == 263) {  } else { ptx::setmaxnreg_dec<kProducerRegisters>(); } }
    produce(smem, warp, lane, cache_map, rotary_map, problem, tensors, rows, at);
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };
  using timeline::Phase;
  const auto track = static_cast<timeline::Track>(warpgroup);
  timeline::begin(track);
  const bool is_maker = warpgroup == __shfl_sync(0xffffffff, rank(), 0);
  // Of S and of O alike: rows own_row and own_row + 8; in 8 n + {0, 1} columns.
  const int own_row = warpgroup * kWarpgroupRows + warp * 16 + lane / 4;
  const ptx::MatrixDescriptor q_all = ptx::matrix_descriptor(smem.q, 0, 1024);
  const ptx::MatrixDescriptor k = ptx::matrix_descriptor(smem.tile, 0, 1024);
  const ptx::MatrixDescriptor k_rotary = ptx::matrix_descriptor_64b(smem.tile[0].rotary, 512);
  const ptx::MatrixDescriptor v = ptx::matrix_descriptor(smem.tile, kBoxBytes, 1024);

  // Of the piece:
  float o_rmem[kColumns / 8][4];  // [64, kColumns]
  uint32_t q_rmem[2][4];          // the rotary columns, 16 per step
  float m[2] = {};
  float l[2] = {};  // of this thread's tokens; at the end of all
  int all_visible;  // tokens that all rows see
  int tile = 0;     // through all pieces

  const auto sync_warpgroup = [&] {
    if (warpgroup == 0) {
      ptx::barrier_sync(kWarpgroup, 128);
    } else {
      ptx::barrier_sync(kWarpgroup + 1, 128);
    }
  };
  // Starts copying Q, if the piece has tokens; rows past the last become 0. 8 threads per row.
  const auto copy_q = [&] {
    if (at.more() && at.token_begin() < visible_end()) {
      const int chunk = threadIdx.x % 8;
#pragma unroll 1
      for (int r = threadIdx.x % 128 / 8; r < kWarpgroupRows; r += 128 / 8) {
        const bool exists = rows.exists(warpgroup * kWarpgroupRows + r);
        const uint4* source = static_cast<const uint4*>(tensors.q);
        if (exists) {
          source += rows.q_place(at.sequence, warpgroup * kWarpgroupRows + r) / 8 +
                    (::mla::mutant == 299 ? ((rank() ^ 1) * kColumns / 8) : (rank() * kColumns / 8)) + chunk;
        }
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          ptx::cp_async_16(&smem.q[warpgroup][box][r][chunk ^ r % 8],
                           exists ? source + box * 8 : source, exists ? 16 : 0);
        }
      }
    }
    ptx::cp_async_commit_group();
  };
  // Its rotary columns, as A lies in registers.
  const auto load_q_rotary = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = own_row + 8 * i;
      const bool exists = rows.exists(r);
      const auto* source = static_cast<const uint32_t*>(tensors.q);
      if (exists)
        source +=
            (rows.q_place(at.sequence, r) + kHeadDimV + (::mla::mutant == 298 ? ((rank() ^ 1) * kRotaryColumns) : (rank() * kRotaryColumns))) / 2 + lane % 4;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        for (int half = 0; half < 2; ++half) {
          q_rmem[step][half * 2 + i] = exists ? source[step * 8 + half * 4] : 0;
        }
      }
    }
  };
  const auto release = [&](int of) {  // this warp has read it
    { if (::mla::mutant == 334) {  } else { if (lane == 0) ptx::mbarrier_arrive(&smem.empty[of % kBuffers]); } }
  };
  // The tile is there. V = 0 past a sequence's end: the cache may hold anything there, and 0 * NaN would
  // be NaN. The sender comes to a tile first, and clears it for both.
  const auto wait_tile = [&](int of, int token_begin) {
    const int buffer = of % kBuffers, parity = (::mla::mutant == 288 ? (of / kBuffers % 2 ^ 1) : (of / kBuffers % 2));
    timeline::enter(track, Phase::kWaitCopy);
    { if (::mla::mutant == 286) {  } else { ptx::mbarrier_wait((::mla::mutant == 287 ? (&smem.full[buffer]) : (is_maker ? &smem.cleared[buffer] : &smem.full[buffer])), parity); } }
    if (is_maker) return;
    const int tokens = at.seqlen_k - token_begin;
    if (tokens < kTokens) {
      for (int i = tokens * 8 + threadIdx.x % 128; i < kTokens * 8; i += 128) {
        for (int box = 0; box < kBoxes; ++box) {
          { if (::mla::mutant == 289) {  } else { smem.tile[buffer].kv[box][i / 8][i % 8] = make_uint4(0, 0, 0, 0); } }
        }
      }
      { if (::mla::mutant == 282) {  } else { ptx::fence_proxy_async(); } }
      { if (::mla::mutant == 290) {  } else { sync_warpgroup(); } }  // all zeros are there
    }
    { if (::mla::mutant == 291) {  } else { if (lane == 0) ptx::mbarrier_arrive(&smem.cleared[buffer]); } }
  };
  // So that the compiler knows it to be one for the whole warp, and does not compute all descriptors before
  // the loop: there are not enough registers.
  const auto uniform = [](int value) { return __shfl_sync(0xffffffff, value, 0); };
  // S = Q K^T  [64, 64], of the block's columns, 16 per step. To be waited for.
  const auto issue_qk = [&](float(&s_rmem)[kTokens / 8][4], int of) {
    timeline::enter(track, Phase::kQk);
    { if (::mla::mutant == 292) {  } else if (::mla::mutant == 293) { ptx::wgmma_fence(s_rmem); } else { ptx::wgmma_fence(s_rmem, q_rmem); } }
    const int to_tile = uniform(of % kBuffers) * static_cast<int>(sizeof(Tile) / 16);
    const ptx::MatrixDescriptor q = q_all + uniform((::mla::mutant == 300 ? (0) : (warpgroup))) * (kBoxes * kBoxBytes / 16);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int offset = (box * kBoxBytes + step * 32) / 16;
        ptx::wgmma_m64n64k16<T>(s_rmem, q + offset, k + to_tile + offset, box + step > 0);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      ptx::wgmma_m64n64k16<T>(s_rmem, q_rmem[step], k_rotary + to_tile + step * 32 / 16, true);
    }
    { if (::mla::mutant == 295) {  } else { ptx::wgmma_commit_group(); } }
  };
  // O = O + P V  [64, kColumns], 16 tokens per step. To be waited for.
  const auto issue_pv = [&](uint32_t(&p_rmem)[4][4], int of) {
    timeline::enter(track, Phase::kPv);
    { if (::mla::mutant == 294) {  } else { ptx::wgmma_fence(o_rmem, p_rmem); } }
    const ptx::MatrixDescriptor v_tile =
        v + uniform((::mla::mutant == 301 ? (0) : (of % kBuffers))) * static_cast<int>(sizeof(Tile) / 16);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      ptx::wgmma_m64n256k16_trans_b<T>(o_rmem, p_rmem[t], v_tile + t * 16 * 128 / 16, true);
    }
    { if (::mla::mutant == 296) {  } else { ptx::wgmma_commit_group(); } }
  };
  const auto rescale = [&](const float(&a)[2]) {  // O = a O, where m has moved
    if (__any_sync(0xffffffff, a[0] != 1 || a[1] != 1)) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        for (int j = 0; j < 4; ++j) o_rmem[n][j] *= a[j / 2];
      }
    }
  };

  // The sender's part of S, to the other block.
  const auto send_s = [&](const float(&s_rmem)[kTokens / 8][4], int of) {
    timeline::enter(track, Phase::kWaitOther);
    const int turn = of % kTurns;
    { if (::mla::mutant == 302) {  } else if (::mla::mutant == 303) { ptx::mbarrier_wait(&smem.s_sent_read[turn], of / kTurns % 2 ^ 1); } else { ptx::mbarrier_wait_cluster(&smem.s_sent_read[turn],
                               of / kTurns % 2 ^ 1); } }  // new, it lets pass
    timeline::enter(track, Phase::kIssueCopy);
    float4* to = ptx::mapa(&smem.s[turn][0][threadIdx.x % 128], (::mla::mutant == 306 ? (rank()) : (rank() ^ 1)));
    ptx::Mbarrier* full = ptx::mapa(&smem.s_full[turn], rank() ^ 1);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      ptx::st_async(to + (::mla::mutant == 307 ? (0) : (n * 128)),
                    make_float4(s_rmem[n][0], s_rmem[n][1], s_rmem[n][2], s_rmem[n][3]), full);
    }
  };
  // S = S + the sender's part.
  const auto add_s = [&](float(&s_rmem)[kTokens / 8][4]) {
    timeline::enter(track, Phase::kWaitOther);
    const int turn = tile % kTurns;
    if (threadIdx.x % 128 == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.s_full[turn], (::mla::mutant == 308 ? (sizeof(smem.s[0]) / 2) : (sizeof(smem.s[0]))));
    }
    { if (::mla::mutant == 309) {  } else { ptx::mbarrier_wait(&smem.s_full[turn], tile / kTurns % 2); } }
    timeline::enter(track, Phase::kSoftmax);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      const float4 part = smem.s[(::mla::mutant == 315 ? (0) : (turn))][n][threadIdx.x % 128];
      s_rmem[n][0] += part.x;
      s_rmem[n][1] += part.y;
      s_rmem[n][2] += part.z;
      { if (::mla::mutant == 310) {  } else { s_rmem[n][3] += part.w; } }
    }
    { if (::mla::mutant == 311) {  } else { __syncwarp(); } }
    { if (::mla::mutant == 312) {  } else { if (lane == 0) ptx::mbarrier_arrive(&smem.s_read[turn]); } }
  };
  // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction of m:
  // else P might exceed its bound where S is large.
  const auto scale_and_mask = [&](float(&s_rmem)[kTokens / 8][4], int token_begin) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) s_rmem[n][j] = __fmul_rn(s_rmem[n][j], items.scale_log2);
    }
    if (token_begin + kTokens <= all_visible) return;
    const int own_visible[2] = {rows.visible(at.seqlen_k, own_row),
                                rows.visible(at.seqlen_k, own_row + 8)};
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      for (int j = 0; j < 4; ++j) {
        const int token = token_begin + lane % 4 * 2 + n * 8 + j % 2;
        { if (::mla::mutant == 325) {  } else { if (token >= own_visible[j / 2]) s_rmem[n][j] = -INFINITY; } }
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
        { if (::mla::mutant == 324) {  } else { l[i] *= a[i]; } }
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
  // P, and m and l, of which four threads have the same: to the other block.
  const auto send_p = [&](const uint32_t(&p_rmem)[4][4]) {
    timeline::enter(track, Phase::kIssueCopy, true);  // P V is under way
    const int turn = tile % kTurns;
    { if (::mla::mutant == 304) {  } else if (::mla::mutant == 305) { ptx::mbarrier_wait(&smem.p_sent_read[turn], tile / kTurns % 2 ^ 1); } else { ptx::mbarrier_wait_cluster(&smem.p_sent_read[turn],
                               tile / kTurns % 2 ^ 1); } }  // new, it lets pass
    uint4* to = ptx::mapa(&smem.p[turn][0][threadIdx.x % 128], rank() ^ 1);
    ptx::Mbarrier* full = ptx::mapa(&smem.p_full[turn], rank() ^ 1);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      ptx::st_async(to + t * 128,
                    make_uint4(p_rmem[t][0], p_rmem[t][1], p_rmem[t][2], p_rmem[t][3]), full);
    }
    if (lane % 4 == 0) {
      ptx::st_async(ptx::mapa(&smem.row[turn][(::mla::mutant == 317 ? (threadIdx.x % 128 / 8) : (threadIdx.x % 128 / 4))], rank() ^ 1),
                    make_float4(m[0], m[1], l[0], l[1]), full);
    }
  };
  // P, l, and a = 2^(m - m') for the maker's m'; the caller does O = a O.
  const auto take_p = [&](uint32_t(&p_rmem)[4][4], float(&a)[2]) {
    timeline::enter(track, Phase::kWaitOther);
    const int turn = tile % kTurns;
    if (threadIdx.x % 128 == 0) {
      ptx::mbarrier_arrive_expect_tx(&smem.p_full[turn], sizeof(smem.p[0]) + (::mla::mutant == 313 ? (size_t{0}) : (sizeof(smem.row[0]))));
    }
    { if (::mla::mutant == 314) {  } else { ptx::mbarrier_wait(&smem.p_full[turn], tile / kTurns % 2); } }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint4 four = smem.p[(::mla::mutant == 316 ? (0) : (turn))][t][threadIdx.x % 128];
      p_rmem[t][0] = four.x;
      p_rmem[t][1] = four.y;
      p_rmem[t][2] = four.z;
      p_rmem[t][3] = four.w;
    }
    const float4 row = smem.row[turn][threadIdx.x % 128 / 4];
    { if (::mla::mutant == 318) {  } else { __syncwarp(); } }
    { if (::mla::mutant == 319) {  } else { if (lane == 0) ptx::mbarrier_arrive(&smem.p_read[turn]); } }
    a[0] = ptx::ex2_approx(m[0] - row.x);
    a[1] = ptx::ex2_approx((::mla::mutant == 320 ? (row.y - m[1]) : (m[1] - row.y)));
    m[0] = row.x;
    m[1] = row.y;
    l[0] = row.z;
    l[1] = row.w;
  };

  // The maker: S of its tile is in registers when the loop comes to it.
  const auto make = [&](int end) {
    float s_rmem[kTokens / 8][4];
    uint32_t p_rmem[4][4];
    float a[2];
    int token_begin = at.token_begin();
    const auto make_p = [&] {
      add_s(s_rmem);
      scale_and_mask(s_rmem, token_begin);
      softmax(s_rmem, p_rmem, a);
    };
    // P is sent while P V is under way, from a copy: that product owns its registers.
    const auto pv_and_send = [&] {
      { if (::mla::mutant == 321) {  } else { rescale(a); } }
      uint32_t copy[4][4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        for (int i = 0; i < 4; ++i) copy[t][i] = p_rmem[t][i];
      }
      issue_pv(p_rmem, tile);
      send_p(copy);
    };
    wait_tile(tile, token_begin);
    issue_qk(s_rmem, tile);
    { if (::mla::mutant == 327) { ptx::wgmma_wait_group<1>(s_rmem, q_rmem); } else { ptx::wgmma_wait_group<0>(s_rmem, q_rmem); } }
    for (; token_begin + kTokens < end; token_begin += kTokens) {
      make_p();
      pv_and_send();
      wait_tile(tile + 1, token_begin + kTokens);
      issue_qk(s_rmem, tile + 1);
      { if (::mla::mutant == 333) { release(tile); ptx::wgmma_wait_group<1>(o_rmem, p_rmem); } else { { if (::mla::mutant == 331) { ptx::wgmma_wait_group<2>(o_rmem, p_rmem); } else { ptx::wgmma_wait_group<1>(o_rmem, p_rmem); } }
      release(tile); } }
      ++tile;
      { if (::mla::mutant == 328) {  } else { ptx::wgmma_wait_group<0>(s_rmem, q_rmem); } }
    }
    make_p();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
      { if (::mla::mutant == 326) {  } else { l[i] += __shfl_xor_sync(0xffffffff, l[i], 2); } }
    }
    pv_and_send();
    ptx::wgmma_wait_group<0>(o_rmem, p_rmem);
    release(tile);
    ++tile;
  };
  // The sender.
  const auto send = [&](int end) {
    float s_rmem[kTokens / 8][4];
    uint32_t p_rmem[4][4];
    float a[2];
    int token_begin = at.token_begin();
    for (int i = 0; i < 2 && token_begin + i * kTokens < end; ++i) {
      wait_tile(tile + i, token_begin + i * kTokens);
      issue_qk(s_rmem, tile + i);
      { if (::mla::mutant == 329) { ptx::wgmma_wait_group<1>(s_rmem, q_rmem); } else { ptx::wgmma_wait_group<0>(s_rmem, q_rmem); } }
      send_s(s_rmem, tile + i);
    }
    for (; token_begin + 2 * kTokens < end; token_begin += kTokens) {
      take_p(p_rmem, a);
      { if (::mla::mutant == 322) {  } else { rescale(a); } }
      issue_pv(p_rmem, tile);
      wait_tile(tile + 2, token_begin + 2 * kTokens);
      issue_qk(s_rmem, tile + 2);
      { if (::mla::mutant == 332) { ptx::wgmma_wait_group<2>(o_rmem, p_rmem); } else { ptx::wgmma_wait_group<1>(o_rmem, p_rmem); } }
      release(tile);
      { if (::mla::mutant == 330) {  } else { ptx::wgmma_wait_group<0>(s_rmem, q_rmem); } }
      send_s(s_rmem, tile + 2);
      ++tile;
    }
    for (; token_begin < end; token_begin += kTokens) {
      take_p(p_rmem, a);
      { if (::mla::mutant == 323) {  } else { rescale(a); } }
      issue_pv(p_rmem, tile);
      ptx::wgmma_wait_group<0>(o_rmem, p_rmem);
      release(tile);
      ++tile;
    }
  };

  // lse = ln 2 (m + log2 l); and, of the thread's two rows, 1 / l and the place in out or out_partial, -1
  // for none. A row that saw nothing: out = 0, lse = +inf, or -inf in a part.
  const auto write_lse = [&](float(&inverse_l)[2], int64_t(&place)[2], int& slot) {
    timeline::enter(track, Phase::kWriteOut);
    { if (::mla::mutant == 284) {  } else { sync_warpgroup(); } }  // Q has been read
    slot = smem.slot[warpgroup];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = own_row + 8 * i;
      const bool saw_something = rows.visible(at.seqlen_k, r) > at.token_begin();
      inverse_l[i] = saw_something ? 1 / l[i] : 0;
      const float lse = kLn2 * (m[i] + log2f(l[i]));
      const bool writes_lse = (::mla::mutant == 335 ? (true) : (is_maker)) && lane % 4 == 0;
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
      const int64_t first = place[i] + (::mla::mutant == 336 ? (0) : (rank() * kColumns)) + four_columns();
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
  { if (::mla::mutant == 262) {  } else { ptx::barrier_cluster_wait(); } }  // the other block's barriers are there
  while (at.more()) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      for (int j = 0; j < 4; ++j) o_rmem[n][j] = 0;
    }
    m[0] = m[1] = -FLT_MAX;  // finite: 2^(m - m) is 1 for a row that sees nothing yet
    l[0] = l[1] = 0;

    // Now: at the end all would wait for it.
    const int next_slot = threadIdx.x % 128 == 0 ? at.slot() : 0;
    all_visible = min(at.token_end(), rows.visible(at.seqlen_k, 0));
    const int end = visible_end();
    if (at.token_begin() < end) load_q_rotary();
    { if (::mla::mutant == 280) {  } else { ptx::cp_async_wait_group<0>(); } }
    { if (::mla::mutant == 281) {  } else { ptx::fence_proxy_async(); } }
    { if (::mla::mutant == 283) {  } else { sync_warpgroup(); } }  // Q is there, for wgmma; the old slot is read
    if (threadIdx.x % 128 == 0) smem.slot[(::mla::mutant == 285 ? (0) : (warpgroup))] = next_slot;

    if (at.token_begin() < end) {
      if (is_maker) {
        make(end);
      } else {
        send(end);
      }
    }

    float inverse_l[2];
    int64_t place[2];
    int slot;
    write_lse(inverse_l, place, slot);
    at.next();
    copy_q();  // the next piece's Q comes while O is written
    // Not earlier: blocks of the combine that came while few multiprocessors are free would crowd there.
    if (!at.more()) ptx::griddepcontrol_launch_dependents();
    write_out(inverse_l, place, slot);
  }
  timeline::end(track);
}

}  // namespace mla::MLA_MACHINE::cluster
