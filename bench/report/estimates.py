#!/usr/bin/env python3
"""Asks the cost model for the estimates of the chapters' tables, and keeps them for report.py, which then needs no build.

  bench/report/estimates.py --write     asks build/bench/mla_run and writes bench/report/estimates.json
  bench/report/estimates.py --check     fails if the model says something else by now, or if a table has none

Which shapes: those that a chapter names in its marker, <!-- predicted SHAPE SHAPE ...:begin -->. The ceilings are those of the
newest recording, so a new recording needs --write, too. Exit code: 0 all right; 1 stale; 2 bad input.
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import program
from recordings import Error

ROOT = Path(__file__).resolve().parents[2]
FILE = Path("bench/report/estimates.json")
MARKER = re.compile(r"<!-- predicted ([\w.+ -]+?):begin -->")
TERMS = ("launch", "first_tile", "tiles", "end", "combine")


def tables(root):
    """{stage: shapes} of the chapters' markers."""
    found = {}
    for chapter in sorted((root / "stages").glob("[0-9][0-9]_*/README.md")):
        marker = MARKER.search(chapter.read_text(encoding="utf-8"))
        if marker:
            found[chapter.parent.name] = marker[1].split()
    return found


def load(root):
    path = root / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def ask(run, stage, shape):
    """The terms in µs, to four digits: compilers may differ in the last ones."""
    result = subprocess.run([str(run), "predict", "--machine", "model", "--stage", stage[:2], "--shape", shape, "--json"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise Error(f"{run} predict --stage {stage[:2]} --shape {shape}: {result.stderr.strip()}")
    said = json.loads(result.stdout)
    if "estimate_s" not in said:
        raise Error(f"{run} has no estimate of {stage} on {shape}: {said['ceilings']}")
    return {term: float(f"{1e6 * said[f'estimate_{term}_s']:.4g}") for term in TERMS}


def known_stages(run):
    """Stages that this build has."""
    listed = subprocess.run([str(run), "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout
    return set(re.findall(r"\b\d\d_\w+", listed))


def main(arguments=None):
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("write", "check"):
        what.add_argument("--" + name, action="store_true")
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "bench" / "mla_run", help="mla_run")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        wanted = tables(options.root)
        if not wanted:
            return 0
        if not options.program.exists():
            raise Error(f"{options.program} is not there: build mla_run, or name it by --program")
        kept, here = load(options.root), known_stages(options.program)
        now = {stage: {shape: ask(options.program, stage, shape) for shape in shapes} if stage in here else kept.get(stage)
               for stage, shapes in wanted.items()}
        if options.write:
            program.write_text(options.root / FILE, json.dumps(now, indent=1) + "\n")
            return 0
        stale = [stage for stage in {*now, *kept} if now.get(stage) != kept.get(stage)]
        for stage in sorted(stale):
            print(f"{FILE}: {stage} is stale, run bench/report/estimates.py --write and report.py --update")
        return 1 if stale else 0
    except Error as error:
        print(f"estimates.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(program.run("estimates.py", main))
