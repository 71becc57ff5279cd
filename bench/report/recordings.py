"""Recorded results: files of mla_bench, of peers.py, of host_time.py and of mla_service, what each must hold, and how figures are written.

The newest in bench/results of the GPU that the texts speak of stands for all; bench/run.sh --record puts them there.
"""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

SCHEMA = "flashmla_stages/2"
PEERS_SCHEMA = "flashmla_stages/peers/1"
COUNTERS_SCHEMA = "flashmla_stages/counters/1"
STALLS_SCHEMA = "flashmla_stages/stalls/1"
SERVICE_SCHEMA = "flashmla_stages/service/1"
PYTHON_SCHEMA = "flashmla_stages/python/1"
ERRORS_SCHEMA = "flashmla_formats/1"
TRADITIONAL_SCHEMA = "flashmla_traditional/1"
PARALLEL_SCHEMA = "flashmla_parallel/1"
SCALE_SCHEMA = "flashmla_scale/1"
RECORDED_GPU = "NVIDIA H200"
README_SHAPES = ["h128_q1_b64_k4096", "h16_q1_b64_k4096", "h128_q1_b1_k4096"]
ON_CPU = "00_reference"  # has no time of a GPU; "reference", the truth that stages are checked against, has one of the host
CHOOSER = "auto"  # decodes with the stage that a table of times says is the fastest
SAME_RUN = " (same run)"  # ends the name of a stage that was timed once more, among peers
MEASURED_PEERS = {"cublas_pipeline": "cuBLAS pipeline"}  # timed beside the stages, and none of them

REQUIRED_CONTEXT = ["schema", "machine", "commit", "date_utc", "nvcc", "host_compiler"]
REQUIRED_GPU_CONTEXT = ["gpu", "driver", "cuda_driver", "max_sm_mhz", "memory_mhz", "power_limit_w"]
REQUIRED_CEILINGS = ["ceiling_read_gbps", "ceiling_fp32_tflops", "ceiling_launch_us"]
SPREAD = ["p10_us", "p90_us", "n"]
ERRORS = ["rel_l2", "max_abs", "lse_max_abs"]
REQUIRED_COUNTERS = {
    **dict.fromkeys(["cold", "sustained"], [*SPREAD, "TFLOPs", "GBps", *ERRORS, "tokens", "longest"]),
    "plan": SPREAD,
    "plan_and_decode": SPREAD,
    "combine": [*SPREAD, "cold_us", "slots", "bytes"],
    "combine_cold": SPREAD,
    "error": [*ERRORS, "cosine_difference"],
}
REQUIRED_CACHE_COUNTERS = {
    "wall": ["ns", "p10_ns", "p90_ns", "n", "per_second"],
    **dict.fromkeys(["cold", "sustained", "returned", "all"], [*SPREAD, "bytes", "GBps"]),
    "bytes": ["bytes_contiguous", "bytes_paged", "bytes_block_table", "saved_share", "fragmentation", "pages", "tokens"],
}
TIMELESS = ["error", "bytes"]
REQUIRED_PEERS_CONTEXT = ["gpu", "driver", "cuda", "date", "protocol"]
REQUIRED_PYTHON_CONTEXT = ["gpu", "driver", "cpu", "python", "torch", "cuda", "commit", "date_utc", "protocol"]
REQUIRED_SERVICE_CONTEXT = ["machine", "gpu", "driver", "nvcc", "host_compiler", "commit", "date_utc", "clock"]
REQUIRED_FIGURES = """
    arrived finished rejected queued running span_s steps step_ms_mean step_ms_p50 step_ms_p99 token_ms_mean token_ms_p50
    token_ms_p99 first_token_ms_p50 first_token_ms_p99 tokens tokens_per_s batch_mean pages_total pages_peak pages_mean
    waste_share cache_gb queue_mean queue_max preemptions""".split()
LAYER_PARTS = ["projections", "latent", "core", "reconstruction", "output"]
LAYER_FORMS = {"multi_head": "multi-head", "grouped": "grouped", "latent_plain": "latent, plain",
               "latent_fused": "latent, fused", "absorbed": "MLA absorbed"}
REQUIRED_LAYER = [*SPREAD, "flop", "rel_l2", "weight_bytes", "cache_bytes", "activation_bytes", "score_bytes"]
NOT_RECORDED = "Not recorded yet."
DASH = "—"


class Error(Exception):
    """A message for the user."""


def entry_key(name):
    """(stage, shape, mode) of "02_shared_tiled/h128_q1_b64_k4096/cold/iterations:1/manual_time"."""
    parts = name.split("/")
    if len(parts) < 3:
        raise Error(f"entry {name!r} is not named stage/shape/mode")
    return tuple(parts[:3])


class Results:
    """One results file: context, and entries by (stage, shape, mode): of Google Benchmark's rows of a benchmark the one
    over all its samples, or the only one."""

    def __init__(self, data, name):
        self.name = name
        self.context = data.get("context", {})
        self.entries = {}
        for entry in data.get("benchmarks", []):
            try:
                key = entry_key(entry.get("name", ""))
            except Error as error:
                raise Error(f"{name}: {error}") from None
            if entry.get("aggregate_name") == "samples" or "aggregate_name" not in entry and key not in self.entries:
                self.entries[key] = entry
        others = ["reference", "cache", CHOOSER, *MEASURED_PEERS]
        names = {key[0] for key in self.entries} - set(others)
        self.steps = sorted(name for name in names if name.startswith("step_"))  # to a stage, and no stages themselves
        self.stages = sorted(names - set(self.steps))
        timed = unique(key[1] for key in self.entries if key[0] != "cache" and key[2] in ("cold", "sustained"))
        table = self.suite("table") or []
        self.shapes = [shape for shape in table if shape in timed] + [shape for shape in timed if shape not in table]
        self.plans = [key[:2] for key in self.entries if key[2] == "plan"]

    def entry(self, stage, shape, mode="cold"):
        return self.entries.get((stage, shape, mode))

    def measured(self, stage, shape, mode="cold"):
        """An entry that has a time, or nothing."""
        entry = self.entry(stage, shape, mode) or {}
        return {} if why_not(entry) else entry

    def suite(self, name):
        """Shapes of a suite; None if the file does not say."""
        shapes = self.context.get(f"suite_{name}")
        return None if shapes is None else [shape.strip() for shape in shapes.split(",") if shape.strip()]

    def timed(self, suite):
        """Shapes of a suite that have times."""
        return [shape for shape in self.suite(suite) or [] if shape in self.shapes]

    def of_mode(self, mode):
        """{shape: {stage: entry}} of what was measured."""
        found = {}
        for (stage, shape, one), entry in self.entries.items():
            if one == mode and stage != "cache" and not why_not(entry):
                found.setdefault(shape, {})[stage] = entry
        return found

    def cache(self, mode):
        """{what: entry} of the paged cache's suite."""
        return {key[1]: entry for key, entry in self.entries.items()
                if key[0] == "cache" and key[2] == mode and not why_not(entry)}

    def fastest(self, shape):
        """(stage, entry) of the least cold time."""
        found = [(stage, self.measured(stage, shape)) for stage in self.stages if self.measured(stage, shape)]
        return min(found, key=lambda one: median(one[1])) if found else (None, {})

    def problems(self):
        """What keeps this from being a results file; empty if nothing."""
        found = lacking("context", self.context, REQUIRED_CONTEXT)
        if self.context.get("schema", SCHEMA) != SCHEMA:
            found.append(f"schema is '{self.context['schema']}', not '{SCHEMA}'")
        decodes = any(key[0] != "cache" for key in self.entries)  # the cache's suite alone needs no ceilings
        if self.context.get("machine") == "gpu":
            found += lacking("context", self.context, REQUIRED_GPU_CONTEXT + (REQUIRED_CEILINGS if decodes else []))
        if decodes:
            found += lacking("context", self.context, ["wall_s"])
            if not any(key.startswith("suite_") for key in self.context):
                found.append("context lacks 'suite_...'")
        if not self.entries:
            found.append("no entries")
        for (stage, shape, mode), entry in self.entries.items():
            name = f"{stage}/{shape}/{mode}"
            known = (REQUIRED_CACHE_COUNTERS if stage == "cache" else {"wall": []} if stage == "reference"
                     else REQUIRED_COUNTERS)
            if mode not in known:
                found.append(f"{name}: unknown mode")
                continue
            if why_not(entry):
                continue
            found += lacking(name, entry, known[mode])
            if mode not in TIMELESS and not entry.get("real_time", 0) > 0:
                found.append(f"{name} has no time")
        return found


def lacking(where, values, keys):
    return [f"{where} lacks '{key}'" for key in keys if key not in values]


def peers_problems(data):
    found = lacking("context", data.get("context", {}), REQUIRED_PEERS_CONTEXT)
    if not isinstance(data.get("shapes"), dict):
        return found + ["no shapes"]
    for shape, rows in data["shapes"].items():
        if parse_shape(shape) is None:
            found.append(f"'{shape}' is no shape")
        found += [f"{shape}, {name}: not [cold, sustained]" for name, times in rows.items()
                  if not isinstance(times, list) or len(times) != 2]
    return found


def python_problems(data):
    found = lacking("context", data.get("context", {}), REQUIRED_PYTHON_CONTEXT) + lacking("it", data, ["import_ms"])
    if not data.get("shapes"):
        found.append("no shapes")
    for shape, calls in data.get("shapes", {}).items():
        if parse_shape(shape) is None:
            found.append(f"'{shape}' is no shape")
        found += [f"{shape}, {name}: not [median, least]" for name, times in calls.items()
                  if not isinstance(times, list) or len(times) != 2]
    return found


def service_problems(data):
    context, runs = data.get("context", {}), data.get("runs", [])
    found = lacking("context", context, REQUIRED_SERVICE_CONTEXT)
    if not runs:
        found.append("no runs")
    for key, values in [("machine", ["gpu", "model"]), ("clock", ["gpu", "simulated"])]:
        if context.get(key, values[0]) not in values:
            found.append(f"{key} is '{context[key]}', none of {', '.join(values)}")
    for number, run in enumerate(runs):
        name = f"run {number} ({run.get('scenario')}, {run.get('way')})"
        found += lacking(name, run, ["scenario", "way", "stage", "layers", "figures", "rejected_by_reason"])
        found += lacking(name, run.get("figures", {}), REQUIRED_FIGURES)
        if run.get("way") not in ("paged", "unshared", "static"):
            found.append(f"{name}: none of paged, unshared, static")
    return found


def counters_problems(data, of_a_run=("stage", "shape", "kernels")):
    on_gpu = data["context"].get("machine") == "gpu"
    found = lacking("context", data["context"], ["machine", "commit", "date", *["gpu", "driver", "ncu", "nvcc"] * on_gpu])
    for run in data.get("runs", []):
        found += lacking("a run", run, of_a_run)
    return found if data.get("runs") else found + ["no runs"]


def errors_problems(data):
    """What keeps a file from being the study of cache formats; empty if nothing."""
    found = [] if data.get("cases") else ["no cases"]
    for number, case in enumerate(data.get("cases", [])):
        found += lacking(f"case {number}", case, ["tokens", "deviation", "outliers", "rotary", "formats"])
        for format, errors in case.get("formats", {}).items():
            found += lacking(f"case {number}, {format}", errors.get("from_exact", {}), ["out_ordinary_rel_l2", "lse_max"])
    return found


def layers_of(data):
    """{(form, setting, machine and part): entry} of a file of mla_traditional."""
    found = {}
    for entry in data.get("benchmarks", []):
        key = entry_key(entry.get("name", ""))
        if entry.get("aggregate_name") == "samples" or "aggregate_name" not in entry and key not in found:
            found[key] = entry
    return found


def traditional_problems(data):
    found = lacking("context", data["context"], ["machine", "cpu", "commit", "date_utc", "nvcc", "host_compiler", "wall_s"])
    layers = layers_of(data)
    for (form, setting, mode), entry in layers.items():
        name = f"{form}/{setting}/{mode}"
        machine, _, part = mode.partition("_")
        if form not in LAYER_FORMS or machine not in ("cpu", "cold") or part not in ("", *LAYER_PARTS):
            found.append(f"{name}: unknown")
        elif not why_not(entry):
            found += lacking(name, entry, SPREAD if part else REQUIRED_LAYER)
    return found if layers else found + ["no entries"]


REQUIRED_PARALLEL_CONTEXT = ["gpu", "driver", "nvcc", "commit", "date_utc", "nccl", "ranks"]
REQUIRED_PARALLEL_ROW = ["shape", "mode", "ranks", "page_ranks", "exchange", "slices", "stage"]
REQUIRED_TIMELINE = ["shape", "ranks", "exchange", "slices", "stage", "measured", "uncertainty_us", "barrier_us", "clocks"]
REQUIRED_PHASE = ["rank", "stream", "phase", "slice", "begin_us", "end_us"]
REQUIRED_SCALE_ROW = ["shape", "way", "ranks", "decode_us", "exchange_us", "merge_us", "us", "memory_gb"]
REQUIRED_CROSSOVER = ["heads", "sequences", "ranks", "over_heads", "over_one"]
REQUIRED_LINKS = ["exchange_us", "nvlink_gbps", "hop_us", "network_gbps", "network_us", "gpus_per_host"]


def parallel_problems(data):
    """Of what mla_parallel wrote: times of several GPUs, or predictions."""
    context = data["context"]
    is_scale = context["schema"] == SCALE_SCHEMA
    found = lacking("context", context, ["decode", "links"] if is_scale else REQUIRED_PARALLEL_CONTEXT)
    found += lacking("links", data.get("links", {}), REQUIRED_LINKS) if is_scale else []
    for one in data.get("crossovers", []):
        found += lacking("crossover", one, REQUIRED_CROSSOVER)
    rows = data.get("rows", [])
    for row in rows:
        name = f"row {row.get('shape')}"
        found += lacking(name, row, REQUIRED_SCALE_ROW if is_scale else REQUIRED_PARALLEL_ROW)
        if "whole_us" in row:
            found += lacking(name, row, ["one_us", "share_us"])
        if row.get("wrong"):
            found.append(f"{name}: a result is wrong")
    for one in data.get("conformance", []):
        found += lacking("conformance", one, ["ranks", "cases", "wrong"])
    for one in data.get("faults", []):
        found += lacking("fault", one, ["fault", "status", "seconds"])
    for one in data.get("timelines", []):
        found += lacking("timeline", one, REQUIRED_TIMELINE)
        for phase in one.get("phases", []):
            found += lacking("timeline", phase, REQUIRED_PHASE + ["waited_us"] * (phase.get("stream") == "exchange"))
        phases = [[phase.get("phase") for phase in one.get("phases", []) if phase.get("rank") == rank]
                  for rank in range(one.get("ranks", 0))]
        if not phases or not phases[0] or any(rank != phases[0] for rank in phases):
            found.append("timeline: not the same phases of every rank")
    shared = any("gpus" in one for one in data.get("conformance", []))  # by ranks that share GPUs: nothing else is recorded
    return found if rows or shared else found + ["no rows"]


def problems(data, name):
    """What keeps a JSON file from being one of ours, whatever its schema; empty if nothing."""
    schema = data.get("context", {}).get("schema")
    if schema == PEERS_SCHEMA:
        return peers_problems(data)
    if schema == SERVICE_SCHEMA:
        return service_problems(data)
    if schema == PYTHON_SCHEMA:
        return python_problems(data)
    if schema == COUNTERS_SCHEMA:
        return counters_problems(data)
    if schema == STALLS_SCHEMA:
        return counters_problems(data, ("stage", "shape", "states", "samples", "lines"))
    if schema == TRADITIONAL_SCHEMA:
        return traditional_problems(data)
    if schema in (PARALLEL_SCHEMA, SCALE_SCHEMA):
        return parallel_problems(data)
    if data.get("schema") == ERRORS_SCHEMA:
        return errors_problems(data)
    return Results(data, name).problems()


def unique(items):
    return list(dict.fromkeys(items))


def why_not(entry):
    """The reason why an entry has no time; empty if it has one."""
    if entry.get("error_occurred") or entry.get("skipped"):
        return entry.get("error_message") or entry.get("skip_message") or "no reason given"
    return ""


def read_json(path):
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path}: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("context", {}), dict):
        raise Error(f"{path}: not a results file")
    return data


def read_checked(path, wanted):
    """A file of this schema, or an Error that says what is wrong with it."""
    data = read_json(path)
    schema = data.get("context", {}).get("schema")
    found = problems(data, Path(path).name)
    if not found and schema != wanted:
        found = [f"schema is '{schema}', not '{wanted}'"]
    if found:
        raise Error(f"{path}: not a results file: " + "; ".join(found[:5]))
    return data


def load(path):
    return Results(read_checked(path, SCHEMA), Path(path).name)


def files(root, pattern, schema):
    """[(path, context, data)] of bench/results."""
    found = [(path, read_json(path)) for path in sorted((root / "bench" / "results").glob(pattern))]
    return [(path, data["context"], data) for path, data in found if data.get("context", {}).get("schema") == schema]


def recorded(root):
    """The newest in bench/results; rather of the GPU that the texts speak of, rather with every shape that the README
    shows, rather with the ladder's lowest rung. None if there are none."""
    found = [(path, context, Results(data, path.name)) for path, context, data in files(root, "*.json", SCHEMA)
             if context.get("machine") == "gpu"]
    found = [one for one in found if one[2].stages]
    lowest = min((results.stages[0] for *_, results in found), default=None)
    ranked = [(context.get("gpu") == RECORDED_GPU, set(README_SHAPES) <= set(results.shapes),
               results.stages[0] == lowest, context.get("date_utc", ""), path) for path, context, results in found]
    return load(max(ranked)[-1]) if ranked else None


def newest(root, results, is_wanted):
    """The newest recording of the same kind of GPU of those that are wanted; None if there is none."""
    found = [(context.get("date_utc", ""), path) for path, context, data in files(root, "*.json", SCHEMA)
             if context.get("gpu") == results.context.get("gpu") and is_wanted(Results(data, path.name))]
    return load(max(found)[-1]) if found else None


def load_later(root, results):
    """The newest recording of the same kind of GPU with stages that this one has not, of caches of 16 bits, and without
    steps; this one if there is none."""
    return newest(root, results, lambda one: not has_formats(one) and not one.steps and
                  set(one.stages) - set(results.stages)) or results


PLAIN_FORMAT = "16bit"
CACHE_FORMATS = ("fp8_tile128", "fp8_tensor", "int8_tile128")


def is_quantised(shape):
    parts = parse_shape(shape)
    return bool(parts and parts.cache)


def has_formats(results):
    return any(is_quantised(shape) for shape in results.shapes)


def load_quantised(root, results):
    """The newest recording of the same kind of GPU with quantised caches, beside those of 16 bits; None if there is
    none."""
    return newest(root, results, has_formats)


def errors_case(case):
    """The name of a case of the study of cache formats: k8192_dev1, and _outliers4 or _rotary16 where there are such."""
    return (f"k{case['tokens']}_dev{case['deviation']:g}" + (f"_outliers{case['outliers']}" if case["outliers"] else "") +
            (f"_rotary{case['rotary']:g}" if case["rotary"] != 1 else ""))


def load_errors(root):
    """The study of cache formats that mla_formats wrote: name, and cases by name. None if there is none."""
    path = root / "bench" / "results" / "cache_errors.json"
    if not path.exists():
        return None
    data = read_json(path)
    found = problems(data, path.name)
    if found:
        raise Error(f"{path}: not a study of cache formats: " + "; ".join(found[:5]))
    return SimpleNamespace(name=path.name, cases={errors_case(case): case for case in data["cases"]})


def error_of(case, format, what="out"):
    """What a format does to a case of the study: `out`, relative L2 over ordinary columns, or `lse`."""
    return case["formats"][format]["from_exact"][{"out": "out_ordinary_rel_l2", "lse": "lse_max"}[what]]


def load_texts(root, results):
    """The newest recording of suite texts on the same kind of GPU; None if there is none."""
    return newest(root, results, lambda one: one.timed("texts"))


def load_steps(root, results, number):
    """The newest recording of the steps to a stage on the same kind of GPU; None if there is none."""
    return newest(root, results, lambda one: any(step.startswith(f"step_{number}_") for step in one.steps))


def load_cross(root, results):
    """The newest recording of suite cross on the same kind of GPU; None if there is none."""
    return newest(root, results, lambda one: one.timed("cross"))


def load_traditional(root, results):
    """What mla_traditional recorded on the same kind of GPU: layers of all files, of which a later one's stand, and the
    last one's context. None if there are none."""
    found = sorted((context.get("date_utc", ""), path) for path, context, _ in files(root, "*.json", TRADITIONAL_SCHEMA)
                   if context.get("gpu") == results.context.get("gpu"))
    layers = {}
    for _, path in found:
        data = read_checked(path, TRADITIONAL_SCHEMA)
        layers.update(layers_of(data))
    return SimpleNamespace(context=data["context"], layers=layers) if found else None


def load_peers(root, results):
    """Recorded figures of other implementations on the same kind of GPU: the files, oldest first;
    shapes = {shape: {name: [cold, sustained]}}, where a later file's figure stands; same_run, the names in files that time a
    stage, too."""
    found = [read_checked(path, PEERS_SCHEMA) for path in sorted((root / "bench" / "results").glob("peers_*.json"))]
    found = sorted((data for data in found if data["context"]["gpu"] == results.context.get("gpu")),
                   key=lambda data: data["context"]["date"])
    shapes = {}
    for data in found:
        for shape, rows in data["shapes"].items():
            known = {name: times for name, times in rows.items() if any(times)}
            if known:
                shapes.setdefault(shape, {}).update(known)
    same_run = {name for data in found for rows in data["shapes"].values() for name in rows
                if any(one.endswith(SAME_RUN) for one in rows)}
    return SimpleNamespace(files=found, shapes=shapes, same_run=same_run)


def load_python(root, results):
    """The newest recording of host_time.py on the same kind of GPU; None if there is none."""
    found = [read_checked(path, PYTHON_SCHEMA) for path in (root / "bench" / "results").glob("python_*.json")]
    found = [data for data in found if data["context"]["gpu"] == results.context.get("gpu")]
    return max(found, key=lambda data: data["context"]["date_utc"], default=None)


def load_cache(root, results):
    """The newest recording of the paged cache's suite on the same kind of GPU; of a file that is not recorded, its own. None if
    there is none."""
    if results.cache("wall") and not (root / "bench" / "results" / results.name).exists():
        return results
    found = newest(root, results, lambda one: one.cache("wall"))
    return results if found and found.name == results.name else found


def load_service(root, results, formats=False, kind="service"):
    """The newest recorded service results, rather of this kind of GPU than of the model, of caches of 16 bits; `formats`:
    of quantised ones, too; `kind` "requests": of runs that are long enough for requests' p99. None if there are none."""
    found = []
    for path in (root / "bench" / "results").glob(f"*_{kind}_*.json"):
        data = read_checked(path, SERVICE_SCHEMA)
        context = data["context"]
        if formats != any(run.get("cache_format", PLAIN_FORMAT) != PLAIN_FORMAT for run in data["runs"]):
            continue
        same = context["machine"] == "gpu" and context["gpu"] == results.context.get("gpu")
        if same or context["machine"] == "model":
            found.append((same, context["date_utc"], path.name, data))
    return max(found, key=lambda one: one[:3])[-1] if found else None


def parse_shape(name):
    """The parts of a shape's name; None if it is none."""
    match = re.fullmatch(r"h(?P<heads>\d+)(?:x(?P<kv_heads>\d+))?_q(?P<queries>\d+)(?:_b(?P<batch>\d+))?"
                         r"_k(?P<lengths>lognormal|skew|varied|stepped)?(?P<tokens>\d+(?:\+\d+)*)(?P<causal>_causal)?"
                         r"(?:_split(?P<split>\d+))?(?:_(?P<cache>fp8_tile128|fp8_tensor|int8_tile128))?"
                         r"(?:_peak(?P<peak>\d+))?(?P<fp16>_fp16)?", name)
    parts = {key: int(value) if value and value.isdigit() else value
             for key, value in (match.groupdict() if match else {}).items()}
    listed = "+" in str(parts.get("tokens"))
    if not listed and parts.get("batch") is None:
        return None
    return SimpleNamespace(**{**parts, "batch": parts["tokens"].count("+") + 1 if listed else parts["batch"]})


def lengths_title(shape):
    """'64 × 4096'"""
    if "+" in str(shape.tokens):  # listed
        return shape.tokens.replace("+", " + ")
    batch = shape.batch - 1 if shape.lengths == "skew" else shape.batch
    return f"{batch} × " + {None: f"{shape.tokens}", "skew": f"512 + 1 × {shape.tokens}",
                            "lognormal": f"log-normal {shape.tokens}", "varied": f"varied {shape.tokens}",
                            "stepped": f"stepped 256 to {shape.tokens}"}[shape.lengths]


def shape_title(name):
    """'128 heads, 64 × 4096' for h128_q1_b64_k4096."""
    shape = parse_shape(name)
    if shape is None:
        return name
    text = f"{shape.heads} heads"
    text += f" on {shape.kv_heads} KV heads" if shape.kv_heads else ""
    text += f", {shape.queries} query tokens" if shape.queries != 1 else ""
    text += ", causal" if shape.causal else ""
    text += f", {lengths_title(shape)}"
    text += f", split every {shape.split}" if shape.split else ""
    text += f", cache {shape.cache}" if shape.cache else ""
    text += f", peak {shape.peak}" if shape.peak else ""
    return text + (", fp16" if shape.fp16 else "")


def padded_partner(name, longest):
    """The shape of equal lengths that a contiguous cache would make of this one."""
    return re.sub(r"_k[a-z]*\d+", f"_k{int(longest)}", name, count=1)


def varlen_pairs(results):
    """[(shape, its padded partner, tokens, longest)] of the shapes of unequal lengths in suite varlen."""
    found = []
    for name in results.timed("varlen"):
        shape, (_, entry) = parse_shape(name), results.fastest(name)
        if shape and shape.lengths and entry and "longest" in entry:
            found.append((name, padded_partner(name, entry["longest"]), entry["tokens"], entry["longest"]))
    return found


def short(stage):
    """'08' for 08_seesaw: a table of all stages is wide."""
    return MEASURED_PEERS.get(stage) or (stage.split("_")[0] if stage[:1].isdigit() else stage)


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


def floor_us(entry):
    """The least time that any kernel could take, or None."""
    return entry["floor_share"] * entry["real_time"] if entry.get("floor_share") else None
