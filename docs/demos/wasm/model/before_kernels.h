/// @file
/// Included before a kernel that is compiled for a browser: any of its barriers can be left out while it runs.
#pragma once

#include "docs/demos/wasm/missing.h"
#include "stages/common/machine/device.h"

extern int barrier_left_out;  ///< A line of the stage's kernel.cuh; 0: none.

#define __syncthreads() (barrier_left_out == __LINE__ ? void() : (__syncthreads)())
