"""What only JAX has: calls inside jax.jit."""
import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, back

jax = pytest.importorskip("jax")


def test_inside_jit():
    arrays = Problem().of("jax")
    q, *_ = arrays

    def call(*arguments):
        return mla_stages.decode(*arguments, scale=SCALE, stage="03")

    with pytest.raises(TypeError, match="q is traced by JAX: call mla_stages through jax.pure_callback"):
        jax.jit(call)(*arrays)
    shapes = (jax.ShapeDtypeStruct((2, 1, 16, 512), q.dtype), jax.ShapeDtypeStruct((2, 16, 1), "float32"))
    out, lse = jax.jit(lambda *arguments: jax.pure_callback(call, shapes, *arguments))(*arrays)
    expected = call(*arrays)
    numpy.testing.assert_array_equal(back(out), back(expected[0]))
    numpy.testing.assert_array_equal(back(lse), back(expected[1]))
