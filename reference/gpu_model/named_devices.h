/// @file
/// Devices for the model to pretend, by name: a stage that chooses by device shows all its choices on them.
#pragma once

#include <span>

#include "reference/gpu_model/gpu_model.h"

namespace gpu_model {

struct NamedDevice {
  const char* name;
  const char* what;
  Device device;
};

/// The first is the default.
std::span<const NamedDevice> named_devices();

}  // namespace gpu_model
