#include "bench/measure/nvml.h"

#include <dlfcn.h>

namespace mla::bench {
namespace {

using Device = void*;
constexpr unsigned kClockSm = 1;      // NVML_CLOCK_SM
constexpr unsigned kClockMemory = 2;  // NVML_CLOCK_MEM

Device found_device = nullptr;

/// The function of this name in libnvidia-ml, or null. All of those used here return 0 for success.
template <typename Function>
Function* function(const char* name) {
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
}

double clock(const char* name, unsigned kind) {
  static_assert(sizeof(unsigned) == 4, "NVML's enums are 32 bits wide");
  auto* get = function<int(Device, unsigned, unsigned*)>(name);
  unsigned mhz = 0;
  if (get == nullptr || found_device == nullptr || get(found_device, kind, &mhz) != 0) {
    return kUnknown;
  }
  return mhz;
}

}  // namespace

NvmlFacts nvml_facts(const std::string& pci_bus_id) {
  NvmlFacts facts;
  auto* init = function<int()>("nvmlInit_v2");
  auto* find = function<int(const char*, Device*)>("nvmlDeviceGetHandleByPciBusId_v2");
  if (init == nullptr || find == nullptr || init() != 0) return facts;

  char driver[96] = {};
  auto* get_driver = function<int(char*, unsigned)>("nvmlSystemGetDriverVersion");
  if (get_driver != nullptr && get_driver(driver, sizeof driver) == 0) facts.driver = driver;

  if (find(pci_bus_id.c_str(), &found_device) != 0) {
    found_device = nullptr;
    return facts;
  }
  unsigned milliwatts = 0;
  auto* get_limit = function<int(Device, unsigned*)>("nvmlDeviceGetEnforcedPowerLimit");
  if (get_limit != nullptr && get_limit(found_device, &milliwatts) == 0) {
    facts.power_limit_w = milliwatts / 1e3;
  }
  facts.max_sm_mhz = clock("nvmlDeviceGetMaxClockInfo", kClockSm);
  facts.memory_mhz = clock("nvmlDeviceGetClockInfo", kClockMemory);
  return facts;
}

double nvml_energy_joules() {
  auto* get = function<int(Device, unsigned long long*)>("nvmlDeviceGetTotalEnergyConsumption");
  unsigned long long millijoules = 0;
  if (get == nullptr || found_device == nullptr || get(found_device, &millijoules) != 0) {
    return kUnknown;
  }
  return static_cast<double>(millijoules) / 1e3;
}

double nvml_use_share() {
  struct Rates {  // nvmlUtilization_t
    unsigned gpu, memory;
  } percent = {};
  auto* get = function<int(Device, Rates*)>("nvmlDeviceGetUtilizationRates");
  if (get == nullptr || found_device == nullptr || get(found_device, &percent) != 0) {
    return kUnknown;
  }
  return percent.gpu / 100.0;
}

double nvml_temperature_c() {
  constexpr unsigned kOfTheGpu = 0;  // NVML_TEMPERATURE_GPU
  auto* get = function<int(Device, unsigned, unsigned*)>("nvmlDeviceGetTemperature");
  unsigned degrees = 0;
  if (get == nullptr || found_device == nullptr || get(found_device, kOfTheGpu, &degrees) != 0) {
    return kUnknown;
  }
  return degrees;
}

double nvml_sm_clock_mhz() {
  return clock("nvmlDeviceGetClockInfo", kClockSm);
}

}  // namespace mla::bench
