"""What the package does for a GPU apart from kernels, tested with arrays on a CPU: memory of the caller's framework, streams."""
import contextlib
import sys
import types

import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, back
from mla_stages import _arrays, _library


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Python takes every array for one on a GPU; the library itself still sees the CPU."""
    monkeypatch.setattr(_library, "_cuda_was_used", False)
    monkeypatch.setattr(mla_stages, "_workspace_bytes", {})
    monkeypatch.setattr(_arrays, "is_cuda", lambda device: True)


@pytest.mark.parametrize("stage", ["01", "03", "04"])
def test_memory_comes_from_the_framework(stage, framework, monkeypatch, request):
    problem = Problem(lengths=(300, 20))
    arrays = problem.of(framework)
    expected = mla_stages.decode(*arrays, scale=SCALE, stage=stage)
    request.getfixturevalue("as_on_cuda")
    asked = []
    kind = type(_arrays.framework_of("q", arrays[0]))
    original = kind.empty
    monkeypatch.setattr(kind, "empty", lambda self, shape, dtype, like:
                        asked.append((dtype, shape)) or original(self, shape, dtype, like))
    plain = mla_stages.decode(*arrays, scale=SCALE, stage=stage)
    memory = [shape[0] for dtype, shape in asked if dtype == "uint8"]
    plan_bytes, scratch_bytes = next(iter(mla_stages._workspace_bytes.values()))
    assert memory == ([plan_bytes + scratch_bytes] if plan_bytes + scratch_bytes else [])
    assert (plan_bytes > 0) == (stage == "04") and (scratch_bytes > 0) == (stage != "03")
    plan = mla_stages.plan(*arrays, stage=stage)
    asked.clear()
    planned = mla_stages.decode(*arrays, scale=SCALE, stage=stage, plan=plan)
    assert [shape[0] for dtype, shape in asked if dtype == "uint8"] == ([scratch_bytes] if scratch_bytes else [])
    for result in (plain, planned):
        numpy.testing.assert_array_equal(back(result[0]), back(expected[0]))
        numpy.testing.assert_array_equal(back(result[1]), back(expected[1]))
    assert _library._cuda_was_used


def test_too_little_memory_is_refused(problem, as_on_cuda, monkeypatch):
    original = _arrays.Framework.empty
    monkeypatch.setattr(_arrays.Framework, "empty", lambda self, shape, dtype, like: original(
        self, (shape[0] - 1,) if dtype == "uint8" else shape, dtype, like))
    with pytest.raises(RuntimeError, match="workspace too small: workspace.bytes = "):
        mla_stages.decode(*problem.arrays, scale=SCALE, stage="04")


def test_a_cache_after_a_fork(problem, monkeypatch):
    cache = mla_stages.PagedCache(4)
    sequence = cache.add()
    monkeypatch.setattr(cache, "_on_cuda", True)
    monkeypatch.setattr(_library, "_cuda_is_lost", True)
    for call in (lambda: cache.append([sequence], [1], problem.kv_cache[0, :1]),
                 lambda: cache.tables([sequence], like=problem.q)):
        with pytest.raises(RuntimeError, match="forked from one that had used CUDA"):
            call()


def test_jax_on_a_gpu_is_refused(problem, monkeypatch):
    pytest.importorskip("jax")
    q, *rest = problem.of("jax")

    def device(self, array):
        if array is rest[2]:
            raise NotImplementedError("arrays of JAX on gpu")
        return _arrays.CPU

    monkeypatch.setattr(_arrays._Jax, "device", device)
    with pytest.raises(NotImplementedError, match="arrays of JAX on gpu"):
        mla_stages.decode(q, *rest, scale=SCALE, stage="03")


def test_cupys_stream(problem, monkeypatch):
    """With a stand-in for CuPy, which has the parts that the package uses."""
    cupy = types.ModuleType("cupy")
    capturing = False

    class Device(contextlib.nullcontext):
        id = 1

    class ndarray(numpy.ndarray):  # pylint: disable=invalid-name
        device = Device()

        def __dlpack__(self, *, stream):
            assert stream == -1
            return self.view(numpy.ndarray).__dlpack__()

    ndarray.__module__ = "cupy"
    cupy.empty = lambda shape, dtype: numpy.empty(shape, dtype).view(ndarray)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda device: types.SimpleNamespace(
        ptr=4710 + device, is_capturing=lambda: capturing))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_library, "_cuda_was_used", False)
    import tvm_ffi

    seen = []
    run = mla_stages._Call.run

    def watched(self, function, *more):
        self.framework.call(self.q, lambda: seen.append(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 1))), ())
        return run(self, function, *more)

    monkeypatch.setattr(mla_stages._Call, "run", watched)
    expected = mla_stages.decode(*problem.arrays, scale=SCALE, stage="04")
    seen.clear()
    out, lse = mla_stages.decode(*(array.view(ndarray) for array in problem.arrays), scale=SCALE, stage="04")
    assert isinstance(out, ndarray) and isinstance(lse, ndarray) and seen == [4711, 4711]  # its workspace, then it
    numpy.testing.assert_array_equal(back(out), back(expected[0]))
    kept = _arrays.framework_of("out", out).memory_of_graphs
    assert not kept
    capturing = True  # the call's workspace now belongs to the graph
    mla_stages.decode(*(array.view(ndarray) for array in problem.arrays), scale=SCALE, stage="04")
    assert [one.dtype.name for one in kept] == ["uint8"]
    kept.clear()
