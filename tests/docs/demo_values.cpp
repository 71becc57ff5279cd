// Prints as JSON what the pages of docs/demos are compared with. On standard input: {"requests": [{"bytes": 16,
// "addresses": [...]}], "plans": [...], "walks": [...]}. Requests are accesses of a warp to shared memory, whose passes are
// counted as the GPU model counts them; plans are settings of plans; walks are descriptors.
#include <array>
#include <bit>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "reference/gpu_model/counters.h"
#include "reference/gpu_model/ptx.h"
#include "reference/lse_merge.h"
#include "reference/testing/hopper_fragments.h"
#include "stages/common/machine/machine.h"
#include "stages/common/split/plan.h"

namespace mla {
namespace model {
Status dump_box(const void* rows_gmem, uint32_t* out, int row_bytes);
}

namespace {

// JSON has no infinity.
nlohmann::json number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
}

// result[place] says which chunk lies there: row * (chunks per row) + chunk.
Status places(int row_bytes, nlohmann::json& result) {
  const int chunks = 64 * row_bytes / 16;
  std::vector<uint32_t> rows(chunks * 4), box(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint32_t>(i / 4);
  Machine& machine = model_machine();
  DeviceBuffer in, out;
  MLA_RETURN_IF_ERROR(in.assign(machine, rows.data(), rows.size() * 4));
  MLA_RETURN_IF_ERROR(out.allocate(machine, rows.size() * 4));
  MLA_RETURN_IF_ERROR(model::dump_box(in.data(), out.as<uint32_t>(), row_bytes));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  MLA_RETURN_IF_ERROR(machine.copy_to_host(box.data(), out.data(), out.bytes()));
  for (int i = 0; i < chunks; ++i) result.push_back(box[i * 4]);
  return {};
}

unsigned passes(const nlohmann::json& access) {
  gpu_model::detail::Request request;
  request.bytes = access["bytes"];
  request.address.fill(0);
  for (size_t lane = 0; lane < access["addresses"].size(); ++lane) {
    request.lanes |= 1u << lane;
    request.address.at(lane) = access["addresses"][lane];
  }
  return gpu_model::detail::count_wavefronts(request, gpu_model::AccessKind::kStore).taken;
}

// result[worker][piece]: sequence, first grain, end, slot.
nlohmann::json pieces(const nlohmann::json& settings) {
  const std::vector<int32_t> lengths = settings["lengths"];
  Problem problem;
  problem.batch = static_cast<int>(lengths.size());
  problem.max_pages_per_seq = 1 << 20;
  problem.fixed_split_tokens = settings["split"];
  PlanShape shape;
  shape.workers = settings["workers"];
  shape.fixed_grains = settings["fixed"];
  shape.min_grains = settings["min"];
  shape.combine_grains = settings["combine"];
  auto result = nlohmann::json::array();
  for (const auto& worker : pieces_of(make_plan_on_host(problem, shape, lengths))) {
    auto own = nlohmann::json::array();
    for (const Piece& piece : worker) {
      own.push_back({piece.sequence, piece.grain_begin, piece.grain_end, piece.slot});
    }
    result.push_back(own);
  }
  return result;
}

// fp16 of a whole number up to 2048.
uint16_t half(unsigned value) {
  return std::bit_cast<uint16_t>(float16(static_cast<float>(value)));
}

// The elements of wgmma's operands are whole numbers below this base, which fp16 holds exactly; larger numbers are made of
// several digits.
constexpr unsigned kBase = 2048;

// result[thread][register] of D = A B: where in B's image each number comes from, in elements. A is the unit matrix, repeated.
// A walk has "operand", "k" or "mn", "begin", "lbo", "sbo".
Status walked(const nlohmann::json& walk, nlohmann::json& result) {
  const bool transposed = walk["operand"] == "mn";
  const auto form = transposed ? WgmmaForm::kM64N256 : WgmmaForm::kM64N64;
  auto input = std::make_unique<WgmmaInput>();
  input->steps = 1;
  input->a = {0, 1024, {0}};
  input->b = {walk["lbo"], walk["sbo"], {walk["begin"]}};
  auto* a = reinterpret_cast<uint16_t*>(input->a_smem);
  for (int row = 0; row < 64; ++row) {  // in chunk (k / 8) ^ (row % 8) of its row
    const int k = row % 16;
    a[row * 64 + (k / 8 ^ row % 8) * 8 + k % 8] = half(1);
  }
  auto* b = reinterpret_cast<uint16_t*>(input->b_smem);
  auto output = std::make_unique<WgmmaOutput[]>(2);
  Machine& machine = model_machine();
  for (int digit = 0; digit < 2; ++digit) {
    for (unsigned i = 0; i < kWgmmaBBytes / 2; ++i) b[i] = half(digit == 0 ? i % kBase : i / kBase);
    DeviceBuffer in, out;
    MLA_RETURN_IF_ERROR(in.assign(machine, input.get(), sizeof *input));
    MLA_RETURN_IF_ERROR(out.allocate(machine, sizeof(WgmmaOutput)));
    MLA_RETURN_IF_ERROR(model::hopper_fragments().wgmma(form, DType::kFloat16, in.as<WgmmaInput>(),
                                                        1, out.as<WgmmaOutput>()));
    MLA_RETURN_IF_ERROR(machine.copy_to_host(&output[digit], out.data(), sizeof(WgmmaOutput)));
  }
  for (size_t thread = 0; thread < 128; ++thread) {
    auto own = nlohmann::json::array();
    for (size_t i = 0; i < columns_of(form) / 2; ++i) {
      own.push_back(output[0][thread][i] + kBase * output[1][thread][i]);
    }
    result.push_back(own);
  }
  return {};
}

// result[thread][register] of D = A B with A in registers: half h of register i of a thread is 8 thread + 2 i + h. B is the
// unit matrix, so columns 0 ... 15 of D are A.
Status a_in_registers(nlohmann::json& result) {
  auto input = std::make_unique<WgmmaInput>();
  input->steps = 1;
  input->b = {8192, 1024, {0}};
  for (unsigned thread = 0; thread < 128; ++thread) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned low = 8 * thread + 2 * i;
      input->a_registers[0][thread][i] = half(low) | uint32_t{half(low + 1)} << 16;
    }
  }
  auto* b = reinterpret_cast<uint16_t*>(input->b_smem);
  for (int k = 0; k < 16; ++k) b[k * 64 + (k / 8 ^ k % 8) * 8 + k % 8] = half(1);
  Machine& machine = model_machine();
  DeviceBuffer in, out;
  auto output = std::make_unique<WgmmaOutput[]>(1);
  MLA_RETURN_IF_ERROR(in.assign(machine, input.get(), sizeof *input));
  MLA_RETURN_IF_ERROR(out.allocate(machine, sizeof(WgmmaOutput)));
  MLA_RETURN_IF_ERROR(model::hopper_fragments().wgmma(
      WgmmaForm::kM64N256Register, DType::kFloat16, in.as<WgmmaInput>(), 1, out.as<WgmmaOutput>()));
  MLA_RETURN_IF_ERROR(machine.copy_to_host(output.get(), out.data(), sizeof(WgmmaOutput)));
  for (size_t thread = 0; thread < 128; ++thread) {
    result.push_back(std::vector<float>(output[0][thread], output[0][thread] + 8));
  }
  return {};
}

// Where elements are in registers: {"mma_a": [[lane, register, half, row, column]], ...}.
nlohmann::json fragments() {
  using namespace gpu_model::detail;
  nlohmann::json result;
  std::array<MmaOperands, 32> operands;
  std::array<void*, 32> lanes;
  for (size_t i = 0; i < 32; ++i) lanes[i] = &operands[i];
  // One element of A and one of B are 1, all others 0. Where their k is the same they meet, and one register of D is not 0.
  const auto meet = [&](int a, int b) {
    operands = {};
    operands[size_t(a) / 8].a[a / 2 % 4] = uint32_t{half(1)} << a % 2 * 16;
    operands[size_t(b) / 4].b[b / 2 % 2] = uint32_t{half(1)} << b % 2 * 16;
    multiply_float16(lanes.data());
    for (int i = 0; i < 128; ++i) {
      if (operands[size_t(i) / 4].d[i % 4] != 0) return i;
    }
    return -1;
  };
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 128; ++b) {
      if (const int d = meet(a, b); d >= 0) result["mma"].push_back({a, b, d});
    }
  }
  // Each of the 32 lanes gives the address of a row. Element (row, column) is 8 row + column.
  std::array<MatrixOperands, 32> rows;
  std::array<std::array<uint32_t, 4>, 32> registers;
  for (unsigned i = 0; i < 32; ++i) {
    lanes[i] = &rows[i];
    rows[i].r = registers[i].data();
    for (unsigned j = 0; j < 4; ++j) rows[i].row[j] = (8 * i + 2 * j) | (8 * i + 2 * j + 1) << 16;
  }
  load_matrices(lanes.data());
  result["ldmatrix"] = registers;
  load_matrices_transposed(lanes.data());
  result["ldmatrix_trans"] = registers;
  return result;
}

int run() {
  nlohmann::json result;
  const double values[] = {0,   1,    -3,       std::log(10.0), std::log(36.0),
                           700, -700, INFINITY, -INFINITY,      NAN};
  for (double a : values) {
    for (double b : values) {
      const LseMerge<double> merged = merge_lse(a, b);
      result["merge"].push_back({number(a), number(b), number(merged.weight_a),
                                 number(merged.weight_b), number(merged.lse)});
    }
  }
  for (int row_bytes : {128, 64}) {
    const Status status = places(row_bytes, result["places"][std::to_string(row_bytes)]);
    if (!status.ok()) {
      std::cerr << status.message() << "\n";
      return 1;
    }
  }
  const auto input = nlohmann::json::parse(std::cin);
  for (const auto& request : input["requests"]) {
    result["passes"].push_back(passes(request));
  }
  for (const auto& settings : input["plans"]) result["plans"].push_back(pieces(settings));
  result["fragments"] = fragments();
  Status status = a_in_registers(result["wgmma_a"]);
  for (const auto& walk : input["walks"]) {
    if (status.ok()) status = walked(walk, result["walks"].emplace_back());
  }
  if (!status.ok()) {
    std::cerr << status.message() << "\n";
    return 1;
  }
  std::cout << result << "\n";
  return 0;
}

}  // namespace
}  // namespace mla

int main() {
  return mla::run();
}
