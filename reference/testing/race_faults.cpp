#include "reference/testing/race_faults.h"

#include <cstdint>

#include "reference/float16.h"

namespace mla {

namespace model {
std::vector<RaceFault> race_faults();
}
#ifdef MLA_HAVE_CUDA
namespace gpu {
std::vector<RaceFault> race_faults();
}
#endif

std::vector<RaceFault> race_faults([[maybe_unused]] MachineKind machine) {
#ifdef MLA_HAVE_CUDA
  if (machine == MachineKind::kGpu) return gpu::race_faults();
#endif
  return model::race_faults();
}

Status run_race_fault(Machine& machine, const RaceFault& fault, bool right) {
  const std::vector<bfloat16> numbers(kRaceFaultBytes / sizeof(bfloat16), bfloat16(0.5f));
  DeviceBuffer in, out, counter;
  MLA_RETURN_IF_ERROR(in.assign(machine, numbers.data(), kRaceFaultBytes));
  MLA_RETURN_IF_ERROR(out.allocate(machine, kRaceFaultBytes));
  const unsigned zeros[2] = {};
  MLA_RETURN_IF_ERROR(counter.assign(machine, zeros, sizeof zeros));
  MLA_RETURN_IF_ERROR(
      fault.run(right, in.data(), out.data(), static_cast<unsigned*>(counter.data())));
  return machine.synchronize();
}

}  // namespace mla
