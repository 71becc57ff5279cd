#include "reference/testing/observation.h"

#include <bit>
#include <cmath>
#include <sstream>

namespace mla {
namespace {

std::string hexadecimal(uint32_t word) {
  std::ostringstream out;
  out << "0x" << std::hex << word;
  return out.str();
}

/// Empty if equal.
std::string difference(const Observation& o, size_t i, const std::string& what, uint32_t expected) {
  if (o.words[i] == expected) return {};
  return o.row_name + " " + std::to_string(i / o.columns) + ", " + o.column_name + " " +
         std::to_string(i % o.columns) + " is " + hexadecimal(o.words[i]) + ", " + what + " " +
         hexadecimal(expected);
}

/// Hardware adds in its own order, and cuts off bits that fp32 would round.
bool is_close(float actual, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);
  const auto rounded = static_cast<float>(expected);
  if (std::isinf(rounded)) return actual == rounded;
  return std::abs(actual - expected) <= tolerance;
}

std::string float_difference(const Observation& o, size_t i, const std::string& what,
                             double expected, double tolerance) {
  const auto actual = std::bit_cast<float>(o.words[i]);
  if (is_close(actual, expected, tolerance)) return {};
  std::ostringstream out;
  out.precision(10);
  out << o.row_name << " " << i / o.columns << ", " << o.column_name << " " << i % o.columns
      << " is " << actual << ", " << what << " " << expected << ", +- " << tolerance;
  return out.str();
}

/// The place in `words` of element i of what the file has of kFloats.
size_t kept_float(const Observation& o, size_t i) {
  return i / 2 * o.columns + 4 + i % 2 * 2 + i / 2 % 2;
}

}  // namespace

std::string undocumented(const Observation& o) {
  size_t count = 0;
  std::string first;
  for (size_t i = 0; i < o.words.size(); ++i) {
    // In a sum of 16 and the old D each term may lose a unit of the largest one's last place.
    const std::string here =
        o.kept == Kept::kFloats
            ? float_difference(o, i, "the exact sum", o.sums[i], 0x1p-19 * o.magnitudes[i])
            : difference(o, i, "documented", o.documented[i]);
    if (here.empty()) continue;
    if (count++ == 0) first = here;
  }
  if (count == 0) return {};
  return std::to_string(count) + " of " + std::to_string(o.words.size()) + " words, first " + first;
}

std::vector<uint32_t> kept_words(const Observation& o) {
  if (o.kept == Kept::kWords) return o.words;
  const size_t rows = o.words.size() / o.columns;
  std::vector<uint32_t> result;
  if (o.kept == Kept::kFloats) {
    for (size_t i = 0; i < 2 * rows; ++i) result.push_back(o.words[kept_float(o, i)]);
    return result;
  }
  result.assign(rows + o.columns, 0x811c9dc5);
  for (size_t i = 0; i < o.words.size(); ++i) {
    for (uint32_t* hash : {&result[i / o.columns], &result[rows + i % o.columns]}) {
      for (int byte = 0; byte < 4; ++byte) {
        *hash = (*hash ^ (o.words[i] >> 8 * byte & 0xff)) * 0x01000193;
      }
    }
  }
  return result;
}

std::string not_golden(const Observation& o, const std::vector<uint32_t>& golden) {
  const std::vector<uint32_t> actual = kept_words(o);
  if (actual.size() != golden.size()) {
    return std::to_string(actual.size()) + " words, " + std::to_string(golden.size()) +
           " in the file";
  }
  const size_t rows = o.words.size() / o.columns;
  std::string different;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (o.kept == Kept::kWords) {
      const std::string here = difference(o, i, "on the GPU", golden[i]);
      if (!here.empty()) return here;
    } else if (o.kept == Kept::kFloats) {
      const size_t place = kept_float(o, i);
      const std::string here = float_difference(
          o, place, "on the GPU", std::bit_cast<float>(golden[i]), 0x1p-20 * o.magnitudes[place]);
      if (!here.empty()) return here;
    } else if (actual[i] != golden[i]) {
      different += i < rows ? " " + o.row_name + " " + std::to_string(i) + ";"
                            : " " + o.column_name + " " + std::to_string(i - rows) + ";";
    }
  }
  if (different.empty()) return {};
  const std::string documented = undocumented(o);
  return "not the GPU's:" + different +
         " and against what is documented: " + (documented.empty() ? "no difference" : documented);
}

}  // namespace mla
