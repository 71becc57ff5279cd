// What a warp does together for mma and ldmatrix: fragments of 32 lanes to matrices and back. The
// layouts are those of the PTX ISA's figures; fragments_test checks them against a GPU's.
#include <bit>

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
  // Lane by lane, then as matrices: row `lane / 4` of A, of D and of B transposed, columns
  // `2 (lane % 4)` and the next, and the same 8 rows or columns further.
  float values[32][12];
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto& [a, b, d] = *static_cast<const MmaOperands*>(lanes[lane]);
    const uint32_t pairs[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    for (size_t i = 0; i < 6; ++i) {
      values[lane][2 * i] = convert(pairs[i] & 0xffff);
      values[lane][2 * i + 1] = convert(pairs[i] >> 16);
    }
  }
  float a[16][16], b[16][8];
  for (size_t lane = 0; lane < 32; ++lane) {
    const size_t group = lane / 4, pair = lane % 4 * 2;
    for (size_t i = 0; i < 8; ++i) {
      a[group + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] = values[lane][i];
    }
    for (size_t i = 0; i < 4; ++i) b[pair + i / 2 * 8 + i % 2][group] = values[lane][8 + i];
  }

  using Row [[gnu::vector_size(16)]] = float;  // half of one
  float d[16][8];
  for (size_t row = 0; row < 16; ++row) {
    Row left = {}, right = {};
    for (size_t k = 0; k < 16; ++k) {
      Row b_left, b_right;
      __builtin_memcpy(&b_left, &b[k][0], sizeof b_left);
      __builtin_memcpy(&b_right, &b[k][4], sizeof b_right);
      left += a[row][k] * b_left;
      right += a[row][k] * b_right;
    }
    __builtin_memcpy(&d[row][0], &left, sizeof left);
    __builtin_memcpy(&d[row][4], &right, sizeof right);
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    float* out = static_cast<MmaOperands*>(lanes[lane])->d;
    for (size_t i = 0; i < 4; ++i) out[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply_bfloat16(void* const* lanes) {
  multiply<from_bfloat16>(lanes);
}

void multiply_float16(void* const* lanes) {
  multiply<from_float16>(lanes);
}

void load_matrices(void* const* lanes) {
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      const auto* source = static_cast<const MatrixOperands*>(lanes[matrix * 8 + lane / 4]);
      static_cast<MatrixOperands*>(lanes[lane])->r[matrix] = source->row[lane % 4];
    }
  }
}

void load_matrices_transposed(void* const* lanes) {
  const auto element = [&](size_t matrix, size_t row, size_t column) {
    const auto* source = static_cast<const MatrixOperands*>(lanes[matrix * 8 + row]);
    return source->row[column / 2] >> column % 2 * 16 & 0xffff;
  };
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t matrix = 0; matrix < 4; ++matrix) {
      const size_t row = lane % 4 * 2, column = lane / 4;
      static_cast<MatrixOperands*>(lanes[lane])->r[matrix] =
          element(matrix, row, column) | element(matrix, row + 1, column) << 16;
    }
  }
}

}  // namespace gpu_model::detail
