#include "bench/measure/cache_errors.h"

#include <fmt/format.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <new>

#include "reference/parallel_for.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Values = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Tokens that are in memory at once.
constexpr int kBlock = 512;

struct Decoded {
  Matrix out;           // [heads, 512]
  Eigen::VectorXd lse;  // [heads]
};

Status check(const ErrorCase& spec, std::span<const double> deviations) {
  const auto refused = [](const std::string& what, const char* allowed) {
    return Status(StatusCode::kInvalidArgument, what + " must be " + allowed);
  };
  if (spec.tokens < 1) return refused(fmt::format("tokens = {}", spec.tokens), "at least 1");
  if (spec.heads < 1) return refused(fmt::format("heads = {}", spec.heads), "at least 1");
  if (spec.outliers < 0 || spec.outliers > kHeadDimV) {
    return refused(fmt::format("outliers = {}", spec.outliers), "0 to 512");
  }
  if (!(spec.rotary > 0) || std::isinf(spec.rotary)) {
    return refused(fmt::format("rotary = {}", spec.rotary), "finite and greater than 0");
  }
  for (const double deviation : deviations) {
    if (deviation > 0 && !std::isinf(deviation)) continue;
    return refused(fmt::format("deviation = {}", deviation), "finite and greater than 0");
  }
  return {};
}

bool is_outlier(const ErrorCase& spec, int column) {
  for (int i = 0; i < spec.outliers; ++i) {
    if (i * kHeadDimV / spec.outliers == column) return true;
  }
  return false;
}

Matrix queries(const ErrorCase& spec) {
  Matrix q(spec.heads, kHeadDimQK);
  for (int head = 0; head < spec.heads; ++head) {
    for (int column = 0; column < kHeadDimQK; ++column) {
      q(head, column) = to_float(DType::kBFloat16, q_bits(spec.seed, DType::kBFloat16,
                                                          DataKind::kFlat, 0, 0, head, column));
    }
  }
  return q;
}

/// Calls visit(values [block, 576]) with the values as they are, block by block.
template <typename Visit>
void for_each_block(const ErrorCase& spec, int num_threads, const Visit& visit) {
  Eigen::RowVectorXf factors = Eigen::RowVectorXf::Ones(kHeadDimQK);
  for (int column = 0; column < kHeadDimV; ++column) {
    if (is_outlier(spec, column)) factors(column) = kOutlierFactor;
  }
  factors.tail(kHeadDimQK - kHeadDimV).setConstant(static_cast<float>(spec.rotary));
  Values values;
  for (int first = 0; first < spec.tokens; first += kBlock) {
    values.resize(std::min(kBlock, spec.tokens - first), kHeadDimQK);
    parallel_for(values.rows(), num_threads, [&](int64_t i) {
      const uint64_t key =
          generator::row_key(spec.seed, generator::Stream::kCache, 0, first + i, 0);
      for (int column = 0; column < kHeadDimQK; ++column) {
        values(i, column) = generator::normal_tenth(key, column) * factors(column);
      }
    });
    visit(values);
  }
}

/// What is known of all values before any is decoded.
struct Survey {
  float largest = 0;     // magnitude of a value
  double deviation = 0;  // of q.k; if there is one alone, its magnitude
};

Survey survey(const ErrorCase& spec, const Matrix& q, int num_threads) {
  Survey result;
  double sum = 0, squares = 0, largest = 0;
  for_each_block(spec, num_threads, [&](const Values& values) {
    result.largest = std::max(result.largest, values.cwiseAbs().maxCoeff());
    const Matrix scores = q * values.cast<double>().transpose();
    sum += scores.sum();
    squares += scores.squaredNorm();
    largest = std::max(largest, scores.cwiseAbs().maxCoeff());
  });
  const double count = static_cast<double>(spec.tokens) * spec.heads;
  const double variance = squares / count - sum / count * (sum / count);
  const bool differ = variance > 1e-12 * squares / count;
  result.deviation = differ ? std::sqrt(variance) : std::max(largest, 1e-9);
  return result;
}

/// Attention with one softmax scale over keys that come block by block.
class Decoder {
 public:
  Decoder(int heads, double scale)
      : scale_(scale),
        m_(Eigen::VectorXd::Constant(heads, -std::numeric_limits<double>::infinity())),
        l_(Eigen::VectorXd::Zero(heads)),
        out_(Matrix::Zero(heads, kHeadDimV)) {}

  /// @param scores  [heads, block] q.k
  void add(const Matrix& scores, const Matrix& keys) {
    Matrix weights = scale_ * scores;
    for (Eigen::Index head = 0; head < weights.rows(); ++head) {
      const double m = std::max(m_(head), weights.row(head).maxCoeff());
      weights.row(head) = (weights.row(head).array() - m).exp();
      const double kept = std::exp(m_(head) - m);
      l_(head) = l_(head) * kept + weights.row(head).sum();
      out_.row(head) *= kept;
      m_(head) = m;
    }
    out_.noalias() += weights * keys.leftCols(kHeadDimV);
  }
  Decoded result() const {
    return {out_.array().colwise() / l_.array(), m_.array() + l_.array().log()};
  }

 private:
  double scale_;
  Eigen::VectorXd m_,
      l_;       // [heads] the largest logit so far, and the sum of weights relative to it
  Matrix out_;  // [heads, 512] relative to it
};

/// One way to keep the values, and the results from what it keeps.
struct Way {
  CacheError error;
  std::function<void(const float* values, double* row)> keep;  // [576] to [576]
  std::vector<Decoder> decoders{};                             // one for each scale

  void add(const Matrix& q, const Values& values) {
    Matrix keys(values.rows(), kHeadDimQK);
    for (Eigen::Index i = 0; i < values.rows(); ++i) {
      keep(values.row(i).data(), keys.row(i).data());
    }
    const Matrix scores = q * keys.transpose();
    for (Decoder& decoder : decoders) decoder.add(scores, keys);
  }
};

void round_row(const float* values, float* rounded) {
  for (int column = 0; column < kHeadDimQK; ++column) {
    rounded[column] = to_float(DType::kBFloat16, round_to_bfloat16(values[column]));
  }
}

void quantise_and_read(const Problem& problem, ScaleRule rule, const float* values, double* row) {
  alignas(16) uint8_t codes[kTileRowBytes];
  quantise_row(problem, rule, values, codes);
  dequantise_row(problem, codes, row);
}

/// Rotary columns in e4m3, by the scale of their largest.
void rotary_in_e4m3(ScaleRule rule, const float* values, double* row) {
  constexpr CacheFormat kFormat = CacheFormat::kFp8Tile128;
  float largest = 0;
  for (int column = kHeadDimV; column < kHeadDimQK; ++column) {
    largest = std::max(largest, std::abs(values[column]));
  }
  const float scale = scale_for(kFormat, largest, rule);
  for (int column = kHeadDimV; column < kHeadDimQK; ++column) {
    row[column] =
        double{e4m3_value(quantise_value(kFormat, values[column], scale))} * double{scale};
  }
}

/// The values as they are, first; then in bf16, and from that in every quantised format and as
/// kRotaryInE4M3 says.
std::vector<Way> all_ways(float largest, ScaleRule rule) {
  std::vector<Way> ways;
  const auto copy = [](const float* values, double* row) { std::copy_n(values, kHeadDimQK, row); };
  const auto add_from_bf16 = [&](CacheError error, auto keep) {
    ways.push_back({std::move(error), [keep](const float* values, double* row) {
                      float rounded[kHeadDimQK];
                      round_row(values, rounded);
                      keep(rounded, row);
                    }});
  };
  ways.push_back({{"exact"}, copy});
  for (const CacheFormat format : kCacheFormats) {
    Problem problem;
    problem.cache_format = format;
    CacheError error{to_string(format), problem.cache_row_bytes()};
    if (format == CacheFormat::kFp8Tensor) {
      error.cache_scale = problem.cache_scale =
          scale_for(format, to_float(DType::kBFloat16, round_to_bfloat16(largest)), rule);
    }
    if (!is_quantised(format)) {
      add_from_bf16(error, copy);
    } else {
      add_from_bf16(error, [problem, rule](const float* values, double* row) {
        quantise_and_read(problem, rule, values, row);
      });
    }
  }
  Problem tiles;
  tiles.cache_format = CacheFormat::kFp8Tile128;
  constexpr int kBytes = 608;  // 576 codes and 5 scales, up to a multiple of 16
  add_from_bf16({kRotaryInE4M3, kBytes}, [tiles, rule](const float* values, double* row) {
    quantise_and_read(tiles, rule, values, row);
    rotary_in_e4m3(rule, values, row);
  });
  return ways;
}

Distance distance(const ErrorCase& spec, const Decoded& a, const Decoded& b) {
  const Matrix difference = a.out - b.out;
  double off = 0, size = 0;
  for (int column = 0; column < kHeadDimV; ++column) {
    if (is_outlier(spec, column)) continue;
    off += difference.col(column).squaredNorm();
    size += b.out.col(column).squaredNorm();
  }
  const double mean_square = b.out.squaredNorm() / static_cast<double>(b.out.size());
  return {difference.norm() / b.out.norm(), size > 0 ? std::sqrt(off / size) : 0,
          difference.cwiseAbs().maxCoeff() / std::sqrt(mean_square),
          (a.lse - b.lse).cwiseAbs().maxCoeff()};
}

std::vector<CacheErrors> decode_all(const ErrorCase& spec, std::span<const double> deviations,
                                    ScaleRule rule, int num_threads) {
  const Matrix q = queries(spec);
  const Survey known = survey(spec, q, num_threads);
  std::vector<CacheErrors> errors;
  std::vector<Way> ways = all_ways(known.largest, rule);
  for (const double deviation : deviations) {
    errors.push_back({deviation, deviation / known.deviation, {}});
    for (Way& way : ways) way.decoders.emplace_back(spec.heads, errors.back().softmax_scale);
  }
  for_each_block(spec, num_threads, [&](const Values& values) {
    parallel_for(static_cast<int64_t>(ways.size()), num_threads,
                 [&](int64_t i) { ways[static_cast<size_t>(i)].add(q, values); });
  });
  for (size_t i = 0; i < errors.size(); ++i) {
    const Decoded exact = ways[0].decoders[i].result(), plain = ways[1].decoders[i].result();
    for (size_t j = 1; j < ways.size(); ++j) {
      const Decoded result = ways[j].decoders[i].result();
      CacheError error = ways[j].error;
      error.from_exact = distance(spec, result, exact);
      error.from_16_bits = distance(spec, result, plain);
      errors[i].all.push_back(error);
    }
  }
  return errors;
}

}  // namespace

Status cache_errors(const ErrorCase& spec, std::span<const double> deviations, ScaleRule rule,
                    std::vector<CacheErrors>* errors, int num_threads) {
  MLA_RETURN_IF_ERROR(check(spec, deviations));
  try {
    *errors = decode_all(spec, deviations, rule, num_threads);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "no host memory for blocks of the cache in float64"};
  }
  return {};
}

}  // namespace mla::bench
