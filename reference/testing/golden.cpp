#include "reference/testing/golden.h"

#include <fstream>
#include <istream>
#include <ostream>

namespace mla {

void write_golden_words(std::ostream& out, const GoldenWords& golden) {
  for (const auto& [name, words] : golden) {
    out << name << " " << words.size();
    int column = 0;
    for (size_t i = 0; i < words.size(); ++column) {
      out << (column % 8 == 0 ? '\n' : ' ');
      size_t end = i;
      while (end < words.size() && words[end] == 0) ++end;
      if (end > i) {
        out << '*' << std::dec << end - i;
        i = end;
      } else {
        out << std::hex << words[i++] << std::dec;
      }
    }
    out << "\n";
  }
}

GoldenWords read_golden_words(std::istream& in) {
  GoldenWords result;
  std::string name, token;
  while (in >> std::ws && in.peek() == '#') std::getline(in, name);
  size_t count = 0;
  while (in >> name >> count) {
    std::vector<uint32_t>& words = result[name];
    while (words.size() < count && in >> token) {
      if (token[0] == '*') {
        words.resize(words.size() + std::stoul(token.substr(1)));
      } else {
        words.push_back(static_cast<uint32_t>(std::stoul(token, nullptr, 16)));
      }
    }
    if (words.size() != count) return {};
  }
  return result;
}

GoldenWords read_golden_file(const char* path) {
  std::ifstream file(path);
  return read_golden_words(file);
}

}  // namespace mla
