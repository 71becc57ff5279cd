/// @file
/// What the tests of the GPU model share: memory, and checks that a kernel is rejected.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "reference/gpu_model/simt.h"

namespace gpu_model_test {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif

inline constexpr unsigned kAllLanes = 0xffffffff;
inline constexpr int kSeeds = 10;

template <typename T>
T* shared() {
  return static_cast<T*>(gpu_model::dynamic_shared_memory(sizeof(T)));
}

/// Memory from gpu_model::allocate.
template <typename T>
class GlobalArray {
 public:
  explicit GlobalArray(size_t size)
      : data_(static_cast<T*>(gpu_model::allocate(size * sizeof(T)))), size_(size) {}
  ~GlobalArray() { gpu_model::deallocate(data_); }
  GlobalArray(const GlobalArray&) = delete;

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  void fill(T value) { std::fill_n(data_, size_, value); }
  std::vector<T> values() const { return {data_, data_ + size_}; }

 private:
  T* data_;
  size_t size_;
};

class GpuModel : public testing::Test {
 protected:
  void SetUp() override { reset(); }
  void TearDown() override { reset(); }

  static void reset() {
    gpu_model::schedule() = {};
    gpu_model::device() = {};
  }

  /// After a rejection, the model must work as before.
  static void expect_usable() {
    GlobalArray<int> out(64);
    gpu_model::launch(1, 64, 256, [&] {
      int* values = static_cast<int*>(gpu_model::dynamic_shared_memory(256));
      values[threadIdx.x] = static_cast<int>(threadIdx.x);
      __syncthreads();
      out[threadIdx.x] = __shfl_xor_sync(kAllLanes, values[63 - threadIdx.x], 1);
    });
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[static_cast<size_t>(i)], 63 - (i ^ 1));
  }

  /// What launch() throws; empty if nothing.
  template <typename Kernel>
  static std::string error_of(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel,
                              const gpu_model::LaunchOptions& options = {}) {
    std::string message;
    try {
      gpu_model::launch(grid, block, shared_bytes, kernel, options);
    } catch (const gpu_model::KernelError& error) {
      message = error.what();
    }
    const gpu_model::Schedule schedule = gpu_model::schedule();
    const gpu_model::Device device = gpu_model::device();
    reset();
    expect_usable();
    gpu_model::schedule() = schedule;
    gpu_model::device() = device;
    return message;
  }

  static void expect_contains(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos)
        << "message: \"" << message << "\"\nlacks: " << part;
  }

  template <typename Kernel>
  static void expect_rejected(const std::string& part, dim3 grid, dim3 block, size_t shared_bytes,
                              Kernel kernel) {
    expect_contains(error_of(grid, block, shared_bytes, kernel), part);
  }

  /// "tests/reference/gpu_model/gpu_model_test.cpp:41"
  static std::string at(int line, std::string_view file = __builtin_FILE()) {
    return std::string(file.substr(file.rfind("tests/"))) + ":" + std::to_string(line);
  }
};

}  // namespace gpu_model_test
