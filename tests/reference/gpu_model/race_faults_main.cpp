// Runs one of the small kernels, with its race or without, for a tool that looks for races:
//
//   race_faults                              lists them
//   compute-sanitizer --tool racecheck race_faults --machine gpu tree
//   race_faults --machine gpu --right tree
#include <cstdio>
#include <cstring>
#include <string>

#include "reference/testing/race_faults.h"

int main(int argc, char** argv) {
  mla::MachineKind kind = mla::MachineKind::kModel;
  bool right = false;
  std::string name;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--right") == 0) {
      right = true;
    } else if (std::strcmp(argv[i], "--machine") == 0 && i + 1 < argc) {
      kind = std::strcmp(argv[++i], "gpu") == 0 ? mla::MachineKind::kGpu : mla::MachineKind::kModel;
    } else {
      name = argv[i];
    }
  }
  std::string why_not;
  mla::Machine* machine = mla::find_machine(kind, &why_not);
  if (machine == nullptr) {
    std::fprintf(stderr, "%s\n", why_not.c_str());
    return 77;
  }
  for (const mla::RaceFault& fault : mla::race_faults(kind)) {
    if (name.empty()) {
      std::printf("%s: %s\n", fault.name, fault.what);
    } else if (name == fault.name) {
      const mla::Status status = mla::run_race_fault(*machine, fault, right);
      std::printf("%s: %s\n", fault.name, status.to_string().c_str());
      return status.ok() ? 0 : 1;
    }
  }
  if (name.empty()) return 0;
  std::fprintf(stderr, "no fault is named %s\n", name.c_str());
  return 2;
}
