/// @file
/// Steps done by kernels, on a GPU or on the model of one: every layer's rows appended to its paged
/// cache, which quantises them if the cache is a quantised one, and every layer decoded, by one plan per step; or
/// by one of several ranks, which decode a part of the pages each (ranks_engine.h).
///
/// Attention only. There are no weights and no prefill: the rows of a prompt appear as if another
/// machine had computed them. Every row is drawn from a small pool (row_of()), so that a test can
/// tell what must be where.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "bench/service/engine.h"
#include "bench/service/replay.h"
#include "bench/service/step_tables.h"
#include "reference/float8.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/machine/upload_ring.h"
#include "stages/common/parallel/parallel.h"
#include "stages/common/stage.h"

namespace mla::bench {

/// The layers' caches, filled with random finite rows once: on zeros everything is faster.
class LayerCaches {
 public:
  /// @param format    of all of them
  /// @param layers    each appended to and decoded in every step
  /// @param distinct  caches in memory, 1 ... layers; layer i uses cache i % distinct. 0: as many
  ///                  as the free memory holds
  /// @return kInvalidArgument; kOutOfMemory if not even one fits
  static Status create(Machine& machine, int num_pages, CacheFormat format, int layers,
                       int distinct, std::unique_ptr<LayerCaches>* caches);

  const CacheShape& shape() const { return shape_; }
  int num_pages() const { return shape_.num_pages; }
  int layers() const { return layers_; }
  int distinct() const { return static_cast<int>(memory_.size()); }
  /// [num_pages, 64, 1, 576], bf16; of a quantised format rows of its bytes
  void* data(int layer) const { return memory_[static_cast<size_t>(layer % distinct())].data(); }

 private:
  LayerCaches(const CacheShape& shape, int layers) : shape_(shape), layers_(layers) {}
  Status fill(Machine& machine);
  CacheShape shape_;
  int layers_;
  std::vector<DeviceBuffer> memory_;
};

/// Bytes of one layer's cache.
inline int64_t layer_bytes(int64_t num_pages, CacheFormat format) {
  return CacheShape{.num_pages = 1, .cache_format = format}.page_bytes() * num_pages;
}

/// Bits of row `row` of the pool, [576] values of N(0,1)/10 in bf16. Layer i draws from the rows
/// i ... i + kPoolRows - 1.
std::vector<uint16_t> pool_row(int64_t row);
/// The scale of a cache of fp8_tensor: no value of the pool is larger than 0.6.
inline constexpr float kPoolScale = 0.6f / kLargestE4M3;

/// The engine.
class RealEngine final : public Engine {
 public:
  /// @param heads   query heads
  /// @param graphs  A step that brings no prompt in is padded to the next power of two of sequences and of
  ///                pages, and from the second of its size on is one CUDA graph.
  /// @param transport  of a rank, its end of the group, which outlives the engine: the caches hold the rank's own
  ///                   pages alone. Null: a device that holds all of them
  /// @return an error of check_cache_format(), or of check_device()
  static Status create(Machine& machine, const Stage& stage, const LayerCaches& caches, int heads,
                       bool graphs, std::unique_ptr<RealEngine>* engine,
                       Transport* transport = nullptr);
  /// Wall time from making the tables to a synchronisation at the end. The time in which buffers grow and graphs are
  /// made is not in it.
  Status step(const StepWork& work, double* seconds) override;
  bool counts_host_time() const override { return true; }

  /// @name A step in its parts
  /// What step() does, in this order. Ranks do each part together: no one may allocate memory, which can wait for
  /// all devices, while another waits for it in an exchange.
  /// @{
  /// Whether the tables of such a step are to be padded.
  bool pads(const StepWork& work) const { return replays_ != nullptr && brings_no_prompt(work); }
  /// What make_tables() fills.
  StepTables& tables() { return tables_; }
  Status make_room();
  Status upload();
  Status run();  ///< Until it is done.
  /// Whether the step is to be kept as a graph: one of its size is wanted, and there is none.
  bool wants_graph() const { return tables_.padded && !graphs_.contains(size()); }
  Status keep();
  /// @}

  /// Graphs that are kept, and steps that were done by one.
  int64_t graphs() const { return static_cast<int64_t>(graphs_.size()); }
  int64_t replayed() const { return replayed_; }

  /// @name The last decode of the last step
  /// Of a rank: its own part of the problem's tokens, and outputs of the heads that it merges.
  /// @{
  const Problem& problem() const { return problem_; }
  Tensors tensors() const;
  /// @}

 private:
  RealEngine(Machine& machine, const Stage& stage, const LayerCaches& caches, Transport* transport)
      : machine_(machine),
        stage_(stage),
        caches_(caches),
        transport_(transport),
        uploads_(machine) {}
  ParallelSettings settings() const;
  Status find_needs();
  /// What the launches of a step are given: all that a graph keeps of them.
  struct Arguments {
    Problem problem;
    Tensors tensors;
    const RowRun* runs;
    int64_t num_runs;
    Workspace plan, scratch;
  };
  Arguments arguments() const;
  Status enqueue(const Arguments& given, Stream stream) const;
  std::pair<int, int> size() const { return {problem_.batch, problem_.max_pages_per_seq}; }
  Stream stream() const { return replays_ == nullptr ? nullptr : replays_->stream(); }

  Machine& machine_;
  const Stage& stage_;
  const LayerCaches& caches_;
  Transport* transport_;
  Problem problem_;
  StepTables tables_;
  DeviceBuffer pool_;           // [kPoolRows + layers, 576]
  DeviceBuffer q_, out_, lse_;  // of the largest batch so far
  DeviceBuffer block_table_, seqlens_, device_runs_, workspace_;
  WorkspaceBytes needs_;                       // of the step
  std::unique_ptr<Replays> replays_;           // null: no graphs
  std::map<std::pair<int, int>, int> graphs_;  // by batch and width of the table
  int64_t replayed_ = 0;
  UploadRing uploads_;  // first to go: it waits for its copies
};

}  // namespace mla::bench
