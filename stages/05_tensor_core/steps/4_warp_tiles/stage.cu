#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = warp_tiles;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("S and P stay in registers, warps have larger shares of them");
}

}  // namespace mla::MLA_MACHINE
