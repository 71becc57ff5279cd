"""Where the warps of a kernel wait, and for what: samples of Nsight Compute, by source line.

Each multiprocessor is asked at regular times at which instruction a warp stands and why it does not issue it. A
recording has the shares of all reasons, from counters, and the lines with the most samples.
"""
import csv
import re
import tempfile
from pathlib import Path

from ncu import parse_launches
from recordings import Error

SECTIONS = ["SourceCounters", "WarpStateStats"]
# Clocks that the average warp is in a state, per instruction that a scheduler issues.
STATE = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LINES = 10  # of a kernel that are recorded, those with the most samples
# ncu's name of a state, and that of the same in its table of source lines: what the warp waits for.
REASONS = {
    "long_scoreboard": ("long_sb", "device memory or the L2; an mbarrier's phase (`try_wait`); `fence.proxy.async`"),
    "barrier": ("barrier", "other warps at a barrier; a warp's own `wgmma` (`wgmma.wait_group`)"),
    "wait": ("wait", "the instruction before: a fixed number of clocks, known to the compiler"),
    "short_scoreboard": ("short_sb", "shared memory, a shuffle or vote, `ex2`"),
    "math_pipe_throttle": ("math", "a pipe of arithmetic (tensor, fma, alu) that is busy"),
    "mio_throttle": ("mio", "room in the queue to shared memory, shuffles and `ex2`"),
    "lg_throttle": ("lg", "room in the queue to global memory"),
    "gmma": ("gmma", "room for the next `wgmma` (`wgmma.fence`)"),
    "no_instruction": ("no_inst", "the instruction itself, which is not in the instruction cache"),
    "imc_miss": ("imc", "a constant or an argument, which is not in the constant cache"),
    "not_selected": ("not_selected", "nothing; the scheduler has chosen another warp"),
    "selected": ("selected", "nothing: it issues"),
    "dispatch_stall": ("dispatch", "the dispatch unit"),
    "branch_resolving": ("branch_resolving", "the target of a branch"),
    "membar": ("membar", "a fence of memory"),
    "drain": ("drain", "stores at the end of the kernel"),
    "sleeping": ("sleep", "the end of its `nanosleep`"),
    "tex_throttle": ("tex", "room in the queue to textures"),
    "misc": ("misc", "something else"),
}
NAMES = {short: name for name, (short, _) in REASONS.items()}


def parse_states(text):
    """{reason: clocks per issue} of the first kernel in `ncu --csv --page raw`."""
    launches = parse_launches(text)
    found = {}
    for metric, number in (launches[0][1] if launches else {}).items():
        known = STATE.fullmatch(metric)
        if known:
            found[known[1]] = number
    if not found:
        raise Error("ncu wrote no states of warps")
    return found


def opcode(sass):
    """`BAR.SYNC` of '@!P2  BAR.SYNC.DEFER_BLOCKING 0xa, 0x40'"""
    words = [word for word in sass.split() if not word.startswith("@")]
    return ".".join(words[0].rstrip(";").split(".")[:2]) if words else ""


def parse_lines(text, folder):
    """[(file, line, {reason: samples}, opcode)] of `ncu --page source --csv --print-source cuda,sass`, the most samples
    first; the instruction of a line is the one with the most. An instruction of a function that was inlined is listed under
    every line that led to it: it belongs to one in `folder` ("stages/08_seesaw"), or else to one of the project, or else to
    the line before. Files are named from "stages" on. A branch waits for what the instruction before it found out, so that is
    the one named."""
    places, samples, code, path, header, line = {}, {}, {}, None, None, None
    for row in csv.reader(text.splitlines()):
        if row and row[0] == "File Path":
            path, header = row[1], None
        elif row and row[0] == "Line No":
            header = row
        elif header and row:
            line = int(row[0]) if row[0] else line  # above the instructions of a line stands the line, alone
            if len(row) < len(header) or not row[2].startswith("0x"):
                continue
            address = int(row[2], 16)
            code[address] = opcode(row[3])
            samples[address] = {NAMES[title.removeprefix("stall_")]: int(value) for title, value in zip(header, row)
                                if title.startswith("stall_") and title.removeprefix("stall_") in NAMES and value.isdigit() and int(value)}
            if f"/{folder}/" in path or (address not in places and "/stages/" in path):
                places[address] = (path[path.rindex("/stages/") + 1:], line)
    if not samples:
        raise Error("ncu wrote no samples by line; was the program compiled with -lineinfo?")
    found, last, before = {}, None, ""
    for address in sorted(samples):
        last = places.get(address, last)
        of_line, codes = found.setdefault(last, ({}, {}))
        for reason, count in samples[address].items():
            of_line[reason] = of_line.get(reason, 0) + count
        name = before if code[address] == "BRA" else code[address]
        codes[name] = codes.get(name, 0) + sum(samples[address].values())
        before = code[address]
    found.pop(None, None)
    return sorted(((*place, of, max(codes, key=codes.get)) for place, (of, codes) in found.items()),
                  key=lambda one: -sum(one[2].values()))


def record(run, options, stage, shape):
    """A run of the kernel `decode` of a stage. `run` starts a program."""
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder, "report.ncu-rep"))
        sections = [word for one in SECTIONS for word in ("--section", one)]
        result = run([options.ncu, "--clock-control", "none", *sections, "--kernel-name", "decode", "--launch-count", "1", "-f", "-o", report,
                      str(options.program), "decode", "--stage", stage, "--machine", "gpu", "--shape", shape])
        if result.returncode != 0:
            raise Error(f"{options.ncu} failed on stage {stage}:\n{(result.stdout + result.stderr)[-3000:]}")
        def page(*more):
            return run([options.ncu, "--import", report, "--csv", *more]).stdout
        states = parse_states(page("--page", "raw", "--print-units", "base"))
        lines = parse_lines(page("--page", "source", "--print-source", "cuda,sass"), f"stages/{stage}")
    samples = sum(sum(of.values()) for _, _, of, _ in lines)
    return {"stage": stage, "shape": shape, "states": states, "samples": samples,
            "lines": [{"file": file, "line": line, "text": text_of(options.root, file, line), "instruction": code,
                       "reasons": of} for file, line, of, code in lines[:LINES]]}


def text_of(root, file, line):
    """What is there: in a kernel the line of source without its comment; in what all share, the function's name."""
    lines = (root / file).read_text(encoding="utf-8").splitlines()[:line]
    if not file.startswith("stages/common/"):
        return lines[-1].split("//")[0].strip()
    names = [known[1] for known in (re.match(r"__device__ .*?(\w+)\(", one) for one in lines) if known]
    return f"{names[-1]}()" if names else lines[-1].strip()


def states_table(runs, least=0.05):
    """A header and a row per reason: shares of the warps' time in each stage, and what is waited for; reasons that have
    less than `least` everywhere are one row."""
    shares = [{name: clocks / sum(run["states"].values()) for name, clocks in run["states"].items()} for run in runs]
    names = [name for name in REASONS if any(share.get(name, 0) >= least for share in shares)]
    rows = [[f"`{name}`", REASONS[name][1], *(f"{share.get(name, 0):.0%}" for share in shares)] for name in names]
    rest = [1 - sum(share.get(name, 0) for name in names) for share in shares]
    return (["state", "the warp waits for", *(run["stage"] for run in runs)],
            rows + [["others", "", *(f"{share:.0%}" for share in rest)]])


def lines_table(run, least=0.02):
    """A header and a row per line where at least this share of the samples lies."""
    rows = []
    for one in run["lines"]:
        share = sum(one["reasons"].values()) / run["samples"]
        if share < least:
            continue
        reason, count = max(one["reasons"].items(), key=lambda item: item[1])
        text = one["text"].replace("|", "\\|")
        rows.append([f"{share:.0%}", f"`{reason}`, {count / sum(one['reasons'].values()):.0%}", f"`{one['instruction']}`",
                     f"`{Path(one['file']).name}`:{one['line']}", f"`{text}`"])
    return ["share", "mostly", "instruction", "line", "source"], rows
