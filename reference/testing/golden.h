/// @file
/// Golden data, what a GPU did with single instructions: its text, and numbers to feed them.
#pragma once

#include <bit>
#include <cstdint>
#include <iosfwd>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "reference/float16.h"

namespace mla {

/// Arrays of words by name.
using GoldenWords = std::map<std::string, std::vector<uint32_t>>;

/// The golden files, as paths from the project's root. make_golden writes them.
inline constexpr char kFragmentsFile[] = "reference/testing/golden/fragments.txt";
/// The same for Hopper's instructions.
inline constexpr char kHopperFragmentsFile[] = "reference/testing/golden/hopper_fragments.txt";
/// The same for clusters.
inline constexpr char kClusterFragmentsFile[] = "reference/testing/golden/cluster_fragments.txt";
/// What a test says behind the name of a file that is not what it should be.
inline constexpr char kGoldenFileHelp[] =
    " is missing or damaged, or it records other instructions. Run this in the project's root; "
    "make_golden makes the file on a machine with a GPU";

/// Writes, for each array, its name and number of words, then the words in hexadecimal; *N is N
/// zeros (N in decimal).
void write_golden_words(std::ostream& out, const GoldenWords& golden);

/// Reads what write_golden_words wrote, behind any lines that begin with #. Empty if damaged.
GoldenWords read_golden_words(std::istream& in);

/// The same for the file at `path`. Empty if there is none, or if it is damaged.
GoldenWords read_golden_file(const char* path);

/// The pattern of `value`, rounded to T.
template <typename T>
uint32_t bits_of(float value) {
  return std::bit_cast<uint16_t>(from_float<T>(value));
}

/// Splitmix64: the next word of the sequence that `state` is at.
inline uint32_t random_word(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

/// The pattern of a T with random sign and fraction; `exponent` is the biased one.
template <typename T>
uint32_t random_value(uint64_t& state, uint32_t exponent) {
  constexpr int kFractionBits = std::is_same_v<T, bfloat16> ? 7 : 10;
  const uint32_t word = random_word(state);
  return (word & 0x8000) | exponent << kFractionBits | (word & ((1u << kFractionBits) - 1));
}

}  // namespace mla
