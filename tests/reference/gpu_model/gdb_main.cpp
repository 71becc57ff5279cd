// The program that gdb_test.py stops: a cluster of two blocks. It stops in thread 40 of the second.
#include "reference/gpu_model/simt.h"
#include "stages/common/ptx/ptx_sm90.h"

namespace {

namespace ptx = mla::model::ptx;

[[gnu::noinline]] void stop_here() {
  asm volatile("");
}

void wait_for_the_cluster() {
  if (ptx::cluster_ctarank() == 1 && threadIdx.x == 40) stop_here();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

}  // namespace

int main() {
  gpu_model::launch(2, 64, 0, wait_for_the_cluster, {.cluster = 2});
}
