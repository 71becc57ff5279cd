/// @file
/// What the instructions of stages/common/ptx/ptx_sm90.h for clusters do, as words: two blocks
/// that reach into each other's shared memory. What a GPU of compute capability 9.0 did will be in
/// golden/cluster_fragments.txt.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/status.h"
#include "reference/testing/observation.h"

namespace mla {

class Machine;

/// Words of what is copied from block to block, and of the box that both get: 8 rows of 64 elements
/// of 16 bits, with a 128-byte swizzle.
inline constexpr uint32_t kClusterCopyWords = 64, kClusterBoxWords = 256;

/// What a block of a cluster of two saw. `other` is the other block's rank.
struct ClusterOutput {
  uint32_t rank[2];     ///< Its rank, and the number of blocks.
  uint32_t read[32];    ///< What it read in the other block: 1000 other + i.
  uint32_t stored[32];  ///< What the other block stored here, then arrived: 2000 (other + 1) + i.
  /// What st_async of the other block brought, 3000 + other and the halves 4000 + other and
  /// 5000 + other, and what its red_async_add made of 10: 11 + other.
  uint32_t sent[4];
  uint32_t
      copied[kClusterCopyWords];   ///< What a bulk copy of the other block brought: 6000 other + i.
  uint32_t box[kClusterBoxWords];  ///< The box, as block 0 multicast it.
};

/// Runs the instructions on a cluster of two blocks. Element e of the tensor is e; `out`, two of
/// them, is in the machine's memory, as is the tensor.
using ClusterFragments = Status (*)(const void* tensor, ClusterOutput* out);

/// Runs them on `machine`, and appends an observation of each to `result`.
/// @return The machine's errors.
Status record_cluster_fragments(Machine& machine, std::vector<Observation>* result);

namespace gpu {
/// What runs the instructions on the GPU.
ClusterFragments cluster_fragments();
}  // namespace gpu
namespace model {
/// The same on the GPU model.
ClusterFragments cluster_fragments();
}  // namespace model

}  // namespace mla
