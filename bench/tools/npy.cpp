#include "bench/tools/npy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iterator>
#include <memory>
#include <new>
#include <string_view>
#include <system_error>

#include "bench/measure/write_file.h"
#include "reference/float16.h"

namespace mla::npy {
namespace {

static_assert(std::endian::native == std::endian::little,
              "elements are used as they lie in the file");

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "\x93NUMPY";
// NumPy writes 118 bytes for any array of plain numbers; only records with many fields need more.
constexpr uint64_t kMaxHeaderBytes = 65536;
constexpr size_t kMaxRank = 64;  // NumPy's own limit

struct TypeInfo {
  Type type;
  const char* name;
  size_t size;
};
constexpr std::array<TypeInfo, 10> kTypes{{{Type::kFloat16, "<f2", 2},
                                           {Type::kFloat32, "<f4", 4},
                                           {Type::kFloat64, "<f8", 8},
                                           {Type::kUInt8, "|u1", 1},
                                           {Type::kUInt16, "<u2", 2},
                                           {Type::kInt16, "<i2", 2},
                                           {Type::kInt32, "<i4", 4},
                                           {Type::kInt64, "<i8", 8},
                                           {Type::kUInt32, "<u4", 4},
                                           {Type::kUInt64, "<u8", 8}}};
constexpr const char* kTypeList = "<f2, <f4, <f8, |u1, <u2, <i2, <i4, <i8, <u4 or <u8";

const TypeInfo& info(Type type) {
  return *std::find_if(kTypes.begin(), kTypes.end(),
                       [type](const TypeInfo& entry) { return entry.type == type; });
}

Status file_error(const std::string& path, const std::string& message) {
  return {StatusCode::kFileError, path + ": " + message};
}

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

/// Bytes as they can be printed: letters as they are, the rest as \xNN.
std::string printable(std::string_view bytes) {
  std::string text;
  for (const unsigned char c : bytes) {
    const bool letter = c >= 0x20 && c < 0x7f;
    text += letter ? std::string(1, static_cast<char>(c)) : fmt::format("\\x{:02x}", c);
  }
  return text;
}

/// Walks over the header's Python literal.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}

  /// Skips white space, then eats `c` if it comes next.
  bool eat(char c) {
    skip_space();
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  bool eat(std::string_view word) {
    skip_space();
    if (!text_.starts_with(word)) return false;
    text_.remove_prefix(word.size());
    return true;
  }
  bool next_is(char c) {
    skip_space();
    return !text_.empty() && text_.front() == c;
  }
  bool at_end() {
    skip_space();
    return text_.empty();
  }
  /// A string without escapes, in single or double quotes.
  bool string(std::string* value) {
    skip_space();
    if (text_.empty() || (text_.front() != '\'' && text_.front() != '"')) return false;
    const size_t end = text_.find(text_.front(), 1);
    if (end == std::string_view::npos) return false;
    *value = text_.substr(1, end - 1);
    text_.remove_prefix(end + 1);
    return true;
  }
  /// A whole number >= 0 that fits int64_t. Python 2 wrote 3L for some.
  bool number(int64_t* value) {
    skip_space();
    size_t digits = 0;
    int64_t result = 0;
    for (; digits < text_.size() && text_[digits] >= '0' && text_[digits] <= '9'; ++digits) {
      if (__builtin_mul_overflow(result, int64_t{10}, &result) ||
          __builtin_add_overflow(result, int64_t{text_[digits] - '0'}, &result)) {
        return false;
      }
    }
    if (digits == 0) return false;
    text_.remove_prefix(digits);
    if (!text_.empty() && text_.front() == 'L') text_.remove_prefix(1);
    *value = result;
    return true;
  }

 private:
  void skip_space() {
    while (!text_.empty() && (text_.front() == ' ' || text_.front() == '\n')) {
      text_.remove_prefix(1);
    }
  }
  std::string_view text_;
};

/// How NumPy writes the types of ml_dtypes, which are bytes to it, or how others write their names.
bool is_bfloat16(const std::string& descr) {
  return descr.ends_with("V2") || descr == "bfloat16";
}
bool is_float8(const std::string& descr) {
  return descr.ends_with("V1") || descr.ends_with("f1") || descr.starts_with("float8");
}

Status parse_type(const std::string& path, const std::string& descr, const std::string& needed,
                  Type* type) {
  for (const TypeInfo& entry : kTypes) {
    if (descr == entry.name) {
      *type = entry.type;
      return {};
    }
  }
  const std::string found = "dtype '" + printable(descr) + "' found";
  if (descr.starts_with('>')) {
    return file_error(path, found + ", which is big-endian; little-endian needed: " +
                                "save array.astype(array.dtype.newbyteorder('<'))");
  }
  if (is_bfloat16(descr)) {
    return file_error(path, found + ", which is how a bfloat16 of ml_dtypes is saved; " +
                                "save array.view(numpy.uint16) and say --dtype bf16");
  }
  if (is_float8(descr)) {
    return file_error(path, found + ", which is how a float8 of ml_dtypes is saved; " +
                                "save array.astype(numpy.float32), which holds every value of it");
  }
  return file_error(path, found + "; " + needed + " needed");
}

Status parse_shape(const std::string& path, Cursor* cursor, std::vector<int64_t>* shape) {
  const Status malformed = file_error(
      path, "header holds no shape; a tuple of whole numbers >= 0, each below 2^63, needed");
  if (!cursor->eat('(')) return malformed;
  while (!cursor->eat(')')) {
    int64_t size = 0;
    if (!cursor->number(&size)) return malformed;
    shape->push_back(size);
    if (shape->size() > kMaxRank) {
      return file_error(path, "more than 64 axes found; NumPy allows 64");
    }
    if (!cursor->eat(',') && !cursor->next_is(')')) return malformed;
  }
  return {};
}

/// "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }", keys in any order.
Status parse_header(const std::string& path, std::string_view text, const std::string& needed,
                    Header* header) {
  const Status malformed = file_error(
      path, "header is \"" + printable(text.substr(0, 80)) + (text.size() > 80 ? "..." : "") +
                "\"; a dict with the keys descr, fortran_order and shape needed");
  Cursor cursor(text);
  bool has_type = false, has_order = false, has_shape = false;
  if (!cursor.eat('{')) return malformed;
  while (!cursor.eat('}')) {
    std::string key;
    if (!cursor.string(&key) || !cursor.eat(':')) return malformed;
    if (key == "descr" && !has_type) {
      if (cursor.next_is('[')) {
        return file_error(path, "records (a structured dtype) found; " + needed + " needed");
      }
      std::string descr;
      if (!cursor.string(&descr)) return malformed;
      MLA_RETURN_IF_ERROR(parse_type(path, descr, needed, &header->type));
      has_type = true;
    } else if (key == "fortran_order" && !has_order) {
      if (cursor.eat("True")) {
        return file_error(path,
                          "Fortran order found; C order needed: save numpy.ascontiguousarray(...)");
      }
      if (!cursor.eat("False")) return malformed;
      has_order = true;
    } else if (key == "shape" && !has_shape) {
      MLA_RETURN_IF_ERROR(parse_shape(path, &cursor, &header->shape));
      has_shape = true;
    } else {
      return malformed;
    }
    if (!cursor.eat(',') && !cursor.next_is('}')) return malformed;
  }
  if (!cursor.at_end() || !has_type || !has_order || !has_shape) return malformed;
  return {};
}

/// Opens `path`, reads its header, checks the size of its data, and leaves the file at their first
/// byte.
Status open(const std::string& path, const std::string& needed_types, File* file, Header* header,
            uint64_t* data_bytes) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    return file_error(path, "cannot be opened: " + (error ? error.message() : "no such file"));
  }
  if (!fs::is_regular_file(status)) {
    return file_error(path, "not a regular file; a .npy file needed");
  }
  const uint64_t file_bytes = fs::file_size(path, error);
  if (error) return file_error(path, "has no size: " + error.message());
  file->reset(std::fopen(path.c_str(), "rb"));
  if (!*file) return file_error(path, std::string("cannot be opened: ") + std::strerror(errno));

  std::array<unsigned char, 12> prefix{};  // magic, version, header size
  const size_t read_bytes = std::fread(prefix.data(), 1, 8, file->get());
  const std::string_view start(reinterpret_cast<const char*>(prefix.data()), read_bytes);
  if (start.empty()) return file_error(path, "empty file; a .npy file needed");
  if (!start.starts_with(kMagic.substr(0, start.size()))) {
    std::string message = "starts with \"" + printable(start.substr(0, 6)) +
                          "\"; \"\\x93NUMPY\" needed, as numpy.save writes";
    if (start.starts_with("PK")) message += " (this is a zip archive: an .npz or a .pt)";
    return file_error(path, message);
  }
  const auto truncated_header = [&](uint64_t needed) {
    return file_error(path, fmt::format("truncated in its header: {} bytes found, {} needed",
                                        file_bytes, needed));
  };
  if (read_bytes < 8) return truncated_header(10);
  const int major = prefix[6], minor = prefix[7];
  if (major < 1 || major > 3 || minor != 0) {
    return file_error(
        path, fmt::format("format version {}.{} found; 1.0, 2.0 or 3.0 needed", major, minor));
  }
  const size_t length_bytes = major == 1 ? 2 : 4;
  if (std::fread(prefix.data() + 8, 1, length_bytes, file->get()) != length_bytes) {
    return truncated_header(8 + length_bytes);
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < length_bytes; ++i) header_bytes |= uint64_t{prefix[8 + i]} << (8 * i);
  const uint64_t data_begin = 8 + length_bytes + header_bytes;
  if (data_begin > file_bytes) return truncated_header(data_begin);
  if (header_bytes > kMaxHeaderBytes) {
    return file_error(path, fmt::format("header of {} bytes found; at most {} make sense",
                                        header_bytes, kMaxHeaderBytes));
  }
  std::string text(header_bytes, '\0');
  if (std::fread(text.data(), 1, text.size(), file->get()) != text.size()) {
    return truncated_header(data_begin);
  }
  Header parsed;
  MLA_RETURN_IF_ERROR(
      parse_header(path, text, needed_types.empty() ? kTypeList : needed_types, &parsed));

  uint64_t needed = size_of(parsed.type);
  const bool empty = std::find(parsed.shape.begin(), parsed.shape.end(), 0) != parsed.shape.end();
  if (empty) needed = 0;
  for (const int64_t size : parsed.shape) {
    if (!empty && __builtin_mul_overflow(needed, static_cast<uint64_t>(size), &needed)) {
      return file_error(path, "shape " + to_string(parsed.shape) + " found; no file can hold that");
    }
  }
  const uint64_t found = file_bytes - data_begin;
  if (found != needed) {
    return file_error(path, fmt::format("{}: {} bytes of data found, {} needed for {} {}",
                                        found < needed ? "truncated" : "too long", found, needed,
                                        npy::to_string(parsed.type), to_string(parsed.shape)));
  }
  *header = std::move(parsed);
  *data_bytes = needed;
  return {};
}

/// Runs `body`, and makes a Status of what it throws.
template <typename Body>
Status guarded(const std::string& path, Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, path + ": not enough memory for its data"};
  } catch (const std::exception& error) {
    return file_error(path, error.what());
  }
}

std::string header_text(const Output& output) {
  std::string text = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}",
                                 to_string(output.type), fmt::join(output.shape, ", "),
                                 output.shape.size() == 1 ? "," : "");  // "(3,)"
  // Magic, version, length, text and a line feed end on a multiple of 64, so that the data are
  // aligned.
  text.append(63 - (10 + text.size()) % 64, ' ');
  return text + "\n";
}

/// All that comes before the data.
std::string prefix_of(const Output& output) {
  const std::string text = header_text(output);
  std::string prefix(kMagic);
  prefix +=
      {'\x01', '\x00', static_cast<char>(text.size() & 0xff), static_cast<char>(text.size() >> 8)};
  return prefix + text;
}

}  // namespace

const char* to_string(Type type) {
  return info(type).name;
}

size_t size_of(Type type) {
  return info(type).size;
}

std::string to_string(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

int64_t Header::elements() const {
  int64_t product = 1;
  for (const int64_t size : shape) {
    if (size == 0) return 0;
    product *= size;
  }
  return product;
}

Status read_header(const std::string& path, Header* header, const std::string& needed) {
  return guarded(path, [&]() -> Status {
    File file;
    uint64_t data_bytes = 0;
    return open(path, needed, &file, header, &data_bytes);
  });
}

Status read(const std::string& path, Array* array, const std::string& needed) {
  return guarded(path, [&]() -> Status {
    File file;
    Array result;
    uint64_t data_bytes = 0;
    MLA_RETURN_IF_ERROR(open(path, needed, &file, &result.header, &data_bytes));
    result.bytes.resize(data_bytes);
    if (std::fread(result.bytes.data(), 1, data_bytes, file.get()) != data_bytes) {
      return file_error(path, "changed or failed while it was read");
    }
    *array = std::move(result);
    return {};
  });
}

Status check_type(const std::string& path, const Header& header, std::initializer_list<Type> types,
                  const std::string& needed) {
  if (std::find(types.begin(), types.end(), header.type) != types.end()) return {};
  return file_error(path, std::string(to_string(header.type)) + " found; " + needed + " needed");
}

Status check_shape(const std::string& path, const Header& header, std::initializer_list<Axis> axes,
                   const std::string& why) {
  bool fits = header.shape.size() == axes.size();
  std::string needed, empty_axis;
  auto size = header.shape.begin();
  for (const Axis& axis : axes) {
    needed += (needed.empty() ? "" : ", ") + (axis.name ? axis.name : std::to_string(axis.size));
    if (!fits) continue;
    fits = axis.name ? *size >= 1 : *size == axis.size;
    if (!fits && axis.name) empty_axis = axis.name;
    ++size;
  }
  if (fits) return {};
  if (!empty_axis.empty()) {
    return file_error(path, "shape " + to_string(header.shape) + " found: " + empty_axis +
                                " = 0; at least 1 needed");
  }
  return file_error(path, "shape " + to_string(header.shape) + " found; [" + needed + "] needed" +
                              (why.empty() ? "" : " " + why));
}

Status write(std::span<const Output> outputs) {
  std::vector<std::string> prefixes;
  std::transform(outputs.begin(), outputs.end(), std::back_inserter(prefixes), prefix_of);
  std::vector<bench::FileContent> files;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const std::string_view data(reinterpret_cast<const char*>(outputs[i].bytes.data()),
                                outputs[i].bytes.size());
    files.push_back({outputs[i].path, {prefixes[i], data}});
  }
  return bench::write_files(files);
}

}  // namespace mla::npy
