#!/usr/bin/env python3
"""Counters of the stages on the model and on a GPU, recorded and compared. docs/counters.md says what they mean.

  bench/report/counters.py --model                count on the model: bench/results/counters_model.json
  bench/report/counters.py --gpu                  the same on this machine's GPU, by ncu: bench/results/counters_gpu.json
  bench/report/counters.py --hardware             hit rates, pipes and instructions of every stage, by ncu:
                                                  bench/results/counters_hardware.json
  bench/report/counters.py --stalls               where the warps of `decode` wait, and for what, by ncu:
                                                  bench/results/counters_stalls.json
  bench/report/counters.py --compare              what is recorded of the first two, side by side

After any of the first four, bench/report/report.py --update writes the tables of the pages.
A GPU's counters may be read by root alone (or see NVIDIA's ERR_NVGPUCTRPERM). Clocks stay as they are.

Exit code: 0 all right; 1 a program failed, or a file could not be written; 2 bad input.
"""
import argparse
import datetime
import glob
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import program
import stalls
from ncu import parse_launches
from recordings import COUNTERS_SCHEMA, Error, STALLS_SCHEMA

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
# What a whole GPU does during a kernel, as a share of what it could: names of ncu for compute capability 9.0.
TIME = "gpu__time_duration.sum"
PER_SECOND, OF_PEAK = ".sum.per_second", ".avg.pct_of_peak_sustained_elapsed"
SHARES = [("occupancy", "sm__warps_active.avg.pct_of_peak_sustained_active"),
          ("L1 hits", "l1tex__t_sector_hit_rate.pct"), ("L2 hits", "lts__t_sector_hit_rate.pct"),
          ("DRAM", "dram__throughput" + OF_PEAK), ("L2", "lts__throughput" + OF_PEAK),
          ("shared memory", "l1tex__data_pipe_lsu_wavefronts_mem_shared" + OF_PEAK),
          ("tensor pipe", "sm__pipe_tensor_cycles_active" + OF_PEAK), ("FMA pipe", "sm__pipe_fma_cycles_active" + OF_PEAK),
          ("LSU pipe", "sm__inst_executed_pipe_lsu" + OF_PEAK)]
RATES = [("DRAM", "dram__bytes" + PER_SECOND), ("L2", "lts__t_bytes" + PER_SECOND)]
CONFLICTS = ["l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"]
INSTRUCTIONS = "smsp__inst_executed.sum"
PIPES = ["alu", "fma", "lsu", "tensor", "xu", "uniform", "cbu", "adu", "tma"]


def pipe(name):
    """ncu's metric of the warp instructions that a pipe executed."""
    return f"sm__inst_executed_pipe_{name}.sum"


MEANS = [metric for _, metric in SHARES + RATES]
HARDWARE_METRICS = [TIME, *MEANS, *CONFLICTS, INSTRUCTIONS, *map(pipe, PIPES)]
HARDWARE_SHAPE = "h128_q1_b64_k4096"
STALL_SHAPES = [HARDWARE_SHAPE, "h128_q1_b1_k4096"]  # a device that is full, and one sequence, which waits
QUANTISED = "_fp8_tile128"  # of a stage that reads no other cache
# Of the stages, and not of what makes the data or checks results.
KERNELS = ["scores", "softmax", "values", "decode", "combine_few", "combine_many", "make_plan"]
LAUNCH_METRICS = ["launch__registers_per_thread", "launch__occupancy_limit_registers",
                  "launch__occupancy_limit_shared_mem", "launch__occupancy_limit_warps",
                  "launch__occupancy_limit_blocks"]


def stages_with_kernels(root):
    return [path.parent.name for path in sorted((root / "stages").glob("[0-9][0-9]_*/kernel.cuh"))]


def stages_with_decode(root):
    """Those of which one kernel does nearly all."""
    return [stage for stage in stages_with_kernels(root)
            if re.search(r"\bdecode\(", (root / "stages" / stage / "kernel.cuh").read_text(encoding="utf-8"))]


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


def commit(options):
    """Of the program, which may be another than that of the folder."""
    known = re.fullmatch(r"mla_run, commit (\S+)", first_line([str(options.program), "--version"]))
    if known is None:
        raise Error(f"{options.program} --version does not say its commit")
    return known[1]


# ---- ncu ----

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
            elif metric in MEANS:  # over the time, so that a rate is all that moved in all of it
                kernel["metrics"][metric] = kernel["metrics"].get(metric, 0) + value * figures[TIME]
    for name, kernel in kernels.items():
        if kernel["launches"] % decodes != 0:
            raise Error(f"{name} was launched {kernel['launches']} times, in {decodes} decodes")
        kernel["launches"] //= decodes
        for metric in kernel["metrics"]:
            if metric in MEANS:
                kernel["metrics"][metric] /= kernel["metrics"][TIME]
        for metric in kernel["metrics"]:
            if metric.endswith(".sum"):
                kernel["metrics"][metric] /= decodes
    return kernels


def find_ncu(named):
    """Where it is: `named`, in the path, or where NVIDIA's packages put the newest."""
    found = shutil.which(named) or (glob.glob("/opt/nvidia/nsight-compute/*/ncu") if named == "ncu" else [])
    if not found:
        raise Error(f"{named}, of NVIDIA Nsight Compute, is not there: looked in the path and in "
                    "/opt/nvidia/nsight-compute; --ncu says where it is")
    return found if isinstance(found, str) else max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])


def under_ncu(options, stage, shape, metrics, kernels=()):
    """The rows of one stage, of these kernels or of all; metrics that this ncu does not have are taken out of the
    list."""
    only = ["--kernel-name", f"regex:^({'|'.join(kernels)})$"] if kernels else []
    while True:
        with tempfile.NamedTemporaryFile("r", suffix=".csv") as log:
            result = run([options.ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", *only,
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
        return parse_launches(text)


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
    return {"context": {"schema": COUNTERS_SCHEMA, "machine": "model", "commit": commit(options), "date": now()}, "runs": runs}


def record_gpu(options):
    metrics = [metric for one in PAIRS for metric in one["metrics"]] + OTHER_METRICS + LAUNCH_METRICS
    runs = []
    for shape in options.shapes:
        for stage in options.stages:
            data = profile(options, stage, shape)
            rows = under_ncu(options, stage, shape, metrics)
            names = [kernel["name"] for kernel in data["kernels"]]
            runs.append({"stage": data["stage"], "shape": shape, "kernels": sum_of_decodes(rows, names, DECODES)})
            print(f"{data['stage']} {shape}: {', '.join(runs[-1]['kernels'])}")
    return {"context": gpu_context(options), "runs": runs}


def gpu_context(options):
    query = ["nvidia-smi", "--format=csv,noheader", "-i", "0"]
    return {"schema": COUNTERS_SCHEMA, "machine": "gpu", "gpu": first_line([*query, "--query-gpu=name"]),
            "driver": first_line([*query, "--query-gpu=driver_version"]),
            "ncu": first_line([options.ncu, "--version"]), "nvcc": first_line(["nvcc", "--version"]),
            "commit": commit(options), "date": now()}


def with_a_cache(shape, measure):
    """What measure(shape) gives, and the shape; with a quantised cache for a stage that reads no other."""
    try:
        return measure(shape), shape
    except Error as error:
        if "cannot read a cache of" not in str(error):
            raise
        return measure(shape + QUANTISED), shape + QUANTISED


def hardware_of(options, stage, shape, metrics):
    """A run of one stage; of one that failed, why."""
    try:
        rows, shape = with_a_cache(shape, lambda one: under_ncu(options, stage, one, metrics, KERNELS))
        kernels = sum_of_decodes(rows, KERNELS, DECODES)
        if not kernels:
            raise Error("none of its kernels was launched")
        return {"stage": stage, "shape": shape, "kernels": kernels}
    except Error as error:
        print(error, file=sys.stderr)
        lines = str(error).splitlines()
        why = next((line for line in lines if line.startswith("mla_run: ")), lines[0])
        return {"stage": stage, "shape": shape, "kernels": {}, "why_not": why.removeprefix("mla_run: ")}


def record_hardware(options):
    """One stage after the other; one that cannot be measured costs no other its place."""
    metrics, runs = list(HARDWARE_METRICS), []
    for shape in options.shapes:
        for stage in options.stages:
            runs.append(hardware_of(options, stage, shape, metrics))
            print(f"{stage} {runs[-1]['shape']}: {', '.join(runs[-1]['kernels']) or runs[-1]['why_not']}", flush=True)
    if not any(run["kernels"] for run in runs):
        raise Error("no stage was measured")
    return {"context": {**gpu_context(options), "not_known_to_ncu": [m for m in HARDWARE_METRICS if m not in metrics]},
            "runs": runs}


def record_stalls(options):
    runs = []
    for shape in options.shapes:
        for stage in options.stages:
            run_, _ = with_a_cache(shape, lambda one, stage=stage: stalls.record(run, options, stage, one))
            runs.append(run_)
            print(f"{stage} {run_['shape']}: {run_['samples']} samples", flush=True)
    return {"context": {**gpu_context(options), "schema": STALLS_SCHEMA}, "runs": runs}


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def load(path, wanted=COUNTERS_SCHEMA):
    """A recording, or None."""
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Error(f"{path}: {error}") from None
    schema = data.get("context", {}).get("schema")
    if schema != wanted:
        raise Error(f"{path}: the schema is {schema}, not {wanted}")
    return data


def load_both(root):
    folder = root / "bench" / "results"
    return load(folder / "counters_model.json"), load(folder / "counters_gpu.json")


def load_hardware(root):
    return load(root / "bench" / "results" / "counters_hardware.json")


def load_stalls(root):
    return load(root / "bench" / "results" / "counters_stalls.json", STALLS_SCHEMA)


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


def hardware_rows(hardware):
    """[(run, kernel's name, kernel)], the longest of a stage first; kernels that take less than 1% of it are left out."""
    rows = []
    for run_ in hardware["runs"]:
        kernels = sorted(run_["kernels"].items(), key=lambda one: -one[1]["metrics"][TIME])
        least = 0.01 * sum(kernel["metrics"][TIME] for _, kernel in kernels)
        rows += [(run_, name, kernel) for name, kernel in kernels if kernel["metrics"][TIME] >= least]
        if not kernels:
            rows.append((run_, run_["why_not"], None))
    return rows


def hardware_table(hardware, limit):
    """A header and a row per kernel: how busy each part of the GPU was, and at the end limit(stage, shape): what the
    stage's own prediction says, of the recording without ncu."""
    def cells(metrics):
        def of_time(metric, divisor, form):
            return format(metrics[metric] / divisor, form) if metric in metrics else "—"
        rates = {title: f"{of_time(metric, 1e9, '.0f')} GB/s, " for title, metric in RATES if metric in metrics}
        conflicts = [metrics.get(metric, 0) for metric in CONFLICTS]
        return ([of_time(TIME, 1e3, ".1f")] +
                [rates.get(title, "") + (f"{metrics[metric]:.0f}%" if metric in metrics else "—") for title, metric in SHARES] +
                [f"{conflicts[0] / conflicts[1]:.1%}" if conflicts[1] else "—"])
    header = ["stage", "kernel", "µs under ncu", *(title for title, _ in SHARES), "bank conflicts", "own limit"]
    rows, last = [], None
    for run_, name, kernel in hardware_rows(hardware):
        first = run_ is not last
        last = run_
        rows.append([run_["stage"] if first else "", name,
                     *(cells(kernel["metrics"]) if kernel else ["—"] * (len(SHARES) + 2)),
                     limit(run_["stage"], run_["shape"]) if first else ""])
    return header, rows


def instructions_table(hardware):
    """A header and a row per kernel: warp instructions, and of which pipes."""
    rows = []
    for run_, name, kernel in hardware_rows(hardware):
        all_ = kernel["metrics"].get(INSTRUCTIONS, 0) if kernel else 0
        if all_:
            rows.append([run_["stage"], name, f"{all_ / 1e6:.4g}",
                         *(f"{kernel['metrics'][pipe(one)] / all_:.1%}" if pipe(one) in kernel["metrics"] else "—"
                           for one in PIPES)])
    return ["stage", "kernel", "million", *PIPES], rows


RECORDS = {"model": record_model, "gpu": record_gpu, "hardware": record_hardware, "stalls": record_stalls}


def main(arguments=None):
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in (*RECORDS, "compare"):
        what.add_argument("--" + name, action="store_true")
    def names(text):
        return text.split(",")
    parser.add_argument("--stages", type=names, help=f"default {','.join(STAGES)}; for --hardware all with a kernel, for --stalls all with a kernel `decode`")
    parser.add_argument("--shapes", type=names, help=f"default {','.join(SHAPES)}; for --hardware {HARDWARE_SHAPE}, for --stalls {','.join(STALL_SHAPES)}")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "bench" / "mla_run",
                        help="mla_run; of a build for GPUs, except for --model")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's program")
    parser.add_argument("--out", type=Path, help="where the recording goes")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.hardware or options.stalls:
        known = (stages_with_kernels if options.hardware else stages_with_decode)(options.root)
        options.stages = [stage for stage in known
                          if options.stages is None or {stage, stage[:2]} & set(options.stages)]
    options.stages = options.stages or STAGES
    options.shapes = options.shapes or ([HARDWARE_SHAPE] if options.hardware else STALL_SHAPES if options.stalls else SHAPES)
    try:
        if options.compare:
            model, gpu = load_both(options.root)
            if model is None or gpu is None:
                raise Error("nothing to compare: --model and --gpu record it")
            for stage, shape, kernel, title, of_model, of_gpu, metric in compare(model, gpu):
                print(f"{stage:20} {shape:18} {kernel:12} {title:24} {of_model:12.0f} {of_gpu:12.0f} "
                      f"{difference(of_model, of_gpu):>8}  {metric}")
            return 0
        name = next(name for name in RECORDS if getattr(options, name))
        path = options.out or options.root / "bench" / "results" / f"counters_{name}.json"
        program.check_writable(path)
        if not options.model:
            options.ncu = find_ncu(options.ncu)
        data = RECORDS[name](options)
        program.write_text(path, json.dumps(data, indent=1) + "\n")
        print(f"wrote {path}")
        return 0
    except Error as error:
        print(f"counters.py: {error}", file=sys.stderr)
        return 2 if options.compare else 1


if __name__ == "__main__":
    sys.exit(program.run("counters.py", main))
