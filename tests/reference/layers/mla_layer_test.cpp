// The DeepSeek layer: its two forms are compared with each other and with plain loops in long double,
// RoPE and YaRN with values computed elsewhere, decode with prefill. Its core runs on every stage.
// Bad input is refused.
#include "reference/layers/mla_layer.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <stdexcept>

#include "reference/attention.h"
#include "reference/float16.h"
#include "reference/testing/compare.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

using Matrix = MlaMatrix<double>;

// Latent widths that every part but the stages can decode. The ramp of YaRN is within them.
MlaDims small_dims(int q_lora_rank) {
  return {.d_model = 48,
          .num_heads = 3,
          .q_lora_rank = q_lora_rank,
          .kv_lora_rank = 40,
          .qk_nope_head_dim = 12,
          .qk_rope_head_dim = 8,
          .v_head_dim = 10};
}

// Few heads and a narrow model, but with the cache rows of the stages.
MlaDims stage_dims(int num_heads) {
  return {.d_model = 128, .num_heads = num_heads, .q_lora_rank = 96};
}

template <typename T>
MlaLayer<T> make_layer(const MlaDims& dims, uint64_t seed, int num_threads = 0) {
  MlaWeights<T> weights;
  MlaLayer<T> layer;
  Status status = random_weights(dims, seed, &weights);
  if (status.ok()) {
    status = MlaLayer<T>::create(dims, std::move(weights), &layer, num_threads);
  }
  if (!status.ok()) throw std::runtime_error(status.to_string());
  return layer;
}

template <typename T>
MlaCache<T> make_cache(const MlaDims& dims, int64_t capacity) {
  MlaCache<T> cache;
  const Status status = MlaCache<T>::create(dims, capacity, &cache);
  if (!status.ok()) throw std::runtime_error(status.to_string());
  return cache;
}

/// Feeds x to the layer in calls of the given numbers of tokens. Returns the outputs of all calls, row
/// by row. `how` is an MlaForm or an AttentionCore.
template <typename T, typename How>
MlaMatrix<T> run(const MlaLayer<T>& layer, const How& how, const MlaMatrix<T>& x,
                 const std::vector<int64_t>& calls, MlaCache<T>* cache) {
  MlaMatrix<T> all(x.rows(), x.cols());
  int64_t first = 0;
  for (const int64_t tokens : calls) {
    MlaMatrix<T> y;
    const Status status = layer.forward(how, x.middleRows(first, tokens), cache, &y);
    if (!status.ok()) throw std::runtime_error(status.to_string());
    all.middleRows(first, tokens) = y;
    first += tokens;
  }
  EXPECT_EQ(first, x.rows());
  return all;
}

template <typename T, typename How>
MlaMatrix<T> run(const MlaLayer<T>& layer, const How& how, const MlaMatrix<T>& x,
                 const std::vector<int64_t>& calls) {
  MlaCache<T> cache = make_cache<T>(layer.dims(), x.rows());
  return run(layer, how, x, calls, &cache);
}

/// The largest difference, as a share of the largest expected value. NaN if `actual` or `expected` has
/// a NaN.
template <typename A, typename B>
double max_error(const A& actual, const B& expected) {
  const auto difference = actual.template cast<double>() - expected.template cast<double>();
  return difference.cwiseAbs().template maxCoeff<Eigen::PropagateNaN>() /
         expected.template cast<double>().cwiseAbs().maxCoeff();
}

double l2_error(const Matrix& actual, const Matrix& expected) {
  return (actual - expected).norm() / expected.norm();
}

void record(const std::string& name, double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2e", value);
  testing::Test::RecordProperty(name, text);
  std::printf("  %-62s %s\n", name.c_str(), text);
}

// ---------------------------------------------------------------------------- constants

TEST(MlaDims, PresetsAreThePublishedOnes) {
  EXPECT_EQ(MlaDims::v3().d_model, 7168);
  EXPECT_EQ(MlaDims::v2().d_model, 5120);
  EXPECT_EQ(MlaDims::v2_lite().d_model, 2048);
  EXPECT_EQ(MlaDims::v2_lite().num_heads, 16);
  EXPECT_EQ(MlaDims::v2_lite().q_lora_rank, 0);
  for (const MlaDims& dims : {MlaDims::v3(), MlaDims::v2(), MlaDims::v2_lite()}) {
    EXPECT_OK(validate(dims));
    EXPECT_EQ(dims.cache_width(), kHeadDimQK);
    EXPECT_EQ(dims.kv_lora_rank, kHeadDimV);
    EXPECT_EQ(dims.qk_head_dim(), 192);
    EXPECT_EQ(dims.v_head_dim, 128);
  }
}

TEST(MlaDims, SoftmaxScale) {
  // 192^-1/2 (0.1 mscale ln 40 + 1)^2, to 30 digits by another program, rounded to 20.
  EXPECT_NEAR(MlaDims::v3().softmax_scale(), 0.1352337788608800881, 1e-16);
  EXPECT_NEAR(MlaDims::v2().softmax_scale(), 0.1352337788608800881, 1e-16);
  EXPECT_NEAR(MlaDims::v2_lite().softmax_scale(), 0.1147213867929261020, 1e-16);
  MlaDims plain = MlaDims::v3();
  plain.yarn_factor = 1;
  EXPECT_DOUBLE_EQ(plain.softmax_scale(), 1 / std::sqrt(192.0));
}

// ---------------------------------------------------------------------------- RoPE and YaRN

/// YaRN's frequencies in long double, straight from the definition: how often a pair turns within
/// the original context decides how much it is slowed.
std::vector<long double> yarn(int d, long double factor, long double fast, long double slow,
                              long double positions, long double theta) {
  const long double two_pi = 2 * std::acos(-1.0L);
  const auto pair = [&](long double turns) {
    return d * std::log(positions / (turns * two_pi)) / (2 * std::log(theta));
  };
  long double low = std::floor(pair(fast));
  long double high = std::ceil(pair(slow));
  if (low < 0) low = 0;
  if (high > d - 1) high = d - 1;
  if (low == high) high += 0.001L;
  std::vector<long double> result;
  for (int i = 0; i < d / 2; ++i) {
    const long double extrapolated = std::pow(theta, -2.0L * i / d);
    long double keep = 1 - (i - low) / (high - low);
    if (keep < 0) keep = 0;
    if (keep > 1) keep = 1;
    result.push_back(extrapolated / factor * (1 - keep) + extrapolated * keep);
  }
  return result;
}

TEST(Rope, FrequenciesAreThoseOfTheDefinition) {
  for (const int d : {2, 4, 8, 32, 64, 128}) {
    for (const double factor : {1.0, 4.0, 40.0}) {
      for (const int positions : {4, 100, 4096, 1 << 20}) {
        MlaDims dims = MlaDims::v3();
        dims.qk_rope_head_dim = d;
        dims.yarn_factor = factor;
        dims.yarn_original_positions = positions;
        const std::vector<double> actual = rope_frequencies(dims);
        const std::vector<long double> expected = yarn(d, factor, 32, 1, positions, 10000);
        ASSERT_EQ(actual.size(), expected.size());
        for (size_t i = 0; i < actual.size(); ++i) {
          ASSERT_NEAR(actual[i], static_cast<double>(expected[i]), 1e-15 * actual[i] + 1e-18)
              << "d " << d << ", factor " << factor << ", positions " << positions << ", i " << i;
        }
      }
    }
  }
}

TEST(Rope, KnownValuesOfDeepSeek) {
  // theta^(-2i/64) after YaRN, and cos and sin of 5000 times it, to 30 digits by another program.
  // Pairs up to 10 turn 32 times in 4096 positions and stay; from 23 on they turn less than once
  // and are 40 times slower; 11 ... 22 are on the ramp between.
  const struct {
    size_t pair;
    double frequency, cos_5000, sin_5000;
  } known[] = {{0, 1.0, 0.15466840618074712151, -0.98796643876677684725},
               {10, 0.056234132519034908039, -0.0018799000046842530158, -0.99999823298642502559},
               {11, 0.039006926567143857993, 0.96743884101234365653, 0.25310489703024960133},
               {16, 0.0055, -0.71488696877966510272, 0.69924003165509777092},
               {22, 0.00017782794100389228012, 0.63008030449889917251, 0.77652998002818571099},
               {23, 0.000033338035804083100642, 0.98613933068178280048, 0.16591931919606417973},
               {31, 3.3338035804083100642e-6, 0.99986107513789610029, 0.016668245981220964294}};
  const std::vector<double> frequencies = rope_frequencies(MlaDims::v3());
  std::vector<double> real(64, 0), imaginary(64, 0);
  for (size_t i = 0; i < 32; ++i) real[2 * i] = imaginary[2 * i + 1] = 1;
  std::vector<float> rounded(real.begin(), real.end());
  apply_rope(frequencies, 5000, real.data());
  apply_rope(frequencies, 5000, imaginary.data());
  apply_rope(frequencies, 5000, rounded.data());
  for (const auto& k : known) {
    EXPECT_NEAR(frequencies[k.pair], k.frequency, 1e-15 * k.frequency);
    EXPECT_NEAR(real[2 * k.pair], k.cos_5000, 2e-12);  // 5000 times the rounding of a frequency
    EXPECT_NEAR(real[2 * k.pair + 1], k.sin_5000, 2e-12);
    EXPECT_NEAR(imaginary[2 * k.pair], -k.sin_5000, 2e-12);
    EXPECT_NEAR(imaginary[2 * k.pair + 1], k.cos_5000, 2e-12);
    EXPECT_NEAR(rounded[2 * k.pair], k.cos_5000, 6e-8);  // angles are double in float layers, too
    EXPECT_NEAR(rounded[2 * k.pair + 1], k.sin_5000, 6e-8);
  }
}

TEST(Rope, ProductsDependOnDistanceAlone) {
  const std::vector<double> frequencies = rope_frequencies(MlaDims::v3());
  const Matrix ab = random_hidden_states<double>(2, 64, 3);
  const auto product = [&](int64_t position_a, int64_t position_b) {
    Matrix turned = ab;
    apply_rope(frequencies, position_a, turned.row(0).data());
    apply_rope(frequencies, position_b, turned.row(1).data());
    return turned.row(0).dot(turned.row(1));
  };
  EXPECT_NEAR(product(0, 0), ab.row(0).dot(ab.row(1)), 1e-12);
  EXPECT_NEAR(product(700, 300), product(160400, 160000), 1e-8);
  EXPECT_GT(std::abs(product(700, 300) - product(300, 700)), 1e-3);
}

// ---------------------------------------------------------------------------- plain loops

using Row = std::vector<long double>;

template <typename W>
Row times(const W& w, int64_t first_row, int64_t rows, const Row& x) {
  Row y(static_cast<size_t>(rows), 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < x.size(); ++c) {
      y[size_t(r)] += static_cast<long double>(w(first_row + r, Eigen::Index(c))) * x[c];
    }
  }
  return y;
}

Row rms_norm(const Row& x, const MlaVector<double>& gain) {
  long double sum = 0;
  for (const long double v : x) sum += v * v;
  Row y = x;
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] *= gain(Eigen::Index(i)) / std::sqrt(sum / x.size() + 1e-6L);
  }
  return y;
}

void rotate(const std::vector<long double>& frequencies, size_t position, long double* pairs) {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const long double angle = position * frequencies[i];
    const long double a = pairs[2 * i], b = pairs[2 * i + 1];
    pairs[2 * i] = a * std::cos(angle) - b * std::sin(angle);
    pairs[2 * i + 1] = b * std::cos(angle) + a * std::sin(angle);
  }
}

/// The whole layer from its definition: ordinary causal multi-head attention, token by token.
Matrix plain_layer(const MlaDims& d, const MlaWeights<double>& w, const Matrix& x) {
  const auto frequencies = yarn(d.qk_rope_head_dim, 40, 32, 1, 4096, 10000);
  const long double m = 0.1L * d.yarn_mscale * std::log(40.0L) + 1;
  const size_t nope = size_t(d.qk_nope_head_dim), rope = size_t(d.qk_rope_head_dim);
  const long double scale = m * m / std::sqrt(static_cast<long double>(nope + rope));
  std::vector<std::vector<Row>> keys(static_cast<size_t>(d.num_heads)), values = keys;
  Matrix y(x.rows(), x.cols());
  for (int64_t t = 0; t < x.rows(); ++t) {
    Row hidden(x.row(t).begin(), x.row(t).end());
    Row query_input = hidden;
    if (d.q_lora_rank > 0)
      query_input = rms_norm(times(w.w_dq, 0, d.q_lora_rank, hidden), w.q_norm);
    const Row c = rms_norm(times(w.w_dkv, 0, d.kv_lora_rank, hidden), w.kv_norm);
    Row k_r = times(w.w_kr, 0, d.qk_rope_head_dim, hidden);
    rotate(frequencies, size_t(t), k_r.data());
    Row heads;
    for (int i = 0; i < d.num_heads; ++i) {
      Row q = times(w.w_uq, int64_t{i} * d.qk_head_dim(), d.qk_head_dim(), query_input);
      rotate(frequencies, size_t(t), q.data() + nope);
      Row k = times(w.w_uk, int64_t{i} * d.qk_nope_head_dim, d.qk_nope_head_dim, c);
      k.insert(k.end(), k_r.begin(), k_r.end());
      keys[size_t(i)].push_back(k);
      values[size_t(i)].push_back(times(w.w_uv, int64_t{i} * d.v_head_dim, d.v_head_dim, c));
      Row o(size_t(d.v_head_dim), 0);
      long double sum = 0;
      for (size_t s = 0; s < keys[size_t(i)].size(); ++s) {
        long double logit = 0;
        for (size_t j = 0; j < q.size(); ++j) logit += scale * q[j] * keys[size_t(i)][s][j];
        const long double p = std::exp(logit);
        sum += p;
        for (size_t j = 0; j < o.size(); ++j) o[j] += p * values[size_t(i)][s][j];
      }
      for (const long double v : o) heads.push_back(v / sum);
    }
    const Row result = times(w.w_o, 0, d.d_model, heads);
    for (size_t j = 0; j < result.size(); ++j) y(t, Eigen::Index(j)) = double(result[j]);
  }
  return y;
}

TEST(MlaLayer, BothFormsEqualPlainLoops) {
  for (const int q_lora_rank : {0, 20}) {
    const MlaDims dims = small_dims(q_lora_rank);
    MlaWeights<double> weights;
    ASSERT_OK(random_weights(dims, 7, &weights));
    // 300 tokens: more than one task of queries, and the frequencies of 8 columns differ by then.
    const Matrix x = random_hidden_states<double>(300, dims.d_model, 8);
    const Matrix expected = plain_layer(dims, weights, x);
    MlaLayer<double> layer;
    ASSERT_OK(MlaLayer<double>::create(dims, std::move(weights), &layer));
    for (const MlaForm form : {MlaForm::kUnabsorbed, MlaForm::kAbsorbed}) {
      EXPECT_LT(max_error(run(layer, form, x, {300}), expected), 1e-12);
      EXPECT_LT(max_error(run(layer, form, x, {290, 1, 3, 1, 5}), expected), 1e-12);
    }
  }
}

// ---------------------------------------------------------------------------- the two forms

template <typename T>
void forms_agree(const std::string& name, const MlaDims& dims, double tolerance) {
  const MlaLayer<T> layer = make_layer<T>(dims, 11);
  const MlaMatrix<T> x = random_hidden_states<T>(11, dims.d_model, 12);
  const auto unabsorbed = run(layer, MlaForm::kUnabsorbed, x, {8, 1, 1, 1});
  const auto absorbed = run(layer, MlaForm::kAbsorbed, x, {8, 1, 1, 1});
  const auto prefill = run(layer, MlaForm::kUnabsorbed, x, {11});
  const auto absorbed_prefill = run(layer, MlaForm::kAbsorbed, x, {11});
  EXPECT_GT(unabsorbed.norm(), 0.1 * std::sqrt(double(x.size())));  // outputs do not vanish
  const double errors[] = {max_error(absorbed, unabsorbed), max_error(unabsorbed, prefill),
                           max_error(absorbed, absorbed_prefill)};
  record(name + ", absorbed - unabsorbed", errors[0]);
  record(name + ", unabsorbed: decode after prefill - prefill", errors[1]);
  record(name + ", absorbed: decode after prefill - prefill", errors[2]);
  for (const double error : errors) EXPECT_LT(error, tolerance);
}

TEST(MlaLayer, FormsAgreeInDouble) {
  forms_agree<double>("V2-Lite, double", MlaDims::v2_lite(), 1e-10);
  forms_agree<double>("4 heads with q_lora, double", stage_dims(4), 1e-10);
}

TEST(MlaLayer, FormsAgreeInFloat) {
  forms_agree<float>("V2-Lite, float", MlaDims::v2_lite(), 1e-5);
  forms_agree<float>("4 heads with q_lora, float", stage_dims(4), 1e-5);
}

TEST(MlaLayer, FloatAgreesWithDouble) {
  const MlaDims dims = stage_dims(4);
  const auto x = random_hidden_states<double>(40, dims.d_model, 1);
  const auto expected = run(make_layer<double>(dims, 2), MlaForm::kUnabsorbed, x, {40});
  const auto actual =
      run(make_layer<float>(dims, 2), MlaForm::kAbsorbed, MlaMatrix<float>(x.cast<float>()), {40});
  EXPECT_LT(max_error(actual, expected), 1e-5);
}

TEST(MlaLayer, ResultsDoNotDependOnThreads) {
  const MlaDims dims = small_dims(20);
  const auto x = random_hidden_states<float>(30, dims.d_model, 1);
  for (const MlaForm form : {MlaForm::kUnabsorbed, MlaForm::kAbsorbed}) {
    const auto one = run(make_layer<float>(dims, 2, 1), form, x, {29, 1});
    const auto three = run(make_layer<float>(dims, 2, 3), form, x, {29, 1});
    EXPECT_EQ(one, three);
  }
}

TEST(MlaLayer, FutureTokensDoNotMatter) {
  const MlaDims dims = small_dims(20);
  const MlaLayer<double> layer = make_layer<double>(dims, 2);
  const Matrix x = random_hidden_states<double>(10, dims.d_model, 1);
  Matrix other_future = x;
  other_future.bottomRows(3) = 100 * random_hidden_states<double>(3, dims.d_model, 9);
  for (const MlaForm form : {MlaForm::kUnabsorbed, MlaForm::kAbsorbed}) {
    const Matrix y = run(layer, form, x, {10});
    const Matrix other = run(layer, form, other_future, {10});
    EXPECT_EQ(y.topRows(7), other.topRows(7));
    EXPECT_GT(max_error(other.bottomRows(3), y.bottomRows(3)), 0.1);
  }
}

TEST(MlaLayer, TruncateTakesTokensBack) {
  const MlaDims dims = small_dims(0);
  const MlaLayer<double> layer = make_layer<double>(dims, 2);
  const Matrix x = random_hidden_states<double>(6, dims.d_model, 1);
  MlaCache<double> cache = make_cache<double>(dims, 6);
  const Matrix expected = run(layer, MlaForm::kAbsorbed, x, {5, 1}, &cache);
  ASSERT_OK(cache.truncate(5));
  Matrix again;
  ASSERT_OK(layer.forward(MlaForm::kAbsorbed, x.bottomRows(1), &cache, &again));
  EXPECT_EQ(again, expected.bottomRows(1));
}

// ---------------------------------------------------------------------------- through the stages

/// Decodes on a machine, and brings out and lse back.
Status decode_on(Machine& machine, const Stage& stage, PagedDecode* host) {
  DeviceBuffer buffers[7];
  const auto copy = [&](const auto& values, int i) {
    return buffers[i].assign(machine, values.data(), values.size() * sizeof values[0]);
  };
  MLA_RETURN_IF_ERROR(copy(host->q, 0));
  MLA_RETURN_IF_ERROR(host->quantised.empty() ? copy(host->kv_cache, 1) : copy(host->quantised, 1));
  MLA_RETURN_IF_ERROR(copy(host->block_table, 2));
  MLA_RETURN_IF_ERROR(copy(host->seqlens_k, 3));
  MLA_RETURN_IF_ERROR(copy(host->out, 4));
  MLA_RETURN_IF_ERROR(copy(host->lse, 5));
  MLA_RETURN_IF_ERROR(allocate_workspace(stage, host->problem, &buffers[6]));
  const Tensors tensors{.q = buffers[0].data(),
                        .kv_cache = buffers[1].data(),
                        .block_table = buffers[2].as<int32_t>(),
                        .seqlens_k = buffers[3].as<int32_t>(),
                        .out = buffers[4].data(),
                        .lse = buffers[5].as<float>()};
  MLA_RETURN_IF_ERROR(decode(stage, host->problem, tensors, buffers[6]));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(host->out.data(), buffers[4].data(), buffers[4].bytes()));
  return machine.copy_to_host(host->lse.data(), buffers[5].data(), buffers[5].bytes());
}

/// What 16 bits may cost the layer's output, as |y - y_double| / |y_double|. q~, the cache and the
/// latent output are rounded to nearest, each by up to half a unit in the last place: 2^-9 in bf16,
/// 2^-12 in fp16. The softmax passes an error of the logits on to the weights; logits here are
/// within +-10 and their errors average out over 576 columns. Five half-units cover it.
///
/// Codes are rounded to a half unit of their own: 2^-4 of an e4m3, on average half of it; of an int8 1/254 of
/// its tile's largest value, which here is some three deviations. These errors average out over tokens, too.
double layer_tolerance(DType dtype, CacheFormat format) {
  if (format == CacheFormat::kInt8Tile128) return 3.0 / 127;
  if (is_quantised(format)) return 0x1p-4;
  return 5 * (dtype == DType::kBFloat16 ? 0x1p-9 : 0x1p-12);
}

void core_on(Machine& machine, const Stage& stage) {
  SCOPED_TRACE(stage.slug +
               (machine.kind() == MachineKind::kGpu ? " on the GPU" : " on the model"));
  const MlaDims dims = stage_dims(5);
  const MlaLayer<double> layer = make_layer<double>(dims, 21);
  const Matrix x = random_hidden_states<double>(140, dims.d_model, 22);
  // One token at a time over a page's end, then several at once.
  const std::vector<int64_t> calls = {126, 1, 1, 1, 3, 8};
  const Matrix expected = run(layer, MlaForm::kUnabsorbed, x, calls);

  const auto decodes = [&](DType dtype, CacheFormat format) {
    double latent_error = 0;
    const AttentionCore<double> core = [&](const CoreCall<double>& call, Matrix* latent) -> Status {
      PagedDecode host;
      MLA_RETURN_IF_ERROR(make_paged_decode(call, dtype, &host, format));
      MLA_RETURN_IF_ERROR(decode_on(machine, stage, &host));
      // The same core in double, on the same rounded q~ and cache.
      ReferenceResult truth;
      MLA_RETURN_IF_ERROR(reference_attention(host.problem, host.tensors(), &truth));
      const DecodeComparison comparison = compare_decode(host.problem, host.out, host.lse, truth);
      EXPECT_OK(comparison);
      latent_error = std::max(latent_error, comparison.out.relative_l2);
      *latent = host.latent<double>();
      return {};
    };
    const Matrix y = run(layer, core, x, calls);
    const double error = l2_error(y, expected);
    const std::string name = stage.slug + " " + to_string(dtype) + " " + to_string(format);
    record(name + ", latent - double on the same cache", latent_error);
    record(name + ", layer - double", error);
    EXPECT_LT(error, layer_tolerance(dtype, format));
    if (is_quantised(format)) {
      EXPECT_GT(error, layer_tolerance(dtype, CacheFormat::k16Bit) / 5)
          << "as exact as 16 bits, so the codes were not used";
    }
  };
  for (const CacheFormat format : stage.cache_formats) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      if (dtype == DType::kBFloat16 || !has_tile_scales(format)) decodes(dtype, format);
    }
  }
}

TEST(MlaLayer, CoreOnEveryStageOfTheModel) {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    core_on(model_machine(), stage);
  }
}

TEST(MlaLayer, CoreOnEveryStageOfTheGpu) {
  std::string why_not;
  Machine* const gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  for (const Stage& stage : stages(MachineKind::kGpu)) {
    const Status fit = check_device(stage, gpu->limits());
    if (fit.ok()) {
      core_on(*gpu, stage);
    } else {
      std::printf("  %s: %s\n", stage.slug.c_str(), fit.to_string().c_str());
    }
  }
}

// The layer's core and the decode reference are the same function. On inputs that are rounded already,
// they agree to double precision.
TEST(MlaLayer, EigenCoreIsTheReference) {
  const MlaDims dims = stage_dims(40);  // more heads than one task takes
  const int64_t width = dims.cache_width();
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const auto rounded = [dtype](Matrix m) -> Matrix {
      return visit_dtype(dtype, [&](auto type) -> Matrix {
        return m.unaryExpr([](double v) -> double {
          return to_float(from_float<decltype(type)>(static_cast<float>(v)));
        });
      });
    };
    const Matrix q = rounded(random_hidden_states<double>(3, int(dims.num_heads * width), 31));
    const Matrix kv = rounded(random_hidden_states<double>(70, int(width), 32));
    const CoreCall<double> call{
        q, {kv.data(), 70, width}, dims.num_heads, dims.kv_lora_rank, float(dims.softmax_scale())};
    Matrix latent(3, dims.num_heads * dims.kv_lora_rank);
    ASSERT_OK(eigen_core<double>()(call, &latent));
    PagedDecode host;
    ASSERT_OK(make_paged_decode(call, dtype, &host));
    ReferenceResult truth;
    ASSERT_OK(reference_attention(host.problem, host.tensors(), &truth));
    const Eigen::Map<const Matrix> expected(truth.out.data(), latent.rows(), latent.cols());
    EXPECT_LT(max_error(latent, expected), 1e-13);
  }
}

// ---------------------------------------------------------------------------- bad input

void expect_error(const Status& status, StatusCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status.to_string();
  for (const std::string& part : parts) {
    EXPECT_NE(status.message().find(part), std::string::npos)
        << "\"" << part << "\" is not in: " << status.message();
  }
}

TEST(MlaLayerErrors, Dims) {
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const struct {
    std::function<void(MlaDims&)> spoil;
    std::vector<std::string> message;
  } cases[] = {
      {[](MlaDims& d) { d.d_model = 0; }, {"d_model = 0", "must be 1 to 1048576"}},
      {[](MlaDims& d) { d.d_model = 1 << 21; }, {"d_model = 2097152"}},
      {[](MlaDims& d) { d.num_heads = -2; }, {"num_heads = -2"}},
      {[](MlaDims& d) { d.q_lora_rank = -1; }, {"q_lora_rank = -1", "must be 0 to"}},
      {[](MlaDims& d) { d.kv_lora_rank = 0; }, {"kv_lora_rank = 0"}},
      {[](MlaDims& d) { d.qk_nope_head_dim = 0; }, {"qk_nope_head_dim = 0"}},
      {[](MlaDims& d) { d.qk_rope_head_dim = 7; }, {"qk_rope_head_dim = 7", "odd", "pairs"}},
      {[](MlaDims& d) { d.qk_rope_head_dim = 0; }, {"qk_rope_head_dim = 0", "must be 2 to"}},
      {[](MlaDims& d) { d.v_head_dim = 0; }, {"v_head_dim = 0"}},
      {[](MlaDims& d) { d.norm_eps = -1; }, {"norm_eps = -1", ">= 0"}},
      {[](MlaDims& d) { d.rope_theta = 1; }, {"rope_theta = 1", "> 1"}},
      {[](MlaDims& d) { d.yarn_factor = 0.5; }, {"yarn_factor = 0.5", ">= 1"}},
      {[nan](MlaDims& d) { d.yarn_factor = nan; }, {"yarn_factor = nan"}},
      {[](MlaDims& d) { d.yarn_beta_slow = 0; }, {"yarn_beta_slow = 0", "> 0"}},
      {[](MlaDims& d) { d.yarn_beta_fast = 0.5; }, {"yarn_beta_fast = 0.5", "yarn_beta_slow"}},
      {[](MlaDims& d) { d.yarn_original_positions = 0; }, {"yarn_original_positions = 0"}},
      {[](MlaDims& d) { d.yarn_mscale = HUGE_VAL; }, {"yarn_mscale = inf"}}};
  for (const auto& c : cases) {
    MlaDims dims = small_dims(20);
    c.spoil(dims);
    expect_error(validate(dims), kInvalid, c.message);
    MlaWeights<float> weights;
    expect_error(random_weights(dims, 1, &weights), kInvalid, c.message);
    EXPECT_EQ(weights.w_o.size(), 0);
    MlaCache<float> cache;
    expect_error(MlaCache<float>::create(dims, 4, &cache), kInvalid, c.message);
    EXPECT_EQ(cache.capacity(), 0);
    MlaLayer<float> layer;
    expect_error(MlaLayer<float>::create(dims, std::move(weights), &layer), kInvalid, c.message);
    EXPECT_EQ(layer.dims().d_model, 0);
  }
}

TEST(MlaLayerErrors, Weights) {
  const MlaDims dims = small_dims(20);
  MlaWeights<double> weights;
  ASSERT_OK(random_weights(dims, 1, &weights));
  MlaLayer<double> layer;
  const auto expect_refused = [&](auto member, int64_t rows, int64_t cols,
                                  const std::vector<std::string>& message) {
    MlaWeights<double> spoilt = weights;
    (spoilt.*member).resize(rows, cols);
    const Status status = MlaLayer<double>::create(dims, std::move(spoilt), &layer);
    expect_error(status, StatusCode::kInvalidArgument, message);
    // NOLINTNEXTLINE(bugprone-use-after-move): a refusal takes nothing
    EXPECT_EQ((spoilt.*member).size(), rows * cols) << "weights were taken";
    EXPECT_EQ(layer.dims().d_model, 0);
  };
  using W = MlaWeights<double>;
  expect_refused(&W::w_dq, 20, 47, {"w_dq is [20, 47]", "ask for [20, 48]"});
  expect_refused(&W::q_norm, 1, 21, {"q_norm is [1, 21]", "[1, 20]"});
  expect_refused(&W::w_uq, 60, 48, {"w_uq is [60, 48]", "[60, 20]"});
  expect_refused(&W::w_dkv, 48, 48, {"w_dkv is [48, 48]", "[40, 48]"});
  expect_refused(&W::kv_norm, 1, 0, {"kv_norm is [1, 0]", "[1, 40]"});
  expect_refused(&W::w_kr, 4, 48, {"w_kr is [4, 48]", "[8, 48]"});
  expect_refused(&W::w_uk, 12, 40, {"w_uk is [12, 40]", "[36, 40]"});
  expect_refused(&W::w_uv, 40, 30, {"w_uv is [40, 30]", "[30, 40]"});
  expect_refused(&W::w_o, 30, 48, {"w_o is [30, 48]", "[48, 30]"});

  expect_error(random_weights<double>(dims, 1, nullptr), StatusCode::kInvalidArgument,
               {"weights is null"});
  expect_error(MlaLayer<double>::create(dims, std::move(weights), nullptr),
               StatusCode::kInvalidArgument, {"layer is null"});
  EXPECT_GT(weights.w_o.size(), 0);  // NOLINT(bugprone-use-after-move): a refusal takes nothing
  EXPECT_OK(MlaLayer<double>::create(dims, std::move(weights), &layer));
}

TEST(MlaLayerErrors, Cache) {
  const MlaDims dims = small_dims(0);
  MlaCache<double> cache;
  expect_error(MlaCache<double>::create(dims, 0, &cache), StatusCode::kInvalidArgument,
               {"capacity = 0", "must be 1 to 2^30"});
  expect_error(MlaCache<double>::create(dims, (int64_t{1} << 30) + 1, &cache),
               StatusCode::kInvalidArgument, {"capacity = 1073741825"});
  expect_error(MlaCache<double>::create(dims, 4, nullptr), StatusCode::kInvalidArgument,
               {"cache is null"});
  ASSERT_OK(MlaCache<double>::create(dims, 4, &cache));
  const Matrix rows = random_hidden_states<double>(3, 48, 1);
  ASSERT_OK(cache.append(rows));
  expect_error(cache.append(rows), StatusCode::kOutOfRange, {"3 tokens to 3", "capacity of 4"});
  expect_error(cache.append(rows.leftCols(47)), StatusCode::kInvalidArgument, {"47 columns", "48"});
  expect_error(cache.truncate(4), StatusCode::kOutOfRange, {"length = 4", "must be 0 to 3"});
  expect_error(cache.truncate(-1), StatusCode::kOutOfRange, {"length = -1"});
  EXPECT_EQ(cache.length(), 3);
  EXPECT_EQ(Matrix(cache.rows()), rows);
}

TEST(MlaLayerErrors, ForwardChangesNothing) {
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  const MlaDims dims = small_dims(20);
  const MlaLayer<double> layer = make_layer<double>(dims, 1);
  const Matrix x = random_hidden_states<double>(5, dims.d_model, 2);
  MlaCache<double> cache = make_cache<double>(dims, 6);
  const Matrix before = run(layer, MlaForm::kAbsorbed, x, {5}, &cache);
  const Matrix rows = cache.rows();
  Matrix y = before;
  const auto unchanged = [&] { return cache.length() == 5 && cache.rows() == rows && y == before; };

  MlaDims other = dims;
  other.kv_lora_rank = 32;
  MlaCache<double> narrow = make_cache<double>(other, 6);
  for (const MlaForm form : {MlaForm::kUnabsorbed, MlaForm::kAbsorbed}) {
    expect_error(layer.forward(form, x, nullptr, &y), kInvalid, {"cache is null"});
    expect_error(layer.forward(form, x, &cache, nullptr), kInvalid, {"y is null"});
    expect_error(layer.forward(form, x.leftCols(40), &cache, &y), kInvalid,
                 {"x is [5, 40]", "d_model = 48"});
    expect_error(layer.forward(form, x.topRows(0), &cache, &y), kInvalid, {"x is [0, 48]", ">= 1"});
    expect_error(layer.forward(form, x.topRows(2), &cache, &y), StatusCode::kOutOfRange,
                 {"2 tokens to 5", "capacity of 6"});
    expect_error(layer.forward(form, x, &narrow, &y), kInvalid, {"40 columns", "48"});
    EXPECT_EQ(narrow.length(), 0);
    expect_error(MlaLayer<double>().forward(form, x, &cache, &y), kInvalid, {"layer is empty"});
    EXPECT_TRUE(unchanged());
  }

  const Matrix one = x.topRows(1);
  expect_error(layer.forward(AttentionCore<double>(), one, &cache, &y), kInvalid,
               {"core is empty"});
  const AttentionCore<double> refuses = [](const auto&, Matrix*) {
    return Status(StatusCode::kUnavailable, "no GPU today");
  };
  expect_error(layer.forward(refuses, one, &cache, &y), StatusCode::kUnavailable, {"no GPU today"});
  const AttentionCore<double> misshapes = [](const auto&, Matrix* latent) -> Status {
    latent->resize(2, 2);
    return {};
  };
  expect_error(layer.forward(misshapes, one, &cache, &y), kInvalid, {"[2, 2]", "[1, 120]"});
  const AttentionCore<double> starves = [](const auto&, Matrix*) -> Status {
    throw std::bad_alloc();
  };
  expect_error(layer.forward(starves, one, &cache, &y), StatusCode::kOutOfMemory, {"memory"});
  const AttentionCore<double> throws = [](const auto&, Matrix*) -> Status {
    throw std::runtime_error("the caller's own");
  };
  EXPECT_THROW(static_cast<void>(layer.forward(throws, one, &cache, &y)), std::runtime_error);
  const AttentionCore<double> pages = [](const CoreCall<double>& call, Matrix*) -> Status {
    PagedDecode decode;
    return make_paged_decode(call, DType::kBFloat16, &decode);
  };
  expect_error(layer.forward(pages, one, &cache, &y), kInvalid, {"40 + 8", "512 + 64"});
  EXPECT_TRUE(unchanged());

  EXPECT_OK(layer.forward(MlaForm::kAbsorbed, one, &cache, &y));  // and the next call works
  EXPECT_EQ(cache.length(), 6);
}

TEST(MlaLayerErrors, CoreCalls) {
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  const Matrix q = random_hidden_states<double>(2, 2 * kHeadDimQK, 1);
  const Matrix kv = random_hidden_states<double>(5, kHeadDimQK, 2);
  const auto expect_refused = [](const CoreCall<double>& call, StatusCode code,
                                 const std::vector<std::string>& message) {
    Matrix latent = Matrix::Ones(1, 1);
    expect_error(eigen_core<double>()(call, &latent), code, message);
    EXPECT_EQ(latent, Matrix::Ones(1, 1));
    PagedDecode decode;
    expect_error(make_paged_decode(call, DType::kFloat16, &decode), code, message);
    EXPECT_TRUE(decode.q.empty());
  };
  const MlaCache<double>::Rows rows(kv.data(), 5, kHeadDimQK);
  const MlaCache<double>::Rows one_row(kv.data(), 1, kHeadDimQK);
  expect_refused({q, rows, 3, 512, 1.0}, kInvalid, {"q is [2, 1152]", "1728"});
  expect_refused({q, one_row, 2, 512, 1.0}, kInvalid, {"q is [2, 1152]", "[1 ... 1, 1152]"});
  expect_refused({q, rows, 0, 512, 1.0}, kInvalid, {"num_heads = 0"});
  expect_refused({q, rows, 2, 577, 1.0}, kInvalid, {"kv_lora_rank = 577", "[5, 576]"});

  const CoreCall<double> good{q, rows, 2, 512, 1.0};
  expect_error(eigen_core<double>()(good, nullptr), kInvalid, {"latent is null"});
  expect_error(make_paged_decode(good, DType::kFloat16, nullptr), kInvalid, {"decode is null"});
  PagedDecode decode;
  expect_error(make_paged_decode(CoreCall<double>{q, rows, 2, 512, 0.0}, DType::kFloat16, &decode),
               kInvalid, {"softmax_scale"});
  expect_error(make_paged_decode(good, static_cast<DType>(7), &decode), kInvalid, {"dtype"});
  expect_error(make_paged_decode(good, DType::kFloat16, &decode, CacheFormat::kFp8Tile128),
               kInvalid, {"fp8_tile128", "bf16"});
  EXPECT_TRUE(decode.q.empty());
  EXPECT_OK(make_paged_decode(good, DType::kFloat16, &decode));
}

// ---------------------------------------------------------------------------- figures

/// Peak memory since the last reset, MiB, from the kernel's high-water mark.
double peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

// Time and memory of one layer. It is not a test, and runs on request:
//   mla_layer_test --gtest_also_run_disabled_tests --gtest_filter='*Figures*'
TEST(MlaLayer, DISABLED_Figures) {
  std::printf("layer, float       form         tokens    seconds   peak MiB  beside weights\n");
  for (const bool is_v3 : {false, true}) {
    const MlaDims dims = is_v3 ? MlaDims::v3() : MlaDims::v2_lite();
    const MlaLayer<float> layer = make_layer<float>(dims, 1);
    std::map<int64_t, MlaMatrix<float>> unabsorbed;
    for (const MlaForm form : {MlaForm::kUnabsorbed, MlaForm::kAbsorbed}) {
      MlaCache<float> cache = make_cache<float>(dims, 513);
      for (const int64_t tokens : {int64_t{512}, int64_t{1}}) {  // a prefill, then a decode step
        const auto x = random_hidden_states<float>(tokens, dims.d_model, 2);
        MlaMatrix<float> y;
        malloc_trim(0);
        std::ofstream("/proc/self/clear_refs") << 5;  // resets the high-water mark
        const double before = peak_mib();
        const auto start = std::chrono::steady_clock::now();
        ASSERT_OK(layer.forward(form, x, &cache, &y));
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        std::printf("%-18s %-12s %6ld %10.4f %10.0f %10.0f\n", is_v3 ? "V3" : "V2-Lite",
                    form == MlaForm::kUnabsorbed ? "unabsorbed" : "absorbed",
                    static_cast<long>(tokens), took.count(), peak_mib(), peak_mib() - before);
        if (form == MlaForm::kUnabsorbed) {
          unabsorbed[tokens] = y;
        } else {
          std::printf("%50s %.1e\n", "absorbed - unabsorbed:", max_error(y, unabsorbed[tokens]));
        }
      }
    }
  }
}

}  // namespace
}  // namespace mla
