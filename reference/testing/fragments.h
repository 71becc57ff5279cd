/// @file
/// What the instructions of stages/common/ptx/ptx.h do with registers and memory, as words. Run on a
/// GPU once, they are what the model is held to.
#pragma once

#include <cstdint>

#include "reference/float16.h"
#include "reference/status.h"

namespace mla {

/// What a lane brings to one product: pairs of 16-bit values, and the accumulators.
struct MmaInput {
  uint32_t a[4], b[2];
  float c[4];
};

/// Arrays in the memory of the machine that runs the instructions.
struct FragmentBuffers {
  /// Element e of the 256 in shared memory is e. Registers by lane of ldmatrix_x4, then of
  /// ldmatrix_x4_trans.
  uint32_t (*ldmatrix)[32][4];

  /// [mma_count] products: out = c + a b.
  unsigned mma_count;
  const MmaInput (*bfloat16_in)[32], (*float16_in)[32];
  float (*bfloat16_out)[32][4], (*float16_out)[32][4];

  /// [32] What each lane copies, even ones with source_bytes 16, odd ones with 0.
  const uint32_t (*copy_in)[4];
  uint32_t (*copy_out)[4];
};

/// The row of shared memory whose address a lane passes to ldmatrix. Not the lane's own, so that
/// the two are told apart.
constexpr unsigned row_of_lane(unsigned lane) {
  return (5 * lane + 3) % 32;
}

namespace gpu {
Status launch_fragments(const FragmentBuffers& buffers);
}
namespace model {
Status launch_fragments(const FragmentBuffers& buffers);
}

}  // namespace mla
