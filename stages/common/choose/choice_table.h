/// @file
/// Times of stages by regime, measured on one device: what choose.h chooses by. mla_tune writes such a
/// table as JSON; those in `tables` are built in.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reference/problem.h"
#include "stages/common/split/plan.h"

namespace mla {

/// What the host knows of a decode before it runs: shapes, and no lengths.
struct Regime {
  int64_t rows = 1;       ///< Query rows per KV head.
  int64_t sequences = 1;  ///< batch * num_heads_kv: KV heads are decoded like sequences.
  int64_t tokens = 1;     ///< Most that a sequence can have: the width of its block table.
  CacheFormat cache_format = CacheFormat::k16Bit;
  bool operator==(const Regime&) const = default;
};
/// The regime of a problem. With fixed_split_tokens that of kInvariantSequences, whatever the batch and
/// the block table are: another stage would give a sequence other bits.
Regime regime_of(const Problem& problem);
/// Sequences and tokens of regime_of() with fixed_split_tokens.
inline constexpr int64_t kInvariantSequences = 64, kInvariantTokens = 4096;

/// "128 rows, 64 sequences, 4096 tokens", and of a quantised cache ", cache fp8_tile128"
std::string to_string(const Regime& regime);

/// How long a stage takes in a regime.
struct TimedStage {
  std::string stage;      ///< Slug.
  PlanSettings settings;  ///< That it was timed with.
  double us = 0;          ///< Cold, the plan made before.
};

/// All that was timed in a regime, every sequence as long as its block table allows.
struct RegimeTimes {
  Regime regime;
  std::vector<TimedStage> times;
};

/// A table.
struct ChoiceTable {
  std::string origin;          ///< "built in" or the file that it was read from.
  std::string device;          ///< "NVIDIA H200"
  int compute_capability = 0;  ///< 90 for 9.0
  std::string measured;        ///< "2026-11-21, commit 65a9dad": when, and of what.
  std::vector<RegimeTimes> regimes;
  std::vector<CacheFormat> cache_formats;  ///< Of which it has regimes: every decode asks.

  bool has(CacheFormat format) const;
  /// Adds a regime, and its cache format to those.
  void add(RegimeTimes one);
};

/// The schema of the files.
inline constexpr const char* kChoiceSchema = "flashmla_choice/1";

/// Reads a table.
/// @param origin  of the text, for messages
/// @return kFileError, saying what is wrong with it; `table` is then untouched
Status parse_choice_table(std::string_view json, const std::string& origin, ChoiceTable* table);

/// The table for a device: one that was measured on a device of that name, else one of the same compute
/// capability, else the first; of those that have regimes of the cache format, or, where none has, of all.
/// Null if there is none.
const ChoiceTable* table_for(std::span<const ChoiceTable> tables, const DeviceLimits& limits,
                             CacheFormat format);

/// The table's regime that is taken for `regime`; null if the table has none of that cache format. The
/// format's regimes have several numbers of rows. Taken is the least that is not smaller, or else the
/// largest, because kernels pad rows; a problem's sequences then count once for each tile of so many rows.
/// Of these regimes it is the one whose sequences and tokens are nearest, by factors; of equally near ones
/// the first.
const RegimeTimes* nearest(const ChoiceTable& table, const Regime& regime);

/// The tables in force: those that are built in, or in their place the one of the file that the
/// environment variable MLA_CHOICE_TABLE or use_choice_table() named.
std::span<const ChoiceTable> choice_tables();

/// Not ok: the file that MLA_CHOICE_TABLE names was not read, for this reason. The built-in tables are
/// then in force.
Status choice_table_status();

/// Chooses by this file from now on. For the beginning of a program: a plan made before may not fit the
/// stage that is chosen afterwards.
/// @return kFileError, and the tables stay as they were
Status use_choice_table(const std::string& path);

}  // namespace mla
