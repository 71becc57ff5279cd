#!/usr/bin/env python3
"""Tables and figures from recorded results: in the terminal, the README, every stage's chapter, docs.

  bench/report/report.py --table              the recorded results, every shape; then all other tables
  bench/report/report.py --summary            the README's table, in the terminal
  bench/report/report.py --update             write them between the markers of README.md, stages/NN_*/README.md,
                                       stages/NN_*/steps/README.md, docs/results.md and docs/course/ridge.md, and the figures of running text (prose.py says how)
  bench/report/report.py --plots              draw docs/figures (needs matplotlib)
  bench/report/report.py --check              fail if a text or a figure is stale, or if "auto" was more than 3%
                                       slower than the best stage of its run

Results are what mla_bench wrote with --out; by default the newest in bench/results that has the README's shapes, of
the GPU that the texts speak of. bench/run.sh --record puts them there.

Exit code: 0 all right; 1 something is stale, or could not be written; 2 bad input.
"""
import argparse
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import counters
import estimates
import parallel
import plots
import program
import prose
import ridge
import stalls
from recordings import (CACHE_FORMATS, CHOOSER, COUNTERS_SCHEMA, DASH, Error, error_of, ERRORS_SCHEMA, is_quantised, LAYER_FORMS, LAYER_PARTS,
                        lengths_title, load, load_cache, load_cross, load_errors, load_later, load_peers, load_python, load_quantised, load_service, load_steps, load_texts,
                        load_traditional, layers_of, MEASURED_PEERS, median, NOT_RECORDED, ON_CPU, PARALLEL_SCHEMA, parse_shape, PEERS_SCHEMA, percent, PYTHON_SCHEMA, read_json, README_SHAPES,
                        recorded, Results, SAME_RUN, SCALE_SCHEMA, SCHEMA, SERVICE_SCHEMA, STALLS_SCHEMA, shape_title,
                        short, significant, TRADITIONAL_SCHEMA, unique, us, varlen_pairs, why_not)


# ---- tables: a header and rows of cells ----

def table(columns, items):
    """A row per item, a column per (title, what makes an item's cell). Whatever is missing is a dash."""
    def cell(make, item):
        try:
            text = make(item)
        except KeyError:  # not recorded
            return DASH
        return DASH if text is None else text
    return [title for title, _ in columns], [[cell(make, item) for _, make in columns] for item in items]


def each(names, title, make):
    """A column per name: make(name, item)."""
    return [(title(name), partial(make, name)) for name in names]


def markdown(one):
    header, rows = one
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def plain(one):
    """Aligned columns; the first and the last to the left."""
    header, rows = one
    widths = [max(len(row[i]) for row in [header] + rows) for i in range(len(header))]
    def line(row):
        cells = [cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()
    return "\n".join([line(header), "  ".join("─" * width for width in widths)] + [line(row) for row in rows])


def written(parts, how):
    """Parts of a block, texts and tables, as one text; `how` is markdown or plain."""
    return "\n\n".join(part if isinstance(part, str) else how(part) for part in parts)


# ---- cells ----

def spread(entry, unit="us", how=us):
    """'4000 (3960–4080)'; without a spread, the median alone."""
    middle = entry["real_time"] if unit == "us" else entry[unit]
    around = f" ({how(entry[f'p10_{unit}'])}–{how(entry[f'p90_{unit}'])})" if f"p10_{unit}" in entry else ""
    return how(middle) + around


def sustained(one, how):
    return "over 200 ms" if one.cold.get("once") else how(one.sustained)


def cold_and_sustained(one):
    """'4000 / 4100'"""
    return f"{us(median(one.cold))} / {sustained(one, lambda entry: us(median(entry)))}" if one.cold else DASH


def own_limit(entry):
    """'43% fp32'"""
    terms = {"fp32": "fp32", "matrix": "matrix", "shared": "shared", "dram": "DRAM"}
    return f"{percent(entry['own_limit_share'])} {terms[max(terms, key=lambda key: entry.get(f'limit_{key}_us', 0))]}"


def times_x(a, b):
    """b as a multiple of a"""
    return f"{significant(b / a)}×" if a and b else None


def gigabytes(count):
    return significant(count / 1e9)


# ---- one shape, by who decodes it ----

LAST_OF_THE_LADDER = "08_seesaw"  # later rungs branch from it


def decode(results, stage, shape):
    """What is known of a stage on a shape."""
    cold, base = results.measured(stage, shape), results.measured(LAST_OF_THE_LADDER, shape)
    if "speedup" in cold and base and stage > LAST_OF_THE_LADDER:  # older recordings compare it with the stage before
        cold = {**cold, "speedup": median(base) / median(cold)}
    return SimpleNamespace(stage=stage, shape=shape, cold=cold,
                           sustained=results.measured(stage, shape, "sustained"),
                           why=why_not(results.entry(stage, shape) or {}))


def flop(results, shape):
    """FLOP of a shape, from any entry that has both time and rate."""
    for (stage, name, _), entry in results.entries.items():
        if name == shape and stage not in MEASURED_PEERS and not why_not(entry) and "TFLOPs" in entry:
            return entry["TFLOPs"] * entry["real_time"] * 1e6
    return None


def decodes(results, peers, shape):
    """{name: decode} of the stages, then of the peers; `last` is what a table says of it at the end."""
    found = {stage: decode(results, stage, shape) for stage in [*results.stages, *MEASURED_PEERS]
             if results.entry(stage, shape)}
    for one in found.values():
        one.last = "measured" if one.stage in MEASURED_PEERS else one.why or one.cold.get("label", "")
        if one.stage in MEASURED_PEERS and one.cold:
            one.cold = {key: value for key, value in one.cold.items() if key != "speedup"}
    found = {MEASURED_PEERS.get(name, name): one for name, one in found.items()}
    work = flop(results, shape)
    for name, times in peers.shapes.get(shape, {}).items():
        cold, hot = ({"real_time": time} if time else {} for time in times)
        if cold and work:
            cold["TFLOPs"] = work / cold["real_time"] / 1e6
        found[name] = SimpleNamespace(stage=name, shape=shape, cold=cold, sustained=hot, why="", last="recorded")
    return found


def cores(results):
    """'16 cores', of the machine that measured."""
    count = results.context.get("num_cpus")
    return f"{count} cores" if count else "all cores"


def reference(results, shape):
    """What is known of the truth's evaluation on the CPU, as a decode; None if a shape was checked otherwise."""
    entry = results.measured("reference", shape, "wall")
    if not entry:
        return None
    return SimpleNamespace(stage="reference", shape=shape, sustained={}, why="",
                           cold={key: entry[key] for key in ("real_time", "TFLOPs", "GBps")},
                           last=f"{entry.get('label', 'on the CPU')}, {cores(results)}; wall time of one run")


DECODE = [("cold µs (p10–p90)", lambda one: spread(one.cold)),
          ("sustained µs (p10–p90)", lambda one: sustained(one, spread)),
          ("TFLOP/s", lambda one: significant(one.cold["TFLOPs"])),
          ("GB/s", lambda one: significant(one.cold["GBps"])),
          ("own limit", lambda one: own_limit(one.cold)),
          ("floor", lambda one: percent(one.cold["floor_share"])),
          ("speed-up", lambda one: significant(one.cold["speedup"], 2) + "×"),
          ("rel. L2 error", lambda one: f"{one.cold['rel_l2']:.1e}")]


def side_by_side(results, peers, shape):
    """Every stage on one shape, then its peers."""
    rows = decodes(results, peers, shape)
    on_cpu = reference(results, shape)
    if on_cpu:
        rows = {"reference": on_cpu, **rows}
    return table([("stage", lambda one: one[0]),
                  *each(DECODE, lambda column: column[0], lambda column, one: column[1](one[1])),
                  ("the one idea", lambda one: one[1].last)], rows.items())


def readme_table(results, peers):
    """Every stage on a few shapes, then its peers."""
    shapes = [shape for shape in README_SHAPES if shape in results.shapes]
    rows = {shape: decodes(results, peers, shape) for shape in shapes}
    on_cpu = {shape: one for shape in shapes if (one := reference(results, shape))}
    for shape, one in on_cpu.items():
        rows[shape]["reference"] = one
    peer_names = [*MEASURED_PEERS.values(), *(name for shape in shapes for name in peers.shapes.get(shape, {}))]
    names = [*["reference"] * bool(on_cpu), *results.stages, *(name for name in unique(peer_names) if any(name in found for found in rows.values()))]
    columns = [("stage", lambda name: name)]
    for shape in shapes:
        columns.append((shape_title(shape) + ": µs cold / sustained",
                        lambda name, found=rows[shape]: cold_and_sustained(found[name])))
        columns += each([one for one in DECODE if one[0] in ("TFLOP/s", "own limit")], lambda one: one[0],
                        lambda one, name, found=rows[shape]: one[1](found[name]))
    columns.append(("the one idea", lambda name: next((found[name].last for found in rows.values() if name in found and
                                                       not found[name].why), "")))
    return table(columns, names)


def chapter_table(results, stage):
    """One stage on the shapes of suite table."""
    rows = [decode(results, stage, shape) for shape in results.timed("table") if results.entry(stage, shape)]
    (title, make), *others = DECODE
    return table([("shape", lambda one: shape_title(one.shape)), (title, lambda one: one.why or make(one)), *others],
                 rows)


def bound(entry):
    """'137.0 shared', in µs"""
    return f"{us(entry['own_limit_share'] * entry['real_time'])} {own_limit(entry).split(' ')[1]}"


def predicted_table(run, estimated, stage, shapes):
    """Lower bound, estimate by its terms, and time of a stage on the shapes that its chapter speaks of."""
    rows = [SimpleNamespace(shape=shape, cold=decode(run, stage, shape).cold, terms=estimated.get(stage, {}).get(shape) or {})
            for shape in shapes]
    def estimate(one):
        return sum(one.terms[term] for term in estimates.TERMS)
    return table([("shape", lambda one: shape_title(one.shape)), ("lower bound, by", lambda one: bound(one.cold)),
                  *each(estimates.TERMS, lambda term: term.replace("_", " "), lambda term, one: us(one.terms[term])),
                  ("**estimate**", lambda one: f"**{us(estimate(one))}**"), ("measured", lambda one: us(median(one.cold))),
                  ("measured / estimate", lambda one: f"{median(one.cold) / estimate(one):.2f}" if one.cold else None)], rows)


def bounds_table(run, stage, shapes):
    """Lower bound and time on these shapes, of a stage without a plan, for which there is no estimate."""
    rows = [SimpleNamespace(shape=shape, cold=decode(run, stage, shape).cold) for shape in shapes]
    return table([("shape", lambda one: shape_title(one.shape)), ("lower bound, by", lambda one: bound(one.cold)), ("**estimate**", lambda one: None),
                  ("measured", lambda one: us(median(one.cold))),
                  ("measured / bound", lambda one: f"{1 / one.cold['own_limit_share']:.2f}" if one.cold else None)], rows)


def reference_table(results):
    """The truth on the shapes of suite table, and how far the first rung on a GPU is ahead of it."""
    rows = [one for shape in results.timed("table") if (one := reference(results, shape))]
    def ahead(one):
        return times_x(median(results.measured(results.stages[0], one.shape)), median(one.cold))
    return table([("shape", lambda one: shape_title(one.shape)),
                  ("wall time, ms", lambda one: significant(median(one.cold) / 1000)),
                  ("GFLOP/s", lambda one: significant(1000 * one.cold["TFLOPs"])),
                  ("GB/s", lambda one: significant(one.cold["GBps"])),
                  (f"{short(results.stages[0])} on the GPU is faster by", ahead)], rows)


def summary(results, peers):
    """The README's table for the terminal: a block per shape, so that it fits."""
    header, rows = readme_table(results, peers)
    blocks = []
    for first in range(1, len(header) - 1, 3):
        columns = [0, first, first + 1, first + 2, len(header) - 1]
        blocks.append(plain(([header[i] for i in columns], [[row[i] for i in columns] for row in rows])))
    return "\n\n".join(blocks)


# ---- captions ----

def caption(results):
    get = results.context.get
    if get("machine") != "gpu":
        return f"On the CPU model of a GPU: model time, not a GPU's. Commit {get('commit')}, {get('date_utc', '')[:10]}."
    text = (f"{get('gpu')}, driver {get('driver')} (CUDA {get('cuda_driver')}), nvcc {get('nvcc')}, "
            f"commit {get('commit')}, {get('date_utc', '')[:10]}.")
    if get("ceiling_read_gbps"):
        text += (f" Measured in the same run: read {get('ceiling_read_gbps')} GB/s, fp32 {get('ceiling_fp32_tflops')} "
                 f"TFLOP/s, cuBLAS bf16 {get('ceiling_matrix_cold_tflops', DASH)} TFLOP/s cold, "
                 f"{get('ceiling_matrix_sustained_tflops', DASH)} sustained, empty launch "
                 f"{get('ceiling_launch_us')} µs.")
    seconds = float(get("wall_s") or 0)
    took = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
    return text + (f" The whole run took {took}." if seconds else "")


def peer_caption(peers):
    if not peers.shapes:
        return ""
    parts = []
    for data in peers.files:
        get = data["context"].get
        parts.append(f"{get('gpu')}, driver {get('driver')}, CUDA {get('cuda')}, {get('date')[:10]}")
        again = unique(name.removesuffix(SAME_RUN) for rows in data["shapes"].values() for name in rows
                       if name.endswith(SAME_RUN))
        if again:
            parts[-1] += f" (in one run with {', '.join(again)}, whose times in that run are shown beside)"
        absent = data.get("absent") or get("absent") or {}
        if absent:
            parts[-1] += " (without " + ", ".join(f"{name}: {reason}" for name, reason in absent.items()) + ")"
    return "Other implementations, recorded: " + "; ".join(parts) + \
        (". Where a shape has two figures, the later one counts." if len(parts) > 1 else ".")


# ---- blocks of docs/results.md: lists of texts and tables, empty where nothing is recorded ----

def stages_with(results, shapes, mode="cold"):
    return [stage for stage in results.stages if any(results.entry(stage, shape, mode) for shape in shapes)]


SHAPE = ("shape", shape_title)


def best_peer(results, peers, shape):
    """'118.4 / 132.6 FlashMLA': the one of least cold time."""
    found = [one for one in decodes(results, peers, shape).items() if one[1].cold and
             one[0] not in results.stages and not one[0].endswith(SAME_RUN)]
    if not found:
        return None
    name, one = min(found, key=lambda found: median(found[1].cold))
    return f"{us(median(one.cold))} / {us(median(one.sustained))} {name}" + ", measured" * (one.last == "measured")


# What the fastest stage makes of a suite's limit.
SUITE_RATES = {"compute": ("TFLOPs", "TFLOP/s"), "prefill": ("TFLOPs", "TFLOP/s"), "latency": ("GBps", "GB/s"),
               "bandwidth": ("GBps", "GB/s")}


def suite_block(results, peers, suite):
    shapes = results.timed(suite)
    if not shapes:
        return []
    stages = stages_with(results, shapes)
    counter, unit = SUITE_RATES.get(suite, (None, None))
    columns = [SHAPE, *each(stages, short, lambda stage, shape: cold_and_sustained(decode(results, stage, shape)))]
    if counter:
        columns.append((f"{unit} of the fastest", lambda shape: significant(results.fastest(shape)[1][counter])))
    def floor(shape):
        stage, entry = results.fastest(shape)
        return f"{percent(entry['floor_share'])} ({short(stage)})"
    columns += [("floor of the fastest", floor), ("best peer", lambda shape: best_peer(results, peers, shape))]
    note = f"µs, cold / sustained{f'; {unit} cold' if unit else ''}; a peer's time is from another run, unless it says measured."
    left_out = []
    for stage in stages:
        reasons = [one.why for one in (decode(results, stage, shape) for shape in shapes) if one.why]
        if reasons:
            left_out.append(f"{short(stage)} on {len(reasons)} of {len(shapes)} ({unique(reasons)[0]})")
    return [table(columns, shapes), note + (f" No time: {'; '.join(left_out)}." if left_out else "")]


MEMORY_NAMES = {None: "memory_uniform", "lognormal": "memory_lognormal{}", "stepped": "memory_stepped",
                "skew": "memory_skewed"}


def varlen_block(results, cache):
    pairs = varlen_pairs(results)
    if not pairs:
        return []
    stages = [stage for stage in stages_with(results, [pair[0] for pair in pairs]) if stage >= "03"]
    split = [stage for stage in stages if stage >= "04"]
    compared = stages + [peer for peer in MEASURED_PEERS if any(results.measured(peer, pair[0]) for pair in pairs)]
    def time(stage, shape):
        return median(results.measured(stage, shape))
    def ratio(stage, pair):
        return times_x(time(stage, pair[0]), time(stage, pair[1]))
    lengths = ("lengths", lambda pair: shape_title(pair[0]))
    times = [lengths, ("tokens", lambda pair: f"{int(pair[2])}"), ("longest", lambda pair: f"{int(pair[3])}")]
    for stage in unique([*split[:1], *split[-1:]]):
        times += [*each([0, 1], lambda way: f"{short(stage)} {('paged', 'padded')[way]}",
                        lambda way, pair, stage=stage: us(time(stage, pair[way]))), ("ratio", partial(ratio, stage))]
    note = "Padded over paged"
    note += "; the cuBLAS pipeline always pads to the block table's width:" if len(compared) > len(stages) else ":"
    parts = ["Cold µs, paged and padded to the longest:", table(times, pairs),
             note, table([lengths, *each(compared, short, ratio)], pairs)]
    sizes = {}
    for shape in (parse_shape(pair[0]) for pair in pairs):
        entry = cache and cache.cache("bytes").get(MEMORY_NAMES.get(shape.lengths, "").format(shape.tokens))
        if entry:
            sizes[lengths_title(shape)] = entry
    if sizes:
        parts += ["Memory of one layer's cache of such sequences:",
                  table([("lengths", lambda one: one[0]),
                         ("GB contiguous", lambda one: gigabytes(one[1]["bytes_contiguous"])),
                         ("GB paged", lambda one: gigabytes(one[1]["bytes_paged"])),
                         ("saved", lambda one: percent(one[1]["saved_share"]))], sizes.items())]
    return parts


def plan_table(results):
    """Every plan, alone and beside the decode that it is made for."""
    def plan(one):
        return results.measured(*one, "plan")
    def title(one):
        reason = why_not(results.entry(*one, "plan"))
        return shape_title(one[1]) + (f": {reason}" if reason else "")
    return table([("stage", lambda one: one[0]),
                  ("plan alone, warm µs (p10–p90)", lambda one: spread(plan(one))),
                  ("decode, cold µs", lambda one: us(median(results.measured(*one)))),
                  ("plan and decode, cold µs", lambda one: us(plan(one)["with_decode_us"])),
                  ("the plan adds µs", lambda one: us(plan(one)["marginal_us"])), ("shape", title)], results.plans)


def combine_and_plan_block(results):
    plans, combines = results.of_mode("plan"), results.of_mode("combine")
    planned = [shape for shape in results.suite("plan") or plans if shape in plans]
    planners = [stage for stage in results.stages if any(stage in plans[shape] for shape in planned)]
    parts = []
    if planners:
        parts += ["Plan alone, warm µs:",
                  table([SHAPE, *each(planners, short, lambda stage, shape: us(median(plans[shape].get(stage))))],
                        planned)]
    if not combines:
        return parts
    newest = max(stage for by_stage in combines.values() for stage in by_stage)
    columns = [SHAPE, ("slots", lambda shape: f"{combines[shape][newest]['slots']:.0f}"),
               ("combine, warm", lambda shape: us(median(combines[shape][newest]))),
               ("combine, cold", lambda shape: us(combines[shape][newest]["cold_us"])),
               ("decode, cold", lambda shape: us(median(results.measured(newest, shape)))),
               ("share of the decode", lambda shape: percent(
                   combines[shape][newest]["cold_us"] / decode(results, newest, shape).cold["real_time"]))]
    return parts + [f"Combining alone, stage {newest}, µs. A slot is a partial result; the share is of cold times:",
                    table(columns, [shape for shape in unique([*results.shapes, *combines])
                                    if newest in combines.get(shape, {})])]


def numerics_block(results):
    """Of the stages with fp32 arithmetic two, or one column where all agree; of those with tensor cores the first and
    the newest."""
    errors, timed = results.of_mode("error"), results.of_mode("cold")
    found = {shape: errors.get(shape) or timed.get(shape)  # a shape of two suites is timed, and its error is a counter
             for shape in results.suite("numerics") or errors}
    found = {shape: by_stage for shape, by_stage in found.items() if by_stage}
    stages = [stage for stage in results.stages if any(stage in by_stage for by_stage in found.values())]
    def error(stage, counter="rel_l2"):
        return lambda shape: f"{found[shape][stage][counter]:.1e}" if stage in found[shape] else DASH
    fp32, matrix = [stage for stage in stages if stage < "05"], [stage for stage in stages if stage >= "05"]
    agree = len(fp32) > 1 and all(len({error(stage)(shape) for stage in fp32}) == 1 for shape in found)
    shown = {f"{short(fp32[0])}–{short(fp32[-1])}": fp32[0]} if agree else \
        {short(stage): stage for stage in [one for one in fp32 if one[:2] in ("01", "03")] or fp32}
    shown.update({short(stage): stage for stage in unique([*matrix[:1], *matrix[-1:]])})
    shown.update({name: stage for stage, name in MEASURED_PEERS.items()
                  if any(stage in by_stage for by_stage in found.values())})
    parts = []
    if found:
        shapes = {name: parse_shape(name) for name in found if parse_shape(name)}
        def heads(name):
            return shape_title(name).split(f", {lengths_title(shapes[name])}")[0] if name in shapes else name
        columns = [("heads", heads), ("type", lambda name: "fp16" if shapes[name].fp16 else "bf16"),
                   ("lengths", lambda name: lengths_title(shapes[name])),
                   ("logits' deviation", lambda name: f"{shapes[name].peak or '0.01'}"),
                   ("split every", lambda name: f"{shapes[name].split or DASH}"),
                   *each(shown, str, lambda title, shape: error(shown[title])(shape)),
                   (f"lse, {short(stages[-1])}", error(stages[-1], "lse_max_abs"))]
        text = "Relative L2 error of `out`"
        if len({heads(name) for name in found}) == 1:
            text += f", {heads(next(iter(found)))}"
            del columns[0]
        text += f"; largest error of `lse` of stage {stages[-1]}."
        text += f" Stages {short(fp32[0])} to {short(fp32[-1])} agree to two digits in every row." if agree else ""
        parts = [text, table(columns, found)]
    failed = [f"{short(stage)} on {shape_title(shape)} ({why_not(entry)})"
              for (stage, shape, mode), entry in results.entries.items() if mode == "error" and why_not(entry)]
    return parts + [f"No figure: {'; '.join(failed)}."] * bool(failed)


def resources_block(results):
    parts = []
    for name in results.timed("resources"):
        shape = parse_shape(name)
        rows = [(stage, results.measured(stage, name, "sustained")) for stage in [*results.stages, *MEASURED_PEERS]]
        columns = [("stage", lambda one: MEASURED_PEERS.get(one[0], one[0])),
                   ("W", lambda one: significant(one[1]["power_w"])),
                   ("SM GHz", lambda one: f"{one[1]['sm_mhz'] / 1000:.2f}"),
                   ("µs sustained", lambda one: us(median(one[1]))),
                   ("mJ per run", lambda one: significant(one[1]["energy_mj"])),
                   ("mJ per query token", lambda one: significant(one[1]["energy_mj"] / (shape.batch * shape.queries)))]
        if any(entry for _, entry in rows):
            parts += [f"{shape_title(name)}:", table(columns, [one for one in rows if one[1]])]
    return parts + ["Figures of the sustained runs; a run is one layer."] if parts else []


def cache_block(results, cache):
    if cache is None:
        return []
    def column(title, counter, how):
        return title, lambda one: how(one[1][counter])
    def of(mode):
        return lambda name: spread(modes[mode][name])
    def append(name):
        match = re.fullmatch(r"(?:(\w+)_)?append_b(\d+)_t(\d+)", name)
        return "{} × {}".format(*match.groups()[1:]) + (f", {match[1]}" if match[1] else "") if match else name
    modes = {mode: cache.cache(mode) for mode in ["cold", "sustained", "returned", "all"]}
    of_what = ("of", lambda one: one[1].get("label", ""))
    def bytes_of(kind):
        return [(name.removeprefix(kind), entry) for name, entry in cache.cache("bytes").items() if name.startswith(kind)]
    memory = [column("tokens", "tokens", "{:.0f}".format),
              column("GB contiguous", "bytes_contiguous", gigabytes), column("GB paged", "bytes_paged", gigabytes),
              column("MB block table", "bytes_block_table", lambda value: significant(value / 1e6)),
              column("saved", "saved_share", lambda value: percent(max(0, value))),
              column("utilisation", "fragmentation", lambda value: f"{1 - value:.1%}"),
              column("fragmentation", "fragmentation", lambda value: f"{value:.1%}")]
    tables = [
        ("On the host:", cache.cache("wall").items(),
         [("operation", lambda one: one[0].replace("host_", "", 1)),
          ("ns (p10–p90)", lambda one: spread(one[1], "ns", significant)),
          column("million per second", "per_second", lambda value: significant(value / 1e6)), of_what]),
        ("Append, sequences × new tokens, µs:", unique(name for found in modes.values() for name in found),
         [("append", append), ("kernel, cold (p10–p90)", of("cold")), ("kernel, sustained (p10–p90)", of("sustained")),
          ("GB/s, cold", lambda name: significant(modes["cold"][name]["GBps"])),
          ("call returns (p10–p90)", of("returned")), ("with the device's work (p10–p90)", of("all"))]),
        ("Memory of one layer, beside one contiguous buffer per sequence:", bytes_of("memory_"),
         [("lengths", lambda one: one[0]), *memory, of_what]),
        ("Memory of all layers by model, of the same 128 sequences:", bytes_of("model_"),
         [("model", lambda one: one[0]), column("kB per token", "bytes_per_token", lambda value: significant(value / 1e3)),
          *memory, column("MB of empty rows", "bytes_lost", lambda value: significant(value / 1e6)), of_what])]
    parts = []
    for title, items, columns in tables:
        parts += [title, table(columns, items)] if items else []
    return parts + [caption(cache)] * (cache is not results)


SERVICE_ROWS = [  # title, figures, how to write them: None is three digits
    ("requests finished / arrived", ["finished", "arrived"], "{:.0f} / {:.0f}"),
    ("rejected; queued, running at the end", ["rejected", "queued", "running"], "{:.0f}; {:.0f}, {:.0f}"),
    ("tokens per second", ["tokens_per_s"], None),
    ("sequences in a step, mean", ["batch_mean"], "{:.1f}"),
    ("step, ms: mean, p50, p99", ["step_ms_mean", "step_ms_p50", "step_ms_p99"], "{:.2f}, {:.2f}, {:.2f}"),
    ("token to token, ms: mean, p50, p99", ["token_ms_mean", "token_ms_p50", "token_ms_p99"], "{:.2f}, {:.2f}, {:.2f}"),
    ("first token, ms: p50, p99", ["first_token_ms_p50", "first_token_ms_p99"], "{:.1f}, {:.1f}"),
    ("queue: mean, longest", ["queue_mean", "queue_max"], "{:.1f}, {:.0f}"),
    ("pages in use: mean, peak, all", ["pages_mean", "pages_peak", "pages_total"], "{:.0f}, {:.0f}, {:.0f}"),
    ("cache GB; held rows wasted", ["cache_gb", "waste_share"], "{:.1f}; {:.1%}"),
    ("preemptions", ["preemptions"], "{:.0f}"),
    ("span s; steps", ["span_s", "steps"], "{:.1f}; {:.0f}"),
]
SERVICE_ROWS_OF_SOME = [  # left out where no run has them
    ("request, ms: mean, p50", ["request_ms_mean", "request_ms_p50"], "{:.0f}, {:.0f}"),
    ("request, ms: p99, of how many", ["request_ms_p99", "requests_timed"], "{:.0f}, {:.0f}"),
    ("targets, token to token, ms: mean, p99; met", ["target_token_ms_mean", "target_token_ms_p99", "targets_met"],
     "{:g}, {:g}; {}"),
    ("alerts", ["alerts"], "{:.0f}"),
    ("share of the time in steps", ["busy_share"], "{:.0%}"),
    ("GPU in use (NVML)", ["gpu_use_share"], "{:.0%}"),
    ("power W; hottest °C", ["power_w", "temperature_c"], "{:.0f}; {:.0f}"),
    ("power budget W", ["power_budget_w"], "{:g}"),
    ("energy per token, mJ", ["energy_mj_per_token"], None),
    ("price of the GPU per hour; cost of 1000 tokens", ["price_per_hour", "cost_per_1000_tokens"], "{:g}; {:.2g}"),
    ("prompts that found their prefix", ["prefix_hits", "prompts"], "{:.0f} of {:.0f}"),
]


def service_cell(figures, names, how):
    values = [{True: "yes", False: "no"}[value] if isinstance(value, bool) else value
              for value in (figures[name] for name in names)]
    return DASH if None in values else how.format(*values) if how else ", ".join(map(significant, values))


def service_block(service):
    if service is None:
        return []
    every = sorted(service["runs"], key=lambda run: (run["way"], run["stage"]))
    stages = {way: ", ".join(unique(run["stage"] for run in every if run["way"] == way)) for way in ("paged", "static")}
    last = {(run["scenario"], run["way"]): run["figures"] for run in every}
    def both(names, how):
        def cell(scenario):
            figures = [last.get((scenario, way)) for way in ("paged", "static")]
            return " / ".join(service_cell(one, names, how) if one else DASH for one in figures)
        return cell
    columns = [("scenario", lambda scenario: scenario), ("tokens per second", both(["tokens_per_s"], None)),
               ("ratio", lambda scenario: times_x(last[scenario, "static"]["tokens_per_s"],
                                                  last[scenario, "paged"]["tokens_per_s"])),
               ("token to token, ms, mean", both(["token_ms_mean"], "{:.2f}")),
               ("token to token, ms, p99", both(["token_ms_p99"], "{:.2f}")),
               ("held rows wasted", both(["waste_share"], "{:.1%}")),
               ("requests finished", both(["finished", "arrived"], "{:.0f} of {:.0f}"))]
    scenarios = unique(run["scenario"] for run in service["runs"])
    parts = [f"Paged ({stages['paged'] or DASH}) / static ({stages['static'] or DASH}):", table(columns, scenarios)]
    for scenario in scenarios:
        runs = [run for run in every if run["scenario"] == scenario]
        columns = [(" ", lambda row: row[0]),
                   *each(runs, lambda run: f"{run['way']}, {run['stage']}, {run['layers']} layers",
                         lambda run, row: row[1](run))]
        def known(row):
            return any(run["figures"].get(row[1][0]) not in (None, 0) for run in runs)
        shown = SERVICE_ROWS + [row for row in SERVICE_ROWS_OF_SOME if known(row)]
        rows = each(shown, lambda row: row[0], lambda row, run: service_cell(run["figures"], *row[1:]))
        def reasons(run):
            return ", ".join(f"{reason} {count}" for reason, count in run["rejected_by_reason"].items() if count) or DASH
        if any(reasons(run) != DASH for run in runs):
            rows.insert(2, ("why rejected", reasons))
        parts += [f"{scenario}:", table(columns, rows)]
    return parts + [service_caption(service)]


def service_caption(service):
    get = service["context"].get
    where = (f"{get('gpu')}, driver {get('driver')}" if get("machine") == "gpu" else "On the CPU model of a GPU")
    step = get("step", "from its first launch to the end of its synchronize")  # so it was before this was written down
    clock = f"wall time with the GPU's kernels (a step lasts {step})" if get("clock") == "gpu" else "on a simulated clock"
    return f"{where}, {clock}, nvcc {get('nvcc')}, commit {get('commit')}, {get('date_utc')[:10]}."


def service_formats_block(service):
    """Each scenario from caches of each format, way by way, over the first format's run of the same way."""
    if service is None:
        return []
    parts = []
    for scenario in unique(run["scenario"] for run in service["runs"]):
        runs = sorted((run for run in service["runs"] if run["scenario"] == scenario), key=lambda run: run["way"])
        first = {}
        for run in runs:
            first.setdefault(run["way"], run)
        def of(names, how=None):
            return lambda run: service_cell(run["figures"], names, how)
        columns = [("way, stage", lambda run: f"{run['way']}, {run['stage']}"),
                   ("cache", lambda run: f"`{run['cache_format']}`"), ("pages", of(["pages_total"], "{:.0f}")),
                   ("sequences in a step, mean", of(["batch_mean"], "{:.1f}")), ("tokens per second", of(["tokens_per_s"])),
                   ("ratio", lambda run: times_x(first[run["way"]]["figures"]["tokens_per_s"], run["figures"]["tokens_per_s"])),
                   ("step, ms, mean", of(["step_ms_mean"], "{:.2f}")),
                   ("token to token, ms: mean, p99", of(["token_ms_mean", "token_ms_p99"], "{:.2f}, {:.2f}")),
                   ("requests finished", of(["finished", "arrived"], "{:.0f} of {:.0f}")),
                   ("preemptions", of(["preemptions"], "{:.0f}"))]
        if any(run["figures"].get("energy_mj_per_token") is not None for run in runs):
            columns.append(("mJ per token", of(["energy_mj_per_token"])))
        parts += [f"{scenario}:", table(columns, runs)]
    return parts + [service_caption(service)]


def peers_block(results, peers):
    rows = {shape: decodes(results, peers, shape) for shape in results.shapes if shape in peers.shapes}
    if not rows:
        return []
    measured = [name for name in MEASURED_PEERS.values()
                if any(name in found and found[name].cold for found in rows.values())]
    names = measured + unique(name for shape in rows for name in peers.shapes[shape])
    def fastest(shape):
        stage, _ = results.fastest(shape)
        return f"{cold_and_sustained(rows[shape][stage])} ({short(stage)})"
    note = "µs, cold / sustained." + (f" Measured beside the stages: {', '.join(measured)}." if measured else "")
    return [table([SHAPE, ("fastest stage", fastest),
                   *each(names, str, lambda name, shape: cold_and_sustained(rows[shape][name]))], rows),
            " ".join(filter(None, [note, peer_caption(peers)]))]


def best_of_peers(peers, shape, mode):
    """(µs, name, µs of the ladder's last rung in that run) of the fastest of the peers that were timed in one run with
    it; mode: 0 cold, 1 sustained."""
    rows = peers.shapes.get(shape, {})
    again = rows.get(LAST_OF_THE_LADDER + SAME_RUN, [None, None])[mode]
    found = [(times[mode], name, again) for name, times in rows.items()
             if again and times[mode] and name in peers.same_run and not name.endswith(SAME_RUN)]
    return min(found) if found else None


def over_auto(later, peers, shape, mode):
    """The best peer's time over the chooser's, by way of the ladder's last rung, which was timed beside both: so it does
    not matter that cards differ."""
    column = ["cold", "sustained"][mode]
    own, base = (later.measured(stage, shape, column) for stage in (CHOOSER, LAST_OF_THE_LADDER))
    best = best_of_peers(peers, shape, mode)
    return best[0] / best[2] * median(base) / median(own) if own and base and best else None


def later_block(later, peers):
    """Every rung of the recording with the latest ones, beside the chooser and the best peer."""
    if not choices(later):
        return []
    stages = [*later.stages, *[CHOOSER] * any(later.entry(CHOOSER, shape) for shape in later.shapes)]
    def peer(mode, shape):
        best = best_of_peers(peers, shape, mode)
        return f"{us(best[0])} {best[1]}" if best else None
    def ratio(mode, shape):
        value = over_auto(later, peers, shape, mode)
        return f"{value:.3f}" if value else None
    parts = [caption(later),
             table([SHAPE, *each(stages, short, lambda stage, shape: cold_and_sustained(decode(later, stage, shape))),
                    ("best peer, cold", partial(peer, 0)), ("best peer, sustained", partial(peer, 1)),
                    ("peer / auto, cold", partial(ratio, 0)), ("sustained", partial(ratio, 1))], later.shapes),
             "µs, cold / sustained. Peers were timed in another run, which timed stage 08, too. A ratio is the peer's time over "
             "08's in that run, times 08's over auto's in this one."]
    groups = {}
    for shape in later.shapes:
        heads = parse_shape(shape).heads
        for title in ["all", "128 heads" if heads == 128 else "64 heads" if heads == 64 else "up to 32 heads"]:
            groups.setdefault(title, []).append(shape)
    def mean(mode, title):
        ratios = [value for shape in groups[title] if (value := over_auto(later, peers, shape, mode))]
        return f"{math.prod(ratios) ** (1 / len(ratios)):.3f} ({len(ratios)} shapes)" if ratios else None
    means = table([("best peer over auto, geometric mean", str), ("cold", partial(mean, 0)),
                   ("sustained", partial(mean, 1))], groups)
    return [*parts, means]


def quantised_block(quantised):
    """Each format beside 16 bits, by the fastest stage of each."""
    if quantised is None:
        return []
    plain = [shape for shape in quantised.shapes if not is_quantised(shape)]
    def best(format, shape):
        stage, entry = quantised.fastest(f"{shape}_{format}" if format else shape)
        return (stage, f"{shape}_{format}" if format else shape, entry) if entry else None
    def times(format, shape):
        one = best(format, shape)
        return f"{cold_and_sustained(decode(quantised, one[0], one[1]))} ({short(one[0])})" if one else None
    def ratio(format, shape):
        one, base = best(format, shape), best(None, shape)
        return f"{median(one[2]) / median(base[2]):.2f}" if one and base else None
    columns = [SHAPE, ("16 bits", partial(times, None))]
    for format in CACHE_FORMATS:
        columns += [(f"`{format}`", partial(times, format)), ("of 16 bits", partial(ratio, format))]
    return [caption(quantised), table(columns, plain),
            "µs, cold / sustained, of the fastest stage of the run. *Of 16 bits* is the ratio of cold times."]


def quantised_table(quantised, stage):
    """A stage that reads quantised caches alone, on all that it was timed on."""
    rows = [decode(quantised, stage, shape) for shape in quantised.shapes if quantised.entry(stage, shape)]
    (title, make), *others = DECODE
    others = [column for column in others if column[0] != "speed-up"]
    return table([("shape", lambda one: shape_title(one.shape)), (title, lambda one: one.why or make(one)), *others], rows)


def errors_table(errors):
    """What each cache format does to results: the study of mla_formats, where rotary columns are as large as others."""
    cases = sorted((case for case in errors.cases.values() if case["rotary"] == 1),
                   key=lambda case: (case["outliers"], case["deviation"], case["tokens"]))
    formats = [format for format in ("16bit", *CACHE_FORMATS) if all(format in case["formats"] for case in cases)]
    columns = [("tokens", lambda case: str(case["tokens"])), ("logits' deviation", lambda case: f"{case['deviation']:g}"),
               ("outlier columns", lambda case: str(case["outliers"]))]
    for what in ("out", "lse"):
        columns += [(f"{what}, `{format}`", lambda case, format=format, what=what: f"{error_of(case, format, what):.1e}")
                    for format in formats]
    return table(columns, cases)


def rotary_table(errors):
    """What rotary columns of 16 bits are worth, by how large they are and how peaked the softmax is."""
    cases = sorted((case for case in errors.cases.values() if case["tokens"] == plots.ERRORS_TOKENS and not case["outliers"]),
                   key=lambda case: (case["rotary"], case["deviation"]))
    formats = [("fp8_tile128", "bf16, `fp8_tile128`"), ("fp8_tile128_rotary_e4m3", "e4m3, a scale of their own"),
               ("fp8_tensor", "e4m3, `fp8_tensor`")]
    columns = [("rotary columns", lambda case: f"{case['rotary']:g}×"),
               ("logits' deviation", lambda case: f"{case['deviation']:g}")]
    for what in ("out", "lse"):
        columns += [(f"{what}: {title}", lambda case, format=format, what=what: f"{error_of(case, format, what):.1e}")
                    for format, title in formats]
    return table(columns, cases)


def host_time_block(python):
    """What calls of the Python package cost the host."""
    if python is None:
        return []
    context, shapes = python["context"], python["shapes"]
    columns = [("call", lambda name: name)]
    columns += each(shapes, shape_title, lambda shape, name: "{0:.1f} ({1:.1f})".format(*shapes[shape][name]))
    names = unique(name for calls in shapes.values() for name in calls)
    imports = "; ".join(f"{name} {ms:.0f} ms" for name, ms in python["import_ms"].items())
    packages = ", ".join(f"{title} {context[key]}" for title, key in [("Python", "python"), ("PyTorch", "torch"), ("CuPy", "cupy")]
                         if context.get(key))
    absent = "".join(f" Not timed: {name}, {why}." for name, why in python.get("absent", {}).items())
    return [table(columns, names),
            f"µs per call, medians, and the least: {context['protocol']}. In a new process: {imports}. {context['gpu']}, "
            f"driver {context['driver']}, {context['cpu']}, {packages}, commit {context['commit']}, "
            f"{context['date_utc'][:10]}.{absent}"]


SLOWEST_CHOICE = 1.03  # of the fastest stage's time; docs/choosing.md


def choices(results):
    """What the chooser came to, beside the fastest stage of the same run."""
    found = []
    for shape in results.shapes:
        auto, (stage, best) = decode(results, CHOOSER, shape), results.fastest(shape)
        if auto.cold and best:
            found.append(SimpleNamespace(shape=shape, auto=auto, stage=stage, best=decode(results, stage, shape),
                                         ratio=median(auto.cold) / median(best)))
    return found


def slow_choices(results):
    """Shapes on which the choice is too slow. With fixed splits the batch must not decide, so another stage may win."""
    return [f"{results.name}: {one.shape}: {CHOOSER} ({one.auto.cold.get('label', '')}) takes {us(median(one.auto.cold))} "
            f"µs, {one.stage} {us(median(one.best.cold))}: {one.ratio:.3f} times as long, at most {SLOWEST_CHOICE} is allowed"
            for one in choices(results) if one.ratio > SLOWEST_CHOICE and not parse_shape(one.shape).split]


def choice_block(results):
    found = choices(results)
    if not found:
        return []
    columns = [("shape", lambda one: shape_title(one.shape)), ("auto chose", lambda one: one.auto.cold.get("label", "")),
               ("µs, cold / sustained", lambda one: cold_and_sustained(one.auto)),
               ("fastest stage", lambda one: f"{cold_and_sustained(one.best)} ({short(one.stage)})"),
               ("auto / fastest", lambda one: f"{one.ratio:.3f}")]
    worst = max(found, key=lambda one: one.ratio)
    return [table(columns, found), f"By cold times. The worst: {worst.ratio:.3f}, {shape_title(worst.shape)}."]


def of_ceiling(results, entry, counter, ceiling, scale):
    """A rate as a share of the measured ceiling of its kind."""
    most = results.context.get(ceiling)
    return percent(entry[counter] / (scale * float(most))) if most and most != DASH else None


def geometric_mean(ratios):
    return math.prod(ratios) ** (1 / len(ratios)) if ratios else None


MOST_SEQUENCES_OF_THE_GRID = 16
LENGTHS_OF_THE_GRID = (512, 1024, 2048, 4096, 8192, 16384)


def texts_block(texts):
    """Suite texts: the configurations, uneven lists beside their padded partners, the grid."""
    if texts is None:
        return []
    def best(shape):
        return texts.measured(CHOOSER, shape) or texts.fastest(shape)[1]
    shapes = {shape: parse_shape(shape) for shape in texts.timed("texts") if best(shape)}
    def megabytes(name, shape):
        return significant(best(shape)[name] / 1e6)
    columns = [SHAPE, ("chosen", lambda shape: best(shape).get("label", "")),
               ("µs", lambda shape: us(median(best(shape)))), ("mean", lambda shape: us(best(shape)["mean_us"])),
               ("variance, µs²", lambda shape: significant(best(shape)["variance_us2"])),
               ("TFLOP/s", lambda shape: significant(best(shape)["TFLOPs"])),
               ("of the matrix peak", lambda shape: of_ceiling(texts, best(shape), "TFLOPs", "ceiling_matrix_cold_tflops", 1)),
               ("GB/s", lambda shape: significant(best(shape)["GBps"])),
               ("of the read peak", lambda shape: of_ceiling(texts, best(shape), "GBps", "ceiling_read_gbps", 1)),
               *each(["cache_bytes", "workspace_bytes", "peak_bytes"], lambda name: f"{name.split('_')[0]}, MB", megabytes)]
    configurations = [name for name, shape in shapes.items() if shape.batch > MOST_SEQUENCES_OF_THE_GRID]
    parts = [caption(texts), table(columns, configurations)]
    uneven = [name for name, shape in shapes.items() if shape.lengths or "+" in str(shape.tokens)]
    def padded(name):
        shape = shapes[name]
        return best(f"h{shape.heads}_q{shape.queries}_b{shape.batch}_k{int(best(name)['longest'])}")
    parts += ["Lists of lengths, and the same padded to the longest:",
              table([SHAPE, ("µs", lambda name: us(median(best(name)))), ("padded", lambda name: us(median(padded(name)) or None)),
                     ("padded / paged", lambda name: times_x(median(best(name)), median(padded(name)))),
                     ("cache, MB", partial(megabytes, "cache_bytes")),
                     ("padded", lambda name: significant(padded(name)["cache_bytes"] / 1e6))], uneven)]
    def cell(tokens, row, queries=1, rest=""):
        return median(best(f"h{row[0]}_q{queries}_b{row[1]}_k{tokens}{rest}") or None)
    grid = [shape for shape in shapes.values()
            if shape.batch <= MOST_SEQUENCES_OF_THE_GRID and not shape.lengths and shape.tokens in LENGTHS_OF_THE_GRID]
    rows = sorted(unique((shape.heads, shape.batch) for shape in grid), key=lambda row: (-row[0], row[1]))
    lengths = sorted(unique(shape.tokens for shape in grid))
    parts += ["The grid: bf16, one query token, cold µs, by tokens per sequence:",
              table([("heads", lambda row: f"{row[0]}"), ("sequences", lambda row: f"{row[1]}"),
                     *each(lengths, str, lambda tokens, row: us(cell(tokens, row)))], rows)]
    def ratio(queries, rest, heads):
        pairs = [(cell(tokens, row, queries, rest), cell(tokens, row)) for row in rows if row[0] == heads for tokens in lengths]
        mean = geometric_mean([one / base for one, base in pairs if one and base])
        return f"{mean:.3f}" if mean else None
    parts += ["The rest of the grid, as multiples of these times (geometric means):",
              table([("heads", str), ("fp16", partial(ratio, 1, "_fp16")), ("two query tokens, causal", partial(ratio, 2, "_causal")),
                     ("both", partial(ratio, 2, "_causal_fp16"))], unique(row[0] for row in rows))]
    return parts


def cross_block(cross):
    """Suite cross: by the chooser, or by the fastest stage where it was not asked."""
    if cross is None:
        return []
    def best(shape):
        return cross.measured(CHOOSER, shape) or cross.fastest(shape)[1]
    return [caption(cross), table(
        [SHAPE, ("chosen", lambda shape: best(shape).get("label", "")), ("µs", lambda shape: us(median(best(shape)))),
         ("TFLOP/s", lambda shape: significant(best(shape)["TFLOPs"])), ("floor", lambda shape: percent(best(shape)["floor_share"])),
         *each(["cache_bytes", "workspace_bytes", "peak_bytes"], lambda name: f"{name.split('_')[0]}, MB",
               lambda name, shape: significant(best(shape)[name] / 1e6)),
         ("rel. L2 error", lambda shape: f"{best(shape)['rel_l2']:.1e}")],
        [shape for shape in cross.timed("cross") if best(shape)])]


def steps_block(recording, number):
    """Cold times of the stage before, of the steps, and of the stage; of each after the first how it compares with the one
    above it."""
    if recording is None:
        return []
    steps = [step for step in recording.steps if step.startswith(f"step_{number}_")]
    rungs = [stage for stage in recording.stages if stage[:2] == f"{int(number) - 1:02}"] + steps + \
            [stage for stage in recording.stages if stage[:2] == number]
    shapes = [shape for shape in recording.shapes if any(recording.measured(step, shape) for step in steps)]
    def time(shape, rung):
        entry = recording.measured(rung, shape)
        above = rungs[rungs.index(rung) - 1] if rung != rungs[0] else None
        base = recording.measured(above, shape) if above else {}
        return f"{us(median(entry))}" + (f" ({median(entry) / median(base):.2f}×)" if base else "") if entry else None
    columns = [("kernel", lambda rung: short(rung) if rung in recording.stages else rung[len("step_05_"):].replace("_", " "))]
    return [table(columns + each(shapes, shape_title, time), rungs),
            f"Cold µs, and as a multiple of the row above. {caption(recording)}"]


def traditional_block(traditional, cross=False):
    """mla_traditional: each form by its setting; the CPU's beside the GPU's. `cross`: of cross-attention."""
    layers = {key: entry for key, entry in (traditional.layers if traditional else {}).items()
              if key[1].startswith("cross_") == cross}
    if not layers:
        return []
    def one(row, part=""):
        form, setting, machine = row
        return layers.get((form, setting, f"{machine}_{part}" if part else machine)) or {}
    def whole(row):
        return {} if why_not(one(row)) else one(row)
    def time_of(row, what):
        """`what`: real_time; or least_us, in whose place the CPU, of which no ceiling was measured, has its FLOP."""
        return whole(row).get("flop" if what == "least_us" and row[2] == "cpu" else what)
    def over(row, form, what):
        """How many times as long that form takes as this one."""
        return times_x(time_of(row, what), time_of((form, *row[1:]), what)) if row[0] != form else None
    def absorbed_over(row, what):
        return times_x(time_of(("absorbed", *row[1:]), what), time_of(row, what)) if row[0] != "absorbed" else None
    def part(name, row):
        return us(median(one(row, name) or None))
    def outside(row):
        times = {name: median(one(row, name)) for name in LAYER_PARTS if one(row, name)}
        return percent(1 - times["core"] / sum(times.values()))
    def megabytes(name, row):
        return significant(whole(row)[name] / 1e6)
    def what(row):
        return {"cold": "GPU", "cpu": "CPU"}[row[2]]
    parts = [f"{traditional.context.get('gpu')}, driver {traditional.context.get('driver')}; the CPU with {traditional.context['cpu']}; "
             f"commit {traditional.context['commit']}, {traditional.context['date_utc'][:10]}."]
    for setting in unique(key[1] for key in layers):
        rows = [(form, setting, machine) for machine in ("cold", "cpu") for form in LAYER_FORMS if whole((form, setting, machine))]
        if not rows:
            continue
        parts += [f"`{setting}`:", table(
            [("form", lambda row: LAYER_FORMS[row[0]]), ("on", what), ("µs", lambda row: us(median(whole(row)))),
             ("over multi-head: predicted", lambda row: over(row, "multi_head", "least_us")),
             ("measured", lambda row: over(row, "multi_head", "real_time")),
             ("absorbed over it: predicted", lambda row: absorbed_over(row, "least_us")),
             ("measured", lambda row: absorbed_over(row, "real_time")),
             *each(LAYER_PARTS, str, part), ("not core", outside),
             ("core µs per head", lambda row: us(one(row, "core")["real_time"] / whole(row)["core_heads"])),
             *each(["weight_bytes", "cache_bytes", "activation_bytes", "score_bytes"],
                   lambda name: f"{name.split('_')[0]}, MB", megabytes),
             ("rel. L2 error", lambda row: f"{whole(row)['rel_l2']:.1e}")], rows)]
    return parts


def block(name, root, results, later, peers):
    """The parts of a block of docs/results.md or docs/cross_attention.md."""
    if name.startswith("suite-"):
        return suite_block(results, peers, name.removeprefix("suite-"))
    known = {"run": lambda: [caption(results)],
             "varlen": lambda: varlen_block(results, load_cache(root, results)),
             "combine-and-plan": lambda: combine_and_plan_block(results),
             "numerics": lambda: numerics_block(results),
             "resources": lambda: resources_block(results),
             "cache": lambda: cache_block(results, load_cache(root, results)),
             "service": lambda: service_block(load_service(root, results)),
             "service-requests": lambda: service_block(load_service(root, results, kind="requests")),
             "service-formats": lambda: service_formats_block(load_service(root, results, formats=True)),
             "later": lambda: later_block(later, peers),
             "choice": lambda: choice_block(later),
             "quantised": lambda: quantised_block(load_quantised(root, results)),
             "texts": lambda: texts_block(load_texts(root, results)),
             "traditional": lambda: traditional_block(load_traditional(root, results)),
             "cross": lambda: cross_block(load_cross(root, results)),
             "traditional-cross": lambda: traditional_block(load_traditional(root, results), cross=True),
             "peers": lambda: peers_block(results, peers)}
    if name not in known:
        raise Error(f"no block of docs/results.md or docs/cross_attention.md is named '{name}'")
    return known[name]()


def by_ncu(context):
    """On which GPU, by which programs and when counters were read."""
    get = context.get
    return (f"{get('gpu')}, driver {get('driver')}, ncu {get('ncu').split(' (')[0].removeprefix('Version ')}, commit "
            f"{get('commit')}, {get('date')}")


def has_block(page, name):
    """Whether a page, which may not be there, has a place for a block."""
    return page.exists() and f"<!-- {name}:begin -->" in page.read_text(encoding="utf-8")


def comparison(model, gpu):
    """The counters of the model beside those of a GPU."""
    if model is None or gpu is None:
        return NOT_RECORDED
    pairs = counters.compare(model, gpu)
    close = sum(counters.within(of_model, of_gpu) for *_, of_model, of_gpu, _ in pairs)
    parts = [f"{close} of {len(pairs)} counters are within 2%. {by_ncu(gpu['context'])}; the model at commit {model['context']['commit']}."]
    for shape in unique(shape for _, shape, *_ in pairs):
        one = {**model, "runs": [run for run in model["runs"] if run["shape"] == shape]}
        parts += [f"`{shape}`:", counters.comparison_table(one, gpu)]
    return written(parts, markdown)


def hardware(root, results, make):
    """A table of how busy each part of a GPU was, by ncu."""
    recorded = counters.load_hardware(root)
    if recorded is None:
        return NOT_RECORDED
    def limit(stage, shape):
        for one in filter(None, (results, load_later(root, results), load_quantised(root, results))):
            if one.measured(stage, shape):
                return own_limit(one.measured(stage, shape))
        return DASH
    lacks = recorded["context"].get("not_known_to_ncu")
    shapes = unique(run["shape"] for run in recorded["runs"])
    return written([f"{by_ncu(recorded['context'])}; {', '.join(f'`{shape}`' for shape in shapes)}." +
                    (f" This ncu does not know {', '.join(lacks)}." if lacks else ""),
                    make(recorded, limit)], markdown)


def stalls_block(recorded, of):
    """What warps wait for: of all stages side by side, or of one, with the lines where they do."""
    if recorded is None:
        return NOT_RECORDED
    def shape_of(run):
        return run["shape"].removesuffix(counters.QUANTISED)
    chosen = [run for run in recorded["runs"] if of in ("", run["stage"])]
    parts = [f"{by_ncu(recorded['context'])}."]
    for shape in unique(map(shape_of, chosen)):
        runs = [run for run in chosen if shape_of(run) == shape]
        parts += [f"`{shape}`:", stalls.states_table(runs)]
        if of:
            parts.append(stalls.lines_table(runs[0]))
    return written(parts, markdown)


# Recordings that a page speaks of before they are there: what, and whether a file is it.
WANTED = [
    ("suite `texts`", lambda data: "texts" in suites_of(data)),
    ("suite `cross`", lambda data: "cross" in suites_of(data)),
    ("forms of attention on a GPU", lambda data: data["context"].get("schema") == TRADITIONAL_SCHEMA),
    ("counters of the hardware", lambda data: is_hardware(data)),
    ("a service with the latency of requests, power and cost", lambda data: any(
        "request_ms_mean" in run.get("figures", {}) for run in data.get("runs", []))),
    ("any of it on an H100", lambda data: "H100" in str(data["context"].get("gpu"))),
]


def suites_of(data):
    """Suites of which most shapes were timed: any of them may be in another suite, too."""
    one = Results(data, "")
    names = [key.removeprefix("suite_") for key in one.context if key.startswith("suite_")]
    return [name for name in names if 2 * len(one.timed(name)) > len(one.suite(name))]


def is_hardware(data):
    return any("metrics" in kernel and counters.SHARES[0][1] in kernel["metrics"] for run in data.get("runs", [])
               if isinstance(run.get("kernels"), dict) for kernel in run["kernels"].values())


def what_is_recorded(data):
    """'suites main, table; stages 01 to 08'"""
    context = data["context"]
    schema = context.get("schema") or data.get("schema", "")
    if schema == SCHEMA:
        one = Results(data, "")
        suites, stages = suites_of(data), [short(stage) for stage in one.stages]
        who = f"stages {', '.join(stages)}" if stages else CHOOSER if suites else "the paged cache"
        numbers = unique(step.split("_")[1] for step in one.steps)
        who += f", and steps to {', '.join(numbers)}" if numbers else ""
        return who + (f"; suites {', '.join(suites)}" if suites else "")
    if schema == STALLS_SCHEMA:
        return "where warps wait"
    if schema == SERVICE_SCHEMA:
        return "service: " + ", ".join(unique(run["scenario"] for run in data["runs"]))
    if schema == COUNTERS_SCHEMA:
        return "counters " + ("of the hardware" if is_hardware(data) else f"on the {context['machine']}".replace("gpu", "GPU"))
    if schema == PARALLEL_SCHEMA:
        shared = [str(one["ranks"]) for one in data.get("conformance", []) if "gpus" in one]
        return f"{', '.join(shared)} ranks that share GPUs" if shared else "several GPUs"
    if schema == TRADITIONAL_SCHEMA:
        return "forms of attention: " + ", ".join(unique(key[1].split("_")[0] for key in layers_of(data)))
    return {PEERS_SCHEMA: "peers", ERRORS_SCHEMA: "errors of cache formats", PYTHON_SCHEMA: "calls from Python",
            SCALE_SCHEMA: "the model of scale"}.get(schema, schema)


def recordings_block(root):
    """Every file of bench/results, and what is yet to be recorded."""
    found = [(path.name, {"context": {}, **read_json(path)}) for path in sorted((root / "bench" / "results").glob("*.json"))]
    def context(name, how=str):
        return lambda one: how(one[1]["context"][name])
    columns = [("file", lambda one: f"`{one[0]}`"), ("what", lambda one: what_is_recorded(one[1])), ("GPU", context("gpu")),
               ("commit", context("commit")),
               ("date", lambda one: str(one[1]["context"].get("date_utc") or one[1]["context"]["date"])[:10]),
               ("took", context("wall_s", lambda seconds: f"{float(seconds):.0f} s"))]
    missing = [what for what, is_it in WANTED if not any(is_it(data) for _, data in found)]
    return [table(columns, found)] + ([f"Not recorded yet: {'; '.join(missing)}."] if missing else [])


# ---- texts between markers, and figures ----

def texts(root, results):
    """What should be between the markers: [(path, begin, end, text)]."""
    peers = load_peers(root, results)
    note = ("Medians; a result is checked against the fp64 reference before it is timed. Cold: other data went through "
            "the L2 before each run; sustained: back to back after 0.2 s (from stage 05 on 1.2 s) of the same work. The "
            "other columns are for cold runs.")
    if results.plans:
        note += " A stage's plan is made before, outside these times."
    described = "\n\n".join(filter(None, [caption(results), peer_caption(peers)]))
    wanted = [(root / "README.md", "results", f"{markdown(readme_table(results, peers))}\n\n{note} {described}")]
    later = load_later(root, results)
    for stage in unique([*results.stages, *later.stages]):
        run = results if stage in results.stages else later
        wanted.append((root / "stages" / stage / "README.md", "measurement",
                       f"{markdown(chapter_table(run, stage))}\n\n{note} {caption(run)}"))
    quantised = load_quantised(root, results)
    estimated = estimates.load(root)
    for stage, shapes in estimates.tables(root).items():
        run = next((one for one in (results, later, quantised) if one and stage in one.stages), results)
        wanted.append((root / "stages" / stage / "README.md", f"predicted {' '.join(shapes)}",
                       markdown(predicted_table(run, estimated, stage, shapes))))
    for stage in results.stages:
        page = root / "stages" / stage / "README.md"
        marker = re.search(r"<!-- (bounds ([\w.+ -]+?)):begin -->", page.read_text(encoding="utf-8") if page.exists() else "")
        if marker:
            wanted.append((page, marker[1], markdown(bounds_table(results, stage, marker[2].split()))))
    on_cpu = root / "stages" / ON_CPU / "README.md"
    if on_cpu.exists() and ON_CPU not in results.stages:
        wanted.append((on_cpu, "measurement",
                       f"{markdown(reference_table(results))}\n\nThe truth, in fp64 on {cores(results)} of the machine with "
                       f"this GPU; wall time of one run. {caption(results)}"))
    for stage in unique(quantised.stages if quantised else []):
        if stage not in results.stages and stage not in later.stages:
            wanted.append((root / "stages" / stage / "README.md", "measurement",
                           f"{markdown(quantised_table(quantised, stage))}\n\n{note} {caption(quantised)}"))
    for page in sorted(root.glob("stages/[0-9][0-9]_*/steps/README.md")):
        number = page.parent.parent.name[:2]
        parts = steps_block(load_steps(root, results, number), number)
        wanted.append((page, "times", written(parts, markdown) or NOT_RECORDED))
    page = root / "docs" / "python.md"
    if page.exists():
        wanted.append((page, "host-time", written(host_time_block(load_python(root, results)), markdown) or NOT_RECORDED))
    page = root / "docs" / "course" / "ridge.md"
    if page.exists():
        wanted += [(page, "intensity", markdown(table(ridge.intensity_columns(), ridge.ROWS))),
                   (page, "cards", markdown(table(ridge.card_columns(), ridge.cards(results))))]
    errors = load_errors(root)
    if errors:
        page = root / "docs" / "quantisation.md"
        wanted += [(page, "errors", markdown(errors_table(errors))), (page, "rotary", markdown(rotary_table(errors)))]
    model, gpu = counters.load_both(root)
    for stage in unique(run["stage"] for run in model["runs"]) if model else []:
        path = root / "stages" / stage / "README.md"
        if has_block(path, "counters"):
            wanted.append((path, "counters", markdown(counters.stage_table(model, stage)) +
                           f"\n\nCounted on the model, commit {model['context']['commit']}: "
                           f"`mla_run profile --stage {stage[:2]} --shape {counters.SHAPES[0]}`."))
    recorded = counters.load_stalls(root)
    for stage in unique(run["stage"] for run in recorded["runs"]) if recorded else []:
        path = root / "stages" / stage / "README.md"
        if has_block(path, "stalls"):
            wanted.append((path, "stalls", stalls_block(recorded, stage)))
    page = root / "docs" / "counters.md"
    if page.exists():
        wanted += [(page, "stalls", stalls_block(recorded, "")), (page, "comparison", comparison(model, gpu)),
                   (page, "hardware", hardware(root, results, counters.hardware_table)),
                   (page, "instructions", hardware(root, results, lambda one, _: counters.instructions_table(one)))]
    page = root / "docs" / "texts.md"
    if page.exists():
        wanted.append((page, "recordings", written(recordings_block(root), markdown)))
    page = root / "docs" / "parallel.md"
    for name in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text(encoding="utf-8")) if page.exists() else []:
        wanted.append((page, name, written(parallel.parts_of(name, root, table), markdown)))
    for page in [root / "docs" / "results.md", root / "docs" / "cross_attention.md"]:
        if not page.exists():
            continue
        for name in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text(encoding="utf-8")):
            parts = block(name, root, results, later, peers)
            if name == "varlen" and parts and "varlen" in plots.wanted(results):
                parts = [VARLEN_FIGURE, *parts]
            wanted.append((page, name, written(parts, markdown) or NOT_RECORDED))
    return [(path, f"<!-- {name}:begin -->", f"<!-- {name.split(' ')[0]}:end -->", text) for path, name, text in wanted]


# The one figure that is between markers: it is there only once its data are.
VARLEN_FIGURE = ("![Time of a paged decode and of one padded to the longest sequence, by distribution of lengths]"
                 "(figures/varlen.svg)")


def figures(root, results):
    """[(path, name, data, what they are drawn from)] of the figures of the pages that are there."""
    sources = [("results.md", results, plots.DATA), ("quantisation.md", load_errors(root), plots.ERRORS_DATA)]
    return [(root / "docs" / "figures" / f"{name}.svg", name, data, source)
            for page, source, of in sources if source and (root / "docs" / page).exists()
            for name, data in plots.wanted(source, of).items()]


def stale_figures(root, results):
    """Paths of figures that are missing or were drawn from something else."""
    return [path for path, _, data, source in figures(root, results)
            if not path.exists() or plots.stamp(source, data) not in path.read_text(encoding="utf-8")]


def draw(root, results):
    (root / "docs" / "figures").mkdir(parents=True, exist_ok=True)
    try:
        for path, name, data, source in figures(root, results):
            program.write_text(path, plots.draw(name, data, source))
            print(f"{path}: drawn")
    except ImportError as error:
        raise Error(f"--plots needs matplotlib (apt-get install python3-matplotlib): {error}") from None


def folded(page, path, text):
    """A table of shapes by what the page says of it, "<!-- shown: SHAPE, SHAPE -->": these first and in this order, the others
    folded. As it is if the page says nothing."""
    found = re.search(r"<!-- shown: (.*?) -->", page)
    if not found:
        return text
    table, _, rest = text.partition("\n\n")
    head, rows = table.split("\n")[:2], table.split("\n")[2:]
    wanted = [f"| {shape_title(shape)} |" for shape in found[1].split(", ")]
    by_title = {row[:row.index("|", 1) + 1]: row for row in rows}
    unknown = [title for title in wanted if title not in by_title]
    if unknown:
        raise Error(f"{path}: shows {unknown[0].strip('| ')}, which is not in its table")
    others = [row for title, row in by_title.items() if title not in wanted]
    if not others:
        return text
    return "\n".join([*head, *(by_title[title] for title in wanted), "", "<details>",
                      f"<summary>All other shapes: {len(others)}</summary>", "", *head, *others, "", "</details>", "", rest])


def update(root, results, write):
    """Brings the texts up to date (or only looks); the paths that were stale."""
    stale = []
    for path, begin, end, middle in texts(root, results):
        if not path.exists():
            if write:
                print(f"{path}: left out, because it is not there", file=sys.stderr)
            continue
        old = path.read_text(encoding="utf-8")
        if path.parent != root and begin not in old and end not in old:  # a chapter of the reader's own
            print(f"{path}: left out, because it has no '{begin}'", file=sys.stderr)
            continue
        head, found_begin, rest = old.partition(begin)
        _, found_end, tail = rest.partition(end)
        if not found_begin or not found_end:
            raise Error(f"{path}: there is no '{begin}' with '{end}' after it")
        if begin == "<!-- measurement:begin -->":
            middle = folded(old, path, middle)
        new = f"{head}{begin}\n{middle}\n{end}{tail}"
        if new == old:
            continue
        stale.append(path)
        if write:
            program.write_text(path, new)
    return stale


def main(arguments=None):
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ["table", "summary", "update", "check", "plots"]:
        what.add_argument("--" + name, action="store_true")
    parser.add_argument("--results", help="results file (default: the newest in bench/results)")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        results = load(options.results) if options.results else recorded(options.root)
        if results is None:
            print("no results are recorded in bench/results yet")
            return 0
        if options.plots:
            draw(options.root, results)
            return 0
        if options.update or options.check:
            stale = unique(update(options.root, results, write=options.update))
            for path in stale:
                print(f"{path}: " + ("updated" if options.update else "stale, run bench/report/report.py --update"))
            values, wrong = prose.update(options.root, results, write=options.update)
            if wrong:
                raise Error("\n".join(wrong))
            for value in values if options.check else []:
                print(value)
            old_figures = stale_figures(options.root, results)
            for path in old_figures:
                print(f"{path}: stale, run bench/report/report.py --plots")
            later = load_later(options.root, results)
            slow = unique(slow_choices(results) + slow_choices(later))
            for line in slow:
                print(line)
            return 1 if (stale or values or old_figures or slow) and options.check else 0
        peers = load_peers(options.root, results)
        print(f"{results.name}:\n{caption(results)}")
        if peer_caption(peers):
            print(peer_caption(peers))
        if options.summary:
            print("\n" + summary(results, peers))
            return 0
        for shape in results.shapes:
            print(f"\n{shape}: {shape_title(shape)}\n" + plain(side_by_side(results, peers, shape)))
        if results.plans:
            print("\nthe plans\n" + plain(plan_table(results)))
        names = ["varlen", "numerics", "resources"] + ["combine-and-plan"] * bool(results.of_mode("combine"))
        later = load_later(options.root, results)
        names += ["later"] * (later is not results) + ["choice"] * bool(choices(later))
        names += ["cache"] * bool(results.cache("wall") or not options.results)  # else they lie beside this file
        names += ["service", "service-requests", "texts", "traditional", "cross", "traditional-cross"] * (not options.results)
        for name in ["parallel-times", "parallel-scale"] * (not options.results):
            parts = parallel.parts_of(name, options.root, table)
            if parts != [NOT_RECORDED]:
                print(f"\n{name}\n\n" + written(parts, plain))
        for name in names:
            parts = block(name, options.root, results, later, peers)
            if parts:
                print(f"\n{name}\n\n" + written(parts, plain))
    except Error as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(program.run("report.py", main))
