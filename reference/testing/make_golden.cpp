// Makes the golden files: what a GPU of compute capability 9.0 does with single instructions.
//
//   make_golden reference/testing/golden
//
// Prints a line per observation of Hopper's instructions: whether it is what is documented.
//
// Exit code: 0 all files are written; 1 one is not, with the reason; 2 wrong usage.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "reference/testing/cluster_fragments.h"
#include "reference/testing/golden.h"
#include "reference/testing/hopper_fragments.h"

namespace mla {
namespace {

Status write(const std::string& folder, std::string_view path_in_project, const char* what,
             const Machine& machine, const GoldenWords& words) {
  const std::string path = folder + std::string(path_in_project.substr(path_in_project.rfind('/')));
  const std::string part = path + ".part";  // becomes the file only once it is whole
  errno = 0;
  std::ofstream file(part);
  file << "# What " << what << " do with registers and memory.\n"
       << "# Made by make_golden on " << machine.description() << ".\n";
  write_golden_words(file, words);
  file.close();
  if (file && std::rename(part.c_str(), path.c_str()) == 0) return {};
  const std::string why = std::strerror(errno);
  std::remove(part.c_str());
  return {StatusCode::kFileError, path + ": cannot be written: " + why};
}

/// Which of a descriptor's offsets is which: what the swapped walk gave, in words.
void report_swapped(std::ostream& out, const std::vector<Observation>& observations) {
  for (const Observation& swapped : observations) {
    const size_t suffix = swapped.name.find("_swapped");
    if (suffix == std::string::npos) continue;
    for (const Observation& right : observations) {
      if (right.name != swapped.name.substr(0, suffix)) continue;
      out << right.name << ": leading = between boxes, stride = between groups of 8 rows gives "
          << (right.words == right.documented ? "the product" : "NOT the product")
          << "; swapped gives "
          << (swapped.words == right.documented ? "the product" : "not the product") << "\n";
    }
  }
}

Status make_golden(const std::string& folder) {
  std::string why_not;
  Machine* gpu = hopper_machine(&why_not);
  if (gpu == nullptr) return {StatusCode::kUnavailable, why_not};
  GoldenWords fragments;
  MLA_RETURN_IF_ERROR(record_fragments(*gpu, &fragments));
  MLA_RETURN_IF_ERROR(write(folder, kFragmentsFile, "mma, ldmatrix and cp.async", *gpu, fragments));

  std::vector<Observation> observations;
  MLA_RETURN_IF_ERROR(record_hopper_fragments(*gpu, &observations, &std::cout));
  GoldenWords hopper_fragments;
  size_t failed = 0;
  for (const Observation& o : observations) {
    hopper_fragments[o.name] = kept_words(o);
    failed += undocumented(o).empty() ? 0 : 1;
  }
  report_swapped(std::cout, observations);
  std::cout << observations.size() - failed << " of " << observations.size()
            << " are as documented\n";
  MLA_RETURN_IF_ERROR(write(folder, kHopperFragmentsFile, "wgmma, TMA, stmatrix and mbarrier", *gpu,
                            hopper_fragments));

  std::vector<Observation> cluster_observations;
  MLA_RETURN_IF_ERROR(record_cluster_fragments(*gpu, &cluster_observations));
  GoldenWords cluster_fragments;
  for (const Observation& o : cluster_observations) {
    const std::string wrong = undocumented(o);
    std::cout << (wrong.empty() ? "PASS " : "FAIL ") << o.name << (wrong.empty() ? "" : ": ")
              << wrong << "\n";
    cluster_fragments[o.name] = kept_words(o);
  }
  return write(folder, kClusterFragmentsFile, "the instructions for clusters", *gpu,
               cluster_fragments);
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_golden FOLDER\n";
    return 2;
  }
  mla::Status status = mla::make_golden(argv[1]);
  if (status.ok() && !(std::cout << std::flush)) {
    status = {mla::StatusCode::kFileError, "standard output cannot be written"};
  }
  if (!status.ok()) std::cerr << "make_golden: " << status.to_string() << "\n";
  return status.ok() ? 0 : 1;
}
