/// @file
/// The numbers that fill a layer's tensors (attention_layer.h), the same on CPU and GPU.
#pragma once

#include <cstdint>

#include "reference/counter_random.h"

namespace mla::bench {

/// A whole number from -127 to 127, uniform.
MLA_HOST_DEVICE inline int drawn_number(int buffer, int64_t index) {
  const uint64_t key =
      counter_random::mix(counter_random::kStep * static_cast<uint64_t>(buffer + 1));
  return static_cast<int>((counter_random::draw(key, index) >> 32) % 255) - 127;
}

}  // namespace mla::bench
