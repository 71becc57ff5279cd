#include "bench/measure/truth.h"

#include <algorithm>
#include <random>

#include "bench/measure/statistics.h"
#include "reference/testing/oracle.h"

namespace mla::bench {
namespace {

/// What the outputs' buffers hold, on the host.
struct Outputs {
  std::vector<uint16_t> out;
  std::vector<float> lse;

  Status fetch(Machine& machine, const DeviceTensors& tensors) {
    MLA_RETURN_IF_ERROR(bench::fetch(machine, tensors.out, &out));
    return bench::fetch(machine, tensors.lse, &lse);
  }

  uint64_t fingerprint() const {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    const auto add = [&](const auto& values) {
      for (const auto& value : values) {
        uint32_t bits = 0;
        std::copy_n(reinterpret_cast<const unsigned char*>(&value), sizeof value,
                    reinterpret_cast<unsigned char*>(&bits));
        hash = (hash ^ bits) * 0x100000001b3u;
      }
    };
    add(out);
    add(lse);
    return hash;
  }

  /// Only the chosen rows: out [rows, num_heads_q, 512], lse [rows, num_heads_q].
  Outputs select(const Problem& problem, const std::vector<QueryRow>& rows) const {
    Outputs chosen;
    const int64_t heads = problem.num_heads_q;
    for (const QueryRow& row : rows) {
      const int64_t index = int64_t{row.sequence} * problem.seqlen_q + row.query;
      const auto first = out.begin() + index * heads * kHeadDimV;
      chosen.out.insert(chosen.out.end(), first, first + heads * kHeadDimV);
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t place = (row.sequence * heads + head) * problem.seqlen_q + row.query;
        chosen.lse.push_back(lse[static_cast<size_t>(place)]);
      }
    }
    return chosen;
  }
};

/// Whole results of up to kCheckedRows rows may exceed kWholeCheckFlop; the CPU does so much and no
/// more.
constexpr double kReferenceFlop = 80e9;

}  // namespace

std::vector<QueryRow> checked_rows(const DataSet& data, double flop) {
  const int seqlen_q = data.problem.seqlen_q;
  const int64_t count = int64_t{data.problem.batch} * seqlen_q;
  if (flop <= kWholeCheckFlop || count <= kCheckedRows) return {};
  const auto longest =
      std::max_element(data.seqlens_k.begin(), data.seqlens_k.end()) - data.seqlens_k.begin();
  std::vector<QueryRow> rows{{static_cast<int>(longest), seqlen_q - 1}};
  std::mt19937_64 random(data.spec.seed + 1);
  while (rows.size() < kCheckedRows) {
    const auto index = static_cast<int>(random() % static_cast<uint64_t>(count));
    const QueryRow row{index / seqlen_q, index % seqlen_q};
    const bool known = std::any_of(rows.begin(), rows.end(), [&](const QueryRow& other) {
      return other.sequence == row.sequence && other.query == row.query;
    });
    if (!known) rows.push_back(row);
  }
  return rows;
}

bool Truth::is_slow(const Machine& machine, const DataSet& data, double flop) {
  const bool on_cpu = machine.kind() == MachineKind::kModel;
  const auto rows = static_cast<double>(checked_rows(data, flop).size());
  const double share = rows == 0 ? 1 : rows / (data.problem.batch * data.problem.seqlen_q);
  return on_cpu && flop * share > 5e9;
}

bool Truth::by_reference(MachineKind machine, const DataSet& data, double flop) {
  if (!checked_rows(data, flop).empty()) return false;
  // The CPU reference has a row in the table, so it evaluates what it can do whole, once.
  const bool for_table = flop <= kReferenceFlop && data.spec.data == DataKind::kFlat;
  return machine == MachineKind::kModel || for_table;
}

Status Truth::evaluate(Machine& machine, const DataSet& data, const DeviceTensors& tensors,
                       double flop) {
  rows_ = checked_rows(data, flop);
  reference_seconds_ = kUnknown;
  if (machine.kind() == MachineKind::kGpu && !by_reference(machine.kind(), data, flop)) {
    if (rows_.empty()) return oracle_decode(machine, data.problem, tensors.tensors(), &expected_);
    return oracle_decode(machine, data.problem, tensors.tensors(), rows_, &expected_);
  }
  std::vector<uint16_t> q, kv_cache;
  MLA_RETURN_IF_ERROR(fetch(machine, tensors.q, &q));
  MLA_RETURN_IF_ERROR(fetch(machine, tensors.kv_cache, &kv_cache));
  const std::vector<int32_t> table = data.table_buffer(), lengths = data.length_buffer();
  const Tensors host = tensors.layout.tensors(q.data(), kv_cache.data(), table.data(),
                                              lengths.data(), nullptr, nullptr);
  if (!rows_.empty()) {
    return reference_attention_rows(data.problem, host, rows_, &expected_);
  }
  const auto begin = WallClock::now();
  MLA_RETURN_IF_ERROR(reference_attention(data.problem, host, &expected_));
  reference_seconds_ = seconds_since(begin);
  return {};
}

Status Truth::compare(Machine& machine, const DataSet& data, const DeviceTensors& tensors,
                      DecodeComparison* comparison, uint64_t* fingerprint) const {
  Outputs outputs;
  MLA_RETURN_IF_ERROR(outputs.fetch(machine, tensors));
  *fingerprint = outputs.fingerprint();
  outputs.out = gather_out(data.problem, tensors.layout, outputs.out);
  outputs.lse = gather_lse(data.problem, tensors.layout, outputs.lse);
  if (!rows_.empty()) outputs = outputs.select(data.problem, rows_);
  *comparison = compare_decode(data.problem, outputs.out, outputs.lse, expected_, rows_);
  return {};
}

Status fingerprint_outputs(Machine& machine, const DeviceTensors& tensors, uint64_t* fingerprint) {
  Outputs outputs;
  MLA_RETURN_IF_ERROR(outputs.fetch(machine, tensors));
  *fingerprint = outputs.fingerprint();
  return {};
}

}  // namespace mla::bench
