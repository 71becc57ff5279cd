/// @file
/// Steps done by several devices of this process, which hold the pages of one page table together (step_tables.h):
/// each appends the rows of its own pages and decodes over them, and what they make is merged (parallel.h).
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "bench/service/rank_threads.h"
#include "bench/service/real_engine.h"
#include "stages/common/parallel/transport.h"

namespace mla::bench {

/// Makes a rank's end of the group. Called on its thread, by all ranks.
using MakeRankTransport = std::function<Status(int rank, std::unique_ptr<Transport>* transport)>;

/// Ranks of a machine: any number on the model, over threads; GPUs of this host, over NCCL.
/// @return kUnavailable, saying how many there are, if there are fewer GPUs than ranks
Status make_rank_transports(const Machine& machine, int ranks, std::chrono::milliseconds time_limit,
                            MakeRankTransport* make);

/// For which ranks wait for each other.
inline constexpr std::chrono::milliseconds kRankTimeLimit{60'000};

/// The ranks, each a thread with a device of its own, its part of the caches and its end of the group. What engines
/// for several stages have in common.
class DeviceRanks {
 public:
  /// @param num_pages  of one rank; else as LayerCaches::create()
  /// @return LayerCaches::create()'s errors; `make`'s
  static Status create(Machine& machine, int ranks, int num_pages, CacheFormat format, int layers,
                       int distinct, std::chrono::milliseconds time_limit,
                       const MakeRankTransport& make, std::unique_ptr<DeviceRanks>* made);
  ~DeviceRanks();

  int ranks() const { return threads_.ranks(); }
  const CacheShape& shape() const { return shape_; }  ///< Of one rank
  int layers() const { return layers_; }
  int distinct() const { return distinct_; }  ///< Of the rank with the fewest

 private:
  friend class RanksEngine;
  struct Member {
    MakeRankTransport make;  // what the ends of the group have in common, as their hub, lives in it
    std::unique_ptr<LayerCaches> caches;
    std::unique_ptr<Transport> transport;
  };
  DeviceRanks(Machine& machine, int ranks, std::chrono::milliseconds time_limit);

  Machine& machine_;
  CacheShape shape_;
  int layers_ = 0, distinct_ = 0;
  std::shared_ptr<std::vector<Member>> members_;  // [ranks]: each is its thread's
  RankThreads threads_;
};

/// The engine.
class RanksEngine final : public Engine {
 public:
  /// As RealEngine::create(), on every rank.
  /// @param ranks  outlive the engine
  static Status create(DeviceRanks& ranks, const Stage& stage, int heads, bool graphs,
                       std::unique_ptr<RanksEngine>* engine);
  ~RanksEngine() override;
  /// Wall time of the tables, of the slowest rank's copies, and from the ranks' start to the end of the last. The time in
  /// which buffers grow and graphs are made is not in it.
  /// @return the failure of a rank; or that ranks are lost, after the time limit or little more, or after twice that
  ///         where none comes back. Then the ranks are of no more use
  Status step(const StepWork& work, double* seconds) override;
  bool counts_host_time() const override { return true; }
  /// One rank's part, between steps.
  const RealEngine& rank(int rank) const { return *(*engines_)[static_cast<size_t>(rank)]; }

 private:
  explicit RanksEngine(DeviceRanks& ranks);
  using Part = std::function<Status(int rank, RealEngine& engine)>;
  Status each(Part part);

  DeviceRanks& ranks_;
  std::shared_ptr<std::vector<std::unique_ptr<RealEngine>>> engines_;  // [ranks]
  std::vector<StepTables> tables_;
};

}  // namespace mla::bench
