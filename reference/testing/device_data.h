/// @file
/// Test data made on the machine that uses it: the generator of reference/testing/data_generator.h
/// as a kernel.
#pragma once

#include "reference/testing/data_generator.h"
#include "stages/common/machine/machine.h"

namespace mla {

/// A data set's tensors in a machine's memory.
struct DeviceTensors {
  DeviceBuffer q, kv_cache, block_table, seqlens_k, out, lse;  ///< Of the sizes in `layout`.
  Layout layout;                                               ///< Where in them the tensors lie.
  /// The tensors in these buffers.
  Tensors tensors() const;
  /// Fills out and lse with NaN: every byte is 0xff.
  /// @return The machine's errors.
  Status poison_outputs(Machine& machine);
};

/// Makes q and the cache on the machine, equal to generate(data) to the bit, and copies the tables.
/// Outputs are NaN.
/// @return validate()'s errors for the problem, or the machine's.
Status generate_on_device(Machine& machine, const DataSet& data, DeviceTensors* result);

}  // namespace mla
