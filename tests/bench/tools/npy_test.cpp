// The .npy reader and writer: what they accept. All else must be rejected.
#include "bench/tools/npy.h"
#include "tests/status_matchers.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace mla::npy {
namespace {

namespace fs = std::filesystem;

class NpyTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "npy_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name = "a.npy") const { return (folder_ / name).string(); }

  void put(const std::string& bytes, const std::string& name = "a.npy") const {
    std::ofstream(path(name), std::ios::binary) << bytes;
  }
  std::string get(const std::string& name = "a.npy") const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  /// A file with this header text, its length in `length_bytes` (2 or 4) bytes, and data.
  static std::string file(const std::string& text, const std::string& data, char major = 1) {
    std::string bytes = "\x93NUMPY";
    bytes += {major, '\0'};
    for (int i = 0; i < (major == 1 ? 2 : 4); ++i) {
      bytes += static_cast<char>(text.size() >> (8 * i) & 0xff);
    }
    return bytes + text + data;
  }
  static std::string header(const std::string& descr, const std::string& shape,
                            const std::string& order = "False") {
    return "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
  }

  /// Reads a.npy and expects a failure that names the file and says `message`.
  void expect_rejected(const std::string& bytes, const std::string& message) const {
    SCOPED_TRACE(message);
    put(bytes);
    Header found{Type::kInt64, {7}};
    Array array;
    for (const Status& status : {read(path(), &array), read_header(path(), &found)}) {
      EXPECT_EQ(status.code(), StatusCode::kFileError);
      EXPECT_NE(status.message().find(path()), std::string::npos) << status.message();
      EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
    }
    EXPECT_EQ(found.shape, std::vector<int64_t>{7}) << "a failure must leave the result alone";
    EXPECT_TRUE(array.bytes.empty());
  }

  fs::path folder_;
};

template <typename T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

TEST_F(NpyTest, WhatIsWrittenIsReadBack) {
  const std::vector<float> values{1.5F, -2.0F, 3.25F, 4.0F, -0.0F, 6.0F};
  const Output output{path(), Type::kFloat32, {2, 3}, bytes_of(values)};
  ASSERT_OK(write({&output, 1}));
  Array array;
  const Status status = read(path(), &array);
  ASSERT_OK(status);
  EXPECT_EQ(array.header.type, Type::kFloat32);
  EXPECT_EQ(array.header.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(array.header.elements(), 6);
  const auto read_back = array.values<float>();
  EXPECT_EQ(std::memcmp(read_back.data(), values.data(), 24), 0);
}

TEST_F(NpyTest, WritesTheBytesThatNumPyWrites) {
  // numpy.save("a.npy", numpy.array([1, 2, 3], "<i4")), byte for byte.
  const std::vector<int32_t> values{1, 2, 3};
  const Output output{path(), Type::kInt32, {3}, bytes_of(values)};
  ASSERT_OK(write({&output, 1}));
  std::string text = "{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }";
  text.append(118 - 1 - text.size(), ' ');
  const std::string data("\1\0\0\0\2\0\0\0\3\0\0\0", 12);
  EXPECT_EQ(get(), file(text + "\n", data));
}

TEST_F(NpyTest, WritesShapesAsPythonTuples) {
  const std::vector<uint16_t> values(24);
  for (const auto& [shape, text] : std::vector<std::pair<std::vector<int64_t>, std::string>>{
           {{24}, "(24,)"}, {{2, 12}, "(2, 12)"}, {{2, 3, 4}, "(2, 3, 4)"}, {{0, 5}, "(0, 5)"}}) {
    const size_t elements = shape[0] == 0 ? 0 : values.size();
    const Output output{path(), Type::kUInt16, shape, bytes_of(values).first(2 * elements)};
    ASSERT_OK(write({&output, 1}));
    EXPECT_NE(get().find("'shape': " + text + ", }"), std::string::npos) << get();
    EXPECT_EQ((get().size() - 2 * elements) % 64, 0U);
    Header found;
    ASSERT_OK(read_header(path(), &found));
    EXPECT_EQ(found.shape, shape);
  }
  const Output scalar{path(), Type::kUInt16, {}, bytes_of(values).first(2)};
  ASSERT_OK(write({&scalar, 1}));
  EXPECT_NE(get().find("'shape': (), }"), std::string::npos) << get();
}

TEST_F(NpyTest, ReadsEveryTypeAndVersion) {
  const std::vector<std::pair<std::string, Type>> types{
      {"<f2", Type::kFloat16}, {"<f4", Type::kFloat32}, {"<f8", Type::kFloat64},
      {"<u2", Type::kUInt16},  {"<i2", Type::kInt16},   {"<i4", Type::kInt32},
      {"<i8", Type::kInt64},   {"<u4", Type::kUInt32},  {"<u8", Type::kUInt64}};
  for (const auto& [name, type] : types) {
    for (const char major : {'\1', '\2', '\3'}) {
      put(file(header(name, "(2, 1)"), std::string(2 * size_of(type), '\x11'), major));
      Array array;
      const Status status = read(path(), &array);
      ASSERT_OK(status);
      EXPECT_EQ(array.header.type, type);
      EXPECT_EQ(array.header.shape, (std::vector<int64_t>{2, 1}));
      EXPECT_EQ(to_string(type), name);
    }
  }
}

TEST_F(NpyTest, ReadsHeadersAsOtherWritersPutThem) {
  const std::string data(8, '\0');
  for (const std::string& text :
       {std::string("{'shape':(4,),'fortran_order':False,'descr':'<u2'}"),
        std::string("{\"descr\": \"<u2\", \"fortran_order\": False, \"shape\": (4,)}   "),
        std::string(" { 'descr' : '<u2' , 'fortran_order' : False , 'shape' : ( 4L , ) , } \n"),
        std::string("{'descr': '<u2', 'fortran_order': False, 'shape': (4)}")}) {
    put(file(text, data));
    Header found;
    const Status status = read_header(path(), &found);
    EXPECT_OK(status);
    EXPECT_EQ(found.shape, std::vector<int64_t>{4}) << text;
  }
}

TEST_F(NpyTest, RejectsWhatIsNotThere) {
  Array array;
  const Status missing = read(path("missing.npy"), &array);
  EXPECT_EQ(missing.code(), StatusCode::kFileError);
  EXPECT_NE(missing.message().find("missing.npy: cannot be opened: "), std::string::npos)
      << missing.message();
  const Status folder = read(folder_.string(), &array);
  EXPECT_EQ(folder.code(), StatusCode::kFileError);
  EXPECT_NE(folder.message().find("not a regular file"), std::string::npos) << folder.message();
}

TEST_F(NpyTest, RejectsOtherFormats) {
  expect_rejected("", "empty file");
  expect_rejected("PK\3\4rest of it", "\"PK\\x03\\x04re\"; \"\\x93NUMPY\" needed");
  expect_rejected("PK\3\4rest of it", "an .npz or a .pt");
  expect_rejected("NUMPY, almost", "starts with \"NUMPY,\"");
  std::string bytes = file(header("<u2", "(1,)"), "ab");
  bytes[6] = 4;
  expect_rejected(bytes, "format version 4.0 found; 1.0, 2.0 or 3.0 needed");
  bytes[6] = 0;
  expect_rejected(bytes, "format version 0.0 found");
  bytes[6] = 1;
  bytes[7] = 1;
  expect_rejected(bytes, "format version 1.1 found");
}

TEST_F(NpyTest, RejectsTypesItCannotUse) {
  expect_rejected(file(header(">f4", "(1,)"), "abcd"), "'>f4' found, which is big-endian");
  expect_rejected(file(header("<V2", "(2,)"), "abcd"), "array.view(numpy.uint16)");
  expect_rejected(file(header("|V2", "(2,)"), "abcd"), "array.view(numpy.uint16)");
  for (const char* name : {"<V2", "|V2", "bfloat16"}) {  // of ml_dtypes
    expect_rejected(file(header(name, "(2,)"), "abcd"),
                    "bfloat16 of ml_dtypes is saved; save "
                    "array.view(numpy.uint16) and say --dtype");
  }
  for (const char* name : {"<V1", "|V1", "<f1", "|f1", "float8_e4m3fn", "float8_e5m2"}) {
    expect_rejected(file(header(name, "(2,)"), "ab"),
                    "float8 of ml_dtypes is saved; save "
                    "array.astype(numpy.float32)");
  }
  expect_rejected(file(header("<c8", "(0,)"), ""), "dtype '<c8' found; <f2, <f4");
  expect_rejected(file(header("|O", "(0,)"), ""), "dtype '|O' found");
  expect_rejected(file("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "abcd"),
                  "records (a structured dtype) found");
  expect_rejected(file(header("<f4", "(2, 3)", "True"), std::string(24, 'x')),
                  "Fortran order found; C order needed");
}

TEST_F(NpyTest, RejectsDataOfTheWrongSize) {
  expect_rejected(file(header("<f4", "(2, 3)"), std::string(23, 'x')),
                  "truncated: 23 bytes of data found, 24 needed for <f4 [2, 3]");
  expect_rejected(file(header("<f4", "(2, 3)"), std::string(25, 'x')),
                  "too long: 25 bytes of data found, 24 needed for <f4 [2, 3]");
  expect_rejected(file(header("<f4", "(0, 3)"), "x"), "too long: 1 bytes");
  expect_rejected(file(header("<f4", "()"), ""), "truncated: 0 bytes of data found, 4 needed");
}

TEST_F(NpyTest, BelievesNoSizeInTheHeader) {
  // More elements than the file has, more than 2^63 bytes, a side of 2^63, more than 2^64 elements in
  // all, and too many axes.
  expect_rejected(file(header("<f4", "(1099511627776,)"), "abcd"), "truncated: 4 bytes of data");
  expect_rejected(file(header("<f8", "(9223372036854775807,)"), "abcd"), "no file can hold that");
  expect_rejected(file(header("<f8", "(9223372036854775808,)"), "abcd"), "holds no shape");
  expect_rejected(file(header("<u2", "(4294967296, 4294967296)"), ""), "no file can hold that");
  expect_rejected(file(header("<u2", "(-1,)"), ""), "holds no shape");
  std::string many = "(";
  for (int i = 0; i < 65; ++i) many += "1, ";
  expect_rejected(file(header("<u2", many + ")"), "ab"), "more than 64 axes");

  std::string bytes = file(header("<u2", "(1,)"), "ab", 2);
  for (int i = 8; i < 12; ++i) bytes[i] = '\xff';
  expect_rejected(bytes, "truncated in its header");
  expect_rejected(file(header("<u2", "(1,)") + std::string(70000, ' '), "ab", 2),
                  "bytes found; at most 65536 make sense");
}

TEST_F(NpyTest, RejectsHeadersThatNumPyDoesNotWrite) {
  const std::string bad = "a dict with the keys descr, fortran_order and shape needed";
  expect_rejected(file("", ""), bad);
  expect_rejected(file("import os", ""), bad);
  expect_rejected(file("{}", ""), bad);
  expect_rejected(file("{'descr': '<u2', 'fortran_order': False}", ""), bad);
  expect_rejected(file("{'descr': '<u2', 'shape': (1,)}", "ab"), bad);
  expect_rejected(file("{'fortran_order': False, 'shape': (1,)}", "ab"), bad);
  expect_rejected(file("{'descr': '<u2', 'descr': '<f4', 'fortran_order': False}", ""), bad);
  expect_rejected(file("{'descr': '<u2', 'fortran_order': 0, 'shape': (1,)}", "ab"), bad);
  expect_rejected(file(header("<u2", "(1,)") + "x", "ab"), bad);
  expect_rejected(file("{'descr': '<u2' 'fortran_order': False, 'shape': (1,)}", "ab"), bad);
  expect_rejected(file("{'descr: <u2, fortran_order: False, shape: (1,)}", "ab"), bad);
  expect_rejected(file("{'descr': '<u2', 'fortran_order': False, 'shape': [1]}", "ab"),
                  "holds no shape");
  expect_rejected(file("{'descr': '<u2', 'fortran_order': False, 'shape': (1 1)}", "ab"),
                  "holds no shape");
  expect_rejected(file("{'descr': '<u2', 'fortran_order': False, 'shape': (1, ", "ab"),
                  "holds no shape");
}

TEST_F(NpyTest, RejectsEveryTruncation) {
  for (const char major : {'\1', '\2', '\3'}) {
    const std::string whole = file(header("<i8", "(3,)"), std::string(24, '\x7f'), major);
    for (size_t length = 0; length < whole.size(); ++length) {
      put(whole.substr(0, length));
      Array array;
      const Status status = read(path(), &array);
      EXPECT_EQ(status.code(), StatusCode::kFileError) << "cut to " << length << " bytes";
      EXPECT_TRUE(status.message().starts_with(path() + ": ")) << status.message();
    }
    put(whole);
    Array array;
    EXPECT_OK(read(path(), &array));
  }
}

TEST_F(NpyTest, SurvivesEveryChangedByte) {
  const std::string whole = file(header("<i8", "(3,)"), std::string(24, '\x7f'));
  const size_t header_end = whole.size() - 24;
  for (size_t i = 0; i < header_end; ++i) {
    for (const int value : {0x00, 0x20, 0x27, 0x29, 0x30, 0x39, 0x7f, 0x80, 0xff}) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(value);
      put(bytes);
      Array array;
      const Status status = read(path(), &array);
      if (status.ok()) {
        EXPECT_EQ(array.bytes.size(), 24U) << "byte " << i << " = " << value;
      } else {
        EXPECT_EQ(status.code(), StatusCode::kFileError);
      }
    }
  }
}

TEST_F(NpyTest, ChecksSayWhatWasFoundAndNeeded) {
  const Header found{Type::kFloat64, {3, 16, 1, 576}};
  EXPECT_OK(check_type("c.npy", found, {Type::kFloat32, Type::kFloat64}, "floats"));
  EXPECT_EQ(check_type("c.npy", found, {Type::kUInt16}, "<u2 (bf16 bits)").message(),
            "c.npy: <f8 found; <u2 (bf16 bits) needed");
  EXPECT_OK(check_shape("c.npy", found, {"pages", 16, "h_kv", 576}));
  EXPECT_EQ(check_shape("c.npy", found, {"pages", 64, "h_kv", 576}, "(pages of 64)").message(),
            "c.npy: shape [3, 16, 1, 576] found; [pages, 64, h_kv, 576] needed (pages of 64)");
  EXPECT_FALSE(check_shape("c.npy", found, {"b"}).ok());
  EXPECT_FALSE(check_shape("c.npy", Header{Type::kFloat32, {0}}, {"b"}).ok());
  EXPECT_EQ(check_shape("c.npy", found, {"b"}).code(), StatusCode::kFileError);
  EXPECT_EQ(check_shape("q.npy", Header{Type::kFloat32, {0, 576}}, {"b", 576}).message(),
            "q.npy: shape [0, 576] found: b = 0; at least 1 needed");
  EXPECT_EQ(check_shape("q.npy", Header{Type::kFloat32, {0, 5}}, {2, 5}).message(),
            "q.npy: shape [0, 5] found; [2, 5] needed");
}

TEST_F(NpyTest, WritesAllOrNothing) {
  const std::vector<float> values(4);
  put("old", "kept.npy");
  fs::create_directory(path("folder"));
  const std::vector<Output> outputs{
      {path("kept.npy"), Type::kFloat32, {4}, bytes_of(values)},
      {path("folder"), Type::kFloat32, {4}, bytes_of(values)},
  };
  const Status status = write(outputs);
  EXPECT_EQ(status.code(), StatusCode::kFileError);
  EXPECT_EQ(status.message(), path("folder") + ": cannot be written: it is a folder");
  EXPECT_EQ(get("kept.npy"), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 2)
      << "nothing half-written may stay behind";

  const Output nowhere{path("no/such/a.npy"), Type::kFloat32, {4}, bytes_of(values)};
  EXPECT_NE(write({&nowhere, 1}).message().find("there is no folder"), std::string::npos);
}

}  // namespace
}  // namespace mla::npy
