"""bench/report/plots.py: figures are drawn, are readable, and are the same each time. Needs matplotlib."""
import contextlib
import io
import json
import re
import sys
import tempfile
import unittest
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import report_test  # noqa: E402  (finds bench/, too)
import plots  # noqa: E402
import report  # noqa: E402
import recordings  # noqa: E402

try:
    import matplotlib
except ImportError:
    matplotlib = None

SVG = "{http://www.w3.org/2000/svg}"
TEXTS = {"ladder": "128 heads, 128 × 8192: 1333 µs", "roofline": "read 4562 GB/s", "length": "tokens per sequence",
         "batch": "sequences", "cold_sustained": "08_seesaw", "varlen": "128 heads, 128 × stepped 256 to 32768",
         "errors_length": "1M", "errors_deviation": "8192 tokens, 4 outlier columns"}


def all_figures(results, errors):
    """{name: (data, the source they come from)}"""
    return {name: (data, source) for source, of in [(results, plots.DATA), (errors, plots.ERRORS_DATA)]
            for name, data in plots.wanted(source, of).items()}


def recorded_figures():
    return all_figures(recordings.recorded(report_test.ROOT), recordings.load_errors(report_test.ROOT))


class PlacesTest(unittest.TestCase):
    """What needs no matplotlib."""

    def test_labels_are_spread_out(self):
        for places in [[0, 0, 0], [0, 5, 30], [10, 9, 8, 100], [0, 10, 20], [5], [], [3, 0, 1, 2, 25, 24]]:
            moved = plots.spread_out(places, 10)
            order = sorted(range(len(places)), key=lambda i: places[i])
            gaps = [moved[b] - moved[a] for a, b in zip(order, order[1:])]
            self.assertTrue(all(gap >= 10 - 1e-9 for gap in gaps), (places, moved))
            if all(b - a >= 10 for a, b in zip(sorted(places), sorted(places)[1:])):
                self.assertEqual(moved, places)
            if places:  # the mean stays: none is moved without need
                self.assertLessEqual(abs(sum(moved) - sum(places)), 1e-9 * len(places) + 1e-9)

    def test_labels_stay_within_bounds(self):
        self.assertEqual(plots.spread_out([95, 96, 50, 97], 10, 0, 100), [80, 90, 50, 100])
        self.assertEqual(plots.spread_out([1, 2, 40], 10, 0, 100), [0, 10, 40])

    def test_ticks_have_room(self):
        self.assertEqual(plots.thinned([1, 3, 9, 1000, 1001]), [1, 3, 9, 1001])
        self.assertEqual(plots.thinned([512, 1024, 2048, 4096, 8192, 16384]), [512, 1024, 2048, 4096, 8192, 16384])
        self.assertEqual(plots.thinned([2 ** n for n in range(9)]), [1, 4, 16, 64, 256])

    def test_every_colour_has_two_values(self):
        values = [value for pair in plots.COLOURS.values() for value in pair]
        self.assertTrue(all(re.fullmatch("#[0-9a-f]{6}", value) for value in values))
        self.assertEqual(len(set(plots.LIGHT.values())), len(plots.LIGHT))  # the colours of an SVG are told apart by their values


@unittest.skipIf(matplotlib is None, "matplotlib is missing: apt-get install python3-matplotlib")
class PlotsTest(unittest.TestCase):
    def setUp(self):
        results = recordings.Results(report_test.full_results(), "made_up.json")
        cases = {recordings.errors_case(case): case for case in report_test.study()["cases"]}
        self.wanted = all_figures(results, SimpleNamespace(name="cache_errors.json", cases=cases))

    def test_all_are_drawn(self):
        self.assertEqual(list(self.wanted), list(TEXTS))
        for name, (data, source) in self.wanted.items():
            svg = plots.draw(name, data, source)
            root = xml.etree.ElementTree.fromstring(svg)
            texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
            self.assertTrue(any(TEXTS[name] in text for text in texts), (name, texts))
            self.assertIn(plots.stamp(source, data), root.find(f"{SVG}desc").text)
            self.assertLess(len(svg), 60000)

    def test_the_ladder_branches(self):
        times = {"07_tma_pipeline": [9.0], "08_seesaw": [8.0], "10_few_heads": [7.0], "90_mine": [8.5]}
        axes = plots.draw_ladder({"shapes": ["h16_q1_b64_k4096"], "times": times, "floors": [5.0]}).axes[0]
        lines = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
        self.assertEqual(lines, [[(0, 9), (1, 8)], [(1, 8), (2, 7)], [(1, 8), (3, 8.5)]])
        self.assertIn("16 heads, 64 × 4096: 7.00 µs", [text.get_text() for text in axes.texts])

    def test_no_colour_but_by_variable(self):
        for name, (data, source) in self.wanted.items():
            svg = plots.draw(name, data, source)
            style, rest = re.search(r"<style>\n.*?</style>", svg, re.S).group(), re.sub(r"<style>\n.*?</style>", "", svg,
                                                                                   flags=re.S)
            self.assertNotRegex(rest, r"(fill|stroke): #|(fill|stroke)=\"#", name)
            for variable in set(re.findall(r"var\(--(\w+)\)", style)):
                self.assertEqual(style.count(f"--{variable}:#"), 2, (name, variable))  # light, dark
            self.assertIn("prefers-color-scheme:dark", style)
            for used in set(re.findall(r'class="([^"]*)"', rest)):
                for one in used.split():
                    self.assertIn(f".{one}{{", style)

    def test_the_same_each_time(self):
        for name, (data, source) in self.wanted.items():
            svg = plots.draw(name, data, source)
            self.assertEqual(svg, plots.draw(name, data, source))
            self.assertNotIn("<metadata", svg)

    def test_labels_do_not_overlap(self):
        for figures in [self.wanted, recorded_figures()]:
            for name, (data, _) in figures.items():
                self.check_labels(name, plots.DRAW[name](data))

    def check_labels(self, name, figure):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.text import Text
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axes in figure.axes:
            texts = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
            for axis in [axes.xaxis, axes.yaxis]:
                low, high = sorted(axis.get_view_interval())
                texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
            boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer()))  # without its line
                     for text in texts if text.get_text()]
            for i, (text, box) in enumerate(boxes):
                inside = (box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1)
                self.assertTrue(inside, (name, text))
                for other, second in boxes[i + 1:]:
                    wide = min(box.x1, second.x1) - max(box.x0, second.x0)
                    high = min(box.y1, second.y1) - max(box.y0, second.y0)
                    self.assertFalse(wide > 1 and high > 4, (name, text, other, wide, high))

    def test_drawn_figures_are_current(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "bench" / "results").mkdir(parents=True)
            (root / "docs").mkdir()
            (root / "docs" / "results.md").write_text("")
            (root / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
            file = root / "bench" / "results" / "h200_2026-11-21.json"
            file.write_text(json.dumps(report_test.full_results()))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(report.main(["--root", folder, "--update"]), 0)
                self.assertEqual(report.main(["--root", folder, "--check"]), 1)
                self.assertEqual(report.main(["--root", folder, "--plots"]), 0)
                self.assertEqual(report.main(["--root", folder, "--check"]), 0)
                data = report_test.full_results()
                data["benchmarks"][0]["real_time"] += 1
                file.write_text(json.dumps(data))
                report.main(["--root", folder, "--update"])
                self.assertEqual(report.main(["--root", folder, "--check"]), 1)

    def test_figures_of_what_is_recorded(self):
        for name, (data, source) in recorded_figures().items():
            self.assertLess(len(plots.draw(name, data, source)), 60000, name)


if __name__ == "__main__":
    sys.exit(unittest.main())
