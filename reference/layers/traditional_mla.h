/// @file
/// What came before absorbed MLA, on the CPU: the traditional latent attention layer, plain and in
/// chunks, and standard multi-head attention, the baseline of both. For float and double.
///
/// A call takes one sequence of N tokens, `x` [N, d_model], one token per row; a batch is a loop.
/// There are no positions: without a mask, permuted tokens give permuted outputs. A query that sees
/// no token attends to nothing: its heads are 0, and its output is what the biases behind them make
/// of 0.
///
/// The chapter is docs/traditional.md.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <functional>

#include "reference/status.h"

/// The layers that DeepSeek's is measured against.
namespace mla::traditional {

/// One token, or one row of a weight, is contiguous.
template <typename T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// One row, [1, n].
template <typename T>
using RowVector = Eigen::Matrix<T, 1, Eigen::Dynamic, Eigen::RowMajor>;

/// y = x weight + bias.
template <typename T>
struct Linear {
  Matrix<T> weight;   ///< [in, out]
  RowVector<T> bias;  ///< [out], or empty for no bias
};

/// Which tokens a query sees. A function and not a matrix, because [N, N] booleans would be the
/// very buffer that the chunked forms avoid.
class Mask {
 public:
  /// Whether `query` sees `token`; both count from 0.
  using Predicate = std::function<bool(int64_t query, int64_t token)>;

  /// Every query sees every token.
  Mask() = default;
  /// Query i sees tokens 0 ... i.
  static Mask causal();
  /// Any pattern. Called from several threads at once; what it throws reaches the caller.
  static Mask where(Predicate visible);

  /// kInvalidArgument for an empty predicate.
  Status check() const;
  /// Whether `query` sees `token`.
  bool visible(int64_t query, int64_t token) const {
    return kind_ == Kind::kAll || (kind_ == Kind::kCausal ? token <= query : where_(query, token));
  }
  /// The first of `num_tokens` tokens from which on `query` sees none. Later queries may.
  int64_t end(int64_t query, int64_t num_tokens) const {
    return kind_ == Kind::kCausal && query + 1 < num_tokens ? query + 1 : num_tokens;
  }
  /// True if every token before end() is visible.
  bool dense() const { return kind_ != Kind::kWhere; }

 private:
  enum class Kind { kAll, kCausal, kWhere };
  Kind kind_ = Kind::kAll;
  Predicate where_;
};

/// How the chunked forms run.
struct ChunkOptions {
  int64_t chunk_size = 1024;  ///< Queries that are evaluated together; at least 1.
  int num_threads = 0;        ///< 0: all cores. Does not change the memory for scores.
};

/// @name Traditional latent attention
/// All heads share one latent head of width D':
///
///     Q = x W_Q     K = x W_K     V = x W_V                [N, d_model] each
///     q = Q L_Q     k = K L_K     v = V L_V                [N, D'] each
///     P = softmax(mask(q k^T / sqrt(D')))                  [N, N]
///     y = (P v R) W_O                                      [N, D'] -> [N, d_model] -> [N, d_model]
///
/// Each of the eight products may add a bias.
/// @{

/// The weights of the plain layer, one for each product.
template <typename T>
struct LatentWeights {
  Linear<T> query;           ///< W_Q [d_model, d_model]
  Linear<T> key;             ///< W_K [d_model, d_model]
  Linear<T> value;           ///< W_V [d_model, d_model]
  Linear<T> latent_query;    ///< L_Q [d_model, D']
  Linear<T> latent_key;      ///< L_K [d_model, D']
  Linear<T> latent_value;    ///< L_V [d_model, D']
  Linear<T> reconstruction;  ///< R [D', d_model]
  Linear<T> output;          ///< W_O [d_model, d_model]
};

/// The same layer with its six input and latent projections in one:
///
///     F = [ W_Q | W_Q L_Q | W_K L_K | W_V L_V ]                      [d_model, d_model + 3D']
///     f = [ b_Q | b_Q L_Q + l_Q | b_K L_K + l_K | b_V L_V + l_V ]    [d_model + 3D']
///
/// x F + f is then [ Q | q | k | v ], because the two projections of each are linear with nothing
/// between them. K and V at full width, which only their latents read, do not exist any more. The
/// first d_model columns are Q, the query at full width. Attention does not read it either; it is
/// there for other readers (a head of another kind beside this one), and computed on request only.
template <typename T>
struct FusedLatentWeights {
  Linear<T> projection;      ///< F, f
  Linear<T> reconstruction;  ///< R [D', d_model]
  Linear<T> output;          ///< W_O [d_model, d_model]
};

/// D' = d_model / num_heads, the width of one head: the default.
/// @return kInvalidArgument if it is not a whole number of at least 1.
Status default_latent_width(int64_t d_model, int64_t num_heads, int64_t* width);

/// The fused weights of a plain layer. Done once, like loading a model.
/// @return kInvalidArgument for shapes that do not fit, kOutOfMemory; `fused` is then untouched.
template <typename T>
Status fuse(const LatentWeights<T>& weights, FusedLatentWeights<T>* fused);

/// The layer as the formula reads, [N, N] scores and all.
/// @param weights The eight linear maps.
/// @param x [N, d_model], N at least 1
/// @param mask Which tokens a query sees.
/// @param y [N, d_model], resized
/// @param num_threads 0: all cores
/// @return kInvalidArgument, kOutOfMemory; `y` is then untouched.
template <typename T>
Status attend_plain(const LatentWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                    Matrix<T>* y, int num_threads = 0);

/// The same function, one chunk of queries at a time: scores exist for one chunk only, and only for
/// tokens that some query of it can see. Memory: chunked_memory_bound().
/// @param weights What fuse() made.
/// @param x [N, d_model], N at least 1
/// @param mask Which tokens a query sees.
/// @param options Chunk size and threads.
/// @param y [N, d_model], resized
/// @param full_query If not null, gets Q [N, d_model], the first d_model columns of x F + f, which
///     otherwise are not computed.
/// @return kInvalidArgument, kOutOfMemory; `y` and `full_query` are then untouched.
template <typename T>
Status attend_chunked(const FusedLatentWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                      const ChunkOptions& options, Matrix<T>* y, Matrix<T>* full_query = nullptr);
/// @}

/// @name Standard multi-head attention
///
///     Q = x W_Q     K = x W_K     V = x W_V                [N, heads head_dim] each
///     P_i = softmax(mask(Q_i K_i^T / sqrt(head_dim)))      [N, N], head i = columns of its own
///     y = [ P_1 V_1 | ... | P_h V_h ] W_O                  [N, d_model]
/// @{

/// Weights of the layer.
template <typename T>
struct MultiHeadWeights {
  int64_t num_heads = 0;  ///< Divides the number of columns of the first three.
  Linear<T> query;        ///< W_Q [d_model, num_heads head_dim]
  Linear<T> key;          ///< W_K [d_model, num_heads head_dim]
  Linear<T> value;        ///< W_V [d_model, num_heads head_dim]
  Linear<T> output;       ///< W_O [num_heads head_dim, d_model]
};

/// As the formula reads; one head after the other, so that one [N, N] matrix is enough.
/// Parameters and errors as for the latent layer.
template <typename T>
Status attend_plain(const MultiHeadWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                    Matrix<T>* y, int num_threads = 0);

/// The same function, one chunk of queries at a time. Parameters and errors as for the latent
/// layer.
template <typename T>
Status attend_chunked(const MultiHeadWeights<T>& weights, const Matrix<T>& x, const Mask& mask,
                      const ChunkOptions& options, Matrix<T>* y);
/// @}

/// @name Memory
/// @{

/// The most bytes that attend_chunked() has allocated at any one time, y among them; linear in
/// num_tokens = N. With c = min(chunk_size, N):
///
///     sizeof(T) (N d_model + N w + c (N + o + d_model) + threads (b l + n)) + 64 KiB
///
/// | | w: a token's q, k, v | o: its heads | n: largest right operand | d |
/// |---|---|---|---|---|
/// | latent | 3D' | D' | max(N d, d_model max(d_model, 3D')) | D' |
/// | multi-head | 3 heads head_dim | heads head_dim | max(N d, d_model heads head_dim) | head_dim |
///
/// The last term is Eigen's: a matrix product packs blocks of both operands. These may be all of
/// the right operand, and of the left one b = max(32, c / (4 threads)) rows of
/// l = max(N, d_model, o) values. `full_query` takes sizeof(T) N d_model more.
template <typename T>
int64_t chunked_memory_bound(const FusedLatentWeights<T>& weights, int64_t num_tokens,
                             const ChunkOptions& options);
/// The same for multi-head attention.
template <typename T>
int64_t chunked_memory_bound(const MultiHeadWeights<T>& weights, int64_t num_tokens,
                             const ChunkOptions& options);
/// @}

}  // namespace mla::traditional
