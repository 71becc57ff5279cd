/// @file
/// How the programs of the bench begin, complain and end.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>

#include "reference/status.h"

namespace mla::bench {

/// "mla_run: invalid argument: ..." on stderr, after what was printed so far. Returns the exit code.
inline int complain(const char* program, const Status& status, int exit_code = 2) {
  std::cout << std::flush;
  std::fflush(stdout);
  std::cerr << program << ": " << status.to_string() << "\n";
  return exit_code;
}

/// Parses the command line. False: end with `exit_code`, 0 after --help, 2 for a wrong one.
inline bool parse(CLI::App& app, int argc, char** argv, int* exit_code) {
  try {
    app.parse(argc, argv);
    return true;
  } catch (const CLI::ParseError& error) {
    *exit_code = app.exit(error) == 0 ? 0 : 2;
    return false;
  }
}

/// What main() returns: run()'s exit code, or 2 with the message of what it threw.
inline int run_program(const char* program, int (*run)(int, char**), int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::bad_alloc&) {
    return complain(program, {StatusCode::kOutOfMemory, "no host memory for that"});
  } catch (const std::exception& error) {
    std::cerr << program << ": " << error.what() << "\n";
    return 2;
  }
}

}  // namespace mla::bench
