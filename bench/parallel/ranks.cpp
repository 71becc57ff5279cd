#include "bench/parallel/ranks.h"

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <thread>
#include <vector>

namespace mla::bench {
namespace {

/// The number in the first of these variables that is set; `*found` says which.
Status number_of(std::initializer_list<const char*> names, int* value, const char** found) {
  *found = nullptr;
  for (const char* name : names) {
    const char* text = std::getenv(name);
    if (text == nullptr || *text == '\0') continue;
    char* end = nullptr;
    const long number = std::strtol(text, &end, 10);
    if (*end != '\0' || number < 0 || number > 1'000'000) {
      return {StatusCode::kInvalidArgument,
              fmt::format("{}={} must be a number from 0", name, text)};
    }
    *value = static_cast<int>(number);
    *found = name;
    return {};
  }
  return {};
}

int exit_code_of(int status) {
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  return 128 + (WIFSIGNALED(status) ? WTERMSIG(status) : 0);
}

}  // namespace

Status seat_of_environment(std::optional<Seat>* seat) {
  Seat found;
  const char *rank = nullptr, *ranks = nullptr, *local = nullptr;
  MLA_RETURN_IF_ERROR(
      number_of({"MLA_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}, &found.rank, &rank));
  MLA_RETURN_IF_ERROR(
      number_of({"MLA_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}, &found.ranks, &ranks));
  seat->reset();
  if (rank == nullptr && ranks == nullptr) return {};
  if (rank == nullptr || ranks == nullptr) {
    return {StatusCode::kInvalidArgument,
            fmt::format("{} is set, and no number of {}", rank != nullptr ? rank : ranks,
                        rank != nullptr ? "ranks" : "this rank")};
  }
  if (found.rank >= found.ranks) {
    return {StatusCode::kInvalidArgument,
            fmt::format("{}={} must be less than {}={}", rank, found.rank, ranks, found.ranks)};
  }
  found.local_rank = found.rank;
  MLA_RETURN_IF_ERROR(number_of({"MLA_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"},
                                &found.local_rank, &local));
  const char *hub = std::getenv("MLA_HUB"), *here = nullptr;
  const bool has_hub = hub != nullptr && *hub != '\0';
  int ranks_here = found.ranks;
  MLA_RETURN_IF_ERROR(
      number_of({"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"}, &ranks_here, &here));
  if (!has_hub && ranks_here < found.ranks) {
    return {StatusCode::kInvalidArgument,
            fmt::format("{}={} of {}={}: for several hosts MLA_HUB must say where rank 0 listens, "
                        "as host:port",
                        here, ranks_here, ranks, found.ranks)};
  }
  found.hub = has_hub ? hub : "127.0.0.1:29517";
  *seat = found;
  return {};
}

Status run_processes(int ranks, std::chrono::milliseconds time_limit,
                     const std::function<int(const Seat&)>& body, int* exit_code) {
  // The hub's port is taken before the forks, so that no other process can have it. Its thread begins after the last
  // fork, which copies no other thread; until then ranks wait.
  std::unique_ptr<HubPlace> place;
  MLA_RETURN_IF_ERROR(take_hub_place("127.0.0.1:0", &place));
  const std::string address = place->address();
  std::fflush(nullptr);
  std::vector<pid_t> children;
  const auto end_all = [&] {
    for (const pid_t child : children) kill(child, SIGKILL);
    for (const pid_t child : children) waitpid(child, nullptr, 0);
  };
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0)
      _exit([&] {
        place.reset();  // else a connection to a hub that is gone would not be refused
        const int code = body({rank, ranks, rank, address});
        std::fflush(nullptr);
        return code;
      }());
    if (child < 0) {
      end_all();
      return {StatusCode::kUnavailable, "cannot start a process"};
    }
    children.push_back(child);
  }
  std::unique_ptr<Hub> hub;
  if (const Status opened = place->open(ranks, time_limit, &hub); !opened.ok()) {
    end_all();
    return opened;
  }
  *exit_code = 0;
  using Clock = std::chrono::steady_clock;
  Clock::time_point deadline = Clock::time_point::max();
  for (size_t left = children.size(); left > 0;) {
    for (size_t rank = 0; rank < children.size(); ++rank) {
      int status = 0;
      if (children[rank] < 0 || waitpid(children[rank], &status, WNOHANG) != children[rank])
        continue;
      children[rank] = -1;
      --left;
      if (WIFSIGNALED(status)) {
        fmt::print(stderr, "rank {} was ended by signal {}\n", rank, WTERMSIG(status));
      }
      const int code = exit_code_of(status);
      if (code != 0 && *exit_code == 0) *exit_code = code;
      if (code != 0 && deadline == Clock::time_point::max()) {
        deadline = Clock::now() + 2 * time_limit + std::chrono::seconds(5);
      }
    }
    if (Clock::now() > deadline) {
      for (size_t rank = 0; rank < children.size(); ++rank) {
        if (children[rank] < 0) continue;
        fmt::print(stderr, "rank {} did not end, and is ended\n", rank);
        kill(children[rank], SIGKILL);
      }
      deadline = Clock::time_point::max();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return {};
}

Status run_threads(int ranks, std::chrono::milliseconds time_limit,
                   const std::function<int(const Seat&)>& body, int* exit_code) {
  std::unique_ptr<Hub> hub;
  MLA_RETURN_IF_ERROR(open_hub("127.0.0.1:0", ranks, time_limit, &hub));
  std::vector<int> codes(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      codes[static_cast<size_t>(rank)] = body({rank, ranks, rank, hub->address()});
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto worst = std::find_if(codes.begin(), codes.end(), [](int code) { return code != 0; });
  *exit_code = worst == codes.end() ? 0 : *worst;
  return {};
}

void decline(const Seat& seat, std::chrono::milliseconds time_limit, const Status& why) {
  std::unique_ptr<Hub> hub;
  std::unique_ptr<Rendezvous> world;
  if (seat.rank == 0 && !open_hub(seat.hub, seat.ranks, time_limit, &hub).ok()) return;
  if (join_hub(seat.hub, seat.rank, seat.ranks, time_limit, &world).ok()) world->fail(why);
}

Status join_group(Rendezvous& world, const std::string& world_address, int group, int group_ranks,
                  std::unique_ptr<Hub>* hub, std::unique_ptr<Rendezvous>* rendezvous) {
  const int first = group * group_ranks;
  std::string address;
  Status opened;
  if (world.rank() == first) {
    // The others find this rank where it comes from. By the loopback it comes on the host of the hub of all, which
    // they find by that hub's name.
    std::string host = world.host();
    if (host.rfind("127.", 0) == 0 || host == "[::1]") {
      host = world_address.substr(0, world_address.rfind(':'));
    }
    opened = open_hub(host + ":0", group_ranks, world.time_limit(), hub);
    if (opened.ok()) address = (*hub)->address();
  }
  if (!opened.ok()) world.fail(opened);
  std::vector<std::string> addresses;
  MLA_RETURN_IF_ERROR(world.share(address, &addresses));
  const Status joined = join_hub(addresses[static_cast<size_t>(first)], world.rank() - first,
                                 group_ranks, world.time_limit(), rendezvous, &world);
  if (!joined.ok()) world.fail(joined);
  return joined;
}

}  // namespace mla::bench
