"""bench/report/report.py on small results files: their schemas, its tables and figures in running text. Stale texts and
figures are found. And where bench/run.sh leaves results."""
import contextlib
import copy
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench" / "report"))
import estimates  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import recordings  # noqa: E402


def entry(name, time, **counters):
    values = {"p10_us": time * 0.99, "p90_us": time * 1.02, "n": 100, "TFLOPs": 73e3 / time, "GBps": 320e3 / time,
              "rel_l2": 1.7e-3, "max_abs": 1e-4, "lse_max_abs": 1e-7, "own_limit_share": 0.5, "floor_share": 0.021,
              "limit_fp32_us": time / 2, "limit_shared_us": 1.0, "limit_dram_us": 2.0, "limit_matrix_us": 0.0,
              "tokens": 262144, "longest": 4096}
    return {"name": name + "/iterations:1/manual_time", "real_time": time, "time_unit": "us", "label": "one | idea",
            **values, **counters}


def plan_entry(name, time, **counters):
    return {"name": name + "/iterations:1/manual_time", "real_time": time, "time_unit": "us", "p10_us": time * 0.99,
            "p90_us": time * 1.02, "n": 100, **counters}


def results():
    shape = "h128_q1_b64_k4096"
    return {
        "context": {"schema": recordings.SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200", "driver": "580.1",
                    "cuda_driver": "13.0", "max_sm_mhz": "1980", "memory_mhz": "3201", "power_limit_w": "700",
                    "nvcc": "13.0.88", "host_compiler": "GNU 12.2.0", "commit": "abc1234",
                    "date_utc": "2026-11-20T12:00:00Z", "ceiling_read_gbps": "4562", "ceiling_fp32_tflops": "60.1",
                    "ceiling_launch_us": "3.0", "wall_s": "150", "suite_table": shape},
        "benchmarks": [
            entry(f"01_naive/{shape}/cold", 210000.0, once=1),
            entry(f"02_shared_tiled/{shape}/cold", 4000.0, speedup=52.5),
            entry(f"02_shared_tiled/{shape}/sustained", 4100.0),
            plan_entry(f"02_shared_tiled/{shape}/plan", 4.31, with_decode_us=4003.25, marginal_us=3.25),
            plan_entry("02_shared_tiled/h128_q1_b8192_klognormal2048/plan", 9.87),
            {"name": f"08_seesaw/{shape}/cold/iterations:1/manual_time", "error_occurred": True,
             "error_message": "cannot run here: needs compute capability 9.0"},
        ],
    }


SETTING = "prefill_h8_d64_n2048_b4"


def layer(name, time, **counters):
    return {"name": name + "/iterations:1/manual_time", "real_time": time, "p10_us": time, "p90_us": time, "n": 100,
            "flop": 1e9, **counters}


WHOLE_LAYER = {"rel_l2": 3e-3, "weight_bytes": 1e6, "cache_bytes": 2e6, "activation_bytes": 3e6, "score_bytes": 4e6,
               "core_heads": 8}


def traditional_layers():
    """What mla_traditional writes: two forms on a GPU, one of them on the CPU, too."""
    return {"context": {**results()["context"], "schema": recordings.TRADITIONAL_SCHEMA, "cpu": "16 of 16 cores"},
            "benchmarks": [layer(f"multi_head/{SETTING}/cold", 80.0, least_us=60.0, **WHOLE_LAYER),
                           layer(f"multi_head/{SETTING}/cold_core", 40.0),
                           layer(f"multi_head/{SETTING}/cold_projections", 30.0),
                           layer(f"absorbed/{SETTING}/cold", 160.0, least_us=90.0, **WHOLE_LAYER),
                           layer(f"absorbed/{SETTING}/cold_core", 40.0),
                           layer(f"absorbed/{SETTING}/cold_latent", 7.0),
                           layer(f"multi_head/{SETTING}/cpu", 9000.0, **WHOLE_LAYER),
                           {"name": f"absorbed/{SETTING}/cpu/", "error_occurred": True, "error_message": "left out"}]}


STAGES = ["03_online_softmax", "05_tensor_core", "08_seesaw"]
SUITES = {
    "table": ["h128_q1_b64_k4096", "h16_q1_b64_k4096", "h128_q1_b1_k4096", "h128_q1_b128_k8192"],
    "bandwidth": ["h16_q1_b16_k4096", "h16_q1_b64_k4096"],
    "latency": ["h128_q1_b1_k4096", "h128_q1_b4_k4096", "h128_q1_b64_k1024", "h128_q1_b64_k16384"],
    "dtypes": ["h128_q1_b64_k4096", "h128_q1_b64_k4096_fp16"],
    "varlen": ["h128_q1_b128_kstepped32768", "h128_q1_b128_k32768", "h16_q2_b128_klognormal8192", "h16_q2_b128_k27345"],
    "resources": ["h16_q2_b128_k27345"],
    "plan": ["h128_q1_b1_klognormal2048"],
}
TIMED = recordings.unique(shape for name, shapes in SUITES.items() if name != "plan" for shape in shapes)


def cache_entries():
    host = {"real_time": 0.004, "ns": 4.05, "p10_ns": 3.74, "p90_ns": 6.43, "n": 51, "per_second": 246e6,
            "label": "a page"}
    append = {"real_time": 5.41, "p10_us": 4.54, "p90_us": 5.96, "n": 100, "bytes": 294912, "GBps": 54.5}
    memory = {"real_time": 0, "bytes_contiguous": 4.83e9, "bytes_paged": 2.44e9, "bytes_block_table": 262144,
              "saved_share": 0.496, "fragmentation": 0, "pages": 33024, "tokens": 2113536, "label": "256, 512, ..."}
    return [{"name": "cache/host_allocate/wall/iterations:1", **host},
            *({"name": f"cache/append_b128_t1/{mode}/iterations:1", **append} for mode in
              ["cold", "sustained", "returned", "all"]),
            *({"name": f"cache/fp8_tile128_append_b1_t4096/{mode}/iterations:1", **append, "GBps": 876} for mode in
              ["cold", "sustained", "returned", "all"]),
            {"name": "cache/host_cuda_malloc/wall/iterations:1", **host, "ns": 4321, "label": "a buffer"},
            {"name": "cache/memory_stepped/bytes/iterations:1", **memory},
            {"name": "cache/model_mha_32/bytes/iterations:1", **memory, "fragmentation": 0.015, "bytes_per_token": 524288,
             "bytes_lost": 2.11e9}]


def full_results():
    """Every suite and every kind of entry, for three stages and the peer that is measured beside them. A cold run of
    shape number s takes 1000 (s + 1) / n µs in stage number n."""
    data = results()
    data["context"].update({f"suite_{name}": ",".join(shapes) for name, shapes in SUITES.items()},
                           ceiling_matrix_cold_tflops="791")
    longest = {"h128_q1_b128_kstepped32768": 32768, "h16_q2_b128_klognormal8192": 27345}
    found = data["benchmarks"] = []
    for s, shape in enumerate(TIMED):
        for n, stage in enumerate([*STAGES, "cublas_pipeline"]):
            time = 1000.0 * (s + 1) / (n + 1)
            lengths = {"longest": longest.get(shape, 4096), "tokens": 2113536}
            found.append(entry(f"{stage}/{shape}/cold", time, **lengths))
            found.append(entry(f"{stage}/{shape}/sustained", 1.1 * time, sm_mhz=1755, power_w=650, energy_mj=512,
                               **lengths))
    shape = "h128_q1_b1_k4096"
    found.append(plan_entry(f"08_seesaw/{shape}/plan", 5.65, with_decode_us=22.03, marginal_us=3.33))
    found.append(plan_entry(f"08_seesaw/{shape}/plan_and_decode", 22.03))
    found.append(plan_entry(f"08_seesaw/{shape}/combine_cold", 4.44))
    for stage, time in [("05_tensor_core", 3.33), ("08_seesaw", 2.22)]:
        found.append(plan_entry(f"{stage}/{shape}/combine", time, cold_us=2 * time, slots=66, bytes=7.77e6))
    for stage, time in [("05_tensor_core", 6.43), ("08_seesaw", 6.05)]:
        found.append(plan_entry(f"{stage}/h128_q1_b1_klognormal2048/plan", time))
    for shape, error in [("h128_q1_b2_k4096", 2.1e-3), ("h128_q1_b2_k4096_split512_peak4_fp16", 3.2e-4),
                         ("h16x2_q4_b2_k256_causal", 4.3e-3)]:
        found.append({"name": f"08_seesaw/{shape}/error/iterations:1", "real_time": 0, "rel_l2": error, "max_abs": 1e-5,
                      "cosine_difference": 2e-6, "lse_max_abs": 8.8e-7})
    found += cache_entries()
    return data


def peers(date, shapes, **more):
    return {"context": {"schema": recordings.PEERS_SCHEMA, "gpu": "NVIDIA H200", "driver": f"580.{date[-2:]}",
                        "cuda": "13.0", "date": date, "protocol": "the same"}, "shapes": shapes, **more}


def service():
    figures = {name: 10 + number for number, name in enumerate(recordings.REQUIRED_FIGURES)}
    run = {"scenario": "chat_1000", "stage": "08_seesaw", "layers": 61, "rejected_by_reason": {}}
    return {"context": {"schema": recordings.SERVICE_SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200", "driver": "580.1",
                        "nvcc": "13.0.88", "host_compiler": "GNU 12.2.0", "commit": "fed4321",
                        "date_utc": "2026-11-22T12:00:00Z", "clock": "gpu"},
            "runs": [{**run, "way": "static", "stage": "02_shared_tiled", "figures": {**figures, "tokens_per_s": 4321},
                      "rejected_by_reason": {"too long": 7, "never fits": 0}},
                     {**run, "way": "paged", "figures": {**figures, "tokens_per_s": 9876}}]}


def python(date):
    """Host time of calls of the Python package."""
    shapes = {"h16_q1_b4_k256": {"plan": [7.77, 6.66], "FlashMLA's own, planned": [43.21, 40.12]},
              "h128_q1_b1_k4096": {"plan": [9.99, 8.88]}}
    return {"context": {"schema": recordings.PYTHON_SCHEMA, "gpu": "NVIDIA H200", "driver": "580.1", "cpu": "A processor",
                        "python": "3.12.3", "torch": "2.11.0", "cuda": "13.0", "cupy": None, "commit": "abc1234",
                        "date_utc": date, "protocol": "50 calls"},
            "absent": {"CuPy": "ModuleNotFoundError: none"}, "import_ms": {"import mla_stages": 14.6}, "shapes": shapes}


def study():
    """A study of cache formats: errors fall with tokens and grow with the logits' deviation."""
    formats = {"16bit": 1, "fp8_tile128": 16, "fp8_tensor": 17, "int8_tile128": 4, "fp8_tile128_rotary_e4m3": 18}
    def one(tokens, deviation, outliers, rotary):
        def errors(factor):
            out = 2e-3 * factor * deviation * (1 + outliers) * rotary / math.log2(tokens)
            return {"from_exact": {"out_ordinary_rel_l2": out, "lse_max": out / 100}}
        return {"tokens": tokens, "deviation": deviation, "outliers": outliers, "rotary": rotary,
                "formats": {name: errors(factor) for name, factor in formats.items()}}
    cases = [one(tokens, deviation, outliers, rotary) for outliers in (0, 4) for rotary in (1.0, 16.0)
             for tokens in (512, 8192, 1048576) for deviation in (0.5, 1, 16)]
    return {"schema": recordings.ERRORS_SCHEMA, "cases": cases}


class ReportTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        (self.root / "bench" / "results").mkdir(parents=True)
        (self.root / "stages" / "02_shared_tiled").mkdir(parents=True)
        self.file = self.root / "bench" / "results" / "h200_2026-11-21.json"
        self.readme = self.root / "README.md"
        self.chapter = self.root / "stages" / "02_shared_tiled" / "README.md"
        self.readme.write_text("before\n<!-- results:begin -->\n<!-- results:end -->\nafter\n")
        self.chapter.write_text("# 02\n<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        self.write(results())

    def tearDown(self):
        self.folder.cleanup()

    def write(self, data):
        self.file.write_text(json.dumps(data))

    def run_report(self, *arguments):
        """Exit code and everything printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = report.main(["--root", str(self.root), *arguments])
        return code, printed.getvalue()

    def test_update_then_check(self):
        self.assertEqual(self.run_report("--check")[0], 1)
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0)
        self.assertIn("README.md: updated", printed)
        self.assertEqual(self.run_report("--check"), (0, ""))
        text = self.readme.read_text()
        self.assertTrue(text.startswith("before\n") and text.endswith("after\n"))
        for expected in ["4000 / 4100", "210000 / over 200 ms", "50% fp32", "18.2", "one \\| idea", "NVIDIA H200",
                         "580.1", "abc1234", "2026-11-20"]:
            self.assertIn(expected, text)
        chapter = self.chapter.read_text()
        for expected in ["4000 (3960–4080)", "52×", "2.1%", "1.7e-03", "abc1234"]:
            self.assertIn(expected, chapter)

    def test_new_results_make_texts_stale(self):
        self.run_report("--update")
        data = results()
        data["benchmarks"][1]["real_time"] = 3999.0
        self.write(data)
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn("stale", printed)

    def test_an_edited_table_is_stale(self):
        self.run_report("--update")
        self.readme.write_text(self.readme.read_text().replace("4000 / 4100", "40 / 41"))
        self.assertEqual(self.run_report("--check")[0], 1)

    def test_missing_markers_are_an_error(self):
        self.readme.write_text("no markers")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 2)
        self.assertIn("results:begin", printed)

    def test_a_chapter_without_markers_is_left_out(self):
        self.chapter.write_text("# a stage of the reader's own\n")
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0)
        self.assertIn("left out", printed)
        self.assertIn("4000 / 4100", self.readme.read_text())
        self.assertEqual(self.run_report("--check")[0], 0)
        self.chapter.write_text("<!-- measurement:begin -->\n")
        self.assertEqual(self.run_report("--check")[0], 2)

    def test_a_run_of_a_few_shapes_does_not_replace_the_recorded_one(self):
        data = results()
        data["benchmarks"] += [entry(f"02_shared_tiled/{shape}/cold", 100.0) for shape in recordings.README_SHAPES[1:]]
        self.write(data)
        self.run_report("--update")
        partial = results()
        partial["context"]["date_utc"] = "2026-12-01T12:00:00Z"
        later = self.file.with_name("h200_2026-12-01.json")
        later.write_text(json.dumps(partial))
        self.assertEqual(self.run_report("--check"), (0, ""))
        data["context"]["date_utc"] = "2026-12-01T12:00:00Z"
        later.write_text(json.dumps(data))
        self.assertEqual(self.run_report("--check")[0], 1)

    def test_results_elsewhere_are_not_recorded(self):
        self.run_report("--update")
        elsewhere = self.root / "build" / "results"
        elsewhere.mkdir(parents=True)
        data = results()
        data["context"]["date_utc"] = "2026-12-01T12:00:00Z"
        (elsewhere / "h200_2026-12-01_120000.json").write_text(json.dumps(data))
        self.assertEqual(self.run_report("--check"), (0, ""))

    def test_schema(self):
        for key in [*recordings.REQUIRED_CONTEXT, *recordings.REQUIRED_GPU_CONTEXT, *recordings.REQUIRED_CEILINGS,
                    "wall_s"]:
            if key in ("schema", "machine"):  # without these it is not taken for a recorded file at all
                continue
            data = results()
            del data["context"][key]
            self.write(data)
            code, printed = self.run_report("--table")
            self.assertEqual(code, 2, key)
            self.assertIn(key, printed)
        data = results()
        del data["context"]["suite_table"]
        self.assertIn("suite_", " ".join(recordings.problems(data, "")))

    def test_the_row_over_all_samples_counts(self):
        data = results()
        name = data["benchmarks"][1]["name"]
        rounds = [{"name": name, "real_time": time, "time_unit": "us", "run_type": "iteration"} for time in (1.0, 2.0)]
        mean = {"name": name + "_mean", "real_time": 1.5, "run_type": "aggregate", "aggregate_name": "mean"}
        samples = {**data["benchmarks"][1], "name": name + "_samples", "aggregate_name": "samples"}
        data["benchmarks"][1:2] = [*rounds, mean, samples]
        read = recordings.Results(data, "results.json")
        self.assertEqual(read.problems(), [])
        self.assertEqual(read.measured("02_shared_tiled", "h128_q1_b64_k4096")["real_time"], 4000.0)

    def test_every_mode_has_its_counters(self):
        self.assertEqual(recordings.problems(full_results(), ""), [])
        required = {("08_seesaw", mode): keys for mode, keys in recordings.REQUIRED_COUNTERS.items()}
        required.update({("cache", mode): keys for mode, keys in recordings.REQUIRED_CACHE_COUNTERS.items()})
        for (stage, mode), keys in required.items():
            for key in keys:
                data = full_results()
                one = next(one for one in data["benchmarks"]
                           if one["name"].startswith(stage) and one["name"].split("/")[2] == mode)
                del one[key]
                self.assertEqual(len(recordings.problems(data, "")), 1, (stage, mode, key))
                self.assertIn(f"/{mode} lacks '{key}'", recordings.problems(data, "")[0])

    def test_a_mode_that_is_unknown(self):
        for name in ["08_seesaw/h1_q1_b1_k1/lukewarm", "cache/append_b1_t1/plan", "reference/h1_q1_b1_k1/cold"]:
            data = results()
            data["benchmarks"].append(entry(name, 1.0))
            self.assertEqual(recordings.problems(data, ""), [f"{name}: unknown mode"])
        data["benchmarks"][-1]["name"] = "cold"
        self.write(data)
        self.assertIn("stage/shape/mode", self.run_report("--table")[1])

    def test_a_time_of_nothing(self):
        data = full_results()
        data["benchmarks"][0]["real_time"] = 0
        self.assertEqual(len(recordings.problems(data, "")), 1)

    def test_another_schema_is_refused(self):
        data = results()
        data["context"]["schema"] = "flashmla_stages/1"
        self.assertIn("flashmla_stages/1", recordings.problems(data, "")[0])

    def test_chapters_show_suite_table(self):
        self.write(full_results())
        chapter = self.root / "stages" / "08_seesaw" / "README.md"
        chapter.parent.mkdir()
        chapter.write_text("<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        self.assertEqual(self.run_report("--update")[0], 0)
        rows = [line.split(" | ")[0] for line in chapter.read_text().splitlines() if "heads" in line]
        self.assertEqual(rows, [f"| {recordings.shape_title(shape)}" for shape in SUITES["table"]])

    def test_a_chapter_shows_the_shapes_that_it_names_and_folds_the_others(self):
        self.write(full_results())
        chapter = self.root / "stages" / "08_seesaw" / "README.md"
        chapter.parent.mkdir()
        names = [SUITES["table"][2], SUITES["table"][0]]
        chapter.write_text(f"<!-- shown: {', '.join(names)} -->\n<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        self.assertEqual(self.run_report("--update")[0], 0)
        self.assertEqual(self.run_report("--check"), (0, ""))
        def rows(text):
            return [line.split(" | ")[0] for line in text.splitlines() if "heads" in line]
        visible, _, folded = chapter.read_text().partition("<details>")
        self.assertEqual(rows(visible), [f"| {recordings.shape_title(shape)}" for shape in names])
        self.assertEqual(rows(folded), [f"| {recordings.shape_title(shape)}" for shape in SUITES["table"] if shape not in names])
        chapter.write_text(chapter.read_text().replace(names[0], "h7_q1_b1_k1"))
        code, printed = self.run_report("--check")
        self.assertEqual((code, "7 heads, 1 × 1, which is not in its table" in printed), (2, True), printed)

    def test_figures_of_a_chapters_notes_are_kept(self):
        notes = self.chapter.with_name("notes.md")
        notes.write_text("It takes <!--v 02 h128_q1_b64_k4096 cold : .0-->1<!--/v--> µs.\n")
        code, printed = self.run_report("--check")
        self.assertEqual((code, "notes.md:1" in printed), (1, True))
        self.run_report("--update")
        self.assertIn("-->4000<!--/v-->", notes.read_text())

    def test_what_could_not_run_has_its_reason(self):
        code, printed = self.run_report("--table")
        self.assertEqual(code, 0)
        self.assertIn("needs compute capability 9.0", printed)

    def test_plans_have_a_table_of_their_own(self):
        code, printed = self.run_report("--table")
        self.assertEqual(code, 0, printed)
        self.assertRegex(printed, r"4\.31 \(4\.27–4\.40\) +4000 +4003 +3\.25  128 heads, 64 × 4096")
        self.assertRegex(printed, r"9\.87 .* — +— +—  128 heads, 8192 × log-normal 2048")
        self.assertNotIn("h128_q1_b8192_klognormal2048:", printed)  # no decodes, so no table of them
        self.run_report("--update")
        self.assertIn("plan is made before", self.chapter.read_text())
        self.assertNotIn("8192", self.chapter.read_text())

    def test_ridge_sheet(self):
        self.assertEqual(round(report.ridge.intensity(128, 1152), 1), 241.8)  # as in docs/mla.md
        self.assertEqual(round(report.ridge.threshold(1000 * 989.4 / 4800, 1152)), 109)
        formats = (ROOT / "docs" / "cache_formats.md").read_text()
        for name, width in report.ridge.ROW_BYTES.items():
            if name != "16 bits":
                self.assertRegex(formats, rf"(?m)^{', '.join(re.findall('`(.*?)`', name))} +{width} bytes")
        page = self.root / "docs" / "course" / "ridge.md"
        page.parent.mkdir(parents=True)
        page.write_text("<!-- intensity:begin -->\n<!-- intensity:end -->\n<!-- cards:begin -->\n<!-- cards:end -->\n")
        self.write(full_results())
        self.assertEqual(self.run_report("--update")[0], 0)
        text = page.read_text()
        self.assertIn("| 128 | 241.8 | 424.6 | 483.6 | 228.3 |", text)
        self.assertIn("| A100 80 GB SXM | 312 | 2039 | 153 | 81 | 46 | 41 |", text)
        self.assertIn("| NVIDIA H200, measured, cold | 791 | 4562 | 173 | 92 |", text)
        self.assertNotIn("sustained", text)  # these results have no such ceiling

    def test_results_without_plans_are_read_as_before(self):
        data = results()
        data["benchmarks"] = [one for one in data["benchmarks"] if "/plan/" not in one["name"]]
        self.write(data)
        code, printed = self.run_report("--table")
        self.assertEqual(code, 0, printed)
        self.assertNotIn("plan", printed)
        self.run_report("--update")
        self.assertNotIn("plan", self.chapter.read_text())

    def test_results_of_plans_alone(self):
        data = results()
        data["benchmarks"] = [one for one in data["benchmarks"] if "/plan/" in one["name"]]
        alone = self.root / "plans.json"
        alone.write_text(json.dumps(data))
        self.assertEqual(self.run_report("--summary", "--results", str(alone))[0], 0)
        code, printed = self.run_report("--table", "--results", str(alone))
        self.assertEqual(code, 0, printed)
        self.assertIn("9.87", printed)
        del data["benchmarks"][0]["p10_us"]
        alone.write_text(json.dumps(data))
        self.assertEqual(self.run_report("--table", "--results", str(alone))[0], 2)

    def test_titles(self):
        for name, title in [("h16_q1_b128_k8192_split1024", "16 heads, 128 × 8192, split every 1024"),
                            ("h128_q2_b2_k64_causal_split64_fp16",
                             "128 heads, 2 query tokens, causal, 2 × 64, split every 64, fp16"),
                            ("h16x2_q1_b4_kstepped32768_split64_peak16_fp16",
                             "16 heads on 2 KV heads, 4 × stepped 256 to 32768, split every 64, peak 16, fp16"),
                            ("h16_q1_b3_k256+0+1024_fp16", "16 heads, 256 + 0 + 1024, fp16"),
                            ("h16_q1_b1_k64_fp8_tile128", "16 heads, 1 × 64, cache fp8_tile128"),
                            ("h16_q1_b1_k64_split64_fp8_tensor_peak4_fp16",
                             "16 heads, 1 × 64, split every 64, cache fp8_tensor, peak 4, fp16"),
                            ("h1_q1_b1_k1_fp8", "h1_q1_b1_k1_fp8"),
                            ("h16_q1_k256+0+1024", "16 heads, 256 + 0 + 1024"), ("h16_q1_k256", "h16_q1_k256"),
                            ("h1_q1_b1_k1_peak4_split64", "h1_q1_b1_k1_peak4_split64"),
                            ("h1_q1_b1_k1_fp16_split64", "h1_q1_b1_k1_fp16_split64")]:
            self.assertEqual(recordings.shape_title(name), title)

    def test_peers_are_shown_beside_the_stages(self):
        self.beside("peers_h200.json", peers("2026-11-20", {"h128_q1_b64_k4096": {"Other": [118.4, None]}}))
        for flag in ["--table", "--summary"]:
            printed = self.run_report(flag)[1]
            self.assertRegex(printed, r"Other .*118\.4.*recorded")
        data = peers("2026-11-20", {"h128_q1_b64_k4096": {"Other": [118.4, None]}})
        data["context"]["gpu"] = "another"
        self.beside("peers_h200.json", data)
        self.assertNotIn("118.4", self.run_report("--table")[1])

    def beside(self, name, data):
        (self.root / "bench" / "results" / name).write_text(json.dumps(data))

    def test_of_two_files_of_peers_the_later_figure_is_shown(self):
        shape = "h128_q1_b64_k4096"
        self.beside("peers_a.json", peers("2026-11-22", {shape: {"Other": [111.1, 1.0]}},
                                          absent={"Third": "does not build"}))
        self.beside("peers_b.json", peers("2026-11-20", {shape: {"Other": [222.2, 1.0], "Second": [333.3, None]}}))
        printed = self.run_report("--summary")[1]
        self.assertRegex(printed, r"Other +111\.1")
        self.assertRegex(printed, r"Second +333\.3")
        self.assertNotIn("222.2", printed)
        for expected in ["580.20", "580.22", "2026-11-20", "2026-11-22", "Third: does not build"]:
            self.assertIn(expected, printed)

    def test_a_file_of_peers_is_checked(self):
        for data in [peers("2026-11-20", {"h128_b1": {}}), peers("2026-11-20", {"h1_q1_b1_k1": {"Other": [1.0]}}),
                     {"context": {"schema": recordings.PEERS_SCHEMA}, "shapes": {}}]:
            self.assertNotEqual(recordings.problems(data, ""), [])
            self.beside("peers_h200.json", data)
            self.assertEqual(self.run_report("--summary")[0], 2)

    def test_the_choice_is_beside_the_fastest_stage(self):
        shape, split = "h128_q1_b64_k4096", "h128_q1_b64_k4096_split1024"
        data = full_results()
        least = min(one["real_time"] for one in data["benchmarks"] if one["name"].startswith(f"08_seesaw/{shape}/cold"))
        data["benchmarks"] += [entry(f"auto/{shape}/cold", 1.02 * least, label="08_seesaw min_grains=1"),
                               entry(f"08_seesaw/{split}/cold", 100.0), entry(f"auto/{split}/cold", 120.0)]
        self.write(data)
        loaded = recordings.Results(data, "")
        self.assertNotIn("auto", loaded.stages)
        text = report.written(report.choice_block(loaded), report.markdown)
        self.assertIn("| 08_seesaw min_grains=1 |", text)
        self.assertIn("| 1.020 |", text)
        self.assertIn("The worst: 1.200", text)
        self.assertEqual(report.slow_choices(loaded), [])  # where splits are fixed, the batch must not influence the choice
        self.assertIn("auto / fastest", self.run_report("--table")[1])
        self.run_report("--update")
        before = self.run_report("--check")
        self.assertNotIn("at most 1.03", before[1])
        next(one for one in data["benchmarks"] if one["name"].startswith(f"auto/{shape}"))["real_time"] = 1.04 * least
        self.write(data)
        self.run_report("--update")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn(f"{shape}: auto (08_seesaw min_grains=1) takes", printed)

    def test_a_measured_peer_is_no_stage(self):
        self.write(full_results())
        self.beside("peers_h200.json", peers("2026-11-20", {"h128_q1_b64_k4096": {"Other": [118.4, None]}}))
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0, printed)
        self.assertNotIn("cublas_pipeline", printed)  # no chapter is looked for
        lines = [line for line in self.readme.read_text().splitlines() if line.startswith("| ")]
        self.assertEqual([line.split(" | ")[0] for line in lines],
                         ["| stage", *(f"| {stage}" for stage in STAGES), "| cuBLAS pipeline", "| Other"])
        self.assertTrue(lines[-2].endswith("| measured |"))
        data = full_results()
        for one in data["benchmarks"]:
            if one["name"].startswith("cublas_pipeline"):
                one["TFLOPs"], one["speedup"] = 1e6, 7.0
        data["benchmarks"].sort(key=lambda one: not one["name"].startswith("cublas_pipeline"))
        loaded = recordings.Results(data, "")
        rows = report.side_by_side(loaded, recordings.load_peers(self.root, loaded), "h128_q1_b64_k4096")[1]
        self.assertEqual(rows[-2][0], "cuBLAS pipeline")
        self.assertNotIn("7.0×", rows[-2])
        self.assertEqual(rows[-1][3], recordings.significant(73e3 / 118.4))  # not from the peer's rate

    def test_the_reference_on_the_cpu(self):
        shape = "h128_q1_b64_k4096"
        folder = self.root / "stages" / recordings.ON_CPU
        folder.mkdir()
        chapter = folder / "README.md"
        chapter.write_text("# 00\n<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        data = results()
        data["benchmarks"].append({"name": f"reference/{shape}/wall/iterations:1", "real_time": 420000.0,
                                   "time_unit": "us", "TFLOPs": 0.174, "GBps": 0.76, "label": "fp64 on the CPU"})
        data["context"]["num_cpus"] = 24
        self.write(data)
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0, printed)
        rows = [line for line in self.readme.read_text().splitlines() if line.startswith("| ")]
        self.assertEqual(rows[1], "| reference | 420000 / — | 0.174 | — | fp64 on the CPU, 24 cores; wall time of one run |")
        self.assertTrue(rows[2].startswith("| 01_naive | "))
        text = chapter.read_text()
        self.assertIn("| 128 heads, 64 × 4096 | 420 | 174 | 0.760 | 2.00× |", text)  # stage 01 takes 210 ms
        self.assertIn("in fp64 on 24 cores of the machine with this GPU", text)
        self.assertEqual(self.run_report("--check"), (0, ""))
        data["benchmarks"].pop()
        self.write(data)
        self.assertEqual(self.run_report("--update")[0], 0)
        self.assertNotIn("| reference |", self.readme.read_text())

    def test_a_truncated_file_is_named(self):
        broken = self.root / "broken.json"
        broken.write_text('{"context": {')
        code, printed = self.run_report("--table", "--results", str(broken))
        self.assertEqual(code, 2)
        self.assertIn("broken.json", printed)

    def test_nothing_recorded(self):
        self.file.unlink()
        self.assertEqual(self.run_report("--check")[0], 0)

    def test_everything_recorded_follows_its_schema(self):
        folder = ROOT / "bench" / "results"
        paths = sorted(folder.rglob("*.json"))
        self.assertTrue(paths)
        for path in paths:
            self.assertEqual(recordings.problems(json.loads(path.read_text()), path.name), [], path)


def timeline(slices):
    """Of a decode over two ranks, of which rank 0 is done first."""
    phases = []
    for rank, late in [(0, 0), (1, 4)]:
        for number in range(slices):
            start = 50 * number + late
            phases += [{"rank": rank, "stream": stream, "phase": phase, "slice": number, "begin_us": start + begin, "end_us": start + end}
                       for stream, phase, begin, end in [("decode", "cut", 0, 2), ("decode", "bulk decode", 2, 50), ("decode", "wait", 50, 64 - late)]]
            phases.append({"rank": rank, "stream": "exchange", "phase": "exchange", "slice": number, "begin_us": start + 50,
                           "end_us": start + 64 - late, "waited_us": 4 - late})
        phases.append({"rank": rank, "stream": "decode", "phase": "merge", "slice": 0, "begin_us": 50 * slices + 16, "end_us": 50 * slices + 18 + late})
    return {"shape": "h128_q1_b8_k4096", "mode": "context", "ranks": 2, "page_ranks": 2, "exchange": "all_to_all", "slices": slices,
            "stage": "08_seesaw", "whole_us": 70.0, "marked_us": 71.5, "measured": "the last of 100", "uncertainty_us": 1.25,
            "clocks": "one host's", "barrier_us": 30.2, "phases": phases}


def over_two_gpus():
    """What mla_parallel writes."""
    row = {"shape": "h128_q1_b8_k4096", "mode": "context", "ranks": 2, "page_ranks": 2, "exchange": "all_to_all", "slices": 1,
           "stage": "08_seesaw", "one_us": 100.0, "whole_us": 58.0, "share_us": 50.0, "merge_us": 7.0, "exchange_us": 6.0,
           "nccl_us": 5.0, "wrong": []}
    batch = {**row, "mode": "batch", "page_ranks": 1, "whole_us": 52.0}
    for name in ["merge_us", "exchange_us", "nccl_us"]:
        batch.pop(name)
    data = {"context": {"schema": recordings.PARALLEL_SCHEMA, "gpu": "NVIDIA H200", "driver": "580.1", "nvcc": "13", "ranks": 2,
                        "nccl": "NCCL 2.28.9 of /somewhere", "commit": "abc1234", "date_utc": "2026-11-30T01:02:03Z"},
            "rows": [row, {**row, "slices": 2}, batch], "conformance": [{"ranks": 2, "cases": 72, "wrong": 0}],
            "faults": [{"fault": "is killed", "rank": 1, "ranks": 2, "status": "it is gone", "seconds": 0.123}],
            "timelines": [timeline(1), timeline(2)]}
    return data


def model_of_scale():
    """What mla_parallel --predict writes."""
    return {"context": {"schema": recordings.SCALE_SCHEMA, "decode": "an H200", "links": "nominal"},
            "links": {"exchange_us": 15, "nvlink_gbps": 450, "hop_us": 1.5, "network_gbps": 50, "network_us": 10, "gpus_per_host": 8},
            "rows": [{"shape": "h128_q1_b8_k4096", "way": way, "ranks": ranks, "decode_us": 1, "exchange_us": 1, "merge_us": 1, "us": us,
                      "memory_gb": memory}
                     for way, ranks, us, memory in [("one", 1, 100, 8), ("context, all_to_all", 2, 60, 4), ("heads", 2, 90, 8),
                                                    ("batch", 2, 20, 4)]]}


class ResultsPageTest(unittest.TestCase):
    """docs/results.md: its tables, and its figures."""

    BLOCKS = ["run", *(f"suite-{name}" for name in SUITES if name not in ("varlen", "resources")), "suite-compute",
              "varlen", "combine-and-plan", "numerics", "resources", "cache", "service", "service-formats", "service-requests", "peers", "later", "choice", "quantised",
              "texts", "traditional", "cross", "traditional-cross"]

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        (self.root / "bench" / "results").mkdir(parents=True)
        (self.root / "docs" / "figures").mkdir(parents=True)
        self.page = self.root / "docs" / "results.md"
        (self.root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
        self.page.write_text("# Results\n" + "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n"
                                                     for name in self.BLOCKS) + "<!-- prose -->\n")
        self.record("h200_2026-11-21.json", full_results())

    def record(self, name, data):
        (self.root / "bench" / "results" / name).write_text(json.dumps(data))

    run_report = ReportTest.run_report

    def test_study_of_cache_formats(self):
        page = self.root / "docs" / "quantisation.md"
        page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("errors", "rotary")))
        self.record("cache_errors.json", study())
        self.assertEqual(self.run_report("--update")[0], 0)
        errors, rotary = page.read_text().split("<!-- rotary:begin -->")
        self.assertIn("| tokens | logits' deviation | outlier columns | out, `16bit` | out, `fp8_tile128` | out, `fp8_tensor` | "
                      "out, `int8_tile128` | lse, `16bit` |", errors)
        self.assertIn("| 512 | 0.5 | 4 | 5.6e-04 | 8.9e-03 | 9.4e-03 | 2.2e-03 | 5.6e-06 |", errors)
        rows = [line for line in errors.splitlines() if re.match(r"\| \d", line)]
        self.assertEqual(len(rows), 18)  # none with larger rotary columns; by outliers, deviation, tokens
        self.assertTrue(rows[0].startswith("| 512 | 0.5 | 0 |") and rows[1].startswith("| 8192 | 0.5 | 0 |"))
        self.assertIn("| 1× | 0.5 | 1.2e-03 | 1.4e-03 | 1.3e-03 | 1.2e-05 |", rotary)
        self.assertIn("| 16× | 16 | 6.3e-01 |", rotary)
        self.assertEqual(len(re.findall(r"^\| \d", rotary, re.M)), 6)  # 8192 tokens, without outliers
        for what in ("lse_max", "rotary"):
            bad = study()
            bad["cases"][0].pop(what, None)
            bad["cases"][0]["formats"]["16bit"]["from_exact"].pop(what, None)
            self.record("cache_errors.json", bad)
            code, printed = self.run_report("--update")
            self.assertEqual(code, 2, printed)
            self.assertRegex(printed, f"case 0(, 16bit)? lacks '{what}'")

    def test_figures_of_the_study(self):
        page = self.root / "docs" / "quantisation.md"
        page.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("errors", "rotary")))
        self.draw()
        self.record("cache_errors.json", study())
        self.run_report("--update")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn("errors_length.svg: stale", printed)
        self.assertIn("errors_deviation.svg: stale", printed)
        errors = recordings.load_errors(self.root)
        for name, data in plots.wanted(errors, plots.ERRORS_DATA).items():
            (self.root / "docs" / "figures" / f"{name}.svg").write_text(f"<desc>{plots.stamp(errors, data)}</desc>")
        self.assertEqual(self.run_report("--check"), (0, ""))
        changed = study()
        for case in changed["cases"]:
            if recordings.errors_case(case) == "k1048576_dev1":  # in the figure over lengths alone
                case["formats"]["fp8_tensor"]["from_exact"]["out_ordinary_rel_l2"] *= 2
        self.record("cache_errors.json", changed)
        self.run_report("--update")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn("errors_length.svg: stale", printed)
        self.assertNotIn("errors_deviation.svg", printed)
        page.unlink()
        self.run_report("--update")
        self.assertEqual(self.run_report("--check"), (0, ""))

    def block(self, name):
        """What --update writes between the markers."""
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0, printed)
        return self.page.read_text().partition(f"<!-- {name}:begin -->\n")[2].partition(f"\n<!-- {name}:end -->")[0]

    def cells(self, name, first):
        """The cells of a block's only row whose first cell is `first`."""
        text = self.block(name)
        rows = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
        self.assertEqual(len(rows), 1, text)
        return rows[0][2:-2].split(" | ")

    def tables(self, name):
        """The tables of a block: header and rows, as cells."""
        found = [part for part in self.block(name).split("\n\n") if part.startswith("| ")]
        return [[line[2:-2].split(" | ") for line in part.splitlines() if not line.startswith("|---")]
                for part in found]

    def draw(self):
        """Does what --plots does, but writes only the figures' stamps into the files."""
        loaded = recordings.load(self.root / "bench" / "results" / "h200_2026-11-21.json")
        for name, data in plots.wanted(loaded).items():
            (self.root / "docs" / "figures" / f"{name}.svg").write_text(f"<desc>{plots.stamp(loaded, data)}</desc>")
        return plots.wanted(loaded)

    def test_update_then_check(self):
        self.draw()
        self.assertEqual(self.run_report("--check")[0], 1)
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0)
        self.assertEqual(printed.count("results.md: updated"), 1)
        self.assertEqual(self.run_report("--check"), (0, ""))
        self.page.write_text(self.page.read_text().replace("4096", "4097", 1))
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn("results.md: stale", printed)

    def test_what_is_not_recorded_says_so(self):
        self.record("h200_2026-11-21.json", results())
        for name in self.BLOCKS:
            if name not in ("run", "suite-table", "combine-and-plan", "peers"):
                self.assertEqual(self.block(name), recordings.NOT_RECORDED, name)
        self.assertIn("| 64 × 4096", self.block("suite-table").replace("128 heads, ", ""))

    def test_markers_that_mean_nothing(self):
        self.page.write_text("<!-- weather:begin -->\n<!-- weather:end -->\n")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 2)
        self.assertIn("weather", printed)
        self.page.write_text("<!-- cache:begin -->\n")
        self.assertEqual(self.run_report("--update")[0], 2)

    def test_a_suite(self):
        self.record("peers_h200.json", peers("2026-11-20", {"h16_q1_b16_k4096": {"Other": [5000.0, 1.0]},
                                                            "h16_q1_b64_k4096": {"Other": [18.4, None]}}))
        self.assertEqual(self.cells("suite-bandwidth", "shape"),
                         ["shape", "03", "05", "08", "GB/s of the fastest", "floor of the fastest", "best peer"])
        self.assertEqual(self.cells("suite-bandwidth", "16 heads, 64 × 4096"),
                         ["16 heads, 64 × 4096", "2000 / 2200", "1000 / 1100", "666.7 / 733.3", "480", "2.1% (08)",
                          "18.4 / — Other"])
        self.assertIn("cuBLAS pipeline, measured", self.cells("suite-bandwidth", "16 heads, 16 × 4096")[-1])
        self.assertEqual(self.block("suite-compute"), recordings.NOT_RECORDED)
        data = full_results()
        data["context"]["suite_compute"] = "h16_q1_b64_k4096"
        self.record("h200_2026-11-21.json", data)
        (row,) = self.tables("suite-compute")[0][1:]
        self.assertEqual(row[4], recordings.significant(73e3 * 3 / 2000))
        self.assertIn("; TFLOP/s cold;", self.block("suite-compute"))
        self.assertNotIn("of the fastest", self.tables("suite-dtypes")[0][0][4:-2])

    def test_a_stage_without_a_time_has_its_reason(self):
        data = full_results()
        for one in data["benchmarks"]:
            if one["name"].startswith("03_online_softmax/h16_q1_b64_k4096/cold"):
                one.update(error_occurred=True, error_message="too slow")
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.cells("suite-bandwidth", "16 heads, 64 × 4096")[1], "—")
        self.assertIn("03 on 1 of 2 (too slow)", self.block("suite-bandwidth"))

    def test_varlen(self):
        data = full_results()
        for one in data["benchmarks"]:
            one["name"] = one["name"].replace("05_tensor_core", "04_split_kv")
            if one["name"].startswith("04_split_kv/h128_q1_b128_k32768/cold"):
                one["real_time"] = 123456.0
        data["benchmarks"] += [{**one, "name": one["name"].replace("04_split_kv", "06_wgmma")}  # shown in ratios alone
                               for one in data["benchmarks"] if one["name"].startswith("04_split_kv")]
        self.record("h200_2026-11-21.json", data)
        paged, padded = (1000 * (TIMED.index(shape) + 1) for shape in SUITES["varlen"][:2])
        times, ratios, sizes = self.tables("varlen")
        self.assertEqual(times[0], ["lengths", "tokens", "longest", "04 paged", "04 padded", "ratio", "08 paged",
                                    "08 padded", "ratio"])
        self.assertEqual(times[1], ["128 heads, 128 × stepped 256 to 32768", "2113536", "32768", f"{paged / 2:.0f}",
                                    "123456", f"{2 * 123456 / paged:.1f}×", f"{paged / 3:.0f}", f"{padded / 3:.0f}",
                                    f"{padded / paged:.2f}×"])
        self.assertEqual(ratios[0], ["lengths", "03", "04", "06", "08", "cuBLAS pipeline"])
        self.assertEqual(ratios[1][-2:], [f"{padded / paged:.2f}×"] * 2)
        self.assertEqual(len(ratios), 3)
        self.assertEqual(sizes, [["lengths", "GB contiguous", "GB paged", "saved"],
                                 ["128 × stepped 256 to 32768", "4.83", "2.44", "50%"]])
        self.assertIn("figures/varlen.svg", self.block("varlen"))

    def test_the_padded_partner(self):
        for name, longest, partner in [("h16x2_q2_b4_klognormal8192_causal_split64_fp16", 27345.0,
                                        "h16x2_q2_b4_k27345_causal_split64_fp16"),
                                       ("h128_q1_b128_kskew131072", 131072, "h128_q1_b128_k131072")]:
            self.assertEqual(recordings.padded_partner(name, longest), partner)

    def test_combine_and_plan(self):
        plans, combines = self.tables("combine-and-plan")
        self.assertEqual(plans, [["shape", "05", "08"], ["128 heads, 1 × log-normal 2048", "6.43", "6.05"]])
        self.assertEqual(combines, [["shape", "slots", "combine, warm", "combine, cold", "decode, cold",
                                     "share of the decode"],
                                    ["128 heads, 1 × 4096", "66", "2.22", "4.44", "1000", "0.4%"]])
        data = full_results()
        del data["context"]["suite_plan"]  # then every plan is shown
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(len(self.tables("combine-and-plan")[0]), 3)

    def test_numerics(self):
        text = self.block("numerics")
        self.assertIn("| 128 heads | bf16 | 2 × 4096 | 0.01 | — | 2.1e-03 | 8.8e-07 |", text)
        self.assertIn("| 128 heads | fp16 | 2 × 4096 | 4 | 512 | 3.2e-04 | 8.8e-07 |", text)
        self.assertIn("| 16 heads on 2 KV heads, 4 query tokens, causal | bf16 | 2 × 256 | 0.01 | — | 4.3e-03 |", text)
        data = full_results()
        for one in data["benchmarks"]:
            if one["name"].startswith("08_seesaw/h128_q1_b2_k4096/error"):
                one.update(error_occurred=True, error_message="wrong")
        self.record("h200_2026-11-21.json", data)
        self.assertIn("No figure: 08 on 128 heads, 2 × 4096 (wrong).", self.block("numerics"))
        self.record("h200_2026-11-21.json", full_results())
        self.assertNotIn("b2_k4096", self.run_report("--table")[1].partition("numerics")[0])  # no times, so no table

    def test_errors_of_few_columns(self):
        names = ["01_naive", "02_shared_tiled", "03_online_softmax", "04_split_kv", "05_tensor_core", "06_wgmma",
                 "08_seesaw", "cublas_pipeline"]
        data = full_results()
        kept = [one for one in data["benchmarks"] if "/error/" not in one["name"]]
        def record(errors):
            data["benchmarks"] = kept + [
                {"name": f"{name}/{shape}/error/iterations:1", "real_time": 0, "rel_l2": error, "max_abs": 1e-5,
                 "cosine_difference": 2e-6, "lse_max_abs": 1e-6 * (number + 1)}
                for shape in ("h16_q1_b2_k4096", "h16_q1_b2_k256_fp16")
                for number, (name, error) in enumerate(zip(names, errors))]
            self.record("h200_2026-11-21.json", data)
        record([1.71e-3, 1.69e-3, 1.7e-3, 1.7e-3, 2e-3, 3e-3, 4e-3, 5e-3])
        self.assertEqual(self.tables("numerics"), [[
            ["type", "lengths", "logits' deviation", "split every", "01–04", "05", "08", "cuBLAS pipeline", "lse, 08"],
            ["bf16", "2 × 4096", "0.01", "—", "1.7e-03", "2.0e-03", "4.0e-03", "5.0e-03", "7.0e-06"],
            ["fp16", "2 × 256", "0.01", "—", "1.7e-03", "2.0e-03", "4.0e-03", "5.0e-03", "7.0e-06"]]])
        self.assertIn("Stages 01 to 04 agree", self.block("numerics"))
        next(one for one in data["benchmarks"] if one["name"].startswith("04_split_kv"))["rel_l2"] = 1.8e-3
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.tables("numerics")[0][0][4:], ["01", "03", "05", "08", "cuBLAS pipeline", "lse, 08"])
        self.assertNotIn("agree", self.block("numerics"))

    def test_errors_of_a_shape_that_is_timed(self):
        data = full_results()
        data["context"]["suite_numerics"] = "h128_q1_b64_k1024,h128_q1_b2_k4096"
        self.record("h200_2026-11-21.json", data)
        self.assertEqual([row[1] for row in self.tables("numerics")[0][1:]], ["64 × 1024", "2 × 4096"])

    def test_resources(self):
        cells = self.cells("resources", "08_seesaw")
        time = 1100 * (TIMED.index("h16_q2_b128_k27345") + 1) / 3
        # 512 mJ of 128 sequences with 2 query tokens each
        self.assertEqual(cells[1:], ["650", "1.75", f"{time:.0f}", "512", "2.00"])
        self.assertEqual(self.block("resources").count("| 08_seesaw |"), 1)  # of that suite alone
        data = full_results()
        for one in data["benchmarks"]:
            one.pop("power_w", None)
            one.pop("energy_mj", None)
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.cells("resources", "08_seesaw")[1:], ["—", "1.75", f"{time:.0f}", "—", "—"])

    def test_cache(self):
        self.assertEqual(self.cells("cache", "allocate")[1:], ["4.05 (3.74–6.43)", "246", "a page"])
        self.assertEqual(self.cells("cache", "128 × 1")[3], "54.5")
        self.assertEqual(self.cells("cache", "1 × 4096, fp8_tile128")[3], "876")
        self.assertEqual(self.cells("cache", "stepped")[2:4], ["4.83", "2.44"])
        self.assertEqual(self.cells("cache", "cuda_malloc")[1], "4321 (3.74–6.43)")
        self.assertEqual([self.cells("cache", "mha_32")[i] for i in (1, 6, 7, 8, 9)], ["524", "50%", "98.5%", "1.5%", "2110"])
        self.assertNotIn("commit", self.block("cache"))  # the page says it above

    def test_the_cache_of_the_file_that_is_shown(self):
        elsewhere = full_results()
        elsewhere["benchmarks"][-1]["bytes_paged"] = 1.23e9
        (self.root / "elsewhere.json").write_text(json.dumps(elsewhere))
        self.assertIn("1.23", self.run_report("--table", "--results", str(self.root / "elsewhere.json"))[1])

    def test_a_cache_measured_apart(self):
        data = full_results()
        data["benchmarks"] = [one for one in data["benchmarks"] if not one["name"].startswith("cache")]
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.block("cache"), recordings.NOT_RECORDED)
        apart = results()
        apart["context"]["commit"] = "of the cache"
        for key in [*recordings.REQUIRED_CEILINGS, "wall_s", "suite_table"]:  # the cache's suite has none of these
            del apart["context"][key]
        apart["benchmarks"] = cache_entries()
        self.record("h200_cache_2026-11-20.json", apart)
        self.assertEqual(self.cells("cache", "allocate")[1], "4.05 (3.74–6.43)")
        self.assertEqual(self.cells("cache", "stepped")[2], "4.83")
        self.assertEqual(self.cells("cache", "128 × 1")[1], "5.41 (4.54–5.96)")
        self.assertIn("commit of the cache,", self.block("cache"))
        self.assertEqual(self.run_report("--table")[0], 0)
        # The newer of two is shown, in the table and in running text.
        self.record("h200_2026-11-21.json", full_results())
        apart["context"]["date_utc"] = "2026-11-19T00:00:00Z"
        self.record("h200_cache_2026-11-20.json", apart)
        self.assertEqual(self.cells("cache", "allocate")[1], "4.05 (3.74–6.43)")
        self.assertNotIn("commit of the cache,", self.block("cache"))
        apart["context"]["date_utc"] = "2026-12-01T00:00:00Z"
        apart["benchmarks"][0]["ns"] = 7.77
        self.record("h200_cache_2026-11-20.json", apart)
        self.page.write_text(self.page.read_text() + "It takes <!--v cache host_allocate wall.ns-->1<!--/v--> ns.\n")
        self.assertEqual(self.cells("cache", "allocate")[1], "7.77 (3.74–6.43)")
        self.assertIn("It takes <!--v cache host_allocate wall.ns-->7.77<!--/v--> ns.", self.page.read_text())

    def test_host_time_of_the_python_package(self):
        page = self.root / "docs" / "python.md"
        page.write_text("<!-- host-time:begin -->\n<!-- host-time:end -->\n")
        self.assertEqual(self.run_report("--update")[0], 0)
        self.assertIn(recordings.NOT_RECORDED, page.read_text())
        self.record("python_h200_2026-11-29.json", python("2026-11-29T01:02:03Z"))
        newer = python("2026-11-30T01:02:03Z")
        newer["shapes"]["h16_q1_b4_k256"]["plan"] = [5.55, 4.44]
        self.record("python_h200_2026-11-30.json", newer)
        other = python("2026-12-01T01:02:03Z")
        other["context"]["gpu"] = "Another GPU"
        self.record("python_other_2026-12-01.json", other)
        self.assertEqual(self.run_report("--update")[0], 0)
        text = page.read_text()
        self.assertIn("| call | 16 heads, 4 × 256 | 128 heads, 1 × 4096 |", text)
        self.assertIn("| plan | 5.5 (4.4) | 10.0 (8.9) |", text)
        self.assertIn("| FlashMLA's own, planned | 43.2 (40.1) | — |", text)
        self.assertIn("import mla_stages 15 ms. NVIDIA H200, driver 580.1, A processor, Python 3.12.3, PyTorch 2.11.0, commit "
                      "abc1234, 2026-11-30. Not timed: CuPy, ModuleNotFoundError: none.", text)
        for spoil, said in [(lambda data: data["context"].pop("cpu"), "context lacks 'cpu'"),
                            (lambda data: data["shapes"]["h16_q1_b4_k256"].update(plan=7), "plan: not [median, least]"),
                            (lambda data: data["shapes"].update(small={}), "'small' is no shape"),
                            (lambda data: data.update(shapes={}), "no shapes")]:
            data = python("2026-11-30T01:02:03Z")
            spoil(data)
            self.record("python_h200_2026-11-30.json", data)
            code, printed = self.run_report("--check")
            self.assertEqual(code, 2, printed)
            self.assertIn(said, printed)

    def test_service_with_quantised_caches(self):
        self.record("h200_service_2026-11-22.json", service())
        self.assertEqual(self.block("service-formats"), recordings.NOT_RECORDED)
        formats = service()
        formats["context"].update(date_utc="2026-11-25T12:00:00Z", commit="c8b1750")
        formats["runs"] = [{**run, "scenario": "small_device_full", "cache_format": name,
                            "figures": {**run["figures"], "tokens_per_s": factor * run["figures"]["tokens_per_s"]}}
                           for name, factor in [("16bit", 1), ("fp8_tile128", 1.5)] for run in formats["runs"]]
        self.record("h200_service_formats_2026-11-25.json", formats)
        rows = self.tables("service-formats")[0]
        self.assertEqual([row[:2] for row in rows[1:]],
                         [["paged, 08_seesaw", "`16bit`"], ["paged, 08_seesaw", "`fp8_tile128`"],
                          ["static, 02_shared_tiled", "`16bit`"], ["static, 02_shared_tiled", "`fp8_tile128`"]])
        ratio = rows[0].index("ratio")
        self.assertEqual([row[ratio] for row in rows[1:]], ["1.00×", "1.50×", "1.00×", "1.50×"])
        self.assertEqual(rows[2][ratio - 1], "14814")
        self.assertIn("commit c8b1750", self.block("service-formats"))
        self.assertIn("commit fed4321", self.block("service"))  # the older one, of 16 bits alone
        self.assertIn("chat_1000", self.block("service"))

    def test_service(self):
        self.assertEqual(self.block("service"), recordings.NOT_RECORDED)
        self.record("h200_service_2026-11-22.json", service())
        self.assertEqual(self.cells("service", " ")[1:], ["paged, 08_seesaw, 61 layers",
                                                           "static, 02_shared_tiled, 61 layers"])
        self.assertEqual(self.cells("service", "tokens per second")[1:], ["9876", "4321"])
        self.assertEqual(self.tables("service")[0],
                         [["scenario", "tokens per second", "ratio", "token to token, ms, mean", "token to token, ms, p99",
                           "held rows wasted", "requests finished"],
                          ["chat_1000", "9876 / 4321", "2.29×", "20.00 / 20.00", "22.00 / 22.00", "3100.0% / 3100.0%",
                           "11 of 10 / 11 of 10"]])
        self.assertTrue(self.block("service").startswith("Paged (08_seesaw) / static (02_shared_tiled):"))
        self.assertEqual(self.cells("service", "why rejected")[1:], ["—", "too long 7"])
        self.assertIn("wall time with the GPU's kernels", self.block("service"))
        none = service()
        none["runs"][0]["rejected_by_reason"]["too long"] = 0
        none["runs"][0]["figures"]["tokens_per_s"] = 6.502
        self.record("h200_service_2026-11-22.json", none)
        self.assertNotIn("why rejected", self.block("service"))
        self.assertEqual(self.tables("service")[0][1][1:3], ["9876 / 6.50", "1519×"])
        waiting = service()
        waiting["runs"][0]["figures"]["first_token_ms_p50"] = None  # no request had one
        self.record("h200_service_2026-11-22.json", waiting)
        self.assertIn("—", self.cells("service", "first token, ms: p50, p99")[1:])
        model = service()
        model["context"].update(machine="model", clock="simulated", date_utc="2026-12-01T00:00:00Z")
        self.record("model_service_2026-12-01.json", model)
        self.assertIn("fed4321, 2026-11-22", self.block("service"))  # the GPU's is preferred to the model's

    def test_figures_that_some_services_have(self):
        self.record("h200_service_2026-11-22.json", service())
        self.assertEqual(self.block("service-requests"), recordings.NOT_RECORDED)
        longer = service()
        longer["context"].update(commit="1234abc", date_utc="2026-11-30T12:00:00Z")
        self.record("h200_requests_2026-11-30.json", longer)
        self.assertIn("commit 1234abc", self.block("service-requests"))
        self.assertIn("commit fed4321", self.block("service"))
        self.assertNotIn("energy", self.block("service"))
        newer = service()
        newer["context"]["date_utc"] = "2026-11-29T12:00:00Z"
        newer["runs"][0]["figures"].update(target_token_ms_mean=50, target_token_ms_p99=100, targets_met=False, prefix_hits=0,
                                           prompts=9, energy_mj_per_token=None, alerts=0)
        newer["runs"][1]["figures"].update(target_token_ms_mean=50, target_token_ms_p99=100, targets_met=True, prefix_hits=3,
                                           prompts=4, energy_mj_per_token=123.4, alerts=0)
        self.record("h200_service_2026-11-29.json", newer)
        self.assertEqual(self.cells("service", "targets, token to token, ms: mean, p99; met")[1:], ["50, 100; yes", "50, 100; no"])
        self.assertEqual(self.cells("service", "prompts that found their prefix")[1:], ["3 of 4", "0 of 9"])
        self.assertEqual(self.cells("service", "energy per token, mJ")[1:], ["123", "—"])
        self.assertNotIn("alerts", self.block("service"))
        self.assertNotIn("price", self.block("service"))
        newer["runs"][0]["figures"].update(price_per_hour=3, cost_per_1000_tokens=0.00123)
        self.record("h200_service_2026-11-29.json", newer)
        self.assertEqual(self.cells("service", "price of the GPU per hour; cost of 1000 tokens")[1:], ["—", "3; 0.0012"])
        newer["context"]["step"] = "from here to there"
        self.record("h200_service_2026-11-29.json", newer)
        self.assertIn("(a step lasts from here to there)", self.block("service"))

    def test_recordings_are_listed_and_what_is_missing_is_said(self):
        (self.root / "docs" / "texts.md").write_text("<!-- recordings:begin -->\n<!-- recordings:end -->\n")
        def listed():
            self.run_report("--update")
            return (self.root / "docs" / "texts.md").read_text()
        first = listed()
        for missing in ["suite `texts`", "suite `cross`", "counters of the hardware", "latency of requests", "H100"]:
            self.assertIn(missing, first.split("Not recorded yet:")[1])
        self.assertRegex(first, r"\| stages 03, 05, 08; suites table, bandwidth, .*\| NVIDIA H200 \| abc1234 \| 2026-11-20 \| 150 s \|")
        self.record("h200_service_2026-11-22.json", service())
        self.assertIn("| service: chat_1000 | NVIDIA H200 | fed4321 | 2026-11-22 | — |", listed())
        newer = service()
        newer["context"]["gpu"] = "NVIDIA H100 80GB HBM3"
        newer["runs"][0]["figures"]["request_ms_mean"] = 5
        self.record("h100_service_2026-11-29.json", newer)
        busy = {"context": {"schema": recordings.COUNTERS_SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200", "driver": "580.1",
                            "ncu": "Version 1", "nvcc": "13", "commit": "abc1234", "date": "2026-11-30"},
                "runs": [{"stage": "08_seesaw", "shape": "h128_q1_b64_k4096",
                          "kernels": {"decode": {"launches": 1, "metrics": {"sm__warps_active.avg.pct_of_peak_sustained_active": 18.7,
                                                                            "gpu__time_duration.sum": 120000}}}}]}
        self.record("counters_hardware.json", busy)
        self.record("python_h200_2026-11-29.json", python("2026-11-29T01:02:03Z"))
        self.assertIn("| calls from Python | NVIDIA H200 |", listed())
        self.record("h200_traditional_2026-11-30.json", traditional_layers())
        self.assertIn("| forms of attention: prefill | NVIDIA H200 |", listed())
        (self.root / "bench" / "results" / "h200_traditional_2026-11-30.json").unlink()
        last = listed()
        self.assertIn("| counters of the hardware | NVIDIA H200 | abc1234 | 2026-11-30 | — |", last)
        self.assertTrue(last.rstrip().split("Not recorded yet:")[1].startswith(" suite `texts`; suite `cross`; forms of attention on a GPU.\n"))

    def test_several_gpus(self):
        page = self.root / "docs" / "parallel.md"
        names = ["parallel-times", "parallel-conformance", "parallel-faults", "parallel-timelines", "parallel-scale", "parallel-crossover"]
        page.write_text("\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in names))
        def block(name):
            self.assertEqual(self.run_report("--update")[0], 0)
            return page.read_text().split(f"<!-- {name}:begin -->")[1].split("<!--")[0].strip()
        for name in names:
            self.assertEqual(block(name), recordings.NOT_RECORDED)
        data = over_two_gpus()
        row = data["rows"][0]
        self.record("h200x2_parallel_2026-11-30.json", data)
        scale = model_of_scale()
        self.record("parallel_scale.json", scale)
        times = block("parallel-times").splitlines()
        self.assertIn("2 × NVIDIA H200, driver 580.1, NCCL 2.28.9, nvcc 13, commit abc1234, 2026-11-30.", times[0])
        self.assertIn("1 of 2 predictions are within 1.3× of the measured time.", times[0])
        self.assertIn("| context, all_to_all | 100.0 | 58.0 | 0.580 | 50.0 | 7.00 | 6.00 | 5.00 | 60.0 | 1.03 |", times[4])
        self.assertIn("| context, all_to_all, 2 slices |", times[5])
        self.assertTrue(times[5].endswith("| — | — |"))
        self.assertIn("| batch | 100.0 | 52.0 | 0.520 | 50.0 | — | — | — | 20.0 | 0.38 |", times[6])
        self.assertIn("| 2 | 72 | 0 |", block("parallel-conformance"))
        self.assertIn("| rank 1 is killed | `it is gone` | 0.12 s |", block("parallel-faults"))
        older = copy.deepcopy(data)
        older["faults"][0].pop("rank")
        self.record("h200x2_parallel_2026-11-30.json", older)
        self.assertIn("| is killed | `it is gone` | 0.12 s |", block("parallel-faults"))
        # Several decodes to a graph, and over several numbers of GPUs.
        wider = copy.deepcopy(data)
        wider["rows"] = [{**row, "ranks": ranks, "together": 8, "together_us": 57.0} for ranks in [2, 4]]
        self.record("h200x2_parallel_2026-11-30.json", wider)
        shown = block("parallel-times").splitlines()
        self.assertIn("The columns after them have 8 decodes or exchanges in one graph", shown[0])
        self.assertIn(" | 4 | heads 2 × context 2, all_to_all | 100.0 | 58.0 | 0.580 | 57.0 | 50.0 | 7.00 |", shown[5])
        self.record("h200x2_parallel_2026-11-30.json", data)
        self.assertIn("| 2 | **60.0** | 90.0 | 20.0 | 4.00 |", block("parallel-scale"))
        lines = block("parallel-timelines").splitlines()
        self.assertEqual(lines[0], "2 × NVIDIA H200, driver 580.1, NCCL 2.28.9, nvcc 13, commit abc1234, 2026-11-30.")
        self.assertIn("all_to_all, 08_seesaw: the last of 100. Times of two ranks can be compared to within 1.2 µs", lines[2])
        self.assertIn("A decode takes 70.0 µs; one that marks its phases takes 71.5 µs.", lines[2])
        begin = lines.index("```text")
        zero, zero_sent, one, one_sent = (line[18:] for line in lines[begin + 1:begin + 5])
        self.assertEqual([line[:18] for line in lines[begin + 1:begin + 5]],
                         ["rank 0  decode    ", "        exchange  ", "rank 1  decode    ", "        exchange  "])
        place = 96 / 72  # of a microsecond
        self.assertRegex(zero, r"^c{3}b+\.+ *m+$")
        self.assertEqual(zero.index("."), round(50 * place))
        self.assertRegex(zero_sent, r"^ {67}-{5}x{13}$")  # rank 1 comes 4 us later
        self.assertRegex(one, r"^ {5}c{3}b+\.+ *m+$")
        self.assertRegex(one_sent, r"^ {72}x+$")
        self.assertTrue(lines[begin + 5].endswith("72.0 µs"))
        self.assertIn("| exchange | 50.0 | 14.0, of it 4.0 alone | 54.0 | 10.0 |", lines)
        self.assertIn("| bulk decode, slice 1 | 52.0 | 48.0 | 56.0 | 48.0 |", lines)
        # Heads and pages shared both, of which the best is shown; buffers beside the cache; the assumed and the fitted.
        wide = copy.deepcopy(scale)
        wide["context"].update(links="two GPUs, 2026-11-30", merge="assumed")
        wide["links"].update(merge_us=6, memory_gbps=4600)
        for one in wide["rows"]:
            one.update(head_ranks=1, page_ranks=1, buffers_gb=1.5 if one["way"].startswith("context") else 0)
        wide["rows"] += [{**wide["rows"][1], "way": way, "ranks": 4, "us": us, "memory_gb": memory, "head_ranks": heads, "page_ranks": pages}
                         for way, heads, pages, us, memory in [("context, all_gather", 1, 4, 44, 2.5), ("heads 2 × context 2, all_gather", 2, 2, 42, 4.5),
                                                               ("heads 2 × context 2, all_to_all", 2, 2, 41, 4.25)]]
        wide["crossovers"] = [{"heads": 128, "sequences": 1, "ranks": 2, "over_heads": over_heads, "over_one": over_one}
                              for over_heads, over_one in [(464364.2, 0), (None, 1234)]]
        self.record("parallel_scale.json", wide)
        shown = block("parallel-scale")
        self.assertIn("A kernel around an exchange: 6.0 µs and 4600 GB/s (assumed).", shown)
        self.assertIn("| GPUs | context, all_to_all | heads | batch | context, all_gather | heads × context | context: cache per GPU, GB | "
                      "context: buffers per GPU, GB |", shown)
        self.assertIn("| 2 | **60.0** | 90.0 | 20.0 | — | — | 2.50 | 1.5 |", shown)
        self.assertIn("| 4 | — | — | — | 44.0 | **41.0** (2 × 2, all_to_all) | 1.00 | 1.5 |", shown)
        self.assertIn("| 128 | 1 | 2 | 460000 | always |\n| 128 | 1 | 2 | never | 1200 |", block("parallel-crossover"))
        self.assertIn("exchange and merge were fitted to the rows of two GPUs here.", block("parallel-times"))
        self.assertEqual(recordings.problems(wide, ""), [])
        wide["crossovers"][0].pop("over_one")
        self.assertEqual(len(recordings.problems(wide, "")), 1)
        # Of each number of GPUs the newest recording, whatever it is called; heads and pages shared both under the model's name.
        four = over_two_gpus()
        four["context"].update(ranks=4, commit="4444444", date_utc="2026-11-29T01:02:03Z")
        four["rows"] = [{**row, "mode": mode, "ranks": 4, "page_ranks": pages, "exchange": "all_gather", "whole_us": 40.0}
                        for mode, pages in [("context", 4), ("both", 2)]]
        four["conformance"] = [{"ranks": ranks, "cases": 80, "wrong": 0} for ranks in [4, 2]]
        self.record("h200x4_parallel_2026-11-29.json", four)
        times = block("parallel-times")
        self.assertLess(times.index("2 × NVIDIA H200, driver 580.1"), times.index("4 × NVIDIA H200, driver 580.1"))
        self.assertIn("| context, all_to_all | 100.0 | 58.0 |", times)
        self.assertRegex(times, r"\| context, all_gather \| 100.0 \| 40.0 \|.* 44.0 \| 1.10 \|")
        self.assertRegex(times, r"\| heads 2 × context 2, all_gather \| 100.0 \| 40.0 \|.* 42.0 \| 1.05 \|")
        self.assertEqual(times.count("exchange and merge were fitted"), 1)
        self.assertIn("| 2 | 72 | 0 |\n| 4 | 80 | 0 |", block("parallel-conformance"))
        # Ranks that share GPUs have rows of their own, and are no recording of several GPUs.
        shared = over_two_gpus()
        shared["context"].update(date_utc="2026-11-30T01:02:03Z")
        shared = {"context": shared["context"], "rows": [], "conformance": [{"ranks": 2, "cases": 70, "wrong": 0, "gpus": 1}]}
        self.assertEqual(recordings.problems(shared, ""), [])
        self.record("h200_parallel_2026-11-30.json", shared)
        self.assertIn("| 2 | 1 | 70 | 0 |\n| 2 | 2 | 72 | 0 |\n| 4 | 4 | 80 | 0 |", block("parallel-conformance"))
        self.assertEqual(block("parallel-times"), times)
        (self.root / "bench" / "results" / "h200_parallel_2026-11-30.json").unlink()
        (self.root / "bench" / "results" / "h200x4_parallel_2026-11-29.json").unlink()
        # Each block shows the newest recording that has its part.
        newer = over_two_gpus()
        newer["context"].update(commit="fffffff", date_utc="2026-12-01T01:02:03Z")
        newer["rows"] = [{key: value for key, value in row.items() if not key.endswith("_us")}]
        newer["conformance"], newer["faults"] = [], []
        self.record("h200x2_timeline_2026-12-01.json", newer)
        self.assertIn("commit fffffff", block("parallel-timelines"))
        self.assertIn("commit abc1234", block("parallel-times"))
        self.assertIn("| 2 | 72 | 0 |", block("parallel-conformance"))
        self.assertIn("0.12 s", block("parallel-faults"))
        self.assertEqual(recordings.problems(data, ""), [])
        self.assertEqual(recordings.problems(scale, ""), [])
        for fault in [lambda one: one["context"].pop("nccl"), lambda one: one["rows"].clear(), lambda one: one["rows"][0].pop("one_us"),
                      lambda one: one["rows"][0].pop("exchange"), lambda one: one["rows"][0].update(wrong=["rank 0: out"]),
                      lambda one: one["conformance"][0].pop("cases"), lambda one: one["faults"][0].pop("seconds"), lambda one: one["timelines"][0].pop("measured"),
                      lambda one: one["timelines"][0].update(phases=[]), lambda one: one["timelines"][1]["phases"].pop(),
                      lambda one: one["timelines"][0]["phases"][3].pop("waited_us"), lambda one: one["timelines"][0]["phases"][0].pop("end_us")]:
            spoilt = copy.deepcopy(data)
            fault(spoilt)
            self.assertEqual(len(recordings.problems(spoilt, "")), 1)
        for fault in [lambda one: one["context"].pop("links"), lambda one: one["links"].pop("hop_us"), lambda one: one["rows"][1].pop("us")]:
            spoilt = copy.deepcopy(scale)
            fault(spoilt)
            self.assertEqual(len(recordings.problems(spoilt, "")), 1)

    def test_a_service_file_is_checked(self):
        self.assertEqual(recordings.problems(service(), ""), [])
        faults = [lambda data: data["context"].pop("clock"), lambda data: data["context"].update(clock="sundial"),
                  lambda data: data["runs"].clear(), lambda data: data["runs"][0].update(way="other"),
                  lambda data: data["runs"][0].pop("stage")]
        faults += [lambda data, name=name: data["runs"][1]["figures"].pop(name) for name in recordings.REQUIRED_FIGURES]
        for number, fault in enumerate(faults):
            data = service()
            fault(data)
            self.assertEqual(len(recordings.problems(data, "")), 1, number)
        self.record("h200_service_2026-11-22.json", data)
        self.assertEqual(self.run_report("--check")[0], 2)

    def test_peers(self):
        self.assertEqual(self.block("peers"), recordings.NOT_RECORDED)
        self.record("peers_h200.json", peers("2026-11-20T05:02:20Z", {"h16_q1_b64_k4096": {"Other": [18.4, None]},
                                                                     "h128_q1_b1_k4096": {"Idle": [None, None]}}))
        self.assertEqual([row[0] for row in self.tables("peers")[0]], ["shape", "16 heads, 64 × 4096"])
        self.assertNotIn("Idle", self.block("peers") + (self.root / "README.md").read_text())
        self.assertNotIn("2026-11-20T", self.page.read_text())
        self.assertEqual(self.cells("peers", "16 heads, 64 × 4096")[1:],
                         ["666.7 / 733.3 (08)", "500.0 / 550.0", "18.4 / —"])
        self.assertIn("driver 580.", self.block("peers"))

    def test_a_peer_without_figures_of_the_readmes_shapes(self):
        self.record("peers_h200.json", peers("2026-11-20", {"h16_q1_b16_k4096": {"Other": [18.4, None]}}))
        self.block("peers")
        self.assertNotIn("| Other |", (self.root / "README.md").read_text())

    def test_quantised_caches(self):
        """A recording with them has a table of its own. It is not taken for that of later rungs, which has 16 bits."""
        self.assertEqual(self.block("quantised"), recordings.NOT_RECORDED)
        chapter = self.root / "stages" / "12_fp8" / "README.md"
        chapter.parent.mkdir(parents=True)
        chapter.write_text("<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        big, small = "h128_q1_b64_k4096", "h16_q1_b64_k4096"
        data = full_results()
        data["context"].update(date_utc="2026-11-26T00:00:00Z", commit="codes12",
                               suite_quantised=",".join([big, big + "_fp8_tile128", small, small + "_int8_tile128"]))
        data["benchmarks"] = [
            entry(f"{stage}/{shape}/{mode}", time * (2 if mode == "sustained" else 1), label="idea", floor_share=0.5)
            for shape, times in {
                big: {"08_seesaw": 60.0, "11_cluster": 55.0}, small: {"08_seesaw": 20.0},
                big + "_fp8_tile128": {"12_fp8": 44.0, "13_quantised_mma": 50.0}, small + "_int8_tile128": {"12_fp8": 10.0},
                small + "_fp8_tensor_fp16": {"12_fp8": 9.0}}.items()
            for mode in ["cold", "sustained"] for stage, time in times.items()]
        self.record("h200_quantised_2026-11-26.json", data)
        self.assertEqual(self.cells("quantised", recordings.shape_title(big))[1:],
                         ["55.0 / 110.0 (11)", "44.0 / 88.0 (12)", "0.80", "—", "—", "—", "—"])
        self.assertEqual(self.cells("quantised", recordings.shape_title(small))[1:],
                         ["20.0 / 40.0 (08)", "—", "—", "—", "—", "10.0 / 20.0 (12)", "0.50"])
        self.assertEqual(len(self.tables("quantised")[0]), 3)  # the header, and one row per shape in 16 bits
        self.assertEqual(self.block("later"), recordings.NOT_RECORDED)
        self.assertIn("16 heads, 64 × 4096, cache fp8_tensor, fp16", chapter.read_text())
        self.assertIn("commit codes12", chapter.read_text())

    def test_suite_texts(self):
        data = results()
        data["context"]["ceiling_matrix_cold_tflops"] = "800"
        more = {"mean_us": 101.0, "variance_us2": 4.0, "cache_bytes": 2e6, "workspace_bytes": 3e6, "peak_bytes": 7e6}
        times = {"h128_q1_b64_k8192": 100.0, "h128_q1_k512+512": 11.0, "h128_q1_b2_k512": 10.0,
                 "h128_q1_b4_klognormal2048": 20.0, "h128_q1_b4_k3000": 50.0, "h128_q1_b2_k512_fp16": 12.0,
                 "h128_q2_b2_k512_causal": 15.0, "h128_q1_b2_k1024": 14.0, "h64_q1_b1_k512": 8.0, "h128_q1_b1_k512": 9.0}
        longest = {"h128_q1_k512+512": 512, "h128_q1_b4_klognormal2048": 3000}
        data["context"]["suite_texts"] = ",".join(times)
        data["benchmarks"] = [entry(f"auto/{shape}/cold", time, longest=longest.get(shape, 1), **more)
                              for shape, time in times.items()]
        self.record("h200_texts_2026-11-30.json", data)
        configurations, lists, grid, rest = self.tables("texts")
        self.assertEqual([row[0] for row in configurations[1:]], ["128 heads, 64 × 8192"])
        self.assertEqual(configurations[1][2:], ["100.0", "101.0", "4.00", "730", "91%", "3200", "70%", "2.00", "3.00", "7.00"])
        self.assertEqual(lists[1], ["128 heads, 512 + 512", "11.0", "10.0", "0.909×", "2.00", "2.00"])
        self.assertEqual(lists[2][:4], ["128 heads, 4 × log-normal 2048", "20.0", "50.0", "2.50×"])
        self.assertEqual(grid, [["heads", "sequences", "512", "1024"], ["128", "1", "9.00", "—"], ["128", "2", "10.0", "14.0"],
                                ["64", "1", "8.00", "—"]])
        self.assertEqual(rest[1], ["128", "1.200", "1.500", "—"])
        # A recording of the chooser alone is used for nothing else.
        self.assertEqual(recordings.recorded(self.root).name, "h200_2026-11-21.json")

    def test_cross_attention(self):
        data = results()
        data["context"]["suite_cross"] = "h16_q77_b8_k1024"
        more = {"cache_bytes": 9.4e6, "workspace_bytes": 1e6, "peak_bytes": 4e7, "label": "10"}
        data["benchmarks"] = [entry("auto/h16_q77_b8_k1024/cold", 50.0, **more)]
        self.record("h200_cross_2026-11-30.json", data)
        self.assertEqual(self.tables("cross")[0][1], ["16 heads, 77 query tokens, 8 × 1024", "10", "50.0", "1460", "2.1%",
                                                      "9.40", "1.00", "40.0", "1.7e-03"])

    def test_steps_to_a_stage(self):
        page = self.root / "stages" / "05_tensor_core" / "steps" / "README.md"
        page.parent.mkdir(parents=True)
        page.write_text("<!-- times:begin -->\n<!-- times:end -->\n")
        def figure(expression):
            page.write_text(page.read_text() + f"It is <!--v {expression}--><!--/v-->.\n")
            self.run_report("--update")
            return page.read_text()
        self.run_report("--update")
        self.assertIn(recordings.NOT_RECORDED, page.read_text())
        data = results()
        data["context"].update(commit="fed4321", date_utc="2026-11-30T12:00:00Z")
        shape = "h128_q1_b64_k4096"
        times = {"04_split_kv": 2000.0, "step_05_1_plain_mma": 1000.0, "step_05_2_ldmatrix": 750.0, "step_08_1_other": 1.0,
                 "05_tensor_core": 300.0}
        data["benchmarks"] = [entry(f"{stage}/{shape}/cold", time) for stage, time in times.items()]
        self.record("h200_steps_2026-11-30.json", data)
        self.run_report("--update")
        rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
        self.assertEqual(rows, [["| kernel", "128 heads, 64 × 4096 |"], ["| 04", "2000 |"], ["| 1 plain mma", "1000 (0.50×) |"],
                                ["| 2 ldmatrix", "750.0 (0.75×) |"], ["| 05", "300.0 (0.40×) |"]])
        self.assertIn("fed4321", page.read_text())
        self.assertIn("-->0.75<!--/v-->", figure(f"step_05_2 {shape} cold / step_05_1 : 2"))  # of the steps' own recording
        # Steps are no stages: they have no chapter, and no other table uses this recording.
        self.assertEqual(recordings.load_later(self.root, recordings.recorded(self.root)).name, "h200_2026-11-21.json")
        self.assertIn("stages 04, 05, and steps to 05, 08", report.what_is_recorded(data))

    def test_traditional_forms(self):
        data = traditional_layers()
        self.record("h200_traditional_2026-11-30.json", data)
        (rows,) = self.tables("traditional")
        self.assertEqual(rows[1], ["multi-head", "GPU", "80.0", "—", "—", "0.667×", "0.500×", "30.0", "—", "40.0", "—", "—", "43%",
                                   "5.00", "1.00", "2.00", "3.00", "4.00", "3.0e-03"])
        self.assertEqual(rows[2][:9], ["MLA absorbed", "GPU", "160.0", "0.667×", "0.500×", "—", "—", "—", "7.00"])
        self.assertEqual(rows[3][:4], ["multi-head", "CPU", "9000", "—"])
        self.assertEqual(len(rows), 4)
        data["benchmarks"].append(layer(f"grouped/{SETTING}/cpu", 3000.0, **{**WHOLE_LAYER, "flop": 5e8}))
        self.record("h200_traditional_2026-11-30.json", data)
        self.assertEqual(self.tables("traditional")[0][4][:5], ["grouped", "CPU", "3000", "2.00×", "3.00×"])  # by FLOP there
        # A later file adds to it; cross-attention has a table of its own.
        self.assertEqual(self.block("traditional-cross"), recordings.NOT_RECORDED)
        later = {"context": {**data["context"], "date_utc": "2026-12-01T12:00:00Z", "commit": "fed4321"},
                 "benchmarks": [layer(f"multi_head/{SETTING}/cold", 70.0, **WHOLE_LAYER),
                                layer("grouped/cross_h16_d64_n1024_q77_b8/cold", 5.0, **WHOLE_LAYER)]}
        self.record("h200_traditional_2026-12-01.json", later)
        self.assertEqual(self.tables("traditional")[0][1][2], "70.0")
        self.assertIn("fed4321", self.block("traditional"))
        self.assertEqual(self.tables("traditional-cross")[0][1][:3], ["grouped", "GPU", "5.00"])
        del data["benchmarks"][0]["cache_bytes"]
        self.record("h200_traditional_2026-11-30.json", data)
        self.assertIn("lacks 'cache_bytes'", self.run_report("--update")[1])

    def test_rungs_of_a_later_recording(self):
        """They have a table, beside the chooser and the best peer, and figures of their own in their chapters."""
        chapter = self.root / "stages" / "11_cluster" / "README.md"
        chapter.parent.mkdir(parents=True)
        chapter.write_text("<!-- measurement:begin -->\n<!-- measurement:end -->\n")
        self.assertEqual(self.block("later"), recordings.NOT_RECORDED)
        big, small, alone = "h128_q1_b64_k4096", "h16_q1_b64_k4096", "h64_q1_b1_k64"
        data = results()
        data["context"].update(commit="later", date_utc="2026-11-25T00:00:00Z",
                               suite_table=",".join(recordings.README_SHAPES + [alone]))
        data["benchmarks"] = [
            entry(f"{stage}/{shape}/{mode}", time * (2 if mode == "sustained" else 1), label="idea", floor_share=0.5)
            for shape in [*recordings.README_SHAPES, alone] for mode in ["cold", "sustained"]
            for stage, time in [("08_seesaw", 60.0), ("10_few_heads", 99.0), ("11_cluster", 55.0), ("auto", 50.0)]]
        for one in data["benchmarks"]:
            one["speedup"] = 1.8  # over the stage before it: 10, which is not what 11 starts from
        self.record("h200_later_2026-11-25.json", data)
        self.record("peers_h200.json", peers("2026-11-24", {
            big: {"Fast": [100.0, 121.0], "Slow": [110.0, 120.0], "08_seesaw (same run)": [50.0, 100.0]},
            small: {"Fast": [25.0, None], "08_seesaw (same run)": [50.0, None]}}))
        self.record("peers_other.json", peers("2026-11-23", {big: {"Other": [1.0, 1.0]}}))  # no stage was timed in the same run
        self.assertEqual(self.cells("later", recordings.shape_title(big))[1:],
                         ["60.0 / 120.0", "99.0 / 198.0", "55.0 / 110.0", "50.0 / 100.0", "100.0 Fast", "120.0 Slow", "2.400", "1.440"])
        self.assertEqual(self.cells("later", recordings.shape_title(alone))[5:], ["—"] * 4)
        self.assertEqual(self.cells("later", "all")[1:], ["1.200 (2 shapes)", "1.440 (1 shapes)"])
        self.assertEqual(self.cells("later", "up to 32 heads")[1:], ["0.600 (1 shapes)", "—"])
        self.assertIn("in one run with 08_seesaw", self.block("peers"))
        self.assertIn("55.0 (54.5–56.1)", chapter.read_text())
        self.assertIn("| 1.1× |", chapter.read_text())
        self.assertIn("commit later", chapter.read_text())
        self.assertIn("commit abc1234", self.block("run"))  # the recording with the ladder's first rung
        self.assertEqual(self.cells("choice", recordings.shape_title(big))[2:], ["50.0 / 100.0", "55.0 / 110.0 (11)", "0.909"])
        self.assertEqual(self.run_report("--check")[0], 1)  # figures are not drawn
        for one in data["benchmarks"]:
            if one["name"].startswith(f"auto/{big}/cold"):
                one["real_time"] = 57.0
        self.record("h200_later_2026-11-25.json", data)
        self.assertIn("57.0 µs, 11_cluster 55.0", self.run_report("--check")[1])

    def test_later_nothing_does_not_hide_a_figure(self):
        for name, date, times in [("a", "2026-11-20", [18.4, None]), ("b", "2026-11-21", [None, None])]:
            self.record(f"peers_{name}.json", peers(date, {"h16_q1_b64_k4096": {"Other": times}}))
        self.assertEqual(self.cells("peers", "16 heads, 64 × 4096")[-1], "18.4 / —")

    def test_order(self):
        data = full_results()
        data["benchmarks"].reverse()  # as plans are measured first
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.tables("suite-table")[0][0][1:4], ["03", "05", "08"])
        self.assertEqual([row[0] for row in self.tables("suite-table")[0][1:]],
                         [recordings.shape_title(shape) for shape in SUITES["table"]])
        loaded = recordings.Results(data, "")
        self.assertEqual(loaded.stages, STAGES)
        others = [shape for shape in TIMED if shape not in SUITES["table"]]
        self.assertEqual(loaded.shapes, SUITES["table"] + others[::-1])
        self.assertEqual(list(plots.ladder(loaded)["times"]), STAGES)

    def test_every_part_is_in_the_terminal_too(self):
        self.record("h200_service_2026-11-22.json", service())
        printed = self.run_report("--table")[1]
        for expected in ["logits' deviation", "mJ per query token", "Combining alone", "GB contiguous", "allocate",
                         "9876"]:
            self.assertIn(expected, printed)

    def test_stale_figures(self):
        wanted = self.draw()
        self.assertEqual(set(wanted), set(plots.DATA))
        self.run_report("--update")
        self.assertEqual(self.run_report("--check"), (0, ""))
        for name in wanted:
            self.draw()
            path = self.root / "docs" / "figures" / f"{name}.svg"
            path.unlink()
            code, printed = self.run_report("--check")
            self.assertEqual(code, 1)
            self.assertIn(f"{name}.svg: stale, run bench/report/report.py --plots", printed)
            path.write_text("<desc>drawn from h200_2026-11-21.json, sha256 0</desc>")
            self.assertEqual(self.run_report("--check")[0], 1)

    def test_new_results_make_figures_stale(self):
        self.draw()
        self.run_report("--update")
        data = full_results()
        data["context"]["ceiling_read_gbps"] = "4000"
        self.record("h200_2026-11-21.json", data)
        self.run_report("--update")
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn("roofline.svg", printed)
        self.assertNotIn("ladder.svg", printed)

    def test_figures_belong_to_the_page(self):
        self.page.unlink()
        self.run_report("--update")
        self.assertEqual(self.run_report("--check"), (0, ""))

    def test_without_matplotlib(self):
        with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}):
            code, printed = self.run_report("--plots")
        self.assertEqual(code, 2)
        self.assertIn("needs matplotlib", printed)


class ProseTest(unittest.TestCase):
    """Figures in running text."""

    SHAPE = "h128_q1_b64_k4096"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        (self.root / "bench" / "results").mkdir(parents=True)
        (self.root / "docs").mkdir()
        self.page = self.root / "docs" / "page.md"
        (self.root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
        self.record("h200_2026-11-21.json", full_results())
        self.record("peers_h200.json", peers("2026-11-20", {self.SHAPE: {"Other (new)": [118.4, None]}}))
        self.record("h200_service_2026-11-22.json", service())
        self.record("cache_errors.json", study())
        self.run_report("--update")

    def record(self, name, data):
        (self.root / "bench" / "results" / name).write_text(json.dumps(data))

    run_report = ReportTest.run_report

    def written(self, what):
        """What --update writes for an expression."""
        self.page.write_text(f"# Page\n\nIt is <!--v {what}-->?<!--/v--> µs.\n")
        code, printed = self.run_report("--update")
        self.assertEqual(code, 0, printed)
        text = self.page.read_text()
        self.assertTrue(text.startswith(f"# Page\n\nIt is <!--v {what}-->") and text.endswith("<!--/v--> µs.\n"), text)
        self.assertEqual(self.run_report("--check"), (0, ""))
        return text.partition("-->")[2].partition("<!--/v-->")[0]

    def refused(self, line):
        """What --check says of a page with this line, which no result makes right."""
        self.page.write_text(f"# Page\n\n{line}\n")
        before = self.page.read_text()
        self.assertEqual(self.run_report("--update")[0], 2)
        self.assertEqual(self.page.read_text(), before)
        code, printed = self.run_report("--check")
        self.assertEqual(code, 2)
        self.assertIn("docs/page.md:3: ", printed)
        return printed

    def test_a_stale_figure_is_found(self):
        self.written(f"08 {self.SHAPE} cold")
        self.page.write_text(self.page.read_text().replace(">333<", ">332<"))
        code, printed = self.run_report("--check")
        self.assertEqual(code, 1)
        self.assertIn(f"docs/page.md:3: 332 should be 333 (08 {self.SHAPE} cold)", printed)

    def test_new_results_make_figures_stale(self):
        self.written(f"08 {self.SHAPE} cold")
        data = full_results()
        for one in data["benchmarks"]:
            if one["name"].startswith(f"08_seesaw/{self.SHAPE}/cold"):
                one["real_time"] = 400.0
        self.record("h200_2026-11-21.json", data)
        self.assertIn("333 should be 400", self.run_report("--check")[1])

    def test_figures_of_other_recordings(self):
        for name in ("texts", "cross"):
            suite = results()
            suite["context"][f"suite_{name}"] = "h16_q77_b8_k1024"
            suite["benchmarks"] = [entry("auto/h16_q77_b8_k1024/cold", 50.0 if name == "texts" else 60.0)]
            self.record(f"h200_{name}_2026-11-30.json", suite)
        requests = service()
        requests["runs"][1]["figures"]["request_ms_p99"] = 55.5
        self.record("h200_requests_2026-11-30.json", requests)
        formats = service()
        formats["runs"] = [{**formats["runs"][1], "cache_format": name} for name in ("16bit", "fp8_tensor")]
        formats["runs"][1]["figures"] = {**formats["runs"][1]["figures"], "tokens_per_s": 19752}
        self.record("h200_service_formats_2026-11-30.json", formats)
        self.record("h200_traditional_2026-11-30.json", traditional_layers())
        self.record("python_h200_2026-11-30.json", python("2026-11-30T01:02:03Z"))
        for what, expected in [
                ("texts h16_q77_b8_k1024 cold", "50.0"), ("cross h16_q77_b8_k1024 cold.rel_l2 : e", "1.7e-03"),
                ("requests chat_1000 paged request_ms_p99", "55.5"), ("service chat_1000 paged tokens_per_s", "9880"),
                ("formats chat_1000 fp8_tensor tokens_per_s / formats chat_1000 16bit tokens_per_s : 3×", "2.00×"),
                (f"layer multi_head {SETTING} cold_core", "40.0"), (f"layer absorbed {SETTING} cold.least_us", "90.0"),
                ('python h16_q1_b4_k256 "FlashMLA\'s own, planned"', "43.2"), ('python import "import mla_stages"', "14.6")]:
            self.assertEqual(self.written(what), expected, what)
        for what, expected in [("texts h1_q1_b1_k1 cold", "no shape 'h1_q1_b1_k1'"), ("cross cold", "no figure 'cold' of suite cross"),
                               ("requests chat_1000 paged smiles", "chat_1000 paged smiles' of the service"),
                               ("formats chat_1000 fp4 tokens_per_s", "chat_1000 fp4 tokens_per_s"),
                               (f"layer absorbed {SETTING} cpu", f"no figure 'absorbed {SETTING} cpu'"),
                               (f"layer absorbed {SETTING} cold.colour", "cold.colour' of a layer"),
                               ("python h16_q1_b4_k256 decode", "no figure 'h16_q1_b4_k256 decode'")]:
            self.assertIn(expected, self.refused(f"It is <!--v {what}-->1<!--/v-->."), what)

    def test_the_reference_has_figures(self):
        data = full_results()
        data["benchmarks"].append({"name": f"reference/{self.SHAPE}/wall/iterations:1", "real_time": 420000.0,
                                   "time_unit": "us", "TFLOPs": 0.174, "GBps": 0.76, "label": "fp64 on the CPU"})
        self.record("h200_2026-11-21.json", data)
        self.assertEqual(self.written(f"reference {self.SHAPE} wall : 3 ms"), "420 ms")
        self.assertEqual(self.written(f"reference {self.SHAPE} wall / 08 cold : 3"), "1260")

    def test_what_is_unknown_is_named(self):
        for what, expected in [("09 h128_q1_b64_k4096 cold", "no stage '09'"),
                               ("08 h1_q1_b1_k1 cold", "no shape 'h1_q1_b1_k1'"),
                               (f"08 {self.SHAPE} warm", "no column 'warm'"),
                               (f"08 {self.SHAPE} cold.colour", "no column 'cold.colour'"), ("08 cold", "no shape in"),
                               ("context weather", "no 'weather'"),
                               ("service chat_1000 paged smiles", "chat_1000 paged smiles"),
                               ("errors fp8_tensor k512_dev1 size", "k512_dev1 size' of the study"),
                               ("errors fp8_tensor k512_dev3 out", "k512_dev3 out' of the study"),
                               ("errors fp4 k512_dev1 out", "no figure 'fp4 k512_dev1 out'"),
                               ("08 max:weather cold", "no suite 'weather'"), ("@nothing 08 x cold", "nothing.json"),
                               ("1 / 0", "division by zero"), ("1 +", "a value is missing"), ("( 1", "')' is missing"),
                               ("1 ) 2", "')' is not expected"), ("1 : wide", "'wide' is no format")]:
            self.assertIn(expected, self.refused(f"It is <!--v {what}-->1<!--/v-->."), what)

    def test_markers_that_would_be_seen(self):
        marker = f"<!--v 08 {self.SHAPE} cold-->333<!--/v-->"
        for begin in ["", "  ", "- ", "> ", "1. "]:
            self.assertIn("begins a line", self.refused(f"{begin}{marker} µs"), begin)
        self.assertIn("other half", self.refused(f"It is <!--v 08 {self.SHAPE} cold-->333 µs"))
        self.page.write_text(f"```\n  takes {marker} µs\n```\n")
        self.assertIn("page.md:2: a marker in a code block", self.run_report("--check")[1])

    def test_expressions(self):
        shape = self.SHAPE
        other = "h16_q1_b64_k4096"  # the second shape: twice the time
        for what, expected in [
                (f"08 {shape} cold", "333"), (f"05 {shape} sustained", "550"),
                (f"05_tensor_core {shape} cold / 08", "1.50"), (f"08 {other} cold / {shape}", "2.00"),
                (f"08 {shape} sustained / cold", "1.10"), (f"05 {shape} cold - 08 : .1", "166.7"),
                (f"1 - 08 {shape} cold / 05 : .0%", "33%"), (f"( 05 {shape} cold + 08 ) / 2", "417"),
                (f"08 {shape} cold x cold.floor_share", "7.00"), (f"08 {shape} cold.floor_us", "7.00"),
                (f"200 / 08 {shape} cold : 2%", "60%"), (f"08 {shape} cold.own_limit_us", "167"),
                (f"03 {shape} cold.over_fastest : 2×", "3.0×"), (f"08 {shape} sustained.sm_mhz / 1000", "1.75"),
                (f"cublas_pipeline {shape} cold", "250"), (f'"Other (new)" {shape} cold', "118"),
                ("08 min:dtypes cold", "333"), ("08 max:all cold / min:all", f"{len(TIMED)}.0"),
                ("08 h128_q1_b1_k4096 plan.marginal_us", "3.33"), ("08 h128_q1_b1_k4096 combine.bytes : 2 MB", "7.8 MB"),
                ("08 h16x2_q4_b2_k256_causal error.rel_l2 : e", "4.3e-03"), ("context ceiling_read_gbps : 4", "4562"),
                ("service chat_1000 paged tokens_per_s / service chat_1000 static tokens_per_s : 3×", "2.29×"),
                ("errors fp8_tile128 k512_dev1 out : 2%", "0.36%"), ("errors int8_tile128 k512_dev1_outliers4 out : 2%", "0.44%"),
                ("errors fp8_tensor k8192_dev0.5_rotary16 lse : e", "2.1e-04"),
                ("errors int8_tile128 k512_dev16_outliers4_rotary16 out / errors int8_tile128 k512_dev1 out : 4", "1280"),
                ("cache append_b128_t1 returned", "5.41"), ("cache memory_stepped bytes.saved_share : 2%", "50%")]:
            self.assertEqual(self.written(what), expected, what)

    def test_formats(self):
        for what, expected in [("9.996", "10.0"), ("31177", "31200"), ("31177 : .0", "31177"), ("31177 : ,.0", "31,177"),
                               ("31177 : ,3", "31,200"), ("0.01234", "0.0123"), ("19302 : 3 ms", "19.3 ms"),
                               ("2 : .2", "2.00"), ("1 / 3 : 2 TFLOP/s", "0.33 TFLOP/s"), ("0 - 1 / 1000 : .0%", "0%")]:
            self.assertEqual(self.written(what), expected, what)

    def test_another_recording(self):
        (self.root / "bench" / "results" / "variants").mkdir()
        data = full_results()
        data["benchmarks"][0]["real_time"] = 4321.0
        self.record("variants/other.json", data)
        self.assertEqual(self.written(f"@variants/other 03 {self.SHAPE} cold / 03 cold"), "4.32")

    def test_estimates_are_near_what_was_measured(self):
        """In every chapter's table, within 1.5 times."""
        kept = estimates.load(ROOT)
        runs = [recordings.recorded(ROOT), recordings.load_later(ROOT, recordings.recorded(ROOT)),
                recordings.load_quantised(ROOT, recordings.recorded(ROOT))]
        for stage, shapes in estimates.tables(ROOT).items():
            run = next(one for one in runs if stage in one.stages)
            for shape in shapes:
                ratio = recordings.median(run.measured(stage, shape)) / sum(kept[stage][shape].values())
                self.assertGreater(ratio, 1 / 1.5, (stage, shape))
                self.assertLess(ratio, 1.5, (stage, shape))
        self.assertEqual({stage[:2] for stage in kept}, {f"{number:02}" for number in range(4, 14)})

    def test_the_predicted_table(self):
        """Bound, estimate by its terms, time and ratio; a shape without an estimate has dashes."""
        data, shape = results(), "h128_q1_b1_k4096"
        data["benchmarks"].append(entry(f"04_split_kv/{shape}/cold", 30.0, limit_shared_us=1.0))
        kept = {"04_split_kv": {shape: {"launch": 4.0, "first_tile": 3.0, "tiles": 10.0, "end": 2.0, "combine": 1.0}}}
        rows = report.predicted_table(recordings.Results(data, ""), kept, "04_split_kv", [shape, "h16_q1_b9_k64"])[1]
        self.assertEqual(rows[0][1:], ["15.0 fp32", "4.00", "3.00", "10.0", "2.00", "1.00", "**20.0**", "30.0", "1.50"])
        self.assertEqual(set(rows[1][1:]), {"—"})

    def test_the_table_of_bounds(self):
        """Of a stage without a plan: bound, time and ratio, no estimate."""
        data, shape = results(), "h128_q1_b1_k4096"
        data["benchmarks"].append(entry(f"01_naive/{shape}/cold", 30.0, limit_shared_us=1.0))
        rows = report.bounds_table(recordings.Results(data, ""), "01_naive", [shape, "h16_q1_b9_k64"])[1]
        self.assertEqual(rows[0][1:], ["15.0 fp32", "—", "30.0", "2.00"])
        self.assertEqual(set(rows[1][1:]), {"—"})

    def test_a_stale_estimate_is_noticed(self):
        """estimates.py compares with what the program says now."""
        chapter = self.root / "stages" / "04_split_kv" / "README.md"
        chapter.parent.mkdir(parents=True, exist_ok=True)
        chapter.write_text("<!-- predicted h128_q1_b1_k4096:begin -->\n<!-- predicted:end -->\n")
        program = self.root / "mla_run"
        def says(seconds):
            terms = ", ".join(f'"estimate_{term}_s": {seconds}' for term in estimates.TERMS)
            program.write_text(f"#!/bin/sh\nif [ $1 = list ]; then echo 04_split_kv; else echo '{{{terms}, \"estimate_s\": 1}}'; fi\n")
            program.chmod(0o755)
        def run(what):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                return estimates.main([what, "--program", str(program), "--root", str(self.root)]), out.getvalue()
        (self.root / "bench" / "report").mkdir(parents=True, exist_ok=True)
        says(1e-6)
        self.assertEqual(run("--write")[0], 0)
        self.assertEqual(run("--check"), (0, ""))
        says(2e-6)
        code, printed = run("--check")
        self.assertEqual(code, 1)
        self.assertIn("04_split_kv is stale", printed)

    def test_the_seesaws_budget(self):
        """The chapter's table of shared memory agrees with the kernel's layout."""
        folder = ROOT / "stages" / "08_seesaw"
        body = re.search(r"struct Smem \{\n(.*?)\n\};", (folder / "kernel.cuh").read_text(), re.S)[1]
        sizes = {"Box": 8192, "uint4": 16, "float2": 8, "float": 4, "int": 4, "ptx::Mbarrier": 8}
        counts = {"kBoxes": 9, "kRows": 64, "kRegions": 3}
        members, end = {}, 0
        for kind, name, dimensions in re.findall(r"^  ([\w:]+) (\w+)((?:\s*\[\w+\])*);", body, re.M):
            size = sizes[kind] * math.prod(counts.get(one) or int(one) for one in re.findall(r"\w+", dimensions))
            end = -(-end // min(16, sizes[kind])) * min(16, sizes[kind]) + size
            members[name] = size
        end = -(-end // 16) * 16
        listed = (folder / "notes.md").read_text().partition("## Budget\n")[2].partition("\n\nRegisters")[0]
        rows = {what: int(size.replace(",", "")) for what, size in
                re.findall(r"^\| (.*?) \| \**([\d,]+)\** \|$", listed, re.M)}
        self.assertEqual(rows.pop("`Smem`"), end)
        self.assertEqual(sum(rows.values()), end)
        for what, size in rows.items():
            padding = size - sum(members.pop(name) for name in re.findall(r"`(\w+)`", what))
            self.assertEqual(padding > 0, "padding" in what, what)
        self.assertEqual(members, {})
        self.assertIn(f"there are {232448 - end:,} bytes left", (folder / "README.md").read_text())

    def test_few_heads_budget(self):
        """The chapter's table of shared memory agrees with the kernel's layout, for each number of rows."""
        folder = ROOT / "stages" / "10_few_heads"
        kernel = (folder / "kernel.cuh").read_text()
        body = re.search(r"struct Smem \{\n(.*?)\n\};", kernel, re.S)[1]
        sizes = {"Atom": 1024, "float": 4, "int": 4, "int64_t": 8, "ptx::Mbarrier": 8}
        counts = {"kBuffers": 2, "kCopies": 3, "kCopyBoxes": 3, "kBoxes": 9, "kTokens": 64, "kWarps": 4}
        table = (folder / "notes.md").read_text().partition("## Budget\n")[2].partition("| registers")[0]
        rows = [[cell.strip(" *").replace(",", "") for cell in line.strip("|").split("|")]
                for line in table.strip().splitlines() if line.startswith("|")]
        header, listed = rows[0], rows[2:]
        for column, query_rows in enumerate(map(int, header[1:]), 1):
            members, end = {}, 0
            for kind, name, dimensions in re.findall(r"^  ([\w:]+) (\w+)((?:\s*\[[^\]]+\])*);", body, re.M):
                size = sizes[kind] * math.prod(
                    eval(one.replace("/", "//"), {}, {**counts, "kRows": query_rows})  # from our own kernel
                    for one in re.findall(r"\[([^\]]+)\]", dimensions))
                align = min(16, sizes[kind])
                end = -(-end // align) * align + size
                members[name] = size
            end = -(-end // 16) * 16
            sums = {row[0]: int(row[column]) for row in listed}
            self.assertEqual(sums.pop("`Smem`"), end)
            self.assertEqual(sum(sums.values()), end)
            self.assertEqual(sums["`kv`: two tiles"], members["kv"])
            self.assertEqual(sums["`q`: 9 boxes"], members["q"])
            self.assertEqual(sums["`p`"], members["p"])
            self.assertEqual(sums["`row_max` and `row_sum`"], members["row_max"] + members["row_sum"])
            self.assertEqual(sums["`place` and `inverse_l`"], members["place"] + members["inverse_l"])


class RunScriptTest(unittest.TestCase):
    """bench/run.sh in a folder of its own. Programs that measure nothing take the place of mla_bench and the others."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        for name in ["bench/results", "bench/report", "build/bench", "stages/cmake"]:
            (self.root / name).mkdir(parents=True)
        for name in ["run.sh", *(f"report/{one}.py" for one in ["report", "counters", "ncu", "estimates", "parallel", "recordings", "program", "prose", "ridge", "plots", "stalls"])]:
            shutil.copy(ROOT / "bench" / name, self.root / "bench" / name)
        (self.root / "stages" / "cmake" / "setup.sh").write_text("build() { :; }\n")
        (self.root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
        (self.root / "measured.json").write_text(json.dumps(results()))
        self.program("echo h200")

    def program(self, print_gpu):
        program = self.root / "build" / "bench" / "mla_bench"
        program.write_text(f'#!/bin/sh\ncase "$*" in\n  *--print-gpu*) {print_gpu} ;;\n'
                           '  *--list*|*--help*) echo shown ;;\n  "--out "*) cp measured.json "$2"; echo "$*" >> arguments ;;\nesac\n')
        program.chmod(0o755)
        serving = self.root / "build" / "bench" / "mla_service"
        serving.write_text('#!/bin/sh\ncp service.json "$2"\n')  # --out FILE ...
        serving.chmod(0o755)
        parallel = self.root / "build" / "bench" / "mla_parallel"
        # What it is asked for goes to a file; `gpus` holds how many there are.
        parallel.write_text('#!/bin/sh\ncase "$*" in\n'
                            '  *--print-nccl*) test -f gpus && test "$2" -le "$(cat gpus)" && echo NCCL 9 || { echo no NCCL here; exit 1; } ;;\n'
                            '  *--predict*) echo "$*" > predicted; cp scale.json "$3" ;;\n'
                            '  *) echo "$*" >> parallel; test ! -f broken || exit 1; cp parallel.json "$3" ;;\nesac\n'
                            'case "$*" in *--fault*) exit 1 ;; esac\n')
        parallel.chmod(0o755)
        data = over_two_gpus()
        data["faults"] *= 6  # as many as it is asked for
        (self.root / "parallel.json").write_text(json.dumps(data))
        (self.root / "scale.json").write_text(json.dumps(model_of_scale()))
        layers = self.root / "build" / "bench" / "mla_traditional"
        layers.write_text('#!/bin/sh\ncp layers.json "$2"; echo "$*" >> arguments\n')
        layers.chmod(0o755)
        (self.root / "layers.json").write_text(json.dumps(traditional_layers()))
        (self.root / "service.json").write_text(json.dumps(service()))
        (self.root / "bench" / "peers.py").write_text("")  # takes its arguments, and measures nothing

    def run_script(self, *arguments):
        return subprocess.run(["bash", str(self.root / "bench" / "run.sh"), *arguments], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding="utf-8", check=False)

    def found(self, folder):
        return [path.name for path in sorted((self.root / folder).glob("*.json"))]

    def test_results_stay_in_the_build_folder(self):
        for arguments in [[], ["--stages", "02"]]:
            ran = self.run_script(*arguments)
            self.assertEqual(ran.returncode, 0, ran.stdout)
            self.assertIn("4000 / 4100", ran.stdout)
        self.assertRegex(self.found("build/results")[0], r"^h200_\d{4}-\d\d-\d\d_\d{6}\.json$")
        self.assertEqual(self.found("bench/results"), [])

    def test_only_record_records(self):
        ran = self.run_script("--record")
        self.assertEqual(ran.returncode, 0, ran.stdout)
        recorded = self.found("bench/results")
        self.assertRegex(recorded[0], r"^h200_\d{4}-\d\d-\d\d\.json$")
        self.assertEqual([name[5:-16] for name in recorded[1:-1]],
                         ["cross", "requests", "service", "service_formats", "texts", "traditional", "traditional_audio_text",
                          "traditional_image_text", "traditional_text_image"])
        self.assertEqual(recorded[-1], "parallel_scale.json")
        self.assertIn("4000 / 4100", (self.root / "README.md").read_text())
        arguments = (self.root / "arguments").read_text()
        self.assertRegex(arguments, r"^--out \S+ --suite all\n")
        for expected in ["--suite cross --stages auto", "--suite texts --stages auto", "--queries 1500 --n 448 --batch 4"]:
            self.assertIn(expected, arguments)

    def test_decodes_over_several_gpus_are_recorded_where_there_are(self):
        for flag, code in [("--record", 0), ("--record-parallel", 2)]:
            ran = self.run_script(flag)
            self.assertEqual(ran.returncode, code, ran.stdout)
            self.assertIn("Nothing is measured over several GPUs: no NCCL here.", ran.stdout)
        self.assertFalse((self.root / "parallel").exists())
        (self.root / "gpus").write_text("2")
        (self.root / "broken").touch()  # a report that is not whole is not kept
        for flag in ["--record", "--record-parallel"]:
            self.assertNotEqual(self.run_script(flag).returncode, 0)
        self.assertFalse([name for name in self.found("bench/results") if "_parallel_" in name])
        (self.root / "broken").unlink()
        for flag, gpus, used in [("--record", 1, 1), ("--record-parallel", 1, 1), ("--record", 2, 2), ("--record-parallel", 2, 2), ("--record-parallel", 5, 4), ("--record-parallel", 8, 8)]:
            (self.root / "parallel").unlink(missing_ok=True)
            (self.root / "predicted").unlink(missing_ok=True)
            (self.root / "gpus").write_text(str(gpus))
            ran = self.run_script(flag)
            self.assertEqual(ran.returncode, 0, ran.stdout)
            shared = [call for call in (self.root / "parallel").read_text().splitlines() if "--share-gpus" in call]
            self.assertEqual([call.split("--ranks ")[1] for call in shared], [f"{ranks} --share-gpus --conformance" for ranks in [2, 3, 4, 8]])
            self.assertTrue(all(call.startswith("--append --out build/results/h200_ranks_") for call in shared), shared)
            name = next(name for name in self.found("bench/results") if "_ranks_" in name)
            self.assertRegex(name, r"^h200_ranks_\d{4}-\d\d-\d\d\.json$")
            (self.root / "bench" / "results" / name).unlink()
            self.assertEqual("Nothing is measured over several GPUs: no NCCL here." in ran.stdout, used == 1)
            if used == 1:
                self.assertFalse([name for name in self.found("bench/results") if "_parallel_" in name])
                continue
            name = next(name for name in self.found("bench/results") if "_parallel_" in name)
            self.assertRegex(name, rf"^h200x{used}_parallel_\d{{4}}-\d\d-\d\d\.json$")
            calls = [call for call in (self.root / "parallel").read_text().splitlines() if "--share-gpus" not in call]
            self.assertEqual(len({call.split()[2] for call in calls}), 1)  # all in one report
            self.assertTrue(all(call.startswith(f"--append --out build/results/h200x{used}_parallel_") for call in calls), calls)
            for part in ["--times", "--slices 1,2", "--mode heads,batch", "--mode heads --shape h128_q1_b1_k65536,h128_q1_b1_k1000000", "_trace_2.json", "--fault kill-later:0", "--fault stop:1"]:
                self.assertTrue(any(part in call for call in calls), part)
            self.assertEqual([call.split("--ranks ")[1] for call in calls if "--conformance" in call],
                             [f"{ranks} --conformance" for ranks in [1, 2, 4, 8] if ranks <= used])
            self.assertEqual({call.split()[4] for call in calls if "--times" in call}, {str(n) for n in [2, 4, 8] if n <= used})
            self.assertIn("h128_q1_b16_k8192", (self.root / "predicted").read_text())
            self.assertIn("parallel_scale.json", self.found("bench/results"))
            (self.root / "bench" / "results" / name).unlink()
        # A fault that is not in the report.
        (self.root / "parallel.json").write_text(json.dumps(over_two_gpus()))
        ran = self.run_script("--record-parallel")
        self.assertEqual(ran.returncode, 1, ran.stdout)
        self.assertIn("a fault is not in build/results/h200x8_parallel_", ran.stdout)
        self.assertFalse([name for name in self.found("bench/results") if "_parallel_" in name])
        self.assertNotEqual(self.run_script("--record-parallel", "--out", "x").returncode, 0)

    def test_a_part_is_not_recorded(self):
        for arguments in [["--stages", "02"], ["--shapes", "h1_q1_b1_k1"], ["--out", "x.json"], ["--suite", "table"]]:
            self.assertEqual(self.run_script("--record", *arguments).returncode, 2, arguments)
        self.program("echo no driver; exit 1")
        self.assertEqual(self.run_script("--record").returncode, 2)
        self.assertEqual(self.found("bench/results"), [])

    def test_what_measures_nothing_succeeds(self):
        for flag in ["--list", "--help"]:
            ran = self.run_script(flag)
            self.assertEqual(ran.returncode, 0, ran.stdout)
            self.assertIn("shown", ran.stdout)


if __name__ == "__main__":
    unittest.main()
