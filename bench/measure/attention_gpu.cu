// The layers of attention_layer.h on a GPU: every product by cuBLAS, the softmax by a kernel between
// two of them, scores in global memory. It is the traditional way, whatever the form.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "bench/measure/attention_layer.h"
#include "bench/measure/cublas.h"
#include "bench/measure/layer_draws.h"
#include "bench/measure/over_block.cuh"

namespace mla::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMostScoreBytes = int64_t{2} << 30;
constexpr unsigned kMostBlocks = 1u << 20;  // of kernels whose threads walk in steps

unsigned grid_for(int64_t threads) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMostBlocks));
}

/// values [count], as drawn_value() has them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    draw(int buffer, double unit, int64_t count, T* values) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    const double value = unit * drawn_number(buffer, i);
    if constexpr (sizeof(T) == sizeof(double)) {
      values[i] = value;
    } else {
      values[i] = static_cast<T>(static_cast<float>(value));  // exact
    }
  }
}

/// to [rows, columns] = from, a row every to_row and from_row values. A warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int columns) {
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp; row < rows;
       row += step) {
    for (int i = static_cast<int>(threadIdx.x % kWarp); i < columns; i += kWarp) {
      to[row * to_row + i] = from[row * from_row + i];
    }
  }
}

/// Rows of scores, and which tokens they see.
struct ScoreRows {
  int64_t rows;            ///< Of a matrix
  int64_t rows_per_query;  ///< Heads in a matrix
  int64_t first_query;     ///< Of the chunk
  int64_t queries, tokens;
  int64_t row;  ///< From a row of scores to the next
  bool causal;
  double scale;
};

/// P = softmax(mask(scale S)). A block per row. scores, weights: [matrices, rows, row]
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) softmax(ScoreRows of, const S* scores, T* weights) {
  const int64_t row = blockIdx.x;
  const int64_t query = of.first_query + row % of.rows / of.rows_per_query;
  const int64_t hidden = of.causal ? of.queries - 1 - query : 0;
  const int64_t visible = max(of.tokens - hidden, int64_t{0});
  const S scale = static_cast<S>(of.scale);
  scores += row * of.row;
  weights += row * of.row;

  S largest = -INFINITY;
  for (int64_t t = threadIdx.x; t < visible; t += kThreads) largest = max(largest, scores[t]);
  largest = over_block<kThreads>(largest, [](S a, S b) { return max(a, b); });
  S sum = 0;
  for (int64_t t = threadIdx.x; t < visible; t += kThreads) {
    sum += exp(scale * (scores[t] - largest));
  }
  sum = over_block<kThreads>(sum, [](S a, S b) { return a + b; });
  for (int64_t t = threadIdx.x; t < of.tokens; t += kThreads) {
    const S weight = t < visible ? exp(scale * (scores[t] - largest)) / sum : S{0};
    weights[t] = static_cast<T>(weight);
  }
}

/// Loaded once and never unloaded: its kernels may be in graphs.
Cublas& cublas() {
  static Cublas& library = *new Cublas;
  return library;
}

Status load_cublas() {
  static const Status loaded = cublas().load();
  return loaded;
}

template <typename T>
constexpr Cublas::Type kTypeOf = Cublas::Type::kFp64;
template <>
constexpr Cublas::Type kTypeOf<float> = Cublas::Type::kFp32;
template <>
constexpr Cublas::Type kTypeOf<__half> = Cublas::Type::kFp16;
template <>
constexpr Cublas::Type kTypeOf<__nv_bfloat16> = Cublas::Type::kBf16;

double to_double(double value) {
  return value;
}
double to_double(__half value) {
  return static_cast<double>(__half2float(value));
}
double to_double(__nv_bfloat16 value) {
  return static_cast<double>(__bfloat162float(value));
}

/// T: the layer's type, S: that of scores.
template <typename T, typename S>
class GpuLayer final : public LayerRunner {
 public:
  GpuLayer(Machine& machine, LayerPlan plan)
      : machine_(machine), plan_(std::move(plan)), matrices_(core_matrices(plan_.core())) {
    const LayerCore& core = plan_.core();
    score_row_ = (core.tokens + 7) / 8 * 8;  // cuBLAS is fast where rows begin at 16 bytes
    const int64_t row_bytes = score_row_ * int64_t{sizeof(S)};
    const int64_t most_rows = std::max<int64_t>(kMostScoreBytes / row_bytes, 1);
    chunk_ = std::clamp<int64_t>(most_rows / matrices_.rows_per_query, 1, core.chunk);
    at_once_ = std::clamp<int64_t>(most_rows / (chunk_ * matrices_.rows_per_query), 1, count());
  }

  Status allocate() {
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
      const LayerBuffer& one = plan_.buffers[i];
      MLA_RETURN_IF_ERROR(
          data_.emplace_back().allocate(machine_, static_cast<size_t>(one.elements) * sizeof(T)));
      if (one.kind == LayerBuffer::Kind::kActivation) continue;
      draw<T><<<grid_for(one.elements), kThreads>>>(
          static_cast<int>(i), std::ldexp(1.0, one.exponent), one.elements, data_[i].as<T>());
      MLA_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "draw"));
    }
    MLA_RETURN_IF_ERROR(scores_.allocate(machine_, score_elements() * sizeof(S)));
    MLA_RETURN_IF_ERROR(weights_.allocate(machine_, score_elements() * sizeof(T)));
    MLA_RETURN_IF_ERROR(place_matrices());
    return machine_.synchronize();  // streams that do not wait for the default one come next
  }

  Status run(std::optional<LayerPart> part, Stream stream) override {
    for (const LayerOperation& one : plan_.operations) {
      if (part && one.part != *part) continue;
      const auto perform_it = [&](const auto& what) {
        return perform(what, static_cast<cudaStream_t>(stream));
      };
      MLA_RETURN_IF_ERROR(std::visit(perform_it, one.what));
    }
    return {};
  }

  Status poison() override {
    for (size_t i = 0; i < data_.size(); ++i) {
      if (plan_.buffers[i].kind != LayerBuffer::Kind::kActivation) continue;
      MLA_RETURN_IF_ERROR(machine_.fill(data_[i].data(), 0xff, data_[i].bytes()));
    }
    MLA_RETURN_IF_ERROR(machine_.fill(scores_.data(), 0xff, scores_.bytes()));
    MLA_RETURN_IF_ERROR(machine_.fill(weights_.data(), 0xff, weights_.bytes()));
    return machine_.synchronize();
  }

  Status result(std::vector<double>* y) override {
    MLA_RETURN_IF_ERROR(machine_.synchronize());
    const DeviceBuffer& buffer = data_[static_cast<size_t>(plan_.y)];
    std::vector<T> values(buffer.bytes() / sizeof(T));
    MLA_RETURN_IF_ERROR(machine_.copy_to_host(values.data(), buffer.data(), buffer.bytes()));
    y->resize(values.size());
    std::transform(values.begin(), values.end(), y->begin(),
                   [](T value) { return to_double(value); });
    return {};
  }

  double score_bytes() const override { return double(score_elements()) * (sizeof(S) + sizeof(T)); }

 private:
  int64_t count() const { return static_cast<int64_t>(matrices_.places.size()); }
  int64_t chunk_rows() const { return chunk_ * matrices_.rows_per_query; }
  size_t score_elements() const {
    return static_cast<size_t>(at_once_ * chunk_rows() * score_row_);
  }

  T* place(const LayerView& view, int64_t at) const {
    return data_[static_cast<size_t>(view.buffer)].as<T>() + at;
  }

  // Row-major matrices are cuBLAS's transposed: out^T = weight^T in^T.
  Status perform(const LayerProduct& one, cudaStream_t stream) {
    return cublas().multiply_batched(
        kTypeOf<T>, kTypeOf<T>, {one.n, one.rows, one.k}, /*transpose_a=*/false,
        {place(one.weight, one.weight.at), one.weight.row, one.weight.step},
        {place(one.in, one.in.at), one.in.row, one.in.step},
        {place(one.out, one.out.at), one.out.row, one.out.step}, static_cast<int>(one.count),
        stream);
  }

  Status perform(const LayerCopy& one, cudaStream_t stream) {
    copy_rows<T><<<grid_for(one.rows * kWarp), kThreads, 0, stream>>>(
        place(one.from, one.from.at), one.from.row, place(one.to, one.to.at), one.to.row, one.rows,
        static_cast<int>(one.columns));
    return cuda_status(cudaGetLastError(), "copy_rows");
  }

  Status perform(const LayerCore& core, cudaStream_t stream) {
    for (int64_t query = 0; query < core.queries; query += chunk_) {
      const int64_t rows = std::min(chunk_, core.queries - query) * matrices_.rows_per_query;
      for (int64_t first = 0; first < count(); first += at_once_) {
        const int64_t end = std::min(first + at_once_, count());
        const ScoreRows score_rows{rows,        matrices_.rows_per_query,
                                   query,       core.queries,
                                   core.tokens, score_row_,
                                   core.causal, core.scale};
        MLA_RETURN_IF_ERROR(multiply(core, query, first, end, rows, /*values=*/false, stream));
        softmax<T, S><<<static_cast<unsigned>((end - first) * rows), kThreads, 0, stream>>>(
            score_rows, scores_.as<S>(), weights_.as<T>());
        MLA_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "softmax"));
        MLA_RETURN_IF_ERROR(multiply(core, query, first, end, rows, /*values=*/true, stream));
      }
    }
    return {};
  }

  /// S = Q K^T, or O = P V, of matrices first ... end. Many query rows: in runs of equal steps, for which
  /// cuBLAS has its fastest kernels. One query: at once, wherever they lie.
  Status multiply(const LayerCore& core, int64_t query, int64_t first, int64_t end, int64_t rows,
                  bool values, cudaStream_t stream) {
    const int64_t run = run_from(first, end);
    if (run < end && core.queries == 1) {
      return multiply_anywhere(core, first, end, rows, values, stream);
    }
    for (int64_t i = first; i < end;) {
      const int64_t next = run_from(i, end);
      MLA_RETURN_IF_ERROR(multiply_run(core, query, first, i, next, rows, values, stream));
      i = next;
    }
    return {};
  }

  using Places = CoreMatrices::Places;
  static Places step(const Places& a, const Places& b) {
    return {b.q - a.q, b.k - a.k, b.v - a.v, b.out - a.out};
  }
  const Places& places(int64_t i) const { return matrices_.places[static_cast<size_t>(i)]; }
  Places step_from(int64_t i, int64_t end) const {
    return i + 1 < end ? step(places(i), places(i + 1)) : Places{};
  }

  /// The end of the matrices from `first` on that are equally far apart.
  int64_t run_from(int64_t first, int64_t end) const {
    const Places apart = step_from(first, end);
    int64_t i = first + 1;
    for (; i < end; ++i) {
      const Places one = step(places(i - 1), places(i));
      if (one.q != apart.q || one.k != apart.k || one.v != apart.v || one.out != apart.out) break;
    }
    return i;
  }

  /// Matrices i ... end, of a group that begins with `first`.
  Status multiply_run(const LayerCore& core, int64_t query, int64_t first, int64_t i, int64_t end,
                      int64_t rows, bool values, cudaStream_t stream) {
    const Places apart = step_from(i, end);
    const int64_t row = query * matrices_.rows_per_query, area = rows * score_row_;
    const int64_t score = (i - first) * area;
    const auto number = static_cast<int>(end - i);
    if (!values) {
      return cublas().multiply_batched(
          kTypeOf<T>, kTypeOf<S>, {core.tokens, rows, core.d_qk}, /*transpose_a=*/true,
          {place(core.k, places(i).k), core.k.row, apart.k},
          {place(core.q, places(i).q + row * matrices_.q_row), matrices_.q_row, apart.q},
          {scores_.as<S>() + score, score_row_, area}, number, stream);
    }
    return cublas().multiply_batched(
        kTypeOf<T>, kTypeOf<T>, {core.d_v, rows, core.tokens}, /*transpose_a=*/false,
        {place(core.v, places(i).v), core.v.row, apart.v},
        {weights_.as<T>() + score, score_row_, area},
        {place(core.out, places(i).out + row * matrices_.out_row), matrices_.out_row, apart.out},
        number, stream);
  }

  /// The addresses of all matrices, for one query: q, k, v, out, then scores and weights of a group.
  Status place_matrices() {
    const LayerCore& core = plan_.core();
    std::vector<void*> all;
    for (int64_t i = 0; i < count(); ++i) all.push_back(place(core.q, places(i).q));
    for (int64_t i = 0; i < count(); ++i) all.push_back(place(core.k, places(i).k));
    for (int64_t i = 0; i < count(); ++i) all.push_back(place(core.v, places(i).v));
    for (int64_t i = 0; i < count(); ++i) all.push_back(place(core.out, places(i).out));
    const int64_t area = chunk_rows() * score_row_;
    for (int64_t i = 0; i < at_once_; ++i) all.push_back(scores_.as<S>() + i * area);
    for (int64_t i = 0; i < at_once_; ++i) all.push_back(weights_.as<T>() + i * area);
    return addresses_.assign(machine_, all.data(), all.size() * sizeof(void*));
  }

  Status multiply_anywhere(const LayerCore& core, int64_t first, int64_t end, int64_t rows,
                           bool values, cudaStream_t stream) {
    void* const* all = addresses_.as<void*>();
    void* const* const scores = all + 4 * count();
    void* const* const weights = scores + at_once_;
    const auto number = static_cast<int>(end - first);
    if (!values) {
      return cublas().multiply_each(kTypeOf<T>, kTypeOf<S>, {core.tokens, rows, core.d_qk},
                                    /*transpose_a=*/true, {all + count() + first, core.k.row},
                                    {all + first, matrices_.q_row}, {scores, score_row_}, number,
                                    stream);
    }
    return cublas().multiply_each(kTypeOf<T>, kTypeOf<T>, {core.d_v, rows, core.tokens},
                                  /*transpose_a=*/false, {all + 2 * count() + first, core.v.row},
                                  {weights, score_row_},
                                  {all + 3 * count() + first, matrices_.out_row}, number, stream);
  }

  Machine& machine_;
  const LayerPlan plan_;
  const CoreMatrices matrices_;
  int64_t score_row_ = 0;
  int64_t chunk_ = 1;    ///< Queries
  int64_t at_once_ = 1;  ///< Matrices whose scores exist together
  std::vector<DeviceBuffer> data_;
  DeviceBuffer scores_, weights_, addresses_;
};

template <typename T, typename S>
Status make(const LayerPlan& plan, std::unique_ptr<LayerRunner>* runner) {
  std::string why_not;
  Machine* machine = gpu_machine(&why_not);
  if (machine == nullptr) return {StatusCode::kUnavailable, why_not};
  MLA_RETURN_IF_ERROR(load_cublas());
  auto layer = std::make_unique<GpuLayer<T, S>>(*machine, plan);
  MLA_RETURN_IF_ERROR(layer->allocate());
  *runner = std::move(layer);
  return {};
}

}  // namespace

Status make_gpu_layer(const LayerPlan& plan, Element element,
                      std::unique_ptr<LayerRunner>* runner) {
  switch (element) {
    case Element::kBf16:
      return make<__nv_bfloat16, float>(plan, runner);
    case Element::kFp16:
      return make<__half, float>(plan, runner);
    case Element::kFp64:
      return make<double, double>(plan, runner);
    case Element::kFp32:
      break;
  }
  return {StatusCode::kInvalidArgument, "the GPU's layers are bf16, fp16 and fp64, not fp32"};
}

}  // namespace mla::bench
