#!/usr/bin/env python3
"""Times the implementations a user would otherwise pick, on mla_bench's inputs and by its protocol (docs/measuring.md).

    python3 bench/report/peers.py --list
    python3 bench/report/peers.py --out peers.json
    python3 bench/report/peers.py --shapes h128_q1_b64_k4096,h16_q1_b64_k4096 --peers eager,triton --out peers.json

Needs PyTorch and an NVIDIA GPU; a peer whose package is not installed is named with the reason. The file is of the
schema of bench/results/peers_h200.json; "spread" and "absent" come on top.
"""
import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

try:
    import torch
except ImportError:  # --list, shapes and the schema need none
    torch = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SCHEMA = "flashmla_stages/peers/1"
PAGE = 64
D_QK, D_V = 576, 512
SCALE = 1 / 24  # 576^-1/2, what data of seed 0 have
GARBAGE_PAGE = 2147480000  # in unused slots of the block table: no cache has this page
SPARE_PAGES = 3
FLUSH_BYTES = 256 << 20
ONCE_US = 200e3
LEAVE_OUT_US = 2e6
SUSTAINED_WARMUP_S = 1.2
SUSTAINED_ROUNDS = 2
CHECKED_ROWS = 64
ABS_TOL, REL_TOL, COS_TOL, ROW_COS_TOL = 8e-4, 2.01 / 128, 5e-6, 1e-5  # reference/testing/compare.h, kOutTolerance

SUITES = {  # bench/measure/shapes.cpp
    "main": ["h128_q1_b1_k4096", "h128_q1_b16_k4096", "h128_q1_b64_k4096", "h128_q1_b128_k4096", "h128_q1_b128_k8192",
             "h128_q2_b128_k4096_causal", "h64_q1_b64_k4096", "h16_q1_b1_k8192", "h16_q1_b16_k4096",
             "h16_q1_b64_k4096", "h16_q1_b128_k8192", "h128_q1_b128_klognormal8192", "h128_q1_b128_kskew131072"],
}

PROTOCOL = (
    "mla_bench's inputs (flat data of seed 0, pages of 64 tokens, randomly permuted); one operation captured in a CUDA "
    "graph, between CUDA events; median of interleaved rounds of all peers (under 1 ms: 10 warm-ups, 4 x 25; under 20 "
    "ms: 2, 4 x 9; else 4 x 1); cold: 256 MB read through the L2 before each run; sustained: back to back after 1.2 s "
    "of the same work, as many runs in 2 rounds, none over 200 ms; outputs full of NaN checked against float64 before "
    "and after, 64 rows (sequence, query) with all heads")
NOTES = (
    "PyTorch eager and SDPA gather the pages inside the operation, padded to the longest sequence, and read what is "
    "past a sequence's end before they mask it. What serves all layers of a model, a split plan or a mask, is made "
    "before, outside the time. Another permutation of pages than mla_bench's.")


class Refusal(Exception):
    """A message for the user: exit status 2."""


class Left(Exception):
    """Why a peer has no time on a shape."""


# --- Shapes -----------------------------------------------------------------------------------------------------------

MASK64 = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
EVEN_FIELDS = 0x0000FFFF0000FFFF
STREAM_Q, STREAM_CACHE, STREAM_LENGTH, STREAM_EMPTY = 1, 2, 4, 5


def mix(x):
    """generator::mix on Python's integers."""
    x = ((x ^ (x >> 30)) * MIX_1) & MASK64
    x = ((x ^ (x >> 27)) * MIX_2) & MASK64
    return x ^ (x >> 31)


def row_key(seed, stream, sequence, position, head):
    key = mix((seed + STEP * stream) & MASK64)
    for part in (sequence, position, head):
        key = mix((key + STEP * (part + 1)) & MASK64)
    return key


def draw(key, index):
    return mix((key + STEP * index) & MASK64)


def normal(key, column):
    sums = 0
    for j in range(3):
        bits = draw(key, 3 * column + j)
        sums += (bits & EVEN_FIELDS) + ((bits >> 16) & EVEN_FIELDS)
    return (sums & 0xFFFFFFFF) + (sums >> 32) - 6 * 65535


def log_normal_lengths(batch, mean):
    def uniform(counter):
        return ((mix(((counter + 1) * STEP) & MASK64) >> 11) + 0.5) / 9007199254740992.0

    variance = math.log(1 + 0.25)
    lengths = []
    for i in range(batch):
        z = math.sqrt(-2 * math.log(uniform(2 * i))) * math.cos(2 * math.pi * uniform(2 * i + 1))
        length = mean * math.exp(math.sqrt(variance) * z - variance / 2)
        below = math.floor(length)
        lengths.append(max(1, below + (length - below >= 0.5)))  # std::round
    return lengths


def varied_lengths(batch, mean, queries):
    lengths = []
    for i in range(batch):
        z = normal(row_key(0, STREAM_LENGTH, i, 0, 0), 0) / 65536.0
        length = max(math.floor(mean + z * mean / 2), queries)
        empty = (draw(row_key(0, STREAM_EMPTY, i, 0, 0), 0) >> 11) * 2.0**-53 < 0.125
        lengths.append(0 if empty else length)
    return lengths


class Shape:
    """What a name like h128x2_q2_b64_klognormal4096_causal_fp16 spells."""
    FORM = re.compile(r"h(\d+)(?:x(\d+))?_q(\d+)_b(\d+)_k(lognormal|skew|varied|stepped)?(\d+)(_causal)?"
                      r"(_split\d+)?(_fp16)?", re.ASCII)

    def __init__(self, name):
        match = self.FORM.fullmatch(name)
        if not match:
            raise Refusal(f"shape '{name}' is not of the form h128_q1_b64_k4096[_causal][_fp16]")
        if match[8]:
            raise Refusal(f"shape '{name}': {match[8]} asks for batch-invariant mode, which peers do not have")
        self.name = name
        self.h_q, self.h_kv, self.s_q, self.b, k = (int(match[i] or 1) for i in (1, 2, 3, 4, 6))
        if min(self.h_q, self.h_kv, self.s_q, self.b, k) < 1 or max(self.h_q, self.s_q, k) > 1 << 30 or self.b > 65535:
            raise Refusal(f"shape '{name}': a size is zero or too large")
        if self.h_q % self.h_kv:
            raise Refusal(f"shape '{name}': {self.h_kv} KV heads do not divide {self.h_q} query heads")
        self.causal, self.dtype = bool(match[7]), "fp16" if match[9] else "bf16"
        if match[5] == "lognormal":
            self.lengths = log_normal_lengths(self.b, k)
        elif match[5] == "skew":
            self.lengths = [512] * (self.b - 1) + [k]
        elif match[5] == "varied":
            self.lengths = varied_lengths(self.b, k, self.s_q)
        elif match[5] == "stepped":
            self.lengths = [max(1, (2 * k * (i + 1) + self.b) // (2 * self.b)) for i in range(self.b)]
        else:
            self.lengths = [k] * self.b

    @property
    def group(self):
        """Query heads that share a KV head."""
        return self.h_q // self.h_kv

    @property
    def rows(self):
        """Packed rows (query, head) of a KV head."""
        return self.s_q * self.group

    @property
    def pages(self):
        return [-(-length // PAGE) for length in self.lengths]

    @property
    def padded(self):
        """The longest sequence, in whole pages: what a padded batch has for each."""
        return PAGE * max(1, max(self.pages))

    def flop(self, tokens=None):
        tokens = sum(self.lengths) if tokens is None else tokens
        return 2 * self.s_q * self.h_q * tokens * (D_QK + D_V)


def select_shapes(text, suite, dtype):
    names = [name for name in text.split(",") if name] if text else SUITES[suite]
    names = [name + "_fp16" if dtype == "fp16" and not name.endswith("_fp16") else name for name in names]
    return [Shape(name) for name in dict.fromkeys(names)]


# --- Inputs -----------------------------------------------------------------------------------------------------------

def signed(x):
    """A 64-bit pattern as the int64 that torch computes with."""
    return (x & MASK64) - (1 << 64 if x & (1 << 63) else 0)


def mix_tensor(x):
    def shifted(x, n):  # logical; torch's is arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = (x ^ shifted(x, 30)) * signed(MIX_1)
    x = (x ^ shifted(x, 27)) * signed(MIX_2)
    return x ^ shifted(x, 31)


def flat_rows(stream, sequence, position, head, dtype):
    """Rows of 576 values of flat data, seed 0, as generator::normal_tenth makes them. Index tensors of one shape."""
    key = torch.full_like(sequence, signed(mix((STEP * stream) & MASK64)))
    for part in (sequence, position, head):
        key = mix_tensor(key + (part + 1) * signed(STEP))
    key = key[..., None]
    column = torch.arange(D_QK, device=key.device)
    sums = 0
    for j in range(3):
        bits = mix_tensor(key + (3 * column + j) * signed(STEP))
        sums = sums + (bits & EVEN_FIELDS) + ((bits >> 16) & EVEN_FIELDS)
    value = (sums & 0xFFFFFFFF) + (sums >> 32) - 6 * 65535
    # Exact, then one rounded product, then one rounding to 16 bits; the factor is float32's 0.1 over 2^16.
    return (value.to(torch.float32) * (0.100000001490116119384765625 / 65536)).to(dtype)


class Inputs:
    """q, cache and tables of a shape on a device. The values are mla_bench's, bit by bit; the pages' order is not."""
    CHUNK_ELEMENTS = 1 << 24

    def __init__(self, shape, device="cuda"):
        self.shape, self.device = shape, device
        self.dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
        pages = shape.pages
        order = torch.randperm(sum(pages) + SPARE_PAGES, generator=torch.Generator().manual_seed(0), dtype=torch.int64)
        used = order[:sum(pages)]
        columns = max(pages) + 1
        owner = torch.repeat_interleave(torch.arange(shape.b), torch.tensor(pages))
        begin = torch.tensor([0] + pages).cumsum(0)
        place = torch.arange(sum(pages)) - begin[owner]
        table = torch.full((shape.b, columns), GARBAGE_PAGE, dtype=torch.int32)
        table[owner, place] = used.to(torch.int32)
        safe = table.clone()
        safe[safe == GARBAGE_PAGE] = int(order[-1])
        self.table = table.to(device)
        self.safe_table = safe.to(device)  # unused slots name a page that no sequence owns
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=device)

        self.kv = torch.empty(len(order), PAGE, shape.h_kv, D_QK, dtype=self.dtype, device=device)
        page_sequence = torch.full((len(order),), -1)
        page_sequence[used] = owner
        page_place = torch.zeros(len(order), dtype=torch.int64)
        page_place[used] = place
        sequence = page_sequence.repeat_interleave(PAGE)
        token = page_place.repeat_interleave(PAGE) * PAGE + torch.arange(PAGE).repeat(len(order))
        owned = (sequence >= 0) & (token < torch.tensor(shape.lengths)[sequence.clamp(min=0)])
        rows = owned.nonzero().flatten()
        self.unused = (~owned).nonzero().flatten().to(device)
        flat = self.kv.view(-1, shape.h_kv, D_QK)
        heads = torch.arange(shape.h_kv, device=device)
        for part in rows.split(max(1, self.CHUNK_ELEMENTS // (shape.h_kv * D_QK))):
            of, at = sequence[part].to(device)[:, None], token[part].to(device)[:, None]
            of, at, head = torch.broadcast_tensors(of, at, heads)
            flat[part.to(device)] = flat_rows(STREAM_CACHE, of, at, head, self.dtype)
        self.fill_unused(float("nan"))

        grid = torch.meshgrid(torch.arange(shape.b, device=device), torch.arange(shape.s_q, device=device),
                              torch.arange(shape.h_q, device=device), indexing="ij")
        self.q = torch.empty(shape.b, shape.s_q, shape.h_q, D_QK, dtype=self.dtype, device=device)
        step = max(1, self.CHUNK_ELEMENTS // (shape.s_q * shape.h_q * D_QK))
        for i in range(0, shape.b, step):
            self.q[i:i + step] = flat_rows(STREAM_Q, *(index[i:i + step] for index in grid), self.dtype)

    def fill_unused(self, value):
        """Rows past every sequence's end, and pages that no sequence owns."""
        self.kv.view(-1, self.kv.shape[2] * D_QK).index_fill_(0, self.unused, value)

    def new_out(self):
        shape = self.shape
        return torch.full((shape.b, shape.s_q, shape.h_q, D_V), float("nan"), dtype=self.dtype, device=self.device)

    def tokens(self, sequence):
        """The cache rows of a sequence, in order: [s_k, h_kv, 576]."""
        pages = self.table[sequence, :self.shape.pages[sequence]].long()
        return self.kv[pages].flatten(0, 1)[:self.shape.lengths[sequence]]

    def limits(self):
        """[b, s_q]: how many tokens a query sees; not positive: none."""
        lengths = self.lengths[:, None].expand(-1, self.shape.s_q)
        if not self.shape.causal:
            return lengths
        return lengths - self.shape.s_q + 1 + torch.arange(self.shape.s_q, device=self.device, dtype=torch.int32)


class Verdict:
    def __init__(self, ok, rel_l2, why):
        self.ok, self.rel_l2, self.why = ok, rel_l2, why


class Truth:
    """The float64 result in some (sequence, query) rows, all heads; the longest sequence is always among them."""

    def __init__(self, inputs):
        shape = inputs.shape
        self.shape = shape
        every = [(i, j) for i in range(shape.b) for j in range(shape.s_q)]
        longest = (max(range(shape.b), key=lambda i: shape.lengths[i]), shape.s_q - 1)
        rows = every if len(every) <= CHECKED_ROWS else [longest] + random.Random(1).sample(
            [row for row in every if row != longest], CHECKED_ROWS - 1)
        self.rows = sorted(rows)
        self.index = tuple(torch.tensor(part, device=inputs.device) for part in zip(*self.rows))
        expected = []
        for i, j in self.rows:
            seen = shape.lengths[i] - shape.s_q + 1 + j if shape.causal else shape.lengths[i]
            row = torch.zeros(shape.h_kv, shape.group, D_V, dtype=torch.float64, device=inputs.device)
            if seen > 0:
                keys = inputs.tokens(i)[:seen].double()
                q = inputs.q[i, j].double().view(shape.h_kv, shape.group, D_QK)
                for head in range(shape.h_kv):
                    weights = torch.softmax(SCALE * (q[head] @ keys[:, head].T), dim=-1)
                    row[head] = weights @ keys[:, head, :D_V]
            expected.append(row.view(shape.h_q, D_V))
        self.expected = torch.stack(expected)

    def compare(self, out):
        """reference/testing/compare.h on these rows. Written so that NaN fails."""
        shape = self.shape
        want = (shape.b, shape.s_q, shape.h_q, D_V)
        if tuple(out.shape) != want:
            return Verdict(False, None, f"output of shape {tuple(out.shape)}, expected {want}")
        actual = out[self.index].double()
        error = (actual - self.expected).abs()
        good = (error < ABS_TOL) | (error / (self.expected.abs() + 1e-6) < REL_TOL)
        wrong = int((~good).sum())
        dd, aa, rr = ((x * x).sum(-1) for x in (error, actual, self.expected))

        def cosine(dd, total):
            return torch.where(total == 0, torch.zeros_like(dd), dd / total)

        whole, row = float(cosine(dd.sum(), (aa + rr).sum())), float(cosine(dd, aa + rr).max())
        l2 = 0.0 if float(dd.sum()) == 0 else float((dd.sum() / rr.sum()).sqrt())
        why = None
        if wrong:
            place, head, column = (~good).nonzero()[0].tolist()
            i, j = self.rows[place]
            why = (f"wrong: out[{i}, {j}, {head}, {column}] is {float(actual[place, head, column]):.6g}, expected "
                   f"{float(self.expected[place, head, column]):.6g}; {wrong} of {good.numel()} elements mismatch")
        elif not whole < COS_TOL:
            why = f"wrong: cosine difference {whole:.3g} is not less than {COS_TOL:g}"
        elif not row < ROW_COS_TOL:
            why = f"wrong: cosine difference {row:.3g} of a row is not less than {ROW_COS_TOL:g}"
        return Verdict(why is None, l2, why)


# --- Peers ------------------------------------------------------------------------------------------------------------

class Peer:
    """An implementation. `prepare` does what a user does once a step, and returns the operation: no arguments, enqueues
    one decode, returns out [b, s_q, h_q, 512]."""
    name = key = ""
    package = module = None  # as pip and as Python name it
    reads_past_end = False   # and masks afterwards: NaN there would spread

    def __init__(self):
        self.note = ""  # what a reader should know of the run on this shape

    def available(self):
        """Why it cannot run here, or None."""
        if torch is None:
            return "PyTorch is not installed"
        if self.module is None:
            return None
        try:
            if importlib.util.find_spec(self.module) is None:
                return f"package {self.package} is not installed"
            importlib.import_module(self.module)
        except Exception as error:  # a broken package is no worse than none
            return f"package {self.package} cannot be imported: {explain(error)}"
        return None

    def version(self):
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return str(getattr(sys.modules.get(self.module), "__version__", "unknown"))

    def refuses(self, shape):
        """Why it cannot do a shape, or None."""
        return None

    def predicted_seconds(self, shape):
        """A guess, high, of one run: what would take over 2 s is not tried."""
        return 0.0

    def prepare(self, inputs):
        raise NotImplementedError


class Padded(Peer):
    """What the two PyTorch peers share: pages gathered into [n, s_max, 576], n sequences at once, in every decode."""
    package = "torch"
    reads_past_end = True
    chunk_bytes = 16 << 30

    def predicted_seconds(self, shape):
        return shape.flop(shape.b * shape.padded) / 4e12

    def sequence_bytes(self, shape):
        """Temporaries for one sequence: K (in float32 too), logits and weights."""
        return shape.padded * (shape.h_kv * D_QK * 12 + shape.h_q * shape.s_q * 10)

    def attend(self, q, k, mask):
        """q [n, h_kv, rows, 576], k [n, h_kv, s_max, 576], mask [n, 1, 1 or rows, s_max] or None; the result's elements
        in the order [n, h_kv, rows, 512]."""
        raise NotImplementedError

    def prepare(self, inputs):
        shape = inputs.shape
        table = inputs.safe_table[:, :shape.padded // PAGE].long()
        step = max(1, min(shape.b, self.chunk_bytes // self.sequence_bytes(shape)))
        limits = inputs.limits()
        mask = blind = None  # one mask serves all layers of a model, so it is made here
        if shape.causal or any(length != shape.padded for length in shape.lengths):
            seen = limits.repeat_interleave(shape.group, 1) if shape.causal else limits[:, :1]
            mask = (torch.arange(shape.padded, device=inputs.device) < seen[..., None])[:, None]
        if bool((limits <= 0).any()):
            blind = (limits <= 0)[..., None, None]  # rows that see nothing: 0
        q = inputs.q.view(shape.b, shape.s_q, shape.h_kv, shape.group, D_QK).transpose(1, 2)
        self.note = f"{-(-shape.b // step)} chunks of {step} sequences" if step < shape.b else ""

        def part(first):
            own = slice(first, min(first + step, shape.b))
            n = own.stop - own.start
            k = inputs.kv[table[own]].view(n, -1, shape.h_kv, D_QK).transpose(1, 2)
            out = self.attend(q[own].reshape(n, shape.h_kv, shape.rows, D_QK), k, None if mask is None else mask[own])
            out = out.reshape(n, shape.h_kv, shape.s_q, shape.group, D_V).transpose(1, 2)
            out = out.reshape(n, shape.s_q, shape.h_q, D_V)
            return out if blind is None else out.masked_fill(blind[own], 0)

        def operation():
            parts = [part(first) for first in range(0, shape.b, step)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return operation


class Eager(Padded):
    name, key = "PyTorch eager with gather", "eager"

    def attend(self, q, k, mask):
        n, h_kv, rows, _ = q.shape
        k = k.reshape(n * h_kv, -1, D_QK)
        logits = torch.bmm(q.reshape(n * h_kv, rows, D_QK), k.transpose(1, 2)).mul_(SCALE)
        if mask is not None:  # finite: a row that sees nothing must not be NaN
            logits.view(n, h_kv, rows, -1).masked_fill_(~mask, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, k[..., :D_V])


class Sdpa(Padded):
    """Heads that share a KV head are folded into the query dimension, so K and V need no copy for each."""
    name, key = "PyTorch SDPA with gather", "sdpa"

    def attend(self, q, k, mask):
        v = k[..., :D_V]
        if mask is not None:
            mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
        if "backend" not in self.note:
            self.note = "; ".join(filter(None, ["backend " + self.backend(q, k, v, mask), self.note]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)

    @staticmethod
    def backend(q, k, v, mask):
        try:  # what scaled_dot_product_attention asks, too
            choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, scale=SCALE)
            return torch.nn.attention.SDPBackend(choice).name
        except Exception as error:
            return f"unknown ({explain(error)})"


if triton is not None:
    # Row tile x sequence and KV head x split. A sequence has ceil(length / chunk) splits; one that has a single split
    # (or is empty) is written to OUT, others leave normalised partial results in slots, with lse in base 2. WIDEN is
    # for Triton's interpreter alone.
    @triton.jit(do_not_specialize=["s_q", "group", "rows", "table_stride"])
    def mla_decode(Q, KV, TABLE, LENGTHS, FIRST_SLOT, OUT, PART, PART_LSE, scale_log2, s_q, group, rows, table_stride,
                   chunk, H_KV: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   WIDEN: tl.constexpr):
        tile = tl.program_id(0)
        sequence = tl.program_id(1) // H_KV
        head_kv = tl.program_id(1) % H_KV
        split = tl.program_id(2)
        length = tl.load(LENGTHS + sequence)
        splits = tl.maximum(tl.cdiv(length, chunk), 1)
        if split >= splits:
            return
        begin = split * chunk
        end = tl.minimum(begin + chunk, length)

        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < rows
        query = row // group
        head = head_kv * group + row % group
        q_row = (sequence.to(tl.int64) * s_q + query) * (H_KV * group) + head
        latent = tl.arange(0, 512)
        rope = 512 + tl.arange(0, 64)
        q_latent = tl.load(Q + q_row[:, None] * 576 + latent[None, :], mask=valid[:, None], other=0.0)
        q_rope = tl.load(Q + q_row[:, None] * 576 + rope[None, :], mask=valid[:, None], other=0.0)
        if WIDEN:
            q_latent, q_rope = q_latent.to(tl.float32), q_rope.to(tl.float32)
        limit = tl.zeros([BLOCK_M], tl.int32) + end
        if CAUSAL:
            limit = tl.minimum(limit, length - s_q + 1 + query)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, 512], tl.float32)
        for start in range(begin, end, BLOCK_N):  # BLOCK_N divides a page, and a page divides chunk
            page = tl.load(TABLE + sequence * table_stride + start // 64).to(tl.int64)
            token = start + tl.arange(0, BLOCK_N)
            inside = token < end  # what is past the end may be NaN
            kv_row = (page * 64 + token % 64) * H_KV + head_kv
            k_latent = tl.load(KV + kv_row[:, None] * 576 + latent[None, :], mask=inside[:, None], other=0.0)
            k_rope = tl.load(KV + kv_row[:, None] * 576 + rope[None, :], mask=inside[:, None], other=0.0)
            if WIDEN:
                k_latent, k_rope = k_latent.to(tl.float32), k_rope.to(tl.float32)
            logit = tl.dot(q_rope, tl.trans(k_rope))
            logit = tl.dot(q_latent, tl.trans(k_latent), logit) * scale_log2
            logit = tl.where(token[None, :] < limit[:, None], logit, float("-inf"))
            new_top = tl.maximum(top, tl.max(logit, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf less -inf would be NaN
            weight = tl.exp2(logit - base[:, None])
            keep = tl.exp2(top - base)
            total = total * keep + tl.sum(weight, 1)
            acc = tl.dot(weight.to(k_latent.dtype), k_latent, acc * keep[:, None])
            top = new_top

        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        if splits == 1:
            tl.store(OUT + q_row[:, None] * 512 + latent[None, :], acc.to(OUT.dtype.element_ty), mask=valid[:, None])
        else:
            slot = tl.load(FIRST_SLOT + sequence).to(tl.int64) + split
            part_row = (slot * H_KV + head_kv) * rows + row
            tl.store(PART + part_row[:, None] * 512 + latent[None, :], acc, mask=valid[:, None])
            tl.store(PART_LSE + part_row, top + tl.log2(total), mask=valid)

    # Packed row x sequence and KV head.
    @triton.jit(do_not_specialize=["s_q", "group", "rows"])
    def mla_combine(LENGTHS, FIRST_SLOT, OUT, PART, PART_LSE, s_q, group, rows, chunk, H_KV: tl.constexpr):
        row = tl.program_id(0)
        sequence = tl.program_id(1) // H_KV
        head_kv = tl.program_id(1) % H_KV
        splits = tl.cdiv(tl.load(LENGTHS + sequence), chunk)
        if splits <= 1:
            return
        slot = tl.load(FIRST_SLOT + sequence).to(tl.int64)
        column = tl.arange(0, 512)
        top = -float("inf")
        total = 0.0
        acc = tl.zeros([512], tl.float32)
        for split in range(0, splits):
            part_row = ((slot + split) * H_KV + head_kv) * rows + row
            lse = tl.load(PART_LSE + part_row)
            new_top = tl.maximum(top, lse)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            keep = tl.exp2(top - base)
            weight = tl.exp2(lse - base)
            total = total * keep + weight
            acc = acc * keep + weight * tl.load(PART + part_row * 512 + column)
            top = new_top
        acc = acc / tl.where(total > 0, total, 1.0)
        out_row = (sequence.to(tl.int64) * s_q + row // group) * (H_KV * group) + head_kv * group + row % group
        tl.store(OUT + out_row * 512 + column, acc.to(OUT.dtype.element_ty))

    @triton.jit
    def read_words(X, LARGEST, BLOCK: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(LARGEST + tl.program_id(0), tl.max(tl.load(X + place), 0))

    @triton.jit
    def nothing(X):
        pass


class Triton(Peer):
    """Split-KV decode of a paged cache, tuned a little: for a shape, the fastest of a few block sizes and splits."""
    name, key, package, module = "Triton of bench/report/peers.py", "triton", "triton", "triton"
    # Rows a tile, tokens a step, warps, stages; by the number of rows. A stage goes to the page's number, which the
    # load of the page waits for.
    MANY = [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 5)]
    SOME = [(32, 64, 8, 2), (32, 32, 8, 5)]
    FEW = [(16, 64, 4, 2), (16, 32, 4, 5), (16, 64, 8, 2), (16, 32, 8, 5)]

    def chunks(self, shape, tile):
        """Tokens a split, for one, two and four blocks a multiprocessor."""
        on_gpu = torch.cuda.is_available()
        processors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 4
        work = sum(shape.lengths) * shape.h_kv * -(-shape.rows // tile)
        found = []
        for waves in (1, 2, 4):
            chunk = max(1, -(-work // (processors * waves)))
            splits = max(1, round(max(shape.lengths) / chunk))
            found.append(PAGE * max(1, -(-max(shape.lengths) // (splits * PAGE))))
        return list(dict.fromkeys(found))

    def launcher(self, inputs, tile, step, warps, stages, chunk, out):
        shape = inputs.shape
        splits = [max(1, -(-length // chunk)) for length in shape.lengths]
        slots = [n if n > 1 else 0 for n in splits]  # whoever has one split needs no slot
        first = torch.tensor([sum(slots[:i]) for i in range(shape.b)], dtype=torch.int32, device=inputs.device)
        part = torch.empty(max(1, sum(slots)) * shape.h_kv * shape.rows, D_V, device=inputs.device)
        part_lse = torch.empty(part.shape[0], device=inputs.device)
        sizes = (shape.s_q, shape.group, shape.rows)
        grid = (-(-shape.rows // tile), shape.b * shape.h_kv, max(splits))
        interpreted = inputs.device == "cpu"  # which multiplies the bit patterns of bf16, and truncates to it
        target = torch.full_like(out, float("nan"), dtype=torch.float32) if interpreted else out

        def operation():
            mla_decode[grid](inputs.q, inputs.kv, inputs.table, inputs.lengths, first, target, part, part_lse,
                             SCALE * math.log2(math.e), *sizes, inputs.table.shape[1], chunk, H_KV=shape.h_kv,
                             CAUSAL=shape.causal, BLOCK_M=tile, BLOCK_N=step, WIDEN=interpreted,
                             num_warps=warps, num_stages=stages)
            if sum(slots):
                mla_combine[(shape.rows, shape.b * shape.h_kv)](inputs.lengths, first, target, part, part_lse,
                                                                *sizes, chunk, H_KV=shape.h_kv, num_warps=4)
            return out.copy_(target) if interpreted else out

        return operation

    def prepare(self, inputs):
        out = inputs.new_out()
        best, failure = None, None
        rows = inputs.shape.rows
        for config in self.MANY if rows > 32 else self.SOME if rows > 16 else self.FEW:
            for chunk in self.chunks(inputs.shape, config[0]):
                try:
                    operation = self.launcher(inputs, *config, chunk, out)
                    if inputs.device == "cpu":
                        return operation
                    seconds = self.time(operation)
                except torch.cuda.OutOfMemoryError as error:
                    failure = error
                    continue
                except Exception as error:  # too much shared memory, say
                    failure = error
                    torch.cuda.synchronize()  # raises if the device is gone
                    break
                if best is None or seconds < best[0]:
                    best = (seconds, operation)
                    self.note = "{} rows x {} tokens, {} warps, {} stages; ".format(*config) + f"{chunk} tokens a split"
        if best is None:
            raise failure
        return best[1]

    @staticmethod
    def time(operation):
        for _ in range(2):
            operation()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(3):
            operation()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])


class FlashMla(Peer):
    name, key, package, module = "FlashMLA", "flashmla", "flash_mla", "flash_mla"

    def prepare(self, inputs):
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
        shape = inputs.shape
        # Newer packages plan in the first call, and keep it.
        plan, splits = get_mla_metadata(inputs.lengths, shape.rows, shape.h_kv)
        return lambda: flash_mla_with_kvcache(inputs.q, inputs.kv, inputs.safe_table, inputs.lengths, D_V, plan, splits,
                                              softmax_scale=SCALE, causal=shape.causal)[0]


class FlashInfer(Peer):
    name, key, package, module = "FlashInfer", "flashinfer", "flashinfer-python", "flashinfer"

    def refuses(self, shape):
        return "one KV head only" if shape.h_kv > 1 else None

    def prepare(self, inputs):
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
        shape = inputs.shape
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=inputs.device))
        pages = torch.tensor(shape.pages)
        used = torch.arange(inputs.table.shape[1]) < pages[:, None]
        wrapper.plan(torch.arange(shape.b + 1, dtype=torch.int32, device=inputs.device) * shape.s_q,
                     torch.tensor([0] + shape.pages).cumsum(0).to(inputs.device, torch.int32),
                     inputs.table[used.to(inputs.device)], inputs.lengths, shape.h_q, D_V, D_QK - D_V, PAGE,
                     shape.causal, SCALE, inputs.dtype, inputs.dtype)
        self.note = "backend " + str(getattr(wrapper, "_backend", "unknown"))
        q, kv, out = inputs.q.flatten(0, 1), inputs.kv[:, :, 0], inputs.new_out()

        def operation():
            wrapper.run(q[..., :D_V], q[..., D_V:], kv[..., :D_V], kv[..., D_V:], out=out.flatten(0, 1))
            return out

        return operation


class FlashAttention3(Peer):
    name, key, package, module = "FlashAttention-3 qv", "fa3", "flash_attn_3", "flash_attn_interface"

    def prepare(self, inputs):
        import flash_attn_interface
        shape, extra = inputs.shape, {}
        if hasattr(flash_attn_interface, "get_scheduler_metadata"):
            extra["scheduler_metadata"] = flash_attn_interface.get_scheduler_metadata(
                shape.b, shape.s_q, inputs.safe_table.shape[1] * PAGE, shape.h_q, shape.h_kv, D_QK - D_V,
                inputs.lengths, inputs.dtype, headdim_v=D_V, page_size=PAGE, causal=shape.causal)

        def operation():
            out = flash_attn_interface.flash_attn_with_kvcache(
                inputs.q[..., D_V:], inputs.kv[..., D_V:], inputs.kv[..., :D_V], qv=inputs.q[..., :D_V],
                cache_seqlens=inputs.lengths, page_table=inputs.safe_table, softmax_scale=SCALE, causal=shape.causal,
                **extra)
            return out[0] if isinstance(out, (tuple, list)) else out

        return operation


PEERS = [FlashMla, FlashInfer, FlashAttention3, Triton, Sdpa, Eager]


def select_peers(text):
    peers = [peer() for peer in PEERS]
    if not text:
        return peers
    wanted = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in wanted:
        if not any(word in (peer.key, peer.name.lower()) for peer in peers):
            raise Refusal(f"peer '{word}' is none of {', '.join(peer.key for peer in peers)}")
    return [peer for peer in peers if {peer.key, peer.name.lower()} & set(wanted)]


# --- Timing -----------------------------------------------------------------------------------------------------------

def plan(microseconds):
    """Warm-ups, rounds, runs a round: bench/measure/gpu_runner.cu."""
    if microseconds < 1e3:
        return 10, 4, 25
    return (2, 4, 9) if microseconds < 20e3 else (0, 4, 1)


def quantile(samples, q):
    """Linear between neighbours: bench/measure/statistics.cpp."""
    samples = sorted(samples)
    place = q * (len(samples) - 1)
    below = math.floor(place)
    above = min(below + 1, len(samples) - 1)
    return samples[below] + (place - below) * (samples[above] - samples[below])


def explain(error):
    """An exception in one short line."""
    if isinstance(error, Left):
        return str(error)
    if torch is not None and isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Handle:
    """A prepared operation: what `launch` enqueues, and the output it leaves."""

    def __init__(self, operation):
        self.graph, self.note, self.output = None, "", None
        self.operation = operation

    def launch(self):
        if self.graph is None:
            self.output = self.operation()
        else:
            self.graph.replay()


class GpuRunner:
    """CUDA graphs timed by CUDA events: bench/measure/gpu_runner.cu in Python."""

    def __init__(self):
        self.other_data = torch.empty(FLUSH_BYTES // 4, device="cuda").uniform_(1, 2)
        self.events = []
        torch.cuda.synchronize()

    def prepare(self, operation):
        handle = Handle(operation)
        # Before the capture, and on another stream than the default: libraries make handles and workspaces for each.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                handle.output = operation()
        torch.cuda.synchronize()
        handle.output = None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = operation()
            handle.graph, handle.output = graph, output
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            torch.cuda.synchronize()  # raises if the device is gone
            handle.note = f"not in a CUDA graph ({explain(error)}): times have the host's gaps in them"
        return handle

    def run_poisoned(self, handle):
        """Once, on an output full of NaN. Without a graph the allocator gives the same memory again, as a rule."""
        if handle.output is not None:
            handle.output.fill_(float("nan"))
        if handle.graph is None:
            handle.output = None
        handle.launch()
        torch.cuda.synchronize()
        return handle.output

    def run_cold(self, handle, runs):
        """read 256 MB | begin | operation | end | read ...: the host enqueues ahead, while reads run."""
        self.make_events(2 * runs)
        for i in range(runs):
            self.other_data.sum()
            self.events[2 * i].record()
            handle.launch()
            self.events[2 * i + 1].record()
        torch.cuda.synchronize()
        return [1e3 * self.events[2 * i].elapsed_time(self.events[2 * i + 1]) for i in range(runs)]

    def run_sustained(self, handle, expected_us, warmup_s, runs):
        """Chunks of about 2 ms, one running while the next is enqueued; then one event between two runs."""
        self.make_events(runs + 1)
        done = [torch.cuda.Event(), torch.cuda.Event()]
        chunk = int(min(max(2e3 / max(expected_us, 1.0), 1), 400))
        end, i = time.monotonic() + warmup_s, 0
        while time.monotonic() < end:
            for _ in range(chunk):
                handle.launch()
            done[i % 2].record()
            if i > 0:
                done[(i + 1) % 2].synchronize()
            i += 1
        self.events[0].record()
        for i in range(runs):
            handle.launch()
            self.events[i + 1].record()
        torch.cuda.synchronize()
        return [1e3 * self.events[i].elapsed_time(self.events[i + 1]) for i in range(runs)]

    def survives(self):
        """Whether the device still works: some errors of kernels stay until the process ends."""
        try:
            torch.cuda.synchronize()
            return True
        except Exception:
            return False

    def make_events(self, count):
        while len(self.events) < count:
            event = torch.cuda.Event(enable_timing=True)
            event.record()  # made at its first record
            self.events.append(event)


class Result:
    """What became of one peer on one shape."""

    def __init__(self, peer):
        self.peer, self.handle, self.reason = peer, None, None
        self.cold, self.sustained, self.notes = [], [], []
        self.rel_l2, self.expected_us = None, None

    def entry(self):
        def spread(samples):
            if not samples:
                return None
            return [round(quantile(samples, 0.1), 2), round(quantile(samples, 0.9), 2), len(samples)]

        note = "; ".join(([self.reason] if self.reason else []) + self.notes)
        return {"cold": spread(self.cold), "sustained": spread(self.sustained), "checked": self.rel_l2, "note": note}

    def times(self):
        return [round(quantile(samples, 0.5), 2) if samples else None for samples in (self.cold, self.sustained)]


class Measurement:
    """All peers on one shape: each checked, then timed in rounds. `lost` says that the device is gone."""

    def __init__(self, inputs, peers, runner, truth, say=lambda text: None):
        self.inputs, self.runner, self.truth, self.say = inputs, runner, truth, say
        self.results = [Result(peer) for peer in peers]
        self.lost = False

    def run(self):
        for result in self.results:
            self.attempt(result, "check", lambda: self.check(result))
        self.fill_unused(0.0)  # for all alike while they are timed
        plans = {id(result): plan(result.expected_us or 0) for result in self.results}
        for result in self.results:
            warmups, rounds, runs = plans[id(result)]
            self.attempt(result, "warm-up", lambda: self.runner.run_cold(result.handle, warmups))
        for _ in range(4):
            for result in self.results:
                runs = plans[id(result)][2]
                self.attempt(result, "cold", lambda: result.cold.extend(self.runner.run_cold(result.handle, runs)))
        for _ in range(SUSTAINED_ROUNDS):
            for result in self.results:
                _, rounds, runs = plans[id(result)]
                self.attempt(result, "sustained", lambda: self.sustain(result, rounds * runs // SUSTAINED_ROUNDS))
        for result in self.results:
            self.attempt(result, "check again", lambda: self.check_again(result))
            result.handle = None
            if result.reason:
                result.cold, result.sustained = [], []
        return self.results

    def attempt(self, result, what, step):
        """Runs `step`, unless the peer dropped out; what it raises is the peer's reason."""
        if result.reason:
            return
        if self.lost:
            if not result.cold:
                result.reason = f"not run: the device was lost in the run of {self.lost}"
            elif not any("lost" in note for note in result.notes):
                result.notes.append(f"cut short: the device was lost in the run of {self.lost}")
            return
        self.say(f"{result.peer.name}: {what}")
        try:
            step()
        except Exception as error:
            result.reason, result.handle = explain(error), None  # and the memory that its graph holds
            if not self.runner.survives():
                self.lost = result.peer.name
                result.reason += " (the device is lost with it)"

    def fill_unused(self, value):
        if not self.lost:
            self.inputs.fill_unused(value)

    def check(self, result):
        peer, shape = result.peer, self.inputs.shape
        refusal = peer.refuses(shape)
        if refusal:
            raise Left(refusal)
        seconds = peer.predicted_seconds(shape)
        if seconds * 1e6 > LEAVE_OUT_US:
            raise Left(f"left out: a run is predicted to take up to {seconds:.1f} s")
        self.fill_unused(0.0 if peer.reads_past_end else float("nan"))
        peer.note = ""
        result.handle = self.runner.prepare(peer.prepare(self.inputs))
        result.notes += [note for note in (peer.note, result.handle.note) if note]
        verdict = self.truth.compare(self.runner.run_poisoned(result.handle))
        if not verdict.ok and not peer.reads_past_end:
            self.fill_unused(0.0)
            verdict = self.truth.compare(self.runner.run_poisoned(result.handle))
            if verdict.ok:
                result.notes.append("wrong with NaN past a sequence's end: zeros there")
        elif peer.reads_past_end:
            result.notes.append("zeros past a sequence's end, not NaN")
        if not verdict.ok:
            raise Left(verdict.why)
        result.rel_l2 = float(f"{verdict.rel_l2:.3g}")
        result.expected_us = self.runner.run_cold(result.handle, 1)[0]
        if result.expected_us > LEAVE_OUT_US:
            raise Left(f"left out: a run takes {result.expected_us * 1e-6:.1f} s")
        if result.expected_us > ONCE_US:
            result.notes.append("over 200 ms: cold only")

    def sustain(self, result, runs):
        if result.expected_us <= ONCE_US:
            result.sustained.extend(
                self.runner.run_sustained(result.handle, result.expected_us, SUSTAINED_WARMUP_S, runs))

    def check_again(self, result):
        verdict = self.truth.compare(self.runner.run_poisoned(result.handle))
        if not verdict.ok:
            raise Left("after timing: " + verdict.why)


def measure_ceilings(runner):
    """Rates of this run, in words. What fails is said, and loses no other."""
    def matrix():
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        handle = runner.prepare(lambda: torch.matmul(a, b))
        expected = quantile(runner.run_cold(handle, 3), 0.5)
        cold = quantile(runner.run_cold(handle, 36), 0.5)
        sustained = quantile(runner.run_sustained(handle, expected, SUSTAINED_WARMUP_S, 36), 0.5)
        return "torch.matmul bf16 8192^3 {:.0f} TFLOP/s cold, {:.0f} sustained".format(
            *(2 * 8192**3 / us * 1e-6 for us in (cold, sustained)))

    def read():
        words = torch.randint(-2**31, 2**31 - 1, ((1208 << 20) // 4,), dtype=torch.int32, device="cuda")
        block = 16384
        largest = torch.empty(len(words) // block, dtype=torch.int32, device="cuda")

        def rate(operation):
            handle = runner.prepare(operation)
            runner.run_cold(handle, 2)
            return words.nbytes / quantile(runner.run_cold(handle, 36), 0.5) * 1e-3

        try:
            grid = (len(largest),)
            return f"read {rate(lambda: read_words[grid](words, largest, BLOCK=block, num_warps=8)):.0f} GB/s"
        except Exception as error:
            torch.cuda.synchronize()
            numbers = words.view(torch.float32).nan_to_num_()
            return f"read {rate(lambda: numbers.sum()):.0f} GB/s (by torch.sum; no Triton: {explain(error)})"

    def launch():
        word = torch.zeros(1, device="cuda")
        try:
            handle, what = runner.prepare(lambda: nothing[(1,)](word)), "empty kernel"
        except Exception:
            torch.cuda.synchronize()
            handle, what = runner.prepare(lambda: word.zero_()), "kernel that clears one word"
        if handle.graph is None:
            what += " (no graph)"
        runner.run_cold(handle, 10)
        return f"{what} {quantile(runner.run_cold(handle, 100), 0.5):.1f} us"

    texts = []
    for step in (read, matrix, launch):
        try:
            texts.append(step())
        except Exception as error:
            if not runner.survives():
                raise Refusal(f"the device was lost while its {step.__name__} rate was measured: {explain(error)}")
            texts.append(f"no {step.__name__} rate: {explain(error)}")
        tidy()
    return "in this run: " + "; ".join(texts)


def tidy():
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Output -----------------------------------------------------------------------------------------------------------

def output_of(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def new_report(gpu, peers, ceilings):
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    root = Path(__file__).resolve().parents[2]
    absent = {peer.name: peer.available() for peer in peers if peer.available()}
    context = {
        "schema": SCHEMA,
        "gpu": gpu,
        "driver": driver[0] if driver else "unknown",
        "cuda": (torch.version.cuda if torch else None) or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "values": "median us, [cold, sustained]; null: not measured",
        "protocol": PROTOCOL,
        "notes": NOTES,
        "ceilings": ceilings,
        "torch": torch.__version__ if torch else "none",
        "triton": triton.__version__ if triton else "none",
        "commit": output_of(["git", "-C", str(root), "rev-parse", "--short", "HEAD"]) or "unknown",
    }
    for peer in peers:
        if peer.package not in (None, "torch", "triton") and peer.name not in absent:
            context[peer.package] = peer.version()
    return {"context": context, "shapes": {}, "spread": {}, "absent": absent}


def add_results(report, shape, results):
    report["spread"][shape.name] = {result.peer.name: result.entry() for result in results}
    times = {result.peer.name: result.times() for result in results if result.cold}
    if times:
        report["shapes"][shape.name] = times


def write_report(report, path):
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)  # a list on a line
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def table(shape, results):
    """Lines for the terminal."""
    lines = [shape.name, f"  {'peer':20} {'cold us (p10-p90)':>27} {'sustained us (p10-p90)':>27} {'TFLOP/s':>8} "
                         f"{'rel. L2':>8}  note"]

    def cell(samples):
        if not samples:
            return "-"
        median, low, high = (f"{quantile(samples, q):.1f}" for q in (0.5, 0.1, 0.9))
        return f"{median} ({low}-{high})"

    for result in results:
        entry = result.entry()
        rate = f"{shape.flop() / quantile(result.cold, 0.5) * 1e-6:.1f}" if result.cold else "-"
        checked = "-" if entry["checked"] is None else f"{entry['checked']:.1e}"
        lines.append(f"  {result.peer.name:20} {cell(result.cold):>27} {cell(result.sustained):>27} {rate:>8} "
                     f"{checked:>8}  {entry['note']}")
    return "\n".join(lines)


def show_list(peers):
    print("peers:")
    for peer in peers:
        reason = peer.available()
        state = reason if reason else f"available, {peer.package} {peer.version()}"
        print(f"  {peer.key:12} {peer.name:20} {state}")
    print("default shapes:")
    for name in SUITES["main"]:
        print(f"  {name}")


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)


def measure_shapes(shapes, peers, runner, report, path, make_inputs, make_truth):
    """Writes after every shape, so that what ends the run loses no figure. True if the device survived."""
    for shape in shapes:
        progress(f"{shape.name}: making data")
        try:
            inputs = make_inputs(shape)
            truth = make_truth(inputs)
        except Exception as error:
            results, lost = [Result(peer) for peer in peers], not runner.survives()
            for result in results:
                result.reason = f"no data: {explain(error)}"
        else:
            measurement = Measurement(inputs, peers, runner, truth, lambda text: progress(f"{shape.name}: {text}"))
            results = measurement.run()
            lost = measurement.lost
            del measurement
        inputs = truth = None
        progress("")
        add_results(report, shape, results)
        print(table(shape, results) + "\n", flush=True)
        if lost:
            report["context"]["notes"] += f" The run ended at {shape.name}: the device was lost."
        write_report(report, path)
        if lost:
            return False
        tidy()
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Times other implementations of MLA decoding by mla_bench's protocol.")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--shapes", help="names, separated by commas, as mla_bench has them")
    chosen.add_argument("--suite", choices=sorted(SUITES), help="of shapes; the default is main")
    parser.add_argument("--peers", help="keys of --list, separated by commas; the default is all")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--out", help="the JSON file to write")
    parser.add_argument("--list", action="store_true", help="show peers, whether each can run here, and default shapes")
    options = parser.parse_args(arguments)
    try:
        shapes = select_shapes(options.shapes, options.suite or "main", options.dtype)
        peers = select_peers(options.peers)
        if options.list:
            show_list(peers)
            return 0
        if not options.out:
            raise Refusal("--out FILE is missing")
        if not Path(options.out).resolve().parent.is_dir():
            raise Refusal(f"{options.out}: there is no such folder")
        if torch is None:
            raise Refusal("needs PyTorch, which this Python does not have: pip install torch")
        if not torch.cuda.is_available():
            raise Refusal("needs an NVIDIA GPU; PyTorch sees none")
        runner = GpuRunner()
        gpu = torch.cuda.get_device_name()
        progress("ceilings")
        report = new_report(gpu, peers, measure_ceilings(runner))
    except Refusal as refusal:
        progress("")
        print(f"peers.py: {refusal}", file=sys.stderr)
        return 2
    progress("")
    context = report["context"]
    print(f"{gpu}, driver {context['driver']}, CUDA {context['cuda']}, torch {context['torch']}, triton "
          f"{context['triton']}\n{context['ceilings']}")
    for name, reason in report["absent"].items():
        print(f"absent: {name}: {reason}")
    print(flush=True)
    here = [peer for peer in peers if peer.name not in report["absent"]]
    write_report(report, options.out)
    survived = measure_shapes(shapes, here, runner, report, options.out, Inputs, Truth)
    print(f"{options.out} written")
    if not survived:
        print("peers.py: the device was lost; the file has what was measured before", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
