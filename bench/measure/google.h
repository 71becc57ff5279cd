/// @file
/// Google Benchmark as what drives every measurement: benchmarks are registered by name before
/// anything runs, its flags say which of them run and how often, and what it reports is written.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench/measure/environment.h"
#include "reference/status.h"

namespace mla::bench {

/// What the library's flags (--benchmark_...) ask for, as far as this program must know it.
struct GoogleFlags {
  bool list = false;                         ///< Print the names of what would run, and end
  std::optional<int> repetitions;            ///< Rounds; by default the protocol's
  bool own_order = false;                    ///< The library's order of calls, not rounds in turn
  bool own_iterations = false;               ///< The library's count of runs, not the protocol's
  bool display_aggregates_only = false;      ///< Of the listing alone
  std::string out;                           ///< A file for the JSON, or empty
  std::vector<std::string> for_the_library;  ///< Those that it reads itself
};

/// Reads flags.
/// @return kInvalidArgument for one that is unknown, has a bad value, or cannot be honoured here
Status read_google_flags(const std::vector<std::string>& arguments, GoogleFlags* flags);

/// One benchmark when its turn has come.
struct GoogleRun {
  std::string name;    ///< As registered
  int iterations = 1;  ///< Per repetition, unless the user said how many
  int rounds = 1;      ///< Repetitions, likewise
  /// Runs `count` times and appends a time in us for each: one sample per iteration.
  std::function<Status(int count, std::vector<double>* us)> measure;
  std::map<std::string, double> per_iteration = {};  ///< Shown as rates: FLOP, bytes
  std::vector<double>* us = nullptr;                 ///< Where the samples of all rounds go
};

/// What a program says of a benchmark beyond the library's own figures.
struct GoogleEntry {
  std::string name;                        ///< "stage/shape/cold"
  double us = 0;                           ///< The median of all samples
  std::map<std::string, double> counters;  ///< kUnknown ones are left out
  std::string label;
  std::string why_not;  ///< Empty, or the error that takes the place of a time
};

/// The library, of which a process has one; so there is one of these at a time.
class GoogleBenchmark {
 public:
  /// Registers `names`, in this order, and lets the library choose among them by its filter. Nothing
  /// runs. `show`: print the library's own listing while it runs.
  /// @return kInvalidArgument if the filter chooses none, or is no regular expression
  static Status create(const std::vector<std::string>& names, const GoogleFlags& flags, bool show,
                       std::unique_ptr<GoogleBenchmark>* result);
  ~GoogleBenchmark();

  /// What the library lists: the full names of those that the filter leaves, one per line.
  const std::string& listing() const;
  bool is_chosen(const std::string& name) const;
  bool is_any_chosen(const std::vector<std::string>& names) const;

  /// Lets the library run those of `runs` that are chosen. A round of it is a repetition to the
  /// library, whose own order has all repetitions of a benchmark in a row; so the rounds are taken
  /// first, in turn (A, B, A, B), and each of its calls is given the next one. Where flags ask for
  /// its own counts or its random order, its calls measure.
  /// @return what `measure` returned, in the order of `runs`; a run that failed leaves no samples
  std::vector<Status> run(std::span<const GoogleRun> runs);

  /// Adds to what the library reported: the figures of all samples as one more aggregate,
  /// "samples", of a benchmark that ran; or the reason of one that has no result. Entries that are
  /// not chosen are left out.
  void add(const std::vector<GoogleEntry>& entries);

  /// Drops what was reported of a benchmark whose result turned out wrong.
  void forget(const std::string& name);

  /// The library's JSON of everything that was reported, less what names the machine's owner.
  std::string json(const Context& context) const;

 private:
  class Library;
  explicit GoogleBenchmark(std::unique_ptr<Library> library);
  std::unique_ptr<Library> library_;
};

}  // namespace mla::bench
