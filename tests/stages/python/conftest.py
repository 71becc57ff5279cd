"""Problems for the tests, as arrays of every framework that is installed here."""
import importlib
import os

import numpy
import pytest

import mla_stages

SCALE = 0.135234
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX leaves some of a GPU to others


class Problem:
    """Random q and cache, with pages in random order. Entries past a sequence's end are garbage."""

    def __init__(self, lengths=(70, 3), heads=16, seqlen_q=1, dtype="bfloat16", page_size=64, heads_kv=1, seed=0):
        ml_dtypes = importlib.import_module("ml_dtypes")
        random = numpy.random.default_rng(seed)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else numpy.float16
        pages = [-(-length // page_size) for length in lengths]
        total = sum(pages) + 2
        self.q = random.standard_normal((len(lengths), seqlen_q, heads, 576)).astype(kind)
        self.kv_cache = random.standard_normal((total, page_size, heads_kv, 576)).astype(kind)
        self.block_table = numpy.full((len(lengths), max(pages) + 1), 12345, numpy.int32)
        order = iter(random.permutation(total))
        for row, count in zip(self.block_table, pages):
            row[:count] = [next(order) for _ in range(count)]
        self.seqlens_k = numpy.array(lengths, numpy.int32)

    @property
    def arrays(self):
        return self.q, self.kv_cache, self.block_table, self.seqlens_k

    def of(self, framework):
        return tuple(to(framework, array) for array in self.arrays)


def to(framework, array):
    """A NumPy array as an array of another framework."""
    if framework == "numpy":
        return array
    if framework == "jax":
        jax = importlib.import_module("jax")
        return jax.device_put(array, jax.devices("cpu")[0])
    torch = importlib.import_module("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(numpy.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def back(array):
    """Any framework's array as float64 in NumPy."""
    if type(array).__module__.startswith("torch"):
        array = array.double().numpy()
    return numpy.asarray(array).astype(numpy.float64)


def assert_close(results, expected):
    """Compares results in 16 bits with the reference's. Values of these problems are about 1."""
    out, lse = map(back, results)
    true_out, true_lse = map(back, expected)
    assert out.shape == true_out.shape and lse.shape == true_lse.shape
    numpy.testing.assert_allclose(out, true_out, rtol=2 ** -7, atol=0.01)
    numpy.testing.assert_allclose(lse, true_lse, rtol=1e-5, atol=1e-4)


@pytest.fixture(params=["numpy", "torch", "jax"])
def framework(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def problem():
    return Problem()


@pytest.fixture
def truth(problem):
    return mla_stages.reference(*problem.arrays, scale=SCALE)
