#!/usr/bin/env python3
"""Makes every memory access that the race detector sees say its place first, by a store of a number before each call that
-fsanitize=thread made. clang 14 copies structs by calls of memcpy; these become calls of the detector's, as clang14_copies.h
of the model does natively.

    places.py TABLE FILE.ll...     LLVM's text of kernels, changed in place; TABLE: kPlaces, the lines by number, as C++
"""
import pathlib
import re
import sys

NODE = re.compile(r"^!(\d+) = (?:distinct )?!(\w+)\((.*)\)$")
CALL = re.compile(r"^\s+(?:%\S+ = )?(?:tail )?call .*@__tsan_(?:(?:unaligned_|volatile_|unaligned_volatile_)*(?:read|write)\d+|atomic|mem(?:cpy|move|set)).*, !dbg !(\d+)$")
COPY = re.compile(r"@(memcpy|memmove|memset)\(")
places = {"an unknown place": 0}


def field(text, name):
    found = re.search(rf"\b{name}: (?:!(\d+)|(\d+)|\"([^\"]*)\")", text)
    return found and next(group for group in found.groups() if group is not None)


def place_of(nodes, number):
    """The innermost line of a stage that a location is in."""
    while number is not None:
        location = nodes[number][1]
        scope = nodes[field(location, "scope")][1]
        file = field(nodes[field(scope, "file")][1], "filename").removeprefix("./")
        if file.startswith("stages/"):
            return f"{file}:{field(location, 'line')}"
        number = field(location, "inlinedAt")
    return "an unknown place"


def main():
    for name in sys.argv[2:]:
        path = pathlib.Path(name)
        lines = COPY.sub(r"@__tsan_\1(", path.read_text()).splitlines()
        nodes = {found[1]: (found[2], found[3]) for found in map(NODE.match, lines) if found}
        made = []
        for line in lines:
            call = CALL.match(line)
            if call:
                number = places.setdefault(place_of(nodes, call[1]), len(places))
                made.append(f"  store i32 {number}, i32* @gpu_model_place, align 4, !dbg !{call[1]}")
            made.append(line)
        at = next(i for i, line in enumerate(made) if line.startswith("target triple"))
        made.insert(at + 1, "\n@gpu_model_place = external global i32, align 4")
        path.write_text("\n".join(made) + "\n")
    texts = ", ".join(f'"{place}"' for place in places)
    pathlib.Path(sys.argv[1]).write_text(f"extern const char* const kPlaces[];\nconst char* const kPlaces[] = {{{texts}}};\n")


if __name__ == "__main__":
    main()
