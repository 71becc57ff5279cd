// Scheduler and kernels together, on the GPU model and on a GPU if there is one. Every sequence of
// every step, after appends, frees and preemptions, is compared with the reference on rows that the
// test makes itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "bench/service/real_engine.h"
#include "bench/service/service.h"
#include "reference/testing/compare.h"
#include "tests/bench/service/expected_step.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

constexpr int kHeads = 16;

/// Reads the last decode back and compares it with what the step should give.
void check_decode(Machine& machine, const RealEngine& engine, const StepWork& work, int layer) {
  const Problem& decoded = engine.problem();
  const Tensors device = engine.tensors();
  const auto batch = work.sequences.size();
  ASSERT_GE(decoded.batch, int(batch));  // padded, if it is a graph
  std::vector<uint16_t> q(size_t(decoded.q_elements())), out(size_t(decoded.out_elements()));
  std::vector<float> lse(size_t(decoded.lse_elements()));
  ASSERT_OK(machine.copy_to_host(q.data(), device.q, q.size() * 2));
  ASSERT_OK(machine.copy_to_host(out.data(), device.out, out.size() * 2));
  ASSERT_OK(machine.copy_to_host(lse.data(), device.lse, lse.size() * 4));

  Problem problem;
  ReferenceResult truth;
  ASSERT_OK(expected_of(decoded, q, work, layer, &problem, &truth));
  const DecodeComparison comparison = compare_decode(problem, out, lse, truth);
  EXPECT_OK(comparison);
}

/// Does each step, then checks it. By the test's clock, a step takes 0.01 s.
class CheckingEngine final : public Engine {
 public:
  CheckingEngine(Machine& machine, RealEngine& engine, int layers)
      : machine_(machine), engine_(engine), layers_(layers) {}
  Status step(const StepWork& work, double* seconds) override {
    MLA_RETURN_IF_ERROR(engine_.step(work, seconds));
    EXPECT_GT(*seconds, 0);
    *seconds = 0.01;
    SCOPED_TRACE("step " + std::to_string(steps++));
    check_decode(machine_, engine_, work, layers_ - 1);
    return {};
  }
  int steps = 0;

 private:
  Machine& machine_;
  RealEngine& engine_;
  int layers_;
};

/// How requests are served.
struct Serving {
  CacheFormat format = CacheFormat::k16Bit;
  SharedPrefixes prefixes = {};
  bool graphs = false;
};

void serve_and_check(Machine& machine, const Stage* stage, int layers, const Serving& how = {}) {
  const CacheFormat format = how.format;
  ASSERT_NE(stage, nullptr);
  SCOPED_TRACE(stage->slug + ", " + to_string(format));
  const SchedulerLimits limits{.num_pages = 7, .max_batch = 4, .max_length = 400};
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(machine, limits.num_pages, format, layers, 0, &caches));
  EXPECT_EQ(caches->distinct(), layers);
  std::unique_ptr<RealEngine> real;
  ASSERT_OK(RealEngine::create(machine, *stage, *caches, kHeads, how.graphs, &real));
  CheckingEngine engine(machine, *real, layers);
  std::unique_ptr<PagedScheduler> scheduler;
  ASSERT_OK(PagedScheduler::create(limits, &scheduler));
  Figures figures;
  const Status status = run_service({.requests = 3}, first_requests(how.prefixes),
                                    RequestStream({20, {90, 90}, {6, 3}, how.prefixes}, 1, 11),
                                    *scheduler, engine, &figures);
  ASSERT_OK(status);
  EXPECT_EQ(figures.counts.finished + figures.counts.rejected_total(), 8);
  EXPECT_GE(figures.counts.finished, 7);
  if (how.prefixes.count == 0) {
    EXPECT_GT(figures.counts.preemptions, 0) << "too many pages to show anything";
  } else {
    EXPECT_GT(figures.counts.prefix_hits, 3);
  }
  // The first step of a size is done and its graph is kept.
  EXPECT_EQ(real->replayed() > 0, how.graphs);
  EXPECT_EQ(real->graphs() > 0, how.graphs);
  EXPECT_EQ(engine.steps, figures.steps);
}

TEST(RealEngine, DecodesWhatWasAppended_03) {
  serve_and_check(model_machine(), find_stage(MachineKind::kModel, "03"), 1);
}

TEST(RealEngine, DecodesWhatWasAppendedByAPlan_04) {
  serve_and_check(model_machine(), find_stage(MachineKind::kModel, "04"), 2);
}

// One prefix ends where a page does, one within a page. Its rows belong to no request.
TEST(RealEngine, DecodesWhatIsShared) {
  for (const int64_t tokens : {64, 100}) {
    serve_and_check(model_machine(), find_stage(MachineKind::kModel, "03"), 2,
                    {.prefixes = {1, tokens}});
  }
}

// Steps are padded to four sequences, and replayed with other lengths and other pages.
TEST(RealEngine, DecodesWhatAGraphAppended) {
  for (const char* stage : {"03", "04"}) {
    serve_and_check(model_machine(), find_stage(MachineKind::kModel, stage), 2, {.graphs = true});
    serve_and_check(model_machine(), find_stage(MachineKind::kModel, stage), 1,
                    {.prefixes = {2, 70}, .graphs = true});
  }
}

// Steps of so many sequences of one page each, all of them checked. The first step of a size is
// done, the others are replayed.
TEST(RealEngine, GraphsAreOfSizesAndGoWithTheBuffers) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(machine, 40, CacheFormat::k16Bit, 1, 0, &caches));
  std::unique_ptr<RealEngine> engine;
  ASSERT_OK(RealEngine::create(machine, *find_stage(MachineKind::kModel, "04"), *caches, kHeads,
                               true, &engine));
  std::vector<int32_t> pages(40);
  std::iota(pages.begin(), pages.end(), 0);
  int32_t tokens = 0;  // in the first page of each sequence
  int64_t first_request = 0;
  const auto step = [&](int sequences) {
    StepWork work;
    for (int i = 0; i < sequences; ++i) {
      work.sequences.push_back(
          {first_request + i, tokens, 1, tokens + 1, std::span(pages).subspan(size_t(i), 1)});
    }
    ++tokens;
    double seconds = 0;
    const Status status = engine->step(work, &seconds);
    ASSERT_OK(status);
    check_decode(machine, *engine, work, 0);
  };
  const auto steps = [&](std::initializer_list<int> batches) {
    tokens = 0;
    first_request += 100;
    for (const int batch : batches) step(batch);
  };
  steps({1, 1, 1});
  EXPECT_EQ(engine->replayed(), 2);
  EXPECT_EQ(engine->problem().batch, 1);
  steps({3});  // padded to four: other buffers
  EXPECT_EQ(engine->problem().batch, 4);
  EXPECT_EQ(engine->graphs(), 1);
  steps({4, 4, 3});
  EXPECT_EQ(engine->replayed(), 5);
  steps({1, 1});
  EXPECT_EQ(engine->replayed(), 6);
  EXPECT_EQ(engine->graphs(), 2);
  StepWork longer;
  longer.sequences.push_back({7, 33 * 64 - 1, 1, 33 * 64, pages});
  double seconds = 0;
  ASSERT_OK(engine->step(longer, &seconds));
  EXPECT_EQ(engine->problem().max_pages_per_seq, 64);
}

TEST(RealEngine, DecodesOnAGpu) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  for (const Stage& stage : stages(MachineKind::kGpu)) {
    if (!check_device(stage, gpu->limits()).ok()) continue;
    for (const CacheFormat format : stage.cache_formats) {
      serve_and_check(*gpu, &stage, 3, {.format = format});
      serve_and_check(*gpu, &stage, 3, {.format = format, .prefixes = {2, 70}, .graphs = true});
    }
  }
}

// With the stage that auto chooses for the format, and with every other stage that reads it.
class QuantisedService : public testing::TestWithParam<CacheFormat> {};

TEST_P(QuantisedService, DecodesWhatWasAppended) {
  for (const Stage& stage : stages(MachineKind::kModel)) {
    if (!can_read(stage, GetParam())) continue;
    serve_and_check(model_machine(), &stage, 1, {.format = GetParam()});
  }
  serve_and_check(model_machine(), find_stage(MachineKind::kModel, "auto"), 2,
                  {.format = GetParam(), .graphs = true});
}

INSTANTIATE_TEST_SUITE_P(Formats, QuantisedService,
                         testing::Values(CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor,
                                         CacheFormat::kInt8Tile128),
                         [](const auto& format) { return std::string(to_string(format.param)); });

TEST(RealEngine, RefusesACacheThatTheStageCannotRead) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(machine, 6, CacheFormat::kFp8Tensor, 1, 0, &caches));
  std::unique_ptr<RealEngine> engine;
  const Status status = RealEngine::create(machine, *find_stage(MachineKind::kModel, "03"), *caches,
                                           kHeads, false, &engine);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("03_online_softmax cannot read a cache of cache_format = "
                                  "fp8_tensor"),
            std::string::npos)
      << status.to_string();
  EXPECT_EQ(engine, nullptr);
}

TEST(LayerCaches, AreFullOfThePool) {
  std::vector<Machine*> machines{&model_machine()};
  if (Machine* gpu = gpu_machine(); gpu != nullptr) machines.push_back(gpu);
  for (Machine* machine : machines) {
    for (const CacheFormat format : kCacheFormats) {
      SCOPED_TRACE(to_string(format));
      constexpr int kPages = 70;  // more rows than the pool has
      std::unique_ptr<LayerCaches> caches;
      ASSERT_OK(LayerCaches::create(*machine, kPages, format, 2, 0, &caches));
      Problem problem;
      problem.cache_format = format;
      problem.cache_scale = kPoolScale;
      const auto row_bytes = size_t(problem.cache_row_bytes());
      std::vector<uint8_t> bytes(size_t(layer_bytes(kPages, format)));
      ASSERT_EQ(bytes.size(), kPages * kDefaultPageSize * row_bytes);
      for (int layer = 0; layer < 2; ++layer) {
        ASSERT_OK(machine->copy_to_host(bytes.data(), caches->data(layer), bytes.size()));
        std::vector<uint8_t> expected(row_bytes);
        for (int64_t row = 0; row < kPages * kDefaultPageSize; ++row) {
          put_row(problem, pool_row(row % kPoolRows), expected.data());
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(),
                                 bytes.begin() + row * ptrdiff_t(row_bytes)))
              << "row " << row;
        }
      }
    }
  }
}

// The scale is set by the largest value of the pool, so no value saturates in e4m3.
TEST(LayerCaches, TheScaleHoldsThePool) {
  float largest = 0;
  for (int64_t row = 0; row < kPoolRows; ++row) {
    for (const uint16_t bits : pool_row(row)) {
      largest = std::max(largest, std::abs(to_float(DType::kBFloat16, bits)));
    }
  }
  EXPECT_LE(largest, kPoolScale * kLargestE4M3);
  EXPECT_GT(2 * largest, kPoolScale * kLargestE4M3);
}

TEST(RealEngine, RowsGoToTheNextPageWhereverItIs) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(machine, 6, CacheFormat::k16Bit, 1, 0, &caches));
  std::unique_ptr<RealEngine> engine;
  ASSERT_OK(RealEngine::create(machine, *find_stage(MachineKind::kModel, "03"), *caches, kHeads,
                               false, &engine));
  const int32_t pages[] = {3, 1};
  double seconds = 0;
  for (const auto& [before, after] : {std::pair(0, 60), std::pair(60, 70)}) {
    StepWork work;
    work.sequences = {{5, before, after - before, after, pages}};
    const Status status = engine->step(work, &seconds);
    ASSERT_OK(status);
    check_decode(machine, *engine, work, 0);
  }
}

TEST(RealEngine, StaticBatchesRun) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  ASSERT_OK(LayerCaches::create(machine, 6, CacheFormat::k16Bit, 2, 1, &caches));
  EXPECT_EQ(caches->distinct(), 1);
  EXPECT_EQ(caches->data(0), caches->data(1));
  std::unique_ptr<RealEngine> engine;
  ASSERT_OK(RealEngine::create(machine, *find_stage(MachineKind::kModel, "02"), *caches, kHeads,
                               false, &engine));
  std::unique_ptr<StaticScheduler> scheduler;
  ASSERT_OK(
      StaticScheduler::create({.num_pages = 6, .max_batch = 4, .max_length = 128}, &scheduler));
  const std::vector<Request> requests{{.id = 0, .prompt = 100, .output = 3},
                                      {.id = 1, .prompt = 10, .output = 1},
                                      {.id = 2, .prompt = 0, .output = 2},
                                      {.id = 3, .prompt = 60, .output = 2}};
  Figures figures;
  const Status status =
      run_service({.requests = 0}, requests, RequestStream({1, {1, 0}, {1, 0}}, 1), *scheduler,
                  *engine, &figures);
  ASSERT_OK(status);
  EXPECT_EQ(figures.counts.finished, 4);
  EXPECT_EQ(figures.steps, 5);
}

TEST(RealEngine, RefusesWhatItCannotHold) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  const auto create = [&](int pages, CacheFormat format, int layers, int distinct) {
    return LayerCaches::create(machine, pages, format, layers, distinct, &caches);
  };
  constexpr CacheFormat k16Bit = CacheFormat::k16Bit;
  EXPECT_EQ(create(0, k16Bit, 1, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(create(1, k16Bit, 2, 3).code(), StatusCode::kInvalidArgument);
  for (const auto& [format, size] :
       {std::pair(k16Bit, "1179648 MiB"), std::pair(CacheFormat::kFp8Tile128, "671744 MiB"),
        std::pair(CacheFormat::kFp8Tensor, "589824 MiB")}) {
    const Status status = create(1 << 24, format, 61, 61);
    EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
    EXPECT_NE(status.message().find(size), std::string::npos) << status.to_string();
  }
  EXPECT_EQ(caches, nullptr);
}

}  // namespace
}  // namespace mla::bench
