#include "bench/service/ranks_engine.h"

#include <algorithm>
#include <utility>

#include "bench/measure/statistics.h"
#include "stages/common/machine/gpus.h"
#include "stages/common/parallel/nccl_transport.h"

namespace mla::bench {

Status make_rank_transports(const Machine& machine, int ranks, std::chrono::milliseconds time_limit,
                            MakeRankTransport* make) {
  if (machine.kind() == MachineKind::kModel) {
    const auto ends = std::make_shared<std::vector<std::unique_ptr<Transport>>>();
    MLA_RETURN_IF_ERROR(make_thread_transports(ranks, time_limit, ends.get()));
    *make = [ends](int rank, std::unique_ptr<Transport>* transport) {
      *transport = std::move((*ends)[static_cast<size_t>(rank)]);
      return Status();
    };
    return {};
  }
  if (const int gpus = gpu_count(); gpus < ranks) {
    return {StatusCode::kUnavailable, too_few_gpus(ranks, gpus)};
  }
  std::unique_ptr<Hub> opened;
  MLA_RETURN_IF_ERROR(open_hub("127.0.0.1:0", ranks, time_limit, &opened));
  *make = [hub = std::shared_ptr<Hub>(std::move(opened)), ranks, time_limit](
              int rank, std::unique_ptr<Transport>* transport) {
    std::unique_ptr<Rendezvous> rendezvous;
    MLA_RETURN_IF_ERROR(join_hub(hub->address(), rank, ranks, time_limit, &rendezvous));
    return make_nccl_transport(std::move(rendezvous), transport);
  };
  return {};
}

DeviceRanks::DeviceRanks(Machine& machine, int ranks, std::chrono::milliseconds time_limit)
    : machine_(machine),
      members_(std::make_shared<std::vector<Member>>(static_cast<size_t>(ranks))),
      threads_(ranks, time_limit) {}

Status DeviceRanks::create(Machine& machine, int ranks, int num_pages, CacheFormat format,
                           int layers, int distinct, std::chrono::milliseconds time_limit,
                           const MakeRankTransport& make, std::unique_ptr<DeviceRanks>* made) {
  std::unique_ptr<DeviceRanks> result(new DeviceRanks(machine, ranks, time_limit));
  const auto fill = [=, members = result->members_, &machine](int rank) -> Status {
    if (machine.kind() == MachineKind::kGpu) MLA_RETURN_IF_ERROR(use_gpu(rank));
    return LayerCaches::create(machine, num_pages, format, layers, distinct,
                               &(*members)[static_cast<size_t>(rank)].caches);
  };
  MLA_RETURN_IF_ERROR(result->threads_.each(fill));
  // Nobody waits for another while it fills its caches.
  MLA_RETURN_IF_ERROR(result->threads_.each([make, members = result->members_](int rank) {
    Member& member = (*members)[static_cast<size_t>(rank)];
    member.make = make;
    return make(rank, &member.transport);
  }));
  const LayerCaches& first = *result->members_->front().caches;
  result->shape_ = first.shape();
  result->layers_ = first.layers();
  result->distinct_ = first.distinct();
  for (const Member& member : *result->members_) {
    result->distinct_ = std::min(result->distinct_, member.caches->distinct());
  }
  *made = std::move(result);
  return {};
}

DeviceRanks::~DeviceRanks() {
  threads_.clean_up([members = members_](int rank) {
    Member& member = (*members)[static_cast<size_t>(rank)];
    member.transport.reset();
    member = {};
    return Status();
  });
}

RanksEngine::RanksEngine(DeviceRanks& ranks)
    : ranks_(ranks),
      engines_(std::make_shared<std::vector<std::unique_ptr<RealEngine>>>(
          static_cast<size_t>(ranks.ranks()))),
      tables_(static_cast<size_t>(ranks.ranks())) {}

Status RanksEngine::create(DeviceRanks& ranks, const Stage& stage, int heads, bool graphs,
                           std::unique_ptr<RanksEngine>* engine) {
  std::unique_ptr<RanksEngine> result(new RanksEngine(ranks));
  MLA_RETURN_IF_ERROR(
      ranks.threads_.each([&machine = ranks.machine_, &stage, heads, graphs,
                           members = ranks.members_, engines = result->engines_](int rank) {
        const DeviceRanks::Member& member = (*members)[static_cast<size_t>(rank)];
        return RealEngine::create(machine, stage, *member.caches, heads, graphs,
                                  &(*engines)[static_cast<size_t>(rank)], member.transport.get());
      }));
  *engine = std::move(result);
  return {};
}

RanksEngine::~RanksEngine() {
  ranks_.threads_.clean_up([engines = engines_](int rank) {  // its graphs, before the transport
    (*engines)[static_cast<size_t>(rank)].reset();
    return Status();
  });
}

/// Every rank does its part; who fails tells those that wait for it in an exchange.
Status RanksEngine::each(Part part) {
  return ranks_.threads_.each(
      [part = std::move(part), engines = engines_, members = ranks_.members_](int rank) {
        const auto index = static_cast<size_t>(rank);
        const Status status = part(rank, *(*engines)[index]);
        if (!status.ok()) (*members)[index].transport->fail(status);
        return status;
      });
}

Status RanksEngine::step(const StepWork& work, double* seconds) {
  if (work.empty()) return {StatusCode::kInvalidArgument, "a step decodes at least one sequence"};
  MLA_RETURN_IF_ERROR(ranks_.threads_.failure());  // a lost rank may still be at its tables
  RealEngine& first = *engines_->front();
  auto begin = WallClock::now();
  make_tables(work, first.pads(work), tables_);
  *seconds = seconds_since(begin);
  for (size_t rank = 0; rank < tables_.size(); ++rank) {
    std::swap((*engines_)[rank]->tables(), tables_[rank]);  // whose memory the next step uses
  }
  // Memory first, on all ranks: then none waits for it while another is in an exchange.
  const auto copying = std::make_shared<std::vector<double>>(tables_.size());
  const auto get_ready = [copying](int rank, RealEngine& engine) -> Status {
    MLA_RETURN_IF_ERROR(engine.make_room());
    const auto start = WallClock::now();
    const Status status = engine.upload();
    (*copying)[static_cast<size_t>(rank)] = seconds_since(start);
    return status;
  };
  MLA_RETURN_IF_ERROR(each(get_ready));
  *seconds += *std::max_element(copying->begin(), copying->end());
  begin = WallClock::now();
  MLA_RETURN_IF_ERROR(each([](int, RealEngine& engine) { return engine.run(); }));
  *seconds += seconds_since(begin);
  if (!first.wants_graph()) return {};
  return each([](int, RealEngine& engine) { return engine.keep(); });
}

}  // namespace mla::bench
