// What a warp does together for mma and ldmatrix: fragments of 32 lanes to matrices and back. The
// layouts are those of the PTX ISA's figures; tests/fragments_test.cpp holds them to a GPU's.
#include <algorithm>
#include <bit>

#include "reference/gpu_model/multiprocessor.h"
#include "reference/gpu_model/ptx.h"

namespace gpu_model::detail {
namespace {

float from_bfloat16(uint32_t bits) {
  return std::bit_cast<float>(bits << 16);
}

/// Without branches, so that the compiler vectorises loops of it, as it does not Eigen's.
float from_float16(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000;  // infinities and NaNs
  return std::bit_cast<float>((magnitude < 0x0f800000 ? finite : special) | (bits & 0x8000) << 16);
}

template <float convert(uint32_t)>
void multiply(void* const* lanes) {
  // Row `lane / 4` of A, of D and of B transposed, columns `2 (lane % 4)` and the next, and the
  // same 8 rows or columns further.
  alignas(64) uint16_t a_bits[16][16], b_bits[16][8];
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto& [a, b, d] = *static_cast<const MmaOperands*>(lanes[lane]);
    const size_t group = lane / 4, pair = lane % 4 * 2;
    for (size_t i = 0; i < 4; ++i) {
      uint16_t* element = &a_bits[group + i % 2 * 8][pair + i / 2 * 8];
      element[0] = static_cast<uint16_t>(a[i]);
      element[1] = static_cast<uint16_t>(a[i] >> 16);
    }
    for (size_t i = 0; i < 2; ++i) {
      b_bits[pair + i * 8][group] = static_cast<uint16_t>(b[i]);
      b_bits[pair + i * 8 + 1][group] = static_cast<uint16_t>(b[i] >> 16);
    }
  }
  float a[256], b[128];
  for (size_t i = 0; i < 256; ++i) a[i] = convert((&a_bits[0][0])[i]);
  for (size_t i = 0; i < 128; ++i) b[i] = convert((&b_bits[0][0])[i]);

  using Row [[gnu::vector_size(32)]] = float;
  Row rows[16] = {};
  for (size_t row = 0; row < 16; ++row) {
    for (size_t k = 0; k < 16; ++k) {
      Row b_row;
      __builtin_memcpy(&b_row, &b[k * 8], sizeof b_row);
      rows[row] += a[row * 16 + k] * b_row;
    }
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaOperands*>(lanes[lane])->d;
    for (size_t i = 0; i < 4; ++i) d[i] += rows[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct MatrixOperands {
  const Granule* row;
  uint32_t* r;
};

void load(void* const* lanes) {
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      const auto* source = static_cast<const MatrixOperands*>(lanes[matrix * 8 + lane / 4]);
      static_cast<MatrixOperands*>(lanes[lane])->r[matrix] = (*source->row)[lane % 4];
    }
  }
}

void load_transposed(void* const* lanes) {
  const auto element = [&](size_t matrix, size_t row, size_t column) {
    const auto* source = static_cast<const MatrixOperands*>(lanes[matrix * 8 + row]);
    return (*source->row)[column / 2] >> column % 2 * 16 & 0xffff;
  };
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      const size_t row = lane % 4 * 2, column = lane / 4;
      static_cast<MatrixOperands*>(lanes[lane])->r[matrix] =
          element(matrix, row, column) | element(matrix, row + 1, column) << 16;
    }
  }
}

}  // namespace

void mma_bfloat16(MmaOperands& operands, const char* file, int line) {
  Multiprocessor::here().collect_warp({"mma_m16n8k16", file, line}, &operands,
                                      multiply<from_bfloat16>);
}

void mma_float16(MmaOperands& operands, const char* file, int line) {
  Multiprocessor::here().collect_warp({"mma_m16n8k16", file, line}, &operands,
                                      multiply<from_float16>);
}

void exchange_matrices(const char* what, bool transposed, const Granule& row, uint32_t (&r)[4],
                       const char* file, int line) {
  MatrixOperands operands{&row, r};
  Multiprocessor::here().collect_warp({what, file, line}, &operands,
                                      transposed ? load_transposed : load);
}

}  // namespace gpu_model::detail
