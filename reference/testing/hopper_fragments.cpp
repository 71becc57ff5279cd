// What the instructions of Hopper are given, what comes out, and what should, which plain loops
// work out here from what stages/common/ptx/ptx_sm90.h documents.
#include "reference/testing/hopper_fragments.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "reference/float16.h"
#include "reference/testing/golden.h"

namespace mla {
namespace {

// wgmma. Every case is two matrices, how they lie in shared memory, and what the descriptors say
// about that. Where an image holds no matrix it is NaN.

/// Where boxes of 64 columns, and in them groups of 8 rows of 128 bytes, lie in shared memory.
struct Layout {
  uint32_t box_bytes = 8192, group_bytes = 1024, begin = 0;

  size_t position(size_t row, size_t column) const {
    return begin + column / 64 * box_bytes + row / 8 * group_bytes + row % 8 * 128 +
           (column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2;
  }
};

enum class Values { kPlaces, kRegisterPlaces, kIntegers, kRandom, kSubnormal, kSpecial };

struct WgmmaCase {
  std::string name;
  Values values = Values::kIntegers;
  size_t k = 16;
  bool accumulate = false;
  Layout a, b;
  uint32_t a_leading = 8192;  ///< Not used: A is K-major, or has one box of columns.
  bool swapped = false;       ///< B's descriptor has leading and stride exchanged.
};

constexpr bool mn_major(WgmmaForm form) {
  return facts_of(form).trans_b;
}

std::vector<WgmmaCase> wgmma_cases(WgmmaForm form) {
  std::vector<WgmmaCase> cases;
  const auto add = [&](const char* name, Values values, size_t k) -> WgmmaCase& {
    WgmmaCase& made = cases.emplace_back();
    made.name = name;
    made.values = values;
    made.k = k;
    return made;
  };
  add("layout", Values::kPlaces, 16);
  if (form == WgmmaForm::kM64N256Register) add("layout_of_a", Values::kRegisterPlaces, 32);
  add("accumulate", Values::kIntegers, 16).accumulate = true;
  if (columns_of(form) > 8) {  // what the file keeps of sums is in the columns after these
    add("random", Values::kRandom, 16).accumulate = true;
    add("subnormal", Values::kSubnormal, 16);
    add("special", Values::kSpecial, 16).accumulate = true;
  }
  if (facts_of(form).trans_a) {
    add("walk", Values::kIntegers, 64);
    add("walk_other_leading", Values::kIntegers, 64).a_leading = 16;
    add("walk_a_stride_3072", Values::kIntegers, 64).a = {8192, 3072, 0};
    add("walk_a_further_on", Values::kIntegers, 64).a = {8192, 3072, 2048};
  } else if (mn_major(form)) {
    add("walk", Values::kIntegers, 64);
    add("walk_swapped", Values::kIntegers, 64).swapped = true;
    add("walk_leading_16384", Values::kIntegers, 64).b = {16384, 1024, 0};
    add("walk_stride_2048", Values::kIntegers, 64).b = {16384, 2048, 0};
    add("walk_leading_1024_stride_4096", Values::kIntegers, 64).b = {1024, 4096, 0};
    add("walk_second_256_columns", Values::kIntegers, 64).b = {8192, 1024, 32768};
    if (form == WgmmaForm::kM64N256) {
      add("walk_a_stride_2048", Values::kIntegers, 64).a = {16384, 2048, 0};
    }
  } else {
    add("walk", Values::kIntegers, 128);
    add("walk_other_leading", Values::kIntegers, 128).a_leading = 16;
    WgmmaCase& a_stride = add("walk_a_stride_2048", Values::kIntegers, 128);
    a_stride.a = {16384, 2048, 0};
    a_stride.a_leading = 0;
    WgmmaCase& b_stride = add("walk_b_stride_2048", Values::kIntegers, 128);
    b_stride.b = {16384, 2048, 0};
    // Groups of both boxes in turn, as where a row of 128 columns is two swizzled boxes side by
    // side.
    WgmmaCase& interleaved = add("walk_boxes_1024_stride_2048", Values::kIntegers, 128);
    interleaved.a = interleaved.b = {1024, 2048, 0};
    // Rows 32 ... of a box of 64, or all of a box that does not come first.
    add("walk_b_further_on", Values::kIntegers, 128).b.begin =
        form == WgmmaForm::kM64N32 ? 4096 : 16384;
    if (form == WgmmaForm::kM64N16) {  // eight rows of three boxes each
      add("walk_a_stride_3072", Values::kIntegers, 64).a = {8192, 3072, 1024};
    }
  }
  return cases;
}

/// The matrices of a case: 16-bit patterns of A [64, k], B [k, columns], and D by row and column.
struct Matrices {
  std::vector<uint32_t> a, b;
  std::vector<float> d;
};

/// Where an element of A is, if A is in registers: its thread, and its half of a register.
struct Place {
  size_t thread, half;
};
Place place_in_registers(size_t row, size_t k) {
  return {row / 16 * 32 + row % 8 * 4 + k % 8 / 2, k % 16 / 8 * 4 + row % 16 / 8 * 2 + k % 2};
}

template <typename T>
Matrices wgmma_matrices(const WgmmaCase& wgmma, size_t columns) {
  constexpr uint32_t kBias = std::is_same_v<T, bfloat16> ? 127 : 15;
  const size_t k = wgmma.k;
  Matrices m{std::vector<uint32_t>(64 * k), std::vector<uint32_t>(k * columns),
             std::vector<float>(64 * columns, 0)};
  const auto a = [&](size_t row, size_t i) -> uint32_t& { return m.a[row * k + i]; };
  const auto b = [&](size_t i, size_t column) -> uint32_t& { return m.b[i * columns + column]; };
  const auto number = [](size_t n) { return bits_of<T>(static_cast<float>(n)); };
  uint64_t state = 1;
  switch (wgmma.values) {
    case Values::kPlaces:  // D = 256 row + column
      for (size_t row = 0; row < 64; ++row) {
        a(row, 0) = number(row);
        a(row, 1) = number(1);
      }
      for (size_t column = 0; column < columns; ++column) {
        b(0, column) = number(256);
        b(1, column) = number(column);
      }
      break;
    case Values::kRegisterPlaces:  // D = 8 thread + half of that which holds A's (row, column)
      for (size_t row = 0; row < 64; ++row) {
        for (size_t i = 0; i < 16; ++i) {
          a(row, i) = number(place_in_registers(row, i).thread);
          a(row, 16 + i) = number(place_in_registers(row, i).half);
        }
      }
      for (size_t i = 0; i < 16; ++i) {
        for (size_t column = i; column < columns; column += 16) {
          b(i, column) = number(8);
          b(16 + i, column) = number(1);
        }
      }
      break;
    case Values::kIntegers:  // any order of adding them gives the same
      for (uint32_t& value : m.a) value = number(1 + random_word(state) % 15);
      for (uint32_t& value : m.b) value = number(1 + random_word(state) % 15);
      for (float& value : m.d) value = static_cast<float>(1 + random_word(state) % 65536);
      break;
    default:
      const bool subnormal = wgmma.values == Values::kSubnormal;
      for (uint32_t& value : m.a) {
        const uint32_t exponent = subnormal ? 0 : kBias - 8 + random_word(state) % 16;
        value = random_value<T>(state, exponent);
      }
      for (uint32_t& value : m.b) {
        const uint32_t exponent = kBias + random_word(state) % 8 - (subnormal ? 0 : 4);
        value = random_value<T>(state, exponent);
      }
      for (float& value : m.d) {
        // Drawn first by a statement: compilers do not agree on the order of arguments.
        const int power = static_cast<int>(random_word(state) % 16) - 31;
        value = std::ldexp(static_cast<float>(random_word(state) >> 8) - 0x1p23f, power);
      }
  }
  if (wgmma.values == Values::kSpecial) {  // in columns that the file has
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    a(3, 2) = bits_of<T>(kInfinity);
    b(2, 12) = 0;  // infinity * 0
    a(10, 5) = bits_of<T>(kNaN);
    a(20, 1) = bits_of<T>(kInfinity);  // infinities of either sign, or of one
    a(20, 7) = bits_of<T>(-kInfinity);
    a(37, 15) = bits_of<T>(-kInfinity);
    b(4, 11) = bits_of<T>(kInfinity);
    for (size_t i = 0; i < 16; ++i) a(30, i) = 0;
    a(30, 0) = kBias == 127 ? 0x7f7f : 0x7bff;  // the largest
    b(0, 8) = bits_of<T>(8);                    // in bf16 the product is past fp32's range
    m.d[40 * columns + 8] = kInfinity;
    m.d[41 * columns + 15] = kNaN;
    m.d[3 * columns + 8] = -kInfinity;  // meets infinity times B's (2, 8)
  }
  return m;
}

template <typename T>
double value_of(uint32_t bits) {
  return static_cast<double>(to_float(std::bit_cast<T>(static_cast<uint16_t>(bits))));
}

void put(uint32_t* image, size_t position, uint32_t bits) {
  const size_t shift = position % 4 * 8;
  image[position / 4] = (image[position / 4] & ~(0xffffu << shift)) | bits << shift;
}

/// The row (then the column) of D that is in register i of a thread.
size_t d_row(size_t thread, size_t i) {
  return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
size_t d_column(size_t thread, size_t i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

void fill_wgmma_input(WgmmaForm form, const WgmmaCase& wgmma, const Matrices& m,
                      WgmmaInput* input) {
  const size_t columns = columns_of(form), k = wgmma.k;
  input->steps = static_cast<uint32_t>(k / 16);
  input->accumulate = wgmma.accumulate;
  std::fill(std::begin(input->a_smem), std::end(input->a_smem), ~0u);
  std::fill(std::begin(input->b_smem), std::end(input->b_smem), ~0u);
  for (size_t row = 0; row < 64; ++row) {
    for (size_t i = 0; i < k; ++i) {
      put(input->a_smem,
          facts_of(form).trans_a ? wgmma.a.position(i, row) : wgmma.a.position(row, i),
          m.a[row * k + i]);
      const Place place = place_in_registers(row, i);
      put(input->a_registers[i / 16][place.thread], place.half * 2, m.a[row * k + i]);
    }
  }
  for (size_t i = 0; i < k; ++i) {
    for (size_t column = 0; column < columns; ++column) {
      put(input->b_smem, mn_major(form) ? wgmma.b.position(i, column) : wgmma.b.position(column, i),
          m.b[i * columns + column]);
    }
  }
  input->a.leading_bytes = wgmma.a_leading;
  input->a.stride_bytes = wgmma.a.group_bytes;
  input->b.leading_bytes = wgmma.swapped ? wgmma.b.group_bytes : wgmma.b.box_bytes;
  input->b.stride_bytes = wgmma.swapped ? wgmma.b.box_bytes : wgmma.b.group_bytes;
  for (size_t step = 0; step < input->steps; ++step) {
    const auto along_rows = [&](const Layout& layout) {
      return static_cast<uint32_t>(layout.begin + step / 4 * layout.box_bytes + step % 4 * 32);
    };
    const auto down_columns = [&](const Layout& layout) {
      return static_cast<uint32_t>(layout.begin + step * 2 * layout.group_bytes);
    };
    input->a.offset[step] = facts_of(form).trans_a ? down_columns(wgmma.a) : along_rows(wgmma.a);
    input->b.offset[step] = mn_major(form) ? down_columns(wgmma.b) : along_rows(wgmma.b);
  }
  for (size_t thread = 0; thread < 128; ++thread) {
    for (size_t i = 0; i < 128; ++i) {  // without accumulate the old D must not count, even NaN
      input->d[thread][i] = wgmma.accumulate && i < columns / 2
                                ? m.d[d_row(thread, i) * columns + d_column(thread, i)]
                                : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

/// What B's descriptor, as documented, finds at (k, column) of the image.
uint32_t b_by_descriptor(const WgmmaInput& input, size_t k, size_t column) {
  const WgmmaInput::Walk& walk = input.b;
  // The swizzle is one of addresses: bits 4-6 by bits 7-9.
  size_t address = walk.offset[k / 16] + column / 64 * walk.leading_bytes + column % 64 * 2 +
                   k % 16 / 8 * walk.stride_bytes + k % 8 * 128;
  address ^= (address / 128 % 8) * 16;
  return input.b_smem[address / 4] >> address % 4 * 8 & 0xffff;
}

template <typename T>
void expect_of_wgmma(WgmmaForm form, const WgmmaCase& wgmma, const Matrices& matrices,
                     const WgmmaInput& input, Observation* o) {
  const size_t columns = columns_of(form), k = wgmma.k;
  const size_t registers = wgmma.values == Values::kRegisterPlaces ? 8 : columns / 2;
  std::vector<double> a(matrices.a.size()), b(matrices.b.size());
  for (size_t i = 0; i < a.size(); ++i) a[i] = value_of<T>(matrices.a[i]);
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = value_of<T>(wgmma.swapped ? b_by_descriptor(input, i / columns, i % columns)
                                     : matrices.b[i]);
  }
  o->columns = registers;
  o->row_name = "thread";
  o->column_name = "register";
  for (size_t thread = 0; thread < 128; ++thread) {
    for (size_t j = 0; j < registers; ++j) {
      const size_t row = d_row(thread, j), column = d_column(thread, j);
      double sum = wgmma.accumulate ? matrices.d[row * columns + column] : 0;
      double magnitude = std::abs(sum);
      for (size_t i = 0; i < k; ++i) {
        const double product = a[row * k + i] * b[i * columns + column];
        sum += product;
        magnitude += std::abs(product);
      }
      o->documented.push_back(std::bit_cast<uint32_t>(static_cast<float>(sum)));
      o->sums.push_back(sum);
      o->magnitudes.push_back(magnitude);
    }
  }
}

/// Floats that are small whole numbers as such: they are easier to read, and shorter.
uint32_t whole_number(uint32_t bits) {
  const auto value = std::bit_cast<float>(bits);
  return value >= 0 && value < 0x1p24f && value == std::floor(value) ? static_cast<uint32_t>(value)
                                                                     : bits;
}

template <typename T>
Status record_wgmma(Machine& machine, const HopperFragments& fragments, WgmmaForm form,
                    std::vector<Observation>* result) {
  constexpr bool kBFloat16 = std::is_same_v<T, bfloat16>;
  const std::vector<WgmmaCase> cases = wgmma_cases(form);
  std::vector<Observation> observations(cases.size());
  std::vector<WgmmaInput> inputs(cases.size());
  for (size_t i = 0; i < cases.size(); ++i) {
    const Matrices matrices = wgmma_matrices<T>(cases[i], columns_of(form));
    fill_wgmma_input(form, cases[i], matrices, &inputs[i]);
    observations[i].name = std::string("wgmma_") + facts_of(form).name +
                           (kBFloat16 ? "_bf16_" : "_fp16_") + cases[i].name;
    expect_of_wgmma<T>(form, cases[i], matrices, inputs[i], &observations[i]);
  }

  DeviceBuffer in, out;
  MLA_RETURN_IF_ERROR(in.assign(machine, inputs.data(), std::span(inputs).size_bytes()));
  MLA_RETURN_IF_ERROR(out.allocate(machine, cases.size() * sizeof(WgmmaOutput)));
  MLA_RETURN_IF_ERROR(fragments.wgmma(form, kBFloat16 ? DType::kBFloat16 : DType::kFloat16,
                                      in.as<WgmmaInput>(), static_cast<unsigned>(cases.size()),
                                      out.as<WgmmaOutput>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  std::vector<uint32_t> words(cases.size() * 128 * 128);
  MLA_RETURN_IF_ERROR(
      machine.copy_to_host(words.data(), out.data(), std::span(words).size_bytes()));

  for (size_t i = 0; i < cases.size(); ++i) {
    Observation& o = observations[i];
    const Values values = cases[i].values;
    for (size_t thread = 0; thread < 128; ++thread) {
      for (size_t j = 0; j < o.columns; ++j) o.words.push_back(words[(i * 128 + thread) * 128 + j]);
    }
    if (values == Values::kPlaces || values == Values::kRegisterPlaces) {
      o.kept = o.words.size() <= 2048 ? Kept::kWords : Kept::kHashes;
      for (uint32_t& word : o.words) word = whole_number(word);
      for (uint32_t& word : o.documented) word = whole_number(word);
    } else {
      o.kept = values == Values::kIntegers ? Kept::kHashes : Kept::kFloats;
    }
    result->push_back(std::move(o));
  }
  return {};
}

// TMA.

struct TmaCase {
  std::string name;
  TmaTensor tensor;
  std::vector<TmaBox> boxes;
};

TmaTensor cache_tensor(bool swizzle) {  // 2 heads, 3 pages
  return {{576, 2, 64, 3}, {2, 1152, 2304, 147456}, {64, 1, 64, 1}, swizzle};
}
/// The same in boxes of three times 64 columns of 16 tokens: {64 columns, token % 8, columns / 64 of both
/// heads, token / 8, page}.
TmaTensor tile_tensor() {
  return {{64, 8, 18, 8, 3}, {2, 2304, 128, 18432, 147456}, {64, 8, 3, 2, 1}, true};
}
/// No size is a multiple of the box's, rows are padded, by 4 elements.
TmaTensor odd_tensor(bool swizzle) {
  return swizzle ? TmaTensor{{100, 3, 10, 5}, {2, 208, 624, 6240}, {64, 2, 4, 3}, true}
                 : TmaTensor{{100, 3, 10, 5}, {2, 208, 624, 6240}, {24, 2, 3, 2}, false};
}

// The first coordinate is a multiple of 16 bytes: a box from anywhere else is an illegal
// instruction.
std::vector<TmaCase> tma_loads() {
  return {
      {"cache",
       cache_tensor(true),
       {
           {{128, 1, 0, 2}},                                        // all inside
           {{8, 0, 0, 1}},                                          // inside, at an odd place
           {{-24, 0, 0, 1}},  {{-8, 1, 0, 0}},   {{-64, 0, 0, 1}},  // before the first column
           {{544, 1, 0, 0}},  {{568, 0, 0, 2}},  {{576, 0, 0, 0}},  // past the last one
           {{64, -1, 0, 1}},  {{64, 2, 0, 1}},                      // heads
           {{64, 0, -7, 1}},  {{64, 0, 40, 1}},  {{64, 1, 63, 0}},  // tokens: not the next page's
           {{64, 0, 64, 1}},  {{64, 0, -64, 1}},                    //
           {{64, 0, 0, -1}},  {{64, 0, 0, 3}},                      // pages
           {{560, 1, 50, 2}}, {{-8, 0, -3, 0}},  {{1 << 20, 0, 0, 0}}  // two edges; far away
       }},
      {"cache_plain", cache_tensor(false), {{{128, 1, 0, 2}}, {{560, 1, 50, 2}}}},
      {"odd",
       odd_tensor(true),
       {{{0, 0, 0, 0}}, {{64, 1, 8, 3}}, {{-16, -1, -2, -1}}, {{88, 2, 9, 4}}}},
      {"odd_plain",
       odd_tensor(false),
       {{{0, 0, 0, 0}}, {{8, 1, 8, 4}}, {{-8, -1, -2, -1}}, {{96, 2, 8, 3}}}},
      {"tile",
       tile_tensor(),
       {
           {{0, 0, 12, 2, 1}},  // all inside
           {{0, 3, 6, 0, 2}},
           {{0, -2, 0, 4, 0}},
           {{8, 0, 0, 0, 1}},  // rows, columns
           {{0, 0, 16, 0, 0}},
           {{0, 0, -1, 1, 1}},  // boxes of columns
           {{0, 0, 3, 7, 0}},
           {{0, 0, 3, -1, 1}},  // groups of tokens
           {{0, 0, 0, 0, -1}},
           {{0, 0, 9, 6, 3}},  // pages
       }}};
}

// No box here begins before the tensor: an H200 ended in an illegal instruction at the one that
// did.
std::vector<TmaCase> tma_stores() {
  return {{"cache", cache_tensor(true), {{{128, 1, 0, 2}}, {{560, 1, 50, 2}}}},
          {"odd", odd_tensor(true), {{{64, 1, 8, 3}}}},
          {"odd_plain", odd_tensor(false), {{{24, 0, 4, 1}}, {{88, 2, 9, 4}}, {{104, 0, 0, 0}}}}};
}

/// What an element of a tensor is. In the cache no two of a box are equal, and none is 0.
uint16_t tma_value(const TmaTensor& tensor, const int64_t (&c)[5]) {
  const bool tiles = tensor.rank() == 5;
  const int64_t token = tiles ? c[3] * 8 + c[1] : c[2];
  const int64_t part = tiles ? c[2] + 5 * c[4] : c[0] / 64 + 4 * c[1] + 5 * c[3];
  return static_cast<uint16_t>((part % 15 + 1) << 12 | c[0] % 64 << 6 | token);
}

/// Calls f(element of the box, place in shared memory, coordinates, place in the tensor), the last
/// one in elements, -1 outside. Stores write whole chunks of 16 bytes: for them the elements that
/// pad the end of a row are inside.
template <typename F>
void for_each_of_box(const TmaTensor& tensor, const TmaBox& box, bool store, const F& f) {
  const auto rank = static_cast<size_t>(tensor.rank());
  size_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= tensor.box[i];
  for (size_t e = 0; e < count; ++e) {
    int64_t c[5] = {}, place = 0;
    bool inside = true;
    size_t rest = e;
    for (size_t i = 0; i < rank; ++i) {
      c[i] = box.start[i] + static_cast<int64_t>(rest % tensor.box[i]);
      rest /= tensor.box[i];
      const int64_t end = static_cast<int64_t>(tensor.size[i]);
      inside = inside && c[i] >= 0 && c[i] < (store && i == 0 ? (end + 7) / 8 * 8 : end);
      place += c[i] * static_cast<int64_t>(tensor.stride_bytes[i]) / 2;
    }
    f(tensor.swizzle_128b ? e ^ e / 64 % 8 * 8 : e, c, inside ? place : -1);
  }
}

/// The tensor in memory; what pads its rows is NaN.
std::vector<uint32_t> tensor_words(const TmaTensor& tensor) {
  const auto rank = static_cast<size_t>(tensor.rank());
  std::vector<uint32_t> words(tensor.size[rank - 1] * tensor.stride_bytes[rank - 1] / 4, ~0u);
  size_t elements = 1;
  for (size_t i = 0; i < rank; ++i) elements *= tensor.size[i];
  for (size_t e = 0; e < elements; ++e) {
    int64_t c[5] = {};
    size_t bytes = 0, rest = e;
    for (size_t i = 0; i < rank; ++i) {
      c[i] = static_cast<int64_t>(rest % tensor.size[i]);
      rest /= tensor.size[i];
      bytes += static_cast<size_t>(c[i]) * tensor.stride_bytes[i];
    }
    put(words.data(), bytes, tma_value(tensor, c));
  }
  return words;
}

std::string name_of_box(const char* what, const TmaCase& tma, const TmaBox& box) {
  std::string name = what + tma.name + "_at";
  for (int i = 0; i < tma.tensor.rank(); ++i) name += "_" + std::to_string(box.start[i]);
  return name;
}

Status record_tma_loads(Machine& machine, const HopperFragments& fragments,
                        std::vector<Observation>* result) {
  for (const TmaCase& tma : tma_loads()) {
    const std::vector<uint32_t> words = tensor_words(tma.tensor);
    const size_t count = tma.boxes.size();
    DeviceBuffer tensor, boxes, out;
    MLA_RETURN_IF_ERROR(tensor.assign(machine, words.data(), std::span(words).size_bytes()));
    MLA_RETURN_IF_ERROR(boxes.assign(machine, tma.boxes.data(), std::span(tma.boxes).size_bytes()));
    MLA_RETURN_IF_ERROR(out.allocate(machine, count * kTmaBoxWords * 4));
    MLA_RETURN_IF_ERROR(fragments.tma_load(tma.tensor, tensor.data(), boxes.as<TmaBox>(),
                                           static_cast<int>(count),
                                           out.as<uint32_t[kTmaBoxWords]>()));
    MLA_RETURN_IF_ERROR(machine.synchronize());
    for (size_t i = 0; i < count; ++i) {
      Observation o;
      o.name = name_of_box("tma_load_", tma, tma.boxes[i]);
      o.row_name = "row";
      o.column_name = "word";
      o.columns = tma.tensor.box[0] / 2;
      // One row more than the box has, where there is room: it is to stay untouched.
      o.documented.assign(kTmaBoxWords, kUntouched);
      size_t elements = 0;
      for_each_of_box(tma.tensor, tma.boxes[i], false,
                      [&](size_t element, const int64_t(&c)[5], int64_t place) {
                        put(o.documented.data(), 2 * element,
                            place < 0 ? 0 : tma_value(tma.tensor, c));
                        ++elements;
                      });
      o.words.resize(std::min(kTmaBoxWords, elements / 2 + o.columns));
      o.documented.resize(o.words.size());
      const bool first_of_cache = tma.name == "cache" && i == 0;
      o.kept = o.words.size() < 256 || first_of_cache ? Kept::kWords : Kept::kHashes;
      MLA_RETURN_IF_ERROR(machine.copy_to_host(
          o.words.data(), out.as<uint32_t>() + i * kTmaBoxWords, std::span(o.words).size_bytes()));
      result->push_back(std::move(o));
    }
  }
  return {};
}

Status record_tma_stores(Machine& machine, const HopperFragments& fragments,
                         std::vector<Observation>* result) {
  for (const TmaCase& tma : tma_stores()) {
    for (const TmaBox& box : tma.boxes) {
      Observation o;
      o.name = name_of_box("tma_store_", tma, box);
      // A row is one place in the tensor's third dimension; in the cache, one token.
      o.row_name = "row";
      o.column_name = "word";
      o.columns = tma.tensor.stride_bytes[2] / 4;
      o.kept = Kept::kHashes;
      o.documented = tensor_words(tma.tensor);
      DeviceBuffer tensor;
      MLA_RETURN_IF_ERROR(
          tensor.assign(machine, o.documented.data(), std::span(o.documented).size_bytes()));
      for_each_of_box(tma.tensor, box, true,
                      [&](size_t element, const int64_t(&)[5], int64_t place) {
                        if (place < 0) return;
                        put(o.documented.data(), 2 * static_cast<size_t>(place),
                            kTmaStored + static_cast<uint32_t>(element));
                      });
      MLA_RETURN_IF_ERROR(fragments.tma_store(tma.tensor, tensor.data(), box));
      MLA_RETURN_IF_ERROR(machine.synchronize());
      o.words.resize(o.documented.size());
      MLA_RETURN_IF_ERROR(
          machine.copy_to_host(o.words.data(), tensor.data(), std::span(o.words).size_bytes()));
      result->push_back(std::move(o));
    }
  }
  return {};
}

// Bulk copies, stmatrix, mbarrier.

Status record_bulk(Machine& machine, const HopperFragments& fragments,
                   std::vector<Observation>* result) {
  Observation load{"cp_async_bulk", Kept::kWords, "row", "word", 4, {}, {}, {}, {}};
  Observation store = load;
  store.name = "cp_async_bulk_store";
  std::vector<uint32_t> numbers(kBulkWords);
  for (uint32_t i = 0; i < kBulkWords; ++i) numbers[i] = i + 1;
  DeviceBuffer in, loaded, stored;
  MLA_RETURN_IF_ERROR(in.assign(machine, numbers.data(), std::span(numbers).size_bytes()));
  MLA_RETURN_IF_ERROR(loaded.allocate(machine, in.bytes()));
  MLA_RETURN_IF_ERROR(stored.allocate(machine, in.bytes()));
  MLA_RETURN_IF_ERROR(machine.fill(stored.data(), 0xcd, stored.bytes()));
  MLA_RETURN_IF_ERROR(
      fragments.bulk(in.as<uint32_t>(), loaded.as<uint32_t>(), stored.as<uint32_t>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  load.documented.assign(kBulkWords, kUntouched);
  store.documented.assign(kBulkWords, 0xcdcdcdcd);
  for (const BulkCopy& copy : kBulkLoads) {
    std::copy_n(&numbers[copy.source / 4], copy.bytes / 4, &load.documented[copy.destination / 4]);
  }
  for (const BulkCopy& copy : kBulkStores) {
    std::copy_n(&load.documented[copy.source / 4], copy.bytes / 4,
                &store.documented[copy.destination / 4]);
  }
  load.words.resize(kBulkWords);
  store.words.resize(kBulkWords);
  MLA_RETURN_IF_ERROR(machine.copy_to_host(load.words.data(), loaded.data(), loaded.bytes()));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(store.words.data(), stored.data(), stored.bytes()));
  result->push_back(std::move(load));
  result->push_back(std::move(store));
  return {};
}

Status record_stmatrix(Machine& machine, const HopperFragments& fragments,
                       std::vector<Observation>* result) {
  Observation o{"stmatrix_x4", Kept::kWords, "row", "word", 4, {}, {}, {}, {}};
  DeviceBuffer out;
  MLA_RETURN_IF_ERROR(out.allocate(machine, 32 * 4 * sizeof(uint32_t)));
  MLA_RETURN_IF_ERROR(fragments.stmatrix(out.as<uint32_t[4]>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  o.words.resize(32 * 4);
  o.documented.resize(32 * 4);
  for (uint32_t address = 0; address < 32; ++address) {
    const uint32_t matrix = address / 8, row = address % 8;
    for (uint32_t pair = 0; pair < 4; ++pair) {
      const uint32_t low = 8 * (4 * row + pair) + 2 * matrix + 1;
      o.documented[row_of_lane(address) * 4 + pair] = (low + 1) << 16 | low;
    }
  }
  MLA_RETURN_IF_ERROR(machine.copy_to_host(o.words.data(), out.data(), out.bytes()));
  result->push_back(std::move(o));
  return {};
}

Status record_stmatrix_trans(Machine& machine, const HopperFragments& fragments,
                             std::vector<Observation>* result) {
  Observation o{"stmatrix_x2_trans", Kept::kWords, "row", "word", 4, {}, {}, {}, {}};
  DeviceBuffer out;
  MLA_RETURN_IF_ERROR(out.allocate(machine, 32 * 4 * sizeof(uint32_t)));
  MLA_RETURN_IF_ERROR(fragments.stmatrix_trans(out.as<uint32_t[4]>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  o.words.resize(32 * 4);
  o.documented.assign(32 * 4, kUntouched);
  for (uint32_t address = 0; address < 16; ++address) {
    const uint32_t matrix = address / 8, column = address % 8;
    const auto element = [&](uint32_t row) {
      return 8 * (4 * row + column / 2) + 2 * matrix + 1 + column % 2;
    };
    for (uint32_t pair = 0; pair < 4; ++pair) {
      o.documented[row_of_lane(address) * 4 + pair] =
          element(2 * pair + 1) << 16 | element(2 * pair);
    }
  }
  MLA_RETURN_IF_ERROR(machine.copy_to_host(o.words.data(), out.data(), out.bytes()));
  result->push_back(std::move(o));
  return {};
}

Status record_mbarrier(Machine& machine, const HopperFragments& fragments,
                       std::vector<Observation>* result) {
  Observation o{"mbarrier", Kept::kWords, "wait", "thread", 128, {}, {}, {}, {}};
  o.documented.assign((kMbarrierPhases + 1) * 128, 1);
  for (uint32_t phase = 0; phase < kMbarrierPhases; ++phase) {
    std::fill_n(&o.documented[(phase + 1) * 128], 128, 4 * 100 * phase + 1 + 2 + 3 + 4);
  }
  DeviceBuffer out;
  MLA_RETURN_IF_ERROR(out.allocate(machine, std::span(o.documented).size_bytes()));
  MLA_RETURN_IF_ERROR(fragments.mbarrier(out.as<uint32_t[128]>()));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  o.words.resize(o.documented.size());
  MLA_RETURN_IF_ERROR(machine.copy_to_host(o.words.data(), out.data(), out.bytes()));
  result->push_back(std::move(o));
  return {};
}

}  // namespace

Status record_hopper_fragments(Machine& machine, std::vector<Observation>* result,
                               std::ostream* log) {
  const HopperFragments fragments = MLA_ON_MACHINE(machine, hopper_fragments)();
  size_t logged = 0;
  const auto finish = [&](const Status& status) {
    for (; log != nullptr && logged < result->size(); ++logged) {
      const Observation& o = (*result)[logged];
      const std::string wrong = undocumented(o);
      *log << (wrong.empty() ? "PASS " : "FAIL ") << o.name << (wrong.empty() ? "" : ": ") << wrong
           << std::endl;
    }
    return status;
  };
  for (const WgmmaFormFacts& facts : kWgmmaForms) {
    MLA_RETURN_IF_ERROR(finish(record_wgmma<bfloat16>(machine, fragments, facts.form, result)));
    MLA_RETURN_IF_ERROR(finish(record_wgmma<float16>(machine, fragments, facts.form, result)));
  }
  for (const auto part : {record_stmatrix, record_stmatrix_trans, record_mbarrier, record_bulk,
                          record_tma_loads, record_tma_stores}) {
    MLA_RETURN_IF_ERROR(finish(part(machine, fragments, result)));
  }
  return {};
}

Machine* hopper_machine(std::string* why_not) {
  Machine* gpu = gpu_machine(why_not);
  if (gpu == nullptr || gpu->limits().compute_capability == 90) return gpu;
  *why_not = "sm_90a code runs on compute capability 9.0 only, not on " + gpu->description();
  return nullptr;
}

}  // namespace mla
