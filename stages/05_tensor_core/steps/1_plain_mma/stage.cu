#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = plain_mma;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("both products by mma.sync, its fragments by plain loads");
}

}  // namespace mla::MLA_MACHINE
