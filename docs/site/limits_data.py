"""What docs/demos/limits.js knows of cards and of recordings: limits_data.js, made with the site.

Peak rates are those of the ridge sheet. What else the cost model needs is here, from data sheets and architecture whitepapers. A
card's rate of shared memory is 128 bytes per clock and multiprocessor, at the clock that the peak of fp32 implies.
"""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench/report"))
import recordings  # noqa: E402
import ridge  # noqa: E402

# Compute capability times ten, multiprocessors, peak of fp32 in TFLOP/s, fp32 lanes per multiprocessor.
MORE = {"A100 80 GB SXM": (80, 108, 19.5, 64), "RTX 4090": (89, 128, 82.6, 128), "L40S": (89, 142, 91.6, 128),
        "H100 SXM": (90, 132, 66.9, 128), "H200 SXM": (90, 132, 67, 128)}
EQUAL_LENGTHS = re.compile(r"h\d+_q\d+_b\d+_k\d+(_causal)?(_(fp8_tile128|fp8_tensor|int8_tile128))?(_fp16)?")


def of_sheets(launch):
    for name, tflops, gbps, source in ridge.CARDS:
        capability, multiprocessors, fp32, lanes = MORE[name]
        yield {"name": name, "origin": f"peaks of the data sheet; launch as measured on an {recordings.RECORDED_GPU.removeprefix('NVIDIA ')}", "source": source,
               "capability": capability, "multiprocessors": multiprocessors, "read": gbps * 1e9, "fp32": fp32 * 1e12,
               "matrix": tflops * 1e12, "sustained": None, "shared": fp32 * 1e12 * 128 / (2 * lanes), "shared_clock": 128,
               "launch": launch}


def measured(results):
    context = results.context
    number = {key: float(context[f"ceiling_{key}"]) for key in
              ("read_gbps", "fp32_tflops", "matrix_cold_tflops", "matrix_sustained_tflops", "shared_tbps", "shared_bytes_per_clock", "launch_us")}
    return {"name": context["gpu"], "origin": f"recorded: {context['gpu']}, commit {context['commit']}, {context['date_utc'][:10]}",
            "source": "measured", "capability": round(float(context["compute_capability"]) * 10),
            "multiprocessors": int(context["multiprocessors"]), "read": number["read_gbps"] * 1e9, "fp32": number["fp32_tflops"] * 1e12,
            "matrix": number["matrix_cold_tflops"] * 1e12, "sustained": number["matrix_sustained_tflops"] * 1e12,
            "shared": number["shared_tbps"] * 1e12, "shared_clock": number["shared_bytes_per_clock"],
            "launch": number["launch_us"] / 1e6}


def times(results):
    """{shape: {stage: [median, p10, p90, runs, sustained or null]}} in µs, of equal lengths."""
    found = {}
    for shape, stages in results.of_mode("cold").items():
        if not EQUAL_LENGTHS.fullmatch(shape):
            continue
        for stage, entry in stages.items():
            if stage not in results.stages:
                continue
            sustained = results.measured(stage, shape, "sustained").get("real_time")
            found.setdefault(shape, {})[stage] = [round(value, 3) for value in (entry["real_time"], entry["p10_us"], entry["p90_us"])] + [
                round(entry["n"]), sustained and round(sustained, 3)]
    return found


def data():
    ladder = recordings.recorded(ROOT)
    all_of_them = [ladder, recordings.load_later(ROOT, ladder), recordings.load_quantised(ROOT, ladder)]
    card = measured(ladder)
    return {"cards": [card, *of_sheets(card["launch"])],
            "recordings": [{"date": one.context["date_utc"][:10], "times": times(one)} for one in all_of_them if one]}


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "limits_data.js").write_text("const limitsData = " + json.dumps(data(), separators=(",", ":")) + ";\n", encoding="utf-8")
