// Scheduler and kernels together, on the GPU model: every sequence of every step, after appends,
// frees and preemptions, against the reference on rows that the test makes itself.
#include <gtest/gtest.h>

#include <numeric>

#include "bench/service/real_engine.h"
#include "bench/service/service.h"
#include "reference/compare.h"
#include "reference/data_generator.h"

namespace mla::bench {
namespace {

constexpr int kHeads = 16;

/// Reads the last decode back and compares it with the reference on a cache of the test's own:
/// contiguous, with row_of() as the only thing shared.
void check_decode(Machine& machine, const RealEngine& engine, const StepWork& work, int layer) {
  const Problem& decoded = engine.problem();
  const Tensors device = engine.tensors();
  const auto batch = work.sequences.size();
  ASSERT_EQ(decoded.batch, int(batch));
  std::vector<uint16_t> q(size_t(decoded.q_elements())), out(size_t(decoded.out_elements()));
  std::vector<float> lse(size_t(decoded.lse_elements()));
  ASSERT_TRUE(machine.copy_to_host(q.data(), device.q, q.size() * 2).ok());
  ASSERT_TRUE(machine.copy_to_host(out.data(), device.out, out.size() * 2).ok());
  ASSERT_TRUE(machine.copy_to_host(lse.data(), device.lse, lse.size() * 4).ok());

  Problem problem = decoded;
  std::vector<int32_t> lengths;
  int64_t longest = 0;
  for (const SequenceWork& sequence : work.sequences) {
    lengths.push_back(sequence.decoded);
    longest = std::max(longest, int64_t(sequence.decoded));
  }
  problem.max_pages_per_seq = int(pages_for(longest));
  problem.num_pages = problem.batch * problem.max_pages_per_seq;
  std::vector<int32_t> table(size_t(problem.num_pages));
  std::iota(table.begin(), table.end(), 0);
  std::vector<uint16_t> cache(size_t(problem.kv_elements()), nan_bits(problem.dtype));
  for (size_t i = 0; i < batch; ++i) {
    for (int32_t token = 0; token < lengths[i]; ++token) {
      const auto row = pool_row(row_of(work.sequences[i].request, token) + layer);
      const int64_t place = int64_t(i) * problem.max_seqlen_k() + token;
      std::copy(row.begin(), row.end(), cache.begin() + place * kHeadDimQK);
    }
  }
  ReferenceResult truth;
  const Tensors host{q.data(), cache.data(), table.data(), lengths.data(), nullptr, nullptr};
  const Status status = reference_attention(problem, host, &truth, 1);
  ASSERT_TRUE(status.ok()) << status.to_string();
  const DecodeComparison comparison = compare_decode(problem.dtype, out, lse, truth);
  EXPECT_TRUE(comparison.ok()) << comparison.describe();
}

/// Does each step, then checks it; as long as steps of the test's own clock.
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

void serve_and_check(const char* stage_name, int layers) {
  Machine& machine = model_machine();
  const Stage* stage = find_stage(MachineKind::kModel, stage_name);
  ASSERT_NE(stage, nullptr);
  const SchedulerLimits limits{.num_pages = 7, .max_batch = 4, .max_length = 400};
  std::unique_ptr<LayerCaches> caches;
  ASSERT_TRUE(LayerCaches::create(machine, limits.num_pages, layers, 0, &caches).ok());
  EXPECT_EQ(caches->distinct(), layers);
  std::unique_ptr<RealEngine> real;
  ASSERT_TRUE(RealEngine::create(machine, *stage, *caches, kHeads, &real).ok());
  CheckingEngine engine(machine, *real, layers);
  std::unique_ptr<PagedScheduler> scheduler;
  ASSERT_TRUE(PagedScheduler::create(limits, &scheduler).ok());
  // An empty prompt, one that ends where a page does, one that grows into a page that is not
  // there; then some at random.
  const std::vector<Request> first{{.id = 0, .prompt = 0, .output = 8},
                                   {.id = 1, .prompt = 120, .output = 16},
                                   {.id = 2, .prompt = 120, .output = 12},
                                   {.id = 3, .prompt = 61, .output = 10},
                                   {.id = 4, .prompt = 190, .output = 4, .generated = 2}};
  Figures figures;
  const Status status =
      run_service({.requests = 3}, first, RequestStream({20, {90, 90}, {6, 3}}, 1, 5), *scheduler,
                  engine, &figures);
  ASSERT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(figures.counts.finished + figures.counts.rejected_total(), 8);
  EXPECT_GE(figures.counts.finished, 7);
  EXPECT_GT(figures.counts.preemptions, 0) << "too many pages to show anything";
  EXPECT_EQ(engine.steps, figures.steps);
}

TEST(RealEngine, DecodesWhatWasAppended_03) {
  serve_and_check("03", 1);
}

TEST(RealEngine, DecodesWhatWasAppendedByAPlan_04) {
  serve_and_check("04", 2);
}

TEST(RealEngine, StaticBatchesRun) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  ASSERT_TRUE(LayerCaches::create(machine, 6, 2, 1, &caches).ok());
  EXPECT_EQ(caches->distinct(), 1);
  EXPECT_EQ(caches->data(0), caches->data(1));
  std::unique_ptr<RealEngine> engine;
  ASSERT_TRUE(
      RealEngine::create(machine, *find_stage(MachineKind::kModel, "02"), *caches, kHeads, &engine)
          .ok());
  std::unique_ptr<StaticScheduler> scheduler;
  ASSERT_TRUE(
      StaticScheduler::create({.num_pages = 6, .max_batch = 4, .max_length = 128}, &scheduler)
          .ok());
  const std::vector<Request> requests{{.id = 0, .prompt = 100, .output = 3},
                                      {.id = 1, .prompt = 10, .output = 1},
                                      {.id = 2, .prompt = 0, .output = 2},
                                      {.id = 3, .prompt = 60, .output = 2}};
  Figures figures;
  const Status status =
      run_service({.requests = 0}, requests, RequestStream({1, {1, 0}, {1, 0}}, 1), *scheduler,
                  *engine, &figures);
  ASSERT_TRUE(status.ok()) << status.to_string();
  EXPECT_EQ(figures.counts.finished, 4);
  EXPECT_EQ(figures.steps, 5);
}

TEST(RealEngine, RefusesWhatItCannotHold) {
  Machine& machine = model_machine();
  std::unique_ptr<LayerCaches> caches;
  EXPECT_EQ(LayerCaches::create(machine, 0, 1, 0, &caches).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(LayerCaches::create(machine, 1, 2, 3, &caches).code(), StatusCode::kInvalidArgument);
  const Status status = LayerCaches::create(machine, 1 << 24, 61, 0, &caches);
  EXPECT_EQ(status.code(), StatusCode::kOutOfMemory);
  EXPECT_NE(status.message().find("1179648 MiB"), std::string::npos) << status.to_string();
  EXPECT_EQ(caches, nullptr);
}

}  // namespace
}  // namespace mla::bench
