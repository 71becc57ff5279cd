/// @file
/// Tensor maps: what TMA must know about a tensor in global memory to copy boxes of it.
#pragma once

#include <cstdint>

#include "stages/common/machine/device.h"
#include "stages/common/machine/machine.h"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "reference/gpu_model/tensor_map.h"
#endif

namespace mla::MLA_MACHINE {

/// Opaque, 64-byte aligned; a kernel takes it as a `const __grid_constant__` parameter.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = gpu_model::TensorMap;
#endif

/// A tensor and the box that one copy takes of it. Dimensions innermost first.
struct TensorShape {
  int element_bytes = 2;  ///< 2, or 4 for rows of a box of more than 512 bytes.
  int rank = 0;           ///< 1 ... 5
  uint64_t size[5] = {};  ///< Elements.
  uint64_t stride_bytes[5] =
      {};  ///< Between neighbours of a dimension. Multiples of 16; [0] is element_bytes.
  uint32_t box[5] = {};  ///< Elements, 1 ... 256.
  /// Whether chunk c (16 bytes) of row r of a box, whose rows have 128 bytes, lies in place
  /// c ^ (r % 8).
  bool swizzle_128b = false;
  bool swizzle_64b = false;  ///< The same for rows of 64 bytes, place c ^ (r / 2 % 4).
};

/// Makes a tensor map. `address` is 16-byte aligned. L2 fetches 128 bytes at a time, because rows
/// of a cache are no multiple of 256.
/// @return kCudaError if the driver refuses the map or is too old; on the model kInvalidArgument.
Status encode_tensor_map(const void* address, const TensorShape& shape, TensorMap* map);

/// The same for the cache of a problem, [576, num_heads_kv, page_size, num_pages], in boxes of 64 or 32
/// `columns`, swizzled as such rows are, of one head and of `tokens` of a page, or of the whole page if that has fewer. Coordinates
/// are (column, head, token of the page, page).
Status encode_cache_map(const Problem& problem, const Tensors& tensors, TensorMap* map,
                        int tokens = kGrainTokens, int columns = 64);

}  // namespace mla::MLA_MACHINE
