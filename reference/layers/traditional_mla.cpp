#include "reference/layers/traditional_mla.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <thread>
#include <utility>

#include "reference/parallel_for.h"

namespace mla::traditional {
namespace {

using Eigen::Index;

/// A view of whole or partial rows; never a copy, as all matrices here are row-major.
template <typename T>
using View = Eigen::Ref<Matrix<T>>;
template <typename T>
using ConstView = Eigen::Ref<const Matrix<T>>;

int thread_count(int num_threads) {
  if (num_threads > 0) return num_threads;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

/// Rows that a thread takes at a time. Several such groups per thread, as later rows of a causal mask
/// have more to do, but none so small that packing the other operand would cost more than the
/// product.
Index block_rows(Index rows, int num_threads) {
  constexpr Index kLeastRows = 32;
  const Index blocks_wanted = 4 * Index{thread_count(num_threads)};
  return std::max(kLeastRows, (rows + blocks_wanted - 1) / blocks_wanted);
}

/// Calls body(first, count) for blocks of [0, rows).
template <typename Body>
void for_row_blocks(Index rows, int num_threads, Body&& body) {
  const Index block = block_rows(rows, num_threads);
  parallel_for((rows + block - 1) / block, num_threads, [&](int64_t i) {
    const Index first = static_cast<Index>(i) * block;
    body(first, std::min(block, rows - first));
  });
}

/// y = x weight[:, first : first + y.cols()] + bias of the same columns
template <typename T>
void apply_columns(const Linear<T>& linear, Index first, const ConstView<T>& x, View<T> y) {
  y.noalias() = x * linear.weight.middleCols(first, y.cols());
  if (linear.bias.size() > 0) y.rowwise() += linear.bias.segment(first, y.cols());
}

/// x weight + bias, rows shared out to threads
template <typename T>
Matrix<T> apply(const Linear<T>& linear, const Matrix<T>& x, int num_threads) {
  Matrix<T> y(x.rows(), linear.weight.cols());
  for_row_blocks(x.rows(), num_threads, [&](Index first, Index rows) {
    apply_columns<T>(linear, 0, x.middleRows(first, rows), y.middleRows(first, rows));
  });
  return y;
}

/// Calls body(first, count) for blocks of [0, tokens) that do not cross a chunk's end.
template <typename Body>
void for_chunked_row_blocks(Index tokens, Index chunk, int num_threads, Body&& body) {
  for (Index begin = 0; begin < tokens; begin += chunk) {
    for_row_blocks(std::min(chunk, tokens - begin), num_threads,
                   [&](Index first, Index rows) { body(begin + first, rows); });
  }
}

/// Turns the scores of queries first_query, first_query + 1, ... into probabilities, in place.
template <typename T>
void softmax_rows(const Mask& mask, Index first_query, View<T> s) {
  for (Index r = 0; r < s.rows(); ++r) {
    T* const row = s.row(r).data();
    const Index query = first_query + r;
    const Index end = mask.end(query, s.cols());
    std::fill(row + end, row + s.cols(), T{0});

    // What is masked becomes -inf, and its exponential 0.
    Index seen = end;
    if (!mask.dense()) {
      seen = 0;
      for (Index t = 0; t < end; ++t) {
        if (mask.visible(query, t)) {
          ++seen;
        } else {
          row[t] = -std::numeric_limits<T>::infinity();
        }
      }
    }
    if (seen == 0) {  // there is no maximum, and no sum to divide by
      std::fill(row, row + end, T{0});
      continue;
    }

    // p_t = exp(s_t - max s) / sum_t exp(s_t - max s)
    T max = -std::numeric_limits<T>::infinity();
    for (Index t = 0; t < end; ++t) max = std::max(max, row[t]);
    T sum = 0;
    for (Index t = 0; t < end; ++t) {
      row[t] = std::exp(row[t] - max);
      sum += row[t];
    }
    for (Index t = 0; t < end; ++t) row[t] /= sum;
  }
}

/// One head for some queries: o [rows, d] of q [rows, d], k [N, d], v [N, d]. The scores go to
/// s [rows, N], whose columns past what the last query sees stay as they are.
template <typename T>
void attend_rows(const ConstView<T>& q, const ConstView<T>& k, const ConstView<T>& v,
                 const Mask& mask, Index first_query, View<T> s, View<T> o) {
  const T scale = T{1} / std::sqrt(static_cast<T>(q.cols()));
  const Index end = mask.end(first_query + q.rows() - 1, k.rows());
  auto seen = s.leftCols(end);
  seen.noalias() = (scale * q) * k.topRows(end).transpose();
  softmax_rows<T>(mask, first_query, seen);
  o.noalias() = seen * v.topRows(end);
}

// ---- checks -----------------------------------------------------------------------------------

std::string shape(Index rows, Index cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

Status invalid(std::string message) {
  return {StatusCode::kInvalidArgument, std::move(message)};
}

template <typename T>
Status check_linear(const char* name, const Linear<T>& linear, Index in, Index out,
                    const char* expected) {
  if (linear.weight.rows() != in || linear.weight.cols() != out) {
    return invalid(std::string(name) + ".weight is " +
                   shape(linear.weight.rows(), linear.weight.cols()) + "; it must be " + expected +
                   " = " + shape(in, out));
  }
  if (linear.bias.size() != 0 && linear.bias.size() != out) {
    return invalid(std::string(name) + ".bias has " + std::to_string(linear.bias.size()) +
                   " values; it must have none or " + std::to_string(out));
  }
  return {};
}

template <typename T>
Status check_weights(const LatentWeights<T>& w) {
  const Index d_model = w.query.weight.rows();
  const Index width = w.latent_query.weight.cols();
  if (d_model < 1) return invalid("query.weight is empty; d_model must be at least 1");
  if (width < 1) return invalid("latent_query.weight has no columns; D' must be at least 1");
  for (const auto& [name, linear] :
       {std::pair{"query", &w.query}, {"key", &w.key}, {"value", &w.value}}) {
    MLA_RETURN_IF_ERROR(check_linear(name, *linear, d_model, d_model, "[d_model, d_model]"));
  }
  for (const auto& [name, linear] : {std::pair{"latent_query", &w.latent_query},
                                     {"latent_key", &w.latent_key},
                                     {"latent_value", &w.latent_value}}) {
    MLA_RETURN_IF_ERROR(check_linear(name, *linear, d_model, width, "[d_model, D']"));
  }
  MLA_RETURN_IF_ERROR(
      check_linear("reconstruction", w.reconstruction, width, d_model, "[D', d_model]"));
  return check_linear("output", w.output, d_model, d_model, "[d_model, d_model]");
}

template <typename T>
Status check_weights(const FusedLatentWeights<T>& w) {
  const Index width = w.reconstruction.weight.rows();
  const Index d_model = w.reconstruction.weight.cols();
  if (width < 1 || d_model < 1) {
    return invalid("reconstruction.weight is " + shape(width, d_model) +
                   "; D' and d_model must be at least 1");
  }
  MLA_RETURN_IF_ERROR(check_linear("projection", w.projection, d_model, d_model + 3 * width,
                                   "[d_model, d_model + 3D']"));
  MLA_RETURN_IF_ERROR(
      check_linear("reconstruction", w.reconstruction, width, d_model, "[D', d_model]"));
  return check_linear("output", w.output, d_model, d_model, "[d_model, d_model]");
}

template <typename T>
Status check_weights(const MultiHeadWeights<T>& w) {
  const Index d_model = w.query.weight.rows();
  const Index width = w.query.weight.cols();
  if (d_model < 1 || width < 1) {
    return invalid("query.weight is empty; it must be [d_model, heads head_dim]");
  }
  if (w.num_heads < 1 || width % w.num_heads != 0) {
    return invalid("num_heads = " + std::to_string(w.num_heads) + " must divide the " +
                   std::to_string(width) + " columns of query.weight");
  }
  for (const auto& [name, linear] :
       {std::pair{"query", &w.query}, {"key", &w.key}, {"value", &w.value}}) {
    MLA_RETURN_IF_ERROR(check_linear(name, *linear, d_model, width, "[d_model, heads head_dim]"));
  }
  return check_linear("output", w.output, width, d_model, "[heads head_dim, d_model]");
}

template <typename T>
Status check_call(Index d_model, const Matrix<T>& x, const Mask& mask, const ChunkOptions& options,
                  const Matrix<T>* y) {
  if (x.rows() < 1) return invalid("x has no rows; it must have at least one token");
  if (x.cols() != d_model) {
    return invalid("x is " + shape(x.rows(), x.cols()) +
                   "; it must have d_model = " + std::to_string(d_model) + " columns");
  }
  MLA_RETURN_IF_ERROR(mask.check());
  if (options.chunk_size < 1) {
    return invalid("chunk_size = " + std::to_string(options.chunk_size) + " must be at least 1");
  }
  if (options.num_threads < 0) {
    return invalid("num_threads = " + std::to_string(options.num_threads) + " must be at least 0");
  }
  if (y == nullptr) return invalid("y is null");
  return {};
}

/// body(), with short memory as a status.
template <typename Body>
Status catch_bad_alloc(Body&& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "not enough memory for the scores and results of the layer"};
  }
  return {};
}

// ---- evaluation -------------------------------------------------------------------------------

template <typename T>
Matrix<T> evaluate_plain(const LatentWeights<T>& w, const Matrix<T>& x, const Mask& mask,
                         int threads) {
  // Q, K, V [N, d_model], from x
  const Matrix<T> full_q = apply(w.query, x, threads);
  const Matrix<T> full_k = apply(w.key, x, threads);
  const Matrix<T> full_v = apply(w.value, x, threads);

  // q, k, v [N, D']
  const Matrix<T> q = apply(w.latent_query, full_q, threads);
  const Matrix<T> k = apply(w.latent_key, full_k, threads);
  const Matrix<T> v = apply(w.latent_value, full_v, threads);

  // P = softmax(q k^T / sqrt(D')) [N, N]; o = P v [N, D']
  Matrix<T> p(x.rows(), x.rows());
  Matrix<T> o(x.rows(), q.cols());
  for_row_blocks(x.rows(), threads, [&](Index first, Index rows) {
    attend_rows<T>(q.middleRows(first, rows), k, v, mask, first, p.middleRows(first, rows),
                   o.middleRows(first, rows));
  });

  // y = (o R) W_O [N, d_model]
  return apply(w.output, apply(w.reconstruction, o, threads), threads);
}

template <typename T>
Matrix<T> evaluate_plain(const MultiHeadWeights<T>& w, const Matrix<T>& x, const Mask& mask,
                         int threads) {
  // Q, K, V [N, heads head_dim]
  const Matrix<T> q = apply(w.query, x, threads);
  const Matrix<T> k = apply(w.key, x, threads);
  const Matrix<T> v = apply(w.value, x, threads);

  Matrix<T> p(x.rows(), x.rows());
  Matrix<T> o(x.rows(), q.cols());
  const Index dim = q.cols() / w.num_heads;
  for (Index head = 0; head < w.num_heads; ++head) {
    // P_i = softmax(Q_i K_i^T / sqrt(head_dim)) [N, N]; o_i = P_i V_i [N, head_dim]
    const Index column = head * dim;
    for_row_blocks(x.rows(), threads, [&](Index first, Index rows) {
      attend_rows<T>(q.block(first, column, rows, dim), k.middleCols(column, dim),
                     v.middleCols(column, dim), mask, first, p.middleRows(first, rows),
                     o.block(first, column, rows, dim));
    });
  }
  return apply(w.output, o, threads);
}

/// The result of a chunked latent layer.
template <typename T>
struct LatentResult {
  Matrix<T> y;           // [N, d_model]
  Matrix<T> full_query;  // [N, d_model] or empty
};

template <typename T>
LatentResult<T> evaluate_chunked(const FusedLatentWeights<T>& w, const Matrix<T>& x,
                                 const Mask& mask, const ChunkOptions& options,
                                 bool want_full_query) {
  const Index tokens = x.rows();
  const Index d_model = x.cols();
  const Index width = w.reconstruction.weight.rows();
  const Index chunk = std::min<Index>(options.chunk_size, tokens);
  LatentResult<T> result;
  result.y.resize(tokens, d_model);
  if (want_full_query) result.full_query.resize(tokens, d_model);

  // [ Q | q | k | v ] = x F + f [N, d_model + 3D'], Q only if it is wanted
  Matrix<T> qkv(tokens, 3 * width);
  for_chunked_row_blocks(tokens, chunk, options.num_threads, [&](Index first, Index rows) {
    const auto x_rows = x.middleRows(first, rows);
    apply_columns<T>(w.projection, d_model, x_rows, qkv.middleRows(first, rows));
    if (want_full_query) {
      apply_columns<T>(w.projection, 0, x_rows, result.full_query.middleRows(first, rows));
    }
  });
  const auto q = qkv.leftCols(width);
  const auto k = qkv.middleCols(width, width);
  const auto v = qkv.rightCols(width);

  Matrix<T> p(chunk, tokens);  // all the scores there ever are
  Matrix<T> o(chunk, width);
  Matrix<T> r(chunk, d_model);
  for (Index begin = 0; begin < tokens; begin += chunk) {
    const Index count = std::min(chunk, tokens - begin);
    for_row_blocks(count, options.num_threads, [&](Index first, Index rows) {
      auto o_rows = o.middleRows(first, rows);
      auto r_rows = r.middleRows(first, rows);
      attend_rows<T>(q.middleRows(begin + first, rows), k, v, mask, begin + first,
                     p.middleRows(first, rows), o_rows);
      apply_columns<T>(w.reconstruction, 0, o_rows, r_rows);
      apply_columns<T>(w.output, 0, r_rows, result.y.middleRows(begin + first, rows));
    });
  }
  return result;
}

template <typename T>
Matrix<T> evaluate_chunked(const MultiHeadWeights<T>& w, const Matrix<T>& x, const Mask& mask,
                           const ChunkOptions& options) {
  const Index tokens = x.rows();
  const Index chunk = std::min<Index>(options.chunk_size, tokens);
  Matrix<T> y(tokens, x.cols());

  // Q, K, V [N, heads head_dim]
  const Index width = w.query.weight.cols();
  Matrix<T> q(tokens, width), k(tokens, width), v(tokens, width);
  for_chunked_row_blocks(tokens, chunk, options.num_threads, [&](Index first, Index rows) {
    const auto x_rows = x.middleRows(first, rows);
    apply_columns<T>(w.query, 0, x_rows, q.middleRows(first, rows));
    apply_columns<T>(w.key, 0, x_rows, k.middleRows(first, rows));
    apply_columns<T>(w.value, 0, x_rows, v.middleRows(first, rows));
  });

  const Index dim = q.cols() / w.num_heads;
  Matrix<T> p(chunk, tokens);  // one head's
  Matrix<T> o(chunk, q.cols());
  for (Index begin = 0; begin < tokens; begin += chunk) {
    const Index count = std::min(chunk, tokens - begin);
    for_row_blocks(count, options.num_threads, [&](Index first, Index rows) {
      for (Index column = 0; column < q.cols(); column += dim) {
        attend_rows<T>(q.block(begin + first, column, rows, dim), k.middleCols(column, dim),
                       v.middleCols(column, dim), mask, begin + first, p.middleRows(first, rows),
                       o.block(first, column, rows, dim));
      }
      apply_columns<T>(w.output, 0, o.middleRows(first, rows), y.middleRows(begin + first, rows));
    });
  }
  return y;
}

/// What chunked_memory_bound() says; `largest_weight` in elements.
template <typename T>
int64_t memory_bound(int64_t tokens, int64_t d_model, int64_t qkv_width, int64_t out_width,
                     int64_t head_dim, int64_t largest_weight, const ChunkOptions& options) {
  const int64_t chunk = std::min(options.chunk_size, tokens);
  const int64_t results = tokens * (d_model + qkv_width);
  const int64_t chunks = chunk * (tokens + out_width + d_model);
  const int64_t packed =
      block_rows(chunk, options.num_threads) * std::max({tokens, d_model, out_width}) +
      std::max(tokens * head_dim, largest_weight);
  return static_cast<int64_t>(sizeof(T)) *
             (results + chunks + thread_count(options.num_threads) * packed) +
         (int64_t{64} << 10);
}

}  // namespace

Mask Mask::causal() {
  Mask mask;
  mask.kind_ = Kind::kCausal;
  return mask;
}

Mask Mask::where(Predicate visible) {
  Mask mask;
  mask.kind_ = Kind::kWhere;
  mask.where_ = std::move(visible);
  return mask;
}

Status Mask::check() const {
  if (kind_ == Kind::kWhere && !where_) return invalid("the predicate of mask is empty");
  return {};
}

Status default_latent_width(int64_t d_model, int64_t num_heads, int64_t* width) {
  if (width == nullptr) return invalid("width is null");
  if (d_model < 1) return invalid("d_model = " + std::to_string(d_model) + " must be at least 1");
  if (num_heads < 1 || d_model % num_heads != 0) {
    return invalid("num_heads = " + std::to_string(num_heads) +
                   " must divide d_model = " + std::to_string(d_model));
  }
  *width = d_model / num_heads;
  return {};
}

template <typename T>
Status fuse(const LatentWeights<T>& weights, FusedLatentWeights<T>* fused) {
  MLA_RETURN_IF_ERROR(check_weights(weights));
  if (fused == nullptr) return invalid("fused is null");
  return catch_bad_alloc([&] {
    const Index d_model = weights.query.weight.rows();
    const Index width = weights.latent_query.weight.cols();
    FusedLatentWeights<T> result;
    Matrix<T>& weight = result.projection.weight;
    RowVector<T>& bias = result.projection.bias;
    weight.resize(d_model, d_model + 3 * width);
    bias.setZero(d_model + 3 * width);

    // F[:, :d_model] = W_Q
    weight.leftCols(d_model) = weights.query.weight;
    if (weights.query.bias.size() > 0) bias.head(d_model) = weights.query.bias;

    // (x W + b) L + l = x (W L) + (b L + l)
    Index column = d_model;
    for (const auto& [input, latent] : {std::pair{&weights.query, &weights.latent_query},
                                        {&weights.key, &weights.latent_key},
                                        {&weights.value, &weights.latent_value}}) {
      weight.middleCols(column, width).noalias() = input->weight * latent->weight;
      auto b = bias.segment(column, width);
      if (input->bias.size() > 0) b += input->bias * latent->weight;
      if (latent->bias.size() > 0) b += latent->bias;
      column += width;
    }
    result.reconstruction = weights.reconstruction;
    result.output = weights.output;
    *fused = std::move(result);
  });
}

template <typename T>
Status attend_plain(const LatentWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                    Matrix<T>* y, int num_threads) {
  MLA_RETURN_IF_ERROR(check_weights(weights));
  const ChunkOptions options{.num_threads = num_threads};
  MLA_RETURN_IF_ERROR(check_call(weights.query.weight.rows(), x, mask, options, y));
  return catch_bad_alloc([&] { *y = evaluate_plain(weights, x, mask, num_threads); });
}

template <typename T>
Status attend_chunked(const FusedLatentWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                      const ChunkOptions& options, Matrix<T>* y, Matrix<T>* full_query) {
  MLA_RETURN_IF_ERROR(check_weights(weights));
  MLA_RETURN_IF_ERROR(check_call(weights.projection.weight.rows(), x, mask, options, y));
  if (full_query == y) return invalid("full_query and y are the same matrix; they must differ");
  return catch_bad_alloc([&] {
    LatentResult<T> result = evaluate_chunked(weights, x, mask, options, full_query != nullptr);
    *y = std::move(result.y);
    if (full_query != nullptr) *full_query = std::move(result.full_query);
  });
}

template <typename T>
Status attend_plain(const MultiHeadWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                    Matrix<T>* y, int num_threads) {
  MLA_RETURN_IF_ERROR(check_weights(weights));
  const ChunkOptions options{.num_threads = num_threads};
  MLA_RETURN_IF_ERROR(check_call(weights.query.weight.rows(), x, mask, options, y));
  return catch_bad_alloc([&] { *y = evaluate_plain(weights, x, mask, num_threads); });
}

template <typename T>
Status attend_chunked(const MultiHeadWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                      const ChunkOptions& options, Matrix<T>* y) {
  MLA_RETURN_IF_ERROR(check_weights(weights));
  MLA_RETURN_IF_ERROR(check_call(weights.query.weight.rows(), x, mask, options, y));
  return catch_bad_alloc([&] { *y = evaluate_chunked(weights, x, mask, options); });
}

template <typename T>
int64_t chunked_memory_bound(const FusedLatentWeights<T>& weights, int64_t num_tokens,
                             const ChunkOptions& options) {
  const Index width = weights.reconstruction.weight.rows();
  const Index d_model = weights.reconstruction.weight.cols();
  return memory_bound<T>(num_tokens, d_model, 3 * width, width, width,
                         d_model * std::max(d_model, 3 * width), options);
}

template <typename T>
int64_t chunked_memory_bound(const MultiHeadWeights<T>& weights, int64_t num_tokens,
                             const ChunkOptions& options) {
  const Index width = weights.query.weight.cols();
  const Index d_model = weights.query.weight.rows();
  return memory_bound<T>(num_tokens, d_model, 3 * width, width,
                         width / std::max<Index>(weights.num_heads, 1), d_model * width, options);
}

// float and double, so that the header stays free of the evaluation.
#define MLA_INSTANTIATE(T)                                                                         \
  template Status fuse(const LatentWeights<T>&, FusedLatentWeights<T>*);                           \
  template Status attend_plain(const LatentWeights<T>&, const Matrix<T>&, const Mask&, Matrix<T>*, \
                               int);                                                               \
  template Status attend_chunked(const FusedLatentWeights<T>&, const Matrix<T>&, const Mask&,      \
                                 const ChunkOptions&, Matrix<T>*, Matrix<T>*);                     \
  template Status attend_plain(const MultiHeadWeights<T>&, const Matrix<T>&, const Mask&,          \
                               Matrix<T>*, int);                                                   \
  template Status attend_chunked(const MultiHeadWeights<T>&, const Matrix<T>&, const Mask&,        \
                                 const ChunkOptions&, Matrix<T>*);                                 \
  template int64_t chunked_memory_bound(const FusedLatentWeights<T>&, int64_t,                     \
                                        const ChunkOptions&);                                      \
  template int64_t chunked_memory_bound(const MultiHeadWeights<T>&, int64_t, const ChunkOptions&)
MLA_INSTANTIATE(float);
MLA_INSTANTIATE(double);
#undef MLA_INSTANTIATE

}  // namespace mla::traditional
