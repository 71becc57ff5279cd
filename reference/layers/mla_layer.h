/// @file
/// The layer around the decode problem: DeepSeek's multi-head latent attention, from hidden states
/// to hidden states, in the two forms that docs/mla.md derives from one another.
///
///     c_q = RMSNorm(W_DQ x)                     [q_lora]           absent without q_lora: c_q = x
///     q_i = [ W_UQ,i c_q ], its last columns RoPE'd  [nope | rope]      head i
///     c   = RMSNorm(W_DKV x)                    [kv_lora]          one cache row is [ c | k_r ]
///     k_r = RoPE(W_KR x)                        [rope]
///
///     unabsorbed   k_i,t = [ W_UK,i c_t | k_r,t ],  v_i,t = W_UV,i c_t
///                  o_i   = sum_t softmax_t(scale <q_i, k_i,t>) v_i,t
///     absorbed     q~_i  = [ W_UK,i^T q_nope,i | q_rope,i ]
///                  o~_i  = sum_t softmax_t(scale <q~_i, [c_t | k_r,t]>) c_t   the attention core
///                  o_i   = W_UV,i o~_i
///
///     y = W_O [ o_1 | ... | o_h ]
///
/// The attention core is what a stage of the ladder computes: hand one in as an AttentionCore.
/// Sources: arXiv 2405.04434 section 2.1, arXiv 2412.19437 section 2.1.1, and DeepSeek-V3's
/// inference/model.py for what the papers leave out (YaRN, the scale, the norms).
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <functional>
#include <vector>

#include "reference/problem.h"
#include "reference/quantise.h"

namespace mla {

/// Row-major, as everything here: the values of a token, or of an output, lie side by side.
template <typename T>
using MlaMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// A row of values.
template <typename T>
using MlaVector = Eigen::Matrix<T, 1, Eigen::Dynamic>;

/// Shapes and constants of one layer.
struct MlaDims {
  int d_model = 0;             ///< Width of a hidden state.
  int num_heads = 0;           ///< Query heads.
  int q_lora_rank = 0;         ///< Width of c_q; 0: queries come straight from x (V2-Lite).
  int kv_lora_rank = 512;      ///< Width of the latent c.
  int qk_nope_head_dim = 128;  ///< Columns of a head's q and k without a position.
  int qk_rope_head_dim = 64;   ///< Even: RoPE turns pairs.
  int v_head_dim = 128;        ///< Columns of a head's v and o.

  double norm_eps = 1e-6;              ///< RMSNorm: x / sqrt(mean(x^2) + eps)
  double rope_theta = 10000;           ///< Base of the angles, > 1.
  double yarn_factor = 40;             ///< How far YaRN stretches the context, >= 1; 1: plain RoPE.
  double yarn_beta_fast = 32;          ///< A pair that turns this often or more keeps its speed.
  double yarn_beta_slow = 1;           ///< One that turns this often or less is slowed fully.
  int yarn_original_positions = 4096;  ///< Context before YaRN, in tokens.
  double yarn_mscale = 1;              ///< Strength of the correction to the softmax scale.

  static MlaDims v3();       ///< DeepSeek-V3: 7168 wide, 128 heads
  static MlaDims v2();       ///< DeepSeek-V2: 5120 wide, 128 heads
  static MlaDims v2_lite();  ///< DeepSeek-V2-Lite: 2048 wide, 16 heads, no q_lora, mscale 0.707

  /// Columns of an unabsorbed query or key.
  int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  /// Columns of a cache row, and of an absorbed query: 576 in every model above.
  int cache_width() const { return kv_lora_rank + qk_rope_head_dim; }
  /// Width of what the queries are projected from.
  int query_input_dim() const { return q_lora_rank > 0 ? q_lora_rank : d_model; }
  /// qk_head_dim^-1/2 * m^2, m = 0.1 * mscale * ln(factor) + 1.
  double softmax_scale() const;
};

/// Checks every member: sizes in 1 ... 2^20 (q_lora_rank may be 0), an even rope size, finite
/// constants in their ranges.
/// @return kInvalidArgument, naming the member, its value and what is allowed; or ok.
Status validate(const MlaDims& dims);

/// The angle per position of each pair of columns, in radian: theta^(-2i/d), after YaRN:
/// [qk_rope_head_dim / 2].
/// YaRN (arXiv 2309.00071) leaves the pairs that turn more than beta_fast times within the original
/// context as they are, slows those that turn less than beta_slow times by `factor`, and ramps in
/// between.
std::vector<double> rope_frequencies(const MlaDims& dims);

/// Turns the pairs (2i, 2i + 1) of `values` by position * frequencies[i]. Angles are double for
/// every T: in float, those of the last positions (163839) would be off by up to 0.008 radian.
template <typename T>
void apply_rope(const std::vector<double>& frequencies, int64_t position, T* values);

/// A layer's weights, each stored [out, in]: y = W x.
template <typename T>
struct MlaWeights {
  MlaMatrix<T> w_dq;    ///< [q_lora, d_model]; empty without q_lora
  MlaVector<T> q_norm;  ///< [q_lora], RMSNorm's gain; empty without q_lora
  MlaMatrix<T> w_uq;    ///< [heads * (nope + rope), q_lora or d_model]: by head, W_UQ,i over W_QR,i
  MlaMatrix<T> w_dkv;   ///< [kv_lora, d_model]
  MlaVector<T> kv_norm;  ///< [kv_lora]
  MlaMatrix<T> w_kr;     ///< [rope, d_model]
  MlaMatrix<T> w_uk;     ///< [heads * nope, kv_lora]
  MlaMatrix<T> w_uv;     ///< [heads * v, kv_lora]
  MlaMatrix<T> w_o;      ///< [d_model, heads * v]
};

/// Weights drawn from N(0, 1/in), so that a hidden state of variance 1 keeps it through every
/// projection and logits spread over about +-2 (with V3's scale); gains from N(1, 0.1^2). The
/// same seed draws the same numbers for float and double, except for rounding.
/// @return kInvalidArgument for `dims` or a null `weights`; kOutOfMemory. On an error `weights` is
/// untouched.
template <typename T>
Status random_weights(const MlaDims& dims, uint64_t seed, MlaWeights<T>* weights,
                      int num_threads = 0);
/// Hidden states from N(0, 1), [tokens >= 0, d_model >= 1]. Token i depends on seed and i alone.
template <typename T>
MlaMatrix<T> random_hidden_states(int64_t tokens, int d_model, uint64_t seed);

/// One sequence's cache: one row [ c | k_r ] per token, shared by all heads.
template <typename T>
class MlaCache {
 public:
  /// Rows of the cache, [tokens, kv_lora + rope].
  using Rows = Eigen::Map<const MlaMatrix<T>>;

  /// A cache without room for any token.
  MlaCache() = default;
  /// Makes room for `capacity` tokens, 1 ... 2^30.
  /// @return kInvalidArgument or kOutOfMemory; `cache` is then untouched.
  static Status create(const MlaDims& dims, int64_t capacity, MlaCache* cache);

  int64_t length() const { return length_; }         ///< Tokens so far.
  int64_t capacity() const { return rows_.rows(); }  ///< Tokens there is room for.
  int64_t width() const { return rows_.cols(); }     ///< kv_lora + rope
  /// The tokens so far, [length, kv_lora + rope].
  Rows rows() const { return {rows_.data(), length_, rows_.cols()}; }
  /// Adds tokens at the end, [n, kv_lora + rope].
  /// @return kInvalidArgument for another width, kOutOfRange past the capacity; then none is added.
  Status append(const MlaMatrix<T>& rows);
  /// Forgets all but the first `length` tokens, as after rejected speculation.
  /// @return kOutOfRange unless 0 <= length <= length()
  Status truncate(int64_t length);

 private:
  MlaMatrix<T> rows_;
  int64_t length_ = 0;
};

/// What the core of absorbed attention computes: causal multi-query attention with
/// V = K[:, :kv_lora]. The queries are the sequence's last tokens.
template <typename T>
struct CoreCall {
  const MlaMatrix<T>& q;          ///< [tokens, heads * (kv_lora + rope)]: by head, [ q~ | q_rope ]
  typename MlaCache<T>::Rows kv;  ///< [length, kv_lora + rope]; its last rows are the tokens of q.
  int num_heads;                  ///< Query heads.
  int kv_lora_rank;               ///< Columns of a cache row that are also the value.
  double softmax_scale;           ///< Factor on q.k; the language model defines it.
};

/// Computes `latent` [tokens, heads * kv_lora], o~ of every token and head; the heads of a token
/// lie side by side. `latent` arrives with that shape. The layer passes an error on to its caller.
template <typename T>
using AttentionCore = std::function<Status(const CoreCall<T>& call, MlaMatrix<T>* latent)>;

/// The core in T, with Eigen, on `num_threads` threads (0: all cores): what the layer uses unless
/// it is handed another.
template <typename T>
AttentionCore<T> eigen_core(int num_threads = 0);

/// How a layer attends; both forms compute the same function.
enum class MlaForm { kUnabsorbed, kAbsorbed };

/// One layer: dims, weights, and the forward pass. Immutable once made, so threads may share it.
template <typename T>
class MlaLayer {
 public:
  /// A layer that create() has yet to make; forward() refuses it.
  MlaLayer() = default;
  /// Takes the weights over, without a copy. Uses `num_threads` threads (0: all cores); results do
  /// not depend on their number.
  /// @return kInvalidArgument for `dims`, or for weights whose shapes do not fit them; the weights
  /// are then untouched.
  static Status create(const MlaDims& dims, MlaWeights<T>&& weights, MlaLayer* layer,
                       int num_threads = 0);

  const MlaDims& dims() const { return dims_; }

  /// Computes the next tokens of a sequence, causally: appends x's rows to the cache and attends to
  /// all of it. A prefill is a call on an empty cache, a decode step a call on a filled one; both
  /// take any number of tokens >= 1. A thread never holds scores of more than one head and 256
  /// tokens, or of one token and 32 heads.
  /// @param form which of the two forms computes it
  /// @param x hidden states, [tokens, d_model], finite: a NaN spoils its token and all later ones,
  /// and in the unabsorbed form the earlier ones of the same call, too (as 0 * NaN)
  /// @param cache the sequence's cache, of width kv_lora + rope
  /// @param y [tokens, d_model]; resized
  /// @return kInvalidArgument for shapes that do not fit, kOutOfRange past the cache's capacity,
  /// kOutOfMemory. On an error cache and y are as they were.
  Status forward(MlaForm form, const MlaMatrix<T>& x, MlaCache<T>* cache, MlaMatrix<T>* y) const;
  /// The absorbed form with a core of the caller's. Returns the core's error if it has one.
  Status forward(const AttentionCore<T>& core, const MlaMatrix<T>& x, MlaCache<T>* cache,
                 MlaMatrix<T>* y) const;

 private:
  Status check(const MlaMatrix<T>& x, const MlaCache<T>* cache, const MlaMatrix<T>* y) const;
  MlaMatrix<T> project(const MlaMatrix<T>& x, const MlaMatrix<T>& w) const;
  void normalise(const MlaVector<T>& gain, MlaMatrix<T>* x) const;
  MlaMatrix<T> queries(const MlaMatrix<T>& x, int64_t first_position) const;
  MlaMatrix<T> cache_rows(const MlaMatrix<T>& x, int64_t first_position) const;
  MlaMatrix<T> attend_unabsorbed(const MlaMatrix<T>& q, typename MlaCache<T>::Rows kv) const;
  Status attend_absorbed(const AttentionCore<T>& core, const MlaMatrix<T>& q,
                         typename MlaCache<T>::Rows kv, MlaMatrix<T>* heads) const;
  Status forward_with(const AttentionCore<T>* core, const MlaMatrix<T>& x, MlaCache<T>* cache,
                      MlaMatrix<T>* y) const;

  MlaDims dims_;
  MlaWeights<T> weights_;
  std::vector<double> frequencies_;
  int num_threads_ = 0;
};

/// A core call as a decode problem for the stages: rounded to 16 bits, its cache quantised then if a format
/// asks for it, and paged. Batch 1.
struct PagedDecode {
  Problem problem;                 ///< One sequence, causal, one KV head.
  std::vector<uint16_t> q;         ///< [1, tokens, heads, 576]
  std::vector<uint16_t> kv_cache;  ///< [pages, 64, 1, 576]; NaN past the last token
  std::vector<uint8_t>
      quantised;  ///< [pages, 64, 1, row bytes]: what is decoded if it is not empty
  std::vector<int32_t> block_table;  ///< [1, pages]: the sequence's pages in reverse order
  std::vector<int32_t> seqlens_k;    ///< [1]
  std::vector<uint16_t> out;         ///< [1, tokens, heads, 512], NaN
  std::vector<float> lse;            ///< [1, heads, tokens], NaN

  /// Pointers to these.
  Tensors tensors();
  /// `out` in T, as an AttentionCore returns it.
  template <typename T>
  MlaMatrix<T> latent() const;
};
/// Makes the decode problem of a core call. The scale of an fp8_tensor cache is that of its largest value.
/// @return kInvalidArgument if a cache row is not 512 + 64 wide or the format does not go with the dtype,
/// kOutOfMemory; `decode` is then untouched.
template <typename T>
Status make_paged_decode(const CoreCall<T>& call, DType dtype, PagedDecode* decode,
                         CacheFormat format = CacheFormat::k16Bit,
                         ScaleRule rule = ScaleRule::kLargest);

}  // namespace mla
