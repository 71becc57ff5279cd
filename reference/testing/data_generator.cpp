#include "reference/testing/data_generator.h"

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "reference/parallel_for.h"

namespace mla {
namespace {

using generator::Stream;

constexpr int kSeededNeedles = 14;

/// Uniform in [0, count). The modulo's bias, count / 2^64, is of no account.
int64_t draw_below(uint64_t key, int64_t index, int64_t count) {
  return static_cast<int64_t>(generator::draw(key, index) % static_cast<uint64_t>(count));
}

std::vector<int32_t> draw_lengths(const DecodeCase& spec) {
  std::vector<int32_t> lengths(static_cast<size_t>(std::max(spec.batch, 0)));
  for (size_t b = 0; b < lengths.size(); ++b) {
    const auto sequence = static_cast<int64_t>(b);
    double length = spec.seqlen_k;
    if (spec.variable_lengths) {
      const uint64_t key = generator::row_key(spec.seed, Stream::kLength, sequence, 0, 0);
      const double z = generator::normal(key, 0) / 65536.0;
      length = std::max(std::floor(spec.seqlen_k + z * spec.seqlen_k / 2), double(spec.seqlen_q));
    }
    const uint64_t key = generator::row_key(spec.seed, Stream::kEmpty, sequence, 0, 0);
    const double uniform = static_cast<double>(generator::draw(key, 0) >> 11) * 0x1p-53;
    if (uniform < spec.empty_fraction) length = 0;
    lengths[b] = static_cast<int32_t>(std::clamp(length, 0.0, double(INT_MAX)));
  }
  return lengths;
}

/// `count` distinct values of [0, population), by the first steps of a Fisher-Yates shuffle.
std::vector<int32_t> draw_distinct(uint64_t key, int64_t population, int64_t count) {
  std::vector<int32_t> values(static_cast<size_t>(population));
  std::iota(values.begin(), values.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    std::swap(values[size_t(i)], values[size_t(i + draw_below(key, i, population - i))]);
  }
  values.resize(static_cast<size_t>(count));
  return values;
}

/// Needles of one sequence, by token: token 0, the last seqlen_q tokens, and one token on each of
/// 14 drawn pages (or of all, if there are fewer). A token chosen twice is one needle.
std::vector<Needle> draw_needles(const DecodeCase& spec, float softmax_scale, int64_t sequence,
                                 int64_t length) {
  if (length == 0) return {};
  std::vector<int32_t> tokens{0};
  for (int64_t t = std::max<int64_t>(length - spec.seqlen_q, 0); t < length; ++t) {
    tokens.push_back(static_cast<int32_t>(t));
  }
  const uint64_t page_key = generator::row_key(spec.seed, Stream::kNeedles, sequence, 0, 0);
  const uint64_t token_key = generator::row_key(spec.seed, Stream::kNeedles, sequence, 1, 0);
  const int64_t pages = pages_for(length, spec.page_size);
  for (const int32_t page :
       draw_distinct(page_key, pages, std::min<int64_t>(pages, kSeededNeedles))) {
    const int64_t first = int64_t{page} * spec.page_size;
    const int64_t tokens_there = std::min<int64_t>(spec.page_size, length - first);
    tokens.push_back(static_cast<int32_t>(first + draw_below(token_key, page, tokens_there)));
  }
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());

  // logit = scale * 8 * value + noise = ln(s_k) + d: a needle weighs e^d times all ordinary tokens
  // together.
  std::vector<Needle> needles;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double rise = -2 + 4.0 * double(i) / double(std::max<size_t>(tokens.size() - 1, 1));
    const double d = sequence % 2 == 0 ? rise : -rise;
    const double value = (std::log(double(length)) + d) / (8 * double(softmax_scale));
    needles.push_back(
        {tokens[i], generator::round_to_16_bits(spec.dtype, static_cast<float>(value))});
  }
  return needles;
}

/// What no finite value of the cache exceeds.
float largest_value(const DataSet& data) {
  if (data.spec.data == DataKind::kExtremeValues) {
    return data.spec.dtype == DType::kBFloat16 ? 0x1p100f : 65504.0f;
  }
  float largest = data.spec.data == DataKind::kExtremeLogits ? 8.0f : 0.6f;  // six deviations
  if (data.spec.data == DataKind::kScaledTiles) largest *= 1 << 8;
  if (data.spec.data == DataKind::kGrowingValues) {
    largest *= data.spec.dtype == DType::kFloat16 ? 1 << 16 : 1 << 24;
  }
  for (const Needle& needle : data.needles) {
    largest = std::max(largest, std::abs(to_float(data.spec.dtype, needle.bits)));
  }
  return largest;
}

}  // namespace

const char* to_string(DataKind kind) {
  switch (kind) {
    case DataKind::kFlat:
      return "flat";
    case DataKind::kNeedles:
      return "needles";
    case DataKind::kExtremeValues:
      return "extreme-values";
    case DataKind::kExtremeLogits:
      return "extreme-logits";
    case DataKind::kScaledTiles:
      return "scaled-tiles";
    case DataKind::kGrowingValues:
      return "growing-values";
  }
  return "unknown";
}

std::string DecodeCase::name() const {
  std::string text = std::string(mla::to_string(dtype)) + " b=" + std::to_string(batch) +
                     " s_q=" + std::to_string(seqlen_q) + " s_k=" + std::to_string(seqlen_k) +
                     " h_q=" + std::to_string(num_heads_q) +
                     " h_kv=" + std::to_string(num_heads_kv);
  if (!lengths.empty()) {
    constexpr size_t kShown = 8;
    text += " lengths=";
    for (size_t i = 0; i < std::min(lengths.size(), kShown); ++i) {
      if (i > 0) text += ',';
      text += std::to_string(lengths[i]);
    }
    if (lengths.size() > kShown) text += ",...";
  } else {
    if (variable_lengths) text += " var";
    if (empty_fraction > 0) {
      char empty[32];
      std::snprintf(empty, sizeof empty, " empty=%g", empty_fraction);
      text += empty;
    }
  }
  if (causal) text += " causal";
  if (fixed_split_tokens != 0) text += " split=" + std::to_string(fixed_split_tokens);
  if (page_size != kDefaultPageSize) text += " page=" + std::to_string(page_size);
  if (strided) text += " strided";
  if (is_quantised(cache_format)) {
    text += std::string(" ") + mla::to_string(cache_format);
    if (scale_rule == ScaleRule::kPowerOfTwo) text += " pow2";
    if (cache_scale != 0) {
      char scale[32];
      std::snprintf(scale, sizeof scale, " cache_scale=%g", double{cache_scale});
      text += scale;
    }
  }
  text += std::string(" ") + to_string(data);
  return text + " seed=" + std::to_string(seed);
}

std::string shape_name(const DataSet& data) {
  const Problem& problem = data.problem;
  std::string text = "h" + std::to_string(problem.num_heads_q);
  if (problem.num_heads_kv != 1) text += "x" + std::to_string(problem.num_heads_kv);
  text += "_q" + std::to_string(problem.seqlen_q);
  const std::vector<int32_t>& lengths = data.seqlens_k;
  const bool equal =
      lengths.front() > 0 && std::all_of(lengths.begin(), lengths.end(),
                                         [&](int32_t length) { return length == lengths.front(); });
  text += equal ? "_b" + std::to_string(lengths.size()) + "_k" : "_k";
  for (size_t i = 0; i < (equal ? 1 : lengths.size()); ++i) {
    text += (i > 0 ? "+" : "") + std::to_string(lengths[i]);
  }
  if (problem.causal) text += "_causal";
  if (problem.fixed_split_tokens != 0)
    text += "_split" + std::to_string(problem.fixed_split_tokens);
  if (problem.page_size != kDefaultPageSize) text += "_page" + std::to_string(problem.page_size);
  if (data.spec.strided) text += "_strided";
  if (is_quantised(problem.cache_format))
    text += std::string("_") + to_string(problem.cache_format);
  return problem.dtype == DType::kFloat16 ? text + "_fp16" : text;
}

int64_t DataSet::total_tokens() const {
  return std::accumulate(seqlens_k.begin(), seqlens_k.end(), int64_t{0});
}

DataSet make_data_set(const DecodeCase& spec) {
  DataSet data;
  data.spec = spec;
  if (!spec.lengths.empty()) data.spec.batch = static_cast<int>(spec.lengths.size());
  Problem& problem = data.problem;
  problem.dtype = spec.dtype;
  problem.batch = data.spec.batch;
  problem.seqlen_q = spec.seqlen_q;
  problem.num_heads_q = spec.num_heads_q;
  problem.num_heads_kv = spec.num_heads_kv;
  problem.softmax_scale = spec.seed % 2 == 0 ? 1.0f / 24 : 0.135234f;
  if (spec.softmax_scale != 0) problem.softmax_scale = spec.softmax_scale;
  problem.causal = spec.causal;
  problem.fixed_split_tokens = spec.fixed_split_tokens;
  problem.page_size = spec.page_size;
  problem.cache_format = spec.cache_format;
  if (!is_page_size(spec.page_size)) return data;  // validate() refuses it

  std::vector<int32_t> lengths = spec.lengths.empty() ? draw_lengths(data.spec) : spec.lengths;
  int64_t used_pages = 0;
  int64_t longest = 0;
  for (const int32_t length : lengths) {
    if (length < 0) return data;  // no pages: validate() refuses the problem
    used_pages += pages_for(length, spec.page_size);
    longest = std::max(longest, pages_for(length, spec.page_size));
  }
  if (problem.batch < 0 || used_pages > INT_MAX - kSparePages) return data;
  data.seqlens_k = std::move(lengths);
  problem.num_pages = static_cast<int>(used_pages) + kSparePages;
  problem.max_pages_per_seq =
      static_cast<int>(std::min<int64_t>(longest + 1, kMaxTokensPerSeq / problem.page_size));

  const auto num_pages = static_cast<size_t>(problem.num_pages);
  data.block_table.assign(static_cast<size_t>(problem.block_table_elements()), kGarbagePage);
  data.page_sequence.assign(num_pages, -1);
  data.page_position.assign(num_pages, -1);
  const std::vector<int32_t> shuffled = draw_distinct(
      generator::row_key(spec.seed, Stream::kPages, 0, 0, 0), problem.num_pages, used_pages);
  size_t next = 0;
  data.needle_begin.push_back(0);
  for (int b = 0; b < problem.batch; ++b) {
    const int64_t length = data.seqlens_k[size_t(b)];
    int32_t* const table_row = &data.block_table[size_t(b) * size_t(problem.max_pages_per_seq)];
    for (int32_t p = 0; p < pages_for(length, spec.page_size); ++p) {
      const int32_t page = shuffled[next++];
      table_row[p] = page;
      data.page_sequence[size_t(page)] = b;
      data.page_position[size_t(page)] = p;
    }
    if (spec.data == DataKind::kNeedles) {
      const std::vector<Needle> needles = draw_needles(data.spec, problem.softmax_scale, b, length);
      data.needles.insert(data.needles.end(), needles.begin(), needles.end());
    }
    data.needle_begin.push_back(static_cast<int32_t>(data.needles.size()));
  }
  if (problem.cache_format == CacheFormat::kFp8Tensor) {
    problem.cache_scale = spec.cache_scale != 0 ? spec.cache_scale
                                                : scale_for(problem.cache_format,
                                                            largest_value(data), spec.scale_rule);
  }
  return data;
}

Layout DataSet::layout() const {
  return layout_of(problem, spec.strided);
}

Layout layout_of(const Problem& problem, bool strided) {
  Layout layout;
  Tensors& strides = layout.strides;
  const int64_t batch = problem.batch, queries = problem.seqlen_q, heads = problem.num_heads_q;
  const int64_t kv_heads = problem.num_heads_kv;
  if (strided) {
    strides.q_strides.head = kHeadDimQK + 64;
    strides.q_strides.token = heads * strides.q_strides.head + 8;
    strides.q_strides.batch = queries * strides.q_strides.token + 16;
    const int64_t chunk = 16 / problem.cache_element_bytes();
    strides.kv_strides.token = problem.cache_row_elements() + 3 * chunk;
    strides.kv_strides.head = problem.page_size * strides.kv_strides.token + chunk;
    strides.kv_strides.page = kv_heads * strides.kv_strides.head + 5 * chunk;
    strides.block_table_stride = problem.max_pages_per_seq + 3;
    strides.out_strides.token = kHeadDimV + 32;
    strides.out_strides.head = queries * strides.out_strides.token + 8;
    strides.out_strides.batch = heads * strides.out_strides.head + 24;
    strides.lse_strides.head = 1;
    strides.lse_strides.token = heads + 1;
    strides.lse_strides.batch = queries * strides.lse_strides.token + 3;
    layout.begin = 1;
  }
  const Tensors filled = with_strides(problem, strides);
  // What a dimension of one member steps over does not matter to a kernel; a buffer ends with a gap.
  const auto size = [&](int64_t members, int64_t asked, int64_t contiguous) {
    return members * (asked == kContiguous ? contiguous : asked);
  };
  layout.q = size(batch, strides.q_strides.batch, queries * heads * kHeadDimQK);
  layout.kv_cache = size(problem.num_pages, strides.kv_strides.page,
                         problem.page_size * kv_heads * problem.cache_row_elements());
  layout.block_table =
      layout.begin + size(batch, strides.block_table_stride, problem.max_pages_per_seq);
  layout.seqlens_k = layout.begin + batch;
  layout.out = size(batch, strides.out_strides.batch, queries * heads * kHeadDimV);
  layout.lse = size(batch, strides.lse_strides.batch, queries * heads);
  strides = filled;
  return layout;
}

Tensors Layout::tensors(const void* q_buffer, const void* kv_buffer, const int32_t* table_buffer,
                        const int32_t* length_buffer, void* out_buffer, float* lse_buffer) const {
  Tensors tensors = strides;
  tensors.q = q_buffer;
  tensors.kv_cache = kv_buffer;
  tensors.block_table = table_buffer + begin;
  tensors.seqlens_k = length_buffer + begin;
  tensors.out = out_buffer;
  tensors.lse = lse_buffer;
  return tensors;
}

std::vector<int32_t> DataSet::table_buffer() const {
  const Layout at = layout();
  std::vector<int32_t> buffer(static_cast<size_t>(at.block_table), kGarbagePage);
  const int64_t columns = problem.max_pages_per_seq;
  for (int64_t b = 0; b < problem.batch; ++b) {
    std::copy_n(block_table.begin() + b * columns, columns,
                buffer.begin() + at.begin + b * at.strides.block_table_stride);
  }
  return buffer;
}

std::vector<int32_t> DataSet::length_buffer() const {
  const Layout at = layout();
  std::vector<int32_t> buffer(static_cast<size_t>(at.seqlens_k), -1);
  std::copy(seqlens_k.begin(), seqlens_k.end(), buffer.begin() + at.begin);
  return buffer;
}

namespace {

/// Calls visit(sequence, query, head) for every row of the outputs.
template <typename Visit>
void for_each_row(const Problem& problem, Visit&& visit) {
  for (int sequence = 0; sequence < problem.batch; ++sequence) {
    for (int query = 0; query < problem.seqlen_q; ++query) {
      for (int head = 0; head < problem.num_heads_q; ++head) visit(sequence, query, head);
    }
  }
}

}  // namespace

std::vector<uint16_t> gather_out(const Problem& problem, const Layout& layout,
                                 std::span<const uint16_t> buffer) {
  std::vector<uint16_t> out(static_cast<size_t>(problem.out_elements()));
  auto next = out.begin();
  for_each_row(problem, [&](int sequence, int query, int head) {
    const auto row = buffer.begin() + layout.strides.out_place(sequence, query, head);
    next = std::copy_n(row, kHeadDimV, next);
  });
  return out;
}

std::vector<float> gather_lse(const Problem& problem, const Layout& layout,
                              std::span<const float> buffer) {
  const Tensors contiguous = with_strides(problem, {});
  std::vector<float> lse(static_cast<size_t>(problem.lse_elements()));
  for_each_row(problem, [&](int sequence, int query, int head) {
    lse[size_t(contiguous.lse_place(sequence, query, head))] =
        buffer[size_t(layout.strides.lse_place(sequence, query, head))];
  });
  return lse;
}

bool gaps_hold(const Problem& problem, const Layout& layout, std::span<const uint16_t> out,
               uint16_t out_pattern, std::span<const float> lse, float lse_pattern) {
  std::vector<bool> out_written(out.size()), lse_written(lse.size());
  for_each_row(problem, [&](int sequence, int query, int head) {
    const auto row = out_written.begin() + layout.strides.out_place(sequence, query, head);
    std::fill_n(row, kHeadDimV, true);
    lse_written[size_t(layout.strides.lse_place(sequence, query, head))] = true;
  });
  for (size_t i = 0; i < out.size(); ++i) {
    if (!out_written[i] && out[i] != out_pattern) return false;
  }
  for (size_t i = 0; i < lse.size(); ++i) {
    if (!lse_written[i] &&
        std::bit_cast<uint32_t>(lse[i]) != std::bit_cast<uint32_t>(lse_pattern)) {
      return false;
    }
  }
  return true;
}

Tensors HostTensors::tensors(const DataSet& data) {
  const bool quantised = is_quantised(data.problem.cache_format);
  return data.layout().tensors(
      q.data(), quantised ? static_cast<const void*>(quantised_cache.data()) : kv_cache.data(),
      block_table.data(), seqlens_k.data(), out.data(), lse.data());
}

void HostTensors::poison_outputs(DType dtype) {
  std::fill(out.begin(), out.end(), nan_bits(dtype));
  std::fill(lse.begin(), lse.end(), std::numeric_limits<float>::quiet_NaN());
}

namespace {

void fill_quantised_row(const DataSet& data, int sequence, int64_t token, int head_kv,
                        uint8_t* row) {
  const int first = data.needle_begin[size_t(sequence)];
  const int count = data.needle_begin[size_t(sequence) + 1] - first;
  std::array<float, kHeadDimQK> values{};
  for (int column = 0; column < kHeadDimQK; ++column) {
    values[size_t(column)] = kv_value(data.spec.seed, data.problem.dtype, data.spec.data, sequence,
                                      token, head_kv, column, data.needles.data() + first, count);
  }
  quantise_row(data.problem, data.spec.scale_rule, values.data(), row);
}

}  // namespace

HostTensors generate(const DataSet& data, int num_threads) {
  const Problem& problem = data.problem;
  const DType dtype = problem.dtype;
  const uint64_t seed = data.spec.seed;
  const DataKind kind = data.spec.data;
  HostTensors host;

  const Layout layout = data.layout();
  const Tensors& places = layout.strides;

  // NaN first: gaps, and whatever no sequence owns, keep it.
  host.q.assign(static_cast<size_t>(layout.q), nan_bits(dtype));
  parallel_for(int64_t{problem.batch} * problem.seqlen_q, num_threads, [&](int64_t row) {
    const auto sequence = static_cast<int>(row / problem.seqlen_q);
    const auto query = static_cast<int>(row % problem.seqlen_q);
    for (int head = 0; head < problem.num_heads_q; ++head) {
      uint16_t* q = &host.q[size_t(places.q_place(sequence, query, head))];
      for (int column = 0; column < kHeadDimQK; ++column) {
        *q++ = q_bits(seed, dtype, kind, sequence, query, head, column);
      }
    }
  });

  const bool quantised = is_quantised(problem.cache_format);
  if (quantised) {
    host.quantised_cache.assign(static_cast<size_t>(layout.kv_cache), 0xff);
  } else {
    host.kv_cache.assign(static_cast<size_t>(layout.kv_cache), nan_bits(dtype));
  }
  parallel_for(problem.num_pages, num_threads, [&](int64_t page) {
    const int32_t sequence = data.page_sequence[size_t(page)];
    if (sequence < 0) return;
    const int64_t first = int64_t{data.page_position[size_t(page)]} * problem.page_size;
    const int64_t tokens =
        std::min<int64_t>(problem.page_size, data.seqlens_k[size_t(sequence)] - first);
    for (int row = 0; row < tokens; ++row) {
      for (int head = 0; head < problem.num_heads_kv; ++head) {
        const auto place = size_t(places.page_place(page, row, head));
        if (quantised) {
          fill_quantised_row(data, sequence, first + row, head, &host.quantised_cache[place]);
          continue;
        }
        uint16_t* kv = &host.kv_cache[place];
        for (int column = 0; column < kHeadDimQK; ++column) {
          *kv++ = kv_bits(seed, dtype, kind, sequence, first + row, head, column);
        }
      }
    }
  });
  host.block_table = data.table_buffer();
  host.seqlens_k = data.length_buffer();
  for (int b = 0; !quantised && b < problem.batch; ++b) {
    const int32_t* const table_row =
        &data.block_table[size_t(b) * size_t(problem.max_pages_per_seq)];
    for (int32_t n = data.needle_begin[size_t(b)]; n < data.needle_begin[size_t(b) + 1]; ++n) {
      const Needle& needle = data.needles[size_t(n)];
      for (int head = 0; head < problem.num_heads_kv; ++head) {
        const int64_t place = cache_place(problem, places, table_row, needle.token, head);
        host.kv_cache[size_t(place + kHeadDimQK - 1)] = needle.bits;
      }
    }
  }

  host.out.resize(static_cast<size_t>(layout.out));
  host.lse.resize(static_cast<size_t>(layout.lse));
  host.poison_outputs(dtype);
  return host;
}

}  // namespace mla
