/// @file
/// Which line of a kernel a machine instruction belongs to.
#pragma once

#include <string>
#include <vector>

namespace gpu_model::detail {

/// A line of a function.
struct SourceFrame {
  std::string function;  ///< Demangled, with its parameters.
  std::string file;      ///< As "stages/01_naive/kernel.cuh".
  int line = 0;
};

/// Of each address behind an instruction the functions that it is in, the innermost first, each inlined
/// into the next. Functions of the model and of the system's headers are left out. Empty without addr2line or
/// debug information. Asks once for all.
std::vector<std::vector<SourceFrame>> source_frames(const std::vector<const void*>& codes);

/// "stages/01_naive/kernel.cuh:41", for the address behind an instruction; of a function of the model that
/// was inlined, the line that calls it. Without addr2line, or debug information, the address in its file.
std::string source_line(const void* code);

}  // namespace gpu_model::detail
