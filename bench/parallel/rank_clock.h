/// @file
/// A rank's GPU: its stream, the times of graphs, and of the phases in them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stages/common/parallel/transport.h"

namespace mla::bench {

/// How many GPUs a process would see. A process of its own asks CUDA, because CUDA does not survive a fork once
/// it has begun.
int count_gpus();

/// The GPU of a rank of this host, of those that its process sees: the one that a launcher shows it, if that is one
/// alone. Where ranks share GPUs, they are dealt to them in turns.
int gpu_of_rank(int local_rank, int visible, bool share);

/// A phase of a rank's decode, and when it began.
struct TimedMark {
  RankPhase phase;
  double us;  ///< By the host's steady clock.
};

/// Takes the times of a decode's marks: by CUDA events on a GPU, which a graph takes along and every replay records
/// anew; by the host's clock on the model.
class PhaseClock : public RankObserver {
 public:
  /// Forgets all marks. To be called as a decode is enqueued.
  virtual void begin() = 0;
  /// The marks of the last run, which is done, in the order in which they were enqueued.
  /// @param uncertainty_us  how far the host's clock and the GPU's are from being brought together
  virtual Status read(std::vector<TimedMark>* marks, double* uncertainty_us) = 0;
};

/// What a difference between two clocks can be: every reading narrows it.
struct ClockBounds {
  double low = -1e300, high = 1e300;
  void narrow(double least, double most);
  double middle() const { return (low + high) / 2; }
  /// Where readings contradict each other, as clocks of a coarse step do, by how much.
  double half_width() const { return (high < low ? low - high : high - low) / 2; }
};

/// The host's steady clock.
double host_us();

/// Times what is enqueued on a stream of its own.
class RankClock {
 public:
  /// As many runs are enqueued before they are waited for. A queue that is full makes the host wait inside the driver,
  /// where it hears of no other rank's failure.
  static constexpr int kMostAtOnce = 64;
  using Enqueue = std::function<Status(Stream)>;
  /// Waits for a stream: Transport::wait of the rank.
  using Wait = std::function<Status(Stream)>;
  /// Tells the others of an error: Transport::fail of the rank.
  using Fail = std::function<void(const Status&)>;
  virtual ~RankClock() = default;
  /// Null on the model.
  virtual Stream stream() const = 0;
  /// Does it once, waits, and keeps it: as a CUDA graph, if `as_graph`, or to be enqueued again.
  virtual Status prepare(const Enqueue& enqueue, bool as_graph, int* handle) = 0;
  /// Does it `runs` times, in pieces of no more than `most`.
  /// @param us  if not null, the mean of one. Each piece has then one run more, before time is taken: ranks come to a
  ///            piece one after the other, and where they exchange anything they leave its first run together. On the
  ///            model 0
  Status run(int handle, int runs, double* us, int most = kMostAtOnce);
  /// Forgets it, before memory that it uses is freed.
  virtual void forget(int handle) = 0;
  /// Of this clock's stream. What is enqueued with it must be forgotten before it ends.
  virtual Status make_phase_clock(std::unique_ptr<PhaseClock>* clock) = 0;
  /// Does it `runs` times back to back, and waits: a piece of run().
  /// @param total_us  if not null, of all of them, after one more
  virtual Status run_piece(int handle, int runs, double* total_us) = 0;
};

/// @param fail  told of every error of prepare() and run(), before they return it: what is under way on the device
///              may be waiting for the others, and they for this rank, which announces no replay of a graph
/// @return the machine's error
Status make_rank_clock(Machine& machine, RankClock::Wait wait, std::unique_ptr<RankClock>* clock,
                       RankClock::Fail fail = nullptr);

}  // namespace mla::bench
