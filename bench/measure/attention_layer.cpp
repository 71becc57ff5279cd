#include "bench/measure/attention_layer.h"

#include <algorithm>
#include <cmath>

#include "bench/measure/layer_draws.h"
#include "reference/layers/cost_model.h"

namespace mla::bench {
namespace {

using Kind = LayerBuffer::Kind;

/// MLA's widths, which no head_dim changes.
constexpr int64_t kLatent = 512, kNope = 128, kRope = 64, kValue = 128;
constexpr int64_t kMlaRow = kLatent + kRope, kMlaQuery = kNope + kRope;

/// Standard deviation of the whole numbers that are drawn.
constexpr double kDrawnDeviation = 73.6;

Status invalid(const std::string& message) {
  return {StatusCode::kInvalidArgument, message};
}

Status check(const char* name, int64_t value, int64_t most, int64_t multiple = 1) {
  if (value >= 1 && value <= most && value % multiple == 0) return {};
  return invalid(std::string(name) + " = " + std::to_string(value) + "; " +
                 (multiple > 1 ? "multiples of " + std::to_string(multiple) + " up to "
                               : std::string("1 to ")) +
                 std::to_string(most) + " are allowed");
}

Status check(const LayerCase& layer) {
  MLA_RETURN_IF_ERROR(check("heads", layer.heads, 1024));
  MLA_RETURN_IF_ERROR(check("head_dim", layer.head_dim, 1024, 8));  // cuBLAS wants 16 bytes
  MLA_RETURN_IF_ERROR(check("tokens", layer.tokens, int64_t{1} << 20));
  MLA_RETURN_IF_ERROR(check("batch", layer.batch, 4096));
  MLA_RETURN_IF_ERROR(check("queries", layer.num_queries(), int64_t{1} << 20));
  if (layer.form == LayerForm::kGrouped) {
    MLA_RETURN_IF_ERROR(check("kv_heads", layer.kv_heads, layer.heads));
    if (layer.heads % layer.kv_heads != 0) {
      return invalid("heads = " + std::to_string(layer.heads) +
                     " is not a multiple of kv_heads = " + std::to_string(layer.kv_heads));
    }
  }
  return {};
}

/// Writes a plan: buffers by their names, operations in order.
class Planner {
 public:
  Planner(const LayerCase& layer, LayerPlan* plan)
      : layer_(layer), plan_(*plan), d_(layer.d_model()), rows_(layer.batch * layer.num_queries()) {
    plan_ = {};
    plan_.of = layer;
    x_ = buffer("x", Kind::kInput, rows_ * d_, unit());
  }

  void standard(int64_t kv_heads) {
    const int64_t dim = layer_.head_dim, width = kv_heads * dim;
    const int q = activation("q", rows_ * d_);
    const int k = cache("k", width), v = cache("v", width);
    project(LayerPart::kProjections, "W_Q", {x_, 0, d_}, d_, {q, 0, d_}, d_);
    cache_rows("W_K", k, width);
    cache_rows("W_V", v, width);
    const int o = activation("o", rows_ * d_);
    core({{q, 0, d_, dim}, {k, 0, width, dim}, {v, 0, width, dim}, {o, 0, d_, dim}}, layer_.heads,
         kv_heads, dim, dim, dim);
    output(o, d_);
    plan_.roundings = 6;  // q, k, v, the weights of the softmax, o, y
  }

  void latent_plain() {
    const int64_t dim = layer_.head_dim;  // D' = d_model / heads
    const int q = activation("q", rows_ * dim);
    const int k = cache("k", dim), v = cache("v", dim);
    const auto through = [&](const char* full, const char* wide, const char* narrow, int to,
                             bool cached) {
      const int between = activation(full, rows_ * d_);
      project(LayerPart::kProjections, wide, {x_, 0, d_}, d_, {between, 0, d_}, d_);
      project(LayerPart::kLatent, narrow, {between, 0, d_}, d_,
              cached ? new_rows(to, dim) : LayerView{to, 0, dim}, dim);
    };
    through("Q", "W_Q", "L_Q", q, false);
    if (layer_.mode != LayerMode::kCross) {
      through("K", "W_K", "L_K", k, true);
      through("V", "W_V", "L_V", v, true);
    }
    plan_.roundings = 10;  // Q, K, V, q, k, v, the weights, o, r, y
    one_head({q, 0, dim}, {k, 0, dim}, {v, 0, dim}, layer_.num_queries());
  }

  /// F as two products, so that keys and values land where they are cached.
  void latent_fused() {
    const int64_t dim = layer_.head_dim;
    const int q = activation("q", rows_ * dim);
    const int kv = cache("kv", 2 * dim);
    project(LayerPart::kProjections, "W_Q L_Q", {x_, 0, d_}, d_, {q, 0, dim}, dim);
    cache_rows("[W_K L_K | W_V L_V]", kv, 2 * dim);
    plan_.roundings = 7;  // q, k, v, the weights, o, r, y
    one_head({q, 0, dim}, {kv, 0, 2 * dim}, {kv, dim, 2 * dim}, kLatentChunk);
  }

  void absorbed() {
    const int64_t h = layer_.heads, rows = rows_;
    const int q = activation("q", rows * h * kMlaQuery);
    const int wide = activation("q~", rows * h * kMlaRow);
    const int c = cache("c", kMlaRow);
    project(LayerPart::kProjections, "W_Q", {x_, 0, d_}, d_, {q, 0, h * kMlaQuery}, h * kMlaQuery);
    cache_rows("[W_DKV | W_KR]", c, kMlaRow);
    // q~_i = q_nope,i W_UK,i, and q_rope,i beside it
    const int up_key = weight("W_UK", h * kNope * kLatent, kNope);
    add(LayerPart::kLatent, LayerProduct{{q, 0, h * kMlaQuery, kMlaQuery},
                                         {up_key, 0, kLatent, kNope * kLatent},
                                         {wide, 0, h * kMlaRow, kMlaRow},
                                         rows,
                                         kLatent,
                                         kNope,
                                         h});
    add(LayerPart::kLatent,
        LayerCopy{{q, kNope, kMlaQuery, 0}, {wide, kLatent, kMlaRow, 0}, rows * h, kRope});
    const int latent = activation("o~", rows * h * kLatent);
    core({{wide, 0, h * kMlaRow, kMlaRow},
          {c, 0, kMlaRow, kMlaRow},
          {c, 0, kMlaRow, kMlaRow},
          {latent, 0, h * kLatent, kLatent}},
         h, 1, kMlaRow, kLatent, kMlaQuery);
    const int o = activation("o", rows * h * kValue);
    const int up_value = weight("W_UV", h * kLatent * kValue, kLatent);
    add(LayerPart::kReconstruction, LayerProduct{{latent, 0, h * kLatent, kLatent},
                                                 {up_value, 0, kValue, kLatent * kValue},
                                                 {o, 0, h * kValue, kValue},
                                                 rows,
                                                 kValue,
                                                 kLatent,
                                                 h});
    output(o, h * kValue);
    plan_.roundings = 7;  // q, q~, c, the weights, o~, o, y
  }

 private:
  struct CoreViews {
    LayerView q, k, v, out;
  };

  /// Inputs have a standard deviation of about 1.15, so that logits have one of about 1.
  static int unit() { return -6; }

  int buffer(const std::string& name, Kind kind, int64_t elements, int exponent) {
    plan_.buffers.push_back({name, kind, elements, exponent});
    return static_cast<int>(plan_.buffers.size()) - 1;
  }
  int activation(const std::string& name, int64_t elements) {
    return buffer(name, Kind::kActivation, elements, 0);
  }
  int cache(const std::string& name, int64_t width) {
    return buffer(name, Kind::kCache, layer_.batch * layer_.tokens * width, unit());
  }
  /// Its product has about the size of what goes in.
  int weight(const std::string& name, int64_t elements, int64_t fan_in) {
    const double deviation = kDrawnDeviation * std::sqrt(static_cast<double>(fan_in));
    return buffer(name, Kind::kWeight, elements,
                  static_cast<int>(std::lround(-std::log2(deviation))));
  }
  void add(LayerPart part, std::variant<LayerProduct, LayerCopy, LayerCore> what) {
    plan_.operations.push_back({part, what});
  }
  /// Where the keys or values of new tokens lie in a cache of this width.
  LayerView new_rows(int cache_buffer, int64_t width) const {
    if (layer_.mode == LayerMode::kPrefill) return {cache_buffer, 0, width, 0};
    return {cache_buffer, (layer_.tokens - 1) * width, layer_.tokens * width, 0};
  }
  void project(LayerPart part, const std::string& name, LayerView in, int64_t k, LayerView out,
               int64_t n) {
    const int w = weight(name, k * n, k);
    add(part, LayerProduct{in, {w, 0, n, 0}, out, rows_, n, k, 1});
  }
  /// Projects new tokens into a cache. Cross-attention has no new ones there.
  void cache_rows(const std::string& name, int cache_buffer, int64_t width) {
    if (layer_.mode == LayerMode::kCross) return;
    project(LayerPart::kProjections, name, {x_, 0, d_}, d_, new_rows(cache_buffer, width), width);
  }
  void core(const CoreViews& views, int64_t heads, int64_t kv_heads, int64_t d_qk, int64_t d_v,
            int64_t scaled_by, int64_t chunk = 0) {
    const int64_t queries = layer_.num_queries();
    add(LayerPart::kCore,
        LayerCore{views.q, views.k, views.v, views.out, heads, kv_heads, d_qk, d_v, layer_.batch,
                  queries, layer_.tokens, std::min(chunk > 0 ? chunk : queries, queries),
                  1 / std::sqrt(static_cast<double>(scaled_by)), layer_.causal});
  }
  void one_head(LayerView q, LayerView k, LayerView v, int64_t chunk) {
    const int64_t dim = layer_.head_dim;
    const int o = activation("o", rows_ * dim);
    core({q, k, v, {o, 0, dim}}, 1, 1, dim, dim, dim, chunk);
    const int r = activation("r", rows_ * d_);
    project(LayerPart::kReconstruction, "R", {o, 0, dim}, dim, {r, 0, d_}, d_);
    output(r, d_);
  }
  void output(int o, int64_t width) {
    plan_.y = activation("y", rows_ * d_);
    project(LayerPart::kOutput, "W_O", {o, 0, width}, width, {plan_.y, 0, d_}, d_);
  }

  const LayerCase& layer_;
  LayerPlan& plan_;
  const int64_t d_;
  const int64_t rows_;
  int x_ = 0;
};

double flop_of(const LayerProduct& one) {
  return 2.0 * double(one.count) * double(one.rows) * double(one.n) * double(one.k);
}
double flop_of(const LayerCopy&) {
  return 0;
}
cost::Cost cost_of(const LayerCore& one, double element_bytes) {
  const bool shared = one.k.buffer == one.v.buffer && one.k.at == one.v.at;
  const cost::Core core{double(one.heads), double(one.kv_heads), double(one.d_qk), double(one.d_v),
                        shared};
  const double queries = double(one.batch) * double(one.queries);
  return cost::core_cost(core, queries * double(one.tokens), queries,
                         double(one.batch) * double(one.tokens), element_bytes);
}
double flop_of(const LayerCore& one) {
  return cost_of(one, 1).flop;
}

double elements_of(const LayerProduct& one) {
  return double(one.count) *
         (double(one.rows) * double(one.k + one.n) + double(one.k) * double(one.n));
}
double elements_of(const LayerCopy& one) {
  return 2.0 * double(one.rows) * double(one.columns);
}
double elements_of(const LayerCore& one) {
  return cost_of(one, 1).bytes;
}

template <typename Of>
double sum_over(const LayerPlan& plan, LayerPart part, Of&& of) {
  double sum = 0;
  for (const LayerOperation& one : plan.operations) {
    if (one.part == part) sum += std::visit(of, one.what);
  }
  return sum;
}

}  // namespace

const char* to_string(LayerForm form) {
  switch (form) {
    case LayerForm::kMultiHead:
      return "multi_head";
    case LayerForm::kGrouped:
      return "grouped";
    case LayerForm::kLatentPlain:
      return "latent_plain";
    case LayerForm::kLatentFused:
      return "latent_fused";
    case LayerForm::kAbsorbed:
      return "absorbed";
  }
  return "unknown";
}

const char* to_string(LayerMode mode) {
  switch (mode) {
    case LayerMode::kPrefill:
      return "prefill";
    case LayerMode::kDecode:
      return "decode";
    case LayerMode::kCross:
      return "cross";
  }
  return "unknown";
}

const char* to_string(LayerPart part) {
  switch (part) {
    case LayerPart::kProjections:
      return "projections";
    case LayerPart::kLatent:
      return "latent";
    case LayerPart::kCore:
      return "core";
    case LayerPart::kReconstruction:
      return "reconstruction";
    case LayerPart::kOutput:
      return "output";
  }
  return "unknown";
}

const char* to_string(Element element) {
  switch (element) {
    case Element::kBf16:
      return "bf16";
    case Element::kFp16:
      return "fp16";
    case Element::kFp32:
      return "fp32";
    case Element::kFp64:
      return "fp64";
  }
  return "unknown";
}

int64_t bytes_of(Element element) {
  return element == Element::kFp64 ? 8 : element == Element::kFp32 ? 4 : 2;
}

double error_limit(Element element, int roundings) {
  if (element == Element::kFp64) return 1e-10;
  if (element == Element::kFp32) return 1e-5;
  return (element == Element::kBf16 ? 0x1p-8 : 0x1p-11) * std::sqrt(double(roundings));
}

CoreMatrices core_matrices(const LayerCore& core) {
  CoreMatrices result;
  const int64_t group = core.heads / core.kv_heads;
  // All heads of all queries read one KV head, and follow each other; or all heads of a group, of one
  // query; or the queries of one head.
  const bool all = core.kv_heads == 1;
  const bool a_group = core.queries == 1;
  result.rows_per_query = all ? core.heads : a_group ? group : 1;
  result.rows = core.queries * result.rows_per_query;
  result.q_row = all || a_group ? core.q.step : core.q.row;
  result.out_row = all || a_group ? core.out.step : core.out.row;
  if (result.rows_per_query == 1) {  // one head: there is no step to the next
    result.q_row = core.q.row;
    result.out_row = core.out.row;
  }
  for (int64_t sequence = 0; sequence < core.batch; ++sequence) {
    for (int64_t head = 0; head < core.heads; head += result.rows_per_query) {
      const int64_t kv_head = head / group;
      result.places.push_back(
          {core.q.at + sequence * core.queries * core.q.row + head * core.q.step,
           core.k.at + sequence * core.tokens * core.k.row + kv_head * core.k.step,
           core.v.at + sequence * core.tokens * core.v.row + kv_head * core.v.step,
           core.out.at + sequence * core.queries * core.out.row + head * core.out.step});
    }
  }
  return result;
}

const LayerCore& LayerPlan::core() const {
  const auto found = std::find_if(
      operations.begin(), operations.end(),
      [](const LayerOperation& one) { return std::holds_alternative<LayerCore>(one.what); });
  return std::get<LayerCore>(found->what);
}

bool LayerPlan::has(LayerPart part) const {
  return std::any_of(operations.begin(), operations.end(),
                     [&](const LayerOperation& one) { return one.part == part; });
}

double LayerPlan::flop(LayerPart part) const {
  return sum_over(*this, part, [](const auto& one) { return flop_of(one); });
}

double LayerPlan::bytes(LayerPart part, int64_t element_bytes) const {
  return double(element_bytes) *
         sum_over(*this, part, [](const auto& one) { return elements_of(one); });
}

double LayerPlan::flop() const {
  double sum = 0;
  for (const LayerPart part : kLayerParts) sum += flop(part);
  return sum;
}

double LayerPlan::bytes(LayerBuffer::Kind kind, int64_t element_bytes) const {
  double sum = 0;
  for (const LayerBuffer& one : buffers) {
    if (one.kind == kind) sum += double(one.elements) * double(element_bytes);
  }
  return sum;
}

Status plan_layer(const LayerCase& layer, LayerPlan* plan) {
  MLA_RETURN_IF_ERROR(check(layer));
  Planner planner(layer, plan);
  switch (layer.form) {
    case LayerForm::kMultiHead:
      planner.standard(layer.heads);
      break;
    case LayerForm::kGrouped:
      planner.standard(layer.kv_heads);
      break;
    case LayerForm::kLatentPlain:
      planner.latent_plain();
      break;
    case LayerForm::kLatentFused:
      planner.latent_fused();
      break;
    case LayerForm::kAbsorbed:
      planner.absorbed();
      break;
  }
  return {};
}

double drawn_value(const LayerPlan& plan, int buffer, int64_t index) {
  const LayerBuffer& of = plan.buffers[static_cast<size_t>(buffer)];
  return std::ldexp(double(drawn_number(buffer, index)), of.exponent);
}

double relative_l2(const std::vector<double>& y, const std::vector<double>& expected) {
  double off = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    off += (y.at(i) - expected[i]) * (y.at(i) - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(off / size);
}

}  // namespace mla::bench
