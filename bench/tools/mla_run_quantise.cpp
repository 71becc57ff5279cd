// mla_run quantise: what a cache loses in a format of 8 bits, and what that does to the results.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "bench/measure/write_file.h"
#include "bench/tools/mla_run.h"
#include "bench/tools/npy.h"
#include "reference/attention.h"
#include "reference/float16.h"
#include "reference/quantise.h"
#include "reference/testing/compare.h"

namespace mla::bench {
namespace {

/// Calls f(row of the cache) for every token of every sequence; a page that two share counts twice.
template <typename F>
void for_each_token(const Dump& dump, F&& f) {
  const Problem& problem = dump.problem;
  for (int sequence = 0; sequence < problem.batch; ++sequence) {
    const int32_t* table = dump.block_table.data() + int64_t{sequence} * problem.max_pages_per_seq;
    for (int token = 0; token < dump.seqlens_k[static_cast<size_t>(sequence)]; ++token) {
      const int64_t row =
          int64_t{table[problem.page_of(token)]} * problem.page_size + problem.row_in_page(token);
      for (int head = 0; head < problem.num_heads_kv; ++head) f(row * problem.num_heads_kv + head);
    }
  }
}

/// The rows in 16 bits of a cache with strides of its own, without the gaps between them.
std::vector<uint16_t> rows_of(const Dump& dump) {
  const Problem& problem = dump.problem;
  const Tensors tensors = with_strides(problem, dump.tensors());
  std::vector<uint16_t> rows(static_cast<size_t>(problem.kv_elements()));
  auto to = rows.begin();
  for (int64_t page = 0; page < problem.num_pages; ++page) {
    for (int row = 0; row < problem.page_size; ++row) {
      for (int head = 0; head < problem.num_heads_kv; ++head, to += kHeadDimQK) {
        std::copy_n(
            static_cast<const uint16_t*>(tensors.kv_cache) + tensors.page_place(page, row, head),
            kHeadDimQK, to);
      }
    }
  }
  return rows;
}

float largest_value(const Dump& dump, std::span<const uint16_t> rows) {
  float largest = 0;
  for_each_token(dump, [&](int64_t row) {
    for (int column = 0; column < kHeadDimQK; ++column) {
      const float value = std::abs(
          to_float(dump.problem.dtype, rows[static_cast<size_t>(row * kHeadDimQK + column)]));
      if (std::isfinite(value)) largest = std::max(largest, value);
    }
  });
  return largest;
}

/// What the tokens' rows lose: |quantised - original| / |original|, both as L2 norms, over finite values.
struct CacheLoss {
  double latent = 0;  ///< Of columns 0 ... 511.
  double rotary = 0;  ///< Of the others.
};
CacheLoss loss_of(const Problem& quantised, const Dump& dump, std::span<const uint16_t> rows,
                  const std::vector<uint8_t>& codes) {
  double error[2] = {}, size[2] = {};
  const int64_t row_bytes = quantised.cache_row_bytes();
  for_each_token(dump, [&](int64_t row) {
    for (int column = 0; column < kHeadDimQK; ++column) {
      const double value =
          to_float(dump.problem.dtype, rows[static_cast<size_t>(row * kHeadDimQK + column)]);
      const double says = dequantise_value(quantised, codes.data() + row * row_bytes, column);
      if (!std::isfinite(value) || !std::isfinite(says)) continue;
      const int part = column < kHeadDimV ? 0 : 1;
      error[part] += (says - value) * (says - value);
      size[part] += value * value;
    }
  });
  const auto share = [&](int part) {
    return size[part] > 0 ? std::sqrt(error[part] / size[part]) : 0.0;
  };
  return {share(0), share(1)};
}

void print_head() {
  fmt::print("{:<14} {:>9} {:>7} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "cache", "bytes/row",
             "of 16", "latent", "rotary", "out", "1 - cos", "max error", "lse error");
}

/// Quantises, decodes what that says, and prints a row of the table.
Status try_format(const Dump& dump, std::span<const uint16_t> rows, const QuantiseOptions& options,
                  const ReferenceResult& expected, CacheFormat format) {
  Problem problem = dump.problem;
  problem.cache_format = format;
  if (format == CacheFormat::kFp8Tensor) {
    problem.cache_scale =
        options.cache_scale.value_or(scale_for(format, largest_value(dump, rows), options.rule));
  }
  std::vector<uint8_t> codes;
  MLA_RETURN_IF_ERROR(quantise_cache(problem, rows.data(), options.rule, &codes));
  Tensors tensors = dump.tensors();
  tensors.kv_cache = codes.data();
  tensors.kv_strides = {};
  ReferenceResult result;
  MLA_RETURN_IF_ERROR(reference_attention(problem, tensors, &result));
  const std::vector<float> out(result.out.begin(), result.out.end());
  const std::vector<float> lse(result.lse.begin(), result.lse.end());
  const Comparison outs = compare_out(dump.problem, out, expected);
  const Comparison lses = compare_lse(dump.problem, lse, expected);
  const CacheLoss loss = loss_of(problem, dump, rows, codes);
  fmt::print(
      "{:<14} {:>9} {:>7.2f} {:>10.2e} {:>10.2e} {:>10.2e} {:>10.2e} {:>10.2e} {:>10.2e}{}\n",
      to_string(format), problem.cache_row_bytes(),
      double(problem.cache_row_bytes()) / (2.0 * kHeadDimQK), loss.latent, loss.rotary,
      outs.relative_l2, outs.cosine_difference, outs.max_abs_error, lses.max_abs_error,
      format == CacheFormat::kFp8Tensor ? fmt::format("  cache_scale {:.9g}", problem.cache_scale)
                                        : std::string());
  if (options.out.empty()) return {};
  const npy::Output file{
      options.out,
      npy::Type::kUInt8,
      {problem.num_pages, problem.page_size, problem.num_heads_kv, problem.cache_row_bytes()},
      std::as_bytes(std::span(codes))};
  MLA_RETURN_IF_ERROR(npy::write({&file, 1}));
  fmt::print("wrote {}: {} {}\n", file.path, to_string(file.type), npy::to_string(file.shape));
  return {};
}

}  // namespace

int run_quantise(const RunOptions& options, const QuantiseOptions& quantise) {
  const auto invalid = [](const std::string& message) {
    return refuse({StatusCode::kInvalidArgument, message});
  };
  if (!quantise.out.empty() && !quantise.format) {
    return invalid("--out writes the cache in one format: name it, as in --format fp8_tile128");
  }
  if (quantise.cache_scale && quantise.format && *quantise.format != CacheFormat::kFp8Tensor) {
    return invalid(fmt::format("--cache-scale is for fp8_tensor; {} has its own scales",
                               to_string(*quantise.format)));
  }
  for (const std::string& input :
       {options.files.q, options.files.cache, options.files.block_table, options.files.seqlens}) {
    if (same_file(quantise.out, input)) {
      return invalid(quantise.out + " is an input, and will not be overwritten");
    }
  }
  if (const Status status = check_writable(quantise.out); !status.ok()) return refuse(status);
  Dump dump;
  if (const Status status = load_problem(options, {.decodes = true}, &dump); !status.ok()) {
    return refuse(status);
  }
  if (is_quantised(dump.problem.cache_format)) {
    return invalid(fmt::format("--shape {} has a quantised cache already; leave out _{}",
                               options.shape, to_string(dump.problem.cache_format)));
  }
  fmt::print("{}\n", describe(dump));
  for (const std::string& note : dump.notes) fmt::print("note: {}\n", note);
  ReferenceResult expected;
  if (const Status status = reference_attention(dump.problem, dump.tensors(), &expected);
      !status.ok()) {
    return refuse(status, kWrong);
  }
  std::vector<uint16_t> gathered;
  if (dump.strided) gathered = rows_of(dump);
  const std::span<const uint16_t> rows = dump.strided ? gathered : dump.kv_cache.values();
  print_head();
  fmt::print("{:<14} {:>9} {:>7.2f}\n", to_string(CacheFormat::k16Bit), 2 * kHeadDimQK, 1.0);
  Status first_refused;
  bool any = false;
  for (const CacheFormat format : kCacheFormats) {
    if (!is_quantised(format) || (quantise.format && format != *quantise.format)) continue;
    const Status status = try_format(dump, rows, quantise, expected, format);
    any |= status.ok();
    if (status.ok()) continue;
    if (first_refused.ok()) first_refused = status;
    fmt::print("{:<14} {}\n", to_string(format), status.message());
  }
  if (!any) return refuse(first_refused);
  fmt::print(
      "latent, rotary: the relative L2 error of columns 0 to 511 and 512 to 575 of the tokens. "
      "The rest: errors of the\nfloat64 reference on the quantised cache against the same on "
      "this one; no kernel's rounding is in "
      "it.\n");
  return kRight;
}

}  // namespace mla::bench
