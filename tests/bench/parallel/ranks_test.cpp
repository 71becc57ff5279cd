// How ranks are started: by a launcher's environment, or as processes, of which one may be killed.
#include "bench/parallel/ranks.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>

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
