#include "bench/parallel/rank_data.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace mla::bench {
namespace {

/// The data set of the pages that a rank holds, of all heads and sequences `first` ... `end` - 1.
DataSet part_of(const DataSet& whole, const ContextShare& share, int first, int end) {
  const Problem& problem = whole.problem;
  const auto row_of = [&](int sequence) {
    return whole.block_table.begin() + int64_t{sequence} * problem.max_pages_per_seq;
  };
  const int columns = share_columns(problem.max_pages_per_seq, share.ranks, share.pages_per_turn);
  DataSet part = whole;
  part.problem.max_pages_per_seq = columns;
  part.block_table.assign(static_cast<size_t>(problem.batch) * static_cast<size_t>(columns),
                          kGarbagePage);
  part.needles.clear();
  // In the order of the whole cache, so that pages of a sequence lie apart here, too.
  std::vector<std::pair<int32_t, std::pair<int, int>>> pages;
  for (int sequence = first; sequence < end; ++sequence) {
    const int64_t count =
        pages_for(whole.seqlens_k[static_cast<size_t>(sequence)], problem.page_size);
    const int64_t mine = share.pages(count);
    for (int64_t column = 0; column < mine; ++column) {
      pages.push_back(
          {*(row_of(sequence) + share.page_in(column)), {sequence, static_cast<int>(column)}});
    }
  }
  std::sort(pages.begin(), pages.end());
  part.page_sequence.clear();
  part.page_position.clear();
  for (const auto& [page, place] : pages) {
    const auto [sequence, column] = place;
    part.block_table[static_cast<size_t>(sequence) * static_cast<size_t>(columns) +
                     static_cast<size_t>(column)] = static_cast<int32_t>(part.page_sequence.size());
    part.page_sequence.push_back(sequence);
    part.page_position.push_back(static_cast<int32_t>(share.page_in(column)));
  }
  part.page_sequence.push_back(-1);  // nobody's: NaN
  part.page_position.push_back(-1);
  part.problem.num_pages = static_cast<int>(part.page_sequence.size());
  // A needle is planted where the table leads; in a quantised cache its token is asked for.
  for (int sequence = 0; sequence < problem.batch; ++sequence) {
    part.needle_begin[static_cast<size_t>(sequence)] = static_cast<int32_t>(part.needles.size());
    for (int n = whole.needle_begin[static_cast<size_t>(sequence)];
         sequence >= first && sequence < end &&
         n < whole.needle_begin[static_cast<size_t>(sequence) + 1];
         ++n) {
      Needle needle = whole.needles[static_cast<size_t>(n)];
      const int page = needle.token / problem.page_size;
      if (share.owner(page) != share.rank) continue;
      if (!is_quantised(problem.cache_format)) {
        needle.token = static_cast<int32_t>(share.pages(page)) * problem.page_size +
                       needle.token % problem.page_size;
      }
      part.needles.push_back(needle);
    }
  }
  part.needle_begin.back() = static_cast<int32_t>(part.needles.size());
  return part;
}

}  // namespace

Status make_rank_data(Machine& machine, const DataSet& whole, const Division& division, int rank,
                      RankData* result) {
  const Problem& problem = whole.problem;
  MLA_RETURN_IF_ERROR(validate(problem));
  if (problem.batch < division.batch) {
    return {StatusCode::kInvalidArgument, "batch = " + std::to_string(problem.batch) +
                                              " is less than the ranks that share it, " +
                                              std::to_string(division.batch)};
  }
  result->settings = division.settings;
  if (result->settings.pages_per_turn == 0) {
    result->settings.pages_per_turn = contiguous_pages(problem.max_pages_per_seq, division.pages);
  }
  const int group = division.group(rank), in_group = rank % division.pages;
  HeadShare heads;
  MLA_RETURN_IF_ERROR(share_heads(problem, group % division.heads, division.heads, &heads));
  const auto first_of = [&](int64_t which) {
    return static_cast<int>(which * problem.batch / division.batch);
  };
  const int first = first_of(group / division.heads), end = first_of(group / division.heads + 1);

  const ContextShare share = {in_group, division.pages, result->settings.pages_per_turn};
  const DataSet part = part_of(whole, share, first, end);
  MLA_RETURN_IF_ERROR(generate_on_device(machine, part, &result->device));
  result->cache_bytes = static_cast<double>(result->device.kv_cache.bytes());

  result->problem = part.problem;
  result->problem.batch = end - first;
  result->problem.num_heads_q = heads.num_q;
  result->problem.num_heads_kv = heads.num_kv;
  result->problem.max_pages_per_seq = problem.max_pages_per_seq;
  result->first_sequence = first;
  result->first_head = heads.first_q;
  Tensors tensors = with_strides(part.problem, result->device.tensors());
  const int64_t bytes = sizeof(uint16_t);
  tensors.q = static_cast<const char*>(tensors.q) +
              (first * tensors.q_strides.batch + heads.first_q * tensors.q_strides.head) * bytes;
  tensors.kv_cache = static_cast<const char*>(tensors.kv_cache) +
                     heads.first_kv * tensors.kv_strides.head * problem.cache_element_bytes();
  tensors.block_table += first * tensors.block_table_stride;
  tensors.seqlens_k += first;
  Problem outputs = result->problem;
  if (division.pages > 1 && result->settings.exchange != Exchange::kAllGather) {
    if (heads.num_q % division.pages != 0) {
      return {StatusCode::kInvalidArgument, "num_heads_q = " + std::to_string(heads.num_q) +
                                                " must be a multiple of " +
                                                std::to_string(division.pages) + " ranks for " +
                                                to_string(result->settings.exchange)};
    }
    outputs.num_heads_q /= division.pages;
    outputs.num_heads_kv = 1;
    result->first_head += in_group * outputs.num_heads_q;
  }
  MLA_RETURN_IF_ERROR(
      result->out.allocate(machine, static_cast<size_t>(outputs.out_elements()) * 2));
  MLA_RETURN_IF_ERROR(
      result->lse.allocate(machine, static_cast<size_t>(outputs.lse_elements()) * 4));
  MLA_RETURN_IF_ERROR(machine.fill(result->out.data(), 0xff, result->out.bytes()));
  MLA_RETURN_IF_ERROR(machine.fill(result->lse.data(), 0xff, result->lse.bytes()));
  tensors.out = result->out.data();
  tensors.lse = result->lse.as<float>();
  tensors.out_strides = {};
  tensors.lse_strides = {};
  result->tensors = tensors;
  return machine.synchronize();
}

Status read_outputs(Machine& machine, const RankData& data, RankOutputs* outputs) {
  outputs->out.resize(data.out.bytes() / sizeof(uint16_t));
  outputs->lse.resize(data.lse.bytes() / sizeof(float));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(outputs->out.data(), data.out.data(), data.out.bytes()));
  return machine.copy_to_host(outputs->lse.data(), data.lse.data(), data.lse.bytes());
}

Status same_bits(const RankOutputs& first, const RankOutputs& second) {
  const auto compare = [](const char* name, const auto& one, const auto& other) -> Status {
    if (one.size() == other.size()) {
      size_t i = 0;
      const auto is_same = [&] {  // bits, not values
        const void *a = &one[i], *b = &other[i];
        return std::memcmp(a, b, sizeof one[i]) == 0;
      };
      while (i < one.size() && is_same()) ++i;
      if (i == one.size()) return {};
      return {StatusCode::kInvalidArgument,
              std::string(name) + "[" + std::to_string(i) + "]: a second decode has other bits"};
    }
    return {StatusCode::kInvalidArgument, std::string(name) + " has another size"};
  };
  MLA_RETURN_IF_ERROR(compare("out", first.out, second.out));
  return compare("lse", first.lse, second.lse);
}

Status compare_rank(Machine& machine, const DataSet& whole, const RankData& data,
                    const ReferenceResult& expected, const std::vector<QueryRow>& rows,
                    bool is_merged) {
  const Problem& all = whole.problem;
  const int queries = all.seqlen_q, sequences = data.problem.batch;
  const auto heads =
      static_cast<int>(data.out.bytes() / 2 / kHeadDimV / static_cast<size_t>(sequences * queries));
  RankOutputs outputs;
  MLA_RETURN_IF_ERROR(read_outputs(machine, data, &outputs));
  const auto& [out, lse] = outputs;
  std::vector<uint16_t> some_out;
  std::vector<float> some_lse;
  ReferenceResult part;
  std::vector<QueryRow> chosen = rows;
  for (int i = 0; rows.empty() && i < all.batch * queries; ++i) {
    chosen.push_back({i / queries, i % queries});
  }
  std::vector<QueryRow> kept;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int sequence = chosen[i].sequence - data.first_sequence, query = chosen[i].query;
    if (sequence < 0 || sequence >= sequences) continue;
    kept.push_back({sequence, query});
    for (int head = 0; head < heads; ++head) {
      const auto row = static_cast<size_t>((int64_t{sequence} * queries + query) * heads + head);
      const auto from =
          i * static_cast<size_t>(all.num_heads_q) + static_cast<size_t>(data.first_head + head);
      const auto copy = [](const auto& source, size_t at, auto* target) {
        if (source.empty()) return;
        target->insert(target->end(), source.begin() + static_cast<std::ptrdiff_t>(at * kHeadDimV),
                       source.begin() + static_cast<std::ptrdiff_t>((at + 1) * kHeadDimV));
      };
      copy(out, row, &some_out);
      copy(expected.out, from, &part.out);
      copy(expected.out_size, from, &part.out_size);
      if (!expected.row_size.empty()) part.row_size.push_back(expected.row_size[from]);
      some_lse.push_back(
          lse[static_cast<size_t>((int64_t{sequence} * heads + head) * queries + query)]);
      const size_t of_lse =
          rows.empty()
              ? static_cast<size_t>(
                    (chosen[i].sequence * all.num_heads_q + data.first_head + head) * queries +
                    query)
              : from;
      part.lse.push_back(expected.lse[of_lse]);
    }
  }
  if (kept.empty()) return {};
  Problem problem = data.problem;
  problem.num_heads_q = heads;
  problem.num_heads_kv = 1;
  const Comparison of_out = is_merged ? compare(problem.dtype, some_out, part.out, kHeadDimV,
                                                merged_tolerance(problem.dtype))
                                      : compare_decode(problem, some_out, some_lse, part, kept).out;
  if (!of_out.ok) return {StatusCode::kInvalidArgument, "out: " + of_out.failure};
  const Comparison of_lse = compare_lse(problem, some_lse, part, kept);
  if (!of_lse.ok) return {StatusCode::kInvalidArgument, "lse: " + of_lse.failure};
  return {};
}

}  // namespace mla::bench
