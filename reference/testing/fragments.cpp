// What the instructions of stages/common/ptx/ptx.h are given, and what comes out.
#include "reference/testing/fragments.h"

#include <bit>
#include <cmath>
#include <span>
#include <vector>

#include "reference/float16.h"

namespace mla {
namespace {

// The products. The first ones tell every register's place: those of A hold numbers that no two
// share, B is 1 in one place, so the numbers of one column of A come out in one column of D. One
// more says that C lies as D does. The others are sums of mixed magnitudes.
constexpr unsigned kLayoutProducts = 128 + 1;
constexpr unsigned kRandomProducts = 16;
constexpr unsigned kProducts = kLayoutProducts + kRandomProducts;

template <typename T>
std::vector<MmaInput> mma_inputs() {
  constexpr uint32_t kBias = std::is_same_v<T, bfloat16> ? 127 : 15;
  std::vector<MmaInput> inputs(kProducts * 32);  // all zero
  for (unsigned product = 0; product < 128; ++product) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 8; ++i) {
        inputs[product * 32 + lane].a[i / 2] |= bits_of<T>(static_cast<float>(lane * 8 + i + 1))
                                                << i % 2 * 16;
      }
    }
    inputs[product * 32 + product / 4].b[product % 4 / 2] = bits_of<T>(1) << product % 2 * 16;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      inputs[128 * 32 + lane].c[i] = static_cast<float>(lane * 4 + i + 1);
    }
  }
  uint64_t state = 1;
  for (unsigned product = 0; product < kRandomProducts; ++product) {
    const bool subnormal = product % 2 == 1;  // A, and no C that would swallow the result
    for (unsigned lane = 0; lane < 32; ++lane) {
      MmaInput& input = inputs[(kLayoutProducts + product) * 32 + lane];
      for (unsigned i = 0; i < 8; ++i) {
        const uint32_t exponent = subnormal ? 0 : kBias - 8 + random_word(state) % 16;
        input.a[i / 2] |= random_value<T>(state, exponent) << i % 2 * 16;
      }
      for (unsigned i = 0; i < 4; ++i) {
        const uint32_t exponent = kBias + random_word(state) % 8 - (subnormal ? 0 : 4);
        input.b[i / 2] |= random_value<T>(state, exponent) << i % 2 * 16;
      }
      for (float& c : input.c) {
        // Drawn first by a statement: compilers do not agree on the order of arguments.
        const int power = static_cast<int>(random_word(state) % 16) - 31;
        const float value =
            std::ldexp(static_cast<float>(random_word(state) >> 8) - 0x1p23f, power);
        c = subnormal ? 0 : value;
      }
    }
  }
  return inputs;
}

template <typename T>
std::vector<double> magnitudes_of() {
  const std::vector<MmaInput> inputs = mma_inputs<T>();
  const auto value = [](uint32_t pair, unsigned half) {
    return std::abs(
        static_cast<double>(to_float(std::bit_cast<T>(static_cast<uint16_t>(pair >> half * 16)))));
  };
  std::vector<double> result;
  for (unsigned product = kLayoutProducts; product < kProducts; ++product) {
    const MmaInput* lanes = &inputs[product * 32];
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        double sum = std::abs(static_cast<double>(lanes[lane].c[i]));
        for (unsigned k = 0; k < 16; ++k) {
          const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, pair = k % 8 / 2;
          sum += value(lanes[row * 4 + pair].a[i / 2 + k / 8 * 2], k % 2) *
                 value(lanes[column * 4 + pair].b[k / 8], k % 2);
        }
        result.push_back(sum);
      }
    }
  }
  return result;
}

}  // namespace

Status record_fragments(Machine& machine, GoldenWords* result) {
  const std::vector<MmaInput> bfloat16_inputs = mma_inputs<bfloat16>(),
                              float16_inputs = mma_inputs<float16>();
  std::vector<uint32_t> copied(32 * 4);
  for (uint32_t i = 0; i < copied.size(); ++i) copied[i] = i + 1;

  constexpr size_t kOutBytes = kProducts * 32 * 4 * sizeof(float);
  DeviceBuffer ldmatrix, bfloat16_in, float16_in, bfloat16_out, float16_out, copy_in, copy_out;
  MLA_RETURN_IF_ERROR(ldmatrix.allocate(machine, 2 * 32 * 4 * sizeof(uint32_t)));
  MLA_RETURN_IF_ERROR(
      bfloat16_in.assign(machine, bfloat16_inputs.data(), std::span(bfloat16_inputs).size_bytes()));
  MLA_RETURN_IF_ERROR(
      float16_in.assign(machine, float16_inputs.data(), std::span(float16_inputs).size_bytes()));
  MLA_RETURN_IF_ERROR(bfloat16_out.allocate(machine, kOutBytes));
  MLA_RETURN_IF_ERROR(float16_out.allocate(machine, kOutBytes));
  MLA_RETURN_IF_ERROR(copy_in.assign(machine, copied.data(), std::span(copied).size_bytes()));
  MLA_RETURN_IF_ERROR(copy_out.allocate(machine, copy_in.bytes()));

  FragmentBuffers buffers{};
  buffers.ldmatrix = ldmatrix.as<uint32_t[32][4]>();
  buffers.mma_count = kProducts;
  buffers.bfloat16_in = bfloat16_in.as<MmaInput[32]>();
  buffers.float16_in = float16_in.as<MmaInput[32]>();
  buffers.bfloat16_out = bfloat16_out.as<float[32][4]>();
  buffers.float16_out = float16_out.as<float[32][4]>();
  buffers.copy_in = copy_in.as<uint32_t[4]>();
  buffers.copy_out = copy_out.as<uint32_t[4]>();
  const auto launch = MLA_ON_MACHINE(machine, launch_fragments);
  MLA_RETURN_IF_ERROR(launch(buffers));
  MLA_RETURN_IF_ERROR(machine.synchronize());

  const auto read = [&](const DeviceBuffer& buffer, size_t begin, size_t end, const char* name) {
    std::vector<uint32_t>& words = (*result)[name];
    words.resize((end - begin) * 128);
    return machine.copy_to_host(words.data(), buffer.as<uint32_t>() + begin * 128,
                                std::span(words).size_bytes());
  };
  MLA_RETURN_IF_ERROR(read(ldmatrix, 0, 1, "ldmatrix_x4"));
  MLA_RETURN_IF_ERROR(read(ldmatrix, 1, 2, "ldmatrix_x4_trans"));
  MLA_RETURN_IF_ERROR(read(bfloat16_out, 0, kLayoutProducts, "mma_bf16_layout"));
  MLA_RETURN_IF_ERROR(read(float16_out, 0, kLayoutProducts, "mma_fp16_layout"));
  MLA_RETURN_IF_ERROR(read(bfloat16_out, kLayoutProducts, kProducts, "mma_bf16_random"));
  MLA_RETURN_IF_ERROR(read(float16_out, kLayoutProducts, kProducts, "mma_fp16_random"));
  return read(copy_out, 0, 1, "cp_async_16");
}

std::vector<double> mma_magnitudes(DType dtype) {
  return visit_dtype(dtype, [](auto zero) { return magnitudes_of<decltype(zero)>(); });
}

}  // namespace mla
