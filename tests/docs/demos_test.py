#!/usr/bin/env python3
"""Pages that move, docs/demos, in Chromium: against the page they come from, and against what the library and the GPU model say.

    demos_test.py DEMO_VALUES     the program of demo_values.cpp
"""
import json
import random
import subprocess
import sys
import unittest

import site_test


class Demo(unittest.TestCase):
    def setUp(self):
        self.page = BROWSER.new_page(viewport=site_test.PHONE)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.addCleanup(self.page.close)

    def tearDown(self):
        self.assertEqual(self.errors, [])

    def open(self, name, state=""):
        self.page.goto("about:blank")  # else only the hash changes
        self.page.goto(site_test.address(f"docs/demos/{name}.html") + (f"#{state}" if state else ""))

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def cells(self, selector):
        return self.page.evaluate("selector => [...document.querySelector(selector).rows].map(r => [...r.cells].map(c => c.innerText))", selector)

    def every_proposal_moves(self, name, result):
        self.open(name)
        for link in self.page.locator("a[data-state]").all():
            state = link.get_attribute("data-state")
            link.click()
            self.page.wait_for_function("state => location.hash.includes(state.split('=')[0])", arg=state)
            moved = self.text(result)
            self.open(name, state)
            self.assertEqual(moved, self.text(result), state)


class OnlineSoftmax(Demo):
    def test_as_by_hand(self):
        self.page.goto(site_test.address("docs/course/by_hand.html"))
        tables = self.page.evaluate("[...document.querySelectorAll('article table')].map(t => [...t.rows].map(r => [...r.cells].map(c => c.innerText)))")
        text = self.text("article")
        self.open("online_softmax")
        self.assertEqual([self.cells(f"#{id}") for id in ("at-once", "online", "merge")], tables[:3])
        out = "(21/23, 36/23)"
        self.assertIn(out, text)
        self.assertIn(f"l = 23/16, out = {out}, lse = ln 46 = 3.8286", self.text("#at-once-result"))
        self.assertIn(f"out = O / l = {out}, lse = 3.8286: as before", self.text("#online-result"))
        self.assertIn("weights 0.2174 and 0.7826, out = (0.9130, 1.5652), lse = 3.8286: as before", self.text("#merge-result"))
        self.open("online_softmax", "sign=new&start=first")
        self.assertIn("out = O / l = (21/23, 6/23)", self.text("#online-result"))
        self.assertIn("(21/23, 6/23)", text)
        self.open("online_softmax", "base=2")
        self.assertIn("weights 0.2915 and 0.7085, out = (0.8455, 1.4927)", self.text("#merge-result"))
        self.assertIn("0.2915 and 0.7085", text)

    def test_infinities(self):
        for state, online, merge in (
                ("s=-inf,3,2,5", "(10/11, 18/11), lse = 3.7842: as before", "as before"),
                ("s=-inf,3,2,5&start=inf", "NaN: not as before", ": as before"),
                ("sign=new", "NaN: not as before", ": as before"),
                ("s=1,3,-inf,-inf", "(1/5, 4/5), lse = 2.3026: as before", "weights 1.0000 and 0.0000, out = (0.2000, 0.8000), lse = 2.3026: as before"),
                ("s=1,3,-inf,-inf&empty=use", ": as before", "(NaN, NaN), lse = 2.3026: not as before"),
                ("s=-inf,-inf,-inf,-inf", "(0, 0), lse = ∞: as before", "weights 0.0000 and 0.0000, out = (0.0000, 0.0000), lse = ∞: as before")):
            self.open("online_softmax", state)
            self.assertIn(online, self.text("#online-result"), state)
            self.assertIn(merge, self.text("#merge-result"), state)

    def test_the_address_is_the_state(self):
        self.open("online_softmax")
        self.page.get_by_label("S of token 0").fill("-2.5")
        self.page.locator("#split").select_option("3")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)
        self.assertEqual(self.page.get_by_label("S of token 0").input_value(), "-2.5")
        self.page.get_by_role("button", name="As on the page").click()
        self.assertIn("ln 46", self.text("#at-once-result"))
        self.every_proposal_moves("online_softmax", "#demo")

    def test_merges_as_the_library(self):
        self.open("online_softmax")
        names = ("weightA", "weightB", "lse")
        rows = values([])["merge"]
        self.assertGreater(len(rows), 50)
        for a, b, *expected in rows:
            got = self.page.evaluate("([a, b]) => { const m = softmaxDemo.mergeLse(Number(a), Number(b)); return [m.weightA, m.weightB, m.lse].map(String); }", [a, b])
            for name, g, e in zip(names, map(number, got), map(number, expected)):
                self.assertTrue(g == e or abs(g - e) <= 1e-14 * abs(e) or (g != g and e != e), f"{a}, {b}: {name} {g}, {e}")


class Layouts(Demo):
    def test_a_box_lies_as_the_model_lays_it(self):
        self.open("layouts")
        for pitch, divide, modulo in ((128, 1, 8), (64, 2, 4)):
            got = self.page.evaluate("""layout => {
              const places = [], chunks = layoutsDemo.chunksOf(layout);
              for (let r = 0; r < 64; ++r) for (let c = 0; c < chunks; ++c) places[layoutsDemo.addressOf(layout, r, c) / 16] = r * chunks + c;
              return places; }""", {"pitch": pitch, "divide": divide, "modulo": modulo})
            self.assertEqual(got, values([])["places"][str(pitch)])

    def test_conflicts_as_the_model_counts_them(self):
        self.open("layouts")
        accesses = self.page.evaluate("""() => {
          const all = [], keys = key => Object.keys(layoutsDemo.kChoices[key][1]);
          for (const pitch of keys("pitch")) for (const divide of keys("divide")) for (const modulo of keys("modulo"))
            for (const pattern of keys("pattern")) for (const [row, column] of [[0, 0], [13, 21], [31, 31]]) {
              const access = layoutsDemo.access(layoutsDemo.layoutOf({pitch, divide, modulo}), pattern, row, column);
              all.push({bytes: access.bytes, addresses: access.addresses, taken: layoutsDemo.passes(access).taken});
            }
          return all; }""")
        taken = [access["taken"] for access in accesses]
        self.assertGreater(len(set(taken)), 4)
        self.assertEqual(taken, values(accesses)["passes"])

    def test_what_the_page_says(self):
        for state, said in (("modulo=1", "takes 8 passes; 1 without"), ("modulo=8", "takes 1 pass; 1 without"), ("pitch=144&modulo=1", "takes 1 pass;"),
                            ("pitch=1152&modulo=1", "takes 8 passes"), ("pitch=64&divide=2&modulo=4", "takes 1 pass;"),
                            ("pitch=64&modulo=4", "takes 2 passes"), ("pattern=column", "takes 4 passes")):
            self.open("layouts", state)
            self.assertIn(said, self.text("#passes"), state)

    def test_click_and_address(self):
        self.open("layouts")
        self.page.locator("#layout tr").nth(6).locator("td").nth(2).click()  # row 5, place 2: chunk 7
        self.assertEqual(self.text("#where"), "Row 5, column 56: chunk 7, at place 2 of its row; byte 672, bank 8.")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)
        self.every_proposal_moves("layouts", "#demo")


class Plan(Demo):
    def test_plans_as_the_library(self):
        random.seed(1)
        plans = []
        for _ in range(400):
            longest, alike = random.choice((64, 300, 5000, 60000)), random.random() < 0.3
            plans.append({"lengths": [longest if alike else random.choice((longest, random.randint(0, longest))) for _ in range(random.choice((1, 2, 3, 4, 8, 30)))],
                          "workers": random.choice((1, 2, 7, 8, 16, 132)), "fixed": random.choice((0, 1, 5)), "min": random.choice((1, 4, 9)),
                          "combine": random.choice((0, 1, 10)), "split": random.choice((0, 0, 0, 64, 512))})
        self.open("plan")
        got = self.page.evaluate("plans => plans.map(settings => planDemo.planOf(settings))", plans)
        self.assertEqual(len({plan["rule"][:20] for plan in got}), 4)
        for settings, plan, expected in zip(plans, got, values([], plans)["plans"], strict=True):
            self.assertEqual([[list(piece.values()) for piece in worker] for worker in plan["workers"]], expected, settings)

    def test_what_the_page_says(self):
        for state, rule, parts in (("", "interval of the line", 3), ("lengths=4096,4096,4096,4096,4096,4096,4096,4096", "nothing is cut", 0),
                                   ("lengths=16384", "interval", 1),
                                   ("lengths=256&min=4", "", 0), ("lengths=256&min=1", "", 1), ("lengths=4096,4096,4096,4096", "equally many pieces", 4),
                                   ("split=512", "every 512 tokens", 2), ("workers=0", "workers: 1 to 264", 0), ("lengths=x", "lengths, in tokens: 1 to", 0)):
            self.open("plan", state)
            self.assertIn(rule, self.text("#rule"), state)
            self.assertEqual(self.page.locator("#combine li").count(), parts, state)
        self.every_proposal_moves("plan", "#demo")

    def test_the_address_is_the_state(self):
        self.open("plan")
        self.page.locator("#lengths").fill("100, 5000")
        self.page.locator("#workers").fill("3")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)


def values(accesses, plans=()):
    requests = [{"bytes": access["bytes"], "addresses": access["addresses"]} for access in accesses]
    return json.loads(subprocess.run([sys.argv[1]], input=json.dumps({"requests": requests, "plans": plans}), capture_output=True, text=True, check=True).stdout)


def number(value):
    return float(str(value).replace("Infinity", "inf"))


if __name__ == "__main__":
    playwright, chromium, missing = site_test.begin()
    if missing:
        print(missing)
        sys.exit(77)
    with playwright() as running:
        BROWSER = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        sys.exit(not unittest.main(argv=sys.argv[:1], exit=False).result.wasSuccessful())
