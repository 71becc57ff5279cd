// The layers of mla_traditional, compared with those of the reference. The two share no code.
#include "bench/measure/attention_layer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "reference/layers/cost_model.h"
#include "reference/layers/traditional_mla.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using traditional::Linear;
using Matrix = traditional::Matrix<double>;

LayerCase small(LayerForm form, LayerMode mode = LayerMode::kPrefill) {
  LayerCase layer{.form = form, .mode = mode, .heads = 4, .kv_heads = 2, .head_dim = 8};
  layer.tokens = 13;
  layer.queries = 5;
  layer.batch = 2;
  return layer;
}

LayerPlan planned(const LayerCase& layer) {
  LayerPlan plan;
  EXPECT_OK(plan_layer(layer, &plan));
  return plan;
}

std::vector<double> evaluate(const LayerPlan& plan, Element element = Element::kFp64,
                             int threads = 3) {
  std::unique_ptr<LayerRunner> runner;
  std::vector<double> y;
  EXPECT_OK(make_cpu_layer(plan, element, threads, &runner));
  EXPECT_OK(runner->poison());
  EXPECT_OK(runner->run({}, nullptr));
  EXPECT_OK(runner->result(&y));
  return y;
}

int named(const LayerPlan& plan, const std::string& name) {
  for (size_t i = 0; i < plan.buffers.size(); ++i) {
    if (plan.buffers[i].name == name) return static_cast<int>(i);
  }
  ADD_FAILURE() << "no buffer " << name;
  return 0;
}

/// A drawn buffer, or a part of it.
Matrix drawn(const LayerPlan& plan, const std::string& name, int64_t rows, int64_t columns,
             int64_t at = 0) {
  const int buffer = named(plan, name);
  Matrix matrix(rows, columns);
  for (int64_t i = 0; i < rows * columns; ++i) matrix.data()[i] = drawn_value(plan, buffer, at + i);
  return matrix;
}

Linear<double> linear(const LayerPlan& plan, const std::string& name, int64_t in, int64_t out) {
  return {drawn(plan, name, in, out), {}};
}

/// The relative distance between one sequence's result and the reference's.
double distance(const std::vector<double>& y, int64_t sequence, const Matrix& expected) {
  const auto* begin = y.data() + sequence * expected.size();
  return relative_l2({begin, begin + expected.size()},
                     {expected.data(), expected.data() + expected.size()});
}

traditional::Mask mask_of(const LayerCase& layer) {
  return layer.causal ? traditional::Mask::causal() : traditional::Mask();
}

/// For each sequence's x, the result must be what `attend`(x, &expected) gives.
template <typename Attend>
void expect_each(const LayerPlan& plan, const std::vector<double>& y, Attend attend) {
  const LayerCase& layer = plan.of;
  const int64_t tokens = layer.tokens, d = layer.d_model();
  for (int64_t b = 0; b < layer.batch; ++b) {
    Matrix expected;
    ASSERT_OK(attend(drawn(plan, "x", tokens, d, b * tokens * d), &expected));
    EXPECT_LT(distance(y, b, expected), 1e-12);
  }
}

class Prefill : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Causal, Prefill, testing::Bool());

TEST_P(Prefill, MultiHeadAgreesWithTheReference) {
  LayerCase layer = small(LayerForm::kMultiHead);
  layer.causal = GetParam();
  const LayerPlan plan = planned(layer);
  const int64_t d = layer.d_model();
  const traditional::MultiHeadWeights<double> weights{
      layer.heads, linear(plan, "W_Q", d, d), linear(plan, "W_K", d, d), linear(plan, "W_V", d, d),
      linear(plan, "W_O", d, d)};
  expect_each(plan, evaluate(plan), [&](const Matrix& x, Matrix* expected) {
    return attend_plain(weights, x, mask_of(layer), expected);
  });
}

TEST_P(Prefill, LatentPlainAgreesWithTheReference) {
  LayerCase layer = small(LayerForm::kLatentPlain);
  layer.causal = GetParam();
  const LayerPlan plan = planned(layer);
  const int64_t d = layer.d_model(), narrow = layer.head_dim;
  const traditional::LatentWeights<double> weights{
      linear(plan, "W_Q", d, d),      linear(plan, "W_K", d, d),
      linear(plan, "W_V", d, d),      linear(plan, "L_Q", d, narrow),
      linear(plan, "L_K", d, narrow), linear(plan, "L_V", d, narrow),
      linear(plan, "R", narrow, d),   linear(plan, "W_O", d, d)};
  expect_each(plan, evaluate(plan), [&](const Matrix& x, Matrix* expected) {
    return attend_plain(weights, x, mask_of(layer), expected);
  });
}

TEST_P(Prefill, LatentFusedAgreesWithTheReferenceInChunks) {
  LayerCase layer = small(LayerForm::kLatentFused);
  layer.causal = GetParam();
  layer.tokens = kLatentChunk + 70;  // two chunks, even on one thread
  const LayerPlan plan = planned(layer);
  const int64_t d = layer.d_model(), narrow = layer.head_dim;
  traditional::FusedLatentWeights<double> weights;
  weights.projection.weight = Matrix::Zero(d, d + 3 * narrow);
  weights.projection.weight.middleCols(d, narrow) = drawn(plan, "W_Q L_Q", d, narrow);
  weights.projection.weight.rightCols(2 * narrow) =
      drawn(plan, "[W_K L_K | W_V L_V]", d, 2 * narrow);
  weights.reconstruction = linear(plan, "R", narrow, d);
  weights.output = linear(plan, "W_O", d, d);
  expect_each(plan, evaluate(plan, Element::kFp64, 1), [&](const Matrix& x, Matrix* expected) {
    return attend_chunked(weights, x, mask_of(layer), {.chunk_size = 100}, expected);
  });
}

// A KV head that serves two query heads is the same as two heads with equal weights.
TEST_P(Prefill, GroupedIsMultiHeadWithEqualHeads) {
  LayerCase layer = small(LayerForm::kGrouped);
  layer.causal = GetParam();
  const LayerPlan plan = planned(layer);
  const int64_t d = layer.d_model(), dim = layer.head_dim, width = layer.kv_heads * dim;
  const auto repeated = [&](const std::string& name) {
    const Matrix narrow = drawn(plan, name, d, width);
    Matrix wide(d, d);
    for (int64_t head = 0; head < layer.heads; ++head) {
      wide.middleCols(head * dim, dim) = narrow.middleCols(head / 2 * dim, dim);
    }
    return Linear<double>{wide, {}};
  };
  const traditional::MultiHeadWeights<double> weights{layer.heads, linear(plan, "W_Q", d, d),
                                                      repeated("W_K"), repeated("W_V"),
                                                      linear(plan, "W_O", d, d)};
  expect_each(plan, evaluate(plan), [&](const Matrix& x, Matrix* expected) {
    return attend_plain(weights, x, mask_of(layer), expected);
  });
}

/// One head's attention, by loops.
Matrix attend(const Matrix& q, const Matrix& k, const Matrix& v, double scale, bool causal) {
  Matrix out = Matrix::Zero(q.rows(), v.cols());
  for (int64_t i = 0; i < q.rows(); ++i) {
    const int64_t visible = causal ? k.rows() - (q.rows() - 1 - i) : k.rows();
    double sum = 0;
    for (int64_t t = 0; t < visible; ++t) {
      const double weight = std::exp(scale * q.row(i).dot(k.row(t)));
      out.row(i) += weight * v.row(t);
      sum += weight;
    }
    if (visible > 0) out.row(i) /= sum;
  }
  return out;
}

// In each mode, the absorbed form gives what keys and values expanded for every head give.
TEST(Absorbed, IsTheUnabsorbedLayer) {
  for (const LayerMode mode : {LayerMode::kPrefill, LayerMode::kDecode, LayerMode::kCross}) {
    for (const bool causal : {false, true}) {
      LayerCase layer = small(LayerForm::kAbsorbed, mode);
      layer.causal = causal;
      const LayerPlan plan = planned(layer);
      const int64_t d = layer.d_model(), h = layer.heads, n = layer.num_queries();
      const Matrix query = drawn(plan, "W_Q", d, h * 192);
      const Matrix output = drawn(plan, "W_O", h * 128, d);
      const std::vector<double> y = evaluate(plan);
      for (int64_t b = 0; b < layer.batch; ++b) {
        const Matrix x = drawn(plan, "x", n, d, b * n * d);
        Matrix cache = drawn(plan, "c", layer.tokens, 576, b * layer.tokens * 576);
        if (mode != LayerMode::kCross) {
          cache.bottomRows(n) = x * drawn(plan, "[W_DKV | W_KR]", d, 576);
        }
        Matrix heads(n, h * 128);
        for (int64_t i = 0; i < h; ++i) {
          const Matrix up_key = drawn(plan, "W_UK", 128, 512, i * 128 * 512);
          const Matrix up_value = drawn(plan, "W_UV", 512, 128, i * 512 * 128);
          Matrix keys(layer.tokens, 192);
          keys << cache.leftCols(512) * up_key.transpose(), cache.rightCols(64);
          const Matrix values = cache.leftCols(512) * up_value;
          heads.middleCols(i * 128, 128) = attend((x * query).middleCols(i * 192, 192), keys,
                                                  values, 1 / std::sqrt(192.0), causal);
        }
        EXPECT_LT(distance(y, b, heads * output), 1e-12)
            << to_string(mode) << " " << causal << " " << b;
      }
    }
  }
}

// Decode and cross-attention of standard attention read what the cache holds, the new token last.
TEST(Standard, ReadsTheCache) {
  for (const LayerForm form : {LayerForm::kMultiHead, LayerForm::kGrouped}) {
    for (const LayerMode mode : {LayerMode::kDecode, LayerMode::kCross}) {
      for (const bool causal : {false, true}) {
        LayerCase layer = small(form, mode);
        layer.causal = causal;
        const LayerPlan plan = planned(layer);
        const int64_t d = layer.d_model(), dim = layer.head_dim, n = layer.num_queries();
        const int64_t group = form == LayerForm::kGrouped ? 2 : 1;
        const int64_t width = layer.heads / group * dim;
        const std::vector<double> y = evaluate(plan);
        for (int64_t b = 0; b < layer.batch; ++b) {
          const Matrix x = drawn(plan, "x", n, d, b * n * d);
          const auto cached = [&](const char* name, const char* weight) {
            Matrix rows = drawn(plan, name, layer.tokens, width, b * layer.tokens * width);
            if (mode == LayerMode::kDecode) rows.bottomRows(1) = x * drawn(plan, weight, d, width);
            return rows;
          };
          const Matrix q = x * drawn(plan, "W_Q", d, d);
          const Matrix k = cached("k", "W_K"), v = cached("v", "W_V");
          Matrix heads(n, d);
          for (int64_t i = 0; i < layer.heads; ++i) {
            heads.middleCols(i * dim, dim) =
                attend(q.middleCols(i * dim, dim), k.middleCols(i / group * dim, dim),
                       v.middleCols(i / group * dim, dim), 1 / std::sqrt(double(dim)), causal);
          }
          EXPECT_LT(distance(y, b, heads * drawn(plan, "W_O", d, d)), 1e-12)
              << to_string(form) << " " << to_string(mode) << " " << causal << " " << b;
        }
      }
    }
  }
}

// A query that may see no token gives 0, as everywhere in the project.
TEST(Standard, SeesNothingGivesZero) {
  LayerCase layer = small(LayerForm::kMultiHead, LayerMode::kCross);
  layer.causal = true;
  layer.tokens = 2;  // of five queries, the first three see none
  const std::vector<double> y = evaluate(planned(layer));
  const auto d = static_cast<size_t>(layer.d_model());
  for (size_t i = 0; i < 3 * d; ++i) ASSERT_EQ(y[i], 0) << i;
  EXPECT_NE(y[3 * d], 0);
}

TEST(Layers, ThreadsDoNotChangeAResultMuch) {
  for (const LayerForm form : kLayerForms) {
    const LayerPlan plan = planned(small(form));
    EXPECT_LT(relative_l2(evaluate(plan, Element::kFp64, 4), evaluate(plan, Element::kFp64, 1)),
              1e-13)
        << to_string(form);
  }
}

TEST(Layers, SinglePrecisionIsWithinItsLimit) {
  for (const LayerForm form : kLayerForms) {
    for (const LayerMode mode : {LayerMode::kPrefill, LayerMode::kDecode, LayerMode::kCross}) {
      const LayerPlan plan = planned(small(form, mode));
      const double off = relative_l2(evaluate(plan, Element::kFp32), evaluate(plan));
      EXPECT_LT(off, error_limit(Element::kFp32, plan.roundings)) << to_string(form);
      EXPECT_GT(off, 1e-8) << to_string(form);  // it is another precision, not the same numbers
    }
  }
}

// Each type that is measured can hold the drawn values exactly.
TEST(Layers, EveryTypeHoldsWhatIsDrawn) {
  LayerCase layer = small(LayerForm::kAbsorbed, LayerMode::kDecode);
  layer.heads = 128;
  layer.head_dim = 256;
  const LayerPlan plan = planned(layer);
  for (size_t i = 0; i < plan.buffers.size(); ++i) {
    for (int64_t j = 0; j < 200; ++j) {
      const double value = drawn_value(plan, static_cast<int>(i), j);
      EXPECT_EQ(static_cast<double>(static_cast<float>(Eigen::bfloat16(static_cast<float>(value)))),
                value);
      EXPECT_EQ(static_cast<double>(static_cast<float>(Eigen::half(static_cast<float>(value)))),
                value);
    }
  }
}

// The work that the plan lists is that of the cost model's formulas, part by part.
TEST(Layers, WorkIsThatOfTheCostModel) {
  for (const LayerMode mode : {LayerMode::kPrefill, LayerMode::kDecode}) {
    for (const LayerForm form : kLayerForms) {
      if (form == LayerForm::kLatentFused) continue;  // the cost model has no formulas for it
      const LayerCase layer = small(form, mode);
      const LayerPlan plan = planned(layer);
      const cost::Step step{layer.batch, layer.num_queries(), layer.tokens, /*causal=*/false, 2};
      const int64_t d = layer.d_model();
      cost::LayerCost expected;
      if (form == LayerForm::kLatentPlain) {
        ASSERT_OK(layer_cost(cost::TraditionalLatent{d, layer.head_dim}, step, &expected));
      } else if (form == LayerForm::kAbsorbed) {
        ASSERT_OK(layer_cost(cost::Mla{.d_model = d, .heads = layer.heads}, cost::Form::kAbsorbed,
                             step, &expected));
      } else {
        const int64_t kv_heads = form == LayerForm::kGrouped ? layer.kv_heads : layer.heads;
        ASSERT_OK(
            layer_cost(cost::MultiHead{d, layer.heads, kv_heads, layer.head_dim}, step, &expected));
      }
      SCOPED_TRACE(std::string(to_string(form)) + " " + to_string(mode));
      EXPECT_EQ(plan.flop(LayerPart::kProjections) + plan.flop(LayerPart::kOutput),
                expected.projections.flop);
      EXPECT_EQ(plan.flop(LayerPart::kLatent) + plan.flop(LayerPart::kReconstruction),
                expected.expansion.flop);
      EXPECT_EQ(plan.flop(LayerPart::kCore), expected.core.flop);
      EXPECT_EQ(plan.bytes(LayerPart::kCore, 2), expected.core.bytes);
      EXPECT_EQ(plan.bytes(LayerBuffer::Kind::kCache, 2),
                expected.cache_bytes_per_token * double(layer.batch * layer.tokens));
    }
  }
}

TEST(Layers, FusedProjectsToThreeLatents) {
  const LayerCase layer = small(LayerForm::kLatentFused);
  const LayerPlan plan = planned(layer);
  const double rows = double(layer.batch * layer.tokens);
  EXPECT_EQ(plan.flop(LayerPart::kProjections),
            2 * rows * double(layer.d_model()) * 3 * double(layer.head_dim));
  EXPECT_FALSE(plan.has(LayerPart::kLatent));
}

TEST(Layers, ScoresExistForAChunk) {
  LayerCase layer = small(LayerForm::kLatentPlain);
  layer.tokens = 3 * kLatentChunk;
  std::unique_ptr<LayerRunner> plain, fused;
  ASSERT_OK(make_cpu_layer(planned(layer), Element::kFp32, 1, &plain));
  layer.form = LayerForm::kLatentFused;
  ASSERT_OK(make_cpu_layer(planned(layer), Element::kFp32, 1, &fused));
  EXPECT_EQ(plain->score_bytes(), 4.0 * double(layer.tokens) * double(layer.tokens));
  EXPECT_EQ(fused->score_bytes(), 4.0 * double(kLatentChunk) * double(layer.tokens));
}

TEST(Layers, RefusesWhatItCannotPlan) {
  const auto refused = [](auto change, const std::string& message) {
    LayerCase layer = small(LayerForm::kGrouped, LayerMode::kCross);
    change(layer);
    LayerPlan plan;
    const Status status = plan_layer(layer, &plan);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
  };
  refused([](LayerCase& layer) { layer.heads = 0; }, "heads = 0; 1 to 1024 are allowed");
  refused([](LayerCase& layer) { layer.head_dim = 20; }, "head_dim = 20; multiples of 8 up to");
  refused([](LayerCase& layer) { layer.kv_heads = 3; }, "not a multiple of kv_heads = 3");
  refused([](LayerCase& layer) { layer.tokens = -1; }, "tokens = -1");
  refused([](LayerCase& layer) { layer.batch = 0; }, "batch = 0");
  refused([](LayerCase& layer) { layer.queries = 0; }, "queries = 0");
  std::unique_ptr<LayerRunner> runner;
  const Status status =
      make_cpu_layer(planned(small(LayerForm::kGrouped)), Element::kBf16, 1, &runner);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status.message();
}

}  // namespace
}  // namespace mla::bench
