/// @file
/// Requests for mla_service's engines, and what a step should give: the reference on a cache of the test's own, contiguous,
/// with row_of() as the only thing that it shares with an engine.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "bench/service/real_engine.h"
#include "bench/service/requests.h"
#include "reference/attention.h"
#include "reference/float16.h"
#include "reference/quantise.h"

namespace mla::bench {

/// A row as the cache of a problem keeps it.
inline void put_row(const Problem& problem, const std::vector<uint16_t>& bits, uint8_t* row) {
  if (!is_quantised(problem.cache_format)) {
    std::memcpy(row, bits.data(), kHeadDimQK * 2);
    return;
  }
  float values[kHeadDimQK];
  for (size_t i = 0; i < kHeadDimQK; ++i) values[i] = to_float(problem.dtype, bits[i]);
  quantise_row(problem, ScaleRule::kLargest, values, row);
}

/// The decode of a layer over all tokens of the step's sequences.
/// @param decoded  the problem, padded perhaps
/// @param q        its queries
/// @param problem  the one that the results belong to
inline Status expected_of(const Problem& decoded, const std::vector<uint16_t>& q,
                          const StepWork& work, int layer, Problem* problem,
                          ReferenceResult* truth) {
  const size_t batch = work.sequences.size();
  *problem = decoded;
  std::vector<int32_t> lengths;
  int64_t longest = 0;
  for (const SequenceWork& sequence : work.sequences) {
    lengths.push_back(sequence.decoded);
    longest = std::max(longest, int64_t(sequence.decoded));
  }
  lengths.resize(size_t(problem->batch));  // padding has no tokens
  problem->max_pages_per_seq = int(pages_for(longest, kDefaultPageSize));
  problem->num_pages = problem->batch * problem->max_pages_per_seq;
  std::vector<int32_t> table(size_t(problem->num_pages));
  std::iota(table.begin(), table.end(), 0);
  const auto row_bytes = size_t(problem->cache_row_bytes());
  std::vector<uint8_t> cache(size_t(problem->num_pages) * kDefaultPageSize * row_bytes, 0xFF);
  for (size_t i = 0; i < batch; ++i) {
    for (int32_t token = 0; token < lengths[i]; ++token) {
      const auto row = pool_row(row_of(work.sequences[i], token) + layer);
      const int64_t place = int64_t(i) * problem->max_seqlen_k() + token;
      put_row(*problem, row, &cache[size_t(place) * row_bytes]);
    }
  }
  const Tensors host{.q = q.data(),
                     .kv_cache = cache.data(),
                     .block_table = table.data(),
                     .seqlens_k = lengths.data()};
  return reference_attention(*problem, host, truth, 1);
}

/// Requests before those at random. The ids make the rows of request 7 wrap around the pool. There is an empty prompt, one
/// that ends where a page does, and one that grows into a page that is not there. Those that are long enough begin with the
/// first of the shared prefixes, if there are any.
inline std::vector<Request> first_requests(const SharedPrefixes& prefixes) {
  std::vector<Request> first{{.id = 6, .prompt = 0, .output = 8},
                             {.id = 7, .prompt = 120, .output = 16},
                             {.id = 8, .prompt = 120, .output = 12},
                             {.id = 9, .prompt = 61, .output = 10},
                             {.id = 10, .prompt = 190, .output = 4, .generated = 2}};
  for (Request& request : first) {
    if (prefixes.count == 0 || request.prompt < prefixes.tokens) continue;
    request.prefix = 0;
    request.prefix_tokens = prefixes.tokens;
  }
  return first;
}

}  // namespace mla::bench
