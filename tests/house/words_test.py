#!/usr/bin/env python3
"""No chapter has more than 2,000 words of visible text: without tables, code, comments and folded parts."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST = 2000


def words(text):
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    text = re.sub(r"^ *\|.*", "", text, flags=re.M)
    return len(re.sub(r"\]\([^)]*\)", "]", text).split())


def main():
    one = "# A b\n\n- c [d e](f g) <!--v h-->i<!--/v-->\n| j |\n<details>\nk\n</details>\n```\nl\n```\nm\n"
    if words(one) != 9:  # with # and -
        print(f"{words(one)} words in the test's own text")
        return 1
    counts = {path.relative_to(ROOT): words(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("stages/[0-9][0-9]_*/README.md"))}
    for path, count in counts.items():
        print(f"{path}: {count}{'' if count <= MOST else f', more than {MOST}'}")
    return 1 if not counts or max(counts.values()) > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
