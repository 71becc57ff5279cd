#!/usr/bin/env python3
"""Pages that move, docs/demos, in Chromium. They are compared with the pages they come from, the library and the GPU model.

    demos_test.py DEMO_VALUES [LIMITS_VALUES MLA_RUN]     the programs of demo_values.cpp and limits_values.cpp, and mla_run
"""
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
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
        self.page.goto("about:blank")  # otherwise only the hash changes, and the page is not loaded anew
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


class Every(Demo):
    """What holds for each of the pages."""

    def test_for_every_reader(self):
        """Says what to try first; and a control has a name, whoever reads it out."""
        for name in NAMES:
            self.open(name)
            self.assertRegex(self.page.evaluate("document.getElementById('demo').previousElementSibling.textContent"), "^Try this first: ", name)
            self.page.locator("#demo :is(input, select, button)").first.wait_for()
            nameless = self.page.evaluate("""() => [...document.querySelectorAll("#demo :is(input, select, button, svg)")].filter(each =>
              !(each.ariaLabel || each.labels?.length || each.textContent.trim())).map(each => each.outerHTML)""")
            self.assertEqual(nameless, [], name)

    def test_a_proposal_is_shown(self):
        """A link far below moves the page to what it changes, without a motion for who wants none."""
        for motion in ("reduce", "no-preference"):
            self.page.emulate_media(reduced_motion=motion)
            self.open("layouts")
            self.page.locator("a[data-state]").last.click()
            if motion == "no-preference":
                self.page.wait_for_timeout(1500)
            top = self.page.evaluate("document.getElementById('demo').getBoundingClientRect().top")
            self.assertTrue(0 <= top <= 100, (motion, top))


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
        self.assertEqual(self.text("#where"), "Row 5, column 56: chunk 7, at place 2 of its row; byte 672, bank 8; ldmatrix brings it to lane 20, the low half of a register.")
        for key in ("ArrowUp", "ArrowRight"):  # by the keyboard, too: row 4, place 3
            self.page.keyboard.press(key)
        self.assertIn("Row 4, column 56: chunk 7, at place 3 of its row; byte 560, bank 12; ldmatrix brings it to lane 16,", self.text("#where"))
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)
        self.every_proposal_moves("layouts", "#demo")


    def test_a_swizzle_of_ones_own(self):
        self.open("layouts", "modulo=1&own=c+^+r+%25+8")
        self.assertIn("takes 1 pass;", self.text("#passes"))
        for own, said in (("(c + r) % 8", "takes 1 pass;"), ("c ^ (r >> 1) % 8", "takes 2 passes"), ("c", "takes 8 passes"), ("7 - c", "takes 8 passes"),
                          ("c & 6", "chunks 0 and 1 both get place 0"), ("c + 1", "chunk 7 gets place 8"), ("c ^", "no expression"),
                          ("alert(1)", "r, c, numbers"), ("rc", "no expression"), ("c / 0", "place")):
            self.page.locator("#own").fill(own)
            self.assertIn(said, self.text("#passes"), own)
        got = self.page.evaluate("""() => ["", "c ^ r % 8"].map(own => layoutsDemo.access(layoutsDemo.layoutOf({pitch: "128", divide: "1", modulo: "8", own}), "rows", 5, 9))""")
        self.assertEqual(got[0], got[1])

    def test_who_gets_an_element(self):
        self.open("layouts", "pattern=rows&row=5&column=16")
        self.assertIn("; lane 10 stores it.", self.text("#where"))
        self.open("layouts", "pattern=column&row=5&column=17")
        self.assertIn("; lane 5 loads it, the high half of a register.", self.text("#where"))

    def test_descriptors_as_the_model_walks_them(self):
        random.seed(3)
        walks = [{"operand": "k", "begin": 96, "lbo": 0, "sbo": 1024}, {"operand": "mn", "begin": 2048, "lbo": 8192, "sbo": 1024}]
        for _ in range(10):
            walks += [{"operand": "k", "begin": random.randrange(4) * 32 + random.randrange(8) * 1024, "lbo": random.randrange(0, 65536, 1024), "sbo": random.randrange(1024, 7168, 1024)},
                      {"operand": "mn", "begin": random.randrange(8) * 1024, "lbo": random.randrange(1024, 11264, 1024), "sbo": random.randrange(1024, 16384, 1024)}]
        self.open("layouts")
        for walk, got in zip(walks, values([], walks=walks)["walks"], strict=True):
            columns = 64 if walk["operand"] == "k" else 256
            bytes_of = self.page.evaluate("""([walk, columns]) => Array.from({length: 16}, (_, k) => Array.from({length: columns}, (_, n) => layoutsDemo.walkByte(walk, k, n)))""", [walk, columns])
            place = self.page.evaluate("""() => Array.from({length: 64}, (_, r) => Array.from({length: 8}, (_, n) => layoutsDemo.fragmentOf("wgmma_d", r, n)))""")
            for row in range(64):  # row r of A is the unit vector of k = r % 16
                for n in range(columns):
                    d = place[row][n % 8]
                    self.assertEqual(got[d["lane"]][n // 8 * 4 + d["register"]] * 2, bytes_of[row % 16][n], f"{walk}: k = {row % 16}, n = {n}")

    def test_fragments_as_the_model_has_them(self):
        self.open("layouts")
        held = self.page.evaluate("""() => Object.fromEntries(Object.entries(layoutsDemo.kFragments).map(([kind, [, rows, columns, of]]) =>
          [kind, Array.from({length: rows}, (_, r) => Array.from({length: columns}, (_, c) => of(r, c)))]))""")
        model = values([])
        a, b, d = ([[x["lane"] * each + x["register"] * scale + max(x["half"], 0) for x in row] for row in held[kind]]
                   for kind, each, scale in (("mma_a", 8, 2), ("mma_b", 4, 2), ("mma_d", 4, 1)))
        self.assertEqual(sorted([a[r][k], b[k][c], d[r][c]] for r in range(16) for k in range(16) for c in range(8)), sorted(model["fragments"]["mma"]))
        for kind in ("ldmatrix", "ldmatrix_trans"):
            for row in range(32):
                for column in range(8):
                    x = held[kind][row][column]
                    self.assertEqual(model["fragments"][kind][x["lane"]][x["register"]] >> 16 * x["half"] & 0xffff, 8 * row + column, f"{kind}: {row}, {column}")
        for r in range(16):
            for k in range(16):
                self.assertEqual(held["mma_a"][r][k], held["ldmatrix"][(r // 8 + k // 8 * 2) * 8 + r % 8][k % 8])
                self.assertEqual(held["mma_b"][k][r % 8], held["ldmatrix_trans"][k][r % 8])
        for r in range(64):
            for k in range(16):
                x, y = held["wgmma_a"][r][k], held["wgmma_d"][r][k]
                self.assertEqual(model["wgmma_a"][y["lane"]][y["register"]], 8 * x["lane"] + 2 * x["register"] + x["half"], f"row {r}, k = {k}")
                self.assertEqual(x["lane"], y["lane"])  # why P crosses as it is

    def test_the_path_of_p(self):
        """It ends where the next instruction reads P. The kernels' lines that the page tells of are still there."""
        self.open("layouts")
        places = self.page.evaluate("""() => ["05", "06", "08"].map(how => Array.from({length: 64}, (_, r) => Array.from({length: 64}, (_, t) => layoutsDemo.pathOf(how, r, t).byte)))""")
        walk = self.page.evaluate("""() => Array.from({length: 64}, (_, r) => Array.from({length: 64}, (_, t) =>
          layoutsDemo.walkByte({operand: "k", begin: (t >> 4) * 32, lbo: 0, sbo: 1024}, t % 16, r)))""")
        self.assertEqual(places[1], walk)  # A is walked as B is
        for how in places:
            self.assertEqual(len({byte for row in how for byte in row}), 64 * 64)
        for stage, line in (("05_tensor_core", "kStrideP = kTokens + 8;"), ("05_tensor_core", "ldmatrix_x4(p_rmem[i], &smem.p[i * 16 + lane % 16][t + lane / 16 * 8])"),
                            ("06_wgmma", "stmatrix_x4(&smem.p[row][chunk ^ row % 8], four)"), ("07_tma_pipeline", "stmatrix_x4(&smem.p[row][chunk ^ row % 8], four)"),
                            ("08_seesaw", "const uint4 four = smem.p[t][threadIdx.x % 128];")):
            self.assertIn(line, (site_test.ROOT / "stages" / stage / "kernel.cuh").read_text(), stage)

    def test_what_the_other_views_say(self):
        for state, selector, said in (
                ("view=walk&operand=mn&begin=0&lbo=8192&sbo=1024", "#descriptor", "Descriptor 0x4000004002000000:"),
                ("view=walk&operand=mn&begin=0&lbo=8192&sbo=1024", "#where", "This step reads it as B[k = 0][n = 0 … 7]."),
                ("view=walk&operand=mn&begin=0&lbo=1024&sbo=8192", "#passes", "reads 256 granules of 16 bytes."),
                ("view=walk&operand=mn&begin=0&lbo=16384&sbo=1024", "#passes", "outside"),
                ("view=fragment&kind=wgmma_d&row=37&column=9", "#where", "warp 2, lane 20, d5, fp32"),
                ("view=fragment&kind=ldmatrix&row=11&column=2", "#where", "lane 13, register 1, the low half. The row's address comes from lane 11."),
                ("view=path&how=08&row=3&column=21", "#steps", "smem.p[1][14]"), ("view=path&how=06&row=3&column=40", "#steps", "place 5 ^ 3 % 8 = 6")):
            self.open("layouts", state)
            self.assertIn(said, self.text(selector), state)
        self.open("layouts", "view=walk")
        self.page.locator("#sbo").fill("1000")
        self.assertEqual(self.page.evaluate("getComputedStyle(document.querySelector('[data-wrong]'), '::after').content"), '" a multiple of 16 below 65536"')
        self.assertIn("SBO / 16 = 64", self.text("#descriptor"))
        self.page.locator("#sbo").fill("1024")
        self.assertEqual(self.page.locator("#sbo:invalid").count(), 0)
        self.page.locator("#next").click()
        self.page.locator("#layout tr").nth(2).locator("td").nth(3).click()  # token 1, place 3: chunk 2
        self.assertIn("Byte 176: token 1, columns 16 … 23, box 0, place 3; banks 12 … 15. This step reads it as B[k = 0 … 7][n = 1].", self.text("#where"))
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)


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
        self.open("plan", "lengths=100,5000&workers=2")
        self.page.get_by_text("The plan as a table").click()
        self.page.locator("#workers").fill("3")
        rows = self.cells("#pieces")[1:]
        self.assertTrue(self.page.locator("#pieces").is_visible())  # it stays open
        self.assertEqual((rows[0][:3], rows[-1][1], rows[-1][2][-5:]), (["0", "0", "0–100"], "1", "–5000"))

    def test_the_address_is_the_state(self):
        self.open("plan")
        self.page.locator("#lengths").fill("100, 5000")
        self.page.locator("#workers").fill("3")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)


class Player(Demo):
    """The player of the model's recordings; demo_recordings_test says whether these are current."""

    def text(self, selector):
        self.page.wait_for_function("document.getElementById('demo').dataset.drawn === location.hash")
        return super().text(selector)

    def listed(self):
        self.page.wait_for_function("playerDemo.listed().recordings.length > 0")
        return self.page.evaluate("playerDemo.listed()")

    def test_size(self):
        recordings = [path.stat().st_size for path in (site_test.SITE / "_static").glob("recording*.js")]
        self.assertGreater(len(recordings), 20)
        self.assertLess(sum(recordings), 3e6)

    def test_its_account_is_the_models(self):
        """Every phase and barrier releases as many threads as the model says; every copy and product ends, unless the kernel is stopped."""
        self.open("player")
        stages = set()
        for item in self.listed()["recordings"]:
            found = self.page.evaluate("""async name => {
              const recording = await playerDemo.recordingOf(name), state = playerDemo.stateOf(recording), half = playerDemo.stateOf(recording);
              playerDemo.go(recording, state, recording.steps.length);
              playerDemo.go(recording, half, recording.steps.length >> 1);
              return {mistakes: recording.mistakes, waits: recording.spans.filter(span => span.what === "wait").length, stopped: recording.error !== "" || recording.truncated,
                      open: [...state.open.values()].flat().length, waiting: [...state.warps.values()].flatMap(warp => warp.waits).length, copies: state.copies.size,
                      readers: [...state.cells.values()].flat().flatMap(region => region.cells).filter(cell => cell.readers !== 0).length,
                      steps: recording.steps.length, kept: recording.events_kept, error: recording.error, half: half.at}; }""", item["name"])
            self.assertEqual(found["mistakes"], [], item["name"])
            self.assertEqual((found["steps"], found["half"]), (found["kept"], found["kept"] // 2), item["name"])
            self.assertGreater(found["waits"], 10, item["name"])
            self.assertEqual(bool(found["error"]), "fault" in item, item["name"])
            if not found["stopped"]:
                self.assertEqual([found[what] for what in ("open", "waiting", "copies", "readers")], [0] * 4, item["name"])
                stages.add(item["stage"])
        self.assertLessEqual({f"{stage:02}" for stage in range(1, 9)}, stages)

    def test_places_are_in_the_sources(self):
        """An instruction is in the line that a recording names, or ends a statement that begins there."""
        self.open("player")
        for item in self.listed()["recordings"]:
            places = self.page.evaluate("""async name => { const recording = await playerDemo.recordingOf(name);
              return recording.places.map(([instruction, file, line]) => [instruction, recording.files[file], line]); }""", item["name"])
            for instruction, path, line in places:
                near = "".join((site_test.ROOT / path).read_text().splitlines()[line - 1:line + 2])
                if instruction not in ("load", "store", "atomic"):
                    self.assertIn(instruction, near, f"{item['name']}: {path}:{line}; docs/demos/record.py records anew")

    def test_stories(self):
        self.open("player")
        stories = self.listed()["stories"]
        links = self.page.evaluate("[...document.querySelectorAll('#watch-the-race a[data-state]')].map(a => a.dataset.state.split('=')[1])")
        self.assertEqual(links, [story["name"] for story in stories])
        self.assertGreaterEqual(len({story["left"] for story in stories}), 6)
        for story in stories:
            for k, (left, right, told) in enumerate(story["steps"]):
                self.open("player", f"story={story['name']}&k={k}")
                self.assertIn(told, self.text("#story li.here"), story["name"])
                self.assertIn(f"Step {left} of", self.text("#pane-a .event"))
                self.assertIn(f"Step {right} of", self.text("#pane-b .event"))
                last = k == len(story["steps"]) - 1
                self.assertEqual(self.page.locator("#pane-a .error").count(), last, story["name"])
                self.assertEqual([self.page.locator(f"#{pane} .source span").count() for pane in ("pane-a", "pane-b")], [9, 9])
            self.assertRegex(self.text("#pane-a .change"), r"^The fault, line \d+: ")
            self.assertIn("MLA_MUTANT=N build/tests/mutant_run trace --stage 0", self.page.locator("#pane-a details code").text_content())

    def test_what_the_page_says(self):
        self.open("player", "story=p-overwritten&k=1")
        self.assertIn("stmatrix_x4", self.text("#pane-a .source .here"))
        self.assertIn("P of the tile before has been read", self.text("#pane-b .source .here"))
        rows = self.cells("#pane-b .who")
        self.assertEqual(rows[1][:2], ["warp 0", "waits for barrier 1"])
        self.assertRegex(self.page.locator("#pane-b .who td:last-child").first.text_content(), r"^step \d+: Warp \d waits at barrier 1: 256 of 256 threads")
        self.open("player", "story=p-not-given&k=2")
        self.assertIn("deadlock", self.text("#pane-a .error"))
        rows = self.cells("#pane-a .who")
        self.assertEqual([row[2] for row in rows[1:12]], ["never"] * 11)
        self.assertEqual(rows[12][1], "has returned")
        self.open("player", "story=no-wait&k=1")
        self.assertIn("full[0] 0 · -1/1 · 16384 B", self.text("#pane-a .chips"))
        self.open("player", "story=no-wait&k=0")
        self.assertEqual(self.page.locator("#pane-a .region .under-way").count(), 36)  # all of kv
        self.open("player", "story=nothing&a=nothing")
        self.assertIn("There is no recording 'nothing'", self.text("#demo"))

    def test_forwards_and_backwards(self):
        self.open("player", "a=08-3&at=700&b=08-0&bt=650")
        self.page.get_by_label("skip what leaves").uncheck()
        text, seen = self.text(".panes"), []
        for button in ("a step on",) * 3 + ("a step back",) * 3:
            seen.append(self.text(".panes"))
            self.page.get_by_role("button", name=button, exact=True).click()
        self.assertEqual(seen[4:] + [self.text(".panes")], [seen[2], seen[1], text])
        self.assertEqual(len(set(seen)), 4)
        self.page.get_by_role("button", name="to the end").click()
        self.assertRegex(self.text("#pane-a .event"), r"^Step (\d+) of \1\.")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual(self.text("#demo"), text)
        box = self.page.locator("#pane-a .lanes").bounding_box()
        self.page.locator("#pane-a .lanes").click(position={"x": box["width"] / 2, "y": 20})
        self.assertRegex(self.text("#pane-a .event"), r"^Step (\d+) of (?!\1)")

    def test_by_keyboard(self):
        self.open("player", "a=08-3&at=700&b=")
        self.text("#pane-a")
        self.page.locator("#pane-a input[type=range]").focus()
        self.page.keyboard.press("ArrowRight")
        self.page.keyboard.press("ArrowRight")  # it still has the focus
        self.assertIn("Step 702 of", self.text("#pane-a .event"))
        self.assertIn("at=702", self.page.evaluate("location.hash"))
        self.page.locator("#pane-a .memory").press("ArrowRight")
        self.assertRegex(self.text("#pane-a .told"), r"^q from byte 0: ")
        self.page.locator("#race").focus()
        self.page.locator("#race").select_option("no-wait")
        self.assertEqual(self.page.evaluate("document.activeElement.id"), "race")
        self.assertIn("07: the producer does not wait", self.text("#story"))

    def test_another_size(self):
        self.open("player")
        self.text("#pane-a")
        for width in (600, 390):
            self.page.set_viewport_size({"width": width, "height": 844})
            self.page.wait_for_function("""() => { const lanes = document.querySelector("#pane-a .lanes"); return Math.abs(lanes.viewBox.baseVal.width - lanes.clientWidth) < 2; }""")

    def test_ones_own(self):
        text = (site_test.SITE / "_static/recording_01-0.js").read_text()
        recording = text[text.index("{"):text.rindex("}") + 1]
        self.open("player")
        self.listed()
        self.page.locator("#file").set_input_files({"name": "mine.json", "mimeType": "application/json", "buffer": recording.encode()})
        self.page.wait_for_function("location.hash.startsWith('#a=own')")
        self.assertIn("Step 0 of", self.text("#pane-a .event"))
        self.assertIn("01_naive", self.text("#pane-a .title"))
        self.page.locator("#file").set_input_files({"name": "bad.json", "mimeType": "application/json", "buffer": b'{"schema": "x"}'})
        self.page.get_by_text("bad.json: This is not a recording of version 1.").wait_for()

    def test_proposals(self):
        self.every_proposal_moves("player", ".panes")


class Seesaw(Demo):
    def open(self, name, state=""):
        super().open(name, state)
        self.page.locator("#demo p").first.wait_for()

    def test_holds_what_the_figures_hold(self):
        subprocess.run([site_test.ROOT / "docs/demos/seesaw.py", "--check"], check=True)
        self.open("seesaw")
        for name in ("07", "08"):
            drawn = (site_test.ROOT / f"docs/figures/timeline_{name}.svg").read_text()
            clocks = sorted(int(text) for text in re.findall(r": (\d+) clocks", drawn))
            got = self.page.evaluate("name => seesawTimelines.find(each => each.name === name).intervals.map(([, , from, to]) => to - from)", name)
            self.assertEqual(sorted(got), clocks)
            self.assertGreater(len(clocks), 30)

    def test_ideal(self):
        """Worked out by hand: S takes 1152 clocks and half of P V 512; in 07 S takes 1728, by shared memory. The page has the chapters' numbers."""
        self.open("seesaw")
        for (stage, tiles, softmax), length in {("08", 1, 490): 1152 + 490 + 1024, ("08", 2, 490): 4352, ("08", 3, 490): 4352 + 1152 + 490 + 1024, ("08", 4, 490): 2 * 4352,
                                                ("08", 2, 0): 4352,
                                                # At 700 clocks the second softmax is not hidden: S1 shares the unit with P0 V0_L and ends at 3456 - softmax. At 1300 neither is the first.
                                                ("08", 2, 700): 3456 + 1024, ("08", 2, 1300): 1152 + 2 * 1300 + 1024,
                                                ("07", 1, 256): 1728 + 256 + 1024, ("07", 3, 500): 3 * (1728 + 500 + 1024)}.items():
            got = self.page.evaluate("([stage, tiles, softmax]) => seesawDemo.ideal(stage, tiles, softmax)", [stage, tiles, softmax])
            self.assertEqual((got["length"], got["stuck"]), (length, False), (stage, tiles, softmax))
            work = {"Q K^T": 0, "P V": 0}
            for track in (0, 1):  # within a warpgroup products come one after the other
                own = sorted(product[2:4] for product in got["products"] if product[0] == track)
                self.assertTrue(all(a[1] <= b[0] for a, b in zip(own, own[1:])), got["products"])
            self.assertEqual(len(got["products"]), tiles * (4 if stage == "07" else 3))

    def test_measured(self):
        self.open("seesaw", "timeline=08&from=0&tiles=2&softmax=")
        cuts = self.cells("#cuts")[1:]
        self.assertEqual([int(row[1]) for row in cuts], [1152, 1664, 534, 1002, 0, 4352])
        measured = [int(row[2]) for row in cuts]
        self.assertEqual(sum(measured[:-1]), measured[-1])
        self.assertTrue(all(int(row[2]) - int(row[1]) == int(row[3]) for row in cuts))
        begins = self.page.evaluate("seesawTimelines.find(each => each.name === '08').intervals.filter(([track, phase]) => track === 0 && phase === 'Q K^T').map(each => each[2])")
        self.assertEqual(measured[-1], begins[1] - begins[0])
        self.assertIn(f"a pair of tiles takes {measured[-1]} clocks", self.text("#sum"))
        rows = self.cells("#phases")[1:]
        for track in ("warpgroup 0", "warpgroup 1"):
            self.assertAlmostEqual(sum(int(row[3]) for row in rows if row[0] == track), measured[-1], delta=5)
        self.page.locator(".time rect.p2").first.click()
        self.assertEqual(self.text("#told"), "ideal, Q K^T: 1152 clocks, 0 to 1152")
        self.page.locator(".time").press("ArrowRight")
        self.assertEqual(self.text("#told"), "ideal, softmax: 490 clocks, 1152 to 1642")

    def test_what_the_page_says(self):
        for state, said in (("timeline=07&from=1&tiles=1", "Ideal: 1 tile takes 3008 clocks"), ("timeline=08&tiles=1", "1 tile takes 2666"), ("timeline=x", "no timeline 'x'"),
                            ("timeline=08&from=9", "turn: 0 to 0"), ("tiles=0", "tiles: 1 to 16"), ("softmax=-1", "softmax: 0 to 5000")):
            self.open("seesaw", state)
            self.assertIn(said, self.text("#demo"), state)
        self.open("seesaw")
        self.page.locator("#softmax").fill("800")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.page.locator("#phases").wait_for()
        self.assertEqual(self.text("#demo"), text)
        self.every_proposal_moves("seesaw", "#demo")

    def test_unpaired_tile(self):
        """A timeline that ends with a piece: its last turn is one tile, which warpgroup 1 has no part of but P V, and ends last."""
        self.open("seesaw")
        self.page.evaluate("""() => { seesawTimelines.splice(0, Infinity, {name: "08_odd", title: "an odd one", stage: "08", megahertz: 1000, intervals: [
          [0, "Q K^T", 0, 1000, false], [0, "softmax", 1000, 1500, false], [0, "P V", 1500, 2000, false], [0, "wait for other", 2000, 3500, false], [0, "P V", 3500, 4500, false],
          [1, "Q K^T", 1000, 3000, false], [1, "wait for other", 3000, 3100, false], [1, "softmax", 3100, 3400, true], [1, "P V", 3400, 3500, false], [1, "P V", 3500, 4500, false],
          [0, "Q K^T", 4500, 5700, false], [0, "softmax", 5700, 6300, false], [0, "P V", 6300, 7400, false], [0, "write out", 7400, 9000, false],
          [1, "wait for other", 4500, 6400, false], [1, "P V", 6400, 7450, false], [1, "write out", 7450, 9000, false]]});
          location.hash = "timeline=08_odd&from=1&tiles=3"; }""")
        self.page.get_by_text("the unpaired tile takes 2950 clocks").wait_for()
        self.assertEqual(self.cells("#phases")[1:4], [["warpgroup 0", "Q K^T", "1152", "1200"], ["warpgroup 0", "softmax", "490", "600"], ["warpgroup 0", "P V", "1024", "1100"]])
        self.assertEqual(self.page.locator("#cuts").count(), 0)
        self.page.evaluate("location.hash = 'timeline=08_odd&from=0&tiles=3'")
        self.page.get_by_text("a pair of tiles takes 4500 clocks").wait_for()
        self.assertEqual([row[2] for row in self.cells("#cuts")[1:]], ["1000", "2000", "500", "1000", "0", "4500"])


class Model(Demo):
    """The GPU model in the browser: it finds the kernels right, and a race in each that lacks a barrier."""

    def run_it(self, state):
        self.open("model", state)
        self.page.locator("#run").click()
        self.page.wait_for_function("!/^(Running.*)?$/.test(document.getElementById('result').textContent)", timeout=120000)
        return self.text("#result")

    def test_up_to_date(self):
        self.open("model")
        known = self.page.evaluate("modelKernels")
        now = subprocess.run([sys.executable, BUILD_WASM.parent / "model/kernels.py", *known], capture_output=True, text=True, check=True).stdout
        self.assertEqual(known, json.loads(now), "a kernel has changed; bash docs/demos/wasm/model/build.sh compiles it")

    def test_kernels_are_right(self):
        for stage, seed in (("01_naive", 1), ("02_shared_tiled", 2), ("03_online_softmax", 3), ("03_online_softmax", 0)):
            self.assertRegex(self.run_it(f"stage={stage}&heads=2&tokens=33&seed={seed}"), r"^Right\. out: ok .*; lse: ok ", stage)

    def test_without_a_barrier(self):
        self.open("model")
        for slug, known in self.page.evaluate("modelKernels").items():
            for line, why in known["barriers"]:
                said = self.run_it(f"stage={slug}&out={line}&heads=4&tokens=70&seed=1")
                if "the next item" in why:  # a block has one item here
                    self.assertRegex(said, "^Right", f"{slug}:{line}")
                else:
                    place = r"at stages/\S+:\d+"  # one of the two may be in a header that the kernel includes
                    self.assertRegex(said, rf"^race: .*{place} after .*{place}", f"{slug}:{line}")
                    self.assertIn(f"stages/{slug}/kernel.cuh", said)

    def test_a_race_that_no_schedule_shows(self):
        self.open("model")
        line = self.page.evaluate("modelKernels['01_naive'].barriers[0][0]")
        for tokens, seed, races, said in ((20, 0, "no", "^Right"), (20, 1, "no", "^Right"), (20, 7, "no", "^Right"), (20, 1, "yes", "^race"), (70, 1, "no", "^Wrong")):
            self.assertRegex(self.run_it(f"stage=01_naive&out={line}&tokens={tokens}&seed={seed}&races={races}"), said)

    def test_the_address_is_the_state(self):
        self.open("model")
        self.page.locator("#set-stage").select_option("01_naive")
        self.page.locator("#set-tokens").fill("9")
        address = self.page.evaluate("location.href")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.assertEqual((self.page.locator("#set-stage").input_value(), self.page.locator("#set-tokens").input_value()), ("01_naive", "9"))
        self.assertIn("tokens: 0 to 200", self.run_it("tokens=1000"))
        for link in self.page.locator("a[data-state]").all():  # lines of barriers
            state = link.get_attribute("data-state")
            self.open("model", state)
            self.assertIn(f"out={self.page.locator('#set-out').input_value()}", state)


NAMES = [path.stem for path in sorted((site_test.ROOT / "docs/demos").glob("*.md"))]
BUILD_WASM = site_test.ROOT / "docs/demos/wasm/build.sh"


class Limits(Demo):
    def setUp(self):
        if len(sys.argv) < 4:
            self.skipTest("the programs of bench are not built")
        super().setUp()

    def open(self, name="limits", state=""):
        super().open(name, state)
        self.page.wait_for_selector("#floor")

    def answers(self, requests):
        """What the page's cost model says: the numbers of a call, and the text that came back."""
        return self.page.evaluate("""async requests => {
          const {explain} = await limitsDemo.load();
          return requests.map(({card, state, times, origin}) => explain(limitsDemo.cards[card], state, times, origin)); }""", requests)

    def test_as_the_library(self):
        random.seed(2)
        self.open()
        cards, slugs = self.page.evaluate("limitsDemo.cards"), self.page.evaluate("limitsDemo.load().then(model => model.slugs)")
        formats = self.page.evaluate("Object.keys(limitsDemo.kFormats)")
        self.assertGreaterEqual(len(cards), 6)
        requests, calls = [], []
        for i in range(240):
            card = cards[i % len(cards)]
            state = {"h": random.choice((1, 7, 8, 16, 20, 64, 128)), "q": random.choice((1, 1, 2, 4)), "b": random.choice((1, 3, 16, 128)),
                     "k": random.choice((0, 1, 63, 512, 4096, 20000)), "causal": random.choice(("no", "yes")), "dtype": random.choice(("bf16", "bf16", "fp16")),
                     "format": random.choice(formats)}
            times = {slug: [t, t * 0.9, t * 1.1, 100, t * 1.2] for slug in slugs if random.random() < 0.6 for t in [random.uniform(5, 900)]}
            requests.append({"card": i % len(cards), "state": state, "times": times, "origin": "recorded: a test"})
            calls.append({"names": "\n".join((card["name"], card["origin"], "recorded: a test")), "times": [times.get(slug, [None, None, None, 0, None]) for slug in slugs],
                          "numbers": [card[key] for key in ("capability", "multiprocessors", "read", "fp32", "matrix", "sustained", "shared", "shared_clock", "launch")] +
                          [state[key] for key in "hqbk"] + [int(state["causal"] == "yes"), int(state["dtype"] == "fp16"), formats.index(state["format"])]})
        got = self.answers(requests)
        expected = json.loads(subprocess.run([sys.argv[2]], input=json.dumps(calls), capture_output=True, text=True, check=True).stdout)
        self.assertGreater(sum("error" in one for one in got), 5)
        self.assertGreater(sum("error" not in one for one in got), 100)
        for one, other, call in zip(got, map(json.loads, expected), calls, strict=True):
            self.assertEqual(one, other, f"{call}: limits_wasm.js is out of date; bash {BUILD_WASM} makes it")

    def test_as_mla_run_says(self):
        self.open()
        for shape in ("h128_q1_b128_k8192", "h16_q1_b64_k4096_fp8_tile128", "h128_q2_b128_k4096_causal"):
            state = self.page.evaluate("shape => limitsDemo.stateOf(shape)", shape)
            self.assertEqual(self.page.evaluate("state => limitsDemo.shapeOf(state)", state), shape)
            [got] = self.answers([{"card": 0, "state": state, "times": {}, "origin": ""}])
            said = subprocess.run([sys.argv[3], "predict", "--stage", "all", "--machine", "model", "--json", "--shape", shape], capture_output=True, text=True, check=True).stdout
            said = [json.loads(line) for line in said.splitlines()]
            self.assertIn(self.page.evaluate("limitsDemo.cards[0].origin"), said[0]["ceilings"])
            able = {stage["slug"]: stage for stage in got["stages"] if not stage["why_not"]}
            self.assertEqual(sorted(able), sorted(one["stage"] for one in said))
            for one in said:
                for key in ("own_limit_s", *(["estimate_s"] if "estimate_s" in one else []), "fp32_s", "matrix_s", "shared_s", "dram_s", "busy_fraction", "workspace_bytes"):
                    self.assertAlmostEqual(able[one["stage"]][key], one[key], delta=1e-9 * abs(one[key]), msg=f"{shape}, {one['stage']}, {key}")
                self.assertAlmostEqual(got["floor"]["seconds"], one["floor_s"], delta=1e-9 * one["floor_s"])

    def test_what_the_page_says(self):
        for state, floor in (("", "The products bind"), ("h=16", "Reading binds"), ("h=128&b=1&k=512", "The launch binds"),
                             ("card=3", "Reading binds"), ("card=2", "The products bind"), ("h=0", "h_q, query heads: 1 to"),
                             ("dtype=fp16&format=fp8_tile128", "must be bf16")):
            self.open(state=state)
            self.assertIn(floor, self.text("#floor"), state)
        self.open(state="h=128&b=128&k=8192")
        rows = {row[0]: row[1:] for row in self.cells("#stages")}
        recorded = self.page.evaluate("limitsDemo.recordings[0].times.h128_q1_b128_k8192['08_seesaw'][0]")
        self.assertEqual(rows["08_seesaw"][3], f"{recorded:.1f}")
        self.assertAlmostEqual(float(rows["08_seesaw"][4]), recorded / float(rows["08_seesaw"][2]), delta=0.011)
        self.assertEqual(rows["12_fp8"], ["cannot read a cache of cache_format = 16bit, only fp8_tile128, fp8_tensor, int8_tile128"])
        self.open(state="card=2")
        self.assertIn("needs compute capability 9.0 exactly", {row[0]: row[1:] for row in self.cells("#stages")}["08_seesaw"][0])
        self.every_proposal_moves("limits", "#demo")

    def test_the_address_is_the_state(self):
        self.open()
        self.page.locator("#set-k").fill("5000")
        self.page.locator("#set-card").select_option("1")
        address, text = self.page.evaluate("location.href"), self.text("#demo")
        self.page.goto("about:blank")
        self.page.goto(address)
        self.page.wait_for_selector("#floor")
        self.assertEqual(self.text("#demo"), text)
        self.page.locator("#recorded").select_option("h16_q1_b64_k4096_fp8_tensor")
        self.assertEqual(self.page.locator("#set-format").input_value(), "fp8_tensor")
        self.assertIn("k=4096", self.page.evaluate("location.hash"))

    def test_build(self):
        version = shutil.which("em++") and subprocess.run(["em++", "--version"], capture_output=True, text=True, check=True).stdout
        if not version or " 3.1.6 " not in version:
            self.skipTest("Emscripten 3.1.6 is missing, Debian 12's")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["bash", BUILD_WASM, folder], check=True, capture_output=True)
            made = pathlib.Path(folder, "limits_wasm.js").read_text()
        self.assertEqual(made, (site_test.ROOT / "docs/demos/limits_wasm.js").read_text(), f"bash {BUILD_WASM} makes another file")


def values(accesses, plans=(), walks=()):
    requests = [{"bytes": access["bytes"], "addresses": access["addresses"]} for access in accesses]
    return json.loads(subprocess.run([sys.argv[1]], input=json.dumps({"requests": requests, "plans": plans, "walks": walks}), capture_output=True, text=True, check=True).stdout)


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
