#include "reference/layers/cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace mla::cost {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// Products of four such, twice, stay far inside a double's range.
constexpr int64_t kLargest = int64_t{1} << 40;

Status check(const char* name, int64_t value, int64_t least) {
  if (value >= least && value <= kLargest) return {};
  return {StatusCode::kInvalidArgument, std::string(name) + " = " + std::to_string(value) +
                                            " must be " + std::to_string(least) + " to 2^40"};
}

Status check(const Step& step) {
  MLA_RETURN_IF_ERROR(check("batch", step.batch, 1));
  MLA_RETURN_IF_ERROR(check("new_tokens", step.new_tokens, 1));
  MLA_RETURN_IF_ERROR(check("context", step.context, 1));
  MLA_RETURN_IF_ERROR(check("element_bytes", step.element_bytes, 1));
  if (step.new_tokens <= step.context) return {};
  return {StatusCode::kInvalidArgument,
          "new_tokens = " + std::to_string(step.new_tokens) + " is more than context = " +
              std::to_string(step.context) + "; the context counts the new tokens"};
}

Status check(const MultiHead& model) {
  MLA_RETURN_IF_ERROR(check("d_model", model.d_model, 1));
  MLA_RETURN_IF_ERROR(check("heads", model.heads, 1));
  MLA_RETURN_IF_ERROR(check("kv_heads", model.kv_heads, 1));
  MLA_RETURN_IF_ERROR(check("head_dim", model.head_dim, 1));
  if (model.heads % model.kv_heads == 0) return {};
  return {StatusCode::kInvalidArgument,
          "heads = " + std::to_string(model.heads) +
              " is not a multiple of kv_heads = " + std::to_string(model.kv_heads)};
}

Status check(const TraditionalLatent& model) {
  MLA_RETURN_IF_ERROR(check("d_model", model.d_model, 1));
  return check("latent", model.latent, 1);
}

Status check(const Mla& model) {
  MLA_RETURN_IF_ERROR(check("d_model", model.d_model, 1));
  MLA_RETURN_IF_ERROR(check("heads", model.heads, 1));
  MLA_RETURN_IF_ERROR(check("q_lora", model.q_lora, 0));
  MLA_RETURN_IF_ERROR(check("kv_lora", model.kv_lora, 1));
  MLA_RETURN_IF_ERROR(check("nope", model.nope, 1));
  MLA_RETURN_IF_ERROR(check("rope", model.rope, 0));
  MLA_RETURN_IF_ERROR(check("v", model.v, 1));
  if (model.rope % 2 == 0) return {};
  return {StatusCode::kInvalidArgument,
          "rope = " + std::to_string(model.rope) + " is odd; RoPE turns pairs of columns"};
}

template <typename Model>
Status check(const Model& model, const Step& step, const LayerCost* cost) {
  MLA_RETURN_IF_ERROR(check(model));
  MLA_RETURN_IF_ERROR(check(step));
  if (cost != nullptr) return {};
  return {StatusCode::kInvalidArgument, "cost is null"};
}

/// The sums over a batch that the formulas are written in, as doubles.
struct Amounts {
  explicit Amounts(const Step& step)
      : new_tokens(static_cast<double>(step.batch) * static_cast<double>(step.new_tokens)),
        tokens(static_cast<double>(step.batch) * static_cast<double>(step.context)),
        pairs(static_cast<double>(step.batch) * visible_pairs(static_cast<double>(step.new_tokens),
                                                              static_cast<double>(step.context),
                                                              step.causal)),
        element_bytes(static_cast<double>(step.element_bytes)) {}
  double new_tokens;
  double tokens;
  double pairs;
  double element_bytes;
};

/// [rows, in] x [in, out], once for each of `blocks` heads.
Cost product(double rows, double in, double out, double element_bytes, double blocks = 1) {
  return {2 * rows * in * out * blocks,
          element_bytes * blocks * (in * out + rows * in + rows * out)};
}

void add_core(const Core& core, const Amounts& amounts, LayerCost* cost) {
  cost->core =
      core_cost(core, amounts.pairs, amounts.new_tokens, amounts.tokens, amounts.element_bytes);
  cost->exponentials = core.heads * amounts.pairs;
}

}  // namespace

Mla deepseek_v3() {
  return {.d_model = 7168, .heads = 128, .q_lora = 1536};
}
Mla deepseek_v2() {
  return {.d_model = 5120, .heads = 128, .q_lora = 1536};
}
Mla deepseek_v2_lite() {
  return {.d_model = 2048, .heads = 16};
}
MultiHead mha_32() {
  return {.d_model = 4096, .heads = 32, .kv_heads = 32, .head_dim = 128};
}

Step decode_step(int64_t context, int64_t batch) {
  return {.batch = batch, .new_tokens = 1, .context = context};
}
Step prefill_step(int64_t tokens, int64_t batch) {
  return {.batch = batch, .new_tokens = tokens, .context = tokens};
}

Cost& Cost::operator+=(const Cost& other) {
  flop += other.flop;
  bytes += other.bytes;
  return *this;
}

Cost LayerCost::total() const {
  Cost sum = projections;
  sum += expansion;
  sum += core;
  return sum;
}

double visible_pairs(double new_tokens, double context, bool causal) {
  if (!causal) return new_tokens * context;
  // Only the last `context` queries see anything: the one before them would see token -1.
  const double seeing = std::min(new_tokens, context);
  return seeing * context - seeing * (seeing - 1) / 2;
}

Cost core_cost(const Core& core, double pairs, double queries, double tokens,
               double element_bytes) {
  const double token_row = core.kv_heads * (core.d_qk + (core.value_in_key ? 0 : core.d_v));
  const double query_row = core.heads * (core.d_qk + core.d_v);
  return {2 * core.heads * pairs * (core.d_qk + core.d_v),
          element_bytes * (tokens * token_row + queries * query_row)};
}

Core core_of(const MultiHead& model) {
  const auto head_dim = static_cast<double>(model.head_dim);
  return {static_cast<double>(model.heads), static_cast<double>(model.kv_heads), head_dim,
          head_dim};
}

Core core_of(const TraditionalLatent& model) {
  const auto latent = static_cast<double>(model.latent);
  return {1, 1, latent, latent};
}

Core core_of(const Mla& model, Form form) {
  const auto heads = static_cast<double>(model.heads);
  if (form == Form::kAbsorbed) {
    return {heads, 1, static_cast<double>(model.latent_row()), static_cast<double>(model.kv_lora),
            true};
  }
  return {heads, heads, static_cast<double>(model.nope + model.rope), static_cast<double>(model.v)};
}

Status layer_cost(const MultiHead& model, const Step& step, LayerCost* cost) {
  MLA_RETURN_IF_ERROR(check(model, step, cost));
  const Amounts amounts(step);
  const double n = amounts.new_tokens, e = amounts.element_bytes;
  const auto d = static_cast<double>(model.d_model);
  const double all_heads = static_cast<double>(model.heads) * static_cast<double>(model.head_dim);
  const double kv_heads = static_cast<double>(model.kv_heads) * static_cast<double>(model.head_dim);
  LayerCost result;
  result.projections += product(n, d, all_heads, e);  // q
  result.projections += product(n, d, kv_heads, e);   // k
  result.projections += product(n, d, kv_heads, e);   // v
  result.projections += product(n, all_heads, d, e);  // out
  add_core(core_of(model), amounts, &result);
  result.cache_bytes_per_token = e * 2 * kv_heads;
  *cost = result;
  return {};
}

Status layer_cost(const TraditionalLatent& model, const Step& step, LayerCost* cost) {
  MLA_RETURN_IF_ERROR(check(model, step, cost));
  const Amounts amounts(step);
  const double n = amounts.new_tokens, e = amounts.element_bytes;
  const auto d = static_cast<double>(model.d_model);
  const auto latent = static_cast<double>(model.latent);
  LayerCost result;
  for (int i = 0; i < 4; ++i) result.projections += product(n, d, d, e);     // q, k, v, out
  for (int i = 0; i < 3; ++i) result.expansion += product(n, d, latent, e);  // q, k, v
  result.expansion += product(n, latent, d, e);                              // reconstruction
  add_core(core_of(model), amounts, &result);
  result.cache_bytes_per_token = e * 2 * latent;
  *cost = result;
  return {};
}

Status layer_cost(const Mla& model, Form form, const Step& step, LayerCost* cost) {
  MLA_RETURN_IF_ERROR(check(model, step, cost));
  if (form != Form::kAbsorbed && form != Form::kUnabsorbedLatent &&
      form != Form::kUnabsorbedExpanded) {
    return {StatusCode::kInvalidArgument, "form = " + std::to_string(static_cast<int>(form)) +
                                              " must be 0, 1 or 2, one of MLA's three"};
  }
  const Amounts amounts(step);
  const double n = amounts.new_tokens, e = amounts.element_bytes;
  const auto d = static_cast<double>(model.d_model), h = static_cast<double>(model.heads);
  const auto q_lora = static_cast<double>(model.q_lora);
  const auto kv_lora = static_cast<double>(model.kv_lora);
  const auto nope = static_cast<double>(model.nope), rope = static_cast<double>(model.rope);
  const auto v = static_cast<double>(model.v);
  const auto latent_row = static_cast<double>(model.latent_row());
  const auto expanded_row = static_cast<double>(model.expanded_row());

  LayerCost result;
  if (model.q_lora > 0) {
    result.projections += product(n, d, q_lora, e);
    result.projections += product(n, q_lora, h * (nope + rope), e);
  } else {
    result.projections += product(n, d, h * (nope + rope), e);
  }
  result.projections += product(n, d, latent_row, e);
  result.projections += product(n, h * v, d, e);

  if (form == Form::kAbsorbed) {
    result.expansion += product(n, nope, kv_lora, e, h);  // q~ = W_UK^T q_nope
    result.expansion += product(n, kv_lora, v, e, h);     // o = W_UV o~
  } else {
    // One kernel reads the rows [c | k_r] and writes [k_nope | k_r] and v of every head.
    const double m = form == Form::kUnabsorbedLatent ? amounts.tokens : n;
    result.expansion = {2 * m * h * kv_lora * (nope + v),
                        e * (h * kv_lora * (nope + v) + m * latent_row + m * expanded_row)};
  }
  add_core(core_of(model, form), amounts, &result);
  result.cache_bytes_per_token =
      e * (form == Form::kUnabsorbedExpanded ? expanded_row : latent_row);
  *cost = result;
  return {};
}

double pairs_per_expansion(const Mla& model) {
  // A pair and head: absorbed 2 kv_lora + rope multiply-adds, unabsorbed nope + rope + v. A token
  // and head: kv_lora (nope + v).
  const auto kv_lora = static_cast<double>(model.kv_lora);
  const auto narrow = static_cast<double>(model.nope + model.v);
  const double larger_by = 2 * kv_lora - narrow;
  return larger_by > 0 ? kv_lora * narrow / larger_by : kInfinity;
}

double flop_crossover_new_tokens(const Mla& model, double context, bool causal) {
  // Equal where pairs = r (s_k - s_q): the core's surplus against the tokens not expanded.
  const double r = pairs_per_expansion(model);
  if (r == kInfinity) return context;
  if (!causal) return r * context / (r + context);
  const double b = context + r + 0.5;
  // B - sqrt(B B - 2 r s_k), without the cancellation.
  return 2 * r * context / (b + std::sqrt(b * b - 2 * r * context));
}

double flop_crossover_context(const Mla& model, double new_tokens, bool causal) {
  const double r = pairs_per_expansion(model);
  if (r == kInfinity) return new_tokens;
  if (new_tokens >= r) return kInfinity;
  const double hidden = causal ? (new_tokens - 1) / 2 : 0;
  return new_tokens * (r - hidden) / (r - new_tokens);
}

double bytes_crossover_share(const Mla& model, Form against) {
  if (against == Form::kAbsorbed) return 0;  // never fewer than itself
  const auto kv_lora = static_cast<double>(model.kv_lora);
  if (against == Form::kUnabsorbedLatent) {
    return static_cast<double>(model.nope + model.rope + model.v) / (2 * kv_lora);
  }
  const auto expanded = static_cast<double>(model.expanded_row());
  const auto latent = static_cast<double>(model.latent_row());
  const double saved_a_cached_token = expanded - latent;
  const double paid_a_new_token =
      4 * static_cast<double>(model.heads) * kv_lora - expanded - latent;
  if (saved_a_cached_token <= 0) return 0;
  return paid_a_new_token > 0 ? saved_a_cached_token / paid_a_new_token : kInfinity;
}

double roofline_seconds(const LayerCost& cost, double flop_per_second, double bytes_per_second) {
  const auto part = [&](const Cost& work) {
    return std::max(work.flop / flop_per_second, work.bytes / bytes_per_second);
  };
  return part(cost.projections) + part(cost.expansion) + part(cost.core);
}

}  // namespace mla::cost
