#include "reference/testing/device_data.h"

#include <algorithm>

namespace mla {

namespace gpu {
Status launch_generate(const Problem&, uint64_t, DataKind, ScaleRule, const int32_t*,
                       const int32_t*, const Needle*, const int32_t*, const Tensors&);
}
namespace model {
Status launch_generate(const Problem&, uint64_t, DataKind, ScaleRule, const int32_t*,
                       const int32_t*, const Needle*, const int32_t*, const Tensors&);
}

Tensors DeviceTensors::tensors() const {
  return layout.tensors(q.data(), kv_cache.data(), block_table.as<int32_t>(),
                        seqlens_k.as<int32_t>(), out.data(), lse.as<float>());
}

Status DeviceTensors::poison_outputs(Machine& machine) {
  MLA_RETURN_IF_ERROR(machine.fill(out.data(), 0xff, out.bytes()));
  return machine.fill(lse.data(), 0xff, lse.bytes());
}

Status generate_on_device(Machine& machine, const DataSet& data, DeviceTensors* result) {
  const Problem& problem = data.problem;
  MLA_RETURN_IF_ERROR(validate(problem));
  const auto bytes = [](const auto& values) { return values.size() * sizeof(values[0]); };
  const auto upload = [&](DeviceBuffer& buffer, const auto& values) {
    return buffer.assign(machine, values.data(), bytes(values));
  };
  DeviceBuffer page_sequence, page_position, needles, needle_begin;
  result->layout = data.layout();
  const Layout& layout = result->layout;
  MLA_RETURN_IF_ERROR(upload(result->block_table, data.table_buffer()));
  MLA_RETURN_IF_ERROR(upload(result->seqlens_k, data.length_buffer()));
  MLA_RETURN_IF_ERROR(upload(page_sequence, data.page_sequence));
  MLA_RETURN_IF_ERROR(upload(page_position, data.page_position));
  MLA_RETURN_IF_ERROR(upload(needle_begin, data.needle_begin));
  MLA_RETURN_IF_ERROR(needles.allocate(machine, std::max<size_t>(1, bytes(data.needles))));
  MLA_RETURN_IF_ERROR(
      machine.copy_to_device(needles.data(), data.needles.data(), bytes(data.needles)));
  // NaN first: gaps keep it.
  const auto allocate = [&](DeviceBuffer& buffer, int64_t elements, size_t size) -> Status {
    MLA_RETURN_IF_ERROR(buffer.allocate(machine, static_cast<size_t>(elements) * size));
    return data.spec.strided ? machine.fill(buffer.data(), 0xff, buffer.bytes()) : Status();
  };
  MLA_RETURN_IF_ERROR(allocate(result->q, layout.q, 2));
  MLA_RETURN_IF_ERROR(allocate(result->kv_cache, layout.kv_cache,
                               static_cast<size_t>(problem.cache_element_bytes())));
  MLA_RETURN_IF_ERROR(allocate(result->out, layout.out, 2));
  MLA_RETURN_IF_ERROR(allocate(result->lse, layout.lse, sizeof(float)));
  const auto generate = MLA_ON_MACHINE(machine, launch_generate);
  MLA_RETURN_IF_ERROR(generate(problem, data.spec.seed, data.spec.data, data.spec.scale_rule,
                               page_sequence.as<int32_t>(), page_position.as<int32_t>(),
                               needles.as<Needle>(), needle_begin.as<int32_t>(),
                               result->tensors()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  return result->poison_outputs(machine);
}

}  // namespace mla
