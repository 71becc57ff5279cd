/// @file
/// What the instructions of stages/common/ptx/ptx.h do with registers and memory, as words. What a
/// GPU did is in golden/fragments.txt; the model is checked against it.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/float16.h"
#include "reference/status.h"
#include "reference/testing/golden.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// What a lane brings to one product.
struct MmaInput {
  uint32_t a[4], b[2];  ///< Pairs of 16-bit values, in the order of mma_m16n8k16's registers.
  float c[4];           ///< The accumulators.
};

/// Arrays in the memory of the machine that runs the instructions.
struct FragmentBuffers {
  /// [2] By lane, the registers of ldmatrix_x4, then of ldmatrix_x4_trans. Element e of the 256 in
  /// shared memory is e.
  uint32_t (*ldmatrix)[32][4];

  unsigned mma_count;                                    ///< Products of each type: out = c + a b.
  const MmaInput (*bfloat16_in)[32], (*float16_in)[32];  ///< [mma_count], by lane.
  float (*bfloat16_out)[32][4], (*float16_out)[32][4];   ///< [mma_count], by lane.

  /// [32] What each lane copies: even lanes with source_bytes 16, odd ones with 0.
  const uint32_t (*copy_in)[4];
  uint32_t (*copy_out)[4];  ///< [32] What shared memory then holds, by lane.
};

/// The row of shared memory whose address a lane passes to ldmatrix. It differs from the lane, so
/// that a result shows which of the two counts.
constexpr unsigned row_of_lane(unsigned lane) {
  return (5 * lane + 3) % 32;
}

/// Runs all the instructions on `machine`; sets the array of each name in `result`.
/// @return The machine's errors.
Status record_fragments(Machine& machine, GoldenWords* result);

/// For the products "mma_bf16_random" or "mma_fp16_random": by product, lane and register, the sum
/// of the magnitudes of the terms.
std::vector<double> mma_magnitudes(DType dtype);

namespace gpu {
/// Runs all the instructions on the GPU. `buffers` are in its memory.
Status launch_fragments(const FragmentBuffers& buffers);
}  // namespace gpu
namespace model {
/// The same on the GPU model.
Status launch_fragments(const FragmentBuffers& buffers);
}  // namespace model

}  // namespace mla
