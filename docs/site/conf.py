"""Settings of the site (docs/build.sh): the pages as GitHub shows them, in the order of docs/mainpage.md.

Sphinx reads the Markdown files where they are, so pages need nothing that GitHub does not know. What is added here:

- chapters: each list of links in mainpage.md becomes a part of the table of contents, with previous and next
- notebooks, with the outputs that are stored
- links to sources: to Doxygen's page of a file where it has one, otherwise to a page made here
- Doxygen's pages, in the same frame, so that one menu and one search serve both
"""
import html
import json
import os
import pathlib
import re
import sys

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = pathlib.Path(__file__).resolve().parents[2]
API = pathlib.Path(os.environ["MLA_SITE"]) / "doxygen"
DATA = pathlib.Path(os.environ["MLA_SITE"] + "-data")  # made here, for pages that move
sys.path.insert(0, str(ROOT / "docs/site"))
import limits_data  # noqa: E402

limits_data.write(DATA)

project = "FlashMLA, stage by stage"
html_title = project
extensions = ["myst_parser"]
myst_enable_extensions = ["linkify", "strikethrough"]  # as on GitHub, and nothing of MyST's own
myst_disable_syntax = ["myst_role", "myst_target", "myst_line_comment", "myst_block_break"]
myst_heading_anchors = 6
highlight_language = "none"
root_doc = "docs/mainpage"
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
include_patterns = ["*.md", "docs/**/*.md", "docs/*.md", "docs/notebooks/*.ipynb", "stages/*/*.md", "stages/*/steps/*.md", "reference/**/*.md"]
exclude_patterns = ["build*", ".*", "stages/template", "bench", "tests"]

html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["static", str(DATA), *map(str, ROOT.glob("docs/demos/*.js")), *map(str, ROOT.glob("docs/demos/recordings/*.js"))]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
html_additional_pages = {"search": "search.html"}
html_use_index = False
templates_path = ["templates"]
html_sidebars = {"**": ["sidebar/scroll-start.html", "sidebar/brand.html", "sidebar/search.html", "sidebar/navigation.html",
                        "sidebar/api.html", "sidebar/scroll-end.html"]}


def chapters(page):
    """The lists of links of a page: [(heading, [document])]."""
    parts = []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            parts.append((line[3:], []))
        elif parts and re.match(r"[-|] ", line):  # a list or a table
            for target in re.findall(r"\]\(([^()#:]+)\.md\)", line):
                parts[-1][1].append(os.path.normpath(os.path.join(os.path.dirname(page), target)))
    return [(heading, documents) for heading, documents in parts if documents]


MAIN = chapters("docs/mainpage.md")
CHAPTERS = {"docs/mainpage": [("", ["README"]), *MAIN]}
listed = {document for _, documents in MAIN for document in documents}
for part in ("docs/course/README", "docs/course/labs/README"):  # what they list is below them, unless it is on the main page
    below = [d for d in sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in (ROOT / part).parent.glob("*.md"))
             if d not in listed and d != part]
    CHAPTERS[part] = [("", below)]
for notes in sorted(ROOT.glob("stages/*/notes.md")):  # below their chapter
    folder = notes.parent.relative_to(ROOT).as_posix()
    if f"{folder}/README" in listed and f"{folder}/notes" not in listed:
        CHAPTERS[f"{folder}/README"] = [("", [f"{folder}/notes"])]
CHAPTERS["docs/notebooks"] = [("", sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in ROOT.glob("docs/notebooks/*.ipynb")))]


def doxygen_pages():
    """{file of the repository: Doxygen's page of it}, by the titles of the pages of sources."""
    found = {}
    for page in sorted(API.glob("*_source.html")):
        path = re.search(r"<title>.*?: (\S+) Source File", page.read_text(encoding="utf-8")).group(1)
        documented = page.with_name(page.name.replace("_source", ""))
        found[path] = f"api/{documented.stem if documented.exists() else page.stem}"
    return found


DOXYGEN = doxygen_pages()
SOURCES = {}  # file without a page of Doxygen's: page


class Notebook(MystParser):
    """A notebook as Markdown: its prose, its code, and what that showed."""
    supported = ("notebook",)

    def parse(self, text, document):
        parts = []
        for cell in json.loads(text)["cells"]:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"`````python\n{source}\n`````")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    parts.append(f"![]({'data:image/png;base64,' + ''.join(data['image/png']).replace(chr(10), '')})")
                else:
                    parts.append("`````text\n" + "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n`````")
        super().parse("\n\n".join(parts), document)


class Site(SphinxTransform):
    default_priority = 100

    def apply(self):
        here = self.env.docname
        for link in list(self.document.findall(addnodes.download_reference)):
            path = os.path.normpath(os.path.join(os.path.dirname(here), link["reftarget"]))
            target = DOXYGEN.get(path) or SOURCES.setdefault(path, "source/" + path.removeprefix("."))
            new = nodes.reference("", "", *link.children, refuri=self.app.builder.get_relative_uri(here, target), internal=True)
            link.replace_self(new)
        for link in list(self.document.findall(addnodes.pending_xref)):  # a folder: its name will do
            if (ROOT / os.path.dirname(here) / link["reftarget"]).is_dir():
                link.replace_self(link.children)
        for heading, documents in CHAPTERS.get(here, []):
            self.document[0] += addnodes.toctree(
                "", parent=here, entries=[(None, d) for d in documents], includefiles=documents, maxdepth=-1, glob=False,
                hidden=True, titlesonly=True, caption=heading or None, rawcaption=heading, includehidden=False, numbered=0)


def heading(title):
    return "<h1 class='path'>" + html.escape(title).replace("/", "/<wbr>") + "</h1>\n"


def contents(page):
    """(title, body, table of contents) of a page of Doxygen's, without its scripts."""
    text = page.read_text(encoding="utf-8")
    title = re.search(r'<div class="title">(.*?)</div>', text, re.S)
    body = re.search(r'<div class="contents">(.*)</div><!-- contents -->', text, re.S)
    if not title or not body:
        return None
    title = re.sub(r"<.*?>", " ", title.group(1)).strip()
    path = re.search(r"<title>.*?: (\S+) (?:Source File|File Reference)", text)
    body = re.sub(r'<div class="levels">.*?</div>|<script.*?</script>|<img src="closed.png"[^>]*>(&#160;)?| onclick="[^"]*"', "", body.group(1), flags=re.S)
    body = re.sub(r'<a (?:id="(\w[^"]*)" name="\1"|name="(\w[^"]*)" id="\2")></a>\s*<h2 class="(\w+)">', r'<h2 class="\3" id="\1\2">', body)
    body = re.sub(r'<h2 class="(\w+)"><a id="([^"]*)" name="\2"></a>', r'<h2 class="\1" id="\2">', body)
    body = re.sub(r'<a id="([^"]*)" name="\1"></a>\s*<h2 class="memtitle">', r'<h2 class="memtitle" id="\1">', body)
    heads = re.findall(r'<h2 class="\w+" id="([^"]*)">(.*?)</h2>', body, re.S)
    toc = "".join(f'<li><a class="reference internal" href="#{id}">{re.sub("<span class=.permalink.*?</span>|<.*?>", "", text, flags=re.S).strip()}'
                  "</a></li>" for id, text in heads)
    title = html.unescape(path.group(1) if path else title)
    return title, heading(title) + body, f"<ul>{toc}</ul>" if toc else ""


def other_pages(app):
    for page in sorted(API.glob("*.html")):
        found = page.name != "index.html" and contents(page)
        if found:
            title, body, toc = found
            yield f"api/{page.stem}", {"title": title, "body": f'<div class="doxygen">{body}</div>', "toc": toc}, "page.html"
    for path, name in sorted(SOURCES.items()):
        text = (ROOT / path).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(path, text)
        except ClassNotFound:
            lexer = get_lexer_for_filename("x.sh" if text.startswith("#!") and "bash" in text[:40] else "x.py" if text.startswith("#!") else "x.txt")
        body = highlight(text, lexer, HtmlFormatter(cssclass="highlight", linenos="inline", lineanchors="l"))
        yield name, {"title": path, "body": heading(path) + body}, "page.html"


def complete(app, page, template, context, doctree):
    """The script of a page that moves; and a table of contents, which the theme hides where there is no document."""
    if (ROOT / f"{page}.js").exists():
        name = pathlib.Path(page).name  # what it needs is named after it
        own = [file.name for folder in (ROOT / "docs/demos", DATA) for file in sorted(folder.glob(f"{name}_*.js"))]
        for script in ("demo.js", *own, f"{name}.js"):
            app.add_js_file(script, loading_method="defer")
    if page.startswith("api/"):
        context["furo_hide_toc"] = not context["toc"]


def recorded_sources(app, _):
    """The texts that recordings point into, for the page that plays them."""
    for recording in (ROOT / "docs/demos/recordings").glob("recording_*.js"):
        for path in json.loads(re.search(r'^"files":(.*),$', recording.read_text(encoding="utf-8"), re.M)[1]):
            text = f"playerDemo.source({json.dumps(path)}, {json.dumps((ROOT / path).read_text(encoding='utf-8'))});\n"
            (pathlib.Path(app.outdir) / "_static" / f"source_{path.replace('/', '__')}.js").write_text(text, encoding="utf-8")


def setup(app):
    app.add_source_parser(Notebook)
    app.add_transform(Site)
    app.connect("html-collect-pages", other_pages)
    app.connect("html-page-context", complete, priority=900)
    app.connect("build-finished", recorded_sources)
    app.connect("builder-inited", lambda app: setattr(app.builder, "search", False))  # search.py makes a better index
