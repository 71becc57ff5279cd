#!/usr/bin/env python3
"""Doxygen's filter for Markdown: links that work in the repository become links that work on the site.

    site_links.py LIST PAGE

A link to a page stays. One to a source that is part of the site, which LIST names line by line, becomes a \\ref; one to
any other file of the repository becomes its text, because the site has no copy of it; pictures are copied. Headings as
targets are dropped: Doxygen names them otherwise. Markers of recorded figures (bench/report/prose.py) go, because Doxygen
takes the space behind a comment with it.
"""
import os
import re
import sys

files, page = sys.argv[1:]
with open(files, encoding="utf-8") as file:
    on_site = set(file.read().splitlines())


def link(match):
    image, text, target = match.groups()
    if image:  # Doxygen looks for it in IMAGE_PATH
        return f"![{text}]({os.path.basename(target)})"
    path = os.path.normpath(os.path.join(os.path.dirname(page), target))
    if not target:  # a heading of this page
        return text
    if target.endswith(".md") or not os.path.exists(path):  # Doxygen complains about what is not there
        return f"[{text}]({target})"
    if path in on_site:
        return f'\\ref {path} "' + " ".join(text.replace("`", "").split()) + '"'
    return text


with open(page, encoding="utf-8") as file:
    text = re.sub(r"<!--(v .*?|/v)-->", "", file.read())
sys.stdout.write(re.sub(r"(!?)\[([^][]+)\]\(([^()#:\s]*)(?:#[^()\s]*)?\)", link, text))
