/// @file
/// What the driver's management library tells about the GPU, where it is there (loaded at run
/// time).
#pragma once

#include <string>

#include "bench/measure/statistics.h"

namespace mla::bench {

struct NvmlFacts {
  std::string driver;  ///< "580.159.04"; empty if unknown
  double power_limit_w = kUnknown;
  double max_sm_mhz = kUnknown;
  double memory_mhz = kUnknown;
};

/// Looks the device up by its PCI bus id ("0000:3b:00.0", from cudaDeviceGetPCIBusId). Everything
/// stays unknown if the library or the device cannot be found.
NvmlFacts nvml_facts(const std::string& pci_bus_id);

/// Clock of the multiprocessors now, in MHz; kUnknown before nvml_facts() found the device.
double nvml_sm_clock_mhz();

/// Energy that the device of the last nvml_facts() has used since the driver was loaded, in J;
/// kUnknown if it cannot be read.
double nvml_energy_joules();

/// Share of the last moments (NVML: up to a second) in which a kernel ran; kUnknown if it cannot be read.
double nvml_use_share();

/// Of the GPU itself, in degrees Celsius; kUnknown if it cannot be read.
double nvml_temperature_c();

}  // namespace mla::bench
