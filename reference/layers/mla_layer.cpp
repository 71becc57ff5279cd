#include "reference/layers/mla_layer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <new>
#include <numbers>
#include <string>
#include <utility>

#include "reference/counter_random.h"
#include "reference/float16.h"
#include "reference/parallel_for.h"

namespace mla {
namespace {

constexpr int kLargestDim = 1 << 20;
constexpr int64_t kOutputsATask = 256;  // of a projection
constexpr int64_t kQueriesATask = 256;  // of one head, unabsorbed
constexpr int64_t kHeadsATask = 32;     // of one token, absorbed
constexpr uint64_t kHiddenStates = 0;   // matrix number of the draws for x; weights count from 1

Status invalid(const std::string& message) {
  return {StatusCode::kInvalidArgument, message};
}

std::string shape(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

/// Runs `body`, which may allocate, and turns a failure to do so into a status.
template <typename Body>
Status guard_memory(const char* what, Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, std::string("not enough memory for ") + what};
  }
}

/// Row `row` of random matrix `matrix`: N(0, 1), times `deviation`, plus `mean`.
template <typename Row>
void draw_row(uint64_t seed, uint64_t matrix, int64_t row, double mean, double deviation,
              Row&& values) {
  using T = typename std::decay_t<Row>::Scalar;
  constexpr uint64_t kStream = 64;  // no other draw uses it
  const uint64_t key = counter_random::row_key(seed, kStream, static_cast<int64_t>(matrix), row, 0);
  for (Eigen::Index i = 0; i < values.size(); ++i) {
    const double z = counter_random::normal(key, static_cast<int>(i)) / 65536.0;
    values(i) = static_cast<T>(mean + deviation * z);
  }
}

/// A core call whose parts fit each other, so that no core reads or writes past their ends.
template <typename T>
Status validate(const CoreCall<T>& call) {
  if (call.num_heads < 1 || call.kv_lora_rank < 1 || call.kv_lora_rank > call.kv.cols()) {
    return invalid("num_heads = " + std::to_string(call.num_heads) +
                   ", kv_lora_rank = " + std::to_string(call.kv_lora_rank) +
                   " do not fit kv, which is " + shape(call.kv.rows(), call.kv.cols()));
  }
  if (call.q.rows() < 1 || call.q.rows() > call.kv.rows() ||
      call.q.cols() != call.num_heads * call.kv.cols()) {
    return invalid("q is " + shape(call.q.rows(), call.q.cols()) + "; kv asks for [1 ... " +
                   std::to_string(call.kv.rows()) + ", " +
                   std::to_string(call.num_heads * call.kv.cols()) + "]");
  }
  return {};
}

/// Logits to probabilities, in place: the first `seen` of a row's tokens share 1, the rest get 0.
template <typename Row>
void softmax(int64_t seen, Row&& row) {
  using T = typename std::decay_t<Row>::Scalar;
  auto visible = row.head(seen);
  const T max = visible.maxCoeff();
  // Not Eigen's exp(): it bounds its argument, which would turn a NaN into a number.
  visible = visible.unaryExpr([max](T logit) { return std::exp(logit - max); }).eval();
  visible /= visible.sum();
  row.tail(row.size() - seen).setZero();
}

}  // namespace

// ---------------------------------------------------------------------------- dims

MlaDims MlaDims::v3() {
  return {.d_model = 7168, .num_heads = 128, .q_lora_rank = 1536};
}

MlaDims MlaDims::v2() {
  return {.d_model = 5120, .num_heads = 128, .q_lora_rank = 1536};
}

MlaDims MlaDims::v2_lite() {
  return {.d_model = 2048, .num_heads = 16, .yarn_mscale = 0.707};
}

double MlaDims::softmax_scale() const {
  const double m = 0.1 * yarn_mscale * std::log(yarn_factor) + 1;
  return m * m / std::sqrt(static_cast<double>(qk_head_dim()));
}

Status validate(const MlaDims& dims) {
  const struct {
    const char* name;
    int value;
    int least;
  } sizes[] = {{"d_model", dims.d_model, 1},
               {"num_heads", dims.num_heads, 1},
               {"q_lora_rank", dims.q_lora_rank, 0},
               {"kv_lora_rank", dims.kv_lora_rank, 1},
               {"qk_nope_head_dim", dims.qk_nope_head_dim, 1},
               {"qk_rope_head_dim", dims.qk_rope_head_dim, 2},
               {"v_head_dim", dims.v_head_dim, 1}};
  for (const auto& size : sizes) {
    if (size.value < size.least || size.value > kLargestDim) {
      return invalid(std::string(size.name) + " = " + std::to_string(size.value) + " must be " +
                     std::to_string(size.least) + " to " + std::to_string(kLargestDim));
    }
  }
  if (dims.qk_rope_head_dim % 2 != 0) {
    return invalid("qk_rope_head_dim = " + std::to_string(dims.qk_rope_head_dim) +
                   " is odd; RoPE turns pairs of columns");
  }
  const struct {
    const char* name;
    bool ok;
    double value;
    const char* allowed;
  } constants[] = {{"norm_eps", dims.norm_eps >= 0, dims.norm_eps, ">= 0"},
                   {"rope_theta", dims.rope_theta > 1, dims.rope_theta, "> 1"},
                   {"yarn_factor", dims.yarn_factor >= 1, dims.yarn_factor, ">= 1"},
                   {"yarn_beta_slow", dims.yarn_beta_slow > 0, dims.yarn_beta_slow, "> 0"},
                   {"yarn_beta_fast", dims.yarn_beta_fast >= dims.yarn_beta_slow,
                    dims.yarn_beta_fast, ">= yarn_beta_slow"},
                   {"yarn_original_positions", dims.yarn_original_positions >= 1,
                    static_cast<double>(dims.yarn_original_positions), ">= 1"},
                   {"yarn_mscale", dims.yarn_mscale >= 0, dims.yarn_mscale, ">= 0"}};
  for (const auto& constant : constants) {
    if (!constant.ok || !std::isfinite(constant.value)) {
      return invalid(std::string(constant.name) + " = " + std::to_string(constant.value) +
                     " must be finite and " + constant.allowed);
    }
  }
  return {};
}

// ---------------------------------------------------------------------------- RoPE

std::vector<double> rope_frequencies(const MlaDims& dims) {
  const int d = dims.qk_rope_head_dim;
  // The pair that turns `rotations` times within the original context, as a real number: solve
  // positions * theta^(-2i/d) = 2 pi rotations for i.
  const auto pair_of = [&](double rotations) {
    return d * std::log(dims.yarn_original_positions / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(dims.rope_theta));
  };
  // DeepSeek bounds the upper end by d - 1, not by the number of pairs; so it is done here, too.
  const double low = std::max(std::floor(pair_of(dims.yarn_beta_fast)), 0.0);
  double high = std::min(std::ceil(pair_of(dims.yarn_beta_slow)), d - 1.0);
  if (low == high) high += 0.001;  // a step, without a division by 0

  std::vector<double> frequencies(static_cast<size_t>(d) / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double plain = std::pow(dims.rope_theta, -2.0 * static_cast<double>(i) / d);
    const double slowed = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] = plain / dims.yarn_factor * slowed + plain * (1 - slowed);
  }
  return frequencies;
}

template <typename T>
void apply_rope(const std::vector<double>& frequencies, int64_t position, T* values) {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    const double c = std::cos(angle);
    const double s = std::sin(angle);
    const double re = values[2 * i];
    const double im = values[2 * i + 1];
    values[2 * i] = static_cast<T>(re * c - im * s);
    values[2 * i + 1] = static_cast<T>(re * s + im * c);
  }
}

// ---------------------------------------------------------------------------- weights

template <typename T>
Status random_weights(const MlaDims& dims, uint64_t seed, MlaWeights<T>* weights, int num_threads) {
  if (weights == nullptr) return invalid("weights is null");
  MLA_RETURN_IF_ERROR(validate(dims));
  return guard_memory("the weights", [&]() -> Status {
    MlaWeights<T> w;
    uint64_t number = 1;
    const auto matrix = [&](int64_t rows, int64_t cols, MlaMatrix<T>* m) {
      m->resize(rows, cols);
      const double deviation = 1 / std::sqrt(static_cast<double>(cols));
      parallel_for(rows, num_threads,
                   [&](int64_t r) { draw_row(seed, number, r, 0, deviation, m->row(r)); });
      ++number;
    };
    const auto gain = [&](int64_t size, MlaVector<T>* v) {
      v->resize(size);
      draw_row(seed, number++, 0, 1, 0.1, *v);
    };
    const int64_t heads = dims.num_heads;
    if (dims.q_lora_rank > 0) {
      matrix(dims.q_lora_rank, dims.d_model, &w.w_dq);
      gain(dims.q_lora_rank, &w.q_norm);
    }
    matrix(heads * dims.qk_head_dim(), dims.query_input_dim(), &w.w_uq);
    matrix(dims.kv_lora_rank, dims.d_model, &w.w_dkv);
    gain(dims.kv_lora_rank, &w.kv_norm);
    matrix(dims.qk_rope_head_dim, dims.d_model, &w.w_kr);
    matrix(heads * dims.qk_nope_head_dim, dims.kv_lora_rank, &w.w_uk);
    matrix(heads * dims.v_head_dim, dims.kv_lora_rank, &w.w_uv);
    matrix(dims.d_model, heads * dims.v_head_dim, &w.w_o);
    *weights = std::move(w);
    return {};
  });
}

template <typename T>
MlaMatrix<T> random_hidden_states(int64_t tokens, int d_model, uint64_t seed) {
  MlaMatrix<T> x(tokens, d_model);
  for (int64_t t = 0; t < tokens; ++t) draw_row(seed, kHiddenStates, t, 0, 1, x.row(t));
  return x;
}

// ---------------------------------------------------------------------------- cache

template <typename T>
Status MlaCache<T>::create(const MlaDims& dims, int64_t capacity, MlaCache* cache) {
  if (cache == nullptr) return invalid("cache is null");
  MLA_RETURN_IF_ERROR(validate(dims));
  if (capacity < 1 || capacity > kMaxTokensPerSeq) {
    return invalid("capacity = " + std::to_string(capacity) + " must be 1 to 2^30 tokens");
  }
  return guard_memory("the cache", [&]() -> Status {
    MlaCache made;
    made.rows_.resize(capacity, dims.cache_width());
    *cache = std::move(made);
    return {};
  });
}

template <typename T>
Status MlaCache<T>::append(const MlaMatrix<T>& rows) {
  if (rows.cols() != width()) {
    return invalid("rows has " + std::to_string(rows.cols()) + " columns; the cache has " +
                   std::to_string(width()));
  }
  if (rows.rows() > capacity() - length_) {
    return {StatusCode::kOutOfRange,
            "appending " + std::to_string(rows.rows()) + " tokens to " + std::to_string(length_) +
                " exceeds the cache's capacity of " + std::to_string(capacity())};
  }
  rows_.middleRows(length_, rows.rows()) = rows;
  length_ += rows.rows();
  return {};
}

template <typename T>
Status MlaCache<T>::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    return {StatusCode::kOutOfRange, "length = " + std::to_string(length) + " must be 0 to " +
                                         std::to_string(length_) + ", the tokens in the cache"};
  }
  length_ = length;
  return {};
}

// ---------------------------------------------------------------------------- the core

template <typename T>
AttentionCore<T> eigen_core(int num_threads) {
  return [num_threads](const CoreCall<T>& call, MlaMatrix<T>* latent) -> Status {
    MLA_RETURN_IF_ERROR(validate(call));
    if (latent == nullptr) return invalid("latent is null");
    const int64_t tokens = call.q.rows();
    const int64_t width = call.kv.cols();
    latent->resize(tokens, int64_t{call.num_heads} * call.kv_lora_rank);
    const int64_t tasks_a_token = (call.num_heads + kHeadsATask - 1) / kHeadsATask;
    parallel_for(tokens * tasks_a_token, num_threads, [&](int64_t task) {
      const int64_t token = task / tasks_a_token;
      const int64_t head = task % tasks_a_token * kHeadsATask;
      const int64_t heads = std::min(kHeadsATask, call.num_heads - head);
      const int64_t seen = call.kv.rows() - tokens + token + 1;
      const Eigen::Map<const MlaMatrix<T>> q(call.q.row(token).data() + head * width, heads, width);
      Eigen::Map<MlaMatrix<T>> o(latent->row(token).data() + head * call.kv_lora_rank, heads,
                                 call.kv_lora_rank);
      const auto k = call.kv.topRows(seen);
      // S = scale Q K^T [heads, seen]
      MlaMatrix<T> s = static_cast<T>(call.softmax_scale) * (q * k.transpose());
      for (int64_t h = 0; h < heads; ++h) softmax(seen, s.row(h));
      // O~ = P C [heads, kv_lora]
      o.noalias() = s * k.leftCols(call.kv_lora_rank);
    });
    return {};
  };
}

// ---------------------------------------------------------------------------- the layer

template <typename T>
Status MlaLayer<T>::create(const MlaDims& dims, MlaWeights<T>&& weights, MlaLayer* layer,
                           int num_threads) {
  if (layer == nullptr) return invalid("layer is null");
  MLA_RETURN_IF_ERROR(validate(dims));
  const int64_t heads = dims.num_heads;
  const bool low_rank = dims.q_lora_rank > 0;
  const struct {
    const char* name;
    int64_t rows, cols, expected_rows, expected_cols;
  } shapes[] = {
      {"w_dq", weights.w_dq.rows(), weights.w_dq.cols(), dims.q_lora_rank,
       low_rank ? dims.d_model : 0},
      {"q_norm", 1, weights.q_norm.cols(), 1, dims.q_lora_rank},
      {"w_uq", weights.w_uq.rows(), weights.w_uq.cols(), heads * dims.qk_head_dim(),
       dims.query_input_dim()},
      {"w_dkv", weights.w_dkv.rows(), weights.w_dkv.cols(), dims.kv_lora_rank, dims.d_model},
      {"kv_norm", 1, weights.kv_norm.cols(), 1, dims.kv_lora_rank},
      {"w_kr", weights.w_kr.rows(), weights.w_kr.cols(), dims.qk_rope_head_dim, dims.d_model},
      {"w_uk", weights.w_uk.rows(), weights.w_uk.cols(), heads * dims.qk_nope_head_dim,
       dims.kv_lora_rank},
      {"w_uv", weights.w_uv.rows(), weights.w_uv.cols(), heads * dims.v_head_dim,
       dims.kv_lora_rank},
      {"w_o", weights.w_o.rows(), weights.w_o.cols(), dims.d_model, heads * dims.v_head_dim}};
  for (const auto& s : shapes) {
    if (s.rows != s.expected_rows || s.cols != s.expected_cols) {
      return invalid(std::string(s.name) + " is " + shape(s.rows, s.cols) + "; dims ask for " +
                     shape(s.expected_rows, s.expected_cols));
    }
  }
  layer->dims_ = dims;
  layer->weights_ = std::move(weights);
  layer->frequencies_ = rope_frequencies(dims);
  layer->num_threads_ = num_threads;
  return {};
}

template <typename T>
Status MlaLayer<T>::check(const MlaMatrix<T>& x, const MlaCache<T>* cache,
                          const MlaMatrix<T>* y) const {
  if (dims_.d_model == 0) return invalid("the layer is empty; make it with create()");
  if (cache == nullptr) return invalid("cache is null");
  if (y == nullptr) return invalid("y is null");
  if (x.rows() < 1 || x.cols() != dims_.d_model) {
    return invalid("x is " + shape(x.rows(), x.cols()) +
                   "; it must be [tokens >= 1, d_model = " + std::to_string(dims_.d_model) + "]");
  }
  if (cache->width() != dims_.cache_width()) {
    return invalid("cache is " + std::to_string(cache->width()) +
                   " columns wide; the layer needs " + std::to_string(dims_.cache_width()) +
                   " (kv_lora_rank + qk_rope_head_dim)");
  }
  return {};
}

/// X W^T: [tokens, in] by [out, in].
template <typename T>
MlaMatrix<T> MlaLayer<T>::project(const MlaMatrix<T>& x, const MlaMatrix<T>& w) const {
  MlaMatrix<T> y(x.rows(), w.rows());
  parallel_for((w.rows() + kOutputsATask - 1) / kOutputsATask, num_threads_, [&](int64_t task) {
    const int64_t first = task * kOutputsATask;
    const int64_t count = std::min(kOutputsATask, w.rows() - first);
    y.middleCols(first, count).noalias() = x * w.middleRows(first, count).transpose();
  });
  return y;
}

template <typename T>
void MlaLayer<T>::normalise(const MlaVector<T>& gain, MlaMatrix<T>* x) const {
  for (int64_t t = 0; t < x->rows(); ++t) {
    const T mean_square = x->row(t).squaredNorm() / static_cast<T>(x->cols());
    const T factor = 1 / std::sqrt(mean_square + static_cast<T>(dims_.norm_eps));
    x->row(t).array() *= factor * gain.array();
  }
}

/// [tokens, heads * (nope + rope)], RoPE applied.
template <typename T>
MlaMatrix<T> MlaLayer<T>::queries(const MlaMatrix<T>& x, int64_t first_position) const {
  MlaMatrix<T> q;
  if (dims_.q_lora_rank > 0) {
    MlaMatrix<T> c_q = project(x, weights_.w_dq);
    normalise(weights_.q_norm, &c_q);
    q = project(c_q, weights_.w_uq);
  } else {
    q = project(x, weights_.w_uq);
  }
  parallel_for(q.rows(), num_threads_, [&](int64_t t) {
    for (int64_t i = 0; i < dims_.num_heads; ++i) {
      T* const head = q.row(t).data() + i * dims_.qk_head_dim();
      apply_rope(frequencies_, first_position + t, head + dims_.qk_nope_head_dim);
    }
  });
  return q;
}

/// [tokens, kv_lora + rope]: [ c | k_r ].
template <typename T>
MlaMatrix<T> MlaLayer<T>::cache_rows(const MlaMatrix<T>& x, int64_t first_position) const {
  MlaMatrix<T> c = project(x, weights_.w_dkv);
  normalise(weights_.kv_norm, &c);
  MlaMatrix<T> k_r = project(x, weights_.w_kr);
  for (int64_t t = 0; t < x.rows(); ++t) {
    apply_rope(frequencies_, first_position + t, k_r.row(t).data());
  }
  MlaMatrix<T> rows(x.rows(), dims_.cache_width());
  rows << c, k_r;
  return rows;
}

/// [tokens, heads * v]: every head expands the cache into its own keys and values.
template <typename T>
MlaMatrix<T> MlaLayer<T>::attend_unabsorbed(const MlaMatrix<T>& q,
                                            typename MlaCache<T>::Rows kv) const {
  const int64_t nope = dims_.qk_nope_head_dim;
  const int64_t rope = dims_.qk_rope_head_dim;
  const int64_t v_dim = dims_.v_head_dim;
  const auto c = kv.leftCols(dims_.kv_lora_rank);
  const auto k_r = kv.rightCols(rope);
  const T scale = static_cast<T>(dims_.softmax_scale());
  MlaMatrix<T> o(q.rows(), dims_.num_heads * v_dim);

  parallel_for(dims_.num_heads, num_threads_, [&](int64_t i) {
    // K_i = [ C W_UK,i^T | K_r ] [length, nope + rope], V_i = C W_UV,i^T [length, v]
    MlaMatrix<T> k(kv.rows(), nope + rope);
    k.leftCols(nope).noalias() = c * weights_.w_uk.middleRows(i * nope, nope).transpose();
    k.rightCols(rope) = k_r;
    const MlaMatrix<T> v = c * weights_.w_uv.middleRows(i * v_dim, v_dim).transpose();

    for (int64_t first = 0; first < q.rows(); first += kQueriesATask) {
      const int64_t count = std::min(kQueriesATask, q.rows() - first);
      const int64_t seen_first = kv.rows() - q.rows() + first + 1;  // by the first of these queries
      const int64_t seen_last = seen_first + count - 1;
      // S = scale Q_i K_i^T [count, seen_last], then P, in place; O_i = P V_i
      MlaMatrix<T> s = scale * (q.block(first, i * (nope + rope), count, nope + rope) *
                                k.topRows(seen_last).transpose());
      for (int64_t r = 0; r < count; ++r) softmax(seen_first + r, s.row(r));
      o.block(first, i * v_dim, count, v_dim).noalias() = s * v.topRows(seen_last);
    }
  });
  return o;
}

/// The same, but the queries go to the latent space, and the result comes back from it.
template <typename T>
Status MlaLayer<T>::attend_absorbed(const AttentionCore<T>& core, const MlaMatrix<T>& q,
                                    typename MlaCache<T>::Rows kv, MlaMatrix<T>* heads) const {
  const int64_t nope = dims_.qk_nope_head_dim;
  const int64_t rope = dims_.qk_rope_head_dim;
  const int64_t lora = dims_.kv_lora_rank;
  const int64_t v_dim = dims_.v_head_dim;

  // Q~_i = [ Q_nope,i W_UK,i | Q_rope,i ] [tokens, kv_lora + rope]
  MlaMatrix<T> absorbed(q.rows(), dims_.num_heads * (lora + rope));
  parallel_for(dims_.num_heads, num_threads_, [&](int64_t i) {
    const auto q_i = q.middleCols(i * (nope + rope), nope + rope);
    auto absorbed_i = absorbed.middleCols(i * (lora + rope), lora + rope);
    absorbed_i.leftCols(lora).noalias() =
        q_i.leftCols(nope) * weights_.w_uk.middleRows(i * nope, nope);
    absorbed_i.rightCols(rope) = q_i.rightCols(rope);
  });

  MlaMatrix<T> latent(q.rows(), dims_.num_heads * lora);
  MLA_RETURN_IF_ERROR(
      core({absorbed, kv, dims_.num_heads, dims_.kv_lora_rank, dims_.softmax_scale()}, &latent));
  if (latent.rows() != q.rows() || latent.cols() != dims_.num_heads * lora) {
    return invalid("the attention core returned " + shape(latent.rows(), latent.cols()) +
                   "; the layer needs " + shape(q.rows(), dims_.num_heads * lora));
  }

  // O_i = O~_i W_UV,i^T [tokens, v]
  heads->resize(q.rows(), dims_.num_heads * v_dim);
  parallel_for(dims_.num_heads, num_threads_, [&](int64_t i) {
    heads->middleCols(i * v_dim, v_dim).noalias() =
        latent.middleCols(i * lora, lora) * weights_.w_uv.middleRows(i * v_dim, v_dim).transpose();
  });
  return {};
}

template <typename T>
Status MlaLayer<T>::forward_with(const AttentionCore<T>* core, const MlaMatrix<T>& x,
                                 MlaCache<T>* cache, MlaMatrix<T>* y) const {
  MLA_RETURN_IF_ERROR(check(x, cache, y));
  // Takes the appended rows back unless the whole pass succeeds, also if the caller's core throws.
  struct Rollback {
    MlaCache<T>* cache;
    int64_t length = cache->length();
    ~Rollback() { static_cast<void>(cache->truncate(length)); }
  } rollback{cache};
  return guard_memory("the layer's intermediate results", [&]() -> Status {
    const int64_t position = cache->length();
    MLA_RETURN_IF_ERROR(cache->append(cache_rows(x, position)));
    const MlaMatrix<T> q = queries(x, position);
    MlaMatrix<T> heads;
    if (core != nullptr) {
      MLA_RETURN_IF_ERROR(attend_absorbed(*core, q, cache->rows(), &heads));
    } else {
      heads = attend_unabsorbed(q, cache->rows());
    }
    *y = project(heads, weights_.w_o);
    rollback.length = cache->length();
    return {};
  });
}

template <typename T>
Status MlaLayer<T>::forward(MlaForm form, const MlaMatrix<T>& x, MlaCache<T>* cache,
                            MlaMatrix<T>* y) const {
  if (form == MlaForm::kUnabsorbed) return forward_with(nullptr, x, cache, y);
  const AttentionCore<T> core = eigen_core<T>(num_threads_);
  return forward_with(&core, x, cache, y);
}

template <typename T>
Status MlaLayer<T>::forward(const AttentionCore<T>& core, const MlaMatrix<T>& x, MlaCache<T>* cache,
                            MlaMatrix<T>* y) const {
  if (!core) return invalid("core is empty");
  return forward_with(&core, x, cache, y);
}

// ---------------------------------------------------------------------------- to the stages

Tensors PagedDecode::tensors() {
  return {
      .q = q.data(),
      .kv_cache = quantised.empty() ? static_cast<const void*>(kv_cache.data()) : quantised.data(),
      .block_table = block_table.data(),
      .seqlens_k = seqlens_k.data(),
      .out = out.data(),
      .lse = lse.data()};
}

template <typename T>
MlaMatrix<T> PagedDecode::latent() const {
  return visit_dtype(problem.dtype, [&](auto type) -> MlaMatrix<T> {
    using Half = decltype(type);
    const Eigen::Map<const MlaMatrix<Half>> values(reinterpret_cast<const Half*>(out.data()),
                                                   problem.seqlen_q,
                                                   int64_t{problem.num_heads_q} * kHeadDimV);
    return values.template cast<float>().template cast<T>();
  });
}

template <typename T>
Status make_paged_decode(const CoreCall<T>& call, DType dtype, PagedDecode* decode,
                         CacheFormat format, ScaleRule rule) {
  if (decode == nullptr) return invalid("decode is null");
  MLA_RETURN_IF_ERROR(validate(call));
  if (call.kv.cols() != kHeadDimQK || call.kv_lora_rank != kHeadDimV) {
    return invalid("cache rows are " + std::to_string(call.kv_lora_rank) + " + " +
                   std::to_string(call.kv.cols() - call.kv_lora_rank) +
                   " wide; stages decode 512 + 64");
  }
  PagedDecode made;
  const int64_t length = call.kv.rows();
  const int pages = static_cast<int>(pages_for(length, kDefaultPageSize));
  made.problem = {.dtype = dtype,
                  .batch = 1,
                  .seqlen_q = static_cast<int>(call.q.rows()),
                  .num_heads_q = call.num_heads,
                  .num_heads_kv = 1,
                  .num_pages = pages,
                  .max_pages_per_seq = pages,
                  .softmax_scale = static_cast<float>(call.softmax_scale),
                  .causal = true};
  Problem quantised = made.problem;
  quantised.cache_format = format;
  if (format == CacheFormat::kFp8Tensor) {
    const auto largest = static_cast<float>(call.kv.cwiseAbs().maxCoeff());
    quantised.cache_scale = scale_for(format, largest, rule);
  }
  MLA_RETURN_IF_ERROR(validate(quantised));
  return guard_memory("a paged copy of the cache", [&]() -> Status {
    const auto round = [dtype](const T* values, int64_t count, uint16_t* bits) {
      visit_dtype(dtype, [&](auto type) {
        std::transform(values, values + count, bits, [](T value) {
          return std::bit_cast<uint16_t>(from_float<decltype(type)>(static_cast<float>(value)));
        });
      });
    };
    made.q.resize(static_cast<size_t>(made.problem.q_elements()));
    round(call.q.data(), call.q.size(), made.q.data());

    made.seqlens_k = {static_cast<int32_t>(length)};
    const Tensors contiguous = with_strides(made.problem, {});
    for (int page = 0; page < pages; ++page) made.block_table.push_back(pages - 1 - page);
    made.kv_cache.assign(static_cast<size_t>(made.problem.kv_elements()), nan_bits(dtype));
    for (int64_t t = 0; t < length; ++t) {
      const int64_t place =
          cache_place(made.problem, contiguous, made.block_table.data(), static_cast<int>(t), 0);
      round(call.kv.row(t).data(), kHeadDimQK, made.kv_cache.data() + place);
    }
    if (is_quantised(format)) {
      MLA_RETURN_IF_ERROR(quantise_cache(quantised, made.kv_cache.data(), rule, &made.quantised));
      made.problem = quantised;
    }
    made.out.assign(static_cast<size_t>(made.problem.out_elements()), nan_bits(dtype));
    made.lse.assign(static_cast<size_t>(made.problem.lse_elements()), std::nanf(""));
    *decode = std::move(made);
    return {};
  });
}

#define MLA_INSTANTIATE(T)                                                                \
  template void apply_rope(const std::vector<double>&, int64_t, T*);                      \
  template Status random_weights(const MlaDims&, uint64_t, MlaWeights<T>*, int);          \
  template MlaMatrix<T> random_hidden_states<T>(int64_t, int, uint64_t);                  \
  template class MlaCache<T>;                                                             \
  template AttentionCore<T> eigen_core<T>(int);                                           \
  template class MlaLayer<T>;                                                             \
  template MlaMatrix<T> PagedDecode::latent<T>() const;                                   \
  template Status make_paged_decode(const CoreCall<T>&, DType, PagedDecode*, CacheFormat, \
                                    ScaleRule);
MLA_INSTANTIATE(float)
MLA_INSTANTIATE(double)
#undef MLA_INSTANTIATE

}  // namespace mla
