/// @file
/// Bulk copies (TMA) on the model: those under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/gpu_model/proxy.h"
#include "reference/gpu_model/tensor_map.h"

namespace gpu_model::detail {

/// One bulk copy, of a tensor's box or of consecutive bytes.
struct BulkCopy {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
  unsigned thread = 0;
  bool tensor = false;
  TensorMap map;
  int coordinates[4] = {};
  std::byte* global = nullptr;  ///< Where it is no tensor.
  size_t offset = 0;            ///< In shared memory.
  size_t bytes = 0;
  size_t barrier = 0;     ///< A load's, by its offset.
  bool begun = false;     ///< A load that may land.
  bool has_data = false;  ///< Its source has been read.
  GranuleArray data;      ///< As it lies in shared memory.
};

/// One GPU thread's stores, in the order of issue, which may still read shared memory.
struct StoreQueue {
  std::vector<BulkCopy> stores;
  std::vector<size_t> group_ends;  ///< Of each committed group: the number of stores to its end.
};

}  // namespace gpu_model::detail
