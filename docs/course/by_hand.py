#!/usr/bin/env python3
"""Works out what by_hand.md says, in fractions: nothing is rounded before it is printed.

    docs/course/by_hand.py --check     checks that the page is as it is worked out here (a test)
    docs/course/by_hand.py --write     writes it into the page

What must agree, such as one pass and two parts, is asserted. The rule by which m moves is read from the kernels' header.
"""
import argparse
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = HERE.parents[1] / "stages" / "common" / "machine" / "softmax.h"

S = [1, 3, 2, 5]                      # scale log2(e) <q, k>: logits as powers of two
V = [(1, 0), (0, 1), (2, 0), (1, 2)]  # two columns
LATE = 13                             # token 3's score in the seesaw's pair: large enough to move m


def power(exponent):
    return Fraction(2) ** exponent


def add(row, weight, column_values):
    return [o + weight * v for o, v in zip(row, column_values)]


def direct(scores, values):
    """out and the sum of 2^S, by the formula."""
    total = sum(power(s) for s in scores)
    out = [Fraction(0), Fraction(0)]
    for s, v in zip(scores, values):
        out = add(out, power(s) / total, v)
    return out, total


def log2(value):
    """The logarithm, even of a fraction that is too small for a float."""
    return math.log2(value.numerator) - math.log2(value.denominator)


def show(value):
    value = Fraction(value)
    exponent = value.denominator.bit_length() - 1
    if value.denominator == 1 << exponent and exponent > 4:
        return f"{value.numerator} · 2^-{exponent}" if value.numerator != 1 else f"2^-{exponent}"
    return str(value)


def pair(values):
    return "(" + ", ".join(show(v) for v in values) + ")"


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def at_once():
    out, total = direct(S, V)
    m = max(S)
    rows = [[str(t), str(s), show(power(s)), show(power(s - m)), str(V[t])] for t, s in enumerate(S)]
    weights = sum(power(s - m) for s in S)
    assert weights * power(m) == total
    return (table(["token", "S", "2^S", f"P = 2^(S - {m})", "v"], rows) +
            f"\n\nThe sum of 2^S is {show(total)}. The sum of P is l = {show(weights)}, which is {show(total)} / 2^{m}. So\n\n"
            f"- out = ΣPv / l = {pair([o * weights for o in out])} / ({show(weights)}) = {pair(out)};\n"
            f"- lse = ln 2 · (m + log2 l) = ln 2 · ({m} + {log2(weights):.4f}) = ln {show(total)} = {math.log(total):.4f}.")


def online():
    m, l, o = None, Fraction(0), [Fraction(0), Fraction(0)]
    rows = []
    for t, s in enumerate(S):
        m_new = s if m is None else max(m, s)
        a = Fraction(0) if m is None else power(m - m_new)  # from -FLT_MAX: 2^(-FLT_MAX - S) is 0
        p = power(s - m_new)
        l = a * l + p
        o = add([a * x for x in o], p, V[t])
        m = m_new
        rows.append([str(t), str(s), str(m), show(a), show(p), show(l), pair(o)])
    out, total = direct(S, V)
    assert [x / l for x in o] == out and l * power(m) == total
    return (table(["token", "S", "m", "a", "P", "l = a l + P", "O = a O + P v"], rows) +
            f"\n\nout = O / l = {pair([x / l for x in o])}, as before.")


def wrong_sign():
    l, o, m = Fraction(1), [Fraction(v) for v in V[0]], S[0]
    for t in range(1, len(S)):
        m_new = max(m, S[t])
        a, p, m = power(m_new - m), power(S[t] - m_new), m_new
        l, o = a * l + p, add([a * x for x in o], p, V[t])
    out, _ = direct(S, V)
    wrong = [x / l for x in o]
    assert wrong != out
    return (f"With a = 2^(m' - m), new minus old, the same four steps end in l = {show(l)}, and out = {pair(wrong)} in the place of "
            f"{pair(out)}.")


def merge():
    parts = [(0, 1), (2, 3)]
    rows, totals, outs = [], [], []
    for name, tokens in zip("AB", parts):
        out, total = direct([S[t] for t in tokens], [V[t] for t in tokens])
        rows.append([name, " and ".join(map(str, tokens)), show(total), f"ln {show(total)} = {math.log(total):.4f}", pair(out)])
        totals.append(total)
        outs.append(out)
    all_of_it = sum(totals)
    weights = [total / all_of_it for total in totals]
    merged = [weights[0] * a + weights[1] * b for a, b in zip(*outs)]
    out, total = direct(S, V)
    assert merged == out and all_of_it == total
    base2 = [2 ** math.log(t) for t in totals]
    base2 = [w / sum(base2) for w in base2]
    wrong = [base2[0] * float(a) + base2[1] * float(b) for a, b in zip(*outs)]
    assert max(abs(w - float(o)) for w, o in zip(wrong, out)) > 0.01
    return (table(["part", "tokens", "Σ 2^S", "lse", "out"], rows) +
            f"\n\nThe weights are exp(lse_A - lse) = {show(totals[0])}/{show(total)} and exp(lse_B - lse) = "
            f"{show(totals[1])}/{show(total)}; they add up to 1. So\n\n"
            f"- lse = ln ({show(totals[0])} + {show(totals[1])}) = ln {show(total)} = {math.log(total):.4f};\n"
            f"- out = {show(totals[0])}/{show(total)} · {pair(outs[0])} + {show(totals[1])}/{show(total)} · {pair(outs[1])} = "
            f"{pair(merged)}.\n\n"
            f"Take 2^lse in the place of exp(lse), and the weights are {base2[0]:.4f} and {base2[1]:.4f} and not "
            f"{float(weights[0]):.4f} and {float(weights[1]):.4f}. They add up to 1, too, and out is ({wrong[0]:.4f}, {wrong[1]:.4f}) "
            f"and not ({float(out[0]):.4f}, {float(out[1]):.4f}).")


def rule():
    """kHeadroom and bf16's kLargestP, as the header has them."""
    text = HEADER.read_text()
    headroom = int(re.search(r"constexpr float kHeadroom = (\d+);", text).group(1))
    largest = int(re.search(r"kLargestP = std::is_same_v<T, float16> \? \d+ : (\d+);", text).group(1))
    return headroom, largest


class Half:
    """One warpgroup: its column of O, its sum l, and m."""

    def __init__(self):
        self.m, self.l, self.o = None, Fraction(0), Fraction(0)

    def factor(self, m_new):
        a = Fraction(0) if self.m is None else power(self.m - m_new)
        self.m = m_new
        self.l *= a
        return a


def seesaw():
    headroom, largest_p = rule()
    scores = [*S[:3], LATE]
    w0, w1 = Half(), Half()
    steps = []

    def move(half, tile):
        """The factor a, after m has moved if a P would exceed its bound."""
        largest = max(scores[t] for t in tile)
        if half.m is not None and largest <= half.m + largest_p:
            return Fraction(1)
        new = largest + headroom - largest_p
        return half.factor(new if half.m is None else max(half.m, new))

    def softmax(half, tile):
        p = [power(scores[t] - half.m) for t in tile]
        half.l += sum(p)
        return p

    def product(half, a, p, tile, column):
        half.o = a * half.o + sum(w * V[t][column] for w, t in zip(p, tile))

    tiles = [(0, 1), (2, 3)]
    a = move(w0, tiles[0])
    p0 = softmax(w0, tiles[0])
    steps.append(("0", f"softmax 0: m = {max(scores[t] for t in tiles[0])} + {headroom} = {w0.m}; P0 = {pair(p0)}; gives P0 and m",
                  f"l_0 = {show(w0.l)}"))
    product(w0, a, p0, tiles[0], 0)
    steps.append(("0", "O_L = a O_L + P0 V0_L, with a = 0: there was nothing", f"O_L = {show(w0.o)}"))
    a = w1.factor(w0.m)
    product(w1, a, p0, tiles[0], 1)
    steps.append(("1", f"takes P0 and m = {w1.m}; O_R = a O_R + P0 V0_R, likewise", f"O_R = {show(w1.o)}, l_1 = {show(w1.l)}"))
    a1 = move(w1, tiles[1])
    assert a1 != 1, "m is meant to move at the odd tile"
    p1 = softmax(w1, tiles[1])
    steps.append(("1", f"softmax 1: {LATE} exceeds {w0.m}, so m = {LATE} + {headroom} = {w1.m}, a = 2^({w0.m} - {w1.m}) = {show(a1)}; "
                  f"P1 = {pair(p1)}; gives P1 and m", f"l_1 = {show(w1.l)}"))
    product(w1, a1, p1, tiles[1], 1)
    steps.append(("1", "O_R = a O_R + P1 V1_R", f"O_R = {show(w1.o)}"))
    a2 = w0.factor(w1.m)
    assert a2 == a1
    product(w0, a2, p1, tiles[1], 0)
    steps.append(("0", f"takes P1 and m = {w0.m}, so a = {show(a2)}; l_0 = a l_0; O_L = a O_L + P1 V1_L",
                  f"O_L = {show(w0.o)}, l_0 = {show(w0.l)}"))
    l = w0.l + w1.l
    out, total = direct(scores, V)
    assert [w0.o / l, w1.o / l] == out and l * power(w0.m) == total
    return (table(["warpgroup", "does", "and then has"], [[who, what, has] for who, what, has in steps]) +
            f"\n\nThe sum over both is l = l_0 + l_1 = {show(l)}, and 2^{w0.m} · l = {show(total)} is the sum of 2^S. So out = (O_L, O_R) / l = "
            f"{pair(out)}, and lse = ln 2 · ({w0.m} + log2 l) = {math.log(2) * (w0.m + log2(l)):.4f} = ln {show(total)}.")


BLOCKS = {"at-once": at_once, "online": online, "wrong-sign": wrong_sign, "merge": merge, "seesaw": seesaw}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    parser.add_argument("--page", type=Path, default=HERE / "by_hand.md", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    old = new = options.page.read_text(encoding="utf-8")
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        if begin not in new or end not in new:
            print(f"{options.page}: no block '{name}'", file=sys.stderr)
            return 2
        head, _, rest = new.partition(begin)
        new = head + begin + make() + end + rest.partition(end)[2]
    if options.write:
        options.page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{options.page}: not what docs/course/by_hand.py works out; run it with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
