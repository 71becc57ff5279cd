// Every public function gets random problems and tensors. Whatever the numbers, a call ends with a status;
// if that is an error, the call has touched nothing. Meant for AddressSanitizer and
// UndefinedBehaviorSanitizer. MLA_FUZZ sets how many problems there are.
#include <gtest/gtest.h>

#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "reference/attention.h"
#include "reference/testing/data_generator.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/cache/paging_check.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

constexpr int kFewest = 20000;

int count() {
  const char* set = std::getenv("MLA_FUZZ");
  return set == nullptr ? kFewest : std::max(kFewest, std::atoi(set));
}

class Fuzz : public testing::Test {
 protected:
  uint64_t draw(uint64_t limit) { return random_() % limit; }
  template <typename T, size_t n>
  T any(const T (&values)[n]) {
    return values[draw(n)];
  }

  // Mostly a number that a dimension may well have; otherwise one at an edge, or any.
  int dimension() {
    constexpr int kUsual[] = {1, 2, 3, 4, 6, 16, 64, 128};
    constexpr int kEdges[] = {INT_MIN,       -1,      0,      1, 63, 64, 65, 1 << 15, 1 << 20,
                              (1 << 30) - 1, 1 << 30, INT_MAX};
    const uint64_t kind = draw(8);
    return kind < 6 ? any(kUsual) : kind == 6 ? any(kEdges) : static_cast<int>(random_());
  }

  Problem problem() {
    constexpr float kScales[] = {0.135234f, 1.0f / 24, 1, 0, -1, 1e-45f, 3e38f, INFINITY, NAN};
    constexpr int kPages[] = {16, 32, 64, 64, 64, 128, 256, 0, 1, -64, 512, 48};
    constexpr int kSplits[] = {0, 0, 0, 64, 1024, 1, -64, 1 << 30, INT_MAX};
    Problem made;
    made.dtype = static_cast<DType>(draw(20) == 0 ? draw(256) : draw(2));
    if (draw(8) == 0) made.cache_format = static_cast<CacheFormat>(draw(5));
    made.cache_scale = any(kScales);
    made.batch = dimension();
    made.seqlen_q = dimension();
    made.num_heads_kv = dimension();
    made.num_heads_q = dimension();
    if (draw(4) > 0 && made.num_heads_kv > 0 && made.num_heads_kv < 1 << 10) {
      made.num_heads_q = made.num_heads_kv * static_cast<int>(1 + draw(16));
    }
    made.num_pages = dimension();
    made.max_pages_per_seq = dimension();
    made.page_size = draw(3) == 0 ? any(kPages) : 64;
    made.softmax_scale = draw(3) == 0 ? any(kScales) : 0.135234f;
    made.causal = draw(2) == 0;
    made.fixed_split_tokens = any(kSplits);
    return made;
  }

  int64_t stride() {
    constexpr int64_t kStrides[] = {kContiguous, 0,       1,         8,         576,
                                    1 << 20,     -8,      INT64_MIN, INT64_MAX, int64_t{1} << 40,
                                    512,         INT_MAX, -1152};
    return draw(3) == 0 ? any(kStrides) : kContiguous;
  }
  RowStrides row_strides() { return {stride(), stride(), stride()}; }

  // Pointers into a small buffer, odd ones, and null. At least one pointer is such that no call accepts
  // it, so that no call decodes memory that does not exist.
  Tensors tensors() {
    Tensors made;
    made.q = memory_;
    made.kv_cache = memory_;
    made.block_table = made.seqlens_k = reinterpret_cast<const int32_t*>(memory_);
    made.out = out_;
    made.lse = reinterpret_cast<float*>(out_);
    made.q_strides = row_strides();
    made.out_strides = row_strides();
    made.lse_strides = row_strides();
    made.kv_strides = {stride(), stride(), stride()};
    made.block_table_stride = stride();
    const uintptr_t bad = draw(2);  // null, or odd
    switch (draw(6)) {
      case 0:
        made.q = reinterpret_cast<const void*>(bad);
        break;
      case 1:
        made.kv_cache = reinterpret_cast<const void*>(bad);
        break;
      case 2:
        made.block_table = reinterpret_cast<const int32_t*>(bad);
        break;
      case 3:
        made.seqlens_k = reinterpret_cast<const int32_t*>(bad);
        break;
      case 4:
        made.out = reinterpret_cast<void*>(bad);
        break;
      default:
        made.lse = reinterpret_cast<float*>(bad);
    }
    return made;
  }

  Workspace workspace() {
    constexpr size_t kSizes[] = {0, 16, sizeof memory_, SIZE_MAX};
    void* const places[] = {nullptr, memory_, memory_ + 8};
    return {any(places), any(kSizes)};
  }

  DeviceLimits limits() {
    if (draw(3) > 0) return model_machine().limits();
    constexpr int kNumbers[] = {0, 1, 80, 90, 132, INT_MAX, -1};
    return {any(kNumbers), any(kNumbers), static_cast<size_t>(any(kNumbers)),
            static_cast<unsigned>(any(kNumbers))};
  }

  std::mt19937_64 random_{1};
  alignas(16) unsigned char memory_[4096] = {};
  alignas(16) unsigned char out_[4096] = {};
};

TEST_F(Fuzz, EveryCallEndsWithAStatus) {
  const std::vector<Stage>& all = stages(MachineKind::kModel);
  const int problems = count();
  int64_t calls = 0, accepted = 0, valid = 0;
  std::memset(out_, 0xab, sizeof out_);
  for (int i = 0; i < problems; ++i) {
    const Stage& stage = all[draw(all.size())];
    Problem p = problem();
    if (!can_read(stage, CacheFormat::k16Bit) && draw(8) > 0) {
      p.cache_format = stage.cache_formats[draw(stage.cache_formats.size())];
    }
    const Tensors t = tensors();
    const bool is_valid = validate(p).ok();
    valid += is_valid;
    const auto took = [&](const Status& status) {
      ++calls;
      accepted += status.ok();
      return status.ok();
    };
    // An error leaves results alone.
    WorkspaceBytes needs{7, 8};
    if (!took(workspace_bytes(stage, p, limits(), &needs))) {
      ASSERT_TRUE(needs.plan == 7 && needs.scratch == 8);
    } else {
      ASSERT_TRUE(is_valid);
    }
    took(workspace_bytes(stage, p, &needs));
    PlanShape shape;
    shape.workers = -77;
    if (!took(plan_shape(stage, p, limits(), &shape))) {
      ASSERT_EQ(shape.workers, -77);
    } else {
      ASSERT_TRUE(shape.workers >= 1 && shape.workers <= kMaxWorkers && shape.row_tiles >= 1)
          << shape.workers << " " << shape.row_tiles;
    }
    Prediction prediction;
    const int64_t tokens = draw(4) == 0 ? static_cast<int64_t>(random_()) : int64_t(draw(1 << 20));
    took(predict(stage, p, tokens, limits(), &prediction));
    const bool tensors_fit = took(validate(p, t));
    ASSERT_TRUE(!tensors_fit || p.batch == 0);
    // Calls on tensors: at least one of them is refused, or there is no sequence.
    const bool decoded = took(decode(stage, p, t, workspace()));
    ASSERT_TRUE(!decoded || p.batch == 0);
    ASSERT_TRUE(!took(decode_planned(stage, p, t, workspace(), workspace())) || p.batch == 0);
    const Workspace small{memory_, draw(2) * 16};
    const bool plan_fits = is_valid && needs.plan <= small.bytes;
    const int32_t* odd = reinterpret_cast<const int32_t*>(draw(2));
    if (stage.plan_shape != nullptr) {
      took(plan_decode(stage, p, odd, small));
      took(check_plan(stage, p, odd, small));
      HostPlan plan;
      PlanState state{};
      ASSERT_TRUE(!took(read_plan(stage, p, small, &plan)) || plan_fits);
      ASSERT_TRUE(!took(plan_state(stage, p, small, &state)) || plan_fits);
    }
    took(check_paging(model_machine(), p, nullptr, odd));
    took(validate_paging(p, nullptr, nullptr, stride()));
    took(validate_paging(p, reinterpret_cast<const int32_t*>(memory_), nullptr, stride()));
    ReferenceResult result;
    if (!tensors_fit && draw(4) == 0) {
      Tensors inputs = t;  // for the reference, which does not look at out and lse
      inputs.q = nullptr;
      took(reference_attention(p, inputs, &result, static_cast<int>(draw(3)) - 1));
      const QueryRow row{static_cast<int32_t>(dimension()), static_cast<int32_t>(dimension())};
      took(reference_attention_rows(p, inputs, {&row, 1}, &result));
    }
    if (is_valid && t.q_strides.batch == kContiguous) with_strides(p, t);
    PageTable table;
    if (p.num_pages < 1 << 12) took(PageTable::create(p.num_pages, p.page_size, &table));
    std::unique_ptr<PagedCache> cache;
    CacheShape cache_shape{p.num_pages, p.page_size,    p.num_heads_kv,
                           p.dtype,     p.cache_format, p.cache_scale};
    if (p.num_pages > 4 || p.num_heads_kv > 4) cache_shape.num_heads_kv = INT_MAX;
    if (draw(16) == 0) took(PagedCache::create(model_machine(), cache_shape, &cache));
    for (const unsigned char byte : out_) ASSERT_EQ(byte, 0xab) << i;
  }
  std::printf("[  FUZZED  ] %d problems, %lld of them valid; %lld calls, %lld accepted\n", problems,
              static_cast<long long>(valid), static_cast<long long>(calls),
              static_cast<long long>(accepted));
  // It went where it should.
  EXPECT_GT(valid, problems / 20);
  EXPECT_GT(accepted, problems / 10);
  EXPECT_GT(calls - accepted, problems);
}

// Lengths of any kind, and no more sequences than fit. The host's plan is whole, or the call is refused.
TEST_F(Fuzz, PlansOfAnyLengths) {
  const Stage* planning = nullptr;  // the last that makes a plan
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (stage.plan_shape != nullptr) planning = &stage;
  }
  ASSERT_NE(planning, nullptr);
  int plans = 0;
  for (int i = 0; i < count() / 50; ++i) {
    Problem p = problem();
    p.batch = static_cast<int>(1 + draw(8));
    const Stage& stage = *planning;
    if (!can_read(stage, p.cache_format)) p.cache_format = stage.cache_formats.front();
    if (!validate(p).ok()) continue;
    PlanShape shape;
    if (!plan_shape(stage, p, limits(), &shape).ok()) continue;
    WorkspaceBytes needs;
    if (!workspace_bytes(stage, p, model_machine().limits(), &needs).ok()) continue;
    std::vector<int32_t> lengths;
    for (int b = 0; b < p.batch; ++b) lengths.push_back(dimension());
    if (p.fixed_split_tokens > 0 && p.max_seqlen_k() / p.fixed_split_tokens > 1 << 16) continue;
    if (shape.workers > 1 << 12) continue;
    const HostPlan plan = make_plan_on_host(p, shape, lengths);
    int64_t grains = 0, expected = 0;
    for (const auto& pieces : pieces_of(plan)) {
      for (const Piece& piece : pieces) grains += piece.grain_end - piece.grain_begin;
    }
    for (const int32_t length : lengths) {
      expected += std::max<int64_t>(1, grains_for(clamped_length(p, length)));
    }
    ASSERT_EQ(grains, expected);
    ASSERT_FALSE(describe_plan(plan, static_cast<int>(draw(50)) - 5).empty());
    ++plans;
  }
  EXPECT_GT(plans, count() / 5000);
}

}  // namespace
}  // namespace mla
