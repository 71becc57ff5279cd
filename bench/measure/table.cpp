#include "bench/measure/table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace mla::bench {
namespace {

constexpr const char* kDash = "—";

}  // namespace

size_t width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char byte) {
    return (static_cast<unsigned char>(byte) & 0xc0) != 0x80;  // not a continuation byte
  }));
}

std::string Table::to_string() const {
  std::vector<size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string text;
  const auto add_row = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - width(row[i]), ' ');
      const bool left = i == 0 || i + 1 == widths.size();
      if (i > 0) line += "  ";
      line += left ? row[i] + padding : padding + row[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  };
  add_row(rows_.front());
  std::string rule;
  for (size_t i = 0; i < widths.size(); ++i) {
    if (i > 0) rule += "  ";
    for (size_t j = 0; j < widths[i]; ++j) rule += "─";
  }
  text += rule + '\n';
  std::for_each(rows_.begin() + 1, rows_.end(), add_row);
  return text;
}

std::string number(double value, int significant) {
  if (std::isnan(value)) return kDash;
  const double magnitude = value == 0 ? 0 : std::floor(std::log10(std::fabs(value)));
  return fmt::format("{:.{}f}", value, std::max(0, significant - 1 - static_cast<int>(magnitude)));
}

std::string microseconds(double value) {
  if (std::isnan(value)) return kDash;
  return fmt::format("{:.{}f}", value, value < 10 ? 2 : value < 1000 ? 1 : 0);
}

std::string spread(const Summary& summary) {
  if (summary.n == 0) return kDash;
  return fmt::format("{} ({}–{})", microseconds(summary.median), microseconds(summary.p10),
                     microseconds(summary.p90));
}

std::string percent(double share) {
  return std::isnan(share) ? kDash : fmt::format("{:.{}f}%", 100 * share, share < 0.0995 ? 1 : 0);
}

std::string factor(double value) {
  return std::isnan(value) ? kDash : number(value, 2) + "×";
}

std::string error(double value) {
  return std::isnan(value) ? kDash : fmt::format("{:.1e}", value);
}

}  // namespace mla::bench
