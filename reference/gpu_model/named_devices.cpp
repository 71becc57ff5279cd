#include "reference/gpu_model/named_devices.h"

namespace gpu_model {
namespace {

constexpr NamedDevice kDevices[] = {
    {"h100", "Hopper, the default", {}},
    {"a100", "compute capability 8.0", {.compute_capability = 80, .max_shared_bytes = 166912}},
    {"rtx3090",
     "8.6, with less shared memory",
     {.compute_capability = 86, .max_shared_bytes = 101376}},
    {"h100_grid5",
     "grids of at most 5 blocks, so that every kernel walks its items",
     {.max_grid_x = 5}},
    {"h100_sm3", "3 multiprocessors, so that a worker has many tiles", {.multiprocessors = 3}}};

}  // namespace

std::span<const NamedDevice> named_devices() {
  return kDevices;
}

}  // namespace gpu_model
