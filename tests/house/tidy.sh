#!/usr/bin/env bash
# Runs clang-tidy, with the checks of .clang-tidy, on what changed. It reads kernels as the GPU model compiles them.
#
#   tests/house/tidy.sh             files that differ from where the branch left origin/main, or from the last commit
#   tests/house/tidy.sh all         every source
#   tests/house/tidy.sh FILE...     these files
#   --limit SECONDS, given first    starts no source after that time, and names those that it left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

limit=86400
if [[ ${1-} == --limit ]]; then limit=$2; shift 2; fi
export build=build-clang
cmake --preset clang -DCMAKE_EXPORT_COMPILE_COMMANDS=ON > /dev/null
cmake --build $build --target mutants > /dev/null  # sources that a test includes

base=$(git merge-base HEAD origin/main 2> /dev/null || true)
if [[ -z $base || $base == $(git rev-parse HEAD) ]]; then base=HEAD~1; fi
if [[ $# -eq 0 ]] && ! git rev-parse --quiet --verify $base > /dev/null; then set -- all; fi  # a clone without history

files=("$@")
if [[ $# -eq 0 ]]; then
  mapfile -t files < <(git diff --name-only --diff-filter=d "$base" -- '*.h' '*.cpp' '*.cu' '*.cuh')
elif [[ $1 == all ]]; then
  mapfile -t files < <(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
fi
pattern=$(printf '|%s' "${files[@]}" | sed 's/[.+]/\\&/g')
export filter="(${pattern:1})\$"  # no warnings about headers that did not change
if [[ ${1-} == all ]]; then filter="$PWD/(bench|docs|reference|stages|tests)/"; fi

# What is compiled to read each: a source itself; for a header, one source that includes it.
python3 - $build "${files[@]}" > $build/tidy.txt << 'END'
import json, os, re, subprocess, sys
build, *files = sys.argv[1:]
units = {}  # source in the repository -> what the compiler is given: itself, or what includes it for the model
for entry in json.load(open(f"{build}/compile_commands.json")):
    unit = os.path.join(entry["directory"], entry["file"])
    source = os.path.relpath(unit)
    if not os.path.exists(unit):
        continue  # made by the build
    text = open(unit).read()
    if source.startswith(build):
        wrapped = re.fullmatch(r'#include "(.*)"\n', text)
        if not wrapped:
            continue
        source = os.path.relpath(wrapped[1])
    if not source.startswith(build):
        units.setdefault(source, unit)
includers = {}  # file -> the sources and headers that include it
for source in subprocess.check_output(["git", "ls-files", "*.h", "*.cpp", "*.cu", "*.cuh"], text=True).split():
    for path in re.findall(r'^#include "(.*)"', open(source).read(), re.M):
        beside = os.path.join(os.path.dirname(source), path)
        includers.setdefault(beside if os.path.exists(beside) else path, []).append(source)


def unit_of(file, seen):
    """A source that reads `file`: itself, or the nearest that includes it; None where the compiler reads it nowhere."""
    level = [file]
    while level:
        for one in level:
            if one in units:
                return one
        seen.update(level)
        level = [by for one in level for by in includers.get(one, []) if by not in seen]
    return None


chosen = {unit_of(file, set()) for file in files} - {None}
print("\n".join(units[source] for source in sorted(chosen)))
END
if [[ $(wc -w < $build/tidy.txt) -eq 0 ]]; then
  echo "clang-tidy: nothing to read"
  exit
fi
echo "clang-tidy: $(wc -l < $build/tidy.txt) sources"

export end=$(($(date +%s) + limit))
read_one() {
  if [[ $(date +%s) -ge $end ]]; then
    echo "clang-tidy: no time left for ${1#"$PWD/"}"
  else
    clang-tidy -p "$build" --quiet --warnings-as-errors='*' "--header-filter=$filter" "$1" \
      2> >(grep -vE '^[0-9]+ warnings? (generated|treated)|^Suppressed|^Use -header' >&2)
  fi
}
export -f read_one
xargs -P "$(nproc)" -n 1 bash -c 'read_one "$0"' < $build/tidy.txt
