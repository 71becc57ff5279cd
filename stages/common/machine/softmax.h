/// @file
/// Numbers of the softmax, the same in every stage. Logits are kept in powers of two, as 2^x is the
/// instruction that the GPU has.
#pragma once

#include <type_traits>

#include "reference/float16.h"

namespace mla {

inline constexpr float kLog2e = 1.44269504f;  ///< e^x = 2^(kLog2e x)
inline constexpr float kLn2 = 0.693147181f;   ///< ln x = kLn2 log2 x

/// The largest P, in powers of two. From stage 05 on P is 16 bits wide. fp16 has few exponents, so P
/// takes all of them: a token that weighs 2^-21 of the heaviest is still a normal number. bf16 has as
/// many as fp32, and there P <= 1 keeps P V as small as V.
template <typename T>
inline constexpr float kLargestP = std::is_same_v<T, float16> ? 15 : 0;
/// The same as a number, 2^kLargestP.
template <typename T>
inline constexpr float kBound = std::is_same_v<T, float16> ? 32768 : 1;
/// How far below kLargestP, in powers of two, a row's largest P is put when its m moves.
inline constexpr float kHeadroom = 8;

}  // namespace mla
