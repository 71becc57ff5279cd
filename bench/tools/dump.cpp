#include "bench/tools/dump.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <new>
#include <numeric>
#include <utility>

#include "bench/measure/memory.h"
#include "reference/float16.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {
namespace {

using npy::Type;

bool holds_patterns(Type type) {
  return type == Type::kUInt16 || type == Type::kInt16;
}

Status file_error(const std::string& path, const std::string& message) {
  return {StatusCode::kFileError, path + ": " + message};
}

/// The same code, with the files that are at fault before the message.
Status blame(const std::string& paths, const Status& status) {
  if (status.ok()) return status;
  return {status.code(), paths + ": " + status.message()};
}

Status to_int(const std::string& path, const char* name, int64_t value, int* result) {
  if (value > INT_MAX) {
    return file_error(path, fmt::format("{} = {} found; at most {} allowed", name, value, INT_MAX));
  }
  *result = static_cast<int>(value);
  return {};
}

/// The array's elements as float; `patterns_dtype` says what <u2 and <i2 are.
std::vector<float> floats(const npy::Array& array, DType patterns_dtype) {
  switch (array.header.type) {
    case Type::kFloat16:
      return to_floats(DType::kFloat16, array.values<uint16_t>());
    case Type::kFloat32: {
      const auto values = array.values<float>();
      return {values.begin(), values.end()};
    }
    case Type::kFloat64: {
      const auto values = array.values<double>();
      std::vector<float> result(values.size());
      std::transform(values.begin(), values.end(), result.begin(),
                     [](double value) { return static_cast<float>(value); });
      return result;
    }
    default:
      return to_floats(patterns_dtype, array.values<uint16_t>());
  }
}

/// Reads q or the cache as patterns of `dtype`, and notes what rounding did to it.
Status load_patterns(const std::string& path, DType dtype, Patterns* patterns,
                     std::vector<std::string>* notes) {
  MLA_RETURN_IF_ERROR(npy::read(path, &patterns->read));
  const Type type = patterns->read.header.type;
  if (holds_patterns(type) || (type == Type::kFloat16 && dtype == DType::kFloat16)) return {};

  const std::vector<float> values = floats(patterns->read, dtype);
  patterns->read = {};
  patterns->converted = to_patterns(dtype, values);
  int64_t overflows = 0;
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < values.size(); ++i) {
      const float rounded = to_float(std::bit_cast<T>(patterns->converted[i]));
      overflows += std::isinf(rounded) && !std::isinf(values[i]);
    }
  });
  if (overflows > 0) {
    notes->push_back(fmt::format("{}: {} of {} values are too large for {} and became infinite",
                                 path, overflows, values.size(), to_string(dtype)));
  }
  return {};
}

/// Copies whole numbers. One that does not fit int32_t is an error if `used(index)`, else it becomes
/// -1.
template <typename T, typename Used>
Status copy_int32(const std::string& path, std::span<const T> values, Used used,
                  std::vector<int32_t>* result) {
  result->assign(values.size(), -1);
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::in_range<int32_t>(values[i])) {
      (*result)[i] = static_cast<int32_t>(values[i]);
    } else if (used(i)) {
      return file_error(path, fmt::format("{} found at element {}; a value that fits int32 needed",
                                          values[i], i));
    }
  }
  return {};
}

/// Reads whole numbers of any type.
template <typename Used>
Status load_int32(const std::string& path, std::vector<int32_t>* result, Used used) {
  npy::Array array;
  MLA_RETURN_IF_ERROR(npy::read(path, &array));
  switch (array.header.type) {
    case Type::kInt32:
      return copy_int32(path, array.values<int32_t>(), used, result);
    case Type::kUInt32:
      return copy_int32(path, array.values<uint32_t>(), used, result);
    case Type::kUInt64:
      return copy_int32(path, array.values<uint64_t>(), used, result);
    default:
      return copy_int32(path, array.values<int64_t>(), used, result);
  }
}

constexpr const char* kValueTypes = "<u2 or <i2 (16-bit patterns), <f2 or <f4";
constexpr const char* kIndexTypes = "<i4, <i8, <u4 or <u8";

/// What files a cache may have.
const char* cache_types(const DumpFiles& files) {
  return is_quantised(files.cache_format) ? "|u1 (bytes)" : kValueTypes;
}

/// Types and shapes, from the headers alone; fills in the problem's sizes.
struct Headers {
  npy::Header q, cache, block_table, seqlens;

  Status read(const DumpFiles& files, bool paged) {
    MLA_RETURN_IF_ERROR(npy::read_header(files.q, &q, kValueTypes));
    MLA_RETURN_IF_ERROR(npy::read_header(files.cache, &cache, cache_types(files)));
    if (paged) {
      MLA_RETURN_IF_ERROR(npy::read_header(files.block_table, &block_table, kIndexTypes));
    }
    return npy::read_header(files.seqlens, &seqlens, kIndexTypes);
  }

  Status check_types(const DumpFiles& files, bool paged) const {
    const std::initializer_list<Type> values{Type::kUInt16, Type::kInt16, Type::kFloat16,
                                             Type::kFloat32};
    const std::initializer_list<Type> indices{Type::kInt32, Type::kInt64, Type::kUInt32,
                                              Type::kUInt64};
    MLA_RETURN_IF_ERROR(npy::check_type(files.q, q, values, kValueTypes));
    MLA_RETURN_IF_ERROR(
        is_quantised(files.cache_format)
            ? npy::check_type(files.cache, cache, {Type::kUInt8}, cache_types(files))
            : npy::check_type(files.cache, cache, values, cache_types(files)));
    if (paged) {
      MLA_RETURN_IF_ERROR(npy::check_type(files.block_table, block_table, indices, kIndexTypes));
    }
    return npy::check_type(files.seqlens, seqlens, indices, kIndexTypes);
  }

  Status check_shapes(const DumpFiles& files, bool paged, Problem* problem) const {
    MLA_RETURN_IF_ERROR(npy::check_shape(files.q, q, {"b", "s_q", "h_q", int64_t{kHeadDimQK}}));
    const int64_t batch = q.shape[0];
    MLA_RETURN_IF_ERROR(to_int(files.q, "b", batch, &problem->batch));
    MLA_RETURN_IF_ERROR(to_int(files.q, "s_q", q.shape[1], &problem->seqlen_q));
    MLA_RETURN_IF_ERROR(to_int(files.q, "h_q", q.shape[2], &problem->num_heads_q));
    const std::string b_of_q = fmt::format("(b = {} of {})", batch, files.q);

    const bool one_head = cache.shape.size() == 3;  // no axis for KV heads
    const int64_t row = problem->cache_row_elements();
    Status fits;
    if (paged && one_head) {
      fits = npy::check_shape(files.cache, cache, {"pages", "page_size", row});
    } else if (paged) {
      fits = npy::check_shape(files.cache, cache, {"pages", "page_size", "h_kv", row},
                              "with --block-table");
    } else if (one_head) {
      fits = npy::check_shape(files.cache, cache, {batch, "s", kHeadDimQK}, b_of_q);
    } else {
      fits = npy::check_shape(files.cache, cache, {batch, "s", "h_kv", kHeadDimQK},
                              b_of_q + "; a paged cache needs --block-table");
    }
    MLA_RETURN_IF_ERROR(fits);
    const int64_t heads_kv = one_head ? 1 : cache.shape[2];
    MLA_RETURN_IF_ERROR(to_int(files.cache, "h_kv", heads_kv, &problem->num_heads_kv));
    if (paged) {
      MLA_RETURN_IF_ERROR(to_int(files.cache, "pages", cache.shape[0], &problem->num_pages));
      MLA_RETURN_IF_ERROR(to_int(files.cache, "page_size", cache.shape[1], &problem->page_size));
      MLA_RETURN_IF_ERROR(
          npy::check_shape(files.block_table, block_table, {batch, "max_pages"}, b_of_q));
      MLA_RETURN_IF_ERROR(to_int(files.block_table, "max_pages", block_table.shape[1],
                                 &problem->max_pages_per_seq));
    } else {
      const int64_t pages = pages_for(cache.shape[1], problem->page_size);
      MLA_RETURN_IF_ERROR(
          to_int(files.cache, "pages per sequence", pages, &problem->max_pages_per_seq));
      MLA_RETURN_IF_ERROR(to_int(files.cache, "pages", batch * pages, &problem->num_pages));
    }
    return npy::check_shape(files.seqlens, seqlens, {batch}, b_of_q);
  }

  /// Of memory at most, while all is read, rounded to 16 bits and paged.
  double bytes(const Problem& problem, bool paged) const {
    const auto read = [&problem](const npy::Header& header) {
      const auto elements = static_cast<double>(header.elements());
      const bool as_it_is = holds_patterns(header.type) || header.type == Type::kUInt8 ||
                            (header.type == Type::kFloat16 && problem.dtype == DType::kFloat16);
      return elements * (static_cast<double>(npy::size_of(header.type)) +
                         (as_it_is ? 0 : sizeof(float) + sizeof(uint16_t)));
    };
    const double pages = paged ? 0 : sizeof(uint16_t) * static_cast<double>(problem.kv_elements());
    return read(q) + read(cache) + pages;
  }
};

/// Copies [b, s, h_kv, 576] into pages, in order; the rest of each sequence's last page is NaN.
void page_cache(int64_t tokens, Dump* dump) {
  const Problem& problem = dump->problem;
  const auto row = static_cast<size_t>(problem.num_heads_kv) * kHeadDimQK;
  const size_t sequence = static_cast<size_t>(tokens) * row;
  const size_t paged_sequence = static_cast<size_t>(problem.max_seqlen_k()) * row;
  std::vector<uint16_t> paged(static_cast<size_t>(problem.kv_elements()), nan_bits(problem.dtype));
  const std::span<const uint16_t> contiguous = dump->kv_cache.values();
  for (size_t b = 0; b < static_cast<size_t>(problem.batch); ++b) {
    std::copy_n(contiguous.begin() + static_cast<ptrdiff_t>(b * sequence), sequence,
                paged.begin() + static_cast<ptrdiff_t>(b * paged_sequence));
  }
  dump->kv_cache.read = {};
  dump->kv_cache.converted = std::move(paged);
  dump->block_table.resize(static_cast<size_t>(problem.block_table_elements()));
  std::iota(dump->block_table.begin(), dump->block_table.end(), 0);
}

Status load_checked(const DumpFiles& files, bool paged, Dump* dump) {
  Problem& problem = dump->problem;
  problem.cache_format = files.cache_format;
  problem.cache_scale = files.cache_scale.value_or(0);
  Headers headers;
  MLA_RETURN_IF_ERROR(headers.read(files, paged));
  MLA_RETURN_IF_ERROR(headers.check_types(files, paged));
  MLA_RETURN_IF_ERROR(headers.check_shapes(files, paged, &problem));

  const bool both_fp16 = headers.q.type == Type::kFloat16 &&
                         (headers.cache.type == Type::kFloat16 || is_quantised(files.cache_format));
  if (!files.dtype && !both_fp16) {
    const bool q_decides = headers.q.type != Type::kFloat16;
    return {StatusCode::kInvalidArgument,
            (q_decides ? files.q : files.cache) + " holds " +
                npy::to_string(q_decides ? headers.q.type : headers.cache.type) +
                "; say by --dtype bf16 or --dtype fp16 what that is, or becomes"};
  }
  problem.dtype = files.dtype.value_or(DType::kFloat16);
  problem.softmax_scale = files.softmax_scale;
  problem.causal = files.causal;
  problem.fixed_split_tokens = files.fixed_split_tokens;
  MLA_RETURN_IF_ERROR(blame(files.q + ", " + files.cache, validate(problem)));

  MLA_RETURN_IF_ERROR(check_memory(files.q + " and " + files.cache, headers.bytes(problem, paged),
                                   host_memory_there(), "host memory"));
  MLA_RETURN_IF_ERROR(load_patterns(files.q, problem.dtype, &dump->q, &dump->notes));
  if (is_quantised(files.cache_format)) {
    MLA_RETURN_IF_ERROR(npy::read(files.cache, &dump->kv_cache.read));
  } else {
    MLA_RETURN_IF_ERROR(load_patterns(files.cache, problem.dtype, &dump->kv_cache, &dump->notes));
  }
  MLA_RETURN_IF_ERROR(load_int32(files.seqlens, &dump->seqlens_k, [](size_t) { return true; }));
  if (!paged) {
    const int64_t tokens = headers.cache.shape[1];
    for (size_t b = 0; b < dump->seqlens_k.size(); ++b) {
      if (dump->seqlens_k[b] > tokens) {
        return {StatusCode::kOutOfRange,
                fmt::format("{}: seqlens_k[{}] = {}; {} has {} tokens per sequence", files.seqlens,
                            b, dump->seqlens_k[b], files.cache, tokens)};
      }
    }
    page_cache(tokens, dump);
    return blame(files.seqlens,
                 validate_paging(problem, dump->block_table.data(), dump->seqlens_k.data()));
  }
  const auto used = [&](size_t slot) {
    const auto columns = static_cast<size_t>(problem.max_pages_per_seq);
    return static_cast<int64_t>(slot % columns) <
           pages_for(dump->seqlens_k[slot / columns], problem.page_size);
  };
  MLA_RETURN_IF_ERROR(load_int32(files.block_table, &dump->block_table, used));
  return blame(files.block_table + ", " + files.seqlens,
               validate_paging(problem, dump->block_table.data(), dump->seqlens_k.data()));
}

Status load_floats(const std::string& path, DType dtype, bool patterns_allowed,
                   std::initializer_list<npy::Axis> shape, std::vector<float>* values) {
  const std::string needed =
      patterns_allowed ? "<u2 or <i2 (16-bit patterns), <f2, <f4 or <f8" : "<f4 or <f8";
  npy::Array array;
  MLA_RETURN_IF_ERROR(npy::read(path, &array, needed));
  MLA_RETURN_IF_ERROR(
      patterns_allowed
          ? npy::check_type(
                path, array.header,
                {Type::kUInt16, Type::kInt16, Type::kFloat16, Type::kFloat32, Type::kFloat64},
                needed)
          : npy::check_type(path, array.header, {Type::kFloat32, Type::kFloat64}, needed));
  MLA_RETURN_IF_ERROR(npy::check_shape(path, array.header, shape, "for these inputs"));
  *values = floats(array, dtype);
  return {};
}

}  // namespace

int64_t Dump::total_tokens() const {
  return std::accumulate(seqlens_k.begin(), seqlens_k.end(), int64_t{0});
}

Tensors Dump::tensors() const {
  const void* cache =
      kv_codes.empty() ? static_cast<const void*>(kv_cache.values().data()) : kv_codes.data();
  return layout().tensors(q.values().data(), cache, (strided ? table_buffer : block_table).data(),
                          (strided ? length_buffer : seqlens_k).data(), nullptr, nullptr);
}

Status load(const DumpFiles& files, Dump* dump) {
  const CacheLayout layout = files.layout.value_or(
      files.block_table.empty() ? CacheLayout::kContiguous : CacheLayout::kPaged);
  if (layout == CacheLayout::kPaged && files.block_table.empty()) {
    return {StatusCode::kInvalidArgument, "a paged cache needs --block-table"};
  }
  if (layout == CacheLayout::kContiguous && !files.block_table.empty()) {
    return {StatusCode::kInvalidArgument,
            "a contiguous cache takes no --block-table (" + files.block_table + ")"};
  }
  if (layout == CacheLayout::kContiguous && is_quantised(files.cache_format)) {
    return {StatusCode::kInvalidArgument, "a quantised cache is paged: it needs --block-table"};
  }
  try {
    Dump result;
    MLA_RETURN_IF_ERROR(load_checked(files, layout == CacheLayout::kPaged, &result));
    *dump = std::move(result);
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, files.q + ", " + files.cache + ": not enough memory"};
  }
}

Status load_out(const std::string& path, const Problem& problem, std::vector<float>* out) {
  return load_floats(path, problem.dtype, true,
                     {int64_t{problem.batch}, int64_t{problem.seqlen_q},
                      int64_t{problem.num_heads_q}, int64_t{kHeadDimV}},
                     out);
}

Status load_lse(const std::string& path, const Problem& problem, std::vector<float>* lse) {
  return load_floats(
      path, problem.dtype, false,
      {int64_t{problem.batch}, int64_t{problem.num_heads_q}, int64_t{problem.seqlen_q}}, lse);
}

std::vector<float> to_floats(DType dtype, std::span<const uint16_t> patterns) {
  std::vector<float> values(patterns.size());
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::transform(patterns.begin(), patterns.end(), values.begin(),
                   [](uint16_t bits) { return to_float(std::bit_cast<T>(bits)); });
  });
  return values;
}

std::vector<uint16_t> to_patterns(DType dtype, std::span<const float> values) {
  std::vector<uint16_t> patterns(values.size());
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::transform(values.begin(), values.end(), patterns.begin(),
                   [](float value) { return std::bit_cast<uint16_t>(from_float<T>(value)); });
  });
  return patterns;
}

}  // namespace mla::bench
