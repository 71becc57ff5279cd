#!/usr/bin/env python3
"""Makes what docs/demos/player.md plays: the recordings of kernels, some with a fault, that recordings.json lists.

    docs/demos/record.py [--build BUILD]            writes docs/demos/recordings/*.js, with programs of BUILD (default: build)
    docs/demos/record.py [--build BUILD] --check    says whether they are what these programs record now

Exit code: 0 done, or up to date; 1 not; 77 it cannot be checked, because a program is missing or another compiler made it.
"""
import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/demos/recordings"
LIST = FOLDER / "recordings.json"
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "stages" / "mutants"))
import mutants  # noqa: E402


class Wrong(Exception):
    pass


def compiler_of(build):
    """The compiler of a build. Another one may merge or move plain loads and stores."""
    for path in build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
        text = path.read_text()
        name, version = (re.search(rf'set\(CMAKE_CXX_COMPILER_{what} "([^"]*)"\)', text)[1] for what in ("ID", "VERSION"))
        return f"{name} {version.split('.')[0]}"
    raise Wrong(f"{build} has not been configured")


def program_of(build, stage):
    """A program whose kernels' plain loads and stores are recorded; kernels that mutants.txt names can have faults in it."""
    faulty = any(mutant.stage == stage for mutant in mutants.read_list())
    return build / ("tests/mutant_run" if faulty else "bench/mla_profile")


def command_of(entry):
    words = ["trace", "--stage", entry["stage"], "--shape", entry["shape"], "--multiprocessors", entry.get("multiprocessors", 1),
             "--seed", 3, "--schedule", entry["schedule"], "--block", 0]
    if "max_events" in entry:
        words += ["--max-events", entry["max_events"]]
    return [str(word) for word in words]


def record(build, entry):
    """The recording, with names of files as they are in the repository."""
    environment = dict(os.environ)
    environment.pop("MLA_MUTANT", None)
    if "fault" in entry:
        numbers = [number for number, mutant in enumerate(mutants.read_list(), 1)
                   if (mutant.stage, mutant.name) == (entry["stage"], entry["fault"])]
        if len(numbers) != 1:
            raise Wrong(f"mutants.txt has no '{entry['fault']}' of stage {entry['stage']}")
        environment["MLA_MUTANT"] = str(numbers[0])
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "recording.json"
        ran = subprocess.run([program_of(build, entry["stage"]), *command_of(entry), "-o", file], env=environment, cwd=ROOT,
                             capture_output=True, text=True)
        if not file.exists():
            raise Wrong(f"{entry['name']}: {ran.stdout}{ran.stderr}")
        recording = json.loads(file.read_text())
    if bool(recording["error"]) != ("fault" in entry):
        raise Wrong(f"{entry['name']}: the model says '{recording['error']}'")
    return tidy(recording)


def tidy(recording):
    def short(name):  # absolute or not, as the compiler has it
        return "stages/" + name.split("/mutants/", 1)[1] if "/mutants/" in name else re.search(r"(?:^|/)((?:stages|reference)/.*)", name)[1]

    names = [short(name) for name in recording["files"]]
    files = list(dict.fromkeys(names))
    for place in recording["places"]:
        place[1] = files.index(names[place[1]])
    recording["files"] = files
    recording["error"] = re.sub(r"[^ ]*/(\w+\.(?:cuh?|h):\d+)", r"\1", recording["error"])
    for name in ("max_events", "max_bytes"):
        del recording[name]
    return recording


def text_of(entry, recording):
    """A classic script, because a page from disk cannot load JSON."""
    members = ",\n".join(f"{json.dumps(key)}:{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}" for key, value in recording.items())
    return f"playerDemo.take({json.dumps(entry['name'])}, {{{members}}});\n"


@functools.lru_cache
def lines_of(path):
    return [line.strip() for line in (ROOT / path).read_text().splitlines()]


def step_of(recording, find, what):
    """How many events there are until the one that is meant: {"kind", "warp", "text": of the instruction or of its line, "nth"}."""
    if find == "end":
        return len(recording["events"])
    found = []
    for number, event in enumerate(recording["events"], 1):
        kind = recording["kinds"][event[0]]
        fields = dict(zip(kind[1:], event[1:]))
        place = recording["places"][fields["place"]] if fields.get("place", -1) >= 0 else None
        text = f"{place[0]} {lines_of(recording['files'][place[1]])[place[2] - 1]}" if place else ""
        if (find.get("kind", kind[0]) == kind[0] and find.get("warp", fields.get("warp")) == fields.get("warp")
                and find.get("text", "") in text and all(fields.get(name) == value for name, value in find.get("fields", {}).items())):
            found.append(number)
    nth = find.get("nth", 1)
    if len(found) < abs(nth):
        raise Wrong(f"{what}: {find} is found {len(found)} times")
    return found[nth - (nth > 0)]


def files_of(build, wanted):
    """{name: text} of all files that the folder must have."""
    recordings, texts, listed = {}, {}, []
    for entry in wanted["recordings"]:
        recording = recordings[entry["name"]] = record(build, entry)
        texts[f"recording_{entry['name']}.js"] = text_of(entry, recording)
        item = {key: entry[key] for key in ("name", "stage", "fault") if key in entry}
        item["title"] = (f"{recording['about']['stage']}, {entry['shape']}, schedule {entry['schedule']}"
                         + (f": {entry['fault']}" if "fault" in entry else ""))
        program = "MLA_MUTANT=N build/tests/mutant_run" if "fault" in entry else "build/bench/mla_profile"
        item["command"] = f"{program} {' '.join(command_of(entry))} -o mine.json"
        if "fault" in entry:
            mutant = next(m for m in mutants.read_list() if (m.stage, m.name) == (entry["stage"], entry["fault"]))
            source = mutants.source_of(entry["stage"])
            text = source.read_text()
            begin, end = mutant.span(text)
            item["change"] = {"file": source.relative_to(ROOT).as_posix(), "line": text.count("\n", 0, begin) + 1,
                              "removed": " ".join(text[begin:end].split()), "instead": " ".join(mutant.replacement)}
        listed.append(item)
    stories = []
    for story in wanted["stories"]:
        steps = []
        for number, step in enumerate(story["steps"], 1):
            sides = [step_of(recordings[story[side]], step[side], f"{story['name']}, step {number}, {side}")
                     for side in ("left", "right") if side in story]
            steps.append([*sides, step["text"]])
        stories.append({**{key: story[key] for key in ("name", "title", "left", "right") if key in story}, "steps": steps})
    texts["recordings.js"] = ("playerDemo.list(" + json.dumps({"compiler": compiler_of(build), "recordings": listed, "stories": stories},
                                                              ensure_ascii=False, indent=1) + ");\n")
    return texts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = json.loads(LIST.read_text())
    build = options.build.resolve()
    there = {path.name: path.read_text() for path in FOLDER.glob("*.js")}
    missing = [str(path) for path in sorted({program_of(build, entry["stage"]) for entry in wanted["recordings"]}) if not path.exists()]
    if missing:
        print(f"skipped: {', '.join(missing)} is not built")
        return 77
    if options.check and f'"compiler": "{compiler_of(build)}"' not in there.get("recordings.js", ""):
        print(f"skipped: {compiler_of(build)} is not the compiler that made the recordings")
        return 77
    texts = files_of(build, wanted)
    if options.check:
        wrong = sorted(name for name in texts.keys() | there.keys() if texts.get(name) != there.get(name))
        print("\n".join(f"{name} is not what is recorded now; docs/demos/record.py writes it" for name in wrong)
              or f"{len(texts)} files are as they are recorded now")
        return bool(wrong)
    for name in there.keys() - texts.keys():
        (FOLDER / name).unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
    print(f"wrote {len(texts)} files, {sum(len(text.encode()) for text in texts.values())} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Wrong, ValueError) as error:
        sys.exit(str(error))
