/// @file
/// The shapes that are measured, by name.
///
/// A name says everything: h128_q1_b64_k4096 is 128 query heads, 1 query token, 64 sequences of
/// 4096 tokens. `h16x2` has 2 KV heads. `_causal`, `_split1024` (batch-invariant, cut every 1024
/// tokens: any multiple of 64) and `_fp16` may follow, in this order. In place of equal lengths:
///
///     klognormal8192   log-normal, mean 8192, standard deviation 4096
///     kskew131072      one sequence of 131072 tokens, all others 512
///     kvaried256       normal, mean 256, standard deviation 128, about one in eight empty
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "reference/data_generator.h"

namespace mla::bench {

struct Shape {
  std::string name;
  DecodeCase spec;         ///< Flat data, seed 0.
  bool plan_only = false;  ///< Only plans are timed: no cache is made.
  /// "h_q=128 s_q=2 causal, 128 x 4096, bf16"
  std::string title() const;
};

/// The shape that `name` spells, or kInvalidArgument with what is wrong with it.
Status parse_shape(std::string_view name, Shape* shape);

/// Names of a suite: "main" (the default on a GPU), "table" (every shape of docs' table),
/// "invariant" (pairs without and with _split1024), "plan" (shapes on which plans alone are timed),
/// "smoke" (small enough for the GPU model); empty for an unknown one.
std::vector<std::string> suite(std::string_view name);

/// Names of all suites: "main, table, ...".
std::string suite_names();

/// Which shapes to measure. `filter` is a comma-separated list of names, which need not be in any
/// suite, and of regular expressions over the suite's names; empty: the whole suite. All of suite
/// "plan" are plan_only; the whole suite "table" has them at its end.
Status select_shapes(std::string_view suite_name, const std::string& filter, DType dtype,
                     std::vector<Shape>* shapes);

}  // namespace mla::bench
