"""Arguments that break the contract: the exception names the argument, its value and what is allowed."""
import ctypes
import re

import ml_dtypes
import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem

CASES = {
    # argument, what it becomes, exception, text
    "a list": ("q", lambda q: [1.0], TypeError, "q is of the type list, must be an array of NumPy, PyTorch, CuPy or JAX"),
    "nothing": ("kv_cache", lambda _: None, TypeError, "kv_cache is of the type NoneType, must be an array"),
    "float32": ("q", lambda q: q.astype(numpy.float32), TypeError, "q has the dtype float32, must be bfloat16 or float16"),
    "integers": ("q", lambda q: q.view(numpy.uint16), TypeError,
                 "q has the dtype uint16, must be bfloat16 or float16: if it holds bfloat16, view it as ml_dtypes.bfloat16"),
    "another cache dtype": ("kv_cache", lambda kv: kv.astype(numpy.float16), TypeError,
                            "kv_cache is fp16, q is bf16: they must be the same"),
    "8 bits unnamed": ("kv_cache", lambda kv: kv.view(numpy.uint8)[..., :576], TypeError,
                       "kv_cache has the dtype uint8, must be that of q for cache_format = '16bit'"),
    "three dimensions": ("q", lambda q: q[:, 0], ValueError,
                         "q has the shape [2, 16, 576], must be [batch, seqlen_q, num_heads_q, 576]"),
    "another width": ("q", lambda q: q[..., :512], ValueError, "q has the shape [2, 1, 16, 512], must be"),
    "a cache of another width": ("kv_cache", lambda kv: kv[..., :512], ValueError, "kv_cache has the shape [5, 64, 1, 512]"),
    "another batch": ("block_table", lambda table: table[:1], ValueError,
                      "block_table has the shape [1, 3], must be [batch, max_pages_per_seq] = [2, any]"),
    "int64": ("block_table", lambda table: table.astype(numpy.int64), TypeError,
              "block_table has the dtype int64, must be int32"),
    "long lengths": ("seqlens_k", lambda lengths: lengths.astype(numpy.int64), TypeError,
                     "seqlens_k has the dtype int64, must be int32"),
    "two-dimensional lengths": ("seqlens_k", lambda lengths: lengths[None], ValueError,
                                "seqlens_k has the shape [1, 2], must be [batch] = [2]"),
    "a last dimension with gaps": ("q", lambda q: numpy.repeat(q, 2, -1)[..., ::2], ValueError,
                                   "q has the stride 2 in its last dimension, must be 1: nothing is copied"),
    # A stride of -1 elements, which the library would take for "as if contiguous".
    "a table backwards": ("block_table", lambda table: numpy.ascontiguousarray(table[:, :1])[::-1], ValueError,
                          "block_table has the stride -1 in dimension 0, must be at least 0"),
    "lse backwards": ("lse", lambda _: numpy.zeros((2, 16, 1), numpy.float32)[:, ::-1], ValueError,
                      "lse has the stride -1 in dimension 1, must be at least 0"),
    "another byte order": ("q", lambda q: q.astype(">f2"), TypeError,
                           "q has the dtype float16, in the byte order '>', which no argument has"),
    "text": ("seqlens_k", lambda lengths: lengths.astype("U4"), TypeError, "seqlens_k has the dtype str"),
    "rows that are misaligned": ("q", lambda q: numpy.concatenate([q, q], -1)[..., 1:577], ValueError,
                                 " is not aligned to 16 bytes"),
    "rows too near": ("kv_cache", lambda kv: numpy.concatenate([kv, kv], -1)[..., :1152 - 4].reshape(-1)
                      [:5 * 64 * 580].reshape(5, 64, 1, 580)[..., :576], ValueError,
                      "kv_cache stride of page_size = 580 must be a multiple of 8"),
    "heads that do not divide": ("kv_cache", lambda kv: numpy.concatenate([kv] * 3, 2), ValueError,
                                 "num_heads_q = 16 is not a multiple of num_heads_kv = 3"),
    "a page of 48": ("kv_cache", lambda kv: kv[:, :48], ValueError, "page_size = 48"),
    "a page id past the end": ("block_table", lambda table: table + 5, ValueError, "block_table[0, 0] = "),
    "a length past the table": ("seqlens_k", lambda lengths: lengths + 1000, ValueError,
                                "seqlens_k[0] = 1070 must be in [0, 192]"),
    "scale 0": ("scale", lambda _: 0.0, ValueError, "softmax_scale = 0 must be finite and greater than 0"),
    "scale NaN": ("scale", lambda _: float("nan"), ValueError, "softmax_scale = nan"),
    "no scale": ("scale", lambda _: None, TypeError, "scale = None must be a number"),
    "a stage that is not there": ("stage", lambda _: "99", ValueError,
                                  "stage = '99': there is no stage '99'; there are 00_reference, "),
    "a stage by number": ("stage", lambda _: 8, TypeError,
                          "stage = 8 must be a name of stages(), or its number as in '08'"),
    "half a split": ("fixed_split_tokens", lambda _: 64.0, TypeError, "fixed_split_tokens = 64.0 must be an integer"),
    "an unknown format": ("cache_format", lambda _: "fp4", ValueError, "cache_format = 'fp4' is not one of '16bit', "),
    "an uneven split": ("fixed_split_tokens", lambda _: 100, ValueError,
                        "fixed_split_tokens = 100 must be 0 or a positive multiple of 64"),
    "out of another type": ("out", lambda _: numpy.zeros((2, 1, 16, 512), numpy.float16), TypeError,
                            "out is fp16, q is bf16"),
    "out of another shape": ("out", lambda _: numpy.zeros((2, 1, 16, 576), ml_dtypes.bfloat16), ValueError,
                             "out has the shape [2, 1, 16, 576], must be [batch, seqlen_q, num_heads_q, 512] = "
                             "[2, 1, 16, 512]"),
    "out that overlaps": ("out", lambda _: numpy.broadcast_to(numpy.zeros((1, 1, 1, 512), ml_dtypes.bfloat16),
                                                              (2, 1, 16, 512)), ValueError, "out is read-only"),
    "lse of another type": ("lse", lambda _: numpy.zeros((2, 16, 1)), TypeError,
                            "lse has the dtype float64, must be float32"),
    "lse of another shape": ("lse", lambda _: numpy.zeros((2, 1, 16), numpy.float32), ValueError,
                             "lse has the shape [2, 1, 16], must be [batch, num_heads_q, seqlen_q] = [2, 16, 1]"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(case, problem):
    argument, change, error, text = CASES[case]
    arguments = {"q": problem.q, "kv_cache": problem.kv_cache, "block_table": problem.block_table,
                 "seqlens_k": problem.seqlens_k, "scale": SCALE, "stage": "03",
                 "out": numpy.full((2, 1, 16, 512), 7, ml_dtypes.bfloat16)}
    untouched = arguments["out"]
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises(error, match=re.escape(text)):
        mla_stages.decode(**arguments)
    assert (untouched == 7).all()


def test_a_stage_on_the_cpu_has_nothing_of_a_gpu(problem):
    with pytest.raises(ValueError, match="nothing to record: stage '00' launched no kernel"):
        mla_stages.trace(*problem.arrays, scale=SCALE, stage="00")
    with pytest.raises(Exception, match="00_reference runs on the CPU: no limit of a GPU binds it"):
        mla_stages.predict("00", batch=1, seqlen_k=64)


def test_a_device_that_is_not_here_says_so():
    for call in (lambda: mla_stages.stages("tpu"), lambda: mla_stages.stages("cuda:x")):
        with pytest.raises(ValueError, match="must be 'cpu', 'cuda' or 'cuda:N'"):
            call()
    on_gpu = mla_stages.stages("cuda")
    assert all(isinstance(stage.why_not, str) for stage in on_gpu)


class OnAnotherDevice:
    """An array that says by DLPack that it is on a GPU."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, "bytes"

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2  # DLTensor: data, device type
        return capsule


@pytest.mark.parametrize("argument", ["kv_cache", "block_table", "seqlens_k"])
def test_mixed_devices(argument, problem):
    arguments = {"q": problem.q, "kv_cache": problem.kv_cache, "block_table": problem.block_table,
                 "seqlens_k": problem.seqlens_k}
    arguments[argument] = OnAnotherDevice(arguments[argument].view(numpy.int16 if argument == "kv_cache" else "i4"))
    with pytest.raises(ValueError, match=f"{argument} is on cuda:0, q is on cpu: all must be on one device"):
        mla_stages.decode(**arguments, scale=SCALE)


def test_the_reference_takes_no_memory(problem):
    with pytest.raises(ValueError, match="stage = 'reference' takes no out, lse or plan"):
        mla_stages.decode(*problem.arrays, scale=SCALE, stage="reference", out=problem.q[..., :512])


@pytest.mark.parametrize("kind", ["float8_e5m2", "float8_e4m3fnuz", "bool"])
def test_other_types_of_8_bits(framework, kind):
    """Types of 8 bits with other codes are refused."""
    problem = Problem()
    q, kv_cache, table, lengths = problem.of(framework)
    codes = mla_stages.quantise(kv_cache, "fp8_tensor")
    if framework == "torch":
        codes = codes.view(getattr(pytest.importorskip("torch"), kind))
    else:
        codes = codes.view(getattr(ml_dtypes, kind, bool))
    with pytest.raises(TypeError, match="kv_cache has the dtype "):
        mla_stages.decode(q, codes, table, lengths, scale=SCALE, cache_format="fp8_tensor")


@pytest.mark.parametrize("call", [
    lambda problem: mla_stages.dequantise(problem.kv_cache, "fp8_tensor"),
    lambda problem: mla_stages.decode(*problem.arrays, scale=SCALE, stage="13", cache_format="fp8_tensor")])
def test_codes_have_8_bits(call, problem):
    with pytest.raises(TypeError, match="kv_cache has the dtype bfloat16, must be uint8, int8 or float8_e4m3fn for "):
        call(problem)


def test_quantising_to_16_bits(problem):
    with pytest.raises(ValueError, match="cache_format = 16bit"):
        mla_stages.quantise(problem.kv_cache, "16bit")


def test_merging_nothing():
    with pytest.raises(ValueError, match="0 outs and 0 lses"):
        mla_stages.merge([], [])


def test_memory_without_a_framework_makes_no_results(problem):
    cache = mla_stages.PagedCache(4)
    with pytest.raises(TypeError, match="q must be an array of NumPy, PyTorch, CuPy or JAX, because results come back as such"):
        mla_stages.decode(cache.data, problem.kv_cache, problem.block_table, problem.seqlens_k, scale=SCALE)


def test_lengths_and_pages_are_not_checked_if_so_asked(problem):
    # A length past the table counts as the longest that the table can describe.
    longest = numpy.array([192, 3], numpy.int32)
    problem.block_table[:] = 0
    expected = mla_stages.decode(problem.q, problem.kv_cache, problem.block_table, longest, scale=SCALE, stage="03")
    longest[0] = 5000
    result = mla_stages.decode(problem.q, problem.kv_cache, problem.block_table, longest, scale=SCALE, stage="03",
                               check=False)
    assert (result[1] == expected[1]).all()
