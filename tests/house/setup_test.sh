#!/usr/bin/env bash
# What setup.sh says before it installs, whether --no-install refuses, and which stages MLA_STAGES configures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0
# expect WHAT COMMAND...: the command succeeds
expect() {
  if "${@:2}"; then echo "ok: $1"; else
    echo "FAILED: $1; said:"
    cat "$scratch/said"
    failures=$((failures + 1))
  fi
}
says() { grep --quiet --extended-regexp -e "$1" "$scratch/said"; }
silent() { ! says "$1"; }

# Nothing is installed here: this apt-get only notes, in the same file as its caller, that it ran. This sudo runs its command.
mkdir "$scratch/bin"
printf '#!/bin/sh\necho "ran apt-get $*" >> "%s"\n' "$scratch/said" > "$scratch/bin/apt-get"
printf '#!/bin/sh\nexec "$@"\n' > "$scratch/bin/sudo"
chmod +x "$scratch"/bin/*
export PATH=$scratch/bin:$PATH
# install NO_INSTALL: asks for a package whose witness is nowhere
install() {
  : > "$scratch/said"
  (no_install=$1; source stages/cmake/setup.sh; install_missing libnowhere-dev=/nowhere/witness.h) >> "$scratch/said" 2>&1
}
install yes
expect "--no-install fails" test $? -ne 0
expect "--no-install lists the package and the command" says 'apt-get install .*libnowhere-dev'
expect "--no-install installs nothing" silent '^ran apt-get'
install ""
expect "it installs" test $? -eq 0
expect "it runs the command" says '^ran apt-get install .*libnowhere-dev'
expect "it first says the command" eval 'sed "/^ran /,\$d" "$scratch/said" | grep -q "apt-get install .*libnowhere-dev"'

configure() { cmake -S . -B "$scratch/build" -DMLA_CUDA=OFF "-DMLA_STAGES=$1" > "$scratch/said" 2>&1; }
configure "77"
expect "an unknown stage is an error" test $? -ne 0
tr -s '\n ' '  ' < "$scratch/said" > "$scratch/line" && mv "$scratch/line" "$scratch/said"
expect "it names those there are" says 'no stage 77; there are 00_reference, 01_naive, 02_shared_tiled'
for stages in "00" "02" "02_shared_tiled;03" "08"; do
  configure "$stages"
  expect "MLA_STAGES=$stages configures" test $? -eq 0
  ctest --test-dir "$scratch/build" -N > "$scratch/said"
  expected=$(grep -oE '(^|;)[0-9]+' <<< "$stages" | tr -d ';' | sort)
  found=$(grep -oE ' [0-9]{2}_[a-z_]+\.model' "$scratch/said" | cut -c2-3 | grep -v 90 | sort)
  expect "MLA_STAGES=$stages registers these stages' tests alone" test "$found" = "$expected"
done
[ "$failures" -eq 0 ] || { echo "$failures failed"; exit 1; }
