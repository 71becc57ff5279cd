// What the model asks of Linux, and a browser has not.
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

extern "C" {
int gpu_model_place = 0;

int sched_getaffinity(pid_t, size_t, cpu_set_t*) {
  return -1;
}
int __sched_cpucount(size_t, const cpu_set_t*) {
  return 1;
}
int sigaltstack(const stack_t*, stack_t*) {
  return 0;
}

// Emscripten's does nothing, but the model wants zeros.
int madvise(void* address, size_t bytes, int advice) {
  if (advice == MADV_DONTNEED) memset(address, 0, bytes);
  return 0;
}
}
