namespace mla { extern int mutant; }
#include "stages/common/parallel/share.h"

#include <string>

namespace mla {

Status share_heads(const Problem& problem, int rank, int ranks, HeadShare* share) {
  if ((::mla::mutant == 721 ? (false) : (rank < 0 || rank >= ranks))) {
    return {StatusCode::kInvalidArgument, "rank = " + std::to_string(rank) +
                                              " must be in [0, ranks = " + std::to_string(ranks) +
                                              ")"};
  }
  const int heads_q = problem.num_heads_q, heads_kv = problem.num_heads_kv;
  if ((::mla::mutant == 722 ? (false) : (heads_q % ranks != 0))) {
    return {StatusCode::kInvalidArgument,
            "num_heads_q = " + std::to_string(heads_q) +
                " must be a multiple of ranks = " + std::to_string(ranks)};
  }
  if ((::mla::mutant == 723 ? (false) : (heads_kv % ranks != 0 && ranks % heads_kv != 0))) {
    return {StatusCode::kInvalidArgument,
            "num_heads_kv = " + std::to_string(heads_kv) +
                " must be a multiple of ranks = " + std::to_string(ranks) + ", or divide it"};
  }
  share->num_q = heads_q / ranks;
  share->first_q = rank * share->num_q;
  share->num_kv = heads_kv > ranks ? (::mla::mutant == 724 ? (1) : (heads_kv / ranks)) : 1;
  share->first_kv = (::mla::mutant == 725 ? (0) : (share->first_q / problem.group_size()));
  return {};
}

}  // namespace mla
