#include "stages/common/cache/paging_check.h"

namespace mla {

namespace gpu {
Status launch_paging_check(const Problem&, const Tensors&, const SequenceShares&,
                           unsigned long long*, Stream);
}
namespace model {
Status launch_paging_check(const Problem&, const Tensors&, const SequenceShares&,
                           unsigned long long*, Stream);
}

namespace {
Status check_share(const ContextShare& share) {
  if (share.pages_per_turn >= 1 && share.rank >= 0 && share.rank < share.ranks) return {};
  return {StatusCode::kInvalidArgument,
          "share: rank = " + std::to_string(share.rank) +
              " must be in [0, ranks = " + std::to_string(share.ranks) +
              "), pages_per_turn = " + std::to_string(share.pages_per_turn) + " at least 1"};
}
}  // namespace

Status check_paging(Machine& machine, const Problem& problem, const int32_t* block_table,
                    const int32_t* seqlens_k, Stream stream, int64_t block_table_stride) {
  return check_paging(machine, problem, ContextShare(), block_table, seqlens_k, stream,
                      block_table_stride);
}

Status check_paging(Machine& machine, const Problem& problem, const ContextShare& share,
                    const int32_t* block_table, const int32_t* seqlens_k, Stream stream,
                    int64_t block_table_stride, const int32_t* first_ranks) {
  MLA_RETURN_IF_ERROR(validate(problem));
  MLA_RETURN_IF_ERROR(check_share(share));
  if (problem.batch == 0) return {};
  if (block_table == nullptr || seqlens_k == nullptr) {
    return {StatusCode::kInvalidArgument,
            std::string(block_table == nullptr ? "block_table" : "seqlens_k") + " is null"};
  }
  Tensors tensors;
  tensors.block_table = block_table;
  tensors.block_table_stride = block_table_stride;
  tensors.seqlens_k = seqlens_k;
  Problem own = problem;
  own.max_pages_per_seq =
      share_columns(problem.max_pages_per_seq, share.ranks, share.pages_per_turn);
  tensors = with_strides(own, tensors);
  constexpr unsigned long long kNone = ~0ull;
  unsigned long long first = kNone;
  DeviceBuffer verdict;
  MLA_RETURN_IF_ERROR(verdict.allocate(machine, sizeof(first)));
  MLA_RETURN_IF_ERROR(machine.fill(verdict.data(), 0xff, sizeof(first), stream));  // kNone
  const auto launch = MLA_ON_MACHINE(machine, launch_paging_check);
  MLA_RETURN_IF_ERROR(
      launch(problem, tensors, {share, first_ranks}, verdict.as<unsigned long long>(), stream));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(&first, verdict.data(), sizeof(first), stream));
  if (first == kNone) return {};

  const int sequence = static_cast<int>(first >> 32);
  const int64_t place = static_cast<int64_t>(first & 0xffffffff);
  int32_t value = 0;
  if (place == 0) {
    MLA_RETURN_IF_ERROR(machine.copy_to_host(&value, seqlens_k + sequence, sizeof(value), stream));
    return {StatusCode::kOutOfRange, "seqlens_k[" + std::to_string(sequence) +
                                         "] = " + std::to_string(value) + " must be in [0, " +
                                         std::to_string(problem.max_seqlen_k()) + "]"};
  }
  const int64_t slot = place - 1;
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(&value, tensors.table_row(sequence) + slot, sizeof(value), stream));
  return {StatusCode::kOutOfRange,
          "block_table[" + std::to_string(sequence) + ", " + std::to_string(slot) + "] = " +
              std::to_string(value) + " must be in [0, " + std::to_string(problem.num_pages) + ")"};
}

}  // namespace mla
