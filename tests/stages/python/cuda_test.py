"""Tensors on a GPU: results, streams, graphs, devices. Skipped without one."""
import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, assert_close

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU that PyTorch can use", allow_module_level=True)
if all(stage.why_not for stage in mla_stages.stages("cuda")):
    pytest.skip("mla_stages was built without CUDA, or none of its stages runs on this GPU", allow_module_level=True)


def on_gpu(problem):
    return tuple(array.cuda() for array in problem.of("torch"))


def test_every_stage_that_runs_here(problem, truth):
    arrays = on_gpu(problem)
    for stage in mla_stages.stages("cuda"):
        if not stage.why_not and "16bit" in stage.cache_formats:
            out, lse = mla_stages.decode(*arrays, scale=SCALE, stage=stage.name, check=True)
            assert out.is_cuda and lse.is_cuda
            assert_close((out.cpu(), lse.cpu()), truth)
    assert_close([one.cpu() for one in mla_stages.decode(*arrays, scale=SCALE)], truth)


def test_nothing_waits(problem, truth):
    arrays = on_gpu(problem)
    mla_stages.decode(*arrays, scale=SCALE)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(), torch.cuda.Event()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # pylint: disable=protected-access
        begin.record()
        result = mla_stages.decode(*arrays, scale=SCALE)
        end.record()
        assert not begin.query() and not end.query()  # the call returned while its stream was still asleep
    stream.synchronize()
    assert_close([one.cpu() for one in result], truth)


def test_a_graph_follows_the_lengths():
    problem = Problem(lengths=(300, 20))
    q, kv_cache, table, lengths = on_gpu(problem)
    table.clamp_(max=len(kv_cache) - 1)
    arrays = (q, kv_cache, table, lengths)
    plan = mla_stages.plan(*arrays)
    out, lse = mla_stages.decode(*arrays, scale=SCALE, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(*arrays)
        mla_stages.decode(*arrays, scale=SCALE, plan=plan, out=out, lse=lse)
    for first in (300, 150, 1):
        lengths[0] = first
        graph.replay()
        problem.seqlens_k[0] = first
        assert_close((out.cpu(), lse.cpu()), mla_stages.reference(*problem.arrays, scale=SCALE))


def test_a_cache_on_the_gpu(problem):
    cache = mla_stages.PagedCache(8, device="cuda")
    sequence = cache.add()
    rows = problem.of("torch")[1].reshape(-1, 1, 576)[:100].cuda()
    cache.append([sequence], [100], rows)
    q = problem.of("torch")[0][:1].cuda()
    result = mla_stages.decode(q, cache, *cache.tables([sequence], like=q), scale=SCALE)
    flat = problem.kv_cache.reshape(-1, 64, 1, 576)[:2]
    expected = mla_stages.reference(problem.q[:1], flat, numpy.array([[0, 1]], numpy.int32),
                                    numpy.array([100], numpy.int32), scale=SCALE)
    assert_close([one.cpu() for one in result], expected)


def test_mixed_devices(problem):
    q, *rest = problem.of("torch")
    with pytest.raises(ValueError, match="kv_cache is on cpu, q is on cuda:0: all must be on one device"):
        mla_stages.decode(q.cuda(), *rest, scale=SCALE)


def test_cupy():
    cupy = pytest.importorskip("cupy")
    problem = Problem(dtype="float16")
    arrays = [cupy.asarray(array) for array in problem.arrays]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out, lse = mla_stages.decode(*arrays, scale=SCALE)
    stream.synchronize()
    assert isinstance(out, cupy.ndarray)
    assert_close((out.get(), lse.get()), mla_stages.reference(*problem.arrays, scale=SCALE))
