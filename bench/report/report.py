#!/usr/bin/env python3
"""Tables and figures from recorded results: in the terminal, the README, every stage's chapter, docs/results.md.

  bench/report/report.py --table              the recorded results, every shape; then all other tables
  bench/report/report.py --summary            the README's table, in the terminal
  bench/report/report.py --update             write them between the markers of README.md, stages/NN_*/README.md and
                                       docs/results.md, and the figures of running text (prose.py says how)
  bench/report/report.py --plots              draw docs/figures (needs matplotlib)
  bench/report/report.py --check              fail if a text or a figure is stale

Results are what mla_bench wrote with --out; by default the newest in bench/results that has the README's shapes, of
the GPU that the texts speak of. bench/run.sh --record puts them there.
"""
import argparse
import re
import sys
from pathlib import Path

import prose
from recordings import (DASH, Error, MEASURED_PEERS, NOT_RECORDED, README_SHAPES, lengths_title, load, load_cache,
                     load_peers, load_service, median, padded_partner, parse_shape, percent, recorded, shape_title,
                     significant, unique, us, why_not)


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
    for (stage, name, _), entry in results.entries.items():
        if name == shape and stage not in MEASURED_PEERS and not why_not(entry) and "TFLOPs" in entry:
            return entry["TFLOPs"] * entry["real_time"] * 1e6
    return None


def rate(work, time):
    return significant(work / time / 1e6) if work and time else DASH


def caption(results):
    get = results.context.get
    if get("machine") != "gpu":
        return f"On the CPU model of a GPU: model time, not a GPU's. Commit {get('commit')}, {get('date_utc', '')[:10]}."
    text = (f"{get('gpu')}, driver {get('driver')} (CUDA {get('cuda_driver')}), nvcc {get('nvcc')}, "
            f"commit {get('commit')}, {get('date_utc', '')[:10]}.")
    if get("ceiling_read_gbps"):
        text += (f" Measured in the same run: "
                 f"read {get('ceiling_read_gbps')} GB/s, fp32 {get('ceiling_fp32_tflops')} TFLOP/s, cuBLAS bf16 "
                 f"{get('ceiling_matrix_cold_tflops', DASH)} TFLOP/s cold, "
                 f"{get('ceiling_matrix_sustained_tflops', DASH)} "
                 f"sustained, empty launch {get('ceiling_launch_us')} µs.")
    return text + (f" The whole run took {float(get('wall_s')) / 60:.0f} minutes." if get("wall_s") else "")


def peer_caption(peers):
    if not peers.shapes:
        return ""
    parts = []
    for data in peers.files:
        get = data["context"].get
        parts.append(f"{get('gpu')}, driver {get('driver')}, CUDA {get('cuda')}, {get('date')[:10]}")
        absent = data.get("absent") or get("absent") or {}
        if absent:
            parts[-1] += " (without " + ", ".join(f"{name}: {reason}" for name, reason in absent.items()) + ")"
    return "Other implementations, recorded: " + "; ".join(parts) + \
        (". Of two figures the later stands." if len(parts) > 1 else ".")


def side_by_side(results, peers, shape):
    """Header and rows: every stage on one shape, then its peers."""
    header = ["stage", "cold µs (p10–p90)", "sustained µs (p10–p90)", "TFLOP/s", "GB/s", "own limit", "floor",
              "speed-up", "rel. L2 error", "the one idea"]
    rows = []
    reference = results.measured("reference", shape, "wall")
    if reference:
        rows.append(["reference", us(median(reference)), DASH, significant(reference["TFLOPs"]),
                     significant(reference["GBps"]), DASH, DASH, DASH, DASH, reference.get("label", "")])
    for stage in [*results.stages, *MEASURED_PEERS]:
        cold = results.entry(stage, shape)
        if cold is None:
            continue
        name, last = (MEASURED_PEERS[stage], "measured") if stage in MEASURED_PEERS else (stage, cold.get("label", ""))
        if why_not(cold):
            rows.append([name] + [DASH] * 8 + [why_not(cold)])
            continue
        rows.append([name, *times_and_rates(results, stage, shape), last])
    work = flop(results, shape)
    for name, times in peers.shapes.get(shape, {}).items():
        rows.append([name, us(times[0]), us(times[1]), rate(work, times[0])] + [DASH] * 5 + ["recorded"])
    return header, rows


def times_and_rates(results, stage, shape):
    """What tables of one stage or one shape say of a stage on a shape."""
    cold, sustained = results.measured(stage, shape), results.measured(stage, shape, "sustained")
    return [median_and_spread(cold), "over 200 ms" if cold.get("once") else median_and_spread(sustained),
            significant(cold["TFLOPs"]), significant(cold["GBps"]), own_limit(cold), percent(cold.get("floor_share")),
            DASH if stage in MEASURED_PEERS else speedup(cold), f"{cold['rel_l2']:.1e}"]


def speedup(entry):
    return f"{significant(entry['speedup'], 2)}×" if "speedup" in entry else DASH


def readme_table(results, peers):
    """Header and rows: every stage on a few shapes, then its peers."""
    shapes = [shape for shape in README_SHAPES if shape in results.shapes]
    header = ["stage"]
    for shape in shapes:
        header += [shape_title(shape) + ": µs cold / sustained", "TFLOP/s", "own limit"]
    header.append("the one idea")
    rows = []
    for stage in [*results.stages, *MEASURED_PEERS]:
        row, idea = [MEASURED_PEERS.get(stage, stage)], ""
        for shape in shapes:
            cold, sustained = results.measured(stage, shape), results.measured(stage, shape, "sustained")
            row += [cold_and_sustained(cold, sustained)]
            row += [significant(cold["TFLOPs"]), own_limit(cold)] if cold else [DASH, DASH]
            idea = idea or (cold or {}).get("label", "")
        if stage not in MEASURED_PEERS:
            rows.append(row + [idea])
        elif any(results.measured(stage, shape) for shape in shapes):
            rows.append(row + ["measured"])
    for name in unique(name for shape in shapes for name in peers.shapes.get(shape, {})):
        row = [name]
        for shape in shapes:
            times = peers.shapes.get(shape, {}).get(name)
            work = flop(results, shape)
            row += [f"{us(times[0])} / {us(times[1])}", rate(work, times[0]), DASH] if times else [DASH] * 3
        rows.append(row + ["recorded"])
    return header, rows


def chapter_table(results, stage):
    """Header and rows: every shape of one stage, or those of suite table."""
    header = ["shape", "cold µs (p10–p90)", "sustained µs (p10–p90)", "TFLOP/s", "GB/s", "own limit", "floor",
              "speed-up", "rel. L2 error"]
    rows = []
    for shape in shapes_of(results, "table"):
        cold = results.entry(stage, shape)
        if cold is None:
            continue
        if why_not(cold):
            rows.append([shape_title(shape), why_not(cold)] + [DASH] * 7)
            continue
        rows.append([shape_title(shape), *times_and_rates(results, stage, shape)])
    return header, rows


def shapes_of(results, suite):
    """Shapes of a suite that have times. A file that does not know suites is one of suite table."""
    return [shape for shape in results.suite(suite) or [] if shape in results.shapes]


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


def short(stage):
    """'08' for 08_seesaw: a table of all stages is wide."""
    return MEASURED_PEERS.get(stage) or (stage.split("_")[0] if stage[:1].isdigit() else stage)


def times_x(a, b):
    """b as a multiple of a"""
    return f"{significant(b / a)}×" if a and b else DASH


def stages_with(results, shapes, mode="cold"):
    return [stage for stage in results.stages if any(results.entry(stage, shape, mode) for shape in shapes)]


def best_peer(results, peers, shape):
    """'118.4 / 132.6 FlashMLA': the one of least cold time."""
    found = [(times[0], times[1], name) for name, times in peers.shapes.get(shape, {}).items() if times[0]]
    for stage, name in MEASURED_PEERS.items():
        if results.measured(stage, shape):
            sustained = median(results.measured(stage, shape, "sustained"))
            found.append((median(results.measured(stage, shape)), sustained, name + ", measured"))
    if not found:
        return DASH
    cold, sustained, name = min(found, key=lambda one: one[0])
    return f"{us(cold)} / {us(sustained)} {name}"


# What the fastest stage makes of a suite's limit.
SUITE_RATES = {"compute": ("TFLOPs", "TFLOP/s"), "prefill": ("TFLOPs", "TFLOP/s"), "latency": ("GBps", "GB/s"),
               "bandwidth": ("GBps", "GB/s")}


def suite_block(results, peers, suite):
    shapes = shapes_of(results, suite)
    if not shapes:
        return []
    stages = stages_with(results, shapes)
    counter, unit = SUITE_RATES.get(suite, (None, None))
    rows = []
    for shape in shapes:
        row = [shape_title(shape)]
        for stage in stages:
            row.append(cold_and_sustained(results.measured(stage, shape), results.measured(stage, shape, "sustained")))
        fastest, entry = results.fastest(shape)
        if counter:
            row.append(significant(entry[counter]) if entry else DASH)
        row.append(f"{percent(entry.get('floor_share'))} ({short(fastest)})" if entry else DASH)
        rows.append(row + [best_peer(results, peers, shape)])
    left_out = []
    for stage in stages:
        reasons = [why_not(results.entry(stage, shape)) for shape in shapes
                   if results.entry(stage, shape) and why_not(results.entry(stage, shape))]
        if reasons:
            left_out.append(f"{short(stage)} on {len(reasons)} of {len(shapes)} ({unique(reasons)[0]})")
    note = f"µs, cold / sustained{f'; {unit} cold' if unit else ''}; a peer is recorded unless it says measured."
    note += f" No time: {'; '.join(left_out)}." if left_out else ""
    rate_of = [f"{unit} of the fastest"] * bool(unit)
    return [(["shape", *map(short, stages), *rate_of, "floor of the fastest", "best peer"], rows), note]


MEMORY_NAMES = {None: "memory_uniform", "lognormal": "memory_lognormal{}", "stepped": "memory_stepped",
                "skew": "memory_skewed"}


def varlen_pairs(results):
    """[(shape, its padded partner, tokens, longest)] of the shapes of unequal lengths in suite varlen."""
    found = []
    for name in shapes_of(results, "varlen"):
        shape, (_, entry) = parse_shape(name), results.fastest(name)
        if shape and shape.lengths and entry and "longest" in entry:
            found.append((name, padded_partner(name, entry["longest"]), entry["tokens"], entry["longest"]))
    return found


def gigabytes(count):
    return significant(count / 1e9)


def varlen_block(results, cache):
    pairs = varlen_pairs(results)
    if not pairs:
        return []
    stages = [stage for stage in stages_with(results, [pair[0] for pair in pairs]) if stage >= "03"]
    split = [stage for stage in stages if stage >= "04"]
    shown = unique([*split[:1], *split[-1:]])
    compared = stages + [peer for peer in MEASURED_PEERS if any(results.measured(peer, pair[0]) for pair in pairs)]
    times, ratios, sizes = [], [], []
    for name, partner, tokens, longest in pairs:
        def pair(stage):
            return median(results.measured(stage, name)), median(results.measured(stage, partner))
        shape, row = parse_shape(name), [shape_title(name), f"{int(tokens)}", f"{int(longest)}"]
        for stage in shown:
            row += [us(pair(stage)[0]), us(pair(stage)[1]), times_x(*pair(stage))]
        times.append(row)
        ratios.append([shape_title(name), *(times_x(*pair(stage)) for stage in compared)])
        key = MEMORY_NAMES.get(shape.lengths, "").format(shape.tokens)
        memory = cache.cache("bytes").get(key) if cache else None
        if memory:
            sizes.append((lengths_title(shape), gigabytes(memory["bytes_contiguous"]), gigabytes(memory["bytes_paged"]),
                          percent(memory["saved_share"])))
    header = ["lengths", "tokens", "longest"]
    for stage in shown:
        header += [f"{short(stage)} paged", f"{short(stage)} padded", "ratio"]
    note = "Padded over paged"
    note += "; the cuBLAS pipeline always pads to the block table's width:" if len(compared) > len(stages) else ":"
    parts = ["Cold µs, paged and padded to the longest:", (header, times),
             note, (["lengths", *map(short, compared)], ratios)]
    if sizes:
        parts += ["Memory of one layer's cache of such sequences:",
                  (["lengths", "GB contiguous", "GB paged", "saved"], unique(sizes))]
    return parts


def combine_and_plan_block(results):
    plans, combines = results.of_mode("plan"), results.of_mode("combine")
    planned = [shape for shape in results.suite("plan") or plans if shape in plans]
    planners = [stage for stage in results.stages if any(stage in plans[shape] for shape in planned)]
    parts = []
    if planners:
        parts += ["Plan alone, warm µs:", (["shape", *map(short, planners)],
                  [[shape_title(shape), *(us(median(plans[shape].get(stage))) for stage in planners)]
                   for shape in planned])]
    if not combines:
        return parts
    newest = max(stage for by_stage in combines.values() for stage in by_stage)
    rows = []
    for shape in [shape for shape in unique([*results.shapes, *combines]) if newest in combines.get(shape, {})]:
        entry, decode = combines[shape][newest], median(results.measured(newest, shape))
        rows.append([shape_title(shape), f"{entry['slots']:.0f}", us(median(entry)), us(entry["cold_us"]), us(decode),
                     percent(entry["cold_us"] / decode) if decode else DASH])
    return parts + [f"Combining alone, stage {newest}, µs; a slot is a partial result, the share is cold over cold:",
                    (["shape", "slots", "combine, warm", "combine, cold", "decode, cold", "share of the decode"], rows)]


def numerics_block(results):
    """Of the stages with fp32 arithmetic two, or one column where all agree; of those with tensor cores the first and
    the newest."""
    errors = results.of_mode("error")
    timed = results.of_mode("cold")  # a shape of two suites is timed, and its error is an entry's counter
    found = {shape: errors.get(shape) or timed.get(shape) for shape in results.suite("numerics") or errors}
    found = {shape: by_stage for shape, by_stage in found.items() if by_stage}
    stages = [stage for stage in results.stages if any(stage in by_stage for by_stage in found.values())]
    def written_error(shape, stage, counter="rel_l2"):
        return f"{found[shape][stage][counter]:.1e}" if stage in found[shape] else DASH
    fp32, matrix = [stage for stage in stages if stage < "05"], [stage for stage in stages if stage >= "05"]
    agree = len(fp32) > 1 and all(len({written_error(shape, stage) for stage in fp32}) == 1 for shape in found)
    columns = {f"{short(fp32[0])}–{short(fp32[-1])}": fp32[0]} if agree else \
        {short(stage): stage for stage in [one for one in fp32 if one[:2] in ("01", "03")] or fp32}
    columns.update({short(stage): stage for stage in unique([*matrix[:1], *matrix[-1:]])})
    columns.update({name: stage for stage, name in MEASURED_PEERS.items()
                    if any(stage in by_stage for by_stage in found.values())})
    newest = stages[-1] if stages else None
    rows = []
    for name in found:
        shape = parse_shape(name)
        heads = shape_title(name).split(f", {lengths_title(shape)}")[0] if shape else name
        row = ([heads, "fp16" if shape.fp16 else "bf16", lengths_title(shape), f"{shape.peak}" if shape.peak else "0.01",
                f"{shape.split}" if shape.split else DASH] if shape else [name] + [DASH] * 4)
        rows.append(row + [written_error(name, stage) for stage in columns.values()]
                    + [written_error(name, newest, "lse_max_abs")])
    header = ["heads", "type", "lengths", "logits' deviation", "split every", *columns, f"lse, {short(newest)}"] \
        if newest else []
    parts = []
    if rows:
        text = "Relative L2 error of `out`"
        if len({row[0] for row in rows}) == 1:
            text += f", {rows[0][0]}"
            header, rows = header[1:], [row[1:] for row in rows]
        text += f"; largest error of `lse` of stage {newest}."
        text += f" Stages {short(fp32[0])} to {short(fp32[-1])} agree to two digits in every row." if agree else ""
        parts = [text, (header, rows)]
    failed = [f"{short(stage)} on {shape_title(shape)} ({why_not(entry)})"
              for (stage, shape, mode), entry in results.entries.items() if mode == "error" and why_not(entry)]
    return parts + [f"No figure: {'; '.join(failed)}."] * bool(failed)


def resources_block(results):
    parts = []
    for name in shapes_of(results, "resources"):
        shape, rows = parse_shape(name), []
        for stage in [*results.stages, *MEASURED_PEERS]:
            sustained = results.measured(stage, name, "sustained")
            if sustained is None:
                continue
            energy, clock = sustained.get("energy_mj"), sustained.get("sm_mhz")
            rows.append([MEASURED_PEERS.get(stage, stage), significant(sustained.get("power_w")),
                         f"{clock / 1000:.2f}" if clock else DASH, us(median(sustained)), significant(energy),
                         significant(energy / (shape.batch * shape.queries) if energy and shape else None)])
        if rows:
            parts += [f"{shape_title(name)}:",
                      (["stage", "W", "SM GHz", "µs sustained", "mJ a run", "mJ a query token"], rows)]
    return parts + ["Of the sustained runs; a run is one layer."] if parts else []


def cache_block(results, cache):
    if cache is None:
        return []
    wall, memory = cache.cache("wall"), cache.cache("bytes")
    nanoseconds = [[name.replace("host_", "", 1), f"{significant(one['ns'])} ({significant(one['p10_ns'])}–"
                    f"{significant(one['p90_ns'])})", significant(one["per_second"] / 1e6), one.get("label", "")]
                   for name, one in wall.items()]
    modes = {mode: cache.cache(mode) for mode in ["cold", "sustained", "returned", "all"]}
    appends = []
    for name in unique(name for found in modes.values() for name in found):
        match, cold = re.fullmatch(r"append_b(\d+)_t(\d+)", name), modes["cold"].get(name)
        appends.append(["{} × {}".format(*match.groups()) if match else name,
                        *(median_and_spread(modes[mode].get(name)) for mode in ["cold", "sustained"]),
                        significant(cold["GBps"] if cold else None),
                        *(median_and_spread(modes[mode].get(name)) for mode in ["returned", "all"])])
    sizes = [[name.replace("memory_", "", 1), f"{one['tokens']:.0f}", gigabytes(one["bytes_contiguous"]),
              gigabytes(one["bytes_paged"]), significant(one["bytes_block_table"] / 1e6),
              percent(max(0, one["saved_share"])), percent(one["fragmentation"]), one.get("label", "")]
             for name, one in memory.items()]
    parts = []
    for title, header, rows in [
            ("Bookkeeping on the host:", ["operation", "ns (p10–p90)", "million a second", "of"], nanoseconds),
            ("Append, sequences × new tokens, µs:", ["append", "kernel, cold (p10–p90)", "kernel, sustained (p10–p90)",
             "GB/s, cold", "call returns (p10–p90)", "with the device's work (p10–p90)"], appends),
            ("Memory of one layer against one contiguous buffer a sequence:", ["lengths", "tokens", "GB contiguous",
             "GB paged", "MB block table", "saved", "fragmentation", "of"], sizes)]:
        parts += [title, (header, rows)] if rows else []
    return parts + [caption(cache)] * (cache is not results)


SERVICE_ROWS = [  # title, figures, how to write them: None is three digits
    ("requests finished / arrived", ["finished", "arrived"], "{:.0f} / {:.0f}"),
    ("rejected; queued, running at the end", ["rejected", "queued", "running"], "{:.0f}; {:.0f}, {:.0f}"),
    ("tokens a second", ["tokens_per_s"], None),
    ("sequences in a step, mean", ["batch_mean"], "{:.1f}"),
    ("a step, ms: mean, p50, p99", ["step_ms_mean", "step_ms_p50", "step_ms_p99"], "{:.2f}, {:.2f}, {:.2f}"),
    ("a token, ms: mean, p50, p99", ["token_ms_mean", "token_ms_p50", "token_ms_p99"], "{:.2f}, {:.2f}, {:.2f}"),
    ("first token, ms: p50, p99", ["first_token_ms_p50", "first_token_ms_p99"], "{:.1f}, {:.1f}"),
    ("queue: mean, longest", ["queue_mean", "queue_max"], "{:.1f}, {:.0f}"),
    ("pages in use: mean, peak, of", ["pages_mean", "pages_peak", "pages_total"], "{:.0f}, {:.0f}, {:.0f}"),
    ("cache GB; held rows wasted", ["cache_gb", "waste_share"], "{:.1f}; {:.1%}"),
    ("preemptions", ["preemptions"], "{:.0f}"),
    ("span s; steps", ["span_s", "steps"], "{:.1f}; {:.0f}"),
]


def service_cell(figures, names, how):
    values = [figures[name] for name in names]
    return DASH if None in values else how.format(*values) if how else ", ".join(map(significant, values))


def service_summary(runs, scenarios):
    """Header and rows: paged against static, a row a scenario."""
    rows = []
    for scenario in scenarios:
        paged, static = ([run["figures"] for run in runs if (run["scenario"], run["way"]) == (scenario, way)][-1:]
                         for way in ("paged", "static"))
        def both(names, how):
            return " / ".join(service_cell(one[0], names, how) if one else DASH for one in (paged, static))
        ratio = times_x(static[0]["tokens_per_s"], paged[0]["tokens_per_s"]) if paged and static else DASH
        rows.append([scenario, both(["tokens_per_s"], None), ratio, both(["token_ms_mean"], "{:.2f}"),
                     both(["token_ms_p99"], "{:.2f}"), both(["waste_share"], "{:.1%}"),
                     both(["finished", "arrived"], "{:.0f} of {:.0f}")])
    return ["scenario", "tokens a second", "ratio", "a token, ms, mean", "a token, ms, p99", "held rows wasted",
            "requests finished"], rows


def service_block(service):
    if service is None:
        return []
    every = sorted(service["runs"], key=lambda run: (run["way"], run["stage"]))
    stages = {way: ", ".join(unique(run["stage"] for run in every if run["way"] == way)) for way in ("paged", "static")}
    scenarios = unique(run["scenario"] for run in service["runs"])
    parts = [f"Paged ({stages['paged'] or DASH}) / static ({stages['static'] or DASH}):",
             service_summary(every, scenarios)]
    for scenario in scenarios:
        runs = [run for run in every if run["scenario"] == scenario]
        rows = [[title, *(service_cell(run["figures"], names, how) for run in runs)]
                for title, names, how in SERVICE_ROWS]
        reasons = [", ".join(f"{reason} {count}" for reason, count in run["rejected_by_reason"].items() if count > 0)
                   for run in runs]
        if any(reasons):
            rows.insert(2, ["why rejected", *(reason or DASH for reason in reasons)])
        header = [" ", *(f"{run['way']}, {run['stage']}, {run['layers']} layers" for run in runs)]
        parts += [f"{scenario}:", (header, rows)]
    get = service["context"].get
    where = (f"{get('gpu')}, driver {get('driver')}" if get("machine") == "gpu" else "On the CPU model of a GPU")
    clock = ("wall time with the GPU's kernels (a step lasts from its first launch to the end of its synchronize)"
             if get("clock") == "gpu" else "on a simulated clock")
    return parts + [f"{where}, {clock}, nvcc {get('nvcc')}, commit {get('commit')}, {get('date_utc')[:10]}."]


def peers_block(results, peers):
    shapes = [shape for shape in results.shapes if shape in peers.shapes]
    names = unique(name for shape in shapes for name in peers.shapes.get(shape, {}))
    measured = [stage for stage in MEASURED_PEERS if any(results.measured(stage, shape) for shape in shapes)]
    rows = []
    for shape in shapes:
        stage, cold = results.fastest(shape)
        row = [shape_title(shape)]
        row.append(f"{cold_and_sustained(cold, results.measured(stage, shape, 'sustained'))} ({short(stage)})"
                   if stage else DASH)
        row += [cold_and_sustained(results.measured(peer, shape), results.measured(peer, shape, "sustained"))
                for peer in measured]
        for name in names:
            times = peers.shapes.get(shape, {}).get(name)
            row.append(f"{us(times[0])} / {us(times[1])}" if times else DASH)
        rows.append(row)
    if not rows:
        return []
    note = "µs, cold / sustained."
    if measured:
        note += f" Measured beside the stages: {', '.join(MEASURED_PEERS[stage] for stage in measured)}."
    return [(["shape", "fastest stage", *(MEASURED_PEERS[stage] for stage in measured), *names], rows),
            " ".join(filter(None, [note, peer_caption(peers)]))]


def block(name, root, results, peers):
    """The parts of a block of docs/results.md, each a text or a table; none if nothing of it is recorded."""
    if name.startswith("suite-"):
        return suite_block(results, peers, name.removeprefix("suite-"))
    if name == "run":
        return [caption(results)]
    if name == "varlen":
        return varlen_block(results, load_cache(root, results))
    if name == "cache":
        return cache_block(results, load_cache(root, results))
    if name == "service":
        return service_block(load_service(root, results))
    if name == "peers":
        return peers_block(results, peers)
    known = {"combine-and-plan": combine_and_plan_block, "numerics": numerics_block, "resources": resources_block}
    if name not in known:
        raise Error(f"docs/results.md: no block is named '{name}'")
    return known[name](results)


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


def written(parts, table):
    """Parts of a block as one text; `table` is markdown or plain."""
    return "\n\n".join(part if isinstance(part, str) else table(part) for part in parts)


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
    page = root / "docs" / "results.md"
    if page.exists():
        for name in re.findall(r"<!-- ([\w-]+):begin -->", page.read_text(encoding="utf-8")):
            parts = block(name, root, results, peers)
            if name == "varlen" and parts and "varlen" in figures(results):
                parts = [VARLEN_FIGURE, *parts]
            wanted.append((page, name, written(parts, markdown) or NOT_RECORDED))
    return [(path, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", text) for path, name, text in wanted]


# The one figure that stands between markers: it is there only once its data are.
VARLEN_FIGURE = ("![Time of a paged decode and of one padded to the longest sequence, by distribution of lengths]"
                 "(figures/varlen.svg)")


def figures(results):
    """{name: what it shows} of the figures that these results can fill."""
    import plots  # the figures belong to docs/results.md; where that is not, neither need plots.py be
    return plots.wanted(results)


def stale_figures(root, results):
    """Paths of figures that are missing or were drawn from something else."""
    if not (root / "docs" / "results.md").exists():
        return []
    import plots
    stale = []
    for name, data in figures(results).items():
        path = root / "docs" / "figures" / f"{name}.svg"
        if not path.exists() or plots.stamp(results, data) not in path.read_text(encoding="utf-8"):
            stale.append(path)
    return stale


def draw(root, results):
    import plots
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, data in figures(results).items():
            (folder / f"{name}.svg").write_text(plots.draw(name, data, results), encoding="utf-8")
            print(f"{folder / name}.svg: drawn")
    except ImportError as error:
        raise Error(f"--plots needs matplotlib (apt-get install python3-matplotlib): {error}") from None


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
            return 1 if (stale or values or old_figures) and options.check else 0
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
        names += ["cache"] * bool(results.cache("wall") or not options.results)  # else they lie beside this file
        names += ["service"] * (not options.results)
        for name in names:
            parts = block(name, options.root, results, peers)
            if parts:
                print(f"\n{name}\n\n" + written(parts, plain))
    except Error as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
