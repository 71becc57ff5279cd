#!/usr/bin/env python3
"""host_time.py without a GPU: how it measures, and what it says where it cannot."""
import contextlib
import io
import pathlib
import sys
import tempfile
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "bench" / "report"))
import host_time  # noqa: E402
import recordings  # noqa: E402


class HostTimeTest(unittest.TestCase):
    def test_rounds_of_all_calls_in_turn(self):
        clock, done = [0.0], []

        def call(name, us):
            def run():
                done.append(name)
                clock[0] += us / 1e6
            return run

        def wait():
            done.append("wait")
            clock[0] += 1  # waiting is not counted as a part of a call

        found = host_time.interleaved({"a": call("a", 2), "b": call("b", 3)}, wait, now=lambda: clock[0])
        self.assertEqual(found, {"a": [2, 2], "b": [3, 3]})
        rounds = host_time.WARM_UPS + host_time.ROUNDS
        self.assertEqual(done, (["wait", *["a"] * host_time.CALLS, "wait", *["b"] * host_time.CALLS]) * rounds + ["wait"])

    def test_rounds_to_warm_up_do_not_count(self):
        clock, calls = [0.0], [0]

        def call():
            calls[0] += 1
            clock[0] += 1 if calls[0] <= host_time.WARM_UPS * host_time.CALLS else 4e-6

        median, least = host_time.interleaved({"one": call}, lambda: None, now=lambda: clock[0])["one"]
        self.assertEqual((median, least), (4, 4))

    def test_shapes_are_shapes(self):
        self.assertTrue(all(recordings.parse_shape(shape) for shape in host_time.SHAPES))

    def test_without_what_it_needs(self):
        def missing(name, absent, title):
            absent[title] = f"ModuleNotFoundError: no {name}"

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(host_time, "found", missing):
            path = pathlib.Path(folder) / "out.json"
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                self.assertEqual(host_time.main(["--out", str(path)]), 2)
            self.assertIn("host_time.py: needs PyTorch: ModuleNotFoundError: no torch; needs mla_stages: ", said.getvalue())
            self.assertFalse(path.exists())

    def test_why_a_module_is_absent(self):
        absent = {}
        self.assertIsNone(host_time.found("no_such_module_here", absent, "It"))
        self.assertEqual(absent, {"It": "ModuleNotFoundError: No module named 'no_such_module_here'"})


if __name__ == "__main__":
    unittest.main()
