#!/usr/bin/env python3
"""Counters of the stages on the model and on a GPU, recorded and compared. docs/counters.md says what they mean.

  bench/report/counters.py --model                count on the model: bench/results/counters_model.json
  bench/report/counters.py --gpu                  the same on this machine's GPU, by ncu: bench/results/counters_gpu.json
  bench/report/counters.py --compare              what is recorded, side by side

After either of the first two, bench/report/report.py --update writes the tables of the pages.
A GPU's counters may be read by root alone (or see NVIDIA's ERR_NVGPUCTRPERM). Clocks stay as they are.

Exit code: 0 all right; 1 a program failed, or a file could not be written; 2 bad input.
"""
import argparse
import csv
import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import program
from recordings import COUNTERS_SCHEMA, Error

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["01", "02", "03", "04", "05"]
# Small enough for the model to take seconds; the first is what the chapters show, the second has tiles that are not full.
SHAPES = ["h128_q1_b1_k256", "h16_q1_b2_k300"]
DECODES = 6  # that mla_run makes on a GPU: one to check, five for the time


def pair(title, part, kinds, figure, *metrics):
    """A figure of the model's JSON, the sum over kinds, and ncu's metrics that say the same, the best known first."""
    return {"title": title, "part": part, "kinds": kinds.split(), "figure": figure, "metrics": metrics}


SASS = "smsp__sass_l1tex_data_"
PAIRS = [
    # ncu's op_ld has the copies, too.
    pair("global load requests", "global", "loads async_copies", "requests", "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum"),
    pair("global load sectors", "global", "loads async_copies", "sectors", "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"),
    pair("global store requests", "global", "stores", "requests", "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum"),
    pair("global store sectors", "global", "stores", "sectors", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum"),
    pair("cp.async requests", "global", "async_copies", "requests",
         "sm__sass_l1tex_t_requests_pipe_lsu_mem_global_op_ldgsts_cache_bypass.sum"),
    pair("cp.async sectors", "global", "async_copies", "sectors",
         "sm__sass_l1tex_t_sectors_pipe_lsu_mem_global_op_ldgsts_cache_bypass.sum"),
    pair("cp.async wavefronts", "shared", "async_copies", "wavefronts",
         "sm__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts_cache_bypass.sum"),
    pair("shared load requests", "shared", "loads", "requests", "smsp__sass_inst_executed_op_shared_ld.sum"),
    pair("shared load wavefronts", "shared", "loads", "wavefronts", SASS + "pipe_lsu_wavefronts_mem_shared_op_ld.sum",
         "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum"),
    pair("shared load conflicts", "shared", "loads", "conflicts",
         SASS + "bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
         "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum"),
    pair("shared store requests", "shared", "stores", "requests", "smsp__sass_inst_executed_op_shared_st.sum"),
    pair("shared store wavefronts", "shared", "stores", "wavefronts",
         SASS + "pipe_lsu_wavefronts_mem_shared_op_st.sum", "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum"),
    pair("shared store conflicts", "shared", "stores", "conflicts",
         SASS + "bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
         "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum"),
    pair("ldmatrix requests", "shared", "matrix_loads", "requests", "smsp__inst_executed_op_ldsm.sum"),
    pair("ldmatrix wavefronts", "shared", "matrix_loads", "wavefronts",
         SASS + "pipe_lsu_wavefronts_mem_shared_op_ldsm.sum"),
    pair("ldmatrix conflicts", "shared", "matrix_loads", "conflicts",
         SASS + "bank_conflicts_pipe_lsu_mem_shared_op_ldsm.sum"),
]
# Shown beside, without a figure of the model that must be the same.
OTHER_METRICS = ["lts__t_sectors_srcunit_tex_op_read.sum", "lts__t_sectors_srcunit_tex_op_write.sum",
                 "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum",
                 "smsp__inst_executed_op_ldgsts.sum", "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum",
                 "smsp__inst_executed.sum"]
LAUNCH_METRICS = ["launch__registers_per_thread", "launch__occupancy_limit_registers",
                  "launch__occupancy_limit_shared_mem", "launch__occupancy_limit_warps",
                  "launch__occupancy_limit_blocks"]


def run(command, **options):
    try:
        return subprocess.run(command, capture_output=True, text=True, **options)
    except OSError as error:
        raise Error(f"{command[0]}: {error.strerror}") from None


def first_line(command):
    """Of what a program prints, for the record; empty if there is none."""
    try:
        lines = run(command).stdout.strip().splitlines()
    except Error:
        return ""
    return lines[-1] if command[-1] == "--version" and lines else lines[0] if lines else ""


def commit():
    known = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "unknown"
    changed = run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return known + ("-dirty" if changed else "")


# ---- ncu ----

def kernel_name(function):
    """'scores' of 'void mla::gpu::naive::scores<__nv_bfloat16, 0>(mla::Problem, int)'"""
    name, depth, i = "", 0, 0
    while i < len(function):
        if function[i] == "<":
            depth += 1
        if depth == 0 and function[i] == "(" and not function.startswith("(anonymous ", i):
            break
        if depth == 0:
            name += function[i]
        if function[i] == ">":
            depth -= 1
        i += 1
    return re.split("[: ]", name.strip())[-1]


def parse_ncu(text):
    """The rows of `ncu --csv --page raw`: [(kernel, {metric: number})]. The first lines are ncu's own remarks, the
    first row below the header has the units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise Error("ncu wrote no table:\n" + "\n".join(lines[-10:]))
    rows = list(csv.DictReader(lines[begin:]))
    found = []
    for row in rows:
        if not row["ID"]:  # the units
            continue
        figures = {}
        for metric, value in row.items():
            try:
                figures[metric] = float(value.replace(",", ""))
            except (AttributeError, ValueError):
                continue
        found.append((kernel_name(row["Kernel Name"]), figures))
    return found


def sum_of_decodes(rows, names, decodes):
    """{kernel: {metric: of one decode}} of the kernels with these names; what a launch has per thread stays."""
    kernels = {}
    for name, figures in rows:
        if name not in names:
            continue
        kernel = kernels.setdefault(name, {"launches": 0, "metrics": {}})
        kernel["launches"] += 1
        for metric, value in figures.items():
            if metric.startswith("launch__registers"):
                kernel["registers"] = int(max(kernel.get("registers", 0), value))
            elif metric.startswith("launch__occupancy"):
                kernel["metrics"][metric] = value
            elif metric.endswith(".sum"):
                kernel["metrics"][metric] = kernel["metrics"].get(metric, 0) + value
    for name, kernel in kernels.items():
        if kernel["launches"] % decodes != 0:
            raise Error(f"{name} was launched {kernel['launches']} times, in {decodes} decodes")
        kernel["launches"] //= decodes
        for metric in kernel["metrics"]:
            if metric.endswith(".sum"):
                kernel["metrics"][metric] /= decodes
    return kernels


def ncu(options, stage, shape, metrics):
    """The rows of one stage; metrics that this ncu does not have are taken out of the list."""
    while True:
        with tempfile.NamedTemporaryFile("r", suffix=".csv") as log:
            result = run([options.ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
                          "--metrics", ",".join(metrics), "--log-file", log.name, "-f", str(options.program),
                          "decode", "--stage", stage, "--machine", "gpu", "--shape", shape])
            text = log.read()
        said = result.stdout + result.stderr + text
        missing = [metric for metric in re.findall(r"Failed to find metric (?:regex:)?([\w.]+)", said)
                   if metric in metrics]
        if missing:
            for metric in missing:
                print(f"{options.ncu} has no {metric}", file=sys.stderr)
                metrics.remove(metric)
            continue
        if result.returncode != 0:
            raise Error(f"{options.ncu} failed on stage {stage}:\n{said[-3000:]}")
        return parse_ncu(text)


# ---- recordings ----

def profile(options, stage, shape):
    """What the model counts."""
    result = run([str(options.program), "profile", "--stage", stage, "--shape", shape, "--json"])
    if result.returncode != 0:
        raise Error(f"{options.program} profile failed: {result.stderr.strip()}")
    data = json.loads(result.stdout)
    for kernel in data["kernels"]:
        del kernel["lines"]  # what a kernel does in all is enough to record
    return data


def record_model(options):
    runs = [{"stage": data["stage"], "shape": shape, "kernels": data["kernels"]}
            for shape in options.shapes for stage in options.stages for data in [profile(options, stage, shape)]]
    return {"context": {"schema": COUNTERS_SCHEMA, "machine": "model", "commit": commit(), "date": now()}, "runs": runs}


def record_gpu(options):
    metrics = [metric for one in PAIRS for metric in one["metrics"]] + OTHER_METRICS + LAUNCH_METRICS
    runs = []
    for shape in options.shapes:
        for stage in options.stages:
            data = profile(options, stage, shape)
            rows = ncu(options, stage, shape, metrics)
            names = [kernel["name"] for kernel in data["kernels"]]
            runs.append({"stage": data["stage"], "shape": shape, "kernels": sum_of_decodes(rows, names, DECODES)})
            print(f"{data['stage']} {shape}: {', '.join(runs[-1]['kernels'])}")
    query = ["nvidia-smi", "--format=csv,noheader", "-i", "0"]
    context = {"schema": COUNTERS_SCHEMA, "machine": "gpu", "gpu": first_line([*query, "--query-gpu=name"]),
               "driver": first_line([*query, "--query-gpu=driver_version"]),
               "ncu": first_line([options.ncu, "--version"]), "nvcc": first_line(["nvcc", "--version"]),
               "commit": commit(), "date": now()}
    return {"context": context, "runs": runs}


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def load(path):
    """A recording, or None."""
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Error(f"{path}: {error}") from None
    schema = data.get("context", {}).get("schema")
    if schema != COUNTERS_SCHEMA:
        raise Error(f"{path}: the schema is {schema}, not {COUNTERS_SCHEMA}")
    return data


def load_both(root):
    folder = root / "bench" / "results"
    return load(folder / "counters_model.json"), load(folder / "counters_gpu.json")


# ---- comparison ----

def compare(model, gpu):
    """[(stage, shape, kernel, title, the model's, ncu's, metric)] of all that both have, where either is not 0."""
    measured = {(run["stage"], run["shape"]): run["kernels"] for run in gpu["runs"]}
    rows = []
    for run_ in model["runs"]:
        kernels = measured.get((run_["stage"], run_["shape"]), {})
        for kernel in run_["kernels"]:
            if kernel["name"] not in kernels:
                continue
            metrics = kernels[kernel["name"]]["metrics"]
            for one in PAIRS:
                metric = next((name for name in one["metrics"] if name in metrics), None)
                if metric is None:
                    continue
                kinds = kernel.get(one["part"], {})
                figure = sum(kinds.get(kind, {}).get(one["figure"], 0) for kind in one["kinds"])
                if figure or metrics[metric]:
                    rows.append((run_["stage"], run_["shape"], kernel["name"], one["title"], figure, metrics[metric],
                                 metric))
    return rows


def difference(model, gpu):
    """'+1.3%': the model's against the GPU's."""
    if model == gpu:
        return "0%"
    return f"{100 * (model / gpu - 1):+.1f}%" if gpu else "—"


def within(model, gpu, limit=0.02):
    return abs(model - gpu) <= limit * gpu


def comparison_table(model, gpu):
    """A header and rows: every pair, with the difference."""
    rows = [[stage, kernel, title, f"{of_model:.0f}", f"{of_gpu:.0f}", difference(of_model, of_gpu)]
            for stage, _, kernel, title, of_model, of_gpu, _ in compare(model, gpu)]
    return ["stage", "kernel", "counter", "model", "ncu", "difference"], rows


def stage_table(model, stage):
    """A header and a row per kernel of a stage, on the first shape."""
    runs = [run for run in model["runs"] if run["stage"] == stage and run["shape"] == SHAPES[0]]
    def cell(kernel, part, kinds, upper, lower=None):
        found = [kernel.get(part, {}).get(kind, {}) for kind in kinds]
        above = sum(one.get(upper, 0) for one in found)
        below = sum(one.get(lower, 0) for one in found)
        if lower is None:
            return f"{above}" if any(found) else "—"
        return f"{above / below:.4g}" if below else "—"
    loads, shared = ["loads", "async_copies", "bulk_loads"], ["loads", "matrix_loads"]
    rows = [[kernel["name"],
             cell(kernel, "global", loads, "requests"), cell(kernel, "global", loads, "sectors", "requests"),
             cell(kernel, "global", ["stores", "bulk_stores"], "sectors", "requests"),
             cell(kernel, "shared", shared, "requests"), cell(kernel, "shared", shared, "wavefronts", "requests"),
             cell(kernel, "shared", [*shared, "stores", "matrix_stores", "async_copies"], "conflicts"),
             f"{kernel['flop'] / 1e6:.4g}" if kernel["flop"] else "—"]
            for run in runs for kernel in run["kernels"]]
    return ["kernel", "global loads", "sectors per load", "sectors per store", "shared loads",
            "wavefronts per load", "bank conflicts", "tensor MFLOP"], rows


def main(arguments=None):
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("model", "gpu", "compare"):
        what.add_argument("--" + name, action="store_true")
    def names(text):
        return text.split(",")
    parser.add_argument("--stages", type=names, default=STAGES, help=f"default {','.join(STAGES)}")
    parser.add_argument("--shapes", type=names, default=SHAPES, help=f"default {','.join(SHAPES)}")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "bench" / "mla_run",
                        help="mla_run; for --gpu of a build for GPUs")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's program")
    parser.add_argument("--out", type=Path, help="where the recording goes")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            model, gpu = load_both(options.root)
            if model is None or gpu is None:
                raise Error("nothing to compare: --model and --gpu record it")
            for stage, shape, kernel, title, of_model, of_gpu, metric in compare(model, gpu):
                print(f"{stage:20} {shape:18} {kernel:12} {title:24} {of_model:12.0f} {of_gpu:12.0f} "
                      f"{difference(of_model, of_gpu):>8}  {metric}")
            return 0
        name = "counters_model.json" if options.model else "counters_gpu.json"
        path = options.out or options.root / "bench" / "results" / name
        program.check_writable(path)
        data = record_model(options) if options.model else record_gpu(options)
        program.write_text(path, json.dumps(data, indent=1) + "\n")
        print(f"wrote {path}")
        return 0
    except Error as error:
        print(f"counters.py: {error}", file=sys.stderr)
        return 2 if options.compare else 1


if __name__ == "__main__":
    sys.exit(program.run("counters.py", main))
