#!/usr/bin/env bash
# Says what a target will need, and names everything that is missing in one message, before anything is downloaded.
#
#   tests/env/preflight.sh demo|test|lint|wheel|bench
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=${1:?usage: tests/env/preflight.sh TARGET}
missing=()

at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# Gigabytes that each environment and the build outputs take once they are there (measured, rounded up). All of them
# together are what the README says.
disk_gb() {
  local total_gb=0
  [ -e .venv/.kvlane-ready ] || total_gb=$((total_gb + 7))
  [ -e target/make/wheel ] || total_gb=$((total_gb + 1))
  if [ "$target" = test ]; then
    [ -e .venv-vllm-0.15.0/.kvlane-ready ] || total_gb=$((total_gb + 8))
  fi
  if [ "$target" = bench ]; then
    [ -e .venv-peers-p2p/.kvlane-ready ] || total_gb=$((total_gb + 1))
  fi
  if [ "$target" = test ] || [ "$target" = lint ]; then
    [ -e target/debug ] || total_gb=$((total_gb + 5))
  fi
  echo "$total_gb"
}

# How long the first run takes on two cores; a later one reuses environments and builds. lint was measured from nothing at
# 7 minutes 18 seconds, and making the wheel is a part of it; the limit of test is the one that CI has.
first_run() {
  case $target in
  lint) echo "about 8 minutes" ;;
  wheel) echo "less than 8 minutes" ;;
  demo) echo "about 10 minutes" ;;
  test) echo "up to 30 minutes" ;;
  *) echo "longer than that of test, up to hours" ;;
  esac
}

check_rust() {
  local needed found
  needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  command -v cargo >/dev/null || missing+=("cargo: install stable Rust $needed or newer (rustup, or the distribution's package)")
  if ! command -v rustc >/dev/null; then
    missing+=("rustc: comes with cargo")
  elif found=$(rustc --version 2>/dev/null | awk '{print $2}') && [ -n "$found" ]; then
    at_least "$needed" "$found" || missing+=("rustc $needed or newer: found $found (rustup update stable)")
  else
    missing+=("rustc that starts: 'rustc --version' failed (rustup toolchain install stable)")
  fi
}

check_rust_lint() {
  cargo fmt --version >/dev/null 2>&1 || missing+=("rustfmt: rustup component add rustfmt")
  cargo clippy --version >/dev/null 2>&1 || missing+=("clippy: rustup component add clippy")
}

check_python() {
  [ -e .venv/.kvlane-ready ] && return
  local candidate
  for candidate in ${KVLANE_PYTHON:-} python3.12 python3.11 python3 python; do
    "$candidate" -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info[:2] <= (3, 12)' 2>/dev/null && return
  done
  missing+=("Python 3.11 or 3.12 with venv (python3.12 and python3.12-venv on Debian and Ubuntu), or KVLANE_PYTHON=/path/to/it")
}

check_linker() {
  local candidate
  for candidate in cc gcc clang; do
    command -v "$candidate" >/dev/null && return
  done
  missing+=("a C compiler and linker called cc (build-essential on Debian and Ubuntu)")
}

check_disk() {
  local needed_gb=$1 free_gb
  free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free_gb" -ge "$needed_gb" ] || missing+=("disk: $needed_gb GB are needed below $PWD, $free_gb GB are free")
}

needed_gb=$(disk_gb)
check_rust
[ "$target" = lint ] && check_rust_lint
check_python
check_linker
check_disk "$needed_gb"

if [ "$(uname -s)" != Linux ]; then
  missing+=("Linux: this is $(uname -s)")
fi

if [ "${#missing[@]}" -gt 0 ]; then
  {
    echo "kvlane: make $target cannot start. Missing:"
    printf '  - %s\n' "${missing[@]}"
  } >&2
  exit 1
fi

if [ "$needed_gb" -gt 0 ]; then
  echo "kvlane: make $target will put up to $needed_gb GB below $PWD (environments with CPU builds of vLLM, Rust builds), and downloads"
  echo "kvlane: from the Python and Rust package registries only. demo and test together take about 21 GB."
  echo "kvlane: the first run of $target on two cores takes $(first_run); later runs reuse all of it."
fi
