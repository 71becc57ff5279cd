/// @file
/// Starts the ranks of a program, or finds that another program has started this one as a rank.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "stages/common/parallel/nccl_transport.h"

namespace mla::bench {

/// What a rank knows when it begins.
struct Seat {
  int rank = 0, ranks = 1;
  int local_rank = 0;  ///< Among the ranks of this host: the GPU that it takes.
  std::string hub;     ///< Where all ranks meet.
};

/// The seat that a launcher gave this process by environment variables: MLA_RANK, MLA_RANKS, MLA_LOCAL_RANK and
/// MLA_HUB, or those of mpirun (Open MPI's, and PMI's). Nothing if there are none.
/// @return kInvalidArgument for variables that are no numbers, or contradict each other, and where mpirun says that
///         there are several hosts and MLA_HUB does not say where they meet
Status seat_of_environment(std::optional<Seat>* seat);

/// Starts `ranks` processes of this program, each of which does `body` and ends with what that returns. Gives
/// each the time limit twice, once one has ended badly, before it ends them.
/// @return the exit code of the worst: the first that is not 0
Status run_processes(int ranks, std::chrono::milliseconds time_limit,
                     const std::function<int(const Seat&)>& body, int* exit_code);

/// The same as threads of this process.
Status run_threads(int ranks, std::chrono::milliseconds time_limit,
                   const std::function<int(const Seat&)>& body, int* exit_code);

/// What a rank of a launcher does that cannot take part: it comes all the same, and says why, for which the others
/// would else wait until the time limit. Rank 0 opens the hub for it.
void decline(const Seat& seat, std::chrono::milliseconds time_limit, const Status& why);

/// Opens a hub for the ranks of each group, and joins that of this rank's. All ranks call it.
/// @param world          of all ranks
/// @param world_address  of its hub, by a name that leads there on all hosts
/// @param group          which this rank is in; its ranks are neighbours, and `group_ranks` many
Status join_group(Rendezvous& world, const std::string& world_address, int group, int group_ranks,
                  std::unique_ptr<Hub>* hub, std::unique_ptr<Rendezvous>* rendezvous);

}  // namespace mla::bench
