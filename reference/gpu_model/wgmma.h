/// @file
/// wgmma on the model: the products that each warp has under way. A warp computes its 16 of a
/// product's 64 rows by itself; warps of a warpgroup only have to issue the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "reference/gpu_model/ptx_sm90.h"

namespace gpu_model::detail {

/// A warp's part of one wgmma.
struct WarpProduct {
  WarpProduct() {}  // leaves the arrays alone: there are many of these

  Product product;
  size_t accumulator = 0;           ///< In WarpProducts::accumulators.
  uint32_t a[32][4];                ///< A in registers, as it was at issue,
  const uint32_t* a_registers[32];  ///< and where.
  size_t granule_count = 0;
  uint16_t granules[(16 + 256) * 2];  ///< Of shared memory that it reads: of A, then of B.
};

/// D of products under way: its registers hold NaN, its values are here.
struct Accumulator {
  bool in_flight = false;
  uint64_t last = 0;  ///< The newest product that adds to it.
  int columns = 0;
  float* d[32];
  std::vector<float> values;  ///< [16, columns]
};

struct WarpProducts {
  std::deque<WarpProduct> queue;  ///< Issued, but not waited for.
  uint64_t first = 0;             ///< How many were issued before queue[0],
  uint64_t computed = 0;          ///< and how many are computed.
  std::vector<uint64_t> groups;   ///< How many were issued up to the end of each incomplete group.
  std::vector<Accumulator> accumulators;
  uint64_t instructions = 0;  ///< That all warps of its warpgroup are to execute.

  uint64_t issued() const { return first + queue.size(); }
};

/// An instruction that all warps of a warpgroup are to execute.
struct WarpgroupInstruction {
  const char* what;
  const char* file;
  int line;
  uint64_t a, b;
  bool accumulate;
  unsigned warps;  ///< How many have executed it.
  unsigned first;  ///< The warp that was first.
};

struct Warpgroup {
  std::deque<WarpgroupInstruction> instructions;  ///< Not executed by all warps yet.
  uint64_t first = 0;                             ///< How many there were before.
};

/// Registers of a thread as they were at the last wgmma_fence that named them, or as a wait left
/// them.
struct FencedRegisters {
  const uint32_t* begin;
  std::vector<uint32_t> values;
};

}  // namespace gpu_model::detail
