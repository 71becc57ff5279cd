/// @file
/// How the programs of the bench take a table that "auto" chooses by.
#pragma once

#include <CLI/CLI.hpp>
#include <iostream>
#include <string>

#include "stages/common/choose/choose.h"

namespace mla::bench {

/// Adds --choice-table. A file that cannot be read ends the program, with the reason.
inline void add_choice_table(CLI::App* app) {
  app->add_option_function<std::string>(
         "--choice-table",
         [](const std::string& path) {
           const Status status = use_choice_table(path);
           if (!status.ok()) throw CLI::ValidationError("--choice-table", status.message());
         },
         "Let auto choose by this file, which mla_tune wrote, instead of the built-in tables or "
         "the "
         "file that the environment variable MLA_CHOICE_TABLE names")
      ->type_name("FILE");
}

/// If `stage` is "auto" and the file that MLA_CHOICE_TABLE names was not read: says so on stderr.
inline void note_choice_table(const char* program, const std::string& stage) {
  if (stage != kAutoSlug || choice_table_status().ok()) return;
  std::cerr << program << ": note: " << choice_table_status().message()
            << "; auto chooses by the built-in tables\n";
}

}  // namespace mla::bench
