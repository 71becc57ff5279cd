#!/usr/bin/env python3
"""Times what calls of the Python package cost the host, beside FlashMLA's own where that is installed.

    python3 bench/report/host_time.py --out bench/results/python_h200_2026-11-30.json

Needs an NVIDIA GPU, PyTorch and the installed package (docs/python.md); CuPy and FlashMLA are timed where they are. The
kernels' time is another matter: bench/run.sh measures it.

Exit code: 0 all right; 1 the file or stdout could not be written; 2 nothing was run.
"""
import datetime
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import program
from recordings import PYTHON_SCHEMA, parse_shape

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ["h16_q1_b4_k256", "h128_q1_b1_k4096", "h128_q1_b128_k4096"]
SCALE = 0.135234
CALLS, ROUNDS, WARM_UPS = 50, 30, 3
PROTOCOL = (f"wall time of {CALLS} calls that enqueue their work one after another and do not wait for it, divided by their "
            f"number; {ROUNDS} rounds of all calls in turn, behind {WARM_UPS} that do not count; the GPU is idle when each "
            "turn begins; bf16 (CuPy: fp16), equal lengths, pages of 64 tokens, one KV head")


class Refusal(Exception):
    """A message for the user: exit status 2."""


def interleaved(calls, wait, now=time.perf_counter):
    """{name: [median, least]} of {name: function}, in µs per call."""
    times = {name: [] for name in calls}
    for number in range(WARM_UPS + ROUNDS):
        for name, call in calls.items():
            wait()
            begin = now()
            for _ in range(CALLS):
                call()
            end = now()
            if number >= WARM_UPS:
                times[name].append((end - begin) / CALLS * 1e6)
    wait()
    return {name: [round(statistics.median(found), 2), round(min(found), 2)] for name, found in times.items()}


def of_the_package(mla_stages, arrays, prefix=""):
    plan = mla_stages.plan(*arrays)
    out, lse = mla_stages.decode(*arrays, scale=SCALE, plan=plan)
    calls = {"plan": lambda: mla_stages.plan(*arrays),
             "plan.update": lambda: plan.update(*arrays),
             "decode": lambda: mla_stages.decode(*arrays, scale=SCALE),
             "decode, planned": lambda: mla_stages.decode(*arrays, scale=SCALE, plan=plan),
             "decode, planned, out and lse given":
                 lambda: mla_stages.decode(*arrays, scale=SCALE, plan=plan, out=out, lse=lse)}
    return {prefix + name: call for name, call in calls.items()}


def of_flashmla(flash_mla, arrays, name):
    metadata, _ = flash_mla.get_mla_metadata()

    def call(one):
        return flash_mla.flash_mla_with_kvcache(*arrays, 512, one, softmax_scale=SCALE)

    call(metadata)
    return {f"{name}, planned": lambda: call(metadata), f"{name}, new metadata": lambda: call(flash_mla.get_mla_metadata()[0])}


def found(name, absent, title):
    """A module, or None with the reason in `absent`."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # what a package with other libraries than here raises
        absent[title] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def calls_of(shape, torch, mla_stages, ours, theirs, cupy):
    size = parse_shape(shape)
    pages = -(-int(size.tokens) // 64)
    q = torch.randn(size.batch, 1, size.heads, 576, device="cuda", dtype=torch.bfloat16)
    kv_cache = torch.randn(size.batch * pages, 64, 1, 576, device="cuda", dtype=torch.bfloat16)
    block_table = torch.arange(size.batch * pages, dtype=torch.int32, device="cuda").view(size.batch, pages)
    seqlens_k = torch.full((size.batch,), int(size.tokens), dtype=torch.int32, device="cuda")
    arrays = q, kv_cache, block_table, seqlens_k
    calls = of_the_package(mla_stages, arrays)
    calls.update(of_flashmla(ours, arrays, "flash_mla"))
    if theirs:
        calls.update(of_flashmla(theirs, arrays, "FlashMLA's own"))
    calls["torch.empty"] = lambda: torch.empty((size.batch, 1, size.heads, 512), dtype=torch.bfloat16, device="cuda")
    if cupy:
        calls.update(of_the_package(mla_stages, [cupy.asarray(one.half() if one.dtype == torch.bfloat16 else one)
                                                 for one in arrays], "CuPy: "))
    return calls


def import_ms():
    """{what: ms} in new processes, the median of three: the package alone, and behind PyTorch, whose import takes seconds."""
    now = "time.perf_counter() * 1e3"

    def run(code):
        return subprocess.run([sys.executable, "-c", f"import time\n{code}"], check=True, capture_output=True, text=True).stdout

    alone = f"begin = {now}\nimport mla_stages\nprint({now} - begin)"
    behind = f"import torch\n{alone}\ntorch.zeros(1).cuda()\nbegin = {now}\nmla_stages.stages('cuda')\nprint({now} - begin)"
    found = [[float(line) for line in (run(alone) + run(behind)).split()] for _ in range(3)]
    names = ["import mla_stages", "import mla_stages, behind torch", "first call, behind torch"]
    return {name: round(statistics.median(times), 1) for name, times in zip(names, zip(*found))}


def output_of(*command):
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def cpu():
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return names[0] if names else "unknown"


def main(arguments=None):
    parser = program.Parser(description="Times what calls of the Python package cost the host.",
                            epilog=__doc__.strip().splitlines()[-1])
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--commit", help="the commit that the package was built from; by default that of this folder")
    options = parser.parse_args(arguments)
    absent = {}
    try:
        torch, mla_stages = found("torch", absent, "PyTorch"), found("mla_stages", absent, "mla_stages")
        ours = found("mla_stages.flash_mla", absent, "mla_stages")
        if absent:
            raise Refusal("; ".join(f"needs {name}: {why}" for name, why in absent.items()))
        if not torch.cuda.is_available():
            raise Refusal("needs an NVIDIA GPU; PyTorch sees none")
    except Refusal as refusal:
        print(f"host_time.py: {refusal}", file=sys.stderr)
        return 2
    program.check_writable(options.out)
    cupy, theirs = found("cupy", absent, "CuPy"), found("flash_mla", absent, "FlashMLA")
    context = {"schema": PYTHON_SCHEMA, "gpu": torch.cuda.get_device_name(),
               "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "cpu": cpu(),
               "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda,
               "tvm_ffi": importlib.import_module("tvm_ffi").__version__, "cupy": cupy and cupy.__version__,
               "mla_stages": mla_stages.__version__, "commit": options.commit or output_of("git", "rev-parse", "--short", "HEAD"),
               "date_utc": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
               "values": "us per call, [median, least]", "protocol": PROTOCOL}
    shapes = {}
    for shape in SHAPES:
        shapes[shape] = interleaved(calls_of(shape, torch, mla_stages, ours, theirs, cupy), torch.cuda.synchronize)
        print(shape, *(f"  {name:40} {median:8.2f} {least:8.2f}" for name, (median, least) in shapes[shape].items()), sep="\n",
              flush=True)
    data = {"context": context, "absent": absent, "import_ms": import_ms(), "shapes": shapes}
    program.write_text(options.out, json.dumps(data, indent=1) + "\n")
    print(f"{data['import_ms']}\n{options.out} written")
    return 0


if __name__ == "__main__":
    sys.exit(program.run("host_time.py", main))
