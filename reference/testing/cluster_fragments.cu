// A cluster of two blocks, each of which does to the other what the other does to it.
#include "reference/testing/cluster_fragments.h"

#include "stages/common/machine/launch.h"
#include "stages/common/ptx/ptx_sm90.h"
#include "stages/common/ptx/tensor_map.h"

namespace mla::MLA_MACHINE {
namespace {

struct ClusterSmem {
  alignas(1024) uint32_t box[kClusterBoxWords];
  alignas(16) uint32_t from[kClusterCopyWords];
  alignas(16) uint32_t to[kClusterCopyWords];
  uint32_t values[32];
  uint32_t stored[32];
  alignas(8) uint32_t pair[2];
  uint32_t word, sum;
  ptx::Mbarrier arrivals, sent, copied, box_full;
};

__global__ void __launch_bounds__(32)
    cluster_fragments_kernel(const __grid_constant__ TensorMap map, ClusterOutput* out) {
  ClusterSmem& smem = shared_memory<ClusterSmem>();
  const unsigned thread = threadIdx.x, rank = ptx::cluster_ctarank(), other = 1 - rank;
  ClusterOutput& result = out[blockIdx.x];
  if (thread == 0) {
    ptx::mbarrier_init(&smem.arrivals, 32);
    ptx::mbarrier_init(&smem.sent, 1);
    ptx::mbarrier_init(&smem.copied, 1);
    ptx::mbarrier_init(&smem.box_full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&smem.sent, 16);
    ptx::mbarrier_arrive_expect_tx(&smem.copied, static_cast<int>(sizeof smem.from));
    ptx::mbarrier_arrive_expect_tx(&smem.box_full, static_cast<int>(sizeof smem.box));
    smem.sum = 10;
    result.rank[0] = rank;
    result.rank[1] = ptx::cluster_nctarank();
  }
  smem.values[thread] = 1000 * rank + thread;
  for (unsigned i = thread; i < kClusterCopyWords; i += 32) smem.from[i] = 6000 * rank + i;
  ptx::fence_proxy_async();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();

  result.read[thread] = *ptx::mapa(&smem.values[thread], other);
  *ptx::mapa(&smem.stored[thread], other) = 2000 * (rank + 1) + thread;
  ptx::mbarrier_arrive_cluster(ptx::mapa(&smem.arrivals, other));
  if (thread == 0) {
    ptx::Mbarrier* sent = ptx::mapa(&smem.sent, other);
    ptx::st_async(ptx::mapa(&smem.word, other), 3000 + rank, sent);
    ptx::st_async(reinterpret_cast<uint64_t*>(ptx::mapa(&smem.pair[0], other)),
                  uint64_t{5000 + rank} << 32 | (4000 + rank), sent);
    ptx::red_async_add(ptx::mapa(&smem.sum, other), rank + 1, sent);
    ptx::cp_async_bulk_cluster(ptx::mapa(&smem.to[0], other), smem.from,
                               static_cast<int>(sizeof smem.from), ptx::mapa(&smem.copied, other));
    if (rank == 0) {
      ptx::cp_async_bulk_tensor_4d_multicast(smem.box, &map, 0, 0, 0, 0, &smem.box_full, 3,
                                             ptx::createpolicy_evict_last());
    }
  }
  ptx::mbarrier_wait_cluster(&smem.arrivals, 0);
  ptx::mbarrier_wait_cluster(&smem.sent, 0);
  ptx::mbarrier_wait_cluster(&smem.copied, 0);
  ptx::mbarrier_wait_cluster(&smem.box_full, 0);
  result.stored[thread] = smem.stored[thread];
  for (unsigned i = thread; i < kClusterCopyWords; i += 32) result.copied[i] = smem.to[i];
  for (unsigned i = thread; i < kClusterBoxWords; i += 32) result.box[i] = smem.box[i];
  if (thread == 0) {
    result.sent[0] = smem.word;
    result.sent[1] = smem.pair[0];
    result.sent[2] = smem.pair[1];
    result.sent[3] = smem.sum;
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

Status run(const void* tensor, ClusterOutput* out) {
  TensorShape shape;
  shape.rank = 4;
  const uint64_t size[] = {64, 8, 1, 1}, stride[] = {2, 128, 1024, 1024};
  for (int i = 0; i < 4; ++i) {
    shape.size[i] = size[i];
    shape.stride_bytes[i] = stride[i];
    shape.box[i] = static_cast<uint32_t>(size[i]);
  }
  shape.swizzle_128b = true;
  TensorMap map;
  MLA_RETURN_IF_ERROR(encode_tensor_map(tensor, shape, &map));
  return launch_cluster(cluster_fragments_kernel, 2, 2, 32, sizeof(ClusterSmem), nullptr, map, out);
}

}  // namespace

ClusterFragments cluster_fragments() {
  return run;
}

}  // namespace mla::MLA_MACHINE
