// How ranks are started: by a launcher's environment, or as processes, of which one may be killed.
#include "bench/parallel/ranks.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <ifaddrs.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <thread>

#include "bench/parallel/parallel_run.h"
#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

using std::chrono::milliseconds;

// Environment variables for the length of a test.
class Environment {
 public:
  explicit Environment(std::vector<std::pair<const char*, const char*>> values)
      : values_(std::move(values)) {
    for (const auto& [name, value] : values_) setenv(name, value, 1);
  }
  ~Environment() {
    for (const auto& [name, value] : values_) unsetenv(name);
  }

 private:
  std::vector<std::pair<const char*, const char*>> values_;
};

// A case for two ranks.
Status case_of(const std::string& shape, const std::string& mode, ParallelCase* one) {
  one->mode = mode;
  MLA_RETURN_IF_ERROR(parse_shape(shape, &one->shape));
  return divide(mode, 2, &one->division);
}

TEST(Seat, IsWhatTheLauncherSays) {
  std::optional<Seat> seat;
  ASSERT_OK(seat_of_environment(&seat));
  EXPECT_FALSE(seat);
  {
    const Environment mpirun({{"OMPI_COMM_WORLD_RANK", "5"},
                              {"OMPI_COMM_WORLD_SIZE", "16"},
                              {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                              {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                              {"MLA_HUB", "head:4711"}});
    ASSERT_OK(seat_of_environment(&seat));
    ASSERT_TRUE(seat);
    EXPECT_EQ(seat->rank, 5);
    EXPECT_EQ(seat->ranks, 16);
    EXPECT_EQ(seat->local_rank, 1);
    EXPECT_EQ(seat->hub, "head:4711");
    const Environment own({{"MLA_RANK", "3"}, {"MLA_RANKS", "4"}});  // these take precedence
    ASSERT_OK(seat_of_environment(&seat));
    EXPECT_EQ(seat->rank, 3);
    EXPECT_EQ(seat->ranks, 4);
  }
  const Environment pmi({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}});
  ASSERT_OK(seat_of_environment(&seat));
  EXPECT_EQ(seat->local_rank, 1);
  EXPECT_EQ(seat->hub, "127.0.0.1:29517");
}

TEST(Seat, AnInvalidOneIsRefused) {
  std::optional<Seat> seat;
  const auto refused = [&](std::vector<std::pair<const char*, const char*>> values) {
    const Environment environment(std::move(values));
    const Status status = seat_of_environment(&seat);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(refused({{"MLA_RANK", "x"}, {"MLA_RANKS", "2"}}), "MLA_RANK=x must be a number from 0");
  EXPECT_EQ(refused({{"MLA_RANK", "-1"}, {"MLA_RANKS", "2"}}),
            "MLA_RANK=-1 must be a number from 0");
  EXPECT_EQ(refused({{"MLA_RANK", "2"}, {"MLA_RANKS", "2"}}),
            "MLA_RANK=2 must be less than MLA_RANKS=2");
  EXPECT_EQ(refused({{"MLA_RANK", "0"}}), "MLA_RANK is set, and no number of ranks");
  EXPECT_EQ(refused({{"PMI_SIZE", "2"}}), "PMI_SIZE is set, and no number of this rank");
  EXPECT_EQ(refused({{"PMI_RANK", "1"}, {"PMI_SIZE", "4"}, {"MPI_LOCALNRANKS", "2"}}),
            "MPI_LOCALNRANKS=2 of PMI_SIZE=4: for several hosts MLA_HUB must say where rank 0 "
            "listens, as host:port");
}

TEST(Gpu, IsTheOneThatALauncherShows) {
  EXPECT_EQ(gpu_of_rank(3, 8, false), 3);
  EXPECT_EQ(gpu_of_rank(0, 2, false), 0);
  EXPECT_EQ(gpu_of_rank(3, 1, false), 0);
  EXPECT_EQ(gpu_of_rank(3, 2, false), 3);  // there is no such GPU, and CUDA says so
  EXPECT_EQ(gpu_of_rank(3, 2, true), 1);
  EXPECT_EQ(gpu_of_rank(3, 8, true), 3);
  EXPECT_EQ(gpu_of_rank(3, 0, true), 3);  // CUDA says that there is none
}

// What a rank does: it joins, and exchanges data with the others. Returns its exit code.
int talk(const Seat& seat, milliseconds limit, int killed) {
  std::unique_ptr<Rendezvous> world, group;
  std::unique_ptr<Hub> hub;
  if (!join_hub(seat.hub, seat.rank, seat.ranks, limit, &world).ok()) return 10;
  if (!join_group(*world, seat.hub, seat.rank / 2, 2, &hub, &group).ok()) return 11;
  std::vector<std::string> all;
  if (!group->share(std::to_string(seat.rank), &all).ok()) return 12;
  const int first = seat.rank / 2 * 2;
  if (all[0] != std::to_string(first) || all[1] != std::to_string(first + 1)) return 13;
  // Otherwise another rank could learn of the killed one from its own group first, and leave.
  if (!world->share("", &all).ok()) return 16;
  if (seat.rank == killed) raise(SIGKILL);
  const Status last = world->share("", &all);
  if (killed < 0) return last.ok() ? 0 : 14;
  return last.message() == "rank " + std::to_string(killed) + " is gone: its connection ended" ? 20
                                                                                               : 15;
}

TEST(Processes, MeetInGroups) {
  int code = -1;
  ASSERT_OK(run_processes(
      4, milliseconds(20000), [](const Seat& seat) { return talk(seat, milliseconds(20000), -1); },
      &code));
  EXPECT_EQ(code, 0);
  ASSERT_OK(run_threads(
      4, milliseconds(20000), [](const Seat& seat) { return talk(seat, milliseconds(20000), -1); },
      &code));
  EXPECT_EQ(code, 0);
}

// From the first fork on nobody else gets the hub's port, and no rank keeps it when the hub is gone.
TEST(Processes, TheHubsPortIsKept) {
  int code = -1;
  ASSERT_OK(run_processes(
      8, milliseconds(20000),
      [](const Seat& seat) {
        std::unique_ptr<Hub> hub;
        if (open_hub(seat.hub, seat.ranks, milliseconds(20000), &hub).ok()) return 30;
        for (int fd = 0; fd < 256; ++fd) {
          int listens = 0;
          socklen_t length = sizeof listens;
          if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0 && listens != 0) {
            return 31;
          }
        }
        return talk(seat, milliseconds(20000), -1);
      },
      &code));
  EXPECT_EQ(code, 0);
}

// The address of the group's hub, where all ranks meet at `world`.
std::string group_address(const std::string& world) {
  constexpr milliseconds kLimit{8000};
  std::unique_ptr<Hub> hub;
  const Status opened = open_hub(world, 2, kLimit, &hub);
  EXPECT_OK(opened);
  if (!opened.ok()) return "";
  std::string address;
  const auto meet = [&](int rank) {
    std::unique_ptr<Rendezvous> all, group;
    std::unique_ptr<Hub> own;
    EXPECT_OK(join_hub(hub->address(), rank, 2, kLimit, &all));
    if (all == nullptr) return;
    EXPECT_OK(join_group(*all, hub->address(), 0, 2, &own, &group));
    EXPECT_EQ(own != nullptr, rank == 0);
    if (own != nullptr) address = own->address();
    std::vector<std::string> met;
    EXPECT_OK(all->share("", &met));
  };
  std::thread other(meet, 1);
  meet(0);
  other.join();
  return address;
}

TEST(Groups, MeetWhereTheirFirstRankIsFound) {
  const auto host_of = [](const std::string& address) {
    return address.substr(0, address.rfind(':'));
  };
  EXPECT_EQ(host_of(group_address("127.0.0.1:0")), "127.0.0.1");
  // By the loopback a rank is on the hub's host, which the others know by that name.
  EXPECT_EQ(host_of(group_address("127.0.0.2:0")), "127.0.0.2");
  EXPECT_EQ(host_of(group_address("localhost:0")), "localhost");
  // From elsewhere it is found where it comes from, and not at a name that may lead the others to themselves.
  ifaddrs* interfaces = nullptr;
  ASSERT_EQ(getifaddrs(&interfaces), 0);
  for (const ifaddrs* one = interfaces; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_addr->sa_family != AF_INET) continue;
    char text[INET_ADDRSTRLEN] = {};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr, text,
              sizeof text);
    EXPECT_EQ(host_of(group_address(std::string(text) + ":0")), text);
  }
  freeifaddrs(interfaces);
}

TEST(Groups, OneThatCannotTakePartSaysWhyAtOnce) {
  const auto begin = std::chrono::steady_clock::now();
  constexpr milliseconds kLimit{60000};
  // An address of this process's own, so that nobody takes the port meanwhile.
  const int pid = getpid();
  const std::string own =
      "127.78." + std::to_string(pid / 250 % 250) + "." + std::to_string(pid % 250 + 1) + ":0";
  for (const int absent : {0, 1}) {  // 0 is to open the hub
    std::unique_ptr<HubPlace> place;
    ASSERT_OK(take_hub_place(own, &place));
    const std::string address = place->address();
    place.reset();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 3; ++rank) {
      threads.emplace_back([&, rank] {
        if (rank == absent) {
          return decline({rank, 3, rank, address}, kLimit, {StatusCode::kUnavailable, "no GPU"});
        }
        std::unique_ptr<Hub> hub;
        if (rank == 0) {
          EXPECT_OK(open_hub(address, 3, kLimit, &hub));
        }
        std::unique_ptr<Rendezvous> world;
        std::vector<std::string> all;
        Status status = join_hub(address, rank, 3, kLimit, &world);
        if (status.ok()) status = world->share("", &all);
        EXPECT_EQ(status.message(),
                  "rank " + std::to_string(absent) + " failed: unavailable: no GPU");
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(40));
}

// Another transport, whose failures are counted.
class Watched final : public Transport {
 public:
  Watched(std::unique_ptr<Transport> transport, std::atomic<int>* fails)
      : transport_(std::move(transport)), fails_(fails) {}
  int rank() const override { return transport_->rank(); }
  int ranks() const override { return transport_->ranks(); }
  Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) override {
    return transport_->all_gather(send, receive, bytes, stream);
  }
  Status all_to_all(const void* send, void* receive, size_t bytes, Stream stream) override {
    return transport_->all_to_all(send, receive, bytes, stream);
  }
  Status reduce_scatter(const float* send, float* receive, size_t count, Stream stream) override {
    return transport_->reduce_scatter(send, receive, count, stream);
  }
  Status join(Stream stream) override { return transport_->join(stream); }
  Status wait(Stream stream) override { return transport_->wait(stream); }
  void fail(const Status& why) override {
    ++*fails_;
    transport_->fail(why);
  }

 private:
  std::unique_ptr<Transport> transport_;
  std::atomic<int>* fails_;
};

// Two ranks on the model, of which rank 1 has other options. Returns rank 0's exit code, and how often each rank's
// transport was told of a failure.
int run_two(const ParallelOptions& options, const ParallelOptions& other,
            std::atomic<int> (&fails)[2]) {
  std::vector<std::unique_ptr<Transport>> ends;
  EXPECT_OK(make_thread_transports(2, options.time_limit, &ends));
  const MakeTransport make = [&](const Seat& own, int, std::unique_ptr<Rendezvous>,
                                 std::unique_ptr<Transport>* transport, NcclApi**) {
    const auto rank = static_cast<size_t>(own.rank);
    *transport = std::make_unique<Watched>(std::move(ends[rank]), &fails[rank]);
    return Status();
  };
  int code = -1, codes[2] = {-1, -1};
  EXPECT_OK(run_threads(
      2, options.time_limit,
      [&](const Seat& seat) {
        nlohmann::ordered_json report;
        return codes[seat.rank] = run_rank(seat.rank == 0 ? options : other, seat, make, &report);
      },
      &code));
  EXPECT_NE(codes[1], 0);
  return codes[0];
}

TEST(Ranks, OneThatFailsTellsTheOthersAtOnce) {
  const auto begin = std::chrono::steady_clock::now();
  ParallelOptions options;
  options.stage = "04";
  options.time_limit = milliseconds(60000);
  ParallelCase one;
  ASSERT_OK(case_of("h8_q1_b2_k130", "context", &one));
  options.cases = {one};
  ParallelOptions other = options;
  other.stage = "77";  // it cannot begin
  std::atomic<int> fails[2] = {0, 0};
  EXPECT_EQ(run_two(options, other, fails), 2);
  other = options;
  // It fails before the exchange, and tells its group, too.
  other.cases[0].shape.spec.num_heads_q = 1;
  other.cases[0].division.settings.exchange = Exchange::kAllToAll;
  EXPECT_EQ(run_two(options, other, fails), 1);
  EXPECT_GT(fails[1], 0);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(40));
}

TEST(RankClock, TellsItsErrors) {
  std::string why_not;
  Machine* const machine = find_machine(MachineKind::kModel, &why_not);
  ASSERT_NE(machine, nullptr);
  Status told, waited;
  std::unique_ptr<RankClock> clock;
  ASSERT_OK(make_rank_clock(
      *machine, [&](Stream) { return waited; }, &clock, [&](const Status& why) { told = why; }));
  int handle = -1;
  EXPECT_EQ(clock
                ->prepare([](Stream) { return Status(StatusCode::kCudaError, "it burns"); }, true,
                          &handle)
                .message(),
            "it burns");
  EXPECT_EQ(told.message(), "it burns");
  ASSERT_OK(clock->prepare([](Stream) { return Status(); }, true, &handle));
  waited = {StatusCode::kCudaError, "it hangs"};
  EXPECT_EQ(clock->run(handle, 1, nullptr).message(), "it hangs");
  EXPECT_EQ(told.message(), "it hangs");
}

TEST(Processes, OneThatIsKilledIsToldToTheOthersAtOnce) {
  const auto begin = std::chrono::steady_clock::now();
  std::string codes;
  for (const int killed : {1, 2}) {  // rank 2 keeps its group's hub
    int code = -1;
    ASSERT_OK(run_processes(
        4, milliseconds(60000),
        [&](const Seat& seat) { return talk(seat, milliseconds(60000), killed); }, &code));
    EXPECT_TRUE(code == 20 || code == 128 + SIGKILL) << code;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(40));
}

TEST(Processes, OneThatHangsIsEnded) {
  int code = -1;
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_OK(run_processes(
      2, milliseconds(50),
      [](const Seat& seat) {
        if (seat.rank == 1) return 7;
        for (;;) pause();
      },
      &code));
  EXPECT_EQ(code, 7);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

// ---- What rows say

std::vector<Problem> decoded;
const Stage* decodes = nullptr;

TEST(DecodedProblems, AreWhatAStageIsAsked) {
  decodes = find_stage(MachineKind::kModel, "04");
  ASSERT_NE(decodes, nullptr);
  Stage stage = *decodes;
  stage.decode = [](const Problem& problem, const Tensors& tensors, const DevicePlan& plan,
                    void* scratch, const DeviceLimits& limits, Stream stream) {
    decoded.push_back(problem);
    return decodes->decode(problem, tensors, plan, scratch, limits, stream);
  };
  for (const char* name : {"h4_q1_k200+3+70", "h4_q3_k200+3+70_causal", "h4_q3_k200+3+70"}) {
    for (const int ranks : {1, 2, 3}) {
      for (const int slices : {1, 2, 5}) {
        for (const int turn : {0, 1}) {
          SCOPED_TRACE(std::string(name) + " " + std::to_string(ranks) + " " +
                       std::to_string(slices) + " " + std::to_string(turn));
          Shape shape;
          ASSERT_OK(parse_shape(name, &shape));
          Division division;
          division.pages = ranks;
          division.settings = {turn, Exchange::kAllGather, slices};
          RankData data;
          ASSERT_OK(make_rank_data(model_machine(), make_data_set(shape.spec), division, 0, &data));
          std::vector<std::unique_ptr<Transport>> transports;
          ASSERT_OK(make_thread_transports(ranks, milliseconds(100), &transports));
          size_t bytes = 0;
          ASSERT_OK(parallel_workspace_bytes(stage, data.problem, data.settings, ranks, &bytes));
          DeviceBuffer workspace;
          ASSERT_OK(workspace.allocate(model_machine(), bytes));
          decoded.clear();
          ASSERT_OK(decode_share(stage, data.problem, data.tensors, data.settings, *transports[0],
                                 workspace));
          const auto told = decoded_problems(data.problem, data.settings, ranks);
          ASSERT_EQ(told.size(), decoded.size());
          for (size_t i = 0; i < told.size(); ++i) {
            EXPECT_EQ(told[i].batch, decoded[i].batch);
            EXPECT_EQ(told[i].seqlen_q, decoded[i].seqlen_q);
            EXPECT_EQ(told[i].num_heads_q, decoded[i].num_heads_q);
            EXPECT_EQ(told[i].causal, decoded[i].causal);
            EXPECT_EQ(told[i].max_pages_per_seq, decoded[i].max_pages_per_seq);
          }
        }
      }
    }
  }
}

TEST(SameBits, AreNotEqualNumbers) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const RankOutputs first{{1, 2}, {0.0f, nan}};
  EXPECT_OK(same_bits(first, first));
  RankOutputs other = first;
  other.lse[0] = -0.0f;
  EXPECT_EQ(same_bits(first, other).message(), "lse[0]: a second decode has other bits");
  other = first;
  other.out[1] = 3;
  EXPECT_EQ(same_bits(first, other).message(), "out[1]: a second decode has other bits");
  other = first;
  other.out.pop_back();
  EXPECT_EQ(same_bits(first, other).message(), "out has another size");
}

// Rank 0's end of a group, whose third exchange brings it other last bits.
class Inexact final : public Transport {
 public:
  explicit Inexact(std::unique_ptr<Transport> transport) : transport_(std::move(transport)) {}
  int rank() const override { return transport_->rank(); }
  int ranks() const override { return transport_->ranks(); }
  Status all_gather(const void* send, void* receive, size_t bytes, Stream stream) override {
    const Status status = transport_->all_gather(send, receive, bytes, stream);
    if (rank() == 0 && ++calls_ == 3) {
      auto* from_rank_1 = reinterpret_cast<uint16_t*>(static_cast<char*>(receive) + bytes);
      for (int i = 0; i < kHeadDimV; ++i) from_rank_1[i] ^= 1;
    }
    return status;
  }
  Status all_to_all(const void*, void*, size_t, Stream) override { return {}; }
  Status reduce_scatter(const float*, float*, size_t, Stream) override { return {}; }
  Status join(Stream stream) override { return transport_->join(stream); }
  Status wait(Stream stream) override { return transport_->wait(stream); }
  void fail(const Status& why) override { transport_->fail(why); }

 private:
  std::unique_ptr<Transport> transport_;
  int calls_ = 0;
};

TEST(Repeat, ADecodeThatIsNotTheSameAgainIsWrong) {
  for (const bool repeat : {false, true}) {
    ParallelOptions options;
    options.stage = "04";
    options.check = true;
    options.repeat = repeat;
    options.time_limit = milliseconds(60000);
    ParallelCase one;
    ASSERT_OK(case_of("h4_q1_b1_k200", "context", &one));
    options.cases = {one};
    std::vector<std::unique_ptr<Transport>> transports;
    ASSERT_OK(make_thread_transports(2, options.time_limit, &transports));
    const MakeTransport make = [&](const Seat& seat, int, std::unique_ptr<Rendezvous>,
                                   std::unique_ptr<Transport>* transport, NcclApi**) -> Status {
      *transport = std::make_unique<Inexact>(std::move(transports[size_t(seat.rank)]));
      return {};
    };
    std::vector<nlohmann::ordered_json> reports(2);
    int code = -1;
    ASSERT_OK(run_threads(
        2, options.time_limit,
        [&](const Seat& seat) {
          return run_rank(options, seat, make, &reports[size_t(seat.rank)]);
        },
        &code));
    // The one decode that is checked is right.
    EXPECT_EQ(code, repeat ? 1 : 0);
    const auto& wrong = reports[0]["rows"][0]["wrong"];
    ASSERT_EQ(wrong.size(), repeat ? 1U : 0U);
    if (repeat) {
      EXPECT_NE(wrong[0].get<std::string>().find("a second decode has other bits"),
                std::string::npos);
    }
  }
}

// A transport between processes: through the group's hub.
class OverHub final : public Transport {
 public:
  explicit OverHub(std::unique_ptr<Rendezvous> group) : group_(std::move(group)) {}
  int rank() const override { return group_->rank(); }
  int ranks() const override { return group_->ranks(); }
  Status all_gather(const void* send, void* receive, size_t bytes, Stream) override {
    std::vector<std::string> all;
    MLA_RETURN_IF_ERROR(group_->share({static_cast<const char*>(send), bytes}, &all));
    for (const std::string& one : all) {
      receive = std::copy(one.begin(), one.end(), static_cast<char*>(receive));
    }
    return {};
  }
  Status all_to_all(const void*, void*, size_t, Stream) override { return {}; }
  Status reduce_scatter(const float*, float*, size_t, Stream) override { return {}; }
  Status join(Stream) override { return group_->failure(); }
  Status wait(Stream) override { return group_->failure(); }
  void fail(const Status& why) override { group_->fail(why); }

 private:
  std::unique_ptr<Rendezvous> group_;
};

TEST(Fault, OfARankThatIsKilledIsReportedByAnother) {
  const auto file = std::filesystem::temp_directory_path() / fmt::format("fault_{}", getpid());
  for (const Fault fault : {Fault::kKill, Fault::kKillLater}) {
    double soonest = 1e9;
    for (const int killed : {0, 1}) {  // 0 has the group's hub
      SCOPED_TRACE(std::string(to_string(fault)) + " " + std::to_string(killed));
      ParallelOptions options;
      options.stage = "04";
      options.fault = fault;
      options.faulty_rank = killed;
      options.time_limit = milliseconds(20000);
      ParallelCase one;
      ASSERT_OK(case_of("h4_q1_b1_k70", "context", &one));
      options.cases = {one};
      std::filesystem::remove(file);
      int code = -1;
      ASSERT_OK(run_processes(
          2, options.time_limit,
          [&](const Seat& seat) {
            const MakeTransport make = [](const Seat&, int, std::unique_ptr<Rendezvous> group,
                                          std::unique_ptr<Transport>* transport,
                                          NcclApi**) -> Status {
              *transport = std::make_unique<OverHub>(std::move(group));
              return {};
            };
            nlohmann::ordered_json report;
            const int result = run_rank(options, seat, make, &report);
            if (seat.rank == reporting_rank(options)) std::ofstream(file) << report;
            return result;
          },
          &code));
      EXPECT_TRUE(code == 1 || code == 128 + SIGKILL) << code;
      std::ifstream stream(file);
      const auto report = nlohmann::ordered_json::parse(stream, nullptr, false);
      ASSERT_TRUE(report.contains("fault")) << report;
      EXPECT_FALSE(report.contains("rows"));
      const auto& row = report["fault"];
      EXPECT_EQ(row["fault"], to_string(fault));
      EXPECT_EQ(row["rank"], killed);
      EXPECT_EQ(row["ranks"], 2);
      const std::string status = row["status"];
      EXPECT_NE(status.find(killed == 0 ? "hub ended" : "rank 1 is gone"), std::string::npos)
          << status;
      EXPECT_GE(row["seconds"], 0);
      soonest = std::min(soonest, row["seconds"].get<double>());
    }
    EXPECT_LT(soonest, 0.45);  // since the fault: decodes have gone on for half a second until then
  }
  std::filesystem::remove(file);
}

// Where nothing is exchanged nothing is to be connected.
TEST(Alone, NeedsNoTransport) {
  for (const char* mode : {"heads", "batch"}) {
    ParallelOptions options;
    options.stage = "04";
    options.check = true;
    options.time_limit = milliseconds(60000);
    ParallelCase one;
    ASSERT_OK(case_of("h4_q1_k200+3", mode, &one));
    options.cases = {one};
    const MakeTransport make = [](const Seat&, int, std::unique_ptr<Rendezvous>,
                                  std::unique_ptr<Transport>*, NcclApi**) -> Status {
      return {StatusCode::kUnavailable, "no NCCL here"};
    };
    std::vector<nlohmann::ordered_json> reports(2);
    int code = -1;
    ASSERT_OK(run_threads(
        2, options.time_limit,
        [&](const Seat& seat) {
          return run_rank(options, seat, make, &reports[size_t(seat.rank)]);
        },
        &code));
    EXPECT_EQ(code, 0);
  }
}

TEST(Division, OfAMode) {
  Division division;
  const std::tuple<const char*, int, int, int> wanted[] = {
      {"context", 6, 1, 1}, {"heads", 1, 6, 1}, {"batch", 1, 1, 6}, {"both", 3, 2, 1}};
  for (const auto& [mode, pages, heads, batch] : wanted) {
    ASSERT_OK(divide(mode, 6, &division));
    EXPECT_EQ(division.pages, pages) << mode;
    EXPECT_EQ(division.heads, heads) << mode;
    EXPECT_EQ(division.batch, batch) << mode;
    EXPECT_EQ(division.ranks(), 6);
  }
  EXPECT_EQ(divide("both", 2, &division).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(divide("both", 5, &division).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(divide("all", 4, &division).code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace mla::bench
