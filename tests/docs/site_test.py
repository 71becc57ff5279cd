#!/usr/bin/env python3
"""The site of docs/build.sh, from disk: every link and anchor, and the order of chapters. Chromium shows every page as on a
dark phone, some also as on a desk and in light; screenshots of these go to build/site-screenshots.

Exit code: 0 all is right; 1 something is not; 77 there is no site, or no browser (then only links were checked).
"""
import html.parser
import os
import pathlib
import shutil
import sys
import urllib.parse
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SITE = ROOT / "build/site"
PYTHON = ROOT / "build/site-packages/bin/python"
SHOTS = ROOT / "build/site-screenshots"
SHOWN = ["docs/mainpage.html", "README.html", "docs/course/by_hand.html", "docs/demos/layouts.html", "docs/demos/limits.html", "docs/demos/model.html",
         "docs/demos/online_softmax.html", "docs/demos/plan.html", "docs/demos/player.html", "docs/demos/seesaw.html", "docs/architecture.html",
         "docs/results.html", "docs/notebooks/5-the-plan-drawn.html",
         "stages/05_tensor_core/README.html", "stages/08_seesaw/README.html", "api/softmax_8h.html", "api/files.html",
         "api/08__seesaw_2kernel_8cuh_source.html", "search.html?q=bank+conflict"]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1400, "height": 900}


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.next, self.toc = set(), [], None, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")} - {None}
        for name in ("href", "src", "action"):
            if attributes.get(name):
                self.links.append(attributes[name])
        if attributes.get("class") == "next-page":
            self.next = attributes["href"]
        self.toc |= attributes.get("class") == "toc-tree"


def check_links():
    """Checks the links of all pages. Returns (faults, number of links)."""
    pages = {path: Page(path) for path in sorted(SITE.rglob("*.html"))}
    faults, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            count += 1
            aim = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            anchor = urllib.parse.unquote(url.fragment)
            if not aim.is_file():
                faults.append(f"{path.relative_to(SITE)}: {link}: no such file")
            elif anchor and aim.suffix == ".html" and anchor not in pages[aim].ids:
                faults.append(f"{path.relative_to(SITE)}: {link}: no such anchor")
    # "Next" leads from the first page to the last, to every chapter once, and through the ladder in its order.
    chapters = [p for p in pages if p.name != "search.html" and p.relative_to(SITE).parts[0] not in ("api", "source", "index.html")]
    path, way = SITE / "docs/mainpage.html", []
    while path and path not in way:
        way.append(path)
        if not pages[path].toc and path.read_text(encoding="utf-8").count("<h2>") > 1:
            faults.append(f"{path.relative_to(SITE)}: no table of contents")
        path = pages[path].next and (path.parent / pages[path].next).resolve()
    if sorted(way) != sorted(chapters):
        faults.append(f"next leads to {len(way)} pages of {len(chapters)}: not to {sorted(set(map(str, chapters)) - set(map(str, way)))}")
    ladder = [p.parent.name for p in way if p.parent.parent.name == "stages"]
    if ladder != sorted(ladder) or len(ladder) < 9:
        faults.append(f"order of the ladder: {ladder}")
    return faults, count


def pixel(page, x, y):
    """(r, g, b) of a point, from a screenshot of that one pixel."""
    png = page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
    at, data = 8, b""
    while at < len(png):
        size, kind = int.from_bytes(png[at:at + 4], "big"), png[at + 4:at + 8]
        data += png[at + 8:at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return tuple(zlib.decompress(data)[1:4])


def address(path):
    name, _, query = path.partition("?")
    return (SITE / name).as_uri() + (f"?{query}" if query else "")


def check_pages(browser):
    faults = []
    SHOTS.mkdir(exist_ok=True)
    chapters = [p.relative_to(SITE).as_posix() for p in sorted(SITE.rglob("*.html"))
                if p.relative_to(SITE).parts[0] not in ("api", "source", "index.html")]
    others = [p.relative_to(SITE).as_posix() for p in sorted(SITE.glob("api/*.html"))[::10]]
    for size, view in (("phone", PHONE), ("desk", DESK)):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport=view, color_scheme=scheme)
            page = context.new_page()
            where = ""
            page.on("console", lambda m: m.type in ("error", "warning") and faults.append(f"{where}: console: {m.text}"))
            page.on("pageerror", lambda e: faults.append(f"{where}: {e}"))
            page.on("requestfailed", lambda r: faults.append(f"{where}: not loaded: {r.url}"))
            page.on("request", lambda r: r.url.startswith("http") and faults.append(f"{where}: asks the network for {r.url}"))
            for path in dict.fromkeys([*SHOWN, *chapters, *others] if (size, scheme) == ("phone", "dark") else SHOWN):
                where = f"{path}, {size}, {scheme}"
                page.goto(address(path))
                if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                    faults.append(f"{where}: the page scrolls sideways")
                dark = sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")[:3])) < 200
                if dark != (scheme == "dark"):
                    faults.append(f"{where}: background")
                small = page.evaluate("[...document.querySelectorAll('article img[src$=\".svg\"]')].filter(i => i.clientWidth < 640).length")
                if small:
                    faults.append(f"{where}: {small} figures too small to read")
                if path == "docs/results.html" and view == PHONE and not page.evaluate(
                        "[...document.querySelectorAll('.table-wrapper')].some(w => w.scrollWidth > w.clientWidth + 100)"):
                    faults.append(f"{where}: wide tables are squeezed and not scrolled")
                if path in SHOWN:
                    page.screenshot(path=SHOTS / f"{path.partition('?')[0].replace('/', '_').removesuffix('.html')}_{size}_{scheme}.png")
            context.close()
    return faults


def check_figures(browser):
    """A figure is light or dark as the page's button says, whatever the system prefers."""
    page = browser.new_page(viewport=DESK, color_scheme="light")
    page.goto(address("docs/architecture.html"))
    sums = []
    for theme in ("light", "dark"):
        page.evaluate("theme => document.body.dataset.theme = theme", theme)
        figure = page.locator("article img[src$='.svg']").first
        figure.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        box = figure.bounding_box()
        sums.append(sum(pixel(page, box["x"] + 3, box["y"] + 3)))
    page.close()
    return [] if sums[0] > 600 and sums[1] < 200 else [f"figure in light and dark: {sums}"]


def check_search(browser):
    """A chapter's search field leads to the place itself."""
    faults = []
    page = browser.new_page(viewport=DESK)
    page.goto(address("stages/02_shared_tiled/README.html"))
    page.locator(".sidebar-search").fill("bank conflict")
    page.locator(".sidebar-search").press("Enter")
    page.wait_for_url("**/search.html?q=bank*")
    for query in ("bank conflict", "kHeadroom"):
        page.locator("#q").fill(query)
        found = page.locator("#results a")
        if found.count() < 3:
            faults.append(f"search: '{query}' is found {found.count()} times")
            continue
        target = found.first.get_attribute("href")
        found.first.click()
        page.wait_for_url("**/" + target)
        text = page.evaluate("""() => (location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))).closest("section, .fragment, .doxygen")
                                                      : document.querySelector("article")).innerText.toLowerCase()""")
        if query.lower() not in text:
            faults.append(f"search: '{query}' is not at {target}")
        page.go_back()
    page.locator("#q").fill("zqx" * 5)
    if page.locator("#results a").count():
        faults.append("search: finds what is not there")
    page.close()
    return faults


def begin():
    """Goes on in the Python that has the packages. Returns (Playwright, path of Chromium, what is missing or None)."""
    if not (SITE / "index.html").exists():
        print("skipped: there is no site; bash docs/build.sh makes it")
        sys.exit(77)
    if PYTHON.exists() and pathlib.Path(sys.prefix) != PYTHON.parents[1]:
        os.execv(PYTHON, [PYTHON, *sys.argv])
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None, None, "skipped: Playwright is missing; bash docs/build.sh brings it"
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    return sync_playwright, chromium, None if chromium else "skipped: pages in a browser, because Chromium is missing"


def main():
    sync_playwright, chromium, missing = begin()
    faults, count = check_links()
    print(f"{count} links within the site")
    if count < 1000:
        faults.append("too few links")
    if not missing:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            faults += check_pages(browser) + check_figures(browser) + check_search(browser)
    print("\n".join(faults))
    if faults:
        return 1
    print(missing or f"screenshots: {SHOTS}")
    return 77 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
