/// @file
/// Checks of single arguments, with the messages that all entry points share.
#pragma once

#include "reference/status.h"

namespace mla {

/// @return kInvalidArgument with "name = value must be at least 1", or ok.
Status check_at_least_one(const char* name, int value);

/// @return kInvalidArgument with "page_size = value must be 16, 32, 64, 128 or 256", or ok.
Status check_page_size(int page_size);

/// Checks a pointer without following it.
/// @return kInvalidArgument, naming the pointer, if it is null or not aligned to `alignment` bytes; or
/// ok.
Status check_pointer(const char* name, const void* pointer, int alignment = 16);

}  // namespace mla
