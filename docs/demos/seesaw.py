#!/usr/bin/env python3
"""The measured timelines that docs/demos/seesaw.md shows: those that mla_timeline drew as docs/figures/timeline_*.svg.

    docs/demos/seesaw.py            writes docs/demos/seesaw_timelines.js
    docs/demos/seesaw.py --check    says whether it is what the figures hold

A figure is recorded on a GPU; a few tiles from the middle, and an odd number of tiles with its end:

    build/bench/mla_timeline --stage 09 --shape h128_q1_b128_k8192 --from-us 100 --to-us 107 --svg docs/figures/timeline_09.svg
    build/bench/mla_timeline --stage 11 --shape h128_q1_b128_k8192 --from-us 100 --to-us 107 --svg docs/figures/timeline_11.svg
    build/bench/mla_timeline --stage 08 --shape h128_q1_b66_k320 --svg docs/figures/timeline_08_odd.svg
"""
import html
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "docs/demos/seesaw_timelines.js"


def timeline_of(path):
    """The first block of a figure: intervals [track, phase, begin, end, product in flight], in clocks from the first."""
    text = path.read_text(encoding="utf-8")
    title = html.unescape(re.search(r'font-size="15">([^<]*)<', text)[1])
    first = text.split('<text x="10" y="', 1)[1]
    blocks = re.split(r'(?=<text x="10" y="\d+">block )', first)
    block = blocks[1]
    number, megahertz = re.search(r"block (\d+), multiprocessor \d+, (\d+) MHz", block).groups()
    lanes = {int(y): track for track, y in enumerate(re.findall(r'<text x="10" y="(\d+)">(?:warpgroup \d|TMA)</text>', block))}
    intervals = []
    for x, y, phase, begin, end in re.findall(r'<rect class="p\d" x="([\d.]+)" y="(\d+)"[^>]*><title>([^:]*): \d+ clocks, (\d+) to (\d+)</title>', block):
        flies = bool(re.search(rf'<rect class="p2" x="{x}" y="{int(y) + 24}"[^>]*height="3"/>', block))
        intervals.append([lanes[int(y) + 16], phase, int(begin), int(end), flies])
    start = min(interval[2] for interval in intervals)
    for interval in intervals:
        interval[2] -= start
        interval[3] -= start
    name = path.stem.removeprefix("timeline_")
    return {"name": name, "title": f"{title.split(',')[0]}, {title.split(', ')[1]}, {title.split(', ')[2]}, block {number}",
            "stage": name[:2], "megahertz": int(megahertz), "intervals": intervals}


def main():
    timelines = [timeline_of(path) for path in sorted(ROOT.glob("docs/figures/timeline_*.svg"))]
    text = "const seesawTimelines = [\n" + ",\n".join(json.dumps(timeline) for timeline in timelines) + "];\n"
    if sys.argv[1:] == ["--check"]:
        if FILE.read_text(encoding="utf-8") != text:
            sys.exit(f"{FILE.relative_to(ROOT)} is not what the figures hold; docs/demos/seesaw.py writes it")
        return
    if sys.argv[1:]:
        sys.exit(__doc__)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
