/// @file
/// Runs a stage on the tensors of a dump.
#pragma once

#include <vector>

#include "bench/measure/limits.h"
#include "bench/measure/statistics.h"
#include "bench/measure/truth.h"
#include "bench/tools/mla_run.h"
#include "reference/testing/device_data.h"

namespace mla::bench {

/// Out and lse on the host.
struct Output {
  std::vector<uint16_t> out;
  std::vector<float> lse;
};

/// Runs a stage on tensors held on its machine.
class StageRunner {
 public:
  /// Copies the tensors to the machine.
  Status prepare(const Placement& placement, const Dump& dump) {
    stage_ = placement.stage;
    machine_ = placement.machine;
    problem_ = dump.problem;
    const Tensors host = dump.tensors();
    device_.layout = dump.layout();
    const Layout& at = device_.layout;
    const auto bytes = [](int64_t elements, size_t size) {
      return static_cast<size_t>(elements) * size;
    };
    MLA_RETURN_IF_ERROR(device_.q.assign(*machine_, host.q, bytes(at.q, 2)));
    MLA_RETURN_IF_ERROR(device_.kv_cache.assign(
        *machine_, host.kv_cache,
        bytes(at.kv_cache, static_cast<size_t>(problem_.cache_element_bytes()))));
    MLA_RETURN_IF_ERROR(device_.block_table.assign(*machine_, host.block_table - at.begin,
                                                   bytes(at.block_table, 4)));
    MLA_RETURN_IF_ERROR(
        device_.seqlens_k.assign(*machine_, host.seqlens_k - at.begin, bytes(at.seqlens_k, 4)));
    MLA_RETURN_IF_ERROR(device_.out.allocate(*machine_, bytes(at.out, 2)));
    MLA_RETURN_IF_ERROR(device_.lse.allocate(*machine_, bytes(at.lse, 4)));
    return allocate_workspace(*stage_, problem_, &workspace_);
  }

  /// One decode into outputs full of NaN, by the host's clock, waiting included.
  Status run(double* seconds) {
    MLA_RETURN_IF_ERROR(device_.poison_outputs(*machine_));
    if (workspace_.bytes() > 0) {  // nothing that the run before left
      MLA_RETURN_IF_ERROR(machine_->fill(workspace_.data(), 0xff, workspace_.bytes()));
    }
    MLA_RETURN_IF_ERROR(machine_->synchronize());
    const auto start = WallClock::now();
    MLA_RETURN_IF_ERROR(decode(*stage_, problem_, device_.tensors(), workspace_));
    MLA_RETURN_IF_ERROR(machine_->synchronize());
    *seconds = seconds_since(start);
    return {};
  }

  /// Copies the outputs back.
  Status fetch(Output* output) const {
    std::vector<uint16_t> out;
    std::vector<float> lse;
    MLA_RETURN_IF_ERROR(bench::fetch(*machine_, device_.out, &out));
    MLA_RETURN_IF_ERROR(bench::fetch(*machine_, device_.lse, &lse));
    output->out = gather_out(problem_, device_.layout, out);
    output->lse = gather_lse(problem_, device_.layout, lse);
    return {};
  }

 private:
  const Stage* stage_ = nullptr;
  Machine* machine_ = nullptr;
  Problem problem_;
  DeviceTensors device_;
  DeviceBuffer workspace_;
};

}  // namespace mla::bench
