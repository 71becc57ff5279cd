// The model's mma, ldmatrix and cp.async against what a GPU does: reference/testing/golden/fragments.txt,
// written on one by
//
//   fragments_test --write reference/testing/golden
//
// and, where there is a GPU, against that one.
#include "reference/testing/fragments.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <iostream>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "stages/common/machine/machine.h"
#include "reference/testing/golden.h"

namespace mla {
namespace {

constexpr char kGoldenFile[] = "reference/testing/golden/fragments.txt";

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
        const float value = std::ldexp(static_cast<float>(random_word(state) >> 8) - 0x1p23f, power);
        c = subnormal ? 0 : value;
      }
    }
  }
  return inputs;
}

Status record(Machine& machine, GoldenWords* result) {
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
#ifdef MLA_HAVE_CUDA
  const auto launch =
      machine.kind() == MachineKind::kGpu ? gpu::launch_fragments : model::launch_fragments;
#else
  const auto launch = model::launch_fragments;
#endif
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

/// The sum of the magnitudes of what a product adds up, by lane and register.
template <typename T>
std::vector<double> magnitudes() {
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

void expect_close(const std::vector<uint32_t>& actual, const std::vector<uint32_t>& expected,
                  const std::vector<double>& scale) {
  ASSERT_EQ(actual.size(), scale.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    // Hardware adds in its own order, and cuts off bits that fp32 would round.
    ASSERT_NEAR(std::bit_cast<float>(actual[i]), std::bit_cast<float>(expected[i]),
                0x1p-20 * scale[i])
        << "product " << i / 128 << ", lane " << i / 4 % 32 << ", d[" << i % 4 << "]";
  }
}

void expect_golden(Machine& machine) {
  std::ifstream file(kGoldenFile);
  ASSERT_TRUE(file.is_open())
      << "no " << kGoldenFile
      << ": run this in the project's root; fragments_test --write reference/testing/golden makes the "
         "file on a machine with a GPU";
  const GoldenWords golden = read_golden_words(file);
  GoldenWords actual;
  const Status status = record(machine, &actual);
  ASSERT_TRUE(status.ok()) << status.to_string();
  ASSERT_EQ(actual.size(), golden.size()) << kGoldenFile << " is damaged";
  for (const auto& [name, expected] : golden) {
    SCOPED_TRACE(name);
    ASSERT_EQ(actual[name].size(), expected.size());
    if (name == "mma_bf16_random") {
      expect_close(actual[name], expected, magnitudes<bfloat16>());
    } else if (name == "mma_fp16_random") {
      expect_close(actual[name], expected, magnitudes<float16>());
    } else {
      EXPECT_EQ(actual[name], expected);
    }
  }
}

TEST(Fragments, ModelDoesWhatTheGpuDid) {
  expect_golden(model_machine());
}

TEST(Fragments, GpuDoesWhatTheGpuDid) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) GTEST_SKIP() << why_not;
  expect_golden(*gpu);
}

TEST(Fragments, TextIsReadAsItWasWritten) {
  GoldenWords fragments;
  ASSERT_TRUE(record(model_machine(), &fragments).ok());
  std::stringstream text;
  text << "# a comment\n";
  write_golden_words(text, fragments);
  EXPECT_EQ(read_golden_words(text), fragments);
}

int write_golden(const std::string& folder) {
  std::string why_not;
  Machine* gpu = gpu_machine(&why_not);
  if (gpu == nullptr) {
    std::cerr << "fragments_test: " << why_not << "\n";
    return 1;
  }
  GoldenWords fragments;
  if (const Status status = record(*gpu, &fragments); !status.ok()) {
    std::cerr << "fragments_test: " << status.to_string() << "\n";
    return 1;
  }
  std::ofstream file(folder + "/fragments.txt");
  file << "# What mma, ldmatrix and cp.async do with registers and memory: see reference/testing/fragments.h.\n"
       << "# Made by fragments_test --write on " << gpu->description() << ".\n";
  write_golden_words(file, fragments);
  file.close();
  if (!file) {
    std::cerr << "fragments_test: cannot write " << folder << "/fragments.txt\n";
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  if (argc == 3 && argv[1] == std::string_view("--write")) return mla::write_golden(argv[2]);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
