/// @file
/// 00_reference: the formula on the CPU, in double. Every later stage computes this and nothing else.
///
///     S[row, t] = scale * <q_row, k_t>
///     P[row, t] = exp(S[row, t] - m)                m = max_t S[row, t]
///     O[row, :] = sum_t P[row, t] * v_t / l         l = sum_t P[row, t]
///
/// A row is one query head of one query token. v_t is the first 512 of the 576 columns of k_t.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/float16.h"
#include "reference/problem.h"

namespace mla::model::plain {

/// In double, row by row.
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// [rows, 576] 16-bit values, each row `stride` elements after the one before, in double.
template <typename T>
Matrix load(const T* first, int64_t rows, int64_t stride) {
  using Stored = Eigen::Matrix<T, Eigen::Dynamic, kHeadDimQK, Eigen::RowMajor>;
  const Eigen::OuterStride<> outer(stride);
  return Eigen::Map<const Stored, 0, Eigen::OuterStride<>>(first, rows, kHeadDimQK, outer)
      .template cast<double>();
}

/// The rows of one query token that share a KV head: `heads` rows, which see the same `tokens`.
template <typename T>
void attend(const Problem& problem, const Tensors& tensors, int sequence, int query, int head_kv) {
  const int seqlen_k = clamped_length(problem, tensors.seqlens_k[sequence]);
  const int tokens = std::max(0, static_cast<int>(problem.visible_tokens(seqlen_k, query)));
  const int heads = problem.group_size(), first_head = head_kv * heads;
  const double scale = problem.softmax_scale;

  // K of the page that begins with token t  [n, 576]; of the last page only what is seen.
  const auto keys = [&](int t) {
    const int64_t page = tensors.table_row(sequence)[problem.page_of(t)];
    return load(static_cast<const T*>(tensors.kv_cache) + tensors.page_place(page, 0, head_kv),
                std::min(problem.page_size, tokens - t), tensors.kv_strides.token);
  };
  const Matrix q =
      load(static_cast<const T*>(tensors.q) + tensors.q_place(sequence, query, first_head), heads,
           tensors.q_strides.head);

  Matrix o = Matrix::Zero(heads, kHeadDimV);  // what a row gives that sees nothing
  Eigen::VectorXd lse = Eigen::VectorXd::Constant(heads, std::numeric_limits<double>::infinity());
  if (tokens > 0) {
    // S = scale Q K^T  [heads, tokens]
    Matrix s(heads, tokens);
    for (int t = 0; t < tokens; t += problem.page_size) {
      const Matrix k = keys(t);
      s.middleCols(t, k.rows()).noalias() = scale * q * k.transpose();
    }

    // P = exp(S - m)  [heads, tokens]. Not Eigen's exp(): that makes a number of a NaN.
    const Eigen::VectorXd m = s.rowwise().maxCoeff();
    const Matrix p = (s.colwise() - m).unaryExpr([](double x) { return std::exp(x); });
    const Eigen::VectorXd l = p.rowwise().sum();

    // O = P V / l  [heads, 512]; V is the first 512 columns of K
    for (int t = 0; t < tokens; t += problem.page_size) {
      const Matrix k = keys(t);
      o.noalias() += p.middleCols(t, k.rows()) * k.leftCols<kHeadDimV>();
    }
    o.array().colwise() /= l.array();
    lse = m.array() + l.array().log();
  }

  for (int row = 0; row < heads; ++row) {
    T* out = static_cast<T*>(tensors.out) +
             tensors.out_place(sequence, query, first_head + row);  // [512]
    for (int c = 0; c < kHeadDimV; ++c) out[c] = from_float<T>(static_cast<float>(o(row, c)));
    tensors.lse[tensors.lse_place(sequence, query, first_head + row)] =
        static_cast<float>(lse(row));
  }
}

}  // namespace mla::model::plain
