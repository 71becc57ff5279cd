/// @file
/// A data race that ThreadSanitizer finds in a kernel rejects the kernel, like anything else the
/// model finds.
#ifdef GPU_MODEL_TSAN

#include <unistd.h>

#include <cstdlib>
#include <iterator>
#include <string>

#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/sanitizer.h"

extern "C" {
// ThreadSanitizer's interface for debuggers; no header declares it.
int __tsan_get_report_mop(void* report, unsigned long index, int* thread, void** address, int* size,
                          int* write, int* atomic, void** trace, unsigned long trace_size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace {

struct Access {
  int size, write, atomic;
  void* trace[4];  // the innermost function first
};

/// Plain values alone: the report comes while ThreadSanitizer attributes everything to the GPU
/// thread, and a string made there would be a race itself.
struct Race {
  bool found = false;
  unsigned thread = 0;
  Access accesses[2] = {};
};
thread_local constinit Race race;

std::string describe(const Access& access) {
  char place[512] = "an unknown place";
  for (void* function : access.trace) {
    if (function == nullptr) break;
    __sanitizer_symbolize_pc(function, "%s:%l", place, sizeof place);
    if (place[0] == '<')
      __sanitizer_symbolize_pc(function, "%f", place, sizeof place);  // no line known
    // What a function of the model does for a kernel is at the kernel's line.
    if (!gpu_model::detail::relative_path(place).starts_with("reference/gpu_model/")) break;
  }
  return std::string(access.atomic != 0 ? "atomic " : "") + (access.write != 0 ? "write" : "read") +
         " of " + std::to_string(access.size) + " bytes at " +
         std::string(gpu_model::detail::relative_path(place));
}

}  // namespace

// A kernel's race is thrown by launch(), so it must not change the exit code; and it must be
// reported again when a test runs the same kernel again.
extern "C" const char* __tsan_default_options() {
  return "exitcode=0:suppress_equal_stacks=0:suppress_equal_addresses=0";
}

extern "C" void __tsan_on_report(void* report) {
  gpu_model::detail::Multiprocessor* multiprocessor = gpu_model::detail::Multiprocessor::current();
  if (multiprocessor == nullptr || !multiprocessor->runs_thread()) {
    // A race of the host's own code: the exit code that the default options took away.
    static const int registered = std::atexit([] { _exit(66); });
    static_cast<void>(registered);
    return;
  }
  if (race.found) return;
  race.found = true;
  race.thread = multiprocessor->self().number;
  for (unsigned long i = 0; i < 2; ++i) {
    Access& access = race.accesses[i];
    int thread = 0;
    void* address = nullptr;
    __tsan_get_report_mop(report, i, &thread, &address, &access.size, &access.write, &access.atomic,
                          access.trace, std::size(access.trace));
  }
  // One race is enough to reject a kernel; this GPU thread may have thousands before the scheduler
  // runs again.
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

void gpu_model::detail::tsan_drop_report() {
  race.found = false;
}

std::string gpu_model::detail::tsan_take_report() {
  if (!race.found) return {};
  race.found = false;
  Multiprocessor* multiprocessor = Multiprocessor::current();
  multiprocessor->thread(race.thread).fiber->impersonate([] {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  });
  return "ThreadSanitizer reported a data race: " + describe(race.accesses[0]) + " by " +
         multiprocessor->place(race.thread) + ", after another thread's " +
         describe(race.accesses[1]);
}

#endif
