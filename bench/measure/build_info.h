/// @file
/// What the build knows about itself; filled in by build_info.cmake.
#pragma once

namespace mla::bench {

extern const char* const kCommit;        ///< git describe, or "unknown"
extern const char* const kCudaCompiler;  ///< "13.0.88", or "none"
extern const char* const kHostCompiler;  ///< "GNU 12.2.0"

}  // namespace mla::bench
