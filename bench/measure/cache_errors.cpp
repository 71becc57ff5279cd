#include "bench/measure/cache_errors.h"

#include <fmt/format.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <functional>
#include <new>
#include <string>

#include "reference/parallel_for.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Tokens that are in double at once.
constexpr int kBlock = 512;

/// Fills a row [576] with what a cache says of a token.
using Row = std::function<void(int token, double* row)>;

struct Decoded {
  Matrix out;           // [heads, 512]
  Eigen::VectorXd lse;  // [heads]
};

Status check(const ErrorCase& spec) {
  const auto refused = [](const std::string& what, const char* allowed) {
    return Status(StatusCode::kInvalidArgument, what + " must be " + allowed);
  };
  if (spec.tokens < 1) return refused(fmt::format("tokens = {}", spec.tokens), "at least 1");
  if (spec.heads < 1) return refused(fmt::format("heads = {}", spec.heads), "at least 1");
  if (!(spec.deviation > 0) || std::isinf(spec.deviation)) {
    return refused(fmt::format("deviation = {}", spec.deviation), "finite and greater than 0");
  }
  if (spec.outliers < 0 || spec.outliers > kHeadDimV) {
    return refused(fmt::format("outliers = {}", spec.outliers), "0 to 512");
  }
  return {};
}

bool is_outlier(const ErrorCase& spec, int column) {
  for (int i = 0; i < spec.outliers; ++i) {
    if (i * kHeadDimV / spec.outliers == column) return true;
  }
  return false;
}

/// The values as they are: [tokens, 576].
std::vector<float> exact_values(const ErrorCase& spec, int num_threads) {
  std::vector<float> values(static_cast<size_t>(spec.tokens) * kHeadDimQK);
  std::vector<bool> outlier;
  for (int column = 0; column < kHeadDimV; ++column) outlier.push_back(is_outlier(spec, column));
  parallel_for(spec.tokens, num_threads, [&](int64_t token) {
    const uint64_t key = generator::row_key(spec.seed, generator::Stream::kCache, 0, token, 0);
    float* const row = &values[static_cast<size_t>(token) * kHeadDimQK];
    for (int column = 0; column < kHeadDimQK; ++column) {
      row[column] = generator::normal_tenth(key, column);
    }
    for (int column = 0; column < kHeadDimV; ++column) {
      if (outlier[static_cast<size_t>(column)]) row[column] *= kOutlierFactor;
    }
  });
  return values;
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

/// Calls visit(first, rows [block, 576]) for the tokens, block by block.
template <typename Visit>
void for_each_block(int tokens, const Row& row, int num_threads, const Visit& visit) {
  for (int first = 0; first < tokens; first += kBlock) {
    Matrix rows(std::min(kBlock, tokens - first), kHeadDimQK);
    parallel_for(rows.rows(), num_threads,
                 [&](int64_t i) { row(first + static_cast<int>(i), rows.row(i).data()); });
    visit(first, rows);
  }
}

/// S = Q K^T, without the scale.  [heads, tokens]
Matrix scores_of(const Matrix& q, int tokens, const Row& row, int num_threads) {
  Matrix scores(q.rows(), tokens);
  for_each_block(tokens, row, num_threads, [&](int first, const Matrix& keys) {
    scores.middleCols(first, keys.rows()).noalias() = q * keys.transpose();
  });
  return scores;
}

Decoded decode(const Matrix& q, double scale, int tokens, const Row& row, int num_threads) {
  Matrix weights = scale * scores_of(q, tokens, row, num_threads);
  Decoded result;
  result.lse.resize(q.rows());
  for (Eigen::Index head = 0; head < q.rows(); ++head) {
    const double m = weights.row(head).maxCoeff();
    weights.row(head) = (weights.row(head).array() - m).exp();
    const double l = weights.row(head).sum();
    weights.row(head) /= l;
    result.lse(head) = m + std::log(l);
  }
  result.out = Matrix::Zero(q.rows(), kHeadDimV);
  for_each_block(tokens, row, num_threads, [&](int first, const Matrix& values) {
    result.out.noalias() += weights.middleCols(first, values.rows()) * values.leftCols(kHeadDimV);
  });
  return result;
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

CacheErrors decode_all(const ErrorCase& spec, ScaleRule rule, int num_threads) {
  const std::vector<float> exact = exact_values(spec, num_threads);
  const Matrix q = queries(spec);
  const auto value = [&](int token, int column) {
    return exact[static_cast<size_t>(token) * kHeadDimQK + static_cast<size_t>(column)];
  };
  const auto bf16 = [&](int token, int column) {
    return to_float(DType::kBFloat16, round_to_bfloat16(value(token, column)));
  };
  const Row as_it_is = [&](int token, double* row) {
    for (int column = 0; column < kHeadDimQK; ++column) row[column] = double{value(token, column)};
  };
  const Row in_bf16 = [&](int token, double* row) {
    for (int column = 0; column < kHeadDimQK; ++column) row[column] = double{bf16(token, column)};
  };
  const Matrix scores = scores_of(q, spec.tokens, as_it_is, num_threads);
  const double mean = scores.mean();
  const double square = (scores.array() - mean).square().mean();
  // One token has one logit: then the scale is that of logits as large as q.k.
  const double scale = spec.deviation / (square > 0 ? std::sqrt(square)
                                                    : std::max(scores.cwiseAbs().maxCoeff(), 1e-9));

  const Decoded truth = decode(q, scale, spec.tokens, as_it_is, num_threads);
  const Decoded plain = decode(q, scale, spec.tokens, in_bf16, num_threads);
  CacheErrors errors{scale, {{CacheFormat::k16Bit, 0, distance(spec, plain, truth), {}}}};
  float largest = 0;
  for (const float x : exact) largest = std::max(largest, std::abs(x));
  for (const CacheFormat format : kCacheFormats) {
    if (!is_quantised(format)) continue;
    Problem problem;
    problem.cache_format = format;
    problem.cache_scale =
        scale_for(format, to_float(DType::kBFloat16, round_to_bfloat16(largest)), rule);
    const Row quantised = [&](int token, double* row) {
      float values[kHeadDimQK];
      alignas(16) uint8_t codes[kTileRowBytes];
      for (int column = 0; column < kHeadDimQK; ++column) values[column] = bf16(token, column);
      quantise_row(problem, rule, values, codes);
      dequantise_row(problem, codes, row);
    };
    const Decoded result = decode(q, scale, spec.tokens, quantised, num_threads);
    errors.all.push_back({format, format == CacheFormat::kFp8Tensor ? problem.cache_scale : 0,
                          distance(spec, result, truth), distance(spec, result, plain)});
  }
  return errors;
}

}  // namespace

Status cache_errors(const ErrorCase& spec, ScaleRule rule, CacheErrors* errors, int num_threads) {
  MLA_RETURN_IF_ERROR(check(spec));
  try {
    *errors = decode_all(spec, rule, num_threads);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory,
            "no memory for " + std::to_string(spec.tokens) + " tokens in double"};
  }
  return {};
}

}  // namespace mla::bench
