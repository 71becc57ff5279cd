/// @file
/// Bulk copies (TMA) on the model: those under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/gpu_model/proxy.h"
#include "reference/gpu_model/ptx_sm90.h"
#include "reference/gpu_model/tensor_map.h"

namespace gpu_model::detail {

class Multiprocessor;

/// One bulk copy, of a tensor's box or of consecutive bytes.
struct BulkCopy {
  const char* what = nullptr;  ///< The instruction,
  const char* file = nullptr;  ///< its place
  int line = 0;
  unsigned thread = 0;          ///< and the number of the thread that issued it.
  bool tensor = false;          ///< Whether it copies a tensor's box.
  TensorMap map;                ///< If so: the tensor,
  Coordinates coordinates;      ///< and where the box begins.
  std::byte* global = nullptr;  ///< If not: the address in global memory.
  size_t offset = 0;            ///< In shared memory, in bytes.
  size_t bytes = 0;             ///< Its size in shared memory.
  size_t barrier = 0;           ///< A load's mbarrier: its offset in shared memory.
  bool begun = false;           ///< Whether a load may land.
  bool has_data = false;        ///< Whether its source has been read.
  GranuleArray data;            ///< What was read, as it lies in shared memory.
  uint64_t number = 0;          ///< In a recording.

  // Between blocks of a cluster. It is under way in the block that it writes to.
  /// A bulk copy, or what st_async or red_async does with one value.
  enum class Kind : uint8_t { kBulk, kStore, kAdd };
  Kind kind = Kind::kBulk;
  CopiedValue value{};               ///< If it is one value: that.
  Multiprocessor* issuer = nullptr;  ///< The block of the thread, if not the one that is written.
  Multiprocessor* source = nullptr;  ///< The block whose shared memory it reads, if any,
  size_t source_offset = 0;          ///< and where, in bytes.
};

/// The stores of one GPU thread that may still read shared memory, in the order of issue.
struct StoreQueue {
  std::vector<BulkCopy> stores;
  std::vector<size_t> group_ends;  ///< Per committed group: the number of stores up to its end.
};

}  // namespace gpu_model::detail
