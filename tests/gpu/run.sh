#!/usr/bin/env bash
# Runs the GPU tests and the GPU benchmark with a wheel that is not installed: it is unpacked into a folder that goes away.
#
#   run.sh [test|bench|all] [--stand-in LIBRARY] [--only NAME]
#
#   PYTHON   the interpreter, 3.10 or newer; python3. Where it has PyTorch with CUDA, caches are PyTorch's tensors
#   OUT      folder for test-gpu.log and gpu.json; the current one
#
# --only: tests whose name has this in it. With --stand-in nothing is measured, and nothing says anything about a GPU. The
# status is 0 if all that ran passed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# In the bundle this file lies beside `tests` and the wheel, in the repository in tests/gpu.
root=$here
[ -d "$root/tests/gpu" ] || root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-.}
what=all
stand_in=()
only=()
while [ $# -gt 0 ]; do
  case $1 in
  test | bench | all) what=$1 ;;
  --stand-in)
    stand_in=(--stand-in "${2:?--stand-in needs the path of the library}")
    shift
    ;;
  --only)
    only=("${2:?--only needs a name}")
    shift
    ;;
  *)
    echo "kvlane: '$1', allowed: test, bench, all, --stand-in LIBRARY, --only NAME" >&2
    exit 2
    ;;
  esac
  shift
done

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "kvlane: $python is not Python 3.10 or newer; PYTHON=/path/to/it names another" >&2
  exit 1
fi
wheels=("$root"/kvlane-*.whl "$root"/dist/kvlane-*.whl)
wheel=
for candidate in "${wheels[@]}"; do
  [ -e "$candidate" ] && wheel=$candidate && break
done
if [ -z "$wheel" ]; then
  echo "kvlane: no wheel beside $here and none in $root/dist: make wheel" >&2
  exit 1
fi

unpacked=$(mktemp -d "${TMPDIR:-/tmp}/kvlane-gpu.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
"$python" -m zipfile -e "$wheel" "$unpacked"
export PYTHONPATH=$unpacked PYTHONDONTWRITEBYTECODE=1
mkdir -p "$out"

status=0
if [ "$what" != bench ]; then
  "$python" "$root/tests/gpu/run.py" "${stand_in[@]}" "${only[@]}" 2>&1 | tee "$out/test-gpu.log" || status=1
fi
if [ "$what" != test ]; then
  if [ ${#stand_in[@]} -gt 0 ]; then
    "$python" "$root/benches/gpu/run.py" --stand-in-dry-run "${stand_in[1]}" || status=1
  else
    "$python" "$root/benches/gpu/run.py" --json "$out/gpu.json" || status=1
  fi
fi
exit $status
