// A worked decode: one DeepSeek layer, the same tokens by three routes.
//
//   unabsorbed   every head expands the cache into its own keys and values       double
//   absorbed     the queries go to the latent space instead                      double
//   kernel       absorbed, but the attention core is a stage of the ladder       16 bits
//
// All three get the same hidden states, and each has a cache of its own. The layer is small (256 wide, 4
// heads), but its cache rows have the stages' width: 512 + 64. The derivation is in
// docs/derivation.md, the layer in reference/layers/mla_layer.h.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>

#include "reference/layers/mla_layer.h"
#include "stages/common/stage.h"

namespace {

using mla::MlaForm;
using mla::Status;
using Matrix = mla::MlaMatrix<double>;

constexpr int kPromptTokens = 100;
constexpr int kNewTokens = 32;  // tokens 100 ... 131: the cache grows into its third page

// The two forms are the same function; they differ only by the rounding of doubles.
constexpr double kFormsAgree = 1e-12;
// Three roundings to bf16 (q, cache, out) of up to 2^-9 each, seen through the softmax.
constexpr double kKernelAgrees = 1e-2;

// The attention core on a stage. Everything a kernel asks of its caller is here: 16-bit values, pages
// and the table that finds them, memory on the machine that decodes, and a workspace.
Status decode_on(mla::Machine& machine, const mla::Stage& stage, const mla::CoreCall<double>& call,
                 Matrix* latent) {
  mla::PagedDecode host;
  MLA_RETURN_IF_ERROR(make_paged_decode(call, mla::DType::kBFloat16, &host));

  mla::DeviceBuffer q, kv_cache, block_table, seqlens_k, out, lse, workspace;
  const auto copy = [&machine](const auto& values, mla::DeviceBuffer* buffer) {
    return buffer->assign(machine, values.data(), values.size() * sizeof values[0]);
  };
  MLA_RETURN_IF_ERROR(copy(host.q, &q));
  MLA_RETURN_IF_ERROR(copy(host.kv_cache, &kv_cache));
  MLA_RETURN_IF_ERROR(copy(host.block_table, &block_table));
  MLA_RETURN_IF_ERROR(copy(host.seqlens_k, &seqlens_k));
  MLA_RETURN_IF_ERROR(
      copy(host.out, &out));  // full of NaN: a value that the kernel leaves out shows
  MLA_RETURN_IF_ERROR(copy(host.lse, &lse));
  MLA_RETURN_IF_ERROR(allocate_workspace(stage, host.problem, &workspace));

  const mla::Tensors tensors{.q = q.data(),
                             .kv_cache = kv_cache.data(),
                             .block_table = block_table.as<int32_t>(),
                             .seqlens_k = seqlens_k.as<int32_t>(),
                             .out = out.data(),
                             .lse = lse.as<float>()};
  MLA_RETURN_IF_ERROR(decode(stage, host.problem, tensors, workspace));
  MLA_RETURN_IF_ERROR(machine.synchronize());
  MLA_RETURN_IF_ERROR(machine.copy_to_host(host.out.data(), out.data(), out.bytes()));
  *latent = host.latent<double>();
  return {};
}

// The norm of the difference over that of the expected: one figure for all values of all rows.
double relative_error(const Matrix& actual, const Matrix& expected) {
  return (actual - expected).norm() / expected.norm();
}

Status run(mla::Machine& machine, const mla::Stage& stage, bool* agree) {
  const mla::MlaDims dims{.d_model = 256, .num_heads = 4, .q_lora_rank = 128};
  mla::MlaWeights<double> weights;
  mla::MlaLayer<double> layer;
  MLA_RETURN_IF_ERROR(random_weights(dims, /*seed=*/1, &weights));
  MLA_RETURN_IF_ERROR(mla::MlaLayer<double>::create(dims, std::move(weights), &layer));
  const mla::AttentionCore<double> kernel_core = [&](const auto& call, Matrix* latent) {
    return decode_on(machine, stage, call, latent);
  };

  mla::MlaCache<double> caches[3];
  for (auto& cache : caches) {
    MLA_RETURN_IF_ERROR(mla::MlaCache<double>::create(dims, kPromptTokens + kNewTokens, &cache));
  }
  // Runs all three routes on hidden states x; a prefill and a decode step are the same call.
  Matrix unabsorbed, absorbed, kernel;
  const auto forward = [&](const Matrix& x) -> Status {
    MLA_RETURN_IF_ERROR(layer.forward(MlaForm::kUnabsorbed, x, &caches[0], &unabsorbed));
    MLA_RETURN_IF_ERROR(layer.forward(MlaForm::kAbsorbed, x, &caches[1], &absorbed));
    return layer.forward(kernel_core, x, &caches[2], &kernel);
  };

  std::printf("%d heads, scale %.6f; a prompt of %d tokens, then %d more through %s\n\n",
              dims.num_heads, dims.softmax_scale(), kPromptTokens, kNewTokens, stage.slug.c_str());
  std::printf(
      "           ----- largest value of the output -----   -- norm of difference / norm --\n");
  std::printf("  token     unabsorbed       absorbed       kernel      absorbed          kernel\n");
  *agree = true;
  Matrix x = mla::random_hidden_states<double>(kPromptTokens, dims.d_model, /*seed=*/2);
  for (int step = 0; step <= kNewTokens; ++step) {
    MLA_RETURN_IF_ERROR(forward(x));
    const double forms = relative_error(absorbed, unabsorbed);
    const double kernels = relative_error(kernel, unabsorbed);
    const bool ok = forms < kFormsAgree && kernels < kKernelAgrees;  // false for NaN
    *agree = *agree && ok;

    const Eigen::Index last = x.rows() - 1;
    Eigen::Index largest = 0;  // a value near 0 would differ by a larger share of itself
    unabsorbed.row(last).cwiseAbs().maxCoeff(&largest);
    const std::string token = step == 0 ? "prompt" : std::to_string(caches[0].length() - 1);
    std::printf("%7s  %13.10f  %13.10f  %11.8f  %12.1e  %14.1e%s\n", token.c_str(),
                unabsorbed(last, largest), absorbed(last, largest), kernel(last, largest), forms,
                kernels, ok ? "" : "  DISAGREE");
    // The next hidden state. In a model it would come from the rest of this layer, the other layers
    // and a sampled token. Here it is the residual stream, scaled back to variance 1.
    Matrix next = x.row(last) + unabsorbed.row(last);
    next *= std::sqrt(static_cast<double>(dims.d_model)) / next.norm();
    x = std::move(next);
  }
  std::printf(
      "\nnorm: Euclidean, over all %d values of a token, in the first row over all %d tokens;\n",
      dims.d_model, kPromptTokens);
  std::printf("a single value, most of all one near 0, may differ by a larger share of itself\n");
  std::printf("%s: forms within %.0e of the norm, kernel within %.0e\n",
              *agree ? "agreed" : "DISAGREED", kFormsAgree, kKernelAgrees);
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  std::string slug = "03", machine_name = "model", why_not = "the model is always there";
  CLI::App app("Decodes with one DeepSeek layer: unabsorbed, absorbed, and through a stage.");
  app.add_option("--stage", slug, "Number or name of a stage")->capture_default_str();
  app.add_option("--machine", machine_name, "Where it runs")
      ->check(CLI::IsMember({"model", "gpu"}))
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }

  const bool on_gpu = machine_name == "gpu";
  mla::Machine* machine = on_gpu ? mla::gpu_machine(&why_not) : &mla::model_machine();
  if (machine == nullptr) return std::fprintf(stderr, "no GPU: %s\n", why_not.c_str()), 2;
  const mla::Stage* stage = find_stage(machine->kind(), slug);
  if (stage == nullptr) return std::fprintf(stderr, "there is no stage %s\n", slug.c_str()), 2;

  bool agree = false;
  const Status status = run(*machine, *stage, &agree);
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.to_string().c_str()), 1;
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    return std::fprintf(stderr, "standard output cannot be written\n"), 1;
  }
  return agree ? 0 : 1;
}
