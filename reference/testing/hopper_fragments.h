/// @file
/// What the instructions of stages/common/ptx/ptx_sm90.h do with registers and memory, as words. Run on
/// a GPU of compute capability 9.0 once, they are what the model is held to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reference/problem.h"
#include "reference/status.h"
#include "reference/testing/fragments.h"

namespace mla {

/// The products of a warpgroup: N, how B lies, and where A is.
enum class WgmmaForm {
  kM64N32,          ///< Both in shared memory, K-major.
  kM64N64,          ///< The same.
  kM64N256,         ///< Both in shared memory, B MN-major.
  kM64N256Register  ///< A in registers.
};
inline constexpr size_t kWgmmaSteps = 8;  ///< At most, of k = 16 each.
inline constexpr size_t kWgmmaABytes = 32 * 1024, kWgmmaBBytes = 64 * 1024;

/// A chain of products d = (accumulate ? d : 0) + a b + a b + ..., one a step.
struct WgmmaInput {
  /// A matrix descriptor's fields; in step s it begins `offset[s]` bytes into the image.
  struct Walk {
    uint32_t leading_bytes, stride_bytes, offset[kWgmmaSteps];
  };
  uint32_t steps, accumulate;
  Walk a, b;
  uint32_t a_smem[kWgmmaABytes / 4], b_smem[kWgmmaBBytes / 4];  ///< Images of shared memory.
  uint32_t a_registers[kWgmmaSteps][128][4];
  float d[128][128];  ///< By thread; N / 2 of each are used.
};
using WgmmaOutput = float[128][128];

/// A tensor of four dimensions of 16-bit elements, and the box of it that one copy takes.
struct TmaTensor {
  uint64_t size[4], stride_bytes[4];
  uint32_t box[4];
  bool swizzle_128b;
};
struct TmaBox {
  int32_t start[4];  ///< Coordinates, innermost first.
};
inline constexpr size_t kTmaBoxWords = 2048;  ///< At most.
inline constexpr uint32_t kUntouched = 0xabababab;

struct BulkCopy {
  uint32_t destination, source, bytes;  ///< Where, in bytes.
};
inline constexpr size_t kBulkWords = 1024;
inline constexpr BulkCopy kBulkLoads[] = {{16, 32, 16}, {64, 0, 272}, {1024, 512, 2048}};
inline constexpr BulkCopy kBulkStores[] = {{16, 1024, 64}, {256, 48, 1008}, {4080, 4080, 16}};

inline constexpr int kMbarrierPhases = 5;

/// The instructions on one machine; all arrays are in its memory.
struct HopperFragments {
  /// in[i] -> out[i]
  Status (*wgmma)(WgmmaForm form, DType dtype, const WgmmaInput* in, unsigned count,
                  WgmmaOutput* out);
  /// The boxes, one after the other, through one mbarrier that each time expects the whole box.
  Status (*tma_load)(const TmaTensor& shape, const void* tensor, const TmaBox* boxes, int count,
                     uint32_t (*out)[kTmaBoxWords]);
  /// Element e of the box in shared memory is kTmaStored + e, whatever the swizzle.
  Status (*tma_store)(const TmaTensor& shape, void* tensor, TmaBox box);
  /// kBulkLoads into shared memory of kUntouched, copied to `loaded`; then kBulkStores from there.
  Status (*bulk)(const uint32_t* in, uint32_t* loaded, uint32_t* stored);
  /// Register i of lane l holds 8 l + 2 i + 1 in its low half, and one more in the high one; the
  /// lane passes the address of row row_of_lane(l) of 32, which are copied to `out`.
  Status (*stmatrix)(uint32_t (*out)[4]);
  /// [kMbarrierPhases + 1][128] First 1 of each thread whose wait with parity 1 on the new barrier
  /// ended; then what each saw after the wait for phase p: the sum of 100 p + 1 ... 100 p + 4.
  Status (*mbarrier)(uint32_t (*out)[128]);
};
inline constexpr uint32_t kTmaStored = 0x1000;

namespace gpu {
HopperFragments hopper_fragments();
}
namespace model {
HopperFragments hopper_fragments();
}

}  // namespace mla
