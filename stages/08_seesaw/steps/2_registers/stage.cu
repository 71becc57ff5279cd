#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = registers;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("P crosses as it lies in registers, and is multiplied from there");
}

}  // namespace mla::MLA_MACHINE
