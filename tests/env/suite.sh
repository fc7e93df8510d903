#!/usr/bin/env bash
# Runs one suite, keeps its output in target/test/NAME.log and its exit status as ours.
#
#   tests/env/suite.sh NAME COMMAND...   run a suite
#   tests/env/suite.sh --summary        what ran, and what a test said it could not run
#
# A test that cannot run on this machine prints a line `NOT RUN: what: why`. Such a line does not fail `make test`, since
# a laptop may lack a kernel feature; .ci/run fails on it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

logs=target/test
mkdir -p "$logs"

if [ "$1" = --summary ]; then
  echo
  echo "kvlane: suites"
  cat "$logs"/*.result 2>/dev/null || echo "  none ran"
  awk '{ sum += $(NF - 1) } END { if (NR) printf "  %-41s %5d s\n", "all of them", sum }' "$logs"/*.result 2>/dev/null || true
  # Who reads a long log reads its end: there it must say which tests failed, not only which suite.
  for result in "$logs"/*.result; do
    if grep -qs FAILED "$result"; then
      name=$(basename "$result" .result)
      echo "kvlane: failed in $name"
      # Names first: what a test says of itself can be very long. Every part reads its input to the end, since a pipe that is
      # closed early is an error here.
      for lines in '^(FAILED|ERROR) |\.\.\. FAILED$|: FAILED \([0-9.]+ s\)$|^error(\[|: (test failed|could not))' '^E   '; do
        { grep -hE "$lines" "$logs/$name.log" || true; } | cut -c1-300 | awk 'NR <= 40 { print "  " $0 }'
      done
    fi
  done
  # One line per statement, whatever the harness printed in front of it. Pytest prints a skip twice.
  grep -hoE 'NOT RUN: .*' "$logs"/*.log | sort -u >"$logs/not-run.txt" || true
  if [ -s "$logs/not-run.txt" ]; then
    echo "kvlane: these could not run here"
    sed 's/^/  /' "$logs/not-run.txt"
  fi
  exit 0
fi

name=$1
shift
echo "=== $name: $*"
started_s=$SECONDS
status=0
"$@" 2>&1 </dev/null | tee "$logs/$name.log" || status=$?
outcome=passed
[ "$status" -eq 0 ] || outcome="FAILED (status $status)"
printf '  %-20s %-20s %5d s\n' "$name" "$outcome" "$((SECONDS - started_s))" >"$logs/$name.result"
echo "=== $name: $outcome after $((SECONDS - started_s)) s"
exit "$status"
