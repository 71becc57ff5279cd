/// @file
/// What a machine did when it ran an instruction, beside what the instruction's documentation says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mla {

/// How a golden file keeps an observation.
enum class Kept {
  kWords,   ///< As it is.
  kHashes,  ///< FNV-1a of every row, then of every column: they tell what differs.
  kFloats   ///< Rounded sums: per thread one of D's columns 8 ... 15, in both its rows.
};

/// What a machine did, as a table of words.
struct Observation {
  std::string name;
  Kept kept = Kept::kWords;
  std::string row_name, column_name;  ///< What a row and a column of the table are, for reports.
  size_t columns = 0;                 ///< Words per row.
  std::vector<uint32_t> words;        ///< [rows, columns]
  /// [rows, columns] What the documentation says. Not compared for Kept::kFloats.
  std::vector<uint32_t> documented;
  /// [rows, columns] For Kept::kFloats: the exact sums, and the sums of the terms' magnitudes.
  std::vector<double> sums, magnitudes;
};

/// How `observation` differs from its documentation, with the first place; empty if it does not.
std::string undocumented(const Observation& observation);

/// What a golden file keeps of `observation`.
std::vector<uint32_t> kept_words(const Observation& observation);

/// How `observation` differs from what a golden file keeps of it; empty if it does not.
std::string not_golden(const Observation& observation, const std::vector<uint32_t>& golden);

}  // namespace mla
