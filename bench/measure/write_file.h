/// @file
/// How every program of the bench writes a file: whole, or not at all.
///
/// The content goes to a temporary file beside the target, is brought to the disk, and only then
/// takes the target's name. Whatever fails before that leaves the old file as it was, and nothing
/// half-written. A link is followed, owner and mode of an old file stay. What is no regular file (a
/// pipe, /dev/stdout) is written to directly.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reference/status.h"

namespace mla::bench {

/// A file to be written.
struct FileContent {
  std::string path;
  std::vector<std::string_view> parts;  ///< One after the other; they must outlive the writing.
};

/// Writes files, and moves them into place only when all are complete.
/// @return kFileError, with the path and the reason.
Status write_files(std::span<const FileContent> files);

/// Writes one file.
/// @return kFileError, with the path and the reason.
Status write_file(const std::string& path, std::string_view text);

/// Whether write_file() could begin: to be asked before minutes of measuring, not after. Changes
/// nothing; ok for an empty path.
/// @return kFileError, with the path and the reason: a folder that is not there or takes no new
/// files, a file that is write-protected, a name that is a folder's.
Status check_writable(const std::string& path);

}  // namespace mla::bench
