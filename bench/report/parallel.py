"""What mla_parallel recorded on several GPUs, and what its model predicts: the tables of docs/parallel.md."""
from recordings import (Error, NOT_RECORDED, PARALLEL_SCHEMA, SCALE_SCHEMA, files, read_checked, shape_title, significant, unique, us)

# What the page shows of the model, if there are such; the others are beside what was measured alone.
CURVES = ["h128_q1_b1_k1000000", "h128_q1_b128_k8192", "h16_q1_b8_k131072"]
WIDE = 96  # places of a picture
LETTERS = {"cut": "c", "bulk decode": "b", "tail decode": "t", "local merge": "l", "wait": ".", "exchange": "x", "weigh": "w", "merge": "m"}
ALONE = "-"  # in an exchange to which another rank has not come
NEAR = 1.3  # an estimate this close to the measurement is right


def load(root, has):
    """The newest recording of several GPUs that `has` what is asked for; None if there is none."""
    found = [(context.get("date_utc", ""), path) for path, context, data in files(root, "*.json", PARALLEL_SCHEMA) if has(data)]
    return read_checked(max(found)[1], PARALLEL_SCHEMA) if found else None


def dated(root):
    """All recordings of several GPUs, or ranks on one, the oldest first: triples of date, path and content."""
    return sorted(((context.get("date_utc", ""), path, data) for path, context, data in files(root, "*.json", PARALLEL_SCHEMA)),
                  key=lambda one: one[:2])


def by_ranks(root, part):
    """For each number of GPUs that `part` has rows of, the newest recording of them: pairs of a recording and its numbers."""
    newest = {}
    for _, path, data in dated(root):
        newest.update({row["ranks"]: path for row in part(data)})
    return [(read_checked(path, PARALLEL_SCHEMA), {ranks for ranks in newest if newest[ranks] == path})
            for path in unique(newest[ranks] for ranks in sorted(newest))]


def load_scale(root):
    """What the model predicts; None if it was not kept."""
    found = files(root, "*.json", SCALE_SCHEMA)
    return read_checked(found[-1][0], SCALE_SCHEMA) if found else None


def way(row):
    """As the model names it."""
    if row["page_ranks"] == 1:
        return row["mode"]
    heads = row["ranks"] // row["page_ranks"]
    return f"heads {heads} × context {row['page_ranks']}, {row['exchange']}" if heads > 1 else f"context, {row['exchange']}"


def predicted(scale, row):
    """The model's row for a measured one; None if there is none."""
    if scale is None or row["slices"] != 1:
        return None
    return next((one for one in scale["rows"] if (one["shape"], one["way"], one["ranks"]) ==
                 (row["shape"], way(row), row["ranks"])), None)


def timed(data):
    return [row for row in data.get("rows", []) if "whole_us" in row] if data else []


def where(data):
    get = data["context"].get
    return (f"{get('ranks')} × {get('gpu')}, driver {get('driver')}, {get('nccl', '').split(' of ')[0]}, nvcc {get('nvcc')}, commit "
            f"{get('commit')}, {get('date_utc', '')[:10]}.")


def caption(data):
    together = next((row["together"] for row in timed(data) if "together" in row), None)
    return (f"{where(data)} Medians over CUDA graphs run back to back, of the slowest rank." + (
        f" *One GPU* and *all* have one graph per decode. The columns after them have {together} decodes or exchanges in one graph: "
        f"the cost of a graph is hardly in them, so they can be added." if together else ""))


def times_parts(data, scale, table):
    """Measured times, and the model's beside them."""
    rows = timed(data)
    if not rows:
        return []
    def of(name):
        return lambda row: us(row[name]) if name in row else None
    def ratio(row):
        one = predicted(scale, row)
        return f"{one['us'] / row['whole_us']:.2f}" if one else None
    def model(row):
        one = predicted(scale, row)
        return us(one["us"]) if one else None
    together = [("all, several per graph", of("together_us"))] * any("together_us" in row for row in rows)
    gpus = [("GPUs", lambda row: str(row["ranks"]))] * (len(unique(row["ranks"] for row in rows)) > 1)
    columns = [("shape", lambda row: shape_title(row["shape"])), *gpus,
               ("shared", lambda row: way(row) + (f", {row['slices']} slices" if row["slices"] > 1 else "")),
               ("one GPU", of("one_us")), ("all", of("whole_us")),
               ("of one", lambda row: f"{row['whole_us'] / row['one_us']:.3f}"), *together,
               ("decode of the share", of("share_us")), ("exchange and merge", of("merge_us")), ("exchange", of("exchange_us")),
               ("NCCL alone", of("nccl_us")), ("predicted", model), ("predicted / measured", ratio)]
    close = [one["us"] / row["whole_us"] for row in rows if (one := predicted(scale, row))]
    near = sum(1 / NEAR <= value <= NEAR for value in close)
    fitted = close and data["context"]["date_utc"][:10] in scale["context"]["links"] and any(row["ranks"] == 2 for row in rows)
    return [caption(data) + (f" {near} of {len(close)} predictions are within {NEAR}× of the measured time." if close else "") +
            (" The model's exchange and merge were fitted to the rows of two GPUs here." if fitted else ""), table(columns, rows)]


def conformance_parts(root, table):
    """For each number of ranks, and of GPUs that they had, the newest recording."""
    newest = {}
    for _, _, data in dated(root):
        for row in data.get("conformance", []):
            gpus = row.get("gpus", row["ranks"])
            newest[row["ranks"], gpus] = {**row, "gpus": gpus}
    if not newest:
        return []
    rows = [newest[key] for key in sorted(newest)]
    gpus = [("GPUs", lambda row: str(row["gpus"]))] * any(row["gpus"] != row["ranks"] for row in rows)
    return [table([("ranks", lambda one: str(one["ranks"])), *gpus, ("cases", lambda one: str(one["cases"])),
                   ("wrong", lambda one: str(one["wrong"]))], rows)]


def faults_parts(data, table):
    if not data or not data.get("faults"):
        return []
    def what(one):
        return f"rank {one['rank']} {one['fault']}" if "rank" in one else one["fault"]
    return [table([("a rank", what), ("another rank's status", lambda one: f"`{one['status']}`"),
                   ("after", lambda one: f"{significant(one['seconds'], 2)} s")], data["faults"])]


def scale_parts(scale, table):
    """Curves: ranks down, ways across."""
    if scale is None:
        return []
    links = scale["links"]
    parts = [f"Decode: fitted to {scale['context']['decode']}. Exchange: {significant(links['exchange_us'], 2)} µs and "
             f"{significant(links['nvlink_gbps'])} GB/s within a host ({scale['context']['links']}); {significant(links['hop_us'], 2)} µs "
             f"for each further rank of it, and between hosts {significant(links['network_us'], 2)} µs and "
             f"{significant(links['network_gbps'])} GB/s per GPU, are assumed. A host has {links['gpus_per_host']} GPUs."]
    if "merge" in scale["context"]:
        parts[0] += (f" A kernel around an exchange: {significant(links['merge_us'], 2)} µs and {significant(links['memory_gbps'], 2)} GB/s "
                     f"({scale['context']['merge']}).")
    shapes = unique(row["shape"] for row in scale["rows"])
    for shape in [one for one in shapes if one in CURVES] or shapes:
        rows = [row for row in scale["rows"] if row["shape"] == shape]
        one = next(row["us"] for row in rows if row["ranks"] == 1)
        both = [row for row in rows if row.get("head_ranks", 1) > 1 and row.get("page_ranks", 1) > 1]
        def cell(name, ranks):
            found = [row["us"] for row in rows if row["ranks"] == ranks and row["way"] == name]
            best = min((row["us"] for row in rows if row["ranks"] == ranks and row["way"] != "batch"), default=0)
            if not found:
                return None
            return f"**{us(found[0])}**" if found[0] == best and ranks > 1 else us(found[0])
        def cell_of_both(ranks):
            found = min((row for row in both if row["ranks"] == ranks), key=lambda row: row["us"], default=None)
            if found is None:
                return None
            return f"{cell(found['way'], ranks)} ({found['head_ranks']} × {found['page_ranks']}, {found['way'].split(', ')[1]})"
        def of_context(ranks):
            return [row for row in rows if row["ranks"] == ranks and row["way"].startswith("context")]
        def cache(ranks):
            return significant(min(row["memory_gb"] - row.get("buffers_gb", 0) for row in of_context(ranks)))
        def buffers(ranks):
            return " / ".join(significant(row["buffers_gb"], 2) for row in of_context(ranks))
        ways = unique(row["way"] for row in rows if row["ranks"] > 1 and row not in both)
        parts += [f"{shape_title(shape)}, µs; one GPU takes {us(one)}:",
                  table([("GPUs", str), *[(name, lambda ranks, name=name: cell(name, ranks)) for name in ways],
                         *[("heads × context", cell_of_both)] * bool(both), ("context: cache per GPU, GB", cache),
                         *[("context: buffers per GPU, GB", buffers)] * any("buffers_gb" in row for row in rows)],
                        unique(row["ranks"] for row in rows if row["ranks"] > 1))]
    return parts


def crossover_parts(scale, table):
    """From how many tokens on context parallel wins."""
    if scale is None or "crossovers" not in scale:
        return []
    def tokens(name):
        def cell(row):
            value = row[name]
            return "never" if value is None else "always" if value == 0 else f"{float(f'{value:.1e}'):.0f}"
        return cell
    return [table([("heads", lambda row: str(row["heads"])), ("sequences", lambda row: str(row["sequences"])),
                   ("GPUs", lambda row: str(row["ranks"])), ("faster than heads from", tokens("over_heads")),
                   ("faster than one GPU from", tokens("over_one"))], scale["crossovers"])]


def picture(timeline):
    """Both streams of every rank, as text: each place has the phase that takes most of it."""
    end = max(phase["end_us"] for phase in timeline["phases"])
    def lane(rank, stream):
        spans = []
        for phase in timeline["phases"]:
            if (phase["rank"], phase["stream"]) != (rank, stream):
                continue
            begin, come = phase["begin_us"], min(phase["begin_us"] + phase.get("waited_us", 0), phase["end_us"])
            spans += [(begin, come, ALONE), (come, phase["end_us"], LETTERS[phase["phase"]])]
        def letter(place):
            left, right = place * end / WIDE, (place + 1) * end / WIDE
            shares = {}
            for begin, stop, what in spans:
                shares[what] = shares.get(what, 0) + max(0, min(stop, right) - max(begin, left))
            shares[" "] = right - left - sum(shares.values())
            return max(shares, key=shares.get)
        return "".join(letter(place) for place in range(WIDE)).rstrip()
    lines = [f"{f'rank {rank}' if stream == 'decode' else '':8}{stream:9} {lane(rank, stream)}".rstrip()
             for rank in range(timeline["ranks"]) for stream in ["decode", "exchange"]]
    scale = f"{end:.1f} µs"
    return "\n".join(["```text", *lines, f"{'':18}0{scale:>{WIDE - 1}}", "```"])


def timeline_parts(data, table):
    """Of each timeline what was measured, the picture, and when each phase began and how long it took."""
    if data is None:
        return []
    parts = [where(data)]
    for one in data["timelines"]:
        slices = f", {one['slices']} slices" if one["slices"] > 1 else ""
        cost = (f" A decode takes {us(one['whole_us'])} µs; one that marks its phases takes {us(one['marked_us'])} µs."
                if "whole_us" in one else "")
        parts.append(f"{shape_title(one['shape'])}, {one['exchange']}{slices}, {one['stage']}: {one['measured']}. Times of two ranks "
                     f"can be compared to within {significant(one['uncertainty_us'], 2)} µs (clocks: {one['clocks']}; by barriers alone: "
                     f"{significant(one['barrier_us'], 2)} µs).{cost}")
        parts.append(picture(one))
        ranks = [[phase for phase in one["phases"] if phase["rank"] == rank] for rank in range(one["ranks"])]
        def began(rank):
            return lambda number: f"{ranks[rank][number]['begin_us']:.1f}"
        def took(rank):
            def cell(number):
                phase = ranks[rank][number]
                waits = f", of it {phase['waited_us']:.1f} alone" if phase.get("waited_us", 0) >= 0.05 else ""
                return f"{phase['end_us'] - phase['begin_us']:.1f}{waits}"
            return cell
        def name(number):
            phase = ranks[0][number]
            return phase["phase"] + (f", slice {phase['slice']}" if one["slices"] > 1 else "")
        columns = [("phase", name)]
        for rank in range(one["ranks"]):
            columns += [(f"rank {rank} from", began(rank)), ("takes", took(rank))]
        parts.append(table(columns, range(len(ranks[0]))))
    return parts


def parts_of(name, root, table):
    """The parts of a block of docs/parallel.md."""
    def having(part):
        return load(root, lambda data: data.get(part))
    def times():
        scale = load_scale(root)
        return [part for data, ranks in by_ranks(root, timed)
                for part in times_parts({**data, "rows": [row for row in data["rows"] if row["ranks"] in ranks]}, scale, table)]
    known = {"parallel-times": times,
             "parallel-conformance": lambda: conformance_parts(root, table),
             "parallel-faults": lambda: faults_parts(having("faults"), table),
             "parallel-timelines": lambda: timeline_parts(having("timelines"), table),
             "parallel-scale": lambda: scale_parts(load_scale(root), table),
             "parallel-crossover": lambda: crossover_parts(load_scale(root), table)}
    if name not in known:
        raise Error(f"no block of docs/parallel.md is named '{name}'")
    return known[name]() or [NOT_RECORDED]
