// The fields:
//
//   stages      slug, idea and the cache formats that it reads, of each
//   suites      name, what it is for, `measure` (times, energy, plans, errors), names of its shapes
//   shapes      by name, each with
//     h_q h_kv s_q b k    sizes; k is the number in the name: the length, the mean, the longest, ...
//     lengths             how they are spelled: equal, lognormal, stepped, skew, varied, listed
//     seqlens_k           the b lengths themselves; tokens is their sum, longest their maximum
//     causal dtype        bool; "bf16" or "fp16"
//     cache_format        "16bit", or how the cache is quantised; cache_scale of fp8_tensor, else null
//     split peak          tokens per piece in batch-invariant mode; deviation of the logits; 0: none
//     softmax_scale
//     title               in words
//     flop bytes          what a decode must do: 2 s_q h_q tokens (576 + 512), a causal mask not
//                         deducted; every cache row, q and out once
//     measure suites      what is done with it; the suites that have it
//   protocol    bench/measure/protocol.h and truth.h. Times are us, `_s` seconds. run_counts are
//               classes by time, in order: the first whose below_us is larger counts; null: no limit
//   tolerances  reference/testing/compare.h, of out and of lse; row_cos null: rows are not compared
#include "bench/measure/catalogue.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "bench/measure/limits.h"
#include "bench/measure/protocol.h"
#include "bench/measure/truth.h"
#include "stages/common/stage.h"

namespace mla::bench {
namespace {

using Json = nlohmann::ordered_json;

Json finite(double value) {
  return std::isfinite(value) ? Json(value) : Json();
}

Json describe_shape(const Shape& shape) {
  const DecodeCase& spec = shape.spec;
  const DataSet data = make_data_set(spec);
  const Work work = work_of(data.problem, data.total_tokens());
  Json names = Json::array();
  for (const Suite& suite : suites()) {
    if (std::count(suite.shapes.begin(), suite.shapes.end(), shape.name)) names += suite.name;
  }
  const auto longest = std::max_element(data.seqlens_k.begin(), data.seqlens_k.end());
  return {{"h_q", spec.num_heads_q},
          {"h_kv", spec.num_heads_kv},
          {"s_q", spec.seqlen_q},
          {"b", spec.batch},
          {"k", spec.seqlen_k},
          {"lengths", to_string(shape.lengths)},
          {"seqlens_k", data.seqlens_k},
          {"tokens", data.total_tokens()},
          {"longest", longest == data.seqlens_k.end() ? 0 : *longest},
          {"causal", spec.causal},
          {"split", spec.fixed_split_tokens},
          {"peak", shape.peak},
          {"dtype", mla::to_string(spec.dtype)},
          {"cache_format", mla::to_string(spec.cache_format)},
          {"cache_scale",
           spec.cache_format == CacheFormat::kFp8Tensor ? Json(data.problem.cache_scale) : Json()},
          {"softmax_scale", data.problem.softmax_scale},
          {"title", shape.title()},
          {"flop", work.flop},
          {"bytes", work.bytes},
          {"measure", to_string(shape.measure)},
          {"suites", names}};
}

Json describe_protocol() {
  Json classes = Json::array();
  for (const auto& [below_us, counts] : kGpuRunClasses) {
    classes += {{"below_us", finite(below_us)},
                {"warmups", counts.warmups},
                {"rounds", counts.rounds},
                {"runs", counts.runs}};
  }
  return {{"run_counts", classes},
          {"flush_bytes", kFlushBytes},
          {"rest_ms", kRest.count()},
          {"rest_above_us", kRestMicroseconds},
          {"once_us", kOnceMicroseconds},
          {"leave_out_us", kLeaveOutMicroseconds},
          {"short_warmup_s", Stage{}.sustained_warmup_s},
          {"long_warmup_s", kTensorCoreWarmup},
          {"whole_check_flop", kWholeCheckFlop},
          {"checked_rows", kCheckedRows}};
}

Json describe_tolerance(const Tolerance& tolerance) {
  return {{"abs", tolerance.abs_tol},
          {"rel", tolerance.rel_tol},
          {"cos", tolerance.cos_tol},
          {"row_cos", finite(tolerance.row_cos_tol)}};
}

}  // namespace

std::string catalogue(MachineKind machine, const std::vector<Shape>& shapes) {
  Json all{
      {"schema", "flashmla_stages/catalogue/1"},
      {"stages", Json::array()},
      {"suites", Json::array()},
      {"shapes", Json::object()},
      {"protocol", describe_protocol()},
      {"tolerances",
       {{"out", describe_tolerance(kOutTolerance)}, {"lse", describe_tolerance(kLseTolerance)}}}};
  for (const Stage& stage : stages(machine)) {
    Json formats = Json::array();
    for (const CacheFormat format : stage.cache_formats) formats += mla::to_string(format);
    all["stages"] += {{"slug", stage.slug}, {"idea", stage.idea}, {"cache_formats", formats}};
  }
  for (const Suite& suite : suites()) {
    all["suites"] += {{"name", suite.name},
                      {"what", suite.what},
                      {"measure", to_string(suite.measure)},
                      {"shapes", suite.shapes}};
  }
  for (const Shape& shape : shapes) all["shapes"][shape.name] = describe_shape(shape);
  return all.dump() + "\n";
}

}  // namespace mla::bench
