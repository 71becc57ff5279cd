#!/usr/bin/env python3
"""How the Python programs of the bench write files and end: no loss goes unreported, and none ends in a traceback."""
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
REPORT = ROOT / "bench" / "report"
sys.path.insert(0, str(REPORT))
import program  # noqa: E402


class WriteText(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def refused(self, path, why):
        for call in (lambda: program.write_text(path, "new"), lambda: program.check_writable(path)):
            with self.assertRaises(program.CannotWrite) as caught:
                call()
            self.assertEqual(str(caught.exception), f"{path}: cannot be written: {why}")

    def test_it_writes_and_replaces(self):
        path = self.root / "a"
        for text in ("first, and longer, µ", "second", ""):
            program.check_writable(path)
            program.write_text(path, text)
            self.assertEqual(path.read_text(encoding="utf-8"), text)
        self.assertEqual(os.listdir(self.root), ["a"])

    def test_mode_stays_and_links_are_followed(self):
        path, link = self.root / "a", self.root / "link"
        path.write_text("old")
        path.chmod(0o604)
        link.symlink_to("a")
        program.write_text(link, "new")
        self.assertTrue(link.is_symlink())
        self.assertEqual((path.read_text(), stat.S_IMODE(path.stat().st_mode)), ("new", 0o604))

    def test_what_may_not_be_replaced_is_refused(self):
        path = self.root / "a"
        path.write_text("old")
        path.chmod(0o444)
        self.refused(path, "it is write-protected")
        self.refused(self.root, "it is a folder")
        self.refused(self.root / "no" / "a", f"there is no folder {self.root / 'no'}")
        self.assertEqual(path.read_text(), "old")

    def test_a_failure_leaves_the_old_file(self):
        path = self.root / "a"
        path.write_text("old")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with self.assertRaisesRegex(program.CannotWrite, "a: cannot be written: File too large"):
                program.write_text(path, "x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        self.assertEqual((path.read_text(), os.listdir(self.root)), ("old", ["a"]))

    def test_a_device_is_written_to(self):
        program.write_text("/dev/null", "anything")
        with self.assertRaisesRegex(program.CannotWrite, "/dev/full: cannot be written: No space left on device"):
            program.write_text("/dev/full", "anything")


RECORDED = sorted((ROOT / "bench" / "results").glob("h200_2*.json"))[0]
COMMANDS = [["report.py", "--table"], ["report.py", "--help"], ["compare.py", RECORDED, RECORDED, "--all"],
            ["peers.py", "--help"]]


class Ends(unittest.TestCase):
    """Each program as a process. Exit code 1 and one line on stderr, never a traceback."""

    def end(self, command, **how):
        unbuffered = how.pop("unbuffered", False)
        environment = {**os.environ, **how.pop("environment", {})}
        environment.pop("PYTHONUNBUFFERED", None)
        ran = subprocess.run([sys.executable, *(["-u"] if unbuffered else []), REPORT / command[0], *command[1:]],
                             stderr=subprocess.PIPE, text=True, env=environment, **how)
        self.assertEqual(ran.returncode, 1, ran.stderr)
        return ran.stderr

    def test_a_full_disk(self):
        for command in COMMANDS:
            for unbuffered in (False, True):
                with self.subTest(command=command, unbuffered=unbuffered), open("/dev/full", "w") as full:
                    self.assertEqual(self.end(command, stdout=full, unbuffered=unbuffered),
                                     f"{command[0]}: standard output cannot be written: No space left on device\n")

    def test_a_reader_that_leaves(self):
        for command in COMMANDS:
            reading, writing = os.pipe()
            os.close(reading)
            with self.subTest(command=command), open(writing, "w") as pipe:
                self.assertEqual(self.end(command, stdout=pipe), "")

    def test_a_closed_stream(self):
        for command in COMMANDS:
            with self.subTest(command=command):
                said = self.end(command, preexec_fn=lambda: os.close(1))
                self.assertEqual(said, f"{command[0]}: standard output is closed\n")

    def test_an_encoding_that_lacks_a_letter(self):
        said = self.end(COMMANDS[0], stdout=subprocess.DEVNULL, environment={"PYTHONIOENCODING": "ascii"})
        self.assertIn("report.py: standard output is ascii, which has no ", said)
        self.assertEqual(said.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
