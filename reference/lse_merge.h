/// @file
/// Merging attention over disjoint sets of tokens: what a combine kernel does with the parts of a
/// split sequence, and what context parallelism does with the parts that several devices computed.
#pragma once

#include <cmath>

#include "reference/dtype.h"

namespace mla {

/// How two partial results (out_a, lse_a) and (out_b, lse_b) of one query row become one:
/// out = weight_a * out_a + weight_b * out_b.
template <typename Real>
struct LseMerge {
  Real weight_a, weight_b;  ///< They add up to 1; both are 0 if both parts are empty.
  Real lse;                 ///< Natural log; +inf if both parts are empty.
};

/// Merges softmax-weighted means over two disjoint sets of tokens. A part that saw no token has an
/// lse of +inf, as decode() writes it, or -inf, the logarithm of a sum over nothing. Its weight is
/// 0, and its out must be taken as 0, since 0 times whatever it holds may be NaN. NaN in either lse
/// gives NaN.
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
