#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = ldmatrix;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("fragments by ldmatrix, from rows whose chunks are swizzled");
}

}  // namespace mla::MLA_MACHINE
