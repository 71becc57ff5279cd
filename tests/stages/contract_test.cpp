// What every stage must do on bad input: return a status whose message names the argument, its value and
// what is allowed; leave the outputs untouched; and work on the next good call. On the model, and on a GPU
// where there is one.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "reference/gpu_model/gpu_model.h"
#include "reference/testing/data_generator.h"
#include "reference/testing/device_data.h"
#include "stages/common/cache/paging_check.h"
#include "stages/common/choose/choose.h"
#include "stages/common/stage.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

// One call's arguments, to be spoilt one at a time.
struct Call {
  Problem problem;
  Tensors tensors;
  Workspace workspace;
};

struct BadCall {
  const char* name;
  std::function<void(Call&)> spoil;
  StatusCode code;
  std::vector<const char*> message;  // each must occur
};

template <typename T>
T* shifted(T* pointer, int bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(bytes));
}

const std::vector<BadCall>& bad_calls() {
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static const std::vector<BadCall> calls = {
      {"dtype", [](Call& c) { c.problem.dtype = static_cast<DType>(7); }, kInvalid, {"dtype", "7"}},
      {"cache_format",
       [](Call& c) { c.problem.cache_format = static_cast<CacheFormat>(9); },
       kInvalid,
       {"cache_format", "9", "fp8_tile128"}},
      {"batch -3", [](Call& c) { c.problem.batch = -3; }, kInvalid, {"batch", "-3"}},
      {"seqlen_q", [](Call& c) { c.problem.seqlen_q = 0; }, kInvalid, {"seqlen_q", "0"}},
      {"num_heads_q", [](Call& c) { c.problem.num_heads_q = 0; }, kInvalid, {"num_heads_q", "0"}},
      {"num_heads_kv",
       [](Call& c) { c.problem.num_heads_kv = 0; },
       kInvalid,
       {"num_heads_kv", "0"}},
      {"heads not divisible",
       [](Call& c) { c.problem.num_heads_kv = 4; },
       kInvalid,
       {"num_heads_q", "6", "num_heads_kv", "4"}},
      {"num_pages", [](Call& c) { c.problem.num_pages = 0; }, kInvalid, {"num_pages", "0"}},
      {"max_pages_per_seq",
       [](Call& c) { c.problem.max_pages_per_seq = -1; },
       kInvalid,
       {"max_pages_per_seq", "-1"}},
      {"page_size",
       [](Call& c) { c.problem.page_size = 48; },
       kInvalid,
       {"page_size = 48", "16, 32, 64, 128 or 256"}},
      {"page_size 1", [](Call& c) { c.problem.page_size = 1; }, kInvalid, {"page_size = 1 "}},
      {"page_size 512", [](Call& c) { c.problem.page_size = 512; }, kInvalid, {"page_size = 512"}},
      {"q stride odd",
       [](Call& c) { c.tensors.q_strides.head = 580; },
       kInvalid,
       {"q stride of num_heads_q = 580", "multiple of 8"}},
      {"q stride negative",
       [](Call& c) { c.tensors.q_strides.batch = -8; },
       kInvalid,
       {"q stride of batch = -8", "at least 0"}},
      {"cache stride odd",
       [](Call& c) { c.tensors.kv_strides.token = 1156; },
       kInvalid,
       {"kv_cache stride of page_size = 1156", "16 bytes"}},
      {"cache stride long",
       [](Call& c) { c.tensors.kv_strides.page = (int64_t{1} << 39) + 16; },
       kInvalid,
       {"kv_cache stride of num_pages = 549755813904", "must be at most 2^3"}},
      {"q past 2^63 bytes",
       [](Call& c) { c.tensors.q_strides.batch = int64_t{1} << 62; },
       kInvalid,
       {"q stride of batch", "2^63"}},
      {"table stride negative",
       [](Call& c) { c.tensors.block_table_stride = -2; },
       kInvalid,
       {"block_table stride of batch = -2"}},
      {"out rows overlap",
       [](Call& c) { c.tensors.out_strides.head = 504; },
       kInvalid,
       {"out stride of num_heads_q = 504", "at least 512", "overlap"}},
      {"out heads over sequences",
       [](Call& c) { c.tensors.out_strides.batch = 2048; },
       kInvalid,
       {"out stride of batch = 2048", "overlap"}},
      {"lse rows overlap",
       [](Call& c) { c.tensors.lse_strides.head = 0; },
       kInvalid,
       {"lse stride of num_heads_q = 0", "overlap"}},
      {"table past 2^30 tokens",
       [](Call& c) { c.problem.max_pages_per_seq = (1 << 24) + 1; },
       kInvalid,
       {"max_pages_per_seq", "16777217"}},
      {"too many rows", [](Call& c) { c.problem.seqlen_q = 1 << 30; }, kInvalid, {"seqlen_q"}},
      {"scale 0", [](Call& c) { c.problem.softmax_scale = 0; }, kInvalid, {"softmax_scale", "0"}},
      {"scale negative",
       [](Call& c) { c.problem.softmax_scale = -1; },
       kInvalid,
       {"softmax_scale", "-1"}},
      {"scale NaN",
       [](Call& c) { c.problem.softmax_scale = kNaN; },
       kInvalid,
       {"softmax_scale", "nan"}},
      {"scale inf",
       [](Call& c) { c.problem.softmax_scale = kInfinity; },
       kInvalid,
       {"softmax_scale", "inf"}},
      {"fixed splits negative",
       [](Call& c) { c.problem.fixed_split_tokens = -64; },
       kInvalid,
       {"fixed_split_tokens", "-64"}},
      {"fixed splits within a page",
       [](Call& c) { c.problem.fixed_split_tokens = 96; },
       kInvalid,
       {"fixed_split_tokens", "96", "multiple of 64"}},
      {"q null", [](Call& c) { c.tensors.q = nullptr; }, kInvalid, {"q ", "null"}},
      {"kv_cache null",
       [](Call& c) { c.tensors.kv_cache = nullptr; },
       kInvalid,
       {"kv_cache", "null"}},
      {"block_table null",
       [](Call& c) { c.tensors.block_table = nullptr; },
       kInvalid,
       {"block_table", "null"}},
      {"seqlens_k null",
       [](Call& c) { c.tensors.seqlens_k = nullptr; },
       kInvalid,
       {"seqlens_k", "null"}},
      {"out null", [](Call& c) { c.tensors.out = nullptr; }, kInvalid, {"out", "null"}},
      {"lse null", [](Call& c) { c.tensors.lse = nullptr; }, kInvalid, {"lse", "null"}},
      {"q misaligned",
       [](Call& c) { c.tensors.q = shifted(c.tensors.q, 2); },
       kInvalid,
       {"q ", "16"}},
      {"kv_cache misaligned",
       [](Call& c) { c.tensors.kv_cache = shifted(c.tensors.kv_cache, 8); },
       kInvalid,
       {"kv_cache", "16"}},
      {"block_table misaligned",
       [](Call& c) { c.tensors.block_table = shifted(c.tensors.block_table, 2); },
       kInvalid,
       {"block_table", "4 bytes"}},
      {"seqlens_k misaligned",
       [](Call& c) { c.tensors.seqlens_k = shifted(c.tensors.seqlens_k, 1); },
       kInvalid,
       {"seqlens_k", "4 bytes"}},
      {"out misaligned",
       [](Call& c) { c.tensors.out = shifted(c.tensors.out, 2); },
       kInvalid,
       {"out", "16"}},
      {"lse misaligned",
       [](Call& c) { c.tensors.lse = shifted(c.tensors.lse, 2); },
       kInvalid,
       {"lse", "4 bytes"}},
  };
  return calls;
}

// Faults that only stages with a workspace can notice.
const std::vector<BadCall>& bad_workspaces() {
  static const std::vector<BadCall> calls = {
      {"workspace too small",
       [](Call& c) { --c.workspace.bytes; },
       StatusCode::kWorkspaceTooSmall,
       {"workspace.bytes", "needs"}},
      {"workspace null",
       [](Call& c) { c.workspace.data = nullptr; },
       StatusCode::kInvalidArgument,
       {"workspace", "null"}},
      {"workspace misaligned",
       [](Call& c) { c.workspace.data = shifted(c.workspace.data, 4); },
       StatusCode::kInvalidArgument,
       {"workspace", "16"}},
  };
  return calls;
}

class Contract : public testing::TestWithParam<MachineKind> {
 protected:
  void SetUp() override {
    std::string why_not;
    machine_ = find_machine(GetParam(), &why_not);
    if (machine_ == nullptr) GTEST_SKIP() << why_not;
    DecodeCase spec;
    spec.batch = 2;
    spec.seqlen_k = 70;
    spec.num_heads_q = 6;
    spec.num_heads_kv = 2;
    data_ = make_data_set(spec);
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
  }
  // A cache that this stage can read.
  void use_data_of(const Stage& stage) {
    DecodeCase spec = data_.spec;
    spec.cache_format = stage.cache_formats.front();
    if (spec.cache_format == data_.spec.cache_format) return;
    data_ = make_data_set(spec);
    ASSERT_OK(generate_on_device(*machine_, data_, &tensors_));
  }
  void TearDown() override { gpu_model::device() = {}; }

  Call good_call(const Stage& stage) {
    WorkspaceBytes needs;
    EXPECT_OK(workspace_bytes(stage, data_.problem, machine_->limits(), &needs));
    if (needs.total() > 0) {
      EXPECT_OK(workspace_.allocate(*machine_, needs.total()));
    }
    return {data_.problem, tensors_.tensors(), {workspace_.data(), needs.total()}};
  }

  static Status make(const Stage& stage, const Call& call) {
    return decode(stage, call.problem, call.tensors, call.workspace);
  }

  // Every byte of out and lse is as poison_outputs left it.
  bool outputs_untouched() {
    if (!machine_->synchronize().ok()) return false;
    for (const DeviceBuffer* buffer : {&tensors_.out, &tensors_.lse}) {
      std::vector<unsigned char> bytes(buffer->bytes());
      if (!machine_->copy_to_host(bytes.data(), buffer->data(), bytes.size()).ok()) return false;
      for (const unsigned char byte : bytes) {
        if (byte != 0xff) return false;
      }
    }
    return true;
  }

  void expect_refused(const Stage& stage, const BadCall& bad) {
    SCOPED_TRACE(stage.slug + ", " + bad.name);
    Call call = good_call(stage);
    bad.spoil(call);
    const Status status = make(stage, call);
    EXPECT_EQ(status.code(), bad.code) << status.to_string();
    for (const char* part : bad.message) {
      EXPECT_NE(status.message().find(part), std::string::npos)
          << status.to_string() << " lacks " << part;
    }
    EXPECT_TRUE(outputs_untouched());
  }

  Machine* machine_ = nullptr;
  DataSet data_;
  DeviceTensors tensors_;
  DeviceBuffer workspace_;
};

TEST_P(Contract, BadArgumentsAreRefusedAndTouchNothing) {
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    if (!check_device(stage, machine_->limits()).ok()) continue;
    for (const BadCall& bad : bad_calls()) expect_refused(stage, bad);
    if (good_call(stage).workspace.bytes > 0) {
      for (const BadCall& bad : bad_workspaces()) expect_refused(stage, bad);
    }
    const Status good = make(stage, good_call(stage));
    EXPECT_OK(good) << stage.slug << " after bad calls: " << good.to_string();
    EXPECT_FALSE(outputs_untouched()) << stage.slug;
    ASSERT_OK(tensors_.poison_outputs(*machine_));
  }
}

TEST_P(Contract, WorkspaceDependsOnShapesAloneAndIsBounded) {
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    Problem problem = data_.problem;
    problem.num_heads_q = 128;
    problem.num_heads_kv = 1;
    for (const int batch : {1, 128, 4096, 1 << 20}) {
      for (const int pages : {1, 64, 4096}) {
        problem.batch = batch;
        problem.max_pages_per_seq = pages;
        const size_t one_sequence = size_t{4} * 128 * static_cast<size_t>(problem.max_seqlen_k());
        WorkspaceBytes needs;
        ASSERT_OK(workspace_bytes(stage, problem, machine_->limits(), &needs));
        EXPECT_LE(needs.total(), std::max(one_sequence, size_t{1} << 30))
            << stage.slug << " batch " << batch << " pages " << pages;
      }
    }
  }
}

// Asked how much memory a problem needs that nobody can decode, a stage gives an error, never a crash or a
// size.
TEST_P(Contract, QuestionsAboutBadProblemsAreRefused) {
  const std::vector<std::function<void(Problem&)>> changes = {
      [](Problem& p) { p.num_heads_kv = 0; }, [](Problem& p) { p.fixed_split_tokens = 1; },
      [](Problem& p) { p.seqlen_q = p.num_heads_q = 1 << 30; }, [](Problem& p) { p.batch = -1; },
      [](Problem& p) { p.page_size = 0; }};
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    for (const auto& change : changes) {
      Problem problem = data_.problem;
      change(problem);
      WorkspaceBytes needs{1, 2};
      PlanShape shape;
      Prediction prediction;
      const DeviceLimits limits = machine_->limits();
      EXPECT_FALSE(workspace_bytes(stage, problem, limits, &needs).ok());
      EXPECT_FALSE(workspace_bytes(stage, problem, &needs).ok());
      EXPECT_EQ(needs.plan, 1u);
      EXPECT_EQ(needs.scratch, 2u);
      EXPECT_FALSE(plan_shape(stage, problem, limits, &shape).ok());
      EXPECT_FALSE(predict(stage, problem, 64, limits, &prediction).ok());
      EXPECT_FALSE(allocate_workspace(stage, problem, &workspace_).ok());
    }
    Prediction prediction;
    const Status status = predict(stage, data_.problem, -1, machine_->limits(), &prediction);
    EXPECT_NE(status.message().find("total_tokens = -1"), std::string::npos) << status.to_string();
  }
}

// What a stage cannot read is refused by every function, before anything else, and named.
TEST_P(Contract, CacheFormatsThatAStageCannotReadAreRefused) {
  std::vector<const Stage*> all = {&auto_stage(GetParam())};
  for (const Stage& stage : stages(GetParam())) all.push_back(&stage);
  int refused = 0;
  for (const Stage* stage : all) {
    if (!check_device(*stage, machine_->limits()).ok()) continue;
    for (const CacheFormat format : kCacheFormats) {
      const std::string parts[] = {stage->slug, to_string(format)};
      SCOPED_TRACE(parts[0] + " " + parts[1]);
      use_data_of(*stage);
      Call call = good_call(*stage);
      call.problem.cache_format = format;
      if (can_read(*stage, format)) {
        EXPECT_OK(check_cache_format(*stage, call.problem));
        continue;
      }
      ++refused;
      const auto expect = [&](const Status& status) {
        EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status.to_string();
        for (const std::string& part : parts) {
          EXPECT_NE(status.message().find(part), std::string::npos) << status.to_string();
        }
      };
      const DeviceLimits limits = machine_->limits();
      WorkspaceBytes needs{1, 2};
      PlanShape shape;
      Prediction prediction;
      PlanState state;
      HostPlan plan;
      DeviceBuffer workspace;
      expect(check_cache_format(*stage, call.problem));
      expect(workspace_bytes(*stage, call.problem, limits, &needs));
      expect(workspace_bytes(*stage, call.problem, &needs));
      EXPECT_EQ(needs.plan, 1u);
      EXPECT_EQ(needs.scratch, 2u);
      expect(allocate_workspace(*stage, call.problem, &workspace));
      expect(plan_shape(*stage, call.problem, limits, &shape));
      expect(predict(*stage, call.problem, 64, limits, &prediction));
      expect(make(*stage, call));
      // Without a workspace, or with an empty batch, the format is refused just the same.
      expect(plan_decode(*stage, call.problem, call.tensors.seqlens_k, {}));
      expect(decode_planned(*stage, call.problem, call.tensors, {}, {}));
      expect(plan_state(*stage, call.problem, {}, &state));
      expect(read_plan(*stage, call.problem, {}, &plan));
      expect(check_plan(*stage, call.problem, call.tensors.seqlens_k, {}));
      call.problem.batch = 0;
      expect(make(*stage, call));
      EXPECT_TRUE(outputs_untouched());
    }
  }
  EXPECT_GT(refused, 0);
}

TEST(CacheFormats, AreNamedInTheMessage) {
  Stage stage;
  stage.slug = "99_some";
  Problem problem;
  EXPECT_OK(check_cache_format(stage, problem)) << "a stage that lists no formats reads 16 bits";
  stage.cache_formats = {CacheFormat::kFp8Tile128, CacheFormat::kFp8Tensor};
  const Status status = check_cache_format(stage, problem);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(),
            "99_some cannot read a cache of cache_format = 16bit, only fp8_tile128, fp8_tensor");
  problem.cache_format = CacheFormat::kFp8Tensor;
  EXPECT_OK(check_cache_format(stage, problem));
  EXPECT_TRUE(can_read(stage, CacheFormat::kFp8Tensor));
  EXPECT_FALSE(can_read(stage, CacheFormat::k16Bit));
}

TEST(CacheFormats, CountInThePredictedBytes) {
  Problem problem;
  problem.num_heads_kv = 2;
  EXPECT_EQ(cache_bytes(problem, 100), 100.0 * 2 * 1152);
  problem.cache_format = CacheFormat::kFp8Tile128;
  EXPECT_EQ(cache_bytes(problem, 100), 100.0 * 2 * 656);
  problem.cache_format = CacheFormat::kFp8Tensor;
  EXPECT_EQ(cache_bytes(problem, 100), 100.0 * 2 * 576);
}

TEST_P(Contract, LimitsOfNoDeviceAreRefused) {
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    for (const int multiprocessors : {-1, 0, (1 << 16) + 1, std::numeric_limits<int>::max()}) {
      DeviceLimits limits = machine_->limits();
      limits.multiprocessors = multiprocessors;
      WorkspaceBytes needs{1, 2};
      const Status status = workspace_bytes(stage, data_.problem, limits, &needs);
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << stage.slug;
      EXPECT_NE(status.message().find("limits.multiprocessors"), std::string::npos)
          << status.to_string();
      EXPECT_EQ(needs.plan, 1u);
      EXPECT_EQ(needs.scratch, 2u);
      PlanShape shape;
      EXPECT_FALSE(plan_shape(stage, data_.problem, limits, &shape).ok()) << stage.slug;
      Prediction prediction;
      EXPECT_FALSE(predict(stage, data_.problem, 64, limits, &prediction).ok()) << stage.slug;
    }
  }
}

// More pieces than a plan's 32-bit numbers can count.
TEST_P(Contract, TooManyPiecesAreRefused) {
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    if (stage.plan_shape == nullptr) continue;
    Problem problem = data_.problem;
    problem.batch = 1 << 20;
    problem.max_pages_per_seq = 1 << 20;
    problem.fixed_split_tokens = 64;
    WorkspaceBytes needs;
    const Status status = workspace_bytes(stage, problem, machine_->limits(), &needs);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("fixed_split_tokens = 64"), std::string::npos)
        << status.to_string();
  }
}

// No sequence: no work, no memory, no error, whatever the pointers are.
TEST_P(Contract, AnEmptyBatchIsNoError) {
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    if (!check_device(stage, machine_->limits()).ok()) continue;
    SCOPED_TRACE(stage.slug);
    Problem problem = data_.problem;
    problem.batch = 0;
    WorkspaceBytes needs;
    EXPECT_OK(workspace_bytes(stage, problem, &needs));
    EXPECT_EQ(needs.total(), 0u);
    EXPECT_OK(decode(stage, problem, {}));
    EXPECT_OK(decode(stage, problem, tensors_.tensors()));
    EXPECT_OK(plan_decode(stage, problem, nullptr, {}));
    EXPECT_OK(decode_planned(stage, problem, {}, {}, {}));
    EXPECT_OK(check_plan(stage, problem, nullptr, {}));
    if (stage.plan_shape != nullptr) {
      HostPlan plan;
      EXPECT_OK(read_plan(stage, problem, {}, &plan));
    }
    EXPECT_OK(machine_->synchronize());
    EXPECT_TRUE(outputs_untouched());
  }
  Problem problem = data_.problem;
  problem.batch = 0;
  EXPECT_OK(check_paging(*machine_, problem, nullptr, nullptr));
}

TEST_P(Contract, AnUnfitDeviceIsRefused) {
  if (GetParam() != MachineKind::kModel) GTEST_SKIP() << "a GPU cannot be made unfit";
  gpu_model::device().compute_capability = 75;
  for (const Stage& stage : stages(GetParam())) {
    use_data_of(stage);
    const Status status = make(stage, good_call(stage));
    if (stage.on_cpu) {
      EXPECT_OK(status) << stage.slug << " needs no device";
      ASSERT_OK(tensors_.poison_outputs(*machine_));
      continue;
    }
    EXPECT_EQ(status.code(), StatusCode::kUnsupported);
    EXPECT_NE(status.message().find("7.5"), std::string::npos) << status.to_string();
    EXPECT_NE(status.message().find(stage.slug), std::string::npos) << status.to_string();
    EXPECT_TRUE(outputs_untouched());
  }
}

// A call that a stage's own check refuses touches nothing either.
TEST_P(Contract, AStagesOwnCheckIsAsked) {
  Stage stage = *find_stage(GetParam(), "03");
  const Call call = good_call(stage);
  ASSERT_OK(make(stage, call));
  ASSERT_OK(tensors_.poison_outputs(*machine_));
  stage.check = [](const Problem& problem, const DeviceLimits& limits) -> Status {
    EXPECT_EQ(problem.num_heads_q, 6);
    EXPECT_GT(limits.multiprocessors, 0);
    return {StatusCode::kUnsupported, "not today"};
  };
  WorkspaceBytes needs{1, 2};
  for (const Status& status :
       {make(stage, call), workspace_bytes(stage, call.problem, &needs),
        plan_decode(stage, call.problem, call.tensors.seqlens_k, {}),
        decode_planned(stage, call.problem, call.tensors, {}, call.workspace)}) {
    EXPECT_EQ(status.to_string(), "unsupported: not today");
  }
  EXPECT_EQ(needs.plan, 1u);
  EXPECT_TRUE(outputs_untouched());
}

TEST(CheckDevice, SaysWhichComputeCapabilitiesAStageNeeds) {
  Stage stage;
  stage.slug = "06_some";
  const auto refusal = [&](int least, int most, int device) {
    stage.min_compute_capability = least;
    stage.max_compute_capability = most;
    return check_device(stage, {.compute_capability = device}).message();
  };
  const std::string needs = "06_some needs compute capability ";
  EXPECT_EQ(refusal(90, 90, 90), "");
  EXPECT_EQ(refusal(90, 90, 100), needs + "9.0 exactly, the device has 10.0");
  EXPECT_EQ(refusal(90, 90, 89), needs + "9.0 exactly, the device has 8.9");
  EXPECT_EQ(refusal(80, 90, 100), needs + "8.0 to 9.0, the device has 10.0");
  EXPECT_EQ(refusal(80, 1 << 30, 75), needs + "8.0 or newer, the device has 7.5");
}

TEST_P(Contract, PagingIsCheckedOnRequest) {
  const Problem& problem = data_.problem;
  const auto check = [&](const std::vector<int32_t>& lengths, const std::vector<int32_t>& table) {
    DeviceBuffer device_lengths, device_table;
    EXPECT_OK(device_lengths.assign(*machine_, lengths.data(), lengths.size() * 4));
    EXPECT_OK(device_table.assign(*machine_, table.data(), table.size() * 4));
    return check_paging(*machine_, problem, device_table.as<int32_t>(),
                        device_lengths.as<int32_t>());
  };
  EXPECT_OK(check(data_.seqlens_k, data_.block_table));

  std::vector<int32_t> lengths = data_.seqlens_k;
  lengths[1] = static_cast<int32_t>(problem.max_seqlen_k()) + 1;
  Status status = check(lengths, data_.block_table);
  EXPECT_EQ(status.code(), StatusCode::kOutOfRange);
  EXPECT_NE(status.message().find("seqlens_k[1] = " + std::to_string(lengths[1])),
            std::string::npos)
      << status.to_string();
  lengths[1] = -1;
  status = check(lengths, data_.block_table);
  EXPECT_NE(status.message().find("seqlens_k[1] = -1"), std::string::npos) << status.to_string();

  for (const int32_t page : {-1, problem.num_pages}) {
    std::vector<int32_t> table = data_.block_table;
    table[static_cast<size_t>(problem.max_pages_per_seq) + 1] = page;  // sequence 1, slot 1: in use
    status = check(data_.seqlens_k, table);
    EXPECT_EQ(status.code(), StatusCode::kOutOfRange);
    EXPECT_NE(status.message().find("block_table[1, 1] = " + std::to_string(page)),
              std::string::npos)
        << status.to_string();
  }
  // Slots past the end hold garbage, and may.
  EXPECT_EQ(data_.block_table.back(), kGarbagePage);
}

// There are more sequences than the grid has blocks, and more pages than a block has threads. The first error is
// named, wherever the others are. Values just within the bounds are no errors.
TEST_P(Contract, TheFirstPagingErrorIsNamed) {
  Problem problem = data_.problem;
  problem.batch = 7;
  problem.num_pages = 5;
  problem.max_pages_per_seq = 300;
  std::vector<int32_t> lengths(7, 0), table(7 * 300, kGarbagePage);
  lengths[5] = 300 * problem.page_size;
  lengths[6] = 290 * problem.page_size;
  for (size_t i = 5 * 300; i < 6 * 300 + 290; ++i) table[i] = static_cast<int32_t>(i % 5);
  const auto message = [&] {
    DeviceBuffer device_lengths, device_table;
    EXPECT_OK(device_lengths.assign(*machine_, lengths.data(), lengths.size() * 4));
    EXPECT_OK(device_table.assign(*machine_, table.data(), table.size() * 4));
    const Status status =
        check_paging(*machine_, problem, device_table.as<int32_t>(), device_lengths.as<int32_t>());
    return status.message().substr(0, status.message().find(" must"));
  };
  gpu_model::device().max_grid_x = 2;
  EXPECT_EQ(message(), "");
  table[6 * 300 + 289] = 5;
  EXPECT_EQ(message(), "block_table[6, 289] = 5");
  table[6 * 300 + 150] = -1;
  EXPECT_EQ(message(), "block_table[6, 150] = -1");
  lengths[6] = -1;
  EXPECT_EQ(message(), "seqlens_k[6] = -1");
  table[5 * 300 + 299] = 7;
  EXPECT_EQ(message(), "block_table[5, 299] = 7");
}

#ifdef MLA_HAVE_CUDA
// The stream does not wait for the default one, so the verdict must be set up, written and read on the stream.
TEST_P(Contract, PagingIsCheckedOnANonBlockingStream) {
  if (GetParam() != MachineKind::kGpu) GTEST_SKIP() << "the model has no streams";
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  std::vector<int32_t> table = data_.block_table;
  table[1] = -7;
  DeviceBuffer bad_table;
  ASSERT_OK(bad_table.assign(*machine_, table.data(), table.size() * 4));
  for (int i = 0; i < 200; ++i) {
    const DeviceBuffer& each = i % 2 == 0 ? bad_table : tensors_.block_table;
    const Status status = check_paging(*machine_, data_.problem, each.as<int32_t>(),
                                       tensors_.seqlens_k.as<int32_t>(), stream);
    EXPECT_EQ(status.ok(), i % 2 == 1) << i << ": " << status.to_string();
  }
  cudaStreamDestroy(stream);
}
#endif

TEST(Registry, FindsStagesByNameAndNumber) {
  ASSERT_FALSE(stages(MachineKind::kModel).empty());
  EXPECT_EQ(find_stage(MachineKind::kModel, "02")->slug, "02_shared_tiled");
  EXPECT_EQ(find_stage(MachineKind::kModel, "02_shared_tiled")->slug, "02_shared_tiled");
  std::string why_not;
  EXPECT_EQ(find_stage(MachineKind::kModel, "77", &why_not), nullptr);
  EXPECT_NE(
      why_not.find("there is no stage '77'; there are 00_reference, 01_naive, 02_shared_tiled"),
      std::string::npos)
      << why_not;
  if (stages(MachineKind::kGpu).empty()) {
    EXPECT_EQ(find_stage(MachineKind::kGpu, "02", &why_not), nullptr);
    EXPECT_NE(why_not.find("built without the CUDA Toolkit"), std::string::npos) << why_not;
  }
  std::string before;
  for (const Stage& stage : stages(MachineKind::kModel)) {
    EXPECT_LT(before, stage.slug);
    EXPECT_FALSE(stage.idea.empty());
    before = stage.slug;
  }
}

// As in a build with MLA_GPU_STEPS=OFF: this program's only step is one for the model.
std::vector<Stage> step_on_model(MachineKind machine) {
  if (machine == MachineKind::kGpu) return {};
  Stage step = stages(machine).back();
  step.slug = "step_05_9_for_the_test";
  return {step};
}
[[maybe_unused]] const bool step_is_added = (add_steps(step_on_model), true);

TEST(Registry, AStepThatIsBuiltForTheModelAloneIsNamedWhereItIsNot) {
  std::string why_not;
  ASSERT_NE(find_stage(MachineKind::kModel, "step_05_9"), nullptr);
  EXPECT_EQ(find_stage(MachineKind::kGpu, "step_05_9", &why_not), nullptr);
  EXPECT_NE(why_not.find(stages(MachineKind::kGpu).empty()
                             ? "built without the CUDA Toolkit"
                             : "step_05_9_for_the_test was built for the GPU model alone"),
            std::string::npos)
      << why_not;
}

// A stage on the CPU belongs to the model's machine alone, predicts nothing, and is never chosen.
TEST(Registry, AStageOnTheCpuIsNamedWhereItCannotRun) {
  const Stage* stage = find_stage(MachineKind::kModel, "00");
  ASSERT_NE(stage, nullptr);
  EXPECT_TRUE(stage->on_cpu);
  EXPECT_EQ(where(*stage, model_machine()).find("CPU, "), 0u);
  std::string why_not;
  EXPECT_EQ(find_stage(MachineKind::kGpu, "00", &why_not), nullptr);
  EXPECT_EQ(why_not, "00_reference runs on the CPU, and has no kernel for GPUs");
  for (const Stage& other : stages(MachineKind::kGpu)) EXPECT_FALSE(other.on_cpu) << other.slug;
  for (const Stage& other : stages(MachineKind::kModel)) {
    EXPECT_EQ(other.on_cpu, other.predict == nullptr) << other.slug;
    if (!other.on_cpu) {
      EXPECT_EQ(where(other, model_machine()), model_machine().description());
    }
  }
  Problem problem;
  problem.batch = problem.num_pages = problem.max_pages_per_seq = problem.num_heads_q = 1;
  problem.softmax_scale = 1;
  Prediction prediction{.fp32_flop = 7};
  const Status status = predict(*stage, problem, 64, model_machine().limits(), &prediction);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(), "00_reference runs on the CPU: no limit of a GPU binds it");
  EXPECT_EQ(prediction.fp32_flop, 7);
  gpu_model::device().compute_capability = 75;
  Choice choice;
  EXPECT_FALSE(choose(MachineKind::kModel, problem, model_machine().limits(), &choice).ok());
  gpu_model::device() = {};
}

INSTANTIATE_TEST_SUITE_P(Machines, Contract,
                         testing::Values(MachineKind::kModel, MachineKind::kGpu),
                         [](const auto& test) {
                           return std::string(test.param == MachineKind::kModel ? "Model" : "Gpu");
                         });

}  // namespace
}  // namespace mla
