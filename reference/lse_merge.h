/// @file
/// Merging attention over parts of the tokens: what a combine kernel does with the parts of a split
/// sequence, and what context parallelism does with the parts that several devices computed.
#pragma once

#include <cmath>

#include "reference/float16.h"

namespace mla {

/// How two partial results (out_a, lse_a) and (out_b, lse_b) of one query row become one:
/// out = weight_a * out_a + weight_b * out_b.
template <typename Real>
struct LseMerge {
  Real weight_a, weight_b;  ///< They add up to 1, or are both 0 if both parts are empty.
  Real lse;                 ///< Natural log; +inf if both parts are empty.
};

/// Merges softmax-weighted means over two disjoint sets of tokens. A part that saw no token is one
/// whose lse is +inf, as decode() writes it, or -inf, as a sum over nothing is; its out is to be
/// taken as 0, whatever its weight of 0 would be multiplied with. NaN in either lse gives NaN.
///
/// Source: softmax over a union of sets, e.g. arXiv 2205.05198, section 3; natural logarithms.
template <typename Real>
MLA_HOST_DEVICE inline LseMerge<Real> merge_lse(Real lse_a, Real lse_b) {
  const Real kEmpty = -Real(INFINITY);
  if (lse_a == -kEmpty) lse_a = kEmpty;
  if (lse_b == -kEmpty) lse_b = kEmpty;
  if (lse_a == kEmpty && lse_b == kEmpty) return {Real(0), Real(0), -kEmpty};
  const Real larger = lse_a > lse_b ? lse_a : lse_b;  // finite, or a NaN is around
  const Real a = std::exp(lse_a - larger), b = std::exp(lse_b - larger);
  return {a / (a + b), b / (a + b), larger + std::log(a + b)};
}

}  // namespace mla
