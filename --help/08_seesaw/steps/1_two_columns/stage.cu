#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = two_columns;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("two tiles, two warpgroups in turn, P through shared memory");
}

}  // namespace mla::MLA_MACHINE
