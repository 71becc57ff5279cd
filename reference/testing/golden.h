/// @file
/// What the tests share that replay what a GPU did: arrays of words as text, and numbers to feed in.
#pragma once

#include <bit>
#include <cstdint>
#include <istream>
#include <map>
#include <ostream>
#include <string>
#include <type_traits>
#include <vector>

#include "reference/float16.h"

namespace mla {

/// Arrays of words by name.
using GoldenWords = std::map<std::string, std::vector<uint32_t>>;

// Text: a name and a number of words, then the words in hexadecimal; *N stands for N zeros.

inline void write_golden_words(std::ostream& out, const GoldenWords& golden) {
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

/// Empty if the file is damaged.
inline GoldenWords read_golden_words(std::istream& in) {
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

template <typename T>
uint32_t bits_of(float value) {
  return std::bit_cast<uint16_t>(from_float<T>(value));
}

/// Splitmix64.
inline uint32_t random_word(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

/// Sign and fraction at random; `exponent` is the biased one.
template <typename T>
uint32_t random_value(uint64_t& state, uint32_t exponent) {
  constexpr int kFractionBits = std::is_same_v<T, bfloat16> ? 7 : 10;
  const uint32_t word = random_word(state);
  return (word & 0x8000) | exponent << kFractionBits | (word & ((1u << kFractionBits) - 1));
}

}  // namespace mla
