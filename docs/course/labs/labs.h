/// @file
/// What the labs of docs/course/labs share. A lab is one kernel about one instruction: `labs/NAME.cuh` lacks the marked
/// part, `labs/solutions/NAME.cuh` has it. Both are compiled, in namespaces of their own (MLA_LAB).
#pragma once

#include <cstdint>

#include "reference/status.h"

namespace mla {

/// What a lab's kernel gets, in the machine's memory. What the arrays hold is said in the lab.
struct LabData {
  const void* a = nullptr;
  const void* b = nullptr;
  uint32_t* out = nullptr;  ///< Or floats, bit by bit.
  int count = 0;            ///< Tiles, or rounds.
};

/// One form of a lab's kernel.
struct LabForm {
  const char* lab;   ///< "tma_box"
  const char* form;  ///< "reader", "solution", or what is wrong with it
  Status (*run)(const LabData& data);
};

}  // namespace mla
