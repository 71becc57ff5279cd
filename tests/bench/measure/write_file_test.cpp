// A written file is whole or not there, whatever fails meanwhile.
#include "bench/measure/write_file.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "tests/status_matchers.h"

namespace mla::bench {
namespace {

namespace fs = std::filesystem;

class WriteFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "write_file_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void put(const std::string& name, const std::string& text) const {
    std::ofstream(path(name)) << text;
  }
  std::string get(const std::string& name) const {
    std::ifstream file(path(name));
    return {std::istreambuf_iterator<char>(file), {}};
  }
  long files() const {
    return std::distance(fs::directory_iterator(folder_), fs::directory_iterator());
  }
  static mode_t mode_of(const std::string& path) {
    struct stat found = {};
    EXPECT_EQ(stat(path.c_str(), &found), 0);
    return found.st_mode & 07777;
  }
  void expect_refused(const std::string& name, const std::string& why) const {
    for (const Status& status : {check_writable(path(name)), write_file(path(name), "new")}) {
      EXPECT_EQ(status.code(), StatusCode::kFileError);
      EXPECT_EQ(status.message(), path(name) + ": cannot be written: " + why);
    }
  }

  fs::path folder_;
};

/// While this lives, no file may grow past so many bytes, as on a full disk.
class SmallDisk {
 public:
  explicit SmallDisk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);  // as run_program() does
    EXPECT_EQ(getrlimit(RLIMIT_FSIZE, &before_), 0);
    const rlimit small{bytes, before_.rlim_max};
    EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  }
  ~SmallDisk() { EXPECT_EQ(setrlimit(RLIMIT_FSIZE, &before_), 0); }

 private:
  rlimit before_{};
};

TEST_F(WriteFileTest, WritesAndReplaces) {
  const mode_t mask = umask(027);
  ASSERT_OK(write_file(path("a"), "first, and longer"));
  umask(mask);
  EXPECT_EQ(get("a"), "first, and longer");
  EXPECT_EQ(mode_of(path("a")), 0640u);
  ASSERT_OK(write_file(path("a"), "second"));
  EXPECT_EQ(get("a"), "second");
  ASSERT_OK(write_file(path("empty"), ""));
  EXPECT_EQ(get("empty"), "");
  EXPECT_EQ(files(), 2);
}

TEST_F(WriteFileTest, KeepsModeAndFollowsLinks) {
  put("a", "old");
  fs::permissions(path("a"), fs::perms(0604));
  fs::create_directory(path("inner"));
  fs::create_symlink("../a", path("inner/link"));
  fs::create_symlink("inner/link", path("chain"));
  ASSERT_OK(write_file(path("chain"), "new"));
  EXPECT_EQ(get("a"), "new");
  EXPECT_EQ(mode_of(path("a")), 0604u);
  EXPECT_TRUE(fs::is_symlink(path("chain")));
  EXPECT_TRUE(fs::is_symlink(path("inner/link")));

  fs::create_symlink("b", path("dangling"));
  ASSERT_OK(check_writable(path("dangling")));
  ASSERT_OK(write_file(path("dangling"), "new"));
  EXPECT_EQ(get("b"), "new");
  EXPECT_TRUE(fs::is_symlink(path("dangling")));
}

TEST_F(WriteFileTest, RefusesWhatItMayNotReplace) {
  put("protected", "old");
  fs::permissions(path("protected"), fs::perms(0444));
  // The reason is the system's; or ours for root, who may write to it all the same.
  for (const Status& status :
       {check_writable(path("protected")), write_file(path("protected"), "new")}) {
    EXPECT_EQ(status.code(), StatusCode::kFileError);
    EXPECT_TRUE(status.message().starts_with(path("protected") + ": cannot be written: "));
  }
  EXPECT_EQ(get("protected"), "old");
  fs::create_directory(path("folder"));
  expect_refused("folder", "it is a folder");
  expect_refused("no/such", "there is no folder " + path("no"));
  fs::create_symlink("loop", path("loop"));
  expect_refused("loop", "Too many levels of symbolic links");
  EXPECT_EQ(files(), 3);
}

TEST_F(WriteFileTest, AFailureLeavesTheOldFilesWhole) {
  put("a", "old a");
  put("b", "old b");
  const std::string large(1 << 16, 'x');
  const FileContent both[] = {{path("a"), {"new"}}, {path("b"), {"new", large}}};
  Status status;
  {
    const SmallDisk disk(1 << 12);
    status = write_files(both);
  }
  EXPECT_EQ(status.code(), StatusCode::kFileError);
  EXPECT_EQ(status.message(), path("b") + ": cannot be written: File too large");
  EXPECT_EQ(get("a"), "old a");
  EXPECT_EQ(get("b"), "old b");
  EXPECT_EQ(files(), 2);
  ASSERT_OK(write_files(both));
  EXPECT_EQ(get("b"), "new" + large);
}

TEST_F(WriteFileTest, WritesToWhatIsNoRegularFile) {
  ASSERT_OK(write_file("/dev/null", "anything"));
  ASSERT_OK(check_writable("/dev/full"));
  put("a", "old");
  const FileContent both[] = {{path("a"), {"new"}}, {"/dev/full", {"anything"}}};
  EXPECT_EQ(write_files(both).message(), "/dev/full: cannot be written: No space left on device");
  EXPECT_EQ(get("a"), "old");
  EXPECT_EQ(files(), 1);
}

TEST_F(WriteFileTest, AsksWithoutChangingAnything) {
  put("a", "old");
  ASSERT_OK(check_writable(""));
  ASSERT_OK(check_writable(path("a")));
  ASSERT_OK(check_writable(path("b")));
  ASSERT_OK(check_writable(path(std::string(255, 'n'))));  // the longest name that there is
  EXPECT_EQ(get("a"), "old");
  EXPECT_EQ(files(), 1);
}

}  // namespace
}  // namespace mla::bench
