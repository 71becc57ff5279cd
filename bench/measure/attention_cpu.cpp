#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <thread>

#include "bench/measure/attention_layer.h"
#include "reference/parallel_for.h"

namespace mla::bench {
namespace {

template <typename T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <typename T>
using MatrixMap = Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>>;

/// Draws handed to a thread at a time.
constexpr int64_t kDrawsAtATime = 1 << 18;
/// Rows of a product handed to a thread at a time, at least.
constexpr int64_t kLeastRows = 64;

template <typename T>
class CpuLayer final : public LayerRunner {
 public:
  CpuLayer(LayerPlan plan, int num_threads)
      : plan_(std::move(plan)),
        threads_(num_threads > 0 ? num_threads
                                 : std::max(1, int(std::thread::hardware_concurrency()))) {
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
      data_.emplace_back(static_cast<size_t>(plan_.buffers[i].elements));
      if (plan_.buffers[i].kind != LayerBuffer::Kind::kActivation) draw(static_cast<int>(i));
    }
    const LayerCore& core = plan_.core();
    chunk_ = std::min(core.chunk, (core.queries + threads_ - 1) / threads_);
  }

  Status run(std::optional<LayerPart> part, Stream) override {
    for (const LayerOperation& one : plan_.operations) {
      if (part && one.part != *part) continue;
      std::visit([&](const auto& what) { perform(what); }, one.what);
    }
    return {};
  }

  Status poison() override {
    for (size_t i = 0; i < data_.size(); ++i) {
      if (plan_.buffers[i].kind != LayerBuffer::Kind::kActivation) continue;
      std::fill(data_[i].begin(), data_[i].end(), std::numeric_limits<T>::quiet_NaN());
    }
    return {};
  }

  Status result(std::vector<double>* y) override {
    const std::vector<T>& from = data_[static_cast<size_t>(plan_.y)];
    y->assign(from.begin(), from.end());
    return {};
  }

  double score_bytes() const override {
    const LayerCore& core = plan_.core();
    const CoreMatrices matrices = core_matrices(core);
    const int64_t chunks = (core.queries + chunk_ - 1) / chunk_;
    const auto at_once = std::min<int64_t>(threads_, chunks * int64_t(matrices.places.size()));
    return double(sizeof(T)) * double(at_once) * double(chunk_ * matrices.rows_per_query) *
           double(core.tokens);
  }

 private:
  void draw(int buffer) {
    std::vector<T>& to = data_[static_cast<size_t>(buffer)];
    const auto count = static_cast<int64_t>(to.size());
    parallel_for((count + kDrawsAtATime - 1) / kDrawsAtATime, threads_, [&](int64_t block) {
      const int64_t end = std::min(count, (block + 1) * kDrawsAtATime);
      for (int64_t i = block * kDrawsAtATime; i < end; ++i) {
        to[static_cast<size_t>(i)] = static_cast<T>(drawn_value(plan_, buffer, i));
      }
    });
  }

  MatrixMap<T> map(int buffer, int64_t at, int64_t rows, int64_t columns, int64_t row) {
    return {data_[static_cast<size_t>(buffer)].data() + at, rows, columns,
            Eigen::OuterStride<>(row)};
  }

  void perform(const LayerProduct& one) {
    // Few rows, as in decode: a block is of columns.
    const bool by_rows = one.rows >= threads_ * kLeastRows;
    const int64_t whole = by_rows ? one.rows : one.n;
    const int64_t size =
        std::max(by_rows ? kLeastRows : int64_t{16}, (whole + threads_ - 1) / threads_);
    const int64_t blocks = (whole + size - 1) / size;
    parallel_for(one.count * blocks, threads_, [&](int64_t task) {
      const int64_t i = task / blocks, first = task % blocks * size;
      const int64_t last = std::min(first + size, whole);
      const int64_t row = by_rows ? first : 0, column = by_rows ? 0 : first;
      const int64_t rows = by_rows ? last - first : one.rows;
      const int64_t columns = by_rows ? one.n : last - first;
      map(one.out.buffer, one.out.at + i * one.out.step + row * one.out.row + column, rows, columns,
          one.out.row)
          .noalias() = map(one.in.buffer, one.in.at + i * one.in.step + row * one.in.row, rows,
                           one.k, one.in.row) *
                       map(one.weight.buffer, one.weight.at + i * one.weight.step + column, one.k,
                           columns, one.weight.row);
    });
  }

  void perform(const LayerCopy& one) {
    map(one.to.buffer, one.to.at, one.rows, one.columns, one.to.row) =
        map(one.from.buffer, one.from.at, one.rows, one.columns, one.from.row);
  }

  void perform(const LayerCore& core) {
    const CoreMatrices matrices = core_matrices(core);
    const int64_t chunks = (core.queries + chunk_ - 1) / chunk_;
    parallel_for(chunks * int64_t(matrices.places.size()), threads_, [&](int64_t task) {
      const auto& places = matrices.places[static_cast<size_t>(task / chunks)];
      const int64_t query = task % chunks * chunk_;
      const int64_t first = query * matrices.rows_per_query;
      const int64_t rows = std::min(chunk_, core.queries - query) * matrices.rows_per_query;
      const auto q =
          map(core.q.buffer, places.q + first * matrices.q_row, rows, core.d_qk, matrices.q_row);
      const auto k = map(core.k.buffer, places.k, core.tokens, core.d_qk, core.k.row);
      const auto v = map(core.v.buffer, places.v, core.tokens, core.d_v, core.v.row);
      Matrix<T> scores(rows, core.tokens);
      scores.noalias() = q * k.transpose();
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t of = query + row / matrices.rows_per_query;
        const int64_t hidden = core.causal ? core.queries - 1 - of : 0;
        const int64_t visible = std::max<int64_t>(core.tokens - hidden, 0);
        scores.row(row).tail(core.tokens - visible).setZero();
        if (visible == 0) continue;
        auto seen = scores.row(row).head(visible);
        const T largest = seen.maxCoeff();
        seen = ((seen.array() - largest) * static_cast<T>(core.scale)).exp();
        seen /= seen.sum();
      }
      map(core.out.buffer, places.out + first * matrices.out_row, rows, core.d_v, matrices.out_row)
          .noalias() = scores * v;
    });
  }

  LayerPlan plan_;
  int64_t threads_;
  int64_t chunk_ = 1;  ///< Queries; so that each thread has a chunk
  std::vector<std::vector<T>> data_;
};

}  // namespace

Status make_cpu_layer(const LayerPlan& plan, Element element, int num_threads,
                      std::unique_ptr<LayerRunner>* runner) {
  if (element != Element::kFp32 && element != Element::kFp64) {
    return {StatusCode::kInvalidArgument,
            std::string("the CPU's layers are fp32 and fp64, not ") + to_string(element)};
  }
  try {
    if (element == Element::kFp32) {
      *runner = std::make_unique<CpuLayer<float>>(plan, num_threads);
    } else {
      *runner = std::make_unique<CpuLayer<double>>(plan, num_threads);
    }
  } catch (const std::bad_alloc&) {
    return {StatusCode::kOutOfMemory, "the host has not enough memory for the layer"};
  }
  return {};
}

}  // namespace mla::bench
