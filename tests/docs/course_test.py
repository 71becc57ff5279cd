#!/usr/bin/env python3
"""The course, docs/course: a session has all its parts, answers quote what is there, numbers are worked out, and pages have
all that they promise."""
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "docs" / "course"
SESSIONS = sorted(COURSE.glob("session_*.md"))
LADDER = [f"{number:02}" for number in range(9)]  # the rungs that the course takes in turn


def flat(text):
    """The text on one line, without comment signs at the beginnings of lines, marks of recorded figures, and backticks (which
    code spans cannot hold)."""
    text = re.sub(r"<!--(v .*?|/v)-->", "", text)
    text = re.sub(r"\n\s*(///?|#)?\s*", " ", text)
    return re.sub(r"\s+", " ", text.replace("`", "")).strip()


def answers(page):
    """[(number, question, answer)] of a page's quiz."""
    quiz = page.read_text(encoding="utf-8").partition("\n## Quiz\n")[2]
    form = r"\*\*(\d+)\.\*\* (.+?)\n\n<details>\n<summary>Answer</summary>\n\n(.+?)\n\n</details>"
    return [(int(number), question, answer) for number, question, answer in re.findall(form, quiz, re.S)]


def quotes(answer):
    """[(path, quoted)] after "Look:"."""
    return re.findall(r"\]\(([^)#]+)\), `([^`]+)`", answer.partition("Look: ")[2])


def is_quoted(page, path, quoted):
    file = (page.parent / path).resolve()
    return file.is_file() and flat(quoted) in flat(file.read_text(encoding="utf-8"))


def exercises(stage):
    return json.loads(next(ROOT.glob(f"stages/{stage}_*/exercises/exercises.json")).read_text(encoding="utf-8"))


class Sessions(unittest.TestCase):
    def test_there_are_eight(self):
        self.assertEqual([page.name for page in SESSIONS], [f"session_{n}.md" for n in range(1, 9)])

    def test_each_has_its_parts_in_order(self):
        for page in SESSIONS:
            headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.M)
            self.assertEqual([one for one in headings if one != "Labs"], ["Goals", "Before", "Read", "To show in class", "Homework", "Quiz"], page.name)

    def test_each_shows_a_page_that_moves(self):
        for page in SESSIONS:
            shown = page.read_text(encoding="utf-8").partition("## To show in class\n")[2].partition("\n## ")[0]
            self.assertIn("](../demos/", shown, page.name)

    def test_hours_add_up(self):
        """Those of the sessions are those of the table, and their sums are in it."""
        table = (COURSE / "README.md").read_text(encoding="utf-8")
        rows = [[float(cell.strip().removesuffix(" h") or 0) for cell in row.split("|")] for row in
                re.findall(r"^\| (?:\[\d\]\(\w+\.md\)|all) \|.*?\| ([\d.]+ h \|.*) \|$", table, re.M)]
        times = []
        for page in SESSIONS:
            said = dict((what, float(hours)) for what, hours in re.findall(r"(reading|homework|labs) ([\d.]+) h", page.read_text(encoding="utf-8")))
            times.append([said[what] if what != "labs" else said.get(what, 0) for what in ("reading", "homework", "labs")])
        self.assertEqual(rows, [*times, [sum(column) for column in zip(*times)]])
        self.assertIn(f"{sum(map(sum, times)):.0f} in all", table)

    def test_each_has_ten_questions_with_folded_answers(self):
        for page in SESSIONS:
            self.assertEqual([number for number, _, _ in answers(page)], list(range(1, 11)), page.name)
            self.assertEqual(page.read_text(encoding="utf-8").count("<details>"), 10, page.name)

    def test_every_answer_quotes_what_is_there(self):
        for page in SESSIONS:
            for number, _, answer in answers(page):
                found = quotes(answer)
                self.assertTrue(found, f"{page.name}, {number}: says not where to look")
                self.assertEqual(answer.partition("Look: ")[2].count("]("), len(found), f"{page.name}, {number}")
                for path, quoted in found:
                    self.assertTrue(is_quoted(page, path, quoted), f"{page.name}, {number}: {path} has no '{quoted}'")

    def test_a_wrong_quote_would_be_seen(self):
        self.assertTrue(is_quoted(SESSIONS[0], "../mla.md", "with 16 heads 30"))
        self.assertFalse(is_quoted(SESSIONS[0], "../mla.md", "with 16 heads 31"))
        self.assertFalse(is_quoted(SESSIONS[0], "../nothing.md", "with 16 heads 30"))

    def test_homework_is_the_exercises_of_the_stages(self):
        given = [(stage, int(number), bool(dots)) for page in SESSIONS for stage, number, dots in
                 re.findall(r"stages/exercise check (\d\d) (\d+)( \.\.\.)?`", page.read_text(encoding="utf-8"))]
        self.assertEqual(len({(stage, number) for stage, number, _ in given}), len(given), "given twice")
        for stage, number, dots in given:
            entries = exercises(stage)
            self.assertLessEqual(number, len(entries), f"{stage} {number}")
            self.assertEqual(dots, entries[number - 1]["kind"] == "number", f"{stage} {number}: a number takes an answer, nothing else does")
        for stage in LADDER:
            self.assertEqual({number for one, number, _ in given if one == stage}, set(range(1, len(exercises(stage)) + 1)), f"stage {stage}")


class Labs(unittest.TestCase):
    def test_each_is_its_solution_without_the_marked_part(self):
        result = subprocess.run([sys.executable, COURSE / "labs" / "skeletons.py", "--check"], capture_output=True, text=True, check=False)
        self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_what_a_skeleton_is(self):
        sys.path.insert(0, str(COURSE / "labs"))
        import skeletons
        solution = "a\n  // Fill in: b.\n  c;\n\n  d;\n  // Until here.\ne\n// Fill in: f.\ng;\n// Until here.\n"
        self.assertEqual(skeletons.skeleton_of(solution), "a\n  // Fill in: b.\n  // Until here.\ne\n// Fill in: f.\n// Until here.\n")
        for wrong in ("a\n", solution.replace("g;\n", ""), solution.replace("// Until here.\n", "", 1), solution + "// Until here.\n"):
            self.assertRaises(ValueError, skeletons.skeleton_of, wrong)

    def test_each_has_a_page_with_three_hints_and_a_session(self):
        labs = sorted(path.stem for path in COURSE.glob("labs/solutions/*.cuh"))
        self.assertEqual(len(labs), 8)
        index = (COURSE / "labs" / "README.md").read_text(encoding="utf-8")
        sessions = "".join(page.read_text(encoding="utf-8") for page in SESSIONS)
        for lab in labs:
            page = (COURSE / "labs" / f"{lab}.md").read_text(encoding="utf-8")
            self.assertEqual(re.findall(r"<summary>(.*?)</summary>", page), ["Hint 1", "Hint 2", "Hint 3", "Answer"], lab)
            self.assertIn(f"]({lab}.md)", index)
            self.assertIn(f"](labs/{lab}.md)", sessions)

    def test_the_command_of_a_page_asks_for_its_lab_alone(self):
        labs = sorted(path.stem for path in COURSE.glob("labs/solutions/*.cuh"))
        for lab in labs:
            page = (COURSE / "labs" / f"{lab}.md").read_text(encoding="utf-8")
            asked = re.search(r"labs_test .*--gtest_filter='(.+?)'", page)[1]
            self.assertEqual([one for one in labs if fnmatch.fnmatchcase(f"Labs/Lab.DISABLED_IsRight/{one}", asked)], [lab])


class Pages(unittest.TestCase):
    def by_hand(self, *arguments):
        return subprocess.run([sys.executable, COURSE / "by_hand.py", *arguments], capture_output=True, text=True, check=False)

    def test_numbers_by_hand(self):
        result = self.by_hand("--check")
        self.assertEqual((result.returncode, result.stdout + result.stderr), (0, ""))

    def test_a_wrong_number_would_be_seen(self):
        text = (COURSE / "by_hand.md").read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.md"
            for right, wrong in (("23/16", "23/15"), ("ln 46", "ln 47"), ("2049 · 2^-19", "2049 · 2^-18")):
                self.assertIn(right, text)
                page.write_text(text.replace(right, wrong, 1), encoding="utf-8")
                self.assertEqual(self.by_hand("--check", "--page", page).returncode, 1, wrong)

    def test_the_table_of_cuda_is_enough_for_the_first_four_kernels(self):
        table = (COURSE / "multiprocessor.md").read_text(encoding="utf-8").partition("## CUDA in one table")[2]
        for stage in LADDER[1:5]:
            kernel = re.sub(r"//.*", "", next(ROOT.glob(f"stages/{stage}_*/kernel.cuh")).read_text(encoding="utf-8"))
            used = set(re.findall(r"\b__\w+|\b(?:thread|block)(?:Idx|Dim)\b|\bgridDim\b|#pragma unroll(?: 1)?|\bMLA_\w+|shared_memory"
                                  r"|\b(?:make_)?u?(?:int|float)[234]\b", kernel))
            self.assertIn("__syncthreads", used)
            self.assertEqual([one for one in sorted(used) if one not in table], [], stage)

    def test_the_questions_have_answers_and_places(self):
        page = (COURSE / "questions.md").read_text(encoding="utf-8")
        found = re.findall(r"^### (\d+)\. (.+)\n\n((?:.+\n)+)", page, re.M)
        self.assertEqual([int(number) for number, _, _ in found], list(range(1, 26)))
        for number, question, answer in found:
            self.assertIn("?", question, number)
            short, _, places = " ".join(answer.split()).partition("In full: ")
            self.assertGreater(len(short.split()), 5, number)
            self.assertRegex(places, r"\]\([^)#]+#[\w-]+\)", number)  # links_test follows it

    def test_the_glossary_says_each_term_once(self):
        page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
        terms = [term for row in re.findall(r"^\| (?!term \|)([^|]+) \|", page, re.M) for term in re.split(r", (?![^`]*`,)", row)]
        self.assertGreater(len(terms), 100)
        self.assertEqual(sorted({term for term in terms if terms.count(term) > 1}), [])

    def test_the_bibliography_has_every_instruction(self):
        lines = [re.sub(r"//.*", "", line) for name in ("ptx.h", "ptx_sm90.h") for line in
                 (ROOT / "stages" / "common" / "ptx" / name).read_text(encoding="utf-8").splitlines() if "#include" not in line]
        page = (COURSE / "bibliography.md").read_text(encoding="utf-8").partition("## Instructions")[2].partition("\n## ")[0]
        listed = set(re.findall(r"`([a-z][\w.]*)`", page)) - {"expect_tx"}
        # An instruction begins a string of assembly, or a line of one, or follows a brace; k16 is a type's name in a macro.
        strings = "\n".join(text.replace("\\n", "\n") for line in lines for text in re.findall(r'"([^"]*)"', line))
        found = {one for one in re.findall(r"^[{ ]*(?:@!?\w+ )?([a-z]\w*(?:\.\w+)+)", strings, re.M) if not one.startswith("k16")}
        self.assertGreater(len(found), 40)
        plain = {"mov.u32", "selp.b32", "setp.ne.b32"}
        # Behind a listed name come only qualifiers: cp.async.bulk.commit_group is no cp.async.bulk.
        qualifier = r"aligned|acquire|relaxed|release|weak|c[gt]a|cluster|gpu|global|shared|tile|x\d|trans|row|col|parity|or|pred|add|ftz|satfinite" \
                    r"|arrive|wait|read|sync|expect_tx|L2|m\d+n\w*|[fbu]\d+|f16x2|bf16(?:x2)?|e4m3x2|[45]d"
        def covers(name, one):
            return one == name or one.startswith(name + ".") and re.fullmatch(rf"(\.({qualifier}))*", one[len(name):]) is not None
        self.assertFalse(covers("cp.async.bulk", "cp.async.bulk.commit_group"))
        missing = [one for one in sorted(found - plain) if not any(covers(name, one) for name in listed)]
        self.assertEqual(missing, [])
        unused = [name for name in sorted(listed) if "." in name and not any(covers(name, one) for one in found)]
        self.assertEqual(unused, [])


if __name__ == "__main__":
    unittest.main()
