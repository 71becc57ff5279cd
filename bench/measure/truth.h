/// @file
/// What a decode should have given, and whether it did.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/attention.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"

namespace mla::bench {

/// Up to this much work a result is checked whole; beyond, in 64 seeded (sequence, query) rows with
/// all their heads.
inline constexpr double kWholeCheckFlop = 50e9;
inline constexpr int kCheckedRows = 64;

/// Copies a buffer of a machine to the host.
template <typename T>
Status fetch(Machine& machine, const DeviceBuffer& buffer, std::vector<T>* values) {
  values->resize(buffer.bytes() / sizeof(T));
  return machine.copy_to_host(values->data(), buffer.data(), buffer.bytes());
}

/// The rows to check: empty if all are. The longest sequence is always among them.
std::vector<QueryRow> checked_rows(const DataSet& data, double flop);

/// The fp64 truth about one data set.
class Truth {
 public:
  /// Evaluates it: whole results with the CPU reference, chosen rows on the machine where it is a
  /// GPU (and the build has the fp64 kernel). `tensors` holds `data` on `machine`.
  Status evaluate(Machine& machine, const DataSet& data, const DeviceTensors& tensors, double flop);

  /// Whether `evaluate` would take long here: no fp64 kernel, and this much work for the CPU.
  static bool is_slow(const Machine& machine, const DataSet& data, double flop);

  /// Whether `evaluate` has the CPU reference compute the whole result, whose wall time then is a
  /// figure of its own.
  static bool by_reference(MachineKind machine, const DataSet& data, double flop);

  /// Compares the outputs that lie in `tensors`. `fingerprint`: a hash of all their bits, for
  /// later.
  Status compare(Machine& machine, const DataSet& data, const DeviceTensors& tensors,
                 DecodeComparison* comparison, uint64_t* fingerprint) const;

  /// Whether the whole result is checked.
  bool whole() const { return rows_.empty(); }
  /// The rows that are checked; empty: all.
  const std::vector<QueryRow>& rows() const { return rows_; }
  /// What they should give.
  const ReferenceResult& expected() const { return expected_; }
  /// Wall time of the CPU reference over the whole result; kUnknown if it was not run so.
  double reference_seconds() const { return reference_seconds_; }

 private:
  std::vector<QueryRow> rows_;  ///< What expected_ holds; empty: the whole, in its own layout
  ReferenceResult expected_;
  double reference_seconds_ = 0;
};

/// A hash of the bits of out and lse.
Status fingerprint_outputs(Machine& machine, const DeviceTensors& tensors, uint64_t* fingerprint);

}  // namespace mla::bench
