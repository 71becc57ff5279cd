// mla_run as a process, on dumps that NumPy wrote (tests/data) and on damaged ones. Runs in the
// project's folder; MLA_RUN names the program.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "bench/tools/npy.h"
#include "reference/quantise.h"
#include "reference/testing/compare.h"
#include "tests/bench/tools/run_program.h"
#include "tests/status_matchers.h"

namespace mla {
namespace {

namespace fs = std::filesystem;

class MlaRunTest : public testing::Test {
 protected:
  void SetUp() override {
    const char* program = std::getenv("MLA_RUN");
    if (program == nullptr) GTEST_SKIP() << "MLA_RUN does not name the program";
    program_ = program;
    ASSERT_TRUE(fs::exists("tests/data/paged/q.npy")) << "not in the project's folder";
    std::string pattern = (fs::temp_directory_path() / "mla_run_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override {
    if (!folder_.empty()) fs::remove_all(folder_);
  }

  Ran run(const std::string& arguments) const {
    return run_program("'" + program_ + "' " + arguments);
  }

  /// Expects bad input to be refused with this message, and nothing to be written.
  void expect_refused(const std::string& arguments, const std::string& message) const {
    SCOPED_TRACE(arguments);
    const Ran ran = run("decode " + arguments + " --out " + path("refused.npy"));
    EXPECT_EQ(ran.exit_code, 2) << ran.text;
    EXPECT_NE(ran.text.find(message), std::string::npos)
        << "found:  " << ran.text << "needed: " << message;
    EXPECT_FALSE(fs::exists(path("refused.npy")));
  }

  /// The same for a whole command line.
  void expect_nothing_run(const std::string& arguments, const std::string& message) const {
    SCOPED_TRACE(arguments);
    const Ran ran = run(arguments);
    EXPECT_EQ(ran.exit_code, 2) << ran.text;
    EXPECT_NE(ran.text.find(message), std::string::npos) << ran.text;
  }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  static std::string text_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  template <typename T>
  void write(const std::string& name, npy::Type type, const std::vector<int64_t>& shape,
             const std::vector<T>& values) const {
    const npy::Output output{path(name), type, shape, std::as_bytes(std::span(values))};
    const Status status = npy::write({&output, 1});
    ASSERT_OK(status);
  }

  static npy::Array read(const std::string& path) {
    npy::Array array;
    const Status status = npy::read(path, &array);
    EXPECT_OK(status);
    return array;
  }

  std::string program_;
  fs::path folder_;
};

const std::string kPaged =
    "--dtype bf16 --scale 0.135234 --q tests/data/paged/q.npy --cache tests/data/paged/cache.npy "
    "--block-table tests/data/paged/block_table.npy --seqlens tests/data/paged/seqlens.npy";
const std::string kContiguous =
    "--causal --scale 0.1147 --q tests/data/contiguous/q.npy "
    "--cache tests/data/contiguous/cache.npy --seqlens tests/data/contiguous/seqlens.npy";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t place = text.find(from);
  EXPECT_NE(place, std::string::npos) << from;
  return text.replace(place, from.size(), to);
}

std::vector<double> doubles(const npy::Array& array) {
  if (array.header.type == npy::Type::kFloat64) {
    return {array.values<double>().begin(), array.values<double>().end()};
  }
  return {array.values<float>().begin(), array.values<float>().end()};
}

TEST_F(MlaRunTest, DecodesADumpFromNumPyWithEveryStage) {
  const std::vector<double> out = doubles(read("tests/data/paged/expected_out.npy"));
  const std::vector<double> lse = doubles(read("tests/data/paged/expected_lse.npy"));
  for (const std::string stage : {"01", "02", "03", "reference"}) {
    SCOPED_TRACE(stage);
    const Ran ran = run("decode --machine model --stage " + stage + " " + kPaged + " --out " +
                        path("out.npy") + " --lse " + path("lse.npy"));
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_NE(ran.text.find("bf16, b=2 s_q=1 h_q=3 h_kv=1, 5 to 70 tokens in 3 pages"),
              std::string::npos)
        << ran.text;
    if (stage != "reference") {
      EXPECT_NE(ran.text.find("PASS"), std::string::npos) << ran.text;
      EXPECT_NE(ran.text.find("which says nothing about a GPU"), std::string::npos) << ran.text;
    }
    const npy::Array ran_out = read(path("out.npy"));
    EXPECT_EQ(ran_out.header.type, npy::Type::kUInt16);
    EXPECT_EQ(ran_out.header.shape, (std::vector<int64_t>{2, 1, 3, 512}));
    const Comparison compared_out =
        compare(DType::kBFloat16, ran_out.values<uint16_t>(), out, 512, kOutTolerance);
    EXPECT_TRUE(compared_out.ok) << compared_out.failure;
    const npy::Array ran_lse = read(path("lse.npy"));
    EXPECT_EQ(ran_lse.header.type, npy::Type::kFloat32);
    EXPECT_EQ(ran_lse.header.shape, (std::vector<int64_t>{2, 3, 1}));
    const Comparison compared_lse = compare(ran_lse.values<float>(), lse, 1, kLseTolerance);
    EXPECT_TRUE(compared_lse.ok) << compared_lse.failure;
    EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2)
        << "only out and lse may be left";
  }
}

TEST_F(MlaRunTest, PagesAContiguousCacheAndWritesFp32) {
  const Ran ran = run("decode --machine model --stage 03 " + kContiguous +
                      " --out-format fp32 --out " + path("out.npy") + " --lse " + path("lse.npy"));
  ASSERT_EQ(ran.exit_code, 0) << ran.text;
  const npy::Array out = read(path("out.npy"));
  EXPECT_EQ(out.header.type, npy::Type::kFloat32);
  const Comparison compared_out =
      compare(out.values<float>(), doubles(read("tests/data/contiguous/expected_out.npy")), 512,
              kOutTolerance);
  EXPECT_TRUE(compared_out.ok) << compared_out.failure;
  // Query 0 of sequence 1 sees nothing: out [1, 0, :, :] is 0 and lse [1, :, 0] is +inf.
  for (size_t i = 0; i < 2 * 512; ++i) EXPECT_EQ(out.values<float>()[2 * 2 * 512 + i], 0);
  const npy::Array lse = read(path("lse.npy"));
  EXPECT_EQ(lse.values<float>()[4], INFINITY);
  EXPECT_EQ(lse.values<float>()[6], INFINITY);
  const Comparison compared_lse =
      compare(lse.values<float>(), doubles(read("tests/data/contiguous/expected_lse.npy")), 1,
              kLseTolerance);
  EXPECT_TRUE(compared_lse.ok) << compared_lse.failure;
}

TEST_F(MlaRunTest, TheSameValuesInOtherFormsGiveTheSameBits) {
  const std::string results = " --out " + path("out.npy") + " --lse " + path("lse.npy");
  ASSERT_EQ(run("decode --machine model --stage 02 " + kPaged + results).exit_code, 0);
  const std::vector<std::byte> bits = read(path("out.npy")).bytes;

  // q as fp32 with a fraction that rounding removes, the cache without its axis of KV heads and as
  // int16.
  const npy::Array q = read("tests/data/paged/q.npy");
  std::vector<float> q_floats;
  for (const uint16_t pattern : q.values<uint16_t>()) {
    const uint32_t wide = uint32_t{pattern} << 16 | 0x7FFF;  // just below half a unit
    q_floats.push_back(std::bit_cast<float>(wide));
  }
  write("q.npy", npy::Type::kFloat32, q.header.shape, q_floats);
  const npy::Array cache = read("tests/data/paged/cache.npy");
  const auto patterns = cache.values<int16_t>();
  write("cache.npy", npy::Type::kInt16, {3, 64, 576},
        std::vector<int16_t>(patterns.begin(), patterns.end()));
  // The table as int64, with a garbage slot that no int32 holds.
  write("table.npy", npy::Type::kInt64, {2, 3},
        std::vector<int64_t>{2, int64_t{1} << 40, 7, 0, 1, -9});
  std::string arguments = replaced(kPaged, "tests/data/paged/q.npy", path("q.npy"));
  arguments = replaced(arguments, "tests/data/paged/cache.npy", path("cache.npy"));
  arguments = replaced(arguments, "tests/data/paged/block_table.npy", path("table.npy"));
  const Ran ran = run("decode --machine model --stage 02 " + arguments + results);
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_EQ(read(path("out.npy")).bytes, bits);
}

TEST_F(MlaRunTest, SaysWhichValuesOverflow) {
  std::vector<float> q(2 * 2 * 2 * 576, 0.5F);
  q[7] = 65504;   // the largest fp16
  q[9] = -65520;  // rounds to -inf
  q[11] = 1e30F;
  write("q.npy", npy::Type::kFloat32, {2, 2, 2, 576}, q);
  const Ran ran = run("decode --machine model --stage 02 --dtype fp16 " +
                      replaced(kContiguous, "tests/data/contiguous/q.npy", path("q.npy")));
  EXPECT_NE(ran.text.find(path("q.npy") +
                          ": 2 of 4608 values are too large for fp16 and became infinite"),
            std::string::npos)
      << ran.text;
}

TEST_F(MlaRunTest, ComparesTheUsersOwnResults) {
  const Ran right = run("decode --stage reference " + kPaged +
                        " --check-out tests/data/paged/expected_out.npy"
                        " --check-lse tests/data/paged/expected_lse.npy");
  EXPECT_EQ(right.exit_code, 0) << right.text;
  EXPECT_EQ(right.text.find("FAIL"), std::string::npos) << right.text;

  npy::Array out = read("tests/data/paged/expected_out.npy");
  std::vector<float> wrong(out.values<float>().begin(), out.values<float>().end());
  wrong[700] += 0.1F;
  write("wrong.npy", npy::Type::kFloat32, out.header.shape, wrong);
  const Ran ran = run("decode --stage reference " + kPaged + " --check-out " + path("wrong.npy"));
  EXPECT_EQ(ran.exit_code, 1) << ran.text;
  EXPECT_NE(ran.text.find("FAIL"), std::string::npos) << ran.text;
}

TEST_F(MlaRunTest, ComparesResultsOfDataOfAnySize) {
  // The cache's values are 20 times as large, as after a norm. So is the error that bf16 makes.
  const npy::Array cache = read("tests/data/paged/cache.npy");
  std::vector<float> large;
  for (const uint16_t bits : cache.values<uint16_t>()) {
    large.push_back(20 * std::bit_cast<float>(uint32_t{bits} << 16));
  }
  write("cache.npy", npy::Type::kFloat32, cache.header.shape, large);
  const std::string dump = replaced(kPaged, "tests/data/paged/cache.npy", path("cache.npy"));
  const Ran ran = run("decode --machine model --stage 05 " + dump + " --out-format fp32 --out " +
                      path("out.npy") + " --lse " + path("lse.npy"));
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  const Ran right = run("decode --stage reference " + dump + " --check-out " + path("out.npy") +
                        " --check-lse " + path("lse.npy"));
  EXPECT_EQ(right.exit_code, 0) << right.text;

  const npy::Array lse = read(path("lse.npy"));
  std::vector<float> base_2(lse.values<float>().begin(), lse.values<float>().end());
  for (float& x : base_2) x *= 1.44269504F;
  write("base_2.npy", npy::Type::kFloat32, lse.header.shape, base_2);
  const Ran wrong = run("decode --stage reference " + dump + " --check-lse " + path("base_2.npy"));
  EXPECT_EQ(wrong.exit_code, 1) << wrong.text;
  EXPECT_NE(wrong.text.find("lse looks like base 2: divide by log2(e)"), std::string::npos)
      << wrong.text;
}

TEST_F(MlaRunTest, SaysWhatIsNaNAsInTheReference) {
  const npy::Array q = read("tests/data/paged/q.npy");
  std::vector<uint16_t> patterns(q.values<uint16_t>().begin(), q.values<uint16_t>().end());
  patterns[3 * 576 + 5] = 0x7FC0;  // head 0 of sequence 1
  write("q.npy", npy::Type::kUInt16, q.header.shape, patterns);
  const std::string dump = replaced(kPaged, "tests/data/paged/q.npy", path("q.npy"));
  const Ran ran = run("decode --machine model --stage 02 " + dump + " --out " + path("out.npy"));
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("  PASS; NaN, as the reference: 1 row\n"), std::string::npos) << ran.text;
  const Ran checked = run("decode --stage reference " + dump + " --check-out " + path("out.npy"));
  EXPECT_NE(checked.text.find("  PASS; NaN, as the reference: 1 row\n"), std::string::npos)
      << checked.text;
}

TEST_F(MlaRunTest, RefusesDamagedFiles) {
  expect_refused("--stage 02 " + replaced(kPaged, "paged/q.npy", "paged/nothing.npy"),
                 "file error: tests/data/paged/nothing.npy: cannot be opened: ");

  std::ifstream whole("tests/data/paged/cache.npy", std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(whole), {}};
  bytes.resize(1000);
  std::ofstream(path("cut.npy"), std::ios::binary) << bytes;
  expect_refused("--stage 02 " + replaced(kPaged, "tests/data/paged/cache.npy", path("cut.npy")),
                 path("cut.npy") +
                     ": truncated: 872 bytes of data found, 221184 needed for <u2 "
                     "[3, 64, 1, 576]");

  write("f8.npy", npy::Type::kFloat64, {2, 1, 3, 576}, std::vector<double>(2 * 3 * 576));
  expect_refused("--stage 02 " + replaced(kPaged, "tests/data/paged/q.npy", path("f8.npy")),
                 path("f8.npy") + ": <f8 found; <u2 or <i2 (16-bit patterns), <f2 or <f4 needed");
  expect_refused("--stage 02 " + replaced(kPaged, "paged/seqlens.npy", "paged/expected_lse.npy"),
                 "tests/data/paged/expected_lse.npy: <f8 found; <i4, <i8, <u4 or <u8 needed");
}

// Every type that a message names as possible is read, and no other.
TEST_F(MlaRunTest, TakesTheTypesThatItNames) {
  const std::string results = " --out " + path("out.npy");
  ASSERT_EQ(run("decode --machine model --stage 02 " + kPaged + results).exit_code, 0);
  const std::vector<std::byte> bits = read(path("out.npy")).bytes;
  const auto decode_with = [&](const std::string& file) {
    const std::string arguments =
        replaced(kPaged, "tests/data/paged/" + file + ".npy", path(file + ".npy"));
    const Ran ran = run("decode --machine model --stage 02 " + arguments + results);
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_EQ(read(path("out.npy")).bytes, bits);
  };
  write("block_table.npy", npy::Type::kUInt32, {2, 3},
        std::vector<uint32_t>{2, 0xffffffffu, 7, 0, 1, 9});
  decode_with("block_table");
  write("block_table.npy", npy::Type::kUInt64, {2, 3},
        std::vector<uint64_t>{2, ~uint64_t{0}, 7, 0, 1, 9});
  decode_with("block_table");
  write("seqlens.npy", npy::Type::kUInt64, {2}, std::vector<uint64_t>{5, 70});
  decode_with("seqlens");
  write("seqlens.npy", npy::Type::kUInt64, {2}, std::vector<uint64_t>{5, ~uint64_t{0}});
  expect_refused(
      "--stage 02 " + replaced(kPaged, "tests/data/paged/seqlens.npy", path("seqlens.npy")),
      "18446744073709551615 found at element 1; a value that fits int32 needed");
  // The answer to a type that no file may have names those that this file may have.
  const auto refuse_type = [&](const std::string& file, const std::string& type,
                               const std::string& needed) {
    std::ofstream(path("odd.npy"), std::ios::binary)
        << std::string("\x93NUMPY\x01\x00", 8) << '\x40' << '\0'
        << ("{'descr': '" + type + "', 'fortran_order': False, 'shape': (2,), }" +
            std::string(64, ' '))
               .substr(0, 64)
        << "ab";
    expect_refused(
        "--stage 02 " + replaced(kPaged, "tests/data/paged/" + file + ".npy", path("odd.npy")),
        "dtype '" + type + "' found; " + needed + " needed");
  };
  refuse_type("q", "|i1", "<u2 or <i2 (16-bit patterns), <f2 or <f4");
  refuse_type("cache", "|b1", "<u2 or <i2 (16-bit patterns), <f2 or <f4");
  refuse_type("block_table", "|i1", "<i4, <i8, <u4 or <u8");
  refuse_type("seqlens", "|i1", "<i4, <i8, <u4 or <u8");
}

TEST_F(MlaRunTest, TakesAScaleAsAFraction) {
  const auto scaled = [](const std::string& scale) {
    return "--stage reference " + replaced(kPaged, "0.135234", scale);
  };
  const Ran fraction = run("decode " + scaled("1/24"));
  EXPECT_EQ(fraction.exit_code, 0) << fraction.text;
  EXPECT_NE(fraction.text.find("scale 0.0416667"), std::string::npos) << fraction.text;
  EXPECT_EQ(run("decode " + scaled("1e-40")).exit_code, 0);
  for (const char* scale : {"0", "-1", "inf", "nan", "1/0", "0/3"}) {
    expect_refused(scaled(scale),
                   "--scale " + std::string(scale) + " must be finite and greater than 0");
  }
  expect_refused(scaled("1e-46"),
                 "--scale 1e-46 is too small: the scale is a float, in which this becomes 0");
  expect_refused(scaled("1e39"), "--scale 1e39 is too large: the scale is a float");
  for (const char* scale : {"x", "1/", "/2", "1/2/3", "0.1f"}) {
    expect_refused(scaled(scale), "--scale " + std::string(scale) + " is no number");
  }
}

TEST_F(MlaRunTest, ADumpMayBeDecodedBatchInvariantly) {
  const Ran ran = run("decode --machine model --stage 04 --split 64 " + kPaged);
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("split every 64 tokens"), std::string::npos) << ran.text;
  const Ran plan = run("plan --machine model --stage 04 --split 64 " + kPaged);
  EXPECT_NE(plan.text.find("1:64-70 (slot 1)"), std::string::npos) << plan.text;
  const Ran shape = run("plan --machine model --stage 04 --split 64 --shape h16_q1_b1_k200");
  EXPECT_NE(shape.text.find("0:64-128 (slot 1)"), std::string::npos) << shape.text;
  expect_refused("--stage 04 --split 65 " + kPaged, "--split 65 must be a multiple of 64");
  expect_refused("--stage 04 --split 0 " + kPaged, "--split");
  expect_refused("--stage 04 --split 64 --shape h1_q1_b1_k200_split128", "name different splits");
}

TEST_F(MlaRunTest, RefusesWhatMemoryDoesNotHold) {
  expect_refused("--stage 02 --machine model --shape h128_q1_b65536_k1073741824",
                 "shape h128_q1_b65536_k1073741824 needs 162 PB of host memory; ");
  expect_refused("--stage reference --shape h1_q1_b1048576_k1073741824",
                 "needs 1.30 EB of host memory; ");
  expect_nothing_run("predict --stage 02 --shape h1_q1_b1048576_k1073741824",
                     "needs 281 TB of host memory; ");
  expect_refused("--stage 02 --shape h1_q1_b0_k64", "shape 'h1_q1_b0_k64' has b = 0; 1 to ");
}

// The dump with pages of 64 tokens is decoded again with each page cut into four of 16.
TEST_F(MlaRunTest, DecodesADumpOfSmallPages) {
  const npy::Array cache = read("tests/data/paged/cache.npy");
  const npy::Array table = read("tests/data/paged/block_table.npy");
  const std::span<const uint16_t> rows = cache.values<uint16_t>();
  std::vector<int32_t> small;
  for (const int32_t page : table.values<int32_t>()) {
    for (int32_t part = 0; part < 4; ++part) small.push_back(page * 4 + part);
  }
  const int64_t pages = cache.header.shape[0], columns = table.header.shape[1];
  write("cache.npy", npy::Type::kUInt16, {pages * 4, 16, 1, 576},
        std::vector<uint16_t>(rows.begin(), rows.end()));
  write("table.npy", npy::Type::kInt32, {2, columns * 4}, small);
  const std::string files =
      replaced(replaced(kPaged, "tests/data/paged/cache.npy", path("cache.npy")),
               "tests/data/paged/block_table.npy", path("table.npy"));
  for (const std::string stage : {"03", "08"}) {
    const Ran ran = run("decode --machine model --stage " + stage + " " + files +
                        " --check-out tests/data/paged/expected_out.npy");
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_NE(ran.text.find("in 12 pages"), std::string::npos) << ran.text;
  }
}

// A shape's name may ask for pages and strides.
TEST_F(MlaRunTest, DecodesShapesWithPagesAndStrides) {
  for (const std::string stage : {"03", "05", "08", "reference"}) {
    const Ran ran = run("decode --machine model --stage " + stage +
                        " --shape h4x2_q2_k70+0+33_causal_page32_strided_fp16");
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
  }
  expect_refused("--stage 02 --shape h4_q1_b1_k70_page20", "has page = 20");
}

TEST_F(MlaRunTest, RefusesShapesThatDisagree) {
  write("page24.npy", npy::Type::kUInt16, {8, 24, 1, 576}, std::vector<uint16_t>(8 * 24 * 576));
  expect_refused("--stage 02 " + replaced(kPaged, "tests/data/paged/cache.npy", path("page24.npy")),
                 "page_size = 24 must be 16, 32, 64, 128 or 256");
  write("three.npy", npy::Type::kInt32, {3}, std::vector<int32_t>(3));
  expect_refused(
      "--stage 02 " + replaced(kPaged, "tests/data/paged/seqlens.npy", path("three.npy")),
      path("three.npy") + ": shape [3] found; [2] needed (b = 2 of tests/data/paged/q.npy)");
  expect_refused(
      "--stage 02 " + replaced(kPaged, "--block-table tests/data/paged/block_table.npy", ""),
      "tests/data/paged/cache.npy: shape [3, 64, 1, 576] found; [2, s, h_kv, 576] "
      "needed (b = 2 of tests/data/paged/q.npy); a paged cache needs --block-table");
  expect_refused("--stage 02 --layout contiguous " + kPaged, "takes no --block-table");
  expect_refused("--stage 02 --layout paged " + kContiguous, "a paged cache needs --block-table");
  write("heads.npy", npy::Type::kUInt16, {3, 64, 2, 576}, std::vector<uint16_t>(3 * 64 * 2 * 576));
  expect_refused("--stage 02 " + replaced(kPaged, "tests/data/paged/cache.npy", path("heads.npy")),
                 "num_heads_q = 3 is not a multiple of num_heads_kv = 2");
}

TEST_F(MlaRunTest, RefusesLengthsAndPagesOutOfRange) {
  const auto with = [&](const char* file) {
    return "--stage 02 " +
           replaced(kPaged, std::string("tests/data/paged/") + file, path("bad.npy"));
  };
  write("bad.npy", npy::Type::kInt32, {2}, std::vector<int32_t>{5, 193});
  expect_refused(with("seqlens.npy"), "seqlens_k[1] = 193 must be in [0, 192]");
  write("bad.npy", npy::Type::kInt32, {2}, std::vector<int32_t>{-1, 70});
  expect_refused(with("seqlens.npy"), "seqlens_k[0] = -1 must be in [0, 192]");
  write("bad.npy", npy::Type::kInt64, {2}, std::vector<int64_t>{5, int64_t{1} << 32});
  expect_refused(with("seqlens.npy"),
                 path("bad.npy") + ": 4294967296 found at element 1; a value that fits int32");
  write("bad.npy", npy::Type::kInt32, {2, 3}, std::vector<int32_t>{2, 0, 0, 0, 3, 0});
  expect_refused(with("block_table.npy"), path("bad.npy") + ", tests/data/paged/seqlens.npy: ");
  expect_refused(with("block_table.npy"), "= 3 ");
  write("bad.npy", npy::Type::kInt32, {2}, std::vector<int32_t>{13, 1});
  expect_refused(
      "--stage 02 " + replaced(kContiguous, "tests/data/contiguous/seqlens.npy", path("bad.npy")),
      path("bad.npy") +
          ": seqlens_k[0] = 13; tests/data/contiguous/cache.npy has 12 tokens per sequence");
}

TEST_F(MlaRunTest, RefusesFlagsThatMakeNoSense) {
  expect_refused(kPaged, "--stage is missing; one of 00_reference, 01_naive, ");
  expect_refused("--stage 99 " + kPaged,
                 "--stage 99 is not known; one of 00_reference, 01_naive, ");
  expect_refused("--stage 02 " + replaced(kPaged, "--scale 0.135234", ""),
                 "--scale or --shape is missing");
  expect_refused("--stage 02 " + replaced(kPaged, "0.135234", "-1"), "--scale");
  expect_refused("--stage 02 " + replaced(kPaged, "--dtype bf16", ""),
                 "tests/data/paged/q.npy holds <u2; say by --dtype bf16 or --dtype fp16");
  expect_refused("--stage 02 " + replaced(kPaged, "bf16", "fp32"), "--dtype");
  expect_refused("--stage 02 --frobnicate " + kPaged, "--frobnicate");
  expect_refused("--stage all " + kPaged, "--out and --lse write the result of one stage");
  expect_refused("--stage 02 --shape h1_q1_b1_k1 " + kPaged, "--shape generates tensors");
  expect_refused("--stage 02 --shape h1_q1_b1_k1 --layout paged", "leave out --layout");
  expect_refused("--stage 02 --shape h1_q1_b1_k1 --scale 1", "leave out --scale");
  expect_refused("--stage 02 --shape h1_q1_b1_k1_fp16 --dtype bf16",
                 "--shape h1_q1_b1_k1_fp16 ends with _fp16, but --dtype says bf16");
  expect_refused("--stage 02 --seed 0 " + kPaged, "--seed is for generated tensors");
  expect_refused("--stage 02 --data needles " + kPaged, "--data is for generated tensors");
  for (const char* flag : {"--schedules 2", "--device a100"}) {
    expect_refused("--stage reference --machine model --shape h1_q1_b1_k1 " + std::string(flag),
                   "--stage reference needs none");
  }
  expect_nothing_run("decode --stage 02 --shape h1_q1_b1_k1 --out-format bits",
                     "there is no --out");
  for (const char* command : {"plan", "predict", "explain"}) {
    expect_nothing_run(std::string(command) + " --stage 04 --shape h1_q1_b1_k1 --out out.npy",
                       "--out");
  }
  expect_refused("--stage 02 --shape nonsense", "shape 'nonsense' is not of the form");
  expect_refused("--stage 02 --schedules 3 " + kPaged, "--schedules needs --machine model");
  const Ran nowhere = run("decode --stage 02 " + kPaged + " --out " + path("no/such/out.npy"));
  EXPECT_EQ(nowhere.exit_code, 2);
  EXPECT_NE(nowhere.text.find("there is no folder " + path("no/such")), std::string::npos);
  fs::copy_file("tests/data/paged/q.npy", path("q.npy"));
  const Ran onto =
      run("decode --stage 02 " + replaced(kPaged, "tests/data/paged/q.npy", path("q.npy")) +
          " --out " + path("q.npy"));
  EXPECT_EQ(onto.exit_code, 2);
  EXPECT_NE(onto.text.find("is an input, and will not be overwritten"), std::string::npos)
      << onto.text;
  expect_refused("--stage 02 --device a100 " + kPaged, "--device needs --machine model");
  for (const char* schedules : {"0", "many", "3..2", "1..", "3..x", "10001", "1..10001"}) {
    expect_refused(
        "--stage 02 --machine model --schedules " + std::string(schedules) + " " + kPaged,
        "--schedules " + std::string(schedules) + " is neither a number of schedules, 1 to 10000");
  }
}

TEST_F(MlaRunTest, OverwritesNothingItReadsUnderAnyName) {
  fs::copy_file("tests/data/paged/expected_out.npy", path("out.npy"));
  fs::copy_file("tests/data/paged/expected_lse.npy", path("lse.npy"));
  fs::create_symlink(path("lse.npy"), path("link.npy"));
  const std::string checks =
      " --check-out " + path("out.npy") + " --check-lse " + path("lse.npy") + " ";
  for (const std::string& output : {"--out " + path("out.npy"), "--lse " + path("lse.npy"),
                                    "--lse " + path("./out.npy"), "--out " + path("link.npy")}) {
    SCOPED_TRACE(output);
    const Ran ran = run("decode --stage reference " + kPaged + checks + output);
    EXPECT_EQ(ran.exit_code, 2) << ran.text;
    EXPECT_NE(ran.text.find("is an input, and will not be overwritten"), std::string::npos)
        << ran.text;
  }
  EXPECT_EQ(read(path("out.npy")).bytes, read("tests/data/paged/expected_out.npy").bytes);
  EXPECT_EQ(read(path("lse.npy")).bytes, read("tests/data/paged/expected_lse.npy").bytes);

  fs::create_directory(path("folder"));
  const Ran same = run("decode --stage reference " + kPaged + " --out " + path("new.npy") +
                       " --lse " + path("folder/../new.npy"));
  EXPECT_EQ(same.exit_code, 2) << same.text;
  EXPECT_NE(same.text.find("--out and --lse are the same file"), std::string::npos) << same.text;
  EXPECT_FALSE(fs::exists(path("new.npy")));
}

TEST_F(MlaRunTest, AGpuAskedForIsThereOrItsAbsenceIsSaid) {
  const Ran ran = run("decode --stage 01 --machine gpu " + kPaged);
  if (ran.exit_code == 0) {
    EXPECT_NE(ran.text.find("gpu: "), std::string::npos) << ran.text;
  } else {
    EXPECT_EQ(ran.exit_code, 2) << ran.text;
    EXPECT_NE(ran.text.find("unavailable: "), std::string::npos) << ran.text;
  }
}

TEST_F(MlaRunTest, AllStagesDecodeGeneratedTensorsUnderSeveralSchedules) {
  const Ran ran =
      run("decode --stage all --machine model --schedules 3 --shape h9x3_q2_b3_kvaried100_causal");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("01_naive"), std::string::npos);
  EXPECT_NE(ran.text.find("03_online_softmax"), std::string::npos);
  EXPECT_EQ(ran.text.find("FAIL"), std::string::npos) << ran.text;
}

// A stage on the CPU decodes where the model does. Commands that need a kernel or a GPU are refused,
// with the reason.
TEST_F(MlaRunTest, AStageOnTheCpuSaysSo) {
  const std::string shape = " --stage 00 --shape h3_q1_b2_k100";
  for (const char* machine : {"", " --machine model"}) {
    const Ran ran = run("decode" + shape + machine);
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_NE(ran.text.find("00_reference         cpu "), std::string::npos) << ran.text;
    EXPECT_NE(ran.text.find("PASS"), std::string::npos) << ran.text;
    EXPECT_NE(ran.text.find("cpu: wall time; CPU, "), std::string::npos) << ran.text;
    EXPECT_EQ(ran.text.find("plays the GPU"), std::string::npos) << ran.text;
  }
  const std::string no_kernel = "00_reference runs on the CPU, and has no kernel";
  expect_nothing_run("decode --machine gpu" + shape, no_kernel + " for GPUs");
  expect_nothing_run("plan" + shape, "00_reference makes no plan");
  expect_nothing_run("predict" + shape, "00_reference runs on the CPU: no limit of a GPU binds it");
  expect_nothing_run("trace -o t.json" + shape, no_kernel + "s to record");
  const Ran explained = run("explain" + shape);
  EXPECT_EQ(explained.exit_code, 0) << explained.text;
  EXPECT_NE(explained.text.find("no limit of a GPU binds it"), std::string::npos) << explained.text;
}

TEST_F(MlaRunTest, PrintsThePlan) {
  const Ran plan = run("plan --machine model --stage 04 --shape h128_q8_b5_kskew20000");
  EXPECT_EQ(plan.exit_code, 0) << plan.text;
  for (const char* needed :
       {"04_split_kv, plan made on: ", "b=5 s_q=8 h_q=128", "\nworker   0 ", "###",
        "0:0-512, 1:0-512,", "(slot 0)", "of the mean)\n", "1 of 5 sequences split"}) {
    EXPECT_NE(plan.text.find(needed), std::string::npos) << needed << "\n" << plan.text;
  }
  const Ran fixed = run("plan --machine model --stage 04 --shape h16_q1_b1_k200_split64");
  EXPECT_NE(fixed.text.find("0:64-128 (slot 1)"), std::string::npos) << fixed.text;
  const Ran dump = run("plan --machine model --stage 04 " + kPaged);
  EXPECT_EQ(dump.exit_code, 0) << dump.text;
  EXPECT_NE(dump.text.find("1:0-"), std::string::npos) << dump.text;

  const Ran all = run("plan --machine model --stage all --shape h16_q1_b1_k200");
  EXPECT_EQ(all.exit_code, 0) << all.text;
  EXPECT_NE(all.text.find("04_split_kv, plan"), std::string::npos) << all.text;
  EXPECT_EQ(all.text.find("01_naive"), std::string::npos) << all.text;
  expect_nothing_run("plan --machine model --stage 02 --shape h16_q1_b1_k200",
                     "02_shared_tiled makes no plan");
  expect_nothing_run("plan --stage reference --shape h1_q1_b1_k1", "plan is for stages");
}

TEST_F(MlaRunTest, Explains) {
  const Ran all = run("explain --machine model --shape h16_q1_b1_k8192");
  EXPECT_EQ(all.exit_code, 0) << all.text;
  for (const char* needed :
       {"b=1 s_q=1 h_q=16",
        "NVIDIA H200, compute capability 9.0, 132 multiprocessors, from records",
        "(recorded: ", "set by the launch", "\n01_naive ", "\n08_seesaw ", "advice, for 08_seesaw",
        "- launch bound: "}) {
    EXPECT_NE(all.text.find(needed), std::string::npos) << needed << "\n" << all.text;
  }
  const Ran one = run("explain --machine model --stage 07 --shape h16_q1_b1_k8192");
  EXPECT_EQ(one.exit_code, 0) << one.text;
  EXPECT_NE(one.text.find("\nstage     07_tma_pipeline: own limit "), std::string::npos)
      << one.text;
  EXPECT_NE(one.text.find("µs cold, recorded"), std::string::npos) << one.text;
  // Without a GPU, recorded times are explained. On a GPU, whatever is known of it; but it succeeds.
  const Ran here = run("explain --stage 05 --shape h16_q1_b1_k8192");
  EXPECT_EQ(here.exit_code, 0) << here.text;
  for (const std::string& dump : {kPaged, kContiguous}) {
    const Ran ran = run("explain --machine model --stage all " + dump);
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_NE(ran.text.find("no times of this shape are known"), std::string::npos) << ran.text;
    EXPECT_EQ(ran.text.find("PASS"), std::string::npos) << ran.text;
  }
  const std::string explain = "explain --shape h1_q1_b1_k1 ";
  expect_nothing_run(explain + "--stage reference", "explain is for stages");
  expect_nothing_run(explain + "--stage 01 --check-out out.npy", "--check-out");
  expect_nothing_run(explain + "--stage 99", "--stage 99 is not known");
  const Ran shapeless = run("explain --shape h1_q1_b1_k");
  EXPECT_EQ(shapeless.exit_code, 2);
  EXPECT_NE(shapeless.text.find("is not of the form"), std::string::npos) << shapeless.text;
  const Ran gpu = run("explain --machine gpu --stage 05 --shape h16_q1_b1_k8192");
  EXPECT_TRUE(gpu.exit_code == 0 || gpu.text.find("unavailable: ") != std::string::npos)
      << gpu.text;
}

TEST_F(MlaRunTest, DecodesInBatchInvariantMode) {
  const Ran ran = run("decode --machine model --stage 04 --shape h16_q1_b2_k200_split64");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("split every 64 tokens"), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("PASS"), std::string::npos) << ran.text;
}

TEST_F(MlaRunTest, TellsWhatItCan) {
  const Ran list = run("list");
  EXPECT_EQ(list.exit_code, 0);
  for (const char* needed : {"01_naive", "02_shared_tiled", "03_online_softmax", "model", "gpu",
                             "gpu    00_reference runs on the CPU", "model  CPU, "}) {
    EXPECT_NE(list.text.find(needed), std::string::npos) << list.text;
  }
  // Steps to a stage can be run by name, but the list does not show them.
  EXPECT_EQ(list.text.find("step_"), std::string::npos) << list.text;
  for (const std::string step : {"step_05_1", "step_05_4_warp_tiles", "step_08_2"}) {
    const Ran ran = run("decode --machine model --shape h2_q1_b1_k70 --stage " + step);
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    EXPECT_NE(ran.text.find(step), std::string::npos) << ran.text;
  }
  EXPECT_EQ(run("decode --machine model --shape h2_q1_b1_k70 --stage step_05").exit_code, 2);
  const Ran help = run("decode --help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_NE(help.text.find("--block-table tests/data/paged/block_table.npy"), std::string::npos);
  EXPECT_NE(help.text.find("192^-1/2"), std::string::npos);
  const Ran version = run("--version");
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_TRUE(version.text.starts_with("mla_run, commit ")) << version.text;
  expect_nothing_run("", "Subcommands:");
  expect_nothing_run("--list", "Run with --help");
  expect_nothing_run("predict --stage 02 --shape h1_q1_b1_k1 --schedules 2", "--schedules");
  expect_nothing_run("plan --stage 04 --shape h1_q1_b1_k1 --json", "--json");
}

TEST_F(MlaRunTest, EveryExampleOfItsHelpRuns) {
  for (const std::string command : {"decode", "plan", "predict", "explain", "list"}) {
    const Ran help = run(command + " --help");
    EXPECT_EQ(help.exit_code, 0) << help.text;
    size_t examples = 0;
    for (size_t at = 0; (at = help.text.find("\n  mla_run ", at)) != std::string::npos; ++at) {
      const size_t begin = at + std::string("\n  mla_run ").size();
      size_t end = help.text.find('\n', begin);
      while (help.text[end - 1] == '\\') end = help.text.find('\n', end + 1);
      std::string example = help.text.substr(begin, end - begin);
      for (const char* file : {"--out out.npy", "--lse lse.npy"}) {
        const size_t place = example.find(file);
        if (place != std::string::npos) example.insert(place + 6, path("") + "/");
      }
      const Ran ran = run(example);
      EXPECT_EQ(ran.exit_code, 0) << example << "\n" << ran.text;
      ++examples;
    }
    EXPECT_GE(examples, 1u) << help.text;
  }
}

TEST_F(MlaRunTest, PredictsInUnitsAndForADevice) {
  const Ran table = run("predict --machine model --stage 03 --shape h128_q1_b64_k4096");
  EXPECT_EQ(table.exit_code, 0) << table.text;
  for (const char* needed :
       {"device: NVIDIA H200, ", "ceilings: recorded: ", "own limit ", " µs, by ", "floor ",
        "73.0 GFLOP", "TFLOP/s", " MB ", "GB/s", "workspace "}) {
    EXPECT_NE(table.text.find(needed), std::string::npos) << needed << "\n" << table.text;
  }
  const Ran ran = run("predict --machine model --stage 03 --shape h128_q1_b64_k4096 --json");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  const auto json = nlohmann::json::parse(ran.text);
  EXPECT_EQ(json["stage"], "03_online_softmax");
  EXPECT_EQ(json["tokens"], 262144);
  EXPECT_EQ(json["flop"], 73014444032);
  const double us = 1e6 * json["own_limit_s"].get<double>();
  EXPECT_GE(json["own_limit_s"], json["floor_s"]);
  char said[32];
  std::snprintf(said, sizeof said, us < 1000 ? "own limit %.1f µs" : "own limit %.0f µs", us);
  EXPECT_NE(table.text.find(said), std::string::npos) << said << "\n" << table.text;
  // A stage without a plan has no estimate; one with a plan has the sum of its steps.
  EXPECT_EQ(table.text.find("estimate"), std::string::npos) << table.text;
  EXPECT_FALSE(json.contains("estimate_s"));
  const auto planned = nlohmann::json::parse(
      run("predict --machine model --stage 08 --shape h128_q1_b1_k4096 --json").text);
  double steps = 0;
  for (const char* step : {"launch", "first_tile", "tiles", "end", "combine"}) {
    const double seconds = planned[std::string("estimate_") + step + "_s"];
    EXPECT_GT(seconds, 0) << step;
    steps += seconds;
  }
  EXPECT_NEAR(planned["estimate_s"].get<double>(), steps, 1e-12);
  EXPECT_GT(steps, planned["own_limit_s"].get<double>());
  const Ran all = run("predict --machine model --stage all --shape h16_q1_b1_k8192");
  EXPECT_EQ(all.exit_code, 0) << all.text;
  EXPECT_NE(all.text.find("\nestimate "), std::string::npos) << all.text;
  EXPECT_NE(all.text.find("\n08_seesaw: own limit "), std::string::npos) << all.text;
  expect_nothing_run("predict --stage reference --shape h1_q1_b1_k1", "predict is for stages");
  const Ran dump = run("predict --machine model --stage 02 " + kPaged);
  EXPECT_EQ(dump.exit_code, 0) << dump.text;
}

// The table of mla_parallel --predict, of as many GPUs as are named.
TEST_F(MlaRunTest, PredictsSeveralGpus) {
  const std::string arguments = "predict --ranks 2,8 --shape h16_q1_b8_k131072";
  const Ran table = run(arguments);
  EXPECT_EQ(table.exit_code, 0) << table.text;
  for (const char* needed : {"decode: NVIDIA H200, ", "\nlinks: ", " µs, NVLink ", "of one"}) {
    EXPECT_NE(table.text.find(needed), std::string::npos) << needed << "\n" << table.text;
  }
  const Ran ran = run(arguments + " --json");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  std::istringstream lines(ran.text);
  std::vector<std::string> ways;
  for (std::string line; std::getline(lines, line);) {
    const auto json = nlohmann::json::parse(line);
    const std::string way = json["way"].get<std::string>();
    ways.push_back(fmt::format("{} {}", json["ranks"].get<int>(), way));
    if (table.text.find(way) == std::string::npos) {  // of several it has the best
      EXPECT_NE(way.find(" × "), std::string::npos) << way;
      continue;
    }
    EXPECT_NEAR(json["predicted_s"].get<double>(),
                json["decode_s"].get<double>() + json["exchange_s"].get<double>() +
                    json["merge_s"].get<double>(),
                1e-12);
    // The same number, rounded.
    const double us = 1e6 * json["predicted_s"].get<double>();
    EXPECT_NE(table.text.find(us < 1000 ? fmt::format("{:.1f}", us) : fmt::format("{:.0f}", us)),
              std::string::npos)
        << us << "\n"
        << table.text;
  }
  const std::vector<std::string> expected = {"2 context, all_gather",
                                             "2 context, all_to_all",
                                             "2 context, reduce_scatter",
                                             "2 heads",
                                             "2 batch",
                                             "8 context, all_gather",
                                             "8 context, all_to_all",
                                             "8 context, reduce_scatter",
                                             "8 heads 2 × context 4, all_gather",
                                             "8 heads 2 × context 4, all_to_all",
                                             "8 heads 2 × context 4, reduce_scatter",
                                             "8 heads 4 × context 2, all_gather",
                                             "8 heads 4 × context 2, all_to_all",
                                             "8 heads 4 × context 2, reduce_scatter",
                                             "8 heads",
                                             "8 batch"};
  EXPECT_EQ(ways, expected);
  expect_nothing_run("predict --ranks 2 --stage 08 --shape h16_q1_b1_k64", "leave out --stage");
  expect_nothing_run("predict --ranks 2", "--ranks needs a --shape");
  expect_nothing_run("predict --ranks 2 --shape h16_q2_b1_k64", "only one query token");
}

// The logits 2^24 and 2^24 + 1 are equal in fp32, so no kernel gives the result of float64.
TEST_F(MlaRunTest, TheLastLineOfAFailureRepeatsIt) {
  std::vector<float> q(2 * 576), cache(2 * 576);
  q[576] = cache[0] = cache[576] = 4096;
  q[576 + 1] = cache[576 + 1] = 1;
  cache[2] = 1;
  cache[576 + 2] = -1;
  write("it's q.npy", npy::Type::kFloat32, {1, 1, 2, 576}, q);
  write("cache.npy", npy::Type::kFloat32, {1, 2, 1, 576}, cache);
  write("seqlens.npy", npy::Type::kInt32, {1}, std::vector<int32_t>{2});
  const std::string files = " --machine model --q \"" + path("it's q.npy") + "\" --cache " +
                            path("cache.npy") + " --seqlens " + path("seqlens.npy") +
                            " --scale 100 --dtype bf16";
  const auto failure_in = [](const std::string& text) {
    const size_t begin = text.find("outside tolerance at sequence 0, query token 0, head 1");
    EXPECT_NE(begin, std::string::npos) << text;
    return text.substr(begin, text.find('\n', begin) - begin);
  };
  for (const std::string arguments :
       {"--stage 02 --schedules 5..7", "--stage 05 --schedules 3 --device a100",
        "--stage all --causal --layout contiguous"}) {
    SCOPED_TRACE(arguments);
    const Ran failed = run("decode " + arguments + files);
    EXPECT_EQ(failed.exit_code, 1) << failed.text;
    const std::string begin = "\nrepeat: mla_run ";
    const size_t at = failed.text.rfind(begin);
    ASSERT_NE(at, std::string::npos) << failed.text;
    const std::string last = failed.text.substr(at + 1);
    EXPECT_EQ(std::count(last.begin(), last.end(), '\n'), 1) << "not the last line: " << last;
    const Ran again = run(last.substr(begin.size() - 1, last.size() - begin.size()));
    EXPECT_EQ(again.exit_code, 1) << again.text;
    EXPECT_EQ(failure_in(again.text), failure_in(failed.text));
    EXPECT_EQ(again.text.substr(again.text.rfind(begin) + 1), last);
  }
}

// The block has two tiles or more, so buffers are used again. The program replays what it wrote.
TEST_F(MlaRunTest, ATraceOfEveryStageReplays) {
  const std::string shape = " --shape h64_q1_b1_k300 --multiprocessors 1 ";
  for (const std::string stage : {"01", "02", "03", "04", "05", "06", "07", "08"}) {
    for (const std::string seed : {"0", "3", "7"}) {
      SCOPED_TRACE(stage + ", seed " + seed);
      const std::string command = "trace --stage " + stage + shape + "--seed " + seed + " -o ";
      const Ran ran = run(command + path("a.json") + " --chrome " + path("chrome.json"));
      ASSERT_EQ(ran.exit_code, 0) << ran.text;
      EXPECT_LT(fs::file_size(path("a.json")), 350 * 1024);
      EXPECT_EQ(run(command + path("b.json")).exit_code, 0);
      EXPECT_EQ(text_of(path("a.json")), text_of(path("b.json")));
      const Ran checked = run("trace --check " + path("a.json"));
      EXPECT_EQ(checked.exit_code, 0) << checked.text;
      EXPECT_NE(checked.text.find("a.json: right; "), std::string::npos) << checked.text;
      const auto file = nlohmann::json::parse(text_of(path("a.json")));
      EXPECT_EQ(file.at("about").at("schedule"), seed);
      for (const auto& launch : file.at("launches")) {
        EXPECT_EQ(launch.at("shared_bytes") > 0, !launch.at("regions").empty()) << launch;
      }
      const auto chrome = nlohmann::json::parse(text_of(path("chrome.json")));
      size_t waits = 0;
      for (const auto& event : chrome.at("traceEvents")) {
        EXPECT_TRUE(event.at("ph") == "M" || event.at("dur") > 0) << event;
        waits += event.at("ph") == "X" && event.at("args").contains("released by") ? 1 : 0;
      }
      EXPECT_GT(waits, 0u);
    }
  }
}

TEST_F(MlaRunTest, ATraceIsBoundedAndSaysSo) {
  const std::string command =
      "trace --stage 07 --shape h16_q1_b1_k128 -o " + path("trace.json") + " --max-events 50";
  const Ran ran = run(command);
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("note: truncated"), std::string::npos) << ran.text;
  const auto file = nlohmann::json::parse(text_of(path("trace.json")));
  EXPECT_EQ(file.at("events").size(), 50u);
  EXPECT_EQ(file.at("truncated"), true);
  EXPECT_GT(file.at("events_left_out"), 50);
  const Ran checked = run("trace --check " + path("trace.json"));
  EXPECT_EQ(checked.exit_code, 0);
  EXPECT_NE(checked.text.find("; truncated"), std::string::npos) << checked.text;
}

TEST_F(MlaRunTest, ATracesOptionsAreChecked) {
  const std::string right = "trace --stage 02 --shape h1_q1_b1_k64";
  const std::string to = " -o " + path("no.json");
  expect_nothing_run(right, "-o is missing");
  expect_nothing_run("trace --stage 02" + to, "--shape is missing");
  expect_nothing_run("trace --shape h1_q1_b1_k64" + to, "--stage is missing");
  expect_nothing_run("trace --stage all --shape h1_q1_b1_k64" + to, "names no single stage");
  expect_nothing_run("trace --stage 99 --shape h1_q1_b1_k64" + to, "--stage 99 is not known");
  expect_nothing_run("trace --stage 02 --shape h1_q1" + to, "h1_q1");
  expect_nothing_run(right + to + " --chrome " + path("no.json"), "are the same file");
  expect_nothing_run(right + to + " --block 1000000", "no launch has a block of that number");
  expect_nothing_run(right + to + " --max-events 0", "--max-events");
  expect_nothing_run(right + to + " --max-mib 0", "--max-mib");
  expect_nothing_run(right + to + " --multiprocessors 0", "--multiprocessors");
  expect_nothing_run(right + to + " --block 1 --blocks", "excludes");
  expect_nothing_run(right + " --check x.json", "leave out all other options");
  expect_nothing_run("trace --check " + path("none.json"), "cannot be read");
  EXPECT_FALSE(fs::exists(path("no.json")));
  std::ofstream(path("other.json")) << "{}";
  const Ran other = run("trace --check " + path("other.json"));
  EXPECT_EQ(other.exit_code, 1) << other.text;
  EXPECT_NE(other.text.find("this is no recording"), std::string::npos) << other.text;
}

TEST_F(MlaRunTest, ASchedulesSeedAndADeviceCanBeNamed) {
  const std::string command = "decode --machine model --stage 04 --shape h4_q1_b2_k100 ";
  for (const char* more : {"--schedules 17..17", "--schedules 3..5", "--device a100",
                           "--device h100_grid5 --schedules 9..9 --data extreme-values"}) {
    const Ran ran = run(command + more);
    EXPECT_EQ(ran.exit_code, 0) << more << "\n" << ran.text;
    EXPECT_EQ(ran.text.find("repeat:"), std::string::npos) << ran.text;
  }
  const Ran other = run("decode --machine model --stage 08 --shape h4_q1_b2_k100 --device rtx3090");
  EXPECT_EQ(other.exit_code, 2) << other.text;
  EXPECT_NE(other.text.find("the device has 8.6"), std::string::npos) << other.text;
}

TEST_F(MlaRunTest, QuantiseSaysWhatEachFormatLoses) {
  const Ran ran = run("quantise --shape h16_q1_b2_k256 --data flat");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  const auto numbers = [&](const std::string& format) {
    std::istringstream line(ran.text.substr(ran.text.find("\n" + format) + 1 + format.size()));
    std::array<double, 8> found{};
    for (double& one : found) line >> one;
    EXPECT_TRUE(line) << format << ": " << ran.text;
    return found;
  };
  const auto tile = numbers("fp8_tile128"), tensor = numbers("fp8_tensor"),
             int8 = numbers("int8_tile128");
  EXPECT_EQ(tile[0], 656);
  EXPECT_EQ(tensor[0], 576);
  EXPECT_EQ(int8[0], 656);
  // Three bits of fraction: an error of at most 2^-4, and of 2^-4 / sqrt(12) or more on average. The
  // 8 bits of int8_tile128 lose less.
  EXPECT_GT(tile[2], 0.015);
  EXPECT_LT(tile[2], 0.0625);
  EXPECT_LT(int8[2], tile[2] / 2);
  EXPECT_EQ(tile[3], 0) << "rotary columns are bf16";
  EXPECT_EQ(int8[3], 0);
  EXPECT_GT(tensor[3], 0.015);
  for (const auto& one : {tile, tensor, int8}) {
    EXPECT_GT(one[4], one[2] / 4) << "out";
    EXPECT_LT(one[4], one[2] * 4);
  }
  const Ran fp16 = run("quantise --shape h16_q1_b1_k64_fp16");
  EXPECT_EQ(fp16.exit_code, 0) << fp16.text;
  EXPECT_NE(fp16.text.find("fp8_tile128    dtype = fp16 must be bf16"), std::string::npos);
  EXPECT_NE(fp16.text.find("cache_scale 0."), std::string::npos);
}

TEST_F(MlaRunTest, QuantiseWritesTheCache) {
  const std::string dump =
      "--dtype bf16 --scale 0.135234 --q tests/data/paged/q.npy --cache "
      "tests/data/paged/cache.npy --block-table tests/data/paged/block_table.npy --seqlens "
      "tests/data/paged/seqlens.npy ";
  const Ran ran = run("quantise " + dump + "--format int8_tile128 --out " + path("cache.npy"));
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  const npy::Array cache = read("tests/data/paged/cache.npy"), written = read(path("cache.npy"));
  ASSERT_EQ(written.header.type, npy::Type::kUInt8);
  const int64_t pages = cache.header.shape[0];
  ASSERT_EQ(written.header.shape, (std::vector<int64_t>{pages, 64, 1, 656}));
  Problem problem;
  problem.batch = problem.num_heads_q = problem.max_pages_per_seq = 1;
  problem.softmax_scale = 1;
  problem.num_pages = static_cast<int>(pages);
  problem.cache_format = CacheFormat::kInt8Tile128;
  std::vector<uint8_t> expected;
  ASSERT_OK(quantise_cache(problem, cache.bytes.data(), ScaleRule::kLargest, &expected));
  const auto bytes = written.values<uint8_t>();
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), expected.begin(), expected.end()));
}

TEST_F(MlaRunTest, QuantiseRefusesWhatItCannotDo) {
  const std::string shape = "quantise --shape h16_q1_b1_k64 ";
  expect_nothing_run(shape + "--out " + path("all.npy"), "name it, as in --format fp8_tile128");
  expect_nothing_run(shape + "--format fp8_tile128 --cache-scale 1", "fp8_tile128 has its own");
  expect_nothing_run(shape + "--format fp4", "--format");
  expect_nothing_run("quantise --shape h16_q1_b1_k64_fp16 --format int8_tile128",
                     "dtype = fp16 must be bf16");
  expect_nothing_run(
      "quantise --dtype bf16 --scale 1 --q tests/data/paged/q.npy --cache "
      "tests/data/paged/cache.npy --block-table tests/data/paged/block_table.npy --seqlens "
      "tests/data/paged/seqlens.npy --format fp8_tensor --out tests/data/paged/cache.npy",
      "is an input, and will not be overwritten");
}

TEST_F(MlaRunTest, Recommends) {
  const std::string wish = "recommend --heads 16 --layers 27 --context 8192 ";
  const Ran ran = run(wish + "--goal throughput --budget 2GiB");
  EXPECT_EQ(ran.exit_code, 0) << ran.text;
  EXPECT_NE(ran.text.find("caches of at most 2.00 GiB"), std::string::npos) << ran.text;
  EXPECT_NE(ran.text.find("Run stage "), std::string::npos) << ran.text;
  const Ran none = run(wish + "--goal latency --p99 1us");
  EXPECT_EQ(none.exit_code, 1) << none.text;
  EXPECT_NE(none.text.find("Nothing that is recorded meets this"), std::string::npos) << none.text;
  expect_nothing_run(wish + "--goal memory --budget 2",
                     "--budget 2 must be a number and one of GiB, MiB, GB");
  expect_nothing_run(wish + "--goal memory --p99 -5ms", "p99 = -5 must be greater than 0");
  expect_nothing_run(wish + "--goal beauty", "--goal");
  expect_nothing_run("recommend --goal memory --heads 7",
                     "no stage has recorded times up to 7 heads");
}

// What quantise writes can be decoded, with the error that quantise said.
TEST_F(MlaRunTest, DecodesAQuantisedCache) {
  const std::string rest =
      "--dtype bf16 --scale 0.135234 --q tests/data/paged/q.npy --block-table "
      "tests/data/paged/block_table.npy --seqlens tests/data/paged/seqlens.npy ";
  const std::string plain = "--cache tests/data/paged/cache.npy ";
  const auto out_of = [&](const std::string& arguments) {
    const Ran ran =
        run("decode --stage reference " + arguments + " --out-format fp32 --out " + path("o.npy"));
    EXPECT_EQ(ran.exit_code, 0) << ran.text;
    const npy::Array array = read(path("o.npy"));
    const auto values = array.values<float>();
    return std::vector<float>(values.begin(), values.end());
  };
  const std::vector<float> expected = out_of(rest + plain);
  for (const std::string format : {"fp8_tile128", "int8_tile128", "fp8_tensor"}) {
    SCOPED_TRACE(format);
    const std::string scale = format == "fp8_tensor" ? "--cache-scale 0.01 " : "";
    const Ran ran = run("quantise " + rest + plain + "--format " + format + " " + scale + "--out " +
                        path("cache.npy"));
    ASSERT_EQ(ran.exit_code, 0) << ran.text;
    std::istringstream line(ran.text.substr(ran.text.find("\n" + format) + 1 + format.size()));
    double skipped = 0, said = 0;
    line >> skipped >> skipped >> skipped >> skipped >> said;
    const std::vector<float> out =
        out_of(rest + "--cache " + path("cache.npy") + " --cache-format " + format + " " + scale);
    ASSERT_EQ(out.size(), expected.size());
    double error = 0, size = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      error += std::pow(double{out[i]} - double{expected[i]}, 2);
      size += std::pow(double{expected[i]}, 2);
    }
    EXPECT_GT(said, 1e-3);
    EXPECT_NEAR(std::sqrt(error / size), said, 0.01 * said);
  }
  const std::string shape = "decode --shape h16_q1_b1_k64 --cache-format fp8_tensor --stage ";
  EXPECT_EQ(run(shape + "reference").exit_code, 0);
  expect_nothing_run(shape + "08 --machine model", "08_seesaw cannot read a cache of");
  const std::string named = "decode --stage reference --shape h16_q1_b1_k64_fp8_tensor";
  const auto file = [&](const char* name) { return std::string(" --out ") + path(name); };
  EXPECT_EQ(run(named + file("by_name.npy")).exit_code, 0);
  EXPECT_EQ(run(shape + "reference" + file("by_flag.npy")).exit_code, 0);
  EXPECT_EQ(run(named + " --cache-scale 3" + file("by_scale.npy")).exit_code, 0);
  npy::Array by_name, by_flag, by_scale;
  ASSERT_OK(npy::read(path("by_name.npy"), &by_name));
  ASSERT_OK(npy::read(path("by_flag.npy"), &by_flag));
  ASSERT_OK(npy::read(path("by_scale.npy"), &by_scale));
  const auto same = [](const npy::Array& a, const npy::Array& b) {
    return std::ranges::equal(a.values<uint16_t>(), b.values<uint16_t>());
  };
  EXPECT_TRUE(same(by_name, by_flag));
  EXPECT_FALSE(same(by_name, by_scale));
  const std::string other = named.substr(0, named.find("_fp8")) + "_int8_tile128";
  expect_nothing_run(other + " --cache-scale 3", "--cache-scale needs --cache-format fp8_tensor");
  expect_nothing_run(other + " --cache-format fp8_tensor", "name different formats");
  expect_nothing_run("quantise" + other.substr(other.find(" --shape")),
                     "has a quantised cache already; leave out _int8_tile128");
}

TEST_F(MlaRunTest, RefusesCachesThatAreNotWhatTheyAreSaidToBe) {
  const std::string codes = "--stage reference --cache-format fp8_tile128 ";
  expect_refused(codes + kPaged, "cache.npy: <u2 found; |u1 (bytes) needed");
  write("short.npy", npy::Type::kUInt8, {3, 64, 1, 576}, std::vector<uint8_t>(3 * 64 * 576));
  const std::string shorter = replaced(kPaged, "tests/data/paged/cache.npy", path("short.npy"));
  expect_refused(codes + shorter, "[pages, page_size, h_kv, 656] needed");
  expect_refused("--stage reference --cache-format fp8_tensor " + shorter, "needs --cache-scale");
  expect_refused("--stage reference --cache-scale 1 " + std::string(kPaged),
                 "needs --cache-format");
  expect_refused(codes + replaced(shorter, "--block-table tests/data/paged/block_table.npy", ""),
                 "a quantised cache is paged");
}

}  // namespace
}  // namespace mla
