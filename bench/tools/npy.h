/// @file
/// NumPy's .npy files, versions 1 to 3: what mla_run reads tensors from and writes results to.
/// Format: numpy.org/doc/stable/reference/generated/numpy.lib.format.html
///
/// Little-endian, C order, ten element types. Every failure is a kFileError whose message names
/// the file, what was found and what is needed. No size that a file claims is believed before it is
/// compared with the file's own size, so a damaged file cannot make the reader allocate or loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "reference/status.h"

namespace mla::npy {

enum class Type {
  kFloat16,
  kFloat32,
  kFloat64,
  kUInt8,
  kUInt16,
  kInt16,
  kInt32,
  kInt64,
  kUInt32,
  kUInt64
};

/// NumPy's name of a type: "<f2", "<u2", ...
const char* to_string(Type type);
/// Bytes per element.
size_t size_of(Type type);

/// "[2, 1, 4, 576]"
std::string to_string(std::span<const int64_t> shape);

/// What a file says it holds.
struct Header {
  Type type = Type::kFloat32;
  std::vector<int64_t> shape;  ///< Empty for a scalar.
  int64_t elements() const;
};

/// A file's content.
struct Array {
  Header header;
  std::vector<std::byte> bytes;

  /// The elements as T, which must be as wide as header.type; fp16 is read as uint16_t.
  template <typename T>
  std::span<const T> values() const {
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
  }
};

/// Reads and checks everything but the data itself, whose size must be exactly what type and shape
/// say.
/// @param needed  Types, for the message about a file of another one; empty: all that can be read.
Status read_header(const std::string& path, Header* header, const std::string& needed = "");

/// Reads a file. kOutOfMemory if its data, checked to be there, do not fit into memory.
Status read(const std::string& path, Array* array, const std::string& needed = "");

/// One axis of a shape that is needed: its size, or any size >= 1 under a name.
struct Axis {
  Axis(const char* any) : name(any) {}      // NOLINT: {"b", 64, "h_kv", 576} reads as a shape
  Axis(int64_t exactly) : size(exactly) {}  // NOLINT
  const char* name = nullptr;
  int64_t size = 0;
};

/// ok, or "q.npy: <f8 found; <u2 (bf16 bits) or <f4 needed". `needed` is that last part.
Status check_type(const std::string& path, const Header& header, std::initializer_list<Type> types,
                  const std::string& needed);

/// ok, or "cache.npy: shape [3, 16, 1, 576] found; [pages, 64, h_kv, 576] needed" and `why`.
Status check_shape(const std::string& path, const Header& header, std::initializer_list<Axis> axes,
                   const std::string& why = "");

/// A file to be written; `bytes` is size_of(type) times the product of `shape`.
struct Output {
  std::string path;
  Type type = Type::kFloat32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

/// Writes version 1 files as bench/measure/write_file.h does, all or none.
Status write(std::span<const Output> outputs);

}  // namespace mla::npy
