#include "bench/measure/environment.h"

#include <fmt/chrono.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <ctime>

#include "bench/measure/build_info.h"
#include "bench/measure/nvml.h"
#include "bench/measure/recorded.h"
#include "bench/measure/table.h"

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace mla::bench {
namespace {

void add_known(Context* context, const char* key, double value, int significant) {
  if (!std::isnan(value)) context->emplace_back(key, number(value, significant));
}

#ifdef MLA_HAVE_CUDA
std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void add_gpu(Context* context) {
  int device = 0, driver = 0, runtime = 0;
  cudaDeviceProp properties{};
  char bus_id[32] = {};
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaGetDeviceProperties(&properties, device) != cudaSuccess ||
      cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device) != cudaSuccess ||
      cudaDriverGetVersion(&driver) != cudaSuccess ||
      cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
    context->emplace_back("gpu", "unknown");
    return;
  }
  const NvmlFacts facts = nvml_facts(bus_id);
  context->emplace_back("gpu", properties.name);
  context->emplace_back("compute_capability",
                        std::to_string(properties.major) + "." + std::to_string(properties.minor));
  context->emplace_back("multiprocessors", std::to_string(properties.multiProcessorCount));
  context->emplace_back("l2_mib", std::to_string(properties.l2CacheSize >> 20));
  context->emplace_back("driver", facts.driver.empty() ? "unknown" : facts.driver);
  context->emplace_back("cuda_driver", cuda_version(driver));
  context->emplace_back("cuda_runtime", cuda_version(runtime));
  const auto or_unknown = [](double value) {
    return std::isnan(value) ? std::string("unknown") : number(value, 4);
  };
  context->emplace_back("max_sm_mhz", or_unknown(facts.max_sm_mhz));
  context->emplace_back("memory_mhz", or_unknown(facts.memory_mhz));
  context->emplace_back("power_limit_w", or_unknown(facts.power_limit_w));
}
#else
void add_gpu(Context*) {}
#endif

}  // namespace

Context describe_environment(const Machine& machine) {
  const bool gpu = machine.kind() == MachineKind::kGpu;
  Context context{{"schema", kResultsSchema},
                  {"machine", gpu ? "gpu" : "model"},
                  {"machine_description", machine.description()}};
  if (gpu) add_gpu(&context);
  context.emplace_back("nvcc", kCudaCompiler);
  context.emplace_back("host_compiler", kHostCompiler);
  context.emplace_back("commit", kCommit);
  context.emplace_back("date_utc",
                       fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))));
  return context;
}

Context describe_ceilings(const Ceilings& ceilings) {
  Context context;
  add_known(&context, "ceiling_read_gbps", ceilings.read / 1e9, 4);
  add_known(&context, "ceiling_read_302mb_gbps", ceilings.read_302mb / 1e9, 4);
  add_known(&context, "ceiling_fp32_tflops", ceilings.fp32 / 1e12, 3);
  add_known(&context, "ceiling_matrix_cold_tflops", ceilings.matrix_cold / 1e12, 3);
  add_known(&context, "ceiling_matrix_sustained_tflops", ceilings.matrix_sustained / 1e12, 3);
  add_known(&context, "ceiling_shared_tbps", ceilings.shared / 1e12, 3);
  add_known(&context, "ceiling_shared_bytes_per_clock", ceilings.shared_bytes_per_clock, 4);
  add_known(&context, "ceiling_launch_us", ceilings.launch * 1e6, 2);
  if (!ceilings.matrix_note.empty()) {
    context.emplace_back("ceiling_matrix_note", ceilings.matrix_note);
  }
  return context;
}

std::string gpu_slug(const std::string& gpu_name) {
  std::string slug;
  const bool nvidia = gpu_name.starts_with("NVIDIA ");
  for (const char c : nvidia ? gpu_name.substr(7) : gpu_name) {
    const auto byte = static_cast<unsigned char>(c);
    slug += std::isalnum(byte) ? static_cast<char>(std::tolower(byte)) : '_';
  }
  return slug;
}

std::string value_of(const Context& context, const std::string& key) {
  const auto found = std::find_if(context.begin(), context.end(),
                                  [&](const auto& entry) { return entry.first == key; });
  return found == context.end() ? "" : found->second;
}

}  // namespace mla::bench
