// Launches the lab's kernels, for the GPU model and for GPUs.
#include "docs/traditional/first.cuh"
#include "docs/traditional/mended.cuh"
#include "docs/traditional/second.cuh"
#include "stages/common/machine/launch.h"

namespace mla::MLA_MACHINE {
namespace {

// All have 128 threads.
Status launch_by_head(void (*kernel)(LatentDecode), size_t shared_bytes, const LatentDecode& d) {
  return launch(kernel, static_cast<unsigned>(d.heads), 128, shared_bytes, nullptr, d);
}

}  // namespace

Status first_decode(const LatentDecode& d) {
  return launch_by_head(traditional_first::decode, 0, d);
}
Status second_decode(const LatentDecode& d) {
  return launch_by_head(traditional_second::decode, sizeof(traditional_second::Smem), d);
}
Status mended_first_decode(const LatentDecode& d) {
  return launch_by_head(traditional_mended::first, 0, d);
}
Status mended_second_decode(const LatentDecode& d) {
  return launch_by_head(traditional_mended::second, sizeof(traditional_mended::Smem), d);
}

}  // namespace mla::MLA_MACHINE
