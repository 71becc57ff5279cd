// 12_fp8: half the bytes. The cache has 8-bit codes and fp32 scales (docs/cache_formats.md), and nothing of it
// is ever written down in 16 bits: codes become 16 bits wide, exactly, on their way to the registers of a
// product.
//
//   S^T [64 tokens, rows]  = sum over groups of 128 columns: scale[token, group] (K codes) Q^T
//   O^T [128 of 512, rows] += (V codes)^T (P scale[token, group])^T
//
// As in 10, tokens or columns of V are the rows of a product, and query rows its columns. But here its left
// operand comes from registers. Scales are applied where they are few: to sums, in fp32, and to P.
//
// Two warpgroups have every other tile each, with O, m and l of their own, and so never wait for each other but
// at a piece's ends, where their results are added. While one makes a softmax or converts, the other multiplies.
// One more warp copies tiles.
#pragma once

#include <cfloat>

#include "stages/common/machine/device.h"
#include "stages/common/machine/softmax.h"
#include "stages/common/machine/vector8.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/split/piece_cursor.h"
#include "stages/common/split/split_items.h"

namespace mla::MLA_MACHINE::fp8 {

constexpr int kWarpgroups = 2;
constexpr int kWarps = 4;  // of a warpgroup
constexpr int kConsumers = kWarpgroups * 128;
constexpr int kThreads = kConsumers + 128;  // and the producer's warpgroup
// Registers of a thread, redistributed among the warpgroups: 168 each would not hold 32 rows of O.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kTokens = 64;              // of a tile
constexpr int kBoxes = kHeadDimQK / 64;  // boxes of 64 columns of Q
constexpr int kVBoxes = kHeadDimV / 64;  // those of V
constexpr int kGroups = kHeadDimV / kTileColumns;
constexpr int kAtomBytes = 8 * 128;
static_assert(kTokens == kGrainTokens, "a tile is a grain");

// From one row of a tile to the next in shared memory: an odd number of 16-byte chunks, so that a column
// of chunks, one of each of eight rows, lies in all banks. The copy fills what is more than the row.
template <CacheFormat kFormat>
constexpr int kRowBytes = has_tile_scales(kFormat) ? kTileRowBytes : kHeadDimQK + 16;
// Versions of P in shared memory: one for each scale of a token.
template <CacheFormat kFormat>
constexpr int kVersions = has_tile_scales(kFormat) ? kGroups : 1;

// 64 columns of 8 query rows, or of P^T 64 tokens, in rows of 128 bytes. Chunk c of row r, 16 bytes, lies
// where chunk c ^ r would: wgmma's 128-byte swizzle.
using Atom = uint4[8][8];

// kRows: query rows of a tile, a multiple of 8.
template <CacheFormat kFormat, int kRows>
struct Smem {
  static constexpr int kBuffers = kRows <= 16 ? 4 : 3;
  uint4 kv[kBuffers][kTokens][kRowBytes<kFormat> / 16];
  Atom q[kBoxes][kRows / 8];  // see column_place()
  Atom p[kWarpgroups][kVersions<kFormat>][kRows / 8];
  // A warpgroup's sums for the other one, of 8 query rows: half of its boxes.
  float4 o[kWarpgroups][kVBoxes / 2][128];
  float q_factor[kRows];  // what a row of Q was divided by, times the softmax's scale
  float row_max[kWarpgroups][kWarps][kRows];  // of a warp's tokens
  float row_sum[kWarpgroups][kWarps][kRows];  // the same
  int64_t place[kRows];                       // see write_lse()
  float weight[kWarpgroups][kRows];           // of a warpgroup's O in out
  float scale_max[kWarpgroups][kWarps];
  int slot;  // of the piece
  // 1 arrival, the producer's, and a tile's bytes: it is there. Not one for each buffer: a buffer may change
  // hands, and who does not wait for every phase of a barrier takes one for another.
  ptx::Mbarrier full[kWarpgroups][2];
  ptx::Mbarrier empty[kBuffers];  // 4 arrivals, a warpgroup's warps: the tile has been read
  static_assert(kBuffers <= 2 * kWarpgroups, "a barrier's tile has been read before its next");
  MLA_REGIONS(kv, q, p, o, q_factor, row_max, row_sum, place, weight, scale_max, slot, full, empty)
};

enum Barrier { kAllConsumers = 1, kOneWarpgroup = 2 };  // 256 sync; 128 sync, and the next one's

// Two codes of K as two fp16, exactly. NaN stays NaN, and by S and P gets into all columns of O.
template <CacheFormat kFormat>
__device__ __forceinline__ uint32_t k_values(uint32_t codes) {
  if constexpr (kFormat == CacheFormat::kInt8Tile128) {
    // 0x6400 + u is 1024 + u in fp16, and u is the code plus 128.
    return ptx::fma_rn_x2<float16>(__byte_perm(codes ^ 0x8080, 0x64646464, 0x4140), 0x3C003C00,
                                   0xE480E480);
  } else {
    return ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(codes));
  }
}

// V's codes of two tokens, in bytes kByte and kByte + 2, as two values of T: exactly, but for NaN, times
// 2^-kCodeExponent. In bf16 an e4m3 code is its own bits, moved: that is a power of two and no conversion.
template <typename T, CacheFormat kFormat>
constexpr int kCodeExponent =
    std::is_same_v<T, bfloat16>&& kFormat != CacheFormat::kInt8Tile128 ? 120 : 0;
template <typename T, CacheFormat kFormat, int kByte>
__device__ __forceinline__ uint32_t v_values(uint32_t codes) {
  if constexpr (kFormat == CacheFormat::kInt8Tile128) {
    // The low seven bits are 0 to 127, and the sign is -128: (128 + low) + (-128 or -256).
    const uint32_t code = __byte_perm(codes, 0, kByte == 0 ? 0x4240 : 0x4341);
    return ptx::fma_rn_x2<bfloat16>((code & 0x007F007F) | 0x43004300, 0x3F803F80,
                                    (code & 0x00800080) | 0xC300C300);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    // seeeemmm, its sign repeated to its left, becomes s0000eeeemmm0000.
    return ptx::prmt(codes, kByte == 0 ? 0xA280 : 0xB391) << 4 & 0x87F087F0;
  } else {
    const uint32_t two = __byte_perm(codes, 0, kByte == 0 ? 0x4420 : 0x4431);
    return ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(two));
  }
}

// The least power of two that is not below a magnitude, up to 2^126.
__device__ __forceinline__ float power_of_two_above(float magnitude) {
  return __uint_as_float(min((__float_as_uint(magnitude) + 0x7FFFFF) & 0x7F800000, 0x7E800000u));
}

// Where Q's pair of columns 2i, 2i + 1 lies: box, 16-byte chunk, and word of it. A thread that loads 16
// bytes of a row of K at once has 4 codes for each of 4 steps of 16 columns, where the fragment of a step
// wants columns 2j, 2j + 1, 2j + 8 and 2j + 9 of it from lane j % 4. So Q's columns are renamed.
struct ColumnPlace {
  int box, chunk, word;
};
__device__ __forceinline__ ColumnPlace column_place(int pair) {
  const int column = pair * 2;
  // Columns of a lane: 32 of each group of 128, then 16 of the 64 rotary ones.
  const bool rotary = column >= kHeadDimV;
  const int lane_columns = rotary ? 16 : 32;
  const int in_group = column % kTileColumns;
  const int step = in_group % lane_columns / 4;
  return {column / kTileColumns * 2 + step / 4, step % 4 * 2 + column / 2 % 2,
          in_group / lane_columns};
}

// One item: a worker, for one tile of rows of a KV head.
template <typename T, CacheFormat kFormat, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ TensorMap cache_map, Problem problem, Tensors tensors,
           SplitWorkspace split, SplitItems items) {
  constexpr bool kTileScales = has_tile_scales(kFormat);
  constexpr int kTiles = kRows / 8;  // of 8 query rows
  // Steps of 16 that are made ready while those before are multiplied: as many as there are registers for.
  constexpr int kSteps = kRows <= 16 ? 4 : 2;
  constexpr int kParts = kRows <= 16 ? 2 : 1;  // sums of S under way
  constexpr int kBatches = 4 / kSteps;         // of a box
  constexpr int kBytes = kRowBytes<kFormat>;
  using Block = Smem<kFormat, kRows>;
  constexpr int kBuffers = Block::kBuffers;
  auto& smem = shared_memory<Block>();
  static_assert(sizeof(smem) <= 232448, "227 KB");
  // By a shuffle, so that the compiler knows it to be one for the whole warp.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const RowTile rows(problem, tensors, items, kRows);
  PieceCursor at(problem, tensors, split, rows.worker);
  const auto visible_end = [&] {  // of the piece's tokens, for any row of the tile
    return min(at.token_end(), rows.visible_to_any(at.seqlen_k, kRows));
  };

  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensormap(&cache_map);
    for (int i = 0; i < 4; ++i) ptx::mbarrier_init(&smem.full[i / 2][i % 2], 1);
    for (int i = 0; i < kBuffers; ++i) ptx::mbarrier_init(&smem.empty[i], kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are there

  if (warp >= kWarpgroups * kWarps) {  // the producer: one warp, a lane for each page of a tile
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp > kWarpgroups * kWarps) return;
    const uint64_t policy = ptx::createpolicy_evict_first();
    const int page_rows = min(kTokens, problem.page_size), page_row = lane * page_rows;
    unsigned tile = 0;           // of all, in order: the warpgroups' by turns
    int buffer = 0, parity = 1;  // new barriers let the first copies pass
    for (; page_row < kTokens && at.more(); at.next()) {
      const int end = visible_end();
      const int32_t* table = tensors.table_row(at.sequence);
      const auto page_at = [&](int token) {  // past the sequence's end page -1, which makes zeros
        return token < at.seqlen_k ? table[problem.page_of(token)] : -1;
      };
      int next_page = page_at(at.token_begin() + page_row);
      for (int token_begin = at.token_begin(); token_begin < end; token_begin += kTokens) {
        const int page = next_page;
        next_page = page_at(token_begin + kTokens + page_row);
        ptx::mbarrier_wait(&smem.empty[buffer], parity);
        ptx::Mbarrier* full = &smem.full[tile % 2][tile / 2 % 2];
        if (lane == 0) ptx::mbarrier_arrive_expect_tx(full, sizeof(smem.kv[buffer]));
        ptx::cp_async_bulk_tensor_4d(smem.kv[buffer][page_row], &cache_map, 0, rows.head_kv,
                                     problem.row_in_page(token_begin + page_row), page, full,
                                     policy);
        ++tile;
        if (++buffer == kBuffers) {
          buffer = 0;
          parity ^= 1;
        }
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int warpgroup = warp / kWarps, own_warp = warp % kWarps;
  // Of S^T, this thread has tokens own_token and own_token + 8; of O^T, columns 64 box + own_column and the
  // next; of both, query rows 8 n + own_row + {0, 1}.
  const int own_token = own_warp * 16 + lane / 4, own_row = lane % 4 * 2;
  const int own_column = own_warp * 16 + lane / 4 * 2;
  auto& p_smem = smem.p[warpgroup];
  const ptx::MatrixDescriptor q = ptx::matrix_descriptor(smem.q, 0, kAtomBytes);
  const ptx::MatrixDescriptor p = ptx::matrix_descriptor(p_smem, 0, kAtomBytes);
  const auto sync_consumers = [&] { ptx::barrier_sync(kAllConsumers, kConsumers); };
  const auto sync_warpgroup = [&] { ptx::barrier_sync(kOneWarpgroup + warpgroup, 128); };

  // Of the piece, and of this warpgroup's tiles:
  float o_rmem[kVBoxes][kTiles][4];  // O^T / bound
  float m[kTiles][2];
  float l[kTiles][2];  // of this thread's tokens
  // A power of two, and no |scale| so far is larger; nearly always 1. And what P is multiplied by beside a
  // scale, so that products with codes of V come out right, and fp32 holds what becomes of large scales.
  constexpr float kCodeFactor = kCodeExponent<T, kFormat> == 120 ? 0x1p120F : 1;
  float bound, p_factor;

  // Q to shared memory as fp16, a warp for each row; rows past the last become 0. bf16 has more exponents
  // than fp16: a row is divided by a power of two that brings its largest element to 2^7 and more. All
  // elements down to 2^-24 of that are exact.
  const auto load_q = [&] {
    constexpr int kPairs = kHeadDimQK / 2 / 32;                                   // of a lane
    constexpr int kStep = kWarpgroups * kWarps, kAtOnce = kRows > kStep ? 2 : 1;  // rows of a warp
#pragma unroll 1
    for (int begin = warp; begin < kRows; begin += kAtOnce * kStep) {
      uint32_t pairs[kAtOnce][kPairs];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = begin + i * kStep;
        const bool exists = rows.exists(r);
        const auto* source = reinterpret_cast<const uint32_t*>(
            static_cast<const T*>(tensors.q) + (exists ? rows.q_place(at.sequence, r) : 0));
#pragma unroll
        for (int j = 0; j < kPairs; ++j) pairs[i][j] = exists ? source[j * 32 + lane] : 0;
      }
#pragma unroll
      for (int row = 0; row < kAtOnce; ++row) {
        const int r = begin + row * kStep;
        const uint32_t(&pair)[kPairs] = pairs[row];
        float down = 1, up = 1;
        if constexpr (std::is_same_v<T, bfloat16>) {
          uint32_t largest = 0;  // of the magnitudes' bits; NaN and infinity are larger than all
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            largest = max(largest, max(pair[i] << 16 & 0x7FFFFFFF, pair[i] & 0x7FFF0000));
          }
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2) {
            largest = max(largest, __shfl_xor_sync(0xffffffff, largest, offset));
          }
          // Exponents of floats are biased by 127. Those of numbers below 2^-110 count as that.
          const uint32_t exponent = max(largest >> 23, 17u);
          down = __uint_as_float((127 + 127 + 7 - exponent) << 23);
          up = __uint_as_float((exponent - 7) << 23);
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          uint32_t value = pair[i];
          const int number = i * 32 + lane;
          if constexpr (std::is_same_v<T, bfloat16>) {
            const float low = __uint_as_float(value << 16) * down;
            const float high = __uint_as_float(value & 0xFFFF0000) * down;
            const bool as_bf16 = kTileScales && number * 2 >= kHeadDimV;
            value = as_bf16 ? pack<bfloat16>(low, high) : pack<float16>(low, high);
          }
          const ColumnPlace place = column_place(number);
          reinterpret_cast<uint32_t*>(
              &smem.q[place.box][r / 8][r % 8][place.chunk ^ r % 8])[place.word] = value;
        }
        if (lane == 0)
          smem.q_factor[r] = up * items.scale_log2 * (kTileScales ? 1 : problem.cache_scale);
      }
    }
  };

  // lse = ln 2 (m + log2 l), +inf for a row that saw nothing, or -inf in a part. Returns where the row's
  // out begins, or its part; -1: it does not exist.
  int slot, sequence, seqlen_k;
  const auto write_lse = [&](int r, float row_m, float row_l, bool saw_something) {
    if (!rows.exists(r)) return int64_t{-1};
    const float lse = kLn2 * (row_m + log2f(row_l));
    if (slot >= 0) {
      const int64_t at_slot = rows.slot_place(slot, r);
      split.lse_partial[at_slot] = saw_something ? lse : -INFINITY;
      return at_slot * kHeadDimV;
    }
    tensors.lse[rows.lse_place(sequence, r)] = saw_something ? lse : INFINITY;
    return rows.out_place(sequence, r);
  };

  unsigned tile_number = 0;  // of all, as the producer counts
  int buffer = 0;
  while (at.more()) {
    const int all_visible = min(at.token_end(), rows.visible(at.seqlen_k, 0));
    const int piece_begin = at.token_begin(), end = visible_end();

    // Now: at the end all would wait for it.
    const int next_slot = threadIdx.x == 0 ? at.slot() : 0;
    if (piece_begin < end) load_q();
    ptx::fence_proxy_async();
    sync_consumers();  // Q is there, for wgmma; the old slot and the other's sums are read
    if (threadIdx.x == 0) smem.slot = next_slot;

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
    bool first = true;
    bound = 1;
    p_factor = kCodeFactor;
#pragma unroll 1
    for (int token_begin = piece_begin; token_begin < end; token_begin += kTokens) {
      const int own_buffer = buffer;
      const unsigned number = tile_number++;
      if (++buffer == kBuffers) buffer = 0;
      if (static_cast<int>(number % 2) != warpgroup) continue;
      ptx::mbarrier_wait(&smem.full[warpgroup][number / 2 % 2], static_cast<int>(number / 4 % 2));
      auto* tile = reinterpret_cast<unsigned char*>(smem.kv[own_buffer]);
      unsigned char* own_rows[2] = {tile + own_token * kBytes, tile + (own_token + 8) * kBytes};

      // Rows = 0 past the sequence's end: they may hold NaN, and 0 * NaN is NaN. Each warp's own tokens.
      const int tokens = at.seqlen_k - token_begin;
      if (tokens < own_warp * 16 + 16) {
        for (int t = max(tokens, own_warp * 16); t < own_warp * 16 + 16; ++t) {
          for (int i = lane; i < kBytes / 16; i += 32) {
            reinterpret_cast<uint4*>(tile + t * kBytes)[i] = make_uint4(0, 0, 0, 0);
          }
        }
        ptx::fence_proxy_async();  // the next copy comes there
        __syncwarp();
      }
      // Of one of this thread's two tokens; read again and again, because registers are few.
      const auto scales = [&](int i) {
        return reinterpret_cast<const float4*>(own_rows[i] + kTileScalesByte);
      };
      const auto scale = [&](int group, int i) {
        return reinterpret_cast<const float*>(scales(i))[group];
      };

      // S^T = K Q^T  [64, kRows], 16 columns per step; a sum for each scale, and one for the rotary columns.
      // A product with registers holds its warp up until it has read them. So what comes next of shared memory is
      // asked for before.
      float s_rmem[kTiles][4] = {};
      float part[kParts][kTiles][4];
      uint32_t a[2][kSteps][4];  // of this batch of steps and the one before
      uint4 k_codes[2];          // of this thread's tokens: four steps, or two of bf16
      constexpr int kKBatches = kBoxes * kBatches;
      constexpr int kOfScale = kTileScales ? 2 * kBatches : kKBatches;  // batches of a sum
      const auto rotary = [&](int i, int step) {
        const auto* own = reinterpret_cast<const uint4*>(own_rows[i] + kTileRotaryByte);
        return own[lane % 4 * 2 + step / 2];
      };
      const auto load_k = [&](int batch) {
        const int box = batch / kBatches, first_step = batch % kBatches * kSteps;
        if (kTileScales && box == kVBoxes) {
          for (int i = 0; i < 2; ++i) k_codes[i] = rotary(i, first_step);
        } else if (first_step == 0) {  // else they are there already
          const int byte = box == kVBoxes ? kHeadDimV + lane % 4 * 16
                                          : box / 2 * kTileColumns + (lane % 4 * 2 + box % 2) * 16;
          for (int i = 0; i < 2; ++i) {
            k_codes[i] = *reinterpret_cast<const uint4*>(own_rows[i] + byte);
          }
        }
      };
      const auto convert_k = [&](int batch) {
        const int box = batch / kBatches, first_step = batch % kBatches * kSteps;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t word[4] = {k_codes[i].x, k_codes[i].y, k_codes[i].z, k_codes[i].w};
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            uint32_t(&fragment)[4] = a[batch % 2][step];
            if (kTileScales && box == kVBoxes) {
              const uint4 two_steps = step < 2 ? k_codes[i] : rotary(i, step);
              fragment[i] = step % 2 == 0 ? two_steps.x : two_steps.z;
              fragment[2 + i] = step % 2 == 0 ? two_steps.y : two_steps.w;
            } else {
              fragment[i] = k_values<kFormat>(word[first_step + step] & 0xFFFF);
              fragment[2 + i] = k_values<kFormat>(word[first_step + step] >> 16);
            }
          }
        }
      };
      const auto add_part = [&](int sum) {
        float factor[2] = {1, 1};
        if (kTileScales && sum < kGroups) {
          for (int i = 0; i < 2; ++i) factor[i] = scale(sum, i);
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int j = 0; j < 4; ++j) s_rmem[n][j] += factor[j / 2] * part[sum % kParts][n][j];
        }
      };
      load_k(0);
#pragma unroll
      for (int batch = 0; batch < kKBatches; ++batch) {
        const int sum = batch / kOfScale, box = batch / kBatches;
        const bool begins = batch % kOfScale == 0;
        if (batch >= 2) {  // what had these registers is done
          ptx::wgmma_wait_group<1>(part[(batch - 2) / kOfScale % kParts], a[batch % 2]);
        }
        convert_k(batch);
        if (batch + 1 < kKBatches) load_k(batch + 1);
        if (begins) {
          ptx::wgmma_fence(part[sum % kParts], a[batch % 2]);
        } else {
          ptx::wgmma_fence(a[batch % 2]);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int of_box = batch % kBatches * kSteps + step;
          const auto b = q + (box * kTiles * kAtomBytes + of_box * 32) / 16;
          const bool adds = !begins || step > 0;
          if (kTileScales && box == kVBoxes) {
            ptx::wgmma_m64nNk16<bfloat16>(part[sum % kParts], a[batch % 2][step], b, adds);
          } else {
            ptx::wgmma_m64nNk16<float16>(part[sum % kParts], a[batch % 2][step], b, adds);
          }
        }
        ptx::wgmma_commit_group();
        const bool ends = (batch + 1) % kOfScale == 0 || batch + 1 == kKBatches;
        if (kParts == 2 && begins && batch > 0) {
          ptx::wgmma_wait_group<1>(part[(sum - 1) % kParts], a[(batch - 1) % 2]);
          add_part(sum - 1);
        }
        if (ends && (kParts == 1 || batch + 1 == kKBatches)) {
          ptx::wgmma_wait_group<0>(part[sum % kParts], a[0], a[1]);
          add_part(sum);
        }
      }

      // S = scale log2(e) S, -inf for what a row does not see. Rounded, not fused with the subtraction
      // of m: else P might exceed its bound where S is large.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const auto factor = *reinterpret_cast<const float2*>(&smem.q_factor[n * 8 + own_row]);
        for (int j = 0; j < 4; ++j) {
          s_rmem[n][j] = __fmul_rn(s_rmem[n][j], j % 2 == 0 ? factor.x : factor.y);
        }
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
      }
      // m stays as long as no P exceeds its bound; if one does, m' = max(m, rowmax S + kHeadroom - kLargestP),
      // a = 2^(m - m'), l = a l and O = a O. The same for the scales' bound.
      bool exceeds = first;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) exceeds |= s_rmem[n][j] > m[n][j % 2] + kLargestP<T>;
      }
      float largest_scale = 0;  // NaN loses
      if constexpr (kTileScales) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 four = *scales(i);
          largest_scale = fmaxf(largest_scale, fmaxf(fmaxf(fabsf(four.x), fabsf(four.y)),
                                                     fmaxf(fabsf(four.z), fabsf(four.w))));
        }
        exceeds |= largest_scale > bound;
      }
      if (ptx::barrier_sync_or(kOneWarpgroup + warpgroup, 128, exceeds)) {
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
            if (lane < 4) smem.row_max[warpgroup][own_warp][n * 8 + own_row + i] = largest[n][i];
          }
        }
        if constexpr (kTileScales) {
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2) {
            largest_scale =
                fmaxf(largest_scale, __shfl_xor_sync(0xffffffff, largest_scale, offset));
          }
          if (lane == 0) smem.scale_max[warpgroup][own_warp] = largest_scale;
        }
        sync_warpgroup();  // all maxima are there
        float a_bound = 1;
        if constexpr (kTileScales) {
          float larger = bound;
          for (int w = 0; w < kWarps; ++w) {
            larger = fmaxf(larger, power_of_two_above(smem.scale_max[warpgroup][w]));
          }
          a_bound = bound / larger;
          bound = larger;
          p_factor = kCodeFactor / larger;
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          for (int i = 0; i < 2; ++i) {
            for (int w = 0; w < kWarps; ++w) {
              largest[n][i] = fmaxf(largest[n][i], smem.row_max[warpgroup][w][n * 8 + own_row + i]);
            }
            const float m_new = fmaxf(m[n][i], largest[n][i] + (kHeadroom - kLargestP<T>));
            const float a_m = ptx::ex2_approx(m[n][i] - m_new);  // old minus new: at most 1
            m[n][i] = m_new;
            l[n][i] *= a_m;
#pragma unroll
            for (int box = 0; box < kVBoxes; ++box) {
              o_rmem[box][n][i] *= a_m * a_bound;
              o_rmem[box][n][2 + i] *= a_m * a_bound;
            }
          }
        }
        first = false;
      }

      // Codes of V of 16 columns of a box, 32 tokens each time: a pair of neighbouring codes is 16 bits, which
      // ldmatrix transposes. So a product's rows 16 w + i and 16 w + 8 + i are columns 16 w + 2i and the next.
      uint32_t v_codes[kSteps / 2]
                      [4];  // of 8 tokens each: two of the first column in bytes 0 and 2
      constexpr int kVBatches = kVBoxes * kBatches;
      const auto load_v = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kSteps / 2; ++i) {
          const int token = (batch % kBatches * kSteps / 2 + i) * 32 + lane;
          ptx::ldmatrix_x4_trans(v_codes[i],
                                 tile + token * kBytes + batch / kBatches * 64 + own_warp * 16);
        }
      };
      const auto convert_v = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kSteps * 2; ++i) {
          uint32_t(&fragment)[4] = a[batch % 2][i / 2];
          fragment[i % 2 * 2] = v_values<T, kFormat, 0>(v_codes[i / 4][i % 4]);
          fragment[i % 2 * 2 + 1] = v_values<T, kFormat, 1>(v_codes[i / 4][i % 4]);
        }
      };
      load_v(0);

      // P = 2^(S - m), l = l + rowsum P. (P scale / bound)^T to shared memory, 8 query rows at a time.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int j = 0; j < 4; ++j) {
          s_rmem[n][j] = ptx::ex2_approx(s_rmem[n][j] - m[n][j % 2]);
          l[n][j % 2] += s_rmem[n][j];
        }
      }
#pragma unroll
      for (int version = 0; version < kVersions<kFormat>; ++version) {
        float factor[2];
        for (int i = 0; i < 2; ++i)
          factor[i] = kTileScales ? scale(version, i) * p_factor : p_factor;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          uint32_t packed[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            packed[i] = pack<T>(s_rmem[n][2 * i] * factor[i], s_rmem[n][2 * i + 1] * factor[i]);
          }
          const int chunk = own_warp * 2 + lane / 8 % 2;
          ptx::stmatrix_x2_trans(&p_smem[version][n][lane % 8][chunk ^ lane % 8], packed);
        }
      }
      ptx::fence_proxy_async();
      sync_warpgroup();  // P is there, for wgmma; codes past the end are 0

      // O^T = O^T + V^T P^T  [512, kRows], 16 tokens per step.
#pragma unroll
      for (int batch = 0; batch < kVBatches; ++batch) {
        const int box = batch / kBatches, version = kTileScales ? box / 2 : 0;
        if (batch >= 2) ptx::wgmma_wait_group<1>(o_rmem[(batch - 2) / kBatches], a[batch % 2]);
        convert_v(batch);
        if (batch + 1 < kVBatches) load_v(batch + 1);
        if (batch % kBatches == 0) {
          ptx::wgmma_fence(o_rmem[box], a[batch % 2]);
        } else {
          ptx::wgmma_fence(a[batch % 2]);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int of_box = batch % kBatches * kSteps + step;
          ptx::wgmma_m64nNk16<T>(o_rmem[box], a[batch % 2][step],
                                 p + (version * kTiles * kAtomBytes + of_box * 32) / 16, true);
        }
        ptx::wgmma_commit_group();
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&smem.empty[own_buffer]);  // this warp has read the tile
      ptx::wgmma_wait_group<0>(o_rmem[kVBoxes - 2], o_rmem[kVBoxes - 1], a[0], a[1]);
    }

    // The sums of all of the warpgroup's tokens.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          l[n][i] += __shfl_xor_sync(0xffffffff, l[n][i], offset);
        }
        if (lane < 4) {
          smem.row_sum[warpgroup][own_warp][n * 8 + own_row + i] = l[n][i];
          if (own_warp == 0) smem.row_max[warpgroup][0][n * 8 + own_row + i] = m[n][i];
        }
      }
    }
    sync_consumers();  // the sums of both are there; Q has been read
    slot = smem.slot;
    sequence = at.sequence;
    seqlen_k = at.seqlen_k;
    at.next();
    // Not earlier: blocks of the combine that came while few multiprocessors are free would crowd there.
    if (!at.more()) ptx::griddepcontrol_launch_dependents();

    // m = max m_i, l = sum 2^(m_i - m) l_i, O = sum 2^(m_i - m) O_i / l of the two warpgroups. What this needs
    // per row is made once, by a thread for each row: as code of every thread for its own rows it was so long
    // that a decode of few tiles waited for instructions more than for anything else.
    if (threadIdx.x < kRows) {
      const int r = threadIdx.x;
      float sum[kWarpgroups] = {};
#pragma unroll
      for (int g = 0; g < kWarpgroups; ++g) {
        for (int w = 0; w < kWarps; ++w) sum[g] += smem.row_sum[g][w][r];
      }
      const float m_0 = smem.row_max[0][0][r], m_1 = smem.row_max[1][0][r];
      const float both_m = fmaxf(m_0, m_1);
      const float a_0 = ptx::ex2_approx(m_0 - both_m), a_1 = ptx::ex2_approx(m_1 - both_m);
      const float both_l = a_0 * sum[0] + a_1 * sum[1];
      const bool saw_something = rows.visible(seqlen_k, r) > piece_begin;
      smem.weight[0][r] = saw_something ? a_0 / both_l : 0;
      smem.weight[1][r] = saw_something ? a_1 / both_l : 0;
      smem.place[r] = write_lse(r, both_m, both_l, saw_something);
    }
    sync_consumers();  // weights and places are there

    // Each warpgroup writes half of the columns, and gives its share of the others away.
    constexpr int kHalf = kVBoxes / 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float weight[2];
      int64_t place[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = n * 8 + own_row + i;
        weight[i] = smem.weight[warpgroup][r];
        place[i] = smem.place[r];
      }
      const auto weighted = [&](int box, int j) {
        const float value = o_rmem[box][n][j] * weight[j % 2];
        return value * (kTileScales ? bound : problem.cache_scale);
      };
      if (n > 0) sync_consumers();  // the sums of the rows before have been read
#pragma unroll
      for (int box = 0; box < kVBoxes; ++box) {
        if ((box / kHalf) == warpgroup) continue;
        smem.o[warpgroup][box % kHalf][threadIdx.x % 128] =
            make_float4(weighted(box, 0), weighted(box, 1), weighted(box, 2), weighted(box, 3));
      }
      sync_consumers();  // the other's share is there
#pragma unroll
      for (int box = 0; box < kVBoxes; ++box) {
        if ((box / kHalf) != warpgroup) continue;
        const float4 other = smem.o[warpgroup ^ 1][box % kHalf][threadIdx.x % 128];
        o_rmem[box][n][0] = weighted(box, 0) + other.x;
        o_rmem[box][n][1] = weighted(box, 1) + other.y;
        o_rmem[box][n][2] = weighted(box, 2) + other.z;
        o_rmem[box][n][3] = weighted(box, 3) + other.w;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place[i] < 0) continue;
        float* part = split.out_partial + place[i] + own_column;
        T* out = static_cast<T*>(tensors.out) + place[i] + own_column;
#pragma unroll
        for (int box = 0; box < kVBoxes; ++box) {
          if ((box / kHalf) != warpgroup) continue;
          const float left = o_rmem[box][n][i], right = o_rmem[box][n][2 + i];
          if (slot >= 0) {
            *reinterpret_cast<float2*>(part + box * 64) = make_float2(left, right);
          } else {
            *reinterpret_cast<uint32_t*>(out + box * 64) = pack<T>(left, right);
          }
        }
      }
    }
  }
}

}  // namespace mla::MLA_MACHINE::fp8
