#!/usr/bin/env bash
# Checks that every C++ and CUDA source is laid out as .clang-format says, or lays it out.
#
#   tests/house/format.sh          says what differs
#   tests/house/format.sh --fix    formats in place
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=14.0.6  # other versions break lines elsewhere; PyPI gives every machine the same one
venv=build/clang-format-$version
if [[ ! -x $venv/bin/clang-format ]]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "clang-format==$version"
fi

case ${1-} in
  "") action=(--dry-run --Werror) ;;
  --fix) action=(-i) ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
git ls-files -z '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -0 "$venv/bin/clang-format" "${action[@]}"
