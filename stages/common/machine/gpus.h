/// @file
/// The GPUs of this process, where it uses more than the current one.
#pragma once

#include <string>

#include "reference/status.h"

namespace mla {

/// How many there are; 0 in a build without CUDA.
int gpu_count();

/// "3 ranks need as many GPUs; there is 1"
std::string too_few_gpus(int ranks, int gpus);

/// Makes GPU `index`, counted from 0, the current device of this thread.
/// @return CUDA's error; kUnavailable in a build without CUDA
Status use_gpu(int index);

}  // namespace mla
