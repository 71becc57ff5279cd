"""Tensors on a GPU: results, streams, graphs, memory, threads, devices. Skipped without one."""
import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import traceback

import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, assert_close
from mla_stages import flash_mla

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU that PyTorch can use", allow_module_level=True)
if all(stage.why_not for stage in mla_stages.stages("cuda")):
    pytest.skip("mla_stages was built without CUDA, or none of its stages runs on this GPU", allow_module_level=True)

RUNNING = [stage for stage in mla_stages.stages("cuda") if not stage.why_not]
FORMATS = ("fp8_tile128", "fp8_tensor", "int8_tile128")


def on_gpu(problem, device="cuda"):
    """Entries of the table past a sequence's end stay garbage."""
    return tuple(array.to(device) for array in problem.of("torch"))


def on_cpu(results):
    return [one.cpu() for one in results]


def same(results, expected):
    return all(torch.equal(one, other) for one, other in zip(results, expected))


@contextlib.contextmanager
def asleep(stream):
    """A torch stream that is the current one within the block, and is busy all the time."""
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # pylint: disable=protected-access
        event.record()
        yield
        assert not event.query(), "a call waited for its stream"


# ---- Results

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_every_stage_that_runs_here(dtype, seqlen_q):
    problem = Problem(lengths=(1000, 3, 0, 129), dtype=dtype, seqlen_q=seqlen_q)
    truth = mla_stages.reference(*problem.arrays, scale=SCALE, causal=True)
    arrays = on_gpu(problem)
    tried = [stage.name for stage in RUNNING if "16bit" in stage.cache_formats] + ["auto"]
    for name in tried:
        out, lse = mla_stages.decode(*arrays, scale=SCALE, causal=True, stage=name, check=True)
        assert out.is_cuda and lse.is_cuda and out.dtype == arrays[0].dtype and lse.dtype == torch.float32
        assert_close(on_cpu((out, lse)), truth)
        plan = mla_stages.plan(*arrays, causal=True, stage=name)
        planned = mla_stages.decode(*arrays, scale=SCALE, causal=True, stage=name, plan=plan)
        assert same(planned, (out, lse)), name
    assert len(tried) > 3


@pytest.mark.parametrize("cache_format", FORMATS)
def test_caches_of_8_bits(cache_format):
    problem = Problem(lengths=(300, 20))
    q, kv_cache, table, lengths = problem.arrays
    settings = {"scale": SCALE, "cache_format": cache_format, "cache_scale": 0.02}
    codes = mla_stages.quantise(kv_cache, cache_format, cache_scale=0.02)
    truth = mla_stages.reference(q, codes, table, lengths, **settings)
    arrays = on_gpu(problem)
    codes = torch.from_numpy(codes).cuda()
    readers = [stage.name for stage in RUNNING if cache_format in stage.cache_formats]
    for name in readers:
        assert_close(on_cpu(mla_stages.decode(arrays[0], codes, *arrays[2:], stage=name, **settings)), truth)
    assert readers
    if cache_format != "int8_tile128":
        assert_close(on_cpu(mla_stages.decode(arrays[0], codes.view(torch.float8_e4m3fn), *arrays[2:], **settings)), truth)


def test_strides_and_memory_of_the_caller(problem):
    q, kv_cache, table, lengths = on_gpu(problem)
    expected = mla_stages.decode(q, kv_cache, table, lengths, scale=SCALE)
    wide_q = torch.full((3, 1, 32, 584), torch.nan, dtype=q.dtype, device="cuda")[:2, :, ::2, :576]
    wide_q.copy_(q)
    padded = torch.full((5, 80, 1, 640), torch.nan, dtype=q.dtype, device="cuda")[:, :64, :, :576]
    padded.copy_(kv_cache)
    wide_table = torch.full((2, 9), 7777, dtype=torch.int32, device="cuda")[:, :3]
    wide_table.copy_(table)
    out = torch.full((2, 1, 16, 1024), 7.0, dtype=q.dtype, device="cuda")
    lse = torch.full((1, 16, 4), 7.0, device="cuda")
    given = out[..., :512], lse[..., ::2].permute(2, 1, 0)
    result = mla_stages.decode(wide_q, padded, wide_table, lengths, scale=SCALE, out=given[0], lse=given[1])
    assert result[0] is given[0] and result[1] is given[1] and same(result, expected)
    assert (out[..., 512:] == 7).all() and (lse[..., 1::2] == 7).all()


def test_nothing_to_decode():
    arrays = on_gpu(Problem())
    out, lse = mla_stages.decode(*(array[:0] if i != 1 else array for i, array in enumerate(arrays)), scale=SCALE)
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1) and out.is_cuda


def test_merging(problem):
    q, kv_cache, table, _ = on_gpu(problem)
    halves = [mla_stages.decode(q[:1], kv_cache, table[:1, part:part + 1], torch.tensor([length], dtype=torch.int32,
                                device="cuda"), scale=SCALE) for part, length in ((0, 64), (1, 6))]
    out, lse = mla_stages.merge(*zip(*halves))
    assert out.is_cuda and lse.is_cuda
    truth = mla_stages.reference(*problem.arrays, scale=SCALE)
    assert_close(on_cpu((out, lse)), (truth[0][:1], truth[1][:1]))


# ---- Streams, and graphs

def test_nothing_waits(problem, truth):
    arrays = on_gpu(problem)
    metadata, _ = flash_mla.get_mla_metadata()
    calls = (lambda: mla_stages.decode(*arrays, scale=SCALE),
             lambda: mla_stages.decode(*arrays, scale=SCALE, plan=mla_stages.plan(*arrays)),
             lambda: flash_mla.flash_mla_with_kvcache(*arrays, 512, metadata, softmax_scale=SCALE))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # kernels are loaded, memory is there
        warm = [call() for call in calls]
    stream.synchronize()
    del warm
    metadata.plan = None
    with asleep(stream):
        results = [call() for call in calls]
    stream.synchronize()
    for result in results:
        assert_close(on_cpu(result), truth)


def test_work_is_in_the_order_of_the_current_stream(problem, truth):
    q, *rest = on_gpu(problem)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with asleep(stream):
        late.copy_(q)  # what another stream would not see yet
        result = mla_stages.decode(late, *rest, scale=SCALE)
    stream.synchronize()
    assert_close(on_cpu(result), truth)


def capture(function):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def test_a_graph_follows_the_lengths():
    problem = Problem(lengths=(300, 20))
    arrays = on_gpu(problem)
    lengths = arrays[3]
    plan = mla_stages.plan(*arrays)
    out, lse = mla_stages.decode(*arrays, scale=SCALE, plan=plan)
    metadata = flash_mla.get_mla_metadata_tensors(lengths, 16, 1)

    def planned():
        plan.update(*arrays)
        return mla_stages.decode(*arrays, scale=SCALE, plan=plan, out=out, lse=lse)

    graphs = [capture(one) for one in (
        planned, lambda: mla_stages.decode(*arrays, scale=SCALE),
        lambda: flash_mla.flash_mla_with_kvcache(*arrays, 512, *metadata, softmax_scale=SCALE))]
    for first in (300, 150, 1, 0, 299):
        lengths[0] = problem.seqlens_k[0] = first
        truth = mla_stages.reference(*problem.arrays, scale=SCALE)
        for graph, results in graphs:
            for one in results:
                one.fill_(7)
            graph.replay()
            assert_close(on_cpu(results), truth)


def test_each_stage_in_a_graph(problem, truth):
    arrays = on_gpu(problem)
    for stage in RUNNING:
        if "16bit" not in stage.cache_formats:
            continue
        expected = mla_stages.decode(*arrays, scale=SCALE, stage=stage.name)
        graph, results = capture(lambda name=stage.name: mla_stages.decode(*arrays, scale=SCALE, stage=name))
        for _ in range(3):
            graph.replay()
        assert same(results, expected), stage.name
        assert_close(on_cpu(results), truth)


# ---- Memory, threads, processes

def test_10000_calls_leave_nothing_behind(problem):
    arrays = on_gpu(problem)
    settings = [{"scale": SCALE, "stage": stage} for stage in ("auto", "04")]

    def calls(count):
        for i in range(count):
            mine = settings[i % 2]
            if i % 5 == 0:
                plan = mla_stages.plan(*arrays, stage=mine["stage"])
                mla_stages.decode(*arrays, **mine, plan=plan)
            else:
                mla_stages.decode(*arrays, **mine)
            if i % 100 == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0], pages * os.sysconf("SC_PAGE_SIZE")

    allocated, free, resident = calls(500)
    allocated_later, free_later, resident_later = calls(10000)
    assert allocated_later == allocated
    assert free_later >= free - (1 << 21)
    assert resident_later - resident < 8 << 20


def test_threads_with_streams_of_their_own():
    problems = [Problem(lengths=(700 + 64 * i, 20 + i), seed=i) for i in range(4)]
    failures = []

    def work(problem):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                arrays = on_gpu(problem)
                expected = mla_stages.decode(*arrays, scale=SCALE)
                for _ in range(200):
                    assert same(mla_stages.decode(*arrays, scale=SCALE), expected)
            assert_close(on_cpu(expected), mla_stages.reference(*problem.arrays, scale=SCALE))
        except BaseException as error:  # pylint: disable=broad-except
            failures.append(error)

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def use_after_a_fork():
    """Run in a process of its own."""
    problem = Problem()
    arrays = on_gpu(problem)
    rows = arrays[1][0, :1]  # the child cannot index with PyTorch any more
    mla_stages.decode(*arrays, scale=SCALE)
    cache = mla_stages.PagedCache(4, device="cuda")
    sequence = cache.add()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (lambda: mla_stages.decode(*arrays, scale=SCALE), lambda: mla_stages.plan(*arrays),
                         lambda: mla_stages.stages("cuda"), lambda: cache.append([sequence], [1], rows),
                         lambda: cache.tables([sequence], like=arrays[0]), lambda: mla_stages.PagedCache(4, device="cuda")):
                with pytest.raises(RuntimeError, match="forked from one that had used CUDA"):
                    call()
            mla_stages.decode(*problem.arrays, scale=SCALE, stage="03")
            code = 0
        except BaseException:  # pylint: disable=broad-except
            traceback.print_exc()
        finally:
            os._exit(code)  # pylint: disable=protected-access
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_close(on_cpu(mla_stages.decode(*arrays, scale=SCALE)), mla_stages.reference(*problem.arrays, scale=SCALE))


def test_use_after_a_fork():
    subprocess.run([sys.executable, "-c", "import cuda_test\ncuda_test.use_after_a_fork()"], check=True, timeout=120,
                   cwd=pathlib.Path(__file__).parent)


# ---- Errors

def test_mixed_devices(problem):
    q, *rest = problem.of("torch")
    with pytest.raises(ValueError, match="kv_cache is on cpu, q is on cuda:0: all must be on one device"):
        mla_stages.decode(q.cuda(), *rest, scale=SCALE)
    arrays = on_gpu(problem)
    with pytest.raises(ValueError, match="kv_cache is on cuda:0, q is on cpu"):
        mla_stages.decode(q, *arrays[1:], scale=SCALE)
    with pytest.raises(ValueError, match="out is on cpu, q is on cuda:0"):
        mla_stages.decode(*arrays, scale=SCALE, out=torch.empty(2, 1, 16, 512, dtype=q.dtype))


def test_what_is_refused_leaves_the_gpu_as_it_was(problem, truth):
    arrays = on_gpu(problem)
    q, kv_cache, table, lengths = arrays
    plan = mla_stages.plan(*arrays)
    cases = [
        (TypeError, "block_table has the dtype int64", lambda: mla_stages.decode(q, kv_cache, table.long(), lengths,
                                                                                scale=SCALE)),
        (TypeError, "q has the dtype float32", lambda: mla_stages.decode(q.float(), *arrays[1:], scale=SCALE)),
        (ValueError, "not aligned to 16 bytes",
         lambda: mla_stages.decode(torch.cat([q, q], -1)[..., 1:577], *arrays[1:], scale=SCALE)),
        (ValueError, "last dimension, must be 1", lambda: mla_stages.decode(torch.cat([q, q], -1)[..., ::2], *arrays[1:],
                                                                          scale=SCALE)),
        (ValueError, r"seqlens_k\[1\] = 5000", lambda: mla_stages.decode(
            q, kv_cache, table, torch.tensor([70, 5000], dtype=torch.int32, device="cuda"), scale=SCALE, check=True)),
        (ValueError, r"block_table\[0, 0\] = -1", lambda: mla_stages.decode(q, kv_cache, torch.full_like(table, -1),
                                                                           lengths, scale=SCALE, check=True)),
        (ValueError, "plan", lambda: plan.check(q, kv_cache, table, lengths * 2)),
        (ValueError, "plan was made for", lambda: mla_stages.decode(q[:1], kv_cache, table[:1], lengths[:1], scale=SCALE,
                                                                    plan=plan)),
        (ValueError, "works on the CPU", lambda: mla_stages.reference(*arrays, scale=SCALE)),
        (ValueError, "works on the CPU", lambda: mla_stages.decode(*arrays, scale=SCALE, stage="reference")),
        (ValueError, "works on the CPU", lambda: mla_stages.trace(*arrays, scale=SCALE)),
        (ValueError, "00_reference runs on the CPU, and has no kernel for GPUs",
         lambda: mla_stages.decode(*arrays, scale=SCALE, stage="00")),
        (ValueError, "cuda:99: there is no such GPU here", lambda: mla_stages.stages("cuda:99")),
        (ValueError, "cuda:99: there is no such GPU here", lambda: mla_stages.PagedCache(4, device="cuda:99")),
        (MemoryError, "cudaMalloc", lambda: mla_stages.PagedCache(1 << 28, device="cuda")),
        (NotImplementedError, "^indices: ", lambda: flash_mla.flash_mla_with_kvcache(
            *arrays, 512, flash_mla.get_mla_metadata()[0], softmax_scale=SCALE, indices=table)),
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text):
            call()
    plan.check(*arrays)
    torch.cuda.synchronize()
    assert_close(on_cpu(mla_stages.decode(*arrays, scale=SCALE, plan=plan)), truth)


def test_what_is_asked_of_the_device(problem):
    arrays = on_gpu(problem)
    plan = mla_stages.plan(*arrays)
    assert sorted({piece.sequence for piece in plan.pieces(*arrays)}) == [0, 1]
    assert plan.describe(*arrays)
    said = mla_stages.explain(batch=4, seqlen_k=4096, device="cuda")
    assert said.split()[0].rstrip(",") in [stage.name for stage in mla_stages.stages("cuda") if not stage.why_not], said
    assert mla_stages.predict("08", batch=64, seqlen_k=4096, device="cuda:0")["dram_bytes"] >= 64 * 4096 * 1152


def test_another_gpu(problem, truth):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for current in (0, 1, 0):
        for device in ("cuda:1", "cuda:0"):
            arrays = on_gpu(problem, device)
            with torch.cuda.device(current):
                out, lse = mla_stages.decode(*arrays, scale=SCALE, plan=mla_stages.plan(*arrays), check=True)
                assert str(out.device) == device and torch.cuda.current_device() == current
                assert_close(on_cpu((out, lse)), truth)
    cache = mla_stages.PagedCache(4, device="cuda:1")
    sequence, rows = cache.add(), problem.of("torch")[1][0]
    cache.append([sequence], [64], rows.to("cuda:1"))
    assert torch.equal(torch.from_dlpack(cache.data)[cache.pages(sequence)[0]].cpu(), rows)
    with pytest.raises(ValueError, match="kv_cache is on cuda:1, q is on cuda:0"):
        mla_stages.decode(arrays[0], arrays[1].to("cuda:1"), *arrays[2:], scale=SCALE)


# ---- A cache that grows

@pytest.mark.parametrize("cache_format", ["16bit", *FORMATS])
def test_a_cache_on_the_gpu(cache_format):
    problem = Problem(lengths=(100, 37))
    queries, rows = problem.of("torch")[0], problem.of("torch")[1].reshape(-1, 1, 576)[:138]
    results, pages = [], []
    for device, function in (("cpu", mla_stages.reference), ("cuda", mla_stages.decode)):
        cache = mla_stages.PagedCache(8, device=device, cache_format=cache_format, cache_scale=0.02)
        first, second = cache.add(), cache.add()
        cache.append([first, second], [100, 37], rows[:137].to(device))
        third = cache.fork(first)
        cache.append([third], [1], rows[137:].to(device))
        assert cache.length(third) == 101 and cache.statistics()["pages_shared"] == 1
        q = queries[[0, 1, 0]].to(device)
        table, lengths = cache.tables([first, second, third], like=q)
        assert table.device == lengths.device == q.device and lengths.tolist() == [100, 37, 101]
        results.append(on_cpu(function(q, cache, table, lengths, scale=SCALE)))
        pages.append(torch.from_dlpack(cache.data)[list(cache.pages(third))].cpu())
    assert_close(results[1], results[0])
    if cache_format == "16bit":
        assert torch.equal(pages[0][0], pages[1][0]) and torch.equal(pages[0][1][:37], pages[1][1][:37])


def test_a_cache_cannot_grow_in_a_graph(problem):
    cache = mla_stages.PagedCache(4, device="cuda")
    sequence = cache.add()
    rows = on_gpu(problem)[1][0]
    with pytest.raises(ValueError, match="append and write_tables must run outside graphs"):
        capture(lambda: cache.append([sequence], [64], rows))
    cache.append([sequence], [64], rows)
    assert torch.equal(torch.from_dlpack(cache.data)[cache.pages(sequence)[0]], rows)


# ---- FlashMLA's functions

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_place_of_flashmla(dtype):
    metadata, _ = flash_mla.get_mla_metadata()
    for seed in (0, 1):  # two layers
        problem = Problem(lengths=(300, 2), heads=128, seqlen_q=2, dtype=dtype, seed=seed)
        with pytest.warns(UserWarning, match="softmax_scale is None"):
            result = flash_mla.flash_mla_with_kvcache(*on_gpu(problem), 512, metadata, causal=True)
        assert result[1].shape == (2, 128, 2)
        assert_close(on_cpu(result), mla_stages.reference(*problem.arrays, scale=576 ** -0.5, causal=True))


def test_in_place_of_flashmla_with_rows_of_fp8(problem):
    q, kv_cache, table, lengths = problem.arrays
    codes = mla_stages.quantise(kv_cache, "fp8_tile128")
    arrays = on_gpu(problem)
    result = flash_mla.flash_mla_with_kvcache(arrays[0], torch.from_numpy(codes).cuda().view(torch.float8_e4m3fn),
                                              *arrays[2:], 512, flash_mla.get_mla_metadata()[0], softmax_scale=SCALE,
                                              is_fp8_kvcache=True)
    assert_close(on_cpu(result), mla_stages.reference(q, codes, table, lengths, scale=SCALE, cache_format="fp8_tile128"))


# ---- torch.compile

def test_the_operator(problem):
    arrays = on_gpu(problem)
    mla_stages.decode(*arrays, scale=SCALE)
    torch.library.opcheck(torch.ops.mla_stages.decode, (*arrays, SCALE, False, "auto", "16bit", 1.0, 0))


@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
def test_compiling_without_a_break(problem, backend):
    q, *rest = on_gpu(problem)
    expected = mla_stages.decode(q * 2, *rest, scale=SCALE)

    @torch.compile(fullgraph=True, backend=backend)
    def double(q, kv_cache, block_table, seqlens_k):
        out, lse = mla_stages.decode(q * 2, kv_cache, block_table, seqlens_k, scale=SCALE)
        return out * 2, lse

    for _ in range(4):
        out, lse = double(q, *rest)
        assert torch.equal(out, expected[0] * 2) and torch.equal(lse, expected[1])


# ---- Other frameworks

def cupy_arrays(problem):
    cupy = pytest.importorskip("cupy")
    arrays = [cupy.asarray(array) for array in problem.arrays]
    cupy.cuda.Device().synchronize()
    return cupy, arrays


@pytest.mark.parametrize("foreign", [(), (1,), (1, 2, 3), (4, 5)])
def test_cupy(foreign):
    """Alone, and with arguments of PyTorch, which has another current stream: that of q's framework counts."""
    problem = Problem(dtype="float16")
    truth = mla_stages.reference(*problem.arrays, scale=SCALE)
    cupy, (q, *rest) = cupy_arrays(problem)
    late = cupy.zeros_like(q)
    memory = (cupy.zeros((2, 1, 16, 512), "float16"), cupy.zeros((2, 16, 1), "float32")) if 4 in foreign else (None, None)
    arguments = [late, *rest, *memory]
    for number in foreign:
        arguments[number] = torch.from_dlpack(arguments[number])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        mla_stages.decode(*arguments[:4], scale=SCALE)  # kernels are loaded, memory is there
        late[...] = q
        late[...] = 0
    stream.synchronize()
    with stream, asleep(torch.cuda.ExternalStream(stream.ptr)):
        with torch.cuda.stream(torch.cuda.Stream()):
            late[...] = q
            out, lse = mla_stages.decode(*arguments[:4], scale=SCALE, out=arguments[4], lse=arguments[5])
    stream.synchronize()
    if 4 not in foreign:
        assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    assert_close((cupy.asarray(out).get(), cupy.asarray(lse).get()), truth)


def test_cupy_in_graphs_and_merged():
    problem = Problem(dtype="float16")
    truth = mla_stages.reference(*problem.arrays, scale=SCALE)
    cupy, arrays = cupy_arrays(problem)
    out, lse = mla_stages.decode(*arrays, scale=SCALE)
    merged = mla_stages.merge([out, cupy.zeros_like(out)], [lse, cupy.full_like(lse, numpy.inf)])
    assert_close((merged[0].get(), merged[1].get()), truth)
    plan = mla_stages.plan(*arrays)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        mla_stages.decode(*arrays, scale=SCALE, plan=plan, out=out, lse=lse)
        stream.synchronize()
        stream.begin_capture()
        plan.update(*arrays)
        mla_stages.decode(*arrays, scale=SCALE, plan=plan, out=out, lse=lse)
        own, _ = mla_stages.decode(*arrays, scale=SCALE)
        graph = stream.end_capture()
        plan_bytes, scratch_bytes = mla_stages._Call(*arrays, scale=SCALE, causal=False, stage="auto",
                                                     cache_format="16bit", cache_scale=1.0,
                                                     fixed_split_tokens=0).workspace_bytes()
        others = [cupy.full(size, 7, "uint8") for size in (scratch_bytes, plan_bytes + scratch_bytes) for _ in range(3)]
        for first in (3, 70):
            arrays[3][0] = problem.seqlens_k[0] = first
            graph.launch(stream)
            stream.synchronize()
            assert_close((out.get(), lse.get()), mla_stages.reference(*problem.arrays, scale=SCALE))
            assert_close((own.get(), lse.get()), mla_stages.reference(*problem.arrays, scale=SCALE))
        assert all((other == 7).all() for other in others)  # the graph's memory is its own


def test_a_cache_of_cupys_rows():
    problem = Problem(dtype="float16")
    _, (q, kv_cache, *_) = cupy_arrays(problem)
    cache = mla_stages.PagedCache(8, dtype="fp16", device="cuda")
    sequence = cache.add()
    cache.append([sequence], [100], kv_cache.reshape(-1, 1, 576)[:100])
    out, lse = mla_stages.decode(q[:1], cache, *cache.tables([sequence], like=q), scale=SCALE)
    expected = mla_stages.reference(problem.q[:1], problem.kv_cache, numpy.array([[0, 1]], numpy.int32),
                                    numpy.array([100], numpy.int32), scale=SCALE)
    assert_close((out.get(), lse.get()), expected)


def test_jax(problem, truth):
    """Arrays of JAX come and go by DLPack, because JAX does not tell its stream."""
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX has no GPU")
    q, *rest = [jax.device_put(array, device) for array in problem.arrays]
    with pytest.raises(NotImplementedError, match="arrays of JAX on "):
        mla_stages.decode(q, *rest, scale=SCALE)
    arrays = [torch.from_dlpack(array) for array in (q, *rest)]
    with pytest.raises(NotImplementedError, match="arrays of JAX on "):
        mla_stages.decode(arrays[0], rest[0], *arrays[2:], scale=SCALE)
    out, lse = map(jax.dlpack.from_dlpack, mla_stages.decode(*arrays, scale=SCALE))
    assert out.devices() == {device} and out.dtype == q.dtype
    assert_close((numpy.asarray(out), numpy.asarray(lse)), truth)
    on_host = mla_stages.decode(*problem.of("jax"), scale=SCALE, stage="03")
    assert {one.platform for result in on_host for one in result.devices()} == {"cpu"}
