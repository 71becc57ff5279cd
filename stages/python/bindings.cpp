/// @file
/// What the Python package mla_stages calls, through tvm-ffi: decode and its plan, the reference, the paged
/// cache, quantising, the chooser, the GPU model's schedule and recordings. Tensors come as DLPack views of the caller's; nothing is copied, and
/// an argument that breaks the contract raises an exception that names it. docs/python.md is the page
/// for users.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "reference/attention.h"
#include "reference/gpu_model/gpu_model.h"
#include "reference/gpu_model/recording.h"
#include "reference/quantise.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/cache/paging_check.h"
#include "stages/common/choose/choose.h"
#include "stages/common/split/plan.h"
#include "stages/common/stage.h"

#ifdef MLA_HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

namespace ffi = tvm::ffi;
using ffi::TensorView;
using MaybeTensor = ffi::Optional<TensorView>;
using Dict = ffi::Map<ffi::String, ffi::Any>;

[[noreturn]] void raise(const char* kind, const std::string& message) {
  throw ffi::Error(kind, message, "");
}

/// A status that is not ok becomes the exception that a Python caller expects.
void check(const mla::Status& status) {
  switch (status.code()) {
    case mla::StatusCode::kOk:
      return;
    case mla::StatusCode::kInvalidArgument:
    case mla::StatusCode::kOutOfRange:
      raise("ValueError", status.message());
    case mla::StatusCode::kUnsupported:
      raise("NotImplementedError", status.message());
    case mla::StatusCode::kOutOfMemory:
      raise("MemoryError", status.message());
    default:
      raise("RuntimeError", status.to_string());
  }
}

// ---- Devices

bool is_cpu(DLDevice device) {
  return device.device_type == kDLCPU || device.device_type == kDLCUDAHost;
}
bool is_cuda(DLDevice device) {
  return device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
}

std::string name_of(DLDevice device) {
  if (is_cpu(device)) return "cpu";
  if (is_cuda(device)) return "cuda:" + std::to_string(device.device_id);
  return "a device of DLPack type " + std::to_string(device.device_type);
}

mla::MachineKind kind_of(DLDevice device) {
  return is_cpu(device) ? mla::MachineKind::kModel : mla::MachineKind::kGpu;
}

/// Makes a device current, because the library decodes on the current one. A device that does not exist is an error.
class DeviceGuard {
 public:
  explicit DeviceGuard([[maybe_unused]] DLDevice device) {
#ifdef MLA_HAVE_CUDA
    if (is_cpu(device) || cudaGetDevice(&before_) != cudaSuccess) return;
    if (before_ == device.device_id) return;
    const cudaError_t error = cudaSetDevice(device.device_id);
    changed_ = error == cudaSuccess;
    if (changed_) return;
    cudaGetLastError();  // or the next launch would report it
    if (error == cudaErrorInvalidDevice) {
      raise("ValueError", "device = " + name_of(device) + ": there is no such GPU here");
    }
#endif
  }
  ~DeviceGuard() {
#ifdef MLA_HAVE_CUDA
    if (changed_) cudaSetDevice(before_);
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  [[maybe_unused]] int before_ = 0;
  [[maybe_unused]] bool changed_ = false;
};

mla::Machine& machine_of(DLDevice device) {
  if (!is_cpu(device) && !is_cuda(device)) {
    raise("ValueError", "device = " + name_of(device) + " must be cpu or cuda");
  }
  std::string why_not;
  mla::Machine* machine = mla::find_machine(kind_of(device), &why_not);
  if (machine == nullptr) raise("RuntimeError", why_not);
  return *machine;
}

/// The stream that the caller's framework works on.
mla::Stream stream_of(DLDevice device) {
  if (is_cpu(device)) return nullptr;
  return TVMFFIEnvGetStream(device.device_type, device.device_id);
}

// ---- What a call says beside its tensors

/// Made once for each combination, and kept by Python.
struct OptionsObj : ffi::Object {
  std::string stage;
  mla::Problem problem;  ///< All that the tensors do not say.
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("mla_stages.Options", OptionsObj, ffi::Object);
};
struct Options : ffi::ObjectRef {
  explicit Options(ffi::ObjectPtr<OptionsObj> object) : ffi::ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Options, ffi::ObjectRef, OptionsObj);
};

mla::CacheFormat format_named(const std::string& name) {
  std::string names;
  for (const mla::CacheFormat format : mla::kCacheFormats) {
    if (name == mla::to_string(format)) return format;
    names += (names.empty() ? "'" : ", '") + std::string(mla::to_string(format)) + "'";
  }
  raise("ValueError", "cache_format = '" + name + "' is not one of " + names);
}

mla::DType dtype_named(const std::string& name) {
  for (const mla::DType dtype : {mla::DType::kBFloat16, mla::DType::kFloat16}) {
    if (name == mla::to_string(dtype)) return dtype;
  }
  raise("ValueError", "dtype = '" + name + "' is neither 'bf16' nor 'fp16'");
}

Options make_options(ffi::String stage, double softmax_scale, bool causal, ffi::String cache_format,
                     double cache_scale, int64_t fixed_split_tokens) {
  auto options = ffi::make_object<OptionsObj>();
  options->stage = stage;
  options->problem.softmax_scale = static_cast<float>(softmax_scale);
  options->problem.causal = causal;
  options->problem.cache_format = format_named(cache_format);
  options->problem.cache_scale = static_cast<float>(cache_scale);
  if (fixed_split_tokens < 0 || fixed_split_tokens > INT_MAX) {
    raise("ValueError", "fixed_split_tokens = " + std::to_string(fixed_split_tokens) +
                            " must be 0 or a positive multiple of 64");
  }
  options->problem.fixed_split_tokens = static_cast<int>(fixed_split_tokens);
  return Options(options);
}

// ---- Tensors

std::string shape_of(const TensorView& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

std::string type_of(const TensorView& tensor) {
  const DLDataType type = tensor.dtype();
  if (type.code == kDLUInt && type.bits == 16) return "bfloat16";  // see dtype_of()
  const char* name = type.code == kDLBfloat  ? "bfloat"
                     : type.code == kDLFloat ? "float"
                     : type.code == kDLUInt  ? "uint"
                     : type.code == kDLInt   ? "int"
                     : type.code == kDLBool  ? "bool"
                     : type.bits == 8        ? "float"
                                             : "type";
  return name + std::to_string(type.bits);
}

void* data_of(const TensorView& tensor) {
  return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

/// Refuses sizes that the library cannot count, and negative strides, because -1 has another meaning there.
void check_strides(const char* name, const TensorView& tensor) {
  for (int i = 0; i < tensor.ndim(); ++i) {
    if (tensor.size(i) > INT_MAX) {
      raise("ValueError", std::string(name) + " has the shape " + shape_of(tensor) +
                              ", no dimension may exceed 2^31 - 1");
    }
    if (tensor.numel() > 0 && tensor.size(i) > 1 && tensor.stride(i) < 0) {
      raise("ValueError", std::string(name) + " has the stride " +
                              std::to_string(tensor.stride(i)) + " in dimension " +
                              std::to_string(i) + ", must be at least 0");
    }
  }
}

/// Refuses another shape than `wanted`, in which -1 stands for any size, and a last dimension with gaps.
void check_shape(const char* name, const TensorView& tensor, std::initializer_list<int64_t> wanted,
                 const char* allowed) {
  bool fits = tensor.ndim() == static_cast<int>(wanted.size());
  for (int i = 0; fits && i < tensor.ndim(); ++i) {
    const int64_t size = wanted.begin()[i];
    fits = size < 0 || tensor.size(i) == size;
  }
  if (!fits) {
    std::string sizes;
    for (const int64_t size : wanted) {
      sizes += (sizes.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
    }
    raise("ValueError", std::string(name) + " has the shape " + shape_of(tensor) + ", must be " +
                            allowed + " = [" + sizes + "]");
  }
  check_strides(name, tensor);
  const int last = tensor.ndim() - 1;
  if (tensor.numel() > 0 && tensor.size(last) > 1 && tensor.stride(last) != 1) {
    raise("ValueError", std::string(name) + " has the stride " +
                            std::to_string(tensor.stride(last)) +
                            " in its last dimension, must be 1: nothing is copied");
  }
}

bool has_type(const TensorView& tensor, int code, int bits) {
  return tensor.dtype().code == code && tensor.dtype().bits == bits && tensor.dtype().lanes == 1;
}

void check_type(const char* name, const TensorView& tensor, int code, int bits,
                const char* allowed) {
  if (has_type(tensor, code, bits)) return;
  raise("TypeError",
        std::string(name) + " has the dtype " + type_of(tensor) + ", must be " + allowed);
}

void check_device(const char* name, const TensorView& tensor, DLDevice device) {
  const DLDevice own = tensor.device();
  if (own.device_type == device.device_type && own.device_id == device.device_id) return;
  if (name_of(own) == name_of(device)) return;
  raise("ValueError", std::string(name) + " is on " + name_of(tensor.device()) + ", q is on " +
                          name_of(device) + ": all must be on one device");
}

/// NumPy has no DLPack type for bf16, so the package passes such arrays as 16-bit integers. It refuses arrays that
/// are 16-bit integers themselves.
mla::DType dtype_of(const char* name, const TensorView& tensor) {
  if (has_type(tensor, kDLBfloat, 16)) return mla::DType::kBFloat16;
  if (has_type(tensor, kDLFloat, 16)) return mla::DType::kFloat16;
  if (has_type(tensor, kDLUInt, 16)) return mla::DType::kBFloat16;
  raise("TypeError",
        std::string(name) + " has the dtype " + type_of(tensor) + ", must be bfloat16 or float16");
}

void check_same_dtype(const char* name, const TensorView& tensor, mla::DType dtype) {
  const mla::DType own = dtype_of(name, tensor);
  if (own == dtype) return;
  raise("TypeError", std::string(name) + " is " + mla::to_string(own) + ", q is " +
                         mla::to_string(dtype) + ": they must be the same");
}

void check_8_bits(const TensorView& kv_cache, mla::CacheFormat format) {
  for (const int code : {int{kDLUInt}, int{kDLInt}, int{kDLFloat8_e4m3fn}}) {
    if (has_type(kv_cache, code, 8)) return;
  }
  raise("TypeError", "kv_cache has the dtype " + type_of(kv_cache) +
                         ", must be uint8, int8 or float8_e4m3fn for cache_format = '" +
                         mla::to_string(format) + "'");
}

mla::RowStrides strides_of(const TensorView& tensor, int batch, int token, int head) {
  return {
      .batch = tensor.stride(batch), .token = tensor.stride(token), .head = tensor.stride(head)};
}

/// A problem and its tensors on one device.
struct Call {
  mla::Problem problem;
  mla::Tensors tensors;
  DLDevice device;
};

Call read_call(const OptionsObj& options, const TensorView& q, const TensorView& kv_cache,
               const TensorView& block_table, const TensorView& seqlens_k) {
  Call call{options.problem, {}, q.device()};
  mla::Problem& problem = call.problem;
  const int width = problem.cache_row_elements();

  problem.dtype = dtype_of("q", q);
  check_shape("q", q, {-1, -1, -1, mla::kHeadDimQK}, "[batch, seqlen_q, num_heads_q, 576]");
  check_device("kv_cache", kv_cache, call.device);
  if (mla::is_quantised(problem.cache_format)) {
    check_8_bits(kv_cache, problem.cache_format);
  } else if (kv_cache.dtype().bits == 8) {
    raise("TypeError", "kv_cache has the dtype " + type_of(kv_cache) +
                           ", must be that of q for cache_format = '16bit'; there are "
                           "'fp8_tile128', 'fp8_tensor' and 'int8_tile128'");
  } else {
    check_same_dtype("kv_cache", kv_cache, problem.dtype);
  }
  check_shape("kv_cache", kv_cache, {-1, -1, -1, width},
              "[num_pages, page_size, num_heads_kv, row]");
  check_device("block_table", block_table, call.device);
  check_type("block_table", block_table, kDLInt, 32, "int32");
  check_shape("block_table", block_table, {q.size(0), -1}, "[batch, max_pages_per_seq]");
  check_device("seqlens_k", seqlens_k, call.device);
  check_type("seqlens_k", seqlens_k, kDLInt, 32, "int32");
  check_shape("seqlens_k", seqlens_k, {q.size(0)}, "[batch]");

  problem.batch = static_cast<int>(q.size(0));
  problem.seqlen_q = static_cast<int>(q.size(1));
  problem.num_heads_q = static_cast<int>(q.size(2));
  problem.num_pages = static_cast<int>(kv_cache.size(0));
  problem.page_size = static_cast<int>(kv_cache.size(1));
  problem.num_heads_kv = static_cast<int>(kv_cache.size(2));
  problem.max_pages_per_seq = static_cast<int>(block_table.size(1));

  mla::Tensors& tensors = call.tensors;
  tensors.q = data_of(q);
  tensors.q_strides = strides_of(q, 0, 1, 2);
  tensors.kv_cache = data_of(kv_cache);
  tensors.kv_strides = {kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)};
  tensors.block_table = static_cast<const int32_t*>(data_of(block_table));
  tensors.block_table_stride = block_table.stride(0);
  tensors.seqlens_k = static_cast<const int32_t*>(data_of(seqlens_k));
  return call;
}

/// The same, with the tensors that are written.
void add_results(const TensorView& out, const TensorView& lse, Call* call) {
  const mla::Problem& problem = call->problem;
  check_device("out", out, call->device);
  check_same_dtype("out", out, problem.dtype);
  check_shape("out", out, {problem.batch, problem.seqlen_q, problem.num_heads_q, mla::kHeadDimV},
              "[batch, seqlen_q, num_heads_q, 512]");
  check_device("lse", lse, call->device);
  check_type("lse", lse, kDLFloat, 32, "float32");
  if (lse.ndim() != 3 || lse.size(0) != problem.batch || lse.size(1) != problem.num_heads_q ||
      lse.size(2) != problem.seqlen_q) {
    raise("ValueError",
          "lse has the shape " + shape_of(lse) + ", must be [batch, num_heads_q, seqlen_q] = [" +
              std::to_string(problem.batch) + ", " + std::to_string(problem.num_heads_q) + ", " +
              std::to_string(problem.seqlen_q) + "]");
  }
  check_strides("lse", lse);
  call->tensors.out = data_of(out);
  call->tensors.out_strides = strides_of(out, 0, 1, 2);
  call->tensors.lse = static_cast<float*>(data_of(lse));
  call->tensors.lse_strides = strides_of(lse, 0, 2, 1);
}

const mla::Stage& stage_named(const std::string& name, DLDevice device) {
  machine_of(device);  // a missing GPU is another error than a missing stage
  std::string why_not;
  const mla::Stage* stage = mla::find_stage(kind_of(device), name, &why_not);
  if (stage == nullptr) raise("ValueError", "stage = '" + name + "': " + why_not);
  return *stage;
}

mla::Workspace workspace_of(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return {};
  return {data_of(*tensor), ffi::GetDataSize(*tensor)};
}

// ---- Decode

ffi::Array<int64_t> workspace_bytes(Options options, TensorView q, TensorView kv_cache,
                                    TensorView block_table, TensorView seqlens_k) {
  const Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  const DeviceGuard guard(call.device);
  mla::WorkspaceBytes bytes;
  check(mla::workspace_bytes(stage_named(options->stage, call.device), call.problem, &bytes));
  return {static_cast<int64_t>(bytes.plan), static_cast<int64_t>(bytes.scratch)};
}

void make_plan(Options options, TensorView q, TensorView kv_cache, TensorView block_table,
               TensorView seqlens_k, TensorView plan) {
  const Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  check_device("plan", plan, call.device);
  const DeviceGuard guard(call.device);
  check(mla::plan_decode(stage_named(options->stage, call.device), call.problem,
                         call.tensors.seqlens_k, workspace_of(plan), stream_of(call.device)));
}

/// Without a plan `memory` is the whole workspace, with one it is the scratch part. On a CPU it may be
/// missing. `makes_plan`: the plan is made first.
void decode(Options options, TensorView q, TensorView kv_cache, TensorView block_table,
            TensorView seqlens_k, TensorView out, TensorView lse, MaybeTensor plan,
            MaybeTensor memory, bool check_paging, bool makes_plan) {
  Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  add_results(out, lse, &call);
  const auto& [problem, tensors, device] = call;
  if (plan.has_value()) check_device("plan", *plan, device);
  if (memory.has_value()) check_device("workspace", *memory, device);
  const mla::Stage& stage = stage_named(options->stage, device);
  const DeviceGuard guard(device);
  const mla::Stream stream = stream_of(device);
  if (check_paging && problem.batch > 0) {
    check(is_cpu(device)
              ? mla::validate_paging(problem, tensors.block_table, tensors.seqlens_k,
                                     tensors.block_table_stride)
              : mla::check_paging(machine_of(device), problem, tensors.block_table,
                                  tensors.seqlens_k, stream, tensors.block_table_stride));
  }
  mla::Workspace workspace = workspace_of(memory);
  mla::DeviceBuffer own;
  if (is_cpu(device) && !memory.has_value()) {
    mla::WorkspaceBytes bytes;
    check(mla::workspace_bytes(stage, problem, &bytes));
    const size_t needed = plan.has_value() ? bytes.scratch : bytes.total();
    if (needed > 0) check(own.allocate(machine_of(device), needed));
    workspace = own;
  }
  if (makes_plan && plan.has_value()) {
    check(mla::plan_decode(stage, problem, tensors.seqlens_k, workspace_of(plan), stream));
  }
  check(plan.has_value()
            ? mla::decode_planned(stage, problem, tensors, workspace_of(plan), workspace, stream)
            : mla::decode(stage, problem, tensors, workspace, stream));
}

/// Waits for the stream.
void check_plan(Options options, TensorView q, TensorView kv_cache, TensorView block_table,
                TensorView seqlens_k, TensorView plan) {
  const Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  const DeviceGuard guard(call.device);
  check(mla::check_plan(stage_named(options->stage, call.device), call.problem,
                        call.tensors.seqlens_k, workspace_of(plan), stream_of(call.device)));
}

mla::HostPlan host_plan(Options options, TensorView q, TensorView kv_cache, TensorView block_table,
                        TensorView seqlens_k, TensorView plan) {
  const Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  const DeviceGuard guard(call.device);
  mla::HostPlan host;
  check(mla::read_plan(stage_named(options->stage, call.device), call.problem, workspace_of(plan),
                       &host, stream_of(call.device)));
  return host;
}

/// Waits for the stream.
ffi::String describe_plan(Options options, TensorView q, TensorView kv_cache,
                          TensorView block_table, TensorView seqlens_k, TensorView plan) {
  return mla::describe_plan(host_plan(options, q, kv_cache, block_table, seqlens_k, plan));
}

/// Waits for the stream. Each piece: worker, sequence, first token, the token after its last, slot.
ffi::Array<ffi::Array<int64_t>> plan_pieces(Options options, TensorView q, TensorView kv_cache,
                                            TensorView block_table, TensorView seqlens_k,
                                            TensorView plan) {
  const mla::HostPlan host = host_plan(options, q, kv_cache, block_table, seqlens_k, plan);
  ffi::Array<ffi::Array<int64_t>> result;
  int64_t worker = 0;
  for (const auto& pieces : mla::pieces_of(host)) {
    for (const mla::Piece& piece : pieces) {
      const int64_t length = host.seqlens_k[static_cast<size_t>(piece.sequence)];
      result.push_back({worker, piece.sequence, int64_t{piece.grain_begin} * mla::kGrainTokens,
                        std::min(length, int64_t{piece.grain_end} * mla::kGrainTokens),
                        piece.slot});
    }
    ++worker;
  }
  return result;
}

// ---- The GPU model: its schedule, and what happens in it

/// The seed of all launches on the model from now on; returns the one before.
int64_t set_schedule(int64_t seed) {
  if (seed < 0) raise("ValueError", "seed = " + std::to_string(seed) + " must be at least 0");
  return static_cast<int64_t>(
      std::exchange(gpu_model::schedule().seed, static_cast<uint64_t>(seed)));
}

/// While it lives, what happens on the model is written down.
struct RecordingObj : ffi::Object {
  std::unique_ptr<gpu_model::Recording> recording;
  explicit RecordingObj(const gpu_model::RecordingOptions& options)
      : recording(std::make_unique<gpu_model::Recording>(options)) {
    gpu_model::schedule().recording = recording.get();
  }
  ~RecordingObj() { gpu_model::schedule().recording = nullptr; }
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("mla_stages.Recording", RecordingObj, ffi::Object);
};
struct Recording : ffi::ObjectRef {
  explicit Recording(ffi::ObjectPtr<RecordingObj> object) : ffi::ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Recording, ffi::ObjectRef, RecordingObj);
};

/// No `blocks`: all.
Recording recording_begin(ffi::Array<int64_t> blocks, int64_t max_events) {
  if (gpu_model::schedule().recording != nullptr) {
    raise("RuntimeError", "another trace is being made in this process");
  }
  gpu_model::RecordingOptions options{.blocks = {}};
  for (const int64_t block : blocks) {
    if (block < 0) raise("ValueError", "blocks: " + std::to_string(block) + " is no block");
    options.blocks.push_back(static_cast<uint64_t>(block));
  }
  if (max_events < 1) {
    raise("ValueError", "max_events = " + std::to_string(max_events) + " must be at least 1");
  }
  options.max_events = static_cast<uint64_t>(max_events);
  return Recording(ffi::make_object<RecordingObj>(options));
}

ffi::String recording_json(Recording recording) {
  return recording->recording->json();
}

void need_cpu(const char* what, DLDevice device) {
  if (is_cpu(device)) return;
  raise("ValueError",
        std::string(what) + " works on the CPU, the tensors are on " + name_of(device));
}

/// A contiguous float64 tensor of so many elements, to write.
double* doubles_of(const char* name, const TensorView& tensor, size_t elements) {
  check_type(name, tensor, kDLFloat, 64, "float64");
  if (static_cast<size_t>(tensor.numel()) != elements || !tensor.IsContiguous()) {
    raise("ValueError", std::string(name) + " must be contiguous, with " +
                            std::to_string(elements) + " elements");
  }
  return static_cast<double*>(data_of(tensor));
}

/// The float64 reference: out [batch, seqlen_q, num_heads_q, 512], lse [batch, num_heads_q, seqlen_q].
void reference(Options options, TensorView q, TensorView kv_cache, TensorView block_table,
               TensorView seqlens_k, TensorView out, TensorView lse) {
  const Call call = read_call(*options.get(), q, kv_cache, block_table, seqlens_k);
  need_cpu("the reference", call.device);
  mla::ReferenceResult result;
  check(mla::reference_attention(call.problem, call.tensors, &result));
  std::copy(result.out.begin(), result.out.end(), doubles_of("out", out, result.out.size()));
  std::copy(result.lse.begin(), result.lse.end(), doubles_of("lse", lse, result.lse.size()));
}

// ---- Quantised caches, on the CPU

mla::Problem cache_problem(const OptionsObj& options, const TensorView& cache) {
  mla::Problem problem = options.problem;
  problem.batch = 0;
  problem.num_heads_q = problem.num_heads_kv = static_cast<int>(cache.size(2));
  problem.num_pages = static_cast<int>(cache.size(0));
  problem.page_size = static_cast<int>(cache.size(1));
  problem.max_pages_per_seq = 1;
  problem.softmax_scale = 1;
  return problem;
}

void check_contiguous(const char* name, const TensorView& tensor) {
  need_cpu(name, tensor.device());
  if (!tensor.IsContiguous()) raise("ValueError", std::string(name) + " must be contiguous");
}

void quantise(Options options, TensorView kv_cache, TensorView quantised, bool power_of_two) {
  check_shape("kv_cache", kv_cache, {-1, -1, -1, mla::kHeadDimQK},
              "[num_pages, page_size, num_heads_kv, 576]");
  check_contiguous("kv_cache", kv_cache);
  mla::Problem problem = cache_problem(*options.get(), kv_cache);
  problem.dtype = dtype_of("kv_cache", kv_cache);
  std::vector<uint8_t> bytes;
  check(mla::quantise_cache(problem, data_of(kv_cache),
                            power_of_two ? mla::ScaleRule::kPowerOfTwo : mla::ScaleRule::kLargest,
                            &bytes));
  check_contiguous("quantised", quantised);
  if (ffi::GetDataSize(quantised) != bytes.size())
    raise("ValueError", "quantised has another size");
  std::memcpy(data_of(quantised), bytes.data(), bytes.size());
}

void dequantise(Options options, TensorView quantised, TensorView values) {
  check_8_bits(quantised, options->problem.cache_format);
  check_shape("kv_cache", quantised, {-1, -1, -1, options->problem.cache_row_elements()},
              "[num_pages, page_size, num_heads_kv, row]");
  check_contiguous("kv_cache", quantised);
  std::vector<double> result;
  check(
      mla::dequantise_cache(cache_problem(*options.get(), quantised), data_of(quantised), &result));
  std::copy(result.begin(), result.end(), doubles_of("values", values, result.size()));
}

// ---- Stages, and what is expected of them

ffi::Array<Dict> list_stages(int64_t device_type, int64_t device_id) {
  const DLDevice device{static_cast<DLDeviceType>(device_type), static_cast<int32_t>(device_id)};
  const DeviceGuard guard(device);
  std::string why_not;
  mla::Machine* machine = mla::find_machine(kind_of(device), &why_not);
  ffi::Array<Dict> result;
  for (const mla::Stage& stage : mla::stages(kind_of(device))) {
    std::string reason = why_not;
    if (machine != nullptr) reason = mla::check_device(stage, machine->limits()).message();
    ffi::Array<ffi::String> formats;
    for (const mla::CacheFormat format : stage.cache_formats) {
      formats.push_back(mla::to_string(format));
    }
    result.push_back(Dict{{"name", ffi::String(stage.slug)},
                          {"idea", ffi::String(stage.idea)},
                          {"cache_formats", formats},
                          {"min_compute_capability", stage.min_compute_capability},
                          {"why_not", ffi::String(reason)}});
  }
  return result;
}

/// A problem without tensors, and its stage.
struct Shapes {
  mla::Problem problem;
  const mla::Stage* stage;
  mla::DeviceLimits limits;
};
Shapes read_shapes(const OptionsObj& options, const std::string& dtype,
                   const ffi::Array<int64_t>& sizes, DLDevice device) {
  for (const int64_t size : sizes) {
    if (size < 0 || size > INT_MAX) {
      raise("ValueError", "a size of " + std::to_string(size) + " is outside 0 ... 2^31 - 1");
    }
  }
  const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
  Shapes shapes{options.problem, &stage_named(options.stage, device), machine_of(device).limits()};
  mla::Problem& problem = shapes.problem;
  problem.dtype = dtype_named(dtype);
  problem.batch = size(0);
  problem.seqlen_q = size(1);
  problem.num_heads_q = size(2);
  problem.num_heads_kv = size(3);
  problem.page_size = size(4);
  problem.max_pages_per_seq = size(5);
  problem.num_pages = size(6);
  check(mla::validate(problem));
  return shapes;
}

Dict predict(Options options, ffi::String dtype, ffi::Array<int64_t> sizes, int64_t total_tokens,
             int64_t device_type, int64_t device_id) {
  const DLDevice device{static_cast<DLDeviceType>(device_type), static_cast<int32_t>(device_id)};
  const DeviceGuard guard(device);
  const auto [problem, stage, limits] = read_shapes(*options.get(), dtype, sizes, device);
  mla::Prediction prediction;
  check(mla::predict(*stage, problem, total_tokens, limits, &prediction));
  mla::WorkspaceBytes bytes;
  check(mla::workspace_bytes(*stage, problem, limits, &bytes));
  return {{"fp32_flop", prediction.fp32_flop},
          {"matrix_flop", prediction.matrix_flop},
          {"shared_bytes", prediction.shared_bytes},
          {"dram_bytes", prediction.dram_bytes},
          {"busy_fraction", prediction.busy_fraction},
          {"workspace_bytes", static_cast<int64_t>(bytes.total())}};
}

/// Which stage "auto" takes, and why.
ffi::String explain(Options options, ffi::String dtype, ffi::Array<int64_t> sizes,
                    int64_t device_type, int64_t device_id) {
  const DLDevice device{static_cast<DLDeviceType>(device_type), static_cast<int32_t>(device_id)};
  const DeviceGuard guard(device);
  const auto [problem, stage, limits] = read_shapes(*options.get(), dtype, sizes, device);
  mla::Choice choice;
  check(mla::choose(kind_of(device), problem, limits, &choice));
  return mla::describe(choice, limits);
}

// ---- The paged cache

struct CacheObj : ffi::Object {
  DLDevice device;
  std::unique_ptr<mla::PagedCache> cache;
  ~CacheObj() {
    const DeviceGuard guard(device);
    cache.reset();
  }
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("mla_stages.PagedCache", CacheObj, ffi::Object);
};
struct Cache : ffi::ObjectRef {
  explicit Cache(ffi::ObjectPtr<CacheObj> object) : ffi::ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Cache, ffi::ObjectRef, CacheObj);
};

/// A sequence's id as one number.
int64_t to_number(mla::SequenceId id) {
  return int64_t{id.generation} << 32 | id.slot;
}
mla::SequenceId to_id(int64_t number) {
  return {static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32)};
}
std::vector<mla::SequenceId> to_ids(const ffi::Array<int64_t>& numbers) {
  std::vector<mla::SequenceId> ids;
  for (const int64_t number : numbers) ids.push_back(to_id(number));
  return ids;
}

Cache cache_create(Options options, ffi::String dtype, int64_t num_pages, int64_t page_size,
                   int64_t num_heads_kv, bool power_of_two, int64_t device_type,
                   int64_t device_id) {
  const DLDevice device{static_cast<DLDeviceType>(device_type), static_cast<int32_t>(device_id)};
  const DeviceGuard guard(device);
  const auto clamped = [](int64_t size) {
    return static_cast<int>(std::clamp<int64_t>(size, -1, INT_MAX));
  };
  auto cache = ffi::make_object<CacheObj>();
  cache->device = device;
  check(mla::PagedCache::create(
      machine_of(device),
      {.num_pages = clamped(num_pages),
       .page_size = clamped(page_size),
       .num_heads_kv = clamped(num_heads_kv),
       .dtype = dtype_named(dtype),
       .cache_format = options->problem.cache_format,
       .cache_scale = options->problem.cache_scale,
       .scale_rule = power_of_two ? mla::ScaleRule::kPowerOfTwo : mla::ScaleRule::kLargest},
      &cache->cache));
  return Cache(cache);
}

int64_t cache_add(Cache cache) {
  mla::SequenceId id;
  check(cache->cache->add(&id));
  return to_number(id);
}

int64_t cache_fork(Cache cache, int64_t parent) {
  mla::SequenceId id;
  check(cache->cache->fork(to_id(parent), &id));
  return to_number(id);
}

void cache_free(Cache cache, int64_t sequence) {
  check(cache->cache->free(to_id(sequence)));
}

/// Tokens of a sequence, then its pages.
ffi::Array<int64_t> cache_sequence(Cache cache, int64_t number) {
  const mla::Sequence* sequence = cache->cache->table().find(to_id(number));
  if (sequence == nullptr) {
    raise("ValueError", "sequence = " + mla::to_string(to_id(number)) +
                            " is not a sequence of this cache: it was freed, or never added");
  }
  ffi::Array<int64_t> result{sequence->tokens};
  for (const int32_t page : sequence->pages) result.push_back(page);
  return result;
}

void cache_append(Cache cache, ffi::Array<int64_t> sequences, ffi::Array<int64_t> tokens,
                  TensorView rows) {
  const mla::CacheShape& shape = cache->cache->shape();
  std::vector<int32_t> counts;
  int64_t total = 0;
  for (const int64_t count : tokens) {
    if (count < INT32_MIN || count > INT32_MAX) {
      raise("ValueError", "tokens = " + std::to_string(count) + " is too large");
    }
    counts.push_back(static_cast<int32_t>(count));
    total += count;
  }
  if (name_of(rows.device()) != name_of(cache->device)) {
    raise("ValueError",
          "rows are on " + name_of(rows.device()) + ", the cache is on " + name_of(cache->device));
  }
  if (const mla::DType own = dtype_of("rows", rows); own != shape.dtype) {
    raise("TypeError", std::string("rows are ") + mla::to_string(own) + ", the cache takes " +
                           mla::to_string(shape.dtype));
  }
  check_shape("rows", rows, {total, shape.num_heads_kv, mla::kHeadDimQK},
              "[sum of tokens, num_heads_kv, 576]");
  if (!rows.IsContiguous()) raise("ValueError", "rows must be contiguous: nothing is copied");
  const DeviceGuard guard(cache->device);
  check(cache->cache->append(to_ids(sequences), counts, data_of(rows), stream_of(cache->device)));
}

void cache_write_tables(Cache cache, ffi::Array<int64_t> sequences, TensorView block_table,
                        TensorView seqlens_k) {
  const int64_t batch = static_cast<int64_t>(sequences.size());
  for (const auto& [name, tensor] :
       {std::pair{"block_table", block_table}, {"seqlens_k", seqlens_k}}) {
    check_type(name, tensor, kDLInt, 32, "int32");
    if (name_of(tensor.device()) != name_of(cache->device) || !tensor.IsContiguous()) {
      raise("ValueError", std::string(name) + " must be contiguous, on " + name_of(cache->device));
    }
  }
  check_shape("block_table", block_table, {batch, -1}, "[batch, max_pages_per_seq]");
  check_shape("seqlens_k", seqlens_k, {batch}, "[batch]");
  const DeviceGuard guard(cache->device);
  check(cache->cache->write_tables(to_ids(sequences), static_cast<int>(block_table.size(1)),
                                   static_cast<int32_t*>(data_of(block_table)),
                                   static_cast<int32_t*>(data_of(seqlens_k)),
                                   stream_of(cache->device)));
}

Dict cache_statistics(Cache cache) {
  const mla::CacheStatistics statistics = cache->cache->statistics();
  const mla::PageStatistics& pages = statistics.pages;
  return {{"pages_total", pages.pages_total},
          {"pages_used", pages.pages_used},
          {"pages_shared", pages.pages_shared},
          {"pages_peak", pages.pages_peak},
          {"sequences", pages.sequences},
          {"tokens", pages.tokens},
          {"tokens_stored", pages.tokens_stored},
          {"utilization", pages.utilization()},
          {"fragmentation", pages.fragmentation()},
          {"bytes_total", statistics.bytes_total},
          {"bytes_used", statistics.bytes_used},
          {"bytes_peak", statistics.bytes_peak},
          {"bytes_per_token", statistics.bytes_per_token}};
}

/// The memory of a cache as a tensor, which keeps the cache alive.
struct CacheMemory {
  Cache cache;
  void AllocData(DLTensor* tensor) { tensor->data = cache->cache->data(); }
  void FreeData(DLTensor*) {}
};

ffi::Tensor cache_data(Cache cache) {
  const mla::CacheShape& shape = cache->cache->shape();
  const int width = mla::Problem{.cache_format = shape.cache_format}.cache_row_elements();
  const ffi::Shape sizes{shape.num_pages, shape.page_size, shape.num_heads_kv, width};
  DLDataType type{kDLUInt, 8, 1};
  if (!mla::is_quantised(shape.cache_format)) {
    type.code = shape.dtype == mla::DType::kBFloat16 ? kDLBfloat : kDLFloat;
    type.bits = 16;
  }
  return ffi::Tensor::FromNDAlloc(CacheMemory{cache}, sizes, type, cache->device);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_options, make_options)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_bytes, workspace_bytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_plan, make_plan)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(check_plan, check_plan)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(describe_plan, describe_plan)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_pieces, plan_pieces)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_schedule, set_schedule)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(recording_begin, recording_begin)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(recording_json, recording_json)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(reference, reference)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantise, quantise)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantise, dequantise)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(list_stages, list_stages)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(predict, predict)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(explain, explain)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_create, cache_create)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_add, cache_add)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_fork, cache_fork)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_free, cache_free)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_sequence, cache_sequence)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_append, cache_append)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_write_tables, cache_write_tables)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_statistics, cache_statistics)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_data, cache_data)
