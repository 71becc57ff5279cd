"""What only PyTorch has: torch.compile, gradients, other devices."""
import subprocess
import sys

import pytest

import mla_stages
from conftest import SCALE, Problem
from mla_stages import _arrays

torch = pytest.importorskip("torch")


@pytest.fixture
def arrays():
    return Problem().of("torch")


def test_the_operator(arrays):
    mla_stages.decode(*arrays, scale=SCALE, stage="03")
    torch.library.opcheck(torch.ops.mla_stages.decode, (*arrays, SCALE, False, "03", "16bit", 1.0, 0))


def test_compiling_without_a_break(arrays):
    q, *rest = arrays
    expected = mla_stages.decode(q * 2, *rest, scale=SCALE, stage="03")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def double(q, kv_cache, block_table, seqlens_k):
        out, lse = mla_stages.decode(q * 2, kv_cache, block_table, seqlens_k, scale=SCALE, stage="03")
        return out * 2, lse

    out, lse = double(q, *rest)
    assert torch.equal(out, expected[0] * 2) and torch.equal(lse, expected[1])


def test_compiling_what_cannot_be(arrays):
    plan = mla_stages.plan(*arrays, stage="04")
    compiled = torch.compile(lambda *a: mla_stages.decode(*a, scale=SCALE, stage="04", plan=plan), backend="eager",
                             fullgraph=True)
    with pytest.raises(Exception, match="under torch.compile decode takes no out, lse, plan, check or PagedCache"):
        compiled(*arrays)


def test_exporting(arrays):
    class Layer(torch.nn.Module):
        def forward(self, *arguments):
            return mla_stages.decode(*arguments, scale=SCALE, stage="03")

    expected = mla_stages.decode(*arrays, scale=SCALE, stage="03")
    program = torch.export.export(Layer(), arrays)
    assert "torch.ops.mla_stages.decode" in program.graph_module.code
    out, lse = program.module()(*arrays)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_a_stream_of_cupys_is_kept(arrays):
    """A PyTorch tensor among the arguments would bring PyTorch's stream instead."""
    tvm_ffi = pytest.importorskip("tvm_ffi")
    views = _arrays._CuPy().without_streams((*arrays, None, 1))
    assert all(isinstance(one, tvm_ffi.Tensor) for one in views[:4]) and views[4:] == [None, 1]
    assert torch.equal(torch.from_dlpack(views[0]), arrays[0])


def test_torch_imported_last():
    code = ("import mla_stages, torch\n"
            "q = torch.zeros(0, 1, 16, 576, dtype=torch.float16)\n"
            "table = torch.zeros(0, 1, dtype=torch.int32)\n"
            "mla_stages.decode(q, torch.zeros(1, 64, 1, 576, dtype=torch.float16), table, table[:, 0], scale=1.0)\n"
            "torch.ops.mla_stages.decode")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_are_refused(arrays):
    q, *rest = arrays
    q.requires_grad_()
    with pytest.raises(ValueError, match="q requires a gradient, which decode does not have"):
        mla_stages.decode(q, *rest, scale=SCALE, stage="03")
    with torch.no_grad():
        mla_stages.decode(q, *rest, scale=SCALE, stage="03")


def test_a_cache_of_float8(arrays):
    q, kv_cache, table, lengths = arrays
    codes = mla_stages.quantise(kv_cache, "fp8_tensor", cache_scale=0.02)
    settings = {"scale": SCALE, "stage": "13", "cache_format": "fp8_tensor", "cache_scale": 0.02}
    expected = mla_stages.decode(q, codes, table, lengths, **settings)
    assert torch.equal(mla_stages.decode(q, codes.view(torch.float8_e4m3fn), table, lengths, **settings)[0], expected[0])
