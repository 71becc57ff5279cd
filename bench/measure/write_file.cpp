#include "bench/measure/write_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <utility>

namespace mla::bench {
namespace {

namespace fs = std::filesystem;

Status failed(const std::string& path, const std::string& why) {
  return {StatusCode::kFileError, path + ": cannot be written: " + why};
}

/// With the system's reason.
Status failed(const std::string& path, int error) {
  return failed(path, std::strerror(error));
}

/// A descriptor, closed with the object.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  /// Closes it; false, with errno, if what was written did not arrive.
  bool close_now() { return close(std::exchange(fd_, -1)) == 0; }

 private:
  int fd_;
};

/// Where a file is to go.
struct Target {
  std::string path;     ///< As named by the user, for messages.
  fs::path place;       ///< Links followed.
  bool direct = false;  ///< Written to as it is: a pipe, a device, or this program's own output.
  bool there = false;
  struct stat old = {};  ///< Of a regular file that is there.
};

/// The standard stream that `file` is, by number, or -1. To open such a file again would write over
/// what was printed to it.
int standard_stream(const struct stat& file) {
  for (const int fd : {STDOUT_FILENO, STDERR_FILENO}) {
    struct stat stream = {};
    if (fstat(fd, &stream) == 0 && stream.st_dev == file.st_dev && stream.st_ino == file.st_ino) {
      return fd;
    }
  }
  return -1;
}

Status resolve(const std::string& path, Target* target) {
  target->path = path;
  target->place = path;
  target->there = stat(path.c_str(), &target->old) == 0;
  if (target->there) {
    if (S_ISDIR(target->old.st_mode)) return failed(path, "it is a folder");
    target->direct = !S_ISREG(target->old.st_mode) || standard_stream(target->old) >= 0;
    const bool protected_from_all = (target->old.st_mode & 0222) == 0;  // root may write even so
    if (access(path.c_str(), W_OK) != 0) return failed(path, errno);
    if (!target->direct && protected_from_all) return failed(path, "it is write-protected");
    if (target->direct) return {};
  }
  std::error_code error;
  for (int links = 0; fs::is_symlink(target->place, error); ++links) {
    if (links == 40) return failed(path, ELOOP);  // as many as Linux follows
    const fs::path next = fs::read_symlink(target->place, error);
    if (error) return failed(path, error.message());
    target->place = next.is_absolute() ? next : target->place.parent_path() / next;
  }
  const fs::path folder =
      target->place.has_parent_path() ? target->place.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error)) {
    return failed(path, "there is no folder " + folder.string());
  }
  return {};
}

/// A file under a name of its own beside the target; removed with the object unless it was moved.
class Temporary {
 public:
  explicit Temporary(const Target& target) : path_(beside(target.place)), file_(create(path_)) {
    error_ = file_.get() < 0 ? errno : 0;
  }
  Temporary(Temporary&& other) noexcept
      : path_(std::exchange(other.path_, {})),
        file_(std::move(other.file_)),
        error_(other.error_) {}
  Temporary& operator=(Temporary&&) = delete;
  ~Temporary() {
    if (error_ == 0 && !path_.empty()) unlink(path_.c_str());
  }
  Descriptor& file() { return file_; }
  int error() const { return error_; }  ///< Of its creation; 0: it is there.
  /// Gives it the target's name. False with errno.
  bool move_to(const fs::path& place) {
    if (std::rename(path_.c_str(), place.c_str()) != 0) return false;
    path_.clear();
    return true;
  }

 private:
  static fs::path beside(const fs::path& place) {
    const std::string name = place.filename().string().substr(0, 200);  // the whole has 255 at most
    return place.parent_path() / fmt::format("{}.{:08x}.part", name, std::random_device{}());
  }
  static Descriptor create(const fs::path& path) {
    return Descriptor(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  }

  fs::path path_;
  Descriptor file_;
  int error_;
};

/// False with errno.
bool write_all(int fd, const FileContent& file) {
  for (std::string_view part : file.parts) {
    while (!part.empty()) {
      const ssize_t written = ::write(fd, part.data(), part.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return false;
      part.remove_prefix(static_cast<size_t>(written));
    }
  }
  return true;
}

Status write_directly(const Target& target, const FileContent& file) {
  std::fflush(nullptr);  // what was printed before comes first
  if (const int stream = standard_stream(target.old); stream >= 0) {
    return write_all(stream, file) ? Status() : failed(target.path, errno);
  }
  Descriptor opened(open(target.path.c_str(), O_WRONLY | O_CLOEXEC));
  if (opened.get() < 0 || !write_all(opened.get(), file) || !opened.close_now()) {
    return failed(target.path, errno);
  }
  return {};
}

/// Fills `temporary`, with owner and mode of what it is to replace.
Status fill(const Target& target, const FileContent& file, Temporary& temporary) {
  if (temporary.error() != 0) return failed(target.path, temporary.error());
  Descriptor& opened = temporary.file();
  if (target.there) {
    // Only root may give a file away; for others a file of their own has to do.
    if (fchown(opened.get(), target.old.st_uid, target.old.st_gid) != 0 &&
        fchown(opened.get(), static_cast<uid_t>(-1), target.old.st_gid) != 0 && errno != EPERM) {
      return failed(target.path, errno);
    }
    if (fchmod(opened.get(), target.old.st_mode & 07777) != 0) return failed(target.path, errno);
  }
  if (!write_all(opened.get(), file) || fsync(opened.get()) != 0 || !opened.close_now()) {
    return failed(target.path, errno);
  }
  return {};
}

}  // namespace

Status write_files(std::span<const FileContent> files) {
  std::vector<Target> targets(files.size());
  std::vector<Temporary> temporaries;
  temporaries.reserve(files.size());
  std::vector<size_t> moved;
  for (size_t i = 0; i < files.size(); ++i) {
    MLA_RETURN_IF_ERROR(resolve(files[i].path, &targets[i]));
    if (targets[i].direct) continue;
    moved.push_back(i);
    MLA_RETURN_IF_ERROR(fill(targets[i], files[i], temporaries.emplace_back(targets[i])));
  }
  for (size_t i = 0; i < files.size(); ++i) {
    if (targets[i].direct) MLA_RETURN_IF_ERROR(write_directly(targets[i], files[i]));
  }
  for (size_t i = 0; i < moved.size(); ++i) {
    const Target& target = targets[moved[i]];
    if (!temporaries[i].move_to(target.place)) return failed(target.path, errno);
  }
  return {};
}

Status write_file(const std::string& path, std::string_view text) {
  const FileContent file{path, {text}};
  return write_files({&file, 1});
}

Status check_writable(const std::string& path) {
  if (path.empty()) return {};
  Target target;
  MLA_RETURN_IF_ERROR(resolve(path, &target));
  if (target.direct) return {};
  const Temporary temporary(target);
  return temporary.error() == 0 ? Status() : failed(path, temporary.error());
}

}  // namespace mla::bench
