#!/usr/bin/env bash
# Checks every exercise by its own check, in a copy of the project. The answer is right, the solution passes; a kernel
# does not pass that was not touched, was changed only in a comment, or was broken in another way. Exit code 77: a tool
# is missing.
#
#     tests/stages/exercise_test.sh BUILD [keep]     keep: leave the copy, whose name is printed
set -euo pipefail
build=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."

for tool in python3 git cmake tar; do
  command -v "$tool" > /dev/null || { echo "skipped: no $tool"; exit 77; }
done
git rev-parse --is-inside-work-tree > /dev/null 2>&1 || { echo "skipped: not a git checkout"; exit 77; }
copy=$(mktemp -d)
root=$PWD
# take_stages_from ROOT: the build compiles the stages of this copy of the project
take_stages_from() {
  local stage folder source
  for stage in "$1"/stages/[0-9][0-9]_*/stage.c*; do
    folder=${stage%/*}
    source=$build/bench/tools/stages/${folder##*/}/stage_on_model.cpp
    [ "$(cat "$source")" = "#include \"$stage\"" ] || echo "#include \"$stage\"" > "$source"
  done
}
if [ "${2:-}" = keep ]; then echo "$copy"; else trap 'take_stages_from "$root"; rm -rf "$copy"' EXIT; fi
git ls-files -co --exclude-standard -z | tar c --null --files-from=- | tar x -C "$copy"
cd "$copy"
git init --quiet
git add --all
git -c user.name=test -c user.email=test@localhost -c commit.gpgsign=false commit --quiet --message "as it came"

failures=0
# expect CODE TEXT COMMAND...: the command ends with CODE and says TEXT
expect() {
  local code=0 output
  output=$("${@:3}" 2>&1) || code=$?
  if [ "$code" -eq "$1" ] && [[ $output == *"$2"* ]]; then
    echo "ok: ${*:3}"
  else
    echo "FAILED: ${*:3}: exit code $code, $1 expected; \"$2\" expected in: $output"
    failures=$((failures + 1))
  fi
}

# The kernels of the copy are compiled in the build that runs this test, because all the rest is built there.
export MLA_BUILD=$build

# "stage number kind", one line per exercise
table=$(stages/exercise list | awk '/^[0-9]/ { stage = $1; next } { print stage, $1, $2 }')
[ -n "$table" ] || { echo "FAILED: no exercises"; exit 1; }
numbers=$(awk '{ print $2 }' <<< "$table" | sort -nu)

# Of the kinds that begin, one exercise per stage is solved and checked as a reader would. Its solution is the original
# kernel, which solve must restore. check_untouched has run that kernel, so the other exercises need not build it again.
is_begun() { [ "$1" = mend ] || [ "$1" = write ]; }
is_as_it_came() {
  is_begun "$3" && [ "$2" -gt "$(awk -v s="$1" '$1 == s && ($3 == "mend" || $3 == "write") { print $2; exit }' <<< "$table")" ]
}

# build_all NUMBER: builds the programs of all stages that have an exercise of this number at once, on all cores, so that
# each check finds its own built
build_all() {
  local stages stage number kind
  stages=$(while read -r stage number kind; do
    if [ "$number" = "$1" ] && ! is_as_it_came "$stage" "$number" "$kind"; then echo "$stage"; fi
  done <<< "$table")
  take_stages_from "$PWD"
  [ -n "$stages" ] || return 0
  # shellcheck disable=SC2046
  cmake --build "$MLA_BUILD" --parallel --target $(sed 's/_.*//; s/^/mla_run_/' <<< "$stages") \
    > build.log || { cat build.log; exit 1; }
}

# for_each NUMBER FUNCTION: calls FUNCTION stage number kind for every stage's exercise of this number
for_each() {
  local stage number kind
  while read -r stage number kind; do
    if [ "$number" = "$1" ]; then "$2" "$stage" "$number" "$kind" < /dev/null; fi
  done <<< "$table"
}
# The runs in which a fault must show are right with the original kernel.
check_untouched() {
  if [ "$3" = number ]; then
    check_number "$1" "$2"
    return
  fi
  expect 1 "is as it came" stages/exercise check "$1" "$2"
  check_counter "$1" "$2"
  [ "$3" = break ] || is_as_it_came "$@" || return 0
  local run
  while read -r run; do
    # shellcheck disable=SC2086
    expect 0 PASS "$MLA_BUILD/bench/mla_run" decode --stage "$1" --machine model $run
  done < <(python3 -c 'import json, sys
for run in json.load(open(sys.argv[1]))[int(sys.argv[2]) - 1]["runs"]: print(run)' \
    "stages/$1/exercises/exercises.json" "$2")
}
# The count that an exercise must lower is higher with the original kernel.
check_counter() {
  local counter
  counter=$(python3 -c 'import json, sys
counter = json.load(open(sys.argv[1]))[int(sys.argv[2]) - 1].get("counter", {})
print(*(counter[key] for key in ("shape", "kernel", "figure", "at_most") if counter))' \
    "stages/$1/exercises/exercises.json" "$2")
  [ -n "$counter" ] || return 0
  # shellcheck disable=SC2086
  set -- "$1" $counter
  expect 0 "" python3 -c 'import json, sys
kernels = {kernel["name"]: kernel for kernel in json.loads(sys.argv[1])["kernels"]}
value = kernels[sys.argv[2]]
for key in sys.argv[3].split("."): value = value[key]
assert value > int(sys.argv[4]), f"{value} is not more than {sys.argv[4]}"' \
    "$("$MLA_BUILD/bench/mla_run" profile --stage "$1" --shape "$2" --json)" "$3" "$4" "$5"
}
# The answer and the traps are what their expressions give with the predictions of the project's own program.
check_number() {
  local forecast
  # shellcheck disable=SC2046
  forecast=$("$MLA_BUILD/bench/mla_run" predict --machine model --json \
    $(python3 -c 'import json, sys; entry = json.load(open(sys.argv[1]))[int(sys.argv[2]) - 1]
print("--stage", entry.get("stage", sys.argv[3]), "--shape", entry["shape"])' \
      "stages/$1/exercises/exercises.json" "$2" "$1"))
  expect 0 "" python3 - "stages/$1/exercises/exercises.json" "$2" "$forecast" << 'END'
import json, sys
entry = json.load(open(sys.argv[1]))[int(sys.argv[2]) - 1]
names = {key: int(value) if isinstance(value, float) and value.is_integer() else value
         for key, value in json.loads(sys.argv[3]).items()}
def check(number, expression):
    truth = eval(expression, {"__builtins__": {}}, names)  # from our own exercises.json
    assert abs(number - truth) <= 5e-4 * abs(truth), f"{expression} is {truth}, not {number}"
check(entry["answer"], entry["truth"])
for trap in entry.get("traps", []):
    check(trap["number"], trap["from"])
    assert abs(trap["number"] - entry["answer"]) > entry["tolerance"] * entry["answer"], f"{trap} is right"
END
}
check_comment() {
  if is_begun "$3"; then expect 1 "Not begun yet" stages/exercise check "$1" "$2"; fi
  if [ "$3" = break ]; then expect 1 "Nothing wrong was found" stages/exercise check "$1" "$2"; fi
}
check_broken_otherwise() {
  if [ "$3" = break ]; then expect 1 "but not as asked" stages/exercise check "$1" "$2"; fi
}
begin() {
  if is_begun "$3"; then
    expect 0 "$([ "$3" = mend ] && echo "is broken now" || echo "lacks a part now")" stages/exercise begin "$1" "$2"
    expect 1 "repeat: mla_run decode --stage $1" stages/exercise check "$1" "$2"
  else
    expect 2 "is not one to begin" stages/exercise begin "$1" "$2"
  fi
}
solve() {
  if [ "$3" != number ]; then expect 0 "applied" stages/exercise solve "$1" "$2"; fi
  if is_begun "$3"; then  # all but the last line is the original kernel
    expect 0 "1	0	stages/$1/kernel.cuh" git diff --numstat -- "stages/$1"
  fi
}
check_solution() {
  if is_as_it_came "$@"; then return; fi
  case $3 in
    number)
      expect 0 "Right." env MLA_BUILD=/nowhere stages/exercise check "$1" "$2" "$(stages/exercise solve "$1" "$2")"
      expect 1 "is not it" stages/exercise check "$1" "$2" -1
      expect 2 "is needed" stages/exercise check "$1" "$2" ;;
    break) expect 0 "Broken, and caught." stages/exercise check "$1" "$2" ;;
    improve | mend | write) expect 0 "Right in every run." stages/exercise check "$1" "$2" ;;
  esac
}
check_chapter() {
  local chapter=stages/$1/README.md
  [ -e "$chapter" ] || return 0
  expect 0 "" grep --fixed-strings "stages/exercise check ${1%%_*} $2" "$chapter"
  if [ "$3" = write ]; then  # with three hints
    expect 0 "Hint 1 Hint 2 Hint 3" awk -v begin="stages/exercise begin ${1%%_*} $2" -v number="**$2.**" \
      'index($0, "**") == 1 { here = index($0, number) == 1 } here { text = text " " $0; gsub(/<[^>]*>/, "", $0) }
       here && /^Hint [0-9]$/ { hints = hints $0 " " } END { print hints; exit !index(text, begin) }' "$chapter"
  fi
  if [ "$3" = number ]; then
    expect 0 "" grep --fixed-strings --word-regexp -e "$(stages/exercise solve "$1" "$2")" "$chapter"
  fi
}

for number in $numbers; do
  for_each "$number" check_untouched
  for_each "$number" check_chapter
done
for number in $numbers; do  # all stages' faults, and then solutions, at once, so that one build serves them
  for_each "$number" begin
  for_each "$number" solve
  build_all "$number"
  for_each "$number" check_solution
  git checkout --quiet -- stages
done
# One stage with every kind gets a change that does nothing. Then every kernel is broken, but not as asked.
echo "// touched" >> "$(echo stages/07_*/kernel.cuh)"
for number in $numbers; do while read -r one; do check_comment $one; done < <(awk -v n="$number" '/^07/ && $2 == n' <<< "$table"); done
sed -i 's/\(problem\.softmax_scale\|items\.scale_log2\)/-&/' stages/[0-9][0-9]_*/kernel.*h
build_all 2  # every stage has a second exercise, of the kind break
for number in $numbers; do for_each "$number" check_broken_otherwise; done
git checkout --quiet -- stages
# Exercises that pages and the usage tell the reader to begin can be begun.
while read -r stage number; do
  expect 0 "to begin" awk -v s="$stage" -v n="$number" \
    'index($1, s "_") == 1 && $2 == n && ($3 == "mend" || $3 == "write") { print "to begin" }' <(echo "$table")
done < <(grep --no-filename --only-matching "stages/exercise begin [0-9]* [0-9]*" docs/*.md README.md stages/exercise |
  awk '{ print $3, $4 }' | sort -u)
expect 2 "has exercises 1 to" stages/exercise check 01 99
expect 2 "has no exercises" stages/exercise check 77 1
expect 2 "takes no answer" stages/exercise check 01 2 5

[ "$failures" -eq 0 ] || { echo "$failures failed"; exit 1; }
