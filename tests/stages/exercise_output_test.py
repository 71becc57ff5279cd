#!/usr/bin/env python3
"""What stages/exercise says and writes: nothing is lost in silence, nothing ends in a traceback."""
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


if __name__ == "__main__":
    unittest.main()
