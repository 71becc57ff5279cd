/// @file
/// Aligned plain-text tables, and the numbers in them.
#pragma once

#include <string>
#include <vector>

#include "bench/measure/statistics.h"

namespace mla::bench {

/// Rows of cells, printed in columns under a header. Cells are UTF-8. The first column is aligned
/// left, as is the last (which is not padded, so that it may be long); the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  std::string to_string() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// Characters (not bytes) of a UTF-8 text.
size_t width(const std::string& text);

/// @name Cells
/// kUnknown prints as a dash.
/// @{
std::string number(double value, int significant = 3);  ///< 0.0123, 1.23, 123, 12345
std::string microseconds(double value);                 ///< 9.87, 118.4, 12345
std::string spread(const Summary& summary);             ///< "118.4 (117.9-119.6)"
std::string percent(double share);                      ///< "81%"
std::string factor(double value);                       ///< "3.4x"
std::string error(double value);                        ///< "1.7e-03"
/// @}

}  // namespace mla::bench
