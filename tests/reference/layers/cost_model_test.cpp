/// @file
/// The cost model, compared with counts. Each layer is written out as loops over numbers that count
/// their own multiplications and additions, in tensors that note which elements a kernel touched.
#include "reference/layers/cost_model.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace mla::cost {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- What counts ---------------------------------------------------------------------------------

struct Count {
  int64_t multiplications = 0;
  int64_t additions = 0;
  int64_t elements = 0;  ///< Per kernel, the distinct ones read and the distinct ones written
};
enum Part { kProjections, kExpansion, kCore, kParts };

/// Where everything is counted. A kernel starts with begin(); each element that it touches counts once.
struct Ledger {
  Count parts[kParts];
  int64_t exponentials = 0;
  Part part = kProjections;
  int64_t kernel = 0;

  Count& now() { return parts[part]; }
  void begin(Part next) {
    part = next;
    ++kernel;
  }
  void clear() {
    for (Count& count : parts) count = {};
    exponentials = 0;
  }
};
Ledger ledger;

struct Counted {
  double value = 0;
  friend Counted operator*(Counted a, Counted b) {
    ++ledger.now().multiplications;
    return {a.value * b.value};
  }
  friend Counted operator+(Counted a, Counted b) {
    ++ledger.now().additions;
    return {a.value + b.value};
  }
};
/// For the softmax: its exponentials are counted, its other operations are not.
double counted_exp(double x) {
  ++ledger.exponentials;
  return std::exp(x);
}

/// [rows, columns] in memory.
class Tensor {
 public:
  Tensor(int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), elements_(static_cast<size_t>(rows * columns)) {}
  static Tensor random(int64_t rows, int64_t columns, uint32_t seed) {
    Tensor tensor(rows, columns);
    for (Element& element : tensor.elements_) {
      seed = seed * 1664525u + 1013904223u;
      element.value.value = seed / 4294967296.0 - 0.5;
    }
    return tensor;
  }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  Counted read(int64_t row, int64_t column) {
    Element& element = at(row, column);
    touch(&element.read_by);
    return element.value;
  }
  void write(int64_t row, int64_t column, Counted value) {
    Element& element = at(row, column);
    touch(&element.written_by);
    element.value = value;
  }
  double peek(int64_t row, int64_t column) { return at(row, column).value.value; }

 private:
  struct Element {
    Counted value;
    int64_t read_by = 0;
    int64_t written_by = 0;
  };
  Element& at(int64_t row, int64_t column) {
    return elements_.at(static_cast<size_t>(row * columns_ + column));
  }
  void touch(int64_t* kernel) {
    if (*kernel != ledger.kernel) ++ledger.now().elements;
    *kernel = ledger.kernel;
  }
  int64_t rows_, columns_;
  std::vector<Element> elements_;
};

// --- Kernels -------------------------------------------------------------------------------------

/// Where the new tokens' rows [batch * new_tokens] lie in a cache [batch * context].
struct Rows {
  Step step;
  int64_t sequence(int64_t row) const { return row / step.new_tokens; }
  int64_t cached(int64_t row) const {
    return sequence(row) * step.context + step.context - step.new_tokens + row % step.new_tokens;
  }
};

/// place(row, o) = sum over i of x[row, i] w[i, o]
template <typename Place>
void product(Tensor& x, Tensor& w, Tensor* y, Place place) {
  for (int64_t row = 0; row < x.rows(); ++row) {
    for (int64_t o = 0; o < w.columns(); ++o) {
      Counted sum;
      for (int64_t i = 0; i < w.rows(); ++i) sum = sum + x.read(row, i) * w.read(i, o);
      const auto [to, y_row, y_column] = place(y, row, o);
      to->write(y_row, y_column, sum);
    }
  }
}
struct Target {
  Tensor* tensor;
  int64_t row, column;
};
Target in_place(Tensor* y, int64_t row, int64_t column) {
  return {y, row, column};
}
Tensor product(Part part, Tensor& x, Tensor& w) {
  ledger.begin(part);
  Tensor y(x.rows(), w.columns());
  product(x, w, &y, in_place);
  return y;
}

/// Columns of head j begin at j * stride.
struct Heads {
  Tensor* tensor;
  int64_t stride;
  Counted read(int64_t row, int64_t head, int64_t column) const {
    return tensor->read(row, head * stride + column);
  }
};

/// softmax(q k^T) v: the attention core, one kernel.
Tensor attend(const Step& step, int64_t heads, int64_t kv_heads, Heads q, Heads k, int64_t d_qk,
              Heads v, int64_t d_v) {
  ledger.begin(kCore);
  Tensor out(step.batch * step.new_tokens, heads * d_v);
  for (int64_t row = 0; row < out.rows(); ++row) {
    const int64_t first = Rows{step}.sequence(row) * step.context;
    const int64_t visible = step.causal ? Rows{step}.cached(row) + 1 - first : step.context;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kv_head = head / (heads / kv_heads);
      std::vector<double> p;
      double sum = 0;
      for (int64_t t = 0; t < visible; ++t) {
        Counted logit;
        for (int64_t i = 0; i < d_qk; ++i) {
          logit = logit + q.read(row, head, i) * k.read(first + t, kv_head, i);
        }
        p.push_back(counted_exp(logit.value));
        sum += p.back();
      }
      for (int64_t i = 0; i < d_v; ++i) {
        Counted o;
        for (int64_t t = 0; t < visible; ++t) {
          o = o + Counted{p[static_cast<size_t>(t)] / sum} * v.read(first + t, kv_head, i);
        }
        out.write(row, head * d_v + i, o);
      }
    }
  }
  return out;
}

// --- Layers --------------------------------------------------------------------------------------

/// Appends the tokens of x to the cache: y = x w at the rows of the new tokens.
void append(Part part, const Step& step, Tensor& x, Tensor& w, Tensor* cache) {
  ledger.begin(part);
  product(x, w, cache, [&](Tensor* y, int64_t row, int64_t column) {
    return Target{y, Rows{step}.cached(row), column};
  });
}

Tensor run(const MultiHead& model, const Step& step) {
  const int64_t d = model.d_model, all = model.heads * model.head_dim,
                kv = model.kv_heads * model.head_dim;
  Tensor x = Tensor::random(step.batch * step.new_tokens, d, 1);
  Tensor w_q = Tensor::random(d, all, 2), w_k = Tensor::random(d, kv, 3),
         w_v = Tensor::random(d, kv, 4), w_o = Tensor::random(all, d, 5);
  Tensor k = Tensor::random(step.batch * step.context, kv, 6);
  Tensor v = Tensor::random(step.batch * step.context, kv, 7);
  ledger.clear();
  Tensor q = product(kProjections, x, w_q);
  append(kProjections, step, x, w_k, &k);
  append(kProjections, step, x, w_v, &v);
  Tensor o = attend(step, model.heads, model.kv_heads, {&q, model.head_dim}, {&k, model.head_dim},
                    model.head_dim, {&v, model.head_dim}, model.head_dim);
  return product(kProjections, o, w_o);
}

Tensor run(const TraditionalLatent& model, const Step& step) {
  const int64_t d = model.d_model, latent = model.latent;
  Tensor x = Tensor::random(step.batch * step.new_tokens, d, 1);
  Tensor w[3] = {Tensor::random(d, d, 2), Tensor::random(d, d, 3), Tensor::random(d, d, 4)};
  Tensor down[3] = {Tensor::random(d, latent, 5), Tensor::random(d, latent, 6),
                    Tensor::random(d, latent, 7)};
  Tensor up = Tensor::random(latent, d, 8), w_o = Tensor::random(d, d, 9);
  Tensor k = Tensor::random(step.batch * step.context, latent, 10);
  Tensor v = Tensor::random(step.batch * step.context, latent, 11);
  ledger.clear();
  Tensor full_q = product(kProjections, x, w[0]);
  Tensor full_k = product(kProjections, x, w[1]);
  Tensor full_v = product(kProjections, x, w[2]);
  Tensor q = product(kExpansion, full_q, down[0]);
  append(kExpansion, step, full_k, down[1], &k);
  append(kExpansion, step, full_v, down[2], &v);
  Tensor o = attend(step, 1, 1, {&q, latent}, {&k, latent}, latent, {&v, latent}, latent);
  Tensor y = product(kExpansion, o, up);
  return product(kProjections, y, w_o);
}

/// MLA without norms and RoPE. These are not counted; they act on q and the cache row alone.
class MlaLayer {
 public:
  explicit MlaLayer(const Mla& model) : m_(model) {}

  Tensor run(Form form, const Step& step) {
    // What earlier steps left: latent rows, and their expansion where that is what is cached.
    Tensor latent = Tensor::random(step.batch * step.context, m_.latent_row(), 1);
    Tensor k(latent.rows(), m_.heads * (m_.nope + m_.rope)), v(latent.rows(), m_.heads * m_.v);
    if (form == Form::kUnabsorbedExpanded) {
      for (int64_t t = 0; t < latent.rows(); ++t) expand_row(latent, t, &k, &v);
    }
    Tensor x = Tensor::random(step.batch * step.new_tokens, m_.d_model, 2);
    ledger.clear();

    // Queries: q_rope goes where the core reads it, and so does q_nope unless it is absorbed first.
    const bool absorbed = form == Form::kAbsorbed;
    const int64_t q_width = absorbed ? m_.latent_row() : m_.nope + m_.rope;
    Tensor q(x.rows(), m_.heads * q_width), q_nope(x.rows(), m_.heads * m_.nope);
    const auto place_q = [&](Tensor*, int64_t row, int64_t column) {
      const int64_t head = column / (m_.nope + m_.rope), i = column % (m_.nope + m_.rope);
      if (i >= m_.nope) return Target{&q, row, (head + 1) * q_width - m_.rope + i - m_.nope};
      return absorbed ? Target{&q_nope, row, head * m_.nope + i}
                      : Target{&q, row, head * q_width + i};
    };
    if (m_.q_lora > 0) {
      Tensor c_q = product(kProjections, x, w_dq_);
      ledger.begin(kProjections);
      product(c_q, w_uq_, &q, place_q);
    } else {
      ledger.begin(kProjections);
      product(x, w_q_, &q, place_q);
    }

    // The new tokens' rows [c | k_r].
    append(kProjections, step, x, w_dkv_, &latent);

    Tensor o(0, 0);
    if (absorbed) {
      absorb_queries(q_nope, &q);
      Tensor o_latent =
          attend(step, m_.heads, 1, {&q, q_width}, {&latent, 0}, q_width, {&latent, 0}, m_.kv_lora);
      o = project_values(o_latent);
    } else {
      ledger.begin(kExpansion);
      if (form == Form::kUnabsorbedLatent) {
        for (int64_t t = 0; t < latent.rows(); ++t) expand_row(latent, t, &k, &v);
      } else {
        for (int64_t row = 0; row < x.rows(); ++row) {
          expand_row(latent, Rows{step}.cached(row), &k, &v);
        }
      }
      o = attend(step, m_.heads, m_.heads, {&q, q_width}, {&k, q_width}, q_width, {&v, m_.v}, m_.v);
    }
    return product(kProjections, o, w_o_);
  }

 private:
  /// k_i = [W_UK,i c | k_r], v_i = W_UV,i c for every head i
  void expand_row(Tensor& latent, int64_t token, Tensor* k, Tensor* v) {
    for (int64_t head = 0; head < m_.heads; ++head) {
      for (int64_t i = 0; i < m_.nope; ++i) {
        Counted sum;
        for (int64_t j = 0; j < m_.kv_lora; ++j) {
          sum = sum + w_uk_.read(j, head * m_.nope + i) * latent.read(token, j);
        }
        k->write(token, head * (m_.nope + m_.rope) + i, sum);
      }
      for (int64_t i = 0; i < m_.rope; ++i) {
        k->write(token, head * (m_.nope + m_.rope) + m_.nope + i,
                 latent.read(token, m_.kv_lora + i));
      }
      for (int64_t i = 0; i < m_.v; ++i) {
        Counted sum;
        for (int64_t j = 0; j < m_.kv_lora; ++j) {
          sum = sum + w_uv_.read(j, head * m_.v + i) * latent.read(token, j);
        }
        v->write(token, head * m_.v + i, sum);
      }
    }
  }
  /// q~_i = W_UK,i^T q_nope,i
  void absorb_queries(Tensor& q_nope, Tensor* q) {
    ledger.begin(kExpansion);
    for (int64_t row = 0; row < q_nope.rows(); ++row) {
      for (int64_t head = 0; head < m_.heads; ++head) {
        for (int64_t j = 0; j < m_.kv_lora; ++j) {
          Counted sum;
          for (int64_t i = 0; i < m_.nope; ++i) {
            sum = sum + w_uk_.read(j, head * m_.nope + i) * q_nope.read(row, head * m_.nope + i);
          }
          q->write(row, head * m_.latent_row() + j, sum);
        }
      }
    }
  }
  /// o_i = W_UV,i o~_i
  Tensor project_values(Tensor& o_latent) {
    ledger.begin(kExpansion);
    Tensor o(o_latent.rows(), m_.heads * m_.v);
    for (int64_t row = 0; row < o.rows(); ++row) {
      for (int64_t head = 0; head < m_.heads; ++head) {
        for (int64_t i = 0; i < m_.v; ++i) {
          Counted sum;
          for (int64_t j = 0; j < m_.kv_lora; ++j) {
            sum = sum + w_uv_.read(j, head * m_.v + i) * o_latent.read(row, head * m_.kv_lora + j);
          }
          o.write(row, head * m_.v + i, sum);
        }
      }
    }
    return o;
  }

  Mla m_;
  Tensor w_dq_ = Tensor::random(m_.d_model, m_.q_lora, 3);
  Tensor w_uq_ = Tensor::random(m_.q_lora, m_.heads*(m_.nope + m_.rope), 4);
  Tensor w_q_ = Tensor::random(m_.d_model, m_.heads*(m_.nope + m_.rope), 5);
  Tensor w_dkv_ = Tensor::random(m_.d_model, m_.latent_row(), 6);
  Tensor w_uk_ = Tensor::random(m_.kv_lora, m_.heads* m_.nope, 7);
  Tensor w_uv_ = Tensor::random(m_.kv_lora, m_.heads* m_.v, 8);
  Tensor w_o_ = Tensor::random(m_.heads * m_.v, m_.d_model, 9);
};

// --- Counts and formulas -------------------------------------------------------------------------

std::vector<Step> steps() {
  std::vector<Step> list;
  for (const int64_t batch : {1, 2}) {
    for (const bool causal : {false, true}) {
      for (const auto& [new_tokens, context] : {std::pair{1, 1}, {1, 7}, {2, 7}, {6, 7}, {7, 7}}) {
        list.push_back({batch, new_tokens, context, causal, batch == 1 ? 2 : 4});
      }
    }
  }
  return list;
}

std::string describe(const Step& step) {
  return "b=" + std::to_string(step.batch) + " s_q=" + std::to_string(step.new_tokens) +
         " s_k=" + std::to_string(step.context) + (step.causal ? " causal" : "");
}

/// Expects the ledger to have what the formulas say.
void expect_counted(const LayerCost& cost, const Step& step) {
  const auto e = static_cast<double>(step.element_bytes);
  const Cost* parts[kParts] = {&cost.projections, &cost.expansion, &cost.core};
  const char* names[kParts] = {"projections", "expansion", "core"};
  for (int part = 0; part < kParts; ++part) {
    SCOPED_TRACE(names[part]);
    const Count& count = ledger.parts[part];
    EXPECT_EQ(count.multiplications, count.additions);
    EXPECT_EQ(parts[part]->flop, static_cast<double>(count.multiplications + count.additions));
    EXPECT_EQ(parts[part]->bytes, e * static_cast<double>(count.elements));
  }
  EXPECT_EQ(cost.exponentials, static_cast<double>(ledger.exponentials));
  EXPECT_EQ(cost.total().flop, cost.projections.flop + cost.expansion.flop + cost.core.flop);
}

TEST(CostModel, CountsOfStandardAttention) {
  for (const int64_t kv_heads : {6, 3, 1}) {
    const MultiHead model{.d_model = 10, .heads = 6, .kv_heads = kv_heads, .head_dim = 5};
    for (const Step& step : steps()) {
      SCOPED_TRACE(describe(step) + " kv_heads=" + std::to_string(kv_heads));
      LayerCost cost;
      ASSERT_OK(layer_cost(model, step, &cost));
      run(model, step);
      expect_counted(cost, step);
      EXPECT_EQ(cost.cache_bytes_per_token,
                static_cast<double>(step.element_bytes * 2 * kv_heads * 5));
    }
  }
}

TEST(CostModel, CountsOfTraditionalLatentAttention) {
  const TraditionalLatent model{.d_model = 12, .latent = 5};
  for (const Step& step : steps()) {
    SCOPED_TRACE(describe(step));
    LayerCost cost;
    ASSERT_OK(layer_cost(model, step, &cost));
    run(model, step);
    expect_counted(cost, step);
    EXPECT_EQ(cost.cache_bytes_per_token, static_cast<double>(step.element_bytes * 10));
  }
}

Mla small_mla(int64_t q_lora) {
  return {.d_model = 10, .heads = 3, .q_lora = q_lora, .kv_lora = 9, .nope = 5, .rope = 2, .v = 4};
}
constexpr Form kForms[] = {Form::kAbsorbed, Form::kUnabsorbedLatent, Form::kUnabsorbedExpanded};

TEST(CostModel, CountsOfMlaInEveryForm) {
  for (const int64_t q_lora : {0, 7}) {
    const Mla model = small_mla(q_lora);
    for (const Step& step : steps()) {
      for (const Form form : kForms) {
        SCOPED_TRACE(describe(step) + " q_lora=" + std::to_string(q_lora) + " form " +
                     std::to_string(static_cast<int>(form)));
        LayerCost cost;
        ASSERT_OK(layer_cost(model, form, step, &cost));
        MlaLayer(model).run(form, step);
        expect_counted(cost, step);
        const double e = static_cast<double>(step.element_bytes);
        EXPECT_EQ(cost.cache_bytes_per_token,
                  e * (form == Form::kUnabsorbedExpanded ? 3 * (5 + 2 + 4) : 9 + 2));
      }
    }
  }
}

/// The counted loops of the three forms compute the same result.
TEST(CostModel, CountedFormsAgree) {
  for (const Step& step : steps()) {
    SCOPED_TRACE(describe(step));
    MlaLayer layer(small_mla(7));
    Tensor absorbed = layer.run(Form::kAbsorbed, step);
    for (const Form form : {Form::kUnabsorbedLatent, Form::kUnabsorbedExpanded}) {
      Tensor other = layer.run(form, step);
      for (int64_t row = 0; row < other.rows(); ++row) {
        for (int64_t column = 0; column < other.columns(); ++column) {
          EXPECT_NEAR(other.peek(row, column), absorbed.peek(row, column), 1e-13);
        }
      }
    }
  }
}

TEST(CostModel, VisiblePairs) {
  for (int s_q = 1; s_q <= 9; ++s_q) {
    for (int s_k = 0; s_k <= 9; ++s_k) {
      int causal = 0;
      for (int i = 0; i < s_q; ++i) causal += std::max(0, s_k - s_q + i + 1);
      EXPECT_EQ(visible_pairs(s_q, s_k, true), causal) << s_q << " of " << s_k;
      EXPECT_EQ(visible_pairs(s_q, s_k, false), s_q * s_k);
    }
  }
}

TEST(CostModel, KnownFigures) {
  LayerCost cost;
  const auto cache = [&](const Mla& model, Form form) {
    EXPECT_OK(layer_cost(model, form, decode_step(4096), &cost));
    return cost.cache_bytes_per_token;
  };
  EXPECT_EQ(cache(deepseek_v3(), Form::kUnabsorbedExpanded), 81920);
  EXPECT_EQ(cache(deepseek_v2_lite(), Form::kUnabsorbedExpanded), 10240);
  for (const Mla& model : {deepseek_v3(), deepseek_v2(), deepseek_v2_lite()}) {
    EXPECT_EQ(cache(model, Form::kAbsorbed), 1152);
    EXPECT_EQ(cache(model, Form::kUnabsorbedLatent), 1152);
  }
  ASSERT_OK(layer_cost(mha_32(), decode_step(4096), &cost));
  EXPECT_EQ(cost.cache_bytes_per_token, 16384);
  EXPECT_NEAR(cost.core.intensity(), 1, 1e-3);  // a multiply-add for every 2-byte element

  // Decode of V3, 64 x 4096: 1.89 h_q FLOP per byte of cache; q and out make it a little less.
  ASSERT_OK(layer_cost(deepseek_v3(), Form::kAbsorbed, decode_step(4096, 64), &cost));
  EXPECT_EQ(cost.core.flop, 2.0 * 64 * 128 * 4096 * 1088);
  EXPECT_EQ(cost.core.bytes, 64.0 * 4096 * 1152 + 64 * 128 * (576 + 512) * 2);
  EXPECT_NEAR(cost.core.intensity(), 228, 1);
  // The weights: 187 million in V3, each read once and used in one multiply-add per token.
  ASSERT_OK(layer_cost(deepseek_v3(), Form::kAbsorbed, decode_step(1), &cost));
  EXPECT_EQ((cost.projections.flop + cost.expansion.flop) / 2,
            7168.0 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168);
}

// --- Crossovers ----------------------------------------------------------------------------------

enum class Measure { kFlop, kBytes };

/// The absorbed form's cost minus that of `against`: negative where absorbing pays.
double surplus(const Mla& model, Form against, const Step& step, Measure measure) {
  LayerCost absorbed, other;
  EXPECT_OK(layer_cost(model, Form::kAbsorbed, step, &absorbed));
  EXPECT_OK(layer_cost(model, against, step, &other));
  return measure == Measure::kFlop ? absorbed.total().flop - other.total().flop
                                   : absorbed.total().bytes - other.total().bytes;
}

/// Expects `difference` to have the sign of `x - crossover`, and to be 0 only at the crossover.
void expect_sign(double difference, double x, double crossover) {
  if (std::abs(x - crossover) < 1e-9 * crossover) {
    EXPECT_EQ(difference, 0);
  } else if (x < crossover) {
    EXPECT_LT(difference, 0);
  } else {
    EXPECT_GT(difference, 0);
  }
}

const Mla kModels[] = {deepseek_v3(),
                       deepseek_v2(),
                       deepseek_v2_lite(),
                       small_mla(0),
                       {.d_model = 8, .heads = 1, .kv_lora = 64, .nope = 8, .rope = 4, .v = 8},
                       {.d_model = 8, .heads = 2, .kv_lora = 8, .nope = 4, .rope = 8, .v = 4}};

TEST(Crossover, FlopByNewTokensIsTheSignChange) {
  for (const Mla& model : kModels) {
    for (const int64_t context : {2, 3, 64, 200, 341, 1000, 4096}) {
      for (const bool causal : {false, true}) {
        const double crossover =
            flop_crossover_new_tokens(model, static_cast<double>(context), causal);
        for (int64_t s_q = 1; s_q <= context; ++s_q) {
          if (s_q > 1000 && s_q % 97 != 0 && s_q != context) continue;
          SCOPED_TRACE(std::to_string(s_q) + " of " + std::to_string(context));
          const Step step{.new_tokens = s_q, .context = context, .causal = causal};
          expect_sign(surplus(model, Form::kUnabsorbedLatent, step, Measure::kFlop),
                      static_cast<double>(s_q), crossover);
        }
        EXPECT_LT(crossover, context);  // prefill: never
      }
    }
  }
}

TEST(Crossover, FlopByContextIsTheSignChange) {
  for (const Mla& model : kModels) {
    for (const int64_t s_q : {1, 2, 5, 16, 85, 170, 171, 400}) {
      for (const bool causal : {false, true}) {
        const double crossover = flop_crossover_context(model, static_cast<double>(s_q), causal);
        for (int64_t context = s_q; context < 200000; context += 1 + context / 50) {
          SCOPED_TRACE(std::to_string(s_q) + " of " + std::to_string(context));
          const Step step{.new_tokens = s_q, .context = context, .causal = causal};
          expect_sign(-surplus(model, Form::kUnabsorbedLatent, step, Measure::kFlop),
                      static_cast<double>(context), crossover);
        }
      }
    }
  }
}

TEST(Crossover, FlopCrossoversAreEachOthersInverse) {
  for (const bool causal : {false, true}) {
    for (const double context : {10.0, 100.0, 5000.0, 1e6}) {
      const double s_q = flop_crossover_new_tokens(deepseek_v3(), context, causal);
      EXPECT_NEAR(flop_crossover_context(deepseek_v3(), s_q, causal) / context, 1, 1e-6);
    }
  }
}

/// Compared with an expanded cache, the absorbed form has the larger core and saves nothing.
TEST(Crossover, NoFlopSavedAgainstAnExpandedCache) {
  for (const Step& step : steps()) {
    EXPECT_GT(surplus(deepseek_v3(), Form::kUnabsorbedExpanded, step, Measure::kFlop), 0);
  }
}

TEST(Crossover, BytesIsTheSignChange) {
  for (const Mla& model : kModels) {
    for (const Form against : {Form::kUnabsorbedLatent, Form::kUnabsorbedExpanded}) {
      const double share = bytes_crossover_share(model, against);
      for (const int64_t context : {1, 2, 5, 6, 16, 100, 1000, 4096}) {
        for (int64_t s_q = 1; s_q <= context; s_q += 1 + s_q / 50) {
          SCOPED_TRACE(std::to_string(s_q) + " of " + std::to_string(context));
          const Step step{.batch = 2, .new_tokens = s_q, .context = context};
          expect_sign(surplus(model, against, step, Measure::kBytes), static_cast<double>(s_q),
                      share * static_cast<double>(context));
        }
      }
    }
  }
}

TEST(Crossover, Figures) {
  const Mla v3 = deepseek_v3();
  EXPECT_DOUBLE_EQ(pairs_per_expansion(v3), 512.0 / 3);
  EXPECT_NEAR(flop_crossover_new_tokens(v3, 4096, false), 163.84, 0.01);
  EXPECT_NEAR(flop_crossover_new_tokens(v3, 4096, true), 167.1, 0.1);
  EXPECT_NEAR(flop_crossover_new_tokens(v3, 1e9, true), 512.0 / 3, 1e-3);
  EXPECT_LT(flop_crossover_context(v3, 1, true), 2);  // decode: from two tokens on
  EXPECT_EQ(flop_crossover_context(v3, 171, true), kInfinity);
  EXPECT_DOUBLE_EQ(bytes_crossover_share(v3, Form::kUnabsorbedLatent), 0.3125);
  EXPECT_NEAR(bytes_crossover_share(v3, Form::kUnabsorbedExpanded), 0.183, 1e-3);
  EXPECT_NEAR(bytes_crossover_share(deepseek_v2_lite(), Form::kUnabsorbedExpanded), 0.168, 1e-3);
  EXPECT_EQ(bytes_crossover_share(v3, Form::kAbsorbed), 0);

  Mla one_head = v3;  // its own keys and values are smaller than the latent row
  one_head.heads = 1;
  EXPECT_EQ(bytes_crossover_share(one_head, Form::kUnabsorbedExpanded), 0);
  Mla narrow = v3;  // the absorbed core is not larger, so no expansion ever pays
  narrow.kv_lora = 128;
  EXPECT_EQ(pairs_per_expansion(narrow), kInfinity);
  EXPECT_EQ(flop_crossover_new_tokens(narrow, 100, true), 100);
  EXPECT_EQ(flop_crossover_context(narrow, 100, true), 100);
}

TEST(CostModel, RooflineIsTheLongerOfTheTwo) {
  LayerCost cost;
  cost.projections = {100, 1};
  cost.core = {1, 100};
  EXPECT_DOUBLE_EQ(roofline_seconds(cost, 10, 20), 100.0 / 10 + 100.0 / 20);
}

// --- Bad input -----------------------------------------------------------------------------------

void expect_refused(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

TEST(CostModel, RefusesWhatIsNoLayer) {
  LayerCost cost;
  cost.exponentials = 42;
  const Step step = decode_step(8);
  MultiHead heads = mha_32();
  heads.kv_heads = 5;
  expect_refused(layer_cost(heads, step, &cost), "heads = 32 is not a multiple of kv_heads = 5");
  heads.kv_heads = 0;
  expect_refused(layer_cost(heads, step, &cost), "kv_heads = 0 must be 1 to 2^40");
  expect_refused(layer_cost(TraditionalLatent{.d_model = 8, .latent = -1}, step, &cost),
                 "latent = -1");
  Mla mla = deepseek_v3();
  mla.rope = 63;
  expect_refused(layer_cost(mla, Form::kAbsorbed, step, &cost), "rope = 63 is odd");
  mla = deepseek_v3();
  mla.q_lora = -1;
  expect_refused(layer_cost(mla, Form::kAbsorbed, step, &cost), "q_lora = -1 must be 0 to 2^40");
  mla = deepseek_v3();
  mla.heads = int64_t{1} << 41;
  expect_refused(layer_cost(mla, Form::kAbsorbed, step, &cost), "heads = 2199023255552");
  expect_refused(layer_cost(deepseek_v3(), static_cast<Form>(3), step, &cost),
                 "form = 3 must be 0, 1 or 2");
  expect_refused(layer_cost(mha_32(), step, nullptr), "cost is null");
  EXPECT_EQ(cost.exponentials, 42) << "a refused call leaves its result alone";
}

TEST(CostModel, RefusesWhatIsNoStep) {
  LayerCost cost;
  const auto with = [&](Step step) {
    return layer_cost(deepseek_v3(), Form::kUnabsorbedLatent, step, &cost);
  };
  expect_refused(with(decode_step(0)), "context = 0 must be 1 to 2^40");
  expect_refused(with(decode_step(8, 0)), "batch = 0");
  expect_refused(with({.new_tokens = 0, .context = 8}), "new_tokens = 0");
  expect_refused(with({.new_tokens = 9, .context = 8}),
                 "new_tokens = 9 is more than context = 8; the context counts the new tokens");
  expect_refused(with({.context = 8, .element_bytes = 0}), "element_bytes = 0");
}

}  // namespace
}  // namespace mla::cost
