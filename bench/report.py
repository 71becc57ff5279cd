#!/usr/bin/env python3
"""Tables from recorded results: in the terminal, in the README, in every stage's chapter.

  bench/report.py --table              the recorded results, every shape; then the plans
  bench/report.py --summary            the README's table, in the terminal
  bench/report.py --update             write them between the markers of README.md and stages/NN_*/README.md
  bench/report.py --check              fail if what stands there is stale

Results are what mla_bench wrote with --out; by default the newest in bench/results that has the README's shapes, of
the GPU that the texts speak of. bench/run.sh --record puts them there.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

SCHEMA = "flashmla_stages/1"
PEERS_SCHEMA = "flashmla_stages/peers/1"
RECORDED_GPU = "NVIDIA H200"
README_SHAPES = ["h128_q1_b64_k4096", "h16_q1_b64_k4096", "h128_q1_b1_k4096"]
REQUIRED_CONTEXT = ["schema", "machine", "commit", "date_utc", "nvcc", "host_compiler"]
REQUIRED_GPU_CONTEXT = ["gpu", "driver", "cuda_driver", "max_sm_mhz", "memory_mhz", "power_limit_w",
                        "ceiling_read_gbps", "ceiling_fp32_tflops", "ceiling_launch_us"]
REQUIRED_COUNTERS = ["p10_us", "p90_us", "n", "TFLOPs", "GBps", "rel_l2", "max_abs", "lse_max_abs"]
REQUIRED_PLAN_COUNTERS = ["p10_us", "p90_us", "n"]
DASH = "—"


class Error(Exception):
    """A message for the user."""


class Results:
    """One results file: context, and entries by (stage, shape, mode)."""

    def __init__(self, data, name):
        self.name = name
        self.context = data.get("context", {})
        self.entries = {}
        for entry in data.get("benchmarks", []):
            # "02_shared_tiled/h128_q1_b64_k4096/cold/iterations:1/manual_time"
            parts = entry.get("name", "").split("/")
            if len(parts) < 3:
                raise Error(f"{name}: entry {entry.get('name')!r} is not named stage/shape/mode")
            self.entries[tuple(parts[:3])] = entry
        self.stages = [s for s in unique(key[0] for key in self.entries) if s != "reference"]
        self.shapes = unique(key[1] for key in self.entries if key[2] != "plan")
        self.plans = [key[:2] for key in self.entries if key[2] == "plan"]

    def entry(self, stage, shape, mode="cold"):
        return self.entries.get((stage, shape, mode))

    def measured(self, stage, shape, mode="cold"):
        entry = self.entry(stage, shape, mode)
        return entry if entry is not None and not why_not(entry) else None

    def problems(self):
        """What keeps this from being a results file; empty if nothing."""
        found = [f"context lacks '{key}'" for key in REQUIRED_CONTEXT if key not in self.context]
        if self.context.get("schema") not in (None, SCHEMA):
            found.append(f"schema is '{self.context['schema']}', not '{SCHEMA}'")
        if self.context.get("machine") == "gpu":
            found += [f"context lacks '{key}'" for key in REQUIRED_GPU_CONTEXT if key not in self.context]
        if not self.entries:
            found.append("no entries")
        for (stage, shape, mode), entry in self.entries.items():
            if why_not(entry) or stage == "reference":
                continue
            name = f"{stage}/{shape}/{mode}"
            required = REQUIRED_PLAN_COUNTERS if mode == "plan" else REQUIRED_COUNTERS
            found += [f"{name} lacks '{key}'" for key in required if key not in entry]
            if not entry.get("real_time", 0) > 0:
                found.append(f"{name} has no time")
        return found


def unique(items):
    return list(dict.fromkeys(items))


def why_not(entry):
    """The reason why an entry has no time; empty if it has one."""
    if entry.get("error_occurred") or entry.get("skipped"):
        return entry.get("error_message") or entry.get("skip_message") or "no reason given"
    return ""


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path}: {error}") from None


def load(path):
    results = Results(read_json(path), Path(path).name)
    problems = results.problems()
    if problems:
        raise Error(f"{path}: not a results file: " + "; ".join(problems[:5]))
    return results


def recorded(root):
    """The newest in bench/results; rather of the GPU that the texts speak of, rather with every shape that the README
    shows. None if there are none."""
    found = []
    for path in sorted((root / "bench" / "results").glob("*.json")):
        data = read_json(path)
        context = data.get("context", {})
        if context.get("schema") == SCHEMA and context.get("machine") == "gpu":
            full = set(README_SHAPES) <= set(Results(data, path.name).shapes)
            found.append((context.get("gpu") == RECORDED_GPU, full, context.get("date_utc", ""), path))
    return load(max(found)[-1]) if found else None


def load_peers(root, results):
    """Recorded figures of other implementations on the same kind of GPU: {shape: {name: [cold, sustained]}}."""
    for path in sorted((root / "bench" / "results").glob("peers_*.json")):
        data = read_json(path)
        if data["context"]["schema"] != PEERS_SCHEMA:
            raise Error(f"{path}: schema is not '{PEERS_SCHEMA}'")
        if data["context"]["gpu"] == results.context.get("gpu"):
            return data
    return {"context": {}, "shapes": {}}


def shape_title(name):
    """'128 heads, 64 × 4096' for h128_q1_b64_k4096."""
    match = re.fullmatch(r"h(\d+)(?:x(\d+))?_q(\d+)_b(\d+)_k(lognormal|skew|varied)?(\d+)(_causal)?"
                         r"(?:_split(\d+))?(_fp16)?", name)
    if not match:
        return name
    heads, kv_heads, queries, batch, lengths, tokens, causal, split, fp16 = match.groups()
    text = f"{heads} heads"
    text += f" on {kv_heads} KV heads" if kv_heads else ""
    text += f", {queries} query tokens" if queries != "1" else ""
    text += ", causal" if causal else ""
    batch = str(int(batch) - 1) if lengths == "skew" else batch
    text += f", {batch} × " + {None: tokens, "skew": f"512 + 1 × {tokens}", "lognormal": f"log-normal {tokens}",
                               "varied": f"varied {tokens}"}[lengths]
    text += f", split every {split}" if split else ""
    return text + (", fp16" if fp16 else "")


def us(value):
    if value is None:
        return DASH
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def significant(value, digits=3):
    """0.0123, 1.23, 12.3, 123, 1234"""
    if value is None:
        return DASH
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def percent(share):
    return DASH if share is None else f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def median(entry):
    return entry["real_time"] if entry else None


def median_and_spread(entry):
    return f"{us(median(entry))} ({us(entry['p10_us'])}–{us(entry['p90_us'])})" if entry else DASH


def cold_and_sustained(cold, sustained):
    if cold is None:
        return DASH
    return us(median(cold)) + " / " + ("over 200 ms" if cold.get("once") else us(median(sustained)))


def own_limit(entry):
    """'43% fp32'"""
    if "own_limit_share" not in entry:
        return DASH
    terms = {name: entry.get(f"limit_{key}_us", 0)
             for key, name in [("fp32", "fp32"), ("matrix", "matrix"), ("shared", "shared"), ("dram", "DRAM")]}
    return f"{percent(entry['own_limit_share'])} {max(terms, key=terms.get)}"


def flop(results, shape):
    """FLOP of a shape, from any entry that has both time and rate."""
    for (_, name, _), entry in results.entries.items():
        if name == shape and not why_not(entry) and "TFLOPs" in entry:
            return entry["TFLOPs"] * entry["real_time"] * 1e6
    return None


def caption(results):
    get = results.context.get
    if get("machine") != "gpu":
        return f"On the CPU model of a GPU: model time, not a GPU's. Commit {get('commit')}, {get('date_utc', '')[:10]}."
    return (f"{get('gpu')}, driver {get('driver')} (CUDA {get('cuda_driver')}), nvcc {get('nvcc')}, "
            f"commit {get('commit')}, {get('date_utc', '')[:10]}. Measured in the same run: "
            f"read {get('ceiling_read_gbps')} GB/s, fp32 {get('ceiling_fp32_tflops')} TFLOP/s, cuBLAS bf16 "
            f"{get('ceiling_matrix_cold_tflops', DASH)} TFLOP/s cold, {get('ceiling_matrix_sustained_tflops', DASH)} "
            f"sustained, empty launch {get('ceiling_launch_us')} µs.")


def peer_caption(peers):
    get = peers["context"].get
    if not peers["shapes"]:
        return ""
    return f"Other implementations, recorded: {get('gpu')}, driver {get('driver')}, CUDA {get('cuda')}, {get('date')}."


def side_by_side(results, peers, shape):
    """Header and rows: every stage on one shape, then the recorded peers."""
    header = ["stage", "cold µs (p10–p90)", "sustained µs (p10–p90)", "TFLOP/s", "GB/s", "own limit", "floor",
              "speed-up", "rel. L2 error", "the one idea"]
    rows = []
    reference = results.measured("reference", shape, "wall")
    if reference:
        rows.append(["reference", us(median(reference)), DASH, significant(reference["TFLOPs"]),
                     significant(reference["GBps"]), DASH, DASH, DASH, DASH, reference.get("label", "")])
    for stage in results.stages:
        cold, sustained = results.entry(stage, shape), results.measured(stage, shape, "sustained")
        if cold is None:
            continue
        if why_not(cold):
            rows.append([stage] + [DASH] * 8 + [why_not(cold)])
            continue
        rows.append([stage, median_and_spread(cold), "over 200 ms" if cold.get("once") else median_and_spread(sustained),
                     significant(cold["TFLOPs"]), significant(cold["GBps"]), own_limit(cold),
                     percent(cold.get("floor_share")), speedup(cold), f"{cold['rel_l2']:.1e}", cold.get("label", "")])
    work = flop(results, shape)
    for name, times in peers["shapes"].get(shape, {}).items():
        rate = significant(work / times[0] / 1e6) if work else DASH
        rows.append([name, us(times[0]), us(times[1]), rate] + [DASH] * 5 + ["recorded"])
    return header, rows


def speedup(entry):
    return f"{significant(entry['speedup'], 2)}×" if "speedup" in entry else DASH


def readme_table(results, peers):
    """Header and rows: every stage on a few shapes, then the recorded peers."""
    shapes = [shape for shape in README_SHAPES if shape in results.shapes]
    header = ["stage"]
    for shape in shapes:
        header += [shape_title(shape) + ": µs cold / sustained", "TFLOP/s", "own limit"]
    header.append("the one idea")
    rows = []
    for stage in results.stages:
        row, idea = [stage], ""
        for shape in shapes:
            cold, sustained = results.measured(stage, shape), results.measured(stage, shape, "sustained")
            row += [cold_and_sustained(cold, sustained)]
            row += [significant(cold["TFLOPs"]), own_limit(cold)] if cold else [DASH, DASH]
            idea = idea or (cold or {}).get("label", "")
        rows.append(row + [idea])
    for name in unique(name for shape in shapes for name in peers["shapes"].get(shape, {})):
        row = [name]
        for shape in shapes:
            times = peers["shapes"].get(shape, {}).get(name)
            work = flop(results, shape)
            row += [f"{us(times[0])} / {us(times[1])}", significant(work / times[0] / 1e6) if work else DASH,
                    DASH] if times else [DASH] * 3
        rows.append(row + ["recorded"])
    return header, rows


def chapter_table(results, stage):
    """Header and rows: every shape of one stage."""
    header = ["shape", "cold µs (p10–p90)", "sustained µs (p10–p90)", "TFLOP/s", "GB/s", "own limit", "floor",
              "speed-up", "rel. L2 error"]
    rows = []
    for shape in results.shapes:
        cold, sustained = results.entry(stage, shape), results.measured(stage, shape, "sustained")
        if cold is None:
            continue
        if why_not(cold):
            rows.append([shape_title(shape), why_not(cold)] + [DASH] * 7)
            continue
        rows.append([shape_title(shape), median_and_spread(cold),
                     "over 200 ms" if cold.get("once") else median_and_spread(sustained), significant(cold["TFLOPs"]),
                     significant(cold["GBps"]), own_limit(cold), percent(cold.get("floor_share")), speedup(cold),
                     f"{cold['rel_l2']:.1e}"])
    return header, rows


def plan_table(results):
    """Header and rows: every plan, alone and beside the decode that it is made for."""
    header = ["stage", "plan alone, warm µs (p10–p90)", "decode, cold µs", "plan and decode, cold µs", "the plan adds µs",
              "shape"]
    rows = []
    for stage, shape in results.plans:
        entry = results.entry(stage, shape, "plan")
        if why_not(entry):
            rows.append([stage] + [DASH] * 4 + [f"{shape_title(shape)}: {why_not(entry)}"])
            continue
        rows.append([stage, median_and_spread(entry), us(median(results.measured(stage, shape))),
                     us(entry.get("with_decode_us")), us(entry.get("marginal_us")), shape_title(shape)])
    return header, rows


def markdown(table):
    header, rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def plain(table):
    """Aligned columns; the first and the last to the left."""
    header, rows = table
    widths = [max(len(row[i]) for row in [header] + rows) for i in range(len(header))]
    def line(row):
        cells = [cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()
    return "\n".join([line(header), "  ".join("─" * width for width in widths)] + [line(row) for row in rows])


def summary(results, peers):
    """The README's table for the terminal: a block a shape, so that it fits."""
    header, rows = readme_table(results, peers)
    blocks = []
    for first in range(1, len(header) - 1, 3):
        columns = [0, first, first + 1, first + 2, len(header) - 1]
        blocks.append(plain(([header[i] for i in columns], [[row[i] for i in columns] for row in rows])))
    return "\n\n".join(blocks)


def texts(root, results):
    """What should stand between the markers: [(path, begin, end, text)]."""
    peers = load_peers(root, results)
    note = ("Medians; a result is checked against the fp64 reference before it is timed. Cold: other data went through "
            "the L2 before each run; sustained: back to back after 0.2 s (from stage 05 on 1.2 s) of the same work. The "
            "remaining columns are of cold runs.")
    if results.plans:
        note += " Where a stage makes a plan, that is done before, outside these times."
    described = "\n\n".join(filter(None, [caption(results), peer_caption(peers)]))
    wanted = [(root / "README.md", "results", f"{markdown(readme_table(results, peers))}\n\n{note} {described}")]
    for stage in results.stages:
        wanted.append((root / "stages" / stage / "README.md", "measurement",
                       f"{markdown(chapter_table(results, stage))}\n\n{note} {caption(results)}"))
    return [(path, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", text) for path, name, text in wanted]


def replace_between(text, begin, end, middle, path):
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise Error(f"{path}: no '{begin}' followed by '{end}'")
    return f"{head}{begin}\n{middle}\n{end}{tail}"


def update(root, results, write):
    """Brings the texts up to date (or only looks); the paths that were stale."""
    stale = []
    for path, begin, end, middle in texts(root, results):
        if not path.exists():
            if write:
                print(f"{path}: not there, left out", file=sys.stderr)
            continue
        old = path.read_text(encoding="utf-8")
        if path.parent != root and begin not in old and end not in old:  # a chapter of the reader's own
            print(f"{path}: no '{begin}', left out", file=sys.stderr)
            continue
        new = replace_between(old, begin, end, middle, path)
        if new == old:
            continue
        stale.append(path)
        if write:
            path.write_text(new, encoding="utf-8")
    return stale


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ["table", "summary", "update", "check"]:
        what.add_argument("--" + name, action="store_true")
    parser.add_argument("--results", help="results file (default: the newest in bench/results)")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        results = load(options.results) if options.results else recorded(options.root)
        if results is None:
            print("no results are recorded in bench/results yet")
            return 0
        if options.update or options.check:
            stale = update(options.root, results, write=options.update)
            for path in stale:
                print(f"{path}: " + ("updated" if options.update else "stale, run bench/report.py --update"))
            return 1 if stale and options.check else 0
        peers = load_peers(options.root, results)
        print(f"{results.name}:\n{caption(results)}")
        if peer_caption(peers):
            print(peer_caption(peers))
        if options.summary:
            print("\n" + summary(results, peers))
        else:
            for shape in results.shapes:
                print(f"\n{shape}: {shape_title(shape)}\n" + plain(side_by_side(results, peers, shape)))
            if results.plans:
                print("\nthe plans\n" + plain(plan_table(results)))
    except Error as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
