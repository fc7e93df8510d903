#!/usr/bin/env bash
# Fuzzes the parsers of what others can write: files of a shared folder, frames of peers.
#
#   tests/fuzz/run.sh SECONDS [SEED]
#
# Needs a nightly compiler for the address sanitizer; without one it says NOT RUN and ends well (.ci/run does not).
# KVLANE_SOAK=1 also writes tests/results/soak-fuzz.json. A finding lies in target/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=${1:?usage: tests/fuzz/run.sh SECONDS [SEED]}
seed=${2:-1}

not_run() {
  echo "NOT RUN: fuzz: $1"
  exit 0
}

cargo +nightly --version >/dev/null 2>&1 || not_run "no nightly Rust toolchain (rustup toolchain install nightly)"
command -v c++ >/dev/null || not_run "libFuzzer needs a C++ compiler called c++"

make --no-print-directory .tools/bin/cargo-fuzz
export PATH="$PWD/.tools/bin:$PATH"
mkdir -p target/fuzz

# Fuzzes one target. The corpus grows under target; every run starts with an empty one, so that a seed names a run.
fuzz() {
  local target=$1 status=0 executed
  local corpus=target/fuzz/corpus/$target artifacts=target/fuzz/artifacts/$target
  rm -rf "$corpus" "$artifacts"
  mkdir -p "$corpus" "$artifacts"
  cargo +nightly fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz/build "$target" "$corpus" -- \
    -seed="$seed" -max_total_time="$seconds" -max_len=16384 -print_final_stats=1 \
    -artifact_prefix="$PWD/$artifacts/" 2>&1 | tee target/fuzz/output.txt |
    grep -vE '^#[0-9]|NEW_FUNC|NEW_PC|Recommended dictionary|^"' || status=$?

  executed=$(sed -n 's/^stat::number_of_executed_units: *//p' target/fuzz/output.txt)
  if [ "$status" -eq 0 ] && [ "${executed:-0}" -lt 1000 ]; then
    echo "fuzz: only ${executed:-0} inputs ran in $seconds s" >&2
    status=1
  fi
  if [ "${KVLANE_SOAK:-0}" = 1 ]; then
    mkdir -p tests/results
    printf '{"campaign":"fuzz","target":"%s","seed":%d,"seconds":%d,"counts":{"executed":%d},"outcome":"%s"}\n' \
      "$target" "$seed" "$seconds" "${executed:-0}" "$([ "$status" -eq 0 ] && echo passed || echo failed)" \
      >"tests/results/soak-fuzz${2:+-$2}.json"
  fi
  echo "fuzz: $target, seed $seed, $seconds s, ${executed:-0} inputs, status $status"
  return "$status"
}

failed=0
fuzz segment_format || failed=1
fuzz p2p_frames p2p || failed=1
exit "$failed"
