#!/usr/bin/env python3
"""What changed between two results files, beyond the spread.

  bench/report/compare.py A.json B.json               what became slower or faster in B, the largest change first
  bench/report/compare.py A.json B.json --all         every entry
  bench/report/compare.py A.json B.json --threshold 5 only changes over 5% (default: 2%)

A change counts when the medians differ by more than half of both p10-p90 ranges together, and by more than the
threshold. Entries without a time (errors, memory) and the reference's are only looked for. Exit code: 0 nothing became
slower, 1 something did, or is wrong or cannot run now, or stdout could not be written, 2 bad input.
"""
import argparse
import sys

import program
from recordings import DASH, TIMELESS, Error, load, us, why_not
from report import plain, table

CONTEXT = ["gpu", "driver", "nvcc", "commit"]


def half_spread(entry):
    """Half of the p10-p90 range in µs."""
    if "p10_ns" in entry:
        return (entry["p90_ns"] - entry["p10_ns"]) / 2000
    return (entry["p90_us"] - entry["p10_us"]) / 2


def differences(a, b, threshold):
    """(verdict, name, entry of a, entry of b, change, spread) of every timed entry of both; change and spread are shares
    of a's median."""
    found = []
    for key, before in a.entries.items():
        after = b.entries.get(key)
        if after is None or key[0] == "reference" or key[2] in TIMELESS or why_not(before) or why_not(after):
            continue
        median = before["real_time"]
        change = (after["real_time"] - median) / median
        spread = (half_spread(before) + half_spread(after)) / median
        counts = abs(change) > spread and abs(change) > threshold
        verdict = "same" if not counts else "slower" if change > 0 else "faster"
        found.append((verdict, "/".join(key), before, after, change, spread))
    return sorted(found, key=lambda one: -abs(one[4]))


COLUMNS = [("entry", lambda one: one[1]), ("A µs", lambda one: us(one[2]["real_time"])),
           ("B µs", lambda one: us(one[3]["real_time"])), ("change", lambda one: f"{100 * one[4]:+.1f}%"),
           ("spread", lambda one: f"±{100 * one[5]:.1f}%"), ("", lambda one: one[0] if one[0] != "same" else DASH)]


def compare(a, b, threshold, everything):
    """Prints the report; whether something became slower or worse."""
    for key in CONTEXT:
        if a.context.get(key) != b.context.get(key):
            print(f"{key} differs: {a.context.get(key, DASH)}, {b.context.get(key, DASH)}")
    found = differences(a, b, threshold)
    lost = [(key, why_not(b.entries[key])) for key, entry in a.entries.items()
            if key in b.entries and not why_not(entry) and why_not(b.entries[key])]
    won = [key for key, entry in a.entries.items()
           if key in b.entries and why_not(entry) and not why_not(b.entries[key])]
    for key, reason in lost:
        print(f"no longer measured: {'/'.join(key)}: {reason}")
    for key in won:
        print(f"now measured: {'/'.join(key)}")
    for mine, other, name in [(a, b, "A"), (b, a, "B")]:
        only = ["/".join(key) for key in mine.entries if key not in other.entries]
        if only:
            print(f"only in {name}: {len(only)} entries" + ("" if everything else f", as {only[0]}; --all names them"))
        for entry in only if everything else []:
            print(f"  {entry}")
    shown = [one for one in found if everything or one[0] != "same"]
    if shown:
        print(plain(table(COLUMNS, shown)))
    count = {verdict: sum(one[0] == verdict for one in found) for verdict in ("slower", "faster", "same")}
    print(f"{count['slower']} slower, {count['faster']} faster, {count['same']} the same")
    return bool(count["slower"] or lost)


def main(arguments=None):
    parser = program.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    parser.add_argument("--threshold", type=float, default=2, metavar="PERCENT", help="smallest change that counts")
    parser.add_argument("--all", action="store_true", help="show every entry, also those that did not change")
    options = parser.parse_args(arguments)
    try:
        if not options.threshold >= 0:
            raise Error(f"--threshold {options.threshold} is not a percentage")
        a, b = load(options.a), load(options.b)
        if not set(a.entries) & set(b.entries):
            raise Error(f"{a.name} and {b.name} have no entry in common")
        return 1 if compare(a, b, options.threshold / 100, options.all) else 0
    except Error as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(program.run("compare.py", main))
