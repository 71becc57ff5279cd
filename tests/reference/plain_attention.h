/// @file
/// The decode contract as plain loops in long double, without Eigen and without the reference's code.
/// The tests check the reference against it, and put faults into it on purpose.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/problem.h"
#include "tests/reference/code_values.h"

namespace mla::test {

/// value_of() of all patterns.
inline const std::array<double, 65536>& value_table(DType dtype) {
  const auto make = [](DType type) {
    std::array<double, 65536> values;
    for (int bits = 0; bits < 65536; ++bits) {
      values[size_t(bits)] = value_of(type, static_cast<uint16_t>(bits));
    }
    return values;
  };
  static const std::array<double, 65536> bf16 = make(DType::kBFloat16);
  static const std::array<double, 65536> fp16 = make(DType::kFloat16);
  return dtype == DType::kBFloat16 ? bf16 : fp16;
}

/// One row of q with the keys it sees, in double, and their logits.
struct PlainInputs {
  std::vector<double> q;            ///< [576]
  std::vector<double> k;            ///< [tokens, 576]
  std::vector<long double> logits;  ///< [tokens], scale * q.k
  int64_t tokens = 0;
};

inline PlainInputs gather(const Problem& problem, const Tensors& tensors, int sequence, int query,
                          int head) {
  const std::array<double, 65536>& values = value_table(problem.dtype);
  const auto* const q = static_cast<const uint16_t*>(tensors.q);
  const auto* const kv = static_cast<const uint16_t*>(tensors.kv_cache);
  const auto* const bytes = static_cast<const uint8_t*>(tensors.kv_cache);
  const CacheFormat format = problem.cache_format;
  const bool tiles = format == CacheFormat::kFp8Tile128 || format == CacheFormat::kInt8Tile128;
  const int heads_a_kv_head = problem.num_heads_q / problem.num_heads_kv;
  const int64_t length = tensors.seqlens_k[sequence];

  PlainInputs inputs;
  const int64_t q_row = (int64_t{sequence} * problem.seqlen_q + query) * problem.num_heads_q + head;
  for (int c = 0; c < 576; ++c) inputs.q.push_back(values[q[q_row * 576 + c]]);
  for (int64_t t = 0; t < length; ++t) {
    if (problem.causal && t > length - problem.seqlen_q + query) break;
    const int64_t page =
        tensors.block_table[int64_t{sequence} * problem.max_pages_per_seq + t / 64];
    const int64_t row = (page * 64 + t % 64) * problem.num_heads_kv + head / heads_a_kv_head;
    for (int c = 0; c < 576; ++c) {
      inputs.k.push_back(format == CacheFormat::k16Bit
                             ? values[kv[row * 576 + c]]
                             : quantised_value(tiles, format == CacheFormat::kInt8Tile128,
                                               problem.cache_scale,
                                               bytes + row * (tiles ? 656 : 576), c));
    }
    long double dot = 0;
    const double* const k = &inputs.k[size_t(t) * 576];
    for (int c = 0; c < 576; ++c) dot += static_cast<long double>(inputs.q[size_t(c)]) * k[c];
    inputs.logits.push_back(problem.softmax_scale * dot);
    ++inputs.tokens;
  }
  return inputs;
}

struct PlainRow {
  std::vector<double> out;        ///< [512]
  std::vector<double> magnitude;  ///< [512], sum of p |v|: the measure of rounding errors
  double lse = 0;
};

/// Evaluates a row. Token t counts `times[t]` times, or once if `times` is empty. Any number but 1 is a
/// fault.
inline PlainRow evaluate(const PlainInputs& inputs, const std::vector<int>& times = {}) {
  PlainRow row;
  row.out.assign(512, 0);
  row.magnitude.assign(512, 0);
  row.lse = std::numeric_limits<double>::infinity();
  if (inputs.tokens == 0) return row;

  const long double max = *std::max_element(inputs.logits.begin(), inputs.logits.end());
  long double sum = 0;
  std::vector<long double> out(512), magnitude(512);
  for (int64_t t = 0; t < inputs.tokens; ++t) {
    const int count = times.empty() ? 1 : times[size_t(t)];
    if (count == 0) continue;
    const long double p = count * std::exp(inputs.logits[size_t(t)] - max);
    sum += p;
    const double* const v = &inputs.k[size_t(t) * 576];
    for (int c = 0; c < 512; ++c) {
      out[size_t(c)] += p * v[c];
      magnitude[size_t(c)] += p * std::abs(v[c]);
    }
  }
  for (size_t c = 0; c < 512; ++c) {
    row.out[c] = static_cast<double>(out[c] / sum);
    row.magnitude[c] = static_cast<double>(magnitude[c] / sum);
  }
  row.lse = static_cast<double>(max + std::log(sum));
  return row;
}

}  // namespace mla::test
