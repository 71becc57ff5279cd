#include "kernel.cuh"
namespace mla::MLA_MACHINE {
namespace kernel = three_producers;
}
#include "../step.h"

namespace mla::MLA_MACHINE {

Stage MLA_STAGE_ENTRY() {
  return step("three threads send for K, one for each region, as it is free");
}

}  // namespace mla::MLA_MACHINE
