// The GPU model as docs/demos/model.js calls it: one decode of a toy shape, on the model, compared with the reference.
#include <fmt/format.h>

#include <exception>
#include <string>

#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/compare.h"
#include "reference/testing/data_generator.h"
#include "stages/common/stage.h"

int barrier_left_out = 0;

namespace mla {
namespace {

std::string result;

Status run(const Stage& stage, const DecodeCase& spec) {
  const DataSet data = make_data_set(spec);
  MLA_RETURN_IF_ERROR(validate(data.problem));
  HostTensors host = generate(data, 1);
  Machine& machine = model_machine();
  DeviceBuffer q, cache, table, lengths, out, lse, workspace;
  const auto copy = [&](DeviceBuffer& to, const auto& from) {
    return to.assign(machine, from.data(), from.size() * sizeof(from[0]));
  };
  MLA_RETURN_IF_ERROR(copy(q, host.q));
  MLA_RETURN_IF_ERROR(copy(cache, host.kv_cache));
  MLA_RETURN_IF_ERROR(copy(table, host.block_table));
  MLA_RETURN_IF_ERROR(copy(lengths, host.seqlens_k));
  MLA_RETURN_IF_ERROR(copy(out, host.out));
  MLA_RETURN_IF_ERROR(copy(lse, host.lse));
  MLA_RETURN_IF_ERROR(allocate_workspace(stage, data.problem, &workspace));
  const Tensors tensors = data.layout().tensors(q.data(), cache.data(), table.as<int32_t>(),
                                                lengths.as<int32_t>(), out.data(), lse.as<float>());
  ReferenceResult expected;
  MLA_RETURN_IF_ERROR(reference_attention(data.problem, tensors, &expected));
  MLA_RETURN_IF_ERROR(decode(stage, data.problem, tensors, workspace));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(host.out.data(), out.data(), out.bytes()));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(host.lse.data(), lse.data(), lse.bytes()));
  const DecodeComparison found = compare_decode(data.problem, host.out, host.lse, expected);
  result = fmt::format("{}{} lse of the first row: {:.6f}.", found.ok() ? "Right. " : "Wrong. ",
                       found.describe(), host.lse.front());
  return {};
}

}  // namespace
}  // namespace mla

extern "C" {

/// Decodes. Switching fibers leaves this function in its middle, so that it has no value: model_result() says how it ended.
/// @param stage     place among those that are here: 01 is 0
/// @param left_out  line of the barrier that is left out; 0: none
void model_run(int stage, int heads, int tokens, double seed, int races, int left_out) {
  mla::DecodeCase spec;
  spec.batch = 1;
  spec.num_heads_q = heads;
  spec.lengths = {tokens};
  gpu_model::schedule().seed = static_cast<uint64_t>(seed);
  gpu_model::schedule().detect_races = races != 0;
  barrier_left_out = left_out;
  mla::result.clear();
  const mla::Status status =
      mla::run(mla::stages(mla::MachineKind::kModel)[static_cast<size_t>(stage)], spec);
  if (!status.ok()) mla::result = status.message();
}

const char* model_result() {
  return mla::result.c_str();
}

/// What an exception says that came through to JavaScript, where it is a pointer.
const char* model_what(const std::exception* exception) {
  return exception->what();
}
}
