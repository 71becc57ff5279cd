#!/usr/bin/env python3
"""Writes the index of the site's search: search.py SITE. It is a script, not JSON, because a page from disk can load only that.

One entry per heading that has an anchor; in sources, one per few lines. [address, page's title, heading, text]
"""
import json
import pathlib
import re
import sys
from html.parser import HTMLParser

LINES = 12  # of a source per entry


class Page(HTMLParser):
    def __init__(self, address):
        super().__init__(convert_charrefs=True)
        self.address, self.title, self.entries = address, "", []
        self.inside = self.heading = False
        self.skip, self.lines, self.id = 0, 0, ""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside |= tag == "article"
        if not self.inside:
            return
        if self.skip or "headerlink" in (attributes.get("class") or "") or tag in ("script", "style", "form"):
            self.skip += tag not in ("br", "img", "input", "hr", "wbr", "col")
            return
        name = attributes.get("id") or ""
        if re.fullmatch(r"l-?\d+", name):  # a line of a source
            self.lines += 1
            if self.lines % LINES == 1:
                self.entries.append([f"{self.address}#{name}", "", f"line {int(name.strip('l-'))}", ""])
        elif tag in ("section", "span") and name:
            self.id = name
        if re.fullmatch("h[1-6]", tag):
            id = name or self.id
            self.entries.append([self.address + (f"#{id}" if id and tag != "h1" else ""), "", "", ""])
            self.heading, self.title = True, self.title
            self.first = tag == "h1" and not self.title

    def handle_endtag(self, tag):
        if tag == "article":
            self.inside = False
        if self.skip:
            self.skip -= 1
        elif re.fullmatch("h[1-6]", tag) and self.heading:
            self.heading = False
            if self.first:
                self.title = self.entries[-1][2]
        elif self.inside and self.entries and tag in ("p", "td", "th", "div", "li", "pre", "summary", "dd", "dt"):
            self.entries[-1][3] += " "

    def handle_data(self, data):
        if self.inside and not self.skip and self.entries:
            self.entries[-1][2 if self.heading else 3] += data


def main():
    site = pathlib.Path(sys.argv[1])
    entries = []
    for path in sorted(site.rglob("*.html")):
        page = Page(path.relative_to(site).as_posix())
        page.feed(path.read_text(encoding="utf-8"))
        for address, _, heading, text in page.entries:
            heading, text = (" ".join(s.split()) for s in (heading, text))
            if text or heading:
                entries.append([address, " ".join(page.title.split()), heading, text])
    entries.sort(key=lambda entry: entry[0].startswith(("api/", "source/")))  # chapters first
    with open(site / "_static/search_index.js", "w", encoding="utf-8") as file:
        file.write(f"const pages = {json.dumps(entries, ensure_ascii=False, separators=(',', ':'))};\n".replace("</", "<\\/"))


if __name__ == "__main__":
    main()
