"""Figures in running text that come from a recording, written in place by bench/report/report.py --update.

A figure is between two comments, which GitHub does not show and docs/site_links.py takes away:

  <!--v 08 h64_q1_b64_k4096 cold : 3-->86.4<!--/v--> µs

The first one says what the figure is, and after " : " how it is written. An expression is made of numbers, + - x / ( )
with spaces around them, and references of up to three words; a word that is left out is that of the reference before:

  STAGE SHAPE MODE[.COUNTER]          08 h64_q1_b64_k4096 cold / 07       08 h64_q1_b64_k4096 sustained.sm_mhz / 1000
                                      "FlashInfer (Hopper)" h64_q1_b64_k4096 sustained
                                      cache append_b128_t1 returned       (of the newest recording with that suite)
                                      step_05_2 h64_q1_b64_k4096 cold     (in the page of steps, of the steps' recording)
                                      reference h64_q1_b64_k4096 wall     (the truth, on the CPU; in µs, too)
                                      08 max:compute cold.TFLOPs          (the largest of a suite, or of `all`)
  context KEY                         context ceiling_read_gbps
  texts|cross SHAPE MODE[.COUNTER]    texts h128_q1_b64_k4096 cold.TFLOPs  (of the chooser, in the newest recording of that suite)
  service|requests SCENARIO WAY FIGURE  service chat_100 paged step_ms_mean  (requests: of the runs with latencies of requests)
  formats SCENARIO FORMAT FIGURE      formats small_device_full fp8_tensor tokens_per_s     (of the paged way)
  layer FORM SETTING cold|cpu[_PART][.COUNTER]  layer absorbed decode_h8_d64_n2048_b4 cold_core      (of mla_traditional)
  python SHAPE|import CALL            python h16_q1_b4_k256 "decode, planned"     python import "import mla_stages"
  errors FORMAT CASE out|lse          errors fp8_tile128 k8192_dev1 out            (of the study of cache formats; a case
                                      errors int8_tile128 k8192_dev4_outliers4 out  is named by what is not 0 or 1)
  @FILE and one of the above          @variants/h200_01_uncoalesced 01 h64_q1_b64_k4096 cold

MODE is that of an entry's name, and its time is in µs. COUNTER is any that the entry has, or floor_us, own_limit_us,
over_fastest (its time over that of the shape's fastest stage). A format is a number of significant digits (3, the
default), .N for N decimals or e for 1.7e-03, before it a comma for thousands, behind it a unit: % and × are written as
they are, of ms, s, kB, MB and GB the value (µs, bytes) is scaled.
"""
import functools
import operator
import re
import shlex

import program
from recordings import (CHOOSER, Error, MEASURED_PEERS, error_of, floor_us, load, load_cache, load_cross, load_errors, load_peers,
                        load_python, load_service, load_steps, load_texts, load_traditional, significant, why_not)

MARKER = re.compile(r"(<!--v (?P<what>.*?)-->)(?P<text>.*?)(<!--/v-->)")
BEGINS_LINE = re.compile(r"\s*(?:(?:[-*+>]|\d+\.)\s+)*<!--v ")
UNITS = {"%": (100, "%"), "×": (1, "×"), "ms": (1e-3, " ms"), "s": (1e-6, " s"), "kB": (1e-3, " kB"),
         "MB": (1e-6, " MB"), "GB": (1e-9, " GB")}
OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
DERIVED = {
    "floor_us": lambda entry, fastest: floor_us(entry),
    "own_limit_us": lambda entry, fastest: entry["own_limit_share"] * entry["real_time"],
    "over_fastest": lambda entry, fastest: entry["real_time"] / fastest["real_time"],
}


def written(value, how):
    match = re.fullmatch(r"(,?)(?:(\.?)(\d+)|(e))\s*(.*)", how)
    if not match:
        raise Error(f"'{how}' is no format")
    comma, point, digits, exponent, unit = match.groups()
    scale, unit = UNITS.get(unit, (1, unit and f" {unit}"))
    value *= scale
    if exponent:
        return f"{value:.1e}{unit}"
    if not point:  # rounded first, so that 9.996 is 10.0 and 31177 is 31200
        value = float(f"{value:.{digits}g}")
        digits = len(significant(value, int(digits)).partition(".")[2])
    return f"{round(value, int(digits)) + 0:{comma}.{digits}f}{unit}"  # + 0: no -0


class Figures:
    """The values of expressions, by the recorded results."""

    def __init__(self, root, results):
        self.root, self.results, self.peers = root, results, load_peers(root, results)
        self.errors = functools.cache(lambda: load_errors(root))
        self.load = functools.cache(lambda name: load(root / "bench" / "results" / f"{name}.json"))
        self.cache = functools.cache(lambda: load_cache(root, results) or results)
        self.services = functools.cache(lambda **how: load_service(root, results, **how))
        self.layers = functools.cache(lambda: load_traditional(root, results))
        self.python = functools.cache(lambda: load_python(root, results))
        self.suites = {"texts": functools.cache(lambda: load_texts(root, results)),
                       "cross": functools.cache(lambda: load_cross(root, results))}
        self.others = {"service": self.service, "requests": lambda *words: self.service(*words, kind="requests"),
                       "formats": self.of_format, "errors": self.study, "layer": self.layer, "python": self.call}

    def text(self, what):
        """What should be in a marker."""
        expression, _, how = what.rpartition(" : ") if " : " in what else (what, "", "3")
        tokens = shlex.split(expression)
        self.words = {}
        value = self.total(tokens)
        if tokens:
            raise Error(f"'{tokens[0]}' is not expected")
        return written(value, how.strip())

    def total(self, tokens, signs="+-"):
        """A sum of products; takes what it has read from the tokens."""
        def operand():
            return self.total(tokens, "x/") if signs == "+-" else self.operand(tokens)
        value = operand()
        while tokens and tokens[0] in signs:
            value = OPERATORS[tokens.pop(0)](value, operand())
        return value

    def operand(self, tokens):
        if tokens and tokens[0] == "(":
            tokens.pop(0)
            value = self.total(tokens)
            if not tokens or tokens.pop(0) != ")":
                raise Error("a ')' is missing")
            return value
        words = []
        while tokens and tokens[0] not in (*OPERATORS, ")"):
            words.append(tokens.pop(0))
        if not words:
            raise Error("a value is missing")
        if len(words) == 1 and re.fullmatch(r"(0|[1-9]\d*)(\.\d+)?", words[0]):
            return float(words[0])
        return self.reference(words)

    def reference(self, words):
        results = self.results
        if words[0].startswith("@"):
            results = self.load(words.pop(0)[1:])
        elif words[0] == "cache":
            results = self.cache()
        if words[0] == "context":
            if len(words) != 2 or words[1] not in results.context:
                raise Error(f"the context has no '{' '.join(words[1:])}'")
            return float(results.context[words[1]])
        if words[0] in self.others:
            return self.others[words[0]](*words[1:])
        if words[0] in self.suites:
            return self.chosen(*words)
        stage, shape, column = self.complete(results, words)
        if shape[:4] in ("min:", "max:"):
            shapes = results.shapes if shape[4:] == "all" else results.suite(shape[4:])
            if shapes is None:
                raise Error(f"no suite '{shape[4:]}'")
            values = [self.of_entry(results, stage, one, column) for one in shapes if results.measured(stage, one)]
            return (min if shape[:3] == "min" else max)(values)
        times = self.peers.shapes.get(shape, {}).get(stage)
        if times and column in ("cold", "sustained") and times[column == "sustained"]:
            return times[column == "sustained"]
        return self.of_entry(results, stage, shape, column)

    def complete(self, results, words):
        """Stage, shape and column of a reference, what it leaves out from the one before."""
        names = {name for rows in self.peers.shapes.values() for name in rows} | {"cache", "reference", *MEASURED_PEERS}
        found = dict(self.words)
        for word in words:
            stages = [stage for stage in [*results.stages, *results.steps]
                      if re.fullmatch(r"(step_\d\d_)?\d{1,2}(_\w*)?", word) and stage.startswith(word)]
            if word in names or stages:
                found["stage"] = (stages or [word])[0]
            elif re.match(r"h\d+(x\d+)?_q|min:|max:", word) or ("cache", word) in {key[:2] for key in results.entries}:
                found["shape"] = word
            elif re.fullmatch(r"\d\d(_\w*)?", word):
                raise Error(f"no stage '{word}'")
            else:
                found["column"] = word
        self.words = found
        for part in ("stage", "shape", "column"):
            if part not in found:
                raise Error(f"no {part} in '{' '.join(words)}'")
        return found["stage"], found["shape"], found["column"]

    @staticmethod
    def of_entry(results, stage, shape, column):
        mode, _, counter = column.partition(".")
        entry = results.measured(stage, shape, mode)
        if not entry:
            if shape not in {key[1] for key in results.entries}:
                raise Error(f"no shape '{shape}'")
            raise Error(f"no column '{column}' of {stage}, {shape}")
        if counter in DERIVED:
            return DERIVED[counter](entry, results.fastest(shape)[1])
        if (counter or "real_time") not in entry:
            raise Error(f"no column '{column}' of {stage}, {shape}")
        return entry[counter or "real_time"]

    def study(self, *words):
        errors = self.errors()
        format, case, what = words if len(words) == 3 else (None, None, None)
        found = errors.cases.get(case) if errors else None
        if not found or format not in found["formats"] or what not in ("out", "lse"):
            raise Error(f"no figure '{' '.join(words)}' of the study of cache formats")
        return error_of(found, format, what)

    def chosen(self, suite, *words):
        results = self.suites[suite]()
        if results is None or len(words) != 2:
            raise Error(f"no figure '{' '.join(words)}' of suite {suite}")
        return self.of_entry(results, CHOOSER, *words)

    def service(self, *words, kind="service"):
        service = self.services(kind=kind)
        for run in (service or {}).get("runs", []):
            if (run["scenario"], run["way"]) == words[:2] and len(words) == 3 and \
                    run["figures"].get(words[2]) is not None:
                return run["figures"][words[2]]
        raise Error(f"no figure '{' '.join(words)}' of the service")

    def of_format(self, *words):
        for run in (self.services(formats=True) or {}).get("runs", []):
            if (run["scenario"], run["cache_format"], run["way"]) == (*words[:2], "paged") and len(words) == 3 and \
                    run["figures"].get(words[2]) is not None:
                return run["figures"][words[2]]
        raise Error(f"no figure '{' '.join(words)}' of a service by formats")

    def layer(self, *words):
        form, setting, column = words if len(words) == 3 else (None, None, "")
        mode, _, counter = column.partition(".")
        entry = self.layers().layers.get((form, setting, mode)) if self.layers() else None
        if entry is None or why_not(entry) or (counter or "real_time") not in entry:
            raise Error(f"no figure '{' '.join(words)}' of a layer")
        return entry[counter or "real_time"]

    def call(self, *words):
        python = self.python() or {"shapes": {}}
        if len(words) == 2 and words[0] == "import" and words[1] in python.get("import_ms", {}):
            return python["import_ms"][words[1]]
        if len(words) == 2 and words[1] in python["shapes"].get(words[0], {}):
            return python["shapes"][words[0]][words[1]][0]
        raise Error(f"no figure '{' '.join(words)}' of calls from Python")


def pages(root):
    return [path for pattern in ("README.md", "docs/*.md", "docs/course/*.md", "stages/*/README.md", "stages/*/notes.md",
                                 "stages/*/steps/README.md") for path in sorted(root.glob(pattern))]


def update(root, results, write):
    """Brings the figures of all pages up to date (or only looks). (what was stale, each with its place; what is wrong)"""
    of_stages, stale, wrong = Figures(root, results), [], []
    for path in pages(root):
        figures = of_stages
        if path.parent.name == "steps":  # its own recording
            figures = Figures(root, load_steps(root, results, path.parent.parent.name[:2]) or results)
        lines, fenced = path.read_text(encoding="utf-8").split("\n"), False
        for number, line in enumerate(lines):
            fenced ^= line.lstrip().startswith("```")
            if "<!--v" not in line and "<!--/v" not in line:
                continue
            where = f"{path}:{number + 1}"

            def fresh(match):
                try:
                    text = figures.text(match["what"])
                except (Error, KeyError, ValueError, ZeroDivisionError) as error:
                    wrong.append(f"{where}: {error} ({match['what']})")
                    return match[0]
                if text != match["text"]:
                    stale.append(f"{where}: {match['text'] or 'nothing'} should be {text} ({match['what']})")
                return match[1] + text + match[4]

            if fenced or BEGINS_LINE.match(line):
                wrong.append(f"{where}: a marker " + ("in a code block" if fenced else "that begins a line")
                             + " is not hidden")
            lines[number] = MARKER.sub(fresh, line)
            if "<!--v" in MARKER.sub("", line) or "<!--/v" in MARKER.sub("", line):
                wrong.append(f"{where}: a marker without its other half")
        if write and not wrong:
            program.write_text(path, "\n".join(lines))
    return stale, wrong
