"""The drop-in for FlashMLA, and stand-ins for the engines that call it."""
import sys
import types

import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, assert_close, back
from mla_stages import flash_mla


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Chooses a stage that makes a plan and is quick on the model."""
    monkeypatch.setattr(flash_mla, "_stage", "04")


def test_the_newest_form(framework):
    problem = Problem(lengths=(300, 20), seqlen_q=2)
    metadata, none = flash_mla.get_mla_metadata()
    assert none is None
    for seed in (0, 1):  # two layers
        layer = Problem(lengths=(300, 20), seqlen_q=2, seed=seed)
        q, k_cache, block_table, cache_seqlens = layer.of(framework)
        result = flash_mla.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, metadata,
                                                  softmax_scale=SCALE, causal=True)
        assert isinstance(result[0], type(q)) and result[1].shape == (2, 16, 2)
        assert_close(result, mla_stages.reference(*layer.arrays, scale=SCALE, causal=True))
    plan = metadata.plan
    assert plan is not None
    q, k_cache, block_table, cache_seqlens = problem.of(framework)
    with pytest.raises(ValueError, match="plan was made for"):
        flash_mla.flash_mla_with_kvcache(q[:1], k_cache, block_table[:1], cache_seqlens[:1], 512, metadata,
                                         softmax_scale=SCALE, causal=True)


def test_the_older_form(problem, truth):
    metadata, num_splits = flash_mla.get_mla_metadata_tensors(problem.seqlens_k, 16, 1)
    assert metadata.shape == (1, 8) and num_splits.shape == (3,) and metadata.dtype == num_splits.dtype == numpy.int32
    assert_close(flash_mla.flash_mla_with_kvcache(problem.q, problem.kv_cache, problem.block_table, problem.seqlens_k,
                                                  512, metadata, num_splits, SCALE), truth)


def test_the_default_scale_comes_with_a_warning(problem):
    metadata, _ = flash_mla.get_mla_metadata()
    with pytest.warns(UserWarning, match="softmax_scale is None, so it is FlashMLA's default 0.041667.*V3's is 0.135234"):
        result = flash_mla.flash_mla_with_kvcache(*problem.arrays, 512, metadata)
    assert_close(result, mla_stages.reference(*problem.arrays, scale=576 ** -0.5))


def test_rows_of_fp8(problem, monkeypatch):
    monkeypatch.setattr(flash_mla, "_stage", "13")
    q, kv_cache, block_table, seqlens_k = problem.arrays
    codes = mla_stages.quantise(kv_cache, "fp8_tile128")
    metadata, _ = flash_mla.get_mla_metadata()
    assert_close(flash_mla.flash_mla_with_kvcache(q, codes, block_table, seqlens_k, 512, metadata, softmax_scale=SCALE,
                                                  is_fp8_kvcache=True),
                 mla_stages.reference(q, codes, block_table, seqlens_k, scale=SCALE, cache_format="fp8_tile128"))
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache with rows of 576 bytes"):
        flash_mla.flash_mla_with_kvcache(q, codes[..., :576], block_table, seqlens_k, 512, metadata,
                                         softmax_scale=SCALE, is_fp8_kvcache=True)


@pytest.mark.parametrize("name", ["indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
                                  "extra_topk_length", "descale_q", "descale_k"])
def test_what_is_not_there_is_named(problem, name):
    with pytest.raises(NotImplementedError, match=f"^{name}: mla_stages decodes dense attention"):
        flash_mla.flash_mla_with_kvcache(*problem.arrays, 512, flash_mla.get_mla_metadata()[0], softmax_scale=SCALE,
                                         **{name: problem.q})


def test_another_width_of_v(problem):
    with pytest.raises(ValueError, match="head_dim_v = 256 must be 512"):
        flash_mla.flash_mla_with_kvcache(*problem.arrays, 256, flash_mla.get_mla_metadata()[0], softmax_scale=SCALE)


def test_installing(problem, truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", types.ModuleType("flash_mla"))
    flash_mla.install()
    names = {}
    exec("from flash_mla import flash_mla_with_kvcache, get_mla_metadata, flash_mla_sparse_fwd", names)
    assert_close(names["flash_mla_with_kvcache"](*problem.arrays, 512, names["get_mla_metadata"](problem.seqlens_k)[0],
                                                 softmax_scale=SCALE), truth)
    with pytest.raises(NotImplementedError, match="flash_mla_sparse_fwd: "):
        names["flash_mla_sparse_fwd"](problem.q)
    flash_mla.install(older=True)
    exec("from flash_mla import get_mla_metadata", names)
    assert names["get_mla_metadata"](problem.seqlens_k, 16, 1)[1].shape == (3,)
    for name in ("kernels", "kernels.flash_mla"):  # a package of which it is a part
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    flash_mla.install(name="kernels.flash_mla")
    exec("from kernels.flash_mla import get_mla_metadata", names)
    assert names["get_mla_metadata"]()[1] is None


def engine(source):
    """A module that has imported FlashMLA's names, as an engine's backend has."""
    module = types.ModuleType("backend")
    module.flash_mla_with_kvcache = module.get_mla_metadata = module.FlashMLASchedMeta = None
    exec(source, module.__dict__)
    return module


# What vLLM's backend does with these names: it makes metadata per step, whose fields it may set, and one call per layer,
# with a cache of [pages, 64, 576] and arguments by name.
VLLM = """
def build(seq_lens, heads):
    metadata, _ = get_mla_metadata(seq_lens, heads, 1, is_fp8_kvcache=False)
    return metadata

def forward(q, cache, block_table, seq_lens, metadata, scale):
    metadata.tile_scheduler_metadata = metadata.num_splits = None
    return flash_mla_with_kvcache(q=q, k_cache=cache.unsqueeze(-2), block_table=block_table, cache_seqlens=seq_lens,
                                  head_dim_v=512, tile_scheduler_metadata=metadata, softmax_scale=scale, causal=True,
                                  is_fp8_kvcache=False)
"""

# And SGLang's: its metadata are tensors, which it copies into those of a captured CUDA graph.
SGLANG = """
def init_graph(lengths, heads):
    return get_mla_metadata(lengths, heads, 1)

def replay(graph, batch, lengths, heads):
    metadata, num_splits = get_mla_metadata(lengths, heads, 1)
    graph[0].copy_(metadata)
    graph[1][: batch + 1].copy_(num_splits)
    return graph[0], graph[1][: batch + 1]

def forward(q, cache, indices, lengths, metadata, num_splits, scale):
    out, _ = flash_mla_with_kvcache(q=q.view(q.shape[0], -1, 16, 576), k_cache=cache.view(-1, 64, 1, 576),
                                    block_table=indices, cache_seqlens=lengths, head_dim_v=512,
                                    tile_scheduler_metadata=metadata, num_splits=num_splits, softmax_scale=scale,
                                    causal=True)
    return out.view(-1, 16 * 512)
"""


def test_patching_vllm(problem, truth):
    pytest.importorskip("torch")
    backend = engine(VLLM)
    flash_mla.patch(backend)
    q, k_cache, block_table, seqlens_k = problem.of("torch")
    metadata = backend.build(seqlens_k, 16)
    assert isinstance(metadata, backend.FlashMLASchedMeta)
    for _ in range(2):
        assert_close(backend.forward(q, k_cache.squeeze(-2), block_table, seqlens_k, metadata, SCALE), truth)


def test_patching_sglang(problem, truth):
    torch = pytest.importorskip("torch")
    backend = engine(SGLANG)
    flash_mla.patch(backend, older=True)
    q, k_cache, block_table, seqlens_k = problem.of("torch")
    graph = backend.init_graph(torch.ones(8, dtype=torch.int32), 16)
    metadata, num_splits = backend.replay(graph, 2, seqlens_k, 16)
    out = backend.forward(q.view(2, -1), k_cache.view(-1, 1, 576), block_table, seqlens_k, metadata, num_splits, SCALE)
    numpy.testing.assert_allclose(back(out), truth[0].reshape(2, -1), rtol=2 ** -7, atol=0.01)


def test_patching_a_module_without_the_names():
    with pytest.raises(AttributeError, match="backend has no flash_mla_with_kvcache"):
        flash_mla.patch(types.ModuleType("backend"))
