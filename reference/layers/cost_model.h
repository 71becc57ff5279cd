/// @file
/// What one attention layer costs, in FLOP, bytes and cache: multi-head and grouped-query
/// attention, traditional latent attention, and DeepSeek's multi-head latent attention (MLA), not
/// absorbed and absorbed. The bench takes its work from here; docs/derivation.md has the
/// derivation.
///
/// Conventions, the same for all:
/// - A multiply-add is 2 FLOP. Only matrix products count. Norms, RoPE, the softmax, biases and
///   residuals do not; the exponentials of the softmax are given apart.
/// - Bytes are the least that separate kernels must move. A projection reads its weights once and
///   its input once and writes its output once. The attention core is one fused kernel: it reads
///   queries, keys and values once and writes its output; scores never leave the chip, and what
///   both key and value need of a token is read once.
/// - A causal mask is aligned bottom-right and saves the FLOP of what it hides. It saves no bytes:
///   the last query sees every token.
/// - Amounts are doubles, exact up to 2^53.
#pragma once

#include <cstdint>

#include "reference/status.h"

namespace mla::cost {

/// Standard attention: multi-head (kv_heads = heads), grouped-query, multi-query (kv_heads = 1).
struct MultiHead {
  int64_t d_model = 0;   ///< Width of a hidden state.
  int64_t heads = 0;     ///< Query heads.
  int64_t kv_heads = 0;  ///< Divides heads.
  int64_t head_dim = 0;  ///< Width of a head's q, k and v.
};

/// Traditional latent attention: q, k, v as d_model -> d_model, each projected to one latent head
/// that is shared by all; attention there; back to d_model; an output projection.
struct TraditionalLatent {
  int64_t d_model = 0;  ///< Width of a hidden state.
  int64_t latent = 0;   ///< Width D' of the shared head.
};

/// DeepSeek's layer. The defaults are those of V2, V2-Lite and V3 alike.
struct Mla {
  int64_t d_model = 0;    ///< Width of a hidden state.
  int64_t heads = 0;      ///< Query heads.
  int64_t q_lora = 0;     ///< Rank of the query projection; 0: one direct product (V2-Lite).
  int64_t kv_lora = 512;  ///< Width of the latent c.
  int64_t nope = 128;     ///< Columns of a head's q and k without a position.
  int64_t rope = 64;      ///< Columns with one; even.
  int64_t v = 128;        ///< Columns of a head's v.

  /// Values per token in the cache that all heads share: [c | k_r], 576.
  int64_t latent_row() const { return kv_lora + rope; }
  /// Values per token of keys and values expanded for every head: heads * (192 + 128).
  int64_t expanded_row() const { return heads * (nope + rope + v); }
};

/// DeepSeek-V3 (arXiv 2412.19437): d_model 7168, 128 heads.
Mla deepseek_v3();
/// DeepSeek-V2 (arXiv 2405.04434): d_model 5120, 128 heads.
Mla deepseek_v2();
/// DeepSeek-V2-Lite: d_model 2048, 16 heads, no q_lora.
Mla deepseek_v2_lite();
/// 32 heads of 128, d_model 4096: the common layout of 7 billion parameters.
MultiHead mha_32();

/// How an MLA layer is computed. All three give the same result.
enum class Form {
  kAbsorbed,          ///< Latent cache; W_UK applied to the query, W_UV to the output.
  kUnabsorbedLatent,  ///< Latent cache; keys and values of the whole context expanded every step.
  /// Keys and values expanded once, when a token is new, and cached for every head, k_r among them.
  kUnabsorbedExpanded,
};

/// One step of one layer.
struct Step {
  int64_t batch = 1;       ///< Sequences.
  int64_t new_tokens = 1;  ///< s_q per sequence: 1 in plain decode, all of the context in prefill.
  int64_t context = 0;     ///< s_k per sequence: tokens attended to, the new ones among them.
  bool causal = true;      ///< Whether new tokens see none after themselves.
  int64_t element_bytes = 2;  ///< Of weights, activations and cache.
};
/// One new token per sequence.
Step decode_step(int64_t context, int64_t batch = 1);
/// All tokens new.
Step prefill_step(int64_t tokens, int64_t batch = 1);

/// Work: floating-point operations (a multiply-add is 2) and bytes moved.
struct Cost {
  double flop = 0;
  double bytes = 0;
  double intensity() const { return flop / bytes; }  ///< FLOP per byte
  Cost& operator+=(const Cost& other);
};

/// A step's cost in three parts.
struct LayerCost {
  Cost projections;  ///< To q and to what is cached, and the output projection.
  Cost expansion;    ///< Work with W_UK and W_UV; traditional latent: the latent projections and
                     ///< the reconstruction. Nothing in standard attention.
  Cost core;         ///< q.k and p.v
  double exponentials = 0;           ///< Calls of exp() in the softmax.
  double cache_bytes_per_token = 0;  ///< What one token takes in this layer's cache.
  Cost total() const;                ///< Sum of the three parts.
};

/// (query, key) pairs of one sequence that are computed:
///
///     s_q * s_k                                            not causal
///     sum over i < s_q of max(0, s_k - s_q + i + 1)        causal
///       = s_q * s_k - s_q * (s_q - 1) / 2                  for s_q <= s_k
double visible_pairs(double new_tokens, double context, bool causal);

/// An attention core: the shape of q.k and p.v, whatever produced q, k and v.
struct Core {
  double heads = 0;           ///< Query heads.
  double kv_heads = 0;        ///< Heads of k and v.
  double d_qk = 0;            ///< Columns of a head's q and k.
  double d_v = 0;             ///< Columns of a head's v.
  bool value_in_key = false;  ///< V is the first d_v columns of K, so that it is not read again.
};
/// `pairs`, `queries` and `tokens` are sums over the sequences of (query, key) pairs, query tokens
/// and cached tokens:
///
///     flop  = 2 * heads * pairs * (d_qk + d_v)
///     bytes = element_bytes * (tokens * kv_heads * (d_qk + (value_in_key ? 0 : d_v))
///                              + queries * heads * (d_qk + d_v))
Cost core_cost(const Core& core, double pairs, double queries, double tokens, double element_bytes);

/// {heads, kv_heads, head_dim, head_dim}
Core core_of(const MultiHead& model);
/// {1, 1, D', D'}
Core core_of(const TraditionalLatent& model);
/// Absorbed {heads, 1, 576, 512, value_in_key}; unabsorbed {heads, heads, 192, 128}.
Core core_of(const Mla& model, Form form);

/// Standard attention. With n = batch * new_tokens, d = d_model, D = head_dim:
///
///     projections  q: d -> heads D    k, v: d -> kv_heads D each    out: heads D -> d
///                  flop = 2 n d D (2 heads + 2 kv_heads)
///     core         flop = 2 heads pairs (2 D)
///     cache        2 kv_heads D values per token
///
/// @return kInvalidArgument, naming the field, its value and what is allowed; `cost` is then
/// untouched. So it is for all three overloads.
Status layer_cost(const MultiHead& model, const Step& step, LayerCost* cost);

/// Traditional latent attention:
///
///     projections  q, k, v, out: d -> d             flop = 2 n (4 d d)
///     expansion    q, k, v: d -> D'; D' -> d        flop = 2 n (4 d D')
///     core         one head                         flop = 2 pairs (2 D')
///     cache        2 D' values per token
Status layer_cost(const TraditionalLatent& model, const Step& step, LayerCost* cost);

/// MLA, h = heads. The projections and the cache row of 576 are the same in every form:
///
///     q            d -> q_lora -> h (nope + rope), or d -> h (nope + rope) if q_lora = 0
///     latent       d -> kv_lora + rope
///     out          h v -> d
///
/// expansion, where m is the number of tokens whose keys and values are expanded:
///
///     absorbed            q~: nope -> kv_lora, o: kv_lora -> v, per head and *new* token
///                         flop  = 2 n h kv_lora (nope + v)
///                         bytes = e (h kv_lora (nope + v) + n h (nope + kv_lora + kv_lora + v))
///     unabsorbed, latent  m = batch * context
///               expanded  m = n
///                         flop  = 2 m h kv_lora (nope + v)
///                         bytes = e (h kv_lora (nope + v) + m (kv_lora + rope)
///                                    + m h (nope + rope + v))
///
/// (the latter's k_r is copied to every head). core:
///
///     absorbed            flop = 2 h pairs (kv_lora + rope + kv_lora)
///     unabsorbed          flop = 2 h pairs (nope + rope + v)
///
/// cache: 576 values per token, or h (nope + rope + v) with kUnabsorbedExpanded.
Status layer_cost(const Mla& model, Form form, const Step& step, LayerCost* cost);

/// @name Where absorbing pays
/// Closed forms of where absorbed and unabsorbed cost the same. Against an *expanded* cache the
/// absorbed form never saves FLOP: its expansion costs the same, its core 1088 / 320 times as many.
/// It saves bytes. Against a *latent* cache that is expanded every step it saves both, as long as
/// few tokens are new. `model` must be one that layer_cost() takes, with rope <= kv_lora.
/// @{

/// r = kv_lora (nope + v) / (2 kv_lora - nope - v): how many (query, key) pairs of core pay for the
/// expansion of one token. 512 / 3 = 170.7 for every DeepSeek model; +inf if the absorbed core is
/// not larger.
double pairs_per_expansion(const Mla& model);

/// New tokens per step below which absorbed costs fewer FLOP than kUnabsorbedLatent, in a context
/// of `context` tokens:
///
///     1 / s_q = 1 / r + 1 / s_k                                         not causal
///     s_q = B - sqrt(B B - 2 r s_k),  B = s_k + r + 1/2                 causal
///
/// Both tend to r in a long context. At s_q = s_k (prefill) absorbed always costs more.
double flop_crossover_new_tokens(const Mla& model, double context, bool causal);

/// The same solved for the context *above* which absorbed costs fewer FLOP; +inf from s_q >= r on:
///
///     s_k = s_q r / (r - s_q)                                           not causal
///     s_k = s_q (r - (s_q - 1) / 2) / (r - s_q)                         causal
double flop_crossover_context(const Mla& model, double new_tokens, bool causal);

/// s_q / s_k below which a step moves fewer bytes absorbed than in the form `against`; 0: never
/// fewer, +inf: always. With E = expanded_row() and L = latent_row():
///
///     against kUnabsorbedLatent      (nope + rope + v) / (2 kv_lora)            0.3125
///     against kUnabsorbedExpanded    (E - L) / (4 heads kv_lora - E - L)        0.183 for V3
///
/// The weights are the same and cancel, and so do batch and element size.
double bytes_crossover_share(const Mla& model, Form against);
/// @}

/// Least time by the roofline, in s: each of the three parts takes the longer of its FLOP at
/// `flop_per_second` and its bytes at `bytes_per_second`.
double roofline_seconds(const LayerCost& cost, double flop_per_second, double bytes_per_second);

}  // namespace mla::cost
