#!/usr/bin/env bash
# Makes the site: build/site/index.html, to be opened from disk or served as it is. A warning is an error.
#
#   bash docs/build.sh
#
# Installs Doxygen through the system's package manager if it is missing, and what docs/site/requirements.txt names from
# PyPI into a folder of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source stages/cmake/setup.sh
more=(doxygen=doxygen)
python3 -c 'import ensurepip' 2> /dev/null || more+=(python3-venv=/missing)
install_missing "${more[@]}"

site=build/site packages=build/site-packages
if ! cmp -s docs/site/requirements.txt $packages/requirements.txt; then
  rm -rf $packages
  python3 -m venv $packages
  $packages/bin/pip install --quiet --disable-pip-version-check -r docs/site/requirements.txt
  cp docs/site/requirements.txt $packages
fi

rm -rf $site
mkdir -p $site
shopt -s nullglob
export MLA_SITE=$PWD/$site
MLA_INPUT=$(echo docs/site/*.dox reference/*.h reference/{layers,testing}/*.h reference/gpu_model/gpu_model.h \
  stages/common/*.h stages/common/*/*.h stages/*/{kernel,stage}.{h,cuh,cpp,cu})
export MLA_INPUT
doxygen docs/site/Doxyfile

# In every public header, each type and each function outside a class has a comment. Members whose names say everything need
# none, and kernels have plain comments. So of Doxygen's warnings about missing comments, only those are used.
missing=$({ cat docs/site/Doxyfile; printf '%s = %s\n' WARN_IF_UNDOCUMENTED YES WARN_AS_ERROR NO GENERATE_HTML NO; } |
  doxygen - 2>&1 > /dev/null |
  grep -E '\.h:[0-9]+: .*(Compound .*|\((function|typedef|enumeration)\) of (namespace|file) .*) is not documented' | sort -u) || true
if [[ -n $missing ]]; then
  printf 'A comment is missing:\n%s\n' "$missing" >&2
  exit 1
fi

$packages/bin/sphinx-build -qEW --keep-going -d build/site-doctrees -c docs/site . $site
$packages/bin/python docs/site/search.py $site
rm -rf $site/{doxygen,_sources,.buildinfo,objects.inv}
echo '<!doctype html><title>FlashMLA, stage by stage</title><meta http-equiv="refresh" content="0; url=docs/mainpage.html">' \
  '<a href="docs/mainpage.html">FlashMLA, stage by stage</a>' > $site/index.html
echo "site: $site/index.html"
