/// @file
/// Which line of a kernel a machine instruction belongs to.
#pragma once

#include <string>

namespace gpu_model::detail {

/// "stages/01_naive/kernel.cuh:41", for the address behind an instruction; of a function of the model that
/// was inlined, the line that calls it. Without addr2line, or debug information, the address in its file.
std::string source_line(const void* code);

}  // namespace gpu_model::detail
