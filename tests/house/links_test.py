#!/usr/bin/env python3
"""Every relative link in a Markdown page or a notebook leads to an existing file and, after a #, to a heading of that page.
Every script that a page calls by its path can be run, and what it says is in a file is there."""
import json
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CALL = re.compile(r"(?:^|`)((?:bench|docs|stages|tests)/[\w./-]+) [-\w]")  # a path with an argument, as a command has it


def pages():
    """Markdown files and notebooks, except those in build folders and in dot folders that belong to a tool."""
    for path in sorted([*ROOT.rglob("*.md"), *ROOT.rglob("*.ipynb")]):
        parts = path.relative_to(ROOT).parts
        if not parts[0].startswith("build") and (not parts[0].startswith(".") or parts[0] == ".github"):
            yield path


def text_of(page):
    """The text of a page, or the prose of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def prose(text):
    """The text without fenced blocks and code spans, which hold no links; line numbers stay."""
    text = re.sub(r"^( *)```.*?^ *```", lambda block: "\n" * block.group().count("\n"), text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda code: code.group().replace("]", " ").replace("(", " "), text)


def anchors(text):
    """The names that GitHub gives to headings."""
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = 1
        unique = name
        while unique in found:
            unique, again = f"{name}-{again}", again + 1
        found.add(unique)
    return found


NAMED = re.compile(r"((?:`[\w:~]+(?:\(\))?`(?:,? and |, )?)+) in \[[^\]]*\]\(([^()#\s]+\.(?:h|cpp|cu|cuh|py))\)")  # `a` and `b` in [file](path)


def not_there(page, line):
    """Names that the page says are in a file, and that are not."""
    for names, path in NAMED.findall(line):
        file = page.parent / path
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        yield from (f"{name} is not in {path}" for name in re.findall(r"`([\w:~]+)", names) if name.split("::")[-1] not in text)


def cannot_be_run(call):
    script = ROOT / call
    return script.is_file() and script.read_bytes().startswith(b"#!") and not os.access(script, os.X_OK)


def main():
    checked, broken = 0, []
    for page in pages():
        text = text_of(page)
        for number, line in enumerate(text.splitlines(), 1):
            broken += [f"{page.relative_to(ROOT)}:{number}: {call}: cannot be executed"
                       for call in CALL.findall(line) if cannot_be_run(call)]
            broken += [f"{page.relative_to(ROOT)}:{number}: {what}" for what in not_there(page, line)]
        for number, line in enumerate(prose(text).splitlines(), 1):
            for target in LINK.findall(line):
                if re.match(r"[a-z]+:", target):
                    continue
                checked += 1
                path, _, heading = target.partition("#")
                aim = (page.parent / path).resolve() if path else page
                if not aim.exists():
                    reason = "no such file"
                elif heading and aim.suffix == ".md" and heading not in anchors(aim.read_text(encoding="utf-8")):
                    reason = "no such heading"
                else:
                    continue
                broken.append(f"{page.relative_to(ROOT)}:{number}: {target}: {reason}")
    print("\n".join(broken))
    print(f"{checked} links; {len(broken)} links, commands or places are wrong")
    return 1 if broken or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
