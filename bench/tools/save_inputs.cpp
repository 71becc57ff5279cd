#include "bench/tools/save_inputs.h"

#include <filesystem>
#include <limits>
#include <span>
#include <vector>

#include "bench/measure/truth.h"
#include "bench/measure/write_file.h"
#include "bench/tools/npy.h"

namespace mla::bench {
Status save_inputs(Machine& machine, const DecodeCase& spec, const std::string& folder) {
  MLA_RETURN_IF_ERROR(check_writable((std::filesystem::path(folder) / "q.npy").string()));
  const DataSet data = make_data_set(spec);
  const Problem& problem = data.problem;
  MLA_RETURN_IF_ERROR(validate(problem));
  DeviceTensors tensors;
  MLA_RETURN_IF_ERROR(generate_on_device(machine, data, &tensors));
  Truth truth;
  constexpr double kMuch = std::numeric_limits<double>::infinity();  // so that rows are chosen
  MLA_RETURN_IF_ERROR(truth.evaluate(machine, data, tensors, kMuch));
  std::vector<QueryRow> rows = truth.rows();
  for (int i = 0; truth.whole() && i < problem.batch * problem.seqlen_q; ++i) {
    rows.push_back({i / problem.seqlen_q, i % problem.seqlen_q});
  }
  std::vector<int32_t> places;
  for (const QueryRow& row : rows) places.insert(places.end(), {row.sequence, row.query});

  std::vector<std::byte> q, cache;
  MLA_RETURN_IF_ERROR(fetch(machine, tensors.q, &q));
  MLA_RETURN_IF_ERROR(fetch(machine, tensors.kv_cache, &cache));
  const int64_t batch = problem.batch, heads = problem.num_heads_q;
  const auto count = static_cast<int64_t>(rows.size());
  const auto file = [&](const char* name, npy::Type type, std::vector<int64_t> shape,
                        const auto& values) {
    return npy::Output{(std::filesystem::path(folder) / name).string(), type, std::move(shape),
                       std::as_bytes(std::span(values))};
  };
  const npy::Output outputs[] = {
      file("q.npy", npy::Type::kUInt16, {batch, problem.seqlen_q, heads, kHeadDimQK}, q),
      file("cache.npy", is_quantised(problem.cache_format) ? npy::Type::kUInt8 : npy::Type::kUInt16,
           {problem.num_pages, problem.page_size, problem.num_heads_kv,
            problem.cache_row_elements()},
           cache),
      file("block_table.npy", npy::Type::kInt32, {batch, problem.max_pages_per_seq},
           data.block_table),
      file("seqlens.npy", npy::Type::kInt32, {batch}, data.seqlens_k),
      file("rows.npy", npy::Type::kInt32, {count, 2}, places),
      file("out.npy", npy::Type::kFloat64, {count, heads, kHeadDimV}, truth.expected().out)};
  return npy::write(outputs);
}

}  // namespace mla::bench
