#!/usr/bin/env python3
"""What stages/exercise says and writes: no loss goes unreported, and nothing ends in a traceback."""
import importlib.machinery
import importlib.util
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "stages" / "exercise"
sys.dont_write_bytecode = True


def module():
    loader = importlib.machinery.SourceFileLoader("exercise", str(PROGRAM))
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader("exercise", loader))
    loader.exec_module(loaded)
    return loaded


class Output(unittest.TestCase):
    def end(self, command, **how):
        ran = subprocess.run([sys.executable, PROGRAM, *command], stderr=subprocess.PIPE, text=True, **how)
        self.assertEqual(ran.returncode, 1, ran.stderr)
        return ran.stderr

    def test_stdout_that_takes_nothing(self):
        for command in (["list"], ["--help"], ["solve", "01", "1"]):
            with self.subTest(command=command), open("/dev/full", "w") as full:
                self.assertEqual(self.end(command, stdout=full),
                                 "exercise: standard output cannot be written: No space left on device\n")
            reading, writing = os.pipe()
            os.close(reading)
            with self.subTest(command=command), open(writing, "w") as pipe:
                self.assertEqual(self.end(command, stdout=pipe), "")
            with self.subTest(command=command):
                self.assertEqual(self.end(command, preexec_fn=lambda: os.close(1)),
                                 "exercise: standard output is closed\n")

    def test_a_full_disk_costs_no_kernel(self):
        exercise = module()
        with tempfile.TemporaryDirectory() as folder:
            kernel = pathlib.Path(folder) / "kernel.cuh"
            kernel.write_text("old")
            kernel.chmod(0o640)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                with self.assertRaisesRegex(exercise.CheckError, "kernel.cuh: cannot be written: File too large"):
                    exercise.write_text(kernel, "x" * 5000)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            self.assertEqual((kernel.read_text(), os.listdir(folder)), ("old", ["kernel.cuh"]))
            exercise.write_text(kernel, "new")
            self.assertEqual((kernel.read_text(), kernel.stat().st_mode & 0o777), ("new", 0o640))


class Parts(unittest.TestCase):
    """The kernel of a write exercise is the solution without a part, and has lines that say what to write."""

    def test_what_is_taken_out(self):
        part = {"from": "b {", "before": "  }", "instead": ["// TODO", "", "c;"]}
        self.assertEqual(module().without_part("a\n    b {\n      x;\n    }\n  }\nd\n", part), "a\n    // TODO\n\n    c;\n  }\nd\n")
        self.assertEqual(module().without_part("b {\n}\n  }\n", part | {"before": "}"}), "// TODO\n\nc;\n}\n  }\n")
        for source in ("a\n  }\n", "b {\n  b {\n  }\n", "  }\nb {\n"):
            self.assertRaises(ValueError, module().without_part, source, part)

    def test_every_stage_from_02_to_08_has_two(self):
        exercise = module()
        for folder in exercise.stage_folders():
            source = exercise.kernel_of(folder).read_text()
            parts = [entry for entry in exercise.exercises(folder) if entry["kind"] == "write"]
            if "02" <= folder.name[:2] <= "08":
                self.assertGreaterEqual(len(parts), 2, folder.name)
            for entry in parts:
                with self.subTest(stage=folder.name, part=entry["from"]):
                    instead = [line.strip() for line in entry["instead"]]
                    self.assertEqual([line.startswith("// TODO: ") for line in instead].count(True), 1)
                    self.assertNotIn("TODO", source)
                    kernel, skeleton = source.splitlines(), exercise.without_part(source, entry).splitlines()
                    begin = next(i for i, line in enumerate(kernel) if line.strip() == entry["from"])
                    behind = len(skeleton) - begin - len(instead)
                    self.assertEqual(skeleton[:begin], kernel[:begin])
                    self.assertEqual([line.strip() for line in skeleton[begin:begin + len(instead)]], instead)
                    self.assertEqual(skeleton[-behind:], kernel[-behind:])
                    self.assertLess(len([line for line in instead if line and not line.startswith("//")]),
                                    len(kernel) - begin - behind - 4, "hardly anything is left to write")


if __name__ == "__main__":
    unittest.main()
