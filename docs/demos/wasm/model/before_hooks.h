/// @file
/// WebAssembly has no return addresses. places.py has every access say its place first.
#pragma once

#include <cstdint>

#include "docs/demos/wasm/missing.h"

extern "C" int gpu_model_place;  ///< Of the access that follows: a number of kPlaces.

#define __builtin_return_address(level) \
  reinterpret_cast<const void*>(static_cast<uintptr_t>(gpu_model_place))
