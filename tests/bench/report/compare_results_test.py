"""bench/report/compare.py: what counts as a change, in which order it is told, and the exit code."""
import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

import report_test  # noqa: E402  (finds bench/, too)
import compare  # noqa: E402

SHAPE = "h128_q1_b64_k4096"


def results(times, **counters):
    """A results file with these cold times: {stage: µs}; 98% to 102% is the spread."""
    data = report_test.results()
    data["benchmarks"] = []
    for stage, time in times.items():
        spread = {"p10_us": 0.98 * time, "p90_us": 1.02 * time, **counters}
        data["benchmarks"].append(report_test.entry(f"{stage}/{SHAPE}/cold", time, **spread))
    return data


class CompareTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def compare(self, a, b, *arguments):
        """Exit code and everything printed."""
        for name, data in [("a.json", a), ("b.json", b)]:
            (self.root / name).write_text(data if isinstance(data, str) else json.dumps(data))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = compare.main([str(self.root / "a.json"), str(self.root / "b.json"), *arguments])
        return code, printed.getvalue()

    def test_the_same(self):
        code, printed = self.compare(results({"01_a": 100.0}), results({"01_a": 100.0}))
        self.assertEqual((code, printed), (0, "0 slower, 0 faster, 1 the same\n"))

    def test_beyond_the_spread(self):
        # The half-spreads are 2 µs and 2% of the new time. 104 is within their sum, 105 is not.
        self.assertEqual(self.compare(results({"01_a": 100.0}), results({"01_a": 104.0}))[0], 0)
        code, printed = self.compare(results({"01_a": 100.0}), results({"01_a": 105.0}))
        self.assertEqual(code, 1)
        self.assertRegex(printed, r"01_a/h128_q1_b64_k4096/cold +100\.0 +105\.0 +\+5\.0% +±4\.1% +slower")
        code, printed = self.compare(results({"01_a": 100.0}), results({"01_a": 90.0}))
        self.assertEqual(code, 0)
        self.assertIn("faster", printed)

    def test_beyond_the_threshold(self):
        steady = {"p10_us": 100.0, "p90_us": 100.0}
        a = results({"01_a": 100.0}, **steady)
        self.assertEqual(self.compare(a, results({"01_a": 101.9}, **steady))[0], 0)
        self.assertEqual(self.compare(a, results({"01_a": 102.1}, **steady))[0], 1)
        self.assertEqual(self.compare(a, results({"01_a": 101.9}, **steady), "--threshold", "1")[0], 1)
        self.assertEqual(self.compare(a, results({"01_a": 109.0}, **steady), "--threshold", "10")[0], 0)
        for threshold in ["-1", "nan"]:
            self.assertEqual(self.compare(a, a, "--threshold", threshold)[0], 2)

    def test_the_largest_change_first(self):
        a = results({"01_a": 100.0, "02_b": 100.0, "03_c": 100.0, "04_d": 100.0})
        b = results({"01_a": 110.0, "02_b": 50.0, "03_c": 120.0, "04_d": 100.5})
        code, printed = self.compare(a, b)
        self.assertEqual(code, 1)
        order = [line[:4] for line in printed.splitlines() if "/cold" in line]
        self.assertEqual(order, ["02_b", "03_c", "01_a"])
        self.assertIn("2 slower, 1 faster, 1 the same", printed)
        self.assertIn("04_d", self.compare(a, b, "--all")[1])

    def test_contexts_come_first(self):
        b = results({"01_a": 200.0})
        b["context"].update(driver="590.2", nvcc="14.0", commit="fed4321", gpu="another")
        lines = self.compare(results({"01_a": 100.0}), b)[1].splitlines()
        self.assertEqual(lines[:4], ["gpu differs: NVIDIA H200, another", "driver differs: 580.1, 590.2",
                                     "nvcc differs: 13.0.88, 14.0", "commit differs: abc1234, fed4321"])

    def test_entries_of_one_file(self):
        a, b = results({"01_a": 100.0, "02_b": 1.0}), results({"01_a": 100.0, "03_c": 1.0, "04_d": 1.0})
        code, printed = self.compare(a, b)
        self.assertEqual(code, 0)
        self.assertIn(f"only in A: 1 entries, as 02_b/{SHAPE}/cold", printed)
        self.assertIn("only in B: 2 entries", printed)
        self.assertNotIn("04_d", printed)
        self.assertIn("04_d", self.compare(a, b, "--all")[1])

    def test_what_is_no_longer_measured_is_worse(self):
        a, b = results({"01_a": 100.0, "02_b": 100.0}), results({"01_a": 100.0, "02_b": 100.0})
        b["benchmarks"][1].update(error_occurred=True, error_message="wrong: element 7")
        code, printed = self.compare(a, b)
        self.assertEqual(code, 1)
        self.assertIn(f"no longer measured: 02_b/{SHAPE}/cold: wrong: element 7", printed)
        code, printed = self.compare(b, a)
        self.assertEqual(code, 0)
        self.assertIn(f"now measured: 02_b/{SHAPE}/cold", printed)

    def test_every_kind_of_entry(self):
        a, b = report_test.full_results(), report_test.full_results()
        slow = 0
        for one in b["benchmarks"]:
            if one["name"].startswith(("cache/host_allocate/", "08_seesaw/h128_q1_b1_k4096/combine/")):
                one["real_time"] *= 10
                slow += 1
        self.assertEqual(slow, 2)
        code, printed = self.compare(a, b)
        self.assertEqual(code, 1)
        self.assertIn("2 slower", printed)
        self.assertIn("cache/host_allocate/wall", printed)

    def test_bad_input(self):
        good = results({"01_a": 100.0})
        lacking = results({"01_a": 100.0})
        del lacking["benchmarks"][0]["n"]
        for bad in ["{", "[]", lacking, report_test.service(), results({"02_b": 1.0})]:
            code, printed = self.compare(good, bad)
            self.assertEqual(code, 2, bad)
            self.assertIn("compare.py: ", printed)


if __name__ == "__main__":
    sys.exit(unittest.main())
