#!/usr/bin/env python3
"""Times the implementations a user would otherwise pick, on mla_bench's inputs and by its protocol (docs/measuring.md).

    python3 bench/report/peers.py --list
    python3 bench/report/peers.py --out peers.json
    python3 bench/report/peers.py --shapes h128_q1_b64_k4096,h16_q1_b64_k4096 --peers eager,triton --out peers.json

Needs PyTorch, an NVIDIA GPU and a built mla_bench, which says what a shape's name spells, how often to run, and when a
result is right, and which makes the inputs. A peer whose package is not installed is named with the reason. The file is
of the schema of bench/results/peers_*.json; "spread" and "absent" come on top.

Exit code: 0 all right; 1 the device was lost, or a file or stdout could not be written; 2 nothing was run.
"""
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import program

try:
    import numpy
    import torch
except ImportError:  # --list and the schema need none
    torch = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = "flashmla_stages/peers/1"
PAGE = 64
D_QK, D_V = 576, 512
NOTES = (
    "PyTorch eager and SDPA gather the pages inside the operation, padded to the longest sequence, and read what is "
    "past a sequence's end before they mask it. What serves all layers of a model, a split plan or a mask, is made "
    "before, outside the time.")


class Refusal(Exception):
    """A message for the user: exit status 2."""


class Left(Exception):
    """Why a peer has no time on a shape."""


# --- What mla_bench knows ---------------------------------------------------------------------------------------------

class Shape:
    """What a shape's name spells: bench/measure/catalogue.cpp says what the fields mean."""

    def __init__(self, name, fields):
        if fields["split"]:
            raise Refusal(f"shape '{name}' asks for batch-invariant mode, which peers do not have")
        if fields["cache_format"] != "16bit":
            raise Refusal(f"shape '{name}' has a cache of {fields['cache_format']}, which peers are not given")
        self.name = name
        self.h_q, self.h_kv, self.s_q, self.b = (fields[key] for key in ("h_q", "h_kv", "s_q", "b"))
        self.causal, self.dtype, self.scale = fields["causal"], fields["dtype"], fields["softmax_scale"]
        self.lengths, self.tokens, self.longest = fields["seqlens_k"], fields["tokens"], fields["longest"]
        self.flop, self.bytes = fields["flop"], fields["bytes"]

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


class Bench:
    """The program mla_bench."""

    def __init__(self, program, machine="auto"):
        self.command = [str(program), "--machine", machine]
        self.protocol, self.tolerances = None, None

    def run(self, *arguments):
        try:
            done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        except OSError as error:
            raise Refusal(f"needs a built mla_bench: {error}; cmake --build build --target mla_bench, or --bench PATH")
        if done.returncode:
            raise Refusal(done.stderr.strip().removeprefix("mla_bench: ") or done.stdout.strip())
        return done.stdout

    def shapes(self, names=None, suite=None, dtype=None):
        """The shapes of a suite, or those that `names` spells or picks by expressions; protocol and tolerances, too."""
        chosen = ["--suite", suite or "main", *(["--dtype", dtype] if dtype else []), *(["--shapes", names] if names else [])]
        listed = json.loads(self.run("--list", "--json", *chosen))
        self.protocol, self.tolerances = listed["protocol"], listed["tolerances"]
        return [Shape(name, fields) for name, fields in listed["shapes"].items()]

    def run_counts(self, us):
        """How often to run what takes so long: warm-ups, rounds, runs per round."""
        return next(one for one in self.protocol["run_counts"] if one["below_us"] is None or us < one["below_us"])

    def describe_protocol(self):
        counts = "; ".join(
            (f"under {one['below_us'] / 1e3:g} ms" if one["below_us"] else "else") +
            f": {one['warmups']} warm-ups, {one['rounds']} x {one['runs']}" for one in self.protocol["run_counts"])
        return ("mla_bench's inputs (flat data of seed 0, pages of 64 tokens, randomly permuted); one operation captured"
                f" in a CUDA graph, between CUDA events; median of interleaved rounds of all peers ({counts}); cold: "
                f"{self.protocol['flush_bytes'] >> 20} MiB read through the L2 before each run, and a rest of "
                f"{self.protocol['rest_ms']} ms before each turn where a run takes over "
                f"{self.protocol['rest_above_us']:g} us; sustained: as many runs "
                f"back to back after {self.protocol['long_warmup_s']} s of the same work, none over "
                f"{self.protocol['once_us'] / 1e3:g} ms; outputs full of NaN checked against float64 before and after, "
                f"{self.protocol['checked_rows']} rows (sequence, query) with all heads")

    def context(self):
        """What mla_bench writes of the machine, and the ceilings that it measures."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "context.json"
            self.run("--shapes", "h16_q1_b1_k64", "--stages", "01", "--no-peers", "--out", str(path))
            return json.loads(path.read_text())["context"]

    def data(self, shape, device="cuda"):
        """Inputs and what they should give."""
        memory = "/dev/shm"  # quicker than a disk, where it is large enough
        roomy = os.path.isdir(memory) and shutil.disk_usage(memory).free > 2 * shape.bytes + (64 << 20)
        with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
            self.run("--save-inputs", folder, "--shapes", shape.name)
            files = {path.stem: torch.from_numpy(array.view(numpy.int16) if array.dtype == numpy.uint16 else array)
                     for path in Path(folder).iterdir() for array in [numpy.load(path, mmap_mode="c")]}
            inputs = Inputs(shape, files, device)
            return inputs, Truth(inputs, files["rows"], files["out"], self.tolerances["out"])


def describe_ceilings(context):
    """Rates of this run, in words."""
    texts = [text.format(*(context[key] for key in keys)) for text, keys in [
        ("read {} GB/s", ["ceiling_read_gbps"]),
        ("cuBLAS bf16 8192^3 {} TFLOP/s cold, {} sustained",
         ["ceiling_matrix_cold_tflops", "ceiling_matrix_sustained_tflops"]),
        ("empty kernel {} us", ["ceiling_launch_us"]), ("{}", ["ceiling_matrix_note"])] if context.keys() >= set(keys)]
    return "in this run: " + "; ".join(texts)


# --- Inputs -----------------------------------------------------------------------------------------------------------

class Inputs:
    """q, cache and tables of a shape on a device, from what mla_bench saved."""

    def __init__(self, shape, files, device):
        self.shape, self.device = shape, device
        self.dtype = torch.float16 if shape.dtype == "fp16" else torch.bfloat16
        self.q, self.kv = (files[name].view(self.dtype).to(device) for name in ("q", "cache"))
        table = files["block_table"]
        pages = torch.tensor(shape.pages)
        owned = torch.zeros(len(self.kv), PAGE, dtype=torch.bool)
        for i, length in enumerate(shape.lengths):
            own = table[i, :pages[i]].long()
            owned[own] = (torch.arange(len(own) * PAGE) < length).view(-1, PAGE)
        self.unused = (~owned).flatten().nonzero().flatten().to(device)
        spare = int((~owned.any(1)).nonzero()[0])
        used = torch.arange(table.shape[1]) < pages[:, None]
        self.table = table.to(device)
        self.safe_table = table.where(used, spare).to(device)  # unused slots name a page that no sequence owns
        self.page_ids = table[used].to(device)  # of all sequences, one after the other
        self.lengths = files["seqlens"].to(device)

    def fill_unused(self, value):
        """Rows past every sequence's end, and pages that no sequence owns."""
        self.kv.view(-1, self.kv.shape[2] * D_QK).index_fill_(0, self.unused, value)

    def new_out(self):
        shape = self.shape
        return torch.full((shape.b, shape.s_q, shape.h_q, D_V), float("nan"), dtype=self.dtype, device=self.device)

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
    """The float64 result in some (sequence, query) rows, all heads: rows [n, 2], expected [n, h_q, 512]."""

    def __init__(self, inputs, rows, expected, tolerance):
        self.shape, self.tolerance = inputs.shape, tolerance
        self.rows = [tuple(row) for row in rows.tolist()]
        self.index = tuple(rows.T.long().to(inputs.device))
        self.expected = expected.view(len(rows), -1, D_V).to(inputs.device)

    def compare(self, out):
        """reference/testing/compare.h on these rows. Written so that NaN fails."""
        shape, tolerance = self.shape, self.tolerance
        want = (shape.b, shape.s_q, shape.h_q, D_V)
        if tuple(out.shape) != want:
            return Verdict(False, None, f"output of shape {tuple(out.shape)}, expected {want}")
        actual = out[self.index].double()
        error = (actual - self.expected).abs()
        good = (error < tolerance["abs"]) | (error / (self.expected.abs() + 1e-6) < tolerance["rel"])
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
        elif not whole < tolerance["cos"]:
            why = f"wrong: cosine difference {whole:.3g} is not less than {tolerance['cos']:g}"
        elif not row < tolerance["row_cos"]:
            why = f"wrong: cosine difference {row:.3g} of a row is not less than {tolerance['row_cos']:g}"
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
        return shape.flop * shape.b * shape.padded / max(1, shape.tokens) / 4e12

    def sequence_bytes(self, shape):
        """Temporaries for one sequence: K (in float32 too), logits and weights."""
        return shape.padded * (shape.h_kv * D_QK * 12 + shape.h_q * shape.s_q * 10)

    def attend(self, q, k, mask, scale):
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
            out = self.attend(q[own].reshape(n, shape.h_kv, shape.rows, D_QK), k, None if mask is None else mask[own],
                              shape.scale)
            out = out.reshape(n, shape.h_kv, shape.s_q, shape.group, D_V).transpose(1, 2)
            out = out.reshape(n, shape.s_q, shape.h_q, D_V)
            return out if blind is None else out.masked_fill(blind[own], 0)

        def operation():
            parts = [part(first) for first in range(0, shape.b, step)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return operation


class Eager(Padded):
    name, key = "PyTorch eager with gather", "eager"

    def attend(self, q, k, mask, scale):
        n, h_kv, rows, _ = q.shape
        k = k.reshape(n * h_kv, -1, D_QK)
        logits = torch.bmm(q.reshape(n * h_kv, rows, D_QK), k.transpose(1, 2)).mul_(scale)
        if mask is not None:  # finite: a row that sees nothing must not be NaN
            logits.view(n, h_kv, rows, -1).masked_fill_(~mask, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, k[..., :D_V])


class Sdpa(Padded):
    """Heads that share a KV head are folded into the query dimension, so K and V need no copy for each."""
    name, key = "PyTorch SDPA with gather", "sdpa"

    def attend(self, q, k, mask, scale):
        v = k[..., :D_V]
        if mask is not None:
            mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
        if "backend" not in self.note:
            self.note = "; ".join(filter(None, ["backend " + self.backend(q, k, v, mask, scale), self.note]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    @staticmethod
    def backend(q, k, v, mask, scale):
        try:  # what scaled_dot_product_attention asks, too
            choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, scale=scale)
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


class Triton(Peer):
    """Split-KV decode of a paged cache, tuned a little: for a shape, the fastest of a few block sizes and splits."""
    name, key, package, module = "Triton of bench/report/peers.py", "triton", "triton", "triton"
    # Rows per tile, tokens per step, warps, stages; by the number of rows. A stage goes to the page's number, which the
    # load of the page waits for.
    MANY = [(64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 5)]
    SOME = [(32, 64, 8, 2), (32, 32, 8, 5)]
    FEW = [(16, 64, 4, 2), (16, 32, 4, 5), (16, 64, 8, 2), (16, 32, 8, 5)]

    def chunks(self, shape, tile):
        """Tokens per split, for one, two and four blocks per multiprocessor."""
        on_gpu = torch.cuda.is_available()
        processors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 4
        work = shape.tokens * shape.h_kv * -(-shape.rows // tile)
        found = []
        for waves in (1, 2, 4):
            chunk = max(1, -(-work // (processors * waves)))
            splits = max(1, round(shape.longest / chunk))
            found.append(PAGE * max(1, -(-shape.longest // (splits * PAGE))))
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
                             shape.scale * math.log2(math.e), *sizes, inputs.table.shape[1], chunk, H_KV=shape.h_kv,
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
                    self.note = "{} rows x {} tokens, {} warps, {} stages; ".format(*config) + f"{chunk} tokens per split"
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
                                              softmax_scale=shape.scale, causal=shape.causal)[0]


class FlashInfer(Peer):
    name, key, package, module = "FlashInfer", "flashinfer", "flashinfer-python", "flashinfer"

    def refuses(self, shape):
        return "one KV head only" if shape.h_kv > 1 else None

    def prepare(self, inputs):
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
        shape = inputs.shape
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=inputs.device))
        wrapper.plan(torch.arange(shape.b + 1, dtype=torch.int32, device=inputs.device) * shape.s_q,
                     torch.tensor([0] + shape.pages).cumsum(0).to(inputs.device, torch.int32),
                     inputs.page_ids, inputs.lengths, shape.h_q, D_V, D_QK - D_V, PAGE,
                     shape.causal, shape.scale, inputs.dtype, inputs.dtype)
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
                cache_seqlens=inputs.lengths, page_table=inputs.safe_table, softmax_scale=shape.scale,
                causal=shape.causal, **extra)
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
            raise Refusal(f"peer '{word}' is not one of {', '.join(peer.key for peer in peers)}")
    return [peer for peer in peers if {peer.key, peer.name.lower()} & set(wanted)]


# --- Timing -----------------------------------------------------------------------------------------------------------

def tenths(samples):
    """The value below which 10, 50 and 90 % of the samples lie, linear between neighbours."""
    every = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return every[0], every[4], every[8]


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

    def __init__(self, protocol):
        self.other_data = torch.empty(protocol["flush_bytes"] // 4, device="cuda").uniform_(1, 2)
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
            handle.note = f"not in a CUDA graph ({explain(error)}), so gaps of the host are in the times"
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
            low, _, high = tenths(samples)
            return [round(low, 2), round(high, 2), len(samples)]

        note = "; ".join(([self.reason] if self.reason else []) + self.notes)
        return {"cold": spread(self.cold), "sustained": spread(self.sustained), "checked": self.rel_l2, "note": note}

    def times(self):
        return [round(tenths(samples)[1], 2) if samples else None for samples in (self.cold, self.sustained)]


class Measurement:
    """All peers on one shape: each checked, then timed in rounds. `lost` says that the device is gone."""

    def __init__(self, bench, inputs, peers, runner, truth, say=lambda text: None):
        self.bench, self.inputs, self.runner, self.truth, self.say = bench, inputs, runner, truth, say
        self.results = [Result(peer) for peer in peers]
        self.lost = False

    def run(self):
        for result in self.results:
            self.attempt(result, "check", lambda: self.check(result))
        self.fill_unused(0.0)  # for all alike while they are timed
        counts = [self.bench.run_counts(result.expected_us or 0) for result in self.results]
        for result, due in zip(self.results, counts):
            self.attempt(result, "warm-up", lambda: self.runner.run_cold(result.handle, due["warmups"]))
        for turn in range(max((due["rounds"] for due in counts), default=0)):
            for result, due in zip(self.results, counts):
                if turn < due["rounds"]:
                    self.attempt(result, "cold", lambda: self.time_cold(result, due["runs"]))
        for result, due in zip(self.results, counts):
            self.attempt(result, "sustained", lambda: self.sustain(result, due["rounds"] * due["runs"]))
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
        seconds, protocol = peer.predicted_seconds(shape), self.bench.protocol
        if seconds * 1e6 > protocol["leave_out_us"]:
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
        if result.expected_us > protocol["leave_out_us"]:
            raise Left(f"left out: a run takes {result.expected_us * 1e-6:.1f} s")
        if result.expected_us > protocol["once_us"]:
            result.notes.append(f"over {protocol['once_us'] / 1e3:g} ms: cold only")

    def time_cold(self, result, runs):
        """Cold runs, after a rest if they are such as heat a device."""
        protocol = self.bench.protocol
        if result.expected_us > protocol["rest_above_us"]:
            time.sleep(protocol["rest_ms"] / 1e3)
        result.cold.extend(self.runner.run_cold(result.handle, runs))

    def sustain(self, result, runs):
        protocol = self.bench.protocol
        if result.expected_us <= protocol["once_us"]:
            result.sustained.extend(
                self.runner.run_sustained(result.handle, result.expected_us, protocol["long_warmup_s"], runs))

    def check_again(self, result):
        verdict = self.truth.compare(self.runner.run_poisoned(result.handle))
        if not verdict.ok:
            raise Left("after timing: " + verdict.why)


def tidy():
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Output -----------------------------------------------------------------------------------------------------------

def new_report(bench, machine, peers):
    """`machine` is the context that mla_bench writes."""
    absent = {peer.name: peer.available() for peer in peers if peer.available()}
    context = {
        "schema": SCHEMA,
        "gpu": machine["gpu"],
        "driver": machine.get("driver", "unknown"),
        "cuda": (torch.version.cuda if torch else None) or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "values": "median us, [cold, sustained]; null: not measured",
        "protocol": bench.describe_protocol(),
        "notes": NOTES,
        "ceilings": describe_ceilings(machine),
        "torch": torch.__version__ if torch else "none",
        "triton": triton.__version__ if triton else "none",
        "commit": machine.get("commit", "unknown"),
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
    program.write_text(path, text + "\n")


def table(shape, results):
    """Lines for the terminal."""
    lines = [shape.name, f"  {'peer':20} {'cold us (p10-p90)':>27} {'sustained us (p10-p90)':>27} {'TFLOP/s':>8} "
                         f"{'rel. L2':>8}  note"]

    def cell(samples):
        if not samples:
            return "-"
        low, median, high = (f"{us:.1f}" for us in tenths(samples))
        return f"{median} ({low}-{high})"

    for result in results:
        entry = result.entry()
        rate = f"{shape.flop / tenths(result.cold)[1] * 1e-6:.1f}" if result.cold else "-"
        checked = "-" if entry["checked"] is None else f"{entry['checked']:.1e}"
        lines.append(f"  {result.peer.name:20} {cell(result.cold):>27} {cell(result.sustained):>27} {rate:>8} "
                     f"{checked:>8}  {entry['note']}")
    return "\n".join(lines)


def show_list(peers, shapes):
    print("peers:")
    for peer in peers:
        reason = peer.available()
        state = reason if reason else f"available, {peer.package} {peer.version()}"
        print(f"  {peer.key:12} {peer.name:20} {state}")
    print("shapes:")
    for shape in shapes:
        print(f"  {shape.name}")


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)


def measure_shapes(bench, shapes, peers, runner, report, path):
    """Writes after every shape, so that what ends the run loses no figure. True if the device survived."""
    for shape in shapes:
        progress(f"{shape.name}: making data")
        try:
            inputs, truth = bench.data(shape)
        except Exception as error:
            results, lost = [Result(peer) for peer in peers], not runner.survives()
            for result in results:
                result.reason = f"no data: {explain(error)}"
        else:
            measurement = Measurement(bench, inputs, peers, runner, truth,
                                      lambda text: progress(f"{shape.name}: {text}"))
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
    parser = program.Parser(description="Times other implementations of MLA decoding by mla_bench's protocol.",
                                     epilog=__doc__.strip().splitlines()[-1])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--shapes", help="shapes, named as in mla_bench, separated by commas")
    chosen.add_argument("--suite", help="a suite of mla_bench's shapes; the default is main")
    parser.add_argument("--peers", help="keys that --list shows, separated by commas; the default is all")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], help="the type for shapes whose names do not end with _fp16; the default is bf16")
    parser.add_argument("--out", help="the JSON file to write")
    parser.add_argument("--list", action="store_true", help="show peers, whether each can run here, and shapes")
    parser.add_argument("--bench", default=os.environ.get("MLA_BENCH", ROOT / "build" / "bench" / "mla_bench"),
                        help="the program mla_bench; the default is build/bench/mla_bench")
    options = parser.parse_args(arguments)
    bench = Bench(options.bench)
    try:
        shapes = bench.shapes(options.shapes, options.suite, options.dtype)
        peers = select_peers(options.peers)
        if options.list and options.out:
            raise Refusal("--out has no effect: --list measures nothing")
        if options.list:
            show_list(peers, shapes)
            return 0
        if not options.out:
            raise Refusal("--out FILE is missing")
        try:
            program.check_writable(options.out)
        except program.CannotWrite as error:
            raise Refusal(str(error)) from None
        if torch is None:
            raise Refusal("needs PyTorch, which this Python does not have: pip install torch")
        if not torch.cuda.is_available():
            raise Refusal("needs an NVIDIA GPU; PyTorch sees none")
        progress("ceilings")
        report = new_report(bench, bench.context(), peers)
        runner = GpuRunner(bench.protocol)
    except Refusal as refusal:
        progress("")
        print(f"peers.py: {refusal}", file=sys.stderr)
        return 2
    progress("")
    context = report["context"]
    print(f"{context['gpu']}, driver {context['driver']}, CUDA {context['cuda']}, torch {context['torch']}, triton "
          f"{context['triton']}\n{context['ceilings']}")
    for name, reason in report["absent"].items():
        print(f"absent: {name}: {reason}")
    print(flush=True)
    here = [peer for peer in peers if peer.name not in report["absent"]]
    write_report(report, options.out)
    survived = measure_shapes(bench, shapes, here, runner, report, options.out)
    print(f"{options.out} written")
    if not survived:
        print("peers.py: the device was lost; the file has what was measured before", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(program.run("peers.py", main))
