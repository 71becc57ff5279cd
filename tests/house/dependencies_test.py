#!/usr/bin/env python3
"""Which folder may depend on which: reads every #include, Python import and sourced bash file.

Dependencies point one way, from bench and tests over the stages and what they share to the reference. The table RULE
states it; a folder may always use itself.
"""
import ast
import os
import pathlib
import re
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOP_LEVEL = ("bench", "docs", "reference", "stages", "tests")

MODEL = ["reference", "reference/gpu_model"]
COMMON = ["stages/common", "stages/common/cache", "stages/common/choose", "stages/common/machine", "stages/common/ptx", "stages/common/split"]
STAGES = ["stages", "stages/NN", *COMMON, "stages/common/parallel"]
REFERENCE = [*MODEL, "reference/layers", "reference/testing"]
BENCH = ["bench", "bench/explain", "bench/measure", "bench/parallel", "bench/report", "bench/service", "bench/tools"]

# A folder, and what it may use beside itself. A file belongs to the innermost of these folders that contains it. "stages/NN"
# is any one stage, or the template; none may use another.
RULE = {
    "reference": [],
    "reference/layers": ["reference"],
    "reference/gpu_model": ["reference"],
    "reference/testing": [*MODEL, "stages/common/machine", "stages/common/ptx"],  # its kernels run like a stage's
    "stages/common/machine": MODEL,
    "stages/common/ptx": [*MODEL, "stages/common/machine"],
    "stages/common/cache": [*MODEL, "stages/common/machine", "stages/common/ptx"],
    "stages/common/split": [*MODEL, "stages/common/cache", "stages/common/machine", "stages/common/ptx"],
    "stages/common/parallel": [*MODEL, "stages/common", "stages/common/cache", "stages/common/machine", "stages/common/split"],
    "stages/common": [*MODEL, *COMMON, "stages/common/parallel"],
    "stages/NN": [*MODEL, *COMMON],
    "stages/python": [*MODEL, "stages/common", "stages/common/cache", "stages/common/choose", "stages/common/split"],
    "stages": STAGES,  # commands and scripts
    "bench/measure": [*REFERENCE, *STAGES],
    "bench/explain": [*REFERENCE, *STAGES, "bench/measure"],
    "bench/parallel": [*REFERENCE, *STAGES, "bench/measure", "bench/service"],
    "bench/service": [*REFERENCE, *STAGES, "bench/measure"],
    "bench/report": [],  # Python only
    "bench/tools": [*REFERENCE, *STAGES, *BENCH],
    "bench": [*REFERENCE, *STAGES, *BENCH],
    "docs": [*REFERENCE, *STAGES, *BENCH],
    "tests": [*REFERENCE, *STAGES, *BENCH, "stages/python", "docs"],
}

INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]')
SOURCE = re.compile(r"(?:^|[;&|]\s*|\b(?:then|do|else)\s+)\s*(?:source|\.)\s+([^;&|]+)")
CPP_SUFFIXES = (".h", ".cuh", ".cpp", ".cu", ".in")


def folder_of(path):
    """The folder of RULE that a file belongs to, and the folder that counts as itself."""
    parts = pathlib.PurePosixPath(path).parent.parts
    if len(parts) > 1 and parts[0] == "stages" and re.fullmatch(r"\d\d_\w+|template", parts[1]):
        return "stages/NN", "/".join(parts[:2])
    names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    name = next(name for name in names if name in RULE)
    return name, name


def files_of(root):
    for top in TOP_LEVEL:
        for folder, folders, names in os.walk(root / top):
            folders[:] = [name for name in folders if not name.startswith(("__pycache__", "build"))]
            for name in names:
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def language_of(root, path):
    suffix = pathlib.PurePosixPath(path).suffix
    if suffix in CPP_SUFFIXES:
        return "C++"
    if suffix in (".py", ".sh"):
        return {".py": "Python", ".sh": "bash"}[suffix]
    if suffix:
        return None
    with open(root / path, "rb") as file:
        first = file.readline(80)
    if not first.startswith(b"#!"):
        return None
    return "Python" if b"python" in first else "bash" if b"sh" in first else None


def resolve(files, path, target):
    """The file that `path` means by `target`, relative to its own folder or to the root; None for a file outside."""
    folder = os.path.dirname(path)
    without_dots = re.sub(r"^(\.*/)+", "", target)
    for candidate in (os.path.normpath(folder + "/" + target), os.path.normpath(target), without_dots):
        if candidate in files:
            return candidate
    return None


def imports_of(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, (module + "." if module else "") + alias.name
        elif (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
              and node.args and isinstance(node.args[0], ast.Constant)):
            yield node.lineno, str(node.args[0].value)


def modules_named(files, path, module):
    """The project's files that a module name may mean: the one beside the importing file, otherwise any of that name."""
    name = module.replace(".", "/")
    if module.split(".")[0] in sys.stdlib_module_names:
        return []
    endings = (name + ".py", name + "/__init__.py")
    beside = [os.path.normpath(os.path.dirname(path) + "/" + ending) for ending in endings]
    found = [file for file in beside if file in files]
    # A module in a package is left out: its name would begin with the package's.
    return found or [file for file in files for ending in endings
                     if ("/" + file).endswith("/" + ending) and file[:-len(ending)] + "__init__.py" not in files]


def dependencies_of(root, files, path):
    """(line, file) for all that a file depends on in the project."""
    language = language_of(root, path)
    if language is None:
        return
    text = (root / path).read_text(encoding="utf-8")
    if language == "Python":
        for line, module in imports_of(text):
            for target in modules_named(files, path, module):
                yield line, target
        return
    for number, line in enumerate(text.splitlines(), 1):
        if language == "C++":
            names = INCLUDE.findall(line)
        else:
            line = re.sub(r"(^|\s)#.*", "", line)
            names = [re.sub(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|[\"']", "", name).strip().split(" ")[0]
                     for name in SOURCE.findall(line)]
            names = ["." + name if name.startswith("/") else name for name in names]
        for name in names:
            target = resolve(files, path, name)
            if target is not None:
                yield number, target


def violations(root):
    files = set(files_of(root))
    found = []
    for path in sorted(files):
        folder, itself = folder_of(path)
        for line, target in dependencies_of(root, files, path):
            target_folder, target_itself = folder_of(target)
            if target_itself != itself and target_folder not in RULE[folder]:
                found.append(f"{path}:{line}: {itself} may not use {target_itself}, here {target}")
    return sorted(set(found))


class Dependencies(unittest.TestCase):
    def test_the_project_keeps_the_rule(self):
        found = violations(ROOT)
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def test_the_rule_names_folders_that_exist(self):
        for name in RULE:
            self.assertTrue(name == "stages/NN" or (ROOT / name).is_dir(), name)

    def test_the_scripts_and_sources_of_the_project_are_read(self):
        # If they were not read, the test above would pass whatever they say.
        files = set(files_of(ROOT))

        def read(path):
            return {target for _, target in dependencies_of(ROOT, files, path)}
        self.assertIn("reference/status.h", read("reference/problem.h"))
        self.assertIn("stages/common/machine/device.h", read("stages/01_naive/kernel.cuh"))
        self.assertIn("bench/report/report.py", read("tests/bench/report/report_test.py"))
        self.assertIn("stages/cmake/setup.sh", read("tests/run.sh"))


class PlantedViolations(unittest.TestCase):
    """The checks above on small trees of their own, each with one thing that the rule allows or forbids."""

    FILES = ("bench/explain/e.h", "bench/measure/m.h", "bench/report/r.py", "bench/tools/t.h", "docs/d.h",
             "reference/core.h", "reference/gpu_model/g.h", "reference/layers/l.h", "reference/testing/o.h",
             "stages/01_one/kernel.cuh", "stages/02_two/kernel.cuh", "stages/cmake/setup.sh",
             "stages/common/stage.h", "stages/common/cache/c.h", "stages/common/machine/m.h",
             "stages/common/ptx/p.h", "stages/common/split/s.h", "stages/mutants/mutants.py", "stages/python/p.h",
             "stages/python/package/__init__.py", "stages/python/package/inner.py", "stages/template/k.cuh",
             "tests/helper.h", "tests/helper.py", "tests/helper.sh")

    def found(self, path, text):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name in self.FILES:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text("")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
            return violations(root)

    def forbids(self, path, text, line=1):
        found = self.found(path, text)
        self.assertEqual(len(found), 1, f"{path}: {text}: {found}")
        self.assertTrue(found[0].startswith(f"{path}:{line}: "), found[0])

    def allows(self, path, text):
        self.assertEqual(self.found(path, text), [])

    def test_includes(self):

        def include(target):
            return f'#include "{target}"\n'
        for path, target in (
                ("reference/x.h", "reference/gpu_model/g.h"), ("reference/x.h", "reference/testing/o.h"),
                ("reference/x.h", "stages/common/stage.h"), ("reference/layers/x.cpp", "reference/gpu_model/g.h"),
                ("reference/gpu_model/x.h", "reference/layers/l.h"),
                ("reference/gpu_model/x.h", "stages/common/machine/m.h"),
                ("reference/testing/x.cu", "stages/common/stage.h"), ("reference/testing/x.cu", "reference/layers/l.h"),
                ("stages/common/machine/x.h", "stages/common/ptx/p.h"),
                ("stages/common/cache/x.h", "stages/common/split/s.h"),
                ("stages/common/ptx/x.h", "stages/common/cache/c.h"),
                ("stages/common/x.h", "reference/testing/o.h"), ("stages/common/x.h", "stages/01_one/kernel.cuh"),
                ("stages/01_one/stage.cu", "stages/02_two/kernel.cuh"),
                ("stages/01_one/stage.cu", "stages/template/k.cuh"),
                ("stages/01_one/stage.cu", "../02_two/kernel.cuh"), ("stages/01_one/stage.cu", "bench/measure/m.h"),
                ("stages/01_one/stage.cu", "reference/testing/o.h"),
                ("stages/python/x.cpp", "stages/common/ptx/p.h"), ("stages/python/x.cpp", "stages/01_one/kernel.cuh"),
                ("stages/common/x.h", "stages/python/p.h"),
                ("bench/measure/x.h", "bench/tools/t.h"), ("bench/explain/x.h", "bench/tools/t.h"),
                ("bench/service/x.h", "bench/explain/e.h"), ("bench/report/x.cpp", "bench/measure/m.h"),
                ("bench/tools/x.cpp", "tests/helper.h"), ("docs/x.cpp", "tests/helper.h"),
                ("reference/testing/x.h", "tests/helper.h"), ("stages/common/x.cpp.in", "tests/helper.h")):
            self.forbids(path, include(target))
        for path, target in (
                ("reference/x.h", "reference/core.h"), ("reference/testing/x.cu", "stages/common/ptx/p.h"),
                ("stages/common/split/x.h", "stages/common/machine/m.h"), ("stages/common/x.h", "stages/common/split/s.h"),
                ("stages/01_one/stage.cu", "stages/01_one/kernel.cuh"), ("stages/01_one/stage.cu", "kernel.cuh"),
                ("stages/01_one/stage.cu", "stages/common/stage.h"), ("bench/measure/x.h", "reference/testing/o.h"),
                ("bench/service/x.h", "bench/measure/m.h"), ("bench/tools/x.cpp", "bench/explain/e.h"),
                ("tests/x.cpp", "stages/01_one/kernel.cuh"), ("tests/x.cpp", "tests/helper.h"),
                ("reference/x.h", "vector"), ("reference/x.h", "generated.inc")):
            self.allows(path, include(target))
        self.forbids("reference/x.h", "#pragma once\n\n#  include <tests/helper.h>\n", line=3)

    def test_imports(self):
        for text in ("import helper\n", "from helper import x\n", "import tests.helper\n", "from tests import helper\n",
                     "import importlib\nimportlib.import_module('helper')\n"):
            self.forbids("bench/report/x.py", text, line=text.count("\n"))
        self.forbids("bench/report/x.py", "import mutants\n")
        self.forbids("stages/find", "#!/usr/bin/env python3\nimport sys\nimport r\n", line=3)
        self.allows("bench/report/x.py", "import json\nimport numpy\nimport r\n")
        self.allows("tests/x.py", "import r\nimport helper\n")
        self.forbids("bench/report/x.py", "import package\n")
        self.forbids("bench/report/x.py", "from package.inner import x\n")
        self.allows("bench/report/x.py", "import inner\n")  # another one: this one is package.inner

    def test_sourced_files(self):
        for text in ("source tests/helper.sh\n", '. "$root/tests/helper.sh"\n',
                     'source "$(dirname "$0")/../tests/helper.sh"\n', "cd /x && . ${root}/tests/helper.sh\n"):
            self.forbids("bench/run.sh", text)
        self.forbids("stages/find", "#!/bin/bash\n# . a comment\nif true; then . tests/helper.sh; fi\n", line=3)
        self.allows("bench/run.sh", '. "$root/stages/cmake/setup.sh"\n')
        self.allows("tests/run.sh", '. "$root/stages/cmake/setup.sh"\n# source nothing\n')


if __name__ == "__main__":
    unittest.main()
