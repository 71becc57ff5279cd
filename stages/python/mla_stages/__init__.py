"""FlashMLA, stage by stage: multi-head latent attention decode for arrays of NumPy, PyTorch, CuPy and JAX.

An array on a CPU is decoded by the GPU model, or by the float64 reference; a CUDA tensor on its device, on the current
stream of its framework. docs/python.md is the page for users.
"""
import contextlib
import json
import sys
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from . import _arrays
from ._cache import PagedCache
from ._library import library, options, use_cuda
from ._profile import profile

__all__ = ["PagedCache", "Piece", "Plan", "Stage", "decode", "dequantise", "explain", "merge", "plan", "predict",
           "profile", "quantise", "reference", "schedule", "stages", "trace"]
__version__ = "0.2.0"

Array = Any


class _Call:
    """The arguments of a decode, as the library takes them."""

    __slots__ = ("framework", "q", "stage", "on_cuda", "arguments", "shapes")

    def __init__(self, q: Array, kv_cache: Array, block_table: Array, seqlens_k: Array, scale: float, causal: bool,
                 stage: str, cache_format: str, cache_scale: float, fixed_split_tokens: int) -> None:
        framework = self.framework = _arrays.framework_of("q", q)
        _arrays.need_results("q", framework)
        if len(q.shape) != 4:
            raise ValueError(f"q has the shape {list(q.shape)}, must be [batch, seqlen_q, num_heads_q, 576]")
        self.q = q
        self.stage = stage
        device = framework.device(q)
        self.on_cuda = _arrays.is_cuda(device)
        if self.on_cuda:
            use_cuda()
        if isinstance(kv_cache, PagedCache):
            cache_format, cache_scale, kv_cache = kv_cache.cache_format, kv_cache.cache_scale, kv_cache.data
        settings = options(stage, scale if type(scale) is float else _number("scale", scale), bool(causal), cache_format,
                           cache_scale if type(cache_scale) is float else _number("cache_scale", cache_scale),
                           fixed_split_tokens)
        view = _arrays.view
        self.arguments = (settings, framework.view("q", q), view("kv_cache", kv_cache),
                          view("block_table", block_table), view("seqlens_k", seqlens_k))
        #: What a plan and the size of a workspace depend on.
        self.shapes = (stage, causal, cache_format, fixed_split_tokens, device, q.dtype, tuple(q.shape),
                       tuple(kv_cache.shape), tuple(block_table.shape))

    def run(self, function: str, *more: Any) -> Any:
        return self.framework.call(self.q, getattr(library, function), (*self.arguments, *more))

    def workspace_bytes(self) -> Tuple[int, int]:
        """The bytes of the plan, and those of scratch memory."""
        found = _workspace_bytes.get(self.shapes)
        if found is None:
            if len(_workspace_bytes) >= 4096:
                _workspace_bytes.clear()
            plan, scratch = self.run("workspace_bytes")
            found = _workspace_bytes[self.shapes] = (plan, scratch)
        return found

    def memory(self, size: int) -> Optional[Array]:
        return self.framework.empty((size,), "uint8", self.q) if size > 0 else None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} = {value!r} must be a number") from None


_workspace_bytes: Dict[Any, Tuple[int, int]] = {}


class Piece(NamedTuple):
    """A worker's share of a sequence."""

    worker: int
    sequence: int
    begin: int  #: Its first token,
    end: int  #: and the one after its last.
    slot: int  #: Of the partial result; -1: the piece is the whole sequence.


class Plan:
    """Which worker attends to which tokens. plan() makes it from lengths on the device, without waiting.

    The methods take the tensors of a decode, of the same shapes as those that it was made for.
    """

    def __init__(self, call: _Call, settings: Tuple[Any, ...]) -> None:
        self.stage = call.stage
        self._on_cuda = call.on_cuda
        #: On the device; None for a stage that makes no plan.
        self.memory = call.memory(call.workspace_bytes()[0])
        self._view = None if self.memory is None else _arrays.view("plan", self.memory)
        self._settings = settings
        self._shapes = call.shapes

    def update(self, q: Array, kv_cache: Array, block_table: Array, seqlens_k: Array) -> None:
        """Makes the plan anew, in the same memory. May be captured in a CUDA graph."""
        self._run("make_plan", _Call(q, kv_cache, block_table, seqlens_k, *self._settings))

    def check(self, q: Array, kv_cache: Array, block_table: Array, seqlens_k: Array) -> None:
        """Raises a ValueError if the plan was not made for these lengths. Waits for the stream."""
        self._run("check_plan", _Call(q, kv_cache, block_table, seqlens_k, *self._settings))

    def describe(self, q: Array, kv_cache: Array, block_table: Array, seqlens_k: Array) -> str:
        """A picture: a line for each worker, its load and its pieces. Waits for the stream."""
        found = self._run("describe_plan", _Call(q, kv_cache, block_table, seqlens_k, *self._settings))
        return f"stage {self.stage} makes no plan" if found is None else str(found)

    def pieces(self, q: Array, kv_cache: Array, block_table: Array, seqlens_k: Array) -> List[Piece]:
        """The same as numbers, by worker. Waits for the stream."""
        found = self._run("plan_pieces", _Call(q, kv_cache, block_table, seqlens_k, *self._settings))
        return [] if found is None else [Piece(*piece) for piece in found]

    def _run(self, function: str, call: _Call) -> Any:
        self._require(call)
        return None if self._view is None else call.run(function, self._view)

    def _require(self, call: _Call) -> None:
        if call.shapes != self._shapes:
            ours, theirs = next((a, b) for a, b in zip(self._shapes, call.shapes) if a != b)
            raise ValueError(f"plan was made for {ours}, the call has {theirs}: shapes, types, device, stage, causal, "
                             "cache_format and fixed_split_tokens must be the same")


def plan(q: Array, kv_cache: Union[Array, PagedCache], block_table: Array, seqlens_k: Array, *, causal: bool = False,
         stage: str = "auto", cache_format: str = "16bit", cache_scale: float = 1.0,
         fixed_split_tokens: int = 0) -> Plan:
    """Makes a plan that decodes of the same shapes and lengths can share, those of all layers of a model for one.

    Arguments are those of decode(); of q, kv_cache and block_table only the shapes matter.
    """
    settings = (1.0, causal, stage, cache_format, cache_scale, fixed_split_tokens)
    call = _Call(q, kv_cache, block_table, seqlens_k, *settings)
    made = Plan(call, settings)
    made._run("make_plan", call)
    return made


def _is_compiling() -> bool:
    return False


def decode(q: Array, kv_cache: Union[Array, PagedCache], block_table: Array, seqlens_k: Array, *, scale: float,
           causal: bool = False, stage: str = "auto", out: Optional[Array] = None, lse: Optional[Array] = None,
           plan: Optional[Plan] = None, cache_format: str = "16bit", cache_scale: float = 1.0,
           fixed_split_tokens: int = 0, check: Optional[bool] = None) -> Tuple[Array, Array]:
    """Attends to a paged latent cache: out = softmax(scale q k) k[:512] for each query token and head.

    :param q: [batch, seqlen_q, num_heads_q, 576], bfloat16 or float16
    :param kv_cache: [num_pages, page_size, num_heads_kv, 576] as q, or [..., 656] or [..., 576] bytes of a quantised
        one; or a PagedCache
    :param block_table: [batch, max_pages_per_seq], int32
    :param seqlens_k: [batch], int32
    :param scale: the model's factor on q k: 0.135234 for DeepSeek-V3, and not 576 ** -0.5
    :param causal: query i of s_q sees tokens 0 ... seqlen_k - s_q + i
    :param stage: a name or number of stages(), "auto" for the fastest by a measured table, "reference" on a CPU
    :param out: memory for the result; by default it is new
    :param lse: the same
    :param plan: what plan() made for the same shapes and lengths
    :param cache_format: "16bit", "fp8_tile128", "fp8_tensor" or "int8_tile128"
    :param cache_scale: for "fp8_tensor", what every code is multiplied by
    :param fixed_split_tokens: if not 0, a multiple of 64, and results do not depend on the rest of the batch
    :param check: whether lengths and page ids are checked. By default only on a CPU, because a GPU has to be waited for.
    :returns: out [batch, seqlen_q, num_heads_q, 512] as q; lse [batch, num_heads_q, seqlen_q], float32, natural
        logarithm, +inf for a row that sees nothing
    :raises TypeError, ValueError: naming the argument, its value and what is allowed; nothing is written then
    :raises NotImplementedError: the stage cannot run on this device, or read such a cache
    """
    if _is_compiling():
        if out is not None or lse is not None or plan is not None or check or isinstance(kv_cache, PagedCache):
            raise TypeError("under torch.compile decode takes no out, lse, plan, check or PagedCache")
        return _compiled(q, kv_cache, block_table, seqlens_k, float(scale), causal, stage, cache_format,
                         float(cache_scale), fixed_split_tokens)
    call = _Call(q, kv_cache, block_table, seqlens_k, scale, causal, stage, cache_format, cache_scale, fixed_split_tokens)
    if stage == "reference":
        return _decode_by_reference(call, out, lse, plan)
    if plan is not None:
        plan._require(call)
    return _decode(call, out, lse, plan, not call.on_cuda if check is None else check)


def _decode(call: _Call, out: Optional[Array], lse: Optional[Array], plan: Optional[Plan], check: bool,
            makes_plan: bool = False) -> Tuple[Array, Array]:
    """:param makes_plan: make the plan first, in the memory of `plan`"""
    framework, q = call.framework, call.q
    batch, seqlen_q, heads, _ = q.shape
    new_out = framework.empty((batch, seqlen_q, heads, 512), q.dtype, q) if out is None else out
    new_lse = framework.empty((batch, heads, seqlen_q), "float32", q) if lse is None else lse
    plan_view = None if plan is None else plan._view
    memory = None
    if call.on_cuda:
        plan_bytes, scratch_bytes = call.workspace_bytes()
        memory = call.memory(scratch_bytes if plan_view is not None else plan_bytes + scratch_bytes)
    view = _arrays.view
    call.run("decode", view("out", new_out, True), view("lse", new_lse, True), plan_view,
             None if memory is None else view("workspace", memory, True), check, makes_plan)
    if memory is not None:
        framework.done_with(memory)
    return (framework.result(new_out) if out is None else out, framework.result(new_lse) if lse is None else lse)


def _compiled(*arguments: Any) -> Tuple[Array, Array]:
    raise AssertionError("set by _torch_is_here()")


def _torch_is_here() -> None:
    """Makes decode() known to torch.compile. Called when torch has been imported, never to import it."""
    global _is_compiling, _compiled
    from . import _torch

    _is_compiling = sys.modules["torch"].compiler.is_compiling
    _compiled = _torch.decode


@contextlib.contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Sets the GPU model's schedule of threads for the block of a `with`, in this process. 0 runs them in order, which is
    the default; any other seed runs them as an adversary would. Right kernels give the same bits under each."""
    before = library.set_schedule(seed)
    try:
        yield
    finally:
        library.set_schedule(before)


def trace(q: Array, kv_cache: Union[Array, PagedCache], block_table: Array, seqlens_k: Array, *, scale: float,
          causal: bool = False, stage: str = "auto", cache_format: str = "16bit", cache_scale: float = 1.0,
          fixed_split_tokens: int = 0, blocks: Sequence[int] = (0,), max_events: int = 1000000) -> Dict[str, Any]:
    """What some blocks of a decode do on the GPU model, event by event; docs/recording.md is the format.

    Nothing else may run on the model meanwhile. Arrays and settings are those of decode(), on a CPU.

    :param blocks: their numbers in each grid; none: all
    :param max_events: later events are counted, not kept
    """
    settings: Dict[str, Any] = {"causal": causal, "stage": stage, "cache_format": cache_format,
                                "cache_scale": cache_scale, "fixed_split_tokens": fixed_split_tokens}
    made = plan(q, kv_cache, block_table, seqlens_k, **settings)
    if made._on_cuda:
        raise ValueError("trace works on the CPU, by the GPU model: q is on a GPU")
    recording = library.recording_begin(list(blocks), max_events)
    try:
        decode(q, kv_cache, block_table, seqlens_k, scale=scale, plan=made, **settings)
        found = dict(json.loads(str(library.recording_json(recording))))
    finally:
        del recording
    if not found["launches"]:
        raise ValueError(f"nothing to record: stage {stage!r} launched no kernel")
    return found


def _float64_results(call: _Call) -> Tuple[Array, Array]:
    batch, seqlen_q, heads, _ = call.q.shape
    out = call.framework.empty((batch, seqlen_q, heads, 512), "float64", call.q)
    lse = call.framework.empty((batch, heads, seqlen_q), "float64", call.q)
    call.run("reference", out, lse)
    return out, lse


def _decode_by_reference(call: _Call, out: Optional[Array], lse: Optional[Array],
                         plan: Optional[Plan]) -> Tuple[Array, Array]:
    if out is not None or lse is not None or plan is not None:
        raise ValueError("stage = 'reference' takes no out, lse or plan")
    framework = call.framework
    out64, lse64 = _float64_results(call)
    return (framework.result(framework.astype(out64, call.q.dtype)),
            framework.result(framework.astype(lse64, "float32")))


def reference(q: Array, kv_cache: Union[Array, PagedCache], block_table: Array, seqlens_k: Array, *, scale: float,
              causal: bool = False, cache_format: str = "16bit", cache_scale: float = 1.0) -> Tuple[Array, Array]:
    """The truth, in float64, for arrays on a CPU: out and lse as decode() has them. JAX's come back as NumPy's."""
    return _float64_results(_Call(q, kv_cache, block_table, seqlens_k, scale, causal, "reference", cache_format,
                                  cache_scale, 0))


def merge(outs: Sequence[Array], lses: Sequence[Array]) -> Tuple[Array, Array]:
    """Merges results over disjoint sets of tokens, as context parallelism needs: out and lse over all of them.

    :param outs: each as decode() gives it; parts that saw nothing may be among them
    :param lses: the same
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"{len(outs)} outs and {len(lses)} lses: there must be equally many, and at least one")
    framework = _arrays.framework_of("outs[0]", outs[0])
    _arrays.need_results("outs[0]", framework)
    xp = sys.modules["jax.numpy" if framework.name == "jax" else framework.name]
    lse = xp.stack([framework.astype(part, "float32") for part in lses])
    nothing = xp.isinf(lse)
    lse = xp.where(nothing, -float("inf"), lse)
    top = lse.amax(0) if framework.name == "torch" else lse.max(0)
    top = xp.where(xp.isinf(top), 0.0, top)
    weights = xp.exp(lse - top)
    total = weights.sum(0)
    none = total == 0
    total = xp.where(none, 1.0, total)
    weights = (weights / total).swapaxes(-1, -2)[..., None]
    out = sum(xp.where(weight == 0, 0.0, weight * framework.astype(part, "float32"))
              for weight, part in zip(weights, outs))
    return (framework.astype(out, outs[0].dtype),
            framework.astype(xp.where(none, float("inf"), xp.log(total) + top), "float32"))


def quantise(kv_cache: Array, cache_format: str, *, cache_scale: float = 1.0, power_of_two: bool = False) -> Array:
    """Quantises a whole cache on a CPU: [num_pages, page_size, num_heads_kv, 656 or 576] bytes, as uint8.

    A cache that grows, on a GPU too, is a PagedCache. docs/cache_formats.md defines the formats.
    """
    framework = _arrays.framework_of("kv_cache", kv_cache)
    _arrays.need_results("kv_cache", framework)
    width = 576 if cache_format == "fp8_tensor" else 656
    result = framework.empty((*kv_cache.shape[:-1], width), "uint8", kv_cache)
    library.quantise(options("", 1.0, False, cache_format, float(cache_scale), 0),
                       framework.view("kv_cache", kv_cache), result, power_of_two)
    return framework.result(result)


def dequantise(kv_cache: Array, cache_format: str, *, cache_scale: float = 1.0) -> Array:
    """The values of a quantised cache on a CPU: [num_pages, page_size, num_heads_kv, 576], float64. JAX's is NumPy's."""
    framework = _arrays.framework_of("kv_cache", kv_cache)
    _arrays.need_results("kv_cache", framework)
    result = framework.empty((*kv_cache.shape[:-1], 576), "float64", kv_cache)
    library.dequantise(options("", 1.0, False, cache_format, float(cache_scale), 0),
                         framework.view("kv_cache", kv_cache), result)
    return result


class Stage(NamedTuple):
    """One rung of the ladder."""

    name: str
    idea: str
    cache_formats: Tuple[str, ...]
    min_compute_capability: int
    why_not: str  #: Empty: it runs on the device.


def stages(device: str = "cpu") -> List[Stage]:
    """The stages that were built for a device, 'cpu' (the GPU model) or 'cuda:N', in order."""
    return [Stage(one["name"], one["idea"], tuple(one["cache_formats"]), one["min_compute_capability"], one["why_not"])
            for one in library.list_stages(*_device(device))]


def predict(stage: str = "auto", *, batch: int, seqlen_k: int, num_heads_q: int = 128, seqlen_q: int = 1,
            num_heads_kv: int = 1, page_size: int = 64, dtype: str = "bf16", causal: bool = False,
            cache_format: str = "16bit", device: str = "cpu") -> Dict[str, float]:
    """What a stage expects to spend on a shape, by its own count: FLOP, bytes, the share of busy multiprocessors."""
    sizes = _sizes(batch, seqlen_q, num_heads_q, num_heads_kv, page_size, seqlen_k)
    return dict(library.predict(options(stage, 1.0, causal, cache_format, 1.0, 0), dtype, sizes, batch * seqlen_k,
                                  *_device(device)))


def explain(*, batch: int, seqlen_k: int, num_heads_q: int = 128, seqlen_q: int = 1, num_heads_kv: int = 1,
            page_size: int = 64, dtype: str = "bf16", causal: bool = False, cache_format: str = "16bit",
            device: str = "cpu") -> str:
    """Which stage "auto" takes for a shape, and why, in sentences."""
    sizes = _sizes(batch, seqlen_q, num_heads_q, num_heads_kv, page_size, seqlen_k)
    return str(library.explain(options("auto", 1.0, causal, cache_format, 1.0, 0), dtype, sizes, *_device(device)))


def _sizes(batch: int, seqlen_q: int, num_heads_q: int, num_heads_kv: int, page_size: int, seqlen_k: int) -> List[int]:
    pages = max(1, -(-seqlen_k // max(1, page_size)))
    return [batch, seqlen_q, num_heads_q, num_heads_kv, page_size, pages, max(1, batch * pages)]


def _device(device: str) -> _arrays.Device:
    found = _arrays.device_named(device)
    if _arrays.is_cuda(found):
        use_cuda()
    return found


if "torch" in sys.modules:
    _torch_is_here()
