#include "bench/measure/limits.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace mla::bench {

Work work_of(const Problem& problem, int64_t total_tokens) {
  constexpr double kBytesPerElement = 2;
  const auto tokens = static_cast<double>(total_tokens);
  const double query_rows =
      static_cast<double>(problem.batch) * problem.seqlen_q * problem.num_heads_q;
  return {2.0 * problem.seqlen_q * problem.num_heads_q * tokens * (kHeadDimQK + kHeadDimV),
          tokens * problem.num_heads_kv * problem.cache_row_bytes() +
              kBytesPerElement * query_rows * (kHeadDimQK + kHeadDimV)};
}

namespace {

double matrix_rate(const Ceilings& ceilings, Mode mode) {
  return mode == Mode::kCold ? ceilings.matrix_cold : ceilings.matrix_sustained;
}

/// The largest term and its name; a NaN term wins, so that what is unknown stays so.
std::pair<double, const char*> largest(const OwnLimit& limit) {
  std::pair<double, const char*> result{limit.fp32, "fp32"};
  const std::pair<double, const char*> others[] = {
      {limit.matrix, "matrix"}, {limit.shared, "shared"}, {limit.dram, "DRAM"}};
  for (const auto& term : others) {
    if (std::isnan(result.first)) break;
    if (!(term.first <= result.first)) result = term;
  }
  return result;
}

}  // namespace

Floor floor_of(const Work& work, const Ceilings& ceilings, Mode mode) {
  return {work.bytes / ceilings.read, work.flop / matrix_rate(ceilings, mode), ceilings.launch};
}

double Floor::seconds() const {
  if (std::isnan(memory) || std::isnan(launch + matrix)) return kUnknown;
  return std::max(memory, launch + matrix);
}

Floor::Bound Floor::bound() const {
  if (std::isnan(seconds())) return Bound::kNone;
  if (memory > launch + matrix) return Bound::kMemory;
  return launch > matrix ? Bound::kLaunch : Bound::kMatrix;
}

double Floor::lead() const {
  return seconds() / std::min(memory, launch + matrix);
}

OwnLimit own_limit(const Prediction& prediction, const Work& work, const Ceilings& ceilings,
                   Mode mode) {
  const auto term = [&](double amount, double rate) {
    return amount == 0 ? 0.0 : ceilings.launch + amount / rate / prediction.busy_fraction;
  };
  return {term(prediction.fp32_flop, ceilings.fp32),
          term(prediction.matrix_flop, matrix_rate(ceilings, mode)),
          term(prediction.shared_bytes, ceilings.shared),
          std::max(prediction.dram_bytes, work.bytes) / ceilings.read};
}

double OwnLimit::seconds() const {
  return largest(*this).first;
}
const char* OwnLimit::name() const {
  return largest(*this).second;
}

}  // namespace mla::bench
