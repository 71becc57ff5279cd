#include "reference/testing/oracle.h"

#include <algorithm>

namespace mla {

namespace gpu {
Status launch_oracle(const Problem&, const Tensors&, const QueryRow*, int64_t, unsigned, double*,
                     double*, double*, double*, RowSize*);
}
namespace model {
Status launch_oracle(const Problem&, const Tensors&, const QueryRow*, int64_t, unsigned, double*,
                     double*, double*, double*, RowSize*);
}

Status oracle_decode(Machine& machine, const Problem& problem, const Tensors& tensors,
                     std::span<const QueryRow> rows, ReferenceResult* result) {
  MLA_RETURN_IF_ERROR(validate(problem));
  const int64_t items = static_cast<int64_t>(rows.size()) * problem.num_heads_q;
  if (items == 0) {
    *result = {};
    return {};
  }
  // Enough blocks to fill any GPU; their scores stay under 4 GiB.
  const int64_t score_bytes = 2 * problem.max_seqlen_k() * static_cast<int64_t>(sizeof(double));
  const auto grid = static_cast<unsigned>(
      std::min(items, std::clamp<int64_t>((int64_t{4} << 30) / score_bytes, 1, 2048)));

  DeviceBuffer device_rows, scores, out, lse, out_size, row_size;
  MLA_RETURN_IF_ERROR(device_rows.assign(machine, rows.data(), rows.size_bytes()));
  MLA_RETURN_IF_ERROR(scores.allocate(machine, static_cast<size_t>(grid * score_bytes)));
  MLA_RETURN_IF_ERROR(out.allocate(machine, static_cast<size_t>(items) * kHeadDimV * 8));
  MLA_RETURN_IF_ERROR(lse.allocate(machine, static_cast<size_t>(items) * 8));
  MLA_RETURN_IF_ERROR(out_size.allocate(machine, out.bytes()));
  MLA_RETURN_IF_ERROR(row_size.allocate(machine, static_cast<size_t>(items) * sizeof(RowSize)));
  const auto launch = MLA_ON_MACHINE(machine, launch_oracle);
  MLA_RETURN_IF_ERROR(launch(problem, with_strides(problem, tensors), device_rows.as<QueryRow>(),
                             items, grid, scores.as<double>(), out.as<double>(), lse.as<double>(),
                             out_size.as<double>(), row_size.as<RowSize>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  const auto fetch = [&](const DeviceBuffer& from, auto* to) {
    to->resize(from.bytes() / sizeof((*to)[0]));
    return machine.copy_to_host(to->data(), from.data(), from.bytes());
  };
  MLA_RETURN_IF_ERROR(fetch(out, &result->out));
  MLA_RETURN_IF_ERROR(fetch(lse, &result->lse));
  MLA_RETURN_IF_ERROR(fetch(out_size, &result->out_size));
  return fetch(row_size, &result->row_size);
}

Status oracle_decode(Machine& machine, const Problem& problem, const Tensors& tensors,
                     ReferenceResult* result) {
  std::vector<QueryRow> rows;
  for (int sequence = 0; sequence < problem.batch; ++sequence) {
    for (int query = 0; query < problem.seqlen_q; ++query) rows.push_back({sequence, query});
  }
  ReferenceResult by_row;
  MLA_RETURN_IF_ERROR(oracle_decode(machine, problem, tensors, rows, &by_row));
  // [batch, seqlen_q, num_heads_q] to [batch, num_heads_q, seqlen_q]
  result->lse.resize(by_row.lse.size());
  for (int64_t i = 0; i < static_cast<int64_t>(by_row.lse.size()); ++i) {
    const int64_t head = i % problem.num_heads_q,
                  query = i / problem.num_heads_q % problem.seqlen_q,
                  sequence = i / problem.num_heads_q / problem.seqlen_q;
    result->lse[static_cast<size_t>((sequence * problem.num_heads_q + head) * problem.seqlen_q +
                                    query)] = by_row.lse[static_cast<size_t>(i)];
  }
  result->out = std::move(by_row.out);
  result->out_size = std::move(by_row.out_size);
  result->row_size = std::move(by_row.row_size);
  return {};
}

}  // namespace mla
