# Run by `cmake --install`: copies the public headers to include/flashmla. They name each other as
# "flashmla/reference/..." there, so that no consumer's own "reference/" or "stages/" is shadowed.

# The public headers. Those of `stages` include no library but the standard one: flashmla::gpu has no other.
set(names
  stages/common/flashmla.h  # installed as flashmla/flashmla.h
  stages/common/stage.h
  stages/common/choose/choice_table.h
  stages/common/choose/choose.h
  stages/common/cache/context_share.h
  stages/common/cache/page_table.h
  stages/common/cache/paged_cache.h
  stages/common/cache/paging_check.h
  stages/common/machine/machine.h
  stages/common/machine/upload_ring.h
  stages/common/parallel/nccl_api.h
  stages/common/parallel/nccl_transport.h
  stages/common/parallel/parallel.h
  stages/common/parallel/rendezvous.h
  stages/common/parallel/share.h
  stages/common/parallel/transport.h
  stages/common/split/plan.h
  reference/cache_format.h
  reference/dtype.h
  reference/paging.h
  reference/problem.h
  reference/status.h
  # For the other components:
  reference/attention.h
  reference/counter_random.h
  reference/float16.h
  reference/float16_bits.h
  reference/float8.h
  reference/lse_merge.h
  reference/quantise.h
  reference/gpu_model/gpu_model.h
  reference/gpu_model/recording.h
  reference/layers/cost_model.h
  reference/layers/mla_layer.h
  reference/layers/traditional_mla.h
  reference/testing/compare.h
  reference/testing/data_generator.h
  reference/testing/device_data.h
  reference/testing/oracle.h)
foreach(name IN LISTS names)
  file(READ "${source}/${name}" text)
  string(REGEX REPLACE "(#include \")(reference|stages)/" "\\1flashmla/\\2/" text "${text}")
  string(REPLACE "stages/common/flashmla.h" "flashmla.h" name ${name})
  file(WRITE "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/${headers}/${name}" "${text}")
endforeach()
