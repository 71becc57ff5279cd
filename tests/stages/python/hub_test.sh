#!/usr/bin/env bash
# Makes a repository for the Kernel Hub from the wheel, and loads it from disk with Hugging Face's `kernels`.
#   hub_test.sh BUILD_FOLDER
set -euo pipefail
tests=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$tests/environment.sh" hub_test "$1"
make_environment hub
install_wheel  # it has the same name as what is loaded; both must work in one process

python=$scratch/venv/bin/python
"$python" "$root/stages/python/hub.py" "$wheels"/*.whl "$scratch/hub"
if "$python" "$root/stages/python/hub.py" "$wheels"/*.whl "$scratch/hub" 2> "$scratch/log"; then
  echo "hub_test: a variant was written twice"; exit 1
fi
grep -q "is there already" "$scratch/log"
HF_HUB_OFFLINE=1 "$python" "$tests/hub_load.py" "$scratch/hub"
