"""Arrays of NumPy, PyTorch, CuPy and JAX: how each is seen by the library, and how each makes results."""
import sys
from typing import Any, Dict, List, Sequence, Tuple

Device = Tuple[int, int]  # DLPack's type and number
CPU: Device = (1, 0)
_DLPACK_CUDA = 2

_ALLOWED = "an array of NumPy, PyTorch, CuPy or JAX"


class Framework:
    """One array library. This one is NumPy; the others say where they differ."""

    name = "numpy"

    def view(self, name: str, array: Any, written: bool = False) -> Any:
        """A view of the same memory that tvm-ffi takes."""
        array = _as_known(name, array)
        if array.flags.writeable:
            return array
        if written:
            raise ValueError(f"{name} is read-only, must be writable")
        import tvm_ffi

        return tvm_ffi.from_dlpack(array.__dlpack__(max_version=(1, 0)))

    def device(self, array: Any) -> Device:
        return CPU

    def empty(self, shape: Sequence[int], dtype: Any, like: Any) -> Any:
        """Memory to write; `dtype` is a name, or an array's dtype."""
        import numpy

        return numpy.empty(shape, dtype)

    def result(self, array: Any) -> Any:
        """The array that a caller gets for memory that empty() made."""
        return array

    def astype(self, array: Any, dtype: Any) -> Any:
        return array.astype(dtype)

    def call(self, array: Any, function: Any, arguments: Sequence[Any]) -> Any:
        """Calls a function of the library on the framework's current stream for the array's device."""
        return function(*arguments)

    def done_with(self, memory: Any) -> None:
        """Called when the work that uses memory of empty() has been enqueued."""


class _Torch(Framework):
    name = "torch"

    def __init__(self) -> None:
        from . import _torch_is_here

        self.torch = sys.modules["torch"]
        _torch_is_here()
        self.eight_bits, self.integers = (getattr(self.torch, kind, None) for kind in ("float8_e4m3fn", "uint16"))

    def view(self, name: str, array: Any, written: bool = False) -> Any:
        if array.requires_grad and self.torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which decode does not have: use torch.no_grad() or detach()")
        dtype = array.dtype
        if dtype is self.eight_bits:
            return array.view(self.torch.uint8)
        if dtype is self.integers:
            raise _is_integers(name, "torch.bfloat16")
        return array.detach() if array.requires_grad else array

    def device(self, array: Any) -> Device:
        return (_DLPACK_CUDA, array.get_device()) if array.is_cuda else CPU

    def empty(self, shape: Sequence[int], dtype: Any, like: Any) -> Any:
        return like.new_empty(shape, dtype=self._dtype(dtype))

    def astype(self, array: Any, dtype: Any) -> Any:
        return array.to(self._dtype(dtype))

    def _dtype(self, dtype: Any) -> Any:
        return getattr(self.torch, dtype) if isinstance(dtype, str) else dtype


class _CuPy(Framework):
    name = "cupy"

    def __init__(self) -> None:
        self.memory_of_graphs: List[Any] = []

    def view(self, name: str, array: Any, written: bool = False) -> Any:
        import tvm_ffi

        return tvm_ffi.from_dlpack(_as_known(name, array).__dlpack__(stream=-1))  # -1: no other stream waits

    def device(self, array: Any) -> Device:
        return (_DLPACK_CUDA, array.device.id)

    def empty(self, shape: Sequence[int], dtype: Any, like: Any) -> Any:
        import cupy  # type: ignore[import-not-found,unused-ignore]

        with like.device:
            return cupy.empty(shape, dtype)

    def call(self, array: Any, function: Any, arguments: Sequence[Any]) -> Any:
        import cupy
        import tvm_ffi

        number = array.device.id
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", number), cupy.cuda.get_current_stream(number).ptr):
            return function(*self.without_streams(arguments))

    def without_streams(self, views: Sequence[Any]) -> Sequence[Any]:
        """The views, but none that makes tvm-ffi take another stream than CuPy's, as a tensor of PyTorch would."""
        torch = sys.modules.get("torch")
        if torch is None:
            return views
        import tvm_ffi

        return [tvm_ffi.from_dlpack(one) if isinstance(one, torch.Tensor) else one for one in views]

    def done_with(self, memory: Any) -> None:
        import cupy

        # CuPy's pool does not know graphs: it would give memory to others that a replay writes.
        if cupy.cuda.get_current_stream(memory.device.id).is_capturing():
            self.memory_of_graphs.append(memory)


class _Jax(Framework):
    name = "jax"

    def view(self, name: str, array: Any, written: bool = False) -> Any:
        if written:
            raise TypeError(f"{name} is an array of JAX, which cannot be written: leave it out")
        if array.dtype.name == "uint16":
            raise _is_integers(name, "jax.numpy.bfloat16")
        self.device(array)
        return array.view("uint8") if array.dtype.name == "float8_e4m3fn" else array

    def device(self, array: Any) -> Device:
        platform = next(iter(array.devices())).platform
        if platform != "cpu":
            raise NotImplementedError(f"arrays of JAX on {platform}: only those on the CPU, because JAX does not tell its "
                                      "stream")
        return CPU

    def result(self, array: Any) -> Any:
        import jax

        return jax.device_put(array, jax.devices("cpu")[0])  # where the arguments are, whatever JAX prefers


class _Other(Framework):
    """Any object with __dlpack__, such as a PagedCache's memory. It can be read, but makes no results."""

    name = "other"

    def view(self, name: str, array: Any, written: bool = False) -> Any:
        if "uint16" in str(getattr(array, "dtype", "")):
            raise _is_integers(name, "bfloat16")
        return array


_FRAMEWORKS = {"numpy": Framework, "torch": _Torch, "cupy": _CuPy, "jax": _Jax, "jaxlib": _Jax}
_by_type: Dict[type, Framework] = {}
_made: Dict[type, Framework] = {}


def _as_known(name: str, array: Any) -> Any:
    """An array of NumPy or CuPy as a type that DLPack knows: those of ml_dtypes become integers."""
    dtype = array.dtype
    if dtype.isbuiltin == 1 and dtype.kind in "biufc" and dtype.char != "H":  # 1: NumPy's own, in this byte order
        return array
    if dtype.name == "bfloat16":
        return array.view("u2")
    if dtype.name == "float8_e4m3fn":
        return array.view("u1")
    if dtype.char == "H":
        raise _is_integers(name, "ml_dtypes.bfloat16")
    raise TypeError(f"{name} has the dtype {dtype.name}, in the byte order {dtype.byteorder!r}, which no argument has")


def _is_integers(name: str, bfloat16: str) -> TypeError:
    return TypeError(f"{name} has the dtype uint16, must be bfloat16 or float16: if it holds bfloat16, view it as "
                     f"{bfloat16}")


def framework_of(name: str, array: Any) -> Framework:
    """The framework of an array."""
    kind = type(array)
    found = _by_type.get(kind)
    if found is None:
        modules = [base.__module__.split(".")[0] for base in kind.__mro__]
        made = next((_FRAMEWORKS[module] for module in modules if module in _FRAMEWORKS), None)
        if made is None or not hasattr(array, "dtype"):
            if not hasattr(array, "__dlpack__"):
                raise TypeError(f"{name} is of the type {kind.__name__}, must be {_ALLOWED}")
            made = _Other
        if made is _Jax and "Tracer" in kind.__name__:
            raise TypeError(f"{name} is traced by JAX: call mla_stages through jax.pure_callback (docs/python.md)")
        found = _by_type[kind] = _made.setdefault(made, _made.get(made) or made())
    return found


def view(name: str, array: Any, written: bool = False) -> Any:
    known = _by_type.get(type(array))
    return (known or framework_of(name, array)).view(name, array, written)


def need_results(name: str, framework: Framework) -> None:
    """Refuses an array that can be read, but whose framework is not known."""
    if framework.name == "other":
        raise TypeError(f"{name} must be {_ALLOWED}, because results come back as such")


def device_named(device: str) -> Device:
    """'cpu', 'cuda' or 'cuda:1'"""
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return CPU
    if kind == "cuda" and (not number or number.isdecimal()):
        return _DLPACK_CUDA, int(number or 0)
    raise ValueError(f"device = {device!r} must be 'cpu', 'cuda' or 'cuda:N'")


def is_cuda(device: Device) -> bool:
    return device[0] == _DLPACK_CUDA
