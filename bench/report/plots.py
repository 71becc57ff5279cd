"""The figures of docs/results.md, from a results file, and of docs/quantisation.md, from the study of cache formats:
bench/report/report.py --plots draws them.

What a figure shows is worked out without matplotlib, so that `--check` can tell a stale one: each SVG holds the name of
its results file and a hash of these data. Text stays text; every colour is a CSS variable with a value for light pages
and one for dark.
"""
import hashlib
import io
import json
import re
from math import atan2, degrees, log, log10

from recordings import error_of, floor_us, parse_shape, shape_title, short, us, varlen_pairs

# name: light, dark. Stages: Okabe and Ito's palette, which the colour-blind can tell apart, its yellow left out.
COLOURS = {
    "paper": ("#ffffff", "#111418"), "ink": ("#222222", "#dddddd"), "faint": ("#d9d9d9", "#3a3f45"),
    "mid": ("#767676", "#9a9fa5"),
    "s1": ("#8c8c8c", "#8b8b8b"), "s2": ("#56b4e9", "#a6dcff"), "s3": ("#009e73", "#2bc79a"),
    "s4": ("#e69f00", "#f0b53a"), "s5": ("#cc79a7", "#e3a0c6"), "s6": ("#0072b2", "#4da3e0"),
    "s7": ("#d55e00", "#ff8a3d"), "s8": ("#1a1a1a", "#f4f4f4"), "s10": ("#7a4fb5", "#b794f0"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
MARKERS = dict(zip(("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s10"), "os^Dv<>Ph"))
LADDER_SHAPES = ["h128_q1_b128_k8192", "h128_q1_b64_k4096", "h16_q1_b64_k4096", "h128_q1_b1_k4096"]
# The formats of the study, lightest first; a page shows these alone.
FORMATS = {"16bit": "s1", "int8_tile128": "s3", "fp8_tile128": "s6", "fp8_tensor": "s7"}
FORMAT_MARKERS = dict(zip(FORMATS, "oD^s"))
ERRORS_DEVIATIONS = [1, 16]  # a panel for each
ERRORS_TOKENS = 8192
ROOFLINE_SHAPES = ["h16_q1_b128_k8192", "h32_q1_b128_k8192", "h64_q1_b128_k8192", "h128_q1_b128_k8192"]


# ---- what each figure shows; None if the results lack it ----

def time_of(results, stage, shape, mode="cold"):
    entry = results.measured(stage, shape, mode)
    return rounded(entry["real_time"]) if entry else None


def rounded(value):
    """Six digits: what a hash is made of must not hang on the last bit."""
    return None if value is None else float(f"{value:.6g}")


def floor_of(results, shape):
    return rounded(floor_us(results.fastest(shape)[1]))


def series(results, shapes):
    """{stage: its cold time for each shape}, without stages that have none."""
    found = {stage: [time_of(results, stage, shape) for shape in shapes] for stage in results.stages}
    return {stage: times for stage, times in found.items() if any(times)}


def ladder(results):
    shapes = [shape for shape in LADDER_SHAPES if shape in results.shapes]
    if not shapes or len(results.stages) < 2:
        return None
    return {"shapes": shapes, "times": series(results, shapes), "floors": [floor_of(results, shape) for shape in shapes]}


def roofline(results):
    context = results.context
    ceilings = {name: float(context[key]) for name, key in [
        ("read", "ceiling_read_gbps"), ("fp32", "ceiling_fp32_tflops"), ("matrix", "ceiling_matrix_cold_tflops")]
        if context.get(key)}
    columns = []
    for shape in ROOFLINE_SHAPES:
        entries = {stage: results.measured(stage, shape) for stage in results.stages}
        dots = {stage: rounded(entry["TFLOPs"]) for stage, entry in entries.items() if entry}
        if dots:
            _, entry = results.fastest(shape)
            columns.append({"shape": shape, "intensity": rounded(1e3 * entry["TFLOPs"] / entry["GBps"]), "dots": dots})
    return {"columns": columns, "ceilings": ceilings} if columns and {"read", "fp32"} <= set(ceilings) else None


def sweep(results, fixed, varied):
    """The panels of a figure over lengths or over batches: for 128 and for 16 heads what has three points or more.

    A family is all plain shapes that differ in `varied` alone; of several for the same `fixed` the larger one."""
    families = {}
    for name in results.shapes:
        shape = parse_shape(name)
        plain = shape and shape.queries == 1 and not (shape.kv_heads or shape.lengths or shape.causal or shape.split or
                                                      shape.peak or shape.cache or shape.fp16)
        if plain:
            families.setdefault((shape.heads, getattr(shape, fixed)), []).append((getattr(shape, varied), name))
    panels = []
    for heads in [128, 16]:
        found = {key: sorted(shapes) for key, shapes in families.items() if key[0] == heads and len(shapes) >= 3}
        for key in sorted(found, key=lambda key: (-len(found[key]), key))[:2 if varied == "tokens" else 1]:
            names = [name for _, name in found[key]]
            panels.append({"heads": heads, fixed: key[1], "x": [x for x, _ in found[key]],
                           "times": series(results, names), "floors": [floor_of(results, name) for name in names]})
    return {"panels": panels[:2]} if panels else None


def length(results):
    return sweep(results, "batch", "tokens")


def batch(results):
    return sweep(results, "tokens", "batch")


def cold_sustained(results):
    """Sustained over cold, of the stages that draw enough power for it to matter."""
    stages = [stage for stage in results.stages if "05" <= stage < "09"]
    table = results.suite("table") or results.shapes
    rows = []
    for shape in [shape for shape in results.shapes if shape in table]:
        pairs = {stage: [time_of(results, stage, shape, mode) for mode in ("cold", "sustained")] for stage in stages}
        ratios = {stage: rounded(b / a) for stage, (a, b) in pairs.items() if a and b}
        if ratios:
            rows.append({"shape": shape, "time": results.fastest(shape)[1]["real_time"], "ratios": ratios})
    rows = [{"shape": row["shape"], "ratios": row["ratios"]} for row in sorted(rows, key=lambda row: row["time"])]
    return {"rows": rows} if rows else None


def varlen(results):
    rows = []
    for name, partner, _, _ in varlen_pairs(results):
        stage = results.fastest(name)[0]
        if time_of(results, stage, partner):
            rows.append({"shape": name, "stage": stage, "paged": time_of(results, stage, name),
                         "padded": time_of(results, stage, partner)})
    return {"rows": rows} if rows else None


def error_panels(errors, varied, panels):
    """A panel for each title and what its cases have in common, if three cases or more do; in it a line for each format
    over what is varied."""
    found = []
    for title, fixed in panels.items():
        cases = sorted((case for case in errors.cases.values()
                        if all(case[key] == value for key, value in {"rotary": 1, **fixed}.items())),
                       key=lambda case: case[varied])
        if len(cases) >= 3:
            found.append({"title": title, "x": [case[varied] for case in cases],
                          "errors": {format: [rounded(100 * error_of(case, format)) for case in cases]
                                     for format in FORMATS if all(format in case["formats"] for case in cases)}})
    return {"panels": found} if found else None


def errors_length(errors):
    return error_panels(errors, "tokens", {f"logits' deviation {deviation}": {"deviation": deviation, "outliers": 0}
                                           for deviation in ERRORS_DEVIATIONS})


def errors_deviation(errors):
    many = max(case["outliers"] for case in errors.cases.values())
    return error_panels(errors, "deviation", {
        f"{ERRORS_TOKENS} tokens, {outliers or 'no'} outlier columns": {"tokens": ERRORS_TOKENS, "outliers": outliers}
        for outliers in (0, many)})


DATA = {"ladder": ladder, "roofline": roofline, "length": length, "batch": batch, "cold_sustained": cold_sustained,
        "varlen": varlen}


ERRORS_DATA = {"errors_length": errors_length, "errors_deviation": errors_deviation}


def wanted(results, of=DATA):
    """{name: data} of the figures that these results can fill; of=ERRORS_DATA: that the study of cache formats can."""
    found = {name: make(results) for name, make in of.items()}
    return {name: data for name, data in found.items() if data}


def stamp(results, data):
    """What an SVG holds so that a stale one is seen."""
    text = json.dumps(data, sort_keys=True)
    return f"drawn from {results.name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# ---- drawing ----

def name_of(stage):
    """'s8' for 08_seesaw: its name among colours and markers, if it has one."""
    return f"s{int(stage[:2])}" if stage[:2].isdigit() else None


def colour(stage):
    return LIGHT.get(name_of(stage), LIGHT["mid"])


def marker(stage):
    return MARKERS.get(name_of(stage), "x")


def canvas(width, height, panels=1, **options):
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    ink, faint = LIGHT["ink"], LIGHT["faint"]
    rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "figure", "font.size": 9, "font.family": "DejaVu Sans",
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": LIGHT["mid"], "xtick.color": LIGHT["mid"],
        "ytick.color": LIGHT["mid"], "xtick.labelcolor": ink, "ytick.labelcolor": ink, "axes.facecolor": LIGHT["paper"],
        "figure.facecolor": LIGHT["paper"], "grid.color": faint, "grid.linewidth": 0.6, "axes.grid": True,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4,
        "lines.markersize": 4.5, "path.simplify": False, "axes.titlesize": 9, "axes.titlelocation": "left",
    })
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, panels, squeeze=False, **options)[0]
    return figure, axes


def log_axis(axis, low, high):
    """A log axis from `low` to `high` with plain numbers: 1, 2, 5 a decade where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    subs = (1, 2, 5) if log10(high / low) < 2.2 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k"))


def spread_out(places, gap, low=float("-inf"), high=float("inf")):
    """Moves places apart until they are `gap` from one another and within bounds, as little as it takes."""
    def first(members, wishes):  # a group sits around the mean of its wishes
        length = gap * (len(members) - 1)
        return max(low, min(high - length, wishes / len(members) - length / 2))

    groups = []
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        groups.append(([i], places[i]))
        while len(groups) > 1 and first(*groups[-1]) - first(*groups[-2]) < gap * len(groups[-2][0]):
            (a, wishes_a), (b, wishes_b) = groups[-2:]
            groups[-2:] = [(a + b, wishes_a + wishes_b)]
    moved = [0.0] * len(places)
    for members, wishes in groups:
        for n, i in enumerate(members):
            moved[i] = first(members, wishes) + n * gap
    return moved


def label_ends(axes, x, labels, points=9.5, dx=7):
    """Labels beside the points (x, y), apart from each other; a thin line leads to one that had to move.
    labels: [(y, text, colour)]"""
    figure = axes.figure
    pixels = [axes.transData.transform((x, y))[1] for y, _, _ in labels]
    scale = figure.dpi / 72
    apart = spread_out(pixels, points * scale, axes.bbox.y0, axes.bbox.y1)
    for (y, text, tint), before, after in zip(labels, pixels, apart):
        moved = (after - before) / scale
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": tint, "shrinkA": 0, "shrinkB": 2}
        far = abs(moved) > 2
        axes.annotate(text, (x, y), xytext=(dx + 7 if far else dx, moved), textcoords="offset points", va="center",
                      fontsize=8.5, arrowprops=line if far else None, annotation_clip=False)


def draw_ladder(data):
    figure, (axes,) = canvas(7.8, 4.3)
    figure.subplots_adjust(left=0.105, right=0.745, top=0.97, bottom=0.12)
    stages = list(data["times"])
    tints = [LIGHT[name] for name in ["s6", "s7", "s3", "s5"]]
    ends = []
    every = [time for times in [*data["times"].values(), data["floors"]] for time in times if time]
    axes.set_yscale("log")
    axes.set_ylim(min(every) * 0.8, max(every) * 1.35)
    axes.set_xlim(-0.3, len(stages) - 0.8)
    for i, (shape, floor, tint) in enumerate(zip(data["shapes"], data["floors"], tints)):
        points = {stage: (n, data["times"][stage][i]) for n, stage in enumerate(stages) if data["times"][stage][i]}
        ladder = [points[stage] for stage in points if stage < "09"]
        look = {"color": tint, "marker": "os^D"[i]}
        if ladder:
            axes.plot(*zip(*ladder), **look)
        for stage in points:
            if stage >= "09":  # it branches from 08
                axes.plot(*zip(*ladder[-1:], points[stage]), **look, linewidth=1, linestyle=":")
        if floor:
            axes.hlines(floor, -0.3, len(stages) - 0.8, color=tint, linewidth=1, linestyle=(0, (4, 3)))
        best = min(time for _, time in points.values())
        ends.append((best, f"{shape_title(shape)}: {us(best)} µs", tint))
    log_axis(axes.yaxis, min(every), max(every))
    axes.set_xticks(range(len(stages)), [stage.replace("_", "\n").replace("\nkv", "\nKV").replace("\ntma", "\nTMA")
                                         for stage in stages], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("µs, cold (dashed: floor)")
    label_ends(axes, len(stages) - 1, ends, points=12)
    return figure


def clusters(axes, x, dots, points=7):
    """[(height, names)]: dots too close for a label each share one, the highest first."""
    found = []
    for stage in sorted(dots, key=lambda stage: -dots[stage]):
        pixel = axes.transData.transform((x, dots[stage]))[1]
        if found and found[-1][-1][1] - pixel < points * axes.figure.dpi / 72:
            found[-1].append((stage, pixel))
        else:
            found.append([(stage, pixel)])
    return [((dots[one[0][0]] * dots[one[-1][0]]) ** 0.5, " ".join(short(stage) for stage, _ in one)) for one in found]


def draw_roofline(data):
    figure, (axes,) = canvas(7.6, 4.6)
    figure.subplots_adjust(left=0.095, right=0.975, top=0.97, bottom=0.145)
    read, fp32, matrix = (data["ceilings"].get(name) for name in ["read", "fp32", "matrix"])
    top = matrix or fp32
    columns = data["columns"]
    left, right = min(c["intensity"] for c in columns) / 1.8, max(c["intensity"] for c in columns) * 1.9
    lowest = min(dot for c in columns for dot in c["dots"].values())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(lowest * 0.6, top * 1.6)
    ridge = top / read * 1e3
    axes.plot([left, ridge, right] if ridge < right else [left, right],
              [left * read / 1e3, top, top] if ridge < right else [left * read / 1e3, right * read / 1e3],
              color=LIGHT["ink"], linewidth=1.2)
    ridge = fp32 / read * 1e3
    axes.plot([max(left, ridge), right], [fp32, fp32], color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))
    for c in columns:
        for stage, dot in c["dots"].items():
            axes.plot([c["intensity"]], [dot], color=colour(stage), marker=marker(stage), linestyle="none")
    log_axis(axes.yaxis, lowest, top)
    axes.set_xticks([c["intensity"] for c in columns],
                    [f"{parse_shape(c['shape']).heads} heads\n{c['intensity']:.0f}" for c in columns])
    axes.minorticks_off()
    axes.set_xlabel(f"FLOP per byte that must move, {shape_title(columns[0]['shape']).split(', ', 1)[1]}")
    axes.set_ylabel("TFLOP/s, cold")
    for c in columns:
        for dot, text in clusters(axes, c["intensity"], c["dots"]):
            axes.annotate(text, (c["intensity"], dot), xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=8.5)
    (x0, y0), (x1, y1) = axes.transData.transform([(left, left * read), (left * 2, left * 2 * read)])
    angle = degrees(atan2(y1 - y0, x1 - x0))
    axes.annotate(f"read {read:.0f} GB/s", (left * 1.15, left * 1.15 * read / 1e3), xytext=(0, 6),
                  textcoords="offset points", rotation=angle, rotation_mode="anchor", fontsize=8.5)
    if matrix:
        axes.annotate(f"cuBLAS bf16 {matrix:.0f} TFLOP/s", (right, matrix), xytext=(-2, 4), textcoords="offset points",
                      ha="right", fontsize=8.5)
    axes.annotate(f"fp32 {fp32:.3g} TFLOP/s", (right, fp32), xytext=(-2, 4), textcoords="offset points", ha="right",
                  fontsize=8.5)
    return figure


def thinned(values):
    """Those of sorted values that have room for their labels on a log axis; the last always does."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if log(kept[-1] / value) > 0.13 * log(values[-1] / values[0]):
            kept.append(value)
    return kept[::-1]


def draw_sweep(data, x_label, title):
    panels = data["panels"]
    figure, every = canvas(4.2 if len(panels) == 1 else 7.6, 4.1, panels=len(panels))
    left, right = (0.19, 0.89) if len(panels) == 1 else (0.105, 0.935)
    figure.subplots_adjust(left=left, right=right, top=0.93, bottom=0.12, wspace=0.36)
    for axes, panel in zip(every, panels):
        values = [time for times in [*panel["times"].values(), panel["floors"]] for time in times if time]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(panel["x"][0] / 1.15, panel["x"][-1] * 1.1)
        axes.set_ylim(min(values) * 0.8, max(values) * 1.3)
        ends = []
        for stage, times in panel["times"].items():
            points = [(x, time) for x, time in zip(panel["x"], times) if time]
            axes.plot(*zip(*points), color=colour(stage), marker=marker(stage))
            ends.append((*points[-1], short(stage), colour(stage)))
        floors = [(x, floor) for x, floor in zip(panel["x"], panel["floors"]) if floor]
        if floors:
            axes.plot(*zip(*floors), color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))
            ends.append((*floors[-1], "floor", LIGHT["ink"]))
        log_axis(axes.yaxis, min(values), max(values))
        ticks = thinned(panel["x"])
        axes.set_xticks(ticks, [f"{x // 1024}K" if x >= 16384 and x % 1024 == 0 else str(x) for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_title(title(panel))
        for x in sorted({end[0] for end in ends}):
            label_ends(axes, x, [(y, text, tint) for at, y, text, tint in ends if at == x])
    every[0].set_ylabel("µs, cold")
    return figure


def draw_length(data):
    return draw_sweep(data, "tokens per sequence", lambda panel: f"{panel['heads']} heads, {panel['batch']} sequence"
                      + ("s" if panel["batch"] > 1 else ""))


def draw_batch(data):
    return draw_sweep(data, "sequences", lambda panel: f"{panel['heads']} heads, {panel['tokens']} tokens each")


def draw_errors(data, x_label, x_text):
    panels = data["panels"]
    figure, every = canvas(7.6, 3.9, panels=len(panels))
    figure.subplots_adjust(left=0.085, right=0.875, top=0.93, bottom=0.125, wspace=0.62)
    values = [value for panel in panels for line in panel["errors"].values() for value in line]
    for axes, panel in zip(every, panels):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(panel["x"][0] / 1.15, panel["x"][-1] * 1.1)
        axes.set_ylim(min(values) * 0.8, max(values) * 1.3)  # the same in all, to compare
        for format, line in panel["errors"].items():
            axes.plot(panel["x"], line, color=LIGHT[FORMATS[format]], marker=FORMAT_MARKERS[format])
        log_axis(axes.yaxis, min(values), max(values))
        axes.set_xticks(panel["x"], [x_text(x) for x in panel["x"]])
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_title(panel["title"])
        label_ends(axes, panel["x"][-1], [(line[-1], format, LIGHT[FORMATS[format]])
                                          for format, line in panel["errors"].items()])
    every[0].set_ylabel("relative L2 error of out, %")
    return figure


def draw_errors_length(data):
    return draw_errors(data, "tokens", lambda x: f"{x >> 20}M" if x >= 1 << 20 else f"{x >> 10}K" if x >= 1024 else str(x))


def draw_errors_deviation(data):
    return draw_errors(data, "logits' standard deviation", lambda x: f"{x:g}")


def key(axes, stages):
    """Marks and names of stages, in a line above the axes."""
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=colour(stage), marker=marker(stage), linestyle="none", label=stage)
               for stage in stages]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.02, 1.0), ncol=len(handles), frameon=False,
                fontsize=8.5, handletextpad=0.1, columnspacing=1.2, borderaxespad=0.1)


def row_axis(axes, rows):
    """A row per shape; on the left, room for their titles."""
    width = 4.7 * max(len(shape_title(row["shape"])) for row in rows) + 12  # in points, of text of size 8
    axes.figure.subplots_adjust(left=width / (72 * axes.figure.get_figwidth()))
    axes.set_yticks(range(len(rows)), [shape_title(row["shape"]) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def draw_cold_sustained(data):
    rows = data["rows"]
    height = 0.75 + 0.185 * len(rows)
    figure, (axes,) = canvas(7.6, height)
    figure.subplots_adjust(right=0.975, top=1 - 0.3 / height, bottom=0.45 / height)
    row_axis(axes, rows)
    for n, row in enumerate(rows):
        for stage, ratio in row["ratios"].items():
            axes.plot([ratio], [n], color=colour(stage), marker=marker(stage), linestyle="none")
    axes.axvline(1, color=LIGHT["ink"], linewidth=1)
    axes.set_xlabel("time sustained / time cold; shapes by time, the shortest above")
    key(axes, list(dict.fromkeys(stage for row in rows for stage in row["ratios"])))
    return figure


def draw_varlen(data):
    rows = data["rows"]
    height = 0.8 + 0.3 * len(rows)
    figure, (axes,) = canvas(7.6, height)
    figure.subplots_adjust(right=0.92, top=1 - 0.15 / height, bottom=0.5 / height)
    values = [row[way] for row in rows for way in ("paged", "padded")]
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.3, max(values) * 1.5)
    row_axis(axes, rows)
    for n, row in enumerate(rows):
        axes.plot([row["paged"], row["padded"]], [n, n], color=LIGHT["mid"], linewidth=1)
        axes.plot([row["paged"]], [n], color=LIGHT["s6"], marker="o", markersize=6, linestyle="none")
        axes.plot([row["padded"]], [n], color=LIGHT["s7"], marker="s", markersize=6, linestyle="none")
        right = max(row["paged"], row["padded"])
        axes.annotate(f"{row['padded'] / row['paged']:.2g}× ({short(row['stage'])})", (right, n), xytext=(8, 0),
                      textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False)
    log_axis(axes.xaxis, min(values), max(values))
    axes.set_xlabel("µs, cold: circles paged, squares padded to the longest sequence")
    return figure


DRAW = {"ladder": draw_ladder, "roofline": draw_roofline, "length": draw_length, "batch": draw_batch,
        "cold_sustained": draw_cold_sustained, "varlen": draw_varlen, "errors_length": draw_errors_length,
        "errors_deviation": draw_errors_deviation}


def draw(name, data, results):
    """The SVG's text."""
    figure = DRAW[name](data)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return with_variables(file.getvalue(), stamp(results, data))


def with_variables(svg, description):
    """Colours become classes, fonts the page's, and what matplotlib says of itself and of the day goes."""
    svg = svg[svg.index("<svg "):]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # no eye sees more digits
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    names = {light: name for name, (light, _) in COLOURS.items()}
    used = set()

    def classes(match):
        found, rest = [], []
        for declaration in filter(None, (part.strip() for part in match.group(1).split(";"))):
            what, _, value = declaration.partition(": ")
            if what in ("fill", "stroke") and value in names:
                used.add((what, names[value]))
                found.append(f"{what[0]}-{names[value]}")
            else:
                rest.append(declaration)
        return " ".join(filter(None, [f'class="{" ".join(found)}"' if found else "",
                                      f'style="{"; ".join(rest)}"' if rest else ""]))

    svg = re.sub(r'style="([^"]*)"', classes, svg)
    needed = sorted({name for _, name in used} | {"ink"})
    light, dark = (";".join(f"--{name}:{COLOURS[name][scheme]}" for name in needed) for scheme in (0, 1))
    rules = [f"svg{{{light}}}", f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"]
    # The plain colour is for programs that know no variables.
    rules += [f".{what[0]}-{name}{{{what}:{COLOURS[name][0]};{what}:var(--{name})}}" for what, name in sorted(used)]
    style = "<style>\n" + "\n".join(rules) + "\n</style>\n"
    head, tag, tail = svg.partition(">")
    svg = f"{head}{tag}\n<desc>{description}</desc>\n{style}{tail.lstrip()}"
    return "\n".join(line.strip() for line in svg.splitlines()) + "\n"
