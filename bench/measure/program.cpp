#include "bench/measure/program.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

namespace mla::bench {
namespace {

/// Signals that a failing write sends would end the program: it is to say what failed, and to write
/// its other files.
void ignore_signals_of_writes() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

/// A closed standard stream would lend its number to the first file that is opened, and what is
/// printed would go there. In its place comes one that fails as the closed one does.
void occupy_standard_streams() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) == -1) static_cast<void>(open("/dev/null", O_RDONLY));
  }
}

/// Whether stdout is a pipe without a reader.
bool reader_has_left() {
  pollfd stream{STDOUT_FILENO, POLLOUT, 0};
  return poll(&stream, 1, 0) == 1 && (stream.revents & POLLERR) != 0;
}

/// Flushes stdout, and turns success into failure if not all of it was written.
int end_stdout(const char* program, int exit_code) {
  errno = 0;
  const bool flushed = (std::cout << std::flush).good() && std::fflush(stdout) == 0;
  const std::string why = errno != 0 ? std::string(": ") + std::strerror(errno) : "";
  if (flushed && std::ferror(stdout) == 0) return exit_code;
  if (!reader_has_left()) {
    std::cerr << program << ": standard output cannot be written" << why << "\n";
  }
  return exit_code == kRight ? kWrong : exit_code;
}

/// "mla_run: out of memory: ...". The code is that of a failure: something was begun.
int complain_of(const char* program, const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return complain(program, {StatusCode::kOutOfMemory, "the host has not enough memory for that"},
                    kWrong);
  }
  // What prints to stdout may throw if that fails; end_stdout() says so.
  if (std::ferror(stdout) == 0) std::cerr << program << ": " << error.what() << "\n";
  return kWrong;
}

}  // namespace

int complain(const char* program, const Status& status, int exit_code) {
  std::cout << std::flush;
  std::fflush(stdout);
  std::cerr << program << ": " << status.to_string() << "\n";
  return exit_code;
}

bool stdout_is_read() {
  return std::cout.good() && std::ferror(stdout) == 0 && !reader_has_left();
}

int run_program(const char* program, int (*run)(int, char**), int argc, char** argv) {
  occupy_standard_streams();
  ignore_signals_of_writes();
  int exit_code = kWrong;
  try {
    exit_code = run(argc, argv);
  } catch (const std::exception& error) {
    exit_code = complain_of(program, error);
  }
  return end_stdout(program, exit_code);
}

}  // namespace mla::bench
