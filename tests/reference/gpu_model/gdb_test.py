#!/usr/bin/env python3
"""reference/gpu_model/gdb.py, in gdb: which blocks of a cluster run, and where their GPU threads are.

    gdb_test.py PROGRAM    the program of gdb_main.cpp; exit code 77 without gdb, or where it may not stop a process
"""
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[3]
FILE = "tests/reference/gpu_model/gdb_main.cpp"


def line_of(text):
    lines = (ROOT / FILE).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def in_gdb(*commands):
    """Runs these commands where gdb stops in stop_here(). Returns what it says to them, and all that it said."""
    arguments = ["gdb", "-nx", "-batch"]
    for command in ("set debuginfod enabled off", f"source {ROOT}/reference/gpu_model/gdb.py", "break stop_here", "run",
                    "echo BEGIN\\n", *commands):
        arguments += ["-ex", command]
    ran = subprocess.run([*arguments, PROGRAM], capture_output=True, text=True, timeout=120)
    said = ran.stdout + ran.stderr
    return ran.stdout.partition("BEGIN\n")[2], said


class GdbTest(unittest.TestCase):
    def test_lists_the_threads_of_every_block(self):
        waits = f"waits in barrier_cluster_wait at {FILE}:{line_of('barrier_cluster_wait();')}"
        listed, said = in_gdb("gpu threads")
        self.assertEqual([" ".join(line.split()) for line in listed.splitlines() if line.strip()],
                         ["block (0,0,0), 64 threads",
                          "0-63 (0,0,0) " + waits,
                          "block (1,0,0), 64 threads",
                          "0-39 (0,0,0) " + waits,
                          "* 40 (40,0,0) running",
                          "41-63 (41,0,0) ready to run"], said)

    def test_shows_a_thread_of_another_block(self):
        line = line_of("barrier_cluster_wait();")
        shown, said = in_gdb("gpu thread 0,0,0:3", "gpu thread 39")
        self.assertRegex(shown, re.escape(f"block (0,0,0), thread (3,0,0): waits in barrier_cluster_wait at {FILE}:{line}"),
                         said)
        self.assertRegex(shown, re.escape(f"block (1,0,0), thread (39,0,0): waits in barrier_cluster_wait at {FILE}:{line}"),
                         said)
        frame = rf"#\d+ +wait_for_the_cluster at {re.escape(FILE)}:{line}"
        self.assertEqual(len(re.findall(frame, shown)), 2, said)

    def test_says_which_blocks_and_threads_there_are(self):
        _, said = in_gdb("gpu thread 7,0,0:1")
        self.assertIn("Block (7,0,0) does not run.", said)
        _, said = in_gdb("gpu thread 64")
        self.assertIn("The block has threads 0 to 63.", said)


def why_not():
    """Why gdb cannot be tested here; empty if it can."""
    if shutil.which("gdb") is None:
        return "gdb is not installed"
    _, said = in_gdb()
    if "Scripting in the \"Python\" language is not supported" in said:
        return "this gdb was built without Python"
    if re.search(r"ptrace: Operation not permitted|Cannot trace|warning: Error disabling address space", said) and \
            "Breakpoint 1, " not in said:
        return "gdb may not run a process here"
    return ""


if __name__ == "__main__":
    PROGRAM = sys.argv.pop(1)
    reason = why_not()
    if reason:
        print("skipped: " + reason)
        sys.exit(77)
    unittest.main()
