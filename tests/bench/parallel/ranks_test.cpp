// How ranks are started: by a launcher's environment, or as processes, of which one may be killed.
#include "bench/parallel/ranks.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <ifaddrs.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
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
  one.mode = "context";
  ASSERT_OK(parse_shape("h8_q1_b2_k130", &one.shape));
  ASSERT_OK(divide(one.mode, 2, &one.division));
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
