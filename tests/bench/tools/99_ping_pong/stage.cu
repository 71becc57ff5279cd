// What the registry needs to launch the kernel; any problem will do.
#include "kernel.cuh"
#include "stages/common/machine/launch.h"
#include "stages/common/stage.h"

namespace mla::MLA_MACHINE {
namespace {

size_t scratch_bytes(const Problem&, const DeviceLimits&) {
  return 64;
}

Status decode(const Problem&, const Tensors&, const DevicePlan&, void* scratch, const DeviceLimits&,
              Stream stream) {
  return launch(ping_pong::decode, 4, ping_pong::kThreads,
                sizeof(ping_pong::Smem) + timeline::kSharedBytes, stream,
                static_cast<float*>(scratch));
}

}  // namespace

Stage MLA_STAGE_ENTRY() {
  Stage stage;
  stage.idea = "two warpgroups take turns";
  stage.scratch_bytes = scratch_bytes;
  stage.decode = decode;
  return stage;
}

}  // namespace mla::MLA_MACHINE
