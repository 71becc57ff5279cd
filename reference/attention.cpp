#include "reference/attention.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>

#include "reference/float16.h"
#include "reference/parallel_for.h"
#include "reference/quantise.h"

namespace mla {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using FloatMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Rows of the result that are evaluated together, as one matrix: query heads of one KV head, and
/// query tokens of one sequence that see the same tokens.
struct RowTile {
  int sequence;
  int head_kv;
  int64_t tokens;         ///< The tile's rows see tokens 0 ... tokens - 1.
  int64_t first_request;  ///< Index of the first query token among the requested ones.
  int64_t first_row;      ///< Rows count from (first_request, first head of head_kv), head fastest.
  int64_t num_rows;
};

constexpr int64_t kRowsPerTile = 64;

/// The tokens that query token `row` sees: a prefix of its sequence.
int64_t tokens_seen(const Problem& problem, const Tensors& tensors, const QueryRow& row) {
  return std::max<int64_t>(problem.visible_tokens(tensors.seqlens_k[row.sequence], row.query), 0);
}

std::vector<RowTile> make_tiles(const Problem& problem, const Tensors& tensors,
                                std::span<const QueryRow> requests) {
  std::vector<RowTile> tiles;
  const auto count = static_cast<int64_t>(requests.size());
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const int sequence = requests[size_t(begin)].sequence;
    const int64_t tokens = tokens_seen(problem, tensors, requests[size_t(begin)]);
    for (end = begin + 1; end < count; ++end) {
      const QueryRow& next = requests[size_t(end)];
      if (next.sequence != sequence || tokens_seen(problem, tensors, next) != tokens) break;
    }
    const int64_t rows = (end - begin) * problem.group_size();
    for (int head_kv = 0; head_kv < problem.num_heads_kv; ++head_kv) {
      for (int64_t first = 0; first < rows; first += kRowsPerTile) {
        tiles.push_back(
            {sequence, head_kv, tokens, begin, first, std::min(kRowsPerTile, rows - first)});
      }
    }
  }
  return tiles;
}

/// Evaluates tiles for one element type: that of q, and of a cache of 16 bits.
template <typename T>
class Evaluator {
 public:
  /// The result's tensors have their size; lse is [requests, num_heads_q].
  Evaluator(const Problem& problem, const Tensors& tensors, std::span<const QueryRow> requests,
            ReferenceResult* result)
      : problem_(problem), tensors_(tensors), requests_(requests), result_(*result) {}

  void evaluate(const RowTile& tile) const {
    if (tile.tokens == 0) {
      for (int64_t r = 0; r < tile.num_rows; ++r) {
        // out and the sizes are 0 from the start.
        result_.lse[size_t(result_row(tile, r))] = std::numeric_limits<double>::infinity();
      }
      return;
    }

    // Q [rows, 576]
    Matrix q(tile.num_rows, kHeadDimQK);
    for (int64_t r = 0; r < tile.num_rows; ++r) q.row(r) = load_row(tensors_.q, q_place(tile, r));

    // S = scale * Q K^T [rows, tokens], a grain of K [64, 576] at a time
    const double scale = double{problem_.softmax_scale};
    Matrix s(tile.num_rows, tile.tokens);
    Matrix k(kGrainTokens, kHeadDimQK);
    Eigen::VectorXd v_square(tile.tokens);                                // |v|^2 of each token
    double k_square = 0;                                                  // the largest |k|^2
    Eigen::RowVectorXd k_largest = Eigen::RowVectorXd::Zero(kHeadDimQK);  // |k| of each column
    for (int64_t t = 0; t < tile.tokens; t += kGrainTokens) {
      const int64_t n = load_keys(tile, t, &k);
      s.middleCols(t, n).noalias() = scale * (q * k.topRows(n).transpose());
      for (int64_t i = 0; i < n; ++i) {
        v_square(t + i) = k.row(i).head<kHeadDimV>().squaredNorm();
        const double square =
            v_square(t + i) + k.row(i).tail<kHeadDimQK - kHeadDimV>().squaredNorm();
        // An infinite key gives a weight of 0, or NaN to the whole row.
        if (!std::isfinite(square)) continue;
        k_square = std::max(k_square, square);
        k_largest = k_largest.cwiseMax(k.row(i).cwiseAbs());
      }
    }

    // P = exp(S - max S), in place of S; l = sum of P; lse = max S + ln l
    Eigen::VectorXd l(tile.num_rows);
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      const double max = s.row(r).maxCoeff();
      // Not Eigen's exp(): it bounds its argument, which would turn a NaN into a number.
      s.row(r) = s.row(r).unaryExpr([max](double logit) { return std::exp(logit - max); });
      l(r) = s.row(r).sum();
      result_.lse[size_t(result_row(tile, r))] = max + std::log(l(r));
    }

    // O = P V / l [rows, 512]; V is the first 512 columns of K. Its size: the same of magnitudes,
    // with weights as they count when they are rounded to 16 bits; fp32 is enough for it.
    Matrix o = Matrix::Zero(tile.num_rows, kHeadDimV);
    FloatMatrix size = FloatMatrix::Zero(tile.num_rows, kHeadDimV);
    const auto rounded = [dtype = problem_.dtype](double p) {
      return static_cast<float>(rounded_size(dtype, p));
    };
    for (int64_t t = 0; t < tile.tokens; t += kGrainTokens) {
      const int64_t n = load_keys(tile, t, &k);
      o.noalias() += s.middleCols(t, n) * k.topLeftCorner(n, kHeadDimV);
      size.noalias() += s.middleCols(t, n).unaryExpr(rounded) *
                        k.topLeftCorner(n, kHeadDimV).cwiseAbs().template cast<float>();
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      const int64_t row = result_row(tile, r);
      Eigen::Map<Eigen::RowVectorXd> out(result_.out.data() + row * kHeadDimV, kHeadDimV);
      out = o.row(r) / l(r);
      Eigen::Map<Eigen::RowVectorXd>(result_.out_size.data() + row * kHeadDimV, kHeadDimV) =
          size.row(r).template cast<double>() / l(r);
      RowSize& row_size = result_.row_size[size_t(row)];
      row_size = size_of_row(s.row(r), l(r), v_square, out.squaredNorm());
      row_size.logit = std::abs(scale) * std::min(q.row(r).norm() * std::sqrt(k_square),
                                                  q.row(r).cwiseAbs().dot(k_largest));
    }
  }

 private:
  /// The RowSize of weights p / l, of which the largest p is 1; all but the logits' size.
  RowSize size_of_row(const Eigen::RowVectorXd& p, double l, const Eigen::VectorXd& v_square,
                      double out_square) const {
    double squares = 0, second_moment = 0, subnormal = 0;
    for (Eigen::Index t = 0; t < p.size(); ++t) {
      if (p(t) == 0) continue;  // whatever V is
      squares += p(t) * p(t) * v_square(t);
      second_moment += p(t) * v_square(t);
      if (p(t) < smallest_normal(problem_.dtype)) {
        subnormal += rounded_size(problem_.dtype, p(t)) * std::sqrt(v_square(t));
      }
    }
    RowSize size;
    size.tokens = static_cast<double>(p.size());
    size.rounding = (std::sqrt(squares) + subnormal) / l;
    size.spread = std::sqrt(std::max(0.0, second_moment / l - out_square));
    return size;
  }

  /// The 576 values from element `place` of a tensor on, in double.
  static Eigen::Matrix<double, 1, kHeadDimQK> load_row(const void* tensor, int64_t place) {
    const T* const values = static_cast<const T*>(tensor) + place;
    return Eigen::Map<const Eigen::Matrix<T, 1, kHeadDimQK>>(values).template cast<double>();
  }

  /// Fills k with the keys of tokens t ... t + n - 1, the grain's part of those the tile sees;
  /// returns n.
  int64_t load_keys(const RowTile& tile, int64_t t, Matrix* k) const {
    const int32_t* const table_row = tensors_.table_row(tile.sequence);
    const int64_t n = std::min<int64_t>(kGrainTokens, tile.tokens - t);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place =
          cache_place(problem_, tensors_, table_row, static_cast<int>(t + i), tile.head_kv);
      if (is_quantised(problem_.cache_format)) {
        const auto* const row = static_cast<const uint8_t*>(tensors_.kv_cache) + place;
        dequantise_row(problem_, row, k->row(i).data());
      } else {
        k->row(i) = load_row(tensors_.kv_cache, place);
      }
    }
    return n;
  }

  int64_t request(const RowTile& tile, int64_t r) const {
    return tile.first_request + (tile.first_row + r) / problem_.group_size();
  }
  /// Query head of the tile's row r: KV head g serves heads g * group_size ... (g + 1) *
  /// group_size - 1.
  int64_t head(const RowTile& tile, int64_t r) const {
    const int group_size = problem_.group_size();
    return int64_t{tile.head_kv} * group_size + (tile.first_row + r) % group_size;
  }
  int64_t q_place(const RowTile& tile, int64_t r) const {
    const QueryRow& row = requests_[size_t(request(tile, r))];
    return tensors_.q_place(row.sequence, row.query, static_cast<int>(head(tile, r)));
  }
  int64_t result_row(const RowTile& tile, int64_t r) const {
    return request(tile, r) * problem_.num_heads_q + head(tile, r);
  }

  const Problem& problem_;
  const Tensors& tensors_;
  std::span<const QueryRow> requests_;
  ReferenceResult& result_;
};

Status check(const Problem& problem, Tensors tensors, const ReferenceResult* result,
             int num_threads) {
  alignas(16) static std::byte unused[16];  // out and lse are not ours to check
  tensors.out = unused;
  tensors.lse = reinterpret_cast<float*>(unused);
  tensors.out_strides = tensors.lse_strides = {};
  MLA_RETURN_IF_ERROR(validate(problem, tensors));
  MLA_RETURN_IF_ERROR(
      validate_paging(problem, tensors.block_table, tensors.seqlens_k, tensors.block_table_stride));
  if (result == nullptr) return {StatusCode::kInvalidArgument, "result is null"};
  if (num_threads < 0) {
    return {StatusCode::kInvalidArgument,
            "num_threads = " + std::to_string(num_threads) + " must be at least 0"};
  }
  return {};
}

Status check_rows(const Problem& problem, std::span<const QueryRow> rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string row = "rows[" + std::to_string(i) + "]";
    if (rows[i].sequence < 0 || rows[i].sequence >= problem.batch) {
      return {StatusCode::kOutOfRange,
              row + ".sequence = " + std::to_string(rows[i].sequence) +
                  " must be in [0, batch = " + std::to_string(problem.batch) + ")"};
    }
    if (rows[i].query < 0 || rows[i].query >= problem.seqlen_q) {
      return {StatusCode::kOutOfRange,
              row + ".query = " + std::to_string(rows[i].query) +
                  " must be in [0, seqlen_q = " + std::to_string(problem.seqlen_q) + ")"};
    }
  }
  return {};
}

/// out [rows, num_heads_q, 512] and lse [rows, num_heads_q] of a checked problem.
ReferenceResult evaluate(const Problem& problem, const Tensors& given,
                         std::span<const QueryRow> rows, int num_threads) {
  const Tensors tensors = with_strides(problem, given);
  ReferenceResult result;
  const size_t heads = rows.size() * static_cast<size_t>(problem.num_heads_q);
  result.out.resize(heads * kHeadDimV);
  result.lse.resize(heads);
  result.out_size.resize(result.out.size());
  result.row_size.resize(heads);
  const std::vector<RowTile> tiles = make_tiles(problem, tensors, rows);
  visit_dtype(problem.dtype, [&](auto zero) {
    const Evaluator<decltype(zero)> evaluator(problem, tensors, rows, &result);
    parallel_for(static_cast<int64_t>(tiles.size()), num_threads,
                 [&](int64_t i) { evaluator.evaluate(tiles[size_t(i)]); });
  });
  return result;
}

/// lse from [batch, seqlen_q, num_heads_q] to [batch, num_heads_q, seqlen_q].
std::vector<double> transpose_lse(const Problem& problem, const std::vector<double>& lse) {
  std::vector<double> transposed(lse.size());
  const int64_t rows = problem.seqlen_q;
  const int64_t heads = problem.num_heads_q;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t offset = b * rows * heads;
    Eigen::Map<Matrix>(transposed.data() + offset, heads, rows) =
        Eigen::Map<const Matrix>(lse.data() + offset, rows, heads).transpose();
  }
  return transposed;
}

}  // namespace

Status reference_attention_rows(const Problem& problem, const Tensors& tensors,
                                std::span<const QueryRow> rows, ReferenceResult* result,
                                int num_threads) {
  MLA_RETURN_IF_ERROR(check(problem, tensors, result, num_threads));
  MLA_RETURN_IF_ERROR(check_rows(problem, rows));
  try {
    *result = evaluate(problem, tensors, rows, num_threads);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory,
            "not enough memory for the scores and results of the reference"};
  }
  return {};
}

Status reference_attention(const Problem& problem, const Tensors& tensors, ReferenceResult* result,
                           int num_threads) {
  MLA_RETURN_IF_ERROR(check(problem, tensors, result, num_threads));
  try {
    std::vector<QueryRow> rows;
    for (int b = 0; b < problem.batch; ++b) {
      for (int query = 0; query < problem.seqlen_q; ++query) rows.push_back({b, query});
    }
    ReferenceResult whole = evaluate(problem, tensors, rows, num_threads);
    whole.lse = transpose_lse(problem, whole.lse);
    *result = std::move(whole);
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory,
            "not enough memory for the scores and results of the reference"};
  }
  return {};
}

}  // namespace mla
