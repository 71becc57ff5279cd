"""Decode, plan, reference, merge and quantised caches, on arrays of a CPU."""
import gc
import os
import pathlib
import re
import subprocess
import sys
import threading

import ml_dtypes
import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, assert_close, back, to
from mla_stages import _library

ROOT = pathlib.Path(__file__).resolve().parents[3]
QUICK = "03"  # the stage that takes least on the model


@pytest.mark.parametrize("stage", [stage.name for stage in mla_stages.stages()] + ["auto", "reference"])
def test_every_stage_decodes(stage, problem, truth):
    formats = {one.name: one.cache_formats for one in mla_stages.stages()}
    if "16bit" not in formats.get(stage, ["16bit"]):
        with pytest.raises(NotImplementedError, match=f"{stage} cannot read a cache of cache_format = 16bit"):
            mla_stages.decode(*problem.arrays, scale=SCALE, stage=stage)
        return
    out, lse = mla_stages.decode(*problem.arrays, scale=SCALE, stage=stage)
    assert out.dtype == ml_dtypes.bfloat16 and lse.dtype == numpy.float32
    assert_close((out, lse), truth)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", [QUICK, "reference"])
def test_results_are_of_the_callers_framework(framework, dtype, stage):
    problem = Problem(dtype=dtype)
    arrays = problem.of(framework)
    expected = mla_stages.decode(*problem.arrays, scale=SCALE, stage=stage)
    results = mla_stages.decode(*arrays, scale=SCALE, stage=stage)
    assert str(results[0].dtype) == str(arrays[0].dtype)
    for result, want in zip(results, expected):
        assert isinstance(result, type(arrays[0]))
        if stage != "reference":  # each framework rounds the reference's results to 16 bits by itself
            numpy.testing.assert_array_equal(back(result), back(want))
    assert_close(results, expected)
    assert_close(expected, mla_stages.reference(*arrays, scale=SCALE))


def test_memory_of_the_caller_is_written(framework, problem):
    q, *rest = problem.of(framework)
    expected = mla_stages.decode(q, *rest, scale=SCALE, stage=QUICK)
    out = to(framework, numpy.zeros((2, 1, 16, 512), ml_dtypes.bfloat16))
    lse = to(framework, numpy.zeros((2, 16, 1), numpy.float32))
    if framework == "jax":
        with pytest.raises(TypeError, match="out is an array of JAX, which cannot be written"):
            mla_stages.decode(q, *rest, scale=SCALE, stage=QUICK, out=out, lse=lse)
        return
    result = mla_stages.decode(q, *rest, scale=SCALE, stage=QUICK, out=out, lse=lse)
    assert result[0] is out and result[1] is lse
    numpy.testing.assert_array_equal(back(out), back(expected[0]))
    numpy.testing.assert_array_equal(back(lse), back(expected[1]))


def test_causal_rows_that_see_nothing():
    problem = Problem(lengths=(2, 70), seqlen_q=3)
    out, lse = mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK, causal=True)
    assert_close((out, lse), mla_stages.reference(*problem.arrays, scale=SCALE, causal=True))
    assert (lse[0, :, 0] == numpy.inf).all() and (out[0, 0] == 0).all()
    assert numpy.isfinite(lse[0, :, 1:]).all()


def test_strides_are_taken_as_they_are(problem):
    expected = mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)
    wide_q = numpy.full((2, 1, 32, 584), numpy.nan, problem.q.dtype)
    wide_cache = numpy.full((*problem.kv_cache.shape[:-1], 640), numpy.nan, problem.kv_cache.dtype)
    wide_table = numpy.full((4, problem.block_table.shape[1]), -7, numpy.int32)
    wide_q[:, :, ::2, :576] = problem.q
    wide_cache[..., :576] = problem.kv_cache
    wide_table[::2] = problem.block_table
    result = mla_stages.decode(wide_q[:, :, ::2, :576], wide_cache[..., :576], wide_table[::2], problem.seqlens_k,
                               scale=SCALE, stage=QUICK)
    for a, b in zip(result, expected):
        numpy.testing.assert_array_equal(back(a), back(b))


def test_read_only_arrays_are_read(problem):
    expected = mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)
    for array in problem.arrays:
        array.flags.writeable = False
    numpy.testing.assert_array_equal(back(mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)[0]),
                                     back(expected[0]))


def test_an_empty_batch(problem):
    q, kv_cache, block_table, seqlens_k = problem.arrays
    out, lse = mla_stages.decode(q[:0], kv_cache, block_table[:0], seqlens_k[:0], scale=SCALE)
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1)


def test_a_plan_is_shared_and_made_anew(framework):
    problem = Problem(lengths=(300, 20))
    arrays = problem.of(framework)
    plan = mla_stages.plan(*arrays, stage="04")
    for seed in (0, 1):
        other = Problem(lengths=(300, 20), seed=seed)
        q, kv_cache, table, lengths = other.of(framework)
        assert_close(mla_stages.decode(q, kv_cache, table, lengths, scale=SCALE, stage="04", plan=plan),
                     mla_stages.reference(*other.arrays, scale=SCALE))
    shorter = (*arrays[:3], to(framework, numpy.array([100, 20], numpy.int32)))
    plan.check(*arrays)
    with pytest.raises(ValueError, match=r"seqlens_k\[0\] = 100, but the plan was made for 300"):
        plan.check(*shorter)
    assert "0:256-300" in plan.describe(*arrays)
    plan.update(*shorter)
    plan.check(*shorter)
    assert_close(mla_stages.decode(*shorter, scale=SCALE, stage="04", plan=plan),
                 mla_stages.reference(*problem.arrays[:3], numpy.array([100, 20], numpy.int32), scale=SCALE))


def test_pieces_of_a_plan_cover_all_tokens_once():
    problem = Problem(lengths=(1000, 20, 0))
    pieces = mla_stages.plan(*problem.arrays, stage="04").pieces(*problem.arrays)
    for sequence, length in enumerate(problem.seqlens_k):
        own = [piece for piece in pieces if piece.sequence == sequence]
        assert [piece.begin for piece in own] == [0, *(piece.end for piece in own[:-1])]
        assert own[-1].end == length
        assert all((piece.slot >= 0) == (len(own) > 1) for piece in own)
    assert [piece.worker for piece in pieces] == sorted(piece.worker for piece in pieces)
    assert mla_stages.plan(*problem.arrays, stage=QUICK).pieces(*problem.arrays) == []


def test_every_schedule_gives_the_same_bits(problem):
    results = []
    for seed in (0, 1, 2):
        with mla_stages.schedule(seed):
            results.append(mla_stages.decode(*problem.arrays, scale=SCALE, stage="04")[0].tobytes())
    assert results[1:] == results[:1] * 2


def test_a_schedule_ends_with_its_block(problem):
    with mla_stages.schedule(7), pytest.raises(KeyError):
        with mla_stages.schedule(3):
            raise KeyError
    with mla_stages.schedule(0):
        first = mla_stages.trace(*problem.arrays, scale=SCALE, stage="04")
    assert mla_stages.trace(*problem.arrays, scale=SCALE, stage="04") == first
    with mla_stages.schedule(3):
        assert mla_stages.trace(*problem.arrays, scale=SCALE, stage="04") != first
    with pytest.raises(ValueError, match="seed = -1 must be at least 0"):
        with mla_stages.schedule(-1):
            pass


def test_a_trace_has_the_events_of_its_blocks(problem):
    trace = mla_stages.trace(*problem.arrays, scale=SCALE, stage="04", blocks=[1])
    assert trace["schema"] == "gpu_model recording" and not trace["truncated"]
    assert {tuple(block[1:]) for block in trace["blocks"]} == {(1, 0, 0)}
    assert {"begin", "meet", "end"} <= {trace["kinds"][event[0]][0] for event in trace["events"]}
    whole = mla_stages.trace(*problem.arrays, scale=SCALE, stage="04", blocks=[])
    assert len(whole["blocks"]) > len(trace["blocks"])
    assert mla_stages.trace(*problem.arrays, scale=SCALE, stage="04", blocks=[1], max_events=5)["events_kept"] == 5
    for wrong in ({"blocks": [-1]}, {"max_events": 0}):
        with pytest.raises(ValueError):
            mla_stages.trace(*problem.arrays, scale=SCALE, stage="04", **wrong)
    # The refused calls leave no recording behind, and the next one works.
    assert mla_stages.trace(*problem.arrays, scale=SCALE, stage="04", blocks=[1]) == trace


def test_a_plan_of_another_problem_is_refused(problem):
    plan = mla_stages.plan(*problem.arrays, stage="04")
    with pytest.raises(ValueError, match="plan was made for 04, the call has 05"):
        mla_stages.decode(*problem.arrays, scale=SCALE, stage="05", plan=plan)
    with pytest.raises(ValueError, match=r"plan was made for \(2, 1, 16, 576\), the call has \(1, 1, 16, 576\)"):
        q, kv_cache, block_table, seqlens_k = problem.arrays
        mla_stages.decode(q[:1], kv_cache, block_table[:1], seqlens_k[:1], scale=SCALE, stage="04", plan=plan)
    without = mla_stages.plan(*problem.arrays, stage=QUICK)  # this stage makes no plan
    assert without.memory is None
    assert without.describe(*problem.arrays) == f"stage {QUICK} makes no plan"
    mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK, plan=without)


def test_fixed_splits_make_a_result_independent_of_its_batch():
    problem = Problem(lengths=(300, 20))
    q, kv_cache, block_table, seqlens_k = problem.arrays
    both = mla_stages.decode(*problem.arrays, scale=SCALE, stage="04", fixed_split_tokens=64)
    alone = mla_stages.decode(q[:1], kv_cache, block_table[:1], seqlens_k[:1], scale=SCALE, stage="04",
                              fixed_split_tokens=64)
    numpy.testing.assert_array_equal(back(both[0][:1]), back(alone[0]))


@pytest.mark.parametrize("name", ["fp8_tile128", "fp8_tensor", "int8_tile128"])
def test_quantised_caches(framework, name):
    problem = Problem()
    q, kv_cache, table, lengths = problem.of(framework)
    settings = {"cache_format": name, "cache_scale": 0.02}
    codes = mla_stages.quantise(kv_cache, name, cache_scale=0.02)
    assert isinstance(codes, type(kv_cache)) and codes.shape == (*kv_cache.shape[:-1], 576 if "tensor" in name else 656)
    values = mla_stages.dequantise(codes, name, cache_scale=0.02)
    numpy.testing.assert_allclose(back(values), back(kv_cache), rtol=2 ** -4, atol=0.03)
    assert_close(mla_stages.decode(q, codes, table, lengths, scale=SCALE, stage="13", **settings),
                 mla_stages.reference(q, codes, table, lengths, scale=SCALE, **settings))
    # The codes may also be float8, if the framework has that type.
    if name == "fp8_tensor" and framework == "numpy":
        as_float8 = codes.view(ml_dtypes.float8_e4m3fn)
        numpy.testing.assert_array_equal(
            back(mla_stages.reference(q, as_float8, table, lengths, scale=SCALE, **settings)[0]),
            back(mla_stages.reference(q, codes, table, lengths, scale=SCALE, **settings)[0]))


def test_scales_that_are_powers_of_two(problem):
    codes = mla_stages.quantise(problem.kv_cache, "fp8_tile128", power_of_two=True)
    scales = codes[..., 512:528].copy().view(numpy.float32)
    assert (numpy.frexp(scales)[0] == 0.5).all()


def test_merging_parts(framework):
    problem = Problem(lengths=(128, 64, 10))
    q, kv_cache, table, lengths = problem.arrays
    first = numpy.array([64, 64, 0], numpy.int32)  # the third sequence has nothing in the first part
    parts = [mla_stages.reference(q, kv_cache, table, first, scale=SCALE),
             mla_stages.reference(q, kv_cache, numpy.concatenate([table[:2, 1:], table[2:, :-1]]), lengths - first,
                                  scale=SCALE)]
    outs = [to(framework, part[0].astype(numpy.float32)) for part in parts]
    lses = [to(framework, part[1].astype(numpy.float32)) for part in parts]
    out, lse = mla_stages.merge(outs, lses)
    assert isinstance(out, type(outs[0]))
    whole = mla_stages.reference(q, kv_cache, table, lengths, scale=SCALE)
    numpy.testing.assert_allclose(back(out), whole[0], atol=1e-5)
    numpy.testing.assert_allclose(back(lse), whole[1], atol=1e-5)
    empty = to(framework, numpy.full((3, 16, 1), numpy.inf, numpy.float32))
    nan = to(framework, numpy.full((3, 1, 16, 512), numpy.nan, numpy.float32))
    out, lse = mla_stages.merge([nan, nan], [empty, empty])
    assert (back(out) == 0).all() and (back(lse) == numpy.inf).all()


def test_no_memory_is_lost():
    problem = Problem(lengths=(1,), heads=1)
    empty = (problem.q[:0], problem.kv_cache, problem.block_table[:0], problem.seqlens_k[:0])

    def calls(count):
        for _ in range(count):
            mla_stages.decode(*empty, scale=SCALE)
        for _ in range(count // 50):
            mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)
            with pytest.raises(ValueError):
                mla_stages.decode(*problem.arrays, scale=-1.0, stage=QUICK)
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = calls(1000)
    assert calls(10000) - before < 4 << 20


def test_another_thread_runs_meanwhile(problem):
    expected = mla_stages.decode(*problem.arrays, scale=SCALE, stage="11")
    results = []
    thread = threading.Thread(
        target=lambda: results.append(mla_stages.decode(*problem.arrays, scale=SCALE, stage="11")))
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        rounds = 0
        while thread.is_alive():
            mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)
            rounds += 1
    finally:
        sys.setswitchinterval(switch)
    assert rounds >= 5
    numpy.testing.assert_array_equal(back(results[0][0]), back(expected[0]))


def fork(function):
    """Runs the function in a fork of this process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fork_after_a_decode():
    problem = Problem()
    mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK)
    fork(lambda: mla_stages.decode(*problem.arrays, scale=SCALE, stage=QUICK))


def fork_after_cuda():
    _library.use_cuda()

    def use_it_again():
        with pytest.raises(RuntimeError, match="forked from one that had used CUDA"):
            mla_stages.stages("cuda")
    fork(use_it_again)


@pytest.mark.parametrize("function", [fork_after_a_decode, fork_after_cuda])
def test_after_a_fork(function):
    # In a process without threads of a framework.
    subprocess.run([sys.executable, "-c", f"import decode_test\ndecode_test.{function.__name__}()"], check=True,
                   cwd=pathlib.Path(__file__).parent, timeout=60)


def test_import_brings_no_framework():
    code = ("import sys, mla_stages\n"
            "brought = {'numpy', 'torch', 'jax', 'cupy', 'tvm_ffi'} & set(sys.modules)\n"
            "sys.exit(f'imported: {brought}' if brought else 0)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_are_explained_and_predicted():
    assert "08_seesaw" in mla_stages.explain(batch=64, seqlen_k=4096)
    bytes_read = mla_stages.predict("08", batch=64, seqlen_k=4096)["dram_bytes"]
    assert 64 * 4096 * 1152 <= bytes_read < 2 * 64 * 4096 * 1152
    with pytest.raises(ValueError, match="page_size = 48"):
        mla_stages.predict("08", batch=1, seqlen_k=64, page_size=48)


COUNTS = pytest.mark.skipif(not os.access(os.environ.get("MLA_PROFILE", ""), os.X_OK), reason="no mla_profile in this build")


@COUNTS
def test_a_profile_counts_by_kernel_and_line():
    counted = mla_stages.profile("02", batch=2, seqlen_k=70, num_heads_q=4, num_heads_kv=2, seqlen_q=2, page_size=16,
                                 dtype="fp16", causal=True)
    assert counted["stage"] == "02_shared_tiled"
    assert "h4x2_q2_b2_k70_causal_page16_fp16" in counted["problem"]
    assert all(kernel["global"]["loads"]["sectors"] > 0 and kernel["lines"] for kernel in counted["kernels"])
    quantised = mla_stages.profile("13", batch=1, seqlen_k=64, num_heads_q=16, cache_format="int8_tile128")
    assert any(kernel["flop"] > 0 for kernel in quantised["kernels"])


@COUNTS
def test_what_cannot_be_profiled():
    with pytest.raises(ValueError, match="--stage 99 is not known"):
        mla_stages.profile("99", batch=1, seqlen_k=64)
    with pytest.raises(ValueError, match="page"):
        mla_stages.profile("02", batch=1, seqlen_k=64, page_size=48)


def test_a_profile_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.delenv("MLA_PROFILE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="profile needs the program mla_profile"):
        mla_stages.profile(batch=1, seqlen_k=64)
    monkeypatch.setenv("MLA_PROFILE", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="nothing does not run"):
        mla_stages.profile(batch=1, seqlen_k=64)


def test_the_version_is_the_projects():
    project = re.search(r"project\(flashmla VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert mla_stages.__version__ == project[1]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_pages_run(page):
    """A page's blocks of Python run one after the other, except those that need a GPU, an engine, PyTorch, JAX or `kernels`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    without = "cuda", "import vllm", "import sglang", "jax", "torch", "from kernels import"
    blocks = [block for block in blocks if not any(word in block for word in without)]
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # pylint: disable=exec-used
