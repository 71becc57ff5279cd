/// @file
/// The traditional way to decode, as a peer: what a framework does with library calls.
///
///     gather    the pages of each sequence to one padded buffer        [b, s, 576]
///     S = Q K^T   one batched product, cuBLAS, fp32 out                [b, rows, s]
///     softmax   P = exp(scale S - max), 16 bits; sums and lse          [b, rows, s]
///     O = P V   one batched product, cuBLAS, fp32 out                  [b, rows, 512]
///     divide    by the sums, to out
///
/// where s is what the block table can hold: without lengths on the host, every sequence is padded
/// to that. The batch is walked in chunks: their scores stay under 4 GiB, or they are one sequence.
#pragma once

#include <string>

#include "stages/common/stage.h"

namespace mla::bench {

/// A stage that is in no registry, for one KV head (else kUnsupported); its slug is "cublas_pipeline".
/// Null where there is no cuBLAS (see cublas.h) or the build is without CUDA: `why_not` says so.
const Stage* cublas_pipeline(std::string* why_not);

}  // namespace mla::bench
