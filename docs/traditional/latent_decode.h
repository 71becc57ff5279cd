/// @file
/// A decode of traditional latent attention, and the kernels of the lab "find five bugs" (README.md beside this).
#pragma once

#include "reference/status.h"

namespace mla {

/// One query token; all heads attend to the same keys and values. In the machine's memory.
struct LatentDecode {
  static constexpr int kColumns = 64;  ///< Of q, k, v and out.
  static constexpr int kMostTokens = 1024;

  const float* q = nullptr;  ///< [heads, 64]
  const float* k = nullptr;  ///< [tokens, 64]
  const float* v = nullptr;  ///< [tokens, 64]
  float* scores = nullptr;   ///< [heads, tokens], for kernels that keep them in global memory
  float* out = nullptr;      ///< [heads, 64]: softmax(scale q k^T) v
  int heads = 0;             ///< >= 1
  int tokens = 0;            ///< 1 ... kMostTokens
  float scale = 0;
};

/// A kernel, enqueued; what the model rejects is kKernelRejected.
using LatentKernel = Status (*)(const LatentDecode& decode);

}  // namespace mla
