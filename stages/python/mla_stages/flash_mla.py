"""FlashMLA's two functions, decoded by mla_stages: for code that was written for the package flash_mla.

    from mla_stages import flash_mla
    flash_mla.install()              # before that code: its `import flash_mla` then finds this
    flash_mla.patch(backend_module)  # or after it: replaces the names that it has imported

docs/python.md says what is the same, and how vLLM and SGLang are patched.
"""
import dataclasses
import sys
import types
import warnings
from typing import Any, NoReturn, Optional, Tuple

from . import Plan, _arrays, _Call, _decode, decode

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata", "get_mla_metadata_tensors", "install",
           "patch"]

#: If not 0, as decode()'s: a sequence's result does not depend on the rest of its batch.
fixed_split_tokens = 0

_stage = "auto"


@dataclasses.dataclass
class FlashMLASchedMeta:
    """Holds a plan from its first decode on. One for each step: layers share it, other lengths need another."""

    plan: Optional[Plan] = None
    tile_scheduler_metadata: Any = None  #: FlashMLA's; not read
    num_splits: Any = None  #: the same


def get_mla_metadata(*args: Any, **kwargs: Any) -> Tuple[FlashMLASchedMeta, None]:
    """What flash_mla_with_kvcache plans with. Arguments, which older code passes, are not read."""
    return FlashMLASchedMeta(), None


def get_mla_metadata_tensors(cache_seqlens: Any, *args: Any, **kwargs: Any) -> Tuple[Any, Any]:
    """The older form, for code that copies the metadata as tensors: int32, [1, 8] and [batch + 1].

    They are placeholders. A decode that is given them makes its own plan each time, which may be captured in a CUDA
    graph and follows the lengths at each replay.
    """
    framework = _arrays.framework_of("cache_seqlens", cache_seqlens)
    metadata = framework.empty((1, 8), "int32", cache_seqlens)
    num_splits = framework.empty((cache_seqlens.shape[0] + 1,), "int32", cache_seqlens)
    return framework.result(metadata), framework.result(num_splits)


def flash_mla_with_kvcache(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int,
                           tile_scheduler_metadata: Any, num_splits: Any = None, softmax_scale: Optional[float] = None,
                           causal: bool = False, is_fp8_kvcache: bool = False, indices: Any = None,
                           attn_sink: Any = None, extra_k_cache: Any = None, extra_indices_in_kvcache: Any = None,
                           topk_length: Any = None, extra_topk_length: Any = None, descale_q: Any = None,
                           descale_k: Any = None) -> Tuple[Any, Any]:
    """Dense decode with FlashMLA's arguments and results.

    :param tile_scheduler_metadata: of get_mla_metadata(), or a tensor of get_mla_metadata_tensors()
    :param is_fp8_kvcache: k_cache holds rows of 656 bytes, "fp8_tile128"
    :returns: out [batch, seqlen_q, num_heads_q, 512]; lse [batch, num_heads_q, seqlen_q], float32, natural logarithm
    """
    for name, value in (("indices", indices), ("attn_sink", attn_sink), ("extra_k_cache", extra_k_cache),
                        ("extra_indices_in_kvcache", extra_indices_in_kvcache), ("topk_length", topk_length),
                        ("extra_topk_length", extra_topk_length), ("descale_q", descale_q), ("descale_k", descale_k)):
        if value is not None:
            raise NotImplementedError(f"{name}: mla_stages decodes dense attention, with a 16-bit q")
    if head_dim_v != 512:
        raise ValueError(f"head_dim_v = {head_dim_v} must be 512")
    if is_fp8_kvcache and k_cache.shape[-1] != 656:
        raise NotImplementedError(f"is_fp8_kvcache with rows of {k_cache.shape[-1]} bytes: only 656, fp8_tile128; for "
                                  "fp8_tensor call mla_stages.decode")
    if softmax_scale is None:
        softmax_scale = float(q.shape[-1] ** -0.5)
        warnings.warn(f"softmax_scale is None, so it is FlashMLA's default {softmax_scale:.6f}, which is no DeepSeek "
                      "model's: V3's is 0.135234, V2-Lite's 0.114721", stacklevel=2)
    cache_format = "fp8_tile128" if is_fp8_kvcache else "16bit"
    made = None
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        made = tile_scheduler_metadata.plan
        if made is None:
            settings = (softmax_scale, causal, _stage, cache_format, 1.0, fixed_split_tokens)
            call = _Call(q, k_cache, block_table, cache_seqlens, *settings)
            made = Plan(call, settings)
            results = _decode(call, None, None, made, not call.on_cuda, makes_plan=True)
            tile_scheduler_metadata.plan = made
            return results
    return decode(q, k_cache, block_table, cache_seqlens, scale=softmax_scale, causal=causal, stage=_stage, plan=made,
                  cache_format=cache_format, fixed_split_tokens=fixed_split_tokens)


def _missing(name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: mla_stages has FlashMLA's dense decode alone")

    return missing


def _names(older: bool) -> Any:
    missing = ("flash_mla_sparse_fwd", "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func",
               "flash_attn_varlen_kvpacked_func")
    return {"FlashMLASchedMeta": FlashMLASchedMeta, "flash_mla_with_kvcache": flash_mla_with_kvcache,
            "get_mla_metadata": get_mla_metadata_tensors if older else get_mla_metadata,
            **{name: _missing(name) for name in missing}}


def install(older: bool = False, name: str = "flash_mla") -> None:
    """Makes `import flash_mla` find this from now on.

    :param older: get_mla_metadata gives tensors
    :param name: of the module that is imported: "sgl_kernel.flash_mla" for SGLang's own
    """
    module = types.ModuleType(name, __doc__)
    module.__dict__.update(_names(older))
    sys.modules[name] = module


def patch(module: Any, older: bool = False) -> None:
    """Replaces what a module has imported of FlashMLA's dense decode.

    :param older: get_mla_metadata gives tensors
    """
    names = {name: value for name, value in _names(older).items()
             if name in ("FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata") and hasattr(module, name)}
    if "flash_mla_with_kvcache" not in names:
        raise AttributeError(f"{module.__name__} has no flash_mla_with_kvcache to replace")
    for name, value in names.items():
        setattr(module, name, value)
