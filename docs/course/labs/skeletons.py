#!/usr/bin/env python3
"""Makes each lab's kernel from its solution: the same text without what is between "// Fill in: ..." and "// Until here."

    docs/course/labs/skeletons.py --check     checks that they are what their solutions give (a test)
    docs/course/labs/skeletons.py --write     writes them: your own fill-ins are lost
"""
import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PART = re.compile(r"^( *// Fill in: .*\n)((?:.*\n)*?)( *// Until here\.\n)", re.M)


def skeleton_of(solution):
    """Raises ValueError for a solution without a part to fill in, or with an empty one."""
    parts = PART.findall(solution)
    if not parts or solution.count("// Fill in:") != len(parts) or solution.count("// Until here.") != len(parts):
        raise ValueError("marks do not match")
    if any(not part.strip() for _, part, _ in parts):
        raise ValueError("a part is empty")
    return PART.sub(r"\1\3", solution)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    stale = 0
    for solution in sorted(HERE.glob("solutions/*.cuh")):
        lab, text = HERE / solution.name, skeleton_of(solution.read_text(encoding="utf-8"))
        if options.write:
            lab.write_text(text, encoding="utf-8")
        elif not lab.exists() or lab.read_text(encoding="utf-8") != text:
            print(f"{lab}: not its solution without the marked part")
            stale += 1
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
