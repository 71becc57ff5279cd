/// @file
/// One attention layer in the forms that came before MLA and in the absorbed one, as a list of matrix
/// products around one core: what mla_traditional measures. The same list is evaluated by Eigen on the
/// CPU and by cuBLAS on a GPU, in 16, 32 or 64 bits.
///
/// A step has `queries` new tokens in each of `batch` sequences, and each query reads `tokens` tokens.
/// There are no norms, biases or positions: those are no matrix products, and all forms have the same.
/// The forms are defined in docs/traditional.md and docs/mla.md; reference/layers/cost_model.h counts
/// the same work by formulas.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "reference/status.h"
#include "stages/common/machine/machine.h"

namespace mla::bench {

/// The layers, all of width d_model = heads * head_dim.
enum class LayerForm {
  kMultiHead,    ///< A key and a value for each head
  kGrouped,      ///< Each KV head serves several query heads
  kLatentPlain,  ///< Traditional latent attention as the formula reads: six projections, one head
  kLatentFused,  ///< The same layer: projections multiplied out, queries in chunks
  kAbsorbed,     ///< MLA: 576 cached values, W_UK and W_UV applied to queries and outputs
};
inline constexpr std::array kLayerForms{LayerForm::kMultiHead, LayerForm::kGrouped,
                                        LayerForm::kLatentPlain, LayerForm::kLatentFused,
                                        LayerForm::kAbsorbed};
/// "multi_head", "grouped", "latent_plain", "latent_fused", "absorbed"
const char* to_string(LayerForm form);

/// What a step is.
enum class LayerMode {
  kPrefill,  ///< All tokens are new: queries = tokens
  kDecode,   ///< One new token in each sequence, whose key and value join the cache
  kCross,    ///< Queries of one sequence read another's cache, which was made before
};
/// "prefill", "decode", "cross"
const char* to_string(LayerMode mode);

/// One step of one layer.
struct LayerCase {
  LayerForm form = LayerForm::kMultiHead;
  LayerMode mode = LayerMode::kPrefill;
  int64_t heads = 32;
  int64_t kv_heads = 4;  ///< Of kGrouped alone; divides heads
  int64_t head_dim = 64;
  int64_t tokens = 2048;  ///< That each query reads, if no mask hides them
  int64_t queries = 1;    ///< In each sequence; prefill and decode know theirs: tokens, 1
  int64_t batch = 4;
  bool causal = false;  ///< Bottom-right: query i sees tokens 0 ... tokens - queries + i
  int64_t d_model() const { return heads * head_dim; }
  int64_t num_queries() const {
    return mode == LayerMode::kPrefill ? tokens : mode == LayerMode::kDecode ? 1 : queries;
  }
};

/// Queries that the fused form evaluates together.
inline constexpr int64_t kLatentChunk = 1024;

/// The parts of a layer, in the order of their work.
enum class LayerPart {
  kProjections,     ///< To queries, and to keys and values or what they are made from
  kLatent,          ///< Latent projections; MLA: W_UK
  kCore,            ///< q.k, softmax, p.v
  kReconstruction,  ///< From the latent head; MLA: W_UV
  kOutput,          ///< W_O
};
inline constexpr std::array kLayerParts{LayerPart::kProjections, LayerPart::kLatent,
                                        LayerPart::kCore, LayerPart::kReconstruction,
                                        LayerPart::kOutput};
/// "projections", "latent", "core", "reconstruction", "output"
const char* to_string(LayerPart part);

/// A tensor of the layer.
struct LayerBuffer {
  enum class Kind { kInput, kWeight, kCache, kActivation };
  std::string name;
  Kind kind = Kind::kActivation;
  int64_t elements = 0;
  /// Of what is drawn (all but activations): whole numbers from -127 to 127, times this power of two.
  /// So every type that is measured holds the same values.
  int exponent = 0;
};

/// A matrix of a buffer: element (r, j) of matrix i is at + i * step + r * row + j.
struct LayerView {
  int buffer = 0;
  int64_t at = 0;
  int64_t row = 0;
  int64_t step = 0;
};

/// out_i [rows, n] = in_i [rows, k] weight_i [k, n], for each i < count.
struct LayerProduct {
  LayerView in, weight, out;
  int64_t rows = 0, n = 0, k = 0, count = 1;
};

/// to [rows, columns] = from
struct LayerCopy {
  LayerView from, to;
  int64_t rows = 0, columns = 0;
};

/// out = softmax(mask(scale q k^T)) v, for each head. A view's row is from one token to the next, its
/// step from one head to the next; sequences follow each other.
struct LayerCore {
  LayerView q, k, v, out;
  int64_t heads = 0, kv_heads = 0, d_qk = 0, d_v = 0;
  int64_t batch = 0, queries = 0, tokens = 0;
  int64_t chunk = 0;  ///< Queries whose scores exist together
  double scale = 0;
  bool causal = false;
};

/// The core as products of equal size. Query rows that read the same keys are in one matrix, where their
/// places allow that.
struct CoreMatrices {
  struct Places {  ///< First elements
    int64_t q, k, v, out;
  };
  std::vector<Places> places;      ///< Of each matrix
  int64_t rows = 0;                ///< Of each; row r is of query r / rows_per_query
  int64_t rows_per_query = 1;      ///< Heads in a matrix
  int64_t q_row = 0, out_row = 0;  ///< From a row to the next
};
CoreMatrices core_matrices(const LayerCore& core);

/// One operation.
struct LayerOperation {
  LayerPart part;
  std::variant<LayerProduct, LayerCopy, LayerCore> what;
};

/// A layer's tensors and operations.
struct LayerPlan {
  LayerCase of;
  std::vector<LayerBuffer> buffers;
  std::vector<LayerOperation> operations;
  int y = 0;          ///< The buffer of the result, [batch, queries, d_model]
  int roundings = 0;  ///< How many tensors between x and y, and y, are rounded to the layer's type

  const LayerCore& core() const;
  bool has(LayerPart part) const;
  double flop(LayerPart part) const;
  /// Least bytes of a part in a type of that size: each operand once, and no scores.
  double bytes(LayerPart part, int64_t element_bytes) const;
  double flop() const;
  /// Of all buffers of a kind.
  double bytes(LayerBuffer::Kind kind, int64_t element_bytes) const;
};

/// Plans a step.
/// @return kInvalidArgument, naming the dimension, its value and what is allowed
Status plan_layer(const LayerCase& layer, LayerPlan* plan);

/// Value `index` of buffer `buffer`: what every evaluation starts from. GPU kernels draw the same.
double drawn_value(const LayerPlan& plan, int buffer, int64_t index);

/// What a layer is computed in.
enum class Element { kBf16, kFp16, kFp32, kFp64 };
/// "bf16", "fp16", "fp32", "fp64"
const char* to_string(Element element);
int64_t bytes_of(Element element);
/// Largest relative L2 distance of a right result from the float64 one. A rounding is off by at most u of
/// what it rounds, and the roundings of different tensors are independent: u sqrt(roundings). fp32 also rounds
/// every sum: 1e-5. fp64 is compared with another fp64: 1e-10.
double error_limit(Element element, int roundings);

/// A layer with its tensors in place.
class LayerRunner {
 public:
  virtual ~LayerRunner() = default;
  /// Runs a part, or all parts. On a GPU it only enqueues; a capture is allowed.
  virtual Status run(std::optional<LayerPart> part, Stream stream) = 0;
  /// Makes every activation NaN.
  virtual Status poison() = 0;
  /// Waits, and reads the result.
  virtual Status result(std::vector<double>* y) = 0;
  /// Bytes of scores that exist together.
  virtual double score_bytes() const = 0;
};

/// By Eigen. `element` is kFp32 or kFp64.
/// @return kInvalidArgument, kOutOfMemory
Status make_cpu_layer(const LayerPlan& plan, Element element, int num_threads,
                      std::unique_ptr<LayerRunner>* runner);

/// By cuBLAS, with kernels for the softmax. `element` is not kFp32.
/// @return kUnavailable without a GPU, CUDA or cuBLAS; kInvalidArgument, kOutOfMemory, kCudaError
Status make_gpu_layer(const LayerPlan& plan, Element element, std::unique_ptr<LayerRunner>* runner);

/// |y - expected| / |expected|; NaN if any is.
double relative_l2(const std::vector<double>& y, const std::vector<double>& expected);

}  // namespace mla::bench
