"""The paged cache: what it holds, decodes of it, and its errors."""
import gc

import numpy
import pytest

import mla_stages
from conftest import SCALE, Problem, assert_close, back, to


def filled(problem, framework="numpy", **settings):
    """A cache with the sequences of a problem, appended in two steps each."""
    cache = mla_stages.PagedCache(16, page_size=64, **settings)
    ids = [cache.add() for _ in problem.seqlens_k]
    lengths = [int(length) for length in problem.seqlens_k]
    rows = [problem.kv_cache[row].reshape(-1, 1, 576)[:length]
            for row, length in zip((table[:3] % len(problem.kv_cache) for table in problem.block_table), lengths)]
    first = [min(length, 40) for length in lengths]
    cache.append(ids, first, to(framework, numpy.concatenate([row[:n] for row, n in zip(rows, first)])))
    rest = [length - n for length, n in zip(lengths, first)]
    cache.append(ids, rest, to(framework, numpy.concatenate([row[n:] for row, n in zip(rows, first)])))
    return cache, ids, rows


def paged(rows):
    """A cache made of these rows of sequences, with its tables."""
    counts = [-(-len(row) // 64) for row in rows]
    cache = numpy.zeros((sum(counts), 64, 1, 576), rows[0].dtype)
    table = numpy.zeros((len(rows), max(counts)), numpy.int32)
    page = 0
    for sequence, row in enumerate(rows):
        flat = cache[page:page + counts[sequence]].reshape(-1, 1, 576)
        flat[:len(row)] = row
        table[sequence, :counts[sequence]] = range(page, page + counts[sequence])
        page += counts[sequence]
    return cache, table, numpy.array([len(row) for row in rows], numpy.int32)


def test_decoding_what_was_appended(framework):
    problem = Problem(lengths=(100, 20))
    cache, ids, rows = filled(problem, framework)
    q = to(framework, problem.q)
    table, lengths = cache.tables(ids, like=q)
    assert isinstance(table, type(q)) and [cache.length(one) for one in ids] == [100, 20]
    assert back(lengths).tolist() == [100, 20]
    assert_close(mla_stages.decode(q, cache, table, lengths, scale=SCALE, stage="03"),
                 mla_stages.reference(problem.q, *paged(rows), scale=SCALE))


def test_forks_share_pages_until_one_grows():
    problem = Problem(lengths=(100, 20))
    cache, (parent, _), rows = filled(problem)
    used = cache.statistics()["pages_used"]
    child = cache.fork(parent)
    assert cache.pages(child) == cache.pages(parent)
    assert cache.statistics()["pages_used"] == used and cache.statistics()["pages_shared"] == 2
    more = Problem(lengths=(64,), seed=5).kv_cache[0][:1]
    cache.append([child], [1], more)
    assert cache.pages(child)[0] == cache.pages(parent)[0] and cache.pages(child)[1] != cache.pages(parent)[1]
    assert (cache.length(parent), cache.length(child)) == (100, 101)
    table, lengths = cache.tables([parent, child], like=problem.q)
    assert_close(mla_stages.decode(problem.q, cache, table, lengths, scale=SCALE, stage="03"),
                 mla_stages.reference(problem.q, *paged([rows[0], numpy.concatenate([rows[0], more])]), scale=SCALE))
    for sequence in (parent, child):
        cache.free(sequence)
    statistics = cache.statistics()
    assert (statistics["pages_used"], statistics["sequences"], statistics["tokens"]) == (1, 1, 20)
    assert statistics["bytes_used"] == 64 * 1152 and statistics["utilization"] == 20 / 64


@pytest.mark.parametrize("name", ["fp8_tile128", "fp8_tensor", "int8_tile128"])
def test_a_quantised_cache_has_the_bytes_of_quantise(name):
    problem = Problem(lengths=(100, 20))
    cache, ids, rows = filled(problem, cache_format=name, cache_scale=0.02)
    codes = mla_stages.quantise(paged(rows)[0], name, cache_scale=0.02)
    kept = numpy.from_dlpack(cache.data)
    for page, row in zip(cache.pages(ids[0]), (codes[0], codes[1][:36])):
        numpy.testing.assert_array_equal(kept[page][:len(row)], row)
    table, lengths = cache.tables(ids, like=problem.q)
    assert_close(mla_stages.decode(problem.q, cache, table, lengths, scale=SCALE, stage="13"),
                 mla_stages.reference(problem.q, codes, *paged(rows)[1:], scale=SCALE, cache_format=name,
                                      cache_scale=0.02))


def test_the_memory_outlives_the_cache():
    problem = Problem(lengths=(100, 20), dtype="float16")
    cache, ids, rows = filled(problem, dtype="fp16")
    page = cache.pages(ids[0])[0]
    kept = numpy.from_dlpack(cache.data)
    del cache
    gc.collect()
    numpy.testing.assert_array_equal(kept[page], rows[0][:64])


def test_errors_leave_the_cache_as_it_was():
    cache = mla_stages.PagedCache(2)
    sequence = cache.add()
    rows = Problem(lengths=(192,)).kv_cache.reshape(-1, 1, 576)
    for arguments, error, text in (
            (([sequence], [129], rows[:129]), MemoryError, "3"),
            (([sequence, sequence], [1, 1], rows[:2]), ValueError, "twice"),
            (([sequence + 1], [1], rows[:1]), ValueError, "is not a sequence of this cache: it was freed, or never added"),
            (([sequence], [-1], rows[:0]), ValueError, r"tokens\[0\] = -1 must be at least 0"),
            (([sequence], [2], rows[:1]), ValueError,
             r"rows has the shape \[1, 1, 576\], must be \[sum of tokens, num_heads_kv, 576\] = \[2, 1, 576\]"),
            (([sequence], [1], rows[:1].astype(numpy.float16)), TypeError, "rows are fp16, the cache takes bf16"),
            (([sequence], [2], rows[:4:2]), ValueError, "rows must be contiguous: nothing is copied")):
        with pytest.raises(error, match=text):
            cache.append(*arguments)
        assert cache.length(sequence) == 0 and cache.statistics()["pages_used"] == 0
    cache.append([sequence], [128], rows[:128])
    with pytest.raises(ValueError, match="max_pages_per_seq = 1"):
        cache.tables([sequence], like=rows, max_pages_per_seq=1)
    cache.free(sequence)
    for call in (cache.free, cache.fork, cache.length, cache.pages):
        with pytest.raises(ValueError, match="is not a sequence of this cache: it was freed, or never added"):
            call(sequence)


@pytest.mark.parametrize("settings, text", [
    ({"num_pages": 0}, "num_pages = 0"), ({"num_pages": 1, "page_size": 48}, "page_size = 48"),
    ({"num_pages": 1, "num_heads_kv": 0}, "num_heads_kv = 0"), ({"num_pages": 1, "dtype": "fp32"}, "dtype = 'fp32'"),
    ({"num_pages": 1, "cache_format": "fp4"}, "cache_format = 'fp4'"),
    ({"num_pages": 1, "cache_format": "int8_tile128", "dtype": "fp16"}, "dtype = fp16 must be bf16"),
    ({"num_pages": 1, "cache_format": "fp8_tensor", "cache_scale": 0.0}, "cache_scale = 0"),
    ({"num_pages": 1, "device": "tpu"}, "device = 'tpu'")])
def test_caches_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        mla_stages.PagedCache(**settings)
