/// @file
/// Test data made where it is used: the generator of reference/testing/data_generator.h as a kernel.
#pragma once

#include "reference/testing/data_generator.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// A data set's tensors in a machine's memory.
struct DeviceTensors {
  DeviceBuffer q, kv_cache, block_table, seqlens_k, out, lse;
  Tensors tensors() const;
  /// Fills out and lse with NaN.
  Status poison_outputs(Machine& machine);
};

/// Makes q and the cache on the machine, bit-equal to generate(data), and copies the tables.
/// Outputs are NaN.
Status generate_on_device(Machine& machine, const DataSet& data, DeviceTensors* result);

}  // namespace mla
