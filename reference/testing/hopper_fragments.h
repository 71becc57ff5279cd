/// @file
/// What the instructions of stages/common/ptx/ptx_sm90.h do with registers and memory, as words.
/// What a GPU of compute capability 9.0 did is in golden/hopper_fragments.txt; the model is checked
/// against it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "reference/problem.h"
#include "reference/status.h"
#include "reference/testing/fragments.h"
#include "reference/testing/observation.h"

namespace mla {

/// The products of a warpgroup: how many columns, how A and B lie in memory, and where A is.
enum class WgmmaForm {
  kM64N32,           ///< A and B in shared memory, both K-major.
  kM64N64,           ///< The same.
  kM64N256,          ///< A and B in shared memory, B MN-major.
  kM64N256Register,  ///< A in registers, B in shared memory, MN-major.
  kM64N8,            ///< As kM64N32.
  kM64N16,
  kM64N24,
  kM64N8TransA,  ///< A and B in shared memory, A MN-major.
  kM64N16TransA,
  kM64N24TransA,
  kM64N32TransA,
};
/// What a form is called, how many columns it has, and which operands are MN-major.
struct WgmmaFormFacts {
  WgmmaForm form;         ///< Which form,
  const char* name;       ///< its name in the golden file,
  size_t columns;         ///< columns of D,
  bool trans_a, trans_b;  ///< and whether A and B are MN-major.
};
/// All forms, in order.
inline constexpr WgmmaFormFacts kWgmmaForms[] = {
    {WgmmaForm::kM64N32, "m64n32", 32, false, false},
    {WgmmaForm::kM64N64, "m64n64", 64, false, false},
    {WgmmaForm::kM64N256, "m64n256", 256, false, true},
    {WgmmaForm::kM64N256Register, "m64n256_a_in_registers", 256, false, true},
    {WgmmaForm::kM64N8, "m64n8", 8, false, false},
    {WgmmaForm::kM64N16, "m64n16", 16, false, false},
    {WgmmaForm::kM64N24, "m64n24", 24, false, false},
    {WgmmaForm::kM64N8TransA, "m64n8_trans_a", 8, true, false},
    {WgmmaForm::kM64N16TransA, "m64n16_trans_a", 16, true, false},
    {WgmmaForm::kM64N24TransA, "m64n24_trans_a", 24, true, false},
    {WgmmaForm::kM64N32TransA, "m64n32_trans_a", 32, true, false},
};
/// Of one form.
constexpr const WgmmaFormFacts& facts_of(WgmmaForm form) {
  return kWgmmaForms[static_cast<size_t>(form)];
}
/// Columns of D.
constexpr size_t columns_of(WgmmaForm form) {
  return facts_of(form).columns;
}
/// The most steps of one chain, of k = 16 each.
inline constexpr size_t kWgmmaSteps = 8;
/// Bytes of the images of A and of B.
inline constexpr size_t kWgmmaABytes = 32 * 1024, kWgmmaBBytes = 64 * 1024;

/// A chain of products d = (accumulate ? d : 0) + a b + a b + ..., one product per step.
struct WgmmaInput {
  /// A matrix descriptor's fields, in bytes; in step s the matrix begins `offset[s]` bytes into the
  /// image.
  struct Walk {
    uint32_t leading_bytes, stride_bytes, offset[kWgmmaSteps];
  };
  uint32_t steps;       ///< 1 ... kWgmmaSteps
  uint32_t accumulate;  ///< Not 0: the first product adds to d.
  Walk a, b;
  uint32_t a_smem[kWgmmaABytes / 4], b_smem[kWgmmaBBytes / 4];  ///< Images of shared memory.
  uint32_t a_registers[kWgmmaSteps][128][4];  ///< [step][thread][register], for kM64N256Register.
  float d[128][128];  ///< [thread][register]; a form of N columns uses N / 2 registers per thread.
};
/// [thread][register], as WgmmaInput::d.
using WgmmaOutput = float[128][128];

/// A tensor of four or five dimensions of 16-bit elements, and the box of it that one copy takes.
/// Dimensions innermost first, sizes in elements.
struct TmaTensor {
  uint64_t size[5], stride_bytes[5];
  uint32_t box[5];
  bool swizzle_128b;
  /// 5, or 4 if the last size is 0.
  int rank() const { return size[4] > 0 ? 5 : 4; }
};
/// Where a box begins.
struct TmaBox {
  int32_t start[5];  ///< Coordinates, innermost first.
};
/// The most words of one box.
inline constexpr size_t kTmaBoxWords = 2048;
/// What memory holds where no instruction has written.
inline constexpr uint32_t kUntouched = 0xabababab;

/// One bulk copy: offsets in source and destination, and its size, all in bytes.
struct BulkCopy {
  uint32_t destination, source, bytes;
};
/// Words of the memory that bulk copies read and write.
inline constexpr size_t kBulkWords = 1024;
/// The copies to shared memory, and those from there.
inline constexpr BulkCopy kBulkLoads[] = {{16, 32, 16}, {64, 0, 272}, {1024, 512, 2048}};
inline constexpr BulkCopy kBulkStores[] = {{16, 1024, 64}, {256, 48, 1008}, {4080, 4080, 16}};

/// Phases that the mbarrier goes through.
inline constexpr int kMbarrierPhases = 5;

/// The instructions on one machine; all arrays are in its memory.
struct HopperFragments {
  /// [count] Chains: in[i] gives out[i].
  Status (*wgmma)(WgmmaForm form, DType dtype, const WgmmaInput* in, unsigned count,
                  WgmmaOutput* out);
  /// [count] Boxes, one after the other, through one mbarrier, which expects a whole box each time.
  Status (*tma_load)(const TmaTensor& shape, const void* tensor, const TmaBox* boxes, int count,
                     uint32_t (*out)[kTmaBoxWords]);
  /// Stores a box. Element e of it in shared memory is kTmaStored + e, whatever the swizzle.
  Status (*tma_store)(const TmaTensor& shape, void* tensor, TmaBox box);
  /// [kBulkWords] kBulkLoads from `in` to shared memory that holds kUntouched, all of which is then
  /// copied to `loaded`; then kBulkStores from shared memory to `stored`.
  Status (*bulk)(const uint32_t* in, uint32_t* loaded, uint32_t* stored);
  /// Lane l holds in register i the number 8 l + 2 i + 1 in the low half, and one more in the high
  /// half. It passes the address of row row_of_lane(l). All 32 rows are then copied to `out`.
  Status (*stmatrix)(uint32_t (*out)[4]);
  /// The same for the 16 columns of two matrices; the rest of `out` stays kUntouched.
  Status (*stmatrix_trans)(uint32_t (*out)[4]);
  /// [kMbarrierPhases + 1][128] First 1 from each thread whose wait with parity 1 on the new
  /// barrier ended. Then what each thread saw after the wait for phase p: the sum
  /// 100 p + 1 ... 100 p + 4.
  Status (*mbarrier)(uint32_t (*out)[128]);
};
/// Element 0 of the box that tma_store stores.
inline constexpr uint32_t kTmaStored = 0x1000;

/// Runs all the instructions on `machine`, and appends an observation of each to `result`. Writes a
/// line to `log`, unless it is null, as soon as an observation is made, so that a wait that never
/// ends loses no others.
/// @return The machine's errors.
Status record_hopper_fragments(Machine& machine, std::vector<Observation>* result,
                               std::ostream* log = nullptr);

/// The GPU, if it has these instructions, or else null with the reason.
Machine* hopper_machine(std::string* why_not);

namespace gpu {
/// What runs the instructions on the GPU.
HopperFragments hopper_fragments();
}  // namespace gpu
namespace model {
/// The same on the GPU model.
HopperFragments hopper_fragments();
}  // namespace model

}  // namespace mla
