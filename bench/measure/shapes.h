/// @file
/// The shapes that are measured, by name.
///
/// A name says everything: h128_q1_b64_k4096 is 128 query heads, 1 query token, 64 sequences of
/// 4096 tokens. `h16x2` has 2 KV heads. `_causal`, `_split1024` (batch-invariant, cut every 1024
/// tokens: any multiple of 64), `_page16`, `_strided`, `_fp8_tile128`, `_fp8_tensor` or `_int8_tile128`
/// (a quantised cache), `_peak4` (logits with a standard deviation of 4, by the scale; else 0.01) and
/// `_fp16` may follow, in this order. In place of equal lengths:
///
///     klognormal8192   log-normal, mean 8192, standard deviation 4096
///     kstepped32768    evenly from 32768 / b to 32768: 256, 512, ... for 128 sequences
///     kskew131072      one sequence of 131072 tokens, all others 512
///     kvaried256       normal, mean 256, standard deviation 128, about one in eight empty
///     k256+0+1024      these three; 0 is an empty sequence
///
/// Where lengths are listed, `_b3` may be left out; if it is there, it must be their number.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "reference/testing/data_generator.h"

namespace mla::bench {

/// What is done with a shape.
enum class Measure {
  kTimes,   ///< Decodes are checked and timed, and plans beside them.
  kEnergy,  ///< The same, all stages back to back as long as those on tensor cores.
  kPlans,   ///< Only plans are timed: no cache is made.
  kErrors,  ///< Decodes are checked against the reference, and not timed.
};
/// "times", "energy", "plans", "errors"
const char* to_string(Measure measure);

/// How a name spells lengths.
enum class Lengths { kEqual, kLogNormal, kStepped, kSkew, kVaried, kListed };
/// "equal", "lognormal", "stepped", "skew", "varied", "listed"
const char* to_string(Lengths lengths);

struct Shape {
  std::string name;
  DecodeCase spec;  ///< Flat data, seed 0. `seqlen_k` is the name's number, or the longest listed.
  Lengths lengths = Lengths::kEqual;
  int peak = 0;  ///< Standard deviation of the logits; 0: as the usual scale gives it
  Measure measure = Measure::kTimes;
  /// "h_q=128 s_q=2 causal, 128 x 4096, bf16"
  std::string title() const;
};

/// The shape that `text` spells.
/// @return kInvalidArgument with what is wrong with it; kOutOfMemory if not even its lengths can be
/// held
Status parse_shape(std::string_view text, Shape* shape);

/// A suite: its name, what it is for, and its shapes' names.
struct Suite {
  std::string name;
  std::string what;
  std::vector<std::string> shapes;
  Measure measure = Measure::kTimes;
  bool apart = false;  ///< Not in "all"; a results file names its shapes only if it was asked for
};

/// Every suite. "all" has what is recorded together: the shapes of all that are not apart, each once.
const std::vector<Suite>& suites();

/// The suite of this name, or null.
const Suite* find_suite(std::string_view name);

/// Names of all suites.
std::vector<std::string> suite_names();

/// The shape of equal lengths to which a batch is padded: all as long as its longest sequence.
std::string padded(const std::string& shape_name);

/// Which shapes to measure. `filter` is a comma-separated list of names, which need not be in any
/// suite, and of regular expressions over the suite's names; empty: the whole suite.
Status select_shapes(std::string_view suite_name, const std::string& filter, DType dtype,
                     std::vector<Shape>* shapes);

/// The shapes of every suite, each once.
std::vector<Shape> every_shape();

}  // namespace mla::bench
