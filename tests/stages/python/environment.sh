# What the tests of the Python package share: each makes an environment of its own, with the wheel of wheel_test.sh.
#   source environment.sh NAME BUILD_FOLDER
name=$1
build=$(realpath "$2")
root=$(realpath "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../..")
wheels=$build/tests/wheel
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

skip() { echo "$name: skipped: $*"; exit 77; }
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# make_environment KEY...: makes a fresh one at $scratch/venv, with the packages that pyproject.toml names under each KEY:
# build-system, or an optional dependency
make_environment() {
  python3 -c 'import ensurepip' 2> /dev/null || skip "python3 cannot make an environment (python3-venv)"
  python3 -m venv "$scratch/venv"
  local needed
  mapfile -t needed < <("$scratch/venv/bin/python" - "$root/pyproject.toml" "$@" << 'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
for key in sys.argv[2:]:
    print(*(project["build-system"]["requires"] if key == "build-system" else
            [*project["project"]["dependencies"], *project["project"]["optional-dependencies"][key]]), sep="\n")
END
)
  pip install --no-compile "${needed[@]}" 2> "$scratch/log" || { cat "$scratch/log"; skip "pip finds no index with ${needed[*]}"; }
}

install_wheel() {
  ls "$wheels"/*.whl > /dev/null 2>&1 || skip "there is no wheel; python_wheel makes it"
  pip install --no-index --no-deps "$wheels"/*.whl
}
