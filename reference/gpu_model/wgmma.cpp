// wgmma: what a warp does when it issues products, groups and waits for them. From issue to wait
// the accumulators' registers hold a NaN, and their values are kept here; the operands in shared
// memory are read at issue or later, at the latest in the wait.
#include "reference/gpu_model/wgmma.h"

#include <algorithm>
#include <string>

#include "reference/gpu_model/multiprocessor.h"

namespace gpu_model::detail {
namespace {

constexpr size_t kGranule = sizeof(Granule);
constexpr size_t kRows = 16;  // of a warp's part
constexpr size_t kDepth = 16;
constexpr size_t kMaxColumns = 256;
// A NaN that no computation makes, nor leaves as it is: a signalling one.
constexpr uint32_t kInFlight = 0x7fa5a5a5;

constexpr uint64_t kDescriptorBits =
    uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{3} << 62;

/// A descriptor's matrix, in bytes.
struct Matrix {
  explicit Matrix(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        row_bytes(descriptor >> 62 == 2 ? 64 : 128) {}
  size_t start, leading, stride, row_bytes;
};

/// The granule at an address, under the swizzle of these rows. Of 128 bytes: address bits 4 to 6 are
/// xored with bits 7 to 9. Of 64 bytes: bits 4 and 5 with bits 7 and 8.
constexpr size_t swizzled(size_t address, size_t row_bytes = 128) {
  return (address ^ (address >> 3 & (row_bytes - kGranule))) / kGranule;
}

using Floats [[gnu::vector_size(16)]] = float;
using Words [[gnu::vector_size(16)]] = uint32_t;

struct Bfloat16 {
  static Words bits(Words values) { return values << 16; }
};
struct Float16 {
  /// Without branches; see tensor_core.cpp.
  static Words bits(Words values) {
    const Words magnitude = (values & 0x7fff) << 13;
    const auto finite = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 0x1p112f);
    const Words special = magnitude | 0x7f800000;
    return (magnitude < 0x0f800000 ? finite : special) | (values & 0x8000) << 16;
  }
};

/// The 8 values of a granule, in order.
template <typename T>
void convert(const Granule& granule, float* out) {
  Words words;
  __builtin_memcpy(&words, &granule, sizeof words);
  const Words even = T::bits(words & 0xffff), odd = T::bits(words >> 16);
#ifdef __clang__
  const Words low = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  const Words high = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#else
  const Words low = __builtin_shuffle(even, odd, Words{0, 4, 1, 5});
  const Words high = __builtin_shuffle(even, odd, Words{2, 6, 3, 7});
#endif
  __builtin_memcpy(out, &low, sizeof low);
  __builtin_memcpy(out + 4, &high, sizeof high);
}

/// d[16, columns] += a[16, 16] b[16, columns].
[[gnu::always_inline]] inline void multiply_any(float* d, const float* a, const float* b,
                                                size_t columns) {
  using Row [[gnu::vector_size(32)]] = float;
  constexpr size_t kBlock = 8;  // rows, and columns
  for (size_t first = 0; first < kRows; first += kBlock) {
    for (size_t column = 0; column < columns; column += kBlock) {
      Row sums[kBlock];
      for (size_t i = 0; i < kBlock; ++i) {
        __builtin_memcpy(&sums[i], d + (first + i) * columns + column, sizeof(Row));
      }
      for (size_t k = 0; k < kDepth; ++k) {
        Row right;
        __builtin_memcpy(&right, b + k * columns + column, sizeof right);
#pragma GCC unroll 8
        for (size_t i = 0; i < kBlock; ++i) sums[i] += a[(first + i) * kDepth + k] * right;
      }
      for (size_t i = 0; i < kBlock; ++i) {
        __builtin_memcpy(d + (first + i) * columns + column, &sums[i], sizeof(Row));
      }
    }
  }
}

// Compiled for any processor, and for those of today, on which it takes a fifth of the time.
void multiply_baseline(float* d, const float* a, const float* b, size_t columns) {
  multiply_any(d, a, b, columns);
}
#ifdef __x86_64__
[[gnu::target("avx2,fma")]] void multiply_avx2(float* d, const float* a, const float* b,
                                               size_t columns) {
  multiply_any(d, a, b, columns);
}
void multiply(float* d, const float* a, const float* b, size_t columns) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  (has_avx2 ? multiply_avx2 : multiply_baseline)(d, a, b, columns);
}
#else
constexpr auto multiply = multiply_baseline;
#endif

/// Calls function(values, registers) for every two neighbours of a lane's part of [16, columns]:
/// where they lie there, and in the lane's d.
template <typename Function>
void for_each_pair(float* values, float* d, size_t lane, size_t columns, Function function) {
  float* upper = values + lane / 4 * columns + lane % 4 * 2;
  float* lower = upper + 8 * columns;
  for (size_t tile = 0; tile < columns / 8; ++tile) {
    function(upper + tile * 8, d + tile * 4);
    function(lower + tile * 8, d + tile * 4 + 2);
  }
}

void copy_pair(float* to, const float* from) {
  __builtin_memcpy(to, from, 2 * sizeof(float));
}

template <typename T>
void convert_a(const Product& product, const WarpProduct& issued, const Granule* granules,
               float* a) {
  if (product.a_transposed) {
    for (size_t k = 0; k < kDepth; ++k) {
      float values[kRows];
      convert<T>(granules[2 * k], values);
      convert<T>(granules[2 * k + 1], values + 8);
      for (size_t row = 0; row < kRows; ++row) a[row * kDepth + k] = values[row];
    }
    return;
  }
  if (!product.a_in_registers) {
    for (size_t i = 0; i < kRows * kDepth / 8; ++i) convert<T>(granules[i], a + 8 * i);
    return;
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    Granule granule;
    __builtin_memcpy(&granule, issued.a[lane], sizeof granule);
    float values[8];
    convert<T>(granule, values);
    for (size_t i = 0; i < 8; ++i) {
      const size_t row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i / 4 * 8 + i % 2;
      a[row * kDepth + k] = values[i];
    }
  }
}

template <typename T>
void convert_b(const Product& product, const Granule* granules, float* b) {
  const auto columns = static_cast<size_t>(product.columns);
  if (product.b_transposed) {
    for (size_t i = 0; i < kDepth * columns / 8; ++i) convert<T>(granules[i], b + 8 * i);
    return;
  }
  // Four columns at a time, as 4x4 blocks.
  for (size_t column = 0; column < columns; column += 4) {
    float values[4][kDepth];
    for (size_t i = 0; i < 4; ++i) {
      convert<T>(granules[(column + i) * 2], values[i]);
      convert<T>(granules[(column + i) * 2 + 1], values[i] + 8);
    }
    for (size_t k = 0; k < kDepth; ++k) {
      const Floats row = {values[0][k], values[1][k], values[2][k], values[3][k]};
      __builtin_memcpy(b + k * columns + column, &row, sizeof row);
    }
  }
}

bool names(const NamedRegisters& named, const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  for (const auto& array : named.arrays) {
    const auto array_first = reinterpret_cast<uintptr_t>(array.begin);
    if (array_first <= first && first + bytes <= array_first + array.bytes) return true;
  }
  return false;
}

Wait at(const Product& product) {
  return {product.what, product.file, product.line};
}

/// Registers as words, whatever their type.
using Word [[gnu::may_alias]] = uint32_t;

}  // namespace

template <typename Function>
void Multiprocessor::for_each_granule(const Product& product, unsigned warp, Function function) {
  if (product.a_transposed) {
    const Matrix a(product.a);
    for (size_t k = 0; k < kDepth; ++k) {
      const size_t address = a.start + k / 8 * a.stride + k % 8 * 128 + warp % 4 * 2 * kGranule;
      function(swizzled(address));
      function(swizzled(address + kGranule));
    }
  } else if (!product.a_in_registers) {
    const Matrix a(product.a);
    for (size_t row = warp % 4 * kRows; row < (warp % 4 + 1) * kRows; ++row) {
      const size_t address = a.start + row / 8 * a.stride + row % 8 * 128;
      function(swizzled(address));
      function(swizzled(address + kGranule));
    }
  }
  const Matrix b(product.b);
  const auto columns = static_cast<size_t>(product.columns);
  if (product.b_transposed) {
    for (size_t k = 0; k < kDepth; ++k) {
      for (size_t box = 0; box < columns / 64; ++box) {
        const size_t address = b.start + box * b.leading + k / 8 * b.stride + k % 8 * 128;
        for (size_t chunk = 0; chunk < 8; ++chunk) function(swizzled(address + chunk * kGranule));
      }
    }
  } else {
    for (size_t row = 0; row < columns; ++row) {
      const size_t address = b.start + row / 8 * b.stride + row % 8 * b.row_bytes;
      function(swizzled(address, b.row_bytes));
      function(swizzled(address + kGranule, b.row_bytes));
    }
  }
}

void Multiprocessor::warpgroup_instruction(WarpgroupInstruction instruction) {
  const unsigned warp = self().number / warpSize;
  const unsigned last = warp / 4 * 4 + 3;
  const auto describe_instruction = [](const WarpgroupInstruction& of) {
    return std::string(of.what) + " at " + std::string(relative_path(of.file)) + ":" +
           std::to_string(of.line);
  };
  if (last >= warp_count_ || warps_[last].exists != 0xffffffff) {
    fail([&] {
      return describe_instruction(instruction) + " in a warpgroup of fewer than 128 threads, " +
             place(self().number);
    });
  }
  Warpgroup& warpgroup = warpgroups_[warp / 4];
  const uint64_t index = products_[warp].instructions++ - warpgroup.first;
  if (index == warpgroup.instructions.size()) {
    instruction.warps = 0;
    instruction.first = warp;
    warpgroup.instructions.push_back(instruction);
  }
  WarpgroupInstruction& expected = warpgroup.instructions[index];
  const bool same_place = expected.line == instruction.line &&
                          std::string_view(expected.what) == instruction.what &&
                          std::string_view(expected.file) == instruction.file;
  if (!same_place || expected.a != instruction.a || expected.b != instruction.b ||
      expected.accumulate != instruction.accumulate) {
    fail([&] {
      return "warps of one warpgroup disagree: " + place(self().number) + " executes " +
             describe_instruction(instruction) + " while warp " + std::to_string(expected.first) +
             " executed " + describe_instruction(expected) +
             (same_place ? " with other operands" : "");
    });
  }
  if (++expected.warps == 4) {  // the oldest: no warp is further behind than this one
    warpgroup.instructions.pop_front();
    ++warpgroup.first;
  }
}

void Multiprocessor::ask_for_registers(unsigned count, const Wait& wait) {
  Warp& own = warps_[self().number / warpSize];
  if (count <= own.registers) {
    free_registers_ += (own.registers - count) * warpSize;
    own.registers = count;
  } else {
    own.wanted = count;
  }
  if (recording_ != nullptr) {
    recording_->registers(*this, wait, own.registers, own.wanted, free_registers_);
  }
  for (unsigned w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    if (warp.wanted == 0 || (warp.wanted - warp.registers) * warpSize > free_registers_) continue;
    free_registers_ -= (warp.wanted - warp.registers) * warpSize;
    warp.registers = warp.wanted;
    warp.wanted = 0;
    if (recording_ != nullptr) recording_->grant(*this, w, warp.registers, free_registers_);
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      Thread& waiting = *threads_[w * warpSize + lane];
      if (waiting.waits_for_registers) wake(waiting);
    }
  }
}

void Multiprocessor::wait_for_registers(const Wait& wait) {
  Thread& thread = self();
  if (warps_[thread.number / warpSize].wanted == 0) return;
  thread.waits_for_registers = true;
  suspend(wait);
  thread.waits_for_registers = false;
}

void Multiprocessor::check_registers(Thread& thread, const uint32_t* begin, size_t count,
                                     const char* name, const Product& product) {
  const auto* registers = reinterpret_cast<const Word*>(begin);
  for (const FencedRegisters& fenced : thread.registers) {
    if (fenced.begin > begin || begin + count > fenced.begin + fenced.values.size()) continue;
    const uint32_t* values = &fenced.values[static_cast<size_t>(begin - fenced.begin)];
    uint32_t difference = 0;
    for (size_t i = 0; i < count; ++i) difference |= registers[i] ^ values[i];
    if (difference == 0) return;
    fail([&] {
      return detail::describe(at(product)) + ": the " + name +
             " were written after the last wgmma_fence that names them, " + place(thread.number);
    });
  }
  fail([&] {
    return detail::describe(at(product)) + ": no wgmma_fence names the " + name + ", " +
           place(thread.number);
  });
}

void Multiprocessor::record_registers(Thread& thread, const uint32_t* begin, size_t count) {
  const auto* registers = reinterpret_cast<const Word*>(begin);
  uint32_t* values = nullptr;
  for (FencedRegisters& fenced : thread.registers) {
    if (fenced.begin <= begin && begin + count <= fenced.begin + fenced.values.size()) {
      values = &fenced.values[static_cast<size_t>(begin - fenced.begin)];
      break;
    }
  }
  if (values == nullptr) {  // what overlaps is of variables that are no more
    std::erase_if(thread.registers, [&](const FencedRegisters& fenced) {
      return fenced.begin < begin + count && begin < fenced.begin + fenced.values.size();
    });
    FencedRegisters& fenced = thread.registers.emplace_back();
    fenced.begin = begin;
    fenced.values.resize(count);
    values = fenced.values.data();
  }
  for (size_t i = 0; i < count; ++i) values[i] = registers[i];
}

void Multiprocessor::fence_registers(void* const* lanes) {
  const unsigned first_thread = self().number / warpSize * warpSize;
  use_async_view();
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    for (const auto& array : static_cast<const NamedRegisters*>(lanes[lane])->arrays) {
      if (array.bytes == 0) continue;
      record_registers(thread(first_thread + lane), static_cast<const uint32_t*>(array.begin),
                       array.bytes / sizeof(uint32_t));
    }
  }
}

void Multiprocessor::issue_product(void* const* lanes) {
  const unsigned warp = self().number / warpSize;
  const auto operands = [&](size_t lane) -> const ProductOperands& {
    return *static_cast<const ProductOperands*>(lanes[lane]);
  };
  const auto thread_of = [&](size_t lane) -> Thread& {
    return thread(warp * warpSize + static_cast<unsigned>(lane));
  };
  const Product& product = *operands(0).product;
  const Wait wait = at(product);
  for (unsigned lane = 1; lane < warpSize; ++lane) {
    const Product& other = *operands(lane).product;
    if (other.a != product.a || other.b != product.b || other.accumulate != product.accumulate) {
      fail([&] {
        return "lanes of one warp disagree: " + detail::describe(wait) +
               " has other operands than in lane 0, " + place(thread_of(lane).number);
      });
    }
  }
  use_async_view();
  warpgroup_instruction(
      {product.what, product.file, product.line, product.a, product.b, product.accumulate, 0, 0});

  const auto check_descriptor = [&](const char* name, uint64_t descriptor, bool may_have_64_bytes) {
    const bool known = descriptor >> 62 == 1 || (descriptor >> 62 == 2 && may_have_64_bytes);
    if (known && (descriptor & ~kDescriptorBits) == 0) return;
    fail([&] {
      char text[24];
      std::snprintf(text, sizeof text, "0x%016llx", static_cast<unsigned long long>(descriptor));
      return detail::describe(wait) + ": " + text + " is not a descriptor of " + name +
             " with a 128-byte swizzle, " + place(self().number);
    });
  };
  if (!product.a_in_registers) check_descriptor("A", product.a, false);
  check_descriptor("B", product.b, !product.b_transposed);
  WarpProducts& products = products_[warp];
  WarpProduct& issued = products.queue.emplace_back();
  issued.product = product;
  for_each_granule(product, warp, [&](size_t granule) {
    if (granule >= marks_.size()) {
      fail([&] {
        return detail::describe(wait) + " reads past the end of shared memory, at byte " +
               std::to_string(granule * kGranule) + " of " + std::to_string(shared_.bytes()) +
               ", " + place(self().number);
      });
    }
    check_async_access(granule, " reads", wait);
    if (races_ != nullptr) {
      races_->issue_product(warp, granule * kGranule, kGranule,
                            static_cast<Time>(products.issued()), wait);
    }
    ++async_.readers[granule];
    issued.granules[issued.granule_count++] = static_cast<uint16_t>(granule);
  });

  if (counters_ != nullptr) {
    // A warp's rows of A; B once for the warpgroup.
    const size_t b_granules = warp % 4 == 0 ? 2 * static_cast<size_t>(product.columns) : 0;
    const size_t a_granules = product.a_in_registers ? 0 : 2 * kRows;
    counters_->product(product.what, product.file, product.line,
                       (a_granules + b_granules) * kGranule,
                       2 * kRows * kDepth * static_cast<uint64_t>(product.columns));
  }
  if (recording_ != nullptr) {
    recording_->product(*this, wait, product.columns, issued.granules, issued.granule_count);
  }

  // The accumulators: in flight already, or read from the registers.
  const auto columns = static_cast<size_t>(product.columns);
  const size_t registers = columns / 2;
  size_t chosen = products.accumulators.size();
  for (size_t i = 0; i < products.accumulators.size(); ++i) {
    const Accumulator& accumulator = products.accumulators[i];
    if (accumulator.in_flight && accumulator.d[0] == operands(0).d) {
      chosen = i;
      break;
    }
    if (!accumulator.in_flight) chosen = i;
  }
  if (chosen == products.accumulators.size()) products.accumulators.emplace_back();
  Accumulator& accumulator = products.accumulators[chosen];
  const bool chained = accumulator.in_flight;
  for (size_t lane = 0; lane < warpSize; ++lane) {
    float* d = operands(lane).d;
    if (chained) {
      if (accumulator.d[lane] == d && accumulator.columns == product.columns) continue;
      fail([&] {
        return detail::describe(wait) +
               ": some accumulators belong to another product under way, " +
               place(thread_of(lane).number);
      });
    }
    check_registers(thread_of(lane), reinterpret_cast<const uint32_t*>(d), registers,
                    "accumulators", product);
  }
  if (!chained) {
    accumulator.in_flight = true;
    accumulator.columns = product.columns;
    accumulator.values.resize(kRows * columns);
    for (size_t lane = 0; lane < warpSize; ++lane) {
      float* d = operands(lane).d;
      accumulator.d[lane] = d;
      for_each_pair(accumulator.values.data(), d, lane, columns,
                    [](float* value, float* pair) { copy_pair(value, pair); });
      for (size_t i = 0; i < registers; ++i) reinterpret_cast<Word*>(d)[i] = kInFlight;
    }
  }
  issued.accumulator = chosen;
  accumulator.last = products.issued() - 1;
  if (product.a_in_registers) {
    for (size_t lane = 0; lane < warpSize; ++lane) {
      const uint32_t* a = operands(lane).a;
      check_registers(thread_of(lane), a, 4, "A registers", product);
      issued.a_registers[lane] = a;
      for (size_t i = 0; i < 4; ++i) issued.a[lane][i] = a[i];
    }
  }
  const unsigned odds = pace_ == Pace::kLate ? 0 : pace_ == Pace::kNowAndThen ? 8 : 2;
  if (odds != 0 && async_random_.next() % odds == 0) compute_products(warp, products.issued());
}

void Multiprocessor::compute_products(unsigned warp, uint64_t end) {
  WarpProducts& products = products_[warp];
  for (; products.computed < end; ++products.computed) {
    compute_product(warp, products.queue[products.computed - products.first]);
  }
}

void Multiprocessor::compute_product(unsigned warp, WarpProduct& issued) {
  const Product& product = issued.product;
  const auto columns = static_cast<size_t>(product.columns);
  const size_t a_granules = product.a_in_registers ? 0 : kRows * kDepth / 8;
  static thread_local Granule granules[(kRows + kMaxColumns) * kDepth / 8];
  static thread_local float a[kRows * kDepth], b[kDepth * kMaxColumns];
  const Wait wait = at(product);
  for (size_t i = 0; i < issued.granule_count; ++i) {
    check_async_access(issued.granules[i], " reads, while it is under way,", wait);
    granules[i] = async_.granules[issued.granules[i]];
  }
  if (product.float16) {
    convert_a<Float16>(product, issued, granules, a);
    convert_b<Float16>(product, granules + a_granules, b);
  } else {
    convert_a<Bfloat16>(product, issued, granules, a);
    convert_b<Bfloat16>(product, granules + a_granules, b);
  }
  std::vector<float>& values = products_[warp].accumulators[issued.accumulator].values;
  if (!product.accumulate) std::fill(values.begin(), values.end(), 0.0f);
  multiply(values.data(), a, b, columns);
}

void Multiprocessor::commit_products(void* const* lanes) {
  WarpProducts& products = products_[self().number / warpSize];
  products.groups.push_back(products.issued());
  const auto& named = *static_cast<const NamedRegisters*>(lanes[0]);
  if (recording_ != nullptr) {
    recording_->commit(*this, {"wgmma_commit_group", named.file, named.line},
                       Recording::Group::kProducts);
  }
}

void Multiprocessor::wait_products(void* const* lanes) {
  const unsigned warp = self().number / warpSize;
  WarpProducts& products = products_[warp];
  const auto named = [&](size_t lane) -> const NamedRegisters& {
    return *static_cast<const NamedRegisters*>(lanes[lane]);
  };
  const auto pending = static_cast<size_t>(named(0).pending);
  const size_t groups = products.groups.size() - std::min(pending, products.groups.size());
  const uint64_t end = groups == 0 ? products.first : products.groups[groups - 1];
  if (recording_ != nullptr) {
    recording_->settle(*this, {"wgmma_wait_group", named(0).file, named(0).line},
                       Recording::Group::kProducts, pending, end - products.first);
  }
  if (groups == 0) return;
  compute_products(warp, end);
  const auto reject_registers = [&](const char* before, const Product& product, const char* after,
                                    size_t lane) {
    fail([&] {
      return detail::describe({"wgmma_wait_group", named(lane).file, named(lane).line}) + ": " +
             before + detail::describe(at(product)) + after + ", " +
             place(warp * warpSize + static_cast<unsigned>(lane));
    });
  };
  for (uint64_t number = products.first; number < end; ++number) {
    const WarpProduct& issued = products.queue[number - products.first];
    for (size_t i = 0; i < issued.granule_count; ++i) --async_.readers[issued.granules[i]];
    for (size_t lane = 0; issued.product.a_in_registers && lane < warpSize; ++lane) {
      for (size_t i = 0; i < 4; ++i) {
        if (issued.a_registers[lane][i] == issued.a[lane][i]) continue;
        reject_registers("the A registers were changed while ", issued.product, " read them", lane);
      }
      if (!names(named(lane), issued.a_registers[lane], sizeof issued.a[lane])) {
        reject_registers("it does not name the A registers of ", issued.product,
                         ", which it completes", lane);
      }
    }
    Accumulator& accumulator = products.accumulators[issued.accumulator];
    if (accumulator.last != number) continue;
    const auto columns = static_cast<size_t>(accumulator.columns);
    for (size_t lane = 0; lane < warpSize; ++lane) {
      float* d = accumulator.d[lane];
      const auto* words = reinterpret_cast<const Word*>(d);
      uint32_t difference = 0;
      for (size_t i = 0; i < columns / 2; ++i) difference |= words[i] ^ kInFlight;
      if (difference != 0) {
        reject_registers("the accumulators were written while ", issued.product, " wrote them",
                         lane);
      }
      if (!names(named(lane), d, columns / 2 * sizeof(float))) {
        reject_registers("it does not name the accumulators of ", issued.product,
                         ", which it completes", lane);
      }
      for_each_pair(accumulator.values.data(), d, lane, columns,
                    [](float* value, float* pair) { copy_pair(pair, value); });
      record_registers(thread(warp * warpSize + static_cast<unsigned>(lane)),
                       reinterpret_cast<const uint32_t*>(d), columns / 2);
    }
    accumulator.in_flight = false;
  }
  if (races_ != nullptr) races_->finish_products(warp, static_cast<Time>(end));
  products.queue.erase(products.queue.begin(),
                       products.queue.begin() + static_cast<ptrdiff_t>(end - products.first));
  products.first = end;
  products.groups.erase(products.groups.begin(),
                        products.groups.begin() + static_cast<ptrdiff_t>(groups));
}

// What ptx_sm90.h calls.

void issue_product(void* const* lanes) {
  Multiprocessor::here().issue_product(lanes);
}

void fence_registers(void* const* lanes) {
  Multiprocessor::here().fence_registers(lanes);
}

void commit_products(void* const* lanes) {
  Multiprocessor::here().commit_products(lanes);
}

void wait_products(void* const* lanes) {
  Multiprocessor::here().wait_products(lanes);
}

void redistribute_registers(const char* what, int count, const char* file, int line) {
  WarpgroupInstruction instruction{what, file, line, static_cast<uint64_t>(count), 0, false, 0, 0};
  warp_operation(
      what, &instruction,
      [](void* const* lanes) {
        Multiprocessor& multiprocessor = Multiprocessor::here();
        const auto& asked = *static_cast<const WarpgroupInstruction*>(lanes[0]);
        multiprocessor.use_async_view();
        multiprocessor.warpgroup_instruction(asked);
        multiprocessor.ask_for_registers(static_cast<unsigned>(asked.a),
                                         {asked.what, asked.file, asked.line});
      },
      file, line);
  Multiprocessor::here().wait_for_registers({what, file, line});
}

uint64_t matrix_descriptor(const void* matrix, int leading_bytes, int stride_bytes, int row_bytes,
                           const char* file, int line) {
  Multiprocessor& multiprocessor = Multiprocessor::here();
  const Wait wait{"matrix_descriptor", file, line};
  const auto alignment = static_cast<size_t>(row_bytes) * 8;
  const size_t offset =
      multiprocessor.shared_offset(matrix, kGranule, alignment, " describes", wait);
  const auto fits = [](int bytes) { return bytes >= 0 && bytes < 1 << 18 && bytes % 16 == 0; };
  if (!fits(leading_bytes) || !fits(stride_bytes)) {
    multiprocessor.fail([&] {
      return describe(wait) + ": leading_bytes = " + std::to_string(leading_bytes) +
             " and stride_bytes = " + std::to_string(stride_bytes) +
             " must be multiples of 16 from 0 to 262128, " +
             multiprocessor.place(multiprocessor.self().number);
    });
  }
  return uint64_t{offset} >> 4 | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | uint64_t{row_bytes == 64 ? 2u : 1u} << 62;
}

}  // namespace gpu_model::detail
