// 10_few_heads: the operands change places. A product of the tensor cores has 64 rows, and few heads
// do not fill them; its columns come in eights. So tokens become the rows, and query rows the columns:
//
//   S^T [64 tokens, rows]  = K [64, 576] Q^T
//   O^T [512, rows]       += V^T [512, 64] P^T
//
// One warpgroup multiplies; one warp copies a tile by three instructions, each of all its tokens, so
// that device memory is read in order. There are two buffers: the products take so much less time than
// the copies that more would stay full.
//
// A worker of the plan is one block, or a team of blocks: a cluster. They share the tiles of each piece,
// and each ends up with a result of its own. So at the end of a piece every block sends each of the team
// its share of the columns of O: a block gets the same columns of all, adds them up, and writes them out.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::few_heads {

constexpr int kConsumers = 128;            // one warpgroup
constexpr int kThreads = kConsumers + 32;  // and the producer
constexpr int kWarps = kConsumers / 32;
constexpr int kTokens = 64;              // of a tile
constexpr int kBuffers = 2;              // tiles in shared memory
constexpr int kBoxes = kHeadDimQK / 64;  // boxes of 64 columns in a tile of K
constexpr int kVBoxes = kHeadDimV / 64;  // those of V
constexpr int kCopies = 3;               // of a tile, each of
constexpr int kCopyBoxes = kBoxes / kCopies;
constexpr int kAtomBytes = 8 * 128;
constexpr int kGroupBytes = kCopyBoxes * kAtomBytes;  // of 8 tokens, in a copy
constexpr int kCopyBytes = kTokens / 8 * kGroupBytes;
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// 64 columns of 8 tokens or query rows, in rows of 128 bytes. Chunk c of row r, 16 bytes, lies where
// chunk c ^ r would: wgmma's 128-byte swizzle.
using Atom = uint4[8][8];

// kRows: query rows of a tile, a multiple of 8.
template <int kRows>
struct Smem {
  Atom kv[kBuffers][kCopies][kTokens / 8][kCopyBoxes];
  Atom q[kBoxes][kRows / 8];
  Atom p[kRows / 8];             // P^T: query rows by tokens
  float row_max[kWarps][kRows];  // of a warp's tokens
  float row_sum[kWarps][kRows];  // the same
  int64_t place[kRows];          // see write_lse()
  float inverse_l[kRows];
  int slot;  // of the piece
  ptx::Mbarrier full[kBuffers]
                    [kCopies];    // 1 arrival, the producer's, and a copy's bytes: it is there
  ptx::Mbarrier empty[kBuffers];  // 4 arrivals, the consumers' warps: the tile has been read
  MLA_REGIONS(kv, q, p, row_max, row_sum, place, inverse_l, slot, full, empty)
};

// What the blocks of a team send each other. So many times 8 query rows at a time:
template <int kRows>
constexpr int kRoundTiles = kRows <= 24 ? kRows / 8 : 2;  // as there is room for

struct MaxAndSum {
  float m, l;
};

template <int kRows, int kTeam>
struct TeamSmem : Smem<kRows> {
  // By sender. A thread's four values of O lie where the thread of that number reads them.
  float4 o[kTeam][kVBoxes / kTeam][kRoundTiles<kRows>][kConsumers];
  MaxAndSum row[kTeam][kRoundTiles<kRows> * 8];
  float weight[kTeam][kRoundTiles<kRows> * 8];  // of a sender's row
  ptx::Mbarrier sent;  // 1 arrival, the block's own, and the bytes of all senders: they are there
  ptx::Mbarrier read;  // 4 arrivals from each block: what this one sent there has been read
};

// Of a block in a team of so many.
template <int kRows, int kTeam>
struct Layout {
  using type = TeamSmem<kRows, kTeam>;
};
template <int kRows>
struct Layout<kRows, 1> {
  using type = Smem<kRows>;
};
template <int kRows, int kTeam>
using BlockSmem = typename Layout<kRows, kTeam>::type;

enum Barrier { kAllConsumers = 1 };  // 128 sync

// How the tensor map of the cache cuts it.
struct TileMap {
  // Column % 64, token % 8, 64 columns of a head, tokens / 8 of the page, page: boxes of kCopyBoxes times
  // 64 columns of a tile's tokens. A head begins so many times 64 columns after the one before it. 0: that
  // is no multiple of 64. The map is then that of encode_cache_map(), with boxes of 8 tokens.
  int head_boxes;
};

// One item: a worker, for one tile of rows of a KV head. kTeam: blocks of a worker.
template <typename T, int kRows, int kTeam>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map, TileMap tile_map, Problem problem,
           Tensors tensors, SplitWorkspace split, SplitItems items) {
  static_assert(kVBoxes % kTeam == 0, "each block of a team adds up as many boxes of columns");
  auto& smem = shared_memory<BlockSmem<kRows, kTeam>>();
  static_assert(sizeof(smem) <= 232448, "227 KB");
  constexpr int kTiles = kRows / 8;  // of 8 query rows
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = kTeam > 1 ? static_cast<int>(ptx::cluster_ctarank()) : 0;
  const RowTile rows(problem, tensors, items, kRows, kTeam);
  // The producer's lane has a page of each tile, from this row of the tile on. Which is the first, the
  // plan must say, and then the table; mostly it can be guessed, and read while the plan is.
  const int page_rows = min(kTokens, problem.page_size), page_row = lane * page_rows;
  const int guess = static_cast<int>(rows.worker * items.sequences);
  const int guessed_token = rank * kTokens + page_row;
  int guessed_page = -1;
  if (warp == kWarps && page_row < kTokens && guess < problem.batch &&
      guessed_token < problem.max_seqlen_k()) {
    guessed_page = tensors.table_row(guess)[problem.page_of(guessed_token)];
  }
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };
  // The team's blocks take turns, so that together they read pages in order.
  const int turn = kTeam * kTokens;
  const auto first_token = [&] { return at.token_begin() + rank * kTokens; };

  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensormap(&cache_map);
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      for (int i = 0; i < kCopies; ++i) ptx::mbarrier_init(&smem.full[buffer][i], 1);
      ptx::mbarrier_init(&smem.empty[buffer], kWarps);
    }
    if constexpr (kTeam > 1) {
      ptx::mbarrier_init(&smem.sent, 1);
      ptx::mbarrier_init(&smem.read, kTeam * kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there
  if constexpr (kTeam > 1) {
    __syncwarp();
    ptx::barrier_cluster_arrive();
  }

  if (warp == kWarps) {  // the producer: a lane for each page of a tile
    const uint64_t policy = ptx::createpolicy_evict_first();
    int buffer = 0, parity = 1;  // new barriers let the first copies pass
    for (; page_row < kTokens && at.more(); at.next()) {
      const int end = visible_end();
      const int32_t* table = tensors.table_row(at.sequence);
      const auto page_at = [&](int token) {  // past the sequence's end page -1, which makes zeros
        return token < at.seqlen_k ? table[problem.page_of(token)] : -1;
      };
      // Past the sequence's end the guess may be any page: what it brings there reaches nothing.
      int next_page = at.sequence == guess && at.token_begin() == 0
                          ? guessed_page
                          : page_at(first_token() + page_row);
      for (int token_begin = first_token(); token_begin < end; token_begin += turn) {
        const int page = next_page;
        next_page = page_at(token_begin + turn + page_row);
        const int row_in_page = problem.row_in_page(token_begin + page_row);
        ptx::mbarrier_wait(&smem.empty[buffer], parity);
        for (int i = 0; i < kCopies; ++i) {
          ptx::Mbarrier* full = &smem.full[buffer][i];
          if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, kCopyBytes);
          if (tile_map.head_boxes > 0) {
            const int box = rows.head_kv * tile_map.head_boxes + i * kCopyBoxes;
            ptx::cp_async_bulk_tensor_5d(smem.kv[buffer][i][page_row / 8], &cache_map, 0, 0, box,
                                         row_in_page / 8, page, full, policy);
            continue;
          }
          for (int r = 0; r < page_rows; r += 8) {
            for (int box = 0; box < kCopyBoxes; ++box) {
              ptx::cp_async_bulk_tensor_4d(smem.kv[buffer][i][(page_row + r) / 8][box], &cache_map,
                                           (i * kCopyBoxes + box) * 64, rows.head_kv,
                                           row_in_page + r, page, full, policy);
            }
          }
        }
        buffer ^= 1;
        if (buffer == 0) parity ^= 1;
      }
    }
    if constexpr (kTeam > 1) {
      __syncwarp();
      ptx::barrier_cluster_wait();  // who has arrived must wait
    }
    return;
  }

  // Of S^T, this thread has tokens own_token and own_token + 8, of O^T columns 64 box + own_token and
  // + 8; in both, query rows 8 n + own_row + {0, 1}.
  const int own_token = warp * 16 + lane / 4, own_row = lane % 4 * 2;
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, kAtomBytes);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(smem.p, 0, kAtomBytes);
  const ptx::MatrixDescriptor kv = ptx::matrix_descriptor(smem.kv, 0, kGroupBytes);
  int buffer = 0, parity = 0;
  const auto box_at = [&](int box) {  // of the buffer's tile
    const int copy = buffer * kCopies + box / kCopyBoxes;
    return kv + (copy * kCopyBytes + box % kCopyBoxes * kAtomBytes) / 16;
  };
  const auto sync_consumers = [&] { ptx::barrier_sync(kAllConsumers, kConsumers); };

  // Of the piece:
  float o_rmem[kVBoxes][kTiles][4];  // O^T
  float m[kTiles][2];
  float l[kTiles][2];  // of this thread's tokens

  // Starts copying Q, if the piece has tokens; rows past the last become 0. 8 threads per row.
  const auto copy_q = [&] {
    if (at.more() && first_token() < visible_end()) {
      const int chunk = threadIdx.x % 8;
#pragma unroll 1
      for (int r = threadIdx.x / 8; r < kRows; r += kConsumers / 8) {
        const bool exists = rows.exists(r);
        const uint4* source = static_cast<const uint4*>(tensors.q);
        if (exists) source += rows.q_place(at.sequence, r) / 8 + chunk;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          ptx::cp_async_16(&smem.q[box][r / 8][r % 8][chunk ^ r % 8],
                           exists ? source + box * 8 : source, exists ? 16 : 0);
        }
      }
    }
    ptx::cp_async_commit_group();
  };

  int slot, sequence, seqlen_k, piece_begin;
  // lse = ln 2 (m + log2 l), +inf for a row that saw nothing, or -inf in a part. Returns where the row's
  // out begins, or its part; -1: it does not exist.
  const auto write_lse = [&](int r, float row_m, float row_l, bool saw_something, bool writes) {
    if (!rows.exists(r)) return int64_t{-1};
    const float lse = kLn2 * (row_m + log2f(row_l));
    if (slot >= 0) {
      const int64_t at_slot = rows.slot_place(slot, r);
      if (writes) split.lse_partial[at_slot] = saw_something ? lse : -INFINITY;
      return at_slot * kHeadDimV;
    }
    if (writes) tensors.lse[rows.lse_place(sequence, r)] = saw_something ? lse : INFINITY;
    return rows.out_place(sequence, r);
  };
  // Writes the columns of this thread in `kCount` boxes from `first` on, of two query rows: o(box, j), as
  // they lie in o_rmem.
  const auto write_out = [&]<int kCount>(const int64_t(&place)[2], int first,
                                         std::integral_constant<int, kCount>, const auto& o) {
    if (slot >= 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place[i] < 0) continue;
#pragma unroll
        for (int box = 0; box < kCount; ++box) {
          float* to = split.out_partial + place[i] + (first + box) * 64 + own_token;
          to[0] = o(box, i);
          to[8] = o(box, 2 + i);
        }
      }
      return;
    }
    // Neighbouring columns are in lanes 4 apart: the first takes both of the first row, the second
    // those of the second.
    const bool odd = lane / 4 % 2 == 1;
    const int64_t own_place = odd ? place[1] : place[0];
    T* out_gmem = static_cast<T*>(tensors.out) + own_place + first * 64 + own_token - int{odd};
#pragma unroll
    for (int box = 0; box < kCount; ++box) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first_row = o(box, 2 * half), second_row = o(box, 2 * half + 1);
        const float other = __shfl_xor_sync(0xffffffff, odd ? first_row : second_row, 4);
        if (own_place < 0) continue;
        *reinterpret_cast<uint32_t*>(out_gmem + box * 64 + half * 8) =
            odd ? pack<T>(other, second_row) : pack<T>(first_row, other);
      }
    }
  };

  copy_q();
  int exchange_parity = 0;
  bool met = false;  // the team's barriers are there
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

    if (threadIdx.x == 0) smem.slot = at.slot();  // now: at the end all would wait for it
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();
    sync_consumers();  // Q is there, for wgmma

    for (int token_begin = first_token(); token_begin < end; token_begin += turn) {
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
                                 q + (box * kTiles * kAtomBytes + step * 32) / 16, box + step > 0);
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
            const int r = n * 8 + own_row + j % 2;
            if (token >= min(at.token_end(), rows.visible(at.seqlen_k, r))) {
              s_rmem[n][j] = -INFINITY;
            }
          }
        }
        // V = 0 past the sequence's end, after S has been made of it: the cache may hold anything there,
        // and 0 * NaN would be NaN.
        const int tokens = at.seqlen_k - token_begin;
        if (tokens < kTokens) {
          sync_consumers();  // all of S is there
          for (int i = tokens * 8 + threadIdx.x; i < kTokens * 8; i += kConsumers) {
            for (int box = 0; box < kVBoxes; ++box) {
              smem.kv[buffer][box / kCopyBoxes][i / 64][box % kCopyBoxes][i / 8 % 8][i % 8] =
                  make_uint4(0, 0, 0, 0);
            }
          }
        }
      }
      // m stays as long as no P exceeds the bound; if one does, m' = max(m, rowmax S + kHeadroom -
      // kLargestP), a = 2^(m - m'), l = a l and O = a O.
      bool exceeds = token_begin == first_token();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) exceeds |= s_rmem[n][j] > m[n][j % 2] + kLargestP<T>;
      }
      if (ptx::barrier_sync_or(kAllConsumers, kConsumers, exceeds)) {
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
            if (lane < 4) smem.row_max[warp][n * 8 + own_row + i] = largest[n][i];
          }
        }
        sync_consumers();  // all maxima are there
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            for (int w = 0; w < kWarps; ++w) {
              largest[n][i] = fmaxf(largest[n][i], smem.row_max[w][n * 8 + own_row + i]);
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
        const int chunk = warp * 2 + lane / 8 % 2;
        ptx::stmatrix_x2_trans(&smem.p[n][lane % 8][chunk ^ lane % 8], p_rmem);
      }
      ptx::fence_proxy_async();
      sync_consumers();  // P is there, for wgmma

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
        if (lane < 4) smem.row_sum[warp][n * 8 + own_row + i] = l[n][i];
        if (threadIdx.x < 4) smem.row_max[0][n * 8 + own_row + i] = m[n][i];
      }
    }
    sync_consumers();  // the sums are there; Q and P have been read
    slot = smem.slot;
    sequence = at.sequence;
    seqlen_k = at.seqlen_k;
    piece_begin = at.token_begin();
    at.next();
    copy_q();  // the next piece's Q comes while O is written
    // Not earlier: blocks of the combine that came while few multiprocessors are free would crowd there.
    if (!at.more()) ptx::griddepcontrol_launch_dependents();

    const auto sum_of = [&](int r) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += smem.row_sum[w][r];
      return sum;
    };
    if constexpr (kTeam == 1) {
      // One thread per row makes what all need of it. Made by every thread for its own rows, unrolled, it is
      // so much code that a decode of few tiles mostly waits for instructions.
      if (threadIdx.x < kRows) {
        const int r = threadIdx.x;
        const float sum = sum_of(r);
        const bool saw_something = rows.visible(seqlen_k, r) > piece_begin;
        smem.inverse_l[r] = saw_something ? 1 / sum : 0;
        smem.place[r] = write_lse(r, smem.row_max[0][r], sum, saw_something, true);
      }
      sync_consumers();  // factors and places are there
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float inverse_l[2];
        int64_t place[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          inverse_l[i] = smem.inverse_l[n * 8 + own_row + i];
          place[i] = smem.place[n * 8 + own_row + i];
        }
        write_out(place, 0, std::integral_constant<int, kVBoxes>(),
                  [&](int box, int j) { return o_rmem[box][n][j] * inverse_l[j % 2]; });
      }
    } else {
      constexpr int kRound = kRoundTiles<kRows>, kShare = kVBoxes / kTeam;
#pragma unroll
      for (int round = 0; round < kTiles; round += kRound) {
        if (threadIdx.x == 0) {
          ptx::mbarrier_arrive_expect_tx(&smem.sent, sizeof(smem.o) + sizeof(smem.row));
        }
        if (!met) ptx::barrier_cluster_wait();
        met = true;
        ptx::mbarrier_wait_cluster(&smem.read, exchange_parity ^ 1);
#pragma unroll
        for (int box = 0; box < kVBoxes; ++box) {
          const int to = box / kShare;
          float4* place = ptx::mapa(&smem.o[rank][box % kShare][0][threadIdx.x], to);
          ptx::Mbarrier* sent = ptx::mapa(&smem.sent, to);
#pragma unroll
          for (int n = 0; n < kRound; ++n) {
            const float(&o)[4] = o_rmem[box][round + n];
            ptx::st_async(place + n * kConsumers, make_float4(o[0], o[1], o[2], o[3]), sent);
          }
        }
        for (int i = threadIdx.x; i < kTeam * kRound * 8; i += kConsumers) {
          const int to = i / (kRound * 8), r = i % (kRound * 8);
          ptx::st_async(ptx::mapa(&smem.row[rank][r], to),
                        MaxAndSum{smem.row_max[0][round * 8 + r], sum_of(round * 8 + r)},
                        ptx::mapa(&smem.sent, to));
        }
        ptx::mbarrier_wait_cluster(&smem.sent, exchange_parity);
        exchange_parity ^= 1;
        // m = max m_i, l = sum 2^(m_i - m) l_i, w_i = 2^(m_i - m) / l: a thread for each i and row.
        for (int i = threadIdx.x; i < kTeam * kRound * 8; i += kConsumers) {
          const int from = i / (kRound * 8), r = i % (kRound * 8);
          float team_m = -FLT_MAX, team_l = 0;
#pragma unroll
          for (int j = 0; j < kTeam; ++j) team_m = fmaxf(team_m, smem.row[j][r].m);
#pragma unroll
          for (int j = 0; j < kTeam; ++j) {
            team_l += ptx::ex2_approx(smem.row[j][r].m - team_m) * smem.row[j][r].l;
          }
          const bool saw_something = rows.visible(seqlen_k, round * 8 + r) > piece_begin;
          smem.weight[from][r] =
              saw_something ? ptx::ex2_approx(smem.row[from][r].m - team_m) / team_l : 0;
          if (from == 0) {
            smem.place[r] = write_lse(round * 8 + r, team_m, team_l, saw_something, rank == 0);
          }
        }
        sync_consumers();  // the weights are there
        // O = sum w_i O_i, in the order of ranks.
        float team_o[kRound][kShare][4] = {};
        int64_t place[kRound][2];
#pragma unroll
        for (int n = 0; n < kRound; ++n) {
          for (int i = 0; i < 2; ++i) place[n][i] = smem.place[n * 8 + own_row + i];
#pragma unroll
          for (int from = 0; from < kTeam; ++from) {
            const float w[2] = {smem.weight[from][n * 8 + own_row],
                                smem.weight[from][n * 8 + own_row + 1]};
#pragma unroll
            for (int box = 0; box < kShare; ++box) {
              const float4 o = smem.o[from][box][n][threadIdx.x];
              team_o[n][box][0] += w[0] * o.x;
              team_o[n][box][1] += w[1] * o.y;
              team_o[n][box][2] += w[0] * o.z;
              team_o[n][box][3] += w[1] * o.w;
            }
          }
        }
        __syncwarp();  // its lanes have read
        if ((at.more() || round + kRound < kTiles) && lane < kTeam) {
          ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.read, lane));
        }
#pragma unroll
        for (int n = 0; n < kRound; ++n) {
          write_out(place[n], rank * kShare, std::integral_constant<int, kShare>(),
                    [&](int box, int j) { return team_o[n][box][j]; });
        }
      }
    }
  }
  if constexpr (kTeam > 1) {
    if (!met) ptx::barrier_cluster_wait();  // who has arrived must wait
  }
}

}  // namespace mla::MLA_MACHINE::few_heads
