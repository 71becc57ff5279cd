#!/usr/bin/env python3
"""Makes kernels with one fault each from the kernels as they are and the list in mutants.txt.

    stages/mutants/mutants.py FOLDER    writes FOLDER/NN_name/ for each stage of the list, FOLDER/host/ with the list's
                                        host code, and FOLDER/mutants.inc with the table of the stages' mutants

All faults of a stage go into one source, each behind a test of mla::mutant, so that a stage is compiled once:

    ptx::wgmma_commit_group();   becomes   { if (::mla::mutant == 7) { } else { ptx::wgmma_commit_group(); } }

No line moves, so the model's messages name the lines of the kernel itself. A text that no longer matches does not stop
the build: the test fails, and says which.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LIST = pathlib.Path(__file__).resolve().parent / "mutants.txt"


class Mutant:
    def __init__(self, line, stage, name, expected):
        self.line, self.stage, self.name, self.expected = line, stage, name, expected
        self.tests = expected.removeprefix("tests: ") if expected.startswith("tests: ") else None  # of host code
        self.which, self.find, self.replacement = (1, 1), [], []

    def span(self, source):
        """The begin and end of its text. ValueError if the text does not occur as often as the list says."""
        text = " ".join(self.find)
        before, part, after = re.fullmatch(r"(.*?)\{\{(.*)\}\}(.*)", text).groups() if "{{" in text else ("", text, "")
        pattern = r"\s*".join(filter(None, (to_pattern(before), f"(?P<part>{to_pattern(part)})", to_pattern(after))))
        matches = list(re.finditer(pattern, without_comments(source)))
        index, count = self.which
        if len(matches) != count:
            where = f"mutants.txt:{self.line}" if self.line else "the exercise"
            raise ValueError(f"{where}: '{text}' occurs {len(matches)} times in "
                             f"{source_of(self.stage).relative_to(ROOT)}, {count} expected: fit it to the source")
        return matches[index - 1].span("part")


def to_pattern(text):
    """A pattern that matches the same tokens, however they are broken into lines."""
    pattern = ""
    for token in re.findall(r"\w+|[^\w\s]", text):
        if pattern:
            pattern += r"\s+" if pattern[-1].isalnum() and token[0].isalnum() else r"\s*"
        pattern += r"\b" * token[0].isalnum() + re.escape(token) + r"\b" * token[-1].isalnum()
    return pattern


def without_comments(source):
    return re.sub(r"//[^\n]*", lambda match: " " * len(match.group()), source)


def read_list():
    mutants = []
    for number, line in enumerate(LIST.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if head := re.fullmatch(r"(\d\d|step_\d\d_\d|[\w/]+\.(?:cpp|cu)) (.*?) => ((?:model: |conformance|any|race|not modelled: |tests: ).*)",
                                line):
            mutants.append(Mutant(number, *head.groups()))
        elif part := re.fullmatch(r"-(?:(\d+)/(\d+))? (.*)", line):
            if part[1]:
                mutants[-1].which = (int(part[1]), int(part[2]))
            mutants[-1].find.append(part[3])
        elif line.startswith("+ "):
            mutants[-1].replacement.append(line[2:])
        else:
            raise SystemExit(f"{LIST}:{number}: neither '<stage> <what is wrong> => <who>' nor '- text' nor '+ text'")
    return mutants


def stage_folder(stage):
    """The folder of a stage, such as 08, or of a step, such as step_08_1."""
    if step := re.fullmatch(r"step_(\d\d)_(\d)", stage):
        return next(ROOT.glob(f"stages/{step[1]}_*/steps/{step[2]}_*"))
    return next(ROOT.glob(f"stages/{stage}_*"))


def slug_of(stage):
    name = stage_folder(stage).name
    return stage[:len("step_08_")] + name if stage.startswith("step_") else name


def source_of(stage):
    """The kernel of a stage, or the host code that an entry names by its path."""
    return ROOT / stage if "/" in stage else stage_folder(stage) / "kernel.cuh"


def with_all(source, spans):
    """The source with every mutant. spans: {(begin, end): [(id, replacement)]}; one span may lie in another."""
    def rewrite(begin, end, inside):
        result, at = "", begin
        while inside:
            (first, last), here = inside[0]
            inner = [entry for entry in inside[1:] if entry[0][0] < last]
            inside = inside[1 + len(inner):]
            text = rewrite(first, last, inner)
            if source[last - 1] in ";}":
                tests = "".join(f"if (::mla::mutant == {id}) {{ {new} }} else " for id, new in here)
                text = f"{{ {tests}{{ {text} }} }}"
            else:
                tests = "".join(f"::mla::mutant == {id} ? ({new}) : " for id, new in here)
                text = f"({tests}({text}))"
            result += source[at:first] + text
            at = last
        return result + source[at:end]

    return rewrite(0, len(source), sorted(spans.items(), key=lambda entry: (entry[0][0], -entry[0][1])))


def broken_kernel(stage, name):
    """The kernel's source with this fault of the list, for an exercise: no line shows that something is gone."""
    mutant = next((mutant for mutant in read_list() if (mutant.stage, mutant.name) == (stage, name)), None)
    if mutant is None:
        raise ValueError(f"mutants.txt has no '{name}' of stage {stage}")
    return broken((stage_folder(stage) / "kernel.cuh").read_text(), mutant)


def own(stage, find, put):
    """A fault that is not in the list."""
    mutant = Mutant(0, stage, "", "")
    mutant.find, mutant.replacement = [find], put.splitlines()
    return mutant


def broken(source, mutant):
    begin, end = mutant.span(source)
    line = source.rfind("\n", 0, begin) + 1
    replacement = ("\n" + re.match(" *", source[line:]).group()).join(mutant.replacement)
    if not replacement:  # removes its comment, too, and the line if nothing else is on it
        end = re.compile(r"[ \t]*(//[^\n]*)?").match(source, end).end()
        if not source[line:begin].strip():
            begin, end = line, end + 1
    return source[:begin] + replacement + source[end:]


def quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main(folder):
    mutants = read_list()
    spans, table = {}, ""
    for id, mutant in enumerate(mutants, 1):
        source = source_of(mutant.stage).read_text()
        error, line = "", 0
        try:
            begin, end = mutant.span(source)
            here = spans.setdefault(mutant.stage, {})
            across = next((s for s in here if begin < s[0] < end < s[1] or s[0] < begin < s[1] < end), None)
            if across:
                raise ValueError(f"mutants.txt:{mutant.line}: begins or ends in the middle of another's text")
            line = source.count("\n", 0, begin) + 1
            here.setdefault((begin, end), []).append((id, " ".join(mutant.replacement)))
        except ValueError as problem:
            error = str(problem)
        if mutant.tests:
            continue
        strings = (slug_of(mutant.stage), mutant.name, mutant.expected, error)
        table += f"{{{id}, {line}, {', '.join(map(quoted, strings))}}},\n"
    for stage in sorted({mutant.stage for mutant in mutants if mutant.tests}):
        source = with_all(source_of(stage).read_text(), spans.get(stage, {}))
        write(folder / "host" / stage, "namespace mla { extern int mutant; }\n" + source)
    for stage in sorted({mutant.stage for mutant in mutants if not mutant.tests}):
        original = stage_folder(stage)
        source = with_all((original / "kernel.cuh").read_text(), spans.get(stage, {}))
        # Added to the first line, which is a comment, so that no line moves.
        made = folder / original.relative_to(ROOT / "stages")
        write(made / "kernel.cuh", "namespace mla { extern int mutant; }  " + source)
        write(made / "stage.cu", (original / "stage.cu").read_text())
        if stage.startswith("step_"):
            write(made.parent / "step.h", (original.parent / "step.h").read_text())
    write(folder / "mutants.inc", table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    main(pathlib.Path(sys.argv[1]))
