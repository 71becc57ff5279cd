#!/usr/bin/env python3
"""What docs/demos/model.js knows of the kernels that were compiled, as JSON. Each has a hash of its code, which shows whether it
has changed, and its barriers by line, with their comments.

    kernels.py SLUG...
"""
import hashlib
import json
import pathlib
import re
import sys

STAGES = pathlib.Path(__file__).resolve().parents[4] / "stages"


def kernel(slug):
    text = (STAGES / slug / "kernel.cuh").read_text(encoding="utf-8")
    code = " ".join(re.sub(r"//.*", "", text).split())
    barriers = [[number, found[1]] for number, line in enumerate(text.splitlines(), 1)
                for found in [re.search(r"__syncthreads\(\);\s*// (.*)", line)] if found]
    return {"code": hashlib.sha256(code.encode()).hexdigest(), "barriers": barriers}


if __name__ == "__main__":
    print(json.dumps({slug: kernel(slug) for slug in sys.argv[1:]}))
