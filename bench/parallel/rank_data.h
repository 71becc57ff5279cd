/// @file
/// What one of several ranks holds of a problem, made from the data set of the whole.
#pragma once

#include <string>
#include <vector>

#include "reference/attention.h"
#include "reference/testing/compare.h"
#include "reference/testing/device_data.h"
#include "stages/common/parallel/parallel.h"

namespace mla::bench {

/// How ranks share a problem. Their number is the product of the three.
struct Division {
  int pages =
      1;  ///< Context parallel: this many ranks share the pages of the same heads and sequences.
  int heads = 1;              ///< Tensor parallel.
  int batch = 1;              ///< Every rank has sequences of its own.
  ParallelSettings settings;  ///< Of those that share pages; pages_per_turn 0: one run for each.

  int ranks() const { return pages * heads * batch; }
  /// Ranks that share pages are neighbours: 0 ... pages - 1 are the first group.
  int group(int rank) const { return rank / pages; }
};

/// A rank's part of a data set, in a machine's memory, as decode_parallel() takes it.
struct RankData {
  Problem problem;  ///< Of the rank's sequences and heads; all their pages.
  ParallelSettings settings;
  Tensors tensors;  ///< Outputs of the heads that the rank gets.
  DeviceTensors device;
  DeviceBuffer out, lse;
  double cache_bytes = 0;  ///< Of the rank's pages.

  int first_sequence = 0;
  int first_head = 0;  ///< Of the outputs.
};

/// Makes q, which all ranks have, and the rank's own pages. Values are those of the whole data set.
/// @return kInvalidArgument for a division that does not fit the problem; the machine's errors
Status make_rank_data(Machine& machine, const DataSet& whole, const Division& division, int rank,
                      RankData* result);

/// Compares the rank's outputs with the same part of what the whole should give.
/// @param rows  of `expected`; empty: all
/// @return ok, or kInvalidArgument with what differs
Status compare_rank(Machine& machine, const DataSet& whole, const RankData& data,
                    const ReferenceResult& expected, const std::vector<QueryRow>& rows,
                    bool is_merged);

/// A rank's outputs, copied to the host.
struct RankOutputs {
  std::vector<uint16_t> out;
  std::vector<float> lse;
};
Status read_outputs(Machine& machine, const RankData& data, RankOutputs* outputs);

/// Compares bits: a decode that is repeated has the same.
/// @return ok, or kInvalidArgument with what differs
Status same_bits(const RankOutputs& first, const RankOutputs& second);

}  // namespace mla::bench
