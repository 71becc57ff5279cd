/// @file
/// How the programs of the bench begin, complain and end.
#pragma once

#include <CLI/CLI.hpp>
#include <iostream>

#include "reference/status.h"

namespace mla::bench {

/// Exit codes of every program.
inline constexpr int kRight = 0;       ///< All right.
inline constexpr int kWrong = 1;       ///< A run, a result or a file went wrong.
inline constexpr int kNothingRun = 2;  ///< Nothing was run: bad input, or not on this machine.

/// How --help states them.
inline constexpr const char* kExitCodes =
    "Exit code: 0 all right; 1 a run failed, a result is wrong, or a file or stdout could not be "
    "written; 2 nothing was run (bad input, or no such machine).";

/// "mla_run: invalid argument: ..." on stderr, after what was printed so far. Returns the exit code.
int complain(const char* program, const Status& status, int exit_code = kNothingRun);

/// Parses the command line. False: end with `exit_code`, 0 after --help, 2 for a wrong one.
inline bool parse(CLI::App& app, int argc, char** argv, int* exit_code) {
  try {
    app.parse(argc, argv);
    return true;
  } catch (const CLI::ParseError& error) {
    *exit_code = app.exit(error) == 0 ? kRight : kNothingRun;
    return false;
  }
}

/// Whether what is printed still goes somewhere: false once a pipe's reader has left, or a disk is
/// full. A program that writes no file may then stop early.
bool stdout_is_read();

/// What main() returns: run()'s exit code, or 1 with the message of what it threw, or with what
/// became of stdout. If the reader of a pipe leaves early, the program still finishes its work, and there is no
/// message.
int run_program(const char* program, int (*run)(int, char**), int argc, char** argv);

}  // namespace mla::bench
