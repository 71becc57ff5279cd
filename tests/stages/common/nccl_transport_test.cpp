// Ranks that are processes: how they meet, and what happens when one fails. The test plays NCCL and the GPU, so as to
// check that the host code keeps time limits, aborts, and tells every rank.
#include "stages/common/parallel/nccl_transport.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <thread>

#include "stages/common/parallel/rendezvous.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
constexpr milliseconds kPatient{8000}, kShort{150};

// Runs body(rendezvous) on a thread per rank, and returns each rank's status. Absent ranks get no thread.
using Body = std::function<Status(std::unique_ptr<Rendezvous>)>;
std::vector<Status> on_ranks(int ranks, milliseconds limit, const Body& body,
                             const std::vector<int>& absent = {}) {
  std::unique_ptr<Hub> hub;
  EXPECT_OK(open_hub("127.0.0.1:0", ranks, limit, &hub));
  std::vector<Status> ended(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    if (std::find(absent.begin(), absent.end(), rank) != absent.end()) continue;
    threads.emplace_back([&, rank] {
      std::unique_ptr<Rendezvous> joined;
      Status& status = ended[static_cast<size_t>(rank)];
      status = join_hub(hub->address(), rank, ranks, limit, &joined);
      if (status.ok()) status = body(std::move(joined));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return ended;
}

// Asks until the group has failed, because the news take a while.
Status await_failure(Rendezvous& rendezvous) {
  const auto deadline = Clock::now() + std::chrono::seconds(8);
  while (rendezvous.failure().ok() && Clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  return rendezvous.failure();
}

TEST(Rendezvous, EveryRankGetsWhatAllGave) {
  for (const int ranks : {1, 2, 5}) {
    for (const Status& status : on_ranks(ranks, kPatient, [&](auto rendezvous) -> Status {
           EXPECT_EQ(rendezvous->ranks(), ranks);
           EXPECT_EQ(rendezvous->time_limit(), kPatient);
           EXPECT_EQ(rendezvous->host(), "127.0.0.1");
           for (int turn = 0; turn < 30; ++turn) {
             MLA_RETURN_IF_ERROR(rendezvous->announce("call " + std::to_string(turn)));
             const auto text = [&](int rank) {
               return rank == 1 ? std::string()
                                : std::string(size_t(1) << turn % 18, char('a' + rank));
             };
             std::vector<std::string> all;
             MLA_RETURN_IF_ERROR(rendezvous->share(text(rendezvous->rank()), &all));
             EXPECT_EQ(int(all.size()), ranks);
             for (int rank = 0; rank < ranks; ++rank) EXPECT_EQ(all[size_t(rank)], text(rank));
           }
           return {};
         })) {
      EXPECT_OK(status);
    }
  }
}

TEST(Rendezvous, CallsThatDifferAreNamed) {
  for (const bool shares : {false, true}) {
    for (const Status& status : on_ranks(3, kPatient, [&](auto rendezvous) -> Status {
           std::vector<std::string> all;
           if (rendezvous->rank() == 2 && shares) return rendezvous->share("", &all);
           MLA_RETURN_IF_ERROR(rendezvous->announce(rendezvous->rank() == 2 ? "another" : "one"));
           return await_failure(*rendezvous);
         })) {
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
      EXPECT_EQ(status.message(),
                std::string("rank 0 calls one, rank 2 ") + (shares ? "share" : "another"));
    }
  }
}

TEST(Rendezvous, ARankThatDoesNotComeIsNamedInTime) {
  const auto begin = Clock::now();
  for (const Status& status : on_ranks(4, kShort, [&](auto rendezvous) -> Status {
         MLA_RETURN_IF_ERROR(rendezvous->announce("first"));
         if (rendezvous->rank() % 2 == 1) return await_failure(*rendezvous);
         std::vector<std::string> all;
         return rendezvous->share("", &all);
       })) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_EQ(status.message(), "rank 1, rank 3 did not come to share within 150 ms");
  }
  const auto ended = on_ranks(3, kShort, [&](auto) { return Status(); }, {1});
  for (const size_t rank : {size_t{0}, size_t{2}}) {
    EXPECT_EQ(ended[rank].code(), StatusCode::kRankFailed);
    EXPECT_EQ(ended[rank].message(), "rank 1 did not come to the group within 150 ms");
  }
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(7));
}

TEST(Rendezvous, CallsAreCountedApartForEveryRank) {
  // One rank far ahead is no fault: work is enqueued.
  for (const Status& status : on_ranks(2, kPatient, [&](auto rendezvous) -> Status {
         if (rendezvous->rank() == 1) std::this_thread::sleep_for(milliseconds(50));
         for (int i = 0; i < 100; ++i) {
           MLA_RETURN_IF_ERROR(rendezvous->announce(std::to_string(i)));
         }
         std::vector<std::string> all;
         return rendezvous->share("", &all);
       })) {
    EXPECT_OK(status);
  }
}

TEST(Rendezvous, TheFirstFailureIsToldToAll) {
  std::atomic<bool> told = false;
  for (const Status& status : on_ranks(3, kPatient, [&](auto rendezvous) -> Status {
         if (rendezvous->rank() == 1) {
           rendezvous->fail({StatusCode::kCudaError, "it burns"});
           rendezvous->fail({StatusCode::kCudaError, "a second failure"});
           told = true;
         }
         const Status heard = await_failure(*rendezvous);
         while (!told) std::this_thread::yield();
         if (rendezvous->rank() == 2) rendezvous->fail({StatusCode::kCudaError, "a third failure"});
         std::vector<std::string> all;
         EXPECT_EQ(rendezvous->announce("more").message(), heard.message());
         EXPECT_EQ(rendezvous->share("", &all).message(), heard.message());
         return heard;
       })) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_EQ(status.message(), "rank 1 failed: CUDA error: it burns");
  }
}

TEST(Rendezvous, AProcessThatIsKilledIsGoneAtOnce) {
  std::unique_ptr<Hub> hub;
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();  // before the hub's thread begins
  if (child == 0) {
    char address[64] = {};
    std::unique_ptr<Rendezvous> joined;
    if (read(ends[0], address, sizeof address - 1) <= 0) _exit(1);
    _exit(join_hub(address, 1, 2, kPatient, &joined).ok() ? 0 : 1);
  }
  ASSERT_OK(open_hub("127.0.0.1:0", 2, kPatient, &hub));
  ASSERT_GT(write(ends[1], hub->address().c_str(), hub->address().size()), 0);
  std::unique_ptr<Rendezvous> joined;
  ASSERT_OK(join_hub(hub->address(), 0, 2, kPatient, &joined));
  std::vector<std::string> all;
  EXPECT_EQ(joined->share("", &all).message(), "rank 1 is gone: its connection ended");
  EXPECT_EQ(joined->failure().code(), StatusCode::kRankFailed);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  close(ends[0]);
  close(ends[1]);
}

TEST(Rendezvous, WhoLeavesEarlyIsNamed) {
  const auto ended = on_ranks(2, kPatient, [&](auto rendezvous) -> Status {
    MLA_RETURN_IF_ERROR(rendezvous->announce("all"));
    if (rendezvous->rank() == 1) return {};
    std::vector<std::string> all;
    return rendezvous->share("", &all);
  });
  EXPECT_OK(ended[1]);
  EXPECT_EQ(ended[0].message(), "rank 1 has left before share");
}

TEST(Rendezvous, WhoLeavesByAnExceptionHasFailed) {
  const auto ended = on_ranks(2, kPatient, [&](auto rendezvous) -> Status {
    std::vector<std::string> all;
    if (rendezvous->rank() == 0) return rendezvous->share("", &all);
    try {
      const auto own = std::move(rendezvous);
      throw std::bad_alloc();
    } catch (const std::bad_alloc&) {
    }
    return {};
  });
  EXPECT_EQ(ended[0].message(), "rank 1 is gone: its connection ended");
}

TEST(Rendezvous, ARankThatFailsMayTakeItsHubAlong) {
  for (int turn = 0; turn < 200 && !HasFailure(); ++turn) {
    std::unique_ptr<Hub> hub;
    ASSERT_OK(open_hub("127.0.0.1:0", 2, kPatient, &hub));
    std::unique_ptr<Rendezvous> own, other;
    std::thread one([&] { EXPECT_OK(join_hub(hub->address(), 1, 2, kPatient, &other)); });
    ASSERT_OK(join_hub(hub->address(), 0, 2, kPatient, &own));
    one.join();
    own->fail({StatusCode::kCudaError, "it burns"});
    hub.reset();
    EXPECT_EQ(await_failure(*other).message(), "rank 0 failed: CUDA error: it burns");
  }
}

TEST(Rendezvous, AFailureAboveEndsTheWaitForAGroup) {
  std::unique_ptr<Hub> hub;
  ASSERT_OK(open_hub("127.0.0.1:0", 2, kPatient, &hub));
  const auto begin = Clock::now();
  const auto ended = on_ranks(2, kPatient, [&](auto world) -> Status {
    if (world->rank() == 1) {
      std::this_thread::sleep_for(milliseconds(20));  // rank 0 waits by then
      world->fail({StatusCode::kUnavailable, "the hub's host is not known"});
      return world->failure();
    }
    std::unique_ptr<Rendezvous> group;
    const Status joined = join_hub(hub->address(), 0, 2, kPatient, &group, world.get());
    // Nor is a hub waited for that does not come.
    EXPECT_EQ(join_hub("127.0.0.1:1", 0, 2, kPatient, &group, world.get()).message(),
              joined.message());
    return joined;
  });
  EXPECT_EQ(ended[0].message(), "rank 1 failed: unavailable: the hub's host is not known");
  EXPECT_LT(Clock::now() - begin, kPatient / 2);
}

std::string port_of(const std::string& address) {
  return address.substr(address.rfind(':') + 1);
}

TEST(Rendezvous, AHubsPlaceIsTakenBeforeTheHubOpens) {
  std::unique_ptr<HubPlace> place, another;
  ASSERT_OK(take_hub_place("127.0.0.1:0", &place));
  EXPECT_EQ(take_hub_place(place->address(), &another).code(), StatusCode::kUnavailable);
  std::unique_ptr<Rendezvous> joined;
  std::thread rank([&] { EXPECT_OK(join_hub(place->address(), 0, 1, kPatient, &joined)); });
  std::this_thread::sleep_for(milliseconds(20));  // it waits by then
  std::unique_ptr<Hub> hub;
  ASSERT_OK(place->open(1, kPatient, &hub));
  rank.join();
  EXPECT_EQ(hub->address(), place->address());
}

// A hub that could not be told to end would keep its process for ever.
TEST(Rendezvous, AHubNeedsFiles) {
  std::unique_ptr<HubPlace> place;
  ASSERT_OK(take_hub_place("127.0.0.1:0", &place));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int next = dup(STDOUT_FILENO);
  close(next);
  rlimit none = before;
  none.rlim_cur = static_cast<rlim_t>(next);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  std::unique_ptr<Hub> hub;
  const Status refused = place->open(1, kPatient, &hub);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable);
  EXPECT_EQ(refused.message(), place->address() + ": no hub: Too many open files");
  EXPECT_EQ(hub, nullptr);
  EXPECT_OK(place->open(1, kPatient, &hub));
}

TEST(Rendezvous, AHubMayComeLater) {
  // At an address of this process's own, so that nobody takes the port meanwhile.
  const int pid = getpid();
  std::unique_ptr<HubPlace> place;
  ASSERT_OK(take_hub_place(
      "127.77." + std::to_string(pid / 250 % 250) + "." + std::to_string(pid % 250 + 1) + ":0",
      &place));
  const std::string address = place->address();
  place.reset();
  std::unique_ptr<Rendezvous> joined;
  const Status none = join_hub(address, 0, 1, kShort, &joined);
  EXPECT_EQ(none.code(), StatusCode::kUnavailable);
  EXPECT_EQ(none.message(), "no hub at " + address + " within 150 ms: Connection refused");
  std::thread rank([&] { EXPECT_OK(join_hub(address, 0, 1, kPatient, &joined)); });
  std::this_thread::sleep_for(milliseconds(50));
  std::unique_ptr<Hub> hub;
  EXPECT_OK(open_hub(address, 1, kPatient, &hub));
  rank.join();
}

TEST(Rendezvous, AtANameItListensEverywhere) {
  char name[256] = {};
  ASSERT_EQ(gethostname(name, sizeof name - 1), 0);
  std::unique_ptr<Hub> hub;
  if (!open_hub(std::string(name) + ":0", 1, kPatient, &hub).ok()) {
    GTEST_SKIP() << "this host does not know its own name";
  }
  EXPECT_EQ(hub->address().substr(0, hub->address().rfind(':')), name);
  std::unique_ptr<Rendezvous> joined;
  EXPECT_OK(join_hub("127.0.0.2:" + port_of(hub->address()), 0, 1, kPatient, &joined));
  joined.reset();
  for (const char* here : {"localhost:0", "127.0.0.1:0"}) {  // these are for this host alone
    ASSERT_OK(open_hub(here, 1, kPatient, &hub));
    EXPECT_EQ(join_hub("127.0.0.2:" + port_of(hub->address()), 0, 1, kShort, &joined).code(),
              StatusCode::kUnavailable);
    EXPECT_OK(join_hub(hub->address(), 0, 1, kPatient, &joined));
  }
}

TEST(Rendezvous, AddressesMayHaveColons) {
  std::unique_ptr<Hub> hub;
  if (const Status opened = open_hub("[::1]:0", 1, kPatient, &hub);
      opened.code() == StatusCode::kUnavailable) {
    GTEST_SKIP() << opened.to_string();
  } else {
    ASSERT_OK(opened);
  }
  EXPECT_EQ(hub->address(), "[::1]:" + port_of(hub->address()));
  std::unique_ptr<Rendezvous> joined;
  ASSERT_OK(join_hub(hub->address(), 0, 1, kPatient, &joined));
  EXPECT_EQ(joined->host(), "[::1]");
}

TEST(Rendezvous, AHostThatIsNotKnownIsSaidAtOnce) {
  const auto begin = Clock::now();
  std::unique_ptr<Hub> hub;
  std::unique_ptr<Rendezvous> joined;
  for (const Status& status : {open_hub("no such host:1", 1, kPatient, &hub),
                               join_hub("no such host:1", 0, 1, kPatient, &joined)}) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().rfind("host \"no such host\" is not known here: ", 0), 0u)
        << status.message();
  }
  EXPECT_LT(Clock::now() - begin, kPatient / 2);
}

TEST(Rendezvous, BadInputIsRefused) {
  std::unique_ptr<Hub> hub;
  std::unique_ptr<Rendezvous> joined;
  EXPECT_EQ(open_hub("127.0.0.1:0", 0, kShort, &hub).message(), "ranks = 0 must be at least 1");
  for (const char* address :
       {"", "127.0.0.1", ":80", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000",
        "127.0.0.1:123456789", "::1:80", "[::1]", "[]:80"}) {
    EXPECT_EQ(open_hub(address, 1, kShort, &hub).code(), StatusCode::kInvalidArgument) << address;
    EXPECT_EQ(join_hub(address, 0, 1, kShort, &joined).code(), StatusCode::kInvalidArgument)
        << address;
  }
  EXPECT_EQ(join_hub("127.0.0.1:1", 2, 2, kShort, &joined).message(),
            "rank = 2 must be in [0, ranks = 2)");
  EXPECT_EQ(join_hub("127.0.0.1:1", -1, 2, kShort, &joined).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(join_hub("127.0.0.1:1", 0, 2, kShort, &joined).code(), StatusCode::kUnavailable);
}

TEST(Rendezvous, StrangersAndDoublesAreRefused) {
  std::unique_ptr<Hub> hub;
  ASSERT_OK(open_hub("127.0.0.1:0", 2, kPatient, &hub));
  // A stranger, whose bytes mean nothing to the hub.
  const int stranger = socket(AF_INET, SOCK_STREAM, 0);
  const int nobody = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = inet_addr("127.0.0.1");
  address.sin_port =
      htons(static_cast<uint16_t>(std::stoi(hub->address().substr(hub->address().rfind(':') + 1))));
  for (const int other : {stranger, nobody}) {
    ASSERT_EQ(connect(other, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  // It begins with a wrong greeting, but goes on as rank 0 would. Another has ours, and is no rank.
  const std::string said("GET \3\0\0\0h0 2", 12);
  ASSERT_GT(send(stranger, said.data(), said.size(), MSG_NOSIGNAL), 0);
  const std::string wrong("1ALM\4\0\0\0h-1 2", 13);
  ASSERT_GT(send(nobody, wrong.data(), wrong.size(), MSG_NOSIGNAL), 0);
  const timeval patience{8, 0};
  setsockopt(nobody, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  std::string answer(9 + 1 + 31, '\0');  // its head, a code, and this text
  EXPECT_EQ(recv(nobody, answer.data(), answer.size(), MSG_WAITALL), ssize_t(answer.size()));
  EXPECT_EQ(answer.substr(10), "rank -1 is none of a group of 2");
  close(nobody);
  std::unique_ptr<Rendezvous> second, twice, first;
  std::thread zero([&] { EXPECT_OK(join_hub(hub->address(), 0, 2, kPatient, &first)); });
  EXPECT_EQ(join_hub(hub->address(), 0, 3, kPatient, &twice).message(),
            "rank 0 has come to a group of 2 ranks, for one of 3");
  std::thread one([&] { EXPECT_OK(join_hub(hub->address(), 1, 2, kPatient, &second)); });
  zero.join();
  one.join();
  EXPECT_EQ(join_hub(hub->address(), 1, 2, kPatient, &twice).message(), "rank 1 has come twice");
  EXPECT_OK(first->failure());  // the group is none the worse
  close(stranger);
}

// ---- NCCL's part

// What the fakes of all ranks share: what they must do wrong, and what was asked of them.
struct Play {
  std::atomic<int> busy{0};        // how often progress() is busy after each call
  std::atomic<bool> hangs{false};  // collectives are never done until aborted
  std::function<Status(int rank, const std::string& call)> error;  // of a call
  std::atomic<int> aborts{0};
};

class FakeNccl final : public NcclApi {
 public:
  FakeNccl(Play& play, std::vector<std::string>* log) : play_(play), log_(log) {}
  std::string description() const override { return "a play"; }
  Status make_id(std::string* id) override {
    *id = "the id";
    return say("make_id");
  }
  Status connect(const std::string& id, int rank, int ranks) override {
    rank_ = rank;
    return say("connect " + id + " of " + std::to_string(ranks));
  }
  Status progress(bool* is_busy) override {
    EXPECT_FALSE(is_aborted_) << "a communicator that is gone";
    *is_busy = play_.busy < 0 || busy_ > 0;
    busy_ = std::max(0, busy_ - 1);
    return error("progress");
  }
  Status all_gather(const void*, void*, size_t bytes) override {
    return say("all_gather " + std::to_string(bytes));
  }
  Status all_to_all(const void*, void*, size_t bytes) override {
    return say("all_to_all " + std::to_string(bytes));
  }
  Status reduce_scatter(const float*, float*, size_t count) override {
    return say("reduce_scatter " + std::to_string(count));
  }
  Stream stream() const override {
    EXPECT_EQ(busy_, 0) << "what is enqueued there now may come before the last call";
    return &play_;
  }
  Status follow(Stream) override { return say("follow"); }
  Status lead(Stream) override { return say("lead"); }
  Status query(Stream, bool* is_done) override {
    *is_done = !play_.hangs;
    return error("query");
  }
  void abort() override {
    EXPECT_FALSE(is_aborted_);
    is_aborted_ = true;
    ++play_.aborts;
  }

 private:
  Status error(const std::string& call) {
    return play_.error ? play_.error(rank_, call) : Status();
  }
  Status say(const std::string& call) {
    if (log_ != nullptr) log_->push_back(call);
    EXPECT_EQ(busy_, 0) << call << " while the last call is under way";
    const std::string name = call.substr(0, call.find(' '));
    const bool is_quick = name == "make_id" || name == "follow" || name == "lead";
    busy_ = is_quick ? 0 : std::max(0, play_.busy.load());
    return error(name);
  }
  Play& play_;
  std::vector<std::string>* log_;
  int rank_ = 0, busy_ = 0;
  bool is_aborted_ = false;
};

// Runs body(transport) on ranks whose transport is over the play.
std::vector<Status> over_nccl(int ranks, milliseconds limit, Play& play,
                              const std::function<Status(Transport&)>& body,
                              std::vector<std::string>* log = nullptr) {
  return on_ranks(ranks, limit, [&](auto rendezvous) -> Status {
    const bool logs = rendezvous->rank() == 1;
    std::unique_ptr<Transport> transport;
    MLA_RETURN_IF_ERROR(make_nccl_transport(
        std::move(rendezvous), std::make_unique<FakeNccl>(play, logs ? log : nullptr), &transport));
    return body(*transport);
  });
}

Status await_failure(Transport& transport) {
  const auto deadline = Clock::now() + kPatient;
  while (Clock::now() < deadline) {  // until the other's failure has come
    MLA_RETURN_IF_ERROR(transport.wait(nullptr));
    std::this_thread::sleep_for(milliseconds(1));
  }
  return {};
}

Status gather(Transport& transport) {
  MLA_RETURN_IF_ERROR(transport.all_gather(nullptr, nullptr, 48, nullptr));
  MLA_RETURN_IF_ERROR(transport.join(nullptr));
  return transport.wait(nullptr);
}

TEST(NcclTransport, CallsGoToNcclInOrder) {
  Play play;
  play.busy = 3;  // every call takes a while
  std::vector<std::string> log;
  for (const Status& status : over_nccl(
           3, kPatient, play,
           [](Transport& transport) -> Status {
             EXPECT_EQ(transport.ranks(), 3);
             MLA_RETURN_IF_ERROR(transport.all_gather(nullptr, nullptr, 16, nullptr));
             MLA_RETURN_IF_ERROR(transport.all_to_all(nullptr, nullptr, 32, nullptr));
             MLA_RETURN_IF_ERROR(transport.join(nullptr));
             MLA_RETURN_IF_ERROR(transport.reduce_scatter(nullptr, nullptr, 5, nullptr));
             MLA_RETURN_IF_ERROR(transport.join(nullptr));
             return transport.wait(nullptr);
           },
           &log)) {
    EXPECT_OK(status);
  }
  const std::vector<std::string> expected = {
      "connect the id of 3", "follow", "all_gather 16", "follow", "all_to_all 32", "lead", "follow",
      "reduce_scatter 5",    "lead"};
  EXPECT_EQ(log, expected);
  EXPECT_EQ(play.aborts, 0);
}

// Marks of an exchange, on the communicator's stream: behind what it waits for, and when NCCL has taken it.
TEST(NcclTransport, ExchangesAreMarkedOnTheirStream) {
  class Observer final : public RankObserver {
   public:
    Observer(Play& play, std::vector<std::string>* log) : play_(play), log_(log) {}
    Status mark(RankPhase phase, Stream stream) override {
      EXPECT_EQ(stream, &play_);
      log_->push_back(phase == RankPhase::kExchange    ? "begins"
                      : phase == RankPhase::kExchanged ? "ends"
                                                       : "another phase");
      const bool is_last = ++marks_ == fails_at;
      return is_last ? Status(StatusCode::kCudaError, "no event") : Status();
    }
    int fails_at = 0;

   private:
    Play& play_;
    std::vector<std::string>* log_;
    int marks_ = 0;
  };
  for (const int fails_at : {0, 1, 2}) {
    Play play;
    play.busy = 3;
    std::vector<std::string> log;
    Observer observer(play, &log);
    observer.fails_at = fails_at;
    const auto ended = over_nccl(
        2, kPatient, play,
        [&](Transport& transport) -> Status {
          if (transport.rank() == 1) transport.observe(&observer);
          MLA_RETURN_IF_ERROR(transport.all_gather(nullptr, nullptr, 16, nullptr));
          if (fails_at > 0) return await_failure(transport);
          transport.observe(nullptr);
          return transport.all_to_all(nullptr, nullptr, 32, nullptr);
        },
        &log);
    std::vector<std::string> expected = {"connect the id of 2", "follow", "begins", "all_gather 16",
                                         "ends"};
    if (fails_at == 0) {
      for (const Status& status : ended) EXPECT_OK(status);
      expected.insert(expected.end(), {"follow", "all_to_all 32"});
    } else {
      EXPECT_EQ(ended[1].message(), "no event");
      EXPECT_EQ(ended[0].message(), "rank 1 failed: CUDA error: no event");
      expected.resize(fails_at == 1 ? 3 : 5);
    }
    EXPECT_EQ(log, expected);
  }
}

TEST(NcclTransport, WorkThatHangsEndsWithTheTimeLimit) {
  Play play;
  play.hangs = true;
  const auto begin = Clock::now();
  for (const Status& status : over_nccl(2, kShort, play, [](Transport& transport) {
         const Status status = gather(transport);
         EXPECT_EQ(transport.join(nullptr).code(), StatusCode::kRankFailed);
         EXPECT_EQ(transport.wait(nullptr).code(), StatusCode::kRankFailed);
         return status;
       })) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_NE(status.message().find("waited 187 ms for its work with the others"),
              std::string::npos)
        << status.message();
  }
  EXPECT_EQ(play.aborts, 2);
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(7));
}

TEST(NcclTransport, ACommunicatorThatIsNeverReadyEndsWithTheTimeLimit) {
  Play play;
  play.busy = -1;
  for (const Status& status : over_nccl(2, kShort, play, gather)) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_NE(status.message().find("waited 187 ms for the ranks to connect"), std::string::npos)
        << status.message();
  }
  EXPECT_EQ(play.aborts, 2);
}

TEST(NcclTransport, OneRanksFailureEndsTheWorkOfAll) {
  Play play;
  play.hangs = true;
  const auto begin = Clock::now();
  const auto ended = over_nccl(3, kPatient, play, [](Transport& transport) {
    if (transport.rank() == 1) {
      std::this_thread::sleep_for(milliseconds(20));  // the others wait by then
      transport.fail({StatusCode::kCudaError, "it burns"});
    }
    return gather(transport);
  });
  for (const Status& status : ended) {
    EXPECT_EQ(status.code(), StatusCode::kRankFailed);
    EXPECT_EQ(status.message(), "rank 1 failed: CUDA error: it burns");
  }
  EXPECT_EQ(play.aborts, 3);
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(7));
}

// As in a launch that finds the device's queue full: it makes no call of the transport, and ends when the work that hangs
// is aborted.
TEST(NcclTransport, AFailureEndsWorkThatNobodyWaitsFor) {
  Play play;
  play.hangs = true;
  std::atomic<int> launching = 0;
  const auto begin = Clock::now();
  const auto ended = over_nccl(2, kPatient, play, [&](Transport& transport) -> Status {
    MLA_RETURN_IF_ERROR(transport.all_gather(nullptr, nullptr, 48, nullptr));
    ++launching;
    while (launching < 2) std::this_thread::yield();
    if (transport.rank() == 1) transport.fail({StatusCode::kCudaError, "it burns"});
    while (play.aborts < 2 && Clock::now() - begin < kPatient) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    EXPECT_EQ(play.aborts, 2);
    return transport.wait(nullptr);
  });
  for (const Status& status : ended) {
    EXPECT_EQ(status.message(), "rank 1 failed: CUDA error: it burns");
  }
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(7));
}

TEST(NcclTransport, WorkThatIsLeftBehindIsEnded) {
  Play play;
  play.hangs = true;
  const auto begin = Clock::now();
  for (const Status& status : over_nccl(2, milliseconds(1000), play, [](Transport& transport) {
         return transport.all_gather(nullptr, nullptr, 48, nullptr);
       })) {
    EXPECT_OK(status);
  }
  EXPECT_EQ(play.aborts, 2);
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(7));
  play.hangs = false;
  over_nccl(2, kPatient, play, gather);
  EXPECT_EQ(play.aborts, 2);  // what has ended is not aborted
}

TEST(NcclTransport, ACommunicatorWithAnErrorIsAborted) {
  Play play;
  std::atomic<bool> is_late = false;
  play.error = [&](int rank, const std::string& call) {
    if (rank != 0 || call != "progress" || !is_late) return Status();
    return Status(StatusCode::kCudaError, "an error after the last call");
  };
  for (const Status& status : over_nccl(2, kPatient, play, [&](Transport& transport) {
         const Status status = gather(transport);
         if (transport.rank() == 0) is_late = true;
         return status;
       })) {
    EXPECT_OK(status);  // what was asked for is done
  }
  EXPECT_EQ(play.aborts, 1);
}

TEST(NcclTransport, TheCauseIsToldAndNotItsTraceInAnotherRank) {
  Play play;
  play.hangs = true;
  std::atomic<bool> is_gone = false, has_noticed = false;
  play.error = [&](int rank, const std::string& call) {
    if (rank != 0 || call != "progress" || !is_gone) return Status();
    has_noticed = true;
    return Status(StatusCode::kRankFailed, "remote process exited");
  };
  for (const Status& status : over_nccl(2, kPatient, play, [&](Transport& transport) {
         if (transport.rank() == 1) {
           is_gone = true;
           while (!has_noticed) std::this_thread::yield();
           transport.fail({StatusCode::kCudaError, "it burns"});
         }
         const Status called = transport.all_gather(nullptr, nullptr, 48, nullptr);
         return called.ok() ? transport.wait(nullptr) : called;
       })) {
    EXPECT_EQ(status.message(), "rank 1 failed: CUDA error: it burns");
  }
  // Where nobody else says so, it counts.
  for (const Status& status : over_nccl(2, kPatient, play, gather)) {
    EXPECT_NE(status.message().find("remote process exited"), std::string::npos)
        << status.message();
  }
}

TEST(NcclTransport, EveryErrorIsToldToAll) {
  for (const char* call :
       {"make_id", "connect", "progress", "follow", "all_gather", "lead", "query"}) {
    SCOPED_TRACE(call);
    if (HasFailure()) return;  // one failure is enough; the next may wait for its time limit, too
    Play play;
    const bool is_make_id = std::string(call) == "make_id";
    const int culprit = is_make_id ? 0 : 1;
    play.error = [&](int rank, const std::string& made) {
      if (rank != culprit || made != call) return Status();
      return Status(StatusCode::kCudaError, "no " + made);
    };
    const auto ended = over_nccl(2, kPatient, play, [](Transport& transport) -> Status {
      MLA_RETURN_IF_ERROR(gather(transport));
      return await_failure(transport);
    });
    const Status &own = ended[size_t(culprit)], &other = ended[size_t(1 - culprit)];
    EXPECT_EQ(own.code(), StatusCode::kCudaError);
    EXPECT_EQ(own.message(), std::string("no ") + call);
    EXPECT_EQ(other.code(), StatusCode::kRankFailed);
    EXPECT_EQ(other.message(),
              "rank " + std::to_string(culprit) + " failed: CUDA error: no " + call);
    EXPECT_GE(play.aborts, 1);
  }
}

TEST(NcclTransport, AnErrorOfTheNetworkEndsTheWait) {
  Play play;
  play.hangs = true;
  std::atomic<bool> is_cut = false;
  play.error = [&](int rank, const std::string& call) {
    if (rank != 1 || call != "progress" || !is_cut) return Status();
    return Status(StatusCode::kCudaError, "unhandled system error");
  };
  const auto ended = over_nccl(2, kPatient, play, [&](Transport& transport) -> Status {
    MLA_RETURN_IF_ERROR(transport.all_gather(nullptr, nullptr, 48, nullptr));
    if (transport.rank() == 1) is_cut = true;  // its own call has been taken
    return transport.wait(nullptr);
  });
  EXPECT_EQ(ended[1].message(), "unhandled system error");
  EXPECT_EQ(ended[0].message(), "rank 1 failed: CUDA error: unhandled system error");
  EXPECT_EQ(play.aborts, 2);
}

TEST(NcclTransport, AnotherShapeOnOneRank) {
  Play play;
  play.hangs = true;
  for (const Status& status : over_nccl(2, kPatient, play, [](Transport& transport) {
         const Status called =
             transport.all_gather(nullptr, nullptr, transport.rank() == 1 ? 8 : 16, nullptr);
         return called.ok() ? transport.wait(nullptr) : called;
       })) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(),
              "rank 0 calls all_gather of 16 bytes, rank 1 all_gather of 8 bytes");
  }
  EXPECT_EQ(play.aborts, 2);
}

TEST(NcclTransport, WithoutNcclAClearWord) {
  if (gpu_machine() != nullptr) GTEST_SKIP() << "there is a GPU, and maybe NCCL";
  std::unique_ptr<NcclApi> api;
  const Status none = make_nccl_api(&api);
  EXPECT_EQ(none.code(), StatusCode::kUnavailable);
  for (const Status& status : on_ranks(1, kPatient, [&](auto rendezvous) {
         std::unique_ptr<Transport> transport;
         return make_nccl_transport(std::move(rendezvous), &transport);
       })) {
    EXPECT_EQ(status.message(), none.message());
    EXPECT_NE(status.message().find("no "), std::string::npos);
  }
}

}  // namespace
}  // namespace mla
