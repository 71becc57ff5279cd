"""The C++ library, loaded at the first call: tvm-ffi imports torch where that is installed, which takes time."""
import functools
import os
import pathlib
from typing import Any

_cuda_was_used = False
_cuda_is_lost = False


class _Library:
    """The functions of bindings.cpp, each looked up once."""

    def __init__(self) -> None:
        self._module: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._module is None:
            import tvm_ffi

            tvm_ffi.register_error("NotImplementedError", NotImplementedError)
            self._module = tvm_ffi.load_module(pathlib.Path(__file__).with_name("libmla_stages.so"))
        function = getattr(self._module, name)
        setattr(self, name, function)
        return function


library = _Library()


@functools.lru_cache(maxsize=256)
def options(stage: str, scale: float, causal: bool, cache_format: str, cache_scale: float,
            fixed_split_tokens: int) -> Any:
    """What a call says beside its tensors."""
    for name, value, kind, allowed in (("stage", stage, str, "a name of stages(), or its number as in '08'"),
                                       ("cache_format", cache_format, str, "a name"),
                                       ("fixed_split_tokens", fixed_split_tokens, int, "an integer")):
        if not isinstance(value, kind):
            raise TypeError(f"{name} = {value!r} must be {allowed}")
    return library.make_options(stage, scale, causal, cache_format, cache_scale, fixed_split_tokens)


def use_cuda() -> None:
    """To be called before any work on a GPU. A CUDA context does not outlive a fork."""
    global _cuda_was_used
    if _cuda_is_lost:
        raise RuntimeError("this process was forked from one that had used CUDA: "
                           "start it with multiprocessing's method 'spawn'")
    _cuda_was_used = True


def _after_fork() -> None:
    global _cuda_is_lost
    _cuda_is_lost = _cuda_was_used


os.register_at_fork(after_in_child=_after_fork)
