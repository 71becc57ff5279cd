#!/bin/sh
# Runs a compiler, and fails where ptxas says that it undid what a Hopper kernel is about: wgmma serialised, waits put
# in between, setmaxnreg ignored. ptxas says so in remarks (C7500 to C7599), which its -Werror does not see, and the
# kernel stays right, only slow.
#   nvcc_guard.sh nvcc [argument]...
exec 3>&1
said=$("$@" 2>&1 >&3 3>&-)  # standard output goes its way
code=$?
exec 3>&-
[ -z "$said" ] || printf '%s\n' "$said" >&2
[ "$code" -eq 0 ] || exit "$code"
case $said in
  *"(C75"[0-9][0-9]")"*) ;;
  *) exit 0 ;;
esac
echo "nvcc_guard.sh: error: ptxas serialises wgmma or ignores setmaxnreg, see (C75..) above" >&2
while [ $# -gt 1 ]; do  # the object is newer than its source: left there, the next build would take it
  [ "$1" != -o ] || rm -f "$2"
  shift
done
exit 1
