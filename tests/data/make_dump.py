#!/usr/bin/env python3
"""Writes the dumps beside this script: inputs as a user's model would save them, and what NumPy computes from them.

    paged/       bf16 as uint16 patterns, pages of 64 tokens, lengths 5 and 70, DeepSeek-V3's scale
    contiguous/  fp16, no pages, causal with 2 query tokens, lengths 12 and 1: query 0 of sequence 1 sees nothing

Nothing here shares a line with the project, so that the test that reads these files compares two independent readings
of the formula. That is why this is not part of make_golden, which makes the golden files of single instructions.
"""
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
RANDOM = np.random.RandomState(20261120)  # its stream is frozen; that of default_rng is not


def bf16_patterns(values):
    """float32 to bfloat16, nearest even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(patterns):
    return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def attend(q, keys, scale, causal):
    """q [s_q, h_q, 576], keys [s_k, 576], float64 -> out [s_q, h_q, 512], lse [h_q, s_q]"""
    s_q, h_q, _ = q.shape
    out, lse = np.zeros((s_q, h_q, 512)), np.full((h_q, s_q), np.inf)
    for i in range(s_q):
        visible = len(keys) - s_q + i + 1 if causal else len(keys)
        if visible <= 0:
            continue
        seen = keys[:visible]
        logits = scale * (q[i] @ seen.T)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[i] = weights @ seen[:, :512] / weights.sum(axis=1, keepdims=True)
        lse[:, i] = logits.max(axis=1) + np.log(weights.sum(axis=1))
    return out, lse


def save(folder, **arrays):
    (FOLDER / folder).mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(FOLDER / folder / f"{name}.npy", array)


def paged():
    lengths, scale = [5, 70], np.float32(0.135234)
    table = np.array([[2, 2147480000, 2147480000], [0, 1, -1]], np.int32)  # past the end: garbage
    q = bf16_patterns(RANDOM.standard_normal((2, 1, 3, 576)))
    cache = np.full((3, 64, 1, 576), 0x7FC0, np.uint16)  # NaN where no token is
    out, lse = [], []
    for sequence, length in enumerate(lengths):
        keys = bf16_patterns(RANDOM.standard_normal((length, 576)))
        for token in range(length):
            cache[table[sequence, token // 64], token % 64, 0] = keys[token]
        result = attend(bf16_values(q[sequence]), bf16_values(keys), float(scale), causal=False)
        out.append(result[0])
        lse.append(result[1])
    save("paged", q=q, cache=cache, block_table=table, seqlens=np.array(lengths, np.int32),
         expected_out=np.array(out, np.float32), expected_lse=np.array(lse))


def contiguous():
    lengths, scale = [12, 1], np.float32(0.1147)
    q = RANDOM.standard_normal((2, 2, 2, 576)).astype(np.float16)
    cache = RANDOM.standard_normal((2, 12, 576)).astype(np.float16)
    cache[1, 1:] = np.nan  # padding
    out, lse = [], []
    for sequence, length in enumerate(lengths):
        keys = cache[sequence, :length].astype(np.float64)
        result = attend(q[sequence].astype(np.float64), keys, float(scale), causal=True)
        out.append(result[0])
        lse.append(result[1])
    save("contiguous", q=q, cache=cache, seqlens=np.array(lengths, np.int64),
         expected_out=np.array(out, np.float32), expected_lse=np.array(lse))


paged()
contiguous()
