"""bench/report.py on a small results file: its schema, its tables, and that stale texts are found; and where
bench/run.sh leaves results."""
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import report  # noqa: E402


def entry(name, time, **counters):
    values = {"p10_us": time * 0.99, "p90_us": time * 1.02, "n": 100, "TFLOPs": 73e3 / time, "GBps": 320e3 / time,
              "rel_l2": 1.7e-3, "max_abs": 1e-4, "lse_max_abs": 1e-7, "own_limit_share": 0.5, "floor_share": 0.021,
              "limit_fp32_us": time / 2, "limit_shared_us": 1.0, "limit_dram_us": 2.0, "limit_matrix_us": 0.0}
    return {"name": name + "/iterations:1/manual_time", "real_time": time, "time_unit": "us", "label": "one | idea",
            **values, **counters}


def plan_entry(name, time, **counters):
    return {"name": name + "/iterations:1/manual_time", "real_time": time, "time_unit": "us", "p10_us": time * 0.99,
            "p90_us": time * 1.02, "n": 100, **counters}


def results():
    shape = "h128_q1_b64_k4096"
    return {
        "context": {"schema": report.SCHEMA, "machine": "gpu", "gpu": "NVIDIA H200", "driver": "580.1",
                    "cuda_driver": "13.0", "max_sm_mhz": "1980", "memory_mhz": "3201", "power_limit_w": "700",
                    "nvcc": "13.0.88", "host_compiler": "GNU 12.2.0", "commit": "abc1234",
                    "date_utc": "2026-11-20T12:00:00Z", "ceiling_read_gbps": "4562", "ceiling_fp32_tflops": "60.1",
                    "ceiling_launch_us": "3.0"},
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

    def test_a_run_of_a_few_shapes_does_not_stand_for_the_recorded_one(self):
        data = results()
        data["benchmarks"] += [entry(f"02_shared_tiled/{shape}/cold", 100.0) for shape in report.README_SHAPES[1:]]
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
        for key in report.REQUIRED_CONTEXT + report.REQUIRED_GPU_CONTEXT:
            if key in ("schema", "machine"):  # without these it is not taken for a recorded file at all
                continue
            data = results()
            del data["context"][key]
            self.write(data)
            code, printed = self.run_report("--table")
            self.assertEqual(code, 2, key)
            self.assertIn(key, printed)
        for key in report.REQUIRED_COUNTERS:
            data = results()
            del data["benchmarks"][1][key]
            self.write(data)
            self.assertEqual(self.run_report("--table")[0], 2, key)

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
        self.assertIn("makes a plan", self.chapter.read_text())
        self.assertNotIn("8192", self.chapter.read_text())

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
                            ("h1_q1_b1_k1_fp16_split64", "h1_q1_b1_k1_fp16_split64")]:
            self.assertEqual(report.shape_title(name), title)

    def test_peers_stand_beside(self):
        peers = {"context": {"schema": report.PEERS_SCHEMA, "gpu": "NVIDIA H200", "driver": "580", "cuda": "13.0",
                             "date": "2026-11-20"},
                 "shapes": {"h128_q1_b64_k4096": {"Other": [118.4, None]}}}
        (self.root / "bench" / "results" / "peers_h200.json").write_text(json.dumps(peers))
        for flag in ["--table", "--summary"]:
            printed = self.run_report(flag)[1]
            self.assertRegex(printed, r"Other .*118\.4.*recorded")
        peers["context"]["gpu"] = "another"
        (self.root / "bench" / "results" / "peers_h200.json").write_text(json.dumps(peers))
        self.assertNotIn("118.4", self.run_report("--table")[1])

    def test_a_truncated_file_is_named(self):
        broken = self.root / "broken.json"
        broken.write_text('{"context": {')
        code, printed = self.run_report("--table", "--results", str(broken))
        self.assertEqual(code, 2)
        self.assertIn("broken.json", printed)

    def test_nothing_recorded(self):
        self.file.unlink()
        self.assertEqual(self.run_report("--check")[0], 0)

    def test_every_required_figure_is_in_the_peers_file(self):
        path = Path(report.__file__).parent / "results" / "peers_h200.json"
        peers = json.loads(path.read_text())
        for key in ["schema", "gpu", "driver", "cuda", "date", "protocol"]:
            self.assertIn(key, peers["context"])
        for shape, rows in peers["shapes"].items():
            self.assertNotEqual(report.shape_title(shape), shape)
            for times in rows.values():
                self.assertEqual(len(times), 2)


class RunScriptTest(unittest.TestCase):
    """bench/run.sh in a folder of its own, with a program that measures nothing in mla_bench's place."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        for name in ["bench/results", "tests", "build/bench", "stages"]:
            (self.root / name).mkdir(parents=True)
        for name in ["run.sh", "report.py"]:
            shutil.copy(Path(report.__file__).parent / name, self.root / "bench")
        (self.root / "tests" / "setup.sh").write_text("build() { :; }\n")
        (self.root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
        (self.root / "measured.json").write_text(json.dumps(results()))
        self.program("echo h200")

    def program(self, print_gpu):
        program = self.root / "build" / "bench" / "mla_bench"
        program.write_text(f'#!/bin/sh\ncase "$*" in\n  *--print-gpu*) {print_gpu} ;;\n'
                           '  *--list*|*--help*) echo shown ;;\n  "--out "*) cp measured.json "$2" ;;\nesac\n')
        program.chmod(0o755)

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
        for arguments in [["--record"], ["--record", "--suite", "table"]]:
            ran = self.run_script(*arguments)
            self.assertEqual(ran.returncode, 0, ran.stdout)
            self.assertRegex(" ".join(self.found("bench/results")), r"^h200_\d{4}-\d\d-\d\d\.json$")
            self.assertIn("4000 / 4100", (self.root / "README.md").read_text())

    def test_a_part_is_not_recorded(self):
        for arguments in [["--stages", "02"], ["--shapes", "h1_q1_b1_k1"], ["--out", "x.json"], ["--suite", "smoke"]]:
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
