#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = cp_async;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("the next tile by cp.async into a second buffer");
}

}  // namespace mla::MLA_MACHINE
