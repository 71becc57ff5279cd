/// @file
/// wgmma on the model: the products that each warp has under way. A warp computes its own 16 of a
/// product's 64 rows; all that the warps of a warpgroup must do together is issue the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "reference/gpu_model/ptx_sm90.h"

namespace gpu_model::detail {

/// A warp's part of one wgmma.
struct WarpProduct {
  WarpProduct() {}  // does not clear the arrays, because there are many of these

  Product product;
  size_t accumulator = 0;             ///< Index in WarpProducts::accumulators.
  uint32_t a[32][4];                  ///< By lane: A in registers, as it was at issue,
  const uint32_t* a_registers[32];    ///< and where.
  size_t granule_count = 0;           ///< How many of the following there are.
  uint16_t granules[(16 + 256) * 2];  ///< Those of shared memory that it reads: A's, then B's.
};

/// D of products under way: its registers hold NaN, its values are here.
struct Accumulator {
  bool in_flight = false;     ///< Whether a product under way adds to it.
  uint64_t last = 0;          ///< The number of the newest product that adds to it.
  int columns = 0;            ///< Columns of D.
  float* d[32];               ///< By lane: its registers.
  std::vector<float> values;  ///< [16, columns]
};

/// The products of one warp, numbered in the order of issue.
struct WarpProducts {
  std::deque<WarpProduct> queue;  ///< Issued, but not waited for.
  uint64_t first = 0;             ///< The number of queue[0].
  uint64_t computed = 0;          ///< How many are computed.
  std::vector<uint64_t> groups;   ///< How many were issued up to the end of each incomplete group.
  std::vector<Accumulator> accumulators;  ///< Of products under way, and old ones for reuse.
  uint64_t instructions = 0;  ///< How many instructions of the whole warpgroup it has executed.

  /// How many were issued.
  uint64_t issued() const { return first + queue.size(); }
};

/// An instruction that all warps of a warpgroup must execute.
struct WarpgroupInstruction {
  const char* what;  ///< The instruction, its place
  const char* file;
  int line;
  uint64_t a, b;  ///< and its operands, which must be the same in all warps.
  bool accumulate;
  unsigned warps;  ///< How many warps have executed it.
  unsigned first;  ///< The warp that was first.
};

/// What one warpgroup has executed in part.
struct Warpgroup {
  std::deque<WarpgroupInstruction> instructions;  ///< Those that not all warps have executed yet.
  uint64_t first = 0;                             ///< How many there were before these.
};

/// Registers of a thread as they were at the last wgmma_fence that named them, or as a wait left
/// them.
struct FencedRegisters {
  const uint32_t* begin;         ///< Where they are,
  std::vector<uint32_t> values;  ///< and what they held.
};

}  // namespace gpu_model::detail
