# Sourced by tests/run.sh, bench/run.sh and .ci/run: installs what is missing, and builds. From the project's root.
#
#   build TARGET...                      configures into build/ and builds the targets
#   install_missing [PACKAGE=WITNESS]... installs what a build needs, and these; with no_install=yes says what is
#                                        missing, and fails

# Packages of Debian 12 and Ubuntu 24.04, and what is looked for to know whether they are there: a program or a path.
install_missing() {
  local missing=() entry
  for entry in g++=c++ cmake=cmake ninja-build=ninja git=git python3=python3 \
      libeigen3-dev=/usr/include/eigen3/Eigen/Core \
      libboost-context-dev=/usr/include/boost/context/fiber.hpp \
      libgtest-dev=/usr/include/gtest/gtest.h \
      libbenchmark-dev=/usr/include/benchmark/benchmark.h \
      libcli11-dev=/usr/include/CLI/CLI.hpp \
      libfmt-dev=/usr/include/fmt/format.h \
      nlohmann-json3-dev=/usr/include/nlohmann/json.hpp "$@"; do
    local package=${entry%%=*} witness=${entry#*=}
    if [[ $witness == /* ]]; then
      [[ -e $witness ]] || missing+=("$package")
    else
      command -v "$witness" > /dev/null || missing+=("$package")
    fi
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0

  local root=()
  if [[ $(id -u) -ne 0 ]]; then root=(sudo); fi
  local install=("${root[@]}" apt-get install -y --no-install-recommends "${missing[@]}")
  if [[ -n ${no_install:-} ]]; then
    printf 'These packages are missing, and --no-install forbids to install them:\n  %s\nTo install them:\n  %s\n' \
      "${missing[*]}" "${install[*]}" >&2
    return 1
  fi
  if ! command -v apt-get > /dev/null || { [[ ${#root[@]} -gt 0 ]] && ! command -v sudo > /dev/null; }; then
    echo "These packages are needed, and cannot be installed from here (no apt-get, or neither root nor sudo):" >&2
    echo "  ${missing[*]}" >&2
    return 1
  fi
  printf 'About to install what is missing (--no-install refuses instead):\n  %s\n' "${install[*]}"
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]:${#root[@]}}" -qq > /dev/null
}

build() {
  install_missing || exit
  if ! command -v nvcc > /dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
    export PATH=$PATH:/usr/local/cuda/bin
  fi
  local log
  if ! log=$(cmake -S . -B build -G Ninja 2>&1); then
    printf '%s\n' "$log" >&2
    return 1
  fi
  grep '^-- CUDA:' <<< "$log" || true
  cmake --build build --target "$@"
}
