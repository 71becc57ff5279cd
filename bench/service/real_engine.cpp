#include "bench/service/real_engine.h"

#include <algorithm>
#include <string>

#include "bench/measure/statistics.h"
#include "bench/service/checks.h"
#include "bench/service/scale.h"
#include "reference/testing/data_generator.h"

namespace mla::bench {
namespace {

constexpr DType kType = DType::kBFloat16;
constexpr uint64_t kSeed = 1;
constexpr int64_t kRowBytes = kHeadDimQK * 2;
constexpr float kScale = 0.135234f;  // DeepSeek-V3's

// Memory beside the caches: workspaces, of which stage 02's is the largest with 1 GiB, q and out.
constexpr size_t kReserveOfGpu = size_t{4} << 30;
constexpr size_t kReserveOfModel = size_t{1} << 20;

/// `rows` rows of the pool, beginning with row 0.
std::vector<uint16_t> pool_rows(int64_t rows) {
  std::vector<uint16_t> bits;
  bits.reserve(static_cast<size_t>(rows * kHeadDimQK));
  for (int64_t i = 0; i < rows; ++i) {
    const std::vector<uint16_t> row = pool_row(i);
    bits.insert(bits.end(), row.begin(), row.end());
  }
  return bits;
}

/// Query rows: few different ones, in turn, which costs the host little.
std::vector<uint16_t> query_rows(int64_t rows) {
  constexpr int kDistinct = 251;
  std::vector<uint16_t> bits(static_cast<size_t>(rows * kHeadDimQK));
  const auto drawn = static_cast<size_t>(std::min<int64_t>(rows, kDistinct) * kHeadDimQK);
  for (size_t i = 0; i < drawn; ++i) {
    bits[i] = q_bits(kSeed, kType, DataKind::kFlat, 0, 0, static_cast<int>(i / kHeadDimQK),
                     static_cast<int>(i % kHeadDimQK));
  }
  for (size_t i = drawn; i < bits.size(); ++i) bits[i] = bits[i - drawn];
  return bits;
}

/// Grows to at least `bytes`. Graphs that know the old place are of no use then.
Status grow(Machine& machine, size_t bytes, DeviceBuffer* buffer, bool* moved) {
  if (bytes <= buffer->bytes()) return {};
  *moved = true;
  return buffer->allocate(machine, std::max(bytes, buffer->bytes() * 3 / 2));
}

}  // namespace

std::vector<uint16_t> pool_row(int64_t row) {
  std::vector<uint16_t> bits(kHeadDimQK);
  for (int column = 0; column < kHeadDimQK; ++column) {
    bits[static_cast<size_t>(column)] = kv_bits(kSeed, kType, DataKind::kFlat, 0, row, 0, column);
  }
  return bits;
}

Status LayerCaches::create(Machine& machine, int num_pages, CacheFormat format, int layers,
                           int distinct, std::unique_ptr<LayerCaches>* caches) {
  constexpr int kMost = (1 << 30) / kDefaultPageSize;  // rows are counted in 32 bits here and there
  MLA_RETURN_IF_ERROR(check_in("pages", num_pages, 1, kMost));
  MLA_RETURN_IF_ERROR(check_in("layers", layers, 1, 10000));
  if (distinct != 0) MLA_RETURN_IF_ERROR(check_in("distinct caches", distinct, 1, layers));
  const auto bytes = static_cast<size_t>(layer_bytes(num_pages, format));
  const size_t reserve = machine.kind() == MachineKind::kGpu ? kReserveOfGpu : kReserveOfModel;
  const size_t free = machine.free_memory();
  const size_t fit = free > reserve ? (free - reserve) / bytes : 0;
  if (distinct == 0) distinct = static_cast<int>(std::min<size_t>(fit, size_t(layers)));
  if (distinct == 0 || static_cast<size_t>(distinct) > fit) {
    return {StatusCode::kOutOfMemory,
            fmt::format("a layer's cache of {} pages takes {} MiB; of {} MiB free, less {} for the "
                        "rest, {} fit",
                        num_pages, bytes >> 20, free >> 20, reserve >> 20, fit)};
  }
  const CacheShape shape{.num_pages = num_pages, .cache_format = format, .cache_scale = kPoolScale};
  std::unique_ptr<LayerCaches> result(new LayerCaches(shape, layers));
  for (int i = 0; i < distinct; ++i) {
    MLA_RETURN_IF_ERROR(result->memory_.emplace_back().allocate(machine, bytes));
  }
  MLA_RETURN_IF_ERROR(result->fill(machine));
  *caches = std::move(result);
  return {};
}

/// The pool again and again: from the host on the model, where that is quicker; elsewhere by the
/// kernel of an append, from a copy of the pool on the device.
Status LayerCaches::fill(Machine& machine) {
  const std::vector<uint16_t> pool = pool_rows(kPoolRows);
  const int64_t rows = int64_t{num_pages()} * kDefaultPageSize;
  if (machine.kind() == MachineKind::kModel) {
    const void* kept = pool.data();
    std::vector<uint8_t> quantised;
    if (is_quantised(shape_.cache_format)) {
      const Problem problem{.dtype = kType,
                            .cache_format = shape_.cache_format,
                            .cache_scale = shape_.cache_scale,
                            .num_heads_q = 1,
                            .num_pages = kPoolRows / kDefaultPageSize,
                            .max_pages_per_seq = 1,
                            .softmax_scale = kScale};
      MLA_RETURN_IF_ERROR(quantise_cache(problem, kept, shape_.scale_rule, &quantised));
      kept = quantised.data();
    }
    for (DeviceBuffer& memory : memory_) {
      for (int64_t row = 0; row < rows; row += kPoolRows) {
        const int64_t bytes = std::min(kPoolRows, rows - row) * shape_.token_bytes();
        MLA_RETURN_IF_ERROR(machine.copy_to_device(memory.as<char>() + row * shape_.token_bytes(),
                                                   kept, static_cast<size_t>(bytes)));
      }
    }
    return {};
  }
  std::vector<RowRun> runs;
  for (int64_t row = 0; row < rows; row += kMaxRunTokens) {
    runs.push_back({row % kPoolRows, row, kMaxRunTokens, 0});
  }
  DeviceBuffer device_pool, device_runs;
  MLA_RETURN_IF_ERROR(device_pool.assign(machine, pool.data(), pool.size() * sizeof(uint16_t)));
  MLA_RETURN_IF_ERROR(device_runs.assign(machine, runs.data(), runs.size() * sizeof(RowRun)));
  for (DeviceBuffer& memory : memory_) {
    MLA_RETURN_IF_ERROR(write_runs(machine, shape_, device_runs.as<RowRun>(),
                                   static_cast<int64_t>(runs.size()), device_pool.data(),
                                   memory.data(), nullptr));
  }
  return machine.synchronize();
}

Status RealEngine::create(Machine& machine, const Stage& stage, const LayerCaches& caches,
                          int heads, bool graphs, std::unique_ptr<RealEngine>* engine,
                          Transport* transport) {
  MLA_RETURN_IF_ERROR(check_in("heads", heads, 1, 1 << 20));
  std::unique_ptr<RealEngine> result(new RealEngine(machine, stage, caches, transport));
  result->problem_ = {.dtype = kType,
                      .cache_format = caches.shape().cache_format,
                      .cache_scale = caches.shape().cache_scale,
                      .num_heads_q = heads,
                      .num_pages = caches.num_pages(),
                      .softmax_scale = kScale};
  MLA_RETURN_IF_ERROR(check_cache_format(stage, result->problem_));
  MLA_RETURN_IF_ERROR(check_device(stage, machine.limits()));
  if (graphs) MLA_RETURN_IF_ERROR(Replays::create(machine, &result->replays_));
  const std::vector<uint16_t> pool = pool_rows(kPoolRows + caches.layers());
  MLA_RETURN_IF_ERROR(result->pool_.assign(machine, pool.data(), pool.size() * sizeof(uint16_t)));
  *engine = std::move(result);
  return {};
}

ParallelSettings RealEngine::settings() const {
  return {.exchange = exchange_for(problem_.num_heads_q, transport_->ranks()), .own_lengths = true};
}

/// What the step's decodes need beside their tensors.
Status RealEngine::find_needs() {
  if (transport_ == nullptr) return workspace_bytes(stage_, problem_, &needs_);
  return parallel_workspace_bytes(stage_, problem_, settings(), transport_->ranks(), &needs_);
}

Status RealEngine::make_room() {
  problem_.batch = tables_.batch;
  problem_.max_pages_per_seq = tables_.columns;
  bool moved = false;
  const auto queries = static_cast<size_t>(problem_.q_elements()) * sizeof(uint16_t);
  if (queries > q_.bytes()) {
    const std::vector<uint16_t> bits =
        query_rows(2 * int64_t{problem_.batch} * problem_.num_heads_q);
    MLA_RETURN_IF_ERROR(q_.assign(machine_, bits.data(), bits.size() * sizeof(uint16_t)));
    moved = true;
  }
  const auto batch = static_cast<size_t>(problem_.batch);
  const auto grow_to = [&](int64_t elements, size_t size, DeviceBuffer* buffer) {
    return grow(machine_, static_cast<size_t>(elements) * size, buffer, &moved);
  };
  MLA_RETURN_IF_ERROR(grow_to(problem_.out_elements(), sizeof(uint16_t), &out_));
  MLA_RETURN_IF_ERROR(grow_to(problem_.lse_elements(), sizeof(float), &lse_));
  MLA_RETURN_IF_ERROR(grow_to(problem_.block_table_elements(), sizeof(int32_t), &block_table_));
  MLA_RETURN_IF_ERROR(grow(machine_, batch * sizeof(int32_t), &seqlens_, &moved));
  MLA_RETURN_IF_ERROR(grow_to(tables_.most_runs, sizeof(RowRun), &device_runs_));
  MLA_RETURN_IF_ERROR(find_needs());
  MLA_RETURN_IF_ERROR(grow(machine_, needs_.total(), &workspace_, &moved));
  if (moved && replays_ != nullptr) {
    graphs_.clear();
    replays_->clear();
  }
  return {};
}

Tensors RealEngine::tensors() const {
  return {.q = q_.data(),
          .kv_cache = caches_.data(caches_.layers() - 1),
          .block_table = block_table_.as<int32_t>(),
          .seqlens_k = seqlens_.as<int32_t>(),
          .out = out_.data(),
          .lse = lse_.as<float>()};
}

Status RealEngine::upload() {
  const std::vector<int32_t>& data = tables_.data;
  const std::vector<RowRun>& runs = tables_.runs;
  const size_t entries = tables_.entries();
  MLA_RETURN_IF_ERROR(
      uploads_.copy(block_table_.data(), data.data(), entries * sizeof(int32_t), stream()));
  MLA_RETURN_IF_ERROR(uploads_.copy(seqlens_.data(), data.data() + entries,
                                    (data.size() - entries) * sizeof(int32_t), stream()));
  if (runs.empty()) return {};
  return uploads_.copy(device_runs_.data(), runs.data(), runs.size() * sizeof(RowRun), stream());
}

RealEngine::Arguments RealEngine::arguments() const {
  return {problem_,
          tensors(),
          device_runs_.as<RowRun>(),
          static_cast<int64_t>(tables_.runs.size()),
          needs_.plan_in(workspace_),
          needs_.scratch_in(workspace_)};
}

/// Plan, appends and decodes. What differs between steps of one size lies in device memory.
Status RealEngine::enqueue(const Arguments& given, Stream stream) const {
  const auto& [problem, tensors, runs, num_runs, plan, scratch] = given;
  MLA_RETURN_IF_ERROR(
      transport_ == nullptr
          ? plan_decode(stage_, problem, tensors.seqlens_k, plan, stream)
          : plan_parallel(stage_, problem, tensors, settings(), *transport_, plan, stream));
  Tensors layer = tensors;
  for (int i = 0; i < caches_.layers(); ++i) {
    if (num_runs > 0) {
      MLA_RETURN_IF_ERROR(write_runs(machine_, caches_.shape(), runs, num_runs,
                                     pool_.as<char>() + i * kRowBytes, caches_.data(i), stream));
    }
    layer.kv_cache = caches_.data(i);
    MLA_RETURN_IF_ERROR(transport_ == nullptr
                            ? decode_planned(stage_, problem, layer, plan, scratch, stream)
                            : decode_parallel_planned(stage_, problem, layer, settings(),
                                                      *transport_, plan, scratch, stream));
  }
  return {};
}

/// A graph of this size, or else launch by launch; then waits.
Status RealEngine::run() {
  const auto known = graphs_.find(size());
  const bool by_graph = tables_.padded && known != graphs_.end();
  MLA_RETURN_IF_ERROR(by_graph ? replays_->launch(known->second) : enqueue(arguments(), stream()));
  if (by_graph) ++replayed_;
  return transport_ != nullptr ? transport_->wait(stream()) : machine_.synchronize();
}

/// The first of a size has loaded its kernels, which a capture must not.
Status RealEngine::keep() {
  return replays_->capture(
      [this, given = arguments()](Stream stream) { return enqueue(given, stream); },
      &graphs_[size()]);
}

Status RealEngine::step(const StepWork& work, double* seconds) {
  if (work.empty()) return {StatusCode::kInvalidArgument, "a step decodes at least one sequence"};
  auto begin = WallClock::now();
  make_tables(work, pads(work), {&tables_, 1});
  *seconds = seconds_since(begin);
  MLA_RETURN_IF_ERROR(make_room());
  begin = WallClock::now();
  MLA_RETURN_IF_ERROR(upload());
  MLA_RETURN_IF_ERROR(run());
  *seconds += seconds_since(begin);
  return wants_graph() ? keep() : Status();
}

}  // namespace mla::bench
